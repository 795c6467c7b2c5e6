"""WebDataset shards: a folder of tar files, one of them, or a pattern; `ambient_sd.data.shards` indexes them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ambient_sd.data.images import Undecodable
from ambient_sd.data.layouts.layout import Fault, Layout, Request, Table, need_columns
from ambient_sd.data.shards import ShardRows, find_shards, has_shards, index_shards, names_shards
from ambient_sd.data.walk import METADATA
from ambient_sd.utils.errors import UserError


class WebDataset(Layout):
    """Read tar shards.

    Example:
        >>> WebDataset().detects(Request("part-{000..010}.tar"))
        True
    """

    name, what = "webdataset", "tar files"

    def detects(self, request: Request) -> bool:
        if names_shards(request.path):
            return True
        folder = request.path
        if not request.is_folder or not has_shards(folder):
            return False
        if (listing := next((name for name in METADATA if (folder / name).exists()), None)) is not None:
            raise UserError(
                f"folder {folder} has {listing} and tar files",
                rule="they are two image datasets",
                remedy="move one of them away, or give the pattern of the shards, such as part-{000..010}.tar",
            )
        return True

    def read(self, request: Request) -> Table:
        path, faults = request.path, request.faults
        found: list[tuple[str, str]] | None = None if faults is None else []
        shards = find_shards(path)
        rows = index_shards(shards, request.caption_column, found)
        if faults is None:
            needed = request.caption_column if request.must_have_captions else None
            need_columns(str(path), [needed], list(rows[0]))
        else:
            faults.extend(Fault(name, "broken", text) for name, text in found or ())
        left = {}
        if request.is_folder:
            seen, real = request.found, {os.path.realpath(shard) for shard in shards}
            beside = {**dict.fromkeys(seen.images, "not in a shard"), **seen.unread}
            left = {name: why for name, why in sorted(beside.items()) if seen.real[name] not in real}
        return Table(str(path), rows, _ShardImages(rows), rows.names.__getitem__, left)


@dataclass(frozen=True)
class _ShardImages:
    """Reach the image of a row in a shard; a class, because a worker process may have to unpickle it."""

    rows: ShardRows

    def __call__(self, index: int) -> bytes:
        try:
            return self.rows.image(index)
        except OSError as error:
            raise Undecodable(str(error)) from None
