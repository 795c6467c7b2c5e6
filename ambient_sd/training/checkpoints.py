"""Folders checkpoint-N: everything that makes a run continue bit for bit, and nothing that needs pickle.

    checkpoint-500/  unet/ or pytorch_lora_weights.safetensors     the trained weights, loadable by diffusers
                     unet_ema/                                     their moving average, if one is kept
                     optimizer.safetensors                         AdamW moments
                     trainer_state.json                            step, loss scaler, identity

There is no generator state: random numbers are functions of (seed, position), see `ambient_sd.data.stream`; nor one of
the learning-rate schedule, a function of settings and step. A folder
gets its name only when it is whole, so a run killed in mid-save leaves the checkpoint before it as the newest.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ambient_sd.errors import UserError

STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


def find_all(output_dir: Path) -> list[Path]:
    """Return the whole checkpoints of an output folder, oldest first."""
    if not output_dir.is_dir():
        return []
    whole = [p for p in output_dir.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_NAME).is_file()]
    return sorted(whole, key=lambda p: int(p.name.partition("-")[2]))


def find(output_dir: Path, wanted: str) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` names; None for `latest` where there is none yet.

    Raises:
        UserError: the named folder is no whole checkpoint.
    """
    if wanted == "latest":
        return next(iter(reversed(find_all(output_dir))), None)
    # diffusers looks for the last part of the name in output_dir; a path that exists is taken as it is.
    for path in (Path(wanted), output_dir / Path(wanted).name):
        if (path / STATE_NAME).is_file():
            return path
    have = ", ".join(p.name for p in find_all(output_dir)) or "none"
    raise UserError(
        f"resume_from_checkpoint is {wanted!r}",
        rule=f"no whole checkpoint is there; {output_dir} has: {have}",
        remedy="name one of them, or use latest",
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the contents of trainer_state.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        int(state["step"]), dict(state["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / STATE_NAME} is damaged", rule=f"{type(error).__name__}: {error}",
                        remedy="resume from another checkpoint") from None  # fmt: skip
    return dict(state)


def check_identity(checkpoint: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to the run that wants to continue it.

    Raises:
        UserError: a setting or the pictures differ; resuming would mix two runs.
    """
    saved = state["identity"]
    # Through JSON: a tuple saved comes back as a list.
    for key, value in json.loads(json.dumps(identity)).items():
        if saved.get(key) != value:
            raise UserError(
                f"{checkpoint.name} was written with {key} = {saved.get(key)!r}",
                rule=f"this run has {value!r}",
                remedy="resume with the settings and pictures it began with, or start anew in another output_dir",
            )


def save(
    output_dir: Path,
    step: int,
    *,
    write_weights: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    limit: int | None,
) -> Path:
    """Write `output_dir/checkpoint-{step}` atomically, then remove the oldest beyond `limit`; return its path.

    Args:
        output_dir: the run's folder.
        step: optimizer steps done.
        write_weights: writes the trained weights into the folder that it is given.
        optimizer: its state goes to safetensors.
        state: what else goes to trainer_state.json.
        limit: number of checkpoints to keep; all if None.
    """
    target, part = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.part"
    for leftover in output_dir.glob(".checkpoint-*.part"):
        shutil.rmtree(leftover)
    part.mkdir(parents=True)
    write_weights(part)
    packed = optimizer.state_dict()
    tensors = {
        f"{i}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for i, slots in packed["state"].items()
        for name, value in slots.items()
    }
    save_file(tensors, part / OPTIMIZER_NAME)
    text = json.dumps({"step": step, **state, "param_groups": packed["param_groups"]}, indent=1)
    (part / STATE_NAME).write_text(text, encoding="utf-8")
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
    if limit is not None:
        for old in find_all(output_dir)[:-limit]:
            shutil.rmtree(old)
    return target


def load_optimizer(checkpoint: Path, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments back; learning rate, betas, decay and epsilon stay those of `optimizer`.

    Raises:
        UserError: the file is missing or damaged, or does not fit the trained weights.
    """
    path = checkpoint / OPTIMIZER_NAME
    slots: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for name, value in load_file(path).items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = value
        groups = [
            {**new, "params": old["params"]}
            for new, old in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": slots, "param_groups": groups})
    except Exception as error:  # SafetensorError, OSError, ValueError, KeyError
        raise UserError(f"{path} cannot be used", rule=f"{type(error).__name__}: {error}"[:300],
                        remedy="resume from another checkpoint") from None  # fmt: skip
