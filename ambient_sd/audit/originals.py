"""The original that an image may be a copy of, and the nearest OTHER one: neighbours among images that differ.

    d1   distance to the nearest training image
    d2   distance to the nearest training image that is no duplicate of that one

With duplicates in the training set the second nearest image is another copy of the nearest: d1 / d2 is about 1 for the very
images that are memorized first. So training images carry labels, equal for copies of one image, and d2 is taken over other
labels. Which images are duplicates is the caller's to say (`ambient_sd.data.duplicates`).

A mirrored copy is far away in pixels. Given the vectors of the mirror images of the queries as well, every distance is the smaller
one of the two orientations, d2 too: what is searched twice must not halve d1 alone.

The one place where measures search.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ambient_sd.audit.features import Distance
from ambient_sd.audit.neighbours import Neighbours, Rows, nearest
from ambient_sd.utils.errors import UserError


def originals(
    views: Sequence[Tensor],
    training: Tensor | Rows,
    *,
    distance: Distance = "euclidean",
    duplicates: Sequence[Hashable] | None = None,
    own: Tensor | None = None,
    progress: bool = False,
) -> Neighbours:
    """Find for every query the nearest training image and the nearest one that is no duplicate of it.

    Args:
        views: the queries, `(N, D)`, one tensor an orientation, in one order.
        training: `(M, D)`, or rows on disk.
        distance: as in `nearest`.
        duplicates: one label per training row; None: all differ.
        own: the queries are these training rows, int64 `(N,)` (`one_of_each`): they and what has their label are not found.
        progress: show a bar of training rows.

    Returns:
        Neighbours with k = 2.

    Raises:
        UserError: another number of labels than of training rows, or fewer than two different images to find.

    Example:
        >>> training = torch.tensor([[0.0], [0.1], [5.0]])  # the first two are one image
        >>> originals([torch.tensor([[0.2]])], training, duplicates=["a", "a", "b"]).index.tolist()
        [[1, 2]]
    """
    total = training.shape[0]
    labels = range(total) if duplicates is None else duplicates
    if len(labels) != total:
        raise UserError(f"{len(labels)} labels of duplicates for {total} training images", rule="one each")
    numbers: dict[Hashable, int] = {}
    label = torch.tensor([numbers.setdefault(name, len(numbers)) for name in labels])
    if len(numbers) - int(own is not None) < 2:
        raise UserError(
            f"{len(numbers)} different training images", rule="the nearest is held against the second nearest",
            remedy="give more of them",
        )  # fmt: skip
    not_found = torch.full((len(views[0]),), -1) if own is None else label[own]
    values = torch.full((len(views[0]), 2), torch.inf, dtype=torch.float64)
    index = torch.full((len(views[0]), 2), -1)
    pending, k = torch.arange(len(views[0])), 2 + int(own is not None)
    while len(pending):
        k = min(k, total)
        found = [nearest(view[pending], training, k, distance=distance, progress=progress) for view in views]
        v, i = _two_labels(found, label, not_found[pending])
        done = torch.isfinite(v[:, 1])
        values[pending[done]], index[pending[done]] = v[done], i[done]
        # The k nearest were all copies of one image: look further.
        pending, k = pending[~done], 4 * k
    return Neighbours(values, index, distance)


def one_of_each(labels: Sequence[Hashable], most: int | None = None, seed: int = 0) -> Tensor:
    """Return the first row of every label, int64, ascending; with more than `most` labels, of that many drawn by the seed.

    Example:
        >>> one_of_each(["a", "b", "a", "c"]).tolist()
        [0, 1, 3]
    """
    first = {name: row for row, name in reversed(list(enumerate(labels)))}
    rows = torch.tensor(sorted(first.values()))
    if most is not None and len(rows) > most:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]
        rows = rows[drawn.sort().values]
    return rows


def _two_labels(found: Sequence[Neighbours], label: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest row and the nearest one of another label, inf where an orientation shows fewer than two labels."""
    values, index = [], []
    complete = torch.ones(len(own), dtype=torch.bool)
    for one in found:
        labels = label[one.index]
        d = one.distance.masked_fill(labels == own[:, None], torch.inf)
        first = d.argmin(1, keepdim=True)
        other = d.masked_fill(labels == labels.gather(1, first), torch.inf)
        second = other.argmin(1, keepdim=True)
        # Only with two labels in sight is it certain that no nearer row of another label was left out.
        complete &= torch.isfinite(other.gather(1, second)).flatten()
        values += [d.gather(1, first), other.gather(1, second)]
        index += [one.index.gather(1, first), one.index.gather(1, second)]
    all_values, all_index = torch.cat(values, 1), torch.cat(index, 1)
    first = all_values.argmin(1, keepdim=True)
    labels = label[all_index]
    other = all_values.masked_fill(labels == labels.gather(1, first), torch.inf)
    second = other.argmin(1, keepdim=True)
    value = torch.cat([all_values.gather(1, first), other.gather(1, second)], 1)
    value[~complete, 1] = torch.inf
    return value, torch.cat([all_index.gather(1, first), all_index.gather(1, second)], 1)
