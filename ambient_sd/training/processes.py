"""How a run ends before its time: one line for Ctrl-C, for the death of another process, and for processes that differ.

Gloo notices a closed connection and raises. NCCL often does not, and where its time is over torch aborts the process without an
exception; the launcher ends what is left on its machine. None of them says what to do. So processes also tell each other that they live, over the
store through which they met, and what they are at: a thread of each ends it in one line when another is silent, has failed, or is missed for
as long as torch's own limit allows. That limit must be longer than the first process needs to write a checkpoint while the others wait.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

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
    "Timed out waiting",
)
LIMIT = timedelta(minutes=30)  # torch's, for one call to all processes
_BEAT, _SILENT, _GRACE = 5.0, 60.0, 20.0  # seconds; failures speak for themselves first (`exits_on_user_error`)
_MISSED = LIMIT.total_seconds() - 60.0

SCRIPT_NAME = "train_text_to_image_ambient.py"
_TICK = 0.1  # s: the clock of files lags behind the clock of the day by some milliseconds
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
    """End with one line that says how to resume where another process of the run has ended, fallen silent or is missed.

    What only a thread can see, while the main one waits in a call that nothing interrupts, ends this process with status 2. Older versions of
    torch, whose stores cannot be cloned, are left to their own limit.

    Raises:
        UserError: the death of another process raised an error here.

    Example:
        >>> with report_peer_failure():
        ...     loss = 0.5  # a step of the run
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    watch = (
        _Watch()
        if several and torch.distributed.get_world_size() > 1 and hasattr(torch.distributed.Store, "clone")
        else None
    )
    left = "failed"
    try:
        yield
        left = "done"
    except RuntimeError as error:
        if not several or not any(sign in str(error) for sign in _SIGNS):
            raise
        raise _lost(str(error)[:200]) from error
    finally:
        if watch is not None:
            watch.end(left)


def _lost(rule: str) -> UserError:
    return UserError(
        f"process {torch.distributed.get_rank()} has lost another process of this run, and ends", rule=rule,
        remedy="the other's own message, or its machine, says why; then resume with --resume_from_checkpoint latest",
    )  # fmt: skip


class _Watch:
    """Tell the other processes of a run that this one lives and how many calls to all it has made; end it where they do not."""

    def __init__(self) -> None:
        self.rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.others = [rank for rank in range(ranks) if rank != self.rank]
        # A connection of its own: on the process group's the main thread may wait for minutes.
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        self.store = store.clone()
        self.group: Any = torch.distributed.group.WORLD
        self.ended = threading.Event()
        self._tell("0")
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self, left: str) -> None:
        """Stop watching, and tell the others why."""
        self.ended.set()
        with contextlib.suppress(RuntimeError):
            self._tell(left)

    def _tell(self, text: str) -> None:
        self.store.set(f"ambient_sd/{self.rank}", text)

    def _exchange(self, beat: int) -> tuple[int, dict[int, str]]:
        """Tell this process's calls, and return them and what the others told last; nothing while one has yet to begin."""
        calls = self.group._get_sequence_number_for_group()
        self._tell(f"{calls} {beat}")
        keys = [f"ambient_sd/{rank}" for rank in self.others]
        told = self.store.multi_get(keys) if self.store.check(keys) else []
        return calls, {rank: text.decode() for rank, text in zip(self.others, told, strict=False)}

    def _watch(self) -> None:
        since: dict[Any, float] = {}  # what was seen: when it was seen first
        with ThreadPoolExecutor(1) as pool:
            for beat in itertools.count(1):
                if self.ended.wait(_BEAT):
                    return
                try:
                    calls, told = pool.submit(self._exchange, beat).result(_SILENT)
                except (
                    RuntimeError,
                    TimeoutError,
                ) as error:  # the store is a part of the first process, or of its launcher
                    self._end(f"the first process or its machine cannot be reached: {type(error).__name__}")
                    continue
                now, before = time.monotonic(), since
                since = {
                    seen: before.get(seen, now)
                    for rank, text in told.items()
                    for seen in ((rank, text), (rank, text.split()[0], calls))
                }
                for rank, text in told.items():
                    theirs = text.split()[0]
                    if theirs == "failed":
                        self._end(f"process {rank} has failed")
                    elif theirs != "done" and now - since[rank, text] > _SILENT:
                        self._end(f"process {rank} was last heard of {_SILENT:g} s ago")
                    elif theirs.isdigit() and int(theirs) < calls and now - since[rank, theirs, calls] > _MISSED:
                        self._end(f"process {rank} has been waited for for {_MISSED / 60:g} minutes")

    def _end(self, rule: str) -> None:
        """End the process, unless the main thread comes to an end by itself."""
        if not self.ended.wait(_GRACE):
            print(f"ambient-sd: error: {_lost(rule)}", file=sys.stderr, flush=True)
            os._exit(2)


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
    newest = next((p for p in whole if config.resume_from_checkpoint or p.stat().st_mtime >= begun - _TICK), None)
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
