"""A script or a module on one process or two, with the variables that `accelerate launch` sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Imports once and forks a process for each rank, where the launcher would import everything three times.
_FORK = """
import os, runpy, socket, sys, traceback
import torch
import ambient_sd.training.loop

torch.set_num_threads(1)
processes, sys.argv = int(sys.argv[1]), sys.argv[2:]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
children = []
for rank in range(processes):
    children.append(os.fork())
    if children[-1] == 0:
        code = 1
        try:
            if processes > 1:
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
            if sys.argv[0] == "-m":
                del sys.argv[0]
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(max(map(abs, codes)))
"""


def launch(processes: int, script: Path, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return launch_words(processes, [str(script), json.dumps(settings)])


def launch_words(processes: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Launch `script.py arguments` or `-m module arguments`."""
    return subprocess.run(
        [sys.executable, "-c", _FORK, str(processes), *words], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
