"""From a training to an audited card on the hub, each step the real command's: what the card shows is what the audit measured."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import TOKEN, HubServer
from test_model_card import head, render, rendered_text
from tiny import tiny_folder

from ambient_sd.audit.record import AuditRecord
from ambient_sd.audit.shares import RETURNED
from ambient_sd.cli import main
from ambient_sd.reporting.model_card import Facts, make_card, write_run_card
from ambient_sd.reporting.report import show
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run

WEIGHTS = "pytorch_lora_weights.safetensors"
SHORT = ["--features", "pixels,edges", "--max_prompts", "3", "--samples_per_prompt", "1", "--num_inference_steps", "2", "--attributed_prompts", "1",
         "--device", "cpu"]  # fmt: skip


def train(world: Path, base: Path, images: Path, steps: int = 2) -> None:
    write_run_card(run(TrainConfig(
        pretrained_model_name_or_path=str(base), train_data_dir=str(images), resolution=32, train_batch_size=2, overwrite=True,
        max_train_steps=steps, report_to="none", output_dir=str(world / "lora"), lora=True, learning_rate=0.05,
    )))  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_images: Path) -> Path:
    """A LoRA, audited into `audit/` beside its weights, and held-out images."""
    world = tmp_path_factory.mktemp("private-home")
    train(world, tiny_base, tiny_images)
    heldout = tiny_folder(world / "unseen", 12, 56)  # of the same kind
    main(["audit", str(tiny_base), str(tiny_images), "--adapter", str(world / "lora"), "--heldout", str(heldout),
          "--out", str(world / "lora" / "audit"), "--fail-over", "0.99", *SHORT])  # fmt: skip
    return world


@pytest.fixture
def lora(trained: Path, tmp_path: Path) -> Path:
    """A copy of the audited LoRA that a test may damage."""
    return Path(shutil.copytree(trained / "lora", tmp_path / "private-home" / "lora"))


def card(folder: Path) -> str:
    facts = Facts.read(folder)
    assert facts is not None
    return make_card(facts, folder)


def words(text: str) -> str:
    return rendered_text(render(text))


def push(hub: HubServer, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    try:
        main(["push", str(folder), "--repo", "owner/name"])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_card_on_the_hub_shows_what_the_audit_measured(
    trained: Path, lora: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = AuditRecord.read(lora / "audit")
    assert "has not been measured" in words((lora / "README.md").read_text())  # as the training left it
    with HubServer() as hub:
        assert push(hub, monkeypatch, lora) == 0
        text = hub.files["README.md"].decode()
        # The audit's page holds training images, its list their captions: they lie here, and stay.
        assert all((lora / "audit" / kept).exists() for kept in ("audit.html", "images.jsonl", "generated/images"))
        assert set(hub.files) == {"README.md", WEIGHTS, "train_config.yaml"}
        for sent, data in hub.files.items():
            for secret in (str(trained), str(lora), str(tiny_images), str(Path.home()) + "/", TOKEN, "a red square"):
                assert secret.encode() not in data, (sent, secret)
    page = words(text)
    assert "has not been measured" not in page
    for row in record.rows:
        assert show(row.generated) in page, row.name
        if row.name == RETURNED:  # of the training images: no held-out one can come back
            continue
        assert row.heldout is not None and row.excess is not None
        for shown in (show(row.heldout), show(row.excess, signed=True)):
            assert shown in page, row.name
    copies = record.row(record.verdict["measure"]).generated
    low, high = (show(dataclasses.replace(copies, value=end)) for end in (copies.low, copies.high))
    assert record.model is not None
    (digest,) = record.model["files"]["lora_weights"].values()
    for said in (f"{show(copies)} ({low} to {high})", record.finding["sentence"], "3 images for 3 training captions", "seed 0, 1000 resamples",
                 "8 training images and 12 held-out images", "2 steps", digest, "Verdict: passed", "does not exceed the limit of 99.00%",
                 *record.notes):  # fmt: skip
        assert said in page, said
    (model,) = head(text)["model-index"]
    metrics = {m["type"]: m for result in model["results"] for m in result["metrics"]}
    assert set(metrics) == {row.name for row in record.rows} and model["name"] == "owner/name"
    assert metrics[copies.name]["value"] == copies.value
    assert metrics[copies.name]["args"] == {"low": copies.low, "high": copies.high, "n": 3, "seed": 0}


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = folder / "audit" / "audit.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return make


def without_last_byte_of_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_last_byte_of_weights, "it is of other weights"),
        (edited(lambda a: a["model"]["files"].update(network={})), "on another base"),
        (edited(lambda a: a["model"]["files"]["network"].update({"unet/diffusion_pytorch_model.safetensors": "0" * 64})), "on another base"),
        (edited(lambda a: a["model"]["files"].update(lora_weights=None)), "it is of other weights"),
        (edited(lambda a: a.update(model=None)), "made elsewhere"),
        (edited(lambda a: a["model"].update(base_above=1.5)), "above noise level 1.5"),
        (edited(lambda a: a["images"]["training"].update(fingerprint="0" * 64)), "against other images"),
    ],
)  # fmt: skip
def test_audit_of_anything_else_is_left_out_with_the_reason(
    lora: Path, change: Callable[[Path], object], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(lora)
    with caplog.at_level(logging.WARNING):
        text = card(lora)
    assert "has not been measured here. An audit lies here and is left out: " in words(text) and why in words(text)
    assert why in caplog.text and "model-index" not in head(text) and "Verdict" not in text


def test_another_training_into_the_folder_takes_the_audit_out_of_the_card(
    lora: Path, tiny_base: Path, tiny_images: Path
) -> None:
    train(lora.parent, tiny_base, tiny_images, steps=3)
    assert "it is of other weights" in words((lora / "README.md").read_text())


def test_damaged_audit_stops_a_push_and_does_not_stop_a_training(
    lora: Path,
    tiny_base: Path,
    tiny_images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (lora / "audit" / "audit.json").write_text('{"format": 1}')
    with HubServer() as hub:
        assert push(hub, monkeypatch, lora) == 2
        assert not hub.files
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("ambient-sd: error:")]
    assert "its format is 1, this version reads 3; run the audit again" in line
    train(lora.parent, tiny_base, tiny_images, steps=3)
    assert "has not been measured here" in words((lora / "README.md").read_text())


def test_audit_copied_beside_the_weights_is_read_too(lora: Path) -> None:
    shutil.move(lora / "audit" / "audit.json", lora / "audit.json")
    assert "Verdict: passed" in words(card(lora))
