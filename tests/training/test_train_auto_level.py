"""`--ambient_level auto`: one number for the run, its checkpoints, its card and every process, whatever holds the latents."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from launching import launch_words
from safetensors.torch import load_file

from ambient_sd.data import latents as data
from ambient_sd.data.noise_level import measure, representatives
from ambient_sd.data.sources import load_rows
from ambient_sd.data.views import ViewRule
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.training.config import TrainConfig, parse
from ambient_sd.training.loop import run
from ambient_sd.training.plan import base_of
from ambient_sd.utils.errors import UserError

ROOT = Path(__file__).parents[2]
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
Settings = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_folder(tmp_path_factory.mktemp("twelve"), count=12)


@pytest.fixture
def settings(tiny_base: Path, images: Path, tmp_path: Path) -> Settings:
    def make(name: str = "out", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(images), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 2, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-3, "ambient_level": "auto", "center_crop": True,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


def by_hand(config: TrainConfig) -> float:
    """The level from the images and the VAE, without the trainer."""
    base = base_of(config)
    images = load_rows(config.source).check(near_duplicates=True)
    rows, total = representatives(images)
    rule = ViewRule(32, True, False, True, 0)
    x0 = data.encode_all(base.images(), images, rule, rows)
    return measure(x0, total=total, max_level=base.schedule.max_level).proposed


def test_the_level_is_the_measured_one_everywhere_and_equals_giving_it(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ambient_sd")
    config = settings(checkpointing_steps=1)
    expected = by_hand(config)
    assert expected != 1.0, "or the provisional level would pass for it"
    summary = run(config, progress=False)
    write_run_card(summary)
    out = Path(config.output_dir)
    assert summary.level == summary.plan.config.ambient_level == expected
    assert "d1/d2" in summary.plan.level_reason
    assert yaml.safe_load((out / "train_config.yaml").read_text())["ambient_level"] == expected
    state = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["identity"]["ambient_level"] == expected
    assert f"noise level s_n = {expected:.4g}" in (out / "README.md").read_text()
    assert "proposed from the images" in (out / "README.md").read_text()
    assert caplog.text.count(f"s_n = {expected:g} ({summary.plan.level_reason})") == 1
    given = run(settings("given", ambient_level=expected), progress=False)
    assert given.losses == summary.losses
    write_run_card(given)
    assert given.plan.level_reason is None
    assert "proposed" not in (out.with_name("given") / "README.md").read_text()
    assert run(settings("other", ambient_level=1.0), progress=False).losses != summary.losses


def test_a_resumed_run_keeps_its_level_and_ends_as_the_straight_one(settings: Settings) -> None:
    straight = run(settings("s", max_train_steps=4, checkpointing_steps=2), progress=False)
    run(settings("r", max_train_steps=2, checkpointing_steps=2), progress=False)
    more = run(settings("r", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest"), progress=False)
    assert more.level == straight.level
    assert more.plan.level_reason == "as in checkpoint-2"
    a, b = (load_file(s.output / UNET) for s in (straight, more))
    assert all(torch.equal(a[k], b[k]) for k in a)
    # The number may stand in for the word, and another number may not.
    level = straight.level
    run(settings("r", ambient_level=level, max_train_steps=5, resume_from_checkpoint="latest"), progress=False)
    with pytest.raises(UserError, match="ambient_level"):
        run(
            settings("r", ambient_level=level + 0.5, max_train_steps=6, resume_from_checkpoint="latest"), progress=False
        )


def test_a_run_without_level_is_not_continued_with_auto(settings: Settings) -> None:
    run(settings("z", ambient_level=0, checkpointing_steps=2), progress=False)
    with pytest.raises(UserError, match="ambient_level"):
        run(settings("z", max_train_steps=4, resume_from_checkpoint="latest"), progress=False)


def test_held_cached_and_passing_latents_propose_one_level(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = run(settings("h"), progress=False).level
    assert run(settings("c", latent_cache_dir=str(tmp_path / "cache")), progress=False).level == held
    monkeypatch.setattr(data, "MAX_HELD_BYTES", 0)
    assert run(settings("p"), progress=False).level == held


@pytest.mark.slow
def test_two_processes_propose_the_level_of_one(settings: Settings, tmp_path: Path) -> None:
    alone = run(settings("one"), progress=False).level
    config = settings("two")
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    done = launch_words(2, [str(ROOT / "train_text_to_image_ambient.py"), "--config", str(path)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert yaml.safe_load((tmp_path / "two" / "train_config.yaml").read_text())["ambient_level"] == alone
    assert done.stderr.count(f"s_n = {alone:g} (") == 1, "the first process says it, once"
    assert f"noise level s_n = {alone:g}, " in done.stdout


def test_the_word_is_a_setting_like_a_number_and_refused_where_it_means_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    config = settings()
    assert parse(["--config", str(config.save(tmp_path))]) == config
    assert (
        parse(
            ["--pretrained_model_name_or_path", "b", "--train_data_dir", "p", "--ambient_level", "auto"]
        ).ambient_level
        == "auto"
    )
    for values, message in (
        ({"ambient_level": "Auto"}, r"finite number or auto"),
        ({"objective": "weighted"}, "a control shares its level"),
        ({"objective": "gap", "gap_upper": 2.0}, "objective gap"),
        ({"objective": "plain"}, "objective is plain"),
        ({"near_duplicates": "off"}, "near_duplicates off"),
        ({"noise_offset": 0.1}, "noise_offset"),
        ({"ambient_timestep": 300}, "both given"),
    ):
        with pytest.raises(UserError, match=message):
            settings(**values)


def test_too_few_images_end_in_one_line_before_a_step(settings: Settings, tmp_path: Path) -> None:
    few = tiny.tiny_folder(tmp_path / "few", count=4)
    config = settings(train_data_dir=str(few))
    with pytest.raises(UserError, match=r"4 distinct images.*as a number"):
        run(config, progress=False)
    assert not Path(config.output_dir).exists()
