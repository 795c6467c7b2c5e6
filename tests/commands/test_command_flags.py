"""Every command takes its flags from the fields of its settings; one name means one thing; `--help` is whole and quick."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ambient_sd.audit.registry import FeatureOptions
from ambient_sd.cli import COMMANDS, main, make_parser, parser_of
from ambient_sd.commands.audit import AuditedOptions, AuditSettings
from ambient_sd.commands.calibrate import CalibrateSettings, CalibrationPrompts
from ambient_sd.commands.compare import ComparedOptions, CompareSettings
from ambient_sd.commands.demo import DemoSettings
from ambient_sd.commands.inspect import InspectSettings
from ambient_sd.commands.level import LevelSettings
from ambient_sd.commands.push import PushSettings
from ambient_sd.commands.sample import PromptOptions, SampleSettings
from ambient_sd.commands.train import TrainOptions
from ambient_sd.data.dataset_options import DatasetOptions
from ambient_sd.sampling_options import SamplingOptions
from ambient_sd.training import config
from ambient_sd.utils.settings import Parser

SETTINGS: dict[str, tuple[type, ...]] = {
    "demo": (DemoSettings,), "inspect": (InspectSettings,), "level": (LevelSettings,), "push": (PushSettings,),
    "sample": (SamplingOptions, PromptOptions, SampleSettings), "calibrate": (SamplingOptions, CalibrationPrompts, CalibrateSettings),
    "compare": (ComparedOptions, DatasetOptions, CompareSettings),
    "audit": (AuditedOptions, AuditSettings, FeatureOptions, DatasetOptions, SamplingOptions), "script": (config.TrainConfig,), "train": (TrainOptions, config.TrainConfig),
}  # fmt: skip
# Anisotropy and the scores of a calibration are of the model alone; MODEL stands among the places of an audit.
LEFT_OUT = {"calibrate": {"base_above"}, "audit": {"model"}, "train": {"train_data_dir", "dataset_name"}}
ALL = {**{name: parser_of(name) for name in COMMANDS}, "script": config.make_parser()}


def options(parser: Parser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings if action.dest != "help"}


def conflicts(commands: dict[str, Parser]) -> list[str]:
    """Return every flag that has another meaning or value in one command than in another."""
    seen: dict[str, tuple[str, object, str]] = {}
    found = []
    for name, parser in commands.items():
        for flag, action in options(parser).items():
            # Up to the first `;`, `:` or `(` a text says what it is; beyond, what is particular to the command.
            meaning = re.split(r"[;:(]", action.help or "")[0].strip()
            first = seen.setdefault(flag, (meaning, action.metavar, name))
            if (meaning, action.metavar) != first[:2]:
                found.append(f"{flag}: {name} and {first[2]}")
    return found


@pytest.mark.parametrize("name", ALL)
def test_help_shows_every_setting_and_no_none(name: str) -> None:
    text = ALL[name].format_help()
    names = {f.name for owner in SETTINGS[name] for f in dataclasses.fields(owner) if "text" in f.metadata}
    assert {action.dest for action in ALL[name]._actions} - {"help", "config"} == names - {"config"} - LEFT_OUT.get(
        name, set()
    )
    for owner in SETTINGS[name]:
        for item in dataclasses.fields(owner):
            if "text" in item.metadata and item.name not in LEFT_OUT.get(name, set()):
                shown = item.metadata["metavar"] if item.metadata["positional"] else f"--{item.name}"
                assert (shown or item.name.upper()) in text or item.name == "folder"
    assert "None" not in text


def test_one_flag_means_the_same_in_every_command() -> None:
    # compare has several models, each with a name and perhaps a LoRA of its own.
    known = {f"{flag}: compare and train" for flag in ("--lora_weights", "--adapter", "--revision")}
    # In train it is the input that FLUX.1 takes, elsewhere the scale of sampling.
    known |= {f"--guidance_scale: {name} and train" for name in ("audit", "calibrate", "compare", "demo", "sample")}
    assert set(conflicts(ALL)) == known
    sampling = {name: parser for name, parser in ALL.items() if name not in ("train", "script")}
    assert not [conflict for conflict in conflicts(sampling) if conflict.startswith("--guidance_scale")]


def test_another_meaning_or_value_is_noticed() -> None:
    odd = Parser(prog="odd")
    odd.add_argument("--seed", metavar="INTEGER", help="how many seeds")
    odd.add_argument("--device", metavar="GPU", help="torch device")
    assert conflicts({**ALL, "odd": odd}) != conflicts(ALL)
    assert {line.partition(":")[0] for line in set(conflicts({**ALL, "odd": odd})) - set(conflicts(ALL))} == {"--seed", "--device"}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_each_parameter_has_one_spelling_in_all_commands(name: str) -> None:
    flags = options(ALL[name])
    for old, new in (("--out", "--output_dir"), ("--adapter", "--lora_weights"), ("--generations", "--num_images_per_prompt"),
                     ("--samples_per_prompt", "--num_images_per_prompt"), ("--max_prompts", "--num_prompts"),
                     ("--sampling_steps", "--num_inference_steps")):  # fmt: skip
        assert old not in flags or flags[old] is flags[new]


def test_a_typo_names_the_nearest_flag_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words, near in (
        (["sample", "m", "--polcy", "STP"], "--policy"), (["audit", "--fail_ovr", "0"], "--fail_over"), (["levl"], "level"),
        (["push", "--repoo", "a/b"], "--repo"), (["inspect", "x", "--unlistd", "ignore"], "--unlisted"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and f"the nearest known one is {near};" in error


def test_the_commands_help_lists_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = make_parser().format_help()
    assert all(name in text and about in text for name, about in COMMANDS.items())
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "COMMAND" in capsys.readouterr().err


def test_help_comes_without_torch_or_numpy() -> None:
    code = (
        "import sys\nfrom ambient_sd.cli import COMMANDS, parser_of\n"
        "for name in COMMANDS: parser_of(name).format_help()\n"
        "sys.exit([name for name in ('torch', 'numpy', 'diffusers', 'PIL', 'huggingface_hub') if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_of_all_commands_is_what_the_fields_say() -> None:
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("command_page", root / "tools" / "command_page.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = (root / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == made.page(), "run: python tools/command_page.py"
    assert all(f"## ambient-sd {name}" in page for name in COMMANDS) and "`--ambient_level NUMBER\\|auto`" in page
