"""`ambient-sd demo`: its settings, its flags and what it prints; `ambient_sd.commands.demo.work` trains and measures."""

from __future__ import annotations

import argparse
import os
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ambient_sd.commands.shared import SharedOptions
from ambient_sd.sampling_options import SamplingOptions
from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import Parser, add_flags, check, from_flags, option, same


@dataclass(frozen=True)
class DemoSettings:
    """Say where the demo goes, how long it trains and how it samples.

    Raises:
        UserError: a value breaks its rule.

    Example:
        >>> DemoSettings().guidance_scale
        4.0
    """

    # fmt: off
    output_dir: Path = same(SharedOptions, "output_dir", default=Path("demo-out"))
    steps: int | None = option(None, "optimizer steps of each run (default: as in configs/demo.yaml)", low=1)
    level: float | None = option(None, "noise level s_n of the ambient run (default 1.0)", low=0)
    num_images_per_prompt: int = same(SharedOptions, "num_images_per_prompt", default=2, alias="samples_per_prompt")
    num_prompts: int = same(SharedOptions, "num_prompts")
    num_inference_steps: int = same(SamplingOptions, "num_inference_steps", default=15, alias="sampling_steps")
    guidance_scale: float = same(SamplingOptions, "guidance_scale", default=4.0, text="classifier-free guidance; above 1", low=None, above=1)
    seed: int = same(TrainConfig, "seed", text="seed: training, sampling and intervals")
    overwrite: bool = same(SharedOptions, "overwrite")
    open: bool = option(False, "open the page in the browser when it is ready")
    objectives: list[str] = option(["plain", "distill", "ambient"], "runs side by side, each with its loss; the second is compared with the first", choices=("plain", "ambient", "distill"))
    # fmt: on

    def __post_init__(self) -> None:
        check(self)
        if len(set(self.objectives)) < max(2, len(self.objectives)):
            raise UserError(
                f"objectives are {' '.join(self.objectives)}",
                rule="two or three different ones are compared",
                remedy="name them apart",
            )
        if 0 < self.num_prompts < 4:
            raise UserError(
                f"num_prompts is {self.num_prompts}", rule="quality is measured on at least 4 images", remedy="raise it"
            )


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd demo",
        description="Fine-tune the embedded base on 60 embedded images of a style that it has not seen, once with each loss. Sample all under "
        "the memorization guard, for the captions that were trained and for others, measure what comes back and how good the others are, and "
        "write report.html. About eighteen minutes on two CPU cores.",
    )
    add_flags(parser, DemoSettings)
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Run the demo, and print its table and what it found."""
    settings = from_flags(DemoSettings, args)
    from ambient_sd.utils.quiet import quiet

    quiet()  # before the imports below, which load what speaks
    from ambient_sd.commands.demo.work import finding, run_demo, table

    report, page = run_demo(settings), settings.output_dir / "report.html"
    print(f"\n{table(report)}\n\n{finding(report)}\n\nLook at it: {page}", flush=True)
    if settings.open and not os.environ.get("CI"):
        webbrowser.open(page.resolve().as_uri())
