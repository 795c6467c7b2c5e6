"""Training from the cache: the same bits as without, nothing encoded twice, nothing stale, damage named and mended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launching import launch_words
from PIL import Image
from safetensors.torch import load_file

from ambient_sd.data import latents
from ambient_sd.families.encoders import CaptionEncoder
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run

ROOT = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
Settings = Callable[..., TrainConfig]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of which two are wider than high, so that crops matter."""
    folder = tiny.tiny_folder(tmp_path / "images", count=6)
    for name in ("001.png", "002.png"):
        with Image.open(folder / name) as image:
            image.resize((80, 48)).save(folder / name)
    return folder


@pytest.fixture
def settings(tiny_base: Path, images: Path, tmp_path: Path) -> Settings:
    def make(name: str, **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(images), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 3, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-3, "latent_cache_dir": str(tmp_path / "cache"),
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Everything that the VAE or the text encoder is asked for."""
    seen: list[str] = []
    encode, embed = latents.encode, CaptionEncoder.encode

    def counted(vae: Any, samples: Any, **options: Any) -> torch.Tensor:
        seen.extend(s.draw_key for s in samples)
        return encode(vae, samples, **options)

    def counted_captions(self: Any, caption: str) -> dict[str, torch.Tensor]:
        seen.append(f"caption {caption}")
        return embed(self, caption)

    monkeypatch.setattr(latents, "encode", counted)
    monkeypatch.setattr(CaptionEncoder, "encode", counted_captions)
    yield seen


def trained(config: TrainConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = run(config, progress=False).losses
    return losses, load_file(Path(config.output_dir) / UNET)


def same(a: tuple[list[float], dict[str, torch.Tensor]], b: tuple[list[float], dict[str, torch.Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


@pytest.mark.parametrize(
    ("views", "per_image"),
    [
        pytest.param({"objective": "ambient"}, 1, marks=pytest.mark.slow),
        ({"objective": "ambient", "random_flip": True}, 1),
        pytest.param({"objective": "plain", "center_crop": True}, 1, marks=pytest.mark.slow),
        ({"objective": "plain", "center_crop": True, "random_flip": True, "max_train_steps": 6}, 2),
    ],
    ids=["ambient", "ambient-flip", "plain", "plain-flip"],
)
def test_a_run_from_the_cache_has_the_bits_of_one_without(
    settings: Settings, encoded: list[str], views: dict[str, Any], per_image: int
) -> None:
    bare = trained(settings("bare", latent_cache_dir=None, **views))
    encoded.clear()
    first = trained(settings("first", **views))
    assert same(bare, first)
    drawn = [text for text in encoded if not text.startswith("caption")]
    assert len(drawn) == len(set(drawn)) == 6 * per_image
    assert len(encoded) == 6 * per_image + 7, "six captions and the empty one"
    encoded.clear()
    assert same(bare, trained(settings("second", **views)))
    assert encoded == []
    assert same(bare, trained(settings("workers", dataloader_num_workers=2, **views)))


def test_sdxl_from_the_cache_has_the_bits_of_sdxl_without(
    settings: Settings, encoded: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "xl"
    tiny.tiny_sdxl_pipeline().save_pretrained(folder)
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder), "caption_dropout": 0.3, "max_train_steps": 2, "random_flip": True
    }  # fmt: skip
    bare = trained(settings("bare", latent_cache_dir=None, **values))
    assert same(bare, trained(settings("first", **values)))
    encoded.clear()
    assert same(bare, trained(settings("second", **values)))
    assert encoded == []


def test_only_what_is_new_is_computed_and_nothing_is_stale(
    settings: Settings, images: Path, encoded: list[str], tmp_path: Path
) -> None:
    trained(settings("first"))
    with Image.open(images / "003.png") as image:
        image.rotate(90).save(images / "003.png")
    encoded.clear()
    changed = trained(settings("changed"))
    assert len(encoded) == 1, "one image"
    assert same(changed, trained(settings("bare", latent_cache_dir=None)))
    encoded.clear()
    trained(settings("seed", noise_seed=1))
    assert len(encoded) == 6, "other draws, the same captions"
    encoded.clear()
    trained(settings("larger", resolution=48))
    assert len(encoded) == 6
    encoded.clear()
    other = tmp_path / "other-base"
    tiny.tiny_pipeline(seed=1).save_pretrained(other)
    values: dict[str, Any] = {"pretrained_model_name_or_path": str(other)}
    result = trained(settings("other", **values))
    assert len(encoded) == 6 + 7, "other weights: everything"
    assert same(result, trained(settings("other-bare", latent_cache_dir=None, **values)))


def test_a_damaged_shard_is_named_and_computed_again(
    settings: Settings, encoded: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained(settings("first"))
    (shard,) = next(iter((tmp_path / "cache").glob("latents-*"))).glob("*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[-20] ^= 1
    shard.write_bytes(raw)
    (shard.parent / "00.safetensors").write_bytes(b"half")
    encoded.clear()
    with caplog.at_level(logging.WARNING):
        assert same(first, trained(settings("again")))
    named = [record.getMessage() for record in caplog.records if " is damaged" in record.getMessage()]
    assert len(named) == 2
    assert all(any(name in message for message in named) for name in (shard.name, "00.safetensors"))
    assert len(encoded) == 6, "the six latents, no caption"


def test_what_an_interrupted_run_has_written_counts(
    settings: Settings, encoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ambient_sd.training import encode as encoding

    monkeypatch.setattr(encoding, "_MAX_ROWS", 2)
    encode = latents.encode

    def cut(vae: Any, samples: Any, **options: Any) -> torch.Tensor:
        if len(encoded) == 7 + 5:
            raise KeyboardInterrupt
        return encode(vae, samples, **options)

    monkeypatch.setattr(latents, "encode", cut)
    with pytest.raises(KeyboardInterrupt):
        run(settings("cut"), progress=False)
    monkeypatch.setattr(latents, "encode", encode)
    encoded.clear()
    result = trained(settings("again"))
    assert len(encoded) == 2, "two shards of two were whole"
    assert same(result, trained(settings("bare", latent_cache_dir=None)))


def test_vae_and_text_encoder_leave_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from ambient_sd.training import loop

    held: list[bool] = []
    step = loop._Trainer._step

    def look(self: Any, *args: Any) -> Any:
        held.append(self.encoder.image_encoder is not None or bool(self.encoder.caption_encoder.models))
        return step(self, *args)

    monkeypatch.setattr(loop._Trainer, "_step", look)
    run(settings("cached"), progress=False)
    assert not any(held)
    held.clear()
    # The control: a plain run with random crops needs both to the end, and says so of the latents.
    run(settings("crops", objective="plain"), progress=False)
    assert all(held)


def test_the_cache_names_no_path(settings: Settings, tmp_path: Path) -> None:
    run(settings("out"), progress=False)
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes()


def entries(folder: Path) -> dict[bytes, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        shard = load_file(path)
        found |= {bytes(i.tolist()): shard["latent"][row] for row, i in enumerate(shard["entry_ids"])}
    return found


@pytest.mark.slow
def test_two_processes_share_out_the_work_and_write_the_bits_of_one(settings: Settings, tmp_path: Path) -> None:
    values = {"max_train_steps": 1, "train_batch_size": 2}
    run(settings("alone", **values), progress=False)
    config = settings("two", latent_cache_dir=str(tmp_path / "shared"), **values)
    names = ("pretrained_model_name_or_path", "train_data_dir", "resolution", "train_batch_size", "max_train_steps", "report_to",
             "output_dir", "latent_cache_dir")  # fmt: skip
    words = [str(ROOT / "train_text_to_image_ambient.py"), *(f"--{n}={getattr(config, n)}" for n in names)]
    done = launch_words(2, words)
    assert done.returncode == 0, done.stderr[-3000:]
    (mine,), (shared,) = ((tmp_path / name).glob("latents-*") for name in ("cache", "shared"))
    assert mine.name == shared.name
    assert len(list(shared.glob("*.safetensors"))) == 2, "each process wrote its share"
    alone, two = entries(mine), entries(shared)
    assert len(alone) == 6
    assert alone.keys() == two.keys()
    assert all(torch.equal(alone[i], two[i]) for i in alone)
