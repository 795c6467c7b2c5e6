"""What the README tells people to type works as written; `test_docs.py` parses the commands of every page."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_more
from pretend_gpu import pretend_gpu

from ambient_sd.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def launches() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("accelerate launch")]


def guarding() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("ambient-sd ")]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone to the commands, with a user's images in it."""
    for name in ("ambient_sd", "configs", "prompts", "train_text_to_image_ambient.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny.tiny_folder(tmp_path / "my-images", count=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_has_the_commands_that_are_tested_here() -> None:
    assert len(launches()) == 4
    assert len(guarding()) == 5
    assert len(blocks("python")) == 2


@pytest.mark.parametrize("code", blocks("python"), ids=["ten-lines", "own-trainer"])
def test_python_blocks_run(code: str, clone: Path) -> None:
    exec(compile(code, "README.md", "exec"), {})
    if "apple.png" in code:
        assert (clone / "apple.png").stat().st_size > 0


def test_python_block_runs_on_a_gpu(clone: Path) -> None:
    with pretend_gpu() as gpu:
        found: dict[str, Any] = {}
        code = blocks("python")[0]
        short = code.replace("steps=20", "steps=2").replace("target=3.0", "target=3.0, max_steps=1")
        short = short.replace('pipe("red apple", ', 'pipe("red apple", num_inference_steps=2, ')
        assert short.count("steps=2)") + short.count("steps=2,") == 2 and "max_steps=1" in short
        exec(compile(short, "README.md", "exec"), found)
        assert found["pipe"].unet.device.type == "cuda"
    assert gpu.waits["device to host"] > 0


@pytest.mark.parametrize("words", launches(), ids=lambda words: words[words.index("--output_dir") + 1])
def test_training_commands_run(
    words: list[str], clone: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, but for one step and, where the base would come from the hub, a tiny base."""
    assert words[2] == "train_text_to_image_ambient.py"
    small = "--max_train_steps 1 --train_batch_size 1 --gradient_accumulation_steps 1"
    if "configs/z-image-lora.yaml" in words:
        tiny_base = clone / "base"
        tiny_more.tiny_z_image_pipeline().save_pretrained(tiny_base)
    if "--config" in words:
        small += f" --pretrained_model_name_or_path {tiny_base} --resolution 32"
    monkeypatch.setattr(sys, "argv", [*words[2:], *small.split()])
    runpy.run_path(words[2], run_name="__main__")
    assert "1 steps in" in capsys.readouterr().out
    out = clone / words[words.index("--output_dir") + 1]
    assert (out / "train_config.yaml").is_file()
    assert (out / "model_index.json").is_file() or (out / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(w, id=w[1] + w[-1], marks=[pytest.mark.slow] if w[1] in ("audit", "train") else [])
        for w in guarding()
    ],
)
def test_commands_run(words: list[str], clone: Path, tiny_base: Path) -> None:
    """As written, but with fewer steps and images, and a tiny base in place of one on the hub."""
    if words[1] == "train":
        words = [str(tiny_base) if word.startswith("sd2-community/") else word for word in words]
        main([*words[1:], "--max_train_steps", "1", "--train_batch_size", "1"])
        assert (clone / words[-1] / "audit" / "audit.html").is_file()
        return
    few = "--num_prompts 2 --num_images_per_prompt 1 --features pixels --attributed_prompts 0"
    fewer = {"calibrate": ["--num_images_per_prompt", "1"], "audit": few.split()}.get(words[1], [])
    main([*words[1:], *fewer, "--num_inference_steps", "2", "--batch_size", "4"])
    assert any((clone / words[-1]).iterdir())


def test_make_knows_the_targets_that_the_readme_names() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE))
    assert named and named <= targets
    assert {"demo", "test"} <= targets
