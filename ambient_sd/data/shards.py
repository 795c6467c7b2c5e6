"""WebDataset shards: tar files whose members `KEY.jpg` and `KEY.txt` (or `KEY.json`) are one row.

A key is a member's name up to the first dot of its last part, as in WebDataset; members of one key need not be
adjacent. Every shard's headers are read once (`tarfile`); a row keeps a name and 42 bytes: shard, and place and size of
image and caption. Reading a row opens its shard, seeks and reads: nothing is extracted and no handle is shared, so any
number of worker processes, forked or not, may read at once.

Not read: compressed archives (no random access), links, sparse members. Shards on other machines are not fetched.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ambient_sd.data.walk import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from ambient_sd.utils.errors import UserError, first_of

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
CAPTION_KINDS = ("txt", "json")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|Z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000
_MOST_CAPTION = 2**20  # bytes; an image under the name of a caption would be read whole
_NONE = -1


class ShardRows(Sequence[Mapping[str, Any]]):
    """Index the rows of shards; `rows[i]` reads the columns of one from its shard, `image(i)` its image.

    Args:
        paths: the shards.
        caption_column: column under which the text of a `.txt` member appears.

    Example:
        >>> import io, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with tarfile.open(folder / "a.tar", "w") as tar:
        ...     for name, data in (("1.jpg", b"an image"), ("1.txt", b"a cat")):
        ...         info = tarfile.TarInfo(name)
        ...         info.size = len(data)
        ...         tar.addfile(info, io.BytesIO(data))
        >>> rows = index_shards(find_shards(folder), "text")
        >>> rows[0], rows.image(0)
        ({'text': 'a cat'}, b'an image')
    """

    def __init__(self, paths: Sequence[Path], caption_column: str) -> None:
        self.paths, self.caption_column = list(paths), caption_column
        self.names: list[str] = []
        self._shard = array("H" if len(self.paths) < 2**16 else "I")
        # Per row: place and size of the image, then of .txt and .json; sizes of captions are checked to fit.
        self._image, self._size = array("q"), array("q")
        self._text, self._text_size = array("q"), array("i")
        self._json, self._json_size = array("q"), array("i")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Mapping[str, Any]:  # type: ignore[override]  # slices have no use here
        path = self.paths[self._shard[index]]
        with path.open("rb") as file:
            return self._columns(file, index)

    def image(self, index: int) -> bytes:
        """Return the encoded image of a row.

        Raises:
            OSError: the shard cannot be read any more, or has become shorter.
        """
        with self.paths[self._shard[index]].open("rb", buffering=0) as file:
            return _read(file, self._image[index], self._size[index])

    def without_caption(self) -> list[int]:
        """Return the rows that have neither a `.txt` nor a `.json` member."""
        return [i for i in range(len(self)) if self._text[i] == self._json[i] == _NONE]

    def add(self, shard: int, name: str, parts: Mapping[str, tuple[int, int]], image: str) -> None:
        """Append a row: its image's name in messages, and place and size of each of its members by extension."""
        self.names.append(name)
        self._shard.append(shard)
        for kind, places, sizes in (
            (image, self._image, self._size),
            ("txt", self._text, self._text_size),
            ("json", self._json, self._json_size),
        ):
            place, size = parts.get(kind, (_NONE, 0))
            places.append(place)
            sizes.append(size)

    def drop_last(self) -> None:
        """Take the row back that was added last."""
        for column in (self.names, self._shard, self._image, self._size, self._text, self._text_size, self._json, self._json_size):  # fmt: skip
            column.pop()

    def check_last(self, file: BinaryIO) -> None:
        """Read the columns of the row added last.

        Raises:
            UserError: they are no UTF-8, or no JSON object.
        """
        self._columns(file, len(self) - 1)

    def _columns(self, file: BinaryIO, index: int) -> Mapping[str, Any]:
        columns: dict[str, Any] = {}
        try:
            if self._json[index] != _NONE:
                columns = json.loads(_read(file, self._json[index], self._json_size[index]).decode("utf-8-sig"))
                if not isinstance(columns, dict):
                    raise ValueError(f"it holds a {type(columns).__name__}, not columns with values")
            if self._text[index] != _NONE and self.caption_column not in columns:
                text = _read(file, self._text[index], self._text_size[index]).decode("utf-8-sig")
                columns[self.caption_column] = text.rstrip("\r\n")
        except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON
            raise UserError(
                f"the caption of {self.names[index]} cannot be read",
                rule=str(error),
                remedy="it must be a UTF-8 .txt, or a .json with columns and their values",
            ) from None
        return columns


@dataclass(frozen=True)
class _Member:
    name: str
    key: str
    kind: str
    place: int
    size: int


def has_shards(folder: Path) -> bool:
    """Tell whether a folder holds tar files, compressed or not.

    Raises:
        UserError: the folder cannot be listed.

    Example:
        >>> import tempfile
        >>> has_shards(Path(tempfile.mkdtemp()))
        False
    """
    try:
        with os.scandir(folder) as entries:
            return any(_is_shard(e.name) for e in entries)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read", rule=str(error.strerror)) from None


