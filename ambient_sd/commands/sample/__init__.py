"""`ambient-sd sample`: its settings, its flags and what it prints; `ambient_sd.commands.sample.work` samples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ambient_sd.commands.shared import SharedOptions
from ambient_sd.guard.by_name import listing
from ambient_sd.sampling_options import SamplingOptions
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.settings import Parser, add_flags, check, from_flags, option, same

if TYPE_CHECKING:
    from ambient_sd.sampling import SamplingConfig


@dataclass(frozen=True)
class PromptOptions:
    """Say where the prompts come from: texts, or a file of them."""

    prompt: list[str] | None = option(None, "prompts", metavar="TEXT")
    prompts: Path | None = same(SharedOptions, "prompts")

    def __post_init__(self) -> None:
        check(self)
        if (self.prompt is None) == (self.prompts is None):
            raise UserError(
                "both prompt and prompts are given" if self.prompt else "neither prompt nor prompts is given",
                rule="prompts come from the command line or from a file",
                remedy="give one of --prompt and --prompts",
            )

    def read(self) -> list[str]:
        """Return the prompts."""
        from ambient_sd.sampling import read_prompts

        return list(self.prompt or ()) if self.prompts is None else read_prompts(self.prompts)


@dataclass(frozen=True)
class SampleSettings:
    """Say what is sampled.

    A policy acts on every image, or with `when` flagged on those that reach the threshold at the first step. The threshold is a number
    above 0, or "auto": the model's calibrated one where it has one that fits. Under a policy the first step decides, before the policy
    acts: a number then flags only with `when` flagged, as one of the first step. `attribution` changes no image and may differ from run
    to run in one folder.

    Raises:
        UserError: a value breaks its rule.
    """

    # fmt: off
    sampling: SamplingConfig
    output_dir: Path = same(SharedOptions, "output_dir")
    prompts: list[str] = field(default_factory=list, repr=False)
    num_images_per_prompt: int = same(SharedOptions, "num_images_per_prompt", default=1)
    policy: str | None = option(None, "mitigation, or several joined with +; listed below", metavar="NAME[:key=value,...]")
    when: Literal["always", "flagged"] = option("always", "images that the policy acts on")
    threshold: float | Literal["auto"] = option("auto", "score that flags an image; auto: as calibrated, where the model has a threshold that fits. With --policy the first step decides, before the policy acts: a number then flags only with --when flagged", above=0)
    attribution: Literal["flagged", "all", "none"] = option("flagged", "images of which the page shows how far the score hangs on each word; each is sampled once more, with a backward pass at every step: about 2.6 times the price of sampling it")
    score_space: Literal["noise", "output"] | None = same(SharedOptions, "score_space")
    overwrite: bool = same(SharedOptions, "overwrite")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)
        if self.when == "flagged" and self.policy is None:
            raise UserError("when is flagged without a policy", rule="it says on which images a policy acts")


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd sample",
        description="Sample images under the memorization guard and write them, their scores, a contact sheet and a page. "
        "Interrupted runs resume.",
        epilog=f"policies and their settings, for --policy NAME[:key=value,...]:\n{listing().replace('%', '%%')}\n",
    )
    for owner in (SamplingOptions, PromptOptions, SampleSettings):
        add_flags(parser, owner)
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Sample, and print how many images are flagged."""
    prompts = from_flags(PromptOptions, args)
    from_flags(SamplingOptions, args)  # a mistake is found before torch is loaded
    from_flags(SampleSettings, args, sampling=None, prompts=[])
    from ambient_sd.utils.quiet import quiet

    quiet()  # before the imports below, which load what speaks
    from ambient_sd.commands.sample.work import sample
    from ambient_sd.sampling import SamplingConfig, adapted, processes

    sampling = adapted(from_flags(SamplingConfig, args))
    settings = from_flags(SampleSettings, args, sampling=sampling, prompts=prompts.read())
    records = sample(settings)
    if not processes().is_main_process:
        return
    flagged = sum(bool(record["flagged"]) for record in records)
    scores = sorted(record["score"] for record in records if record["score"] is not None)
    undecided = [record for record in records if record["undecided"]]
    has_threshold = any(record["threshold"] is not None for record in records)
    flags = f"{flagged} flagged" if has_threshold else "none is flagged: no threshold"
    if undecided:
        flags = f"{flagged} flagged, of {len(undecided)} it is not known: {one_line(undecided[0]['undecided'], 300)}"
    said = f"median score {scores[len(scores) // 2]:.4g}, highest {scores[-1]:.4g}; {flags}" if scores else "no scores"
    plural = "s" * (len(records) != 1)
    print(f"\n{len(records)} image{plural}, {said}\nLook at them: {settings.output_dir / 'index.html'}", flush=True)
