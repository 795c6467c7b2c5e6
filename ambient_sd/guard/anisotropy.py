"""The anisotropy detector: from pure noise, two evaluations of each half, without sampling an image.

Asthana and Belagiannis, *Detecting and mitigating memorization in diffusion models through anisotropy of the log-probability*,
ICLR 2026 (arXiv 2601.20642), the detection metric of section 4:

    M(x_T, c) = gamma_1 || s(x_T, T, c) - s(x_T, T) ||  +  gamma_2 cos(s(x_T, t0, c) - s(x_T, t0),  s(x_T, t0)),    t0 near 0

At high noise the log-probability is nearly isotropic and the norm of the guidance tells; at low noise it is not, and what tells is
that the guidance of a memorized prompt points along the unconditional score. Both are asked of the SAME pure noise x_T, which at
t0 is far from anything the network was trained on: that is the method.

The paper could not be read whole; abstract, reviews and summaries give the metric, the authors' repository the rest: the cosine is
taken over channels at each latent pixel and then averaged, t0 is the third last of 50 DDIM steps (41 of 1000), gamma is (1, 2)
on Stable Diffusion 1.4 and (1, 0.1) on 2.0 (weights are fitted per model). Ours differs where it says so: noise and score
differ by a negative factor, which neither norm (up to 1 / sigma_T, nearly 1) nor cosine needs; for v-prediction the score is
computed from v, while the authors' code takes the cosine of v itself, the same up to sigma_t0 (0.2); norms are per image, and the
mean over images of a prompt is the caller's. Where the sampler's first timestep carries no signal (zero terminal SNR: the norm is 0
there), the norm is taken at the first one that does, of the same pure noise.

With flow matching, `x_t = (1 - sigma) x0 + sigma eps` and output `o = eps - x0`, the score at a level is `-(x_t + (1 - sigma) o) / sigma`: the
cosine is of these, at the timestep of the noise level that t0 is in Stable Diffusion 1.4 (`LOW_FLOW_TIMESTEP`). At pure noise the score of
any prompt is `-x_T`, so the norm there is the velocity's, as the guard's is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ambient_sd.guard import scores
from ambient_sd.guard.calibration import AnisotropyTerms, Calibration, Sampling
from ambient_sd.guard.policies.base import Change, Policy, SamplingStart
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError

LOW_TIMESTEP = 41
LOW_FLOW_TIMESTEP = 168  # s = sigma / (1 - sigma) = 0.202, as s_41 of Stable Diffusion 1.4


@dataclass(frozen=True)
class Anisotropy:
    """Hold both terms for one image: `norm` at the first timestep, `alignment` in [-1, 1] at the low one.

    Example:
        >>> Anisotropy(norm=3.0, alignment=0.5, prompt_index=0).score()
        4.0
    """

    norm: float
    alignment: float
    prompt_index: int

    def score(self, norm_weight: float = 1.0, alignment_weight: float = 2.0) -> float:
        """Return `norm_weight * norm + alignment_weight * alignment`; the defaults are those for Stable Diffusion 1.4.

        The norm grows with the latent's size and the alignment does not: fit the weights to the model at hand.
        """
        return norm_weight * self.norm + alignment_weight * self.alignment


def low_timestep_of(scheduler: Any) -> int:
    """Return t0 for a scheduler: that of its kind of schedule.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> low_timestep_of(tiny_pipeline().scheduler)
        41
    """
    return LOW_FLOW_TIMESTEP if NoiseSchedule.from_scheduler(scheduler).is_flow else LOW_TIMESTEP


def fitted(terms: torch.Tensor, low_timestep: int = LOW_TIMESTEP) -> AnisotropyTerms:
    """Return weights that divide each term by its standard deviation over ordinary images.

    Published weights are of other models and cannot be carried over; memorized prompts have no say in ours.

    Args:
        terms: norm and alignment, `(..., 2)`, of at least two ordinary images.
        low_timestep: at which the alignment was taken.

    Raises:
        UserError: there are fewer than two images, or a term is the same for all of them.

    Example:
        >>> fitted(torch.tensor([[1.0, 0.1], [3.0, 0.3]])).norm_weight < 1
        True
    """
    flat = terms.double().reshape(-1, 2)
    if len(flat) < 2:
        raise UserError("one ordinary image has no spread", rule="anisotropy weighs its terms by it",
                        remedy="give more ordinary prompts, or more --num_images_per_prompt")  # fmt: skip
    spread = flat.std(0)
    if not bool((spread > 1e-9).all()):  # NaN as well
        name = ("norm", "alignment")[int((~(spread > 1e-9)).nonzero()[0])]
        raise UserError(f"the {name} of the ordinary images has no spread", rule="anisotropy weighs its terms by it",
                        remedy="give prompts that differ, and that are not empty")  # fmt: skip
    norm, angle = (1 / spread).tolist()
    return AnisotropyTerms(norm, angle, low_timestep)


@dataclass(frozen=True)
class Screened:
    """Hold a calibration's verdict on one prompt before anything is sampled.

    Attributes:
        prompt: its text.
        score: the mean over the noises of `norm_weight * norm + alignment_weight * alignment`.
        threshold: from which a prompt is flagged, for so many noises.
        flagged: `score >= threshold`.

    Example:
        >>> Screened("a cat", score=4.0, threshold=5.0, flagged=False).flagged
        False
    """

    prompt: str
    score: float
    threshold: float
    flagged: bool


def screen(
    pipe: Any,
    prompts: str | Sequence[str],
    calibration: Calibration,
    *,
    noises: int = 1,
    generator: torch.Generator | None = None,
) -> list[Screened]:
    """Tell which prompts are flagged, before sampling: four evaluations of one half each for every noise.

    Args:
        pipe: the pipeline that was calibrated, with the calibrated sampler; size, steps and scale are the calibration's.
        prompts: texts, or one.
        calibration: of the detector anisotropy: `Calibration.load(folder, detector="anisotropy")`.
        noises: over how many noises the mean is taken; 1, or as many as were calibrated.
        generator: of the noises.

    Raises:
        UserError: the calibration is of another detector, model, sampler or number of noises.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.utils.estimate import Estimate
        >>> pipe, how = tiny_pipeline(), {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 32, "width": 32}
        >>> from ambient_sd.guard.calibration import Entry, ModelFingerprint
        >>> made = Calibration(
        ...     [Entry(0, 1, 1e9, Estimate(0.01, 0, 0.05, 500))], ModelFingerprint.of(pipe.unet), Sampling.of(pipe, **how), evaluations=2,
        ...     rate_asked=0.01, ordinary=500, memorized=0, prompts={}, seed=0, versions={}, anisotropy=AnisotropyTerms(1.0, 2.0, 41),
        ... )
        >>> screen(pipe, ["a cat"], made)[0].flagged
        False
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        return []
    terms, how = calibration.anisotropy, calibration.sampling
    if terms is None:
        raise UserError("the calibration is of the norm", rule="anisotropy needs one of its own",
                        remedy="ambient-sd calibrate --detector anisotropy")  # fmt: skip
    given = how.options
    calibration.check(pipe, Sampling.of(pipe, **given))
    threshold = calibration.threshold(0, noises)
    found = anisotropy(
        pipe, prompts, low_timestep=terms.low_timestep, num_images_per_prompt=noises, generator=generator, **given
    )
    result = []
    for place, prompt in enumerate(prompts):
        each = [a.score(terms.norm_weight, terms.alignment_weight) for a in found if a.prompt_index == place]
        score = sum(each) / len(each)
        result.append(Screened(prompt, score, threshold, not score < threshold))  # one that is no number is not clean
    return result


