"""The same noisy images through models and oracles: outputs by an independent formula, and a defect that the errors show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.utils.errors import UserError
from experiments import denoised
from experiments.denoised import ORACLES, compare, denoise, main


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageDataset, ImageDataset]:
    folder = tiny.tiny_folder(tmp_path_factory.mktemp("twelve"), count=12, size=32)
    everything = load_rows(folder)
    return everything.subset(range(8)).check(), everything.subset(range(8, 12)).check()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_prediction_is_the_one_that_the_scheduler_steps_from(prediction_type: str) -> None:
    pipe: Any = tiny.tiny_pipeline(prediction_type)
    y = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = denoise(pipe, y, 400, ["a red disc", ""])
    # diffusers' DDIM step returns the same quantity from the same output.
    x_t = y * pipe.scheduler.alphas_cumprod[400].sqrt()
    tokens = [
        pipe.tokenizer(t, padding="max_length", max_length=24, return_tensors="pt").input_ids
        for t in ("a red disc", "")
    ]
    with torch.no_grad():
        hidden = torch.cat([pipe.text_encoder(t)[0] for t in tokens])
        output = pipe.unet(x_t, 400, encoder_hidden_states=hidden).sample
    pipe.scheduler.set_timesteps(1000)
    expected = pipe.scheduler.step(output, 400, x_t).pred_original_sample
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, denoise(pipe, y, 400, ["", ""]), atol=1e-4), "the caption has a say"


def test_the_oracles_know_the_training_images_only(sets: tuple[ImageDataset, ImageDataset]) -> None:
    errors, outputs = compare({"m": tiny.tiny_pipeline()}, *sets, resolution=32, levels=(0.1, 0.6), nature=0.3)
    by = {(e.model, round(e.level, 1)): e for e in errors}
    plain, noisy = by[ORACLES[0], 0.1], by[ORACLES[1], 0.6]
    assert plain.train.value < 1e-6
    assert plain.gap.low > 0
    assert by[ORACLES[1], 0.1].train.value == plain.train.value, "below s_n the two are one"
    assert noisy.train.value > 0.2
    assert (plain.train.n, plain.heldout.n) == (8, 4)
    assert abs(by["m", 0.1].gap.value) < 0.1 * by["m", 0.1].train.value, "random weights know neither kind"
    again, _ = compare({"m": tiny.tiny_pipeline()}, *sets, resolution=32, levels=(0.1, 0.6), nature=0.3)
    assert [e.as_dict() for e in again] == [e.as_dict() for e in errors]
    swapped, _ = compare({"m": tiny.tiny_pipeline()}, *sets[::-1], resolution=32, levels=(0.1,), nature=0.3)
    assert swapped[1].heldout.value > 0.01, "control: told apart by which set the oracle was given"
    assert all(set(o) == {"input", "m", *ORACLES} for o in outputs.values())


def test_models_of_other_spaces_are_refused(sets: tuple[ImageDataset, ImageDataset]) -> None:
    pipe, other = tiny.tiny_pipeline(), tiny.tiny_pipeline(seed=1)
    with pytest.raises(UserError, match="b has another VAE than a"):
        compare({"a": pipe, "b": other}, *sets, resolution=32)
    other.vae = pipe.vae
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, beta_end=0.02)
    with pytest.raises(UserError, match="b has another noise schedule than a"):
        compare({"a": pipe, "b": other}, *sets, resolution=32)
    with pytest.raises(UserError, match="StableDiffusionXLPipeline"):
        compare({"a": tiny.tiny_sdxl_pipeline()}, *sets, resolution=32)


def test_the_command_writes_sheet_page_and_figures(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tiny.tiny_folder(tmp_path / "p", size=32), tmp_path / "out"
    held = tiny.tiny_folder(tmp_path / "h", count=3, size=32)
    flags = ["--data", str(folder), "--heldout", str(held), "--heldout_filter", "--resolution", "32", "--out", str(out)]
    main([f"<b>m={tiny_base}", *flags, "--levels", "0.5", "2", "--unconditional", "--shown", "1"])
    found = json.loads((out / "denoised.json").read_text())
    assert [round(e["level"], 1) for e in found["errors"]] == [0.5] * 3 + [2.0] * 3
    assert all(
        e[k]["low"] <= e[k]["value"] <= e[k]["high"] for e in found["errors"] for k in ("train", "heldout", "gap")
    )
    page = (out / "index.html").read_text()
    assert "&lt;b&gt;m" in page
    assert "<b>m" not in page
    assert str(tmp_path) not in page + json.dumps(found)
    assert not re.search(r"<script|(?<!xmlns=\")https?://|url\(", page)
    assert (out / "denoised.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(denoised, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    for models, part in (
        (["m"], "NAME=FOLDER"),
        ([f"m={tmp_path / 'no'}"], "no"),
        ([f"oracle, images={tiny_base}"], "one name"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*models, *flags])
        assert stop.value.code == 2
        assert part in capsys.readouterr().err
