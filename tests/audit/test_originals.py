"""The original and the nearest other one: against a brute force over groups, with and without mirror images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from ambient_sd.audit.features import MIRROR, Pixels, embed
from ambient_sd.audit.metrics import measure, memorized
from ambient_sd.audit.neighbours import Neighbours, nearest
from ambient_sd.audit.originals import one_of_each, originals
from ambient_sd.utils.errors import UserError


def brute(
    views: list[Tensor], training: Tensor, labels: list[int], own: list[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Return d1 and d2 of every query and the label of the nearest, by trying everything in float64."""
    values, names = [], []
    for i in range(len(views[0])):
        least: dict[int, float] = {}
        for view in views:
            for j, row in enumerate(training):
                if own is None or labels[j] != own[i]:
                    d = float((view[i].double() - row.double()).norm())
                    least[labels[j]] = min(least.get(labels[j], torch.inf), d)
        order = sorted(least, key=lambda name: least[name])
        values.append([least[order[0]], least[order[1]]])
        names.append(order[0])
    return torch.tensor(values, dtype=torch.float64), names


@pytest.mark.parametrize("turned", [False, True])
def test_nearest_and_second_label_equal_a_brute_force_over_labels(turned: bool) -> None:
    g = torch.Generator().manual_seed(0)
    training = torch.randn(60, 4, generator=g)
    labels = torch.randint(0, 7, (60,), generator=g).tolist()
    # Nineteen rows that nearly agree: the first rings of neighbours hold one label only.
    training[20:39] = training[20] + 0.001 * torch.randn(19, 4, generator=g)
    labels[20:39] = [20] * 19
    views = [training[20:40:3] + 0.01, *([torch.randn(7, 4, generator=g)] if turned else [])]
    found = originals(views, training, duplicates=labels)
    values, names = brute(views, training, labels)
    torch.testing.assert_close(found.distance, values)
    assert [labels[i] for i in found.index[:, 0].tolist()] == names
    assert all(labels[i] != labels[j] for i, j in found.index.tolist())


def test_background_leaves_out_an_image_with_all_its_duplicates_and_asks_for_one_of_each() -> None:
    g = torch.Generator().manual_seed(1)
    training = torch.randn(12, 3, generator=g)
    labels = [0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 10]
    training[4], training[8] = training[0] + 1e-3, training[0] - 1e-3
    first = [i for i, name in enumerate(labels) if name not in labels[:i]]
    rows = one_of_each(labels)
    assert rows.tolist() == first
    found = originals([training[rows]], training, duplicates=labels, own=rows)
    values, names = brute([training[first]], training, labels, [labels[i] for i in first])
    torch.testing.assert_close(found.distance, values)
    assert [labels[i] for i in found.index[:, 0].tolist()] == names and len(found.distance) == len(first)


def test_without_duplicates_the_answer_is_that_of_the_plain_search() -> None:
    g = torch.Generator().manual_seed(2)
    queries, training = torch.randn(9, 5, generator=g), torch.randn(30, 5, generator=g)
    for distance in ("euclidean", "cosine"):
        found, plain = originals([queries], training, distance=distance), nearest(queries, training, distance=distance)  # type: ignore[arg-type]
        assert torch.equal(found.distance, plain.distance) and torch.equal(found.index, plain.index)
        assert found.metric == distance
    alone = nearest(training, training, exclude_self=True)
    torch.testing.assert_close(originals([training], training, own=torch.arange(30)).distance, alone.distance)


def test_near_copy_of_a_duplicated_image_is_a_copy_only_with_labels() -> None:
    g = torch.Generator().manual_seed(3)
    training = torch.randn(10, 8, generator=g)
    training[9] = training[0] + 0.05 * torch.randn(8, generator=g)  # a duplicate that differs a little
    copy = training[:1] + 0.02 * torch.randn(1, 8, generator=g)
    labels = [*range(9), 0]
    assert memorized(originals([copy], training, duplicates=labels)).all()
    assert not memorized(originals([copy], training)).any()  # d1 / d2 sees the duplicate as the second nearest


def test_a_mirrored_copy_is_found_by_its_mirror_image_and_d2_is_taken_over_both() -> None:
    g = torch.Generator().manual_seed(4)
    noise = torch.randint(0, 256, (6, 16, 16, 3), generator=g, dtype=torch.uint8)
    images = [Image.fromarray(p.numpy()) for p in noise]
    turned = [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in images[:3]]
    feature = Pixels(16)
    both = embed(turned, [feature], mirrored=True)
    training = feature(images)
    assert torch.equal(both[feature.name + MIRROR], training[:3])
    views = [both[feature.name], both[feature.name + MIRROR]]
    assert memorized(originals(views, training)).all() and not memorized(originals(views[:1], training)).any()
    values, _ = brute(views, training, list(range(6)))
    torch.testing.assert_close(originals(views, training).distance, values)


def test_the_search_widens_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def search(queries: Tensor, training: Tensor, k: int, **options: object) -> Neighbours:
        asked.append(k)
        return nearest(queries, training, k, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("ambient_sd.audit.originals.nearest", search)
    training = torch.eye(20)
    originals([training[:2]], training, duplicates=[0] * 10 + list(range(10, 20)))
    assert asked and asked == sorted(asked)  # wider rings only where the first held one image alone


def test_too_few_different_images_and_missing_labels_are_refused() -> None:
    training = torch.eye(4)
    with pytest.raises(UserError, match="1 different training image"):
        originals([training], training, duplicates=[0, 0, 0, 0])
    with pytest.raises(UserError, match="2 different"):
        originals([training], training, duplicates=[0, 0, 1, 1], own=torch.arange(4))
    with pytest.raises(UserError, match="3 labels"):
        originals([training], training, duplicates=[0, 1, 2])


def test_measure_without_heldout_gives_copies_and_background_but_no_excess_and_no_quality() -> None:
    g = torch.Generator().manual_seed(5)
    noise = torch.randint(0, 256, (12, 16, 16, 3), generator=g, dtype=torch.uint8)
    images = [Image.fromarray(p.numpy()) for p in noise]
    feature = Pixels(16)
    feature.quality = True  # type: ignore[misc]
    result = measure(images[:6], images, None, [feature], resamples=20, mirrored=True)
    (row,) = result.rows
    assert row.generated.value == 1.0 and row.heldout is None and row.excess is None
    assert row.background is not None and row.background.value == 0.0 and not result.heldout_neighbours
