"""Folders checkpoint-N: everything that makes a run continue bit for bit, and nothing that needs pickle.

    checkpoint-500/  unet/ or pytorch_lora_weights.safetensors     the trained weights, loadable by diffusers
                     unet_ema/ or lora_ema.safetensors             their moving average, if one is kept
                     optimizer.safetensors                         AdamW moments
                     losses.jsonl                                  losses of all steps so far
                     trainer_state.json                            step, loss scaler, identity, evaluations of the probe
                     manifest.json                                 sizes and SHA-256 of the files above; written last

There is no generator state: random numbers are functions of (seed, position), see `ambient_sd.data.stream`; nor one of
the learning-rate schedule, a function of settings and step. A folder gets its name when it is whole and on the disk, so a
run killed in mid-save leaves the checkpoint before it as the newest. Before one is used all its bytes are compared with its
manifest, which finds damage, not malice: who can change a file can change the manifest too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from ambient_sd.training import sharding
from ambient_sd.utils import files
from ambient_sd.utils.errors import UserError, one_line

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.safetensors"
MANIFEST_NAME = "manifest.json"
_LATER = ("base",)  # of an identity: checkpoints from before it was written go on
_NAME = re.compile(r"checkpoint-(\d+)")
_READ = (".json", ".jsonl", ".safetensors", ".bin")  # diffusers would read such files without having been asked to


def find_all(output_dir: Path) -> list[Path]:
    """Return all that is named checkpoint-N in an output folder, whole or not, oldest first.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("checkpoint-1000", "checkpoint-500", "logs"):
        ...     (folder / name).mkdir()
        >>> [path.name for path in find_all(folder)]
        ['checkpoint-500', 'checkpoint-1000']
    """
    if not output_dir.is_dir():
        return []
    return sorted((p for p in output_dir.iterdir() if _NAME.fullmatch(p.name)), key=_step)


def find(output_dir: Path, wanted: str) -> Path | None:
    """Return the whole checkpoint that `--resume_from_checkpoint` names; None for `latest` where there is none yet.

    `latest` is the newest whole one: those that are damaged are passed over with a warning.

    Raises:
        UserError: the named one is missing or damaged, or all are damaged.

    Example:
        >>> import tempfile
        >>> find(Path(tempfile.mkdtemp()), "latest") is None  # there is none yet
        True
    """
    if output_dir.is_dir():
        files.recover(output_dir)
    if wanted == "latest":
        damaged: list[str] = []
        for path in reversed(find_all(output_dir)):
            if (wrong := damage(path)) is None:
                for other in damaged:
                    logger.warning("damaged checkpoint skipped: %s; resuming from %s", other, path.name)
                return path
            damaged.append(one_line(f"{path.name} ({wrong})", 200))
        if damaged:
            raise UserError(
                f"no checkpoint in {output_dir} is whole",
                rule=", ".join(damaged),
                remedy="put a copy of one back, or move them away to start anew",
            )
        return None
    # diffusers looks for the last part of the name in output_dir; a path that exists is taken as it is.
    for path in (Path(wanted), output_dir / Path(wanted).name):
        if path.exists():
            if (wrong := damage(path)) is not None:
                raise UserError(f"resume_from_checkpoint is {wanted!r}", rule=f"{path} is damaged: {wrong}",
                                remedy="name another one, or use latest")  # fmt: skip
            return path
    have = ", ".join(p.name for p in find_all(output_dir)) or "none"
    raise UserError(
        f"resume_from_checkpoint is {wanted!r}",
        rule=f"no checkpoint is there; {output_dir} has: {have}",
        remedy="name one of them, or use latest",
    )


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the damaged file, or None if it is whole.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> damage(folder), damage(folder / "checkpoint-500")
        ('the folder is empty', 'it is no folder')
    """
    if not checkpoint.is_dir():
        return "it is no folder"
    if not any(checkpoint.iterdir()):
        return "the folder is empty"
    if (wrong := _differs_from_manifest(checkpoint)) is not None:
        return wrong
    try:
        step = read_state(checkpoint)["step"]
    except UserError as error:
        return str(error)
    if _NAME.fullmatch(checkpoint.name) and step != _step(checkpoint):
        return f"{STATE_NAME} is of step {step}: the folder was renamed"
    return None


