"""The probe counts copies and nothing else, leaves training as it was, repeats itself after a resume, and can end a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from ambient_sd.data.sources import PictureSet, load_rows
from ambient_sd.errors import UserError
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.training.probe import Probe, add_look

UNET = "unet/diffusion_pytorch_model.safetensors"
Settings = Callable[..., TrainConfig]


@pytest.fixture
def settings(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> Settings:
    def make(name: str, **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_pictures), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 4, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-3,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    return load_rows(tiny.tiny_folder(tmp_path_factory.mktemp("probed"), count=24)).check()


def noisy(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    noise = torch.randn(image.size[1], image.size[0], 3, generator=torch.Generator().manual_seed(seed)) * deviation
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(noise.shape)
    return Image.fromarray((pixels + noise).clamp(0, 255).to(torch.uint8).numpy())


def test_copies_are_counted_and_pictures_between_the_originals_are_not(pictures: PictureSet) -> None:
    probe = Probe(pictures, count=8, resolution=48, seed=0)
    copies = [noisy(pictures[i].image, 4, i) for i in range(4)]
    halves = [
        Image.blend(pictures[i].image.convert("RGB"), pictures[i + 1].image.convert("RGB"), 0.5) for i in range(4)
    ]
    seen = probe.measure(copies + halves, [1.0] * 8, step=5)
    assert (seen.share, seen.n, seen.step) == (0.5, 8, 5)
    assert seen.low < 0.5 < seen.high
    assert probe.measure(copies, [1.0] * 4, 1).share == 1
    assert probe.measure(halves, [1.0] * 4, 1).share == 0
    # Red for blue: no pixel copy, and the same contours. Those in between have contours of two pictures.
    swapped = [Image.merge("RGB", pictures[i].image.convert("RGB").split()[::-1]) for i in range(4)]
    assert (probe.measure(copies, [1.0] * 4, 1).recoloured, probe.measure(swapped, [1.0] * 4, 1).recoloured) == (1, 1)
    assert probe.measure(halves, [1.0] * 4, 1).recoloured == 0
    # Two rows of four: what was drawn, above what it is nearest to.
    sheet, size = probe.measure(copies, [1.0] * 4, 1).sheet, 48
    below = sheet.crop((0, size + 2, size, 2 * size + 2))
    first = torch.frombuffer(bytearray(below.convert("L").tobytes()), dtype=torch.uint8).float()
    original = torch.frombuffer(bytearray(pictures[0].image.convert("L").tobytes()), dtype=torch.uint8).float()
    assert (first - original).abs().mean() < 12, "the nearest training picture lies below the copy"


def test_a_picture_that_is_twice_in_the_set_does_not_hide_its_copies(tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path / "twice", count=12)
    with Image.open(folder / "000.png") as image:
        image.save(folder / "again.png")
    with (folder / "metadata.jsonl").open("a") as rows:
        rows.write(json.dumps({"file_name": "again.png", "text": "a red square again"}) + "\n")
    doubled = load_rows(folder).check()
    copy = noisy(doubled[0].image, 3, 1)
    assert Probe(doubled, count=4, resolution=48, seed=0).measure([copy], [0.0], 1).share == 1


def test_the_probe_is_a_function_of_the_seed(pictures: PictureSet) -> None:
    a, b, c = (Probe(pictures, count=6, resolution=48, seed=seed) for seed in (0, 0, 1))
    assert a.captions == b.captions
    assert a.captions != c.captions
    assert set(a.captions) <= set(pictures.captions)


def test_looking_leaves_training_untouched_and_a_resumed_run_repeats_its_looks(settings: Settings) -> None:
    without = settings("without")
    watched = settings("watched", probe_steps=2, probe_pictures=2, checkpointing_steps=3, report_to="tensorboard")
    plain, seen = run(without, progress=False), run(watched, progress=False)
    assert plain["losses"] == seen["losses"]
    out = Path(watched.output_dir)
    weights = load_file(out / UNET)
    assert all(torch.equal(weights[k], v) for k, v in load_file(Path(without.output_dir) / UNET).items())
    looks = (out / "probe.jsonl").read_text()
    assert [json.loads(line)["step"] for line in looks.splitlines()] == [2, 4]
    assert [look["step"] for look in seen["looks"]] == [2, 4]
    assert sorted(p.name for p in (out / "probe").iterdir()) == ["step-2.png", "step-4.png"]
    events = b"".join(p.read_bytes() for p in (out / "logs").rglob("events*"))
    assert all(name in events for name in (b"probe/copied", b"probe/guard_score", b"error/s 1 to 3"))
    watched.resume_from_checkpoint = str(out / "checkpoint-3")
    run(watched, progress=False)
    assert (out / "probe.jsonl").read_text() == looks


@pytest.mark.parametrize("measure_of", ["share", "recoloured"])
def test_a_run_ends_at_the_first_look_above_the_limit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, measure_of: str
) -> None:
    # An untrained network of this size copies nothing; only the share is replaced, all else is as in earnest.
    measure = Probe.measure
    shares = iter([0.0, 0.5, 0.5])

    def planted(self: Probe, *args: Any) -> Any:
        found = measure(self, *args)
        return type(found)(**{**vars(found), "share": 0.0, "recoloured": 0.0, measure_of: next(shares)})

    monkeypatch.setattr(Probe, "measure", planted)
    limit = {"probe_steps": 2, "probe_pictures": 2, "max_train_steps": 8, "stop_on_memorization": 0.2}
    config = settings("stopped", **limit)
    summary = run(config, progress=False)
    assert (summary["steps"], len(summary["losses"]), len(summary["looks"])) == (4, 4, 2)
    assert (Path(config.output_dir) / UNET).is_file(), "the result is kept"
    shares = iter([0.1] * 4)
    assert run(settings("whole", **limit), progress=False)["steps"] == 8


def test_looks_are_written_in_order_and_later_ones_make_room(tmp_path: Path) -> None:
    path = tmp_path / "probe.jsonl"
    for step in (2, 4, 6, 4):
        add_look(path, {"step": step, "copied": 0.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_options_of_the_probe_without_the_probe_are_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match="--probe_steps"):
        settings("a", stop_on_memorization=0.1)
    with pytest.raises(UserError, match="stop_on_memorization"):
        settings("a", probe_steps=2, stop_on_memorization=1.5)
