"""Blocked search against a float64 brute force from differences (torch.cdist without its matrix-product shortcut)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ambient_sd.audit import neighbours
from ambient_sd.audit.features import Distance
from ambient_sd.audit.neighbours import Arithmetic, nearest
from ambient_sd.utils.errors import UserError


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


def test_exact_copy_of_a_duplicated_image_has_ratio_zero_not_nan() -> None:
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


def by_difference(queries: torch.Tensor, reference: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 brute force from differences, query by query: the definition."""
    d = torch.stack([(reference.double() - query.double()).norm(dim=1) for query in queries])
    order = d.sort(dim=1, stable=True)
    return order.values[:, :k], order.indices[:, :k]


def tight(count: int, dim: int, *, seed: int, spread: float) -> torch.Tensor:
    """Clusters whose rows differ by less than bfloat16 resolves."""
    return draw(7, dim, seed=5)[torch.arange(count) % 7] + spread * draw(count, dim, seed=seed)


SETS = {
    "plain": (draw(40, 37, seed=1), draw(700, 37, seed=2)),
    "clusters": (tight(40, 37, seed=3, spread=1e-4), tight(700, 37, seed=4, spread=1e-4)),
    "one cluster far off": (1e-3 * draw(40, 64, seed=1) + 100, 1e-3 * draw(700, 64, seed=2) + 100),
    "duplicates": (draw(40, 5, seed=1), draw(50, 5, seed=2).repeat(14, 1)),
    "all the same": (draw(40, 16, seed=1), draw(1, 16, seed=2).repeat(300, 1)),
    "queries among the rows": (draw(700, 33, seed=2)[:40], draw(700, 33, seed=2)),
    "very small": (1e-30 * draw(40, 20, seed=1), 1e-30 * draw(700, 20, seed=2)),
    "very large": (1e15 * draw(40, 20, seed=1), 1e15 * draw(700, 20, seed=2)),
    "in order of distance": (draw(40, 12, seed=1), draw(700, 12, seed=2) * torch.linspace(9, 0, 700)[:, None]),
    "half precision": (draw(40, 37, seed=1).half(), draw(700, 37, seed=2).half()),
    "double precision": (draw(40, 37, seed=1).double() / 3, draw(700, 37, seed=2).double() / 3),
}


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_every_arithmetic_gives_the_bits_of_brute_force(name: str, arithmetic: Arithmetic, distance: Distance) -> None:
    queries, reference = SETS[name]
    found = nearest(queries, reference, k=3, block=256, query_block=16, arithmetic=arithmetic, distance=distance)
    if distance == "cosine":
        queries, reference = (side.double() / side.double().norm(dim=1, keepdim=True) for side in (queries, reference))
    value, index = by_difference(queries, reference, 3)
    assert torch.equal(found.index, index)
    assert torch.equal(found.distance, value.square() / 2 if distance == "cosine" else value)


def test_without_the_bound_on_what_bfloat16_loses_neighbours_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, reference = SETS["clusters"]
    # Negative control: the same product, with nothing added for the rounding of its factors.
    monkeypatch.setattr(neighbours, "_above", torch.zeros_like)
    found = nearest(queries, reference, k=3, block=256, arithmetic="bfloat16")
    assert not torch.equal(found.index, by_difference(queries, reference, 3)[1])


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_few_rows_are_compared_exactly(arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    exact = neighbours.exact_distances
    monkeypatch.setattr(
        neighbours, "exact_distances", lambda q, r, **options: compared.append(len(q)) or exact(q, r, **options)
    )
    nearest(draw(100, 64, seed=1), draw(20_000, 64, seed=2), arithmetic=arithmetic)
    # 2 (1 + ln of the number of blocks) of 20,000 would pass an exact test on rows in random order.
    assert sum(compared) < 100 * 20_000 / 500


class OnDisk:
    """Rows that come in blocks of any size."""

    def __init__(self, rows: torch.Tensor, sizes: list[int]) -> None:
        self.rows, self.sizes, self.shape, self.out = rows, sizes, tuple(rows.shape), 0

    def blocks(self) -> Iterator[torch.Tensor]:
        for part in self.rows.split(self.sizes):
            self.out += 1
            yield part


@pytest.mark.parametrize("sizes", [[1, 699], [3] * 233 + [1], [256, 256, 188], [700]])
def test_rows_in_blocks_of_any_size_are_searched_like_a_tensor(sizes: list[int]) -> None:
    queries, reference = SETS["plain"]
    found = nearest(queries, OnDisk(reference, sizes), k=3, block=64)
    whole = nearest(queries, reference, k=3)
    assert torch.equal(found.index, whole.index) and torch.equal(found.distance, whole.distance)
    itself = nearest(reference, OnDisk(reference, sizes), k=3, block=64, exclude_self=True)
    assert torch.equal(itself.index, nearest(reference, reference, k=3, exclude_self=True).index)


def test_no_more_than_two_blocks_are_taken_before_the_first_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, reference = SETS["plain"]
    disk = OnDisk(reference, [64] * 10 + [60])
    offer, ahead = neighbours._Search.offer, []

    def watched(self: neighbours._Search, rows: torch.Tensor, side: object, start: int, *more: object) -> None:
        ahead.append(disk.out - start // 64)
        offer(self, rows, side, start, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(neighbours._Search, "offer", watched)
    nearest(queries, disk, block=64)
    assert max(ahead) <= 2


def test_a_distance_depends_on_its_two_rows_alone() -> None:
    q, r = draw(100, 12_288, seed=1), draw(100, 12_288, seed=2)
    whole = neighbours.exact_distances(q, r)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for n in (1, 2, 3, 99):
                assert torch.equal(neighbours.exact_distances(q[:n], r[:n]), whole[:n])
    finally:
        torch.set_num_threads(threads)


def test_values_that_are_not_finite_are_refused_wherever_they_lie() -> None:
    reference = draw(700, 37, seed=2)
    reference[650, 3] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        nearest(draw(4, 37, seed=1), reference, block=64)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_several_threads_give_the_same_bits_and_leave_torch_as_it_was(
    arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, reference = draw(200, 48, seed=1), draw(3000, 48, seed=2)
    alone = nearest(queries, reference, k=3, block=256, query_block=32, arithmetic=arithmetic)
    monkeypatch.setattr(neighbours, "_WORTH_THREADS", 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = nearest(queries, reference, k=3, block=256, query_block=32, arithmetic=arithmetic)
        assert torch.get_num_threads() == 3
        with pytest.raises(UserError, match="NaN"):
            nearest(queries, torch.cat([reference, torch.full((1, 48), torch.nan)]), block=256)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.index, alone.index) and torch.equal(found.distance, alone.distance)
