"""README.md, docs/ and the READMEs of folders say only what is there: links, files, modules, flags, code."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from itertools import dropwhile, pairwise
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ambient_sd import cli
from ambient_sd.utils.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "configs/README.md", ROOT / "prompts/README.md", *DOCS]
SCRIPT = "train_text_to_image_ambient.py"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ +(.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", head).lower()).strip().replace(" ", "-") for head in heads}


# --- links ----------------------------------------------------------------------------------------------------------


def broken_links(page: Path, text: str) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(text if other == page else other.read_text())):
            wrong.append(target)
        elif page in DOCS and not other.is_relative_to(ROOT / "docs"):
            wrong.append(f"{target}: not part of the site")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize("link", ["gone.md", "guard.md#gone", "#gone", "../README.md"])
def test_broken_links_are_noticed(link: str) -> None:
    assert broken_links(ROOT / "docs/index.md", f"# Head\n\n[text]({link})\n")


def nav(entries: object) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, dict):
        for value in entries.values():
            yield from nav(value)
    elif isinstance(entries, list):
        for value in entries:
            yield from nav(value)


def test_every_page_is_in_the_nav_once() -> None:
    listed = list(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


# --- layout ---------------------------------------------------------------------------------------------------------


def swallowed(text: str) -> list[str]:
    """Return the lists and tables that follow a paragraph without an empty line: the site would join them to it."""
    lines = prose(text).splitlines()
    starts = re.compile(r"^(- |\d+\. |\|)")
    inside = re.compile(r"^(- |\d+\. |\||\s|#|>|<|$)")
    found, listed = [], False
    for before, line in pairwise(lines):
        listed = bool(re.match(r"^(- |\d+\. )", before)) or (listed and before.startswith(" "))
        if starts.match(line) and not inside.match(before) and not listed:
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lists_and_tables_begin_after_an_empty_line(page: Path) -> None:
    assert swallowed(page.read_text()) == []


def test_swallowed_lists_are_noticed() -> None:
    assert swallowed("Text:\n- item\n") == ["- item"]
    assert swallowed("Text:\n\n- item\n  goes on\n- item\n") == []


# --- files and modules ----------------------------------------------------------------------------------------------


def missing_files(text: str) -> list[str]:
    named = re.findall(
        r"(?<![\w./-])((?:ambient_sd|benchmarks|configs|docs|experiments|prompts|tests|tools)/[\w./*-]*\w)", text
    )
    return sorted({path for path in named if not list(ROOT.glob(path))})


def missing_modules(text: str) -> list[str]:
    """Return the dotted names under the package that are neither a module nor a name in one."""
    wrong = []
    for dotted in sorted(set(re.findall(r"\b((?:ambient_sd|experiments)(?:\.\w+)+)", text))):
        parts, place = dotted.split("."), ROOT
        while parts and (place / parts[0]).is_dir():
            place = place / parts.pop(0)
        if parts and (place / f"{parts[0]}.py").is_file():
            place = place / f"{parts.pop(0)}.py"
        source = place if place.suffix == ".py" else place / "__init__.py"
        if parts and parts[0] not in ("json", "parquet") and not re.search(rf"\b{parts[0]}\b", source.read_text()):
            wrong.append(dotted)
    return wrong


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_named_files_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    assert missing_files(text) + missing_modules(text) == []


def test_missing_files_and_modules_are_noticed() -> None:
    assert missing_files("`tests/test_gone.py` and configs/*.yaml") == ["tests/test_gone.py"]
    assert missing_modules("`ambient_sd.guard.gone`, ambient_sd.guard.policies, ambient_sd.audit.metrics.measure") == [
        "ambient_sd.guard.gone"
    ]


def mapped(page: str) -> set[str]:
    """Return the modules and folders of the package that the map in docs/architecture.md names, as paths."""
    found, folders = set(), [""]
    for line in page.partition("\nambient_sd/\n")[2].partition("\n```")[0].splitlines():
        if entry := re.match(r"^( +)([\w.]+/?)( |$)", line):
            depth = len(entry[1]) // 2
            folders = [*folders[:depth], entry[2]]
            found.add("".join(folders))
    return found


def test_the_map_names_every_module() -> None:
    there = {path.relative_to(ROOT / "ambient_sd") for path in (ROOT / "ambient_sd").rglob("*.py")}
    # One line stands for the policies, one for the layouts, and one for a command that has a folder.
    shown = {
        f"{path.parent}/" if path.name == "__init__.py" or len(path.parts) > 2 else str(path)
        for path in there
        if path.parts[0] != "__init__.py"
    }
    named = mapped((ROOT / "docs/architecture.md").read_text())
    inside = "guard/policies/", "data/layouts/"
    assert {name for name in named if not name.startswith(inside)} | set(inside) == shown


def test_the_map_is_read_by_indentation() -> None:
    text = "```\ndocs/ x\n\nambient_sd/\n  a.py   x\n  b/     y\n    c.py z\n```\n"
    assert mapped(text) == {"a.py", "b/", "b/c.py"}


# --- code and commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_compile(page: Path) -> None:
    for code in blocks(page.read_text(), "python"):
        compile(code, name(page), "exec")
        for module, names in re.findall(
            r"^from ((?:ambient_sd|experiments)[\w.]*) import ([\w, ]+)", code, re.MULTILINE
        ):
            found = importlib.import_module(module)
            assert [n for n in names.split(", ") if not hasattr(found, n)] == []


def swapped(code: str, **places: object) -> str:
    """Replace the models that a page names at the start of a line by ones that are here."""
    for variable, value in places.items():
        code = re.sub(rf'^{variable} = "[^"]*"', f"{variable} = {str(value)!r}", code, flags=re.MULTILINE)
    return code


@pytest.fixture
def tiny_lora(tmp_path: Path) -> Path:
    unet = tiny.tiny_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(unet))
    return tmp_path / "lora"


@pytest.mark.parametrize("guide", ["fine-tune", "guard"])
def test_code_of_guides_runs(
    guide: str, tiny_base: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "\n".join(blocks((ROOT / f"docs/guides/{guide}.md").read_text(), "python"))
    monkeypatch.chdir(tmp_path)
    exec(compile(swapped(code, model=tiny_base, lora=tiny_lora), guide, "exec"), {})


def test_code_of_the_trainer_guide_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    code = "\n".join(blocks((ROOT / "docs/guides/own-trainer.md").read_text(), "python"))
    given: dict[str, object] = {}
    exec(compile(code, "own-trainer", "exec"), given)
    assert torch.isfinite(given["loss"])  # type: ignore[arg-type]
    assert "flow_prediction 1.0" in capsys.readouterr().out


def commands(text: str) -> list[list[str]]:
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


class _Captured(BaseException):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the parser that a script (path) or a module parses with, caught in the act."""

    def caught(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise _Captured(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Captured) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", caught)
        patch.setattr(sys, "argv", [script])
        patch.syspath_prepend(str((ROOT / script).parent))
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    return found.value.parser


def refused(parser: argparse.ArgumentParser, words: list[str]) -> str | None:
    """Return what the parser says against the words, or None. Commands with "..." are parsed as far as they go."""

    def error(message: str) -> None:
        raise UserError(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, "error", error)
        try:
            parser.parse_args([word for word in words if word != "..."])
        except UserError as wrong:
            return None if "..." in words and "required" in str(wrong) else str(wrong)
        except SystemExit as end:
            return None if end.code == 0 else "refused"
    return None


def wrong_with(words: list[str]) -> str | None:
    """Return what is wrong with a command of ours, or None."""
    words = list(dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S*", word), words))
    if words and words[0].endswith("ambient-sd"):
        if words[1].startswith("-"):
            return refused(cli.make_parser(), words[1:])
        return refused(cli.parser_of(words[1]), words[2:]) if words[1] in cli.COMMANDS else f"no command {words[1]}"
    if words[:2] == ["accelerate", "launch"]:
        launcher = launch_command_parser()
        at = next((i for i, word in enumerate(words) if word in (SCRIPT, "-m")), len(words) - 1)
        if unknown := {w for w in words[2:at] if w.startswith("--")} - {
            o for a in launcher._actions for o in a.option_strings
        }:
            return f"accelerate does not know {unknown}"
        script, rest = (words[at + 1], words[at + 2 :]) if words[at] == "-m" else (words[at], words[at + 1 :])
        return None if "--config_file" in words and at == len(words) - 1 else refused(parser_of(script), rest)
    if words and words[0].endswith("python") and len(words) > 2:
        if words[1] == "-m" and words[2].startswith(("ambient_sd", "experiments")):
            return refused(parser_of(words[2]), words[3:])
        if words[1].endswith(".py"):
            return refused(parser_of(words[1]), words[2:])
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    found = {shlex.join(words): wrong_with(words) for words in commands(page.read_text())}
    assert [f"{wrong}: {command}" for command, wrong in found.items() if wrong] == []


@pytest.mark.parametrize(
    ("line", "gone"),
    [
        ("ambient-sd audit model data --out x", "--gone 1"),
        ("accelerate launch train_text_to_image_ambient.py --lora", "--gone"),
        ("python benchmarks/copies.py --out x.json", "--gone x"),
        ("python -m experiments.lemmas --out x", "--gone x"),
    ],
)
def test_unknown_flags_are_noticed(line: str, gone: str) -> None:
    assert wrong_with(shlex.split(line)) is None
    assert wrong_with(shlex.split(f"{line} {gone}"))


def test_unknown_verbs_and_launcher_flags_are_noticed() -> None:
    assert wrong_with(["ambient-sd", "gone"])
    assert wrong_with(["accelerate", "launch", "--gone", SCRIPT, "--lora"])
