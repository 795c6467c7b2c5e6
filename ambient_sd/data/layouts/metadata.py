"""A folder of images with `metadata.jsonl` or `metadata.csv`: one row per image, as Hugging Face's ImageFolder has it.

The rows are in the order of the list. Names are paths inside the folder: a list that came with an image set must not reach for other
files of this machine. A name in one Unicode form finds a file in another, as copies between macOS and Linux need it.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ambient_sd.data.layouts.caption_files import beside, extensions
from ambient_sd.data.layouts.layout import Fault, Files, Layout, Request, Table, need_columns, not_listed, read_text
from ambient_sd.data.walk import METADATA
from ambient_sd.utils.errors import UserError, first_of, one_line

NAME_COLUMNS = ("image", "file", "filename", "file_path", "image_path", "image_file", "path")  # without a file_name


class Metadata(Layout):
    """Read a folder with metadata.jsonl or metadata.csv.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> _ = (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red square"}')
        >>> Metadata().read(Request(str(folder))).rows
        [{'file_name': 'a.png', 'text': 'a red square'}]
    """

    name, what = "metadata", " or ".join(METADATA)

    def detects(self, request: Request) -> bool:
        return bool(_listings(request.path))

    def read(self, request: Request) -> Table:
        folder, faults = request.path, request.faults
        listings = _listings(folder)
        if len(listings) != 1:
            raise UserError(f"folder {folder} has {' and '.join(METADATA) if listings else f'no {METADATA[0]}'}",
                            rule="two lists can disagree" if listings else "it must name the images", remedy="keep one" if listings else "write it")  # fmt: skip
        (listing,) = listings
        rows: list[dict[str, Any]] = []
        lines = 0
        column: str | None = None
        for number, row in (_csv_rows if listing.suffix == ".csv" else _json_rows)(listing):
            lines += 1
            if column is None and not isinstance(row, UserError):
                column = _name_column(row, request.image_column, number, listing)
            fault = row if isinstance(row, UserError) else _bad_name(row, column or "file_name", number, listing)
            if fault is None:
                rows.append({**row, "file_name": _on_disk(folder, row[column or "file_name"], number, listing)})
            elif faults is None:
                raise fault
            else:
                faults.append(Fault(f"line {number}", "broken", str(fault)))
        if not lines:
            raise UserError(f"{listing} is empty", rule="at least one image is needed")
        missing = {r["file_name"]: None for r in rows if not _is_file(folder / r["file_name"])}
        if missing and faults is None and not request.skip_broken:
            raise UserError(
                f"{len(missing)} of {len(rows)} images named in {listing} do not exist: {first_of(list(missing))}",
                remedy="add the files or remove their lines",
            )
        seen = request.found
        left = not_listed(folder, [str(r["file_name"]) for r in rows if r["file_name"] not in missing], listing, seen)
        if faults is not None:
            told = {f.name for f in faults}  # a link to nothing is told already
            faults.extend(
                Fault(r["file_name"], "broken", "the file does not exist")
                for r in rows
                if r["file_name"] in missing and r["file_name"] not in told
            )
            rows = [r for r in rows if r["file_name"] not in missing]
        if rows and request.must_have_captions:
            need_columns(str(folder), [request.caption_column], sorted({k for r in rows for k in r}))
        names = [str(r["file_name"]) for r in rows]
        if request.need_captions and not request.named:
            self._refuse_two_lists(request, listing, rows, beside(names, seen.texts, extensions(request)))
        return Table(str(folder), rows, Files(folder, names), names.__getitem__, left)

    def _refuse_two_lists(
        self, request: Request, listing: Path, rows: Sequence[dict[str, Any]], files: dict[str, list[str]]
    ) -> None:
        """Refuse captions that differ from those of files beside the images: another tool wrote them, and either may be meant."""
        differ = []
        for row in rows:
            given = row.get(request.caption_column)
            texts = [read_text(request.path / name).strip() for name in files.get(row["file_name"], ())]
            if isinstance(given, str) and any(text != given.strip() for text in texts):
                differ.append(row["file_name"])
        if differ:
            raise UserError(f"{len(differ)} captions in {listing} differ from the text files beside the images: {first_of(differ)}",
                            rule="either may be meant", remedy="say which with --layout metadata or --layout caption_files")  # fmt: skip


def _listings(folder: Path) -> list[Path]:
    return [folder / name for name in METADATA if _is_file(folder / name)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a caption in the place of the name is too long for the file system
        return False


def _on_disk(folder: Path, name: str, number: int, listing: Path) -> str:
    """Return the name of the file that a list means: as it stands, or in another Unicode form.

    Raises:
        UserError: there are files of several forms.
    """
    if name.isascii():
        return name
    forms = {form: None for form in (name, *(unicodedata.normalize(kind, name) for kind in ("NFC", "NFD")))}
    there = [form for form in forms if _is_file(folder / form)]
    if len({os.path.realpath(folder / form) for form in there}) > 1:
        raise UserError(f"line {number} of {listing} names {name!r}, and there are two such files",
                        rule="they differ in Unicode form alone (NFC, NFD)", remedy="rename one")  # fmt: skip
    return there[0] if there else name


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
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return UserError(
            f"line {number} of {listing} names {name!r}",
            rule=f"{column} is a path inside {listing.parent}",
            remedy="move the image there, or put metadata.jsonl in the folder that holds them all",
        )
    return None


def _json_rows(listing: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): that also breaks at characters such as U+2028, which JSON texts may hold.
    for number, line in enumerate(read_text(listing).split("\n"), start=1):
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
    lines = read_text(listing).split("\n")
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
