"""The image at the head of the README: what each run of the demo draws for captions that were trained, and for captions that were not.

    make demo
    python tools/readme_picture.py demo-out --out build/readme
    cp build/readme/readme.png docs/readme.png

The prompts are the first six training captions and the first six held-out ones, the images the first sample of each, from the demo's own start noise:
nothing is chosen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ambient_sd.assets import BASE, STYLE
from ambient_sd.cli import main as ambient_sd
from ambient_sd.data.sources import load_rows

SAMPLER = ["--scheduler", "dpm++", "--num_inference_steps", "15", "--guidance_scale", "4"]  # the demo's
SEEDS = {"train": 0, "heldout": 1000}
RUNS = ("base", "plain", "ambient", "distill")
TITLES = {"train": ("training image", *RUNS), "heldout": ("real image", *RUNS)}
HEADS = {"train": "captions that were trained", "heldout": "captions that were not"}
SHOWN = 6
CELL, GAP, HEAD, FOOT = 112, 8, 56, 22


def sample(model: Path, captions: Sequence[str], seed: int, out: Path) -> list[Image.Image]:
    """Sample the captions by `ambient-sd sample`, which resumes, and return the first image of each."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prompts = out.with_suffix(".jsonl")
    prompts.write_text("".join(json.dumps({"prompt": caption}) + "\n" for caption in captions), encoding="utf-8")
    ambient_sd(["sample", str(model), "--prompts", str(prompts), "--out", str(out), *SAMPLER, "--seed", str(seed)])
    return [Image.open(out / "images" / f"{i:05d}-00.png") for i in range(len(captions))]


def compose(blocks: dict[str, Sequence[Sequence[Image.Image]]], captions: dict[str, Sequence[str]]) -> Image.Image:
    """Lay out a block for either kind of caption, one row a prompt, with titles above the columns and the prompt below its images."""
    width, row = len(TITLES["train"]) * (CELL + GAP), CELL + FOOT + GAP
    sheet = Image.new("RGB", (2 * width + 6 * GAP, HEAD + SHOWN * row), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(13)
    for side, (kind, rows) in enumerate(blocks.items()):
        start = side * (width + 6 * GAP)
        draw.text((start + width // 2, 14), HEADS[kind], fill="black", font=font, anchor="mm")
        for column, title in enumerate(TITLES[kind]):
            draw.text(
                (start + column * (CELL + GAP) + CELL // 2, HEAD - 16), title, fill="#555555", font=small, anchor="mm"
            )
        for place, images in enumerate(rows):
            top = HEAD + place * row
            for column, image in enumerate(images):
                big = image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
                sheet.paste(big, (start + column * (CELL + GAP), top))
            draw.text((start, top + CELL + 3), captions[kind][place], fill="#555555", font=small)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished `ambient-sd demo`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the samples and readme.png")
    args = parser.parse_args()
    blocks, captions = {}, {}
    for kind, seed in SEEDS.items():
        real = load_rows(STYLE, split=kind, caption_column="name")
        captions[kind] = real.captions[:SHOWN]
        drawn = [
            sample(BASE if run == "base" else args.demo / run, captions[kind], seed, args.out / f"{run}-{kind}")
            for run in RUNS
        ]
        blocks[kind] = [[real[i].image, *(images[i] for images in drawn)] for i in range(SHOWN)]
    compose(blocks, captions).save(args.out / "readme.png", optimize=True)


if __name__ == "__main__":
    main()
