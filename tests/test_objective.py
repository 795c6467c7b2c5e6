"""The objective: bit equality with diffusers at level 0, the paper's loss, finiteness, one noise per image, refusals.

Reference values come from diffusers' scheduler or are written out from the paper's formulas, never from the module.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from ambient_sd.data.noise import image_noise
from ambient_sd.objective import AmbientObjective, CorruptedBatch
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP_TYPES = ["epsilon", "v_prediction", "sample"]
ALL_TYPES = [*VP_TYPES, "flow_prediction"]
SHAPE = (4, 3, 5)


def schedule_for(prediction_type: str, zero_snr: bool = False) -> NoiseSchedule:
    if prediction_type == "flow_prediction":
        return NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    return NoiseSchedule.from_scheduler(
        DDPMScheduler(**SD, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    )


def draw(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_diffusers_step(
    prediction_type: str, x0: torch.Tensor, t: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and target as diffusers' own training scripts make them."""
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    if prediction_type == "flow_prediction":
        # Whole timesteps of the unshifted schedule, its sigmas made in the precision of the latents as the script does.
        sigma = (t.to(x0.dtype) / 1000).reshape(-1, 1, 1, 1)
        return sigma * noise + (1.0 - sigma) * x0, noise - x0
    scheduler = DDPMScheduler(**SD)
    target = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[prediction_type]
    return scheduler.add_noise(x0, noise, t), target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", ALL_TYPES)
@pytest.mark.parametrize(
    "how", [{"level": 0.0}, {"mode": "plain"}, {"mode": "gap", "level": 0.5, "gap_upper": 2.0}], ids=str
)
def test_level_zero_equals_the_plain_loss_of_diffusers_bit_for_bit(
    prediction_type: str, dtype: torch.dtype, how: dict
) -> None:
    t = torch.tensor([0, 1, 250, 500, 999])
    x0, eps_n = draw(2, 5, *SHAPE, dtype=dtype)
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    batch = AmbientObjective(schedule_for(prediction_type), **how).corrupt(x0, eps_n, t, generator=ours)
    x_t, target = plain_diffusers_step(prediction_type, x0, t, theirs)
    assert torch.equal(batch.x_t, x_t)
    assert torch.equal(batch.target, target)
    assert torch.equal(ours.get_state(), theirs.get_state()), "the random stream after the step must be the same too"
    assert batch.clean.all()
    if how.get("mode") != "gap":
        assert torch.equal(batch.weight, torch.ones(5, dtype=dtype))
    assert batch.x_t.dtype == batch.target.dtype == batch.weight.dtype == dtype
    # Control: a level that makes the last rows ambient changes exactly those rows.
    other = AmbientObjective(schedule_for(prediction_type), level=1.0).corrupt(x0, eps_n, t, noise=batch.noise)
    same = torch.tensor([torch.equal(a, b) for a, b in zip(other.x_t, x_t, strict=True)])
    assert torch.equal(same, other.clean)
    assert not other.clean.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_corrupted_in_float32(dtype: torch.dtype) -> None:
    x0, eps_n, noise = (v.to(dtype) for v in draw(3, 2, *SHAPE))
    objective = AmbientObjective(schedule_for("v_prediction"), level=1.0)
    t = torch.tensor([10, 700])
    half = objective.corrupt(x0, eps_n, t, noise=noise)
    full = objective.corrupt(x0.float(), eps_n.float(), t, noise=noise.float())
    assert torch.equal(half.x_t, full.x_t.to(dtype))
    assert torch.equal(half.target, full.target.to(dtype))
    assert torch.equal(half.weight, full.weight)
    assert half.weight.dtype == torch.float32


