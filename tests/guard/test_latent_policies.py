"""Policies on the initial latent (Han et al., SAIL): their formulas by hand, their stops, whom they leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import latent_tools as tools
import pytest
import torch

from ambient_sd.guard.policies.base import Change, GuidanceBranches
from ambient_sd.guard.policies.latent_optimization import LatentOptimization
from ambient_sd.guard.policies.latents import LatentPolicy
from ambient_sd.guard.policies.sail import SAIL
from ambient_sd.utils.errors import UserError

ROW = torch.tensor([0])


def difference_norms(halves: GuidanceBranches, sample: torch.Tensor) -> list[float]:
    return [(halves.predict("cond", sample=sample) - halves.predict("uncond", sample=sample))[i].norm().item()
            for i in range(len(sample))]  # fmt: skip


def served(change: Change | None) -> torch.Tensor:
    assert change is not None and change.sample is not None
    return change.sample


# -- Han et al. ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.068])
def test_hans_loss_and_gradient_are_those_of_the_norm_of_the_noise_difference(factor: float) -> None:
    """|| f D x || has the gradient f D'D x / || D x ||."""
    matrix, x = tools.randn(8, 8), tools.randn(1, 2, 2, 2, seed=1).requires_grad_(True)
    start = tools.hand_start(tools.matrix_network(matrix), x.detach(), factor=factor)
    loss, norm = LatentOptimization(1.0).loss(start.halves, ROW, x)
    dx = matrix @ x.detach().flatten()
    assert loss.item() == norm.item() == pytest.approx(factor * dx.norm().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), [x])
    torch.testing.assert_close(gradient.flatten(), factor * matrix.T @ dx / dx.norm(), rtol=1e-10, atol=0)


def test_hans_first_step_is_one_step_of_adamw() -> None:
    """The first step of AdamW is x (1 - lr w) - lr g / (|g| + 1e-8), w = 0.01."""
    matrix, x = tools.randn(8, 8), tools.randn(1, 2, 2, 2, seed=1)
    start = tools.hand_start(tools.matrix_network(matrix), x)
    new = served(LatentOptimization(1e-9, lr=0.01, max_steps=1).begin(start))
    dx = matrix @ x.flatten()
    g = (matrix.T @ dx / dx.norm()).view_as(x)
    torch.testing.assert_close(new, x * (1 - 0.01 * 0.01) - 0.01 * g / (g.abs() + 1e-8), rtol=1e-9, atol=1e-12)
    assert (new - (x - 0.01 * g)).abs().max() > 1e-3  # the control: plain gradient descent is something else


def test_han_reaches_its_target_on_a_real_network_and_says_so() -> None:
    halves = tools.tiny_unet_halves()
    before = difference_norms(halves, halves.sample)
    target = 0.8 * min(before)
    change = LatentOptimization(target, lr=0.05, max_steps=200).begin(tools.start_of(halves))
    after = difference_norms(halves, served(change))
    assert change.changed == [True, True]
    assert change.first_score_before == pytest.approx(before) and change.first_score_after == pytest.approx(after)
    assert max(after) <= target
    assert all(0 < count < 200 for count in change.iterations or [])


def test_too_few_steps_serve_the_best_latent_and_report_its_score() -> None:
    halves = tools.tiny_unet_halves()
    before = difference_norms(halves, halves.sample)
    change = LatentOptimization(1e-6, lr=2.0, max_steps=3).begin(tools.start_of(halves))  # overshoots at once
    assert change.iterations == [3, 3]
    after = difference_norms(halves, served(change))
    assert change.first_score_after == pytest.approx(after)
    assert all(new <= old for new, old in zip(after, before, strict=True))


# -- SAIL ----------------------------------------------------------------------------------------------------------


