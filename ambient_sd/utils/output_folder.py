"""The folder that a command writes to: it belongs to one run, which may be resumed, and is never taken from anything else.

`settings.json` in it holds what the contents depend on: {"kind": ..., "settings": {...}, "finished": true or false}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.files import atomic_write, remove
from ambient_sd.utils.json_schema import load_json

FILE = "settings.json"
_LARGEST = 16 * 2**20  # bytes
_ELSEWHERE = "name another folder with --out"


class OutputFolder:
    """Let a folder belong to one run: refuse any other's, resume its own, or begin it anew.

    Call `check` before anything expensive, `claim` before the first file is written, and `finish` after the last.

    Args:
        path: the folder; made by `claim`.
        kind: what lies in it, for example "demo": another kind's folder is refused.
        contents: names of the entries that the run writes: all that `overwrite` removes.
        overwrite: remove what an earlier run of this kind has left, whatever its settings; None: the command has no such flag.
        resumable: go on in the folder of an earlier run with the same settings. Without, a finished run is only replaced by
            `overwrite`, and one that was cut begins anew.
        grows: settings that are mappings to which a later run may add entries.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "out"
        >>> OutputFolder(out, "sample", ["images"], overwrite=False).claim({"seed": 0})
        >>> try:
        ...     OutputFolder(out, "sample", ["images"], overwrite=False).check({"seed": 1})
        ... except UserError as error:
        ...     print(str(error).replace(str(out), "OUT"))
        OUT was begun with other settings: seed was 0 and is 1; a folder holds one run; name another folder with --out, or give --overwrite
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        contents: Collection[str],
        *,
        overwrite: bool | None = None,
        resumable: bool = True,
        grows: Collection[str] = (),
    ) -> None:
        self.path, self.kind, self.overwrite = path, kind, bool(overwrite)
        self._elsewhere = _ELSEWHERE if overwrite is None else f"{_ELSEWHERE}, or give --overwrite"
        self._contents, self._resumable, self._grows = contents, resumable, grows

    @property
    def claimed(self) -> bool:
        """Whether a run has claimed the folder."""
        return (self.path / FILE).is_file()

    @property
    def finished(self) -> bool:
        """Whether the folder holds a finished run."""
        return self.claimed and bool(self._read()["finished"])

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise a `UserError` if the folder is not this run's to write to. Nothing is written.

        Args:
            settings: what is known of them yet.
        """
        self._check(settings, whole=False)

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder this run's, and remove what `overwrite` asks to remove.

        Args:
            settings: all that the contents depend on, fit for JSON.

        Raises:
            UserError: the folder holds something else.
        """
        before = self._check(settings, whole=True)
        if before is not None and (self.overwrite or not self._resumable):
            for name in self._contents:
                remove(self.path / name)
            before = None
        self.overwrite = False  # what this run writes from here on is its own
        now = json.loads(json.dumps(dict(settings)))
        if before is not None:
            for name in self._grows:
                now[name] = {**before["settings"].get(name, {}), **now.get(name, {})}
            if now == before["settings"]:
                return
        self._write({"kind": self.kind, "settings": now, "finished": False})

    def finish(self) -> None:
        """Note that the run is whole."""
        found = self._read()
        if not found["finished"]:
            self._write({**found, "finished": True})

    def _check(self, settings: Mapping[str, Any], *, whole: bool) -> dict[str, Any] | None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"out is {self.path}", rule="it must be a folder", remedy=_ELSEWHERE)
        if not self.claimed:
            foreign = sorted(p.name for p in self.path.glob("*") if not p.name.startswith("."))
            if foreign:
                raise UserError(f"{self.path} holds {foreign[0]!r} and no {FILE}", rule=f"the {self.kind} needs a folder of its own",
                                remedy=_ELSEWHERE)  # fmt: skip
            return None
        before = self._read()
        if before["kind"] != self.kind:
            raise UserError(f"{self.path} holds another command's output: {one_line(before['kind'], 60)}", rule=f"the {self.kind} needs a folder of its own",
                            remedy=_ELSEWHERE)  # fmt: skip
        if self.overwrite:
            return before
        if not self._resumable:
            if before["finished"]:
                raise UserError(f"{self.path} holds a finished {self.kind}", rule="it is kept",
                                remedy=self._elsewhere)  # fmt: skip
            return before
        old, new = dict(before["settings"]), json.loads(json.dumps(dict(settings)))
        for name in self._grows:  # only what both have must agree
            shared = old.get(name, {}).keys() & new.get(name, {}).keys()
            for side in (old, new):
                if name in side:
                    side[name] = {key: side[name][key] for key in shared}
        if not whole:
            old = {name: value for name, value in old.items() if name in new}
        if (other := difference(old, new)) is not None:
            raise UserError(f"{self.path} was begun with other settings: {other}", rule="a folder holds one run",
                            remedy=self._elsewhere)  # fmt: skip
        return before

    def _read(self) -> dict[str, Any]:
        path = self.path / FILE
        try:
            found = load_json(path, _LARGEST)
            if not (
                isinstance(found["kind"], str)
                and isinstance(found["settings"], dict)
                and isinstance(found["finished"], bool)
            ):
                raise TypeError("no settings")
            if not all(isinstance(found["settings"].get(name, {}), dict) for name in self._grows):
                raise TypeError("no mapping")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} cannot be read", remedy=_ELSEWHERE) from None
        return dict(found)

    def _write(self, found: Mapping[str, Any]) -> None:
        atomic_write(self.path / FILE, json.dumps(found, indent=1) + "\n")


def difference(before: Any, now: Any, name: str = "") -> str | None:
    """Say in a few words what differs between two settings, nested ones too; None if nothing does.

    Example:
        >>> difference({"seed": 0, "data": {"split": "a"}}, {"seed": 0, "data": {"split": "b"}})
        'data.split was a and is b'
    """
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        found = (
            difference(before.get(key), now.get(key), f"{name}.{key}" if name else key) for key in {**before, **now}
        )
        return next(filter(None, found))
    if _short(before) and _short(now):
        return f"{name} was {one_line(before)} and is {one_line(now)}"
    return f"{name} changed"


def _short(value: Any) -> bool:
    """Tell whether a reader can see by a value what it says: no nested one, and no digest."""
    return (
        not isinstance(value, (dict, list))
        and len(text := str(value)) <= 60
        and not re.fullmatch("[0-9a-f]{16,}", text)
    )
