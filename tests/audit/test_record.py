"""audit.json: what the command writes is what the schema file says, and nothing else is read."""

from __future__ import annotations

import configparser
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from ambient_sd.audit import record
from ambient_sd.audit.record import _LARGEST, AuditRecord, schema
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.json_schema import shortened, violation


@pytest.fixture
def values(tiny_audit: Path) -> dict[str, Any]:
    """The contents of an audit.json that the command wrote."""
    return dict(json.loads((tiny_audit / "audit.json").read_text()))


def refusal(path: Path, contents: Any) -> str:
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    with pytest.raises(UserError) as error:
        AuditRecord.read(path)
    said = str(error.value)
    assert (
        "\n" not in said and f"{path} cannot be read; " in said and "run the audit again" in said and len(said) < 1000
    )
    return said


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the address of every value in nested dicts and lists."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(one, (*at, key))


def test_what_the_command_writes_is_read_back_and_written_the_same(tiny_audit: Path, tmp_path: Path) -> None:
    found = AuditRecord.read(tiny_audit)
    assert found.write(tmp_path).read_bytes() == (tiny_audit / "audit.json").read_bytes()
    copies = found.row(found.verdict["measure"])
    assert copies.generated.value == found.verdict["value"] and copies.generated.n == 4 and copies.heldout is not None
    assert {row.name: row.generated.as_dict() for row in found.rows} == {
        m["name"]: m["generated"] for m in found.measures
    }


def test_schema_names_every_key_and_no_other() -> None:
    names = ["format", *(f.name for f in dataclasses.fields(AuditRecord))]
    assert list(schema()["properties"]) == schema()["required"] == names


def test_the_schema_file_is_part_of_the_package() -> None:
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[2] / "setup.cfg")
    pattern = settings["options.package_data"]["ambient_sd.audit"]
    assert fnmatch(record._SCHEMA.name, pattern) and record._SCHEMA.parent.name == "audit"


def test_every_value_of_another_kind_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    addresses = list(places(values))
    assert len(addresses) > 150
    for address in addresses:
        for other in ([["x"]], {"x": 1}, True):
            damaged = copy.deepcopy(values)
            inner: Any = damaged
            for key in address[:-1]:
                inner = inner[key]
            if isinstance(inner[address[-1]], bool) and other is True:
                continue
            inner[address[-1]] = other
            assert violation(damaged, schema()), (address, other)
    refusal(tmp_path / "audit.json", damaged)


def test_every_missing_and_every_unknown_key_is_refused(values: dict[str, Any]) -> None:
    free = {("features",), ("model", "files", "network")}  # keyed by what was audited
    optional = {("model",): {"base", "base_above", "base_weights", "lora_weights"}, ("copies",): {"compared"}}
    for address in [(), *places(values)]:
        inner: Any = values
        for key in address:
            inner = inner[key]
        if not isinstance(inner, dict) or address in free:
            continue
        assert "unknown key 'surprise'" in str(damaged(values, address, lambda d: d.update(surprise=1)))
        for key in set(inner) - optional.get(address, set()):
            assert "has no" in str(damaged(values, address, lambda d, key=key: d.pop(key))), (address, key)


def damaged(values: dict[str, Any], address: tuple[Any, ...], change: Callable[[Any], object]) -> str | None:
    found = copy.deepcopy(values)
    inner: Any = found
    for key in address:
        inner = inner[key]
    change(inner)
    return violation(found, schema())


def first(values: dict[str, Any]) -> dict[str, Any]:
    figure: dict[str, Any] = values["measures"][0]["generated"]
    return figure


