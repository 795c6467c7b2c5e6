"""The noise schedule of a diffusers scheduler: signal `alpha_t`, noise `sigma_t`, level `s_t = sigma_t / alpha_t`.

    x_t = alpha_t x0 + sigma_t eps

Two families. Variance preserving (every scheduler with `alphas_cumprod`): `alpha_t = sqrt(alphas_cumprod[t])`,
`sigma_t = sqrt(1 - alphas_cumprod[t])`, t a whole number. Flow matching: `alpha_t = 1 - t/N`, `sigma_t = t/N`, t the
number that the network is called with (`scheduler.timesteps`, in [0, N], fractions allowed, the shift already in it).
The noise level (Karras et al. 2022 call it sigma) is the one quantity that compares across schedules.

It does not sample: inference-time grids, Karras spacing and the sampler's shifts do not change what is returned here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ambient_sd.utils.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Hold the training noise schedule of one model.

    Args:
        num_train_timesteps: N.
        prediction_type: what the network returns: epsilon, v_prediction, sample or flow_prediction.
        alphas_cumprod: (N,) in the scheduler's own dtype, decreasing; None for flow matching.

    Example:
        >>> schedule = NoiseSchedule(4, "epsilon", torch.tensor([0.9, 0.8, 0.5, 0.2]))
        >>> float(schedule.level(2)), schedule.timestep(1.0)
        (1.0, 2.0)
    """

    num_train_timesteps: int
    prediction_type: str
    alphas_cumprod: torch.Tensor | None = None
    _on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction type {self.prediction_type!r} is unknown",
                remedy=f"use one of {', '.join(PREDICTION_TYPES)}",
            )
        if self.alphas_cumprod is None:
            return
        table = self.alphas_cumprod.double()
        if table.shape != (self.num_train_timesteps,) or not bool(
            ((table >= 0) & (table < 1)).all() and (table.diff() < 0).all()
        ):
            raise UserError(
                "the scheduler's alphas_cumprod does not describe a noise schedule",
                rule="it must hold one value in [0, 1) for each training timestep, each below the one before",
                remedy="check the betas in scheduler_config.json",
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read the training schedule off a diffusers scheduler.

        Args:
            scheduler: any diffusers scheduler with `alphas_cumprod`, or a flow-matching one.

        Raises:
            UserError: it is neither (for example the EDM and variance-exploding ones).
        """
        config = getattr(scheduler, "config", {})
        steps = int(config.get("num_train_timesteps") or 0)
        predicts = config.get("prediction_type")
        if (
            type(scheduler).__name__.startswith("FlowMatch")
            or config.get("use_flow_sigmas")
            or predicts == "flow_prediction"
        ):
            return cls(steps, "flow_prediction")
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, torch.Tensor) or not steps:
            raise UserError(
                f"{type(scheduler).__name__} has no training schedule that can be read",
                rule="it must have alphas_cumprod, or be a flow-matching scheduler",
                remedy="use the scheduler that is saved with the model",
            )
        # A copy: EulerDiscrete and others keep this very tensor and may move or edit it.
        return cls(steps, predicts or "epsilon", table.detach().cpu().clone())

    @property
    def is_flow(self) -> bool:
        """Tell whether alpha + sigma = 1 (flow matching) rather than alpha^2 + sigma^2 = 1."""
        return self.alphas_cumprod is None

    @property
    def max_level(self) -> float:
        """Return the largest noise level that the model is trained at; infinite at zero terminal SNR."""
        return float(self.level(self.num_train_timesteps - (0 if self.is_flow else 1)))

    def coefficients(
        self, timesteps: torch.Tensor | float, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (alpha_t, sigma_t), computed in `dtype` in diffusers' own order of operations.

        A float32 caller gets the very bits of `scheduler.add_noise` in float32, which rounds before the root;
        rounding the float64 root afterwards would differ in the last place.

        Args:
            timesteps: any shape; long in 0..N-1, or for flow matching long or float in [0, N].
            dtype: float32 or float64.

        Returns:
            Two tensors of the shape and device of `timesteps`.

        Raises:
            UserError: timesteps on the CPU lie outside the schedule, or are fractions where whole numbers are needed.
                On other devices values are not looked at: that would stall the device at every training step.
        """
        t = torch.as_tensor(timesteps)
        if t.device.type == "mps" and dtype == torch.float64:
            t = t.cpu()  # no float64 on MPS
        last = self.num_train_timesteps - (0 if self.is_flow else 1)
        # Written so that NaN fails; a negative index would silently read the table from its other end.
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= last)).all()):
            raise UserError(
                f"timestep {_first_outside(t, last)} is outside the schedule", rule=f"it runs from 0 to {last}"
            )
        if self.alphas_cumprod is None:
            sigma = t.to(dtype) / self.num_train_timesteps
            return 1.0 - sigma, sigma
        if t.is_floating_point():
            raise UserError(
                "timesteps are floating point", rule="this schedule is indexed by whole numbers (dtype long)"
            )
        table = self._on_device.get(t.device)
        if table is None:
            table = self._on_device[t.device] = self.alphas_cumprod.to(t.device)
        alphas_cumprod = table[t.long()].to(dtype)
        return alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt()

    def alpha(self, timesteps: torch.Tensor | float) -> torch.Tensor:
        """Return alpha_t in float64, shaped like `timesteps` (see `coefficients`)."""
        return self.coefficients(timesteps)[0]

    def sigma(self, timesteps: torch.Tensor | float) -> torch.Tensor:
        """Return sigma_t in float64, shaped like `timesteps` (see `coefficients`)."""
        return self.coefficients(timesteps)[1]

    def level(self, timesteps: torch.Tensor | float) -> torch.Tensor:
        """Return the noise level s_t = sigma_t / alpha_t in float64, infinite where alpha_t = 0."""
        alpha, sigma = self.coefficients(timesteps)
        if self.is_flow:
            # t / (N - t), for sigma / (1 - sigma) makes t = 800 of 1000 a rounding error noisier than level 4.
            t = sigma * self.num_train_timesteps
            return t / (self.num_train_timesteps - t)
        return sigma / alpha

    def predicted_noise(self, output: torch.Tensor, *, sample: torch.Tensor, timestep: int) -> torch.Tensor:
        """Return the noise that a network's output stands for at a timestep.

        epsilon: `o`;  v: `alpha o + sigma x_t`;  sample: `(x_t - alpha o) / sigma`;  flow: `x_t + alpha o`.

        Args:
            output: in the parametrisation of `prediction_type`, `(B, C, H, W)`.
            sample: the network's input x_t, same shape.
            timestep: whole, of the schedule.
        """
        alpha, sigma = (float(x) for x in self.coefficients(torch.tensor(timestep)))
        if self.prediction_type == "epsilon":
            return output
        if self.is_flow:
            return sample + alpha * output
        if self.prediction_type == "v_prediction":
            return alpha * output + sigma * sample
        return (sample - alpha * output) / sigma

    def timestep(self, level: float) -> float:
        """Return the timestep whose noise level is `level`: the inverse of `level`.

        Between two whole timesteps it interpolates in the angle atan(s), which stays finite at zero terminal SNR;
        at a whole timestep's own level the result is exactly that timestep.

        Args:
            level: noise level, in [level(0), max_level].

        Returns:
            A timestep in [0, N-1], or [0, N] for flow matching; fractional in general.

        Raises:
            UserError: no timestep has this level. Level 0 is such a one if variance preserving: index 0 is not clean.
        """
        low, high = float(self.level(0)), self.max_level
        if not low <= level <= high:  # NaN fails too
            raise UserError(f"no timestep has noise level {level}", rule=f"levels run from {low:.6g} to {high:.6g}")
        if self.alphas_cumprod is None:
            return self.num_train_timesteps / (1.0 + 1.0 / level) if level > 0 else 0.0
        levels = self.level(torch.arange(self.num_train_timesteps))
        above = int(torch.searchsorted(levels, torch.tensor(level, dtype=torch.float64)))  # first s_t >= level
        if levels[above] == level:
            return float(above)
        left, right = math.atan(float(levels[above - 1])), math.atan(float(levels[above]))
        return above - 1 + (math.atan(level) - left) / (right - left)

    def coefficients_at_level(self, level: float) -> tuple[float, float]:
        """Return (alpha, sigma) of this family at a finite noise level s >= 0, on or between the timesteps.

        Variance preserving: `(1, s) / sqrt(1 + s^2)`; flow matching: `(1, s) / (1 + s)`.
        """
        scale = 1.0 + level if self.is_flow else math.hypot(1.0, level)
        return 1.0 / scale, level / scale


def _first_outside(t: torch.Tensor, last: int) -> float:
    """Return the first timestep that is not in [0, last]."""
    flat = t.flatten()
    return flat[~((flat >= 0) & (flat <= last))][0].item()
