"""From a training to an audited card on the hub, each step the real command's: what the card shows is what the audit measured."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN, HubServer
from test_model_card import head, render, rendered_text
from tiny import tiny_folder, tiny_pipeline

from ambient_sd.audit.record import AuditRecord
from ambient_sd.audit.report import show
from ambient_sd.cli import main
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.hub import Facts, make_card
from ambient_sd.training.loop import run

WEIGHTS = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def audit(model: Path, data: Path, heldout: Path, out: Path, *more: str) -> None:
    main(["audit", str(model), str(data), "--heldout", str(heldout), "--out", str(out), "--features", "pixels,edges", "--max_prompts",
          "3", "--samples_per_prompt", "1", "--num_inference_steps", "2", "--attribution", "1", "--device", "cpu", *more])  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, images, held-out images, a LoRA and a full fine-tune of them, each audited into `audit/` beside its weights."""
    root = tmp_path_factory.mktemp("private-home")
    tiny_pipeline().save_pretrained(root / "base")
    tiny_folder(root / "images")
    shutil.copytree(root / "images", root / "all")  # held-out images are others of the same kind
    heldout = tiny_folder(root / "many", 12, 56)
    for name, lora in (("lora", True), ("full", False)):
        run(TrainConfig(pretrained_model_name_or_path=str(root / "base"), train_data_dir=str(root / "images"), resolution=32,
                        train_batch_size=2, max_train_steps=2, report_to="none", output_dir=str(root / name), lora=lora,
                        learning_rate=0.05 if lora else 1e-4))  # fmt: skip
    audit(
        root / "base",
        root / "images",
        heldout,
        root / "lora" / "audit",
        "--adapter",
        str(root / "lora"),
        "--fail-over",
        "0.99",
    )
    audit(root / "full", root / "images", heldout, root / "full" / "audit")
    return root


@pytest.fixture
def place(world: Path, tmp_path: Path) -> Path:
    """A copy of the world that a test may damage."""
    return Path(shutil.copytree(world, tmp_path / "private-home"))


def card(folder: Path) -> str:
    facts = Facts.read(folder)
    assert facts is not None
    return make_card(facts, folder)


def words(text: str) -> str:
    return rendered_text(render(text))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_card_on_the_hub_shows_what_the_audit_measured(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / name
    record = AuditRecord.read(folder / "audit" / "audit.json")
    assert all((folder / "audit" / kept).exists() for kept in ("audit.html", "pictures.jsonl", "generated/images"))
    assert "has not been measured" in words((folder / "README.md").read_text())  # as the training left it
    with HubServer() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        main(["push", str(folder), "--repo", "owner/name"])
        text = hub.files["README.md"].decode()
        assert not [sent for sent in hub.files if "audit" in sent or "pictures" in sent or "generated" in sent]
        for sent, data in hub.files.items():
            for secret in (str(place), str(Path.home()) + "/", TOKEN):
                assert secret.encode() not in data, sent
    page = words(text)
    assert "has not been measured" not in page
    for row in record.rows:
        assert row.heldout is not None and show(row.generated) in page and show(row.heldout) in page, row.name
    copies = record.row(record.verdict["measure"])
    low, high = (
        show(dataclasses.replace(copies.generated, value=end)) for end in (copies.generated.low, copies.generated.high)
    )
    assert f"{show(copies.generated)} ({low} to {high})" in page
    (digest,) = (record.model or {})["files"]["adapter" if name == "lora" else "unet"].values()
    for said in (record.finding["sentence"], "3 images of 3 training captions", "seed 0", "8 training images", "12 held-out images",
                 "2 steps", digest, "does not exceed the limit of 99.00%" if name == "lora" else "no limit was set", *record.notes):  # fmt: skip
        assert said in page, said
    (model,) = head(text)["model-index"]
    metrics = {m["type"]: m for result in model["results"] for m in result["metrics"]}
    assert metrics[copies.name]["value"] == copies.generated.value and set(metrics) == {row.name for row in record.rows}
    assert metrics[copies.name]["args"] == {
        "low": copies.generated.low,
        "high": copies.generated.high,
        "n": 3,
        "seed": 0,
    }
    assert model["name"] == "owner/name" and head(text)["pipeline_tag"] == "text-to-image"
