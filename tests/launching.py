"""A script or a module on one process or two, as `accelerate launch` starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(processes: int, script: Path, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return launch_words(processes, [str(script), json.dumps(settings)])


def launch_words(processes: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Launch `script.py arguments` or `-m module arguments`."""
    start = [sys.executable, "-m", "accelerate.commands.launch"] if processes == 2 else [sys.executable]
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"] if processes == 2 else []
    return subprocess.run(
        [*start, *options, *words], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
