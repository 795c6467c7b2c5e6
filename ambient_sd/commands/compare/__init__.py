"""`ambient-sd compare`: its settings, its flags and what it prints; `ambient_sd.commands.compare.work` compares."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambient_sd.commands.shared import SharedOptions
from ambient_sd.data.dataset_options import AUTO, DatasetOptions, reading
from ambient_sd.guard.by_name import listing
from ambient_sd.sampling_options import SamplingOptions
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option, same


@dataclass(frozen=True, kw_only=True)
class ComparedOptions:
    """Name the models that are compared, and the images that they were trained on."""

    # fmt: off
    models: list[str] = option(REQUIRED, "pipeline folders or hub ids, each with a name of yours; the memorized prompts are those of the first", positional=True, metavar="NAME=MODEL")
    lora_weights: list[str] = same(SamplingOptions, "lora_weights", default=[], text="LoRA on the model: folder, .safetensors file or hub id; each with the name of its model", metavar="NAME=LORA")
    revision: list[str] = same(SamplingOptions, "revision", default=[], text="revision of the hub repository: branch, tag or commit, each with the name of its model", metavar="NAME=REVISION")
    data: str = option(REQUIRED, "the training images: folder, parquet file, tar shards, or hub dataset", metavar="DATA")
    heldout: str = same(SharedOptions, "heldout", default=REQUIRED)
    heldout_split: str | None = same(SharedOptions, "heldout_split")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)
        self.named()

    def named(self) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        """Return models, LoRAs and revisions by the name of the model.

        Raises:
            UserError: a name is missing, unknown or there twice.
        """
        models: dict[str, str] = {}
        for entry in self.models:
            name, _, place = entry.partition("=")
            if not (name and place) or name in models or not name.replace("-", "").replace("_", "").isalnum():
                raise UserError(f"model {entry!r}", rule="each is NAME=MODEL, with a name of its own of letters, digits, - and _",
                                remedy="for example plain=out/plain ambient=out/ambient")  # fmt: skip
            models[name] = place
        given: dict[str, dict[str, str]] = {"lora_weights": {}, "revision": {}}
        for flag, found in given.items():
            for entry in getattr(self, flag):
                name, _, value = entry.partition("=")
                if name not in models or name in found or not value:
                    what = "LORA" if flag == "lora_weights" else "REVISION"
                    raise UserError(f"{flag} {entry!r}", rule=f"each is NAME={what}, with the name of a model: {', '.join(models)}")  # fmt: skip
                found[name] = value
        return models, given["lora_weights"], given["revision"]


@dataclass(frozen=True)
class CompareSettings:
    """Say what a comparison is made of; all of it stands in `comparison.json`.

    `models` maps a name to a pipeline folder; the memorized prompts are those of the first. The `judge` decides how well images show their
    prompts, and its norms stand beside those of the models: it should not have seen the images, so the models' base is best.

    Raises:
        UserError: a value breaks its rule.
    """

    # fmt: off
    models: Mapping[str, str]
    judge: str = same(SharedOptions, "judge", default=REQUIRED)
    output_dir: Path = same(SharedOptions, "output_dir")
    resolution: int = same(SamplingOptions, "resolution", default=REQUIRED, text="side of the images in pixels")
    num_images_per_prompt: int = same(SharedOptions, "num_images_per_prompt", alias="generations")
    num_prompts: int = same(SharedOptions, "num_prompts")
    mitigated: int = option(60, "memorized prompts that are mitigated at most", low=1)
    mitigations: list[str] = option([], "policies that are tried (default: all), short names or long ones, listed below; what is per model comes from the ordinary prompts", metavar="NAME")
    num_inference_steps: int = same(SamplingOptions, "num_inference_steps", default=20)
    guidance_scale: float | None = same(SamplingOptions, "guidance_scale", text="classifier-free guidance; above 1 (default: the usual one of the first, 7.5 of Stable Diffusion)", low=None, above=1)
    batch_size: int = same(SamplingOptions, "batch_size", default=16)
    seed: int = same(SamplingOptions, "seed")
    lora_weights: Mapping[str, str] = field(default_factory=dict)
    revision: Mapping[str, str] = field(default_factory=dict)
    variant: str | None = same(SamplingOptions, "variant", text="variant of the weight files, e.g. fp16; of models and judge that have it")
    single_file_config: str | None = same(SamplingOptions, "single_file_config")
    overwrite: bool = same(SharedOptions, "overwrite")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd compare",
        description="Sample the training captions, see which are memorized, score the detectors on them, and sample the memorized "
        "ones again under every mitigation. Writes tables, sheets and a page. Interrupted runs resume.",
        epilog=f"policies and their settings:\n{listing().replace('%', '%%')}\n",
    )
    for owner in (ComparedOptions, DatasetOptions, CompareSettings):
        add_flags(parser, owner)
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Compare, and print the tables."""
    places, rows = from_flags(ComparedOptions, args), from_flags(DatasetOptions, args)
    models, loras, revisions = places.named()
    settings = from_flags(CompareSettings, args, models=models, lora_weights=loras, revision=revisions)
    from ambient_sd.utils.quiet import quiet

    quiet()  # before the imports below, which load what speaks
    from ambient_sd.commands.compare.work import compare, config_of
    from ambient_sd.data.sources import load_rows
    from ambient_sd.reporting.compare_page import tables
    from ambient_sd.sampling import SamplingConfig, adapted

    for name, place in models.items():
        if (
            name not in loras
            and (found := adapted(SamplingConfig(place, resolution=settings.resolution))).lora_weights is not None
        ):
            models[name], loras[name] = found.model, found.lora_weights
            if found.pretrained_vae_model_name_or_path is not None:
                raise UserError(f"{name} was trained with another VAE", rule="models are compared with the VAE of their base",
                                remedy="give a base folder with that VAE in it, and the LoRA with --lora_weights")  # fmt: skip
    settings = dataclasses.replace(settings, models=models, lora_weights=loras)
    settings = dataclasses.replace(settings, guidance_scale=config_of(settings, next(iter(models.values()))).scale)

    rows_of = reading(rows)
    heldout = {**rows_of, "split": places.heldout_split, "row_filter": (), "layout": AUTO}
    result = compare(
        settings,
        load_rows(places.data, **rows_of),
        load_rows(places.heldout, **heldout),
        _command(settings, places, rows),
    )
    if result is not None:
        print(f"\n{tables(result)}\nLook at it: {settings.output_dir / 'comparison.html'}", flush=True)


def _command(settings: CompareSettings, places: ComparedOptions, rows: DatasetOptions) -> str:
    """Return the command with every setting, defaults too, and of local places the last part of their name only."""
    from ambient_sd.sampling import label

    words = ["ambient-sd", "compare", *(f"{name}={label(place)}" for name, place in settings.models.items())]
    values: dict[str, Any] = {}
    for owner in (places, rows, settings):
        values |= {
            name: getattr(owner, name) for name in owner.__dataclass_fields__ if name not in ("models", "overwrite")
        }
    for name in ("data", "heldout", "judge"):
        values[name] = label(values[name])
    for flag in ("lora_weights", "revision"):
        values[flag] = [f"{name}={label(value)}" for name, value in getattr(settings, flag).items()]
    if settings.single_file_config is not None:
        values["single_file_config"] = label(settings.single_file_config)
    values["output_dir"] = settings.output_dir.resolve().name  # no hub id, even where it looks like one
    for name, value in values.items():
        if isinstance(value, bool):  # a flag alone
            words += [f"--{name}"] if value else []
        elif value is not None and value != []:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
