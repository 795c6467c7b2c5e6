"""What every layout of a dataset is read through: a `Request` goes in, a `Table` of rows comes out.

A layout is a way in which people keep images and captions: a list beside the images, a text beside each, folders whose names say
it, a configuration file of another trainer. Each is one file of this package, a subclass of `Layout`. None of them decodes an image,
and none has an opinion about training: what a file of settings asks of the training is an `Ask`, which the training answers.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ambient_sd.data.images import Undecodable
from ambient_sd.data.walk import Found, walk
from ambient_sd.utils.errors import UserError, first_of, one_line

TRAINING, REGULARISATION, HELDOUT = "training", "regularisation", "heldout"  # roles of rows


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


@dataclass(frozen=True)
class Ask:
    """Hold what a file of settings asks of the training beside its images.

    Attributes:
        text: the setting as its file has it, such as "flip_aug = true".
        setting: the field of `TrainConfig` that does it; empty: nothing here does.
        values: values of that field with which the run does it.
        fresh: it changes an image anew at each epoch; under a fixed noise that leaks the image.
        remedy: what to do where no setting does it, or where it leaks.

    Example:
        >>> Ask("flip_aug = true", "random_flip", (True,), fresh=True).setting
        'random_flip'
    """

    text: str
    setting: str = ""
    values: tuple[Any, ...] = ()
    fresh: bool = False
    remedy: str = ""


@dataclass
class Request:
    """Say what is to be read, in the words of `ambient_sd.data.sources.load_rows`.

    Example:
        >>> Request("my-images.toml").path.suffix
        '.toml'
    """

    source: str
    image_column: str = "image"
    caption_column: str = "text"
    need_captions: bool = True
    split: str | None = None
    config_name: str | None = None
    cache_dir: str | None = None
    caption_extension: str | None = None
    instance_prompt: str | None = None
    skip_broken: bool = False
    named: bool = False  # the layout is named, and not told from the files
    faults: list[Fault] | None = None

    @property
    def path(self) -> Path:
        """Return the source as a path."""
        return Path(self.source).expanduser()

    @property
    def is_folder(self) -> bool:
        """Tell whether the source is a folder."""
        return os.path.isdir(self.path)  # pathlib raises where a path is longer than the system takes

    @property
    def must_have_captions(self) -> bool:
        """Tell whether an image without caption is a mistake."""
        return self.need_captions and self.instance_prompt is None

    @cached_property
    def found(self) -> Found:
        """List the folder; a link that cannot be followed is a mistake, since images may lie behind it."""
        return walked(self.path, self.faults)


@dataclass(frozen=True)
class Table:
    """Hold rows of any layout: their plain columns, and how to reach the encoded image of each.

    Attributes:
        source: for messages.
        rows: columns of each row, its caption (a text, or a list of them) among them.
        image: row -> encoded bytes or path; picklable, because a worker process may need it.
        name: row -> its name in messages.
        left: files that are not read -> why.
        roles: of each row; none: all are training images.
        repeats: how often an epoch holds each row; none: once.
        split_done: the request's split is chosen already; otherwise it is the value of a column `split`.
        no_caption: why a row without caption has none, for messages.
        notes: what the user should know, a line each.
        asks: what the source asks of the training.

    Example:
        >>> table = Table("mine", [{"text": "a cat"}], Files(Path("mine"), ["a.png"]), ["a.png"].__getitem__)
        >>> table.image(0).name
        'a.png'
    """

    source: str
    rows: Sequence[Mapping[str, Any]]
    image: Callable[[int], bytes | Path]
    name: Callable[[int], str]
    left: Mapping[str, str] = field(default_factory=dict)
    roles: Sequence[str] = ()
    repeats: Sequence[int] = ()
    split_done: bool = False
    no_caption: str = ""
    notes: tuple[str, ...] = ()
    asks: tuple[Ask, ...] = ()


class Layout(ABC):
    """Recognize and read one layout.

    Attributes:
        name: for `--layout`.
        what: in a few words, for messages.

    Example:
        >>> from ambient_sd.data.layouts import LAYOUTS
        >>> [layout.name for layout in LAYOUTS if layout.detects(Request("part-{000..010}.tar"))]
        ['webdataset', 'hub']
    """

    name: str
    what: str

    @abstractmethod
    def detects(self, request: Request) -> bool:
        """Tell whether the source looks like this layout; nothing is read of it but names."""

    @abstractmethod
    def read(self, request: Request) -> Table:
        """Read the rows.

        Raises:
            UserError: the source breaks a rule of the layout.
        """


class Picked(Sequence[Any]):
    """Show some places of what a function gives, in a given order.

    Example:
        >>> list(Picked("abc".__getitem__, [2, 0]))
        ['c', 'a']
    """

    def __init__(self, item: Callable[[int], Any], indices: Sequence[int]) -> None:
        self._item, self._indices = item, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._item(i) for i in self._indices[index]]
        return self._item(self._indices[index])


@dataclass(frozen=True)
class Files:
    """Reach the image of a row by its file; a class, because a worker process may have to unpickle it.

    Example:
        >>> Files(Path("images"), ["a.png"])(0).name
        'a.png'
    """

    folder: Path
    names: Sequence[str]

    def __call__(self, index: int) -> Path:
        return self.folder / self.names[index]


@dataclass(frozen=True)
class Cells:
    """Reach the image of a row by its cell of a table: bytes, a path, or a struct of both.

    Example:
        >>> Cells([{"bytes": b"PNG", "path": None}].__getitem__, Path(), local=True)(0)
        b'PNG'
    """

    cell: Callable[[int], Any]
    folder: Path
    local: bool

    def __call__(self, index: int) -> bytes | Path:
        cell = self.cell(index)
        if isinstance(cell, Mapping):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            # As for the names in a folder's list. A hub dataset's paths are those of the downloads.
            if self.local and (Path(cell).is_absolute() or ".." in Path(cell).parts):
                raise Undecodable(f"{one_line(cell, 80)} is no path inside the folder of the file")
            return self.folder / cell
        if not isinstance(cell, bytes):
            raise Undecodable(f"{type(cell).__name__} is not the bytes or path of an image")
        return cell


def walked(folder: Path, faults: list[Fault] | None = None) -> Found:
    """List a folder; a link that cannot be followed is a mistake, since images may lie behind it.

    Raises:
        UserError: there is such a link, and no `faults` to tell it to.

    Example:
        >>> import tempfile
        >>> walked(Path(tempfile.mkdtemp())).images
        []
    """
    seen = walk(folder)
    if seen.broken and faults is None:
        name, why = next(iter(sorted(seen.broken.items())))
        raise UserError(f"{one_line(name, 120)} in {folder} is {why}", rule="images behind it would not be seen",
                        remedy="repair or remove it")  # fmt: skip
    if faults is not None:
        faults.extend(Fault(name, "broken", why) for name, why in sorted(seen.broken.items()))
    return seen


def not_listed(folder: Path, listed: Sequence[str], listing: Path, seen: Found | None = None) -> dict[str, str]:
    """Return the images that a folder holds beside those that its list names, by whatever path, each with the reason.

    Raises:
        UserError: a link in it cannot be followed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> not_listed(folder, [], folder / "metadata.jsonl")
        {'a.png': 'not in metadata.jsonl'}
    """
    seen = seen or walked(folder)
    names = {os.path.normpath(name) for name in listed}
    left = {**dict.fromkeys(seen.images, f"not in {listing.name}"), **seen.unread}
    left = {name: why for name, why in left.items() if name not in names}
    if left:
        files = {os.path.realpath(folder / name) for name in names}
        left = {name: why for name, why in left.items() if seen.real[name] not in files}
    return dict(sorted(left.items()))


def refuse_unlisted(folder: str | Path, left: Mapping[str, str]) -> UserError:
    """Return the refusal of a folder of which files would be left out: each name with its reason.

    Example:
        >>> print(refuse_unlisted("images", {"b.heic": "a kind that is not read"}))
        1 files in images would be left out: b.heic (a kind that is not read); what is not read is not seen; list, convert, unpack or move them, or give --unlisted ignore
    """
    shown = first_of([f"{one_line(name, 60)} ({why})" for name, why in left.items()])
    return UserError(f"{len(left)} files in {folder} would be left out: {shown}", rule="what is not read is not seen",
                     remedy="list, convert, unpack or move them, or give --unlisted ignore")  # fmt: skip


def phrase(why: str) -> str:
    """Return the reason why a file is not read as the end of "it is ...".

    Example:
        >>> phrase("a kind that is not read")
        'of a kind that is not read'
    """
    return why.replace("a kind", "of a kind") if why.startswith("a kind") else why


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with its mark, as spreadsheets and Windows' editors write it; lines end in `\\n`.

    Raises:
        UserError: it cannot be read, or is in another encoding.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.txt")
        >>> _ = path.write_bytes("a café\\r\\n".encode("utf-16"))
        >>> read_text(path)
        'a café\\n'
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read", rule=str(error), remedy="it must be a UTF-8 text file") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def need_columns(source: str, needed: Sequence[str | None], columns: Sequence[str]) -> None:
    """Raise a `UserError` where a table lacks a needed column.

    Example:
        >>> try:
        ...     need_columns("a.parquet", ["text"], ["image", "caption"])
        ... except UserError as error:
        ...     print(error)
        a.parquet has no column 'text'; its columns are image, caption; name the right one with --caption_column or --image_column
    """
    for column in needed:
        if column is not None and column not in columns:
            raise UserError(
                f"{source} has no column {column!r}",
                rule=f"its columns are {', '.join(map(str, columns)) or 'none'}",
                remedy="name the right one with --caption_column or --image_column",
            )


def with_trigger(caption: str, trigger: str) -> str:
    """Return a caption with its trigger word: in place of [trigger], else before it unless it is in there.

    Example:
        >>> with_trigger("a photo of [trigger]", "sks"), with_trigger("a dog", "sks"), with_trigger("", "sks")
        ('a photo of sks', 'sks a dog', 'sks')
    """
    caption = caption.replace("[trigger]", trigger)
    there = re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption)
    return caption if there else f"{trigger} {caption}".rstrip()
