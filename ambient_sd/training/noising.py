"""Options of diffusers' scripts that change noise or weight of the ordinary loss.

    Min-SNR             weight min(snr, gamma) / snr for epsilon, / (snr + 1) for v, / 1 for sample;  snr = 1 / s_t^2
                        Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV 2023)
    noise offset        xi + o u, one u ~ N(0, 1) per sample and channel
    input perturbation  input from xi + p z, target from xi, z ~ N(0, I)
                        Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models" (ICML 2023)
    logit-normal        timesteps of log-normal noise level, ln s_t ~ N(m, d^2): EDM's (Karras et al. 2022), and, as
                        s = u / (1 - u), the logit-normal u of Stable Diffusion 3 (Esser et al. 2024)
    flow matching       timesteps, their shift and weights: `FlowTimesteps`, `flow_weight`

u and z are functions of (seed, place in the run) with purposes of their own: these options change no other random number.

Noise offset and input perturbation are refused with the ambient loss (in `TrainConfig`). Above s_n that loss rests on the mean of
the fixed part of the total noise r = s_n eps_n + sqrt(s_t^2 - s_n^2) xi, which is `E[s_n eps_n | r] = (s_n / s_t)^2 r`. This
needs eps_n and xi of one covariance, and r at level s_t. With an offset the covariance of xi in a channel of d pixels is
`I + o^2 1 1^T`, and along 1 the right factor is `s_n^2 / (s_n^2 + (s_t^2 - s_n^2)(1 + o^2 d))`; a perturbed input lies
at a level above s_t. Min-SNR only multiplies the weight a^q, at the level s_t of the input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ambient_sd.data.stream import SampleStream
from ambient_sd.objective import AmbientObjective, CorruptedBatch
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError


def min_snr_weight(
    schedule: NoiseSchedule, timesteps: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """Return the Min-SNR weight of each timestep, finite at every signal-to-noise ratio from 0 to infinity.

    With `alpha^2 + sigma^2 = 1` nothing has to be divided by the ratio:
    epsilon `min(1, gamma s^2)`, v_prediction `min(alpha^2, gamma sigma^2)`, sample `min(1 / s^2, gamma)`.

    Args:
        schedule: a variance-preserving schedule.
        timesteps: (B,) long.
        gamma: above 0; the paper's is 5.
        prediction_type: epsilon, v_prediction or sample.

    Returns:
        (B,) float64. At zero terminal SNR, s = infinity, it is 1 for epsilon, and 0 for v_prediction and sample.

    Raises:
        UserError: the schedule or prediction is one of flow matching.

    Example:
        >>> schedule = NoiseSchedule(3, "epsilon", torch.tensor([0.9, 0.5, 0.0]))
        >>> found = min_snr_weight(schedule, torch.tensor([0, 1, 2]), gamma=5.0, prediction_type="epsilon")
        >>> [round(v, 3) for v in found.tolist()]
        [0.556, 1.0, 1.0]
    """
    if schedule.is_flow or prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError("snr_gamma is given", rule="Min-SNR is defined for schedules with alpha^2 + sigma^2 = 1",
                        remedy="leave it out for a flow-matching base")  # fmt: skip
    if prediction_type == "v_prediction":
        alpha, sigma = schedule.coefficients(timesteps)
        return torch.minimum(alpha.square(), gamma * sigma.square())
    squared = schedule.level(timesteps).square()
    return (gamma * squared).clamp(max=1.0) if prediction_type == "epsilon" else squared.reciprocal().clamp(max=gamma)


def offset(noise: torch.Tensor, stream: SampleStream, positions: Sequence[int], amount: float) -> torch.Tensor:
    """Return fresh noise with an offset per sample and channel, `xi + amount u`.

    Args:
        noise: (B, C, h, w) white noise.
        stream: the run's samples.
        positions: B places.
        amount: o; 0 returns `noise` itself.

    Example:
        >>> moved = offset(torch.zeros(1, 4, 8, 8), SampleStream(count=3, seed=0), [7], 0.1)
        >>> moved.unique().numel()  # one number for each channel
        4
    """
    if not amount:
        return noise
    size = (noise.shape[1], 1, 1)
    return noise + amount * torch.stack([torch.randn(size, generator=stream.generator("offset", p)) for p in positions])


class LogNormalLevels:
    """Draw timesteps whose noise levels are log-normal: the timestep nearest to `s = exp(mean + std z)` in ln s.

    Levels beyond the schedule's ends fall on its first or last finite one.

    Args:
        schedule: of the base.
        mean, std: of ln s.

    Example:
        >>> schedule = NoiseSchedule(4, "epsilon", torch.tensor([0.9, 0.8, 0.5, 0.2]))
        >>> levels = LogNormalLevels(schedule, mean=0.0, std=0.0)  # the timestep of level 1
        >>> int(levels(SampleStream(count=3, seed=0), position=7))
        2
    """

    def __init__(self, schedule: NoiseSchedule, mean: float, std: float) -> None:
        logs = schedule.level(torch.arange(schedule.num_train_timesteps)).log()
        self.mean, self.std = mean, std
        self.first = int((logs == -torch.inf).sum())  # flow matching begins at level 0
        logs = logs[self.first :]
        self.edges = (logs[1:] + logs[:-1]) / 2

    def __call__(self, stream: SampleStream, position: int) -> torch.Tensor:
        """Return the timestep of a place in the run, long, without shape."""
        z = torch.randn((), generator=stream.generator("level", position), dtype=torch.float64)
        return self.first + torch.bucketize(self.mean + self.std * z, self.edges)


class FlowTimesteps:
    """Draw timesteps of flow matching as diffusers' scripts do: u by a scheme, and the scheduler's u-th timestep, its shift included.

        u ~ U(0, 1), logit-normal, mode (Esser et al. 2024), or u_shaped: density ~ cosh(4 (2u - 1)), both ends over the middle
            (Lee et al., "Improving the Training of Rectified Flows", 2024)
        sigma = shift * v / (1 + (shift - 1) v)      v = 1 - floor(u N) / N;  s -> shift * s
        sigma = e^mu / (e^mu + 1 / v - 1)            where the scheduler shifts by the number of image tokens

    Args:
        scheduler: a flow-matching scheduler.
        scheme: of `weighting_scheme`; those that only weight the loss draw uniformly.
        shift: in place of the scheduler's; None: its own.
        mu: the pipeline's shift for a number of image tokens (`Family.shift`).
        logit_mean, logit_std, mode_scale: of the schemes with these names.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> from ambient_sd.families import SD3
        >>> draw = FlowTimesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), "none", None, SD3.shift)
        >>> bool(0 < draw(SampleStream(count=3, seed=0), position=7, tokens=1024) <= 1000)
        True
    """

    def __init__(
        self, scheduler: Any, scheme: str, shift: float | None, mu: Callable[[Mapping[str, Any], int], float], *, logit_mean: float = 0.0,
        logit_std: float = 1.0, mode_scale: float = 1.29,
    ) -> None:  # fmt: skip
        self.scheme, self.options = scheme, {"logit_mean": logit_mean, "logit_std": logit_std, "mode_scale": mode_scale}
        self.config, self.shift, self.mu = scheduler.config, shift, mu
        self.count = int(scheduler.config.num_train_timesteps)
        # In float32 and in this order the very numbers of FlowMatchEulerDiscreteScheduler.
        self.sigmas = torch.arange(self.count, 0, -1, dtype=torch.float32) / self.count
        self._tables: dict[int | None, torch.Tensor] = {}

    def table(self, tokens: int) -> torch.Tensor:
        """Return the N timesteps for a number of image tokens, (N,) float32, the noisiest first."""
        by_resolution = self.shift is None and bool(self.config.get("use_dynamic_shifting"))
        key = tokens if by_resolution else None
        if key not in self._tables:
            sigmas = self.sigmas
            if by_resolution:
                mu = self.mu(self.config, tokens)
                ratio = math.exp(mu) if self.config.get("time_shift_type", "exponential") == "exponential" else mu
                sigmas = ratio / (ratio + (1 / sigmas - 1))
            else:
                shift = self.shift or self.config.get("shift") or self.config.get("flow_shift") or 1.0
                sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
            self._tables[key] = sigmas * self.count
        return self._tables[key]

    def __call__(self, stream: SampleStream, position: int, tokens: int) -> torch.Tensor:
        """Return the timestep of a place in the run, float32, without shape."""
        g = stream.generator("level", position)
        if self.scheme == "u_shaped":
            v = torch.rand((), generator=g)
            u = (1.0 + torch.asinh((2.0 * v - 1.0) * math.sinh(_U_SHAPE)) / _U_SHAPE) / 2.0
        else:
            scheme = self.scheme if self.scheme in ("logit_normal", "mode") else "none"
            u = compute_density_for_timestep_sampling(scheme, 1, **self.options, device="cpu", generator=g)[0]  # type: ignore[arg-type]
        return self.table(tokens)[(u * self.count).long().clamp(0, self.count - 1)]


_U_SHAPE = 4.0


def flow_weight(sigma: torch.Tensor, scheme: str, preconditioned: bool = False) -> torch.Tensor:
    """Return the factor of the flow loss: `sigma^-2` (sigma_sqrt), `2 / (pi (1 - 2 sigma + 2 sigma^2))` (cosmap), else 1; times `sigma^2` if preconditioned.

    With `x0_hat = x_t - sigma o` the preconditioned loss is `|x0_hat - x0|^2 = sigma^2 |o - (eps - x0)|^2`.

    Args:
        sigma: (B,) in (0, 1].
        scheme: of `weighting_scheme`.
        preconditioned: the loss is that of the x0-prediction.

    Example:
        >>> flow_weight(torch.tensor([0.5]), "sigma_sqrt"), flow_weight(torch.tensor([0.5]), "none", True)
        (tensor([4.]), tensor([0.2500]))
    """
    weight = torch.ones_like(sigma)
    if scheme in ("sigma_sqrt", "cosmap"):
        weight = compute_loss_weighting_for_sd3(scheme, sigma)
    return weight * sigma.square() if preconditioned else weight


def corrupt(
    objective: AmbientObjective,
    x0: torch.Tensor,
    eps_n: torch.Tensor | None,
    timesteps: torch.Tensor,
    *,
    noise: torch.Tensor,
    perturbation: torch.Tensor | None = None,
    snr_gamma: float | None = None,
    scheme: str = "none",
    preconditioned: bool = False,
) -> CorruptedBatch:
    """Corrupt a batch; with a perturbation the input is made from `noise + perturbation` and the target from `noise`.

    `snr_gamma` multiplies the objective's own weight, that of ambient samples too.

    Args:
        objective: the loss.
        x0: (B, C, h, w) clean latents.
        eps_n: (B, C, h, w) fixed noise, or None.
        timesteps: (B,) long.
        noise: (B, C, h, w) fresh noise.
        perturbation: (B, C, h, w) p z from `perturbation_at`, or None.
        snr_gamma: of Min-SNR, or None.
        scheme, preconditioned: of `flow_weight`; nothing without flow matching.

    Example:
        >>> objective = AmbientObjective(NoiseSchedule(2, "epsilon", torch.tensor([0.8, 0.2])), mode="plain")
        >>> x0, noise = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
        >>> batch = corrupt(objective, x0, None, torch.tensor([0, 1]), noise=noise, snr_gamma=1.0)
        >>> [round(v, 3) for v in batch.weight.tolist()]
        [0.25, 1.0]
    """
    batch = objective.corrupt(x0, eps_n, timesteps, noise=noise)
    if perturbation is not None:
        seen = objective.corrupt(x0, eps_n, timesteps, noise=noise + perturbation)
        batch = dataclasses.replace(batch, x_t=seen.x_t)
    if snr_gamma is not None:
        factor = min_snr_weight(objective.schedule, timesteps, snr_gamma, objective.prediction_type)
        batch = dataclasses.replace(batch, weight=batch.weight * factor.to(batch.weight))
    if objective.schedule.is_flow and (preconditioned or scheme in ("sigma_sqrt", "cosmap")):
        factor = flow_weight(objective.schedule.sigma(timesteps), scheme, preconditioned)
        batch = dataclasses.replace(batch, weight=batch.weight * factor.to(batch.weight))
    return batch


def perturbation_at(
    stream: SampleStream, positions: Sequence[int], shape: Sequence[int], amount: float
) -> torch.Tensor | None:
    """Return `amount z`, (B, *shape) float32, of these places; None if `amount` is 0.

    Example:
        >>> stream = SampleStream(count=3, seed=0)
        >>> perturbation_at(stream, [7, 8], (4, 8, 8), 0.1).shape, perturbation_at(stream, [7], (4, 8, 8), 0.0)
        (torch.Size([2, 4, 8, 8]), None)
    """
    if not amount:
        return None
    draws = [torch.randn(tuple(shape), generator=stream.generator("perturbation", p)) for p in positions]
    return amount * torch.stack(draws)
