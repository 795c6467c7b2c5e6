"""Wen et al.'s detection score, how strongly a prompt pulls one denoising step, as pure functions.

`d = || eps_c - eps_u ||_2` per image, over channels and pixels, not squared (Wen, Liu, Chen, Lyu, *Detecting,
explaining, and mitigating memorization in diffusion models*, ICLR 2024, section 3). Networks that do not predict the
noise need a factor. With `x_t = alpha_t x0 + sigma_t eps` both halves of guidance share `x_t`, so it cancels:

    epsilon:  eps_c - eps_u =                      o_c - o_u
    v:        eps_c - eps_u = alpha_t             (o_c - o_u)      eps = alpha_t v + sigma_t x_t
    sample:   eps_c - eps_u = -(alpha_t / sigma_t) (o_c - o_u)     eps = (x_t - alpha_t x0) / sigma_t

The published code takes the norm of the outputs in any parametrisation, so its figures and targets for v-prediction models
(SD2.0, 2.1) are of `|| v_c - v_u ||`: that is the score space "output", with the factor 1 at every step. Ours, "noise", is the default:
alpha_t is 0.07 at the first step and 1 at the last, and the first steps dominate a raw score.

The space "unguided" is for runs without an unconditional half, because guidance is off or an input of the network (FLUX.1 dev): the
norm is that of the conditional prediction against the empty prompt's, for which the network is asked once more at each step.

Where alpha_t is 0 (the last timestep at zero terminal SNR, the first that trailing steps sample) `x_t` holds no image and the
score of every prompt is 0: such a step carries no signal (`NO_SIGNAL`) and takes no part in curve, score or decision.

This module knows no pipeline, no threshold and no average over steps.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

Space = Literal["noise", "output", "unguided"]
SPACES: tuple[Space, ...] = ("noise", "output", "unguided")
Quantity = Literal["noise", "velocity", "output", "unguided"]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# alpha_t below this: the step carries no signal. Stable Diffusion's own schedules start at 0.068; zero terminal SNR is 0, which
# some samplers of diffusers write as 2**-12.
NO_SIGNAL = 1e-3


def guidance_norm(*, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Return `|| o_c - o_u ||_2` for each image, in the network's own parametrisation.

    Args:
        cond: output of the conditional half, floating, `(B, C, H, W)`.
        uncond: output of the unconditional half, same shape.

    Returns:
        `(B,)` tensor on the same device, float32 or wider: half-precision outputs are summed in float32.

    Example:
        >>> guidance_norm(cond=torch.ones(1, 4, 2, 2), uncond=torch.zeros(1, 4, 2, 2)).tolist()
        [4.0]
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    return torch.linalg.vector_norm((cond.to(wide) - uncond.to(wide)).flatten(1), dim=1)


def noise_factor(scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """Return what turns `|| o_c - o_u ||` into `|| eps_c - eps_u ||` at each timestep: 1, alpha_t or alpha_t / sigma_t.

    Fractional timesteps (Euler with Karras sigmas, "linspace" spacing) lie between two entries of the schedule; the
    noise level s = sigma / alpha is interpolated linearly between them, which is how those samplers define them.

    Args:
        scheduler: a diffusers scheduler with `alphas_cumprod`; its `prediction_type` selects the formula.
        timesteps: `(S,)`, in `[0, num_train_timesteps - 1]`, integer or fractional.

    Returns:
        `(S,)` float64 tensor on the CPU.

    Raises:
        UserError: the schedule is not variance preserving, or predicts something else than noise, v or the sample.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> noise_factor(DDIMScheduler(prediction_type="v_prediction"), torch.tensor([0])).round(decimals=3).tolist()
        [1.0]
    """
    schedule = require_supported(scheduler)
    return _factor(schedule.prediction_type, _level(schedule, timesteps.detach().to("cpu", torch.float64)))


class StepFactor:
    """What turns `|| o_c - o_u ||` into the score, for one sampling run: computed on the device, without a transfer.

    As `noise_factor`. With flow matching (`x_t = (1 - sigma) x0 + sigma eps`, output `eps - x0`) the factor to noise would
    be `1 - sigma`, which is 0 at the first step: there the score is the velocity's, factor 1, at every step.

    Args:
        scheduler: a diffusers scheduler, variance preserving or flow matching.
        space: "noise" or "unguided", or "output": the outputs as they are, factor 1 at every step.

    Attributes:
        quantity: "noise", "velocity", "output" or "unguided".
        flow: whether the schedule is one of flow matching.
        epsilon: whether the network predicts the noise itself.

    Raises:
        UserError: the score is not defined for this scheduler.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> factor = StepFactor(DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))
        >>> factor.quantity, factor.silent(999.0), factor.silent(0.0)
        ('noise', True, False)
    """

    def __init__(self, scheduler: Any, space: Space = "noise") -> None:
        self.quantity: Quantity = space
        self.epsilon = False
        self._last_signal: float | None = None
        self._levels: torch.Tensor | None = None
        schedule = NoiseSchedule.from_scheduler(scheduler)
        self.flow = schedule.is_flow
        if self.flow:
            self.quantity = "unguided" if space == "unguided" else "velocity"
            return
        self._prediction_type = require_supported(scheduler).prediction_type
        self.epsilon = self._prediction_type == "epsilon"
        if space == "output":  # whatever a step holds, the outputs differ or do not
            return
        # alpha falls with t: the timesteps without a signal are the last ones.
        silent = int((schedule.alpha(torch.arange(schedule.num_train_timesteps)) < NO_SIGNAL).sum())
        self._last_signal = float(schedule.num_train_timesteps - silent - 1) if silent else None
        if self._prediction_type != "epsilon":
            self._levels = schedule.level(torch.arange(schedule.num_train_timesteps))

    @property
    def may_be_silent(self) -> bool:
        """Say whether any timestep of the schedule carries no signal."""
        return self._last_signal is not None

    def silent(self, timestep: float) -> bool:
        """Say whether a timestep, in the scheduler's units, carries no signal: `alpha_t < NO_SIGNAL`."""
        return self._last_signal is not None and timestep > self._last_signal

    def __call__(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the factor at timesteps `(S,)` in the scheduler's units: `(S,)` float32 on their device."""
        if self._levels is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        wide = torch.float32 if timesteps.device.type == "mps" else torch.float64
        self._levels = send(self._levels.to(wide), timesteps.device)  # once: afterwards it is there
        last = len(self._levels) - 1
        t = timesteps.to(wide).clamp(0, last)
        below, part = t.floor(), t - t.floor()
        low = self._levels[below.long()]
        high = self._levels[(below.long() + 1).clamp(max=last)]
        s = torch.where(part == 0, low, (1 - part) * low + part * high)
        return _factor(self._prediction_type, s).float()


def require_supported(scheduler: Any) -> NoiseSchedule:
    """Return the noise schedule of a scheduler, or raise a `UserError` when the score is not defined for it.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> require_supported(DDIMScheduler()).prediction_type
        'epsilon'
    """
    schedule = NoiseSchedule.from_scheduler(scheduler)
    if schedule.is_flow or schedule.prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"{type(scheduler).__name__} with prediction type {schedule.prediction_type}",
            rule=f"the score is defined for a variance-preserving schedule with {', '.join(PREDICTION_TYPES)}",
            remedy="set pipe.scheduler to DDIM, DPM++, Euler or PNDM, as the model was trained",
        )
    return schedule


def _factor(prediction_type: str, s: torch.Tensor) -> torch.Tensor:
    if prediction_type == "epsilon":
        return torch.ones_like(s)
    return 1 / torch.sqrt(1 + s * s) if prediction_type == "v_prediction" else 1 / s


def _level(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """Return the noise level s_t, linear between the schedule's whole timesteps."""
    below, above = schedule.level(t.floor().long()), schedule.level(t.ceil().long())
    part = t - t.floor()
    # On a whole timestep the entry itself: with zero terminal SNR the last one is infinite, and inf * 0 is no number.
    return torch.where(part == 0, below, (1 - part) * below + part * above)
