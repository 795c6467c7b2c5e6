"""Write docs/commands.md: every command with all of its flags, read from the fields that the command lines are built from.

python tools/command_page.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ambient_sd.cli import COMMANDS, parser_of
from ambient_sd.training.config import make_parser
from ambient_sd.utils.files import atomic_write

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands

<!-- Written by `python tools/command_page.py`: edit the settings' fields, not this page. -->

Every flag of every command, as `--help` shows it. A flag may be spelled with hyphens or underscores. A misspelt one ends the command in one line that names the nearest.
A switch `--name` is turned off by `--no-name`.
"""


def table(actions: list[argparse.Action]) -> str:
    """Return the arguments as a table, or nothing if there are none."""
    rows = []
    for action in actions:
        if action.dest == "help":
            continue
        names = [name for name in action.option_strings if not name.startswith("--no-")] or [
            str(action.metavar or action.dest.upper())
        ]
        value = f" {action.metavar}" if action.option_strings and action.metavar else ""
        shown = f"{', '.join(names)}{value}".replace("|", "\\|")
        text = (action.help or "").replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{shown}` | {text}{' (required)' if action.option_strings and action.required else ''} |")
    return "\n".join(["| argument | what it is |", "|---|---|", *rows]) + "\n" if rows else ""


def section(parser: argparse.ArgumentParser, title: str) -> str:
    """Return the chapter of one command."""
    parts = [f"## {title}", parser.description or ""]
    positional, options, *titled = parser._action_groups
    parts.append(table([*positional._group_actions, *options._group_actions]))
    if title.endswith(" train"):
        titled = []
        parts.append("Beside these every setting of `train_text_to_image_ambient.py`, below.")
    for group in titled:
        parts += [f"**{group.title}.** {group.description or ''}".strip(), table(group._group_actions)]
    if parser.epilog and "policies and their settings" in parser.epilog:
        parts.append("```text\n" + parser.epilog.replace("%%", "%").rstrip() + "\n```\n")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def page() -> str:
    """Return the whole page."""
    chapters = [section(parser_of(name), f"ambient-sd {name}") for name in COMMANDS]
    return "\n".join([HEAD, *chapters, section(make_parser(), "train_text_to_image_ambient.py")])


if __name__ == "__main__":
    atomic_write(PAGE, page())
