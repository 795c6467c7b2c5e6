"""Time and memory of the search for neighbours: 10,000 generations in 10^4, 10^5, 10^6 training vectors of 512 numbers.

Command: python benchmarks/search.py --rows 10000,100000,1000000 --threads 2 --work /tmp/search

Vectors (drawn from fixed keys): 1,000 normal centres in a space of 512; a row is a centre, 0.7 times a normal draw in 48
directions and 0.1 times one in all; a centre has one of four sets of directions. Of the queries, 1,000 are rows plus noise
of 0.02, 0.05, 0.1, 0.2 and 0.4 times 6.9, 200 each; the others are drawn like the rows.

Stores are written once in the work folder and found again. Each search runs in a process of its own, whose peak memory is
its own; seconds hold the reading of the store and not the start of Python. Each line of JSON on stdout is one figure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambient_sd.audit.embedding import About, EmbeddingStore, write_block
from ambient_sd.audit.neighbours import bfloat16_is_faster, nearest
from ambient_sd.data.duplicates import SIDE, Thumbnails
from ambient_sd.data.stream import keyed_generator

DIM, CENTRES, OWN, BLOCK, COPIES = 512, 1000, 48, 2048, 1000
PARTS = (0.02, 0.05, 0.1, 0.2, 0.4)
TYPICAL = 0.7 * (2 * OWN) ** 0.5  # about the distance of two rows of one centre


def drawn(count: int, *key: object) -> torch.Tensor:
    """Return `(count, DIM)` float32 rows."""
    draw = keyed_generator("search benchmark", *key)
    shared = keyed_generator("search benchmark", "centres")
    centres = torch.randn(CENTRES, DIM, generator=shared)
    basis = torch.randn(OWN * 4, DIM, generator=shared) / DIM**0.5
    which = torch.randint(CENTRES, (count,), generator=draw)
    own = torch.randn(count, OWN, generator=draw)
    rows = centres[which] + 0.1 * torch.randn(count, DIM, generator=draw)
    for part in range(4):
        here = which % 4 == part
        rows[here] += 0.7 * own[here] @ basis[part * OWN : (part + 1) * OWN]
    return rows


def made(work: Path, rows: int) -> EmbeddingStore:
    """Write the store of that many rows, or find it."""
    about = About("made", "euclidean", DIM, "float32", 1, "", "cpu", f"search benchmark {rows}", rows, BLOCK)
    folder = work / f"rows{rows}"
    for part in range(about.parts):
        path = folder / f"part-{part:05d}.parquet"
        if not path.exists():
            places = about.rows_of(part)
            vectors = drawn(len(places), "rows", part).numpy()
            thumbnails = Thumbnails()
            thumbnails.extend(bytes(3 * SIDE * SIDE * len(places)), [(1, 1)] * len(places))
            keys = [hashlib.sha256(v).hexdigest() for v in vectors]
            write_block(path, about, places, keys, [""] * len(places), vectors, thumbnails)
    return EmbeddingStore.open(folder)


def asked(store: EmbeddingStore, count: int) -> torch.Tensor:
    """Return queries: the first COPIES are near copies of rows."""
    queries = drawn(count, "queries")
    draw = keyed_generator("search benchmark", "copies", len(store))
    places = torch.randint(len(store), (COPIES,), generator=draw)
    noise = torch.nn.functional.normalize(torch.randn(COPIES, DIM, generator=draw), dim=1)
    size = TYPICAL * torch.tensor(PARTS).repeat(COPIES // len(PARTS))
    queries[:COPIES] = store.gather(places) + size[:, None] * noise
    return queries


def one(args: argparse.Namespace) -> None:
    """Run one search in this process and print what it cost."""
    torch.set_num_threads(args.threads)
    store = made(args.work, args.one)
    queries = asked(store, args.queries)
    if args.what == "fetch":
        return
    bfloat16_is_faster()
    fact: dict[str, Any] = {"rows": len(store), "queries": len(queries), "what": args.what, "threads": args.threads}
    fact["load"] = [round(x, 1) for x in os.getloadavg()]
    before = resource.getrusage(resource.RUSAGE_SELF)
    begin = time.perf_counter()
    if args.what == "tensor":
        rows = torch.cat(list(store.blocks()))
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        found = nearest(queries, rows, 2)
    else:
        found = nearest(
            queries, store, 2, arithmetic="auto" if args.what == "exact" else args.what.removeprefix("exact-")
        )
    fact["seconds"] = round(time.perf_counter() - begin, 2)
    after = resource.getrusage(resource.RUSAGE_SELF)
    fact["processor_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)
    fact["peak_MiB"], fact["MiB_before"] = after.ru_maxrss // 1024, before.ru_maxrss // 1024
    truth = args.work / f"truth{len(store)}.npz"
    if args.what == "exact":
        np.savez(truth, index=found.index.numpy(), distance=found.distance.numpy())
    else:
        right = np.load(truth)
        same = (found.index.numpy() == right["index"]).all() and (found.distance.numpy() == right["distance"]).all()
        fact["same_as_exact"] = bool(same)
    print(json.dumps(fact), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--searches", default="exact,exact-float32")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--what", default="exact", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        one(args)
        return
    for rows in args.rows.split(","):
        for what in ["fetch", *args.searches.split(",")]:
            command = [sys.executable, __file__, "--one", rows, "--what", what, "--work", str(args.work)]
            subprocess.run([*command, "--threads", str(args.threads), "--queries", str(args.queries)], check=True)


if __name__ == "__main__":
    main()
