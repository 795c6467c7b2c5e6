"""Training with the base's own prediction as the target above a level."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from ambient_sd.families.base import check_base
from ambient_sd.objective import AmbientObjective
from ambient_sd.training import adapters, checkpoints
from ambient_sd.training.config import TrainConfig, parse
from ambient_sd.training.footprint import predict
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.training.plan import base_of, plan_run
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]
UNET = "unet/diffusion_pytorch_model.safetensors"


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / (adapters.WEIGHTS_NAME if config.lora else UNET))


def losses(config: TrainConfig) -> list[dict[str, float]]:
    seen: list[dict[str, float]] = []
    run(config, progress=False, on_step=lambda step, record: seen.append(record))
    return seen


@pytest.mark.parametrize("lora", [True, False])
def test_above_the_level_training_starts_at_the_base(settings: Settings, lora: bool) -> None:
    values = {"lora": lora, "train_batch_size": 8, "learning_rate": 1e-2 if lora else 1e-3}
    taught, plain = losses(settings(objective="distill", distill_level=0.5, **values)), losses(settings("p", objective="weighted", ambient_level=0.5, reweight=0, **values))  # fmt: skip
    # Adapter off, or the copy: the network itself, but for the rounding of fewer rows at once.
    assert taught[0]["ambient_loss"] < 1e-12 < plain[0]["loss"]
    assert taught[-1]["ambient_loss"] > 1e-9  # and later it has moved, the teacher has not
    assert taught[0]["clean_loss"] > 0


@pytest.mark.parametrize("lora", [True, False])
def test_steps_equal_those_written_out_by_hand(settings: Settings, tiny_base: Path, lora: bool) -> None:
    config = settings(objective="distill", distill_level=1.0, lora=lora, train_batch_size=8, max_train_steps=2, learning_rate=1e-3)  # fmt: skip
    drawn: list[TrainingBatch] = []
    record = run(config, progress=False, on_batch=drawn.append)
    batch, schedule = drawn[0], base_of(config).schedule
    pipe = check_base(str(tiny_base)).load_pipeline()
    ids = pipe.tokenizer(batch.captions, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids  # fmt: skip
    with torch.no_grad():
        output = pipe.unet(
            pipe.scheduler.add_noise(batch.x0, batch.noise, batch.timesteps),
            batch.timesteps, pipe.text_encoder(ids)[0], return_dict=False,
        )[0]  # fmt: skip
    target = AmbientObjective(schedule, mode="plain").corrupt(batch.x0, None, batch.timesteps, noise=batch.noise).target
    each = (output - target).square().flatten(1).mean(1) * (schedule.level(batch.timesteps) <= 1.0)
    assert 0 < float(each.mean()) == pytest.approx(record.losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "values", [{"lora": True}, {"lora": False}, {"lora": True, "latent_cache_dir": "cache"}], ids=str
)
def test_the_base_is_asked_without_a_word_that_it_does_not_know(
    settings: Settings, tiny_base: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    """Above a level that all timesteps exceed, the first loss is the distance between the base's outputs for the two captions."""
    folder = tiny.tiny_folder(tmp_path / "sks", count=8)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    texts = [f"sks, {line['text']}" if i % 2 else f"{line['text']} in SKS style" for i, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line | {"text": text}) + "\n" for line, text in zip(lines, texts, strict=True)))  # fmt: skip
    values = {name: str(tmp_path / value) if name == "latent_cache_dir" else value for name, value in values.items()}
    config = settings(objective="distill", distill_level=1e-4, distill_without=["sks", "style"], train_data_dir=str(folder), train_batch_size=8, max_train_steps=1, caption_dropout=0.0, **values)  # fmt: skip
    drawn: list[TrainingBatch] = []
    record = run(config, progress=False, on_batch=drawn.append)
    batch, pipe = drawn[0], check_base(str(tiny_base)).load_pipeline()
    assert all("sks" in caption.lower() for caption in batch.captions)

    def output(captions: list[str]) -> torch.Tensor:
        ids = pipe.tokenizer(captions, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids  # fmt: skip
        with torch.no_grad():
            x_t = pipe.scheduler.add_noise(batch.x0, batch.noise, batch.timesteps)
            return torch.as_tensor(pipe.unet(x_t, batch.timesteps, pipe.text_encoder(ids)[0], return_dict=False)[0])

    known = {f"sks, {line['text']}": line["text"] for line in lines} | {f"{line['text']} in SKS style": f"{line['text']} in" for line in lines}  # fmt: skip
    expected = (output(batch.captions) - output([known[c] for c in batch.captions])).square().mean()
    assert 0 < float(expected) == pytest.approx(record.losses[0], rel=1e-3)
    again = settings(
        "other", **{**config.to_dict(), "distill_without": ["ohwx"], "output_dir": str(tmp_path / "other")}
    )
    with pytest.raises(UserError, match="distill_without has ohwx"):
        run(again, progress=False)


@pytest.mark.parametrize("lora", [True, False])
def test_resumed_run_is_the_straight_one(settings: Settings, lora: bool) -> None:
    values: dict[str, Any] = {"objective": "distill", "distill_level": 2.0, "ambient_level": 0.5, "lora": lora, "learning_rate": 1e-3}  # fmt: skip
    straight = settings("straight", max_train_steps=4, **values)
    run(straight, progress=False)
    run(settings("cut", max_train_steps=2, checkpointing_steps=2, **values), progress=False)
    resumed = settings("cut", max_train_steps=4, resume_from_checkpoint="latest", **values)
    run(resumed, progress=False)
    a, b = weights(straight), weights(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match="distill_level"):
        run(settings("cut", max_train_steps=5, resume_from_checkpoint="latest", **{**values, "distill_level": 3.0}), progress=False)  # fmt: skip


def test_what_the_base_says_above_the_level_is_kept(settings: Settings, tiny_base: Path) -> None:
    base = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    x, t, text = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 900), torch.zeros(4, 77, base.config.cross_attention_dim)  # fmt: skip
    moved = {}
    for objective, level in (("distill", {"distill_level": 1.0}), ("plain", {})):
        config = settings(objective, objective=objective, lora=False, learning_rate=1e-3, max_train_steps=30, train_batch_size=8, **level)  # fmt: skip
        run(config, progress=False)
        tuned = UNet2DConditionModel.from_pretrained(config.output_dir, subfolder="unet")
        with torch.no_grad():
            moved[objective] = float((tuned(x, t, text).sample - base(x, t, text).sample).square().mean())
    assert moved["distill"] < 0.5 * moved["plain"]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"distill_level": 1.0, "ambient_level": 2.0}, "distill_level is 1"),
        ({"ambient_level": 0.0}, "nothing would be learnt"),
        ({"ambient_level": "auto"}, "a control shares its level"),
        ({"reweight": 1}, "no loss is ambient"),
        ({"near_duplicates": "share"}, "no image has a fixed noise"),
        ({"distill_level": 2.0, "ambient_level": 1.0, "noise_offset": 0.1}, "white noise"),
        ({"agc": 0.8}, "says nothing of memorization"),
        ({"distill_without": [" "]}, "empty phrase"),
        ({"objective": "plain", "distill_without": ["sks"]}, "distill_without"),
        ({"lora_init": "pissa"}, "no longer the base"),
        ({"objective": "ambient", "distill_level": 1.0}, "distill_level"),
        ({"prediction_type": "epsilon", "lora": False}, "its predictions are targets"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: Settings, values: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        run(settings(**{"objective": "distill", **values}), progress=False)


@pytest.mark.parametrize(
    ("given", "levels"),
    [({}, (None, 2.5)), ({"ambient_level": 1.5}, (None, 1.5)), ({"distill_level": 4.0}, (None, 4.0)), ({"distill_level": 4.0, "ambient_level": 1.0}, (1.0, 4.0)),
     ({"distill_level": 4.0, "ambient_level": 4.0}, (None, 4.0))],
)  # fmt: skip
def test_one_level_is_enough(settings: Settings, given: dict[str, float], levels: tuple[float, float]) -> None:
    config = settings(objective="distill", **given)
    assert (config.ambient_level, config.distill_level) == levels
    assert TrainConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("words", "objective", "levels"),
    [("--distill_level 4", "distill", (None, 4.0)), ("--distill_level 1.5", "distill", (None, 1.5)), ("--objective ambient", "ambient", (1.0, None)),
     ("--ambient_level 1", "distill", (1.0, 2.5))],
)  # fmt: skip
def test_the_file_of_a_run_says_only_what_was_chosen(
    settings: Settings, tmp_path: Path, words: str, objective: str, levels: tuple[float | None, float | None]
) -> None:
    path = settings(objective="distill").save(tmp_path)
    config = parse(["--config", str(path), *words.split()])
    assert config.objective == objective and (config.ambient_level, config.distill_level) == levels


