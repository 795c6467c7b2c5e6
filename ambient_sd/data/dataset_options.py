"""The options with which every command reads a dataset; `ambient_sd.data.sources.load_rows` takes them. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ambient_sd.data.conditions import split_condition
from ambient_sd.utils.settings import check, option

UNLISTED = ("refuse", "ignore")
AUTO = "auto"
LAYOUT_NAMES = (
    AUTO, "webdataset", "arrow", "kohya_toml", "ai_toolkit", "onetrainer", "metadata", "parquet", "kohya", "caption_files",
    "class_folders", "images", "hub",
)  # fmt: skip


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
    layout: str = option(AUTO, "how images and captions are kept; auto tells it from the files", choices=LAYOUT_NAMES)
    caption_extension: str | None = option(None, "ending of the caption files beside the images (default .txt or .caption)")
    instance_prompt: str | None = option(None, "caption of images that have none, such as 'a photo of sks dog'")
    trigger_word: str | None = option(None, "put before each caption that lacks it, and in place of [trigger]")
    skip_broken: bool = option(False, "leave files out that are missing or do not decode, and say which")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)
        self.conditions()

    def conditions(self) -> list[tuple[str, str, str]]:
        """Return `row_filter` as `load_rows` takes it."""
        return [split_condition(term) for term in self.row_filter or ()]


def reading(settings: Any) -> dict[str, Any]:
    """Return the dataset options of any settings that have them, as `load_rows` takes them.

    Example:
        >>> reading(DatasetOptions(dataset_split="train"))["split"]
        'train'
    """
    options = {item.name: getattr(settings, item.name) for item in fields(DatasetOptions)}
    conditions = [split_condition(term) for term in options.pop("row_filter") or ()]
    return {"split": options.pop("dataset_split"), "row_filter": conditions, **options}