def names_shards(source: Path) -> bool:
    """Tell whether a path is a tar file, compressed or not, or a pattern such as `part-{000..010}.tar`.

    Example:
        >>> names_shards(Path("part-{000..010}.tar"))
        True
    """
    return _is_shard(source.name) and (os.path.isfile(source) or bool(_RANGE.search(str(source))))


def _is_shard(name: str) -> bool:
    return name.lower().endswith(".tar") or bool(_COMPRESSED_NAME.search(name))


def find_shards(source: Path) -> list[Path]:
    """Return the shards of a folder, a file or a pattern with ranges `{000..010}`, in the order of their names.

    Raises:
        UserError: a shard is compressed or missing, or a range is wrong.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.tar").touch()
        >>> [path.name for path in find_shards(folder)]
        ['a.tar']
    """
    if source.is_dir():
        # A file and a link to it are one shard, under the file's own name.
        found = sorted((p for p in source.iterdir() if _is_shard(p.name)), key=lambda p: (p.is_symlink(), p.name))
        paths = sorted({os.path.realpath(p): p for p in reversed(found)}.values())
    elif source.exists():
        paths = [source]
    else:
        paths = [Path(name) for name in _expanded(str(source))]
        absent = [p.name for p in paths if not p.is_file()]
        if absent:
            raise UserError(
                f"{len(absent)} of {len(paths)} shards of {source} do not exist: {first_of(absent)}",
                remedy="add them, or correct the range",
            )
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is no file", rule="a shard is a tar file", remedy="move it away, or name the shards"
            )
        if _COMPRESSED_NAME.search(path.name):
            raise _compressed(path, "as its name says")
    return paths


def _expanded(pattern: str) -> list[str]:
    """Expand `{first..last}` with leading zeros kept, as a shell does."""
    names = [""]
    pieces = _RANGE.split(pattern)  # text, first, last, text, ...
    for i, piece in enumerate(pieces):
        if i % 3 == 0:
            names = [name + piece for name in names]
        elif i % 3 == 1:
            first, last = int(piece[:18]), int(pieces[i + 1][:18])
            if not 0 <= last - first < _MOST_SHARDS // len(names):
                raise UserError(
                    f"{pattern} has the range {{{piece}..{pieces[i + 1]}}}",
                    rule=f"it counts upwards, and gives at most {_MOST_SHARDS} shards",
                    remedy="for example part-{000..010}.tar",
                )
            width = len(piece) if piece.startswith("0") else 0
            names = [f"{name}{number:0{width}d}" for name in names for number in range(first, last + 1)]
    return names


def index_shards(paths: Sequence[Path], caption_column: str, faults: list[tuple[str, str]] | None = None) -> ShardRows:
    """Read the headers of shards and return their rows, in the order of shards and images.

    Args:
        paths: the shards.
        caption_column: column of the captions.
        faults: collects (name, text) of what is wrong, and reading continues with the intact rows; without it the first
            fault raises.

    Raises:
        UserError: a shard is damaged, compressed or empty, or its members do not make rows.

    Example:
        >>> import io, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with tarfile.open(folder / "a.tar", "w") as tar:
        ...     for name, data in (("1.jpg", b"an image"), ("1.txt", b"a cat")):
        ...         info = tarfile.TarInfo(name)
        ...         info.size = len(data)
        ...         tar.addfile(info, io.BytesIO(data))
        >>> index_shards(find_shards(folder), "text").names
        ['a.tar/1.jpg']
    """
    rows = ShardRows(paths, caption_column)

    def tell(name: str, error: UserError) -> None:
        if faults is None:
            raise error from None
        faults.append((name, str(error)))

    for shard, path in enumerate(paths):
        keys: dict[str, list[_Member]] = {}
        before = len(rows), len(faults or ())
        try:
            with path.open("rb") as file:
                try:
                    for member in _members(path, file, tell):
                        keys.setdefault(member.key, []).append(member)
                except UserError as error:
                    tell(path.name, error)
                for members in keys.values():
                    _add_row(rows, shard, path, file, members, tell)
        except OSError as error:
            tell(path.name, UserError(f"shard {path} cannot be read", rule=str(error.strerror or error)))
        if (len(rows), len(faults or ())) == before:
            tell(
                path.name,
                UserError(
                    f"shard {path} has no images",
                    rule=f"a row is a member KEY.{IMAGE_KINDS[0]} (or {', '.join(IMAGE_KINDS[1:])}) and KEY.txt or KEY.json",
                    remedy="remove the shard, or name its members so",
                ),
            )
    if faults is None and (absent := rows.without_caption()):
        raise UserError(
            f"{len(absent)} of {len(rows)} images have no caption: {first_of([rows.names[i] for i in absent])}",
            rule="an image KEY.jpg needs KEY.txt, or KEY.json with the caption column, in the same shard",
            remedy="add the members; an empty KEY.txt is an image without caption",
        )
    return rows


