"""The probe counts copies and nothing else, leaves training as it was, repeats itself after a resume, and can end a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from ambient_sd.assets import IMAGES
from ambient_sd.audit.features import Pixels
from ambient_sd.audit.metrics import memorized
from ambient_sd.audit.neighbours import nearest
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.training import validation
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.training.probe import Probe, add_evaluation
from ambient_sd.utils.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
Settings = Callable[..., TrainConfig]


@pytest.fixture
def settings(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> Settings:
    def make(name: str, **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 4, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-3,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    return load_rows(IMAGES, split="finetune").subset(range(0, 1000, 25)).check()


@pytest.fixture(scope="module")
def unseen() -> list[Image.Image]:
    return [row.image.convert("RGB") for row in load_rows(IMAGES, split="heldout").subset(range(0, 320, 40))]


def changed(image: Image.Image) -> Image.Image:
    """A copy that was mirrored, cropped, recoloured and blurred."""
    image = image.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((3, 3, 60, 60)).resize((64, 64))
    return Image.merge("RGB", image.split()[::-1]).filter(ImageFilter.GaussianBlur(1))


def noisy(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    noise = torch.randn(image.size[1], image.size[0], 3, generator=torch.Generator().manual_seed(seed)) * deviation
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(noise.shape)
    return Image.fromarray((pixels + noise).clamp(0, 255).to(torch.uint8).numpy())


def test_changed_copies_are_counted_and_images_that_were_never_seen_are_not(
    images: ImageDataset, unseen: list[Image.Image]
) -> None:
    probe = Probe(images, count=8, resolution=64, seed=0)
    copies = [changed(images[i].image) for i in range(4)]
    seen = probe.measure(copies + unseen[:4], [1.0] * 8, step=5)
    assert (seen.copies.value, seen.copies.n, seen.step) == (0.5, 8, 5)
    assert seen.copies.low < 0.5 < seen.copies.high
    # The published measure sees none of them; it stands beside.
    assert seen.published == 0 and seen.record()["published"] == 0
    assert probe.measure([images[i].image.convert("RGB") for i in range(4)], [1.0] * 4, 1).published == 1
    assert probe.measure(unseen, [1.0] * 8, 1).copies.value == 0
    # What was drawn lies above the training image that explains it.
    sheet, size = probe.measure(copies, [1.0] * 4, 1).sheet, 64
    assert sheet is not None
    for i in range(4):
        x = 4 + i * 100
        below = sheet.crop((x, 4 + size, x + size, 4 + 2 * size))
        assert below.tobytes() == images[i].image.convert("RGB").tobytes()


def test_redrawn_images_are_seen_before_they_are_copies(images: ImageDataset, unseen: list[Image.Image]) -> None:
    """Each caption's own image, half hidden by another picture; the control: the same pictures under other captions."""
    probe = Probe(images, count=8, resolution=64, seed=0)
    own = [images[images.captions.index(caption)].image.convert("RGB") for caption in probe.captions]
    drawn = [Image.blend(a, b.convert("RGB").resize(a.size), 0.4) for a, b in zip(own, unseen, strict=True)]
    seen = probe.measure(drawn, [1.0] * 8, 1)
    assert seen.own == seen.record()["own"] == 1 > seen.copies.value
    assert "nearest to their own training image 100.0 %" in seen.describe()
    assert probe.measure(drawn[1:] + drawn[:1], [1.0] * 8, 1).own == 0


def test_captions_that_the_model_reads_alike_tell_no_images_apart(images: ImageDataset) -> None:
    alike = Probe(images, count=8, resolution=64, seed=0, read=["what is read"] * len(images))
    assert Probe(images, count=8, resolution=64, seed=0).telling and not alike.telling


def test_black_images_are_said_and_not_counted(images: ImageDataset, unseen: list[Image.Image]) -> None:
    probe = Probe(images, count=8, resolution=64, seed=0)
    black = Image.new("RGB", (64, 64))
    seen = probe.measure([black] * 8, [math.nan] * 8, 100)
    assert seen.blank == 8 and seen.copies.n == 0 and seen.copies.high == 1
    assert "copy rate not known" in seen.describe() and "8 of 8 images are black" in seen.describe()
    assert "guard_score" not in seen.record() and "NaN" not in json.dumps(seen.record())
    some = probe.measure([black, *unseen[:7]], [1.0] * 8, 100)
    assert some.blank == 1 and some.record()["n"] == 7 and "of 7 images" in some.describe()
    assert "blank" not in probe.measure(unseen[:8], [1.0] * 8, 100).record()


