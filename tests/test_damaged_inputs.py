"""Damaged inputs end in one line: what, where, the rule and the remedy; status 2, no traceback, nothing written or changed.

The cases are in `damage.py`, by family. Both entries are run as a person runs them, in this process: the training script
and `ambient-sd inspect`. The controls show that odd but sound inputs are taken.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import pytest
from damage import FAMILIES, Case, Place, encoded

from ambient_sd.cli import main as ambient_sd_command

CASES = [
    pytest.param(case, id=f"{family}: {name}") for family, cases in FAMILIES.items() for name, case in cases.items()
]
INSPECTED = [p for p in CASES if p.values[0].inspect]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def train() -> Any:
    script = Path(__file__).parents[1] / "train_text_to_image_ambient.py"
    spec = importlib.util.spec_from_file_location("train_script_damaged", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def place(tiny_base: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    inputs = tmp_path / "inputs"
    shutil.copytree(tiny_base, inputs / "base")
    shutil.copytree(tiny_images, inputs / "images")
    monkeypatch.chdir(tmp_path)
    return Place(inputs, inputs / "base", inputs / "images", inputs / "images")


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder: kind and content."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root) / name
            if path.is_symlink():
                found[str(path)] = f"link {os.readlink(path)}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "other"
    return found


class Ended:
    """What a command left: status, lines on stderr without progress bars, and what libraries said beside."""

    def __init__(self, command: Any, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                warnings.filterwarnings("ignore", category=ResourceWarning)
                command()
            self.status: Any = 0
        except SystemExit as end:
            self.status = end.code
        finally:
            logging.getLogger().removeHandler(handler)
        self.out, err = capfd.readouterr()
        # A bar ends in a carriage return and is overwritten; a line ends in a line break.
        self.lines = [line.rpartition("\r")[2] for line in err.split("\n")]
        self.lines = [line for line in self.lines if line.strip() and "it/s]" not in line and "?it" not in line]
        self.beside = said + [str(w.message) for w in caught]

    def check_refused(self, words: tuple[str, ...]) -> None:
        assert (self.status, len(self.lines)) == (2, 1), (self.status, self.lines)
        line = self.lines[0]
        assert line.startswith("ambient-sd: error: ") and "; " in line and len(line) < 700, line
        assert not [w for w in words if w not in line], line
        assert "Traceback" not in line and not self.beside, self.beside


def arguments(place: Place, out: Path, extra: list[str] | None) -> list[str]:
    words = {
        "--pretrained_model_name_or_path": place.base, "--train_data_dir": place.data, "--output_dir": out, "--resolution": 32,
        "--train_batch_size": 2, "--max_train_steps": 1, "--report_to": "none",
    }  # fmt: skip
    given = {w.split("=")[0] for w in extra or ()}
    kept = [w for key, value in words.items() if key not in given and not ("--config" in given and key in
            ("--train_batch_size", "--resolution", "--output_dir")) for w in (key, str(value))]  # fmt: skip
    return [*kept, *(extra or ())]


@pytest.mark.parametrize("case", CASES)
def test_training_ends_in_one_line(
    case: Case, place: Place, tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    extra = case.make(place)
    before = snapshot(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *arguments(place, tmp_path / "out", extra)])
    Ended(train, capfd).check_refused(case.words)
    assert snapshot(tmp_path) == before, "inputs stay as they are and nothing is written"


@pytest.mark.parametrize("case", INSPECTED)
def test_inspect_refuses_or_lists(case: Case, place: Place, tmp_path: Path, capfd: Any) -> None:
    case.make(place)
    before = snapshot(place.inputs)
    found = tmp_path / "found.json"
    ended = Ended(
        lambda: ambient_sd_command(["inspect", str(place.data), "--resolution", "32", "--json", str(found)]), capfd
    )
    assert snapshot(place.inputs) == before
    if case.inspect == "refuse":
        ended.check_refused(case.words)
        assert not found.exists()
    else:
        assert (ended.status, ended.lines, ended.beside) == (0, [], [])
        assert json.loads(found.read_text())["faults"]


def test_there_are_enough_cases() -> None:
    assert sum(map(len, FAMILIES.values())) >= 200
    assert len(INSPECTED) >= 100


# ---- controls: odd, but sound


@pytest.fixture
def odd_images(place: Place) -> Iterator[Place]:
    """A set of sound images of every unusual kind."""
    kinds: dict[str, bytes] = {
        "cmyk.jpg": encoded("JPEG", "CMYK"), "grey.jpg": encoded("JPEG", "L"), "progressive.jpg": encoded("JPEG", progressive=True),
        "palette.png": encoded("PNG", "P"), "bits.png": encoded("PNG", "1"), "grey-alpha.png": encoded("PNG", "LA"),
        "alpha.png": encoded("PNG", "RGBA"), "alpha.webp": encoded("WEBP", "RGBA"), "palette.gif": encoded("GIF"),
        "sixteen.png": encoded("PNG", "I;16"), "lzw.tiff": encoded("TIFF", compression="tiff_lzw"), "a.bmp": encoded("BMP"),
        "lab.tiff": encoded("TIFF", "LAB"), "wrong-ending.png": encoded("JPEG"), "UPPER.PNG": encoded("PNG"),
        "tiny.png": encoded(size=(1, 1)), "flat.png": encoded(size=(300, 2)), "\u00e9 \u7ea2.png": encoded(),
        "trailing.png": encoded() + b"some more bytes", "no-ending": encoded(),
    }  # fmt: skip
    shutil.rmtree(place.images)
    (place.images / "deep").mkdir(parents=True)
    rows = []
    for name, content in {**kinds, "deep/a.png": encoded()}.items():
        (place.images / name).write_bytes(content)
        rows.append(
            {"file_name": name, "text": f"{name} \u2028 \U0001f34e", "more": {"a": [1, None]}, "n": float("nan")}
        )
    (place.images / "link.png").symlink_to("alpha.png")
    rows += [{"file_name": "link.png", "text": ""}, rows[0], rows[0]]  # no caption, and rows given twice
    lines = "\r\n".join(json.dumps(row) for row in rows)
    (place.images / "metadata.jsonl").write_text("\ufeff" + lines + "\r\n\r\n", encoding="utf-8")
    yield place


def test_odd_but_sound_inputs_are_taken(
    odd_images: Place, tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    settings = tmp_path / "inputs" / "c.yaml"
    settings.write_text(
        "\ufeff# a comment\n---\nseed: &s 0x10\nnoise_seed: *s\nlearning_rate: 1e-4\nmixed_precision: no\nlora: true\nrank: '2'\n"
        "validation_prompts: a red apple\nresume_from_checkpoint: ~\n..."
    )
    before = snapshot(odd_images.inputs)
    argv = [*arguments(odd_images, tmp_path / "out", ["--num_validation_images=1"]), "--config", str(settings)]
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    assert Ended(train, capfd).status == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert snapshot(odd_images.inputs) == before
    found = tmp_path / "found.json"
    command = ["inspect", str(odd_images.data), "--resolution", "1", "--json", str(found)]
    ended = Ended(lambda: ambient_sd_command(command), capfd)
    assert (ended.status, ended.lines) == (0, [])
    counts = json.loads(found.read_text())["counts"]
    assert counts["broken"] == 0 and counts["captionless"] == 1


@pytest.mark.parametrize("make", [damage.parquet().make, damage.shard(words=()).make, lambda place: None])
def test_the_undamaged_inputs_of_the_cases_are_taken(
    make: Any, place: Place, tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The control of the cases: without the damage the same commands run."""
    make(place)
    monkeypatch.setattr(sys, "argv", ["train", *arguments(place, tmp_path / "out", None)])
    assert Ended(train, capfd).status == 0
    assert (tmp_path / "out" / "unet").is_dir()
