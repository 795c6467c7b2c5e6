"""Ambient diffusion as a corrupted input, a corrected target and a weight, for any trainer.

Algorithm 1 of Shah, Kalavasis, Klivans, Daras, "Does Generation Require Memorization?" (ICML 2025), in noise levels
`s = sigma / alpha`. Every image has ONE noisy version, `x_n = alpha_n x0 + sigma_n eps_n`, at the noise level s_n.

    s_t <= s_n    x_t = alpha_t x0 + sigma_t xi                     ordinary denoising of the clean image
    s_t >  s_n    x_t = (alpha_t / alpha_n) x_n + c xi              c = sigma_t sqrt(a),  a = 1 - s_n^2 / s_t^2
                  loss = || a h + (1 - a) y_t - y_n ||^2            y = x / alpha,  h = predicted x0

With y_n = x0 + s_n eps_n, the second loss is an ordinary one on a corrected pair (eps*, x0*):

    eps* = xi / sqrt(a)        x0* = y_n - s_n^2 xi / (s_t sqrt(a))        so that x_t = alpha_t x0* + sigma_t eps*
    || a h + (1 - a) y_t - y_n ||^2 = a^2 s_t^2 || eps_hat - eps* ||^2

so the target is what diffusers computes from (eps*, x0*) and the weight is a^q. Derivation: docs/maths.md.

Fine-tuning can do without images above a level: there the target is what the base itself predicts from x_t ("distill"), which
`CorruptedBatch.distilled` marks and the caller fills in.

It does not reduce the loss, choose timesteps, draw eps_n (`ambient_sd.data.noise`), or change the sampler.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from ambient_sd.schedule import PREDICTION_TYPES, NoiseSchedule
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

MODES = ("ambient", "plain", "gap", "weighted", "distill")


@dataclass(frozen=True)
class CorruptedBatch:
    """Hold what one training step needs.

    Attributes:
        x_t: (B, ...) network input, dtype of x0.
        target: (B, ...) what the network should return, dtype of x0; NaN where it is to be the base's prediction.
        weight: (B,) factor of each sample's loss; float32, or float64 if x0 is.
        clean: (B,) bool, True where x_t and target were made from the clean image.
        noise: (B, ...) the fresh noise xi, dtype of x0.
        distilled: (B,) bool, True where the target is to be the base's prediction; None where none is.

    Example:
        >>> objective = AmbientObjective(NoiseSchedule(2, "epsilon", torch.tensor([0.8, 0.2])), mode="plain")
        >>> x0, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
        >>> batch = objective.corrupt(x0, None, torch.tensor([1]), noise=noise)
        >>> output = torch.zeros_like(batch.x_t)  # of the network
        >>> float(batch.weight * (output - batch.target).square().mean())
        1.0
    """

    x_t: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor
    distilled: torch.Tensor | None = None

    def with_base(self, prediction: torch.Tensor) -> CorruptedBatch:
        """Return the batch with the base's prediction as the target of the distilled samples.

        Args:
            prediction: (N, ...) what the base's network returns for `x_t[distilled]`, without gradient.

        Example:
            >>> objective = AmbientObjective(NoiseSchedule(2, "epsilon", torch.tensor([0.8, 0.2])), mode="distill", level=1.0)
            >>> batch = objective.corrupt(torch.zeros(2, 4, 2, 2), None, torch.tensor([0, 1]))
            >>> batch.distilled.tolist()
            [False, True]
            >>> bool((batch.with_base(torch.full((1, 4, 2, 2), 7.0)).target[1] == 7).all())
            True
        """
        if self.distilled is None:
            return self
        rows = self.distilled.nonzero().flatten()
        wanted = (len(rows), *self.target.shape[1:])
        if prediction.shape != wanted:
            raise UserError(
                f"the base's prediction has shape {tuple(prediction.shape)}",
                rule=f"it must be that of x_t[distilled], {wanted}",
            )
        device = prediction.device
        target = send(self.target, device).index_copy(0, send(rows, device), prediction.detach().to(self.target.dtype))
        return dataclasses.replace(self, target=target, distilled=None)


class AmbientObjective:
    """Turn clean latents, their fixed noise and timesteps into input, target and weight.

    Args:
        schedule: the model's noise schedule.
        level: noise level s_n >= 0; 0 gives the plain loss, bit for bit. A timestep is ambient if level(t) > s_n.
        timestep: the same as `level=schedule.level(timestep)`; exactly one of the two (neither is needed by "plain").
        prediction_type: epsilon, v_prediction, sample or flow_prediction; the schedule's own if not given.
        reweight: q of the weight a^q. 2 is the paper's loss and its released code, which hardly trains the band just
            above s_n; 1 is the noise-target loss of "Consistent Diffusion Meets Tweedie"; 0 removes the weight: the
            variance of the target, 1/a, is then unbounded just above s_n.
        mode: "ambient"; "plain", the ordinary loss, which ignores `level` and eps_n; "gap", the ordinary loss with
            weight zero where level < s_t <= gap_upper ("Two Calm Ends and the Wild Middle", arXiv 2602.17846);
            "weighted", the ordinary loss of the clean image with the weight a^q where s_t > level: the control that
            shares ambient's under-trained band, but not its target; or "distill", the ordinary loss up to `level`, and
            where s_t > distill_level the distance to the base's own prediction on the same input.
        gap_upper: upper noise level of the gap, above `level`; only with "gap".
        distill_level: noise level above which the base's prediction is the target, at least `level`, which it is if not
            given; between the two the loss is the ambient one. Only with "distill".

    Raises:
        UserError: an argument breaks its rule; before any tensor is touched.

    Example:
        >>> objective = AmbientObjective(NoiseSchedule(2, "epsilon", torch.tensor([0.8, 0.2])), level=1.0)
        >>> x0, eps_n = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
        >>> batch = objective.corrupt(x0, eps_n, torch.tensor([0, 1]))
        >>> batch.clean.tolist(), [round(float(w), 4) for w in batch.weight]
        ([True, False], [1.0, 0.5625])
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        level: float | None = None,
        timestep: float | None = None,
        prediction_type: str | None = None,
        reweight: int = 2,
        mode: str = "ambient",
        gap_upper: float | None = None,
        distill_level: float | None = None,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"objective {mode!r} is unknown", remedy=f"use one of {', '.join(MODES)}")
        if reweight not in (0, 1, 2):
            raise UserError(f"reweight is {reweight}", rule="it must be 2 (the paper's loss), 1 or 0")
        self.schedule = schedule
        self.mode = mode
        self.reweight = reweight
        self.prediction_type = _check_prediction_type(schedule, prediction_type)
        self.level = 0.0 if mode == "plain" else _noise_level(schedule, level, timestep)
        self.gap_upper = _check_gap(mode, self.level, gap_upper)
        self.distill_level = _check_distill(mode, schedule, self.level, distill_level)

    @property
    def uses_noise(self) -> bool:
        """Tell whether some loss needs the fixed noise of each image; at level 0 the ambient run is the plain one."""
        upper = math.inf if self.mode == "ambient" else self.distill_level or 0.0
        return 0 < self.level < upper

    def corrupt(
        self,
        x0: torch.Tensor,
        eps_n: torch.Tensor | None,
        timesteps: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
    ) -> CorruptedBatch:
        """Corrupt clean latents to `timesteps` and return input, target and weight.

        One fresh noise of x0's shape and dtype is drawn whatever the timesteps are, as a plain trainer does: the
        random stream does not depend on the objective. Arithmetic is float32, or float64 for float64 latents.

        Args:
            x0: (B, ...) clean latents, scaled as the network sees them, floating point.
            eps_n: (B, ...) the ONE noise of each image (`image_noise`); may be None if nothing can be ambient.
            timesteps: (B,) long, or float for flow matching, as the network receives them.
            generator: source of the fresh noise, on x0's device or the CPU.
            noise: the fresh noise itself, instead of drawing it.

        Returns:
            A `CorruptedBatch`; the loss of sample b is `weight[b] * mean((output[b] - target[b])^2)`.

        Raises:
            UserError: shapes disagree, eps_n is missing, or float16 cannot hold the target (looked at on the CPU only).
        """
        uses_noise = self.uses_noise
        _check_batch(x0, eps_n, timesteps, noise, eps_n_needed=uses_noise)
        if noise is None:
            noise = randn_tensor(tuple(x0.shape), generator=generator, device=x0.device, dtype=x0.dtype)
        work = torch.float64 if x0.dtype == torch.float64 else torch.float32

        def per_sample(values: torch.Tensor) -> torch.Tensor:
            return values.to(x0.device, work).reshape(-1, *[1] * (x0.ndim - 1))

        alpha, sigma = (per_sample(v) for v in self.schedule.coefficients(timesteps, work))
        level_t = self.schedule.level(timesteps)
        beyond = level_t > self.level
        distilled = None if self.distill_level is None else level_t > self.distill_level
        ambient = beyond & uses_noise if distilled is None else beyond & ~distilled
        clean = ~ambient
        # Clean rows have s_n = 0 and any s_t (1); an infinite s_t gives ratio 0. So a, 1 / sqrt(a) and the rest are
        # finite as they stand: there is no 0/0 at s_t = s_n, 0 or infinity that a mask would have to hide.
        s_n = torch.zeros_like(level_t).masked_fill(ambient, self.level)
        ratio = s_n / level_t.masked_fill(clean, 1.0)
        # Both factors are exact to a rounding, so a > 0 wherever s_t > s_n, however close.
        a = (1.0 - ratio) * (1.0 + ratio)
        root = a.sqrt()
        if x0.dtype == torch.float16 and root.device.type == "cpu" and bool((root < 1.0 / 8192).any()):
            raise UserError(
                f"noise level {self.level} lies a rounding error below that of a timestep",
                rule="the target there does not fit float16",
                remedy="give timestep= in place of level=, or x0 in float32",
            )

        xi, y_n = noise.to(work), x0.to(work)
        if uses_noise and eps_n is not None:
            y_n = y_n + per_sample(s_n) * eps_n.to(work)
        x_t = alpha * y_n + sigma * per_sample(root) * xi
        eps_star = per_sample(1.0 / root) * xi
        x0_star = y_n - per_sample(s_n * ratio / root) * xi
        if self.prediction_type == "epsilon":
            target = eps_star
        elif self.prediction_type == "sample":
            target = x0_star
        elif self.prediction_type == "v_prediction":
            target = alpha * eps_star - sigma * x0_star
        else:
            target = eps_star - x0_star
        if distilled is not None:  # until `with_base` fills it in: what is forgotten shows in the first loss
            target = target.masked_fill(per_sample(distilled).bool(), math.nan)
        weight = a**self.reweight
        if self.gap_upper is not None:
            weight = weight.masked_fill(beyond & (level_t <= self.gap_upper), 0.0)
        if self.mode == "weighted":
            ratio = torch.full_like(level_t, self.level).div(level_t).clamp(max=1.0)
            weight = torch.where(beyond, ((1.0 - ratio) * (1.0 + ratio)) ** self.reweight, weight)
        return CorruptedBatch(
            x_t=x_t.to(x0.dtype),
            target=target.to(x0.dtype),
            weight=weight.to(x0.device, work),
            clean=(clean if distilled is None else clean & ~distilled).to(x0.device),
            noise=noise,
            distilled=None if distilled is None else distilled.to(x0.device),
        )


