"""manifest.json: names, sizes and SHA-256 of all files of a folder, written last; a folder that fits its manifest is whole.

It finds damage, not malice: who can change a file can change the manifest too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ambient_sd.utils import files

NAME = "manifest.json"
_READ = (".json", ".jsonl", ".safetensors", ".bin")  # diffusers would read such files without having been asked to


def seal(folder: Path) -> None:
    """Write the manifest of what lies in `folder`, and wait until all of it is on the disk."""
    found = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in _files(folder)
    }
    # What it lists is on the disk before it is: a manifest that can be read vouches for the rest.
    files.sync_tree(folder)
    (folder / NAME).write_text(json.dumps({"files": found}, indent=1), encoding="utf-8")
    files.sync(folder / NAME)
    files.sync(folder)


def damage(folder: Path, *, needs: str) -> str | None:
    """Return what is wrong with a sealed folder, naming the first damaged file, or None if it is whole.

    Args:
        folder: what `seal` was given; it may have another name now.
        needs: a file that the manifest must list.
    """
    try:
        listed = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read ({type(error).__name__})"
    if needs not in expected:
        return f"{NAME} does not list {needs}"
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


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / NAME)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
