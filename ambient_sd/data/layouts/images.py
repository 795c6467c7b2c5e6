"""Images alone: every image below a folder, without captions or with one caption for all (`--instance_prompt`)."""

from __future__ import annotations

from ambient_sd.data.layouts.layout import Files, Layout, Request, Table, phrase
from ambient_sd.data.walk import METADATA
from ambient_sd.utils.errors import UserError, one_line


class ImagesAlone(Layout):
    """Read every image below a folder.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> ImagesAlone().read(Request(str(folder), need_captions=False)).rows
        [{'file_name': 'a.png'}]
    """

    name, what = "images", "images alone"

    def detects(self, request: Request) -> bool:
        return request.is_folder

    def read(self, request: Request) -> Table:
        folder, seen = request.path, request.found
        names = seen.images
        if not names and not seen.unread:
            raise UserError(f"folder {folder} has no images", rule=f"it must hold images and {METADATA[0]}")
        if not names:
            name, why = next(iter(seen.unread.items()))
            raise UserError(f"folder {folder} has no images that are read; {one_line(name, 60)} is {phrase(why)}",
                            remedy="convert or unpack them to PNG or JPEG")  # fmt: skip
        if request.must_have_captions:
            deeper = next((folder / name for name in seen.lists), None)
            line = f'{{"file_name": "a.png", "{request.caption_column}": "a red apple"}}'
            raise UserError(
                f"folder {folder} has {len(names)} images but no {METADATA[0]} and no .txt beside them",
                rule="captions come from there",
                remedy=f"give {deeper.parent}, which has one" if deeper else
                f"write one line per image, {line}, or give one caption for all with --instance_prompt",
            )  # fmt: skip
        rows = [{"file_name": name} for name in names]
        return Table(str(folder), rows, Files(folder, names), names.__getitem__, dict(seen.unread))
