"""`ambient-sd level`: look at the nature level that an image set proposes, before training and without a network.

The table of `ambient_sd.data.noise_level` in the terminal, as a page with curves, and as JSON. The images are encoded as
`--ambient_level auto` would see them: same crop, mirroring, VAE draws; of a large set only those that are measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ambient_sd.data.latents import encode_all
from ambient_sd.data.noise_level import Levels, as_text, measure, representatives
from ambient_sd.data.views import ViewRule
from ambient_sd.families.base import check_base
from ambient_sd.reporting import level_page
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import enlargement_note, open_images
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.files import atomic_write


def level(config: TrainConfig, *, progress: bool = False) -> Levels:
    """Measure the images of a run's settings.

    Args:
        config: of a training; images, base, resolution, views and noise seed are used.
        progress: show bars.

    Raises:
        UserError: base or images are unusable, or too few.
    """
    base = check_base(config)
    images = open_images(config).check(progress, near_duplicates=True)
    if (note := enlargement_note(config, images, base.pixel_step)) is not None:
        print(f"ambient-sd: {note}", file=sys.stderr, flush=True)
    if images.unlisted:
        print(f"ambient-sd: {images.unlisted} files in {images.source} are left out", file=sys.stderr, flush=True)
    rule = ViewRule(config.resolution, config.center_crop, config.random_flip, True, config.noise_seed)
    rows, total = representatives(images)
    x0 = encode_all(base.images(), images, rule, rows, progress=progress)
    return measure(x0, total=total, max_level=base.schedule.max_level)


def run(
    data: str,
    model: str,
    *,
    resolution: int | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    split: str | None = None,
    row_filter: list[str] | None = None,
    center_crop: bool = False,
    random_flip: bool = False,
    unlisted: str = "refuse",
    allow_upscaling: bool = False,
    html_path: Path | None = None,
    json_path: Path | None = None,
) -> Levels:
    """Print the table and write what is asked for; a resolution that is not given is 512, if the images have it."""
    for path in (html_path, json_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written", rule="its folder does not exist", remedy="create it first")
    config = TrainConfig(
        pretrained_model_name_or_path=model, train_data_dir=data, resolution=resolution or 512, image_column=image_column,
        caption_column=caption_column, dataset_split=split, row_filter=row_filter, center_crop=center_crop,
        random_flip=random_flip, unlisted=unlisted, allow_upscaling=allow_upscaling, ambient_level="auto",
    )  # fmt: skip
    config.resolution_given = resolution is not None
    found = level(config, progress=True)
    print(as_text(found), flush=True)
    if json_path is not None:
        atomic_write(
            json_path, json.dumps({"version": 1, "resolution": config.resolution, **found.as_dict()}, indent=1) + "\n"
        )
    if html_path is not None:
        name = Path(data).name if Path(data).exists() else data
        level_page.write(html_path, found, name, resolution=config.resolution)
    return found
