"""A calibrated threshold goes to the hub with its model, and the card says from which score an image is flagged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import guard_calibration
import pytest
from hub_server import HubServer, reach

from ambient_sd.guard.calibration import FILE_NAME, AnisotropyTerms, Calibration
from ambient_sd.guard.pipeline import threshold_file
from ambient_sd.reporting.model_card import Facts, make_card
from ambient_sd.reporting.publishing import collect
from ambient_sd.utils.errors import UserError


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    out = shutil.copytree(tiny_base, tmp_path / "out")
    guard_calibration.calibration().save(out)
    return out


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = dict(
        base="tiny-base", base_id=None, licence={"license": "openrail++"}, objective="ambient", prediction_type="v_prediction",
        level=1.0, distill_level=None, timestep=353.4, timesteps=1000, gap_upper=None, reweight=2, pipeline="AmbientSDPipeline", vae=None, lora=None, averaged=False,
        steps=20, batch=4, learning_rate=1e-4, lr_scheduler="constant", resolution=32, images=8, distinct=7, groups=1,
        grouped=3, captioned=6, fingerprint="ab" * 32, dataset=None, prompts=[], finished=0.0,
    )  # fmt: skip
    return Facts(**{**values, **changes})


def test_threshold_goes_with_the_model_and_the_scores_stay(folder: Path) -> None:
    (folder / "memorization_scores.jsonl").write_text("{}\n")
    sent = collect(folder, "owner/name")
    assert sent[FILE_NAME] == (folder / FILE_NAME).read_bytes() and "memorization_scores.jsonl" not in sent
    assert Calibration.load(folder).threshold(20, 1) == 1.5
    other = guard_calibration.calibration(anisotropy=AnisotropyTerms(1.0, 2.0, 41)).save(folder)
    sent = collect(folder, "owner/name")
    assert sent[other.name] == other.read_bytes() and sent[FILE_NAME] == (folder / FILE_NAME).read_bytes()
    shutil.copy(other, folder / FILE_NAME)  # under the other's name
    with pytest.raises(UserError, match="of the detector anisotropy"):
        collect(folder, "owner/name")
    (folder / FILE_NAME).write_text('{"path": "/home/someone"}')
    with pytest.raises(UserError, match="cannot be read"):
        collect(folder, "owner/name")


def test_card_names_the_threshold_and_leaves_out_one_of_earlier_weights(folder: Path) -> None:
    said = make_card(facts(), folder)
    assert "from a score of 1.5 over the whole run" in said and "500 ordinary prompts" in said and "20 steps" in said
    later = os.stat(folder / FILE_NAME).st_mtime + 60
    assert "from a score" not in make_card(facts(finished=later), folder)
    (folder / FILE_NAME).unlink()
    assert "from a score" not in make_card(facts(), folder)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [("sampling", "guidance_scale", "x"), ("sampling", "guidance_scale", None), ("sampling", "height", 3.5), ("sampling", "sampler", 7),
     ("sampling", "sampler_settings", []), ("entry", "rate", None), ("entry", "rate", {"value": 0.1, "low": "x", "high": 1.0, "n": 5}), ("entry", "value", float("nan"))],
)  # fmt: skip
def test_a_damaged_threshold_is_one_line_and_not_half_a_card(folder: Path, place: str, key: str, value: Any) -> None:
    given = json.loads((folder / FILE_NAME).read_text())
    for part in given["entries"] if place == "entry" else [given["sampling"]]:
        part[key] = value
    (folder / FILE_NAME).write_text(json.dumps(given))
    with pytest.raises(UserError, match="cannot be read"):
        make_card(facts(), folder)
    (folder / FILE_NAME).write_text("[" * 10**5)
    with pytest.raises(UserError, match="nested too deeply"):
        make_card(facts(), folder)


def test_the_pipeline_finds_a_threshold_on_the_hub_and_takes_a_model_without_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as hub:
        reach(monkeypatch, hub.url, tmp_path)
        hub.exists = True
        hub.branches["main"] = {FILE_NAME: (folder / FILE_NAME).read_bytes()}
        found = threshold_file("owner/name", {"revision": "main"})
        assert found is not None and Calibration.load(found).threshold(1, 4) == 2.5
        assert threshold_file("owner/other", {}) is None
