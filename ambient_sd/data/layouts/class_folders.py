"""Class folders: the name of the folder that an image lies in is its caption. Read only where it is asked for by name."""

from __future__ import annotations

import dataclasses

from ambient_sd.data.layouts.caption_files import read_folder, table_of
from ambient_sd.data.layouts.layout import Layout, Request, Table
from ambient_sd.utils.errors import UserError, first_of


class ClassFolders(Layout):
    """Read a folder of folders of images, with the names of these as captions.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp(), "golden retriever")
        >>> folder.mkdir()
        >>> (folder / "a.png").touch()
        >>> ClassFolders().read(Request(str(folder.parent))).rows[0]["text"]
        'golden retriever'
    """

    name, what = "class_folders", "folders whose names are captions"

    def detects(self, request: Request) -> bool:
        return False  # any folder with sub-folders looks like this

    def read(self, request: Request) -> Table:
        rows = [
            dataclasses.replace(row, caption=row.name.rpartition("/")[0].rpartition("/")[2].strip() or None)
            for row in read_folder(request.path, request)
        ]
        names = sorted({str(row.caption) for row in rows if row.caption})
        if not names:
            raise UserError(f"folder {request.path} has no folders of images", rule="their names are the captions")
        notes = [f"{len(names)} folders' names are captions: {first_of(names)}"]
        return table_of(request, rows, left=dict(request.found.unread), notes=notes)
