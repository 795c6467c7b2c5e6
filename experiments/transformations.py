"""What a changed copy looks like to the audit: detection rate per transformation and feature, with the false alarms beside it.

    detected      a transformed training image counts as a copy AND its nearest training image is its own original (or a duplicate)
    false alarm   a held-out image under the same transformation counts as a copy of anything
    at 1 %        detected, with the feature's threshold moved to where 1 % of the untransformed held-out images lie beyond it

Sizes are shares of the image's side, so that images of 64 and of 512 pixels are changed alike. Randomness (noise) is a
function of seed and position. Not here: what a generative model does to an image; these changes are known, its are not.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from ambient_sd.audit.detection import threshold_at
from ambient_sd.audit.features import MIRROR, Features, embed
from ambient_sd.audit.metrics import copied
from ambient_sd.audit.neighbours import Neighbours
from ambient_sd.audit.originals import originals
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.sheets import as_rgb

Change = Callable[[Image.Image, int], Image.Image]


def _blur(share: float) -> Change:
    return lambda p, _: p.filter(ImageFilter.GaussianBlur(share * p.width))


def _crop(keep: float) -> Change:
    def change(p: Image.Image, _: int) -> Image.Image:
        w, h = round(p.width * keep), round(p.height * keep)
        left, top = (p.width - w) // 2, (p.height - h) // 2
        return p.crop((left, top, left + w, top + h)).resize(p.size, Image.Resampling.BICUBIC)

    return change


def _border(keep: float) -> Change:
    def change(p: Image.Image, _: int) -> Image.Image:
        w, h = round(p.width * keep), round(p.height * keep)
        out = Image.new("RGB", p.size, "white")
        out.paste(p.resize((w, h), Image.Resampling.BICUBIC), ((p.width - w) // 2, (p.height - h) // 2))
        return out

    return change


def _jpeg(quality: int) -> Change:
    def change(p: Image.Image, _: int) -> Image.Image:
        buffer = io.BytesIO()
        p.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return change


def _noise(levels: float) -> Change:
    def change(p: Image.Image, seed: int) -> Image.Image:
        noise = np.random.default_rng(seed).normal(0.0, levels, (p.height, p.width, 3))
        return Image.fromarray(np.clip(np.asarray(p, dtype=np.float64) + noise, 0, 255).round().astype(np.uint8))

    return change


def _hue(degrees: float) -> Change:
    def change(p: Image.Image, _: int) -> Image.Image:
        hsv = np.array(p.convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(int) + round(256 * degrees / 360)) % 256
        return Image.fromarray(hsv, "HSV").convert("RGB")

    return change


def _smaller(factor: int) -> Change:
    def change(p: Image.Image, _: int) -> Image.Image:
        size = (max(1, p.width // factor), max(1, p.height // factor))
        return p.resize(size, Image.Resampling.BICUBIC).resize(p.size, Image.Resampling.BICUBIC)

    return change


TRANSFORMATIONS: dict[str, Change] = {
    "none": lambda p, _: p,
    "JPEG, quality 50": _jpeg(50),
    "JPEG, quality 10": _jpeg(10),
    "half the resolution": _smaller(2),
    "blur, 1/64 of the side": _blur(1 / 64),
    "blur, 1/32 of the side": _blur(1 / 32),
    "noise, 16 of 255": _noise(16),
    "noise, 48 of 255": _noise(48),
    "darker, x 0.7": lambda p, _: ImageEnhance.Brightness(p).enhance(0.7),
    "half the contrast": lambda p, _: ImageEnhance.Contrast(p).enhance(0.5),
    "hue turned by 30 degrees": _hue(30),
    "hue turned by 120 degrees": _hue(120),
    "grey": lambda p, _: p.convert("L").convert("RGB"),
    "middle 90 % cut out": _crop(0.9),
    "middle 75 % cut out": _crop(0.75),
    "set in a border, 80 %": _border(0.8),
    "turned by 5 degrees": lambda p, _: p.rotate(5, Image.Resampling.BICUBIC, fillcolor="white"),
    "mirrored": lambda p, _: ImageOps.mirror(p),
    "mirrored, darker, JPEG 50": lambda p, s: _jpeg(50)(ImageEnhance.Brightness(ImageOps.mirror(p)).enhance(0.7), s),
}


@dataclass(frozen=True)
class Cell:
    """Hold one transformation by one feature: shares in [0, 1], with Wilson's intervals."""

    transformation: str
    feature: str
    mirrored: bool
    detected: Estimate
    false_alarms: Estimate
    at_one_percent: Estimate


