"""Look at the embedded base model: a grid of 64 everyday prompts, how much of its own training set it copies, how near it comes.

    python -m experiments.check_base --docs docs
    python -m experiments.build_base --version 2 --work build/base2 --stage export --out build/base2/base    # any checkpoint
    python -m experiments.check_base --base build/base2/base --images build/base2/images.parquet --docs build/base2/looks

Writes `base-grid.png` (the prompts below, first sample of each, nothing chosen) and `base-figures.json`: the memorized
fraction on the `base` split for its own captions, beside the same figure for held-out images. The base was trained with
mirrored, turned and zoomed views, so a sample counts as a copy when it or its mirror image is one.

With `--images` (what version 2 is trained on) the figures are of known concepts in known styles, with seeds never seen in training:
- `seen`: samples for captions of training images; `unseen`: for captions whose concept was trained on in another style only;
- `real`: the training images themselves, the best that `seen` can be; `vae`: the same after the VAE alone, its share of the distance.
Each is held against images in the same styles, as many of each, that were withheld from training; the floor is one half of these
against the other. `--styles 3D flat` gives version 1's figures on the same images.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.audit.features import Features, embed
from ambient_sd.audit.metrics import bootstrap, memorized, quality_rows
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose, with_sscd
from ambient_sd.commands.demo import DemoSettings
from ambient_sd.commands.demo.work import sample
from ambient_sd.data.sources import load_rows
from ambient_sd.reporting.sheets import contact_sheet
from ambient_sd.sampling import own_device
from experiments.build_base import to_tensor
from experiments.concepts import order

PROMPTS = """red apple|dog face|sports car|cat face|house|pizza|tree|guitar|rocket|airplane|sun|blue heart|red heart|yellow star|
panda face|bus|fish|banana|strawberry|pine tree|bicycle|umbrella|crown|happy face|ghost|red circle|blue square|cup of coffee|
birthday cake|fire truck|police car|tulip|sunflower|key|light bulb|camera|rainbow|snowman|christmas tree|penguin|owl|frog|lion|
fox|elephant|whale|turtle|butterfly|ladybug|mushroom|bread|cheese|burger|donut|ice cream|soccer ball|basketball|trophy|green apple|
robot|volcano|sailboat|3D emoji of red apple|flat emoji of red apple""".replace("\n", "").split("|")
EMOJI_STYLES = ("3D", "flat", "fluent", "blob")


def copied(
    images: Sequence[Image.Image], feature: Features, real: torch.Tensor, *, name: str, seed: int
) -> dict[str, Any]:
    """Estimate the share of images that are copies of a row of `real`, as they are or mirrored."""
    hit = torch.zeros(len(images), dtype=torch.bool)
    for view in (images, [ImageOps.mirror(p) for p in images]):
        near = nearest(feature(view), real, distance=feature.distance)
        hit |= near.similarity > 0.5 if feature.distance == "cosine" else memorized(near)
    return bootstrap(hit, torch.mean, name=f"copied-{name}", seed=seed, share=True).as_dict()


def psnr(images: Sequence[Image.Image], rendered: Sequence[Image.Image]) -> torch.Tensor:
    """Return `10 log10(1 / mean((x - y)^2))` of each pair in dB, values in [0, 1]; capped at 100 where they are equal."""
    x, y = (torch.stack([to_tensor(image) for image in some]).double() / 2 for some in (images, rendered))
    return 10 * torch.log10(1 / (x - y).square().flatten(1).mean(1).clamp(min=1e-10))


@torch.no_grad()
def through_vae(base: Path, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Encode and decode: what is left of images when nothing but the VAE stands between."""
    vae = AutoencoderKL.from_pretrained(base / "vae").eval()
    out = []
    for part in torch.stack([to_tensor(image) for image in images]).split(50):
        y = ((vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) + 1) * 127.5).round().byte()
        out += [Image.fromarray(array) for array in y.permute(0, 2, 3, 1).numpy()]
    return out


def known_rows(images: Path, styles: Sequence[str], most: int) -> dict[str, list[dict[str, Any]]]:
    """Choose as many training and withheld rows of every style, by hash: `seen` and `unseen`."""
    rows = pq.read_table(images).to_pylist()
    found: dict[str, list[dict[str, Any]]] = {"seen": [], "unseen": []}
    for style in styles:
        some = sorted((r for r in rows if r["style"] == style), key=lambda r: order("check", r["code"]))
        train = [r for r in some if r["split"] == "train"]
        held = [r for r in some if r["split"] == "measure" and r["known"]]
        n = min(most, len(train), len(held))
        found["seen"] += train[:n]
        found["unseen"] += held[:n]
    return found


