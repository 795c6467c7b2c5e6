"""What a fine-tune adds to its base's guidance, asked of pure noise before anything is sampled.

    score = || (eps_c - eps_u) - (eps'_c - eps'_u) ||_2        eps: the fine-tune's, eps': its base's, same noise, time and prompt

Wen et al.'s norm (`scores`) is large for a memorized prompt, and for a plain thing in strong colours that any model knows. What the base
guides alike cannot have come from the fine-tuning images: it is taken out before the norm, at the sampler's first timestep that
carries a signal. Text encoders are the pipeline's own for both networks. It is ours, not published, and needs no weights to be fitted; the
other way to take the base out, of the norms alone, is `relative`. docs/comparison.md has the figures.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from ambient_sd.families import lora, network_of
from ambient_sd.guard import scores
from ambient_sd.guard.anisotropy import Screened
from ambient_sd.guard.base_above import ready_base
from ambient_sd.guard.calibration import Calibration, ModelFingerprint, Sampling
from ambient_sd.guard.policies.base import Change, Policy, SamplingStart
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.utils.errors import UserError


@torch.no_grad()
def beside_base(
    pipe: Any, prompt: str | Sequence[str], base: torch.nn.Module | None = None, **options: Any
) -> list[float]:
    """Score prompts on a fine-tuned pipeline, without sampling: one evaluation of each half, by the fine-tune and by its base.

    Args:
        pipe: a diffusers pipeline that the guard supports.
        prompt: one or several.
        base: the base's network, of the same kind and precision; None: the pipeline's own without its LoRA.
        **options: of the pipeline's call (`num_images_per_prompt`, `generator`, `latents`, `height`, ...). The number of
            steps only sets the first timestep.

    Returns:
        One per image, in the pipeline's order, in the units of `ImageReport.curve`.

    Raises:
        UserError: the guard cannot be used here, there is no LoRA and no base, the two are of another kind, or a score is no finite number.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe, same = tiny_pipeline(seed=1), tiny_pipeline(seed=1)
        >>> beside_base(pipe, "a cat", same.unet, num_inference_steps=2)
        [0.0]
    """
    watcher = _Watcher(pipe, base_of(pipe, base))
    with MemorizationGuard(pipe, watcher), contextlib.suppress(_Seen):
        pipe(prompt=prompt if isinstance(prompt, str) else list(prompt), **options)
    found: list[float] = watcher.norms.tolist()
    if not all(map(math.isfinite, found)):
        raise UserError("a score beside the base is NaN or Inf", rule="one of the networks overflows in this precision",
                        remedy="load both in float32 or bfloat16")  # fmt: skip
    return found


def base_of(pipe: Any, base: Any) -> torch.nn.Module | None:
    """Return the base's network on the fine-tune's device, or None where it is the pipeline's own without its LoRA.

    Raises:
        UserError: there is neither, or the base is refused (`ready_base`).

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe = tiny_pipeline()
        >>> base_of(pipe, tiny_pipeline(seed=1).unet) is None
        False
    """
    network: Any = network_of(pipe)
    network = getattr(network, "_orig_mod", network)
    if base is None:
        fused = int(getattr(pipe, "num_fused_loras", 0))
        if not getattr(network, "peft_config", None) or fused:
            raise UserError("there is no base to compare with", rule="it is the model without its LoRA, which must be loaded and not fused",
                            remedy="load a LoRA, or give the base's network")  # fmt: skip
        return None
    return ready_base(network, base)


def base_fingerprint(pipe: Any, base: torch.nn.Module | None) -> ModelFingerprint | None:
    """Return what tells the base from another; None where it is the pipeline's own network without its LoRA, which the model's own covers.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> base_fingerprint(tiny_pipeline(), tiny_pipeline(seed=1).unet).dtype
        'float32'
    """
    base = base_of(pipe, base)
    return None if base is None else ModelFingerprint.of(base)


def screen(
    pipe: Any,
    prompts: str | Sequence[str],
    calibration: Calibration,
    base: torch.nn.Module | None = None,
    *,
    noises: int = 1,
    generator: torch.Generator | None = None,
) -> list[Screened]:
    """Tell which prompts are flagged, before sampling.

    Args:
        pipe: the pipeline that was calibrated, with the calibrated sampler; size, steps and scale are the calibration's.
        prompts: texts, or one.
        calibration: of the detector beside_base: `Calibration.load(folder, detector="beside_base")`.
        base: as it was calibrated; None: the pipeline's own network without its LoRA.
        noises: over how many noises the mean is taken; 1, or as many as were calibrated.
        generator: of the noises.

    Raises:
        UserError: the calibration is of another detector, model, base, sampler or number of noises.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.guard.calibration import Entry
        >>> from ambient_sd.utils.estimate import Estimate
        >>> pipe, other = tiny_pipeline(seed=1), tiny_pipeline().unet
        >>> how = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 32, "width": 32}
        >>> made = Calibration(
        ...     [Entry(0, 1, 1e9, Estimate(0.01, 0, 0.05, 500))], ModelFingerprint.of(pipe.unet), Sampling.of(pipe, **how), evaluations=2,
        ...     rate_asked=0.01, ordinary=500, memorized=0, prompts={}, seed=0, versions={}, beside_base=True, base=ModelFingerprint.of(other),
        ... )
        >>> screen(pipe, ["a cat"], made, other)[0].flagged
        False
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        return []
    how = calibration.sampling
    if not calibration.beside_base:
        raise UserError(f"the calibration is of the detector {calibration.detector}", rule="beside_base needs one of its own",
                        remedy="ambient-sd calibrate --detector beside_base")  # fmt: skip
    given = how.options
    calibration.check(pipe, Sampling.of(pipe, **given))
    now = base_fingerprint(pipe, base)
    if (now is None) != (calibration.base is None):
        raise UserError("the calibrated threshold does not fit", rule="it was calibrated beside " + ("the model without its LoRA" if calibration.base is None else "a base of its own"),
                        remedy="give the base, or leave it out, as calibrated")  # fmt: skip
    if now is not None and calibration.base is not None and (why := calibration.base.differs(now)):
        raise UserError(
            f"the calibrated threshold does not fit: another base was calibrated: {why}",
            remedy="give that base, or calibrate for this: ambient-sd calibrate --help",
        )
    threshold = calibration.threshold(0, noises)
    found = beside_base(pipe, prompts, base, num_images_per_prompt=noises, generator=generator, **given)
    result = []
    for place, prompt in enumerate(prompts):
        score = sum(found[place * noises : (place + 1) * noises]) / noises
        result.append(Screened(prompt, score, threshold, not score < threshold))  # one that is no number is not clean
    return result


class _Seen(Exception):
    """Ends the run once the scores are known; the guard leaves the pipeline as it was after any exception."""


class _Watcher(Policy):
    mitigates = False
    begins_at_signal = True

    def __init__(self, pipe: Any, base: torch.nn.Module | None) -> None:
        network: Any = network_of(pipe)
        self.network, self.base = getattr(network, "_orig_mod", network), base
        self.norms = torch.empty(0)

    def begin(self, start: SamplingStart) -> Change | None:
        halves = start.halves
        own = halves.predict("cond") - halves.predict("uncond")
        if self.base is None:
            with lora.switched_off(self.network):
                other = halves.predict("cond") - halves.predict("uncond")
        else:
            asked = halves.of(self.base)
            other = asked.predict("cond") - asked.predict("uncond")
        self.norms = scores.guidance_norm(cond=own, uncond=other) * halves.noise_factor
        raise _Seen
