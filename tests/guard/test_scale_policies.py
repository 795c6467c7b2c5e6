"""STP, DTP, OG, the scale cap and despecification follow their formulas, per image, without leaving the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_network import guided, step_of

from ambient_sd.guard.policies import (
    Compose,
    Despecification,
    DynamicTransition,
    OppositeGuidance,
    Policy,
    ScaleCap,
    ScalePolicy,
    StaticTransition,
    Step,
)
from ambient_sd.utils.errors import UserError


def scales(policy: ScalePolicy, step: Step) -> list[float]:
    """The guidance scale of each image, from what the pipeline makes of the policy's outputs; own: the pipeline's."""
    difference = (step.cond - step.uncond).flatten(1)
    moved = (guided(policy.step(step), step.guidance_scale) - step.uncond).flatten(1)
    found = (moved * difference).sum(1) / (difference * difference).sum(1)
    assert torch.allclose(moved, found[:, None] * difference, atol=1e-4)
    return found.tolist()


@pytest.mark.parametrize(("timestep", "expected"), [(999, 0.0), (500.5, 0.0), (500, 7.5), (1, 7.5)])
def test_stp_has_no_guidance_until_the_transition_point_and_the_pipelines_after(
    timestep: float, expected: float
) -> None:
    step = step_of([[3.0, 4.0]], timestep)
    assert scales(StaticTransition(), step) == pytest.approx([expected] * 2, abs=1e-5)
    cond, uncond = StaticTransition().step(step)
    assert torch.equal(uncond, step.uncond)
    assert torch.equal(cond, step.uncond if expected == 0 else step.cond)  # to the bit in both cases
    if expected == 0:
        assert scales(StaticTransition(until=1000), step) == pytest.approx(
            [7.5] * 2
        )  # control: the point is what decides


@pytest.mark.parametrize(("timestep", "expected"), [(999, -2.0), (651, -2.0), (650, 7.5), (100, 7.5)])
def test_og_guides_away_until_its_point(timestep: float, expected: float) -> None:
    assert scales(OppositeGuidance(), step_of([[3.0, 4.0]], timestep)) == pytest.approx([expected] * 2, abs=1e-4)


@pytest.mark.parametrize(("timestep", "expected"), [(981, -2.0), (651, -2.0), (650, 0.0), (501, 0.0), (500, 7.5)])
def test_og_and_stp_together_leave_a_stretch_without_guidance(timestep: float, expected: float) -> None:
    step = step_of([[3.0]], timestep)
    both = Compose(OppositeGuidance(), StaticTransition())
    assert scales(both, step) == pytest.approx([expected], abs=1e-4)  # type: ignore[arg-type]
    if timestep > 650:  # control: in the other order STP is first, and OG never acts
        assert scales(Compose(StaticTransition(), OppositeGuidance()), step) == pytest.approx([0], abs=1e-4)  # type: ignore[arg-type]


CURVES = {  # curve: the first evaluation with the pipeline's guidance, None if never
    (5, 4, 3, 4, 2, 1): 3,
    (5, 6, 5, 6, 1, 1): 3,  # the first value is no minimum: a rise needs a fall before it
    (5, 3, 3, 4, 1, 1): 3,  # a plateau
    (1, 2, 3, 4, 5, 6): None,
    (6, 5, 4, 3, 2, 1): None,
    (0, 2, 1, 1, 1, 3): 5,
    (2, 1, 2, 1, 0, 0): 2,  # and it stays
}


def test_dtp_waits_for_each_images_first_local_minimum() -> None:
    curves = torch.tensor(list(CURVES), dtype=torch.float32).T
    for k in range(len(curves)):
        found = scales(DynamicTransition(), step_of(curves[: k + 1].tolist()))
        expected = [7.5 if first is not None and k >= first else 0.0 for first in CURVES.values()]
        assert found == pytest.approx(expected, abs=1e-4), k
    assert scales(DynamicTransition(-2), step_of([[5.0], [4.0]])) == pytest.approx([-2], abs=1e-4)


def test_dtp_has_no_state_and_images_do_not_see_each_other() -> None:
    policy, curves = DynamicTransition(), torch.tensor(list(CURVES), dtype=torch.float32).T
    last = policy.scale(step_of(curves.tolist()))
    policy.scale(step_of(curves[:2].tolist()))
    assert torch.equal(policy.scale(step_of(curves.tolist())).isnan(), last.isnan())
    for i in range(curves.shape[1]):
        assert bool(policy.scale(step_of(curves[:, i : i + 1].tolist())).isnan()) == bool(last[i].isnan())


def test_the_cap_lowers_the_scale_in_proportion_to_the_score() -> None:
    step = step_of([[9.0] * 4, [1.0, 2.0, 4.0, 8.0]])
    assert scales(ScaleCap(2.0), step) == pytest.approx([7.5, 7.5, 3.75, 1.875], rel=1e-4)
    cond, _ = ScaleCap(2.0).step(step)
    assert torch.equal(cond[:2], step.cond[:2])  # at or under the cap to the bit
    assert scales(ScaleCap(1e9), step) == pytest.approx([7.5] * 4)
    assert ScaleCap(2.0).scale(step_of([[0.0, math.nan]])).isnan().all()


def test_despecification_subtracts_up_to_all_guidance_above_its_threshold() -> None:
    step = step_of([[1.0, 2.0, 2.1, 8.0, 100.0]])
    # s_1 = max(min(c_1 d, g - 1), 0): 0.5 * 2.1 and 0.5 * 8, then the bound 6.5
    assert scales(Despecification(0.5, threshold=2.0), step) == pytest.approx([7.5, 7.5, 6.45, 3.5, 1.0], rel=1e-4)
    assert scales(Despecification(0.5, threshold=0.0), step)[0] == pytest.approx(
        7.0, rel=1e-4
    )  # control: the threshold
    weak = step_of([[100.0]], scale=0.8)  # max(., 0): guidance below 1 is not raised to 1
    assert scales(Despecification(0.5, threshold=2.0), weak) == pytest.approx([0.8], rel=1e-4)


@pytest.mark.parametrize(
    "policy",
    [StaticTransition(), DynamicTransition(), OppositeGuidance(), ScaleCap(2), Despecification(1, 2),
     Compose(OppositeGuidance(), StaticTransition(), ScaleCap(2))],
    ids=lambda policy: type(policy).__name__,
)  # fmt: skip
def test_no_scale_is_read_on_the_host(policy: Policy) -> None:
    """A meta tensor has no values: whoever asks for one, as a synchronisation does, fails."""
    step = step_of([[3.0, 1.0], [2.0, 1.0], [3.0, 1.0]], device="meta")
    outputs = policy.step(step)
    assert outputs is not None and outputs[0].is_meta

    class Reads(ScalePolicy):
        def scale(self, step: Step) -> torch.Tensor:
            return step.norms[-1] * (0 if step.timestep > 500 else 1)

    with pytest.raises(RuntimeError):  # control
        Reads().step(step)


BAD: list[tuple[Any, tuple[Any, ...], str]] = [
    (StaticTransition, (-1,), "until -1.*finite number, at least 0"),
    (StaticTransition, (math.nan,), "until nan.*finite"),
    (StaticTransition, ("500",), "until '500'.*finite"),
    (StaticTransition, (True,), "until True.*finite"),
    (DynamicTransition, (math.inf,), "scale inf.*finite"),
    (OppositeGuidance, (0,), "scale 0.*below 0"),
    (OppositeGuidance, (2.0,), "scale 2.0.*below 0"),
    (OppositeGuidance, (-2, None), "until None.*finite"),
    (ScaleCap, (0,), "cap 0.*above 0"),
    (Despecification, (0, 1), "strength 0.*above 0"),
    (Despecification, (1, -1), "threshold -1.*at least 0"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), BAD)
def test_arguments_out_of_range_are_refused_with_their_rule(
    kind: Any, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kind(*arguments)
