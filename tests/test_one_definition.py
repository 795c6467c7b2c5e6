"""Audit, probe, study and comparison call the same images copies: there is one definition."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.audit.decision import HELDOUT, CopyDecision
from ambient_sd.commands.audit import AuditSettings, Source
from ambient_sd.commands.audit.work import audit
from ambient_sd.commands.compare import CompareSettings
from ambient_sd.commands.compare import work as comparison
from ambient_sd.data.sources import load_rows
from ambient_sd.training.probe import Probe
from experiments.measures import measure_samples, read_reals


def folder(path: Path, images: list[Image.Image], captions: list[str]) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        image.save(path / f"{i:02d}.png")
    lines = (json.dumps({"file_name": f"{i:02d}.png", "text": text}) for i, text in enumerate(captions))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def changed(image: Image.Image) -> Image.Image:
    """Mirrored, cropped, in other colours, blurred: no copy by d1/d2."""
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((3, 3, 60, 60)).resize((64, 64))
    return Image.merge("RGB", image.split()[::-1]).filter(ImageFilter.GaussianBlur(1))


def test_all_commands_call_the_same_images_copies(tmp_path: Path) -> None:
    rows = load_rows(IMAGES, split="finetune").subset(range(0, 1000, 40))
    training = [row.image.convert("RGB") for row in rows]
    heldout = [row.image.convert("RGB") for row in load_rows(IMAGES, split="heldout").subset(range(0, 320, 13))]
    others = [row.image.convert("RGB") for row in load_rows(IMAGES, split="finetune").subset(range(20, 500, 40))]
    captions = [row.caption for row in rows]
    known = folder(tmp_path / "training", training, captions)
    unseen = folder(tmp_path / "heldout", heldout, ["" for _ in heldout])
    images = [*(changed(image) for image in training[:4]), *others[:12]]
    made = folder(tmp_path / "generated", images, captions[: len(images)])

    published = torch.zeros(len(images), dtype=torch.bool)
    expected = CopyDecision(training, None, {HELDOUT: heldout})(images, published).copy.tolist()
    assert expected == [True] * 4 + [False] * 12
    rate = 4 / 16

    audit(
        AuditSettings(
            training=Source(str(known)), heldout=Source(str(unseen)), generated=made, output_dir=tmp_path / "audit",
            features=("pixels",), resamples=50,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "audit" / "images.jsonl").read_text().splitlines()]
    assert [line["copy"] for line in sorted(lines, key=lambda line: str(line["name"]))] == expected
    assert not any(one["copy"] for line in lines for one in line["nearest"].values()), "d1/d2 sees none of them"

    checked, never = load_rows(known).check(), load_rows(unseen).check()
    figures, each = measure_samples(images, captions[: len(images)], read_reals(checked, never), 0, resamples=20)
    assert each["copies"] == expected and each["originals"][:4] == [0, 1, 2, 3]
    assert (figures["copies"].value, figures["copied"].value) == (rate, 0)

    reals = comparison.read_reals(checked, never)

    def judge(shown: Any, own: Any, captions: Any) -> Any:
        return types.SimpleNamespace(value=torch.zeros(len(own)), hit=torch.zeros(len(own)))

    judge.others = 4  # type: ignore[attr-defined]
    samples = comparison.Samples(images, [{"processor_seconds": 1.0} for _ in images])
    settings = CompareSettings({"a": str(BASE)}, str(BASE), tmp_path, 64, num_images_per_prompt=1)
    found: Any = comparison.mitigation_figures(samples, reals, captions[: len(images)], captions, judge, settings)  # type: ignore[arg-type]
    assert (found["copies"].value, found["copied"].value) == (rate, 0)
    assert comparison.decide(images, reals)[0].copy.tolist() == expected
    assert comparison.truth(comparison.decide(images, reals)[0].copy, 1)[0] == [0, 1, 2, 3]

    probe = Probe(checked, count=len(images), resolution=64, seed=0)
    seen = probe.measure(images, [1.0] * len(images), 1)
    assert probe.decision(images).copy.tolist() == expected
    assert (seen.copies.value, seen.published) == (rate, 0)
