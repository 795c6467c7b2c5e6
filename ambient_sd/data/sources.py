"""Images and captions from a folder with metadata.jsonl or .csv, a parquet file, tar shards or a hub dataset, checked before use.

An image's `key` is the SHA-256 of its decoded RGB content, size included. Whatever is fixed per image (its noise,
its VAE sample, its view) follows from the key, so a copy under another name or in another lossless format shares all of it.

It does not resize or encode anything; near-duplicates are found by `ambient_sd.data.duplicates`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ambient_sd.data.dataset_options import UNLISTED
from ambient_sd.data.duplicates import Group, Thumbnails, find_groups, noise_keys
from ambient_sd.data.shards import ShardRows, find_shards, has_shards, index_shards, names_shards
from ambient_sd.data.walk import METADATA, Found, walk
from ambient_sd.utils.errors import UserError, first_of, one_line

NAME_COLUMNS = (
    "image",
    "file",
    "filename",
    "file_path",
    "image_path",
    "image_file",
    "path",
)  # where there is no file_name
FRAMES = "ambient_sd_frames"  # in a decoded image's info: the file has further frames


@dataclass(frozen=True)
class ImageRow:
    """Hold one decoded image.

    Attributes:
        image: RGB image, upright (EXIF orientation applied), transparency laid on white.
        caption: its caption, possibly empty.
        key: `content_key(image)`.
        name: file name or row, for messages.
        noise_key: key of what is fixed for it and its near-duplicates; empty means `key`.
        mirrored: it is the mirror image of the image that `noise_key` belongs to.

    Example:
        >>> image = Image.new("RGB", (8, 8))
        >>> ImageRow(image, "a black square", content_key(image), "a.png").mirrored
        False
    """

    image: Image.Image
    caption: str
    key: str
    name: str
    noise_key: str = ""
    mirrored: bool = False


@dataclass(frozen=True)
class Fault:
    """Say what is wrong with one row: its `name`, the `kind` of fault, and a `text` for people.

    Example:
        >>> Fault("a.png", "broken", "the file does not exist").kind
        'broken'
    """

    name: str
    kind: str
    text: str


class ImageDataset(Sequence[ImageRow]):
    """Hold rows of images and captions; an image is decoded anew at each access.

    Args:
        images: per row the encoded bytes, or the path of the file.
        captions: per row the caption.
        names: per row a name for messages.
        source: where the rows come from, for messages.
        more_captions: per row the captions after its first one; none of any if not given.
        rows: per row its plain columns, for `column`.

    Attributes:
        unlisted: number of files in the folder that hold or may hold images and were left out on request.
        animated: names of the rows with more than one frame, of which the first is the image; known after `check`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> atomic = (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red square"}')
        >>> rows = load_rows(folder).check()
        >>> len(rows), rows[0].caption, rows.images[0].size
        (1, 'a red square', (8, 8))
    """

    def __init__(
        self,
        images: Sequence[bytes | Path],
        captions: Sequence[str],
        names: Sequence[str],
        source: str,
        more_captions: Sequence[Sequence[str]] = (),
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._rows = rows
        self.more_captions = [tuple(more) for more in more_captions] or [()] * len(captions)
        self._images, self.captions, self.names, self.source = images, list(captions), list(names), source
        self.keys: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.noise_keys: list[str] = []
        self.mirrored: list[bool] = []
        self.groups: list[Group] = []
        self.unlisted = 0
        self.animated: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> ImageRow:  # type: ignore[override]  # slices have no use here
        try:
            image = decode(self._images[index])
        except _Undecodable as error:
            raise UserError(f"{self.names[index]} in {self.source} cannot be read", rule=str(error)) from None
        key = content_key(image)
        shared = (self.noise_keys[index], self.mirrored[index]) if self.noise_keys else (key, False)
        return ImageRow(image, self.captions[index], key, self.names[index], *shared)

    @property
    def images(self) -> Sequence[Image.Image]:
        """Return the images alone, each decoded when it is asked for; of a checked dataset one that has changed since is refused."""
        return _Picked(self._same_image, range(len(self)))

    def _same_image(self, index: int) -> Image.Image:
        row = self[index]
        if self.keys and row.key != self.keys[index]:
            raise UserError(f"{row.name} in {self.source} is not the image that it was", remedy="leave the images alone while they are used")  # fmt: skip
        return row.image

    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """Return the rows `indices` in that order, unchecked."""
        rows = list(indices)
        captions, names = [self.captions[i] for i in rows], [self.names[i] for i in rows]
        more = [self.more_captions[i] for i in rows]
        plain = _Picked(self._rows.__getitem__, rows) if len(self._rows) else ()
        return ImageDataset(_Picked(self._images.__getitem__, rows), captions, names, self.source, more, plain)

    def column(self, name: str) -> list[str]:
        """Return a column's values as texts, an empty one where a row has none.

        Raises:
            UserError: no row has such a column.
        """
        rows = [self._rows[i] for i in range(len(self._rows))]
        if not any(name in row for row in rows):
            known = sorted({key for row in rows for key in row})
            raise UserError(f"{self.source} has no column {name!r}", rule=f"its columns are {', '.join(known) or 'none'}",
                            remedy="check the spelling")  # fmt: skip
        return ["" if row.get(name) is None else str(row[name]) for row in rows]

    def one_of_each(self, rows: Sequence[int] | None = None) -> list[int]:
        """Return of each group of duplicates (`noise_keys` where there are any, else `keys`) the first of `rows`, or of all.

        Two copies are equally near to an image: d1 / d2 would be 1.
        """
        groups = self.noise_keys or self.keys
        rows = range(len(self)) if rows is None else rows
        return list({groups[i]: i for i in reversed(rows)}.values())[::-1]

    def captions_of(self, index: int) -> list[str]:
        """Return all captions of a row, its first one first."""
        return [self.captions[index], *self.more_captions[index]]

    @property
    def all_captions(self) -> list[str]:
        """Return the captions of all rows, in their order."""
        return [caption for i in range(len(self)) for caption in self.captions_of(i)]

    def check(self, progress: bool = False, near_duplicates: bool = False) -> ImageDataset:
        """Decode every image once and record `keys` and `sizes`; return self.

        With `near_duplicates` their `groups` are found, and `noise_keys` and `mirrored` follow them; otherwise
        `noise_keys` are `keys`.

        Training calls this before any model loads: a broken file found in hour three would cost the three hours.

        Raises:
            UserError: images cannot be decoded; the first ones are named.
        """
        keys, sizes, broken, thumbnails = [], [], [], Thumbnails()
        animated: list[str] = []
        for i in tqdm(range(len(self)), desc="checking images", disable=not progress, leave=False):
            try:
                image = decode(self._images[i])
            except _Undecodable as error:
                broken.append(f"{self.names[i]} ({error})")
                continue
            keys.append(content_key(image))
            sizes.append(image.size)
            if image.info.get(FRAMES):
                animated.append(self.names[i])
            if near_duplicates:
                thumbnails.add(image)
        if broken:
            raise UserError(
                f"{len(broken)} of {len(self)} images in {self.source} cannot be read: {first_of(broken)}",
                rule="every image must decode",
                remedy="replace the files or remove their rows",
            )
        self.animated = animated
        return self.known(keys, sizes, find_groups(keys, thumbnails) if near_duplicates else [])

    def known(self, keys: Sequence[str], sizes: Sequence[tuple[int, int]], groups: Sequence[Group]) -> ImageDataset:
        """Record what `check` finds, found elsewhere: keys and sizes per row, groups of duplicates; return self."""
        self.keys, self.sizes, self.groups = list(keys), list(sizes), list(groups)
        self.noise_keys, self.mirrored = noise_keys(self.keys, self.groups)
        return self

    def fingerprint(self) -> str:
        """Return a SHA-256 over keys and captions in their order, running `check` if nothing has."""
        if not self.keys:
            self.check()
        digest = hashlib.sha256()
        for key, caption, more in zip(self.keys, self.captions, self.more_captions, strict=True):
            digest.update(f"{key} {len(caption)} {caption}\n".encode("utf-8", "surrogatepass"))
            for other in more:
                digest.update(f"+ {len(other)} {other}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


class _Undecodable(Exception):
    """The bytes of one image do not decode; the message says why."""


def content_key(image: Image.Image) -> str:
    """Return the SHA-256 of an RGB image's size and pixels, in hexadecimal.

    Example:
        >>> len(content_key(Image.new("RGB", (8, 8))))
        64
    """
    width, height = image.size
    return hashlib.sha256(f"{width}x{height} RGB\n".encode() + image.tobytes()).hexdigest()


def decode(source: bytes | Path) -> Image.Image:
    """Decode an image to RGB: upright, the first frame, transparency laid on white.

    A PNG's comments are skipped where they are too large for Pillow; no pixel depends on them.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
        >>> decode(buffer.getvalue()).getpixel((0, 0))  # transparency is laid on white
        (255, 255, 255)
    """
    try:
        try:
            return _decoded(io.BytesIO(source) if isinstance(source, bytes) else source)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
        data = source if isinstance(source, bytes) else source.read_bytes()
        try:
            return _decoded(io.BytesIO(_without_comments(data)))
        except ValueError as error:
            if "MAX_TEXT" in str(error):
                raise _Undecodable(
                    "the text that holds its orientation is too large; save it without metadata"
                ) from None
            raise
    except _Undecodable:
        raise
    except FileNotFoundError:
        raise _Undecodable(f"there is no file {source.name if isinstance(source, Path) else ''}") from None
    except Image.UnidentifiedImageError:
        raise _Undecodable("no image format that Pillow knows") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise _Undecodable(
            f"it has more than {most} pixels, and so may be made to fill the memory; scale it down"
        ) from None
    except (
        Exception
    ) as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ... on bad bytes
        raise _Undecodable(f"{type(error).__name__}: {error}") from None


def _decoded(file: io.BytesIO | Path) -> Image.Image:
    # A damaged file ends in one line, without Pillow's beside it.
    with warnings.catch_warnings(action="ignore"), Image.open(file) as opened:
        if opened.format == "EPS":  # Pillow would have Ghostscript run it
            raise ValueError("PostScript is a program; save it as an image")
        # A phone's MPO has a preview or a depth map behind its image.
        frames = opened.format != "MPO" and getattr(opened, "is_animated", False)
        opened.load()
        image = ImageOps.exif_transpose(opened)
        clear = image.info.get("transparency")
        # convert("RGB") would clip these at 255: one 16-bit image as white as the next, and under one key.
        if image.mode.startswith("I;16"):
            wide = np.asarray(image)
            image = Image.fromarray((wide >> 8).astype(np.uint8))
            if isinstance(clear, int):  # the grey that stands for nothing
                image.putalpha(Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8)))
        elif image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} has no agreed white; save it with 8 or 16 bits per channel")
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            # convert("RGB") alone would bring out whatever colours lie hidden under transparent pixels.
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        rgb = image.convert("RGB")
        rgb.info = {FRAMES: True} if frames else {}
        return rgb


def _without_comments(data: bytes) -> bytes:
    """Return a PNG without its texts and colour profile, but for a text that holds its orientation."""
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind, start = data[at + 4 : at + 8], data[at + 8 : at + 40]
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or start.startswith(b"Raw profile type exif\0"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def load_rows(
    source: str | Path,
    image_column: str = "image",
    caption_column: str = "text",
    split: str | None = None,
    max_samples: int | None = None,
    seed: int | None = None,
    *,
    row_filter: Sequence[tuple[str, str, str]] = (),
    config_name: str | None = None,
    cache_dir: str | None = None,
    local: bool = False,
    several_captions: bool = False,
    need_captions: bool = True,
    unlisted: str = "refuse",
    faults: list[Fault] | None = None,
) -> ImageDataset:
    """Open a source of images and captions.

    Args:
        source: folder with metadata.jsonl or metadata.csv, parquet file, tar shards (a folder of them, one, or a pattern
            such as part-{000..010}.tar), or hub dataset id.
        image_column: column of the images: bytes, or a struct of bytes and path; a folder uses file_name instead.
        caption_column: column of the captions, one text per row.
        split: of a hub dataset (default train); of a local source the value of its column `split`.
        max_samples: keep at most that many rows.
        seed: draws which rows `max_samples` keeps; the first ones if not given.
        row_filter: (column, operator, value) conditions, operator one of = <= >=; rows must meet all of them.
        config_name: configuration of a hub dataset.
        cache_dir: where hub downloads are kept.
        local: `source` is a path whatever its form: a mistyped folder is then not searched on the hub.
        need_captions: without, a row that has none gets an empty one, and a folder without a list is all images in it.
        several_captions: a row's caption may be a list of texts too; its first one is the caption where one is asked for.
        unlisted: what to do with images in a local folder that would not be read (`ambient_sd.data.walk`): not in its list,
            of an unsupported kind, hidden, or perhaps in an archive. "refuse", or "ignore": they are left out, and
            `ImageDataset.unlisted` counts them.
        faults: collects the faults of single rows, which are then left out (a row without caption stays, with an empty
            one); without it the first fault raises.

    Returns:
        The rows, images not yet decoded (`ImageDataset.check` does that).

    Raises:
        UserError: the source does not exist, has no images, lacks a column or a file, or no row is left; images in it
            would be left out, or lie behind a link that cannot be followed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> atomic = (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red square"}')
        >>> load_rows(folder).captions
        ['a red square']
    """
    if unlisted not in UNLISTED:
        raise UserError(f"unlisted is {unlisted!r}", rule=f"it must be {' or '.join(UNLISTED)}")
    path = Path(source).expanduser()
    needed = caption_column if need_captions else None
    looks_local = str(source).startswith((".", "/", "~")) or path.suffix == ".parquet"
    left: Mapping[str, str] = {}  # what is left out of a folder -> why
    # os.path: pathlib raises where a path is longer than the system takes.
    if names_shards(path):
        table = _from_shards(path, needed, faults)
    elif os.path.isdir(path):
        if _holds_shards(path):
            table = _from_shards(path, needed, faults)
            left = _beside_shards(path, faults)
        else:
            table, left = _from_folder(path, image_column, needed, faults)
    elif os.path.isfile(path):
        table = _from_parquet(path, image_column, needed)
    elif local or looks_local or str(source).count("/") > 1:
        raise UserError(f"there is no file or folder {source}", remedy="check the path; a hub dataset reads owner/name")
    else:
        table = _from_hub(str(source), image_column, needed, split or "train", config_name, cache_dir)
        split = None
    conditions = ([("split", "=", split)] if split is not None else []) + list(row_filter)
    kept = [i for i in range(len(table.rows)) if _meets(table, i, conditions)]
    if not kept and not faults:
        text = " and ".join("".join(c) for c in conditions)
        raise UserError(
            f"{source} has no row" + (f" with {text}" if text else "s"), rule="at least one image is needed"
        )
    if max_samples is not None and max_samples < len(kept):
        chosen = kept[:max_samples] if seed is None else random.Random(seed).sample(kept, max_samples)
        kept = sorted(chosen)
    if need_captions:
        captions = [_captions(table, i, caption_column, faults, several_captions) for i in kept]
    else:
        given = [table.rows[i].get(caption_column) for i in kept]
        captions = [[text if isinstance(text, str) else ""] for text in given]
    # Last: a wrong row of the list is the nearer reason.
    _tell_unlisted(path, left, unlisted, faults)
    rows = ImageDataset(
        _Picked(table.image, kept), [c[0] for c in captions], [table.name(i) for i in kept], str(source),
        [c[1:] for c in captions], _Picked(table.rows.__getitem__, kept),
    )  # fmt: skip
    rows.unlisted = len(left)
    return rows


@dataclass(frozen=True)
class _Table:
    """Rows of any source: the plain columns, and how to reach the encoded image of a row."""

    source: str
    rows: Sequence[Mapping[str, Any]]
    image: Callable[[int], bytes | Path]
    name: Callable[[int], str]


class _Picked(Sequence[Any]):
    def __init__(self, image: Callable[[int], Any], indices: Sequence[int]) -> None:
        self._image, self._indices = image, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._image(i) for i in self._indices[index]]
        return self._image(self._indices[index])


@dataclass(frozen=True)
class _Files:
    """Reach the image of a row by its file; a class, because a worker process may have to unpickle it."""

    folder: Path
    names: Sequence[str]

    def __call__(self, index: int) -> Path:
        return self.folder / self.names[index]


@dataclass(frozen=True)
class _Cells:
    """Reach the image of a row in a table; a class for the same reason."""

    cell: Callable[[int], Any]
    source: str
    folder: Path
    local: bool

    def __call__(self, index: int) -> bytes | Path:
        return _encoded(self.cell(index), self.folder, self.local)


@dataclass(frozen=True)
class _ArrowColumn:
    column: Any  # pyarrow.ChunkedArray

    def __call__(self, index: int) -> Any:
        return self.column[index].as_py()


@dataclass(frozen=True)
class _HubColumn:
    data: Any  # datasets.Dataset
    name: str

    def __call__(self, index: int) -> Any:
        return self.data[index][self.name]


@dataclass(frozen=True)
class _ShardImages:
    """Reach the image of a row in a shard; a class for the same reason."""

    rows: ShardRows

    def __call__(self, index: int) -> bytes:
        try:
            return self.rows.image(index)
        except OSError as error:
            raise _Undecodable(str(error)) from None


def _holds_shards(folder: Path) -> bool:
    if not has_shards(folder):
        return False
    if (listing := next((name for name in METADATA if (folder / name).exists()), None)) is not None:
        raise UserError(
            f"folder {folder} has {listing} and tar files",
            rule="they are two image datasets",
            remedy="move one of them away, or give the pattern of the shards, such as part-{000..010}.tar",
        )
    return True


def _from_shards(path: Path, caption_column: str | None, faults: list[Fault] | None) -> _Table:
    found: list[tuple[str, str]] | None = None if faults is None else []
    rows = index_shards(find_shards(path), caption_column or "text", found)
    if faults is None:
        _need_columns(str(path), [caption_column], list(rows[0]))
    else:
        faults.extend(Fault(name, "broken", text) for name, text in found or ())
    return _Table(str(path), rows, _ShardImages(rows), rows.names.__getitem__)


def _from_folder(
    folder: Path, image_column: str, caption_column: str | None, faults: list[Fault] | None
) -> tuple[_Table, dict[str, str]]:
    """Return the rows of a folder, and what they leave out of it, with the reason."""
    listings = [folder / name for name in METADATA if (folder / name).is_file()]
    if not listings:
        seen = _walked(folder, faults)
        if not seen.images and not seen.unread:
            raise UserError(f"folder {folder} has no images", rule=f"it must hold images and {METADATA[0]}")
        if caption_column is None:
            return _all_in(folder, seen)
        deeper = next((folder / name for name in seen.lists), None)
        line = f'{{"file_name": "a.png", "{caption_column}": "a red apple"}}'
        raise UserError(
            f"folder {folder} has {len(seen.images)} images but no {METADATA[0]}",
            rule="captions come from there",
            remedy=f"give {deeper.parent}, which has one" if deeper else f"write one line per image: {line}",
        )
    if len(listings) > 1:
        raise UserError(
            f"folder {folder} has {' and '.join(METADATA)}", rule="two lists can disagree", remedy="keep one"
        )
    (listing,) = listings
    rows: list[dict[str, Any]] = []
    lines = 0
    column: str | None = None
    for number, row in (_csv_rows if listing.suffix == ".csv" else _json_rows)(listing):
        lines += 1
        if column is None and not isinstance(row, UserError):
            column = _name_column(row, image_column, number, listing)
        fault = row if isinstance(row, UserError) else _bad_name(row, column or "file_name", number, listing)
        if fault is None:
            rows.append(row if column == "file_name" else {**row, "file_name": row[column]})
        elif faults is None:
            raise fault
        else:
            faults.append(Fault(f"line {number}", "broken", str(fault)))
    if not lines:
        raise UserError(f"{listing} is empty", rule="at least one image is needed")
    missing = {r["file_name"]: None for r in rows if not _is_file(folder / r["file_name"])}
    if missing and faults is None:
        raise UserError(
            f"{len(missing)} of {len(rows)} images named in {listing} do not exist: {first_of(list(missing))}",
            remedy="add the files or remove their lines",
        )
    there = [str(r["file_name"]) for r in rows if r["file_name"] not in missing]
    left = not_listed(folder, there, listing, faults)
    if faults is not None:
        told = {f.name for f in faults}  # a link to nothing is told already
        faults.extend(
            Fault(r["file_name"], "broken", "the file does not exist")
            for r in rows
            if r["file_name"] in missing and r["file_name"] not in told
        )
        rows = [r for r in rows if r["file_name"] not in missing]
        if not rows:
            names: list[str] = []
            return _Table(str(folder), rows, _Files(folder, names), lambda i: names[i]), left
    _need_columns(str(folder), [caption_column], sorted({k for r in rows for k in r}))
    names = [str(r["file_name"]) for r in rows]
    return _Table(str(folder), rows, _Files(folder, names), lambda i: names[i]), left


def _walked(folder: Path, faults: list[Fault] | None) -> Found:
    """List a folder; a link that cannot be followed is a mistake, since images may lie behind it."""
    seen = walk(folder)
    if seen.broken and faults is None:
        name, why = next(iter(sorted(seen.broken.items())))
        raise UserError(f"{one_line(name, 120)} in {folder} is {why}", rule="images behind it would not be seen",
                        remedy="repair or remove it")  # fmt: skip
    if faults is not None:
        faults.extend(Fault(name, "broken", why) for name, why in sorted(seen.broken.items()))
    return seen


def _all_in(folder: Path, seen: Found) -> tuple[_Table, dict[str, str]]:
    """Take every image below a folder that has no list."""
    names = seen.images
    if not names:
        name, why = next(iter(seen.unread.items()))
        raise UserError(f"folder {folder} has no images that are read; {one_line(name, 60)} is {_an(why)}",
                        remedy="convert or unpack them to PNG or JPEG")  # fmt: skip
    return _Table(str(folder), [{"file_name": name} for name in names], _Files(folder, names), names.__getitem__), dict(
        seen.unread
    )


def not_listed(folder: Path, listed: Sequence[str], listing: Path, faults: list[Fault] | None = None) -> dict[str, str]:
    """Return the images that a folder holds beside those that its list names, by whatever path, each with the reason.

    Raises:
        UserError: a link in it cannot be followed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        >>> atomic = (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red square"}')
        >>> not_listed(folder, [], folder / "metadata.jsonl")
        {'a.png': 'not in metadata.jsonl'}
    """
    seen = _walked(folder, faults)
    names = {os.path.normpath(name) for name in listed}
    left = {**dict.fromkeys(seen.images, f"not in {listing.name}"), **seen.unread}
    left = {name: why for name, why in left.items() if name not in names}
    if left:
        files = {os.path.realpath(folder / name) for name in names}
        left = {name: why for name, why in left.items() if seen.real[name] not in files}
    return dict(sorted(left.items()))


def _beside_shards(folder: Path, faults: list[Fault] | None) -> dict[str, str]:
    """Return what a folder of shards holds beside them."""
    seen, shards = _walked(folder, faults), {os.path.realpath(path) for path in find_shards(folder)}
    left = {**dict.fromkeys(seen.images, "not in a shard"), **seen.unread}
    return {name: why for name, why in sorted(left.items()) if seen.real[name] not in shards}


def _tell_unlisted(folder: Path, left: Mapping[str, str], unlisted: str, faults: list[Fault] | None) -> None:
    if not left or unlisted == "ignore":
        return
    if faults is not None:
        faults.extend(Fault(name, "unlisted", f"it is {_an(why)}") for name, why in left.items())
        return
    raise refuse_unlisted(folder, left)


def refuse_unlisted(folder: Path, left: Mapping[str, str]) -> UserError:
    """Return the refusal of a folder of which files would be left out: each name with its reason.

    Example:
        >>> print(refuse_unlisted(Path("images"), {"b.heic": "a kind that is not read"}))
        1 files in images would be left out: b.heic (a kind that is not read); what is not read is not seen; list, convert, unpack or move them, or give --unlisted ignore
    """
    shown = first_of([f"{one_line(name, 60)} ({why})" for name, why in left.items()])
    return UserError(f"{len(left)} files in {folder} would be left out: {shown}", rule="what is not read is not seen",
                     remedy="list, convert, unpack or move them, or give --unlisted ignore")  # fmt: skip


def _an(why: str) -> str:
    return why.replace("a kind", "of a kind") if why.startswith("a kind") else why


def _name_column(row: Any, image_column: str, number: int, listing: Path) -> str:
    """Return the column of a list that names the files, by its first row.

    Raises:
        UserError: it has none, or several that may be.
    """
    columns = [c for c in row if c is not None] if isinstance(row, dict) else []
    if "file_name" in columns:
        return "file_name"
    if image_column in columns and image_column != "image":
        return image_column
    known = [c for c in columns if c.strip().lower() in NAME_COLUMNS]
    if len(known) == 1 or not columns:
        return known[0] if known else "file_name"
    where = f"the header of {listing}" if listing.suffix == ".csv" else f"line {number} of {listing}"
    raise UserError(f"{where} has {'no column' if not known else f'{len(known)} columns'} of file names",
                    rule=f"its columns are {', '.join(one_line(c, 40) for c in columns)}",
                    remedy='call the one with the file names "file_name"')  # fmt: skip


def _bad_name(row: Any, column: str, number: int, listing: Path) -> UserError | None:
    """Return what is wrong with the image's name in a row, if anything."""
    name = row.get(column) if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        return UserError(f"line {number} of {listing} names no image", rule=f'it needs a text "{one_line(column, 40)}"')
    # A list that came with an image set must not reach for other files of this machine.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return UserError(
            f"line {number} of {listing} names {name!r}",
            rule=f"{column} is a path inside {listing.parent}",
            remedy="move the image there, or put metadata.jsonl in the folder that holds them all",
        )
    return None


def _json_rows(listing: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text_lines(listing), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_no_key_twice)
            except (ValueError, RecursionError) as error:
                yield number, UserError(f"line {number} of {listing} is no JSON", rule=str(error))


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return columns


def _csv_rows(listing: Path) -> Iterator[tuple[int, Any]]:
    lines = _text_lines(listing)
    reader = csv.DictReader((f"{line}\n" for line in lines), delimiter=_delimiter(lines), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise UserError(f"the header of {listing} is no CSV", rule=str(error)) from None
    reader.fieldnames = names
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the first line of {listing} has the column {twice[0]!r} twice", rule="one would hide the other",
                        remedy="rename or remove one")  # fmt: skip
    while True:
        try:
            row = next(reader)
            if None in row:
                raise csv.Error("more cells than the first line has names; put quotes around a text with commas")
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, UserError(f"line {reader.line_num} of {listing} is no CSV", rule=str(error))
        else:
            yield reader.line_num, row


def _delimiter(lines: Sequence[str]) -> str:
    """Return what stands between the cells of a CSV, by its header alone: a comma, a semicolon or a tab."""

    def header(delimiter: str) -> list[str]:
        try:
            return [
                c.strip().lower() for c in next(csv.reader((f"{line}\n" for line in lines), delimiter=delimiter), [])
            ]
        except csv.Error:
            return []

    headers = {delimiter: header(delimiter) for delimiter in (",", ";", "\t")}
    for name in ("file_name", *NAME_COLUMNS):
        if found := next((d for d, columns in headers.items() if name in columns and len(columns) > 1), None):
            return found
    return max(headers, key=lambda d: len(headers[d]))  # the first of equals: the comma


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a caption in the place of the name is too long for the file system
        return False


def _from_parquet(path: Path, image_column: str, caption_column: str | None) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Else a folder named like year=2020 on the way becomes a column.
        table = pq.read_table(path, partitioning=None)
        rows = table.drop_columns([image_column] if image_column in table.column_names else []).to_pylist()
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # texts that are no UTF-8, dates of no calendar
        raise UserError(
            f"{path} cannot be read as parquet", rule=str(error), remedy="give a parquet file or a folder"
        ) from None
    _need_columns(str(path), [image_column, caption_column], table.column_names)
    images = table.column(image_column)
    image = _Cells(_ArrowColumn(images), str(path), path.parent, local=True)
    return _Table(str(path), rows, image, lambda i: f"row {i}")


def _from_hub(
    name: str, image_column: str, caption_column: str | None, split: str, config_name: str | None, cache_dir: str | None
) -> _Table:
    import datasets

    try:
        data = datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    except (
        Exception
    ) as error:  # the hub client raises a dozen kinds: not found, gated, offline, no such split or configuration
        raise UserError(
            f"dataset {name} cannot be loaded from the hub",
            rule=f"{type(error).__name__}: {error}",
            remedy="check name, split and network, or give a local folder or parquet file",
        ) from None
    _need_columns(name, [image_column, caption_column], data.column_names)
    images = data.select_columns([image_column])
    if isinstance(data.features[image_column], datasets.Image):
        images = images.cast_column(image_column, datasets.Image(decode=False))
    image = _Cells(_HubColumn(images, image_column), name, Path(), local=False)
    return _Table(name, data.remove_columns([image_column]), image, lambda i: f"row {i}")


def _encoded(cell: Any, folder: Path, local: bool) -> bytes | Path:
    """Return what a cell holds of an image: its bytes, or the path of its file."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        # As for the names in a folder's list. A hub data set's paths are those of the downloads.
        if local and (Path(cell).is_absolute() or ".." in Path(cell).parts):
            raise _Undecodable(f"{one_line(cell, 80)} is no path inside the folder of the file")
        return folder / cell
    if not isinstance(cell, bytes):
        raise _Undecodable(f"{type(cell).__name__} is not the bytes or path of an image")
    return cell


def _text_lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        # Spreadsheets write "Unicode text" in UTF-16, with its mark of byte order.
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read", rule=str(error), remedy="it must be a UTF-8 text file") from None
    # Not splitlines(): that also breaks at characters such as U+2028, which JSON texts may hold.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _need_columns(source: str, needed: Sequence[str | None], columns: Sequence[str]) -> None:
    for column in needed:
        if column is not None and column not in columns:
            raise UserError(
                f"{source} has no column {column!r}",
                rule=f"its columns are {', '.join(map(str, columns)) or 'none'}",
                remedy="name the right one with --caption_column or --image_column",
            )


def _captions(table: _Table, index: int, column: str, faults: list[Fault] | None, several: bool) -> list[str]:
    """Return the captions of a row, at least one."""
    given = table.rows[index].get(column)
    captions = list(given) if several and isinstance(given, list) and given else [given]
    rule, remedy = "", "write one, or an empty text for an image without caption"
    for caption in captions:
        if not isinstance(caption, str):
            rule = f"column {column!r} must hold a text there, not {type(caption).__name__}"
            if isinstance(caption, list) and caption and not several:
                remedy += "; --caption_mitigation mc takes a list of them"
        elif any("\ud800" <= c <= "\udfff" for c in caption):  # no tokenizer takes it
            rule = f"column {column!r} holds half a character (a lone surrogate) there"
    if rule:
        if faults is None:
            raise UserError(f"{table.name(index)} in {table.source} has no caption", rule=rule, remedy=remedy)
        faults.append(Fault(table.name(index), "captionless", rule))
        return [""]
    return [str(caption) for caption in captions]


def _meets(table: _Table, index: int, conditions: Sequence[tuple[str, str, str]]) -> bool:
    row = table.rows[index] if conditions else {}
    for column, operator, wanted in conditions:
        if column not in row:
            raise UserError(
                f"{table.name(index)} of {table.source} has no column {column!r} to choose rows by",
                rule=f"its columns are {', '.join(map(str, row))}",
                remedy="correct the split or row filter",
            )
        have = row[column]
        if operator == "=":
            # The value comes from a command line: compare as the cell would be written there.
            if (str(have).lower() if isinstance(have, bool) else str(have)) != (
                wanted.lower() if isinstance(have, bool) else wanted
            ):
                return False
            continue
        try:
            if have is None or not (float(have) <= float(wanted) if operator == "<=" else float(have) >= float(wanted)):
                return False
        except (TypeError, ValueError):
            raise UserError(
                f"row filter {column}{operator}{wanted} compares {have!r}", rule=f"{operator} needs numbers"
            ) from None
    return True