def as_x0(
    prediction_type: str, output: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The x0 that a network's output means."""
    return {
        "epsilon": lambda: (x_t - sigma * output) / alpha,
        "sample": lambda: output,
        "v_prediction": lambda: alpha * x_t - sigma * output,
        "flow_prediction": lambda: x_t - sigma * output,
    }[prediction_type]()


@pytest.mark.parametrize("level", [0.05, 0.4, 1.0, 4.0])
@pytest.mark.parametrize("prediction_type", ALL_TYPES)
def test_reweight_two_equals_the_papers_loss(prediction_type: str, level: float) -> None:
    """`a^2 |o - target|^2 = |a h + (1 - a) y_t - y_n|^2 / s_t^2` for epsilon; for the others times the factor by which
    their plain loss differs from the epsilon loss: 1 / alpha_t^2 for v and flow, s_t^2 for sample."""
    schedule = schedule_for(prediction_type)
    t = torch.arange(1000)
    t = t[schedule.level(t) > level]
    t = t[torch.linspace(0, len(t) - 1 - (prediction_type == "flow_prediction"), 40).long()]
    x0, eps_n, output = draw(3, len(t), *SHAPE)
    objective = AmbientObjective(schedule, level=level, reweight=2)
    batch = objective.corrupt(x0, eps_n, t, generator=torch.Generator().manual_seed(1))
    alpha, sigma, s_t = (v.reshape(-1, 1, 1, 1) for v in (schedule.alpha(t), schedule.sigma(t), schedule.level(t)))

    a = (s_t - level) * (s_t + level) / s_t**2
    y_n, y_t = x0 + level * eps_n, batch.x_t / alpha
    h = as_x0(prediction_type, output, batch.x_t, alpha, sigma)
    paper = (a * h + (1 - a) * y_t - y_n).square().flatten(1).sum(1) / s_t.flatten() ** 2
    factor = {
        "epsilon": torch.ones(len(t), dtype=torch.float64),
        "v_prediction": 1 / alpha.flatten() ** 2,
        "sample": s_t.flatten() ** 2,
        "flow_prediction": 1 / alpha.flatten() ** 2,
    }[prediction_type]
    ours = batch.weight * (output - batch.target).square().flatten(1).sum(1)
    assert torch.allclose(ours, paper * factor, rtol=1e-12, atol=0)
    assert not batch.clean.any()


@pytest.mark.parametrize("reweight", [0, 1])
def test_other_weights_are_powers_of_the_same_factor(reweight: int) -> None:
    schedule = schedule_for("epsilon")
    x0, eps_n, noise = draw(3, 4, *SHAPE)
    t = torch.tensor([300, 400, 600, 999])
    batch = AmbientObjective(schedule, level=1.0, reweight=reweight).corrupt(x0, eps_n, t, noise=noise)
    a = 1 - 1 / schedule.level(t).square()
    a[0] = 1.0  # at or below s_n
    assert torch.allclose(batch.weight, a**reweight, rtol=1e-13)
    # q = 1 is |xi - sqrt(a) eps_hat|^2, the noise-target loss.
    if reweight == 1:
        eps_hat = draw(4, *SHAPE, seed=9)
        root = a.sqrt().reshape(-1, 1, 1, 1)
        assert torch.allclose(
            batch.weight.reshape(-1, 1, 1, 1) * (eps_hat - batch.target).square(),
            (noise - root * eps_hat).square(),
            rtol=1e-11,
        )


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
def test_the_input_is_the_noisy_image_plus_fresh_noise_and_never_sees_the_clean_one(prediction_type: str) -> None:
    schedule = schedule_for(prediction_type)
    level, t = 1.0, torch.tensor([600, 998])
    alpha_n, sigma_n = (1 / 2**0.5,) * 2 if prediction_type in VP_TYPES else (0.5, 0.5)
    assert schedule.coefficients_at_level(level) == pytest.approx((alpha_n, sigma_n))
    x0, eps_n, noise = draw(3, 2, *SHAPE)
    objective = AmbientObjective(schedule, level=level)
    batch = objective.corrupt(x0, eps_n, t, noise=noise)
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in (schedule.alpha(t), schedule.sigma(t)))
    k = alpha / alpha_n
    c = (sigma**2 - k**2 * sigma_n**2).sqrt()
    x_n = alpha_n * x0 + sigma_n * eps_n
    assert torch.allclose(batch.x_t, k * x_n + c * noise, rtol=1e-12, atol=1e-13)
    # Another clean image with the same x_n gives the same input and target: nothing else of it gets through.
    other = x0 + draw(2, *SHAPE, seed=5)
    same = objective.corrupt(other, (x_n - alpha_n * other) / sigma_n, t, noise=noise)
    assert torch.allclose(same.x_t, batch.x_t, rtol=1e-11, atol=1e-12)
    assert torch.allclose(same.target, batch.target, rtol=1e-11, atol=1e-12)
    # Control: below s_n it does get through.
    low = torch.tensor([100, 100])
    below = [objective.corrupt(x, (x_n - alpha_n * x) / sigma_n, low, noise=noise).x_t for x in (x0, other)]
    assert not torch.allclose(*below, atol=0.1)


