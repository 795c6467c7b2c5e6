"""`ambient-sd level`: look at the noise level s_n that an image set proposes, before training and without a network.

The table of `ambient_sd.data.noise_level` in the terminal, as a page with curves, and as JSON. The images are encoded as
`--ambient_level auto` would see them: same crop, mirroring, VAE draws; of a large set only those that are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ambient_sd.commands.shared import SharedOptions
from ambient_sd.data.dataset_options import DatasetOptions
from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.files import atomic_write, check_target
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option, same

if TYPE_CHECKING:
    from ambient_sd.data.noise_level import NoiseLevels


@dataclass(frozen=True)
class LevelSettings:
    """Say which images are measured, and as which training would see them.

    Raises:
        UserError: a value breaks its rule, or a file cannot be written.

    Example:
        >>> LevelSettings("my-images", model="my-base").resolution is None
        True
    """

    data: str = option(
        REQUIRED, "folder with metadata.jsonl, parquet file, or tar shards", positional=True, metavar="DATA"
    )
    model: str = option(
        REQUIRED, "base model: pipeline folder, whole model in one .safetensors file, or hub id", metavar="MODEL"
    )
    revision: str | None = same(TrainConfig, "revision")
    variant: str | None = same(TrainConfig, "variant")
    single_file_config: str | None = same(TrainConfig, "single_file_config")
    resolution: int | None = same(
        TrainConfig,
        "resolution",
        default=None,
        text="side of the images in pixels: they are resized (shorter side) and cropped to it (default: 512, if the images have it)",
    )
    allow_upscaling: bool = same(TrainConfig, "allow_upscaling")
    center_crop: bool = same(TrainConfig, "center_crop")
    image_interpolation_mode: str = same(TrainConfig, "image_interpolation_mode")
    random_flip: bool = same(TrainConfig, "random_flip")
    image_column: str = same(DatasetOptions, "image_column")
    caption_column: str = same(DatasetOptions, "caption_column")
    dataset_split: str | None = same(DatasetOptions, "dataset_split")
    row_filter: list[str] | None = same(DatasetOptions, "row_filter")
    unlisted: str = same(DatasetOptions, "unlisted")
    layout: str = same(DatasetOptions, "layout")
    caption_extension: str | None = same(DatasetOptions, "caption_extension")
    instance_prompt: str | None = same(DatasetOptions, "instance_prompt")
    trigger_word: str | None = same(DatasetOptions, "trigger_word")
    skip_broken: bool = same(DatasetOptions, "skip_broken")
    html: Path | None = same(SharedOptions, "html")
    json: Path | None = same(SharedOptions, "json")

    def __post_init__(self) -> None:
        check(self)
        check_target(self.html, "html")
        check_target(self.json, "json")

    def training(self) -> TrainConfig:
        """Return the settings of the training that would see the images."""
        names = [*DatasetOptions.__dataclass_fields__, "revision", "variant", "single_file_config", "center_crop", "image_interpolation_mode", "random_flip",
                 "allow_upscaling"]  # fmt: skip
        shared = {name: getattr(self, name) for name in names}
        config = TrainConfig(pretrained_model_name_or_path=self.model, train_data_dir=self.data, resolution=self.resolution or 512,
                             ambient_level="auto", **shared)  # fmt: skip
        config.resolution_given = self.resolution is not None
        return config


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd level",
        description="Encode the images of DATA with the VAE of a base model and print, by noise level, how far noisy copies "
        "give their images away; propose s_n as --ambient_level auto does. docs/level.md explains the table.",
    )
    add_flags(parser, LevelSettings)
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Print the table and write page and JSON where asked."""
    settings = from_flags(LevelSettings, args)
    config = settings.training()
    from ambient_sd.utils.quiet import quiet

    quiet()  # before the imports below, which load what speaks
    from ambient_sd.data.noise_level import as_text

    found = level(config, progress=True)
    print(as_text(found), flush=True)
    if settings.json is not None:
        values = {"version": 1, "resolution": config.resolution, **found.as_dict()}
        atomic_write(settings.json, json.dumps(values, indent=1) + "\n")
    if settings.html is not None:
        from ambient_sd.reporting import level_page

        name = Path(settings.data).name if Path(settings.data).exists() else settings.data
        level_page.write(settings.html, found, name, resolution=config.resolution)


def level(config: TrainConfig, *, progress: bool = False) -> NoiseLevels:
    """Measure the images of a run's settings.

    Args:
        config: of a training; images, base, resolution, views and noise seed are used.
        progress: show bars.

    Raises:
        UserError: base or images are unusable, or too few.
    """
    from ambient_sd.data.latents import encode_all
    from ambient_sd.data.noise_level import measure, representatives
    from ambient_sd.data.views import ViewRule
    from ambient_sd.sampling import own_device
    from ambient_sd.training.plan import base_of, enlargement_note, open_images

    base = base_of(config)
    images = open_images(config).check(progress, near_duplicates=True)
    if (note := enlargement_note(config, images, base.pixel_step)) is not None:
        print(f"ambient-sd: {note}", file=sys.stderr, flush=True)
    for note in images.notes:
        print(f"ambient-sd: {note}", file=sys.stderr, flush=True)
    if images.unlisted:
        print(f"ambient-sd: {images.unlisted} files in {images.source} are left out", file=sys.stderr, flush=True)
    rule = ViewRule(config.resolution, config.center_crop, config.random_flip, True, config.noise_seed,
                    interpolation=config.image_interpolation_mode)  # fmt: skip
    rows, total = representatives(images)
    x0 = encode_all(base.images().to(own_device()), images, rule, rows, progress=progress)
    return measure(x0, total=total, max_level=base.schedule.max_level)
