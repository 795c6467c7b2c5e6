"""How a run ends before its time: one line for Ctrl-C, for the death of another process, and for processes that differ.

Gloo and NCCL notice a closed connection and raise; the launcher ends what is left on its machine. Neither says what to do. A
process that hangs without dying is noticed by torch's time limit only (10 minutes under NCCL, 30 under gloo): it must be
longer than the first process needs to write a checkpoint while the others wait.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate import Accelerator

from ambient_sd.training import checkpoints
from ambient_sd.training.config import CONFIG_NAME, TrainConfig
from ambient_sd.utils.errors import Interrupted, UserError

_SIGNS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "ncclSystemError",
    "remote process exited",
)


SCRIPT_NAME = "train_text_to_image_ambient.py"
_LAUNCHERS = ("accelerate", "accelerate.commands.launch", "torchrun", "torch.distributed.run")


def is_first() -> bool:
    """Tell whether this process is the one that speaks, before and after accelerate is set up.

    Example:
        >>> is_first()
        True
    """
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def report_peer_failure() -> Iterator[None]:
    """Turn the error that the death of another process raises here into one line that says how to resume.

    Raises:
        UserError: another process of the run has died.

    Example:
        >>> with report_peer_failure():
        ...     loss = 0.5  # a step of the run
    """
    try:
        yield
    except RuntimeError as error:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not several or not any(sign in str(error) for sign in _SIGNS):
            raise
        raise UserError(
            f"process {torch.distributed.get_rank()} has lost another process of this run, and ends",
            rule=str(error)[:200],
            remedy="the other's own message, or its machine, says why; then resume with --resume_from_checkpoint latest",
        ) from error


def check_same_images(fingerprint: str, accelerator: Accelerator) -> None:
    """Compare the images of all processes: another key of the same image would be a second noise.

    Raises:
        UserError: they decode different images.

    Example:
        >>> from types import SimpleNamespace
        >>> check_same_images("00ff", SimpleNamespace(num_processes=1))  # there is nobody to differ from
    """
    if accelerator.num_processes == 1:
        return
    mine = torch.tensor([list(bytes.fromhex(fingerprint))], device=accelerator.device)
    if bool((accelerator.gather(mine) != mine).any()):
        raise UserError(
            "the processes of this run decode different images",
            rule="an image must have one key, hence one noise, everywhere",
            remedy="give every machine the same files and the same version of Pillow",
        )


@contextlib.contextmanager
def interruptible(config: TrainConfig) -> Iterator[None]:
    """End a run on SIGINT (Ctrl-C) and SIGTERM with one line: the newest checkpoint and the command that resumes.

    Raises:
        Interrupted: one of the signals came; on processes other than the first its text is empty.

    Example:
        >>> import tempfile
        >>> with interruptible(TrainConfig("base-model", train_data_dir="my-images", output_dir=tempfile.mkdtemp())):
        ...     loss = 0.5  # the run
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    owner, begun, got = os.getpid(), time.time(), list[int]()

    def stop(number: int, _: FrameType | None) -> None:
        # The launcher repeats the signal: what ends the run must not be interrupted itself. A worker of the data loader
        # inherits this handler, and ends by its own.
        if os.getpid() != owner or not got:
            got.append(number)
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        number = got[0] if got else signal.SIGINT
        raise Interrupted(_how_to_resume(config, begun) if is_first() else "", status=128 + number) from None
    except Exception:
        # Another process ended first, and the connection broke in the middle of being interrupted.
        if not got:
            raise
        raise Interrupted(_how_to_resume(config, begun) if is_first() else "", status=128 + got[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_to_resume(config: TrainConfig, begun: float) -> str:
    folder = Path(config.output_dir)
    whole = (p for p in reversed(checkpoints.find_all(folder)) if checkpoints.damage(p) is None)
    # A run that does not resume may not have reached the checkpoints that it is told to overwrite.
    newest = next((p for p in whole if config.resume_from_checkpoint or p.stat().st_mtime >= begun), None)
    if newest is None:
        return (
            f"interrupted before the first checkpoint in {folder}; nothing can be resumed: run the same command again"
        )
    resume = ["--config", str(folder / CONFIG_NAME), "--resume_from_checkpoint", "latest"]
    return f"interrupted; the newest checkpoint is {newest}; resume with: {shlex.join([*_started_by(), *resume])}"


def _started_by() -> list[str]:
    """Return the words of the command that started this script, without its arguments; none inside another program."""
    script = sys.argv[0]
    if Path(script).name != SCRIPT_NAME:
        return []
    parent = psutil.Process().parent()
    words = [] if parent is None else parent.cmdline()
    launched = any(Path(word).name in _LAUNCHERS or word in _LAUNCHERS for word in words)
    if not launched or script not in words:
        return ["python", script]
    words = words[: words.index(script) + 1]
    # An interpreter and the file of a console script: its name is what was typed.
    return [Path(words[1]).name, *words[2:]] if Path(words[1]).name in _LAUNCHERS else ["python", *words[1:]]
