"""configs/accelerate: every file is one that accelerate reads, and the one for two processors runs two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

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