def _check_prediction_type(schedule: NoiseSchedule, prediction_type: str | None) -> str:
    chosen = schedule.prediction_type if prediction_type is None else prediction_type
    if chosen not in PREDICTION_TYPES:
        raise UserError(f"prediction type {chosen!r} is unknown", remedy=f"use one of {', '.join(PREDICTION_TYPES)}")
    if (chosen == "flow_prediction") != schedule.is_flow and chosen in ("flow_prediction", "v_prediction"):
        raise UserError(
            f"prediction type {chosen!r} does not fit this schedule",
            rule="flow_prediction belongs to flow matching, v_prediction to a variance-preserving schedule",
        )
    return chosen


def _noise_level(schedule: NoiseSchedule, level: float | None, timestep: float | None) -> float:
    if (level is None) == (timestep is None):
        raise UserError(
            "the noise level s_n is " + ("missing" if level is None else "given twice"),
            rule="exactly one of level (a noise level) and timestep is needed",
        )
    s_n = float(level) if level is not None else float(schedule.level(timestep if timestep is not None else 0))
    if not (0.0 <= s_n <= schedule.max_level and math.isfinite(s_n)):
        raise UserError(
            f"the noise level s_n is {s_n}",
            rule=f"it must be a finite noise level from 0 to {schedule.max_level:.6g}, the schedule's largest",
            remedy="levels between 0.3 and 4 are usual; 0 is plain training",
        )
    return s_n


