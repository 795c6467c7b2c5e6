"""Build what the base model is fine-tuned and measured on: two styles, and a hand, that it has never seen.

    python -m experiments.build_styles --packages DIR --base build/base2/images.parquet --out build/base2

`styles.parquet`: Twemoji (npm `@iconify-json/twemoji` 1.2.5; graphics by Twitter and contributors, CC-BY-4.0), 64 x 64 on white.
The base has seen no image in this style. Of its concepts it knows some.

| split         | concepts                                                                  | for                              |
|---------------|---------------------------------------------------------------------------|----------------------------------|
| `style_train` | known: seen in 3D, flat and fluent. Nested subsets `style_60`, `style_300` | fine-tuning                      |
| `style_test`  | known, of other families than those of `style_train`                      | does the style carry over?       |
| `style_novel` | seen in no style, by the base or in `style_train`                         | are there things it cannot draw? |

`outline.parquet`: OpenMoji (npm `@iconify-json/openmoji` 1.2.29, CC-BY-SA-4.0), drawn with black outlines and room around them, to confirm
on: `outline_train` (nested `outline_60`) and `outline_test`, by hashes of their own, so mostly other concepts than those of `style_60`.

The embedded `ambient_sd/assets/twemoji.parquet` is `style_60` as split `train` and `style_test` as split `heldout` (`--assets`).

`confirm.parquet`: one clip-art artist (`clip_art.CONFIRM`, public domain), kept out of the base altogether and chosen before any
result, to confirm on another kind of image: `confirm_train` (nested `confirm_60`) and `confirm_test`, again apart by family. `experiments/style_sets.json` lists all files' names by split.

Families (`experiments.concepts`) hold variants together: skin tones, gender, cat faces, colours, words for one thing, and all that
looks nearly the same in this style. A family is on one side; `style_train` and `style_test` take at most two images of it. Left out
is what is the same drawing as an image that the base was trained on (plain hearts, circles, some icons). All by fixed hashes of names.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ambient_sd.data.sources import load_rows
from experiments import clip_art
from experiments.build_images import (
    CONCEPTS,
    NEAR_DUPLICATE_RMS,
    SAME_DRAWING_RMS,
    distances,
    encoded,
    fetch,
    icon_names,
    icons,
    rasterize,
)
from experiments.concepts import families, order, words

PACKAGES = {"twemoji": "@iconify-json/twemoji@1.2.5", "openmoji": "@iconify-json/openmoji@1.2.29"}
CREDIT = {
    "twemoji": "Twemoji, graphics by Twitter, Inc and other contributors, CC-BY-4.0 (creativecommons.org/licenses/by/4.0/), resized",
    "openmoji": "OpenMoji, the open-source emoji and icon project, CC-BY-SA-4.0 (creativecommons.org/licenses/by-sa/4.0/), resized",
    "confirm": f"Open Clip Art Library, {clip_art.CONFIRM}, public domain",
}
SETS = Path(__file__).with_name("style_sets.json")
PER_FAMILY = 2  # a family of fifty smileys must not be a sixth of a set


def merged(numbers: list[int], near: np.ndarray) -> list[int]:
    """Join the groups `numbers` of what is `near` each other (a square matrix of truths)."""
    numbers = list(numbers)
    for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True):
        old, new = numbers[int(j)], numbers[int(i)]
        numbers = [new if n == old else n for n in numbers]
    return numbers


def sides(rows: list[dict[str, Any]], kind: str, *, test_share: int = 3) -> list[dict[str, Any]]:
    """Put every row on a side by its family: one family in `test_share` to the test; at most `PER_FAMILY` rows of each.

    A family is named by its first name in the alphabet, so that its side depends on neither numbers nor order. Rows of
    `kind`_train come with their `rank`: the first of every family before the second of any.
    """
    whole: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        whole[row["family"]].append(row)
    found = []
    for members in whole.values():
        title = min(m["name"] for m in members)
        side = "test" if int(order(f"{kind} side", title), 16) % test_share == 0 else "train"
        some = sorted(members, key=lambda m: order(kind, m["code"]))[:PER_FAMILY]
        found += [m | {"split": f"{kind}_{side}", "turn": turn} for turn, m in enumerate(some)]
    found.sort(key=lambda m: (m["split"], m["turn"], order(kind, m["code"])))
    ranks: Counter[str] = Counter()
    for m in found:
        m["rank"] = ranks[m["split"]]
        ranks[m["split"]] += 1
        del m["turn"]
    return found


def drawn(style: str, concepts: list[dict[str, Any]], packages: Path, seen: list[Any]) -> list[dict[str, Any]]:
    """List the concepts that a package of `PACKAGES` draws, without what is the same drawing as an image that was `seen`; families as it looks."""
    root = fetch(packages, {style: PACKAGES[style]})[style]
    svgs, names = icons(root), icon_names(root)
    rows = []
    for c in concepts:
        picture = rasterize(svgs[names[c["code"]]]) if names.get(c["code"]) in svgs else None
        if picture is not None:
            name, *aliases = c["names"]
            about = {"style": style, "text": f"{style} emoji of {name}", "credit": CREDIT[style]}
            rows.append({"image": picture, "name": name, "aliases": aliases, **about} | c)
    images = [r["image"] for r in rows]
    groups = merged([r["family"] for r in rows], distances(images, images) < NEAR_DUPLICATE_RMS)
    same = (distances(images, seen) < SAME_DRAWING_RMS).any(1)
    return [r | {"family": g} for r, g, leak in zip(rows, groups, same, strict=True) if not leak]


def known_sides(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Split the concepts that both versions of the base know from other styles into `kind`_train and `kind`_test."""
    novel = {r["family"] for r in rows if r["base2"] == "novel"}
    known = [r for r in rows if r["base2"] == "known" and r["emoji"] == "base" and r["family"] not in novel]
    return sides(known, kind)


