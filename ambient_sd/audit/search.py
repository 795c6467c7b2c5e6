"""Neighbours in a training set of any size: exact by default, through a faiss index where one was built for it.

    exact     every row is compared (`ambient_sd.audit.neighbours`): the float64 brute force, bit for bit
    ivfpq     rows lie in lists around centres and are kept as 4-bit codes (product quantisation: Jegou et al., TPAMI
              2011; scanned as in Andre et al., 2015). The `probes` lists nearest to a query are scanned, and the
              `candidates` best of them are compared exactly, by float64 differences of the stored vectors.

What the exact comparison of candidates gives: every distance returned is that of its pair, to the bit, and they are in
order. What it cannot give: a row whose list was not probed, or whose code looked worse than those of all candidates, is
missed. So d1 is never too small and a similarity never too large: no pair is ever called more alike than it is. But a
missed second nearest makes d1/d2 too small, and a missed nearest hides a copy. `Neighbours.exact` says which search it was.

Building an index costs more than one exact search of 10,000 images (docs/scale.md): it pays where one training set is
asked again and again. So nothing here builds one unasked:

    python -m ambient_sd.audit.search DIR --feature sscd       builds it beside the embeddings

An index is refused where the embeddings are not those that it was made of. It needs the extra `faiss`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ambient_sd.audit.embedding import VERSION, EmbeddingStore, weights_digest
from ambient_sd.audit.features import Distance, Features
from ambient_sd.audit.neighbours import Neighbours, Rows, check_sizes, exact_distances, nearest
from ambient_sd.audit.registry import label
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.files import atomic_write

Method = Literal["auto", "exact", "ivfpq"]

# Rows. Measured (docs/scale.md): with an index at hand the two take equally long at 500,000 rows. There is no reason to miss
# anything for a factor of two: here it is eight.
EXACT_UP_TO = 4_000_000
CANDIDATES, PROBES = 256, 32
_FOLDER = "index-ivfpq"
_SEED = 1234
_POINTS_PER_LIST = 64  # of a training sample; faiss asks for 39 to 256
_VERSION = 1


def search(
    queries: Tensor,
    reference: Tensor | Rows,
    k: int = 2,
    *,
    distance: Distance,
    method: Method = "auto",
    probes: int = PROBES,
    candidates: int = CANDIDATES,
    progress: bool = False,
) -> Neighbours:
    """Find the `k` nearest rows of `reference` for every query.

    Args:
        queries: `(N, D)`, any float dtype.
        reference: `(M, D)`, or a store; "ivfpq" needs a store that `build_index` has seen.
        k: neighbours per query.
        distance: "euclidean" or "cosine", as in `nearest`.
        method: "auto" is exact, unless the store has an index and more than `EXACT_UP_TO` rows.
        probes: lists that are scanned per query; of "ivfpq" only.
        candidates: rows per query that are compared exactly; of "ivfpq" only.
        progress: show a bar.

    Returns:
        Neighbours; `exact` says whether rows can have been missed.

    Raises:
        UserError: as `nearest`; there is no index, it is damaged, of other embeddings or another distance.
    """
    rows = check_sizes(queries, reference, k)
    if method == "auto":
        indexed = isinstance(reference, EmbeddingStore) and (reference.folder / _FOLDER / "index.json").is_file()
        method = "ivfpq" if indexed and rows > EXACT_UP_TO else "exact"
    if method == "exact":
        return nearest(queries, reference, k, distance=distance, progress=progress)
    if not isinstance(reference, EmbeddingStore):
        raise UserError("method ivfpq on a tensor", rule="an index belongs to a store on disk", remedy="use exact")
    if not 1 <= k <= candidates:
        raise UserError(
            f"{k} neighbours from {candidates} candidates", rule="there must be at least as many candidates"
        )
    if not torch.isfinite(queries).all():
        raise UserError("features with NaN or infinite values", rule="distances to them mean nothing")
    return _through_index(queries, reference, k, distance, probes, min(candidates, rows), progress)


def neighbours_in_store(
    images: Any,
    feature: Features,
    training: EmbeddingStore,
    k: int = 2,
    *,
    method: Method = "auto",
    progress: bool = False,
) -> Neighbours:
    """Embed `images` by `feature` and find their neighbours among the embedded training images.

    Args:
        images: PIL images.
        feature: the extractor that `training` was made by.
        training: opened by `EmbeddingStore.open(folder, feature.name)`.
        k: neighbours per image.
        method: as for `search`.
        progress: show bars.

    Raises:
        UserError: the store is of another feature, resolution, or other weights.
    """
    require_feature(training, feature)
    distance = training.about.distance
    return search(feature(images, progress=progress), training, k, distance=distance, method=method, progress=progress)


def require_feature(training: EmbeddingStore, feature: Features) -> None:
    """Refuse an extractor that these embeddings were not made by.

    Raises:
        UserError: the store is of another feature, resolution, other weights or another version of the code.
    """
    have = (feature.name, getattr(feature, "size", None), weights_digest(feature), VERSION)
    about = training.about
    if have == (about.feature, about.resolution, about.weights, about.version):
        return
    if about.version != VERSION:
        raise UserError(f"embeddings in {training.folder} are of version {about.version}", rule=f"this is version {VERSION}",
                        remedy="embed the training images again into an empty folder")  # fmt: skip
    raise UserError(
        f"embeddings in {training.folder} are of {about.feature} at {about.resolution} px, weights {about.weights[:12] or 'none'}",
        rule=f"images would be embedded by {have[0]} at {have[1]} px, weights {have[2][:12] or 'none'}",
        remedy="embed the training images again into an empty folder, or give those weights",
    )  # fmt: skip


@dataclass(frozen=True)
class _IndexAbout:
    """Say what an index depends on."""

    store: str
    lists: int
    codes: int
    distance: Distance
    rows: int
    seed: int = _SEED
    version: int = _VERSION


def _faiss() -> Any:
    """Import faiss, and make its threads get along with torch's."""
    # Each of the two brings its own OpenMP. Threads of the one that idle in a spinning wait take the processor from the
    # other: on a busy machine training took 20 times as long. The policy is read when the library is loaded.
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import faiss
    except ImportError as error:
        raise UserError(f"method ivfpq: {error}", remedy="pip install faiss-cpu, or use method exact") from error
    finally:
        if before is None:
            os.environ.pop("OMP_WAIT_POLICY", None)
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _sizes(rows: int, dim: int) -> tuple[int, int]:
    """Return the number of lists, about 2 sqrt(rows), and of 4-bit codes per row, one for every four numbers."""
    lists = 2 ** max(0, round(np.log2(2 * max(1, rows) ** 0.5)))
    codes = next(c for c in range(max(1, min(512, dim // 4)), 0, -1) if dim % c == 0)
    return min(lists, max(1, rows // 39)), codes


def build_index(store: EmbeddingStore, *, progress: bool = False) -> Path:
    """Build the index of a store in a folder beside its parts, replacing one that is there.

    The same embeddings, faiss and number of threads give the same index: the sample and all seeds are fixed. Besides codes
    the folder holds the vectors once more, in one file that can be read at any row.

    Raises:
        UserError: faiss is not installed, or the folder cannot be written.
    """
    faiss = _faiss()
    lists, codes = _sizes(len(store), store.dim)
    about = _IndexAbout(store.digest, lists, codes, store.distance, len(store))
    index = faiss.index_factory(store.dim, f"IVF{lists},PQ{codes}x4fs", faiss.METRIC_L2)
    index.cp.seed = index.pq.cp.seed = _SEED
    index.train(_sample(store, max(_POINTS_PER_LIST * lists, 16 * 256)))
    part = store.folder / f".{_FOLDER}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        shape = (len(store), store.dim)
        vectors = np.lib.format.open_memmap(part / "vectors.npy", "w+", np.dtype(store.about.dtype), shape)
        start = 0
        with tqdm(total=len(store), desc="indexing", unit="row", unit_scale=True, disable=not progress) as bar:
            for block in store.blocks():
                vectors[start : start + len(block)] = block.numpy()
                index.add(_prepared(block, store.distance))
                start += len(block)
                bar.update(len(block))
        vectors.flush()
        faiss.write_index(index, str(part / "index.faiss"))
        size = (part / "index.faiss").stat().st_size
        atomic_write(part / "index.json", json.dumps({**asdict(about), "bytes": size}, indent=1) + "\n")
        shutil.rmtree(store.folder / _FOLDER, ignore_errors=True)
        part.rename(store.folder / _FOLDER)
    except OSError as error:
        raise UserError(f"{store.folder / _FOLDER} cannot be written", rule=error.strerror or str(error)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return store.folder / _FOLDER


def _sample(store: EmbeddingStore, rows: int) -> np.ndarray:
    """Return vectors of blocks drawn without replacement, enough to train on; the draw depends on the sizes alone."""
    order = np.random.default_rng(_SEED).permutation(store.about.parts)
    # More blocks than are needed, a part of each: images that lie together are often alike.
    chosen = order[: max(1, min(len(order), 4 * -(-rows // store.about.block)))]
    each = -(-rows // len(chosen))
    parts = []
    for number in chosen.tolist():
        block = store.block(number)
        parts.append(block[:: max(1, len(block) // each)][:each])
    return _prepared(torch.cat(parts), store.distance)


def _prepared(rows: Tensor, distance: Distance) -> np.ndarray:
    rows = rows.to(torch.float32)
    if distance == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=1)
    return np.ascontiguousarray(rows.numpy())


def _open_index(store: EmbeddingStore, distance: Distance) -> tuple[Any, np.ndarray]:
    """Return the index and the vectors, mapped into memory."""
    folder = store.folder / _FOLDER
    again = f"build it again: python -m ambient_sd.audit.search {store.folder}"
    try:
        raw = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        size = raw.pop("bytes")
        about = _IndexAbout(**raw)
    except FileNotFoundError:
        raise UserError(f"{store.folder} has no index", remedy=again.replace(" again", "")) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / 'index.json'} cannot be read", rule=str(error), remedy=again) from None
    lists, codes = _sizes(len(store), store.dim)
    expected = _IndexAbout(store.digest, lists, codes, store.distance, len(store))
    if about != expected:
        raise UserError(f"the index in {folder} belongs to other embeddings", remedy=again)
    if distance != about.distance:
        raise UserError(f"{distance} neighbours from an index for {about.distance}", rule="use method exact")
    faiss = _faiss()
    try:
        if (folder / "index.faiss").stat().st_size != size:
            raise OSError("its size has changed")
        index = faiss.read_index(str(folder / "index.faiss"))
        vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        if vectors.shape != store.shape or index.ntotal != len(store):
            raise OSError("rows are missing")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the index in {folder} is damaged", rule=str(error), remedy=again) from None
    return index, vectors


def _through_index(
    queries: Tensor, store: EmbeddingStore, k: int, distance: Distance, probes: int, candidates: int, progress: bool
) -> Neighbours:
    index, vectors = _open_index(store, distance)
    index.nprobe = min(probes, index.nlist)
    cosine = distance == "cosine"
    value, place = [], []
    with tqdm(total=len(queries), desc="searching", unit="img", disable=not progress, leave=False) as bar:
        for some in queries.split(1024) if len(queries) else ():
            _, found = index.search(_prepared(some, distance), candidates)
            rows = torch.from_numpy(found)
            # Lists that hold fewer than `candidates` rows leave -1 behind.
            known = rows >= 0
            exact = torch.full(rows.shape, torch.inf, dtype=torch.float64)
            query = torch.nonzero(known)[:, 0]
            exact[known] = _by_difference(some, query, vectors, rows[known], cosine)
            # By distance, then by row: the order of the exact search.
            order = torch.from_numpy(np.lexsort((rows.numpy(), exact.numpy()), axis=1)[:, :k].copy())
            value.append(exact.gather(1, order))
            place.append(rows.gather(1, order))
            bar.update(len(some))
    values = torch.cat(value) if value else torch.empty(0, k, dtype=torch.float64)
    places = torch.cat(place) if place else torch.empty(0, k, dtype=torch.int64)
    distances = values.square() / 2 if cosine else values
    short = torch.nonzero(torch.isinf(distances).any(dim=1)).flatten()
    if len(short):
        # Fewer than k rows in all lists that were scanned.
        rest = nearest(queries[short], store, k, distance=distance)
        distances[short], places[short] = rest.distance, rest.index
    return Neighbours(distances, places, distance, exact=False)


def _by_difference(queries: Tensor, query: Tensor, vectors: np.ndarray, rows: Tensor, cosine: bool) -> Tensor:
    """Return the exact distance of pairs; rows are read in the order in which they lie on disk."""
    found = torch.empty(len(rows), dtype=torch.float64)
    order = rows.argsort()
    for some in order.split(2**15):
        stored = torch.from_numpy(vectors[rows[some].numpy()])
        found[some] = exact_distances(queries[query[some]], stored, cosine=cosine)
    return found


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Build the index of a store."""
    parser = argparse.ArgumentParser(prog="python -m ambient_sd.audit.search", description="Build a faiss index beside embeddings.", allow_abbrev=False)  # fmt: skip
    parser.add_argument("store", type=Path, help="folder that ambient_sd.audit.embedding has written")
    parser.add_argument("--feature", help="which one, where there are several, such as efflite0")
    args = parser.parse_args(argv)
    store = EmbeddingStore.open(args.store, None if args.feature is None else label(args.feature))
    print(f"{len(store)} x {store.dim} {store.about.feature}: index in {build_index(store, progress=True)}", flush=True)


if __name__ == "__main__":
    main()
