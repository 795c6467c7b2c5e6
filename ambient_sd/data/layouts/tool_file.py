"""What the layouts that read another trainer's configuration file share: checked values, places of folders, what is asked of the training.

A key that is not known is refused, for it may change the training; a key that is known to change nothing here is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ambient_sd.data.layouts.layout import Ask, read_text
from ambient_sd.utils.errors import UserError, first_of, one_line

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a table of settings",
}


class Section:
    """Hold the settings of one section of a file; each is checked when it is taken.

    Args:
        values: the section.
        where: its name, for messages.
        above: sections whose values hold where it has none.

    Raises:
        UserError: it is no section.

    Example:
        >>> section = Section({"num_repeats": 10}, "data.toml")
        >>> section.take("num_repeats", int, 1), section.take("flip_aug", bool, False)
        (10, False)
    """

    def __init__(self, values: Any, where: str, above: Sequence[Section] = ()) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where} is {one_line(repr(values), 60)}", rule="it must be a table of settings")
        self.values: dict[str, Any] = values
        self.where, self.above = where, above
        self._taken: set[str] = set()

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a value, its default where no section has it.

        Raises:
            UserError: it has another type.
        """
        sections = (self, *self.above)
        for section in sections:  # a value that another goes before is known too
            section._taken.add(name)
        for section in sections:
            if section.values.get(name) is not None:
                value: Any = section.values[name]
                number = kind is float and isinstance(value, int)
                if not isinstance(value, (float, int) if number else kind) or (
                    isinstance(value, bool) and kind is not bool
                ):
                    raise UserError(
                        f"{name} is {one_line(repr(value), 80)} in {section.where}", rule=f"it must be {_KINDS[kind]}"
                    )
                return float(value) if kind is float else value  # type: ignore[arg-type]
        return default

    def sections(self, name: str) -> list[Section]:
        """Return the sections of a list of them.

        Raises:
            UserError: it is no list of sections.
        """
        return [Section(one, f"{self.where}, {name} {i}") for i, one in enumerate(self.take(name, list, ()), start=1)]

    def whole(self, name: str, default: int = 1) -> int:
        """Return a number of repeats.

        Raises:
            UserError: it is no integer above zero.
        """
        value = int(self.take(name, int, default))
        if value < 1:
            raise UserError(
                f"{name} is {value} in {self.where}", rule="it must be at least 1", remedy="take the section out"
            )
        return value

    def refuse_unknown(self, passed_over: Sequence[str] = ()) -> None:
        """Refuse keys that nothing has taken, but for those that change nothing here.

        Raises:
            UserError: there are some.
        """
        unknown = [str(name) for name in self.values if name not in self._taken and name not in passed_over]
        if unknown:
            raise UserError(f"{self.where} has {first_of(unknown)}", rule="such a setting is not known here, and may change the training",
                            remedy="correct it or take it out")  # fmt: skip


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
        UserError: it cannot be read, or is no JSON.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "concepts.json")
        >>> _ = path.write_text("[]")
        >>> read_json(path)
        []
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON", rule=str(error)) from None


def find_folder(text: str, file: Path, where: str) -> Path:
    """Return the folder that a file names: an absolute path, or one that is relative to the file or to the working folder.

    Raises:
        UserError: there is none.

    Example:
        >>> find_folder(os.getcwd(), Path("data.toml"), "data.toml").is_dir()
        True
    """
    places = [file.parent / Path(text).expanduser(), Path(text).expanduser()]
    found = next((place for place in places if text and os.path.isdir(place)), None)
    if found is None:
        windows = " (a path of Windows)" if "\\" in text else ""
        raise UserError(f"{where} names the folder {one_line(text, 120)}{windows}, which does not exist",
                        rule="a path is absolute, or relative to the file, else to the working folder", remedy="correct it")  # fmt: skip
    return Path(os.path.realpath(found))


def ask_if(
    asks: dict[str, Ask], given: Any, text: str, setting: str = "", values: Sequence[Any] = (), **more: Any
) -> None:
    """Add to `asks` what a setting asks of the training, where it is given and not off; equal ones count once.

    Example:
        >>> asks = {}
        >>> ask_if(asks, True, "flip_aug = true", "random_flip", [True], fresh=True)
        >>> ask_if(asks, False, "color_aug = false")
        >>> list(asks)
        ['flip_aug = true']
    """
    if given not in (None, False, 0, "", [], {}):
        asks.setdefault(text, Ask(text, setting, tuple(values), **more))


def prefixes(folders: Sequence[Path]) -> list[str]:
    """Return what goes before the names of images of each folder: its own name, or its whole path where two have the same.

    Example:
        >>> prefixes([Path("/a/cats"), Path("/a/dogs")])
        ['cats/', 'dogs/']
    """
    names = [folder.name for folder in folders]
    twice = {folder.name for folder in folders if len({f for f in folders if f.name == folder.name}) > 1}
    return [f"{folder}/" if name in twice else f"{name}/" for folder, name in zip(folders, names, strict=True)]


def scalar(value: Any) -> str:
    """Return a value as a file has it.

    Example:
        >>> scalar(True), scalar([512, 768])
        ('true', '[512, 768]')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)
