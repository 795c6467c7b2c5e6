"""Drawings that come in series and differ little: what an artist's set looks like, and what d1/d2 cannot tell apart.

    python benchmarks/series.py --out build/series                 # 24 series, 12 training and 12 held-out drawings of each

A series is one subject in one palette on one ground; its drawings differ in a detail or two: the hands of a clock, a mouth, an arm, which
windows are lit. Held-out drawings are further members of the same series. Everything is a function of the seed; no two drawings are equal.
Each folder has a `metadata.jsonl` with a caption (the same for the members of a series, as people write them) and the series' number.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_BIG = 512  # drawn at this side, then brought down: smooth outlines


class _Pen:
    """Draw in units of the side, whatever the size of the canvas."""

    def __init__(self, ground: tuple[int, int, int]) -> None:
        self.image = Image.new("RGB", (_BIG, _BIG), ground)
        self._draw = ImageDraw.Draw(self.image)

    def disc(self, x: float, y: float, rx: float, ry: float, fill: Any, line: Any = None) -> None:
        box = [round(_BIG * v) for v in (x - rx, y - ry, x + rx, y + ry)]
        self._draw.ellipse(box, fill=fill, outline=line, width=_BIG // 64)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Any, line: Any = None, turn: float = 0.0) -> None:
        self._draw.rounded_rectangle(
            [round(_BIG * v) for v in (x0, y0, x1, y1)],
            _BIG * turn,
            fill=fill,
            outline=line,
            width=_BIG // 64,
        )

    def shape(self, points: list[tuple[float, float]], fill: Any) -> None:
        self._draw.polygon([(_BIG * x, _BIG * y) for x, y in points], fill=fill)

    def line(self, points: list[tuple[float, float]], fill: Any, width: float) -> None:
        self._draw.line([(_BIG * x, _BIG * y) for x, y in points], fill=fill, width=round(_BIG * width), joint="curve")
        for x, y in points:
            self.disc(x, y, width / 2, width / 2, fill)

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float, fill: Any, width: float) -> None:
        box = [_BIG * v for v in (x - rx, y - ry, x + rx, y + ry)]
        self._draw.arc(box, start, end, fill=fill, width=round(_BIG * width))


def _colour(hue: float, light: float, strength: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hls_to_rgb(hue % 1, light, strength)
    return round(255 * r), round(255 * g), round(255 * b)


def _around(x: float, y: float, length: float, angle: float) -> tuple[float, float]:
    return x + length * math.cos(angle), y + length * math.sin(angle)


def _face(series: np.random.Generator, member: np.random.Generator, hue: float, pen: _Pen) -> None:
    size, wide = series.uniform(0.3, 0.38), series.uniform(0.09, 0.14)
    skin, dark = _colour(hue, 0.68, 0.8), _colour(hue, 0.18, 0.5)
    if series.random() < 0.5:
        for side in (-1, 1):
            pen.disc(0.5 + side * size * 0.8, 0.5 - size * 0.8, 0.1, 0.1, _colour(hue, 0.5, 0.7))
    pen.disc(0.5, 0.52, size, size * series.uniform(0.9, 1.0), skin, dark)
    look, eyes = member.uniform(-0.03, 0.03), member.integers(3)
    for side in (-1, 1):
        x = 0.5 + side * wide
        if eyes == 0:
            pen.disc(x, 0.45, 0.05, 0.06, "white", dark)
            pen.disc(x + look, 0.46, 0.025, 0.03, dark)
        elif eyes == 1:
            pen.arc(x, 0.46, 0.05, 0.05, 180, 360, dark, 0.02)
        else:
            pen.disc(x + look / 2, 0.46, 0.03, 0.045, dark)
        tilt = member.uniform(-0.04, 0.04)
        pen.line([(x - 0.05, 0.36 - tilt * side), (x + 0.05, 0.36 + tilt * side)], dark, 0.02)
    mouth, width, y = member.integers(3), member.uniform(0.07, 0.16), 0.64 + member.uniform(-0.02, 0.02)
    if mouth == 0:
        pen.arc(0.5, y - 0.04, width, 0.09, 20, 160, dark, 0.025)
    elif mouth == 1:
        pen.disc(0.5, y, width / 2, member.uniform(0.03, 0.08), dark)
    else:
        pen.arc(0.5, y + 0.06, width, 0.08, 200, 340, dark, 0.025)


def _clock(series: np.random.Generator, member: np.random.Generator, hue: float, pen: _Pen) -> None:
    size = series.uniform(0.32, 0.4)
    pen.disc(0.5, 0.5, size, size, _colour(hue, 0.45, 0.7))
    pen.disc(0.5, 0.5, size * 0.85, size * 0.85, "white")
    dark = _colour(hue, 0.2, 0.4)
    for hour in range(0, 12, int(series.choice([1, 3]))):
        pen.line([_around(0.5, 0.5, size * r, hour * math.pi / 6) for r in (0.68, 0.78)], dark, 0.018)
    minute, hour = member.uniform(0, 1), member.uniform(0, 1)
    pen.line([(0.5, 0.5), _around(0.5, 0.5, size * 0.45, 2 * math.pi * hour)], dark, 0.04)
    pen.line([(0.5, 0.5), _around(0.5, 0.5, size * 0.65, 2 * math.pi * minute)], dark, 0.025)


def _house(series: np.random.Generator, member: np.random.Generator, hue: float, pen: _Pen) -> None:
    left, top, floors = series.uniform(0.15, 0.25), series.uniform(0.3, 0.42), int(series.integers(2, 4))
    right = 1 - left
    pen.box(0, 0.82, 1, 1, _colour(hue + 0.3, 0.4, 0.4))
    pen.box(left, top, right, 0.85, _colour(hue, 0.7, 0.5))
    pen.shape([(left - 0.06, top), (0.5, top - 0.2), (right + 0.06, top)], _colour(hue + 0.5, 0.4, 0.6))
    columns = int(series.integers(2, 4))
    for row in range(floors):
        for column in range(columns):
            x = left + (right - left) * (column + 0.5) / columns
            y = top + (0.8 - top) * (row + 0.4) / floors
            lit = member.random() < 0.5
            pen.box(x - 0.055, y - 0.06, x + 0.055, y + 0.06, "#ffe98a" if lit else "#34405c")
            pen.box(x - 0.055, y - 0.06, x + 0.055, y - 0.06 + member.uniform(0.0, 0.1), "#b05a5a")  # a blind
    if member.random() < 0.5:
        x = right - 0.12
        for i in range(3):
            pen.disc(x + 0.03 * i, top - 0.17 - 0.05 * i, 0.03 + 0.01 * i, 0.025, "#e8e8e8")


def _robot(series: np.random.Generator, member: np.random.Generator, hue: float, pen: _Pen) -> None:
    body, trim = _colour(hue, 0.55, 0.4), _colour(hue + 0.45, 0.45, 0.7)
    wide = series.uniform(0.15, 0.2)
    for side in (-1, 1):
        angle = math.pi / 2 - side * member.uniform(-0.3, 2.6)
        elbow = _around(0.5 + side * wide, 0.55, 0.13, angle)
        hand = _around(*elbow, 0.12, angle - side * member.uniform(-0.8, 0.8))
        pen.line([(0.5 + side * wide, 0.55), elbow, hand], trim, 0.05)
        pen.box(0.5 + side * 0.1 - 0.04, 0.78, 0.5 + side * 0.1 + 0.04, 0.93, trim)
    pen.box(0.5 - wide, 0.48, 0.5 + wide, 0.8, body, None, 0.04)
    pen.box(0.36, 0.2, 0.64, 0.45, body, None, 0.04)
    pen.line([(0.5, 0.2), (0.5 + member.uniform(-0.08, 0.08), 0.1)], trim, 0.025)
    for side in (-1, 1):
        pen.disc(0.5 + side * 0.07, 0.3, 0.04, 0.04, "white")
        pen.disc(0.5 + side * 0.07 + member.uniform(-0.015, 0.015), 0.3, 0.02, 0.02, "black")
    pen.box(0.43, 0.37, 0.57, 0.37 + member.uniform(0.02, 0.06), trim)
    for i in range(3):
        pen.disc(0.5 - 0.08 + 0.08 * i, 0.64, 0.025, 0.025, "#ff5050" if member.random() < 0.5 else "#404040")


def _plant(series: np.random.Generator, member: np.random.Generator, hue: float, pen: _Pen) -> None:
    pot, top = series.uniform(0.14, 0.2), series.uniform(0.62, 0.7)
    leaf = _colour(0.33 + series.uniform(-0.08, 0.08), 0.38, 0.6)
    for _ in range(int(member.integers(3, 6))):
        angle = -math.pi / 2 + member.uniform(-1.1, 1.1)
        end = _around(0.5, top, member.uniform(0.28, 0.45), angle)
        pen.line([(0.5, top), end], leaf, 0.025)
        if member.random() < 0.6:
            pen.disc(*end, 0.07, 0.07, _colour(hue + 0.5, 0.6, 0.9))
            pen.disc(*end, 0.025, 0.025, "#fff3b0")
        else:
            pen.disc(*end, 0.06, 0.04, leaf)
    pen.shape(
        [(0.5 - pot, top), (0.5 + pot, top), (0.5 + pot * 0.75, 0.92), (0.5 - pot * 0.75, 0.92)],
        _colour(hue, 0.45, 0.6),
    )


def _boat(series: np.random.Generator, member: np.random.Generator, hue: float, pen: _Pen) -> None:
    sea = series.uniform(0.68, 0.76)
    x = 0.5 + member.uniform(-0.06, 0.06)
    pen.box(0, sea, 1, 1, _colour(0.56, 0.5, 0.6))
    pen.disc(series.uniform(0.15, 0.85), 0.18, 0.08, 0.08, "#ffd84d")
    pen.line([(x, 0.2), (x, sea)], "#6b4a2b", 0.025)
    full = member.uniform(0.12, 0.28)
    pen.shape([(x + 0.02, 0.22), (x + 0.02, sea - 0.1), (x + 0.02 + full, sea - 0.1)], "white")
    if member.random() < 0.6:
        pen.shape(
            [(x - 0.02, 0.28), (x - 0.02, sea - 0.1), (x - 0.02 - full * 0.7, sea - 0.1)], _colour(hue + 0.5, 0.6, 0.7)
        )
    pen.shape(
        [(x - 0.26, sea - 0.05), (x + 0.26, sea - 0.05), (x + 0.17, sea + 0.08), (x - 0.17, sea + 0.08)],
        _colour(hue, 0.4, 0.7),
    )
    for i in range(4):
        y = sea + 0.12 + 0.04 * (i % 2)
        pen.arc(0.125 + 0.25 * i + member.uniform(-0.03, 0.03), y, 0.07, 0.03, 180, 360, "white", 0.015)


SUBJECTS: dict[str, Callable[[np.random.Generator, np.random.Generator, float, _Pen], None]] = {
    "smiling face": _face, "round clock": _clock, "little house": _house, "toy robot": _robot, "potted plant": _plant,
    "sailing boat": _boat,
}  # fmt: skip
_HUES = ("red", "orange", "green", "blue", "violet", "pink")


def member(series: int, number: int, seed: int = 0, size: int = 64) -> Image.Image:
    """Draw one member of a series: the series decides subject, palette and proportions, the number the details."""
    own = np.random.default_rng([seed, series])
    hue = (series // len(SUBJECTS)) / len(_HUES) + own.uniform(-0.03, 0.03)
    pen = _Pen(_colour(hue + own.choice([0.0, 0.5]), 0.9, 0.5))
    list(SUBJECTS.values())[series % len(SUBJECTS)](own, np.random.default_rng([seed, series, number]), hue, pen)
    return pen.image.resize((size, size), Image.Resampling.BOX)


def caption(series: int) -> str:
    """Return the caption of a series: its members share it."""
    return f"{_HUES[(series // len(SUBJECTS)) % len(_HUES)]} {list(SUBJECTS)[series % len(SUBJECTS)]}"


def write(folder: Path, series: range, numbers: range, seed: int = 0, size: int = 64) -> None:
    """Write members of series as PNGs with `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for s in series:
        for n in numbers:
            name = f"{s:02d}-{n:02d}.png"
            member(s, n, seed, size).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": caption(s), "series": s}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", type=int, default=24)
    parser.add_argument(
        "--members", type=int, default=12, help="training drawings of each series; as many again are held out"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name, first in (("training", 0), ("heldout", args.members)):
        write(args.out / name, range(args.series), range(first, first + args.members), args.seed, args.size)


if __name__ == "__main__":
    main()
