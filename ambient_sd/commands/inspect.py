"""What is wrong with an image set: a table for the terminal, an HTML page to look at, JSON for machines.

Training refuses a set at its first unusable row; this lists all of them, and what training would take but its user may
regret: images smaller than the resolution (they are enlarged), captions that are empty, images of which a square
crop keeps less than half, exact copies and near-duplicates (`ambient_sd.data.duplicates`).

The page loads nothing and has no script; file names and captions come from strangers and are escaped.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ambient_sd.commands.shared import SharedOptions
from ambient_sd.data.captions import Cut, find_cut, surely_cut
from ambient_sd.data.conditions import split_condition
from ambient_sd.data.dataset_options import DatasetOptions
from ambient_sd.data.enlargement import WARNED, median_enlargement
from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.files import check_target
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option, same

if TYPE_CHECKING:
    from PIL import Image

    from ambient_sd.data.duplicates import Group
    from ambient_sd.data.sources import Fault, ImageDataset

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
_PAGE_GROUPS, _PAGE_PICTURES, _PAGE_SIDE = 300, 12, 128  # what a page shows at most; JSON has all


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
    image_column: str = "image",
    caption_column: str = "text",
    split: str | None = None,
    row_filter: Sequence[tuple[str, str, str]] = (),
    unlisted: str = "refuse",
    tokenizers: Sequence[Any] = (),
    progress: bool = False,
) -> tuple[Inspection, ImageDataset]:
    """Read every row of an image set and return what is wrong, with the readable rows' images.

    Args:
        source, image_column, caption_column, split, row_filter, unlisted: as `load_rows` takes them; unlisted files are faults here.
        resolution: of the training, pixels.
        tokenizers: of the base model, to count what its text encoders do not read of a caption; without them captions
            count as cut where every CLIP cuts them.
        progress: show a bar.

    Raises:
        UserError: the source cannot be opened at all.
    """
    from tqdm.auto import tqdm

    from ambient_sd.data.duplicates import Thumbnails, find_groups
    from ambient_sd.data.sources import FRAMES, Fault, content_key, load_rows

    faults: list[Fault] = []
    images = load_rows(
        source, image_column, caption_column, split, row_filter=row_filter, unlisted=unlisted, faults=faults
    )
    cuts: dict[int, Cut] = {}  # of several captions of a row, the first is the one that is looked at
    for cut in find_cut(images.captions, tokenizers) if tokenizers else surely_cut(images.captions):
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
            faults.append(Fault(name, "broken", str(error)))
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
        images.unlisted if unlisted == "ignore" else 0, bool(tokenizers),
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
    lines.append("")
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


def as_html(found: Inspection, images: ImageDataset) -> str:
    """Return the page: counts, duplicate groups as images, all faults."""
    text = lambda value, limit=200: html.escape(one_line(value, limit))  # noqa: E731
    rows = [(found.count(k), k, KINDS[k]) for k in KINDS]
    rows += [(found.exact, "exact", "copies of an earlier image"), (found.near, "near", "groups of near-duplicates")]
    counts = "".join(f"<tr><td>{n}</td><th>{k}</th><td>{text(m)}</td></tr>" for n, k, m in rows)
    groups = []
    for group in found.groups[:_PAGE_GROUPS]:
        cells = []
        for i, mirrored in list(zip(group.rows, group.mirrored, strict=True))[:_PAGE_PICTURES]:
            width, height = found.sizes[i]
            note = ", mirrored" if mirrored else ""
            cells.append(
                f'<figure><img src="{_uri(images[i].image)}" alt=""><figcaption><b>{text(found.names[i], 60)}</b><br>'
                f"{width} x {height}{note}<br>{text(found.captions[i], 120)}</figcaption></figure>"
            )
        exact = len({found.keys[i] for i in group.rows}) == 1
        more = len(group.rows) - _PAGE_PICTURES
        groups.append(
            f"<section><h3>{len(group.rows)} {'exact copies' if exact else 'near-duplicates'}</h3><div>{''.join(cells)}"
            f"{f'<p>and {more} more</p>' if more > 0 else ''}</div></section>"
        )
    left = len(found.groups) - _PAGE_GROUPS
    if left > 0:
        groups.append(f"<p>and {left} more groups: --json lists them</p>")
    faults = "".join(
        f"<tr><th>{f.kind}</th><td>{text(f.name, 120)}</td><td>{text(f.text)}</td></tr>" for f in found.faults
    )
    return _PAGE.format(
        title=text(Path(found.source).name or found.source),
        count=len(found.names),
        resolution=found.resolution,
        counts=counts,
        groups="".join(groups) or "<p>none</p>",
        faults=f"<table>{faults}</table>" if faults else "<p>none</p>",
    )


def _uri(image: Image.Image) -> str:
    small, data = image.copy(), io.BytesIO()
    small.thumbnail((_PAGE_SIDE, _PAGE_SIDE))
    small.save(data, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Images of {title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>
body{{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}} td,th{{padding:.25rem .8rem .25rem 0;text-align:left;vertical-align:top}}
td{{overflow-wrap:anywhere;min-width:7rem}} td:first-child{{min-width:0}} td:first-child{{text-align:right;font-variant-numeric:tabular-nums}}
section{{border-top:1px solid #8884;padding:.4rem 0}} section>div{{display:flex;flex-wrap:wrap;gap:.8rem}}
h3{{margin:.2rem 0 .5rem;font-size:1rem}}
figure{{margin:0;width:8rem}} figcaption{{font-size:12px;overflow-wrap:anywhere}} img{{max-width:8rem;display:block;background:#8882}}
</style>
<h1>Images of {title}</h1>
<p>{count} readable images, compared with a training resolution of {resolution} px.</p>
<table>{counts}</table>
<h2>Duplicates</h2>
<p>Images of a group share one noise in ambient training; a mirror image gets it mirrored. Copies that are cropped or shifted
are only partly protected: remove them.</p>
{groups}
<h2>Rows with faults</h2>
{faults}
</html>
"""


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
    found, images = inspect(
        settings.data, resolution=settings.resolution, unlisted=settings.unlisted, tokenizers=_tokenizers(settings.model),
        image_column=settings.image_column, caption_column=settings.caption_column, split=settings.dataset_split,
        row_filter=[split_condition(term) for term in settings.row_filter or ()], progress=True,
    )  # fmt: skip
    print(as_text(found), flush=True)
    # Surrogates (undecodable file names) would stop the write half way.
    if settings.html is not None:
        settings.html.write_bytes(as_html(found, images).encode("utf-8", "replace"))
    if settings.json is not None:
        settings.json.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    return int(settings.fail_on == "problems" and not found.clean)


def _tokenizers(model: str | None) -> list[object]:
    if model is None:
        return []
    from ambient_sd.utils.quiet import quiet

    quiet()
    from ambient_sd.families.base import check_base

    base = check_base(TrainConfig(pretrained_model_name_or_path=model, train_data_dir="."))
    return base.tokenizers()
