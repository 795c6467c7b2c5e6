"""Build the embedded images, and the larger set that version 2 of the base model is trained on.

    python -m experiments.build_images --packages DIR --out ambient_sd/assets/emoji.parquet
    python -m experiments.build_images --packages DIR --set base2 --out build/base2/images.parquet    # needs apt, resvg-py

`emoji.parquet`: the embedded images, from two npm packages, with splits that share no concept.
DIR holds (or receives, through `npm pack`) the two packages below. Every concept that both draw is kept in both styles,
64 x 64 on white. Left out: skin tones, flags, ideograph and keycap buttons, and, of a family whose members differ only in
gender or in the hands of a clock, all but one. What still looks nearly the same after that is grouped and kept on one side.

| style  | package                         | art                                      |
|--------|---------------------------------|------------------------------------------|
| `3D`   | @lobehub/fluent-emoji-3d 1.1.0  | Fluent Emoji, MIT                        |
| `flat` | emoji-datasource-google 16.0.0  | Noto Emoji, Apache-2.0 (package: MIT)    |

Splits: `base` trains the base model; `finetune` is for experiments, with nested subsets of 60, 300 and 1000 images
(columns `subset_60`, `subset_300`, `subset_1000`; the first two hold one image per concept); `heldout` is never trained on.

`base2`: the same concepts in more styles, and clip art, each with its style in the caption.

| style      | package                                | art                        |
|------------|----------------------------------------|----------------------------|
| `3D`       | as above                               | Fluent Emoji, MIT          |
| `flat`     | as above                               | Noto Emoji, Apache-2.0     |
| `fluent`   | @iconify-json/fluent-emoji-flat 1.2.6  | Fluent Emoji, MIT          |
| `blob`     | @iconify-json/noto-v1 1.2.5            | Noto Emoji 2014, Apache-2.0|
| `clip art` | Debian's openclipart-svg 0.18          | public domain              |

Columns: `split` is `train` or `measure`; `known` says whether a `measure` image shows a concept that is trained on in another style.
Withheld from training, and kept as `measure`:
- all images of a `NOVEL` number of concepts, in every style, and clip art that bears a word of theirs: seen in no style;
- the `finetune` and `heldout` concepts of `emoji.parquet` in `3D`, `flat` and `fluent` (`3D` and `fluent` are one drawing in two
  renderings); `blob` alone tells the base of them, and only where it is another drawing than all that is withheld;
- of the other concepts, everyday things apart, a tenth of the `flat` and a tenth of the `blob` images; a tenth of the clip art.
The hashes are fixed; `experiments/concepts.json` lists every concept with its names, family and side.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from ambient_sd.data.images import content_key
from experiments import clip_art
from experiments.concepts import families, order, words
from experiments.names import ALIASES, COMMON

PACKAGES = {"3D": "@lobehub/fluent-emoji-3d@1.1.0", "flat": "emoji-datasource-google@16.0.0"}
SIZE = 64
HELDOUT_PICTURES, FINETUNE_PICTURES = 320, 1_010
# Two images of one style whose 16 x 16 thumbnails differ by less than this root mean square (of 255) count as nearly
# the same. 12 was chosen by eye: the pairs below it are recoloured or slightly turned copies, those above are not.
NEAR_DUPLICATE_RMS = 12.0
ICONS = {"fluent": "@iconify-json/fluent-emoji-flat@1.2.6", "blob": "@iconify-json/noto-v1@1.2.5"}
# Across styles, below this the two are one drawing in other colours. By eye: Noto's flute, sunglasses and baby of 2014 and of today
# differ by 15 to 20; from 24 on the shapes differ.
SAME_DRAWING_RMS = 24.0
NOVEL = 140
CONCEPTS = Path(__file__).with_name("concepts.json")
# Things with one plain name. People, faces and symbols share their words with each other, so that none is seen in no style.
NAMEABLE = {"Objects", "Travel & Places", "Food & Drink", "Animals & Nature", "Activities"}


def fetch(folder: Path, packages: dict[str, str] = PACKAGES) -> dict[str, Path]:
    """Download and unpack the packages into `folder` unless they are there; return the root of each by style."""
    roots: dict[str, Path] = {}
    for style, package in packages.items():
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
    free.sort(key=lambda members: order("emoji split", items[members[0]]["code"]))
    counts = {"heldout": HELDOUT_PICTURES, "finetune": FINETUNE_PICTURES}
    for members in free:
        side = next((s for s, left in counts.items() if left > 0 and len(members) <= 2), "base")
        for i in members:
            items[i]["split"] = side
        if side in counts:
            counts[side] -= 2 * len(members)
    finetune = sorted(
        (c for c in items if c["split"] == "finetune"), key=lambda c: order("emoji split", "subset" + c["code"])
    )
    one_per_group = list({c["group"]: c for c in reversed(finetune)}.values())[::-1]
    chosen = [(c, "3D" if int(order("emoji split", "style" + c["code"]), 16) % 2 else "flat") for c in one_per_group]
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


# --------------------------------------------------------------------------------------------------------------------
# The set of version 2


def rasterize(svg: str, *, crop: bool = False, size: int = SIZE) -> Image.Image | None:
    """Return an SVG on white, `size` x `size`; with `crop`, what is drawn fills it. None where nothing is drawn."""
    import resvg_py  # needed here alone: emoji.parquet comes from ready-made images

    art = Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * size, dpi=96, skip_system_fonts=True)))
    ).convert("RGBA")
    if crop:
        box = art.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
        if box is None:
            return None
        art = art.crop(box)
    side = round(max(art.size) * (size / (size - 4) if crop else 1))
    white = Image.new("RGBA", (side, side), "white")
    white.alpha_composite(art, ((side - art.width) // 2, (side - art.height) // 2))
    return white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def icons(root: Path) -> dict[str, str]:
    """Return the SVGs of an Iconify package by icon name, aliases included."""
    package = json.loads((root / "icons.json").read_text())
    body = package["icons"] | {k: package["icons"].get(a["parent"]) for k, a in package.get("aliases", {}).items()}
    svgs = {}
    for name, icon in body.items():
        if icon:
            w, h = (icon.get(k, package.get(k, 16)) for k in ("width", "height"))
            space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            svgs[name] = f'<svg {space} width="{w}" height="{h}" viewBox="0 0 {w} {h}">{icon["body"]}</svg>'
    return svgs


def icon_names(root: Path) -> dict[str, str]:
    """Return the icon name (CLDR's short name with hyphens) of every code point that an Iconify package maps."""
    return {k.replace("-fe0f", ""): v for k, v in json.loads((root / "chars.json").read_text()).items()}


def names_of(name: str, cldr: str) -> list[str]:
    """List a concept's names: Unicode's, CLDR's, and others in use."""
    return list(dict.fromkeys([name, *([cldr] if cldr else []), *ALIASES.get(name, [])]))


def mark_novel(items: list[dict[str, Any]], count: int = NOVEL) -> None:
    """Give every concept its family, and mark as novel `count` whose words are in the names of no other family."""
    users: dict[str, set[int]] = defaultdict(set)
    whole: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for concept, family_number in zip(items, families([c["names"] for c in items]), strict=True):
        concept |= {"family": family_number, "novel": False}
        whole[family_number].append(concept)
        for word in set().union(*map(words, concept["names"])):
            users[word].add(family_number)
    crowded = {c["group"] for c in items if sum(d["group"] == c["group"] for d in items) > 1}
    free = [
        members
        for number, members in whole.items()
        if all(c["category"] in NAMEABLE and c["name"] not in COMMON and c["group"] not in crowded for c in members)
        and all(users[w] == {number} for c in members for n in c["names"] for w in words(n))
    ]
    chosen = sorted(free, key=lambda members: order("novel", min(c["code"] for c in members)))
    for members in chosen:
        if count >= len(members):
            count -= len(members)
            for c in members:
                c["novel"] = True


def thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float64).ravel()