def _add_row(rows: ShardRows, shard: int, path: Path, file: BinaryIO, members: list[_Member], tell: Any) -> None:
    """Make one row of the members with one key, or tell what is wrong with them."""
    first = members[0].name
    images = [m for m in members if m.kind in IMAGE_KINDS]
    twice = [m for m in members if m.kind in CAPTION_KINDS and sum(o.kind == m.kind for o in members) > 1]
    if not images:
        dotted = next((m for m in members if m.kind.rpartition(".")[2] in IMAGE_KINDS), None)
        other = next((m for m in members if "." + m.kind.rpartition(".")[2] in IMAGE_SUFFIXES | UNREAD_SUFFIXES), None)
        if dotted is None and other is not None:  # left alone, it would count as looked at
            tell(f"{path.name}/{other.name}", UserError(f"{other.name} in shard {path} is an image of a kind that is not read there",
                 rule=f"an image is a member KEY.{', KEY.'.join(IMAGE_KINDS)}", remedy="convert it"))  # fmt: skip
            return
        if dotted is not None:
            rule, remedy = "a key ends at the first dot of a name", "take the other dots out of its name"
        else:
            rule, remedy = "it needs one with the same name up to the dot", "add it, or take the member out"
        if dotted is not None or any(m.kind in CAPTION_KINDS for m in members):
            name = dotted.name if dotted is not None else first
            tell(f"{path.name}/{name}", UserError(f"{name} in shard {path} has no image", rule=rule, remedy=remedy))
        return
    name = f"{path.name}/{images[0].name}"
    if len(images) > 1 or twice:
        both = " and ".join(m.name for m in (images if len(images) > 1 else twice)[:2])
        what = "images" if len(images) > 1 else "captions"
        tell(name, UserError(f"{both} in shard {path} are two {what} of one key", rule="a row has one of each",
                             remedy="rename or remove one"))  # fmt: skip
        return
    if large := next((m for m in members if m.kind in CAPTION_KINDS and m.size > _MOST_CAPTION), None):
        tell(name, UserError(f"{large.name} in shard {path} has {large.size} bytes",
                             rule=f"a caption has at most {_MOST_CAPTION}", remedy="is it a caption?"))  # fmt: skip
        return
    rows.add(shard, name, {m.kind: (m.place, m.size) for m in members}, images[0].kind)
    try:
        rows.check_last(file)
    except UserError as error:
        rows.drop_last()
        tell(name, error)


def _members(path: Path, file: BinaryIO, tell: Any) -> Iterator[_Member]:
    """Yield the regular members of a tar file that have a key.

    `tarfile` takes a damaged header after the first, and a file cut between two members, for the end: what follows the
    last member is looked at here.
    """
    start = file.read(6)
    if kind := next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None):
        raise _compressed(path, kind)
    file.seek(0)
    last, whole = -1, os.fstat(file.fileno()).st_size
    try:
        tar: Any  # mypy knows no `members`
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # it would keep every header
                if info.offset <= last or not 0 <= info.offset_data + info.size <= whole:
                    raise tarfile.ReadError(f"a member reaches from byte {info.offset} out of the file")
                last = info.offset
                name = info.name.removeprefix("./")
                folder, slash, base = name.rpartition("/")
                key, dot, kind = base.partition(".")
                if info.isdir() or not (key and dot):
                    continue
                if bad := _refused(info, name):
                    tell(f"{path.name}/{name}", UserError(f"{name} in shard {path} {bad}",
                         rule="a row's members are plain files inside the shard", remedy="write the shard again"))  # fmt: skip
                    continue
                yield _Member(name, folder + slash + key, kind.lower(), info.offset_data, info.size)
            end = tar.offset
    except UserError:  # it is a ValueError, and tells more
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError, KeyError) as error:
        raise _damaged(path, str(error)) from None
    file.seek(end)
    if any(block := file.read(tarfile.BLOCKSIZE)) or len(block) < tarfile.BLOCKSIZE:
        raise _damaged(path, f"byte {end} begins neither a member nor the end mark")
    while tail := file.read(2**20):
        if any(tail):
            raise UserError(f"shard {path} continues after its end mark", rule="the rest would never be read",
                            remedy="two archives were joined: give them one by one")  # fmt: skip


def _refused(info: tarfile.TarInfo, name: str) -> str:
    """Return why a member cannot be part of a row, if it cannot."""
    if name.startswith("/") or ".." in name.split("/"):
        return "has a name that reaches out of the shard"
    if not info.isreg():
        return "is a link" if info.issym() or info.islnk() else "is no file"
    return "is a sparse file" if info.sparse is not None else ""


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"shard {path} is damaged or cut short", rule=why, remedy="download it or write it again")


def _compressed(path: Path, kind: str) -> UserError:
    return UserError(
        f"shard {path} is compressed ({kind})",
        rule="images are read in any order, and a compressed archive has only one",
        remedy="decompress it to a plain .tar (images hardly get larger)",
    )


def _read(file: Any, place: int, size: int) -> bytes:
    file.seek(place)
    data = bytes(file.read(size))
    # An unbuffered read may give less than asked for.
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    if len(data) < size:
        raise OSError(f"the shard ends {size - len(data)} bytes before the member does")
    return data