def batches_at_the_edges(
    prediction_type: str, zero_snr: bool, reweight: int, dtype: torch.dtype
) -> list[CorruptedBatch]:
    schedule = schedule_for(prediction_type, zero_snr)
    s = float(schedule.level(354))
    levels = [math.nextafter(s, 0), s, math.nextafter(s, 9), s * (1 - 1e-7), 1e-300, 1e-12, float(schedule.level(998))]
    t = torch.tensor([0, 353, 354, 355, 998, 999] + ([1000] if schedule.is_flow else []))
    x0, eps_n, noise = draw(3, len(t), *SHAPE).to(dtype)
    return [
        AmbientObjective(schedule, level=level, reweight=reweight).corrupt(x0, eps_n, t, noise=noise)
        for level in levels
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reweight", [0, 1, 2])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"), [(p, z) for p in VP_TYPES for z in (False, True)] + [("flow_prediction", False)]
)
def test_nothing_is_nan_or_infinite_at_just_above_or_below_the_level_nor_at_the_last_timestep(
    prediction_type: str, zero_snr: bool, reweight: int, dtype: torch.dtype
) -> None:
    for batch in batches_at_the_edges(prediction_type, zero_snr, reweight, dtype):
        output = torch.zeros_like(batch.target)
        loss = batch.weight * (output - batch.target).square().flatten(1).mean(1)
        for values in (batch.x_t, batch.target, batch.weight, loss):
            assert values.isfinite().all()
        assert (batch.weight >= 0).all() and (batch.weight <= 1).all()


def test_the_published_form_of_the_target_would_be_nan_at_zero_terminal_snr() -> None:
    # Control for the test above: the same v-target written as (eps* - sigma_t x_t) / alpha_t is 0 / 0 there.
    schedule = schedule_for("v_prediction", zero_snr=True)
    x0, eps_n, noise = draw(3, 1, *SHAPE)
    t = torch.tensor([999])
    batch = AmbientObjective(schedule, level=1.0).corrupt(x0, eps_n, t, noise=noise)
    assert float(schedule.alpha(t)) == 0.0
    assert ((noise - batch.x_t) / schedule.alpha(t)).isnan().all()
    assert torch.allclose(batch.target, -(x0 + eps_n)), "v = -y_n where x_t is pure noise"
    assert torch.equal(batch.x_t, noise)


def test_a_timestep_is_ambient_only_strictly_above_the_level() -> None:
    schedule = schedule_for("epsilon")
    t = torch.tensor([0, 353, 354, 355, 999])
    x0, eps_n = draw(2, 5, *SHAPE)
    s = float(schedule.level(354))
    for how, expected in (
        ({"timestep": 354}, [True, True, True, False, False]),
        ({"level": s}, [True, True, True, False, False]),
        ({"level": math.nextafter(s, 0)}, [True, True, False, False, False]),
        ({"level": schedule.max_level}, [True] * 5),
        ({"level": 1e-9}, [False] * 5),
    ):
        batch = AmbientObjective(schedule, **how).corrupt(x0, eps_n, t)
        assert batch.clean.tolist() == expected, how
        assert ((batch.weight == 1) == batch.clean).all() or how == {"level": 1e-9}
    assert AmbientObjective(schedule, timestep=354).level == s


def test_the_gap_has_weight_zero_between_its_levels_and_the_plain_loss_outside() -> None:
    schedule = schedule_for("epsilon")
    lower, upper = float(schedule.level(354)), float(schedule.level(600))
    objective = AmbientObjective(schedule, mode="gap", level=lower, gap_upper=upper)
    t = torch.tensor([0, 354, 355, 600, 601, 999])
    batch = objective.corrupt(draw(6, *SHAPE), None, t)
    assert batch.weight.tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("q", [0, 1, 2])
def test_weighted_is_the_plain_loss_with_the_weight_of_ambient(q: int) -> None:
    schedule = schedule_for("v_prediction")
    x0, noise, t = draw(5, *SHAPE), draw(5, *SHAPE), torch.tensor([0, 354, 355, 600, 999])
    batch = AmbientObjective(schedule, mode="weighted", timestep=354, reweight=q).corrupt(x0, None, t, noise=noise)
    plain = AmbientObjective(schedule, mode="plain").corrupt(x0, None, t, noise=noise)
    ambient = AmbientObjective(schedule, timestep=354, reweight=q).corrupt(x0, draw(5, *SHAPE), t, noise=noise)
    assert torch.equal(batch.x_t, plain.x_t) and torch.equal(batch.target, plain.target) and batch.clean.all()
    assert torch.equal(batch.weight, ambient.weight)
    assert not torch.equal(batch.target[2:], ambient.target[2:])  # Control: ambient's target is another


