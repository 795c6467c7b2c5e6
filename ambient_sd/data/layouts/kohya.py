"""Folders as kohya's train_data_dir: `10_sks dog` holds images that an epoch holds ten times, with "sks dog" where there is no text.

A folder with `img/` and `reg/`, as its user interface makes them, is both: `reg/` holds regularisation images in such folders. As there,
images lie directly in their folder, and of a text with several lines the first is the caption.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ambient_sd.data.layouts.caption_files import Row, read_folder, table_of
from ambient_sd.data.layouts.layout import REGULARISATION, TRAINING, Layout, Request, Table, walked
from ambient_sd.utils.errors import UserError, first_of

_NUMBERED = re.compile(r"(\d+)_(.+)")
_MOST = 1000  # repeats that are believed unless the layout is named: 2020_summer is a year


class Kohya(Layout):
    """Read folders whose names are repeats and class tokens.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), "10_sks dog")
        >>> folder.mkdir()
        >>> (folder / "a.png").touch()
        >>> table = Kohya().read(Request(str(folder.parent)))
        >>> table.rows, table.repeats
        ([{'file_name': '10_sks dog/a.png', 'text': 'sks dog'}], [10])
    """

    name, what = "kohya", "kohya's folders N_name"

    def detects(self, request: Request) -> bool:
        if not request.is_folder:
            return False
        inside = [name.split("/") for name in request.found.images]
        if all(parts[0] in ("img", "reg", "log", "model", "sample") for parts in inside):
            inside = [parts[1:] for parts in inside if parts[0] == "img"]
        numbered = [_NUMBERED.fullmatch(parts[0]) for parts in inside if parts]
        return bool(inside) and all(found is not None and int(found[1]) <= _MOST for found in numbered)

    def read(self, request: Request) -> Table:
        folder = request.path
        images = folder / "img" if _numbered(folder / "img") else folder
        roots = [(images, TRAINING)]
        notes = []
        if images != folder and _numbered(folder / "reg"):
            roots.append((folder / "reg", REGULARISATION))
        elif images == folder and folder.name == "img" and _numbered(folder.parent / "reg"):
            notes.append("the folder reg beside it is not read; name the folder above for both")
        rows: list[Row] = []
        left: dict[str, str] = {}
        for root, role in roots:
            prefix = "" if root == folder else f"{root.name}/"
            numbered = _numbered(root)
            for name, (repeats, tokens) in numbered.items():
                rows += first_lines(
                    read_folder(root / name, request, deep=False, fallback=tokens, prefix=f"{prefix}{name}/", role=role, repeats=repeats, left=left),
                    notes,
                )  # fmt: skip
            seen = request.found if root == folder else walked(root, request.faults)
            outside = [n for n in (*seen.images, *seen.unread) if n.split("/")[0] not in numbered]
            left |= {prefix + n: seen.unread.get(n, "not in a folder N_name") for n in outside}
        if not rows:
            raise UserError(
                f"folder {folder} has no folder N_name with images", rule="kohya's folders are named such as 10_sks dog"
            )
        sums = [
            f"{name!r} {n} times an epoch" if n > 1 else f"{name!r} once" for name, (n, _) in _numbered(images).items()
        ]
        notes.insert(0, f"kohya's folders: {first_of(sums)}")
        return table_of(request, rows, left=left, notes=notes)


def _numbered(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the sub-folders N_name, with N and name; those of N = 0 count as absent, as there."""
    if not os.path.isdir(folder):
        return {}
    found = {entry.name: _NUMBERED.fullmatch(entry.name) for entry in os.scandir(folder) if entry.is_dir()}
    return {name: (int(m[1]), m[2].strip()) for name, m in sorted(found.items()) if m is not None and int(m[1]) > 0}


def first_lines(rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """Return rows with the first line of each caption, and note where there are others.

    Example:
        >>> notes = []
        >>> first_lines([Row(Path("a.png"), "a.png", "a cat\\na dog")], notes)[0].caption, notes
        ('a cat', ['1 caption files have several lines, of which the first is read: a.png'])
    """
    longer = [row.name for row in rows if isinstance(row.caption, str) and "\n" in row.caption]
    if longer:
        notes.append(f"{len(longer)} caption files have several lines, of which the first is read: {first_of(longer)}")
    return [
        dataclasses.replace(row, caption=row.caption.split("\n")[0].strip()) if isinstance(row.caption, str) else row
        for row in rows
    ]
