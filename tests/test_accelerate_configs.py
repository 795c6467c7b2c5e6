"""configs/accelerate: every file is one that accelerate reads, and the one for two processors runs two processes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from ambient_sd.training import sharding
from ambient_sd.training.config import parse

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_accelerate_reads_the_file_and_takes_every_key(path: Path) -> None:
    settings = load_config_from_file(str(path))  # raises for a key that it does not know
    assert settings.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert f"configs/accelerate/{path.name}" in path.read_text(), "its header gives the command"


def test_the_file_for_two_processors_starts_two(tmp_path: Path) -> None:
    script = tmp_path / "count.py"
    script.write_text(  # one write a line: the two share a pipe
        "from accelerate import Accelerator\ns = Accelerator()\n"
        "print(f'process {s.process_index} of {s.num_processes}\\n', end='', flush=True)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/two_cpu.yaml"),
               "--main_process_port", "0", str(script)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True,
                          env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("process")) == [
        "process 0 of 2",
        "process 1 of 2",
    ]


@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
def test_the_commands_of_a_spread_models_file_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (
        ("ACCELERATE_USE_FSDP", "true"),
        ("FSDP_VERSION", "2"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ):
        monkeypatch.setenv(variable, value)
    commands = re.findall(
        r"train_text_to_image_ambient.py (--config .*)", (ROOT / f"configs/accelerate/{name}.yaml").read_text()
    )
    assert commands
    for words in commands:
        sharding.check(parse([*shlex.split(words), "--train_data_dir", "my-images"]))
