"""Pushing a folder of results when the hub stumbles, hangs up, holds a person's page or is open to all.

`huggingface_hub` itself is at work, against tests/hub_server.py; only its address and its waits are replaced.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import TOKEN, HubServer, reach
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from ambient_sd.audit.record import AuditRecord
from ambient_sd.cli import main
from ambient_sd.reporting.model_card import Facts, is_ours, write_card

FACTS = Facts(
    base="base", base_id="owner/base", licence={"license": "mit"}, objective="plain", prediction_type="epsilon", level=0.0,
    timestep=None, timesteps=1000, gap_upper=None, distill_level=None, reweight=None, pipeline="StableDiffusionPipeline", vae=None, lora=None, averaged=False, steps=9, batch=4, learning_rate=1e-4,
    lr_scheduler="constant", resolution=32, images=8, distinct=8, groups=None, grouped=0, captioned=8, fingerprint="ab" * 32,
    dataset=None, prompts=["a red disc"], finished=0.0,
)  # fmt: skip
SENT = {"README.md", "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "train_config.yaml", "validation/step-9.png"}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What a training leaves, files that must not travel and notes of this machine included."""
    folder = tmp_path / "private" / "results"
    origin = {"_name_or_path": str(tmp_path / "private" / "base"), "in_channels": 4}
    texts = {
        "model_index.json": json.dumps(origin), "unet/config.json": json.dumps(origin), "optimizer.safetensors": "x",
        "checkpoint-9/optimizer.safetensors": "x", "checkpoint-9/unet/diffusion_pytorch_model.safetensors": "x",
        "logs/events.out": TOKEN, "unet/optimizer.bin": "x", "train_config.yaml": yaml.safe_dump(
            {"train_data_dir": str(tmp_path / "private"), "output_dir": str(folder), "hub_token": TOKEN, "rank": 4}),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for part in ("unet", "vae"):
        (folder / part).mkdir(exist_ok=True)
        save_file({"w": np.full(1000, len(part), np.float32)}, folder / part / "diffusion_pytorch_model.safetensors")
    (folder / "validation").mkdir()
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Source", str(folder))
    Image.new("RGB", (8, 8), "red").save(folder / "validation" / "step-9.png", pnginfo=notes)
    write_card(folder, FACTS)
    return folder


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, which do not happen."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


def push(hub: HubServer, monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> int:
    reach(monkeypatch, hub.url, folder.parent, TOKEN)
    try:
        main(["push", str(folder), "--repo", "owner/name", *more])
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_nothing_pushed_holds_a_token_a_path_or_a_file_that_is_not_on_the_list(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    # Negative control: what must not travel lies in the files that do.
    for secret, name in ((str(results), "validation/step-9.png"), (str(results.parent), "unet/config.json"), (TOKEN, "train_config.yaml")):  # fmt: skip
        assert secret.encode() in (results / name).read_bytes()
    with HubServer() as hub:
        assert push(hub, monkeypatch, results) == 0
        assert set(hub.files) == SENT
        for name, data in hub.files.items():
            for secret in (TOKEN, str(results), str(results.parent), str(Path.home()) + "/"):
                assert secret.encode() not in data, (name, secret)
    with Image.open(io.BytesIO(hub.files["validation/step-9.png"])) as image:
        assert image.getpixel((3, 3)) == (255, 0, 0)
        assert not image.info
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fault", ["500", "drop"])
def test_a_hub_that_stumbles_for_a_moment_is_tried_again(
    results: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], fault: str
) -> None:
    with HubServer(on_upload=lambda n: fault if n == 1 else "", on_commit=lambda n: fault if n == 1 else "") as hub:
        assert push(hub, monkeypatch, results) == 0
        assert set(hub.files) == SENT
        assert (hub.commits, hub.commit_requests) == (1, 2)
    assert waits


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    results: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    with HubServer(on_commit=lambda n: "lost" if n == 1 else "") as hub:
        assert push(hub, monkeypatch, results) == 0
        assert hub.commits == 1
        assert set(hub.files) == SENT


@pytest.mark.parametrize("fault", ["500", "drop"])
def test_a_hub_that_stays_down_ends_in_one_line_and_pushing_again_goes_on_where_it_ended(
    results: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    with HubServer() as hub:
        hub.on_upload = lambda n: fault if len(hub.stored) >= 1 else ""
        assert push(hub, monkeypatch, results, "--revision", "trial") == 2
        line = [text for text in capsys.readouterr().err.splitlines() if text.startswith("ambient-sd: error:")]
        assert len(line) == 1
        assert f"ambient-sd push {results} --repo owner/name --revision trial" in line[0]
        assert f"the results are whole in {results}" in line[0]
        assert TOKEN not in line[0]
        assert hub.commits == 0
        assert len(waits) > 3
        arrived = list(hub.stored)
        hub.on_upload = lambda n: ""
        assert push(hub, monkeypatch, results, "--revision", "trial") == 0
        assert hub.stored[: len(arrived)] == arrived
        assert len(hub.stored) == len(set(hub.stored)) == 3  # nothing was sent twice
        assert set(hub.branches["trial"]) == SENT
        assert not hub.files
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}


def test_a_commit_that_keeps_failing_ends_in_one_line_and_the_next_push_sends_no_part_again(
    results: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with HubServer(on_commit=lambda n: "500") as hub:
        assert push(hub, monkeypatch, results) == 2
        assert hub.commit_requests == 3
        assert waits == [1, 4]
        assert "ambient-sd push" in capsys.readouterr().err
        hub.on_commit = lambda n: ""
        assert push(hub, monkeypatch, results) == 0
        assert (hub.uploads, hub.commits) == (3, 1)


def test_a_refusal_is_not_tried_again(
    results: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with HubServer(on_commit=lambda n: "403") as hub:
        assert push(hub, monkeypatch, results) == 2
        assert hub.commit_requests == 1
    assert not waits
    assert "403" in capsys.readouterr().err


def test_private_creates_a_private_repository_and_refuses_a_public_one(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with HubServer() as hub:
        assert push(hub, monkeypatch, results, "--private") == 0
        assert hub.private
        assert hub.files
        assert push(hub, monkeypatch, results, "--private") == 0
    with HubServer() as hub:
        hub.exists = True
        assert push(hub, monkeypatch, results, "--private") == 2
        assert "owner/name exists already and is public" in capsys.readouterr().err
        assert not hub.objects
        assert not hub.files
        assert push(hub, monkeypatch, results) == 0  # negative control


@pytest.mark.parametrize(
    "repo", ["owner/na`me", "owner/name\n---", 'o/"+x+"', "o/<script>", "../name", "o/\u202ename", "o/" + "x" * 10_000]
)
def test_a_hostile_repository_name_is_one_line_and_nothing_is_created(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repo: str
) -> None:
    with HubServer() as hub:
        assert push(hub, monkeypatch, results, "--repo", repo) == 2
        assert not hub.exists
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_card_on_the_hub_has_its_name_and_follows_what_is_new(
    results: Path, tiny_base: Path, tiny_audit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(tiny_base / weights, results / weights)
    audit = AuditRecord.read(tiny_audit)
    write_card(results, dataclasses.replace(FACTS, fingerprint=audit.images["training"]["fingerprint"]))
    with HubServer() as hub:
        assert push(hub, monkeypatch, results, "--revision", "a/b") == 0
        first = hub.branches["a/b"]["README.md"].decode()
        assert "from_pretrained(\"owner/name\", revision='a/b')" in first
        assert "THIS_FOLDER" not in first
        assert is_ours(first)
        assert "has not been measured" in first
        shutil.copytree(tiny_audit, results / "audit")
        assert push(hub, monkeypatch, results, "--revision", "a/b") == 0
        second = hub.branches["a/b"]["README.md"].decode()
        assert "Verdict: passed" in second and str(audit.row(audit.verdict["measure"]).generated.value) in second
        assert set(hub.branches["a/b"]) == SENT  # nothing of the audit's folder, which holds training images


def test_a_page_edited_on_the_hub_stays_and_one_edited_here_goes(
    results: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with HubServer() as hub:
        assert push(hub, monkeypatch, results) == 0
        edited = hub.files["README.md"] + b"\nMy notes.\n"
        hub.files["README.md"] = edited
        (results / "model_index.json").write_text("{}")
        with caplog.at_level(logging.WARNING):
            assert push(hub, monkeypatch, results) == 0
        assert hub.files["README.md"] == edited
        assert json.loads(hub.files["model_index.json"]) == {}
        assert "was edited there and stays" in caplog.text
        (results / "README.md").write_text("---\nlicense: mit\n---\n# Mine, from THIS_FOLDER\n")
        assert push(hub, monkeypatch, results) == 0
        assert hub.files["README.md"] == b"---\nlicense: mit\n---\n# Mine, from owner/name\n"


def test_a_damaged_audit_or_image_uploads_no_half(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with HubServer() as hub:
        (results / "audit.json").write_text("{")
        assert push(hub, monkeypatch, results) == 2
        assert "audit.json cannot be read" in capsys.readouterr().err
        assert not hub.files
        (results / "audit.json").unlink()
        (results / "validation" / "step-9.png").write_bytes(b"no image")
        assert push(hub, monkeypatch, results) == 0
        assert set(hub.files) == SENT - {"validation/step-9.png"}


def test_no_setting_that_may_be_a_path_leaves_as_one(tmp_path: Path) -> None:
    from ambient_sd.reporting.publishing import _clean_settings
    from ambient_sd.training.config import TrainConfig

    texts = {"instance_prompt", "class_prompt", "trigger_word", "hub_token"}
    names = {item.name for item in dataclasses.fields(TrainConfig) if str(item.type) in ("str", "str | None") and not item.metadata["choices"]}  # fmt: skip
    (tmp_path / "train_config.yaml").write_text(yaml.safe_dump(dict.fromkeys(names - texts, "/home/me/place/x")))
    left = {key for key, value in yaml.safe_load(_clean_settings(tmp_path / "train_config.yaml")).items() if "/home" in value}  # fmt: skip
    no_paths = {"image_column", "caption_column", "dataset_split", "dataset_config_name", "revision", "variant", "aspect_ratio_buckets",
                "tracker_project_name", "hub_model_id", "caption_extension"}  # fmt: skip
    assert left <= no_paths