def decoded(rows: Sequence[dict[str, Any]]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


def check_known(args: argparse.Namespace, settings: DemoSettings) -> dict[str, Any]:
    """Measure known concepts in known styles; write a sheet of samples under their captions."""
    chosen = known_rows(args.images, args.styles, args.count // len(args.styles))
    pictures: dict[str, list[Image.Image]] = {"real": decoded(chosen["seen"])}
    pictures["vae"] = through_vae(args.base, pictures["real"])
    for kind in ("seen", "unseen"):
        captions = [row["text"] for row in chosen[kind]]
        pictures[kind], _ = sample(args.base, captions, settings, title=kind)
        sheet = contact_sheet(pictures[kind][:96], 12, captions=captions[:96])
        sheet.save(args.docs / f"{kind}.png")
    reference, figures = decoded(chosen["unseen"]), {}
    train = [row.image for row in load_rows(args.images, split="train")]
    for feature in choose(with_sscd("pixels", "efflite0"), device=own_device()):
        real = embed(train, [feature], progress=True)[feature.name]
        figures[feature.name] = {
            kind: copied(some, feature, real, name=feature.name, seed=args.seed)
            for kind, some in {"seen": pictures["seen"], "heldout": reference}.items()
        }
        if feature.quality:
            held = feature(reference)
            for kind, some in pictures.items():
                for row in quality_rows(feature(some), held, name=feature.name, seed=args.seed):
                    figures.setdefault(row.name, {})[kind] = row.generated.as_dict()
                    if row.heldout is not None:
                        figures[row.name]["floor"] = row.heldout.as_dict()
    return {"styles": args.styles, "n": len(reference), "figures": figures}


def check_embedded(args: argparse.Namespace, settings: DemoSettings) -> dict[str, Any]:
    """Measure against the embedded images: captions of their `base` split, beside their `heldout` split."""
    rows, heldout = load_rows(IMAGES, split="base"), load_rows(IMAGES, split="heldout")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))[: args.count].tolist()
    images, _ = sample(args.base, [rows[i].caption for i in chosen], settings, title="captions")
    features = choose(with_sscd("pixels", "efflite0"), device=own_device())
    real = embed([row.image for row in rows], features, progress=True)
    unseen = [row.image for row in heldout]
    rendered = through_vae(args.base, unseen)
    decibels = bootstrap(
        psnr(unseen, rendered), torch.mean, name="PSNR", seed=args.seed, detail="autoencoder alone, dB"
    )
    figures: dict[str, Any] = {"PSNR": {"heldout": decibels.as_dict()}}
    for feature in features:
        figures[feature.name] = {
            side: copied(shown, feature, real[feature.name], name=feature.name, seed=args.seed)
            for side, shown in {"generated": images, "heldout": unseen}.items()
        }
        if feature.quality:
            for row in quality_rows(feature(images), feature(unseen), name=feature.name, seed=args.seed):
                both = {"generated": row.generated, "heldout": row.heldout}
                figures[row.name] = {side: f.as_dict() for side, f in both.items() if f is not None}
    return {"n": len(images), "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--docs", type=Path, required=True, help="folder for the grid and the figures")
    parser.add_argument("--images", type=Path, help="measure known concepts in known styles of this file instead")
    parser.add_argument("--styles", nargs="+", default=list(EMOJI_STYLES), help="with --images")
    parser.add_argument("--count", type=int, default=300, help="captions that are sampled, of either kind")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)  # before the minutes, not after
    settings = DemoSettings(
        num_images_per_prompt=1, num_inference_steps=20, guidance_scale=args.guidance, seed=args.seed
    )
    images, _ = sample(args.base, PROMPTS, settings, title="prompts")
    contact_sheet(images, 8, captions=PROMPTS).save(args.docs / "base-grid.png")
    measured = check_known(args, settings) if args.images else check_embedded(args, settings)
    result = {"n": measured["n"], "seed": args.seed, "guidance": args.guidance, "steps": 20} | measured
    (args.docs / "base-figures.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, figures in result["figures"].items():
        print(name, {side: f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for side, f in figures.items()})


if __name__ == "__main__":
    main()