def test_sails_loss_is_the_published_formula_on_a_linear_network() -> None:
    """s = -D x, u = s / || s ||: || s(x + d u) - s(x) ||^2 = d^2 || D u ||^2."""
    matrix, x = tools.randn(8, 8), tools.randn(1, 2, 2, 2, seed=1)
    start = tools.hand_start(tools.matrix_network(matrix), x)
    loss, norm = SAIL(1.0, alpha=0.3, delta=0.7).loss(start.halves, ROW, x)
    dx = matrix @ x.flatten()
    sharpness = 0.49 * (matrix @ dx / dx.norm()).square().sum()
    assert loss.item() == pytest.approx((sharpness + 0.3 * x.square().sum()).item(), rel=1e-12)
    assert norm.item() == pytest.approx(dx.norm().item(), rel=1e-12)


def test_sails_step_is_along_the_score_which_is_against_the_noise() -> None:
    """eps_c - eps_u = x^2, s = -x^2: the loss at x + d s / || s ||, not at x - d s / || s ||."""
    x = tools.randn(1, 2, 2, 2, seed=1)
    start = tools.hand_start(lambda sample, e: sample.square() * e.mean((1, 2)).view(-1, 1, 1, 1), x)
    loss, _ = SAIL(1.0, alpha=1e-12, delta=0.5).loss(start.halves, ROW, x)
    unit = -x.square() / x.square().norm()
    along, against = ((-(x + sign * 0.5 * unit).square() + x.square()).square().sum().item() for sign in (1, -1))
    assert loss.item() == pytest.approx(along, rel=1e-9)
    assert loss.item() != pytest.approx(against, rel=1e-2)


