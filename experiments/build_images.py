"""Build `emoji.parquet`: the embedded images, from two npm packages, with splits that share no concept.

    python -m experiments.build_images --packages DIR --out ambient_sd/assets/emoji.parquet

DIR holds (or receives, through `npm pack`) the two packages below. Every concept that both draw is kept in both styles,
64 x 64 on white. Left out: skin tones, flags, ideograph and keycap buttons, and, of a family whose members differ only in
gender or in the hands of a clock, all but one. What still looks nearly the same after that is grouped and kept on one side.

| style  | package                         | art                                      |
|--------|---------------------------------|------------------------------------------|
| `3D`   | @lobehub/fluent-emoji-3d 1.1.0  | Fluent Emoji, MIT                        |
| `flat` | emoji-datasource-google 16.0.0  | Noto Emoji, Apache-2.0 (package: MIT)    |

Splits: `base` trains the base model; `finetune` is for experiments, with nested subsets of 60, 300 and 1000 images
(columns `subset_60`, `subset_300`, `subset_1000`; the first two hold one image per concept); `heldout` is never trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ambient_sd.data.images import content_key
from experiments.names import ALIASES, COMMON

PACKAGES = {"3D": "@lobehub/fluent-emoji-3d@1.1.0", "flat": "emoji-datasource-google@16.0.0"}
SIZE = 64
HELDOUT_PICTURES, FINETUNE_PICTURES = 320, 1_010
# Two images of one style whose 16 x 16 thumbnails differ by less than this root mean square (of 255) count as nearly
# the same. 12 was chosen by eye: the pairs below it are recoloured or slightly turned copies, those above are not.
NEAR_DUPLICATE_RMS = 12.0


def fetch(folder: Path) -> dict[str, Path]:
    """Download and unpack the two packages into `folder` unless they are there; return the root of each by style."""
    roots: dict[str, Path] = {}
    for style, package in PACKAGES.items():
        root = folder / style
        if not (root / "package" / "package.json").exists():
            root.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(root), package], check=True)
            with tarfile.open(next(root.glob("*.tgz"))) as archive:
                archive.extractall(root, filter="data")
        roots[style] = root / "package"
    return roots


def clean_name(entry: dict[str, Any]) -> str:
    name = (entry["name"] or entry["short_name"].replace("_", " ")).lower().replace("’", "'")
    if name == "heavy black heart":  # Unicode's name for the red one
        return "red heart"
    name = re.sub(r"\b(symbol|sign|ornament|heavy|black(?= right| left| up| down| universal| sun))\b", "", name)
    return " ".join(re.sub(r"[^a-z0-9' -]", " ", name).split())


def family(name: str) -> str:
    """Name the family that a concept belongs to: gender words go, every clock face is one family."""
    if name.startswith("clock face"):
        return "clock face"
    if "moon" in name and ("gibbous" in name or "quarter" in name or "crescent" in name or "new moon" in name):
        return "moon phase"
    words = [
        w
        for w in re.split(r"[ -]", name)
        if w not in {"man", "woman", "person", "men", "women", "male", "female", "people"}
    ]
    return " ".join(w for w in words if w not in {"in", "facing", "right"}) or name


def wanted(entry: dict[str, Any], name: str) -> bool:
    if entry["category"] in {"Flags", "Component"} or entry["subcategory"] in {"keycap", "family"}:
        return False
    return not re.search(r"ideograph|katakana|facing right|^input|squared (cl|ng|vs|id|ab)$", name)


def image(source: Path) -> Image.Image:
    """Return the emoji on white, SIZE x SIZE."""
    art = Image.open(source).convert("RGBA")
    if art.size != (SIZE, SIZE):
        art = art.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", art.size, "white")
    return Image.alpha_composite(white, art).convert("RGB")


def concepts(roots: dict[str, Path]) -> list[dict[str, Any]]:
    """List what both packages draw, one member per family, each with its two images."""
    fluent = {p.stem.replace("-fe0f", ""): p for p in (roots["3D"] / "assets").glob("*.webp")}
    noto = roots["flat"] / "img" / "google" / "64"
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(json.loads((roots["flat"] / "emoji.json").read_text()), key=lambda e: e["sort_order"]):
        name = clean_name(entry)
        code = entry["unified"].lower().replace("-fe0f", "")
        if not wanted(entry, name) or code not in fluent or not (noto / entry["image"]).exists():
            continue
        if family(name) in found:
            continue
        images = {"3D": image(fluent[code]), "flat": image(noto / entry["image"])}
        found[family(name)] = {"name": name, "code": code, "category": entry["category"], "images": images}
    return list(found.values())


def near_duplicate_groups(items: list[dict[str, Any]]) -> list[list[int]]:
    """Group concepts whose images look nearly the same in either style (connected components)."""
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for style in PACKAGES:
        thumbs = np.stack(
            [np.asarray(c["images"][style].resize((16, 16), Image.Resampling.BOX), np.float64).ravel() for c in items]
        )
        square = (thumbs**2).mean(1)
        rms = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * thumbs @ thumbs.T / thumbs.shape[1], 0))
        for i, j in zip(*np.nonzero(np.triu(rms < NEAR_DUPLICATE_RMS, 1)), strict=True):
            parent[root(int(i))] = root(int(j))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(items)):
        groups[root(i)].append(i)
    return list(groups.values())


def order(text: str) -> str:
    """A fixed shuffle: sort by this hash, the same on every machine."""
    return hashlib.sha256(f"ambient_sd emoji split {text}".encode()).hexdigest()


def split(items: list[dict[str, Any]]) -> None:
    """Give every concept its split. Groups of near-duplicates stay whole; everyday things go to `base`."""
    groups = near_duplicate_groups(items)
    for number, members in enumerate(groups):
        for i in members:
            items[i]["group"] = number
    free = []
    for members in groups:
        if any(items[i]["name"] in COMMON or (items[i]["category"] == "Symbols" and len(members) > 3) for i in members):
            for i in members:
                items[i]["split"] = "base"
        else:
            free.append(members)
    free.sort(key=lambda members: order(items[members[0]]["code"]))
    counts = {"heldout": HELDOUT_PICTURES, "finetune": FINETUNE_PICTURES}
    for members in free:
        side = next((s for s, left in counts.items() if left > 0 and len(members) <= 2), "base")
        for i in members:
            items[i]["split"] = side
        if side in counts:
            counts[side] -= 2 * len(members)
    finetune = sorted((c for c in items if c["split"] == "finetune"), key=lambda c: order("subset" + c["code"]))
    one_per_group = list({c["group"]: c for c in reversed(finetune)}.values())[::-1]
    chosen = [(c, "3D" if int(order("style" + c["code"]), 16) % 2 else "flat") for c in one_per_group]
    for rank, (concept, style) in enumerate(chosen):
        concept["rank"] = {style: rank}
    rank = len(chosen)
    for concept in finetune:
        for style in PACKAGES:
            if style not in concept.setdefault("rank", {}):
                concept["rank"][style] = rank
                rank += 1


def rows(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    table = []
    for concept in items:
        for style in PACKAGES:
            image = concept["images"][style]
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", lossless=True, quality=60, method=4)
            rank = concept.get("rank", {}).get(style)
            table.append(
                {
                    "image": {"bytes": buffer.getvalue(), "path": f"{concept['code']}-{style}.webp"},
                    "text": f"{style} emoji of {concept['name']}",
                    "key": content_key(image),
                    "split": concept["split"],
                    "name": concept["name"],
                    "aliases": ALIASES.get(concept["name"], []),
                    "style": style,
                    "code": concept["code"],
                    "category": concept["category"],
                    "group": concept["group"],
                    **{f"subset_{n}": rank is not None and rank < n for n in (60, 300, 1000)},
                }
            )
    return sorted(table, key=lambda r: (r["split"], r["code"], r["style"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the two npm packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("emoji.parquet"))
    args = parser.parse_args()
    items = concepts(fetch(args.packages))
    split(items)
    images = rows(items)
    pq.write_table(pa.Table.from_pylist(images), args.out, compression="none")
    for side in ("base", "finetune", "heldout"):
        print(side, sum(r["split"] == side for r in images), "images")
    print("subsets", {n: sum(r[f"subset_{n}"] for r in images) for n in (60, 300, 1000)})
    print(f"{args.out} {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
