"""How people keep images and captions: one file per layout, in the order in which a source is tried against them."""

from __future__ import annotations

import os

from ambient_sd.data.dataset_options import AUTO, LAYOUT_NAMES
from ambient_sd.data.layouts.ai_toolkit import AiToolkit
from ambient_sd.data.layouts.arrow import Arrow
from ambient_sd.data.layouts.caption_files import CaptionFiles
from ambient_sd.data.layouts.class_folders import ClassFolders
from ambient_sd.data.layouts.hub import Hub
from ambient_sd.data.layouts.images import ImagesAlone
from ambient_sd.data.layouts.kohya import Kohya
from ambient_sd.data.layouts.kohya_toml import KohyaToml
from ambient_sd.data.layouts.layout import Layout, Request, Table
from ambient_sd.data.layouts.metadata import Metadata
from ambient_sd.data.layouts.onetrainer import OneTrainer
from ambient_sd.data.layouts.parquet import Parquet
from ambient_sd.data.layouts.webdataset import WebDataset
from ambient_sd.utils.errors import UserError

LAYOUTS: tuple[Layout, ...] = (
    WebDataset(), Arrow(), KohyaToml(), AiToolkit(), OneTrainer(), Metadata(), Parquet(), Kohya(), CaptionFiles(), ClassFolders(),
    ImagesAlone(), Hub(),
)  # fmt: skip


def read(request: Request, layout: str = AUTO, *, local: bool = False) -> Table:
    """Read a source by the first layout that recognizes it, or by the named one.

    Args:
        request: what is to be read.
        layout: its name, or auto.
        local: the source is a path whatever its form: a mistyped folder is then not searched on the hub.

    Raises:
        UserError: there is no such source, or it breaks a rule of its layout.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> read(Request(str(folder), need_captions=False)).rows
        [{'file_name': 'a.png'}]
    """
    if layout not in LAYOUT_NAMES:
        raise UserError(f"layout is {layout!r}", rule=f"it must be one of {', '.join(LAYOUT_NAMES)}")
    if layout == AUTO:
        chosen = next((one for one in LAYOUTS[:-1] if one.detects(request)), LAYOUTS[-1])
    else:
        chosen = next(one for one in LAYOUTS if one.name == layout)
    name = request.source
    looks_local = local or name.startswith((".", "/", "~")) or name.endswith(".parquet") or name.count("/") > 1
    there = os.path.isfile(request.path) or request.is_folder or (chosen is not LAYOUTS[-1] and chosen.detects(request))
    if not there and (chosen is not LAYOUTS[-1] or (layout == AUTO and looks_local)):
        raise UserError(f"there is no file or folder {name}", remedy="check the path; a hub dataset reads owner/name")
    return chosen.read(request)