def _differs_from_manifest(folder: Path) -> str | None:
    """Return how a folder differs from its manifest.json, naming the first damaged file, or None."""
    try:
        listed = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_NAME} cannot be read ({type(error).__name__})"
    if STATE_NAME not in expected:
        return f"{MANIFEST_NAME} does not list {STATE_NAME}"
    # Sizes first: they cost nothing, and find what was cut short.
    for name, (size, _) in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (have := (folder / name).stat().st_size) != size:
            return f"{name} has {have} bytes instead of {size}"
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in expected and path.suffix in _READ and not path.name.startswith("."):
            return f"{name} does not belong there"
    for name, (_, digest) in expected.items():
        try:
            if _digest(folder / name) != digest:
                return f"{name} has other contents than when it was written"
        except OSError as error:
            return f"{name} cannot be read ({type(error).__name__})"
    return None


def seal(folder: Path) -> None:
    """Write manifest.json, sizes and SHA-256 of all files in `folder`, and wait until all of it is on the disk.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "trainer_state.json").write_text('{"step": 500, "identity": {}}')
        29
        >>> seal(folder)
        >>> damage(folder) is None
        True
    """
    found = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in _files(folder)
    }
    # What it lists is on the disk before it is: a manifest that can be read vouches for the rest.
    files.sync_tree(folder)
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": found}, indent=1), encoding="utf-8")
    files.sync(folder / MANIFEST_NAME)
    files.sync(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST_NAME)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def agree(checkpoint: Path | None, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint that the first process chose, on every process, and check that each sees it.

    Raises:
        UserError: this process sees another one under that path.

    Example:
        >>> from types import SimpleNamespace
        >>> agree(Path("checkpoint-500"), SimpleNamespace(num_processes=1)).name  # nobody else is there
        'checkpoint-500'
    """
    if accelerator.num_processes == 1:
        return checkpoint
    chosen = [(str(checkpoint), _stamp(checkpoint)) if checkpoint is not None else None]
    broadcast_object_list(chosen)
    if chosen[0] is None:
        return None
    path, stamp = Path(chosen[0][0]), chosen[0][1]
    if _stamp(path) != stamp:
        raise UserError(
            f"process {accelerator.process_index} sees another {path} than the first process",
            rule="all processes continue from one checkpoint",
            remedy="put output_dir where all machines see it",
        )
    return path


def _stamp(checkpoint: Path) -> str:
    paths = (checkpoint / MANIFEST_NAME, checkpoint / STATE_NAME)
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths if p.is_file())).hexdigest()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the contents of trainer_state.json.

    Raises:
        UserError: it is damaged.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> files.atomic_write(folder / "trainer_state.json", '{"step": 500, "identity": {"seed": 0}}')
        >>> read_state(folder)
        {'step': 500, 'identity': {'seed': 0}}
    """
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        state["step"] = int(state["step"])
        dict(state["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{STATE_NAME} cannot be read", rule=f"{type(error).__name__}: {error}") from None
    return dict(state)


def check_identity(checkpoint: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to the run that wants to continue it.

    Raises:
        UserError: a setting or the images differ; resuming would mix two runs.

    Example:
        >>> check_identity(Path("checkpoint-500"), {"identity": {"seed": 0}}, {"seed": 0})
        >>> try:
        ...     check_identity(Path("checkpoint-500"), {"identity": {"seed": 0}}, {"seed": 1})
        ... except UserError as error:
        ...     print(str(error).partition(";")[0])
        checkpoint-500 was written with seed = 0
    """
    saved = state["identity"]
    # Through JSON: a tuple saved comes back as a list.
    for key, value in json.loads(json.dumps(identity)).items():
        if key in _LATER and key not in saved:
            continue
        if saved.get(key) != value:
            raise UserError(
                f"{checkpoint.name} was written with {key} = {saved.get(key)!r}",
                rule=f"this run has {value!r}",
                remedy="resume with the settings and images it began with, or start anew in another output_dir",
            )


def save(
    output_dir: Path,
    step: int,
    *,
    write_weights: Callable[[Path], None],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    limit: int | None,
    spared: int | None = None,
) -> Path:
    """Write `output_dir/checkpoint-{step}` atomically, then remove the oldest beyond `limit`; return its path.

    Args:
        output_dir: the run's folder.
        step: optimizer steps done.
        write_weights: writes the trained weights into the folder that it is given.
        optimizer: its `state_dict`, every tensor whole.
        state: what else goes to trainer_state.json.
        limit: number of checkpoints to keep, the new one among them; all if None.
        spared: step of one that is kept beside them.

    Example:
        >>> import tempfile
        >>> optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
        >>> done = {"optimizer": optimizer.state_dict(), "state": {"identity": {}}, "write_weights": lambda folder: None}
        >>> checkpoint = save(Path(tempfile.mkdtemp()), 500, **done, limit=None)
        >>> checkpoint.name, damage(checkpoint)
        ('checkpoint-500', None)
    """
    target, part = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.part"
    files.recover(output_dir)
    for leftover in output_dir.glob(".checkpoint-*.part"):
        files.remove(leftover)
    part.mkdir(parents=True)
    write_weights(part)
    tensors = {
        f"{i}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for i, slots in optimizer["state"].items()
        for name, value in slots.items()
    }
    save_file(tensors, part / OPTIMIZER_NAME)
    text = json.dumps({"step": step, **state, "param_groups": optimizer["param_groups"]}, indent=1)
    (part / STATE_NAME).write_text(text, encoding="utf-8")
    seal(part)
    files.replace(part, target)
    if limit is not None:
        _remove_oldest(output_dir, step, limit, spared)
    return target


def _remove_oldest(output_dir: Path, step: int, limit: int, spared: int | None) -> None:
    """Keep `limit` checkpoints. Those go first whose step this run has not reached: it did not come from them."""
    ours = [p for p in find_all(output_dir) if any((p / name).is_file() for name in (STATE_NAME, MANIFEST_NAME))]
    for old in sorted(ours, key=lambda p: (_step(p) <= step, _step(p)))[:-limit]:
        if _step(old) == spared:
            continue
        # Without its name first: killed in the middle of it, half a checkpoint would be left.
        shutil.rmtree(old.rename(output_dir / f".{old.name}.part"))


def load_optimizer(checkpoint: Path, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments back; learning rate, betas, decay and epsilon stay those of `optimizer`.

    Raises:
        UserError: the file is missing or damaged, or does not fit the trained weights.

    Example:
        >>> import tempfile
        >>> optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
        >>> done = {"optimizer": optimizer.state_dict(), "state": {"identity": {}}, "write_weights": lambda folder: None}
        >>> checkpoint = save(Path(tempfile.mkdtemp()), 500, **done, limit=None)
        >>> load_optimizer(checkpoint, read_state(checkpoint), optimizer)
    """
    path = checkpoint / OPTIMIZER_NAME
    slots: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for name, value in load_file(path).items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = value
        plain = {
            i: {n: int(v) for n, v in found.items() if v.dtype == torch.int64 and not v.ndim}
            for i, found in slots.items()
        }
        groups = [
            {**new, "params": old["params"]}
            for new, old in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
        ]
        whole = sharding.cut(slots, optimizer)
        state_of = {i: {**found, **plain[i]} for i, found in whole.items()}  # a Python number again where it was one
        optimizer.load_state_dict({"state": state_of, "param_groups": groups})
    except Exception as error:  # SafetensorError, OSError, ValueError, KeyError
        raise UserError(f"{path} cannot be used", rule=f"{type(error).__name__}: {error}"[:300],
                        remedy="resume from another checkpoint") from None  # fmt: skip
