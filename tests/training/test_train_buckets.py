"""Training on buckets: images keep their shape, near-duplicates share one, held, cached and encoded give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from ambient_sd.training import plan_run
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.utils.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
SIZES = {"000.png": (96, 48), "001.png": (96, 48), "002.png": (48, 80), "003.png": (49, 81), "004.png": (48, 48)}
Settings = Callable[..., TrainConfig]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tiny.tiny_folder(tmp_path / "images", count=8)
    for name, size in SIZES.items():
        with Image.open(folder / name) as image:
            image.resize(size).save(folder / name)
    return folder


@pytest.fixture
def settings(tiny_base: Path, images: Path, tmp_path: Path) -> Settings:
    def make(name: str, **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(images), "resolution": 32,
            "train_batch_size": 2, "max_train_steps": 6, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-3, "aspect_ratio_buckets": "auto",
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


def trained(config: TrainConfig, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = run(config, progress=False, **options).losses
    return losses, load_file(Path(config.output_dir) / UNET)


def same(a: tuple[list[float], dict[str, torch.Tensor]], b: tuple[list[float], dict[str, torch.Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def test_every_batch_has_one_shape_and_every_shape_is_met(settings: Settings) -> None:
    shapes, seen = set(), set()

    def watch(batch: TrainingBatch) -> None:
        assert batch.eps_n is not None
        assert batch.x0.shape == batch.eps_n.shape == batch.noise.shape
        shapes.add(tuple(batch.x0.shape[2:]))
        seen.update(batch.keys)

    run(settings("out", max_train_steps=16), progress=False, on_batch=watch)
    # The tiny base halves three times in all: sides are multiples of 4; 1:2, about 3:5 and 1:1 at 32 x 32.
    assert len(shapes) == 3
    assert (16, 16) in shapes
    assert all(h * w <= 16 * 16 for h, w in shapes)
    assert len(seen) == 8


@pytest.mark.parametrize("objective", ["ambient", "plain"])
def test_held_cached_and_encoded_latents_give_the_same_bits(
    settings: Settings, objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"objective": objective, "center_crop": True, "random_flip": objective == "ambient"}
    held = trained(settings("held", **values))
    assert same(held, trained(settings("cached", latent_cache_dir=str(tmp_path / "cache"), **values)))
    assert same(held, trained(settings("again", latent_cache_dir=str(tmp_path / "cache"), **values)))
    from ambient_sd.data import latents

    monkeypatch.setattr(latents, "MAX_HELD_BYTES", 1)
    assert same(held, trained(settings("encoded", **values)))


def test_a_resumed_run_on_buckets_equals_the_straight_one(settings: Settings) -> None:
    straight = trained(settings("straight", checkpointing_steps=3))
    config = settings("resumed", checkpointing_steps=3)
    trained(config)
    config.resume_from_checkpoint = str(Path(config.output_dir) / "checkpoint-3")
    assert same(straight, trained(config))
    with pytest.raises(UserError, match="aspect_ratio_buckets"):
        run(
            settings("resumed", aspect_ratio_buckets=None, checkpointing_steps=3, resume_from_checkpoint="latest"),
            progress=False,
        )


def test_near_duplicates_of_other_shapes_share_bucket_and_noise(settings: Settings, images: Path) -> None:
    # One image at two sizes: 1.0638 : 1 and, rounded, 1.0606 : 1; the border of the buckets lies at 1.0607.
    original = Image.effect_mandelbrot((100, 94), (-2, -1, 1, 1), 20).convert("RGB")
    original.save(images / "004.png")
    original.resize((35, 33), Image.Resampling.LANCZOS).save(images / "005.png")
    values = {"aspect_ratio_buckets": "32,32;32,36"}
    plan = plan_run(settings("plan", **values))
    keys = plan.images.noise_keys
    assert plan.buckets is not None
    assert keys[4] == keys[5], "they are one group"
    assert plan.buckets[keys[5]] == (36, 32)
    alone = plan_run(settings("alone", near_duplicates="off", **values))
    assert alone.buckets is not None
    assert alone.buckets[alone.images.noise_keys[5]] == (32, 32), "the control: alone it has another shape"


def test_sdxl_is_told_the_sizes_of_the_bucket(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "xl"
    tiny.tiny_sdxl_pipeline().save_pretrained(folder)
    told: set[tuple[tuple[int, int], tuple[float, float]]] = set()

    def watch(batch: TrainingBatch) -> None:
        assert batch.time_ids is not None
        told.update((tuple(batch.x0.shape[2:]), tuple(row[4:])) for row in batch.time_ids.tolist())  # type: ignore[misc]

    run(settings("out", pretrained_model_name_or_path=str(folder), max_train_steps=8), progress=False, on_batch=watch)
    assert len(told) > 1
    assert len({size[0] / shape[0] for shape, size in told}) == 1, "height and width of the target, pixels per latent"


def test_mistakes_end_before_any_model_loads(settings: Settings) -> None:
    with pytest.raises(UserError, match="multiples of 4"):
        plan_run(settings("a", aspect_ratio_buckets="33,32"))
    with pytest.raises(UserError, match="height,width pairs"):
        plan_run(settings("a", aspect_ratio_buckets="wide"))
