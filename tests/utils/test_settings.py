"""One declaration of a setting gives flag, help, types, bounds and errors; each rule has a value that breaks it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import (
    REQUIRED,
    Parser,
    add_flags,
    check,
    check_modes,
    from_flags,
    load_yaml,
    option,
    over_file,
    same,
)


@dataclass(frozen=True)
class Every:
    """Have a setting of every kind."""

    data: str = option(REQUIRED, "where from", positional=True, metavar="DATA")
    output_dir: Path = option(REQUIRED, "where to", alias="out")
    steps: int = option(50, "how many", low=1, high=1000)
    scale: float = option(7.5, "how much", above=0, below=100)
    side: int | None = option(None, "how large", multiple=8)
    kind: Literal["a", "b"] = option("a", "which")
    limit: float | Literal["auto"] = option("auto", "until when", above=0)
    names: list[str] = option([], "who", metavar="NAME")
    seeds: list[int] | None = option(None, "with which")
    mirrored: bool = option(True, "mirror it")
    token: str | None = option(None, "secret", secret=True)
    agc: float | None = option(None, "bare", bare=0.8)
    lora: bool = option(False, "mode")
    seed: int = option(0, "nought")
    rank: int | None = option(None, "of the mode", needs="lora")
    whole: int | None = option(None, "of the other mode", needs="not lora", because="a LoRA has none")
    level: int | None = option(None, "one way")
    above: float | None = option(None, "a level", low=0)
    base: str | None = option(None, "beside the level", needs="above")
    timestep: int | None = option(None, "another way", rival="level")
    inner: Any = None

    def __post_init__(self) -> None:
        check(self)
        check_modes(self)


def parser() -> Parser:
    made = Parser(prog="mine")
    add_flags(made, Every)
    return made


def read(*words: str) -> Every:
    return from_flags(Every, parser().parse_args(["here", "--out", "there", *words]))


def test_a_command_line_gives_values_of_their_types() -> None:
    got = read("--steps", "3", "--scale=1e-3", "--side", "64", "--kind", "b", "--limit", "0.5", "--names", "x", "y",
               "--seeds", "1", "2", "--no-mirrored", "--agc")  # fmt: skip
    assert got == Every("here", Path("there"), 3, 0.001, 64, "b", 0.5, ["x", "y"], [1, 2], False, None, 0.8)
    assert read() == Every("here", Path("there"))
    assert read("--limit", "auto").limit == "auto"
    assert read("--above", "0", "--base", "x").above == 0, "a mode may be on at 0"
    assert from_flags(Every, parser().parse_args(["here", "--output_dir", "x"]), inner=1, steps=2).steps == 2


def test_hyphens_and_underscores_spell_the_same_flag() -> None:
    assert parser().parse_args(["a", "--output-dir=b"]).output_dir == "b"
    assert parser().parse_args(["a", "--out", "b", "--no_mirrored"]).mirrored is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--steps 0", "steps is 0; it must be at least 1; the default is 50"),
        ("--steps 1001", "steps is 1001; it must be at most 1000"),
        ("--steps 1.5", "it must be an integer"),
        ("--scale 0", "it must be above 0"),
        ("--scale 100", "it must be below 100"),
        ("--scale nan", "it must be a finite number"),
        ("--side 12", "side is 12; it must be a multiple of 8; leave it out for the default"),
        ("--kind c", "it must be one of a, b; the default is a"),
        ("--limit autp", "it must be a finite number or auto; the default is auto"),
        ("--seeds 1 x", "it must be a list of integers"),
        ("--rank 4", "rank is given; it has no effect here: lora is off; add --lora, or leave it out"),
        ("--lora --whole 4", "whole is 4; a LoRA has none; leave it out, or leave lora out"),
        ("--base x", "base is given; it has no effect here: above is off"),
        ("--stesp 3", "unknown argument --stesp; the nearest known one is --steps; see mine --help"),
        ("--zzzz 3", "unknown argument --zzzz; no known one is like it; see mine --help"),
        ("extra", "unknown argument extra"),
        ("--steps", "expected one argument"),
    ],
)
def test_a_mistake_names_value_rule_and_remedy(words: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(*words.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_misspelt_flag_is_named_before_what_is_missing() -> None:
    with pytest.raises(UserError, match="nearest known one is --output_dir"):
        parser().parse_args(["--output_dri", "x"])
    with pytest.raises(UserError, match="required: DATA, --output_dir"):
        parser().parse_args([])


def test_secrets_are_in_no_message_and_no_repr() -> None:
    with pytest.raises(UserError, match=r"token is \(hidden\)"):
        Every("a", Path("b"), token=3)  # type: ignore[arg-type]
    assert "abc" not in repr(Every("a", Path("b"), token="abc"))


def test_help_shows_every_option_and_each_default_once() -> None:
    text = " ".join(parser().format_help().split())
    assert all(f"--{item.name}" in text for item in dataclasses.fields(Every) if item.name not in ("data", "inner"))
    assert "usage: mine DATA --output_dir PATH [options]" in text and "--output_dir, --out PATH" in text
    assert text.count("(default 50)") == 1 and "(default on)" in text and "(default auto)" in text
    assert "nought (default 0)" in text and "mode (default" not in text
    assert "None" not in text and "--mirrored, --no-mirrored" in text


def test_the_same_setting_keeps_text_and_bounds() -> None:
    @dataclass
    class Other:
        steps: int = same(Every, "steps", default=20)
        rank: int | None = same(Every, "rank")

    kept = Other.__dataclass_fields__["steps"].metadata
    assert (Other().steps, kept["text"], kept["low"]) == (20, "how many", 1)
    assert Other.__dataclass_fields__["rank"].metadata["needs"] == ()


def test_the_command_line_switches_modes_of_a_file_off() -> None:
    file = {"lora": True, "rank": 8, "level": 1, "steps": 3}
    assert over_file(Every, {"lora": False}, file) == ({"lora": False, "level": 1, "steps": 3}, ["rank"])
    assert over_file(Every, {"timestep": 9}, file)[0] == {"lora": True, "rank": 8, "timestep": 9, "steps": 3}
    # What the command line gives itself, and what was wrong in the file alone, is refused later.
    assert over_file(Every, {"lora": False, "rank": 4}, file) == ({**file, "lora": False, "rank": 4}, [])
    assert over_file(Every, {"steps": 4}, {"rank": 8}) == ({"rank": 8, "steps": 4}, [])


def test_a_file_has_known_keys_once(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, said in (("stpes: 1", "nearest known one is steps"), ("steps: 1\nsteps: 2", "given twice"), ("- 1", "holds a list")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            load_yaml(path, Every)
    path.write_text("steps: 1e1\n")
    assert load_yaml(path, Every) == {"steps": "1e1"}
