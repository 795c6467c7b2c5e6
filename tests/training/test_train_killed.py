"""Runs that are killed and resumed leave the bytes of runs that are left alone; a process that dies ends the others."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ambient_sd.training import RunRecord, checkpoints
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    before = dict(os.environ)
    spec = importlib.util.spec_from_file_location("torture", ROOT / "tools" / "torture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:  # it sets variables for the processes that it starts
        os.environ.clear()
        os.environ.update(before)
    return module


@pytest.mark.parametrize(
    "options", [["--kills", "3", "--use_ema", "--accumulation", "2"], ["--kills", "1", "--processes", "2", "--lora"]],
    ids=["one process", "two processes"],
)  # fmt: skip
@pytest.mark.slow
def test_sigkills_at_random_moments_change_no_byte(options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "tools/torture.py", *options], capture_output=True, text=True, timeout=500, check=False,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith(f"{options[1]} kills")
    assert "\n0 differences in " in done.stdout


class Stop(Exception):
    """The power goes out."""


class Watch:
    """Note what each step draws; stop at a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.drawn, self.seen, self.rates = stop, dict[int, str](), list[int](), list[float]()

    def batch(self, batch: TrainingBatch) -> None:
        assert batch.eps_n is not None
        self.seen.extend(batch.positions)
        for i, position in enumerate(batch.positions):
            tensors = (batch.noise[i], batch.eps_n[i], batch.x0[i], batch.timesteps[i])
            digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors))
            self.drawn[position] = f"{batch.keys[i]} {batch.captions[i]} {digest.hexdigest()}"

    def step(self, step: int, record: dict[str, float]) -> None:
        self.rates.append(record["lr"])
        if step == self.stop:
            raise Stop


@pytest.fixture
def train(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> Callable[..., RunRecord]:
    def train(name: str, watch: Watch, **values: Any) -> RunRecord:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 3, "max_train_steps": 6, "checkpointing_steps": 3, "report_to": "none",
            "output_dir": str(tmp_path / name), "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 2,
        }  # fmt: skip
        summary = run(TrainConfig(**{**settings, **values}), progress=False, on_batch=watch.batch, on_step=watch.step)
        kept = {"steps": summary.steps, "losses": summary.losses, **summary.means}
        (tmp_path / f"{name}.summary").write_text(json.dumps(kept))
        return summary

    return train


def generators() -> tuple[bytes, bytes, str]:
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()).encode(), repr(random.getstate())


@pytest.mark.parametrize(
    "values", [{"use_ema": True, "gradient_accumulation_steps": 2, "random_flip": True}, {"lora": True, "lora_dropout": 0.3}],
    ids=["full, averaged, accumulating", "lora with dropout"],
)  # fmt: skip
def test_everything_is_the_same_after_a_stop_in_mid_epoch(
    train: Callable[..., RunRecord], torture: ModuleType, tmp_path: Path, values: dict[str, Any]
) -> None:
    before, alone, first, second = generators(), Watch(), Watch(stop=5), Watch()
    train("alone", alone, **values)
    with pytest.raises(Stop):
        train("stopped", first, **values)
    summary = train("stopped", second, resume_from_checkpoint="latest", **values)
    assert summary.first_step == 3
    per_step = len(alone.seen) // 6
    assert 3 * per_step % 8 != 0, "the checkpoint lies in the middle of an epoch of eight images"
    assert second.seen == alone.seen[3 * per_step :], "the sampler goes on where the checkpoint is"
    assert all(alone.drawn[p] == drawn for p, drawn in (first.drawn | second.drawn).items())
    assert second.rates == alone.rates[3:] and len(set(alone.rates)) > 3
    assert generators() == before
    assert torture.differences(tmp_path / "alone", tmp_path / "stopped") == []
    names = [name for name, _ in torture.tree(tmp_path / "alone")]
    assert {"summary", "losses.jsonl", "checkpoint-6/optimizer.safetensors"} < set(names)


def test_a_resume_that_forgets_the_moments_is_found(
    train: Callable[..., RunRecord], torture: ModuleType, tmp_path: Path
) -> None:
    """Negative control of the comparison: zero moments in a checkpoint that is otherwise whole."""
    train("alone", Watch())
    with pytest.raises(Stop):
        train("stopped", Watch(stop=4))
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    path = checkpoint / "optimizer.safetensors"
    save_file({k: torch.zeros_like(v) if "exp_avg" in k else v for k, v in load_file(path).items()}, path)
    (checkpoint / checkpoints.MANIFEST_NAME).unlink()
    checkpoints.seal(checkpoint)
    assert checkpoints.damage(checkpoint) is None
    train("stopped", Watch(), resume_from_checkpoint="latest")
    found = torture.differences(tmp_path / "alone", tmp_path / "stopped")
    assert {"checkpoint-6/optimizer.safetensors differs", "losses.jsonl differs", "summary differs"} < set(found)


def test_a_run_killed_after_its_last_step_still_sums_up(
    train: Callable[..., RunRecord], torture: ModuleType, tmp_path: Path
) -> None:
    whole = train("alone", Watch())
    again = train("alone", Watch(), resume_from_checkpoint="latest")
    assert again.first_step == again.steps == 6
    assert (again.losses, again.loss, again.means["ambient_loss"]) == (
        whole.losses,
        whole.loss,
        whole.means["ambient_loss"],
    )


WORKER = """
import json, os, signal, sys, time
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run

settings, how, died, seen = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], []

def watch(batch):
    seen.append(1)
    if os.environ["RANK"] == "1" and len(seen) == 3:
        with open(died, "w") as file:
            file.write(str(time.time()))
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the second process fails")

run(TrainConfig(**settings), progress=False, on_batch=watch)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "raise"])
@pytest.mark.parametrize("launcher", [True, False], ids=["launched", "alone"])
def test_a_process_that_dies_ends_the_others_within_a_minute(
    tiny_base: Path, tiny_images: Path, tmp_path: Path, how: str, launcher: bool
) -> None:
    """Without a launcher, as on the other machines of a run over several, each process must notice by itself."""
    (tmp_path / "worker.py").write_text(WORKER)
    settings = {
        "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
        "train_batch_size": 2, "max_train_steps": 100_000, "report_to": "none", "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    died = tmp_path / "died"
    worker = [str(tmp_path / "worker.py"), json.dumps(settings), how, str(died)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if launcher:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        starts = [([*launch, "--main_process_port", "0", *worker], env)]
    else:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29713"}
        starts = [([sys.executable, *worker], {**env, **place, "RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    jobs = [subprocess.Popen(command, env=e, stderr=subprocess.PIPE, text=True) for command, e in starts]
    try:
        texts = [job.communicate(timeout=400)[1] for job in jobs]
        ended = time.time()
    finally:
        for job in jobs:
            job.kill()
    assert ended - float(died.read_text()) < 60
    assert all(job.returncode != 0 for job in jobs)
    if launcher:
        assert "Root Cause" in texts[0] and "rank      : 1" in texts[0]
    else:
        assert "process 0 has lost another process of this run" in texts[0]
        assert "--resume_from_checkpoint latest" in texts[0]
    if how == "raise":
        assert "the second process fails" in texts[-1]
