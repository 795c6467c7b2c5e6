"""The demo from end to end, made short: real base, real images, two steps of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ambient_sd.assets import BASE, STYLE
from ambient_sd.cli import main
from ambient_sd.commands.demo import DemoSettings
from ambient_sd.commands.demo.work import settings_of_run
from ambient_sd.training.config import TrainConfig, load_yaml
from ambient_sd.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def test_config_file_says_what_the_demo_does() -> None:
    by_hand = TrainConfig(**load_yaml(ROOT / "configs" / "demo.yaml"))
    in_demo = settings_of_run(DemoSettings(), "distill")
    assert (ROOT / str(by_hand.pretrained_model_name_or_path)).resolve() == BASE.resolve()
    assert (ROOT / str(by_hand.train_data_dir)).resolve() == STYLE.resolve()
    same = {"pretrained_model_name_or_path": str(BASE), "train_data_dir": str(STYLE)}
    assert by_hand.to_dict() | same == in_demo.to_dict()


def test_the_runs_differ_in_the_objective_alone() -> None:
    plain, ambient, distill = (settings_of_run(DemoSettings(), o).to_dict() for o in ("plain", "ambient", "distill"))
    different = {key for key in plain | ambient if plain.get(key) != ambient.get(key)}
    assert different == {"objective", "ambient_level", "reweight", "near_duplicates", "output_dir"}
    different = {key for key in plain | distill if plain.get(key) != distill.get(key)}
    assert different == {"objective", "distill_level", "output_dir"}


def test_too_few_samples_are_refused_at_once() -> None:
    assert DemoSettings(num_prompts=4).num_prompts == 4 and DemoSettings().num_prompts == 0
    with pytest.raises(UserError, match="at least 4 images; raise it"):
        DemoSettings(num_prompts=3)
    for objectives in (["plain"], ["plain", "plain", "ambient"]):
        with pytest.raises(UserError, match="two or three different ones are compared"):
            DemoSettings(objectives=objectives)


@pytest.mark.slow
def test_demo_writes_page_figures_sheets_and_loadable_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    short = ["--steps", "2", "--num_prompts", "4", "--samples_per_prompt", "2", "--sampling_steps", "2"]
    main(["demo", "--out", str(out), *short])
    printed = capsys.readouterr().out
    assert "memorized-pixels64" in printed and "report.html" in printed
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    figures = json.loads((out / "figures.json").read_text())
    assert list(figures["runs"]) == ["plain", "distill", "ambient", "base"]
    for rows in figures["runs"].values():
        # What comes back of the own image decides the sentence; copies by the audit's definition and the published measure stand beside it.
        assert list(rows)[:5] == ["own-pixels64", "own-edges16", "new-pixels64", "new-edges16", "copies"]
        assert {"memorized-pixels64", "memorized-edges16"} < set(rows)
        # Quality is that of captions that were not trained.
        assert {"agreement", "KID-EffLite0"} < set(rows) and rows["KID-EffLite0"]["generated"]["n"] == 4
        assert [rows[name]["generated"]["n"] for name in ("own-pixels64", "new-pixels64")] == [8, 4]
    own = [figures["runs"][name]["own-pixels64"]["generated"]["value"] for name in ("distill", "plain")]
    assert (
        f"{100 * own[0]:.1f} % of 8 samples are closest to the training image of their caption, against {100 * own[1]:.1f} %"
        in figures["finding"]
    )
    assert printed.index("copies ") < printed.index("memorized-pixels64") and "closest: " in page
    for rows in figures["runs"].values():
        for row in rows.values():
            for figure in row.values():
                assert figure["n"] > 0 and figure["low"] <= figure["value"] <= figure["high"]
    assert (
        (out / "new.png").exists()
        and (out / "base.png").exists()
        and not (out / "base").exists()
        and "Captions that were not trained" in page
    )
    for name in ("plain", "ambient", "distill"):
        assert (out / f"{name}.png").exists()
        assert (out / name / "unet" / "diffusion_pytorch_model.safetensors").exists()
        assert (out / name / "train_config.yaml").exists()
    # A finished demo is kept, unless asked otherwise; what is not the demo's own stays then too.
    (out / "notes.txt").write_text("mine")
    weights = (out / "plain" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(out), *short])
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "holds a finished demo" in message and "--overwrite" in message
    assert (out / "plain" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    main(["demo", "--out", str(out), *short, "--overwrite", "--steps", "1", "--objectives", "plain", "ambient"])
    assert (
        (out / "notes.txt").read_text() == "mine"
        and not (out / "distill").exists()
        and not (out / "distill.png").exists()
    )
    assert (out / "plain" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != weights


def test_demo_does_not_touch_a_folder_that_is_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "thesis.tex" in message and message.count("\n") == 1
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_demo_does_not_take_trainings_named_like_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "weights").write_text("days of work")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "a folder of its own" in capsys.readouterr().err
    assert (tmp_path / "plain" / "weights").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["demo", "--steps", "0"], "steps"), (["demo", "--guidance_scale", "1"], "guidance_scale"), (["demo", "--guidance_scale", "nan"], "guidance_scale"), (["dmeo"], "dmeo"),
     (["demo", "--level", "-1"], "level is -1"), (["demo", "--level", "99"], "99"), (["demo", "--seed", "x"], "seed")],
)  # fmt: skip
def test_bad_arguments_end_in_one_line_and_status_2(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("ambient-sd: error: ") and message.count("\n") == 1 and named in message
    assert not list(tmp_path.iterdir())
