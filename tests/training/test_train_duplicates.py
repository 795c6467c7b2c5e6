"""A run gives near-duplicates one noise (mirrored for mirror images), and its checkpoints know the grouping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image, ImageOps

from ambient_sd.data.sources import load_rows
from ambient_sd.data.stream import SampleStream
from ambient_sd.data.views import ViewRule
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.utils.errors import UserError


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Four images, one of them also as JPEG and as a mirror image."""
    folder = tiny.tiny_folder(tmp_path / "images", count=4)
    original = Image.open(folder / "003.png")
    original.save(folder / "jpeg.jpg", quality=80)
    ImageOps.mirror(original).save(folder / "mirror.png")
    with (folder / "metadata.jsonl").open("a") as rows:
        for name in ("jpeg.jpg", "mirror.png"):
            rows.write(json.dumps({"file_name": name, "text": name}) + "\n")
    return folder


def settings(base: Path, images: Path, out: Path, **values: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "pretrained_model_name_or_path": str(base), "train_data_dir": str(images), "resolution": 32,
            "train_batch_size": 6, "max_train_steps": 2, "report_to": "none", "output_dir": str(out),
            "caption_dropout": 0.0, **values,
        }
    )  # fmt: skip


def watched(config: TrainConfig) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
    """Train and return (eps_n, x0) by caption, and the summary."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(batch: TrainingBatch) -> None:
        assert batch.eps_n is not None
        seen.update(zip(batch.captions, zip(batch.eps_n, batch.x0, strict=True), strict=True))

    return seen, run(config, progress=False, on_batch=watch)


def test_near_duplicates_train_under_one_noise(tiny_base: Path, copies: Path, tmp_path: Path) -> None:
    seen, summary = watched(settings(tiny_base, copies, tmp_path / "share", random_flip=True))
    assert len(summary.plan.images.groups) == 1
    original, jpeg, mirror = (seen[c][0] for c in ("a orange disc 3", "jpeg.jpg", "mirror.png"))
    assert torch.equal(original, jpeg)
    assert torch.equal(original, mirror.flip(-1)), "x_n of the mirror image is the mirror image of x_n"
    others = [seen[c][0] for c in seen if c not in ("jpeg.jpg", "mirror.png")]
    assert len({e.numpy().tobytes() for e in others}) == 4


def test_near_duplicates_have_their_own_noises_with_off(tiny_base: Path, copies: Path, tmp_path: Path) -> None:
    seen, summary = watched(settings(tiny_base, copies, tmp_path / "off", near_duplicates="off"))
    assert len(summary.plan.images.groups) == 0
    assert len({e.numpy().tobytes() for e, _ in seen.values()}) == 6


def test_near_duplicates_share_one_view(tmp_path: Path) -> None:
    image = Image.effect_mandelbrot((96, 48), (-2.2, -1.2, 0.9, 0.4), 60).convert("RGB")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg", quality=95)
    ImageOps.mirror(image).save(tmp_path / "c.png")
    lines = [json.dumps({"file_name": n, "text": n}) for n in ("a.png", "b.jpg", "c.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    grouped, alone = (load_rows(tmp_path).check(near_duplicates=share) for share in (True, False))
    stream = SampleStream(3, 0)
    lonely = []
    for seed in range(8):  # other crops and flips
        rule = ViewRule(32, center_crop=False, random_flip=True, per_image=True, noise_seed=seed)
        original, jpeg, mirror = (rule.sample(grouped[i], stream, i).pixels for i in range(3))
        assert float((original - jpeg).abs().mean()) < 0.05
        assert torch.equal(original, mirror.flip(-1))
        lonely.append(torch.equal(original, rule.sample(alone[2], stream, 2).pixels.flip(-1)))
    assert not all(lonely), "negative control: without groups the mirror image has a view of its own"


def test_a_checkpoint_refuses_another_grouping(tiny_base: Path, copies: Path, tmp_path: Path) -> None:
    run(settings(tiny_base, copies, tmp_path / "out", checkpointing_steps=1, max_train_steps=1), progress=False)
    with pytest.raises(UserError, match="near_duplicates = 'share'"):
        run(
            settings(tiny_base, copies, tmp_path / "out", near_duplicates="off", resume_from_checkpoint="latest"),
            progress=False,
        )


def test_near_duplicates_belong_to_the_ambient_objective(tiny_base: Path, copies: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="near_duplicates"):
        settings(tiny_base, copies, tmp_path / "out", objective="plain", near_duplicates="off")
    assert settings(tiny_base, copies, tmp_path / "out").near_duplicates == "share"
    assert settings(tiny_base, copies, tmp_path / "out", objective="plain").near_duplicates is None
