"""`ambient-sd level`: look at the nature level that an image set proposes, before training and without a network.

The table of `ambient_sd.data.noise_level` in the terminal, as a page with curves, and as JSON. The images are encoded as
`--ambient_level auto` would see them: same crop, mirroring, VAE draws; of a large set only those that are measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ambient_sd.data.latents import encode_all
from ambient_sd.data.noise_level import COPY, IDENTIFIED, TARGET, Levels, as_text, marks, measure, representatives
from ambient_sd.data.views import ViewRule
from ambient_sd.families.base import check_base
from ambient_sd.reporting.charts import Line, Mark, chart, figure, table
from ambient_sd.reporting.charts import page as document
from ambient_sd.reporting.report import escaped
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import enlargement_note, open_images
from ambient_sd.utils.errors import UserError, one_line
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
        atomic_write(html_path, page(found, Path(data).name if Path(data).exists() else data))
    return found


def page(found: Levels, name: str) -> str:
    """Return the self-contained page: two charts over the noise level, and the table."""
    where = [Mark(f"{label} {at:.2g}", at, strong=label == "proposed")
             for label, at in (("copy", found.copy), ("proposed", found.proposed), ("collapse", found.collapse))
             if at is not None and found.levels[0] <= at <= found.levels[-1]]  # fmt: skip
    ratios = Line(
        "", found.levels, [q[1] for q in found.ratio_quantiles], [(q[0], q[2]) for q in found.ratio_quantiles]
    )
    weights = Line("", found.levels, found.own, [(q[0], q[2]) for q in found.own_quantiles])
    cuts = [Mark("copy 1/3", COPY, upright=False), Mark("2/3", TARGET, upright=False)]
    first, second = "What a noisy copy gives away", "Does a noisy copy tell which image it was?"
    drawn = "" if found.used == found.images else f" {found.used} of them were measured and stand for the rest."
    body = (
        f"<h1>s<sub>n</sub> = {found.proposed:g}</h1><p>Proposed for {escaped(name, 80)}: {escaped(found.reason)}.</p>"
        + figure(first, "d1/d2 of the copy, linearly denoised: median, 5 to 95 %",
                 chart(first, [ratios], x_label="noise level s", marks=[*cuts, *where], top=1.5))
        + figure(second, "posterior weight of the true image: mean, 5 to 95 %",
                 chart(second, [weights], x_label="noise level s",
                       marks=[Mark("1/2", IDENTIFIED, upright=False), *where], top=1.0))
        + table(["s", "what it is"], [["none" if at is None else f"{at:.2g}", text] for at, text in marks(found)])
        + f"<p class=note>{found.images} distinct images, {found.numbers} numbers each; nearest other image "
        f"{found.nearest[1]:.2f} per number (5 to 95 %: {found.nearest[0]:.2f} to {found.nearest[2]:.2f}).{drawn} "
        "A proposal from geometry, before training; what a trained network copies is for an audit to say.</p>"
    )  # fmt: skip
    return document(f"Nature level of {one_line(name, 80)}", body)
