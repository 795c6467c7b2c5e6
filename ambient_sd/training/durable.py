"""Files and folders that are on the disk, whole, before they get their name; a kill or a power cut leaves the old or the new.

A folder cannot replace another in one system call: the old one is set aside as `.NAME.ambient-old`, the new one takes the
name, the old one goes. `mend` gives the name back where a run was killed between the two. It knows nothing of what is inside.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_ASIDE = ".ambient-old"


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until all that lies in a folder is on the disk, and the folder itself."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_text(path: Path, text: str) -> None:
    """Write a file that holds its old or its new text at any moment."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    part.replace(path)


def put(part: Path, target: Path) -> None:
    """Give `part`, a file or folder on the same disk that is synced, the name `target`; what had it goes afterwards."""
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


def put_all(staging: Path, target: Path, *, last: str) -> None:
    """Move every entry of `staging`, which is synced, into the folder `target`, that named `last` at the end.

    An older `last` goes first: while it is missing, nobody takes new and old parts for one result.
    """
    mend(target)
    if (staging / last).exists():
        remove(target / last)
    for part in sorted(staging.iterdir(), key=lambda p: (p.name == last, p.name)):
        put(part, target / part.name)
    staging.rmdir()


def mend(folder: Path) -> None:
    """Undo what a kill in the middle of `put` left in a folder."""
    for aside in folder.glob(f".*{_ASIDE}"):
        target = folder / aside.name.removesuffix(_ASIDE).removeprefix(".")
        if target.exists():
            remove(aside)
        else:
            aside.rename(target)


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
