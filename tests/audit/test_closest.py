"""Which real image is closest: a model that hands back what it saw, one that draws what it is asked for, and one that draws anything."""

from __future__ import annotations

import pytest
import torch

from ambient_sd.audit.closest import FEATURES, NAMES, closest, closest_rows, own_closest, own_rows

POINTS = 10 * torch.eye(6)


def by_name(points: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict.fromkeys(FEATURES, points)


TRAINING, HELDOUT = (by_name(POINTS[:2]), ["a", "b"]), (by_name(POINTS[2:]), ["c", "d", "e", "f"])


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
    rows = [by_name(POINTS[chosen] + 0.1) for chosen in (trained, new)]
    found = closest((rows[0], ["a", "b"]), (rows[1], ["c", "d", "e", "f"]), TRAINING, HELDOUT, resamples=50)
    for feature in FEATURES:
        assert tuple(found[f"{name}-{feature}"].value for name in NAMES) == expected
    assert all(f.low <= f.value <= f.high for f in found.values())
    rows_of = {row.name: row for row in closest_rows(found)}
    for feature in FEATURES:
        own, other = rows_of[f"own-{feature}"], rows_of[f"new-{feature}"]
        assert (own.generated.value, other.generated.value) == expected[:2]
        assert own.heldout is other.heldout is None  # samples for other captions are no held-out images


def test_features_are_judged_apart() -> None:
    """A sample in the colours of one image and the contours of another is its own by contours alone."""
    samples = {"pixels64": POINTS[[1, 0]], "edges16": POINTS[[0, 1]]}, ["a", "b"]
    hits = [own_closest(samples, TRAINING, HELDOUT, feature).tolist() for feature in FEATURES]
    assert hits == [[False, False], [True, True]]


def test_an_audit_counts_own_images_beside_the_bases() -> None:
    training = by_name(POINTS[:4]), ["a", "b", "c", "c"]
    samples = by_name(POINTS[[0, 1, 3, 4]] + 0.1), ["a", "b", "c", "elsewhere"]
    base = by_name(POINTS[[1, 1]] + 0.1), ["a", "b"]
    for row in own_rows(samples, training, by_name(POINTS[4:]), base, resamples=50):
        assert row.heldout is not None and row.excess is not None
        # Three prompts are training captions; of one caption with two images either is its own.
        assert (row.generated.value, row.generated.n, row.heldout.value, row.excess.value) == (1.0, 3, 0.5, 0.5)
    # A near-duplicate is as good as the image itself.
    alike = own_rows((by_name(POINTS[[1]]), ["a"]), training, None, None, duplicates=[0, 0, 1, 2], resamples=10)
    assert not alike  # by chance 2 of 4: captions tell too little apart
    alike = own_rows(
        (by_name(POINTS[[1]]), ["a"]),
        training,
        by_name(POINTS[:1].expand(8, -1) + 99),
        None,
        duplicates=[0, 0, 1, 2],
        resamples=10,
    )
    assert alike[0].generated.value == 1 and alike[0].heldout is None