def transformed(images: Sequence[Image.Image], change: Change, seed: int) -> list[Image.Image]:
    """Return every image changed; the noise of image i is a function of (seed, i)."""
    return [
        change(as_rgb(p), int(np.random.SeedSequence([seed, i]).generate_state(1)[0])) for i, p in enumerate(images)
    ]


def embed_all(
    images: Sequence[Image.Image],
    features: Sequence[Features],
    *,
    seed: int = 0,
    names: Sequence[str] = tuple(TRANSFORMATIONS),
) -> dict[str, Mapping[str, Tensor]]:
    """Return transformation -> vectors of the changed images and of their mirror images, as `embed` gives them."""
    return {name: embed(transformed(images, TRANSFORMATIONS[name], seed), features, mirrored=True) for name in names}


def detection(
    queries: Mapping[str, Mapping[str, Tensor]],
    rows: Sequence[int],
    heldout: Mapping[str, Mapping[str, Tensor]],
    training: Mapping[str, Tensor],
    features: Sequence[Features],
    *,
    duplicates: Sequence[Hashable],
    mirrored: bool,
) -> list[Cell]:
    """Measure what is detected of transformed training images.

    Args:
        queries: of `embed_all`, of training images. rows: the row of each in the training set.
        heldout: of `embed_all`, of held-out images; "none" must be among the transformations.
        training: name -> `(M, D)`.
        duplicates: label per training row, as in `originals`.
        mirrored: search for mirror images too.
    """
    cells = []
    own = [duplicates[row] for row in rows]
    for feature in features:

        def search(vectors: Mapping[str, Tensor], feature: Features = feature) -> Neighbours:
            views = [vectors[feature.name], *([vectors[feature.name + MIRROR]] if mirrored else [])]
            return originals(views, training[feature.name], distance=feature.distance, duplicates=duplicates)

        plain = search(heldout["none"])
        cut = threshold_at(_score(plain), 0.01)
        for name, vectors in queries.items():
            near, other = search(vectors), search(heldout[name])
            right = torch.tensor([duplicates[i] == o for i, o in zip(near.index[:, 0].tolist(), own, strict=True)])
            cells.append(
                Cell(
                    name, feature.name, mirrored, _share(copied(feature, near) & right),
                    _share(copied(feature, other)),
                    _share((_score(near) >= cut) & right),
                )
            )  # fmt: skip
    return cells


def _score(near: Neighbours) -> Tensor:
    return near.similarity if near.metric == "cosine" else -near.ratio


def _share(marks: Tensor) -> Estimate:
    return Estimate.of_share(int(marks.sum()), len(marks))


def table(cells: Sequence[Cell], of: str = "detected") -> str:
    """Return one figure of all cells as Markdown, a row a transformation, a column a feature; shares in per cent.

    Args:
        of: "detected", "false_alarms" or "at_one_percent".
    """
    columns = list(dict.fromkeys((c.feature, c.mirrored) for c in cells))
    heads = [f"{feature}, mirror searched" if mirrored else feature for feature, mirrored in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    found = {(c.transformation, c.feature, c.mirrored): getattr(c, of) for c in cells}
    for name in dict.fromkeys(c.transformation for c in cells):
        lines.append(f"| {name} | {' | '.join(found[name, *column].show(0, 100) for column in columns)} |")
    return "\n".join(lines)
