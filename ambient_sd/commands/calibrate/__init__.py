"""`ambient-sd calibrate`: its settings, its flags and what it prints; `ambient_sd.commands.calibrate.work` measures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ambient_sd.commands.shared import SharedOptions
from ambient_sd.sampling_options import SamplingOptions
from ambient_sd.utils.errors import UserError, require_guidance
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option, same

if TYPE_CHECKING:
    from ambient_sd.sampling import SamplingConfig


@dataclass(frozen=True)
class CalibrationPrompts:
    """Name the files of the prompts."""

    # fmt: off
    ordinary: Path = option(REQUIRED, "prompts that the model cannot have memorized, a few hundred; .jsonl, or text, one a line", metavar="FILE")
    memorized: Path | None = option(None, "prompts that it has memorized, to see whether it tells; if it does not, no threshold is written and the exit status is 1", metavar="FILE")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class CalibrateSettings:
    """Say what is calibrated.

    Thresholds are found for one image of a prompt and for the mean over `num_images_per_prompt`. `output_dir` may be a .json file.

    Raises:
        UserError: a value breaks its rule.
    """

    # fmt: off
    sampling: SamplingConfig
    ordinary: list[str] = field(repr=False)
    memorized: list[str] = field(default_factory=list, repr=False)
    fpr: float = option(0.01, "share of ordinary prompts that may be flagged", above=0, below=1)
    num_images_per_prompt: int = same(SharedOptions, "num_images_per_prompt", alias="generations")
    output_dir: Path | None = same(SharedOptions, "output_dir", default=None, text="folder for everything that is written; or a .json file (default: the LoRA's or model's folder)")
    detector: Literal["norm", "anisotropy", "beside_base"] = option("norm", "norm: what the guard sees while it samples; anisotropy, and beside_base, what a fine-tune adds to its base: asked of pure noise before sampling, which the guard cannot use while it samples (ambient_sd.guard.anisotropy.screen, ambient_sd.guard.beside_base.screen)")
    beside: str | None = option(None, "of the detector beside_base: the model that MODEL was fine-tuned from (default: MODEL without its LoRA)", metavar="MODEL")
    score_space: Literal["noise", "output"] = same(SharedOptions, "score_space", default="noise", text="what scores, thresholds and targets are of: predicted noise, or outputs as they are, as published figures of v-prediction models (SD2) are; the file remembers which, and the guard follows it. The others have the space noise alone")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)
        if self.score_space != "noise" and self.detector != "norm":
            raise UserError(f"score_space is {self.score_space!r} with the detector {self.detector}",
                            rule=f"{self.detector} has the space noise alone", remedy="leave score_space out")  # fmt: skip
        if self.beside is not None and self.detector != "beside_base":
            raise UserError(f"beside is given with the detector {self.detector}", rule="only beside_base compares with a base",
                            remedy="add --detector beside_base, or leave it out")  # fmt: skip


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd calibrate",
        description="Sample ordinary prompts under the guard and find the thresholds that at most the asked share of them reaches. "
        "Writes memorization_threshold.json, which the guard then uses (of the other detectors: memorization_threshold_DETECTOR.json). "
        "Interrupted runs resume.",
    )
    add_flags(parser, SamplingOptions, skip=("base_above",))
    add_flags(parser, CalibrationPrompts)
    add_flags(parser, CalibrateSettings)
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Calibrate, and print the thresholds; exit with status 1 where the detector tells nothing."""
    files = from_flags(CalibrationPrompts, args)
    if (scale := from_flags(SamplingOptions, args).guidance_scale) is not None:
        require_guidance(scale)  # a mistake is found before torch is loaded
    from_flags(CalibrateSettings, args, sampling=None, ordinary=[], memorized=[])
    from ambient_sd.utils.quiet import quiet

    quiet()  # before the imports below, which load what speaks
    from ambient_sd.commands.calibrate.work import calibrate, read_both, table, useless
    from ambient_sd.sampling import SamplingConfig, adapted, processes

    ordinary, memorized = read_both(str(files.ordinary), None if files.memorized is None else str(files.memorized))
    sampling = adapted(from_flags(SamplingConfig, args))
    found, path = calibrate(
        from_flags(CalibrateSettings, args, sampling=sampling, ordinary=ordinary, memorized=memorized)
    )
    if not processes().is_main_process:
        return
    if path is None:
        print(f"\n{table(found)}\n", flush=True)
        print(f"ambient-sd: {useless(found)}; no threshold is written", file=sys.stderr, flush=True)
        sys.exit(1)
    print(f"\n{table(found)}\n\n{found.origin}; written to {path}", flush=True)
