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
        >>> DemoSettings().subset
        60
    """

    # fmt: off
    output_dir: Path = same(SharedOptions, "output_dir", default=Path("demo-out"))
    subset: int = option(60, "how many training images", choices=(60, 300, 1000))
    steps: int | None = option(None, "optimizer steps of each run (default: as in configs/demo.yaml)", low=1)
    level: float | None = option(None, "noise level s_n of the ambient run (default: as in configs/demo.yaml)", low=0)
    num_images_per_prompt: int = same(SharedOptions, "num_images_per_prompt", alias="samples_per_prompt")
    num_prompts: int = same(SharedOptions, "num_prompts", default=60)
    num_inference_steps: int = same(SamplingOptions, "num_inference_steps", default=15, alias="sampling_steps")
    guidance_scale: float = same(SamplingOptions, "guidance_scale", default=1.5, text="classifier-free guidance; above 1", low=None, above=1)
    seed: int = same(TrainConfig, "seed", text="seed: training, sampling and intervals")
    overwrite: bool = same(SharedOptions, "overwrite")
    open: bool = option(False, "open the page in the browser when it is ready")
    objectives: tuple[str, ...] = ("plain", "ambient")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)
        if (self.num_prompts or self.subset) * self.num_images_per_prompt < 4:
            raise UserError(
                f"num_prompts is {self.num_prompts} and num_images_per_prompt {self.num_images_per_prompt}",
                rule="quality is measured on at least 4 images", remedy="raise one of them",
            )  # fmt: skip


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd demo",
        description="Fine-tune the embedded base on embedded images twice, with the plain and with the ambient loss, sample "
        "both under the memorization guard, measure, and write report.html. About 8 minutes on two CPU cores.",
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
