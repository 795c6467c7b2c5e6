"""Kill a training run over and over, resume it each time, and compare all that it leaves with a run that was left alone.

    python tools/torture.py --kills 50 --use_ema

Both runs train a tiny random U-Net on the processor, deterministically. The kills are SIGKILLs at random moments: by the
clock, after a step, while a checkpoint or the results are being written, and right before a call by which a file reaches the
disk, changes its name or goes. Compared by bytes: weights, optimizer, moving
average and state in the checkpoints, losses.jsonl, the results, the summary. The process that starts the runs has imported
everything and forks one process (or two that train together) per attempt, hence tens of kills a minute. It does not pull
the plug: what the system has not yet written to the disk outlives a SIGKILL.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Threads do not survive a fork, and one is the quickest on networks this small.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import yaml

PATIENCE = 300  # seconds without an end after which an attempt is a failure
OWN = {"output_dir", "resume_from_checkpoint"}  # settings in which the two runs differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the training's is fixed")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--sharded", action="store_true", help="two processes that each hold their part of the U-Net (FSDP2)"
    )
    args = parser.parse_args()
    if args.sharded:
        args.processes = 2
        spread_models()
    with tempfile.TemporaryDirectory(prefix="torture-") as work:
        return torture(Path(work), args)


def torture(work: Path, args: argparse.Namespace) -> int:
    """Run both, print what was done and found, and return the exit status."""
    import tiny
    import torch

    from ambient_sd.training import loop  # noqa: F401  (children find it imported)

    torch.set_num_threads(1)
    tiny.tiny_pipeline().save_pretrained(work / "base")
    tiny.tiny_folder(work / "images")
    draw = random.Random(args.seed)
    # Even, so that the last step has a checkpoint. Three per batch of eight: no checkpoint lies at the end of an epoch.
    steps = 2 * max(4, args.kills // 2)
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(work / "base"), "train_data_dir": str(work / "images"), "resolution": 32,
        "train_batch_size": 3, "gradient_accumulation_steps": args.accumulation, "max_train_steps": steps,
        "checkpointing_steps": 2, "checkpoints_total_limit": 2, "learning_rate": 1e-3, "lr_scheduler": "cosine",
        "lr_warmup_steps": 3, "report_to": "none", "lora": args.lora, "use_ema": args.use_ema,
        "lora_dropout": 0.2 if args.lora else None,
    }  # fmt: skip
    alone, killed = work / "alone", work / "killed"
    begin = time.monotonic()
    if wait(start(settings | {"output_dir": str(alone)}, args.processes), lambda: False):
        print(f"torture: the run that is left alone fails: {log(alone)}", file=sys.stderr)
        return 1
    usual = time.monotonic() - begin

    hits: collections.Counter[str] = collections.Counter()
    attempts = 0
    while True:
        done, last = sum(hits.values()), lines(killed)
        enough = done >= args.kills
        # The run must not end before the kills do: its share of steps is granted as they are dealt out.
        share = last + draw.randint(0, 2 * max(1, round((steps - last) / max(1, 0.9 * args.kills - done))))
        at_end = done >= 0.85 * args.kills
        kind = draw.choice(["end", "call"] if at_end else ["clock", "step", "saving", "call", "call"])
        moment = Moment(killed, kind, min(share, steps - 2), draw.uniform(0, 0.5 * usual), 10 ** draw.uniform(-4, -1))
        processes = start(
            settings | {"output_dir": str(killed), "resume_from_checkpoint": "latest"}, args.processes,
            call=round(10 ** draw.uniform(0, 1.8)) if kind == "call" and not enough else 0,
        )  # fmt: skip
        attempts += 1
        code = wait(processes, (lambda: False) if enough else moment, draw)
        if code == -signal.SIGKILL:
            hits[moment.where()] += 1
        elif code:
            print(f"torture: attempt {attempts}, after {done} kills, fails: {log(killed)}", file=sys.stderr)
            return 1
        elif enough:
            break
        if attempts > 4 * args.kills + 8:
            print(f"torture: {done} of {args.kills} kills after {attempts} attempts", file=sys.stderr)
            return 1
    found = differences(alone, killed)
    files, size = len(list(tree(alone))), sum(p.stat().st_size for _, p in tree(alone))
    print(f"{sum(hits.values())} kills over {steps} steps in {time.monotonic() - begin:.0f} s: "
          + ", ".join(f"{n} {what}" for what, n in sorted(hits.items())))  # fmt: skip
    print(f"{len(found)} differences in {files} files, {size / 1e6:.1f} MB" + "".join(f"\n  {d}" for d in found))
    return 1 if found else 0


class Moment:
    """Say when to kill: when something is seen in a run's folder, and a random while after it."""

    def __init__(self, folder: Path, kind: str, step: int, clock: float, later: float) -> None:
        self.folder, self.kind, self.step = folder, kind, step
        self.later = clock if kind == "clock" else later
        self.since: float | None = time.monotonic() if kind == "clock" else None
        self.begin = time.time()

    def __call__(self) -> bool:
        if self.since is None and self._seen():
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() - self.since >= self.later

    def _seen(self) -> bool:
        if self.kind == "call":
            return False  # the run does it itself
        if self.kind == "end":
            return self._new(".results.part")
        return lines(self.folder) >= self.step and (self.kind == "step" or self._new(".checkpoint-*.part"))

    def _new(self, pattern: str) -> bool:
        """Say whether this attempt made such a folder; an earlier one's may lie there still."""
        for path in self.folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= self.begin:
                    return True
        return False

    def where(self) -> str:
        """Say what a killed run was doing, by what it left."""
        if not lines(self.folder):
            return "before the first step"
        if any(self.folder.glob(".*.ambient-old")):
            return "between two names"
        if self._new(".results.part"):
            return "writing results"
        return "writing a checkpoint" if self._new(".checkpoint-*.part") else "elsewhere"


