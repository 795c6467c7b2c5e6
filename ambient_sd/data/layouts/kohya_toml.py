"""kohya's dataset file (`--dataset_config`): a TOML whose subsets name folders, repeats, class tokens and how images are changed.

A value of a subset goes before that of its dataset, and that before `[general]`. What changes images or captions on the way is asked of
the training (`Ask`): it has a flag here, or is refused there. A subset with a `metadata_file` is of the fine-tuning kind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

from ambient_sd.data.layouts.caption_files import Row, dotted, read_folder, table_of
from ambient_sd.data.layouts.kohya import first_lines
from ambient_sd.data.layouts.layout import HELDOUT, REGULARISATION, TRAINING, Ask, Layout, Request, Table, read_text
from ambient_sd.data.layouts.tool_file import Section, ask_if, find_folder, prefixes, read_json, scalar
from ambient_sd.data.walk import IMAGE_SUFFIXES
from ambient_sd.utils.errors import UserError

_BUCKETS = ("bucket_no_upscale", "bucket_reso_steps", "max_bucket_reso", "min_bucket_reso")
_NO_EFFECT = (
    "cache_info",
    "keep_tokens",
    "keep_tokens_separator",
    "caption_separator",
    "token_warmup_min",
    "custom_attributes",
)
_FRESH = {
    "flip_aug": ("random_flip", (True,), "set flip_aug = false and give --random_flip, which mirrors the same half of the images always"),
    "random_crop": ("center_crop", (False,), "set random_crop = false: without --center_crop each image is cropped at one random place"),
    "color_aug": ("", (), "set color_aug = false, and change the files once instead"),
    "face_crop_aug_range": ("", (), "take face_crop_aug_range out, and crop the files once instead"),
}  # fmt: skip
_NOT_DONE = (
    "shuffle_caption", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "token_warmup_step", "enable_wildcard",
    "secondary_separator", "alpha_mask", "resize_interpolation", "conditioning_data_dir",
)  # fmt: skip
_KINDS = {
    "face_crop_aug_range": list, "caption_dropout_every_n_epochs": int, "caption_tag_dropout_rate": float, "token_warmup_step": float,
    "secondary_separator": str, "resize_interpolation": str, "conditioning_data_dir": str,
}  # fmt: skip


class KohyaToml(Layout):
    """Read the folders that a dataset file of kohya's names.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> text = '[[datasets]]\\n[[datasets.subsets]]\\nimage_dir = "."\\nclass_tokens = "sks dog"\\nnum_repeats = 3\\n'
        >>> _ = (folder / "data.toml").write_text(text)
        >>> table = KohyaToml().read(Request(str(folder / "data.toml")))
        >>> table.rows[0]["text"], table.repeats
        ('sks dog', [3])
    """

    name, what = "kohya_toml", "kohya's dataset file"

    def detects(self, request: Request) -> bool:
        return request.path.suffix.lower() == ".toml"

    def read(self, request: Request) -> Table:
        file = request.path
        try:
            top = Section(tomllib.loads(read_text(file)), str(file))
        except tomllib.TOMLDecodeError as error:
            raise UserError(
                f"{file} is no TOML", rule=str(error), remedy="backslashes go in single quotes: 'C:\\images'"
            ) from None
        general = Section(top.take("general", dict, {}), f"{file}, general")
        datasets = top.sections("datasets")
        top.refuse_unknown()
        asks: dict[str, Ask] = {}
        notes: list[str] = []
        left: dict[str, str] = {}
        subsets: list[Section] = []
        for dataset in datasets:
            dataset.above = (general,)
            _ask_dataset(dataset, asks, notes)
            seen: set[str] = set()
            for subset in dataset.sections("subsets"):
                subset.above = (dataset, general)
                key = str(subset.values.get("metadata_file") or subset.values.get("image_dir"))
                if key in seen:
                    notes.append(
                        f"{subset.where.rpartition(', ')[2]} names {Path(key).name} again and is passed over, as kohya does"
                    )
                    continue
                seen.add(key)
                subsets.append(subset)
        if not subsets:
            raise UserError(f"{file} names no image_dir", rule="it must stand in [[datasets.subsets]]")
        folders = [_folder(subset, file) for subset in subsets]
        rows: list[Row] = []
        for subset, folder, prefix in zip(subsets, folders, prefixes(folders), strict=True):
            rows += _read_subset(subset, folder, prefix, request, asks, notes, left)
        general_only = [name for name in general.values if name in _BUCKETS]
        for section in (*subsets, *datasets, general):
            section.refuse_unknown((*_NO_EFFECT, *_BUCKETS, "subsets"))
        if general_only or any(name in _BUCKETS for dataset in datasets for name in dataset.values):
            notes.append("sizes of buckets are those of --aspect_ratio_buckets, not the file's")
        return table_of(request, rows, left=left, notes=notes, asks=list(asks.values()))


def _folder(subset: Section, file: Path) -> Path:
    given = subset.take("image_dir", str)
    if given is None:
        if subset.values.get("metadata_file") is None:
            raise UserError(f"{subset.where} has no image_dir", rule="a subset names a folder")
        return file.parent
    return find_folder(given, file, subset.where)


def _ask_dataset(dataset: Section, asks: dict[str, Ask], notes: list[str]) -> None:
    """Take a dataset's own settings: what they ask of the training."""
    values = [section.values.get("resolution") for section in (dataset, *dataset.above)]
    size = next((value for value in values if value is not None), None)
    if size is not None:
        size = dataset.take("resolution", type(size) if type(size) in (int, list) else int)
        sides = size if isinstance(size, list) else [size, size]
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise UserError(
                f"resolution is {scalar(size)} in {dataset.where}", rule="it must be a number, or width and height"
            )
        square = sides[0] == sides[1]
        ask_if(
            asks,
            True,
            f"resolution = {scalar(size)}",
            "resolution" if square else "",
            sides[:1] if square else (),
            remedy="squares are trained",
        )
    batch, buckets = dataset.take("batch_size", int), dataset.take("enable_bucket", bool)
    ask_if(asks, batch, f"batch_size = {batch}", "train_batch_size", [batch])
    ask_if(asks, buckets, "enable_bucket = true", "aspect_ratio_buckets", ["auto"])
    weight = dataset.take("network_multiplier", float, 1.0)
    ask_if(asks, weight != 1, f"network_multiplier = {weight}")
    dataset.take("validation_split", float)
    dataset.take("validation_seed", int)


