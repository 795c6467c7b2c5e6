"""`ambient-sd level`: prints what `--ambient_level auto` takes, writes a page that loads nothing, refuses in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny

from ambient_sd.cli import main
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run


def test_the_command_prints_the_level_that_training_takes(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.tiny_folder(tmp_path / "<b>p", count=12)
    page, table = tmp_path / "l.html", tmp_path / "l.json"
    flags = [
        "--model",
        str(tiny_base),
        "--resolution",
        "32",
        "--center_crop",
        "--html",
        str(page),
        "--json",
        str(table),
    ]
    main(["level", str(folder), *flags])
    found = json.loads(table.read_text())
    printed = capsys.readouterr().out
    assert f"proposed: s_n = {found['proposed']:g}: there a noisy copy of one of 12 images" in printed
    assert len(found["levels"]) == len(found["own"]) == len(found["ratio_quantiles"])
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base), train_data_dir=str(folder), resolution=32, center_crop=True,
        max_train_steps=1, train_batch_size=1, report_to="none", output_dir=str(tmp_path / "o"), ambient_level="auto",
    )  # fmt: skip
    assert run(config, progress=False).level == found["proposed"]
    text = page.read_text()
    assert "&lt;b&gt;p" in text
    assert "<b>p" not in text
    assert str(tmp_path) not in text + table.read_text()
    assert not re.search(r"<script|(?<!xmlns=\")https?://|url\(", text)


def test_mistakes_end_in_one_line(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.tiny_folder(tmp_path / "p", count=4)
    for flags, part in (
        ([str(folder), "--model", str(tiny_base), "--resolution", "32"], "4 distinct images"),
        ([str(folder), "--model", str(tmp_path / "none"), "--resolution", "32"], "no such folder"),
        (
            [str(folder), "--model", str(tiny_base), "--html", str(tmp_path / "no" / "x.html")],
            "its folder does not exist",
        ),
        ([str(folder)], "--model"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["level", *flags])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert part in error
