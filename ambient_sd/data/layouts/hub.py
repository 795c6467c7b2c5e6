"""A dataset on the hub, by its name; `datasets` downloads it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambient_sd.data.layouts.layout import Cells, Layout, Request, Table, need_columns
from ambient_sd.utils.errors import UserError


class Hub(Layout):
    """Read a dataset of the hub, or a local folder by the same library.

    Example:
        >>> Hub().detects(Request("someone/images"))
        True
    """

    name, what = "hub", "a dataset on the hub"

    def detects(self, request: Request) -> bool:
        return not (request.is_folder or os.path.isfile(request.path))

    def read(self, request: Request) -> Table:
        import datasets

        try:
            data = datasets.load_dataset(
                request.source, request.config_name, split=request.split or "train", cache_dir=request.cache_dir
            )
        except (
            Exception
        ) as error:  # the hub client raises a dozen kinds: not found, gated, offline, no such split or configuration
            raise UserError(
                f"dataset {request.source} cannot be loaded from the hub",
                rule=f"{type(error).__name__}: {error}",
                remedy="check name, split and network, or give a local folder or parquet file",
            ) from None
        return dataset_table(request, data, local=False)


def dataset_table(request: Request, data: Any, *, local: bool) -> Table:
    """Return the rows of a `datasets.Dataset`, its images still encoded.

    Raises:
        UserError: it lacks a column.

    Example:
        >>> import datasets
        >>> data = datasets.Dataset.from_dict({"image": [b"PNG"], "text": ["a cat"]})
        >>> dataset_table(Request("mine"), data, local=True).rows[0]
        {'text': 'a cat'}
    """
    import datasets

    column = request.image_column
    caption = request.caption_column if request.must_have_captions else None
    need_columns(request.source, [column, caption], data.column_names)
    images = data.select_columns([column])
    if isinstance(data.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    cells = Cells(_DatasetColumn(images, column), request.path if local else Path(), local=local)
    return Table(request.source, data.remove_columns([column]), cells, lambda i: f"row {i}", split_done=True)


@dataclass(frozen=True)
class _DatasetColumn:
    data: Any  # datasets.Dataset
    name: str

    def __call__(self, index: int) -> Any:
        return self.data[index][self.name]
