"""The onset of memorization while a run trains: pictures drawn for a fixed probe of captions, held against the training set.

    copied       share of the probe's pictures with d1 / d2 < 1/3          distances in pixels, at most 64 x 64
    recoloured   the same by contours alone: copies in other colours       `ambient_sd.audit.features.Edges`

d1, d2 are the distances to the nearest and second nearest training picture (Yoon et al. 2023; `ambient_sd.audit`). Captions
of the training set are the prompts for which copies come first. The probe is small: it shows when copying begins, and an audit
says how much there is. It is the one place where training looks through guard and audit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from ambient_sd.audit.features import Edges, Pixels
from ambient_sd.audit.metrics import memorized, wilson
from ambient_sd.audit.neighbours import nearest
from ambient_sd.data.sources import PictureSet
from ambient_sd.files import write_whole
from ambient_sd.training import validation

# Guidance of 7.5 drives the colours of a fine-tuned model away from the originals and hides copies from a distance in pixels.
GUIDANCE_SCALE = 2.0
MAX_SEARCHED = 4096  # 12,288 numbers a picture: 200 MB
_SIDE, _PER_ROW = 64, 8


@dataclass(frozen=True)
class Probed:
    """Hold one look: the copied share with its 95 % Wilson interval, that in any colour, medians of d1/d2 and of the guard's score, pictures."""

    step: int
    share: float
    low: float
    high: float
    recoloured: float
    median_ratio: float
    score: float
    n: int
    sheet: Image.Image

    def record(self) -> dict[str, float]:
        """Return the numbers, for curves and files."""
        return {"step": self.step, "copied": self.share, "copied_low": self.low, "copied_high": self.high,
                "recoloured": self.recoloured, "ratio": self.median_ratio, "guard_score": self.score, "n": self.n}  # fmt: skip


class Probe:
    """Look at a model in training through a fixed set of its own captions.

    Args:
        pictures: the training set, checked (its keys tell copies apart).
        count: how many captions are probed, one picture each; drawn by `seed`, the same at every look.
        resolution: side of the pictures, pixels.
        seed: seed of captions and start noise.
    """

    def __init__(self, pictures: PictureSet, *, count: int, resolution: int, seed: int) -> None:
        self.resolution, self.seed = resolution, seed
        draw = random.Random(seed)
        captioned = [i for i, caption in enumerate(pictures.captions) if caption.strip()] or list(range(len(pictures)))
        chosen = sorted(draw.sample(captioned, min(count, len(captioned))))
        self.captions = [pictures.captions[i] for i in chosen]
        others = sorted(set(range(len(pictures))) - set(chosen))
        room = max(0, MAX_SEARCHED - len(chosen))
        searched = chosen + (others if len(others) <= room else sorted(draw.sample(others, room)))
        searched = pictures.one_of_each(searched)
        self.features = Pixels(_SIDE)
        self.originals = [_centre(pictures[i].image) for i in searched]
        self.edges = Edges()
        self.real, self.contours = self.features(self.originals), self.edges(self.originals)

    def look(self, pipe: Any, accelerator: Accelerator, step: int) -> Probed:
        """Draw the probe's pictures and measure them; to be called by every process."""
        drawn = validation.draw(
            pipe, self.captions, 1, resolution=self.resolution, seed=self.seed, accelerator=accelerator,
            guidance_scale=GUIDANCE_SCALE,
        )  # fmt: skip
        return self.measure([row[0] for row in drawn.rows], [row[0] for row in drawn.scores], step)

    def measure(self, images: Sequence[Image.Image], scores: Sequence[float], step: int) -> Probed:
        """Measure given pictures."""
        found = nearest(self.features(images), self.real)
        share, recoloured = (
            float(memorized(near).double().mean()) for near in (found, nearest(self.edges(images), self.contours))
        )
        low, high = wilson(share, len(images))
        originals = [self.originals[i].resize(images[0].size) for i in found.index[:, 0].tolist()]
        # A row of drawn pictures, below it a row of their nearest training pictures.
        rows = [part[i : i + _PER_ROW] for i in range(0, len(images), _PER_ROW) for part in (list(images), originals)]
        return Probed(
            step, share, low, high, recoloured, float(found.ratio.median()), float(torch.tensor(scores).median()), len(images),
            validation.grid(rows),
        )  # fmt: skip


def add_look(path: Path, record: Mapping[str, float]) -> None:
    """Add a look to a file of JSON lines; later ones, which a resumed run repeats, go."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < record["step"]]
    write_whole(path, "".join(f"{line}\n" for line in [*kept, json.dumps(dict(record))]))


def _centre(image: Image.Image) -> Image.Image:
    """Return the central square at the probe's size: what is compared with a square picture."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
