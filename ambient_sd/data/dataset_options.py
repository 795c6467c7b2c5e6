"""The options with which every command reads a dataset; `ambient_sd.data.sources.load_rows` takes them. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from ambient_sd.data.conditions import split_condition
from ambient_sd.utils.settings import check, option

UNLISTED = ("refuse", "ignore")
AUTO = "auto"
LAYOUT_NAMES = (AUTO, "webdataset", "arrow", "metadata", "parquet", "images", "hub")


@dataclass(frozen=True)
class DatasetOptions:
    """Say which columns and rows of a dataset are read.

    Raises:
        UserError: a value breaks its rule.

    Example:
        >>> DatasetOptions(row_filter=["width>=64"]).conditions()
        [('width', '>=', '64')]
    """

    # fmt: off
    image_column: str = option("image", "column of the images (parquet, hub; a folder uses file_name)")
    caption_column: str = option("text", "column of the captions")
    dataset_split: str | None = option(None, "split: of a hub dataset (default train), or the value of a local source's `split` column")
    row_filter: list[str] | None = option(None, "keep rows where all of these hold: column=value, 'column<=number' or 'column>=number'", metavar="CONDITION")
    unlisted: str = option("refuse", "images in a folder that its list does not name, hidden ones, and kinds that are not read: refuse = end the run in one line; ignore = leave them out and say how many", choices=UNLISTED)
    # fmt: on

    def __post_init__(self) -> None:
        check(self)
        self.conditions()

    def conditions(self) -> list[tuple[str, str, str]]:
        """Return `row_filter` as `load_rows` takes it."""
        return [split_condition(term) for term in self.row_filter or ()]
