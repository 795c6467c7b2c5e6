"""Blocked search against a float64 brute force from differences (torch.cdist without its matrix-product shortcut)."""

from __future__ import annotations

import pytest
import torch

from ambient_sd.audit.neighbours import nearest
from ambient_sd.errors import UserError


def brute(queries: torch.Tensor, reference: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    d = torch.cdist(queries.double(), reference.double(), compute_mode="donot_use_mm_for_euclid_dist")
    order = d.sort(dim=1, stable=True)
    return order.values[:, :k], order.indices[:, :k]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [7, 64, 10_000])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_blocked_search_equals_float64_brute_force(block: int, k: int) -> None:
    queries, reference = draw(50, 32, seed=1), draw(333, 32, seed=2)
    found = nearest(queries, reference, k=k, block=block, query_block=16)
    distance, index = brute(queries, reference, k)
    assert torch.equal(found.index, index)
    torch.testing.assert_close(found.distance, distance, rtol=1e-12, atol=0)


def test_distances_of_near_copies_survive_a_large_common_offset() -> None:
    reference = draw(400, 64, seed=3).double() + 1000
    queries = reference[:40] + 1e-5 * draw(40, 64, seed=4).double()
    found = nearest(queries, reference)
    distance, index = brute(queries, reference, 2)
    assert torch.equal(found.index, index)
    torch.testing.assert_close(found.distance, distance, rtol=1e-9, atol=0)
    # Negative control: the textbook float32 expansion loses these distances completely.
    q, r = queries.float(), reference.float()
    naive = (q.square().sum(1)[:, None] + r.square().sum(1)[None] - 2 * q @ r.T).clamp_min(0).sqrt().min(dim=1).values
    assert ((naive.double() - distance[:, 0]).abs() > 0.9 * distance[:, 0]).all()


def test_more_ties_than_candidates_still_give_the_lowest_indices() -> None:
    reference = draw(1, 16, seed=5).repeat(200, 1)
    found = nearest(draw(3, 16, seed=6), reference, k=3, block=32)
    assert torch.equal(found.index, torch.tensor([[0, 1, 2]] * 3))


@pytest.mark.parametrize("block", [9, 1000])
def test_leave_one_out_never_finds_itself_but_finds_a_true_duplicate(block: int) -> None:
    rows = draw(60, 8, seed=7)
    rows[41] = rows[5]
    found = nearest(rows, rows, k=2, exclude_self=True, block=block, query_block=11)
    assert (found.index != torch.arange(60)[:, None]).all()
    assert found.index[5, 0] == 41 and found.distance[5, 0] == 0
    d = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    assert torch.equal(found.index, d.sort(dim=1, stable=True).indices[:, :2])
    # Negative control: without the option every row is its own neighbour.
    assert torch.equal(nearest(rows, rows).distance[:, 0], torch.zeros(60, dtype=torch.float64))


def test_leave_one_out_works_on_the_smallest_set() -> None:
    found = nearest(torch.eye(3), torch.eye(3), k=2, exclude_self=True)
    assert torch.equal(found.index, torch.tensor([[1, 2], [0, 2], [0, 1]]))


def test_cosine_distance_is_one_minus_similarity_for_rows_of_any_length() -> None:
    queries, reference = draw(20, 24, seed=8) * 7, draw(90, 24, seed=9) * 0.01
    found = nearest(queries, reference, k=2, distance="cosine")
    similarity = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(reference.double()).T
    torch.testing.assert_close(found.similarity, similarity.max(dim=1).values, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.index[:, 0], similarity.argmax(dim=1))
    with pytest.raises(ValueError, match="cosine"):
        _ = nearest(queries, reference).similarity


def test_exact_copy_of_a_duplicated_picture_has_ratio_zero_not_nan() -> None:
    reference = torch.cat([torch.zeros(2, 4), torch.ones(3, 4)])
    assert nearest(torch.zeros(1, 4), reference).ratio.tolist() == [0.0]


@pytest.mark.parametrize(
    ("queries", "reference", "options"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), {}),
        (torch.zeros(2, 3), torch.zeros(1, 3), {}),
        (torch.zeros(2, 3), torch.zeros(5, 3), {"exclude_self": True}),
        (torch.full((2, 3), float("nan")), torch.zeros(5, 3), {}),
    ],
)
def test_impossible_searches_are_refused_in_one_line(
    queries: torch.Tensor, reference: torch.Tensor, options: dict[str, bool]
) -> None:
    with pytest.raises(UserError) as caught:
        nearest(queries, reference, **options)
    assert "\n" not in str(caught.value)
