"""Whole commands on a pretended GPU: every network is on it, samples are drawn in bfloat16, and float32 gives the CPU's images."""

from __future__ import annotations

import json
import os
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import PartialState
from PIL import Image
from pretend_gpu import PretendGPU, pretend_gpu

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.cli import main
from ambient_sd.commands.demo import work
from ambient_sd.data.sources import load_rows
from ambient_sd.sampling import SamplingConfig, generate, load_pipeline, requests_for


def on_gpu(words: list[str]) -> PretendGPU:
    with pretend_gpu() as gpu:
        main(words)
    return gpu


def test_samples_in_float32_are_the_cpus(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sample",
        str(tiny_base),
        "--prompt",
        "a cat",
        "a dog",
        "--num_images_per_prompt",
        "2",
        "--num_inference_steps",
        "2",
    ]
    on_gpu([*words, "--dtype", "float32", "--out", str(tmp_path / "gpu")])
    assert "in float32 on pretended GPU" in capsys.readouterr().out
    main([*words, "--out", str(tmp_path / "cpu")])
    assert "pretended GPU" not in capsys.readouterr().out
    names = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.png"))
    assert len(names) == 5  # and the sheet
    for name in names:
        assert Image.open(tmp_path / "gpu" / name).tobytes() == Image.open(tmp_path / "cpu" / name).tobytes(), name


def test_sampling_is_in_bfloat16_on_a_gpu(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu(["sample", str(tiny_base), "--prompt", "a cat", "--num_inference_steps", "2", "--out", str(tmp_path)])
    assert "in bfloat16 on pretended GPU" in capsys.readouterr().out
    with pretend_gpu():
        assert SamplingConfig("m").dtype == "bfloat16"
        assert SamplingConfig("m", device="cpu").dtype == SamplingConfig("m", dtype="float32").dtype == "float32"
    assert SamplingConfig("m").dtype == "float32"


def numbers(value: Any) -> list[float]:
    """Return the numbers in what JSON holds, in order."""
    if isinstance(value, dict | list):
        return [x for one in (value.values() if isinstance(value, dict) else value) for x in numbers(one)]
    return [float(value)] if isinstance(value, int | float) else []


def test_audit_on_a_gpu_finds_what_the_cpus_does(
    tiny_base: Path, tiny_images: Path, tiny_audit: Path, tmp_path: Path
) -> None:
    heldout = tiny_audit.parent / "heldout"
    gpu = on_gpu(["audit", str(tiny_base), str(tiny_images), "--heldout", str(heldout), "--out", str(tmp_path / "audit"), "--features", "pixels,edges",
                  "--max_prompts", "2", "--samples_per_prompt", "2", "--num_inference_steps", "2", "--attributed_prompts", "1",
                  "--dtype", "float32", "--fail-over", "0.99"])  # fmt: skip
    here, there = (json.loads((folder / "audit.json").read_text()) for folder in (tiny_audit, tmp_path / "audit"))
    assert there["finding"] == here["finding"] and there["made"]["device"] == "cuda"
    assert numbers(there["measures"]) == pytest.approx(numbers(here["measures"]), rel=1e-3, abs=1e-4)
    assert gpu.waits["device to host"] > 0


@pytest.mark.slow
def test_compare_runs_on_a_gpu(tmp_path: Path) -> None:
    rows = sorted(list(load_rows(IMAGES, split="finetune"))[::100], key=lambda row: row.caption)
    images, captions = [row.image for row in rows], [row.caption for row in rows]
    how = ["--resolution", "64", "--num_inference_steps", "2"]
    settings = SamplingConfig(str(BASE), scheduler="dpm++", num_inference_steps=2, resolution=64, batch_size=16)
    made = [one for batch in generate(load_pipeline(settings), requests_for(captions, 2), settings) for one in batch]
    images[:3] = [made[2 * i].image for i in range(3)]  # what the base makes of a caption, it has memorized
    folder = tiny.image_folder(tmp_path / "images", images, captions)
    gpu = on_gpu(["compare", f"a={BASE}", "--data", str(folder), "--heldout", str(folder), "--judge", str(BASE), *how, "--generations", "2",
                  "--mitigated", "2", "--mitigations", "STP", "--out", str(tmp_path / "out")])  # fmt: skip
    assert list(json.loads((tmp_path / "out" / "comparison.json").read_text())["models"]["a"]["mitigations"]) == [
        "none",
        "STP",
    ]
    assert gpu.waits["device to host"] > 0


class _Here(Executor):
    """Does what it is given at once: another process would not see the GPU."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, job: Any, /, *given: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(job(*given, **named))
        return done


@pytest.mark.slow
def test_demo_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ProcessPoolExecutor", _Here)
    few = {"max_samples": 24}
    monkeypatch.setattr(work, "load_rows", lambda *args, **options: load_rows(*args, **options, **few))
    devices: list[str] = []
    real = work.train
    monkeypatch.setattr(
        work, "train", lambda config, **k: (devices.append(str(PartialState().device)), real(config, **k))[1]
    )
    gpu = on_gpu(["demo", "--output_dir", str(tmp_path / "out"), "--steps", "1", "--num_prompts", "4", "--num_images_per_prompt", "1",
                  "--num_inference_steps", "2"])  # fmt: skip
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert {name: rows["copies"]["generated"]["n"] for name, rows in figures["runs"].items()} == {
        "plain": 4,
        "distill": 4,
        "ambient": 4,
        "base": 4,
    }
    assert (tmp_path / "out" / "report.html").exists() and devices == ["cuda"] * 3
    assert gpu.waits["device to host"] > 0


@pytest.mark.parametrize("command", ["level", "calibrate"])
def test_command_runs_on_a_gpu(command: str, tiny_base: Path, tiny_images: Path, tmp_path: Path) -> None:
    (tmp_path / "ordinary.txt").write_text("\n".join(f"image {i}" for i in range(4)))
    words: dict[str, list[str]] = {
        "level": [str(tiny_images), "--model", str(tiny_base), "--resolution", "32"],
        "calibrate": [str(tiny_base), "--ordinary", str(tmp_path / "ordinary.txt"), "--num_inference_steps", "2", "--generations", "1", "--out", str(tmp_path / "out")],
    }  # fmt: skip
    gpu = on_gpu([command, *words[command]])
    assert gpu.waits["device to host"] > 0, "its networks stayed on the CPU"


def test_no_gpu_is_seen_by_tests() -> None:
    hidden = os.environ.get("AMBIENT_SD_TEST_GPU") != "1"
    assert not hidden or (os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available())
