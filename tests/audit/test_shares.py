"""Both shares of an audit against counts by hand: generated images that are copies, training images that come back."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ambient_sd.audit.decision import Decided
from ambient_sd.audit.shares import COPIES, RETURNED, by_group, copy_rate, returned
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import wilson

# Ten generated images; six are copies of rows 0, 0, 1, 2, 5 and 5. Rows 1 and 2 are near-duplicates; 4 is near, but no copy.
COPY = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
ROW = [0, 0, 1, 2, 5, 5, 4, 3, 6, 4]
LABELS = ["a", "b", "b", "c", "d", "e", "f"]
GROUPS = ["Ann", "Ann", "Bea", "Bea", "Cem", "Cem", "Dan"]


def decided(copy: list[int] = COPY, row: list[int] = ROW) -> Decided:
    zeros = torch.zeros(len(copy), dtype=torch.float64)
    return Decided(torch.tensor(copy, dtype=torch.bool), zeros, torch.tensor(row, dtype=torch.int64), zeros, zeros)


def test_the_share_of_generated_images_is_held_against_unseen_ones() -> None:
    row = copy_rate(decided(), torch.tensor([True] + [False] * 9))
    assert row.name == COPIES and row.generated.value == pytest.approx(0.6) and row.generated.n == 10
    assert row.heldout is not None and row.heldout.value == pytest.approx(0.1)
    assert row.excess is not None and row.excess.value == pytest.approx(0.5)
    assert row.generated.low < 0.6 < row.generated.high
    alone = copy_rate(decided(), None)
    assert alone.heldout is None and alone.excess is None and alone.generated.value == pytest.approx(0.6)


def test_images_that_show_nothing_are_no_evidence() -> None:
    found = decided()
    residual = torch.tensor(
        [math.inf] * 2 + [0.5] * 6 + [math.inf] * 2, dtype=torch.float64
    )  # two of the copies among them
    rate = copy_rate(dataclasses.replace(found, residual=residual), None, groups=list("aabbccddee")).generated
    assert rate.value == pytest.approx(6 / 8) and rate.n == 8 and "2 that show too little left out" in rate.detail
    with pytest.raises(UserError, match="3 of 3 generated images show too little to be compared"):
        copy_rate(dataclasses.replace(decided([0] * 3, [0] * 3), residual=residual[[0, 1, 8]]), None)


def test_images_of_one_prompt_are_resampled_together() -> None:
    """All of two prompts are copies and none of eight others: by prompt the interval is that of ten, not of eighty."""
    copy = [int(i < 16) for i in range(80)]
    one_by_one = copy_rate(decided(copy, [0] * 80), None).generated
    by_prompt = copy_rate(decided(copy, [0] * 80), None, groups=[i // 8 for i in range(80)]).generated
    assert one_by_one.value == by_prompt.value == pytest.approx(0.2)
    assert by_prompt.high - by_prompt.low > 1.5 * (one_by_one.high - one_by_one.low)


def test_training_images_come_back_once_each_and_near_duplicates_as_one() -> None:
    found = returned(decided(), LABELS).generated
    assert found.n == 6 and found.value == pytest.approx(3 / 6)  # a, b and e of a to f
    assert (found.low, found.high) == pytest.approx(wilson(3 / 6, 6))
    assert "3 of 6" in found.detail and found.name == RETURNED
    none = returned(decided([0] * 10), LABELS).generated
    assert none.value == none.low == 0 < none.high


def test_groups_are_counted_by_hand_and_those_with_most_returned_come_first() -> None:
    found = by_group(decided(), LABELS, GROUPS)
    assert [(one["value"], one["training"], one["returned"], one["copies"]) for one in found] == [
        ("Ann", 2, 2, 3), ("Bea", 2, 1, 1), ("Cem", 2, 1, 2), ("Dan", 1, 0, 0),
    ]  # fmt: skip
    assert sum(one["copies"] for one in found) == sum(COPY)
    for one in found:
        assert one["share"] == one["returned"] / one["training"]
        assert (one["low"], one["high"]) == pytest.approx(wilson(one["share"], one["training"]))


def test_near_duplicates_of_one_group_count_as_one_there_too() -> None:
    (one,) = by_group(decided(), LABELS, ["all"] * 7)
    assert (one["training"], one["returned"], one["copies"], one["share"]) == (6, 3, 6, 0.5)
    assert not any(one["returned"] or one["copies"] for one in by_group(decided([0] * 10), LABELS, GROUPS))
