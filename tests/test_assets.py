"""The embedded images and the embedded base model: what the documentation says of them is true of the files."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.data.images import content_key
from experiments.build_images import NEAR_DUPLICATE_RMS, near_duplicate_groups


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return pq.read_table(IMAGES).to_pylist()


def test_embedded_files_keep_their_size_limits() -> None:
    assert IMAGES.stat().st_size <= 12e6
    assert sum(p.stat().st_size for p in BASE.rglob("*") if p.is_file()) <= 24e6


def test_every_image_is_64_px_and_its_key_is_its_content(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        assert image.size == (64, 64)
        assert row["key"] == content_key(image)


def test_splits_share_no_concept_and_no_near_duplicate(rows: list[dict[str, Any]]) -> None:
    for column in ("name", "code", "group", "key"):
        sides: dict[Any, set[str]] = defaultdict(set)
        for row in rows:
            sides[row[column]].add(row["split"])
        assert all(len(s) == 1 for s in sides.values()), column


def test_near_duplicates_are_found_where_they_are() -> None:
    """Control: a recoloured-by-a-shade copy is grouped, another image is not."""
    red, other = Image.new("RGB", (64, 64), (200, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 200))
    shade = Image.new("RGB", (64, 64), (200 + int(NEAR_DUPLICATE_RMS), 0, 0))
    items = [{"images": {"3D": p, "flat": p}} for p in (red, other, shade)]
    assert sorted(map(sorted, near_duplicate_groups(items))) == [[0, 2], [1]]


def test_subsets_are_nested_and_have_the_sizes_they_are_named_for(rows: list[dict[str, Any]]) -> None:
    finetune = [row for row in rows if row["split"] == "finetune"]
    assert len(finetune) >= 1000
    assert sum(row["split"] == "heldout" for row in rows) >= 300
    for size in (60, 300, 1000):
        assert sum(row[f"subset_{size}"] for row in rows) == size
    assert all(row["subset_300"] for row in rows if row["subset_60"])
    assert all(row["subset_1000"] for row in rows if row["subset_300"])
    assert all(row["split"] == "finetune" for row in rows if row["subset_1000"])
    small = [row for row in rows if row["subset_300"]]
    assert len({row["group"] for row in small}) == 300, "two images of one concept would hide copies from d1 / d2"


def test_no_skin_tones_and_no_flags(rows: list[dict[str, Any]]) -> None:
    tones = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
    assert not any(tones & set(row["code"].split("-")) for row in rows)
    assert "Flags" not in {row["category"] for row in rows}


def test_stock_pipeline_loads_the_base_and_draws_with_it() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    out = pipe(["red apple", "blue circle"], num_inference_steps=8, generator=torch.manual_seed(0), output_type="np")
    apple, circle = (torch.from_numpy(image).mean((0, 1)) for image in out.images)
    # What the prompt names must be in the image: an untrained model gives grey for both.
    assert apple[0] > apple[2] + 0.05, apple
    assert circle[2] > circle[0] + 0.05, circle


def test_the_base_names_its_classes_and_carries_its_losses() -> None:
    index = json.loads((BASE / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    for name in ("vae.csv", "unet.csv"):
        assert len((BASE / name).read_text().splitlines()) > 50
    assert not list(BASE.rglob("*.bin")) and not list(BASE.rglob("*.pt"))
