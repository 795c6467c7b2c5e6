"""`ambient-sd push`: publish the results of a finished training on the hub (`ambient_sd.reporting.publishing`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option


@dataclass(frozen=True)
class PushSettings:
    """Say what is uploaded, and where to.

    Raises:
        UserError: a value breaks its rule.

    Example:
        >>> PushSettings(Path("my-lora"), repo="owner/name").private
        False
    """

    folder: Path = option(REQUIRED, "output_dir of a finished training", positional=True)
    repo: str = option(REQUIRED, "repository, owner/name; created if it is missing")
    private: bool = option(False, "create the repository private")
    revision: str | None = option(
        None, "revision of the hub repository: the branch to upload to (default: the main one)"
    )

    def __post_init__(self) -> None:
        check(self)


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd push",
        description="Upload weights, configurations, card and validation images; never checkpoints, logs, tokens or local paths. "
        "Token: HF_TOKEN or `hf auth login`.",
    )
    add_flags(parser, PushSettings)
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Upload, and print the address of the commit."""
    settings = from_flags(PushSettings, args)
    from ambient_sd.reporting.publishing import push

    print(
        push(settings.folder, settings.repo, private=settings.private or None, revision=settings.revision), flush=True
    )
