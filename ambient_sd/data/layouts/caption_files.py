"""Images with a text beside each: `a.png` and `a.txt` (or `a.caption`), in sub-folders too, as most trainers' tools write them.

A caption is the whole text of its file, without white space around it; an empty file is an empty caption. `read_folder` reads one such
folder for the layouts of tools whose configuration files name several.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambient_sd.data.layouts.layout import TRAINING, Ask, Fault, Layout, Request, Table, read_text, walked
from ambient_sd.utils.errors import UserError, first_of

EXTENSIONS = (".txt", ".caption")


class CaptionFiles(Layout):
    """Read a folder of images with a caption file beside each.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> _ = (folder / "a.txt").write_text("a red square\\n")
        >>> CaptionFiles().read(Request(str(folder))).rows
        [{'file_name': 'a.png', 'text': 'a red square'}]
    """

    name, what = "caption_files", "images with .txt or .caption files beside them"

    def detects(self, request: Request) -> bool:
        return request.is_folder and bool(beside(request.found.images, request.found.texts, extensions(request)))

    def read(self, request: Request) -> Table:
        rows = read_folder(request.path, request)
        left = dict(request.found.unread)
        captioned = {row.caption_file for row in rows}
        stray = [name for name in request.found.texts if name.endswith(extensions(request)) and name not in captioned]
        notes = [f"{len(stray)} text files caption no image: {first_of(stray)}"] if stray else []
        return table_of(request, rows, left=left, notes=notes)


@dataclass(frozen=True)
class Row:
    """Hold a row of a layout of files.

    Attributes:
        path: of the image; name: for messages.
        caption: None where there is none; several: one of them is meant at a time.
        caption_file: its name in the folder, empty if there is none.
        role: `training`, `regularisation` or `heldout`; repeats: how often an epoch holds it.

    Example:
        >>> Row(Path("a.png"), "a.png", "a cat").repeats
        1
    """

    path: Path
    name: str
    caption: str | list[str] | None
    caption_file: str = ""
    role: str = TRAINING
    repeats: int = 1
    columns: Mapping[str, Any] = field(default_factory=dict)


def extensions(request: Request) -> tuple[str, ...]:
    """Return the endings of caption files, with their dots.

    Example:
        >>> extensions(Request("mine", caption_extension="cap"))
        ('.cap',)
    """
    given = request.caption_extension
    return EXTENSIONS if given is None else (dotted(given),)


def dotted(ending: str) -> str:
    """Return an ending with its dot.

    Example:
        >>> dotted("txt"), dotted(".txt")
        ('.txt', '.txt')
    """
    return ending if ending.startswith(".") else f".{ending}"


def beside(images: Sequence[str], texts: Sequence[str], endings: Sequence[str]) -> dict[str, list[str]]:
    """Return of each image that has them the caption files beside it; Unicode forms of one name are one name.

    Example:
        >>> beside(["a.png", "b.png"], ["a.txt", "c.txt"], (".txt",))
        {'a.png': ['a.txt']}
    """
    by_stem: dict[str, list[str]] = {}
    for name in texts:
        if name.endswith(tuple(endings)):
            by_stem.setdefault(_stem(name), []).append(name)
    return {image: by_stem[_stem(image)] for image in images if _stem(image) in by_stem}


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def read_folder(
    folder: Path,
    request: Request,
    *,
    endings: Sequence[str] = (),
    deep: bool = True,
    fallback: str | None = None,
    prefix: str = "",
    role: str = TRAINING,
    repeats: int = 1,
    left: dict[str, str] | None = None,
) -> list[Row]:
    """Read the images of a folder, in the order of their names, with their caption files.

    Args:
        folder: the folder.
        request: as which it is read.
        endings: of caption files; without, the request's.
        deep: with its sub-folders.
        fallback: the caption of an image that has no file.
        prefix: goes before names, in messages.
        role, repeats: of its rows.
        left: takes in what is not read, with the reason.

    Raises:
        UserError: the folder has no images, two caption files are of one image, or one is no UTF-8.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> read_folder(folder, Request(str(folder)), fallback="a cat")[0].caption
        'a cat'
    """
    seen = request.found if folder == request.path else walked(folder, request.faults)
    images = [name for name in seen.images if deep or "/" not in name]
    if left is not None:
        beyond = {name: "in a sub-folder, which is not read" for name in seen.images if not deep and "/" in name}
        left.update({prefix + name: why for name, why in {**seen.unread, **beyond}.items()})
    if not images:
        raise UserError(f"folder {folder} has no images that are read", rule="at least one is needed",
                        remedy="check the path" if deep else "they must lie directly in it")  # fmt: skip
    twins: dict[str, str] = {}
    files = beside(images, seen.texts, endings or extensions(request))
    rows = []
    for image in images:
        own = files.get(image, [])
        if own and (twin := twins.setdefault(_stem(image), image)) != image:
            raise UserError(f"{twin} and {image} in {folder} share the caption file {own[0]}", rule="each image has its own",
                            remedy="rename one of them, with its text")  # fmt: skip
        caption: str | None = fallback
        texts = [_caption(folder / name, request) for name in own]
        if len(set(texts)) > 1:
            raise UserError(f"{image} in {folder} has the captions {' and '.join(own)}", rule="they differ",
                            remedy=f"remove one, or name the ending with --caption_extension {own[0].rpartition('.')[2]}")  # fmt: skip
        if own:
            caption = texts[0]
        rows.append(Row(folder / image, prefix + image, caption, own[0] if own else "", role, repeats))
    return rows


def _caption(path: Path, request: Request) -> str | None:
    try:
        text = read_text(path).strip()
        if "\0" in text:  # UTF-16 without its mark is UTF-8 with a zero in every other place
            raise UserError(f"{path} cannot be read", rule="it holds zeros", remedy="it must be a UTF-8 text file")
        return text
    except UserError as error:
        if request.faults is None:
            raise
        request.faults.append(Fault(path.name, "broken", str(error)))
        return None


def table_of(
    request: Request,
    rows: Sequence[Row],
    *,
    left: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    asks: Sequence[Ask] = (),
) -> Table:
    """Return the table of rows of files.

    Raises:
        UserError: images have no caption, and must; the first ones are named.

    Example:
        >>> table_of(Request("mine"), [Row(Path("a.png"), "a.png", "a cat")]).repeats
        [1]
    """
    endings = " or ".join(extensions(request))
    absent = [row.name for row in rows if row.caption is None and row.role == TRAINING]
    if absent and request.must_have_captions and request.faults is None:
        raise UserError(f"{len(absent)} of {len(rows)} images in {request.source} have no caption: {first_of(absent)}",
                        rule=f"it is the {endings} of the same name",
                        remedy="write one, empty for an image without caption, or give a caption for them with --instance_prompt")  # fmt: skip
    column = request.caption_column
    plain = [{"file_name": r.name, **r.columns, **({} if r.caption is None else {column: r.caption})} for r in rows]
    names = [row.name for row in rows]
    return Table(
        request.source, plain, [row.path for row in rows].__getitem__, names.__getitem__, left or {}, [r.role for r in rows],
        [r.repeats for r in rows], no_caption=f"there is no {endings} of its name", notes=tuple(notes), asks=tuple(asks),
    )  # fmt: skip
