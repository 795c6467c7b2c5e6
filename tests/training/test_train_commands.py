"""The commands that config headers print, and the script itself: they run, and a mistake costs one line and status 2."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import tiny_more
import yaml
from diffusers import DiffusionPipeline

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# What a tiny run needs to be tiny; everything else comes from the file under test.
TINY = "--resolution 32 --train_batch_size 2 --gradient_accumulation_steps 1 --max_train_steps 1 --learning_rate 1e-4"

BASES = {
    "sdxl-lora": tiny.tiny_sdxl_pipeline, "sd35-lora": tiny_flow.tiny_sd3_pipeline, "flux-lora": tiny_flow.tiny_flux_pipeline,
    "flux2-klein-lora": tiny_flow.tiny_klein_pipeline, "z-image-lora": tiny_more.tiny_z_image_pipeline,
    "qwen-image-lora": tiny_more.tiny_qwen_image_pipeline, "emoji-sd3": tiny_flow.tiny_sd3_pipeline,
}  # fmt: skip


def header_commands(config: Path) -> list[str]:
    """The commands in a config's opening comment."""
    head = [line[1:] for line in config.read_text().splitlines() if line.startswith("#")]
    return [m[1] for line in head if (m := re.search(r"(accelerate launch .*)", line))]


def tiny_arguments(command: str, base: Path, images: Path, out: Path) -> list[str]:
    """The script's arguments of a command, with a tiny model, few images and another output folder."""
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "train_text_to_image_ambient.py"]
    settings = yaml.safe_load(Path(ROOT / words[words.index("--config") + 1]).read_text())
    own = "my-images" in words or {"row_filter", "dataset_split"} & set(settings)  # of the file's own images
    data = [] if own else ["--train_data_dir", str(images)]
    words = [str(images) if w == "my-images" else w for w in words[3:]]
    return [*words, "--pretrained_model_name_or_path", str(base), *data, *TINY.split(), "--output_dir", str(out)]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train_text_to_image_ambient.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_configs_and_each_says_what_it_is() -> None:
    assert {"sd2-full.yaml", "sd2-lora.yaml", "sd15-lora.yaml", "sdxl-lora.yaml"} <= {c.name for c in CONFIGS}
    for config in CONFIGS:
        assert "Needs:" in config.read_text(), config.name
        assert header_commands(config), config.name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_the_command_in_a_config_header_runs(
    config: Path, tiny_base: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(config.read_text())
    data = settings["train_data_dir"]
    if data != "my-images" and not Path(data).exists():
        pytest.skip(f"{data} is not built yet")
    if config.stem in BASES:
        tiny_base = tmp_path / "base"
        BASES[config.stem]().save_pretrained(tiny_base)
    if settings.get("quantize_base"):
        pytest.importorskip("bitsandbytes")
    for command in header_commands(config):
        monkeypatch.setattr(sys, "argv", ["train", *tiny_arguments(command, tiny_base, tiny_images, tmp_path / "out")])
        script().main()
    assert "1 steps in" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").is_file()
    saved = yaml.safe_load((tmp_path / "out" / "train_config.yaml").read_text())
    assert saved["objective"] == settings["objective"]
    pipe = DiffusionPipeline.from_pretrained(tiny_base if settings.get("lora") else tmp_path / "out")
    if settings.get("lora"):
        pipe.load_lora_weights(tmp_path / "out")


@pytest.mark.slow
def test_accelerate_launch_runs_the_script(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> None:
    command = header_commands(ROOT / "configs" / "sd2-lora.yaml")[0]
    arguments = tiny_arguments(command, tiny_base, tiny_images, tmp_path / "out")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "train_text_to_image_ambient.py"]
    done = subprocess.run(
        [*launch, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 steps in" in done.stdout
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "out" / "validation" / "step-1.png").is_file()
    noise = ("Traceback", "torchvision", "float32: []", "Token indices", "truncated", "Warning")
    assert [line for line in done.stderr.splitlines() if any(word in line for word in noise)] == []
    assert done.stderr.count("\nimages     8 at 32 px") + done.stderr.count("\rimages     8 at 32 px") == 1


def test_script_ends_with_the_copies_that_the_probe_found(
    tiny_base: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = f"--pretrained_model_name_or_path {tiny_base} --train_data_dir {tiny_images} --lora --probe_steps 1 --probe_images 2"
    monkeypatch.setattr(sys, "argv", ["train", *words.split(), *TINY.split(), "--output_dir", str(tmp_path / "out")])
    script().main()
    said = capsys.readouterr().out
    assert re.search(r"\nlast evaluation, step 1: \d+% of 2 images are copies \[\d+%, \d+%\]\n", said), said
    assert said.endswith(f"results in {tmp_path / 'out'}\n")


def test_hub_is_asked_before_training_and_pushed_to_after(
    tiny_base: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ambient_sd.commands.train import work

    calls: list[tuple[str, bool]] = []
    card = tmp_path / "out" / "README.md"
    monkeypatch.setattr(work, "prepare", lambda repo, **_: calls.append((f"prepare {repo}", card.exists())))
    monkeypatch.setattr(work, "push", lambda folder, repo, **_: calls.append((f"push {repo}", card.exists())))
    words = f"--pretrained_model_name_or_path {tiny_base} --train_data_dir {tiny_images} --lora --push_to_hub --hub_model_id me/it"
    monkeypatch.setattr(sys, "argv", ["train", *words.split(), *TINY.split(), "--output_dir", str(tmp_path / "out")])
    script().main()
    assert calls == [("prepare me/it", False), ("push me/it", True)]


def test_a_mistake_costs_one_line_and_status_two(
    tiny_base: Path,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = f"--pretrained_model_name_or_path {tiny_base} --train_data_dir {tiny_images} --ambient_level 99 --output_dir {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", ["train", *words.split()])
    with pytest.raises(SystemExit) as stop:
        script().main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "ambient_level is 99" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nothing_else_is_said_by_a_process(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> None:
    arguments = f"--pretrained_model_name_or_path {tiny_base} --train_data_dir {tiny_images} --ambient_level 99"
    done = subprocess.run(
        [sys.executable, "train_text_to_image_ambient.py", *arguments.split(), "--output_dir", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "ambient_level is 99" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_prompt_file_is_as_its_readme_says() -> None:
    rows = [json.loads(line) for line in (ROOT / "prompts" / "validation.jsonl").read_text().splitlines()]
    assert all(isinstance(row["prompt"], str) for row in rows)
    assert f"| `validation.jsonl` | {len(rows)} |" in (ROOT / "prompts" / "README.md").read_text()
