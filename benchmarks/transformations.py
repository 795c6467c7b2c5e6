"""What the audit detects of blurred, cropped, mirrored, recoloured training images, per transformation and feature.

    python benchmarks/transformations.py --out build/transformations.json

Training images of the first condition are changed and searched for among those of each condition; the same changes of held-out images
are the false alarms. Every table is printed before (upright search) and after (mirror images searched too).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ambient_sd.assets import IMAGES
from ambient_sd.audit.features import embed
from ambient_sd.audit.registry import FeatureOptions, choose
from ambient_sd.data.conditions import split_condition
from ambient_sd.data.sources import load_rows
from ambient_sd.utils.errors import exits_on_user_error
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.settings import add_flags, from_flags
from experiments.transformations import detection, embed_all, table


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(IMAGES))
    parser.add_argument(
        "--row_filter",
        nargs="+",
        default=["subset_300=true", "subset_1000=true"],
        help="training sets, one a condition",
    )
    parser.add_argument("--heldout_split", default="heldout")
    add_flags(parser, FeatureOptions)
    parser.add_argument("--queries", type=int, default=150, help="images of each kind, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    features = choose(*from_flags(FeatureOptions, args).chosen())
    sets = [load_rows(args.data, row_filter=[split_condition(c)]).check(near_duplicates=True) for c in args.row_filter]
    heldout = load_rows(args.data, split=args.heldout_split)
    generator = torch.Generator().manual_seed(args.seed)
    first = [sets[0][i] for i in torch.randperm(len(sets[0]), generator=generator)[: args.queries].tolist()]
    unseen = [heldout[i].image for i in torch.randperm(len(heldout), generator=generator)[: args.queries].tolist()]
    queries = embed_all([row.image for row in first], features, seed=args.seed)
    others = embed_all(unseen, features, seed=args.seed + 1)
    found: list[dict[str, Any]] = []
    for condition, rows in zip(args.row_filter, sets, strict=True):
        training = embed([row.image for row in rows], features)
        places = [rows.keys.index(row.key) for row in first]
        cells = [
            cell
            for mirrored in (False, True)
            for cell in detection(
                queries, places, others, training, features, duplicates=rows.noise_keys, mirrored=mirrored
            )
        ]
        head = f"{condition}: {len(rows)} training images, {len(first)} of them changed, {len(unseen)} held-out, seed {args.seed}"
        for of in ("detected", "false_alarms", "at_one_percent"):
            print(f"\n### {head}: {of.replace('_', ' ')}, %\n\n{table(cells, of)}", flush=True)
        found.append({
            "training": condition, "n": len(rows), "queries": len(first), "heldout": len(unseen),
            "cells": [dataclasses.asdict(cell) for cell in cells],
        })  # fmt: skip
    atomic_write(args.out, json.dumps({"seed": args.seed, "sets": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
