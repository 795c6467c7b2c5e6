"""Schedules: our alpha, sigma and level against diffusers' own add_noise, get_velocity and scale_noise; round trips."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = {
    "scaled_linear": SD,
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {**SD, "rescale_betas_zero_snr": True},
}
STEPS = torch.arange(1000)


@pytest.fixture(params=VP, ids=str)
def scheduler(request: pytest.FixtureRequest) -> DDPMScheduler:
    return DDPMScheduler(**VP[request.param])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_timestep_equals_diffusers_add_noise_and_get_velocity_bit_for_bit(
    scheduler: DDPMScheduler, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 3, generator=generator, dtype=dtype)
    alpha, sigma = (c[:, None] for c in NoiseSchedule.from_scheduler(scheduler).coefficients(STEPS, dtype))
    assert torch.equal(alpha * x0 + sigma * eps, scheduler.add_noise(x0, eps, STEPS))
    assert torch.equal(alpha * eps - sigma * x0, scheduler.get_velocity(x0, eps, STEPS))


def test_rounding_the_float64_coefficients_to_float32_would_not_equal_diffusers() -> None:
    # Control for the test above: why coefficients takes a dtype.
    scheduler = DDPMScheduler(**SD)
    x0, eps = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (c.float()[:, None] for c in NoiseSchedule.from_scheduler(scheduler).coefficients(STEPS))
    assert not torch.equal(alpha * x0 + sigma * eps, scheduler.add_noise(x0, eps, STEPS))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_equals_diffusers_scale_noise(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x0, eps = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (c[:, None] for c in schedule.coefficients(scheduler.timesteps, torch.float32))
    theirs = scheduler.scale_noise(x0, scheduler.timesteps, eps)
    if shift == 1.0:
        assert torch.equal(alpha * x0 + sigma * eps, theirs)
    # diffusers stores timesteps = 1000 sigma in float32: one rounding of that stands between the two.
    assert torch.allclose(sigma[:, 0], scheduler.sigmas[:1000], rtol=0, atol=2**-23)
    assert torch.allclose(alpha * x0 + sigma * eps, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete", "UniPCMultistep",
     "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "LCM", "KDPM2Discrete"],
)  # fmt: skip
def test_the_sampler_does_not_change_the_training_schedule(name: str) -> None:
    sampler = getattr(diffusers, f"{name}Scheduler")(**SD)
    sampler.set_timesteps(20)
    reference = NoiseSchedule.from_scheduler(DDPMScheduler(**SD))
    assert torch.equal(NoiseSchedule.from_scheduler(sampler).level(STEPS), reference.level(STEPS))


def test_stable_diffusion_levels_are_the_known_ones() -> None:
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(**SD))
    known = {0: 0.029, 100: 0.344, 200: 0.572, 300: 0.833, 400: 1.164, 500: 1.618, 600: 2.285, 700: 3.334, 800: 5.111,
             900: 8.347, 999: 14.61}  # fmt: skip
    for t, level in known.items():
        assert float(schedule.level(t)) == pytest.approx(level, abs=10.0 ** -(3 if level < 10 else 2) / 2 * 1.01)
    assert schedule.level(torch.tensor([[3, 4]])).shape == (1, 2)
    assert schedule.level(3).dtype == torch.float64


def test_level_and_timestep_are_inverse(scheduler: DDPMScheduler) -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler)
    levels = schedule.level(STEPS)
    assert bool((levels.diff() > 0).all())
    assert [schedule.timestep(s) for s in levels[::9].tolist()] == STEPS[::9].tolist()  # 0 and 999 among them
    for t in (0, 353, 700, 998):
        between = float(levels[t]) + 0.3 * min(float(levels[t + 1] - levels[t]), 10.0)
        assert t < schedule.timestep(between) < t + 1


def test_level_and_timestep_are_inverse_for_flow_matching() -> None:
    schedule = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    t = torch.linspace(0, 1000, 777, dtype=torch.float64)
    back = torch.tensor([schedule.timestep(s) for s in schedule.level(t).tolist()], dtype=torch.float64)
    assert torch.allclose(back, t, rtol=1e-12, atol=0)
    assert schedule.prediction_type == "flow_prediction"
    assert [float(schedule.level(t)) for t in (500, 800, 900)] == [1.0, 4.0, 9.0]


def test_zero_terminal_snr_ends_at_an_infinite_level() -> None:
    assert NoiseSchedule.from_scheduler(DDPMScheduler(**VP["zero_snr"])).max_level == math.inf
    assert NoiseSchedule.from_scheduler(DDPMScheduler(**SD)).max_level < 15


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0, 4.0])
def test_coefficients_at_a_level_belong_to_that_level(level: float) -> None:
    for source in (DDPMScheduler(**SD), FlowMatchEulerDiscreteScheduler()):
        schedule = NoiseSchedule.from_scheduler(source)
        alpha, sigma = schedule.coefficients_at_level(level)
        assert sigma / alpha == pytest.approx(level, rel=1e-15)
        assert (alpha + sigma if schedule.is_flow else alpha**2 + sigma**2) == pytest.approx(1.0, rel=1e-15)


def test_what_is_not_a_timestep_a_level_or_a_schedule_is_refused() -> None:
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(**SD))
    for t in (-1, 1000, torch.tensor([5, 1000])):
        with pytest.raises(UserError, match="outside the schedule; it runs from 0 to 999"):
            schedule.level(t)
    with pytest.raises(UserError, match="whole numbers"):
        schedule.level(torch.tensor([1.5]))
    for level in (0.0, -1.0, 14.7, math.inf, math.nan):
        with pytest.raises(UserError, match="levels run from"):
            schedule.timestep(level)
    with pytest.raises(UserError, match="EDMEulerScheduler has no training schedule"):
        NoiseSchedule.from_scheduler(diffusers.EDMEulerScheduler())
    with pytest.raises(UserError, match="unknown"):
        NoiseSchedule(1000, "score")
    with pytest.raises(UserError, match="alphas_cumprod"):
        NoiseSchedule(3, "epsilon", torch.tensor([0.9, 0.95, 0.1]))
    flow = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    for bad in (-0.5, 1000.5, math.nan):
        with pytest.raises(UserError, match="outside the schedule"):
            flow.level(bad)
