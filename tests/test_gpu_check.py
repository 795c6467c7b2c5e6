"""The check of a GPU, tried without one: its settings are those of the package, and its script runs at toy size."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ambient_sd.guard.by_name import available

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_toy_training_fits_the_package(gpu_check: ModuleType, tmp_path: Path) -> None:
    ctx = gpu_check.Context("cpu", True, tmp_path, tmp_path / "found.json", time.monotonic() + 60)
    assert gpu_check.environment(ctx)[0] == "pass"
    assert json.loads((tmp_path / "found.json").read_text())["versions"]["torch"] == torch.__version__
    assert set(gpu_check.POLICIES) <= set(available())
    settings = gpu_check.config(ctx, "lora", **gpu_check.KINDS["lora"], max_train_steps=1, max_train_samples=2)
    record = gpu_check.train(settings)
    assert record.steps == 1 and gpu_check.distance(gpu_check.weights_of(settings), gpu_check.weights_of(settings)) == 0
    assert gpu_check.apart([1.0, 2.0], [1.0, 2.1]) > 0.04


@pytest.mark.slow
def test_every_check_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--size", "toy", "--budget", "1200", "--out", out], check=True
    )
    verdicts = {name: one["verdict"] for name, one in json.loads(out.read_text())["checks"].items()}
    assert verdicts.pop("compiled") == "skipped"
    assert set(verdicts.values()) <= {"pass", "look", "cut"}, verdicts
