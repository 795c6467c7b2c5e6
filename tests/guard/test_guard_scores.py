"""The score's formula, against the schedulers' own conversions and against hand-made numbers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from ambient_sd.guard.scores import guidance_norm, noise_factor
from ambient_sd.utils.errors import UserError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_norm_is_the_unsquared_l2_over_channels_and_pixels_for_each_image() -> None:
    uncond = torch.zeros(2, 4, 3, 3)
    cond = torch.zeros(2, 4, 3, 3)
    cond[0, 0, 0, 0], cond[0, 3, 2, 2], cond[1] = 3.0, 4.0, 1.0
    assert torch.equal(guidance_norm(cond=cond, uncond=uncond), torch.tensor([5.0, 6.0]))


def test_half_precision_outputs_are_summed_in_float32() -> None:
    cond = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)
    norm = guidance_norm(cond=cond, uncond=torch.zeros_like(cond))
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(300.0 * 128)
    assert cond.square().sum().sqrt().isinf()  # what float16 would have said


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_score_equals_the_noise_difference_that_the_scheduler_itself_computes(prediction_type: str, t: int) -> None:
    # DDIM turns either half into x0, and x0_c - x0_u = -(sigma / alpha) (eps_c - eps_u) whatever the network predicts.
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    g = torch.Generator().manual_seed(0)
    x_t, cond, uncond = (torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(3))
    x0_c, x0_u = (scheduler.step(o, t, x_t).pred_original_sample for o in (cond, uncond))
    alpha_bar = scheduler.alphas_cumprod[t].double()
    expected = (x0_c - x0_u).flatten(1).norm(dim=1) * (alpha_bar / (1 - alpha_bar)).sqrt()
    got = guidance_norm(cond=cond, uncond=uncond) * noise_factor(scheduler, torch.tensor([t]))
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)
    if prediction_type != "epsilon":  # without the factor the score is another number
        assert not torch.allclose(guidance_norm(cond=cond, uncond=uncond), expected, rtol=1e-4)


def test_v_factor_at_the_first_step_of_sd2_is_0_068() -> None:
    factor = noise_factor(DDIMScheduler(**SD, prediction_type="v_prediction"), torch.tensor([999]))
    assert factor.item() == pytest.approx(0.0683, abs=1e-4)


def test_fractional_timesteps_of_euler_get_the_alpha_of_the_sigma_that_euler_uses() -> None:
    scheduler = EulerDiscreteScheduler(**SD, prediction_type="v_prediction", timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    assert (scheduler.timesteps % 1 != 0).any()
    expected = 1 / torch.sqrt(1 + scheduler.sigmas[:-1].double() ** 2)
    torch.testing.assert_close(noise_factor(scheduler, scheduler.timesteps), expected, rtol=1e-5, atol=0)
    rounded = noise_factor(scheduler, scheduler.timesteps.round())
    assert not torch.allclose(rounded, expected, rtol=1e-5)


def test_zero_terminal_snr_gives_zero_at_the_last_timestep_and_no_nan() -> None:
    scheduler = DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    factor = noise_factor(scheduler, torch.tensor([999.0, 998.5, 998.0]))
    assert factor[0] == 0 and math.isfinite(factor[1]) and factor[2] > 0


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()])
def test_schedules_without_a_defined_score_are_refused_in_one_line(scheduler: object) -> None:
    with pytest.raises(UserError, match=type(scheduler).__name__) as error:
        noise_factor(scheduler, torch.tensor([1]))
    assert "\n" not in str(error.value)