def _read_subset(
    subset: Section,
    folder: Path,
    prefix: str,
    request: Request,
    asks: dict[str, Ask],
    notes: list[str],
    left: dict[str, str],
) -> list[Row]:
    for name, (setting, values, remedy) in _FRESH.items():
        given = subset.take(name, _KINDS.get(name, bool))
        ask_if(asks, given, f"{name} = {scalar(given)}", setting, values, fresh=True, remedy=remedy)
    for name in _NOT_DONE:
        given = subset.take(name, _KINDS.get(name, bool))
        ask_if(asks, given, f"{name} = {scalar(given)}")
    dropout = subset.take("caption_dropout_rate", float)
    ask_if(asks, dropout is not None, f"caption_dropout_rate = {dropout}", "caption_dropout", [dropout])
    repeats, tokens = subset.whole("num_repeats"), subset.take("class_tokens", str)
    role = REGULARISATION if subset.take("is_reg", bool, False) else TRAINING
    ending = subset.take("caption_extension", str)
    endings = () if ending is None or request.caption_extension else (dotted(ending),)
    before, after = subset.take("caption_prefix", str, ""), subset.take("caption_suffix", str, "")
    share, seed = subset.take("validation_split", float, 0.0), subset.take("validation_seed", int, 0)
    metadata = subset.take("metadata_file", str)
    if not 0 <= share < 1:
        raise UserError(f"validation_split is {share} in {subset.where}", rule="it must be at least 0 and below 1")
    if metadata is None:
        rows = read_folder(
            folder,
            request,
            endings=endings,
            deep=False,
            fallback=tokens,
            prefix=prefix,
            role=role,
            repeats=repeats,
            left=left,
        )
        rows = first_lines(rows, notes)
    else:
        rows = _listed(subset, folder, metadata, prefix, request, repeats)
    rows = [
        dataclasses.replace(row, caption=" ".join(filter(None, (before, row.caption, after))))
        if isinstance(row.caption, str)
        else row
        for row in rows
    ]
    if role == TRAINING and (count := round(len(rows) * share)):
        drawn = sorted(
            rows, key=lambda row: hashlib.sha256(f"{seed}\n{row.path.name}".encode("utf-8", "surrogateescape")).digest()
        )[:count]
        apart = {row.name for row in drawn}
        rows = [dataclasses.replace(row, role=HELDOUT, repeats=1) if row.name in apart else row for row in rows]
    return rows


def _listed(subset: Section, folder: Path, metadata: str, prefix: str, request: Request, repeats: int) -> list[Row]:
    """Read the images of a metadata file: {"name or path": {"caption": ..., "tags": ...}}."""
    path = next((p for p in (request.path.parent / metadata, Path(metadata)) if p.is_file()), None)
    if path is None:
        raise UserError(f"{subset.where} names the metadata_file {metadata}, which does not exist", remedy="correct it")
    listed = Section(read_json(path), str(path))
    rows = []
    for name in sorted(listed.values):
        entry = Section(listed.values[name], f"{path}, {name}")
        parts = [entry.take("caption", str), entry.take("tags", str)]
        entry.refuse_unknown(("train_resolution", "caption_original"))
        found = _image(folder, name)
        if found is None:
            raise UserError(
                f"{path} names {name}, which does not exist in {folder}", remedy="add the image, or take it out"
            )
        caption = ", ".join(part for part in parts if part) if any(part is not None for part in parts) else None
        rows.append(Row(found, prefix + found.name, caption, repeats=repeats))
    return rows


def _image(folder: Path, name: str) -> Path | None:
    candidates: Sequence[Path] = [Path(name)] if os.path.isabs(name) else [folder / name]
    if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
        candidates = [Path(f"{candidates[0]}{ending}") for ending in sorted(IMAGE_SUFFIXES)]
    return next((path for path in candidates if path.is_file()), None)
