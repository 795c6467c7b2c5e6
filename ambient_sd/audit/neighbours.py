"""The k nearest training rows of every query, exact, in blocks, with flat memory.

    d(q, r) = |q - r|_2                          euclidean
    d(q, r) = 1 - <q, r> / (|q| |r|)             cosine

The fast form |q|^2 + |r|^2 - 2 <q, r> loses every digit exactly where an audit looks: for copies, d -> 0. So a float32
matrix product only PROPOSES candidates; each candidate's distance is then computed from the difference itself in
float64, and a rounding bound certifies that no row left out can be nearer. Queries that the bound cannot certify (long
ties: duplicated training pictures) are searched again from differences alone. The answer is that of a float64 brute
force. Equal distances come out in order of index. Memory is one block of queries by one block of rows, whatever the
size of the training set. An approximate index is not used here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ambient_sd.audit.features import Distance
from ambient_sd.errors import UserError

_SPARE = 14  # candidates beyond k that are re-scored exactly; more of them means fewer second searches


@dataclass(frozen=True)
class Neighbours:
    """Hold the nearest rows: `distance` float64 `(N, k)`, ascending, and `index` int64 `(N, k)` into the reference."""

    distance: Tensor
    index: Tensor
    metric: Distance = "euclidean"

    @property
    def ratio(self) -> Tensor:
        """Return d1 / d2, float64 `(N,)`, in [0, 1]; 0 where d1 = 0, also for 0 / 0 (an exact copy of a duplicate)."""
        d1, d2 = self.distance[:, 0], self.distance[:, 1]
        return torch.where(d1 > 0, d1 / d2.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(d1))

    @property
    def similarity(self) -> Tensor:
        """Return the cosine similarity to the nearest row, float64 `(N,)`; for cosine neighbours only."""
        if self.metric != "cosine":
            raise ValueError("similarity is defined for cosine neighbours; these are euclidean")
        return 1 - self.distance[:, 0]


def nearest(
    queries: Tensor,
    reference: Tensor,
    k: int = 2,
    *,
    distance: Distance = "euclidean",
    exclude_self: bool = False,
    block: int = 8192,
    query_block: int = 1024,
) -> Neighbours:
    """Find the `k` nearest rows of `reference` for every query.

    Args:
        queries: `(N, D)`, any float dtype.
        reference: `(M, D)`, the training rows.
        k: neighbours per query.
        distance: "euclidean", or "cosine" (rows need not be normalised).
        exclude_self: query i IS row i of the reference and must not find itself (leave one out by index, so a true
            duplicate elsewhere is still found); needs N = M.
        block: reference rows per block.
        query_block: queries per block.

    Returns:
        Neighbours; cosine distances are 1 - similarity.

    Raises:
        UserError: shapes disagree, values are not finite, or the reference has fewer than k rows to offer.
    """
    if queries.dim() != 2 or reference.dim() != 2 or queries.shape[1] != reference.shape[1]:
        raise UserError(
            f"neighbours of {tuple(queries.shape)} in {tuple(reference.shape)}",
            rule="both must be (rows, D) with one D",
        )
    if exclude_self and len(queries) != len(reference):
        raise UserError(f"exclude_self with {len(queries)} queries and {len(reference)} rows", rule="must be one set")
    offered = len(reference) - int(exclude_self)
    if offered < k:
        raise UserError(f"{k} neighbours from {offered} training rows", rule="the training set must hold that many")
    if not (torch.isfinite(queries).all() and torch.isfinite(reference).all()):
        raise UserError("features with NaN or infinite values", rule="distances to them mean nothing")

    if distance == "cosine":
        queries, reference = _unit(queries), _unit(reference)
    # Distances do not change when both sides move; small norms make the rounding bound tight.
    centre = reference.mean(dim=0, dtype=torch.float64)
    found = [
        _search(queries[start : start + query_block], reference, centre, k, start if exclude_self else None, block)
        for start in range(0, len(queries), query_block)
    ]
    values = torch.cat([d for d, _ in found]) if found else torch.empty(0, k, dtype=torch.float64)
    index = torch.cat([i for _, i in found]) if found else torch.empty(0, k, dtype=torch.int64)
    # For unit vectors |u - v|^2 / 2 = 1 - <u, v>, without the cancellation of the right-hand side.
    return Neighbours(values.square() / 2 if distance == "cosine" else values, index, distance)


def _unit(rows: Tensor) -> Tensor:
    rows = rows.to(torch.float64)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _search(
    queries: Tensor, reference: Tensor, centre: Tensor, k: int, first: int | None, block: int
) -> tuple[Tensor, Tensor]:
    """Return exact (distance, index), each `(n, k)`; `first` is the row of query 0 when the sets are one."""
    n, dim = queries.shape
    keep = min(k + _SPARE, len(reference) - int(first is not None))
    q = (queries.to(torch.float64) - centre).to(torch.float32)
    q_norm = q.square().sum(dim=1, dtype=torch.float64)
    value = torch.empty(n, 0)
    index = torch.empty(n, 0, dtype=torch.int64)
    r_max = 0.0
    for start in range(0, len(reference), block):
        r = (reference[start : start + block].to(torch.float64) - centre).to(torch.float32)
        r_norm = r.square().sum(dim=1, dtype=torch.float64)
        r_max = max(r_max, float(r_norm.max()))
        squared = (q_norm[:, None] + r_norm[None]).to(torch.float32).addmm_(q, r.T, alpha=-2)
        _hide_self(squared, first, start)
        best = squared.topk(min(keep, squared.shape[1]), largest=False)
        value = torch.cat([value, best.values], dim=1)
        index = torch.cat([index, best.indices + start], dim=1)
        kept = value.topk(min(keep, value.shape[1]), largest=False)
        value, index = kept.values, index.gather(1, kept.indices)

    exact, index = _rescore(queries, reference, index, k, query_rows=first)
    if keep < len(reference) - int(first is not None):
        # |rounding of the fast form| <= 2 (D + 4) u (|q| + |r|)^2 with unit roundoff u, centring included.
        bound = 2 * (dim + 4) * torch.finfo(torch.float32).eps * (q_norm.sqrt() + r_max**0.5).square()
        unsure = value.max(dim=1).values.to(torch.float64) - bound <= exact[:, -1].square()
        for i in torch.nonzero(unsure).flatten().tolist():
            exact[i], index[i] = _one_by_difference(
                queries[i], reference, k, None if first is None else first + i, block
            )
    return exact, index


def _hide_self(squared: Tensor, first: int | None, start: int) -> None:
    if first is None:
        return
    rows = torch.arange(len(squared))
    columns = first + rows - start
    inside = (columns >= 0) & (columns < squared.shape[1])
    squared[rows[inside], columns[inside]] = torch.inf


def _rescore(
    queries: Tensor, reference: Tensor, index: Tensor, k: int, query_rows: int | None
) -> tuple[Tensor, Tensor]:
    """Sort candidates by their float64 distance, then by index; drop a self that only filled a row."""
    index = index.sort(dim=1).values
    exact = torch.stack(
        [
            (reference[candidates].to(torch.float64) - query.to(torch.float64)).norm(dim=1)
            for query, candidates in zip(queries, index, strict=True)
        ]
    )
    if query_rows is not None:
        exact[index == (query_rows + torch.arange(len(index)))[:, None]] = torch.inf
    order = exact.sort(dim=1, stable=True)
    return order.values[:, :k], index.gather(1, order.indices[:, :k])


def _one_by_difference(
    query: Tensor, reference: Tensor, k: int, self_row: int | None, block: int
) -> tuple[Tensor, Tensor]:
    value = torch.empty(0, dtype=torch.float64)
    index = torch.empty(0, dtype=torch.int64)
    for start in range(0, len(reference), block):
        rows = reference[start : start + block].to(torch.float64)
        d = (rows - query.to(torch.float64)).norm(dim=1)
        if self_row is not None and start <= self_row < start + len(rows):
            d[self_row - start] = torch.inf
        value = torch.cat([value, d])
        index = torch.cat([index, torch.arange(start, start + len(rows))])
        order = value.sort(stable=True)
        value, index = order.values[:k], index[order.indices[:k]]
    return value, index
