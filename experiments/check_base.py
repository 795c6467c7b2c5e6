"""Look at the embedded base model: a grid of 64 everyday prompts, and how much of its own training set it copies.

    python -m experiments.check_base --docs docs

Writes `base-grid.png` (the prompts below, first sample of each, nothing chosen) and `base-figures.json`: the memorized
fraction on the `base` split for its own captions, beside the same figure for held-out images. The base was trained with
mirrored, turned and zoomed views, so a sample counts as a copy when it or its mirror image is one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.audit.features import embed
from ambient_sd.audit.metrics import bootstrap, memorized, quality_rows
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose, with_sscd
from ambient_sd.commands.demo import DemoSettings
from ambient_sd.commands.demo.work import sample
from ambient_sd.data.sources import load_rows
from ambient_sd.reporting.sheets import contact_sheet
from ambient_sd.sampling import own_device

PROMPTS = """red apple|dog face|sports car|cat face|house|pizza|tree|guitar|rocket|airplane|sun|blue heart|red heart|yellow star|
panda face|bus|fish|banana|strawberry|pine tree|bicycle|umbrella|crown|happy face|ghost|red circle|blue square|cup of coffee|
birthday cake|fire truck|police car|tulip|sunflower|key|light bulb|camera|rainbow|snowman|christmas tree|penguin|owl|frog|lion|
fox|elephant|whale|turtle|butterfly|ladybug|mushroom|bread|cheese|burger|donut|ice cream|soccer ball|basketball|trophy|green apple|
robot|volcano|sailboat|3D emoji of red apple|flat emoji of red apple""".replace("\n", "").split("|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--docs", type=Path, required=True, help="folder for the grid and the figures")
    parser.add_argument("--count", type=int, default=300, help="captions of the base split that are sampled")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)  # before the minutes, not after
    settings = DemoSettings(num_images_per_prompt=1, num_inference_steps=20, guidance_scale=4.0, seed=args.seed)
    images, _ = sample(args.base, PROMPTS, settings, title="prompts")
    contact_sheet(images, 8, captions=PROMPTS).save(args.docs / "base-grid.png")

    rows, heldout = load_rows(IMAGES, split="base"), load_rows(IMAGES, split="heldout")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))[: args.count].tolist()
    images, _ = sample(args.base, [rows[i].caption for i in chosen], settings, title="captions")
    features = choose(with_sscd("pixels", "efflite0"), device=own_device())
    real = embed([row.image for row in rows], features, progress=True)
    unseen = [row.image for row in heldout]
    result: dict[str, Any] = {"n": len(images), "seed": args.seed, "guidance": 4.0, "steps": 20, "figures": {}}
    for feature in features:
        figures, vectors = {}, {}
        for name, shown in {"generated": images, "heldout": unseen}.items():
            hit = torch.zeros(len(shown), dtype=torch.bool)
            vectors[name] = feature(shown)
            for view in (vectors[name], feature([ImageOps.mirror(p) for p in shown])):
                near = nearest(view, real[feature.name], distance=feature.distance)
                hit |= near.similarity > 0.5 if feature.distance == "cosine" else memorized(near)
            figure = bootstrap(hit, torch.mean, name=f"copied-{feature.name}", seed=args.seed, share=True)
            figures[name] = figure.as_dict()
        result["figures"][feature.name] = figures
        if feature.quality:
            for row in quality_rows(vectors["generated"], vectors["heldout"], name=feature.name, seed=args.seed):
                sides = {"generated": row.generated, "heldout": row.heldout}
                result["figures"][row.name] = {side: f.as_dict() for side, f in sides.items() if f is not None}
    (args.docs / "base-figures.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, figures in result["figures"].items():
        print(name, {side: f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for side, f in figures.items()})


if __name__ == "__main__":
    main()