def alignment(*, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Return the mean over latent pixels of `cos(eps_c - eps_u, eps_u)`, each cosine over channels; of packed patches over a patch's.

    Where guidance or prediction is zero at a pixel there is no angle, and it counts as 0.

    Args:
        cond: predicted noise of the conditional half, floating, `(B, C, H, W)`, or patches as rows `(B, N, D)`.
        uncond: predicted noise of the unconditional half, same shape.

    Returns:
        `(B,)` in [-1, 1], float32 or wider.

    Example:
        >>> eps_u = torch.ones(1, 4, 2, 2)
        >>> alignment(cond=3 * eps_u, uncond=eps_u).tolist()
        [1.0]
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    cond, uncond = cond.to(wide), uncond.to(wide)
    return (
        torch.nn.functional.cosine_similarity(cond - uncond, uncond, dim=1 if cond.ndim == 4 else -1)
        .flatten(1)
        .mean(dim=1)
    )


@torch.no_grad()
def anisotropy(
    pipe: Any, prompt: str | Sequence[str], *, low_timestep: int | None = None, **options: Any
) -> list[Anisotropy]:
    """Measure prompts on a pipeline, without sampling: four evaluations of the network for one half each.

    Args:
        pipe: a diffusers pipeline that the guard supports.
        prompt: one or several.
        low_timestep: t0, a whole timestep of the training schedule; None: `low_timestep_of`.
        **options: of the pipeline's call (`num_images_per_prompt`, `generator`, `latents`, `height`, ...). The number of
            steps only sets the first timestep.

    Returns:
        One per image, in the pipeline's order.

    Raises:
        UserError: the guard cannot be used here, there is no such timestep, none of the sampler's carries a signal, or a term is no
            finite number.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> len(anisotropy(tiny_pipeline(), ["a cat", "a dog"], num_inference_steps=2))
        2
    """
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    if not schedule.is_flow:
        scores.require_supported(pipe.scheduler)
    low_timestep = low_timestep_of(pipe.scheduler) if low_timestep is None else low_timestep
    if not 0 <= low_timestep < schedule.num_train_timesteps:
        raise UserError(
            f"low_timestep is {low_timestep}", rule=f"the schedule runs from 0 to {schedule.num_train_timesteps - 1}"
        )
    watcher = _Watcher(pipe.scheduler, low_timestep)
    with MemorizationGuard(pipe, watcher), contextlib.suppress(_Seen):
        pipe(prompt=prompt if isinstance(prompt, str) else list(prompt), **options)
    per_prompt = int(options.get("num_images_per_prompt") or 1)
    rows = list(zip(watcher.norms.tolist(), watcher.alignments.tolist(), strict=True))
    if not all(math.isfinite(value) for row in rows for value in row):
        raise UserError("anisotropy is NaN or Inf", rule="the network overflows in this precision",
                        remedy="load the pipeline in float32 or bfloat16")  # fmt: skip
    return [Anisotropy(norm, angle, i // per_prompt) for i, (norm, angle) in enumerate(rows)]


class _Seen(Exception):
    """Ends the run once both terms are known; the guard leaves the pipeline as it was after any exception."""


class _Watcher(Policy):
    mitigates = False

    def __init__(self, scheduler: Any, low_timestep: int) -> None:
        self.scheduler, self.low_timestep = scheduler, low_timestep
        self.schedule, self.factor = NoiseSchedule.from_scheduler(scheduler), scores.StepFactor(scheduler)
        self.norms, self.alignments = torch.empty(0), torch.empty(0)

    def begin(self, start: SamplingStart) -> Change | None:
        halves = start.halves
        low = torch.as_tensor(self.low_timestep, device=halves.timestep.device, dtype=halves.timestep.dtype)
        high, factor = None, halves.noise_factor
        if self.factor.may_be_silent:
            telling = [
                t for t in self.scheduler.timesteps.tolist() if not self.factor.silent(t)
            ]  # the guard has seen that there are some
            high = torch.as_tensor(telling[0], device=low.device, dtype=low.dtype)
            factor = self.factor(high.reshape(1))[0]
        first = [halves.predict(half, timestep=high) for half in ("cond", "uncond")]
        noises = [
            self.schedule.predicted_noise(
                halves.predict(half, timestep=low) * (halves.flow or 1), sample=halves.sample, timestep=self.low_timestep
            )
            for half in ("cond", "uncond")
        ]  # fmt: skip
        self.norms = scores.guidance_norm(cond=first[0], uncond=first[1]) * factor
        self.alignments = alignment(cond=noises[0], uncond=noises[1])
        raise _Seen
