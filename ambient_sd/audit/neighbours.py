"""The k nearest training rows of every query, exact, in blocks, with flat memory.

    d(q, r) = |q - r|_2                          euclidean
    d(q, r) = 1 - <q, r> / (|q| |r|)             cosine

The fast form |q|^2 + |r|^2 - 2 <q, r> loses every digit exactly where an audit looks: for copies, d -> 0. So a matrix
product only REJECTS rows; each row that it cannot reject is compared by the difference itself in float64. With T an upper
bound of the distance to the k-th nearest, and q = q_b + e_q, r = r_b + e_r the parts that bfloat16 keeps and loses,

    d(q, r) <= T   implies   <q_b, r_b> - |r|^2 / 2 + |q_b| |e_r| + |e_q| |r| + (T^2 - |q|^2) / 2 + slack >= 0

by Cauchy-Schwarz; `slack` bounds the rounding of the sums (Higham, Accuracy and Stability, section 3.1, any order). The left
side is ONE matrix product, since each term is a number of q times one of r, and its sign survives the rounding of the
result. T falls as nearer rows are met, so few rows pass. The answer is that of a float64 brute force, bit for bit, whichever
arithmetic rejects, and where: float32 everywhere, bfloat16 where a trial shows that the processor is faster with it, products of large
searches on a GPU if there is one (float32 in full, never TF32, whose rounding the bound does not cover). Equal distances come out in order
of index.

Memory is the queries, one block of rows and one block of products, whatever the size of the training set, which may lie on
disk (`ambient_sd.audit.embedding`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ambient_sd.audit.features import Distance
from ambient_sd.utils.devices import full_float32, send
from ambient_sd.utils.errors import UserError

Arithmetic = Literal["auto", "float32", "bfloat16"]

_EXTRA = 8  # columns beside the features: three for |r|^2, two for what bfloat16 lost, three for T
_GROUP = 64  # products whose largest is looked at first
_HEAVY = 64  # rows of a block that may pass for one query before a sharper test is tried
_CENTRE_ROWS = 65_536
_VIEW = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
_TINY = 1e-15
_WORTH_THREADS = 10**9
_LARGE = 10**10  # products for which other arithmetic, or a GPU, pays
_EPS32 = torch.finfo(torch.float32).eps


class Rows(Protocol):
    """Name what a search needs of rows that do not fit memory: their shape, and blocks of them in order."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def blocks(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Neighbours:
    """Hold the nearest rows: `distance` float64 `(N, k)`, ascending, and `index` int64 `(N, k)` into the reference.

    Example:
        >>> Neighbours(torch.tensor([[1.0, 4.0]]), torch.tensor([[7, 2]])).ratio.tolist()
        [0.25]
    """

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
    reference: Tensor | Rows,
    k: int = 2,
    *,
    distance: Distance = "euclidean",
    exclude_self: bool = False,
    block: int = 4096,
    query_block: int = 1024,
    arithmetic: Arithmetic = "auto",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Neighbours:
    """Find the `k` nearest rows of `reference` for every query.

    Args:
        queries: `(N, D)`, any float dtype.
        reference: `(M, D)`, the training rows, or `Rows` on disk, read once from first to last.
        k: neighbours per query.
        distance: "euclidean", or "cosine" (rows need not be normalised).
        exclude_self: query i IS row i of the reference and must not find itself (leave one out by index, so a true
            duplicate elsewhere is still found); needs N = M.
        block: reference rows per block.
        query_block: queries per block.
        arithmetic: what rejects rows; "auto" tries which is faster here. The answer does not depend on it.
        device: where products are made, a GPU in float32; None: a GPU for large searches if it has room. The answer does not depend on it.
        progress: show a bar of reference rows.

    Returns:
        Neighbours; cosine distances are 1 - similarity.

    Raises:
        UserError: shapes disagree, values are not finite, or the reference has fewer than k rows to offer.

    Example:
        >>> found = nearest(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 9.0]]))
        >>> found.index.tolist(), found.distance.tolist()
        ([[0, 1]], [[1.0, 2.0]])
    """
    rows = check_sizes(queries, reference, k, exclude_self)
    if not torch.isfinite(queries).all():
        raise _not_finite()
    large = len(queries) * rows * queries.shape[1] > _LARGE
    device = torch.device(device if device is not None else "cuda" if large and _fits_gpu(queries) else "cpu")
    if device.type != "cpu":
        arithmetic = "float32"  # bfloat16 products come back rounded, and their sums need not be float32
    if arithmetic == "auto":
        arithmetic = "bfloat16" if large and bfloat16_is_faster() else "float32"
    blocks = blocks_of(reference, block)
    first = next(blocks)
    # Rows that lie in memory give a better middle than the first block alone; any middle is right.
    some = reference[:: max(1, rows // _CENTRE_ROWS)] if isinstance(reference, Tensor) else first
    dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
    search = _Search(queries, some, k, distance == "cosine", exclude_self, dtype, device)
    ready = ((part, search.ready(part)) for part in itertools.chain([first], blocks))
    start = 0
    products = len(queries) * rows * queries.shape[1] if device.type == "cpu" else 0
    with _bar(rows, progress) as bar, workers(products) as pool, full_float32():
        for part, side in _ahead(ready):
            search.offer(part, side, start, query_block, pool)
            start += len(part)
            bar.update(len(part))
    assert start == rows
    # For unit vectors |u - v|^2 / 2 = 1 - <u, v>, without the cancellation of the right-hand side.
    return Neighbours(search.value.square() / 2 if distance == "cosine" else search.value, search.index, distance)


def check_sizes(queries: Tensor, reference: Tensor | Rows, k: int, exclude_self: bool = False) -> int:
    """Return the number of rows in `reference`.

    Raises:
        UserError: shapes disagree, or it has fewer than k rows to offer.

    Example:
        >>> check_sizes(torch.zeros(2, 3), torch.zeros(5, 3), k=2)
        5
    """
    shape = tuple(reference.shape)
    if queries.dim() != 2 or len(shape) != 2 or queries.shape[1] != shape[1]:
        raise UserError(f"neighbours of {tuple(queries.shape)} in {shape}", rule="both must be (rows, D) with one D")
    if exclude_self and len(queries) != shape[0]:
        raise UserError(f"exclude_self with {len(queries)} queries and {shape[0]} rows", rule="must be one set")
    offered = shape[0] - int(exclude_self)
    if offered < k:
        raise UserError(f"{k} neighbours from {offered} training rows", rule="the training set must hold that many")
    return shape[0]


def exact_distances(queries: Tensor, rows: Tensor, *, cosine: bool = False) -> Tensor:
    """Return |q_i - r_i| of pairs, float64 `(n,)`, from differences in float64; of unit vectors if `cosine`.

    Each value depends on its two rows alone: not on n, nor on the number of threads.

    Example:
        >>> exact_distances(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])).tolist()
        [5.0]
    """
    found = torch.empty(len(rows), dtype=torch.float64)
    step = max(2, 2**20 // rows.shape[1])
    for start in range(0, len(rows), step):
        q, r = (side[start : start + step].to(torch.float64) for side in (queries, rows))
        if cosine:
            q, r = _unit(q), _unit(r)
        difference = r - q
        # A lone row would be summed in another order by several threads.
        lone = len(difference) == 1
        length = (difference.expand(2, -1).contiguous() if lone else difference).norm(dim=1)
        found[start : start + step] = length[:1] if lone else length
    return found


def _unit(rows: Tensor) -> Tensor:
    rows = rows.to(torch.float64)
    lone = len(rows) == 1
    length = (rows.expand(2, -1).contiguous() if lone else rows).norm(dim=1, keepdim=True)[: len(rows)]
    return rows / length.clamp_min(torch.finfo(torch.float64).tiny)


def _fits_gpu(queries: Tensor) -> bool:
    """Tell whether there is a GPU whose free memory holds the queries in float32 several times over."""
    return torch.cuda.is_available() and 16 * queries.numel() < torch.cuda.mem_get_info()[0]


def _not_finite() -> UserError:
    return UserError("features with NaN or infinite values", rule="distances to them mean nothing")


@functools.lru_cache
def bfloat16_is_faster() -> bool:
    """Tell whether this processor multiplies bfloat16 matrices faster than float32 ones, sums in float32 included.

    Example:
        >>> bfloat16_is_faster() in (True, False)
        True
    """
    draw = torch.Generator().manual_seed(0)
    q, r = torch.randn(512, 544, generator=draw), torch.randn(1024, 544, generator=draw)
    low_q, low_r = q.to(torch.bfloat16), r.to(torch.bfloat16)
    exact = low_q.double() @ low_r.double().T
    bound = 560 * _EPS32 * (low_q.double().abs() @ low_r.double().abs().T) + 2**-8 * exact.abs()
    if ((low_q @ low_r.T).double() - exact).abs().gt(bound).any():
        return False
    seconds = []
    for a, b in ((q, r), (low_q, low_r)):
        spent = []
        for _ in range(3):
            begin = time.perf_counter()
            a @ b.T
            spent.append(time.perf_counter() - begin)
        seconds.append(min(spent))
    return seconds[1] < seconds[0]


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, desc="searching", unit="row", unit_scale=True, disable=not progress, leave=False)


def blocks_of(reference: Tensor | Rows, rows: int) -> Iterator[Tensor]:
    """Yield the reference in blocks of `rows`.

    Example:
        >>> [len(block) for block in blocks_of(torch.zeros(5, 2), 2)]
        [2, 2, 1]
    """
    if isinstance(reference, Tensor):
        yield from reference.split(rows)
        return
    held: list[Tensor] = []
    for part in reference.blocks():
        held.append(part)
        if sum(map(len, held)) >= rows:
            *whole, rest = torch.cat(held).split(rows) if len(held) > 1 else part.split(rows)
            yield from whole
            held = [rest]
            if len(rest) == rows:
                yield rest
                held = []
    if held:
        yield torch.cat(held)


def _ahead(parts: Iterator[tuple[Tensor, _Side]]) -> Iterator[tuple[Tensor, _Side]]:
    """Yield `parts`; the next one is read and made ready while this one is searched."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = pool.submit(next, parts, None)
            yield part


@contextlib.contextmanager
def workers(products: int = _WORTH_THREADS) -> Iterator[ThreadPoolExecutor | None]:
    """Lend one thread per processor that torch may use, for large searches, each of which computes alone.

    Blocks of queries need nothing of one another. Torch's own threads meet after every operation and spin until the last one
    comes: where other programs run on the processors too, that takes several times what the search does.

    Example:
        >>> with workers(products=1) as pool:  # too little work for threads
        ...     pool is None
        True
    """
    threads = torch.get_num_threads()
    if threads == 1 or products < _WORTH_THREADS:
        yield None
        return
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


class _Side:
    """Rows made ready for the product: centred, scaled, rounded to `dtype`, with columns for norms and what was lost."""

    def __init__(self, rows: Tensor, centre: Tensor, scale: float, unit: bool, dtype: torch.dtype) -> None:
        wide = torch.float64 if dtype == torch.float64 or rows.dtype == torch.float64 else torch.float32
        x = rows.to(wide)
        if unit:
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            # Squares of numbers beyond these leave float32.
            plain = wide == torch.float32 and bool(((length > _TINY) & (length < 1 / _TINY)).all())
            x = x / length if plain else _unit(x).to(wide)
        x = (x - centre.to(wide)).mul_(scale)
        x = x if dtype == torch.float64 else x.to(torch.float32)
        low = x.to(dtype)
        self.norm = torch.linalg.vector_norm(x, dim=1).to(torch.float64)
        if not torch.isfinite(self.norm.square().to(x.dtype)).all():
            raise _not_finite()
        self.lost = torch.zeros_like(self.norm)
        if dtype == torch.bfloat16:
            self.lost = torch.linalg.vector_norm(x.sub_(low), dim=1).to(torch.float64)
        count, self.dim = low.shape
        # Matrix units take columns by 32 and more; groups of rows must be full.
        self.matrix = torch.zeros(-(-count // _GROUP) * _GROUP, -(-(self.dim + _EXTRA) // 32) * 32, dtype=dtype)
        self.matrix[:count, : self.dim] = low
        self.count = count

    def as_queries(self) -> _Side:
        extra = self.matrix[: self.count, self.dim : self.dim + _EXTRA]
        extra[:, :3] = 1
        extra[:, 3] = _above(self.norm + self.lost)
        extra[:, 4] = _above(self.lost)
        return self

    def as_rows(self) -> _Side:
        extra = self.matrix[:, self.dim : self.dim + _EXTRA]
        extra[self.count :, 0] = -1e30  # what only fills a group is far from everything
        extra[: self.count, :3] = _pieces(-self.norm.square() / 2, self.matrix.dtype)
        extra[: self.count, 3] = _above(self.lost)
        extra[: self.count, 4] = _above(self.norm)
        extra[: self.count, 5:] = 1
        return self


def _above(value: Tensor) -> Tensor:
    """Return numbers that bfloat16 cannot round to below `value`."""
    return value * (1 + 2**-7)


def _pieces(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `(n, 3)` in `dtype` whose sum is float64 `value` to 2^-24 of it or better."""
    first = value.to(dtype)
    second = (value - first).to(dtype)
    return torch.stack([first, second, (value - first - second).to(dtype)], dim=1)


class _Search:
    """The k nearest so far of every query, and the test that rejects rows."""

    def __init__(
        self,
        queries: Tensor,
        some: Tensor,
        k: int,
        unit: bool,
        exclude_self: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device, self.queries, self.k, self.unit, self.exclude_self, self.dtype = (
            device,
            queries,
            k,
            unit,
            exclude_self,
            dtype,
        )
        some = _unit(some) if unit else some.to(torch.float64)
        # Distances do not change when both sides move; small norms make the bound tight. Rounded, so that subtracting
        # it from float32 rows rounds once.
        self.centre = some.mean(dim=0).to(torch.float32).to(torch.float64)
        largest = float((some - self.centre).norm(dim=1).max())
        if not np.isfinite(largest):
            raise _not_finite()
        self.scale = 2.0 ** -int(np.clip(np.ceil(np.log2(largest)), -100, 100)) if largest > 0 else 1.0
        self.side = _Side(queries, self.centre, self.scale, unit, dtype).as_queries()
        self.side.matrix = send(self.side.matrix, device)
        self.value = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
        self.index = torch.full((len(queries), k), -1, dtype=torch.int64)
        self.own = threading.local()
        self.limit = torch.full((len(queries),), torch.inf, dtype=torch.float64)  # T: no farther row can matter

    def ready(self, rows: Tensor) -> _Side:
        """Return rows as the products take them."""
        return _Side(rows, self.centre, self.scale, self.unit, self.dtype).as_rows()

    def offer(
        self, rows: Tensor, side: _Side, start: int, query_block: int, pool: ThreadPoolExecutor | None = None
    ) -> None:
        """Take note of `rows`, which are those from `start` on of the reference, `side` being them made ready."""
        side.matrix = send(side.matrix, self.device)
        every = torch.arange(len(self.queries)).split(query_block) if len(self.queries) else ()
        # Threads write to different queries; map raises what one of them raised.
        list((pool.map if pool else map)(lambda these: self._offer(these, rows, side, start), every))

    def _offer(self, these: Tensor, rows: Tensor, side: _Side, start: int) -> None:
        fresh = these[torch.isinf(self.limit[these])]
        if len(fresh):
            self._lower_limit(fresh, rows, side, start)
        pairs = self._passing(these, side)
        heavy = _crowded(pairs, these)
        if len(heavy):
            # A better T first; if that is not enough (long ties), a test in float64.
            pairs = pairs[:, ~torch.isin(pairs[0], heavy)]
            self._lower_limit(heavy, rows, side, start)
            more = self._passing(heavy, side)
            crowded = _crowded(more, heavy)
            if len(crowded):
                more = more[:, ~torch.isin(more[0], crowded)]
                sharp = _Side(rows, self.centre, self.scale, self.unit, torch.float64).as_rows()
                more = torch.cat([more, self._passing(crowded, sharp)], dim=1)
            pairs = torch.cat([pairs, more], dim=1)
        self._keep(pairs, rows, start)

    def _passing(self, queries: Tensor, side: _Side) -> Tensor:
        """Return int64 `(2, n)`: query and row of this block, for all pairs that may be within T."""
        products = self._products(queries, side).view(_VIEW[side.matrix.dtype])
        groups = products.view(len(queries), -1, _GROUP)
        # Integers of the same width have the sign of the numbers and the fastest maximum.
        found = torch.nonzero(groups.amax(dim=2) >= 0)
        inside = torch.nonzero(groups[found[:, 0], found[:, 1]] >= 0)
        at = found[inside[:, 0]]
        query, row = torch.stack([at[:, 0], at[:, 1] * _GROUP + inside[:, 1]]).cpu()
        return torch.stack([queries[query], row])

    def _products(self, queries: Tensor, side: _Side) -> Tensor:
        dtype = side.matrix.dtype
        mine = self.side
        if dtype != self.dtype:
            mine = _Side(self.queries[queries], self.centre, self.scale, self.unit, dtype).as_queries()
            norm, matrix = mine.norm, mine.matrix[: len(queries)]
        else:
            norm, matrix = mine.norm[queries], mine.matrix[send(queries, mine.matrix.device)]
        r = float(side.norm.max())
        reach = torch.minimum(self.limit[queries] * self.scale, 2 * (norm + r))
        # Centring and scaling round each number once; float32 unit vectors are off by what their norm is.
        wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        off = wide * (norm + r) + (2 * (side.dim + 8) * wide * self.scale if self.unit else 0)
        reach = (reach + off).square() / 2
        sums = torch.finfo(torch.float64).eps if dtype == torch.float64 else _EPS32
        slack = (matrix.shape[1] + 16) * sums * (norm * r + r * r / 2 + norm.square() / 2 + reach)
        matrix[:, side.dim + 5 : side.dim + _EXTRA] = send(
            _pieces(reach - norm.square() / 2 + slack + 1e-30, dtype), matrix.device
        )
        if dtype != self.dtype or matrix.device.type != "cpu":
            return matrix @ side.matrix.T
        # One buffer per thread for all products: fresh memory of this size costs more than what is done with it.
        needed = len(queries) * len(side.matrix)
        buffer = getattr(self.own, "buffer", matrix)
        if buffer.dim() != 1 or len(buffer) < needed:
            buffer = self.own.buffer = torch.empty(needed, dtype=dtype)
        return torch.mm(matrix, side.matrix.T, out=buffer[:needed].view(len(queries), -1))

    def _lower_limit(self, queries: Tensor, rows: Tensor, side: _Side, start: int) -> None:
        """Bring T down to the k-th nearest of the rows of this block that look nearest."""
        products = self._products(queries, side)[:, : len(rows)]
        best = products.topk(min(self.k + int(self.exclude_self), len(rows)), dim=1).indices.cpu()
        if best.shape[1] - int(self.exclude_self) < self.k:
            return
        found = exact_distances(
            self.queries[queries].repeat_interleave(best.shape[1], dim=0), rows[best.flatten()], cosine=self.unit
        ).view(best.shape)
        if self.exclude_self:
            found[best + start == queries[:, None]] = torch.inf
        self.limit[queries] = torch.minimum(self.limit[queries], found.sort(dim=1).values[:, self.k - 1])

    def _keep(self, pairs: Tensor, rows: Tensor, start: int) -> None:
        """Compare pairs exactly and merge them into the k nearest."""
        if self.exclude_self:
            pairs = pairs[:, pairs[0] != pairs[1] + start]
        if not pairs.shape[1]:
            return
        found = []
        for some in pairs.split(2**18, dim=1):
            found.append(exact_distances(self.queries[some[0]], rows[some[1]], cosine=self.unit))
        touched = pairs[0].unique()
        query = torch.cat([touched.repeat_interleave(self.k), pairs[0]]).numpy()
        value = torch.cat([self.value[touched].flatten(), *found]).numpy()
        index = torch.cat([self.index[touched].flatten(), pairs[1] + start]).numpy()
        order = np.lexsort((index, value, query))
        query = query[order]
        # Place of each entry among those of its query.
        place = np.arange(len(query)) - np.searchsorted(query, query)
        chosen = order[place < self.k]
        self.value[touched] = torch.from_numpy(value[chosen]).view(-1, self.k)
        self.index[touched] = torch.from_numpy(index[chosen]).view(-1, self.k)
        self.limit[touched] = torch.minimum(self.limit[touched], self.value[touched, -1])


def _crowded(pairs: Tensor, queries: Tensor) -> Tensor:
    """Return the queries for which too many rows passed."""
    first = int(queries[0])
    count = torch.bincount(pairs[0] - first, minlength=1)
    return torch.nonzero(count > _HEAVY).flatten() + first
