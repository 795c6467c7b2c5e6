"""losses.jsonl: one line per optimizer step, the same bytes whether the run was killed on the way or not.

    {"step": 1, "loss": 0.5, "clean_loss": null, "ambient_loss": 0.5, "lr": 1e-05}        null: no sample of that kind

Every checkpoint holds the lines up to its step, and a run that resumes begins with those. Where the file in the run's own
folder was cut, or went further than the checkpoint, does not matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from ambient_sd.utils import files
from ambient_sd.utils.errors import UserError

NAME = "losses.jsonl"


class LossLog:
    """Hold the records of all steps of a run.

    Args:
        checkpoint: folder of a checkpoint to continue from; one from before there were losses in it gives none.

    Attributes:
        records: one per step: step and what `add` was given.

    Raises:
        UserError: the checkpoint's losses cannot be read.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.records: list[dict[str, float]] = []
        self._path: Path | None = None
        if checkpoint is not None and (path := checkpoint / NAME).exists():
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                self.records = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300],
                                remedy="resume from another checkpoint") from None  # fmt: skip

    def open(self, folder: Path) -> None:
        """Write `folder/losses.jsonl` with the records so far; later ones are added to it."""
        self._path = folder / NAME
        files.atomic_write(self._path, self._text(), synced=True)

    def add(self, step: int, record: Mapping[str, float]) -> None:
        """Take in the record of a step."""
        self.records.append({"step": step, **record})
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(self.records[-1]))

    def save(self, checkpoint: Path) -> None:
        """Write the records so far into a checkpoint's folder."""
        (checkpoint / NAME).write_text(self._text(), encoding="utf-8")

    def late_mean(self, name: str, steps: int) -> float:
        """Return the mean of one quantity over the last `steps` steps that have it; NaN if none has."""
        values = [r[name] for r in self.records[-steps:] if math.isfinite(r[name])]
        return sum(values) / len(values) if values else math.nan

    def _text(self) -> str:
        return "".join(map(_line, self.records))


def _line(record: Mapping[str, float]) -> str:
    # JSON has no NaN.
    return json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n"