def distances(a: list[Image.Image], b: list[Image.Image]) -> np.ndarray:
    """Root mean square between the 16 x 16 thumbnails of `a` and of `b`, the nearer of `b` and its mirror image."""
    x = np.stack([thumbnail(i) for i in a])
    nearest = np.full((len(a), len(b)), np.inf)
    for y in (np.stack([thumbnail(i) for i in b]), np.stack([thumbnail(ImageOps.mirror(i)) for i in b])):
        square = (x**2).mean(1)[:, None] + (y**2).mean(1)[None] - 2 * x @ y.T / x.shape[1]
        nearest = np.minimum(nearest, np.sqrt(np.maximum(square, 0)))
    return nearest


def tenth(kind: str, code: str) -> bool:
    return int(order("measure " + kind, code), 16) % 10 == 0


def candidates(items: list[dict[str, Any]], packages: Path) -> list[dict[str, Any]]:
    """List every image of version 2 with the side that the rules above give it, before near-duplicates."""
    roots = fetch(packages, ICONS)
    svgs, cldr = {style: icons(root) for style, root in roots.items()}, icon_names(roots["fluent"])
    for concept in items:
        concept["names"] = names_of(concept["name"], cldr.get(concept["code"], "").replace("-", " "))
    mark_novel(items)
    found = []
    for concept in items:
        images = dict(concept["images"])
        for style, icon in svgs.items():
            if svg := icon.get(cldr.get(concept["code"], "")):
                images[style] = rasterize(svg)
        everyday = concept["name"] in COMMON
        for style, picture in images.items():
            outside = concept["novel"] or (concept["split"] != "base" and style != "blob")
            aside = not everyday and style in {"flat", "blob"} and tenth(style, concept["code"])
            found.append(
                {
                    **{k: concept[k] for k in ("name", "code", "category", "family", "novel")},
                    "image": picture,
                    "style": style,
                    "text": f"{style} emoji of {concept['name']}",
                    "aliases": concept["names"][1:],
                    "everyday": everyday,
                    "firm": outside,
                    "split": "measure" if outside or aside else "train",
                }
            )
    novel = {w for c in items if c["novel"] for n in c["names"] for w in words(n)} - clip_art.SHELVES
    plain = {n for c in items if c["name"] in COMMON for n in c["names"]}
    english = {w for c in items for n in c["names"] for w in n.split()}
    for drawing in clip_art.drawings(clip_art.unpack(packages / "openclipart"), english)[0]:
        told = set().union(*map(words, [drawing.name, drawing.stem, *drawing.tags]))
        picture = rasterize(drawing.svg, crop=True)
        if novel & told or picture is None:
            continue
        found.append(
            {
                "name": drawing.name,
                "code": drawing.path,
                "category": drawing.path.split("/")[0],
                "family": -1,
                "novel": False,
                "image": picture,
                "style": "clip art",
                "text": f"clip art of {drawing.name}",
                "aliases": [],
                "everyday": drawing.name in plain,
                "firm": False,
                "split": "measure" if tenth("clip art", drawing.path) else "train",
            }
        )
    return found


