"""The two rates of an audit, from one decision: generated images that are copies, and training images that come back.

A studio asks for the first, a hospital for the second: whose images are in there? Near-duplicates count as one training image. The second rate grows
with the number of generated images: what did not come back may still come back in more of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ambient_sd.audit.decision import Decided
from ambient_sd.audit.metrics import Row, bootstrap, difference
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate

COPIES = "copies"
RETURNED = "training-copied"


def copy_rate(
    decided: Decided, unseen: Tensor | None, groups: Sequence[Hashable] | None = None, *, seed: int = 0, resamples: int = 1000
) -> Row:  # fmt: skip
    """Estimate the copy rate: the share of generated images that are copies, beside that of real images that the model never saw.

    Images that show too little to be compared (`Decided.compared`: black, blank, a few thin lines) are left out: they are no evidence.

    Raises:
        UserError: no image can be compared.

    Args:
        unseen: bool `(M,)`, which of the real images would be called copies; None: there are none.
        groups: one label per generated image, its prompt.

    Example:
        >>> one = torch.zeros(2, dtype=torch.float64)
        >>> decided = Decided(torch.tensor([True, False]), one, torch.tensor([0, 3]), one, one)
        >>> copy_rate(decided, None, resamples=50).generated.value
        0.5
    """
    options: dict[str, Any] = {"name": COPIES, "seed": seed, "resamples": resamples, "share": True}
    seen = decided.compared
    if len(decided) and not seen.any():
        raise nothing_to_compare(decided)
    detail = "share of generated images" + (
        "" if seen.all() else f", {int((~seen).sum())} that show too little left out"
    )
    kept = None if groups is None else [group for group, one in zip(groups, seen.tolist(), strict=True) if one]
    made = bootstrap(decided.copy[seen], torch.mean, groups=kept, detail=detail, **options)
    if unseen is None:
        return Row(COPIES, made, None, None)
    real = bootstrap(unseen, torch.mean, detail="each judged without itself", **options)
    return Row(COPIES, made, real, difference(made, real))


def nothing_to_compare(decided: Decided) -> UserError:
    """Return the refusal of a rate where images show too little: what cannot be compared is not free of copies.

    Example:
        >>> one = torch.zeros(2, dtype=torch.float64)
        >>> decided = Decided(torch.tensor([False, False]), one, torch.tensor([0, 3]), torch.tensor([0.4, torch.inf]), one)
        >>> print(nothing_to_compare(decided))
        1 of 2 generated images shows too little to be compared; must be an image with contrast: a black or blank one is no evidence of no copy; look at them
    """
    n = int((~decided.compared).sum())
    return UserError(f"{n} of {len(decided)} generated images show{'s' if n == 1 else ''} too little to be compared",
                     rule="must be an image with contrast: a black or blank one is no evidence of no copy", remedy="look at them")  # fmt: skip


def returned(decided: Decided, labels: Sequence[Hashable], *, seed: int = 0) -> Row:
    """Estimate the share of training images (near-duplicates as one) of which a generated image is a copy; Wilson's interval.

    Args:
        labels: one per training row, equal for near-duplicates; `decided.row` counts these rows.

    Example:
        >>> one = torch.zeros(2, dtype=torch.float64)
        >>> decided = Decided(torch.tensor([True, False]), one, torch.tensor([0, 3]), one, one)
        >>> returned(decided, ["a", "b", "c", "d"]).generated.value
        0.25
    """
    back = {labels[row] for row in _rows(decided)}
    total = len(set(labels))
    detail = f"share of training images that come back in {len(decided)} generated ones: {len(back)} of {total}"
    return Row(RETURNED, Estimate.of_share(len(back), total, name=RETURNED, seed=seed, detail=detail), None, None)


def by_group(decided: Decided, labels: Sequence[Hashable], groups: Sequence[str]) -> list[dict[str, Any]]:
    """Return for every group of training images (a person, an artist) how many it has, how many come back, and in how many copies.

    Args:
        labels, groups: one per training row.

    Returns:
        One dict a group, those with most images returned first: value, training, returned, copies, share, low, high (Wilson).

    Example:
        >>> one = torch.zeros(2, dtype=torch.float64)
        >>> decided = Decided(torch.tensor([True, False]), one, torch.tensor([0, 3]), one, one)
        >>> [(g["value"], g["returned"]) for g in by_group(decided, ["a", "b", "c", "d"], ["Ann", "Ann", "Bo", "Bo"])]
        [('Ann', 1), ('Bo', 0)]
    """
    rows = _rows(decided)
    found = []
    for value in dict.fromkeys(groups):
        members = {label for label, group in zip(labels, groups, strict=True) if group == value}
        back = {labels[row] for row in rows if groups[row] == value}
        share = Estimate.of_share(len(back), len(members))
        found.append({"value": value, "training": len(members), "returned": len(back),
                      "copies": sum(groups[row] == value for row in rows), "share": share.value, "low": share.low, "high": share.high})  # fmt: skip
    return sorted(found, key=lambda one: (-one["returned"], -one["share"], one["value"]))


def _rows(decided: Decided) -> list[int]:
    found: list[int] = decided.row[decided.copy].tolist()
    return found