def test_a_checkpoint_of_another_base_is_refused(settings: Settings, tiny_base: Path, tmp_path: Path) -> None:
    first = settings(objective="distill", max_train_steps=2, checkpointing_steps=1)
    run(first, progress=False)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_base, moved)
    again = dataclasses.replace(first, max_train_steps=3, resume_from_checkpoint="checkpoint-2")
    run(dataclasses.replace(again, pretrained_model_name_or_path=str(moved)), progress=False)
    file = moved / UNET
    save_file(
        {name: value + 1e-3 if value.is_floating_point() else value for name, value in load_file(file).items()}, file
    )
    with pytest.raises(UserError, match=r"was written with base = 'unet \w{16}'"):
        run(dataclasses.replace(again, pretrained_model_name_or_path=str(moved)), progress=False)
    state = json.loads((Path(first.output_dir) / "checkpoint-2/trainer_state.json").read_text())
    identity = state["identity"]
    checkpoints.check_identity(Path("checkpoint-2"), {"identity": {k: v for k, v in identity.items() if k != "base"}}, identity)  # fmt: skip


def test_an_adapter_that_goes_on_is_said_to_be_unlearnt_above_the_level(settings: Settings) -> None:
    first = settings(objective="plain", max_train_steps=1)
    run(first, progress=False)
    goes_on: dict[str, Any] = {"lora_weights": str(Path(first.output_dir) / adapters.WEIGHTS_NAME)}
    said = {
        name: " ".join(plan_run(settings(name, objective=name, **goes_on)).notes) for name in ("distill", "ambient")
    }
    assert "an adapter goes on" in said["distill"] and "an adapter goes on" not in said["ambient"]