CASES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format 2": (lambda v: v.update(format=2), "its format is 2, this version reads 3"),
    "a later format": (lambda v: v.update(format=4), "its format is 4"),
    "format as text": (lambda v: v.update(format="3"), "its format is '3'"),
    "format true": (lambda v: v.update(format=True), "its format is True"),
    "no format": (lambda v: v.pop("format"), "its format is None"),
    "the card's former file": (lambda v: (v.clear(), v.update(runs={"x": {}})), "its format is None"),
    "no n": (lambda v: first(v).pop("n"), "measures[0].generated has no n"),
    "negative n": (lambda v: first(v).update(n=-1), "measures[0].generated.n is -1, at least 1 is allowed"),
    "n of 400 digits": (lambda v: first(v).update(n=10**400), "measures[0].generated.n is 1000"),
    "value of 400 digits": (lambda v: first(v).update(value=10**400), "no finite number"),
    "broken n": (lambda v: first(v).update(n=4.5), "an integer is allowed"),
    "share above 1": (lambda v: first(v).update(high=1.5), "is no share"),
    "share below 0": (lambda v: first(v).update(low=-0.5), "is no share"),
    "interval turned round": (lambda v: first(v).update(low=0.9, high=0.1), "ends at 0.1 and begins at 0.9"),
    "no measures": (lambda v: v.update(measures=[]), "measures has 0 entries"),
    "a measure twice": (lambda v: v["measures"].append(v["measures"][0]), "is there twice"),
    "verdict of another value": (lambda v: v["verdict"].update(value=0.123), "verdict.value is 0.123"),
    "verdict of an unknown measure": (lambda v: v["verdict"].update(measure="other"), "which was not measured"),
    "verdict turned round": (lambda v: v["verdict"].update(exceeded=True), "verdict.exceeded is true, its figures give false"),
    "verdict without a limit": (lambda v: v["verdict"].update(limit=None), "its figures give null"),
    "verdict with others": (lambda v: v["verdict"].update(others=["memorized-edges16"]), "its figures give true"),
    "limit of 2": (lambda v: v["verdict"].update(limit=2), "at most 1"),
    "long sentence": (lambda v: v["finding"].update(sentence="x" * 2001), "2001 characters, 2000 are allowed"),
    "hostile name": (lambda v: v["measures"][0].update(name="</script>\n\u202e"), "measures[0].name"),
    "hostile key": (lambda v: v.update({"</script>\n\u202e" + "k" * 10**5: 1}), "unknown key"),
    "digest with a line feed": (lambda v: v["images"]["training"].update(fingerprint="a" * 64 + "\n"), "not of the form"),
    "unknown finding": (lambda v: v["finding"].update(kind="safe"), "finding.kind is 'safe'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_line_that_names_the_place(values: dict[str, Any], tmp_path: Path, case: str) -> None:
    change, words = CASES[case]
    change(values)
    assert words in refusal(tmp_path / "audit.json", values)


@pytest.mark.parametrize(
    ("contents", "words"),
    [("", "Expecting value"), ("{", "Expecting"), ("[]", "an object is allowed"), ("null", "it is None"), (b"\xff\xfe", "decode"), ("[" * 10**5, "deeply"),
     ('{"format": 3, "format": 3}', "the key 'format' twice"), ('{"x": NaN}', "NaN"), ('{"x": -Infinity}', "-Infinity"), ('{"x": 1e999}', "1e999"),
     ('{"x": ' + "9" * 5000 + "}", "digits")],
)  # fmt: skip
def test_what_is_no_audit_at_all_is_one_line(tmp_path: Path, contents: str | bytes, words: str) -> None:
    assert words in refusal(tmp_path / "audit.json", contents)


def test_missing_and_enormous_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"audit\.json cannot be read; No such file"):
        AuditRecord.read(tmp_path)
    with (tmp_path / "audit.json").open("wb") as file:
        file.truncate(_LARGEST + 1)
    with pytest.raises(UserError, match="67108865 bytes, more than"):
        AuditRecord.read(tmp_path)


def test_a_record_that_breaks_the_schema_is_not_built(values: dict[str, Any]) -> None:
    del values["format"]
    assert AuditRecord.of(values).as_dict() == {"format": 3, **values}
    with pytest.raises(ValueError, match="unknown key 'surprise'"):
        AuditRecord.of({**values, "surprise": 1})


def test_long_captions_are_cut_and_unknown_numbers_are_null(values: dict[str, Any]) -> None:
    del values["format"]
    values["tokens"][0]["prompt"] = "\ud800" * 20_000
    values["tokens"][0]["scores"][0] = float("nan")
    values["measures"][1]["generated"]["high"] = float("inf")
    found = AuditRecord.of(values)
    assert len(found.tokens[0]["prompt"]) == 10_000 and found.tokens[0]["scores"][0] is None
    assert math.isnan(found.rows[1].generated.high)


def test_keywords_that_the_reader_does_not_know_are_refused() -> None:
    for unknown in ({"uniqueItems": True}, {"$ref": "#/$defs/a", "minimum": 1}):
        with pytest.raises(NotImplementedError):
            violation([], unknown, {"$defs": {"a": {}}})


@pytest.mark.parametrize(
    ("value", "rules", "wrong"),
    [(True, {"type": "integer"}, True), (1, {"enum": [True]}, True), (0, {"minimum": 0}, False), (-1, {"minimum": 0}, True), (2, {"maximum": 1}, True),
     ("ab", {"maxLength": 1}, True), ("a\n", {"pattern": "^a$"}, True), ("a", {"pattern": "^a$"}, False), ([1], {"items": {"type": "string"}}, True),
     ([], {"minItems": 1}, True), ([1, 2], {"maxItems": 1}, True), ({"a": 1}, {"propertyNames": {"maxLength": 0}}, True),
     ({"a": 1}, {"additionalProperties": {"type": "string"}}, True), ({"a": 1}, {"additionalProperties": False}, True),
     ({"a": 1}, {"properties": {"a": {"type": "null"}}}, True), ({}, {"required": ["a"]}, True), (None, {"anyOf": [{"type": "null"}, {"type": "string"}]}, False),
     (1, {"anyOf": [{"type": "null"}, {"type": "string"}]}, True), (float("nan"), {"type": "number"}, True), (1.0, {"type": ["integer", "null"]}, True)],
)  # fmt: skip
def test_each_rule_of_the_schema_language_is_kept(value: Any, rules: dict[str, Any], wrong: bool) -> None:
    assert (violation(value, rules) is not None) == wrong


def test_texts_of_a_set_form_are_never_cut() -> None:
    rules = {
        "properties": {
            "a": {"type": "string", "maxLength": 3},
            "b": {"type": "string", "pattern": "^x*$", "maxLength": 3},
        }
    }
    assert shortened({"a": "abcdef", "b": "xxxxx"}, rules) == {"a": "ab…", "b": "xxxxx"}