def noise_left_in_the_mean(fixed: bool, draws: int = 1000) -> float:
    """Average `draws` inputs of one image, as an attacker would; return the std of x_n's noise that is left."""
    schedule = schedule_for("v_prediction")
    objective = AmbientObjective(schedule, level=1.0)
    alpha_n, _ = schedule.coefficients_at_level(1.0)
    shape, t = (4, 16, 16), 450
    x0 = draw(1, *shape)
    total = torch.zeros_like(x0)
    generator = torch.Generator().manual_seed(11)
    for i in range(draws):
        eps_n = image_noise(["key"], shape, seed=0 if fixed else i, dtype=torch.float64)
        total += objective.corrupt(x0, eps_n, torch.tensor([t]), generator=generator).x_t
    x_n = total / draws * alpha_n / schedule.alpha(t)
    return float((x_n - alpha_n * x0).std())


def test_averaging_a_thousand_corruptions_of_an_image_leaves_its_noise_in_full() -> None:
    sigma_n = 1 / 2**0.5
    assert noise_left_in_the_mean(fixed=True) == pytest.approx(sigma_n, rel=0.08)  # of 1,024 values, known to 2.2 %


def test_fresh_noise_for_every_step_would_average_out() -> None:
    # Control: all noise of the input, sigma_t at level s_t = 1.38, shrinks by sqrt(1000).
    s_t = float(schedule_for("v_prediction").level(450))
    assert noise_left_in_the_mean(fixed=False) == pytest.approx(s_t / 2**0.5 / 1000**0.5, rel=0.08)


def test_ambient_loss_is_finite_on_the_infinite_level_of_other_schedulers() -> None:
    for scheduler in (
        EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True),
        DDIMScheduler(**SD, rescale_betas_zero_snr=True),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    ):
        objective = AmbientObjective(NoiseSchedule.from_scheduler(scheduler), level=1.0, prediction_type="v_prediction")
        x0, eps_n = draw(2, 1, *SHAPE, dtype=torch.float32)
        batch = objective.corrupt(x0, eps_n, torch.tensor([999]))
        assert batch.target.isfinite().all() and batch.x_t.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "noise level s_n is missing"),
        ({"level": 1.0, "timestep": 354}, "given twice"),
        ({"level": -0.1}, "must be a finite noise level from 0 to 14.61"),
        ({"level": 14.7}, "must be a finite noise level"),
        ({"level": math.nan}, "must be a finite noise level"),
        ({"level": math.inf}, "must be a finite noise level"),
        ({"timestep": 1000}, "runs from 0 to 999"),
        ({"timestep": -1}, "runs from 0 to 999"),
        ({"timestep": 3.5}, "whole numbers"),
        ({"level": 1.0, "reweight": 3}, "reweight is 3"),
        ({"level": 1.0, "reweight": 1.5}, "reweight is 1.5"),
        ({"level": 1.0, "mode": "clean"}, "'clean' is unknown"),
        ({"level": 1.0, "prediction_type": "score"}, "'score' is unknown"),
        ({"level": 1.0, "prediction_type": "flow_prediction"}, "does not fit this schedule"),
        ({"level": 1.0, "mode": "gap"}, "gap_upper is None"),
        ({"level": 1.0, "mode": "gap", "gap_upper": 1.0}, "above the lower one"),
        ({"level": 1.0, "mode": "gap", "gap_upper": math.nan}, "above the lower one"),
        ({"level": 1.0, "gap_upper": 2.0}, "belongs to objective"),
    ],
    ids=str,
)
def test_an_argument_that_breaks_its_rule_is_refused_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        AmbientObjective(schedule_for("epsilon"), **arguments)
    assert "\n" not in str(error.value)


def test_an_infinite_level_is_refused() -> None:
    with pytest.raises(UserError, match="finite"):
        AmbientObjective(schedule_for("epsilon", zero_snr=True), timestep=999)