def _check_gap(mode: str, level: float, gap_upper: float | None) -> float | None:
    if mode != "gap":
        if gap_upper is not None:
            raise UserError(f"gap_upper is given with objective {mode!r}", rule='it belongs to objective "gap" only')
        return None
    if gap_upper is None or not level < gap_upper < math.inf:
        raise UserError(
            f"gap_upper is {gap_upper}", rule=f"it must be a finite noise level above the lower one, {level}"
        )
    return float(gap_upper)


def _check_distill(mode: str, schedule: NoiseSchedule, level: float, distill_level: float | None) -> float | None:
    if mode != "distill":
        if distill_level is not None:
            raise UserError(
                f"distill_level is given with objective {mode!r}", rule='it belongs to objective "distill" only'
            )
        return None
    if level <= 0:
        raise UserError("the noise level s_n is 0", rule="with distill nothing would be learnt from the images",
                        remedy="give a level above 0; 2.5 is a start")  # fmt: skip
    upper = level if distill_level is None else float(distill_level)
    if not level <= upper < schedule.max_level:
        raise UserError(f"distill_level is {distill_level if distill_level is not None else level}",
                        rule=f"it must lie from the level s_n, {level:g}, to below {schedule.max_level:.6g}, the schedule's largest")  # fmt: skip
    return upper


def _check_batch(
    x0: torch.Tensor,
    eps_n: torch.Tensor | None,
    timesteps: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    eps_n_needed: bool,
) -> None:
    if not x0.is_floating_point():
        raise UserError(f"x0 is {x0.dtype}", rule="latents are floating point")
    if timesteps.shape != x0.shape[:1]:
        raise UserError(
            f"timesteps have shape {tuple(timesteps.shape)}", rule=f"{len(x0)} samples need shape ({len(x0)},)"
        )
    if eps_n_needed and eps_n is None:
        raise UserError("eps_n is missing", rule="the ambient loss needs the fixed noise of each image")
    # Broadcasting would give every image of the batch the same noise without a word.
    for name, tensor in (("eps_n", eps_n if eps_n_needed else None), ("noise", noise)):
        if tensor is not None and tensor.shape != x0.shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}", rule=f"it must be that of x0, {tuple(x0.shape)}")
