"""Images at 64 pixels that differ as different drawings do, and what a copy of one can look like."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

SIZE = 64


def scene(seed: int) -> Image.Image:
    """A soft ground with six discs and boxes: no two seeds share a shape."""
    rng = np.random.default_rng([7, seed])
    ground = rng.integers(40, 216, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, rx, ry = (float(v) * SIZE for v in rng.uniform([0.15, 0.15, 0.06, 0.06], [0.85, 0.85, 0.22, 0.22]))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
        shape((x - rx, y - ry, x + rx, y + ry), fill=(red, green, blue))
    return image


def scenes(first: int, count: int) -> list[Image.Image]:
    return [scene(first + i) for i in range(count)]


def blurred(image: Image.Image, radius: float = 1.0) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _jpeg(image: Image.Image) -> Image.Image:
    held = io.BytesIO()
    image.save(held, "JPEG", quality=25)
    return Image.open(held).convert("RGB")


def _noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 16, (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _hue(image: Image.Image) -> Image.Image:
    hue, strength, value = image.convert("HSV").split()
    return Image.merge("HSV", [hue.point(lambda v: (v + 85) % 256), strength, value]).convert("RGB")


def _cropped(image: Image.Image) -> Image.Image:
    """The middle 80 % of its width and height."""
    edge = round(0.1 * SIZE)
    return image.crop((edge, edge, SIZE - edge, SIZE - edge)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _bordered(image: Image.Image) -> Image.Image:
    """At 85 % of its width and height on white."""
    side = round(0.85 * SIZE)
    out = Image.new("RGB", (SIZE, SIZE), "white")
    out.paste(image.resize((side, side), Image.Resampling.LANCZOS), ((SIZE - side) // 2,) * 2)
    return out


def _shifted(image: Image.Image) -> Image.Image:
    """By 6 % to the left and 3 % up; what comes in is the edge drawn out."""
    left, up = round(0.06 * SIZE), round(0.03 * SIZE)
    return Image.fromarray(np.pad(np.asarray(image)[up:, left:], ((0, up), (0, left), (0, 0)), mode="edge"))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "blurred": blurred, "JPEG": _jpeg, "noisy": _noisy, "another hue": _hue, "grey": lambda i: i.convert("L").convert("RGB"),
    "darker": lambda i: i.point(lambda v: round(v * 0.6)), "mirrored": ImageOps.mirror, "cropped": _cropped, "bordered": _bordered,
    "turned": lambda i: i.rotate(5, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)), "shifted": _shifted,
}  # fmt: skip


def series() -> ModuleType:
    """Return `benchmarks/series.py`: drawings that come in series and differ in a detail."""
    path = Path(__file__).parents[1] / "benchmarks" / "series.py"
    spec = importlib.util.spec_from_file_location("series", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
