"""The part of JSON Schema that this package's own schema files use, so that a schema file itself is what a reader checks with.

    type, enum, anyOf, $ref to #/$defs, properties, required, additionalProperties, propertyNames, items, minItems, maxItems,
    minimum, maximum, maxLength, pattern                                            JSON Schema, draft 2020-12

Any other keyword in a schema is an error of the schema, never ignored. In one place it is stricter than the standard, for which 1.0 is
an integer: here only 1 is one. Numbers are finite, and keys of one object are different.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ambient_sd.utils.errors import one_line

_NOTES = {"$schema", "$id", "$defs", "title", "description"}
_RULES = {"type", "enum", "anyOf", "$ref", "properties", "required", "additionalProperties", "propertyNames", "items", "minItems",
          "maxItems", "minimum", "maximum", "maxLength", "pattern"}  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),), "integer": (int,), "number": (int, float),
}  # fmt: skip


def load_json(path: Path, largest: int) -> Any:
    """Read a JSON file that others may have written.

    Args:
        path: the file, UTF-8.
        largest: bytes it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, no JSON, nested beyond sense, holds NaN, infinity, or one key twice in one object.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> path.write_text('{"n": 3}')
        8
        >>> load_json(path, largest=100)
        {'n': 3}
    """
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"it has {size} bytes, more than {largest}")
    try:
        return json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_no_constant,
            object_pairs_hook=_different,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def violation(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, at: str = "") -> str | None:
    """Say in a few words where and how a value breaks a schema, or return None if it does not.

    Args:
        value: as `json` gives it: dict, list, str, int, float, bool or None.
        schema: the schema, of the keywords above.
        root: holds `$defs`; the schema itself if None.
        at: name of the place, for the message.

    Example:
        >>> violation({"n": -1}, {"properties": {"n": {"type": "integer", "minimum": 0}}})
        'n is -1, at least 0 is allowed'
    """
    root = schema if root is None else root
    if strange := set(schema) - _NOTES - _RULES:
        raise NotImplementedError(f"JSON Schema keyword {sorted(strange)[0]}")
    if "$ref" in schema:
        if set(schema) - _NOTES - {"$ref"}:
            raise NotImplementedError("JSON Schema rules beside a $ref")
        return violation(value, _definition(schema, root), root, at)

    def said() -> str:
        return f"{at or 'it'} is {one_line(repr(value), 40)}"

    if "anyOf" in schema:
        branches = [_definition(branch, root) for branch in schema["anyOf"]]
        found = [violation(value, branch, root, at) for branch in branches]
        if None in found:
            return None
        # What is wrong within the branch that was meant says more than that no branch fits.
        meant = [
            f for f, branch in zip(found, branches, strict=True) if "type" in branch and _is(value, branch["type"])
        ]
        return meant[0] if meant else f"{said()}, none of what is allowed there"
    if "type" in schema and not _is(value, schema["type"]):
        return f"{said()}, {_article(schema['type'])} is allowed"
    if "enum" in schema and not any(type(value) is type(one) and value == one for one in schema["enum"]):
        return f"{said()}, allowed is {', '.join(json.dumps(one) for one in schema['enum'])}"
    if isinstance(value, str):
        if len(value) > schema.get("maxLength", math.inf):
            return f"{said()} and has {len(value)} characters, {schema['maxLength']} are allowed"
        # A $ of Python's also stands before a last line feed.
        if "pattern" in schema and not re.search(re.sub(r"\$$", r"\\Z", schema["pattern"]), value):
            return f"{said()}, not of the form {schema['pattern']}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # A whole number without end is finite to JSON, and no float.
        if not abs(value) <= sys.float_info.max:
            return f"{said()}, no finite number"
        if value < schema.get("minimum", -math.inf):
            return f"{said()}, at least {schema['minimum']} is allowed"
        if value > schema.get("maximum", math.inf):
            return f"{said()}, at most {schema['maximum']} is allowed"
    if isinstance(value, list):
        return _of_list(value, schema, root, at)
    return _of_object(value, schema, root, at) if isinstance(value, dict) else None


def _of_list(value: list[Any], schema: Mapping[str, Any], root: Mapping[str, Any], at: str) -> str | None:
    for limit, wrong in (("minItems", len(value) < schema.get("minItems", 0)), ("maxItems", len(value) > schema.get("maxItems", math.inf))):  # fmt: skip
        if wrong:
            return f"{at or 'it'} has {len(value)} entries, {'at least' if limit == 'minItems' else 'at most'} {schema[limit]} are allowed"
    rows = (violation(one, schema.get("items", {}), root, f"{at}[{i}]") for i, one in enumerate(value))
    return next((found for found in rows if found is not None), None)


def _of_object(value: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], at: str) -> str | None:
    known = schema.get("properties", {})
    if missing := [key for key in schema.get("required", ()) if key not in value]:
        return f"{at or 'it'} has no {missing[0]}"
    for key, one in value.items():
        if "propertyNames" in schema and (
            found := violation(key, schema["propertyNames"], root, f"a key of {at or 'it'}")
        ):
            return found
        inner = known.get(key, schema.get("additionalProperties", True))
        if inner is False:
            return f"{at or 'it'} has an unknown key {one_line(repr(key), 40)}"
        within = f"{at}.{one_line(key, 40)}" if at else one_line(key, 40)
        if inner is not True and (found := violation(one, inner, root, within)) is not None:
            return found
    return None


def shortened(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> Any:
    """Return a value whose free texts are cut to what the schema allows; texts of a set form (`enum`, `pattern`) stay.

    Captions have no longest length, and a file of figures must not be lost to one.

    Example:
        >>> shortened({"note": "a long note"}, {"properties": {"note": {"type": "string", "maxLength": 6}}})
        {'note': 'a lon…'}
    """
    root = schema if root is None else root
    schema = _definition(schema, root)
    if "anyOf" in schema:
        branches = [_definition(branch, root) for branch in schema["anyOf"]]
        meant = [branch for branch in branches if "type" in branch and _is(value, branch["type"])]
        return shortened(value, meant[0], root) if meant else value
    if isinstance(value, str) and "pattern" not in schema:
        most = schema.get("maxLength", len(value))
        return value if len(value) <= most else value[: most - 1] + "…"
    if isinstance(value, list):
        return [shortened(one, schema.get("items", {}), root) for one in value]
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        inner = {key: known.get(key, rest) for key in value}
        return {k: shortened(v, inner[k], root) if isinstance(inner[k], dict) else v for k, v in value.items()}
    return value


def _definition(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    return found


def _is(value: Any, types: str | Sequence[str]) -> bool:
    wanted = [types] if isinstance(types, str) else types
    # True is an int to Python.
    return any(isinstance(value, _TYPES[t]) and (t == "boolean" or not isinstance(value, bool)) for t in wanted)


def _article(types: str | Sequence[str]) -> str:
    wanted = [types] if isinstance(types, str) else types
    return " or ".join(t if t == "null" else f"an {t}" if t[0] in "aoi" else f"a {t}" for t in wanted)


def _no_constant(text: str) -> Any:
    raise ValueError(f"it holds {text}, no number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {one_line(text, 40)}, no finite number")
    return number


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it holds the key {one_line(repr(name), 40)} twice")
        found[name] = value
    return found
