"""Which rule finds copies, in and outside series: true-positive rate at 1 % false positives, per rule and change.

    python benchmarks/copies.py --out build/copies.json            # about 15 minutes on one core

Training images are changed as a generated copy could be (`experiments.transformations`, a shift, a round trip through the embedded autoencoder); images that
cannot be copies are held-out ones and the embedded base model's own for the same captions. Two sets: the 300 embedded emoji of `subset_300`, and drawings in
series (`benchmarks/series.py`). Half of the held-out images are the null, the others and the base's set every rule's threshold: 1 % of them lie beyond it.
`decision` is what the project decides by: one call holds the changed copies and three times as many that are none, as an audit does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from series import caption, member
from torch import Tensor

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.audit.decision import SAME, CopyDecision, discoveries, through_vae
from ambient_sd.audit.features import MIRROR, embed
from ambient_sd.audit.neighbours import Neighbours
from ambient_sd.audit.originals import originals
from ambient_sd.audit.registry import choose
from ambient_sd.data.sources import load_rows
from ambient_sd.sampling import Request, SamplingConfig, generate, load_pipeline
from ambient_sd.utils.estimate import wilson
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.sheets import as_rgb
from experiments.transformations import TRANSFORMATIONS, transformed

SERIES, MEMBERS = 24, 12
Images = list[Image.Image]


def shifted(p: Image.Image, _: int) -> Image.Image:
    out = Image.new("RGB", p.size, p.getpixel((0, 0)))
    out.paste(p, (round(0.06 * p.width), round(-0.04 * p.height)))
    return out


def sampled_from_base(captions: Sequence[str]) -> Images:
    config = SamplingConfig(str(BASE), None, "dpm++", 15, 1.5, 64, batch_size=16)
    pipe = load_pipeline(config, safety_checker=False)
    # The seeds of the published figures: 0, 1, ...
    requests = [Request(caption, 0, i) for i, caption in enumerate(captions)]
    return [one.image for batch in generate(pipe, requests, config) for one in batch if one.image is not None]


def emoji() -> tuple[Images, Images, list[str], list[Any]]:
    training = load_rows(IMAGES, row_filter=[("subset_300", "=", "true")]).check(near_duplicates=True)
    unseen = [as_rgb(row.image) for row in load_rows(IMAGES, split="heldout")]
    return [as_rgb(row.image) for row in training], unseen, training.captions, list(training.noise_keys)


def in_series() -> tuple[Images, Images, list[str], list[Any]]:
    training = [member(s, n) for s in range(SERIES) for n in range(MEMBERS)]
    unseen = [member(s, n) for n in range(MEMBERS, 2 * MEMBERS) for s in range(SERIES)]
    captions = [caption(s) for s in range(SERIES) for _ in range(MEMBERS)]
    return training, unseen, captions, list(range(len(training)))


class Published:
    """d1 / d2 by one feature, mirror images searched: at 1/3, and at 1 % false positives."""

    def __init__(self, training: Images, labels: list[Any], names: Sequence[str]) -> None:
        self.features, self.labels = choose(names), labels
        self.training = embed(training, self.features)

    def __call__(self, images: Images) -> dict[str, Neighbours]:
        made = embed(images, self.features, mirrored=True)
        return {
            f.name: originals([made[f.name], made[f.name + MIRROR]], self.training[f.name], distance=f.distance, duplicates=self.labels)
            for f in self.features
        }  # fmt: skip


def at_one_percent(scores: Tensor, unseen: Tensor) -> Tensor:
    """Mark scores below all but 1 % of the unseen ones; small is near."""
    return scores < torch.quantile(unseen.double(), 0.01)


def study(
    name: str,
    load: Callable[[], tuple[Images, Images, list[str], list[Any]]],
    queries: int,
    features: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    training, unseen, captions, labels = load()
    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(seed)).tolist()
    null, test = [unseen[i] for i in order[::2]], [unseen[i] for i in order[1::2]]
    different = list(dict.fromkeys(captions))
    base = sampled_from_base((different * 8)[:128])
    rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:queries].tolist()
    originals_of = [training[i] for i in rows]
    changed = {
        k: transformed(originals_of, change, seed)
        for k, change in {**TRANSFORMATIONS, "shifted by 6 % and 4 %": shifted}.items()
    }
    vae: Any = AutoencoderKL.from_pretrained(BASE, subfolder="vae").eval()
    changed["VAE round trip"] = through_vae(vae, 64)(originals_of)
    decide = CopyDecision.of(training, labels, heldout=null, progress=True)
    aware = CopyDecision.of(training, labels, heldout=null, vae=vae, side=64, progress=True)
    published = Published(training, labels, features)
    clean = test + base
    none = {"decision": decide(clean), "decision, with renditions": aware(clean)}
    ratios = {k: n.ratio for k, n in published(clean).items()}
    false: dict[str, list[float]] = {k: _share(d.copy) for k, d in none.items()}
    false |= {f"{k} < 1/3": _share(r < 1 / 3) for k, r in ratios.items()}
    parts = {"held-out": slice(0, len(test)), "base": slice(len(test), None)}
    by_kind = {kind: {k: _share(d.copy[s]) for k, d in none.items()} for kind, s in parts.items()}
    table: dict[str, dict[str, list[float]]] = {}
    for change, images in changed.items():
        row: dict[str, list[float]] = {}
        for key, one in (("decision", decide), ("decision, with renditions", aware)):
            found, others = one(images), none[key]
            # p of an image is its own; only which p are discoveries depends on the others.
            p = torch.cat([found.p, others.p[: 3 * queries]])
            copy = discoveries(p) | (torch.cat([found.residual, others.residual[: 3 * queries]]) <= SAME)
            right = torch.tensor([labels[a] == labels[b] for a, b in zip(found.row.tolist(), rows, strict=True)])
            row[key] = _share(copy[:queries] & right)
            row[f"{key}, false"] = _share(copy[queries:])
            row[f"{key}: r at 1 %"] = _share(at_one_percent(found.ratio, others.ratio))
        for key, near in published(images).items():
            row[f"{key} < 1/3"] = _share(near.ratio < 1 / 3)
            row[f"{key} at 1 %"] = _share(at_one_percent(near.ratio, ratios[key]))
        table[change] = row
        print(name, change, {k: f"{100 * v[0]:.0f}" for k, v in row.items()}, flush=True)
    return {"set": name, "training": len(training), "null": len(null), "unseen": len(test), "base": len(base), "queries": queries, "seed": seed,
            "false": false, "false_by_kind": by_kind, "found": table}  # fmt: skip


def _share(marks: Tensor) -> list[float]:
    value = float(marks.double().mean())
    return [value, *wilson(value, len(marks))]


def markdown(found: Mapping[str, Any]) -> str:
    """Return a set's table: a row a change, a column a rule, per cent with Wilson's 95 % interval."""
    columns = [k for k in next(iter(found["found"].values())) if not k.endswith("false")]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    show = lambda v: f"{100 * v[0]:.0f} [{100 * v[1]:.0f}, {100 * v[2]:.0f}]"  # noqa: E731
    for change, row in found["found"].items():
        lines.append(f"| {change} | " + " | ".join(show(row[c]) for c in columns) + " |")
    lines.append(
        "| **false**, unseen and base | "
        + " | ".join(show(found["false"][c]) if c in found["false"] else "1" for c in columns)
        + " |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=40, help="training images changed, of each set")
    parser.add_argument(
        "--features", default="pixels,standardized,edges", help="published measures beside the decision"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sets = []
    for name, load in (("emoji", emoji), ("series", in_series)):
        sets.append(study(name, load, args.queries, args.features.split(","), args.seed))
        atomic_write(args.out, json.dumps({"sets": sets}, indent=1) + "\n")
        print(f"\n### {name}\n\n{markdown(sets[-1])}\n", flush=True)


if __name__ == "__main__":
    main()