def test_plain_ignores_level_and_fixed_noise() -> None:
    objective = AmbientObjective(schedule_for("epsilon"), mode="plain", level=-5.0)
    x0 = draw(1, *SHAPE)
    assert objective.corrupt(x0, None, torch.tensor([999])).clean.all()


def test_tensors_that_do_not_fit_are_refused() -> None:
    objective = AmbientObjective(schedule_for("epsilon"), level=1.0)
    x0, eps_n = draw(2, 2, *SHAPE)
    t = torch.tensor([5, 900])
    for arguments, message in (
        ((x0, None, t), "eps_n is missing"),
        ((x0, eps_n[:1], t), "eps_n has shape"),  # would broadcast one image's noise to all
        ((x0, eps_n, t[:1]), "timesteps have shape"),
        ((x0, eps_n, torch.tensor([5, 1000])), "runs from 0 to 999"),
        ((x0, eps_n, torch.tensor([5, -1])), "runs from 0 to 999"),
        ((x0.long(), eps_n, t), "floating point"),
    ):
        with pytest.raises(UserError, match=message):
            objective.corrupt(*arguments)
    with pytest.raises(UserError, match="noise has shape"):
        objective.corrupt(x0, eps_n, t, noise=eps_n[:1])
    close = AmbientObjective(
        schedule_for("epsilon"), level=math.nextafter(float(schedule_for("epsilon").level(354)), 0)
    )
    with pytest.raises(UserError, match="does not fit float16"):
        close.corrupt(x0.half(), eps_n.half(), torch.tensor([5, 354]))


def test_distill_is_plain_below_its_level_and_asks_for_the_base_above() -> None:
    schedule = schedule_for("v_prediction")
    x0, noise, t = draw(5, *SHAPE), draw(5, *SHAPE), torch.tensor([0, 354, 355, 600, 999])
    batch = AmbientObjective(schedule, mode="distill", timestep=354).corrupt(x0, None, t, noise=noise)
    plain = AmbientObjective(schedule, mode="plain").corrupt(x0, None, t, noise=noise)
    assert batch.distilled is not None and batch.distilled.tolist() == [False, False, True, True, True]
    assert (
        torch.equal(batch.x_t, plain.x_t) and (batch.weight == 1).all() and torch.equal(batch.clean, ~batch.distilled)
    )
    taught = batch.with_base(torch.full_like(x0[2:], 7.0))
    assert torch.equal(taught.target[:2], plain.target[:2]) and (taught.target[2:] == 7).all()
    with pytest.raises(UserError, match="prediction has shape"):
        batch.with_base(x0)  # of all samples: rows would be mixed up


def test_distill_has_the_ambient_loss_between_its_two_levels() -> None:
    schedule = schedule_for("epsilon")
    x0, eps_n, noise, t = draw(5, *SHAPE), draw(5, *SHAPE), draw(5, *SHAPE), torch.tensor([0, 354, 355, 600, 601])
    lower, upper = float(schedule.level(354)), float(schedule.level(600))
    batch = AmbientObjective(schedule, mode="distill", level=lower, distill_level=upper).corrupt(
        x0, eps_n, t, noise=noise
    )
    ambient = AmbientObjective(schedule, level=lower).corrupt(x0, eps_n, t, noise=noise)
    plain = AmbientObjective(schedule, mode="plain").corrupt(x0, None, t, noise=noise)
    for name in ("x_t", "target", "weight"):
        got, wanted, ordinary = (getattr(b, name) for b in (batch, ambient, plain))
        assert torch.equal(got[:4], wanted[:4])
        assert torch.equal(got[4], ordinary[4]) or name == "target"
    assert batch.target[4].isnan().all(), "a trainer that forgets the base's prediction learns nothing in silence"
    assert batch.distilled is not None and batch.distilled.tolist() == [False] * 4 + [True]
    assert batch.clean.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"mode": "distill", "level": 0.0}, "nothing would be learnt"),
        ({"mode": "distill", "level": 2.0, "distill_level": 1.0}, "distill_level is 1.0"),
        ({"mode": "distill", "level": 2.0, "distill_level": math.inf}, "distill_level is inf"),
        ({"mode": "ambient", "level": 2.0, "distill_level": 3.0}, 'belongs to objective "distill" only'),
    ],
)
def test_distill_refuses_levels_without_a_meaning(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        AmbientObjective(schedule_for("epsilon"), **options)
