"""Sample pages of a study: what each run samples for the same prompts, above the training image that explains it best.

A frame marks a copy, as the tables count them. Made of OUT's own files: `samples.png` and `figures.json` of each step; nothing is sampled again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import drawn
from ambient_sd.reporting.sheets import cut_sheet
from ambient_sd.utils.errors import UserError, one_line

COLUMNS = 20  # of `samples.png`
_GAP, _LABEL, _FRAME = 4, 130, "#d92d20"


def samples_of(step: Path, resolution: int, part: str = "") -> tuple[list[Image.Image], list[bool], list[int]]:
    """Return the images of a step, cut out of its sheet, which are copies, and the rows of the images that they are shown with.

    Args:
        part: "": samples for training captions, with the training image that explains each. "-new": for captions of held-out images, with
            the real image of the caption.
    """
    try:
        sheet = Image.open(step / f"samples{part}.png").convert("RGB")
        kept = json.loads((step / "figures.json").read_text(encoding="utf-8"))
        copies, originals = (kept["new"]["copies"], kept["new"]["own"]) if part else (kept["copies"], kept["originals"])
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise UserError(f"the samples in {step} cannot be shown", rule=one_line(f"{type(error).__name__}: {error}", 160),
                        remedy="remove the folder; the step is then measured again") from None  # fmt: skip
    return cut_sheet(sheet, len(copies), resolution, COLUMNS), copies, originals


def sample_page(
    steps: Sequence[tuple[str, Path]], real: ImageDataset, resolution: int, *, shown: int = 12, part: str = ""
) -> Image.Image:
    """Lay out `shown` samples of each step in one row, and under each the real image that `samples_of` names.

    The samples are a draw that does not depend on what they look like, and for the same number of samples the same for every run.

    Args:
        steps: (label, folder of a measured step), from top to bottom.
        real: the training images; with part "-new" the held-out ones.
        resolution: pixels of a sample's side.
        part: which samples.
    """
    if not part:
        real.fingerprint()  # fills in the keys that tell equal images
        real = real.subset(real.one_of_each())
    below = "below: the real\nimage of the\ncaption;" if part else "below: its\ntraining image;"
    width, row = _LABEL + shown * (resolution + _GAP), 2 * resolution + 3 * _GAP
    sheet = Image.new("RGB", (width, len(steps) * row + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for r, (label, step) in enumerate(steps):
        images, copies, originals = samples_of(step, resolution, part)
        chosen = drawn(len(images), min(shown, len(images)), 0, "sample page")
        top = _GAP + r * row
        number = int(step.name.removeprefix("step-"))
        text = f"{label}\nstep {number}\n\n{below}\nframed: copies"
        for line, words in enumerate(text.splitlines()):
            pen.text((_GAP, top + 12 * line), words, fill="black", font=font)
        for column, i in enumerate(chosen):
            x = _LABEL + column * (resolution + _GAP)
            if copies[i]:
                pen.rectangle((x - 2, top - 2, x + resolution + 1, top + 2 * resolution + 1), fill=_FRAME)
            sheet.paste(images[i], (x, top))
            original = (
                real.images[originals[i]].convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS)
            )
            sheet.paste(original, (x, top + resolution))
    return sheet
