"""Files and folders that have their old or their new contents at any moment, whatever is killed or loses power.

    atomic_write                    one file
    replace, replace_all, recover   a file or a folder that is on the disk takes the name of an older one

A folder cannot replace another in one system call: the old one is set aside as `.NAME.ambient-old`, the new one takes the name,
the old one goes. `recover` gives the name back where a run was killed between the two.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from ambient_sd.utils.errors import UserError

_ASIDE = ".ambient-old"


def atomic_write(path: Path, data: str | bytes, *, synced: bool = False) -> None:
    """Write a file aside and give it its name when it is whole; text as UTF-8. Folders are made.

    Args:
        path: the file.
        data: its contents.
        synced: wait until they are on the disk, so that a power cut cannot leave an empty file under the name.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "new" / "notes.txt"
        >>> atomic_write(file, "whole")
        >>> file.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        if synced:
            sync(part)
        os.replace(part, path)
    except OSError:  # on a full disk, half a file would keep it full
        part.unlink(missing_ok=True)
        raise


def json_safe(value: Any) -> Any:
    """Return nested dicts and lists for JSON, which has no NaN and no infinity: such numbers are null there.

    Example:
        >>> json_safe({"loss": float("nan"), "steps": (1, 2)})
        {'loss': None, 'steps': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> sync(folder)
    """
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until all that lies in a folder is on the disk, and the folder itself.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> sync_tree(folder)
    """
    for path in (*folder.rglob("*"), folder):
        sync(path)


def replace(part: Path, target: Path) -> None:
    """Give `part`, a file or folder on the same disk that is synced, the name `target`; what had it goes afterwards.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> old, new = folder / "model", folder / "model.part"
        >>> old.mkdir(), new.mkdir(), (new / "weights").touch()
        (None, None, None)
        >>> replace(new, old)
        >>> [path.name for path in folder.rglob("*")]
        ['model', 'weights']
    """
    aside = target.with_name(f".{target.name}{_ASIDE}")
    if target.is_dir() or part.is_dir():
        if target.exists():
            remove(aside)
            target.rename(aside)
        part.rename(target)
    else:
        part.replace(target)
    sync(target.parent)
    remove(aside)


def replace_all(staging: Path, target: Path, *, last: str) -> None:
    """Move every entry of `staging`, which is synced, into the folder `target`, that named `last` at the end.

    An older `last` goes first: while it is missing, nobody takes new and old parts for one result.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> staging, target = folder / "staging", folder / "target"
        >>> staging.mkdir(), target.mkdir(), (staging / "index.json").touch()
        (None, None, None)
        >>> replace_all(staging, target, last="index.json")
        >>> [path.name for path in target.iterdir()]
        ['index.json']
    """
    recover(target)
    if (staging / last).exists():
        remove(target / last)
    for part in sorted(staging.iterdir(), key=lambda p: (p.name == last, p.name)):
        replace(part, target / part.name)
    staging.rmdir()


def recover(folder: Path) -> None:
    """Undo what a kill in the middle of `replace` left in a folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / f".model{_ASIDE}").mkdir()  # a kill between two renames
        >>> recover(folder)
        >>> [path.name for path in folder.iterdir()]
        ['model']
    """
    for aside in folder.glob(f".*{_ASIDE}"):
        target = folder / aside.name.removesuffix(_ASIDE).removeprefix(".")
        if target.exists():
            remove(aside)
        else:
            aside.rename(target)


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> remove(folder)
        >>> folder.exists()
        False
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_target(path: Path | None, option: str) -> None:
    """Check that a file can be written, before the images are read.

    Raises:
        UserError: it cannot.

    Example:
        >>> import tempfile
        >>> check_target(Path(tempfile.mkdtemp()) / "report.html", "--html")
    """
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        rule = "that is a folder" if path.is_dir() else "its folder does not exist or cannot be written to"
        raise UserError(f"{option} is {path}", rule=rule, remedy="name a file in a folder that exists")
