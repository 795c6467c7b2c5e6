"""audit.json, an audit's output for other programs: written and read here alone.

`audit.schema.json` beside this module defines the file. Reading and writing check against it, and against what a schema cannot
express: shares lie in [0, 1], intervals are ordered, and the verdict follows from its figures.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambient_sd.audit.metrics import ABOVE, Row
from ambient_sd.audit.shares import COPIES, RETURNED
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write, json_safe
from ambient_sd.utils.json_schema import load_json, shortened, violation

FILE_NAME = "audit.json"
FORMAT = 3
_SCHEMA = Path(__file__).with_name("audit.schema.json")
_LARGEST = 64 * 2**20  # bytes; an audit of every feature has some 100,000
_SIDES = ("generated", "heldout", "excess", "background")


@functools.cache
def schema() -> dict[str, Any]:
    """Return the schema of audit.json (JSON Schema, draft 2020-12).

    Example:
        >>> schema()["properties"]["format"]["enum"]
        [3]
    """
    found: dict[str, Any] = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class AuditRecord:
    """Hold the contents of audit.json, one attribute per key; `audit.schema.json` describes each.

    Attributes:
        finding: the outcome in words.
        verdict: the measure that decides, its value, the limit, and whether it is exceeded.
        model: which model was sampled and how; None for images made elsewhere.
        images: what was compared: generated, training and held-out images, with fingerprints.
        copies: what was called a copy and by which images that cannot be copies; per group of training images, what comes back.
        features: by name.
        mirrored, duplicates_of_one_image_count_once, seed, resamples: of the search and the intervals.
        measures: every figure; `rows` has them typed.
        tokens: pulls of the tokens of the most copied prompts.
        notes: what a reader must know.
        made: versions, command, device, seconds.

    Example:
        With an audit in `folder`, `AuditRecord.read(folder).row("copies").generated` is its copy rate.

        >>> try:
        ...     AuditRecord.read("no-audit.json")
        ... except UserError as error:
        ...     print(error)
        no-audit.json cannot be read; No such file or directory; run the audit again, or remove the file
    """

    finding: dict[str, Any]
    verdict: dict[str, Any]
    model: dict[str, Any] | None
    images: dict[str, Any]
    copies: dict[str, Any]
    features: dict[str, Any]
    mirrored: bool
    duplicates_of_one_image_count_once: bool
    seed: int
    resamples: int
    measures: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    notes: list[str]
    made: dict[str, Any]

    @classmethod
    def of(cls, values: dict[str, Any]) -> AuditRecord:
        """Build a record of what was just measured: numbers that are not finite become null, texts are cut to the schema's lengths.

        Raises:
            ValueError: the values break the schema.
        """
        given = shortened(json_safe({"format": FORMAT, **values}), schema())
        if (wrong := _wrong(given)) is not None:
            raise ValueError(f"{FILE_NAME} would break its own schema: {wrong}")
        del given["format"]
        return cls(**given)

    @classmethod
    def read(cls, place: str | Path) -> AuditRecord:
        """Read and check audit.json: a folder that holds it, or its path.

        Raises:
            UserError: it cannot be read, is of another format, or holds anything that an audit does not write.
        """
        path = Path(place)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            given = load_json(path, _LARGEST)
            known = given.get("format") if isinstance(given, dict) else None
            if isinstance(given, dict) and (type(known) is not int or known != FORMAT):
                raise UserError(f"{path} cannot be read", rule=f"its format is {one_line(repr(known), 40)}, this version reads {FORMAT}",
                                remedy="run the audit again, into the same folder: its images are kept")  # fmt: skip
            if (wrong := _wrong(given)) is not None:
                raise ValueError(wrong)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            said = str(error.strerror) if isinstance(error, OSError) else str(error)
            raise UserError(
                f"{path} cannot be read", rule=one_line(said, 200), remedy="run the audit again, or remove the file"
            ) from None
        del given["format"]
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        """Return what the file holds."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": FORMAT, **values}

    def write(self, place: str | Path) -> Path:
        """Write audit.json, whole or not at all, into a folder or to a path that ends in .json; return its path."""
        path = Path(place)
        path = path if path.suffix == ".json" else path / FILE_NAME
        atomic_write(path, json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")
        return path

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Return every measure with its figures; a number that is not known is NaN."""
        return [
            Row(one["name"], *(None if one[side] is None else Estimate.from_dict(one[side]) for side in _SIDES))  # type: ignore[arg-type]
            for one in self.measures
        ]

    def row(self, name: str) -> Row:
        """Return the measure called `name`."""
        return next(row for row in self.rows if row.name == name)


def measures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as the record's `measures`.

    Example:
        >>> measures([Row("copies", Estimate(0.2, 0.1, 0.4, 50, "copies"), None, None)])[0]["generated"]["value"]
        0.2
    """
    sides = [{side: getattr(row, side) for side in _SIDES} for row in rows]
    return [
        {"name": row.name, **{side: None if figure is None else figure.as_dict() for side, figure in found.items()}}
        for row, found in zip(rows, sides, strict=True)
    ]


def is_share(name: str) -> bool:
    """Tell whether a measure is a share of images, in [0, 1].

    Example:
        >>> is_share("copies"), is_share("FD-EffLite0-pca64")
        (True, False)
    """
    known = name.removesuffix(": difference") in (COPIES, RETURNED, "agreement")
    return known or name.startswith(("memorized-", "own-", "new-", "drawn-")) or ABOVE in name


def _wrong(given: Any) -> str | None:
    """Say what is wrong with the contents of a file, or return None."""
    if (wrong := violation(given, schema())) is not None:
        return wrong
    shares = {}
    for one in given["measures"]:
        if one["name"] in shares:
            return f"the measure {one['name']} is there twice"
        shares[one["name"]] = one["generated"]["value"]
        for side in _SIDES:
            if one[side] is None:
                continue
            known = [one[side][end] for end in ("low", "value", "high") if one[side][end] is not None]
            ends = (one[side]["low"], one[side]["high"])
            if None not in ends and ends[0] > ends[1]:
                return f"the interval of {one['name']}, {side}, ends at {ends[1]} and begins at {ends[0]}"
            if is_share(one["name"]) and any(not (-1 if side == "excess" else 0) <= v <= 1 for v in known):
                return f"{one['name']}, {side}, is no share: {known}"
    verdict = given["verdict"]
    if verdict["measure"] not in shares:
        return f"verdict.measure is {verdict['measure']}, which was not measured"
    if verdict["value"] != shares[verdict["measure"]]:
        return f"verdict.value is {verdict['value']}, its measure {shares[verdict['measure']]}"
    limit = verdict["limit"]
    exceeded = None if limit is None else verdict["value"] > limit or bool(verdict["others"])
    if verdict["exceeded"] is not exceeded:
        return f"verdict.exceeded is {json.dumps(verdict['exceeded'])}, its figures give {json.dumps(exceeded)}"
    return None