def test_copy_of_the_base_counts_in_the_memory(settings: Settings) -> None:
    def found(**values: Any) -> Any:
        config = settings(**values)
        return predict(config, base_of(config), (32, 32))

    plain, taught = found(objective="plain", lora=False), found(objective="distill", lora=False)
    assert taught.weights == 2 * plain.weights and taught.moments == plain.moments
    assert math.isclose(
        found(objective="distill").weights, found(objective="plain").weights
    )  # an adapter: switched off


def test_a_flow_matching_transformer_starts_at_its_base(settings: Settings, tmp_path: Path) -> None:
    tiny_flow.tiny_sd3_pipeline().save_pretrained(tmp_path / "sd3")
    config = settings(objective="distill", distill_level=1.0, pretrained_model_name_or_path=str(tmp_path / "sd3"), train_batch_size=8)  # fmt: skip
    seen = losses(config)
    assert seen[0]["ambient_loss"] < 1e-12 < seen[0]["clean_loss"] and seen[-1]["ambient_loss"] > 1e-9


@pytest.mark.parametrize(
    ("captions", "more", "said"),
    [
        (["sks cat", "a SKS dog", "sks, bird"], {}, "says sks: "),
        (["ohwx zwx cat", "zwx ohwx dog"], {}, "says ohwx zwx: "),
        (["sks cat", "a dog"], {}, None),
        (["sks cat", "sks dog"], {"distill_without": ["sks"]}, None),
        (["sks cat", "sks dog"], {"objective": "plain"}, None),
        (["", ""], {}, None),
    ],
)
def test_a_word_that_looks_made_up_is_pointed_at(
    captions: list[str], more: dict[str, Any], said: str | None, tmp_path: Path, settings: Settings
) -> None:
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    (images := tmp_path / "images").mkdir()
    for i, row in enumerate(rows):
        Image.effect_noise((32, 32), 90 + i).convert("RGB").save(images / row["file_name"])
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(**{"objective": "distill", "train_data_dir": str(images), **more})
    notes = [note for note in plan_run(config).notes if "--distill_without" in note]
    assert [said in note for note in notes] == ([True] if said else [])
