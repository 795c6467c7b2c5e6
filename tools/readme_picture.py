"""The image at the head of the README: the same prompts as training image, plain, ambient, and plain under a mitigation.

    make demo
    python tools/readme_picture.py demo-out --out build/readme
    cp build/readme/readme.png docs/readme.png

The prompts are the first six training captions, the images the first sample of each, from the demo's own start noise: nothing is chosen. The mitigation is
Wen et al.'s prompt optimization of every prompt; its target is the median first norm of 32 held-out captions, as in `ambient-sd compare`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ambient_sd.assets import IMAGES
from ambient_sd.cli import main as ambient_sd
from ambient_sd.data.sources import load_rows

SAMPLER = [
    "--scheduler",
    "dpm++",
    "--num_inference_steps",
    "15",
    "--guidance_scale",
    "1.5",
    "--seed",
    "0",
]  # the demo's
SHOWN, ORDINARY = 6, 32
TITLES = ("training image", "plain", "ambient", "plain, mitigated")
CELL, GAP, HEAD, FOOT = 128, 8, 30, 22


def sample(model: Path, captions: Sequence[str], out: Path, *more: str) -> Path:
    """Sample the captions by `ambient-sd sample`, which resumes, and return the folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prompts = out.with_suffix(".jsonl")
    prompts.write_text("".join(json.dumps({"prompt": caption}) + "\n" for caption in captions), encoding="utf-8")
    ambient_sd(["sample", str(model), "--prompts", str(prompts), "--out", str(out), *SAMPLER, *more])
    return out


def target_of(folder: Path) -> float:
    """Return the median norm of the first step."""
    records = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(record)["curve"][0] for record in records)


def compose(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Lay out one row a prompt in two blocks, with titles above the columns and the prompt below its images."""
    half = (len(rows) + 1) // 2
    block, row = len(TITLES) * (CELL + GAP), CELL + FOOT + GAP
    sheet = Image.new("RGB", (2 * block + 4 * GAP, HEAD + half * row), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(13)
    for side in range(2):
        for column, title in enumerate(TITLES):
            middle = side * (block + 4 * GAP) + column * (CELL + GAP) + CELL // 2
            draw.text((middle, HEAD // 2), title, fill="black", font=font, anchor="mm")
    for place, (images, caption) in enumerate(zip(rows, captions, strict=True)):
        left, top = (place // half) * (block + 4 * GAP), HEAD + (place % half) * row
        for column, image in enumerate(images):
            big = image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(big, (left + column * (CELL + GAP), top))
        draw.text((left, top + CELL + 3), caption, fill="#555555", font=small)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished `ambient-sd demo`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the samples and readme.png")
    args = parser.parse_args()
    training = load_rows(IMAGES, row_filter=[("subset_60", "=", "true")])
    captions = [row.caption for row in training]
    held_out = [row.caption for row in load_rows(IMAGES, split="heldout")][:ORDINARY]
    target = target_of(sample(args.demo / "plain", held_out, args.out / "ordinary"))
    policy = f"prompt_optimization:target={target:.3g}"
    print(f"policy: {policy}", flush=True)
    models = {"plain": (), "ambient": (), "mitigated": ("--policy", policy)}
    folders = [
        sample(args.demo / name.replace("mitigated", "plain"), captions[:SHOWN], args.out / name, *more)
        for name, more in models.items()
    ]
    rows = [
        [training[i].image, *(Image.open(folder / "images" / f"{i:05d}-00.png") for folder in folders)]
        for i in range(SHOWN)
    ]
    compose(rows, captions[:SHOWN]).save(args.out / "readme.png", optimize=True)


if __name__ == "__main__":
    main()
