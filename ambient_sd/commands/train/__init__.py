"""`ambient-sd train`: from a folder of images to a tested LoRA; flags are those of the training script, what is not said is proposed."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ambient_sd.training.config import CONFIG_HELP, GROUPS, MOVED_BASE, RANK, TrainConfig, load_yaml
from ambient_sd.training.elsewhere import ELSEWHERE
from ambient_sd.utils import settings
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, is_given, option

# Modes that are on where the command line says nothing: what needs them may be given alone.
ASSUMED: dict[str, Any] = {"lora": True, "probe_steps": 1, "keep": "best"}
# Settings that are of the ambient loss, or that distillation refuses: given without an objective they choose the ambient one.
_OF_AMBIENT = ("ambient_level", "ambient_timestep", "reweight", "near_duplicates", "fresh_copies", "agc")


# Settings that `propose` proposes.
PROPOSED = (
    "lora", "rank", "resolution", "aspect_ratio_buckets", "train_batch_size", "max_train_steps", "learning_rate", "use_ema", "objective",
    "mixed_precision", "gradient_checkpointing", "gradient_checkpointing_fraction", "probe_steps", "probe_images", "keep", "checkpoints_total_limit",
)  # fmt: skip


def objective_of(given: Mapping[str, Any]) -> str:
    """Return the objective of a run: the given one, or distillation unless a setting belongs to the ambient loss.

    Of what was measured it lets the fewest images come back (docs/results/styles.md).

    Example:
        >>> objective_of({}), objective_of({"ambient_level": 1.0}), objective_of({"objective": "plain"})
        ('distill', 'ambient', 'plain')
    """
    if given.get("objective") is not None:
        return str(given["objective"])
    of_ambient = any(is_given(TrainConfig, name, given[name]) for name in _OF_AMBIENT if name in given)
    of_ambient = of_ambient or given.get("lora_init") in MOVED_BASE
    return "ambient" if of_ambient and "distill_level" not in given else "distill"


def assumed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what this command takes for granted beside the given settings.

    Example:
        >>> assumed({})["rank"], "rank" in assumed({"lora": False}), "rank" in assumed({"lora_weights": "mine.safetensors"})
        (16, False, False)
    """
    own_rank = given.get("lora", True) and given.get("lora_weights") is None
    return {**ASSUMED, **({"rank": RANK} if own_rank else {})}


def sketch(given: Mapping[str, Any]) -> TrainConfig:
    """Return the given settings with the modes that this command turns on, so that a mistake is found before anything is proposed."""
    return TrainConfig(**{**assumed(given), **given, "objective": objective_of(given)})


@dataclass(frozen=True)
class TrainOptions:
    """Say what is trained on and what the command does beside the training; all else is a `TrainConfig`.

    Raises:
        UserError: a value breaks its rule.
    """

    # fmt: off
    folder: str = option(REQUIRED, "the images: a folder as your tools keep it, a parquet file, tar shards, or a dataset's hub id", positional=True, metavar="DATA")
    config: str | None = option(None, CONFIG_HELP, metavar="NAME|FILE.yaml")
    dry_run: bool = option(False, "print the plan, with time and memory measured on three steps, and train nothing")
    audit: bool = option(False, "audit the result at the end: output_dir/audit/audit.html")
    num_processes: int | None = option(None, "train on N devices (default: all GPUs of this machine)", low=1)
    # fmt: on

    def __post_init__(self) -> None:
        check(self)

    def values(self, flags: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that are given: those of the file, and over them those of the command line."""
        place = "train_data_dir" if _is_place(self.folder) else "dataset_name"
        flags, file = {**flags, place: self.folder}, load_yaml(self.config) if self.config else {}
        if file.get("objective") == "distill" and objective_of(flags) == "ambient":
            flags["objective"] = "ambient"  # the presets distill because nothing else was said
        found, dropped = settings.over_file(TrainConfig, flags, file)
        if dropped:
            print(f"ambient-sd: left out of {self.config}, for the command line chooses otherwise: {', '.join(dropped)}", file=sys.stderr)  # fmt: skip
        # A preset's own folders are those of its example command.
        if self.config is not None and "output_dir" not in flags:
            found.pop("output_dir", None)
        return found


def _is_place(name: str) -> bool:
    return (
        os.path.exists(name)
        or name.startswith((".", "/", "~"))
        or name.count("/") != 1
        or any(c in name for c in "*{[")
    )


def make_parser() -> Parser:
    """Build the command line: this command's own options, then every setting of a training."""
    parser = Parser(
        prog="ambient-sd train",
        description="Train a LoRA (or, with --no-lora, the whole U-Net) on the images of DATA so that it hands fewer of them back. Objective, "
        "resolution, steps, rate and noise level are proposed where they are not given (--objective plain: all that the images show is learnt); copying is measured on the way, and the last checkpoint before it "
        "begins is the result. Interrupted runs resume with the same command.",
        epilog="Example: ambient-sd train my-images --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --audit",
        elsewhere=ELSEWHERE,
    )
    add_flags(parser, TrainOptions)
    add_flags(parser, TrainConfig, skip=("train_data_dir", "dataset_name"), groups=GROUPS, proposed=PROPOSED)
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Plan, train and audit; on several devices every process of `accelerate launch` runs this."""
    options = from_flags(TrainOptions, args)
    own = {item.name for item in dataclasses.fields(TrainOptions)}
    flags = {name: value for name, value in vars(args).items() if name not in own}
    values = options.values(flags)
    if values.get("pretrained_model_name_or_path") is None:
        raise UserError("pretrained_model_name_or_path is missing", rule="a base model is needed",
                        remedy="give --pretrained_model_name_or_path a pipeline folder, a hub id or `embedded`, or --config sd2-lora")  # fmt: skip
    place = os.path.realpath(options.folder) if _is_place(options.folder) else options.folder
    values.setdefault("output_dir", f"{os.path.basename(place) or 'images'}-lora")
    sketch(values)  # a mistake is found before torch is loaded
    from ambient_sd.commands.train import work
    from ambient_sd.utils.quiet import quiet

    quiet()
    return work.train(options, values, words)
