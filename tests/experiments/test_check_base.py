"""The figures of a base model: which images stand against which, and what counts as a copy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.audit.registry import choose
from ambient_sd.data.sources import load_rows
from experiments.check_base import copied, known_rows, psnr, through_vae


def row(style: str, split: str, code: int, known: bool = True) -> dict[str, Any]:
    return {"style": style, "split": split, "code": f"{style}{code}", "known": known, "text": f"{style} {code}"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [row(s, "train", i) for s in ("3D", "blob") for i in range(12)]
    rows += [row("3D", "measure", 100 + i) for i in range(8)] + [row("blob", "measure", 100 + i) for i in range(3)]
    rows += [row("3D", "measure", 200 + i, known=False) for i in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def test_as_many_seen_as_withheld_images_of_every_style(table: Path) -> None:
    chosen = known_rows(table, ["3D", "blob"], 5)
    for kind, split in {"seen": "train", "unseen": "measure"}.items():
        assert [r["style"] for r in chosen[kind]] == ["3D"] * 5 + ["blob"] * 3
        assert {r["split"] for r in chosen[kind]} == {split}
    assert all(r["known"] for r in chosen["unseen"])
    assert known_rows(table, ["blob"], 5)["seen"] == chosen["seen"][5:], "which rows depends on nothing but their names"


def test_copies_are_found_mirrored_too() -> None:
    images = [r.image for r in load_rows(IMAGES, split="heldout")][:40]
    (feature,) = choose(["pixels"])
    real = feature(images[:20])
    assert copied([ImageOps.mirror(images[3]), images[4]], feature, real, name="x", seed=0)["value"] == 1
    assert copied(images[20:], feature, real, name="x", seed=0)["value"] < 0.2, "control: other images are none"


def test_psnr_is_that_of_a_known_difference() -> None:
    grey, lighter = (Image.new("RGB", (8, 8), (v, v, v)) for v in (100, 151))
    assert psnr([grey, grey], [lighter, grey]).tolist() == pytest.approx([20 * math.log10(255 / 51), 100])


def test_through_the_vae_an_image_is_nearly_itself() -> None:
    image = load_rows(IMAGES, split="base")[0].image
    back = through_vae(BASE, [image])[0]
    difference = [abs(a - b) for a, b in zip(image.convert("L").tobytes(), back.convert("L").tobytes(), strict=True)]
    assert 0 < sum(difference) / len(difference) < 16