def test_one_caption_for_all_asks_for_no_image_of_its_own(tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path / "alike", count=6)
    rows = [json.loads(line) | {"text": "a thing"} for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    alike = load_rows(folder).check()
    seen = Probe(alike, count=2, resolution=48, seed=0).measure([alike[0].image] * 2, [0.0] * 2, 1)
    assert seen.own is None and "own" not in seen.record() and "nearest" not in seen.describe()


def test_looking_leaves_the_global_generator_alone(images: ImageDataset, unseen: list[Image.Image]) -> None:
    before = torch.random.get_rng_state()
    Probe(images.subset(range(24)).check(), count=4, resolution=64, seed=0).measure(unseen[:2], [1.0] * 2, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_null_the_published_measure_counts_too(images: ImageDataset) -> None:
    few = images.subset(range(12)).check()
    probe = Probe(few, count=4, resolution=64, seed=0)
    # Half another image over it: no copy for the decision alone, and d1/d2 < 1/3.
    mixed = [Image.blend(few[i].image.convert("RGB"), few[i + 1].image.convert("RGB"), 0.2) for i in range(4)]
    published = memorized(nearest(Pixels()(mixed), probe.real))
    alone = probe.decision(mixed).copy
    assert bool(published.any()) and not bool((published & alone).all())
    assert probe.measure(mixed, [1.0] * 4, 1).copies.value == float((published | alone).double().mean())


def test_a_set_of_one_image_is_refused(images: ImageDataset) -> None:
    with pytest.raises(UserError, match="probe_steps with 1 different training image"):
        Probe(images.subset([3, 3]).check(), count=1, resolution=64, seed=0)


def test_an_image_that_is_twice_in_the_set_does_not_hide_its_copies(tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path / "twice", count=12)
    with Image.open(folder / "000.png") as image:
        image.save(folder / "again.png")
    with (folder / "metadata.jsonl").open("a") as rows:
        rows.write(json.dumps({"file_name": "again.png", "text": "a red square again"}) + "\n")
    doubled = load_rows(folder).check()
    copy = noisy(doubled[0].image, 3, 1)
    assert Probe(doubled, count=4, resolution=48, seed=0).measure([copy], [0.0], 1).copies.value == 1


def test_the_probe_is_a_function_of_the_seed(images: ImageDataset) -> None:
    a, b, c = (Probe(images, count=6, resolution=48, seed=seed) for seed in (0, 0, 1))
    assert a.captions == b.captions
    assert a.captions != c.captions
    assert set(a.captions) <= set(images.captions)


def test_looking_leaves_training_untouched_and_a_resumed_run_repeats_its_looks(settings: Settings) -> None:
    without = settings("without")
    watched = settings("watched", probe_steps=2, probe_images=2, checkpointing_steps=3, report_to="tensorboard")
    plain, seen = run(without, progress=False), run(watched, progress=False)
    assert plain.losses == seen.losses
    out = Path(watched.output_dir)
    weights = load_file(out / UNET)
    assert all(torch.equal(weights[k], v) for k, v in load_file(Path(without.output_dir) / UNET).items())
    looks = (out / "probe.jsonl").read_text()
    assert [json.loads(line)["step"] for line in looks.splitlines()] == [2, 4]
    assert [look["step"] for look in seen.evaluations] == [2, 4]
    assert sorted(p.name for p in (out / "probe").iterdir()) == ["step-2.png", "step-4.png"]
    events = b"".join(p.read_bytes() for p in (out / "logs").rglob("events*"))
    assert all(
        name in events for name in (b"probe/copies", b"probe/published", b"probe/guard_score", b"error/s 1 to 3")
    )
    watched.resume_from_checkpoint = str(out / "checkpoint-3")
    run(watched, progress=False)
    assert (out / "probe.jsonl").read_text() == looks


@pytest.mark.parametrize("copied", [True, False])
def test_a_run_ends_at_the_first_look_with_changed_copies_above_the_limit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, images: ImageDataset, unseen: list[Image.Image], tmp_path: Path, copied: bool
) -> None:  # fmt: skip
    rows = images.subset(range(24))
    folder = tmp_path / "emoji"
    folder.mkdir()
    for i, row in enumerate(rows):
        row.image.convert("RGB").save(folder / f"{i:02d}.png")
    lines = (json.dumps({"file_name": f"{i:02d}.png", "text": row.caption}) for i, row in enumerate(rows))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    # An untrained network of this size copies nothing: what it draws is replaced, all else is as in earnest.
    planted = [changed(rows[i].image) for i in range(4)] if copied else unseen[:4]
    sample = validation.sample

    def planting(*args: Any, **options: Any) -> Any:
        found = sample(*args, **options)
        return validation.Samples([[image] for image in planted], found.scores)

    monkeypatch.setattr(validation, "sample", planting)
    config = settings(
        "stopped", train_data_dir=str(folder), probe_steps=1, probe_images=4, max_train_steps=2, stop_on_memorization=0.2
    )  # fmt: skip
    summary = run(config, progress=False)
    assert summary.steps == (1 if copied else 2)
    assert len(summary.evaluations) == len(summary.losses) == summary.steps
    assert summary.evaluations[0]["published"] == 0, "what stops the run is nothing that d1/d2 sees"
    assert (Path(config.output_dir) / UNET).is_file(), "the result is kept"


def test_looks_are_written_in_order_and_later_ones_make_room(tmp_path: Path) -> None:
    path = tmp_path / "probe.jsonl"
    for step in (2, 4, 6, 4):
        add_evaluation(path, {"step": step, "copies": 0.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_options_of_the_probe_without_the_probe_are_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match="--probe_steps"):
        settings("a", stop_on_memorization=0.1)
    with pytest.raises(UserError, match="stop_on_memorization"):
        settings("a", probe_steps=2, stop_on_memorization=1.5)
