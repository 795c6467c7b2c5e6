"""What is wrong with an image set: a table for the terminal, an HTML page to look at, JSON for machines.

Training refuses a set at its first unusable row; this lists all of them, and what training would take but its user may
regret: images smaller than the resolution (they are enlarged), captions that are empty, images of which a square
crop keeps less than half, exact copies and near-duplicates (`ambient_sd.data.duplicates`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ambient_sd.commands.shared import SharedOptions
from ambient_sd.data.captions import Cut, find_cut, surely_cut
from ambient_sd.data.dataset_options import DatasetOptions, reading
from ambient_sd.data.enlargement import WARNED, median_enlargement
from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.files import check_target
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option, same

if TYPE_CHECKING:
    from ambient_sd.data.duplicates import Group
    from ambient_sd.data.layouts.layout import Fault
    from ambient_sd.data.sources import ImageDataset

KINDS = {
    "broken": "unusable: training refuses the set",
    "unlisted": "in the folder but not read: training and audit refuse the set",
    "captionless": "without a caption",
    "cut": "caption longer than the text encoder reads: its end is lost",
    "small": "smaller than the resolution: enlarged",
    "extreme": "longer than twice their width or height: a crop keeps less than half",
    "animated": "of several frames: the first one is the image",
}
_EXTREME = 2.0
_SHOWN = 8  # rows of a kind in the terminal


@dataclass(frozen=True)
class Inspection:
    """Hold what was found.

    Attributes:
        source: where the rows come from.
        resolution: the training resolution that sizes were compared with.
        names, captions, keys, sizes: of the readable images.
        faults: of single rows, in the order of `KINDS`.
        groups: duplicates, exact and near; their rows index `names`.
        unlisted: files that were left out because the caller wanted it so.
        notes: of how the source was read.
        tokenizers: whether captions were counted by a model's tokenizers; without, only what is cut by any is told.
    """

    source: str
    resolution: int
    names: Sequence[str]
    captions: Sequence[str]
    keys: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    faults: Sequence[Fault]
    groups: Sequence[Group]
    unlisted: int = 0
    tokenizers: bool = False
    notes: Sequence[str] = ()

    @property
    def enlargement(self) -> float | None:
        """Return how far the images are enlarged in the median, if there are any."""
        square = (self.resolution, self.resolution)
        return median_enlargement(self.sizes, [square] * len(self.sizes)) if self.sizes else None

    @property
    def exact(self) -> int:
        """Return how many images are exact copies of an earlier one."""
        return len(self.keys) - len(set(self.keys))

    @property
    def near(self) -> int:
        """Return how many groups hold images that differ."""
        return sum(len({self.keys[i] for i in g.rows}) > 1 for g in self.groups)

    def count(self, kind: str) -> int:
        """Return how many rows have a fault of this kind."""
        return sum(f.kind == kind for f in self.faults)

    @property
    def clean(self) -> bool:
        """Tell whether nothing was found."""
        return not self.faults and not self.groups


def inspect(
    source: str | Path,
    *,
    resolution: int = 512,
    tokenizers: Sequence[Any] = (),
    limits: Sequence[int] | None = None,
    progress: bool = False,
    **options: Any,
) -> tuple[Inspection, ImageDataset]:
    """Read every row of an image set and return what is wrong, with the readable rows' images.

    Args:
        source: as `load_rows` takes it.
        resolution: of the training, pixels.
        tokenizers: of the base model, to count what its text encoders do not read of a caption; without them captions
            count as cut where every CLIP cuts them.
        limits: how many tokens of a caption each of them reads; None: as many as it takes.
        progress: show a bar.
        options: of `load_rows`, which columns and rows are read; unlisted and broken files are faults here.

    Raises:
        UserError: the source cannot be opened at all.
    """
    from tqdm.auto import tqdm

    from ambient_sd.data.duplicates import Thumbnails, find_groups
    from ambient_sd.data.images import FRAMES, content_key
    from ambient_sd.data.layouts.layout import Fault
    from ambient_sd.data.sources import load_rows

    faults: list[Fault] = []
    images = load_rows(source, **options, faults=faults)
    cuts: dict[int, Cut] = {}  # of several captions of a row, the first is the one that is looked at
    for cut in find_cut(images.captions, tokenizers, limits) if tokenizers else surely_cut(images.captions):
        cuts[cut.index] = cut
    readable: list[int] = []
    keys: list[str] = []
    sizes: list[tuple[int, int]] = []
    thumbnails, told = Thumbnails(), {f.name for f in faults if f.kind == "captionless"}
    for i in tqdm(range(len(images)), desc="inspecting images", disable=not progress, leave=False):
        name = images.names[i]
        if not images.captions[i].strip() and name not in told:
            faults.append(Fault(name, "captionless", "the caption is empty"))
        if i in cuts:
            least = "" if tokenizers else "at least "
            text = f"{least}{cuts[i].tokens} tokens, {cuts[i].limit} are read; lost: {one_line(cuts[i].lost, 200)}"
            faults.append(Fault(name, "cut", text))
        try:
            image = images[i].image
        except UserError as error:
            what, _, why = str(error).partition("; ")
            faults.append(Fault(name, "broken", why or what))  # what names the row again
            continue
        short, long = sorted(image.size)
        size = f"{image.width} x {image.height}"
        if short < resolution:
            faults.append(Fault(name, "small", f"{size}, enlarged {resolution / short:.2g} times"))
        if long > _EXTREME * short:
            faults.append(Fault(name, "extreme", f"{size}, a square crop keeps {short / long:.0%}"))
        if image.info.get(FRAMES):
            faults.append(Fault(name, "animated", "its other frames are not read"))
        readable.append(i)
        keys.append(content_key(image))
        sizes.append(image.size)
        thumbnails.add(image)
    kinds = list(KINDS)
    faults.sort(key=lambda f: kinds.index(f.kind))  # stable: rows of a kind stay in their order
    kept = images.subset(readable)
    found = Inspection(
        str(source), resolution, kept.names, kept.captions, keys, sizes, faults, find_groups(keys, thumbnails),
        images.unlisted if options.get("unlisted") == "ignore" else 0, bool(tokenizers), images.notes,
    )  # fmt: skip
    return found, kept


def as_text(found: Inspection) -> str:
    """Return the table for the terminal."""
    lines = [f"{found.source}: {len(found.names)} readable images, resolution {found.resolution}"]
    if found.sizes:
        short = sorted(min(s) for s in found.sizes)
        lines.append(f"shorter sides: {short[0]} to {short[-1]} px, median {short[len(short) // 2]}")
    if found.enlargement is not None and found.enlargement >= WARNED:
        lines.append(
            f"half of the images are enlarged {found.enlargement:.3g} times or more: is --resolution {found.resolution} meant?"
        )
    if found.unlisted:
        lines.append(f"{found.unlisted} files are left out (--unlisted ignore)")
    lines += [*found.notes, ""]
    for kind, meaning in KINDS.items():
        lines.append(f"{found.count(kind):8d}  {kind:<12}{meaning}")
    lines.append(f"{found.exact:8d}  {'exact':<12}copies of an earlier image: one noise in any case")
    lines.append(
        f"{found.near:8d}  {'near':<12}groups of near-duplicates: they share one noise unless --near_duplicates off"
    )
    for kind in KINDS:
        faults = [f for f in found.faults if f.kind == kind]
        if faults:
            lines += ["", f"{kind}:"]
            lines += [f"  {one_line(f.name, 80)}: {one_line(f.text, 160)}" for f in faults[:_SHOWN]]
            lines += _rest(len(faults))
    if found.groups:
        lines += ["", "duplicates:"]
        for group in found.groups[:_SHOWN]:
            exact = len({found.keys[i] for i in group.rows}) == 1
            names = ", ".join(one_line(found.names[i], 60) for i in group.rows[:_SHOWN])
            more = f" and {len(group.rows) - _SHOWN} more" if len(group.rows) > _SHOWN else ""
            lines.append(f"  {'exact' if exact else 'near'}: {names}{more}")
        lines += _rest(len(found.groups))
    return "\n".join(lines)


def _rest(count: int) -> list[str]:
    return [f"  and {count - _SHOWN} more (--html or --json lists them)"] if count > _SHOWN else []


def as_json(found: Inspection) -> dict[str, Any]:
    """Return everything that was found, for machines."""
    return {
        "version": 1,
        "source": found.source,
        "resolution": found.resolution,
        "readable": len(found.names),
        "unlisted": found.unlisted,
        "notes": list(found.notes),
        "enlargement": found.enlargement,
        "captions_counted_by": "the model's tokenizers" if found.tokenizers else "a lower bound",
        "counts": {**{k: found.count(k) for k in KINDS}, "exact_copies": found.exact, "near_groups": found.near},
        "faults": [asdict(f) for f in found.faults],
        "groups": [
            {
                "key": g.key,
                "images": [
                    {"name": found.names[i], "key": found.keys[i], "size": list(found.sizes[i]), "mirrored": m}
                    for i, m in zip(g.rows, g.mirrored, strict=True)
                ],
            }
            for g in found.groups
        ],
    }


@dataclass(frozen=True)
class InspectSettings:
    """Say which images are inspected, for which training, and where the result goes.

    Raises:
        UserError: a value breaks its rule, or a file cannot be written.

    Example:
        >>> InspectSettings("my-images").fail_on
        'nothing'
    """

    data: str = option(
        REQUIRED,
        "folder with metadata.jsonl, parquet file, tar shards, or hub dataset",
        positional=True,
        metavar="DATA",
    )
    resolution: int = same(TrainConfig, "resolution", low=1)
    model: str | None = option(
        None, "base model: pipeline folder or hub id; its tokenizers count which captions are cut", metavar="MODEL"
    )
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
    fail_on: Literal["nothing", "problems"] = option("nothing", "problems: exit with status 1 if anything is found")

    def __post_init__(self) -> None:
        check(self)
        check_target(self.html, "html")
        check_target(self.json, "json")


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd inspect",
        description="Read every image of DATA and list unusable, small, captionless and extreme ones, and groups of duplicates.",
    )
    add_flags(parser, InspectSettings)
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Print the table, write page and JSON where asked, and return the exit status."""
    settings = from_flags(InspectSettings, args)
    tokenizers, limits = _read_by(settings.model)
    found, images = inspect(
        settings.data, resolution=settings.resolution, tokenizers=tokenizers, limits=limits, progress=True, **reading(settings)
    )  # fmt: skip
    print(as_text(found), flush=True)
    if settings.html is not None:
        from ambient_sd.reporting import inspect_page

        counts = [(kind, found.count(kind), meaning) for kind, meaning in KINDS.items()]
        counts += [
            ("exact", found.exact, "copies of an earlier image"),
            ("near", found.near, "groups of near-duplicates"),
        ]
        inspect_page.write(settings.html, found, images, counts)
    if settings.json is not None:
        settings.json.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    return int(settings.fail_on == "problems" and not found.clean)


def _read_by(model: str | None) -> tuple[list[Any], list[int] | None]:
    if model is None:
        return [], None
    from ambient_sd.utils.quiet import quiet

    quiet()
    from ambient_sd.families.base import check_base

    return check_base(model).reading()
