"""Which real image is closest: a model that hands back what it saw, one that draws what it is asked for, and one that draws anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.style import closest

POINTS = 10 * torch.eye(6)
REALS: Any = SimpleNamespace(
    training={"deep": POINTS[:2]}, heldout={"deep": POINTS[2:]}, captions=["a", "b"], heldout_captions=["c", "d", "e", "f"],
    features=[None, SimpleNamespace(name="deep")],
)  # fmt: skip


@pytest.mark.parametrize(
    ("trained", "new", "expected"),
    [
        ([0, 1], [0, 1, 0, 1], (1, 0, 1)),  # its training images, whatever it is asked for
        ([0, 1], [2, 3, 4, 5], (1, 1, 0)),  # what it is asked for
        ([5, 5], [5, 5, 5, 5], (0, 0.25, 0)),  # one image
    ],
)
def test_what_is_handed_back_is_told_from_what_is_drawn(
    trained: list[int], new: list[int], expected: tuple[float, ...]
) -> None:
    rows = [POINTS[chosen] + 0.1 for chosen in (trained, new)]
    found = closest(*rows, ["a", "b"], ["c", "d", "e", "f"], REALS, 0)
    assert tuple(found[name].value for name in ("own", "new", "drawn")) == expected
    assert all(f.low <= f.value <= f.high for f in found.values())
