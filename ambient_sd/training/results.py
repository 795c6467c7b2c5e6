"""What a finished run leaves in its folder, and when that may be replaced.

    full    a whole pipeline: model_index.json, unet/, vae/, ...
    LoRA    pytorch_lora_weights.safetensors; on request the same in kohya's format

A result is written aside, waits until it is on the disk, and then takes its names: model_index.json last.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError

from ambient_sd.data.layouts.layout import Fault
from ambient_sd.families.base import Base
from ambient_sd.families.lora import WEIGHTS_NAME
from ambient_sd.families.origin import written
from ambient_sd.training import adapters, checkpoints
from ambient_sd.training.config import CONFIG_NAME, TrainConfig
from ambient_sd.utils import files
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.weight_files import NETWORKS

INDEX_NAME = "model_index.json"
_RESULTS = (INDEX_NAME, *NETWORKS, WEIGHTS_NAME, adapters.KOHYA_NAME)
SKIPPED_NAME = "skipped.jsonl"
_SHEET = re.compile(r"step-\d+(-new)?\.png|scores\.json|curve\.png")


def check_overwrite(folder: Path, *, allowed: bool) -> None:
    """Refuse a folder in which an earlier run left checkpoints or a result.

    Args:
        folder: the output folder; it may be missing.
        allowed: `--overwrite` is given. Then only a model that no training of ours wrote is refused.

    Raises:
        UserError: something is there that must not be replaced.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> check_overwrite(folder, allowed=False)  # empty
        >>> (folder / "checkpoint-500").mkdir()
        >>> check_overwrite(folder, allowed=True)
    """
    found = [name for name in _RESULTS if (folder / name).exists()]
    if found and allowed and not (folder / CONFIG_NAME).is_file():
        raise UserError(f"output_dir {folder} holds {found[0]} and no {CONFIG_NAME}",
                        rule="--overwrite replaces what a training left, and this is something else",
                        remedy="name another output_dir")  # fmt: skip
    if allowed:
        return
    if steps := checkpoints.find_all(folder):
        raise UserError(
            f"output_dir {folder} holds checkpoints of an earlier run, the newest is {steps[-1].name}",
            rule="two runs in one folder cannot be told apart",
            remedy="continue it with --resume_from_checkpoint latest, replace it with --overwrite, or name another output_dir",
        )
    check_finished(folder)


def check_finished(folder: Path) -> None:
    """Refuse a folder that holds a result.

    Raises:
        UserError: there is one.

    Example:
        >>> import tempfile
        >>> check_finished(Path(tempfile.mkdtemp()))  # there is none
    """
    if found := [name for name in _RESULTS if (folder / name).exists()]:
        raise UserError(f"output_dir {folder} holds a finished training: {', '.join(found)}", rule="it would be overwritten",
                        remedy="replace it with --overwrite, or name another output_dir")  # fmt: skip


def write_skipped(folder: Path, skipped: Sequence[Fault]) -> None:
    """Write which images a run left out because they do not decode, a line each; no file where there are none.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_skipped(folder, [Fault("a.png", "broken", "it is cut short")])
        >>> (folder / SKIPPED_NAME).read_text()
        '{"image": "a.png", "reason": "it is cut short"}\\n'
    """
    lines = [json.dumps({"image": fault.name, "reason": fault.text}, ensure_ascii=False) + "\n" for fault in skipped]
    if lines:
        files.atomic_write(folder / SKIPPED_NAME, "".join(lines))
    else:
        files.remove(folder / SKIPPED_NAME)


def clear(folder: Path, logging_dir: str) -> None:
    """Remove what an earlier run left in its folder: checkpoints, result, sheets, records and curves; all else stays.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "checkpoint-500").mkdir(), (folder / "notes.txt").touch()
        (None, None)
        >>> clear(folder, "logs")
        >>> [path.name for path in folder.iterdir()]
        ['notes.txt']
    """
    files.recover(folder)
    parts: list[str] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        parts = [name for name, entry in index.items() if isinstance(entry, list) and re.fullmatch(r"\w+", name)]
    # Without its index a pipeline is none: it goes first.
    for name in (*_RESULTS, *parts, "losses.jsonl", "probe.jsonl", SKIPPED_NAME):
        files.remove(folder / name)
    for path in (*checkpoints.find_all(folder), *folder.glob(".*.part")):
        files.remove(path)
    sheets = [
        path for name in ("validation", "probe") for path in (folder / name).glob("*") if _SHEET.fullmatch(path.name)
    ]
    for path in (*sheets, *(folder / logging_dir).rglob("events.out.tfevents.*")):
        path.unlink()


def write(
    folder: Path, unet: Any, base: Base, config: TrainConfig, text: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write the result of a run; `unet` holds the trained weights, whole, and `text` the text encoders with an adapter, by name.

    Raises:
        UserError: the base is no longer there, so that the U-Net alone could be written.

    Example:
        >>> import tempfile
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.families.base import check_base
        >>> config, base = TrainConfig(str(BASE), train_data_dir="my-images", lora=True), check_base(str(BASE), lora=True)
        >>> unet = base.skeleton()["unet"].to_empty(device="cpu")
        >>> adapters.attach(unet, rank=4, alpha=4.0, targets=["to_q"], seed=0)
        []
        >>> folder = Path(tempfile.mkdtemp())
        >>> write(folder, unet, base, config)
        >>> [path.name for path in folder.iterdir()]
        ['pytorch_lora_weights.safetensors']
    """
    staging = folder / ".results.part"
    files.remove(staging)
    staging.mkdir()
    lost: Exception | None = None
    if config.lora:
        head = written(base, config.resolution)
        adapters.save(unet, staging, base.family, text, head)
        if config.output_kohya_format:
            adapters.save_kohya(unet, staging, base.family, text, head)
    else:
        try:
            pipe = base.pipeline(unet)
        except Exception as error:  # the base was moved, the hub is out of reach, ...
            lost = error
            unet.save_pretrained(staging / base.family.network)
        else:
            pipe.save_pretrained(staging)
    files.sync_tree(staging)
    files.replace_all(staging, folder, last=INDEX_NAME)
    if lost is not None:
        raise UserError(
            f"the other parts of base model {base.name} can no longer be loaded",
            rule=f"{type(lost).__name__}: {lost}"[:300],
            remedy=f"the trained network is whole in {folder / base.family.network}: put it into the base",
        ) from lost


@contextlib.contextmanager
def full_disk_in_one_line(what: str, folder: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a lost mount into one line; what was whole before stays whole.

    Raises:
        UserError: in place of the error of the system.

    Example:
        >>> try:
        ...     with full_disk_in_one_line("checkpoint-500", Path("results")):
        ...         raise OSError("No space left on device")
        ... except UserError as error:
        ...     print(error)
        checkpoint-500 cannot be written to results; OSError: No space left on device; make room there and resume with --resume_from_checkpoint latest
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{what} cannot be written to {folder}",
            rule=one_line(f"{type(error).__name__}: {error}", 200),
            remedy="make room there and resume with --resume_from_checkpoint latest",
        ) from error
