"""Parquet: a file, a folder of files, or a pattern such as data/train-*.parquet; images are cells of a column."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambient_sd.data.layouts.layout import Cells, Layout, Request, Table, need_columns
from ambient_sd.utils.errors import UserError, first_of

SUFFIX = ".parquet"


class Parquet(Layout):
    """Read parquet files.

    Example:
        >>> [Parquet().detects(Request(source)) for source in ("a.parquet", "data/train-*.parquet")]
        [False, True]
    """

    name, what = "parquet", "parquet files"

    def detects(self, request: Request) -> bool:
        path = request.path
        if request.is_folder:
            found = request.found
            return not found.images and not found.lists and bool(_inside(request))
        # Any other file: what is none of ours ends in the line that parquet's reader gives it.
        return os.path.isfile(path) or (path.suffix == SUFFIX and glob.escape(str(path)) != str(path))

    def read(self, request: Request) -> Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, left = request.path, {}
        files = [path]
        if request.is_folder:
            names = _inside(request)
            files = [path / name for name in names]
            left = {name: why for name, why in request.found.unread.items() if name not in names}
        elif not os.path.isfile(path):
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
        if not files:
            raise UserError(f"there is no parquet file {request.source}", remedy="check the path")
        _refuse_splits(request, files)
        at, tables = path, []
        try:
            for at in files:
                # Else a folder named like year=2020 on the way becomes a column.
                tables.append(pq.read_table(at, partitioning=None))
            columns = [table.column_names for table in tables]
            if any(sorted(names) != sorted(columns[0]) for names in columns):
                odd = next(i for i, names in enumerate(columns) if sorted(names) != sorted(columns[0]))
                raise UserError(f"{files[odd]} has other columns than {files[0].name}", rule="parts of one dataset have the same",
                                remedy="name one of them, or a pattern")  # fmt: skip
            table = pa.concat_tables(tables, promote_options="default") if len(tables) > 1 else tables[0]
            images = [request.image_column] if request.image_column in table.column_names else []
            rows = table.drop_columns(images).to_pylist()
        except UserError:
            raise
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # no UTF-8, dates of no calendar
            raise UserError(
                f"{at} cannot be read as parquet", rule=str(error), remedy="give a parquet file or a folder"
            ) from None
        source = request.source
        caption = request.caption_column if request.must_have_captions else None
        need_columns(source, [request.image_column, caption], table.column_names)
        image = Cells(ArrowColumn(table.column(request.image_column)), files[0].parent, local=True)
        if len(files) == 1:
            return Table(str(path), rows, image, lambda i: f"row {i}", left)
        ends = [sum(len(t) for t in tables[: i + 1]) for i in range(len(tables))]

        def name(row: int) -> str:
            part = next(i for i, end in enumerate(ends) if row < end)
            return f"{files[part].name} row {row - (ends[part - 1] if part else 0)}"

        return Table(str(path), rows, image, name, left)


@dataclass(frozen=True)
class ArrowColumn:
    """Reach a cell of a column; a class, because a worker process may have to unpickle it.

    Example:
        >>> import pyarrow as pa
        >>> ArrowColumn(pa.chunked_array([[b"PNG"]]))(0)
        b'PNG'
    """

    column: Any  # pyarrow.ChunkedArray

    def __call__(self, index: int) -> Any:
        return self.column[index].as_py()


def _inside(request: Request) -> list[str]:
    return sorted(name for name in request.found.unread if name.endswith(SUFFIX) and not name.startswith("."))


def _refuse_splits(request: Request, files: Sequence[Path]) -> None:
    """Refuse files of several splits, as the hub names them: train-00000-of-00002.parquet beside test-00000-of-00001.parquet."""
    splits = sorted({path.name.split("-00")[0] for path in files if "-of-" in path.name})
    if len(splits) > 1:
        raise UserError(f"{request.source} holds the splits {first_of(splits)}", rule="one is read",
                        remedy=f"name its files: '{files[0].parent / splits[0]}-*{SUFFIX}'")  # fmt: skip