def test_sails_gradient_is_that_of_the_whole_loss_and_not_with_the_direction_held_still() -> None:
    halves = tools.tiny_unet_halves(images=1)
    policy = SAIL(1.0, alpha=1e-3, delta=1.0)
    x = halves.sample.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(policy.loss(halves, ROW, x)[0].sum(), [x])
    direction = tools.randn(1, 4, 8, 8, seed=9)
    h = 1e-5
    losses = [policy.loss(halves, ROW, halves.sample + sign * h * direction)[0].item() for sign in (1, -1)]
    assert (gradient * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-6)

    def held(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        s, moved = (halves.predict("uncond", sample=y) - halves.predict("cond", sample=y) for y in (x, x + unit))
        return (moved - s).square().sum() + 1e-3 * x.square().sum()

    s = (halves.predict("uncond") - halves.predict("cond")).detach()
    (control,) = torch.autograd.grad(held(x, s / s.norm()), [x])
    assert (control * direction).sum().item() != pytest.approx((gradient * direction).sum().item(), rel=1e-3)


def test_sail_lowers_its_loss_on_a_real_network_and_stops_at_the_target() -> None:
    halves = tools.tiny_unet_halves()
    policy = SAIL(1.0, max_steps=60)
    losses = [policy.loss(halves, torch.tensor([i]), halves.sample[i : i + 1])[0].item() for i in range(2)]
    target = 0.9 * min(losses)
    change = SAIL(target, max_steps=60).begin(tools.start_of(halves))
    new = served(change)
    assert change.changed == [True, True] and all(count < 60 for count in change.iterations or [])
    for i in range(2):
        assert policy.loss(halves, torch.tensor([i]), new[i : i + 1])[0].item() <= target
    assert change.first_score_after == pytest.approx(difference_norms(halves, new))


def test_a_prompt_without_effect_gives_sail_no_direction_and_no_harm() -> None:
    x = tools.randn(1, 2, 2, 2)
    start = tools.hand_start(tools.matrix_network(torch.zeros(8, 8)), x)
    new = served(SAIL(1e-9, max_steps=2).begin(start))
    assert new.isfinite().all()


# -- both ----------------------------------------------------------------------------------------------------------

KINDS: list[Callable[[], LatentPolicy]] = [
    lambda: LatentOptimization(0.1, lr=0.05, max_steps=4),
    lambda: SAIL(0.01, max_steps=4),
]


@pytest.mark.parametrize("kind", KINDS)
def test_images_together_get_the_very_latents_that_each_gets_alone(kind: Callable[[], LatentPolicy]) -> None:
    halves = tools.tiny_unet_halves(images=3)
    together = kind().begin(tools.start_of(halves))
    for i in range(3):
        alone = kind().begin(tools.start_of(halves, active=[k == i for k in range(3)]))
        assert torch.equal(served(together)[i], served(alone)[i])
        assert together.iterations and alone.iterations and together.iterations[i] == alone.iterations[i]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_not_active_is_neither_changed_nor_looked_at(kind: Callable[[], LatentPolicy]) -> None:
    halves = tools.tiny_unet_halves()
    change = kind().begin(tools.start_of(halves, active=[False, True]))
    assert change.changed == [False, True]
    assert torch.equal(served(change)[0], halves.sample[0])
    assert not torch.equal(served(change)[1], halves.sample[1])
    assert all(rows == [1] for _, rows, _ in halves.asked)
    assert change.first_score_before and math.isnan(change.first_score_before[0])


def test_an_image_under_the_target_keeps_its_latent() -> None:
    halves = tools.tiny_unet_halves()
    low, high = sorted(range(2), key=difference_norms(halves, halves.sample).__getitem__)
    norms = difference_norms(halves, halves.sample)
    change = LatentOptimization((norms[low] + norms[high]) / 2, lr=0.05).begin(tools.start_of(halves))
    assert change.iterations is not None and change.iterations[low] == 0 < change.iterations[high]
    assert not change.changed[low] and change.changed[high]
    assert torch.equal(served(change)[low], halves.sample[low])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_pipeline_is_asked_in_bfloat16_and_optimised_in_float32(kind: Callable[[], LatentPolicy]) -> None:
    """A step of 0.002 is less than half a unit in the last place of a bfloat16 number above 1: it would be lost."""
    x = (2 + tools.randn(1, 2, 2, 2).abs()).to(torch.bfloat16)
    policy = kind()
    policy.lr, policy.target, policy.max_steps = 0.002, 1e-9, 20
    start = tools.hand_start(tools.matrix_network(0.5 * torch.eye(8, dtype=torch.float64)), x)
    new = served(policy.begin(start))
    assert {dtype for _, _, dtype in start.halves.asked} == {torch.bfloat16}  # type: ignore[attr-defined]
    assert new.dtype == torch.bfloat16
    moved = (x.float() - new.float()).abs()
    assert (moved > 0.02).all()
    assert torch.equal(x - torch.full_like(x, 0.002), x)  # the control: one such step in bfloat16 is none


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_without_signal_is_refused(kind: Callable[[], LatentPolicy]) -> None:
    start = tools.hand_start(tools.matrix_network(torch.eye(8)), tools.randn(1, 2, 2, 2), factor=0.0)
    with pytest.raises(UserError, match="carries no score"):
        kind().begin(start)


def test_a_network_that_answers_nan_ends_the_descent_at_once() -> None:
    start = tools.hand_start(lambda sample, embeds: sample * math.nan, tools.randn(1, 2, 2, 2))
    change = LatentOptimization(1.0).begin(start)
    assert change.changed == [False] and change.iterations == [0]


@pytest.mark.parametrize("policy", [LatentOptimization, SAIL])
@pytest.mark.parametrize(
    "bad", [{"target": 0}, {"target": math.nan}, {"target": 1, "lr": -1}, {"target": 1, "max_steps": 0},
            {"target": 1, "max_steps": 1.5}]
)  # fmt: skip
def test_arguments_out_of_range_are_refused_in_one_line(policy: Callable[..., LatentPolicy], bad: dict) -> None:
    with pytest.raises(UserError) as error:
        policy(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [{"alpha": 0}, {"delta": math.inf}])
def test_sails_own_arguments_are_checked(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SAIL(1.0, **bad)