def start(settings: dict[str, Any], processes: int, call: int = 0) -> list[int]:
    """Fork one process per rank, each of which trains; return their numbers. The first dies at call number `call`, if any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            code = 1
            try:
                if processes > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
                if call and rank == 0:
                    die_at(call)
                train(settings, rank)
                code = 0
            except BaseException:  # whatever it is must not run on in a copy of the parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        ranks.append(child)
    return ranks


def spread_models() -> None:
    """Ask accelerate for what configs/accelerate/fsdp2.yaml says, as `accelerate launch` does."""
    file = Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp2.yaml"
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for key, value in yaml.safe_load(file.read_text())["fsdp_config"].items():
        os.environ[key.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS")] = str(value)


def die_at(call: int) -> None:
    """Let this process kill itself right before its n-th call that makes a file last, renames or removes it."""
    count = itertools.count(1)

    def mined(real: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **options: Any) -> Any:
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return instead

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, mined(getattr(os, name)))


def train(settings: dict[str, Any], rank: int) -> None:
    """Train, and write the summary's losses beside the run's folder."""
    from ambient_sd.training.config import TrainConfig
    from ambient_sd.training.loop import run

    out = settings["output_dir"]
    to = os.open(f"{out}.log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 2), os.dup2(to, 1)
    summary = run(TrainConfig(**settings), progress=False)
    if rank == 0:
        kept = {"steps": summary.steps, "losses": summary.losses, **summary.means}
        Path(f"{out}.summary").write_text(json.dumps(kept))


def wait(ranks: list[int], moment: Callable[[], bool], draw: random.Random | None = None) -> int:
    """Wait until all ranks have ended, killing one (and then the rest) at the moment; return 0, -SIGKILL or a failure."""
    codes: dict[int, int] = {}
    begin, killed, late = time.monotonic(), False, False
    while len(codes) < len(ranks):
        for rank in ranks:
            if rank not in codes and (status := os.waitpid(rank, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(status[1])
        late = late or time.monotonic() - begin > PATIENCE
        if late or (not killed and moment()):
            left = [rank for rank in ranks if rank not in codes]
            (draw or random.Random()).shuffle(left)
            for rank in left:
                os.kill(rank, signal.SIGKILL)
            killed = bool(left)
        time.sleep(0.0005)
    if late:
        return 1
    # One that killed itself counts too; the other has then ended by itself, with a message.
    return -signal.SIGKILL if killed or -signal.SIGKILL in codes.values() else next(filter(None, codes.values()), 0)


def lines(folder: Path) -> int:
    """Return the number of steps that a run has logged."""
    path = folder / "losses.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def log(folder: Path) -> str:
    """Return the end of what the ranks wrote."""
    return "\n".join(p.read_text()[-2000:] for p in sorted(folder.parent.glob(f"{folder.name}.log*")))


def tree(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of all files that a run left, and of its summary."""
    yield "summary", folder.with_name(f"{folder.name}.summary")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def differences(a: Path, b: Path) -> list[str]:
    """Return one line for each file in which two runs' folders differ."""
    files, others = dict(tree(a)), dict(tree(b))
    found = [f"{name} is in one only" for name in sorted(files.keys() ^ others.keys())]
    return found + [f"{n} differs" for n in files if n in others and contents(files[n]) != contents(others[n])]


def contents(path: Path) -> Any:
    """Return a file's bytes, less what two runs cannot share."""
    if path.name == "train_config.yaml":
        return {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in OWN}
    return path.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
