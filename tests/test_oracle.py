"""The optimal denoisers, and that the objective's expected loss is minimal at them: exact, one dimension, no training.

For a finite data set the input density is a sum of Gaussians, one for each image, so at any input x the image and
the fresh noise that lead there are known. `corrupt` is given exactly those; the minimiser of the expected loss at x
is the mean of its targets, weighted by their density.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ambient_sd.objective import AmbientObjective
from ambient_sd.oracle import ideal_ambient_denoiser, ideal_denoiser
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DATA = torch.tensor([-1.5, -0.2, 0.4, 2.0], dtype=torch.float64)
EPS_N = torch.tensor([0.7, -1.1, 0.3, -0.4], dtype=torch.float64)
GRID = torch.linspace(-3, 3, 41, dtype=torch.float64)
TYPES = ["epsilon", "v_prediction", "sample", "flow_prediction"]


def schedule_for(prediction_type: str) -> NoiseSchedule:
    if prediction_type == "flow_prediction":
        return NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    return NoiseSchedule.from_scheduler(DDPMScheduler(**SD, prediction_type=prediction_type))


def minimiser_as_x0(
    objective: AmbientObjective, data: torch.Tensor, eps_n: torch.Tensor, t: int, log_prior: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """The x0-prediction, at each x of GRID, that minimises the expected loss of `corrupt` over images and noise."""
    schedule = objective.schedule
    alpha, sigma, s_t = float(schedule.alpha(t)), float(schedule.sigma(t)), float(schedule.level(t))
    s_n = objective.level if s_t > objective.level else 0.0
    c = math.sqrt(sigma**2 - (alpha * s_n) ** 2)
    centres = alpha * (data + s_n * eps_n)
    pairs = torch.cartesian_prod(GRID, torch.arange(len(data), dtype=torch.float64))
    x, i = pairs[:, 0], pairs[:, 1].long()
    xi = (x - centres[i]) / c
    batch = objective.corrupt(data[i, None], eps_n[i, None], torch.full((len(x),), t), noise=xi[:, None])
    assert torch.allclose(batch.x_t[:, 0], x, rtol=0, atol=1e-12), "corrupt puts the input where the formulas say"
    log_density = (-0.5 * xi.square()).reshape(len(GRID), len(data))
    share = torch.softmax(log_density + log_prior, 1) * batch.weight.reshape(len(GRID), len(data))
    output = (share * batch.target.reshape(len(GRID), len(data))).sum(1) / share.sum(1)
    return {
        "epsilon": lambda: (GRID - sigma * output) / alpha,
        "sample": lambda: output,
        "v_prediction": lambda: alpha * GRID - sigma * output,
        "flow_prediction": lambda: GRID - sigma * output,
    }[objective.prediction_type]()


def plain_on(schedule: NoiseSchedule) -> AmbientObjective:
    return AmbientObjective(schedule, mode="plain")


@pytest.mark.parametrize("t", [50, 400, 900])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_minimiser_of_the_plain_loss_is_the_ideal_denoiser(prediction_type: str, t: int) -> None:
    schedule = schedule_for(prediction_type)
    found = minimiser_as_x0(plain_on(schedule), DATA, EPS_N, t)
    oracle = ideal_denoiser(GRID[:, None], schedule.alpha(t).item(), schedule.sigma(t).item(), DATA[:, None])[:, 0]
    assert torch.allclose(found, oracle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reweight", [0, 1, 2])
@pytest.mark.parametrize("t", [300, 550, 700, 900])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_minimiser_of_the_ambient_loss_is_the_oracle_of_the_noisy_images(
    prediction_type: str, t: int, reweight: int
) -> None:
    schedule = schedule_for(prediction_type)
    s_n = 0.8
    objective = AmbientObjective(schedule, level=s_n, reweight=reweight)
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    found = minimiser_as_x0(objective, DATA, EPS_N, t)
    plain_oracle = ideal_denoiser(GRID[:, None], alpha, sigma, DATA[:, None])[:, 0]
    if float(schedule.level(t)) <= s_n:
        assert torch.allclose(found, plain_oracle, rtol=1e-9, atol=1e-9)
        return
    alpha_n, sigma_n = schedule.coefficients_at_level(s_n)
    x_n = alpha_n * DATA + sigma_n * EPS_N
    oracle = ideal_ambient_denoiser(
        GRID[:, None], alpha, sigma, x_n[:, None], alpha_n=alpha_n, sigma_n=sigma_n
    )[:, 0]  # fmt: skip
    assert torch.allclose(found, oracle, rtol=1e-9, atol=1e-9)
    # Controls: the plain loss, on the noisy images or on the clean ones, ends somewhere else.
    naive = minimiser_as_x0(plain_on(schedule), DATA + s_n * EPS_N, EPS_N, t)
    assert (naive - oracle).abs().max() > 0.1
    assert (plain_oracle - oracle).abs().max() > 0.1


@pytest.mark.parametrize("prediction_type", TYPES)
def test_over_all_noise_the_ambient_loss_learns_the_clean_distribution_and_the_naive_loss_does_not(
    prediction_type: str,
) -> None:
    # The reference is the plain oracle of the CLEAN data, which shares no formula with the ambient loss.
    schedule, s_n, t = schedule_for(prediction_type), 0.8, 600
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    nodes = torch.linspace(-9, 9, 601, dtype=torch.float64)  # the trapezoid rule is exact to rounding on a Gaussian
    data, eps_n = torch.cartesian_prod(DATA, nodes).unbind(1)
    log_prior = -0.5 * eps_n.square()
    clean = ideal_denoiser(GRID[:, None], alpha, sigma, DATA[:, None])[:, 0]
    ambient = minimiser_as_x0(AmbientObjective(schedule, level=s_n), data, eps_n, t, log_prior)
    naive = minimiser_as_x0(plain_on(schedule), data + s_n * eps_n, eps_n, t, log_prior)
    assert (ambient - clean).abs().max() < 1e-9
    assert (naive - clean).abs().max() > 0.2


def test_the_oracle_has_a_lower_sampled_loss_than_anything_near_it() -> None:
    schedule, s_n, t = schedule_for("sample"), 0.8, 600
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(len(DATA), (20_000,), generator=generator)
    objective = AmbientObjective(schedule, level=s_n)
    batch = objective.corrupt(DATA[i, None], EPS_N[i, None], torch.full((len(i),), t), generator=generator)
    alpha_n, sigma_n = schedule.coefficients_at_level(s_n)
    x_n = (alpha_n * DATA + sigma_n * EPS_N)[:, None]
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    oracle = ideal_ambient_denoiser(batch.x_t, alpha, sigma, x_n, alpha_n=alpha_n, sigma_n=sigma_n)
    naive = ideal_denoiser(batch.x_t, alpha, (sigma**2 - (alpha * s_n) ** 2) ** 0.5, x_n / alpha_n)
    clean = ideal_denoiser(batch.x_t, alpha, sigma, DATA[:, None])
    losses = [
        float((batch.weight[:, None] * (h - batch.target).square()).mean())
        for h in (oracle, oracle + 0.2, oracle - 0.2, 0.8 * oracle, 1.2 * oracle, naive, clean)
    ]
    assert min(losses) == losses[0]
    assert sorted(losses)[1] > losses[0] * 1.001


def test_one_image_is_always_recovered_by_the_plain_oracle() -> None:
    x_t = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    result = ideal_denoiser(x_t, torch.tensor([0.9, 0.5, 0.0]), torch.tensor([0.1, 0.9, 1.0]), image)
    assert result.dtype == torch.float64
    assert torch.equal(result, image.double().expand(3, -1, -1, -1))


def test_extreme_noise_gives_the_nearest_image_and_the_mean_without_overflow() -> None:
    data = torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = data[[7, 31]] + 1e-3
    assert torch.equal(ideal_denoiser(x_t, 1.0, 1e-8, data), data[[7, 31]])
    assert torch.allclose(ideal_denoiser(x_t, 0.0, 1.0, data), data.mean(0).expand(2, -1, -1, -1))
    assert torch.allclose(
        ideal_ambient_denoiser(x_t, 0.0, 1.0, data, alpha_n=0.5, sigma_n=0.8), 2 * data.mean(0).expand(2, -1, -1, -1)
    )
    assert ideal_ambient_denoiser(x_t, 1.0, 1.0 + 1e-9, data, alpha_n=1.0, sigma_n=1.0).isfinite().all()


def test_without_nature_noise_the_ambient_oracle_is_the_plain_one() -> None:
    data = DATA[:, None]
    plain = ideal_denoiser(GRID[:, None], 0.6, 0.8, data)
    assert torch.equal(ideal_ambient_denoiser(GRID[:, None], 0.6, 0.8, data, alpha_n=1.0, sigma_n=0.0), plain)


def test_what_the_formulas_do_not_cover_is_refused() -> None:
    x, data = GRID[:, None], DATA[:, None]
    for call, message in (
        (lambda: ideal_denoiser(x, 1.0, 0.0, data), "sigma_t is not positive"),
        (lambda: ideal_denoiser(x, 1.0, 1.0, data[:0]), "at least one row"),
        (lambda: ideal_denoiser(x, 1.0, 1.0, torch.zeros(3, 2)), "shaped like an input"),
        (lambda: ideal_denoiser(x, torch.ones(3), 1.0, data), "a number or"),
        (lambda: ideal_ambient_denoiser(x, 0.8, 0.6, data, alpha_n=0.6, sigma_n=0.8), "not above s_n"),
        (lambda: ideal_ambient_denoiser(x, 0.6, 0.8, data, alpha_n=0.6, sigma_n=0.8), "not above s_n"),
        (lambda: ideal_ambient_denoiser(x, 0.6, 0.8, data, alpha_n=0.0, sigma_n=1.0), "alpha_n > 0"),
    ):
        with pytest.raises(UserError, match=message):
            call()