def with_subsets(rows: list[dict[str, Any]], kind: str, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Mark the nested subsets of `kind`_train: its first rows by rank."""
    return [r | {f"{kind}_{n}": r["split"] == f"{kind}_train" and r["rank"] < n for n in counts} for r in rows]


def styles(concepts: list[dict[str, Any]], packages: Path, seen: list[Any]) -> list[dict[str, Any]]:
    """List the rows of `styles.parquet`. `seen`: the images that the base was trained on."""
    rows = drawn("twemoji", concepts, packages, seen)
    novel = [r | {"split": "style_novel", "rank": -1} for r in rows if r["base2"] == "novel"]
    return with_subsets([*known_sides(rows, "style"), *novel], "style", (60, 300))


def outline(concepts: list[dict[str, Any]], packages: Path, seen: list[Any]) -> list[dict[str, Any]]:
    """List the rows of `outline.parquet`."""
    return with_subsets(known_sides(drawn("openmoji", concepts, packages, seen), "outline"), "outline", (60,))


def confirm(
    concepts: list[dict[str, Any]], packages: Path, seen: list[Any], told: set[frozenset[str]]
) -> list[dict[str, Any]]:
    """List the rows of `confirm.parquet`. `told`: the words of every name that the base was trained with."""
    english = {w for c in concepts for n in c["names"] for w in n.split()}
    rows = []
    for drawing in clip_art.drawings(clip_art.unpack(packages / "openclipart"), english)[1]:
        picture = rasterize(drawing.svg, crop=True)
        if picture is not None:
            outline = ", outline" if "_bw" in drawing.path else ""
            about = {
                "aliases": [],
                "style": "confirm",
                "credit": CREDIT["confirm"],
                "known": words(drawing.name) in told,
            }
            text = f"gerald clip art of {drawing.name}{outline}"
            rows.append({"image": picture, "name": drawing.name, "code": drawing.path, "text": text, **about})
    images = [r["image"] for r in rows]
    near = distances(images, images) < NEAR_DUPLICATE_RMS
    copies = {int(j) for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True)}  # one drawing lies in several folders
    same = (distances(images, seen) < SAME_DRAWING_RMS).any(1)
    groups = merged(families([[r["name"]] for r in rows]), near)
    kept = [
        r | {"family": g} for i, (r, g) in enumerate(zip(rows, groups, strict=True)) if i not in copies and not same[i]
    ]
    return with_subsets(sides(kept, "confirm", test_share=2), "confirm", (60,))


def embedded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the embedded set in the order of the whole one: 60 images to train on, and what judges new captions."""
    columns = ("image", "text", "key", "name", "aliases", "style", "code", "category")
    chosen = [(r, "train" if r["style_60"] else "heldout") for r in rows if r["style_60"] or r["split"] == "style_test"]
    return [{**{name: r[name] for name in columns}, "split": split} for r, split in chosen]


def write(rows: list[dict[str, Any]], credit: str, path: Path) -> None:
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"credit": credit})
    pq.write_table(table, path, compression="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the packages")
    parser.add_argument(
        "--base", type=Path, required=True, help="what the base is trained on, from build_images --set base2"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for styles.parquet, outline.parquet and confirm.parquet"
    )
    parser.add_argument("--assets", type=Path, help="write the embedded set to this file too")
    args = parser.parse_args()
    concepts = json.loads(CONCEPTS.read_text())
    seen = [row.image for row in load_rows(args.base, split="train")]
    names = pq.read_table(args.base, columns=["name", "aliases", "split"]).to_pylist()
    told = {words(n) for r in names if r["split"] == "train" for n in (r["name"], *r["aliases"])}
    args.out.mkdir(parents=True, exist_ok=True)
    listed: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, rows in {
        "styles": styles(concepts, args.packages, seen),
        "outline": outline(concepts, args.packages, seen),
        "confirm": confirm(concepts, args.packages, seen, told),
    }.items():
        written = [encoded(r) for r in rows]
        write(written, rows[0]["credit"], args.out / f"{name}.parquet")
        if name == "styles" and args.assets is not None:
            write(embedded(written), rows[0]["credit"], args.assets)
        for r in rows:
            listed[r["split"]].append({k: r[k] for k in ("code", "name", "family")})
        print(
            name,
            dict(Counter(r["split"] for r in rows)),
            f"{(args.out / f'{name}.parquet').stat().st_size / 1e6:.1f} MB",
        )
    lines = [f"{json.dumps(k)}: [\n" + ",\n".join(map(json.dumps, v)) + "\n]" for k, v in listed.items()]
    SETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
