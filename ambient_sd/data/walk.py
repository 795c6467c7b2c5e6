"""List a folder of images: every file below it, links followed, once and in a fixed order.

    images     files by their ending, or without a known one by their first bytes
    unread     images of a kind that is not read (HEIC, raw), hidden images, archives that may hold some

Links to files and folders are followed. A file that several paths reach is one image, under its own path rather than a
link's. A link back to a folder above it, a link to nothing and a folder that cannot be listed are mistakes: the images
behind them would go unseen. Hidden files (of a viewer, of macOS) are not images of the dataset, but are reported where their
bytes are an image. Folders of version control are not entered.

Nothing is decoded here; `ambient_sd.data.sources` decides what to do with the files found.
"""

from __future__ import annotations

import errno
import heapq
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ambient_sd.utils.errors import UserError, one_line

METADATA = ("metadata.jsonl", "metadata.csv")
IMAGE_SUFFIXES = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pnm", ".pbm",
}  # fmt: skip
UNREAD_SUFFIXES = {
    ".heic", ".heif", ".jxl", ".psd", ".svg", ".tga", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".exr", ".hdr", ".dds", ".qoi",
    ".pcx",
}  # fmt: skip
_ARCHIVE = re.compile(r"\.(zip|7z|rar|parquet|arrow|tfrecord|tar(\.\w+)?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_TEXT_SUFFIXES = {".txt", ".json", ".jsonl", ".csv", ".caption"}  # not opened: a set may have one beside every image
_VERSION_CONTROL = {".git", ".hg", ".svn", ".dvc"}
_SAMPLES, _SHEET = "samples.jsonl", "contact_sheet.png"  # of `ambient-sd sample`


@dataclass
class Found:
    """Hold the files of a folder; names are sorted paths in it with `/`.

    Attributes:
        images: files that are read as images.
        unread: file -> why it is not read: "a kind that is not read", "hidden", "an archive".
        lists: metadata files, the folder's own among them.
        texts: other files that may hold captions: those of no other kind.
        broken: path -> what is wrong with it, of links and folders that cannot be followed.
        again: further paths to files that are counted already.
        real: image -> its real path.

    Example:
        >>> Found().images
        []
    """

    images: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    lists: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    real: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class _Folder:
    """A folder to list; sorted so that a file gets its own name before a link's."""

    hidden: bool
    linked: bool
    name: str  # as shown, "" for the first
    real: str


def walk(folder: Path) -> Found:
    """Find every image below a folder.

    Args:
        folder: an existing folder, or a link to one.

    Raises:
        UserError: links form a cycle: a path without end.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("a.png", "b.heic", "notes.txt"):
        ...     (folder / name).touch()
        >>> found = walk(folder)
        >>> found.images, found.unread
        (['a.png'], {'b.heic': 'a kind that is not read'})
    """
    found = Found()
    start = _Folder(False, False, "", os.path.realpath(folder))
    pending, entered = [start], set()
    inside: dict[str, list[tuple[str, str]]] = {}  # real folder -> (real folder in it, name as shown)
    files: list[tuple[bool, bool, str, str]] = []  # hidden, reached through a link, name, real path
    while pending:
        at = heapq.heappop(pending)
        if at.real in entered:
            if not at.hidden:
                found.again.append(at.name)
            continue
        entered.add(at.real)
        edges = inside.setdefault(at.real, [])
        for entry, shown, hidden in _entries(folder, at, found):
            link = entry.is_symlink()
            try:
                real = os.path.realpath(entry.path, strict=True) if link else f"{at.real}/{entry.name}"
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:
                if not hidden:  # an editor's lock is a hidden link to nothing
                    found.broken[shown] = "a link to itself" if error.errno == errno.ELOOP else "a link to nothing"
                continue
            if is_folder and entry.name not in _VERSION_CONTROL:
                edges.append((real, shown))
                heapq.heappush(pending, _Folder(hidden, at.linked or link, shown, real))
            elif is_file:
                files.append((hidden, at.linked or link, shown, real))
            elif not is_folder and _suffix(shown) in IMAGE_SUFFIXES | UNREAD_SUFFIXES:
                found.broken[shown] = "no regular file"
    if (name := _cycle(inside, start.real)) is not None:
        raise UserError(f"link {one_line(name, 120)} in {folder} leads back to a folder above it", rule="such a path has no end",
                        remedy="remove the link")  # fmt: skip
    _sort(files, found)
    return found


def _entries(folder: Path, at: _Folder, found: Found) -> Iterator[tuple[os.DirEntry[str], str, bool]]:
    try:
        with os.scandir(f"{folder}/{at.name}" if at.name else folder) as entries:
            listed = sorted(entries, key=lambda e: e.name)
    except OSError as error:
        found.broken[at.name or "."] = f"a folder that cannot be listed ({error.strerror})"
        return
    for entry in listed:
        yield entry, f"{at.name}/{entry.name}" if at.name else entry.name, at.hidden or entry.name.startswith(".")


def _cycle(inside: dict[str, list[tuple[str, str]]], start: str) -> str | None:
    """Return the path that leads to a folder above itself, if there is one: depth first, without recursion."""
    above, done = {start}, set()
    stack = [(start, iter(inside.get(start, ())))]
    while stack:
        real, rest = stack[-1]
        for below, shown in rest:
            if below in above:
                return shown
            if below not in done:
                above.add(below)
                stack.append((below, iter(inside.get(below, ()))))
                break
        else:
            stack.pop()
            above.discard(real)
            done.add(real)
    return None


def _sort(files: list[tuple[bool, bool, str, str]], found: Found) -> None:
    seen: set[str] = set()
    names = {name for *_, name, _ in files}
    for hidden, _, name, real in sorted(files):
        base = name.rpartition("/")[2]
        if base == _SHEET and f"{name[: -len(_SHEET)]}{_SAMPLES}" in names:
            continue  # the sheet of `ambient-sd sample` shows images that lie beside it
        why = _what(real, base, hidden)
        if base in METADATA and not hidden:
            found.lists.append(name)
        if why is None:
            if not hidden:
                found.texts.append(name)
            continue
        if real in seen:
            if not hidden:
                found.again.append(name)
            continue
        seen.add(real)
        if why:
            found.unread[name] = why
        else:
            found.images.append(name)
        found.real[name] = real
    found.images.sort()


def _what(real: str, base: str, hidden: bool) -> str | None:
    """Return "" for an image that is read, why for one that is not, None for another file."""
    suffix = _suffix(base)
    if hidden:
        # A Mac's ._a.jpg and a file that was being written are no images, whatever their names say.
        return "hidden" if not base.endswith(".part") and _image_kind(real) else None
    if suffix in IMAGE_SUFFIXES:
        return ""
    if suffix in UNREAD_SUFFIXES:
        return "a kind that is not read"
    if _ARCHIVE.search(base):
        return "an archive"
    if suffix in _TEXT_SUFFIXES:
        return None
    kind = _image_kind(real)
    return None if kind is None else "" if kind == "read" else "a kind that is not read"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _image_kind(path: str) -> str | None:
    """Tell by its first bytes whether a file is an image that Pillow reads ("read"), another one ("unread"), or none."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(32)
    except OSError:
        return None
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  "))
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or (head.startswith(b"BM") and head[6:10] == bytes(4) and head[14:18] in (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0"))
        or brand in (b"avif", b"avis")
    ):  # fmt: skip
        return "read"
    if brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1") or head.startswith((b"\0\0\0\x0cJXL ", b"8BPS")):
        return "unread"
    return None