def without_leaks(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop near-duplicates within a style, and from training what is the same drawing as an image that is withheld."""
    kept: list[dict[str, Any]] = []
    for style in dict.fromkeys(r["style"] for r in found):
        some = [r for r in found if r["style"] == style]
        near = distances([r["image"] for r in some], [r["image"] for r in some]) < NEAR_DUPLICATE_RMS
        # Emoji that look alike but mean different things (hearts in two reds) stay; the same clip art under two names does not.
        drop: set[int] = set()
        for i in range(len(some)):
            if style == "clip art" and i not in drop:
                drop |= {int(j) for j in np.flatnonzero(near[i]) if j > i}
        kept += [r for i, r in enumerate(some) if i not in drop]
    withheld = [r for r in kept if r["split"] == "measure"]
    train = [r for r in kept if r["split"] == "train"]
    close = distances([r["image"] for r in train], [r["image"] for r in withheld]) < SAME_DRAWING_RMS
    # The embedded `finetune` and `heldout` images and the novel ones must stay unseen; a measured image that is no longer new goes.
    firm = np.array([r["firm"] for r in withheld])
    # 3D, flat and fluent images of `base` concepts stay: the splits of emoji.parquet already keep them apart from the rest.
    movable = np.array([r["style"] in {"blob", "clip art"} for r in train])
    out = (close & firm[None]).any(1) & movable
    train = [r for r, leak in zip(train, out, strict=True) if not leak]
    seen = close[~out].any(0) & ~firm
    withheld = [r for r, leak in zip(withheld, seen, strict=True) if not leak]
    told = {words(n) for r in train for n in (r["name"], *r["aliases"])}
    for r in withheld:
        r["known"] = any(words(n) in told for n in (r["name"], *r["aliases"]))
    return [{k: v for k, v in r.items() if k != "firm"} | {"known": r.get("known", True)} for r in train + withheld]


def encoded(row: dict[str, Any]) -> dict[str, Any]:
    """Return `row` with its image as lossless WebP and its content key."""
    buffer = io.BytesIO()
    row["image"].save(buffer, "WEBP", lossless=True, quality=60, method=4)
    name = re.sub(r"[^\w.-]", "_", f"{row['code']}-{row['style']}.webp")
    return row | {"image": {"bytes": buffer.getvalue(), "path": name}, "key": content_key(row["image"])}


def check_withheld(rows: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
    """Stop where a training row shows what must stay unseen: by its words, its concept, its style or its artist."""
    novel = {w for c in items if c["novel"] for n in c["names"] for w in words(n)} - clip_art.SHELVES
    side = {c["code"]: "novel" if c["novel"] else c["split"] for c in items}
    for row in (r for r in rows if r["split"] == "train"):
        told = set().union(*map(words, (row["name"], *row["aliases"])))
        emoji = side.get(row["code"], "base")
        if (
            told & novel
            or emoji == "novel"
            or (emoji != "base" and row["style"] != "blob")
            or row["style"] == "twemoji"
        ):
            raise AssertionError(f"{row['style']}, {row['code']}, {row['name']!r} must not be trained on")


def build_base2(items: list[dict[str, Any]], packages: Path, out: Path) -> None:
    """Write the set of version 2, and the list of all concepts with their sides."""
    chosen = without_leaks(candidates(items, packages))
    check_withheld(chosen, items)
    taught = {r["code"] for r in chosen if r["split"] == "train"}
    listed = [
        {
            "code": c["code"],
            "names": c["names"],
            "category": c["category"],
            "family": c["family"],
            "emoji": c["split"],
            "group": c["group"],
            "base2": "novel" if c["novel"] else "known" if c["code"] in taught else "unseen",
        }
        for c in items
    ]
    CONCEPTS.write_text("[\n" + ",\n".join(json.dumps(c) for c in listed) + "\n]\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen.sort(key=lambda r: (r["split"], r["style"], r["code"]))
    pq.write_table(pa.Table.from_pylist([encoded(r) for r in chosen]), out, compression="none")
    for split_name in ("train", "measure"):
        some = [r for r in chosen if r["split"] == split_name]
        print(split_name, len(some), dict(Counter(r["style"] for r in some)), sum(r["known"] for r in some), "known")
    print("concepts", dict(Counter(c["base2"] for c in listed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--set", choices=["emoji", "base2"], default="emoji")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("emoji.parquet"))
    args = parser.parse_args()
    items = concepts(fetch(args.packages))
    split(items)
    if args.set == "base2":
        build_base2(items, args.packages, args.out)
        return
    images = rows(items)
    pq.write_table(pa.Table.from_pylist(images), args.out, compression="none")
    for side in ("base", "finetune", "heldout"):
        print(side, sum(r["split"] == side for r in images), "images")
    print("subsets", {n: sum(r[f"subset_{n}"] for r in images) for n in (60, 300, 1000)})
    print(f"{args.out} {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
