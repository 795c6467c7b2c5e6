"""One self-contained HTML page: what was found, the figures with their intervals, the images beside their originals.

The sentence at the top is computed from the figures and their intervals; nothing about the outcome is written down
beforehand. The page loads nothing: images are data URIs, styles are inline, there is no script, and a content
security policy says so. Every text is escaped: prompts come from strangers. The same report gives the same bytes.

Images in the galleries are evidence to look at, not the measurement: "most copied first" shows the extremes, "same
prompt" the first sample of each prompt, chosen by position alone.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ambient_sd.audit.decision import Decided
from ambient_sd.audit.features import as_rgb
from ambient_sd.audit.metrics import MEMORIZED_RATIO, Row, difference, memorized
from ambient_sd.audit.neighbours import Neighbours
from ambient_sd.audit.record import is_share
from ambient_sd.audit.shares import COPIES, RETURNED
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write

_LOSSLESS = 96  # images up to this side go in as they are; larger ones as WebP thumbnails
_THUMBNAIL = 192


# --- what a report holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Hold one generated image beside its nearest training image.

    Attributes:
        ratio: d1 / d2. distance: d1, in the units of the run's features. score: the guard's, None without a guard.
        similarity: to the nearest training image where that decides, None where d1 / d2 does.
        order: sorts samples, lowest first; None: `ratio` or `similarity` does. facts: what is said below instead of d1 and d2.
    """

    image: Image.Image
    prompt: str
    nearest_image: Image.Image
    ratio: float
    distance: float
    memorized: bool
    score: float | None = None
    nearest_prompt: str = ""
    similarity: float | None = None
    order: float | None = None
    facts: tuple[str, ...] = ()

    @property
    def rank(self) -> float:
        """Return what sorts samples, the most copied first."""
        if self.order is not None:
            return self.order
        return self.ratio if self.similarity is None else -self.similarity


@dataclass(frozen=True)
class RunSection:
    """Hold one run: its name, what it was trained with, its rows of figures, and its samples in their own order."""

    name: str
    objective: str
    figures: Sequence[Row]
    samples: Sequence[Sample]
    settings: Mapping[str, object] = field(default_factory=dict)
    features: str = ""  # the features behind the samples' d1 and d2
    counted: tuple[int, int] | None = None  # copies and images of the run, where `samples` are only those to show

    def row(self, name: str) -> Row:
        """Return the row called `name`."""
        for row in self.figures:
            if row.name == name:
                return row
        raise UserError(
            f"report: run {self.name!r} has no measure {name!r}", rule=f"measured: {[r.name for r in self.figures]}"
        )


@dataclass(frozen=True)
class Histogram:
    """Hold values of several sets of images on one axis, with the line beyond which an image counts as a copy.

    Attributes:
        rows: (name, tone, values); tone is a class of the page's colours: "run0", "held", "train".
        low, high: ends of the axis; values beyond them are drawn at the ends.
        cut: where the line stands. below: copies lie below it, else above.
    """

    title: str
    note: str
    rows: Sequence[tuple[str, str, Sequence[float]]]
    cut: float
    cut_label: str
    low: float = 0.0
    high: float = 1.0
    below: bool = True

    def copies(self, values: Sequence[float]) -> int:
        """Count the values on the copies' side of the line."""
        return sum(v < self.cut if self.below else v > self.cut for v in values)


@dataclass(frozen=True)
class TokenAttribution:
    """Hold how strongly each token of a prompt pulls on the guard's score; `note` says what the prompt did."""

    prompt: str
    tokens: Sequence[str]
    scores: Sequence[float]
    padding: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Hold everything on the page.

    Attributes:
        runs: the first is the baseline; the sentence compares the second with it, the table all.
        copies, quality: names of the rows that decide the sentence at the top (for both, less is better).
        heldout_ratios: d1 / d2 of held-out real images, for the histogram.
        histograms: these instead of the one of d1 / d2.
        tokens: prompts and the pull of their tokens.
        made: how the page came to be: versions, fingerprints of model and data, seconds.
        notes: what a reader must know, one sentence each.
        groups: what comes back of each group of training images (`shares.by_group`).
    """

    title: str
    command: str
    runs: Sequence[RunSection]
    training_n: int
    copies: str
    quality: str
    heldout_ratios: Sequence[float] = ()
    made: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    shown: int = 24
    histograms: Sequence[Histogram] = ()
    tokens: Sequence[TokenAttribution] = ()
    groups: Sequence[Mapping[str, Any]] = ()


def make_samples(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    training_images: Sequence[Image.Image],
    neighbours: Neighbours,
    *,
    scores: Sequence[float | None] | None = None,
    training_prompts: Sequence[str] | None = None,
    threshold: float | None = None,
    decided: Decided | None = None,
) -> list[Sample]:
    """Put generated images beside their nearest training images, or beside those that explain them best.

    Args:
        neighbours: of `images` in `training_images`, k >= 2.
        scores: the guard's score per image.
        threshold: an image more similar than this is a copy (cosine neighbours); None: d1 / d2 decides.
        decided: says what is a copy, and of which training image; d1 / d2 stands beside it.
    """
    if not len(images) == len(prompts) == len(neighbours.index) == len(scores if scores is not None else images):
        raise UserError(
            f"report: {len(images)} images, {len(prompts)} prompts, {len(neighbours.index)} neighbours",
            rule="one each per sample",
        )
    ratio, index = neighbours.ratio.tolist(), neighbours.index[:, 0].tolist()
    similar = None if threshold is None else neighbours.similarity.tolist()
    copied = memorized(neighbours).tolist() if similar is None else [s > threshold for s in similar]
    made = [
        Sample(
            image=images[i],
            prompt=prompts[i],
            nearest_image=training_images[index[i]],
            ratio=ratio[i],
            distance=float(neighbours.distance[i, 0]),
            memorized=copied[i],
            score=scores[i] if scores is not None else None,
            nearest_prompt=training_prompts[index[i]] if training_prompts is not None else "",
            similarity=None if similar is None else similar[i],
        )
        for i in range(len(images))
    ]
    if decided is None:
        return made
    order = decided.p + 1e-6 * decided.ratio.clamp(max=1e3) - 2 * decided.copy.double()
    return [
        replace(
            sample,
            nearest_image=training_images[int(decided.row[i])],
            nearest_prompt=training_prompts[int(decided.row[i])] if training_prompts is not None else "",
            ratio=float(decided.ratio[i]),
            distance=float(decided.residual[i]),
            memorized=bool(decided.copy[i]),
            similarity=None,
            order=float(order[i]),
            facts=(_p(float(decided.p[i])), f"residual {float(decided.residual[i]):.2f}", f"d1/d2 {ratio[i]:.2f}"),
        )
        for i, sample in enumerate(made)
    ]


def _p(value: float) -> str:
    return f"p {value:.2g}" if value >= 1e-4 else "p < 0.0001"


# --- the sentence ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Hold the outcome in one word, the sentence for people, and the differences that it rests on.

    `kind` is one of "better" (fewer copies, quality not measurably worse), "trade" (fewer copies, worse quality),
    "unclear" (no clear difference in copies), "worse" (more copies); for a single run "copies", "copies-otherwise"
    (by another measure than the deciding one), "no-copies", or "no-background"
    where no unseen images tell what chance alone would give.
    """

    kind: str
    sentence: str
    detail: str


def find(report: Report) -> Finding:
    """Say what the figures say: compare the second run with the first by the 95 % intervals of the differences."""
    if not report.runs:
        raise UserError("report without runs", rule="needs at least one")
    base = report.runs[0]
    copies_base = base.row(report.copies)
    if len(report.runs) == 1:
        return _find_alone(base, copies_base, report.quality)
    other = report.runs[1]
    copies = other.row(report.copies)
    fewer = difference(copies.generated, copies_base.generated)
    share = f"{show(copies.generated)} of {copies.generated.n} samples against {show(copies_base.generated)}"
    this, that = f"the {other.name} run", f"the {base.name} run"
    good = [run.row(report.quality).generated for run in (other, base)]
    frechet = f"({_label(report.quality).split(',')[0]} {show(good[0])} against {show(good[1])})"
    worse = difference(good[0], good[1])

    if fewer.high < 0:
        kind = "trade" if worse.low > 0 else "better"
        sentence = f"{this} copies fewer training images than {that}: {share}"
        if kind == "trade":
            sentence += f", but its images are worse {frechet}."
        elif worse.high < 0:
            sentence += f", and its images are better {frechet}."
        else:
            sentence += f", at no measurably worse quality {frechet}."
    else:
        if fewer.low > 0:
            kind, sentence = "worse", f"{this} copies more training images than {that}: {share}."
        else:
            kind, sentence = "unclear", f"no clear difference in copying between {this} and {that}: {share}."
        verdict = "worse" if worse.low > 0 else "better" if worse.high < 0 else "not measurably different"
        sentence += f" Its images are {verdict} {frechet}."
    detail = (
        f"Difference in copies {show(fewer, signed=True)} (95 % interval {_span(fewer)}), in {_label(report.quality)} "
        f"{show(worse, signed=True)} ({_span(worse)})."
    )
    if copies.heldout is not None and copies.excess is not None:
        rest = "still more often than" if copies.excess.low > 0 else "not measurably more often than"
        detail += (
            f" {this[0].upper()}{this[1:]} hits a training image {rest} real images that it never saw do "
            f"({show(copies.heldout)})."
        )
    return Finding(kind, sentence[0].upper() + sentence[1:], detail)


def _find_alone(run: RunSection, copies: Row, quality: str) -> Finding:
    deciding = "" if copies.name == COPIES else f" (by {copies.name.removeprefix('memorized-')})"
    share = f"{show(copies.generated)} of {copies.generated.n} images are copies{deciding}"
    name = run.name[:1].upper() + run.name[1:]
    if copies.heldout is None or copies.excess is None:
        others = [
            row
            for row in run.figures
            if row.name.startswith("memorized-") and row.generated.value > copies.generated.value
        ]
        most = max(others, key=lambda row: row.generated.value, default=None)
        by = "" if most is None else f"; by {most.name.removeprefix('memorized-')} {show(most.generated)}"
        back = _back(run)
        return Finding(
            "no-background",
            f"{name}: {share}{by}; how often unseen real images would be called copies is not known.",
            f"{back}95 % interval {_span(copies.generated)}. No unseen real images were given, so there is nothing to subtract: "
            "training images that resemble each other make chance hits. Give images of the same kind that the model "
            "never saw with --heldout.",
        )
    more = [
        (row.excess.value, row, row.heldout)
        for row in run.figures
        if row.name.startswith("memorized-")
        and row.excess
        and row.heldout
        and row.excess.low > max(0.0, copies.excess.value)
    ]
    kind = "copies" if copies.excess.low > 0 else "copies-otherwise" if more else "no-copies"
    verb = "copies training images" if kind == "copies" else "shows no copying beyond chance"
    sentence = f"{name} {verb}: {share}, against {show(copies.heldout)} of unseen real images."
    detail = f"{_back(run)}Excess {show(copies.excess, signed=True)} (95 % interval {_span(copies.excess)})."
    if more:
        _, most, held = max(more, key=lambda found: found[0])
        by = most.name.removeprefix("memorized-")
        if kind == "copies":
            detail += f" By {by} there are more: {show(most.generated)}, against {show(held)}. Look at those too."
        else:
            sentence = (
                f"{name} copies training images, by {by} alone: {show(most.generated)} of {most.generated.n} images, against {show(held)} of "
                f"unseen real ones; the calibrated decision finds {show(copies.generated)}."
            )
            detail = f"By the calibrated decision: excess {show(copies.excess, signed=True)} (95 % interval {_span(copies.excess)})."
    if any(row.name == quality for row in run.figures):
        row = run.row(quality)
        assert row.heldout is not None and row.excess is not None
        worse = "its images are far from real ones" if row.excess.low > 0 else "its images are about as near to real ones as these to each other"  # fmt: skip
        detail += f" Quality: {worse} ({_label(quality)} {show(row.generated)}, real against real {show(row.heldout)})."
        if kind == "no-copies" and row.excess.low > 0:
            detail += " Broken images copy nothing: look at them before trusting a share of copies that is low."
    return Finding(kind, sentence, detail)


def _back(run: RunSection) -> str:
    row = next((row for row in run.figures if row.name == RETURNED), None)
    return (
        ""
        if row is None
        else f"{show(row.generated)} of {row.generated.n} training images come back ({_span(row.generated)}). "
    )


def _unit(name: str) -> tuple[float, str]:
    """Return the factor and the sign of a measure's unit; a difference of two shares is in percentage points."""
    if is_share(name):
        return 100, " points" if name.endswith(": difference") else " %"
    return (1000, " × 10⁻³") if name.startswith("KID") else (1, "")


def _number(value: float, name: str, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    value *= _unit(name)[0]
    sign = "+" if signed else ""
    text = f"{value:{sign}.1f}" if is_share(name) or 100 > abs(value) >= 10 else f"{value:{sign}.2f}"
    if not is_share(name) and abs(value) >= 100:
        text = f"{value:{sign}.0f}"
    return text.replace("-", "−")


def show(figure: Estimate, signed: bool = False) -> str:
    """Write a figure's value: shares in per cent, KID in thousandths, others with three digits."""
    return _number(figure.value, figure.name, signed) + _unit(figure.name)[1]


def _span(figure: Estimate) -> str:
    return f"{_number(figure.low, figure.name)} to {_number(figure.high, figure.name)}"


_NAMES = {COPIES: "Copies among the generated images", RETURNED: "Training images that come back"}


def _label(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("memorized-"):
        return f"Copied images, {name.removeprefix('memorized-')}"
    if name.startswith("FD-"):
        return f"Fréchet distance, {name.removeprefix('FD-')}"
    return name


# --- the page --------------------------------------------------------------------------------------------------------


def escaped(value: object, limit: int = 400) -> str:
    """Escape for HTML text and quoted attributes; control and direction characters are gone, length is bounded."""
    return html.escape(one_line(value, limit), quote=True)


def _uri(image: Image.Image) -> str:
    image = as_rgb(image)
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        image.save(buffer, "WEBP", quality=90, method=4)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _img(image: Image.Image, alt: str) -> str:
    return f'<img src="{_uri(image)}" alt="{escaped(alt, 160)}" loading="lazy" width="96" height="96">'


def _figure_cell(figure: Estimate | None, title: str, tone: str = "") -> str:
    if figure is None:
        return f'<td data-head="{escaped(title)}" class="none">–</td>'
    return (
        f'<td data-head="{escaped(title)}"{tone}><b>{escaped(show(figure))}</b>'
        f"<small>{escaped(_span(figure))}<br>n = {figure.n}</small></td>"
    )


def _table(report: Report) -> str:
    base = report.runs[0]
    heads = [run.name for run in report.runs]
    compared = [f"{run.name} − {base.name}" for run in report.runs[1:]]
    if alone := len(report.runs) == 1 and any(row.excess is not None for row in base.figures):
        compared = ["above held-out"]
    heads += [*compared, "held-out", "training, itself left out"]
    body = []
    for row in base.figures:
        cells = []
        for i, run in enumerate(report.runs):
            cells.append(_figure_cell(run.row(row.name).generated, run.name, f' class="run{i}"'))
        gaps = (
            [row.excess] if alone else [difference(r.row(row.name).generated, row.generated) for r in report.runs[1:]]
        )
        for gap, head in zip(gaps, compared, strict=True):
            if gap is None:
                cells.append(_figure_cell(None, head))
                continue
            cells.append(
                f'<td data-head="{escaped(head)}"><b>{escaped(show(gap, signed=True))}</b>'
                f"<small>{escaped(_span(gap))}<br>{escaped(gap.detail)}</small></td>"
            )
        cells.append(_figure_cell(row.heldout, "held-out"))
        cells.append(_figure_cell(row.background, "training, itself left out"))
        detail = row.generated.detail
        key = ' class="key"' if row.name in (report.copies, report.quality) else ""
        head = f'<th scope="row">{escaped(_label(row.name))}<small>{escaped(detail)}</small></th>'
        body.append(f"<tr{key}>{head}{''.join(cells)}</tr>")
    columns = "".join(f'<th scope="col">{escaped(h)}</th>' for h in heads)
    seeds = sorted({row.generated.seed for run in report.runs for row in run.figures})
    return (
        f'<div class="scroll"><table class="figures"><thead><tr><th scope="col">measure</th>{columns}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="note">95 % intervals; whole prompts are resampled, seed {escaped(", ".join(map(str, seeds)))}. '
        "Held-out: the same measure on real images that no run has seen; for distances between sets it is the floor, "
        "one half of the held-out images against the other at equal n. Less is better in every row that does not say otherwise."
        "</p>"
    )


def _whiskers(title: str, rows: Sequence[tuple[str, str, Estimate]], note: str) -> str:
    """Draw figures as dots with their intervals on one axis that starts at 0 (or at the lowest end, if negative)."""
    measure = rows[0][2].name
    ticks = _ticks(min(0.0, *(f.low for _, _, f in rows)), max(f.high for _, _, f in rows))
    low, high = ticks[0], ticks[-1]
    left, right, step = 8, 392, 44
    x = lambda v: left + (right - left) * (v - low) / (high - low)  # noqa: E731
    height = step * len(rows) + 22
    parts = [f'<svg viewBox="0 0 400 {height}" role="img" aria-label="{escaped(title)}">']
    for v in ticks:
        anchor = "start" if v == low else "end" if v == high else "middle"
        factor, unit = _unit(measure)
        label = f"{v * factor:.6g}".replace("-", "−") + (unit if v == high else "")
        parts.append(f'<line class="grid" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="22" y2="{height - 18}"/>')
        parts.append(
            f'<text class="tick" x="{x(v):.1f}" y="{height - 4}" text-anchor="{anchor}">{escaped(label)}</text>'
        )
    for i, (name, tone, figure) in enumerate(rows):
        y = step * i + 33
        parts.append(f'<text x="{left}" y="{y - 12}">{escaped(name, 40)}</text>')
        parts.append(
            f'<text x="{right}" y="{y - 12}" text-anchor="end" class="value">{escaped(show(figure))}'
            f'<tspan class="tick" dx="6">{escaped(_span(figure))}</tspan></text>'
        )
        parts.append(f'<line class="{tone} bar" x1="{x(figure.low):.1f}" x2="{x(figure.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="{tone} dot" cx="{x(figure.value):.1f}" cy="{y}" r="6"/>')
    parts.append("</svg>")
    caption = f"<figcaption>{escaped(title)}<small>{escaped(note)}</small></figcaption>"
    return f'<figure class="card">{caption}{"".join(parts)}</figure>'


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers that cover [low, high], four to seven of them."""
    span = max(high - low, 1e-9)
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * size for m in (1, 2, 5, 10) if span / (m * size) <= 5)
    first = math.floor(low / step + 1e-9)
    return [k * step for k in range(first, max(math.ceil(high / step - 1e-9), first + 1) + 1)]


def _histogram(of: Histogram, name: str, tone: str, values: Sequence[float], top: float, bins: int) -> str:
    counts = _bin(of, values, bins)
    width = 380 / bins
    cut = 10 + 380 * (of.cut - of.low) / (of.high - of.low)
    inside = of.copies(values)
    parts = [f'<svg viewBox="0 0 400 96" role="img" aria-label="{escaped(name)}: histogram of {escaped(of.title)}">']
    for i, count in enumerate(counts):
        h = 58 * count / len(values) / top
        if count:
            parts.append(
                f'<rect class="{tone} box" x="{10 + i * width + 0.5:.1f}" y="{78 - h:.1f}" width="{width - 1:.1f}" '
                f'height="{h:.1f}"/>'
            )
    side = "left" if of.below else "right"
    parts.append('<line class="axis" x1="10" x2="390" y1="78" y2="78"/>')
    parts.append(f'<line class="cut" x1="{cut:.1f}" x2="{cut:.1f}" y1="16" y2="78"/>')
    parts.append(
        f'<text class="tick" x="10" y="92">{of.low:g}</text>'
        f'<text class="tick" x="390" y="92" text-anchor="end">{of.high:g}</text>'
        f'<text class="tick" x="{cut:.1f}" y="92" text-anchor="middle">{escaped(of.cut_label, 8)}</text>'
        f'<text x="10" y="11">{escaped(name, 40)}</text>'
        f'<text class="tick" x="390" y="11" text-anchor="end">{inside} of {len(values)} {side} of the line</text></svg>'
    )
    return "".join(parts)


def _bin(of: Histogram, values: Sequence[float], bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(max(int((value - of.low) / (of.high - of.low) * bins), 0), bins - 1)] += 1
    return counts


def ratio_histogram(rows: Sequence[tuple[str, str, Sequence[float]]], features: str = "") -> Histogram:
    """Describe the histogram of d1 / d2 of several sets of images."""
    note = "d1/d2: distance to the nearest over the second nearest training image, share of images; copies lie left of 1/3."
    return Histogram(
        "How near is the nearest?" + (f" ({features})" if features else ""), note, rows, MEMORIZED_RATIO, "1/3"
    )


def _histograms(report: Report, bins: int = 24) -> str:
    shown = list(report.histograms)
    if not shown:
        rows = [(run.name, f"run{i}", [s.ratio for s in run.samples]) for i, run in enumerate(report.runs)]
        shown = [ratio_histogram([*rows, ("held-out", "held", list(report.heldout_ratios))])]
    parts = []
    for of in shown:
        filled = [row for row in of.rows if row[2]]
        if not filled:
            continue
        top = max(max(_bin(of, values, bins)) / len(values) for _, _, values in filled)
        parts.append(
            f'<figure class="card wide"><figcaption>{escaped(of.title)}<small>{escaped(of.note)}</small></figcaption>'
            f'<div class="hists">{"".join(_histogram(of, *row, top, bins) for row in filled)}</div></figure>'
        )
    return "".join(parts)


def _tokens(report: Report) -> str:
    """Show prompts with their tokens tinted by their pull."""
    if not report.tokens:
        return ""
    cards = []
    for pull in report.tokens:
        most = max([*pull.scores, pull.padding or 0.0]) or 1.0
        pairs = [*zip(pull.tokens, pull.scores, strict=True)]
        if pull.padding is not None:
            pairs.append(("(padding, mean)", pull.padding))
        chips = "".join(
            f'<span style="background:rgb(200 60 40 / {0.75 * score / most:.2f})">{escaped(text, 24) or "(space)"}'
            f"<small>{score:.3g}</small></span>"
            for text, score in pairs
        )
        cards.append(
            f'<article class="card"><h3 dir="auto">{escaped(pull.prompt, 120)}</h3><p class="tokens">{chips}</p>'
            f'<p class="note">{escaped(pull.note)}</p></article>'
        )
    return (
        '<section><h2>Which words pull</h2><p class="note">The most copied prompts, token by token: the gradient of the guard&#x27;s '
        "score with respect to each token (Wen et al. 2024). The darkest pull most; changing those is what gives a copy up. "
        "A first-order statement, no proof that one word alone brings an image back.</p>"
        f'<div class="duos">{"".join(cards)}</div></section>'
    )


def _caption(sample: Sample) -> str:
    badge = '<span class="badge copy">copy</span>' if sample.memorized else '<span class="badge">no copy</span>'
    score = "" if sample.score is None else f"<span>guard {sample.score:.3g}</span>"
    if sample.facts:
        numbers = "".join(f"<span>{escaped(fact)}</span>" for fact in sample.facts)
    elif sample.similarity is None:
        numbers = f"<span>d1/d2 {sample.ratio:.2f}</span><span>d1 {sample.distance:.3g}</span>"
    else:
        numbers = f"<span>similarity {sample.similarity:.2f}</span>"
    return f'<div class="facts">{badge}{numbers}{score}</div>'


def _pair(sample: Sample) -> str:
    near = f"nearest training image: {sample.nearest_prompt}" if sample.nearest_prompt else "nearest training image"
    made, real = _img(sample.image, f"generated for: {sample.prompt}"), _img(sample.nearest_image, near)
    sides = ((made, "generated"), (real, "nearest training"))
    return f'<div class="pair">{"".join(f"<span>{img}<small>{label}</small></span>" for img, label in sides)}</div>'


def _cards(samples: Iterable[Sample]) -> str:
    cards = []
    for sample in samples:
        prompt = f'<p class="prompt" dir="auto">{escaped(sample.prompt, 120)}</p>'
        tone = "card is-copy" if sample.memorized else "card"
        cards.append(f'<article class="{tone}">{_pair(sample)}{prompt}{_caption(sample)}</article>')
    return "".join(cards)


def _more(shown: str, rest: str, label: str, kind: str) -> str:
    more = f'<details><summary>{escaped(label)}</summary><div class="{kind}">{rest}</div></details>' if rest else ""
    return f'<div class="{kind}">{shown}</div>{more}'


def _gallery(run: RunSection, i: int, shown: int) -> str:
    ordered = sorted(run.samples, key=lambda s: (s.rank, s.prompt))
    copies, total = run.counted or (sum(s.memorized for s in ordered), len(ordered))
    first, rest = ordered[:shown], ordered[shown : 3 * shown]
    hidden = total - len(first) - len(rest)
    tail = f"; {hidden} less copied samples are not on this page" if hidden else ""
    inside = f", distances in {run.features}" if run.features else ""
    marked = f"{run.objective}{'. ' if run.objective else ''}{copies} of {total} samples are marked as copies{inside}."
    return (
        f'<section><h2><i class="swatch run{i}"></i>{escaped(run.name)}: most copied first</h2>'
        f'<p class="note">{escaped(marked)} These are the extremes, not typical samples{tail}.</p>'
        f"{_more(_cards(first), _cards(rest), f'{len(rest)} more', 'cards')}</section>"
    )


def _first_by_prompt(run: RunSection) -> dict[str, Sample]:
    found: dict[str, Sample] = {}
    for sample in run.samples:
        found.setdefault(sample.prompt, sample)
    return found


def _side_by_side(report: Report) -> str:
    if len(report.runs) < 2:
        return ""
    by_run = [_first_by_prompt(run) for run in report.runs]
    prompts = [p for p in by_run[0] if all(p in other for other in by_run[1:])]
    if not prompts:
        return ""
    cards = []
    for prompt in prompts:
        sides = "".join(
            f'<div class="side"><h4><i class="swatch run{i}"></i>{escaped(run.name)}</h4>{_pair(by_run[i][prompt])}'
            f"{_caption(by_run[i][prompt])}</div>"
            for i, run in enumerate(report.runs)
        )
        head = f'<h3 dir="auto">{escaped(prompt, 120)}</h3>'
        cards.append(f'<article class="card duo">{head}<div class="sides">{sides}</div></article>')
    shown = report.shown // 2
    listed = _more("".join(cards[:shown]), "".join(cards[shown:]), f"{len(cards) - shown} more prompts", "duos")
    return (
        "<section><h2>Same prompt, side by side</h2>"
        '<p class="note">The first sample of each prompt, in the order of the prompts: not selected by outcome.</p>'
        f"{listed}</section>"
    )


def _facts(facts: Mapping[str, object]) -> str:
    rows = "".join(f'<tr><th scope="row">{escaped(k)}</th><td>{escaped(v, 600)}</td></tr>' for k, v in facts.items())
    return f'<div class="scroll"><table class="facts-table"><tbody>{rows}</tbody></table></div>' if rows else ""


def _made(report: Report) -> str:
    runs = "".join(
        f'<h3><i class="swatch run{i}"></i>{escaped(run.name)}</h3>{_facts(run.settings)}'
        for i, run in enumerate(report.runs)
        if run.settings
    )
    notes = "".join(f"<li>{escaped(note, 600)}</li>" for note in report.notes)
    return (
        f"<section><h2>How this page was made</h2><pre><code>{escaped(report.command, 600)}</code></pre>"
        f"{_facts(report.made)}{runs}{f'<h3>Notes</h3><ul>{notes}</ul>' if notes else ''}"
        f'<p class="note">{escaped(_copy_rule(report.copies))} '
        "Few copies among these samples do not prove that a model never copies, and broken images copy nothing: read "
        "copies and quality together.</p></section>"
    )


def _groups(report: Report) -> str:
    """Show what comes back of each group of training images, the most first."""
    if not report.groups:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escaped(one["value"], 80) or "(empty)"}</th><td>{one["returned"]} of {one["training"]}</td>'
        f"<td>{100 * one['share']:.1f} % <small>{100 * one['low']:.1f} to {100 * one['high']:.1f}</small></td><td>{one['copies']}</td></tr>"
        for one in report.groups[:200]
    )
    hidden = len(report.groups) - 200
    more = f'<p class="note">{hidden} further groups are in audit.json.</p>' if hidden > 0 else ""
    return (
        '<section><h2>What comes back of whom</h2><p class="note">Per group of training images, near-duplicates as one; 95 % intervals '
        '(Wilson).</p><div class="scroll"><table class="facts-table"><thead><tr><th scope="col">group</th><th scope="col">images that come '
        'back</th><th scope="col">share</th><th scope="col">copies generated</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{more}</section>"
    )


def _copy_rule(name: str) -> str:
    if name == COPIES:
        return "A copy: see the first note. d1/d2, the published measure, stands beside it."
    if name.startswith("memorized"):
        return "A copy: the nearest training image is less than a third as far away as the second nearest."
    return f"A copy: the similarity to the nearest training image is {name.split(' ', 1)[-1]} ({name.split(' ', maxsplit=1)[0]})."


def render(report: Report) -> str:
    """Return the page as one HTML string."""
    finding = find(report)
    charts = []
    for name, note in (
        (report.copies, "share of samples; less is better"),
        (report.quality, "to unseen real images; less is better"),
    ):
        if any(row.name == name for row in report.runs[0].figures):
            first = report.runs[0].row(name)
            rows = [(run.name, f"run{i}", run.row(name).generated) for i, run in enumerate(report.runs)]
            if first.heldout is not None:
                real = "held-out real images" if is_share(name) else "floor: real against real"
                rows.append((real, "held", first.heldout))
            if len(report.runs) == 1 and first.background is not None:
                rows.append(("training images among themselves", "train", first.background))
            charts.append(_whiskers(_label(name), rows, note))
    galleries = "".join(_gallery(run, i, report.shown) for i, run in enumerate(report.runs))
    samples = ", ".join(
        f"{run.counted[1] if run.counted else len(run.samples)} samples from {run.name}" for run in report.runs
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(report.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<p class="kicker">{escaped(report.title)}</p>
<h1 class="{escaped(finding.kind)}">{escaped(finding.sentence)}</h1>
<p class="lead">{escaped(finding.detail, 800)}</p>
<p class="note">{report.training_n} training images; {escaped(samples)}.</p>
</header>
<main>
<section class="charts">{"".join(charts)}{_histograms(report)}</section>
<section><h2>Figures</h2>{_table(report)}</section>
{_side_by_side(report)}
{galleries}
{_groups(report)}{_tokens(report)}
{_made(report)}
</main>
</body>
</html>
"""


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page to `path` (folders are made) and return it; an interrupted write leaves no half page."""
    page = render(report)
    path = Path(path)
    atomic_write(path, page)
    return path


GAP = 4  # pixels between the images of a sheet


def cut_sheet(sheet: Image.Image, number: int, side: int, columns: int, gap: int = GAP) -> list[Image.Image]:
    """Return the first `number` square images of a `contact_sheet` without captions."""
    corners = ((gap + i % columns * (side + gap), gap + i // columns * (side + gap)) for i in range(number))
    return [sheet.crop((x, y, x + side, y + side)) for x, y in corners]


def contact_sheet(
    images: Sequence[Image.Image], columns: int = 8, captions: Sequence[Hashable] | None = None, gap: int = GAP
) -> Image.Image:
    """Lay images out on one white sheet, row by row, each cell as large as the largest image.

    Args:
        captions: one short text under each image, cut to the cell's width.

    Raises:
        UserError: no images, no columns, or another number of captions.
    """
    if not images or columns < 1 or (captions is not None and len(captions) != len(images)):
        raise UserError(
            f"contact sheet of {len(images)} images in {columns} columns",
            rule="needs images, at least one column, and one caption per image",
        )
    font = ImageFont.load_default()
    width, height = max(i.width for i in images), max(i.height for i in images)
    line = 14 if captions is not None else 0
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + line + gap)
        sheet.paste(as_rgb(image), (x, y))
        if captions is not None:
            text = one_line(captions[i], 80).encode("latin-1", "replace").decode("latin-1")
            while text and pen.textlength(text, font=font) > width:
                text = text[:-1]
            pen.text((x, y + height + 1), text, fill="black", font=font)
    return sheet


_STYLE = """
:root{--bg:#faf9f6;--card:#fff;--ink:#1b1c20;--soft:#5d626d;--line:#e2dfd7;--run0:#c2410c;--run1:#0b6e69;--run2:#5b4bb5;
--held:#7a7f8a;--train:#9a7b2f;--copy:#a31621;--copybg:#fdecec;--tag:#efede7}
@media (prefers-color-scheme:dark){:root{--bg:#121316;--card:#1b1d22;--ink:#ecebe7;--soft:#a0a5b0;--line:#2e3138;
--run0:#f08a52;--run1:#4fc3b8;--run2:#a99cf2;--held:#8d93a0;--train:#d1b25e;--copy:#ff9d9d;--copybg:#3c1d20;--tag:#2a2d34}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:44px;padding-bottom:8px}
.kicker{margin:0;color:var(--soft);font-weight:600}
h1{font-size:clamp(1.45rem,3vw,2.1rem);line-height:1.25;margin:.35em 0 .5em;max-width:34em;font-weight:650;
letter-spacing:-.01em;text-wrap:pretty}
h2{font-size:1.3rem;margin:0 0 .3em;letter-spacing:-.005em}
h3{font-size:1rem;margin:1.2em 0 .4em}
h4{font-size:.85rem;margin:0 0 .5em;font-weight:600}
.lead{margin:0 0 .4em;max-width:60em}
.note,small{color:var(--soft)}
.note{font-size:.9rem;margin:.2em 0 1em;max-width:64em}
section{margin:0 0 52px}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px;margin-top:24px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px}
figure{margin:0}
figure.card{padding:16px 18px}
figure.wide{grid-column:1/-1}
figcaption{font-weight:600;margin-bottom:8px}
figcaption small{display:block;font-weight:400}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--ink);paint-order:stroke;stroke:var(--card);stroke-width:4px}
svg .value{font-weight:600}
svg .tick{font-size:10.5px;fill:var(--soft);font-weight:400}
svg .grid,svg .axis{stroke:var(--line)}
svg .cut{stroke:var(--copy);stroke-dasharray:3 3}
.run0{--tone:var(--run0)}.run1{--tone:var(--run1)}.run2{--tone:var(--run2)}.held{--tone:var(--held)}
.train{--tone:var(--train)}
svg .bar{stroke:var(--tone);stroke-width:4;stroke-linecap:round;opacity:.45}
svg .dot,svg .box{fill:var(--tone)}
.hists{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:8px 24px}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--tone);margin-right:.45em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:9px 14px 9px 0;border-bottom:1px solid var(--line)}
thead th{font-size:.82rem;color:var(--soft);font-weight:600;border-bottom-width:2px}
tbody th{font-weight:500;max-width:19em}
td b{font-variant-numeric:tabular-nums;font-weight:600;white-space:nowrap}
td[class^=run] b{color:var(--tone)}
td small,th small{display:block;font-size:.78rem;font-weight:400;line-height:1.4}
tr.key th{font-weight:700}
.none{color:var(--soft)}
.facts-table th{width:14em;color:var(--soft);font-weight:500;padding-right:18px}
.facts-table td{overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(232px,1fr));gap:14px}
.duos{display:grid;grid-template-columns:repeat(auto-fill,minmax(500px,1fr));gap:14px}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:18px}
.duo h3{margin:0 0 .7em;overflow-wrap:anywhere}
.pair{display:flex;gap:8px}
.pair span{flex:1 1 0;min-width:0}
.pair small{display:block;font-size:.74rem;margin-top:2px}
img{display:block;width:100%;height:auto;aspect-ratio:1;object-fit:contain;background:#fff;border:1px solid var(--line);
border-radius:6px}
.prompt{margin:8px 0 6px;font-size:.9rem;line-height:1.35;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:3px 10px;align-items:center;font-size:.78rem;color:var(--soft);
font-variant-numeric:tabular-nums;margin-top:6px}
.tokens{display:flex;flex-wrap:wrap;gap:6px;margin:0 0 6px}
.tokens span{border:1px solid var(--line);border-radius:5px;padding:2px 7px;overflow-wrap:anywhere}
.tokens small{display:block;font-size:.7rem;color:inherit;opacity:.75}
.badge{background:var(--tag);border-radius:4px;padding:1px 6px;color:var(--soft)}
.badge.copy{background:var(--copybg);color:var(--copy);font-weight:650}
.is-copy{border-color:var(--copy)}
details{margin-top:14px}
summary{cursor:pointer;color:var(--soft);padding:6px 0}
summary:hover{color:var(--ink)}
summary:focus-visible{outline:2px solid var(--run1);outline-offset:2px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.88rem}
ul{padding-left:1.2em;max-width:64em}
@media (max-width:760px){header,main{padding-left:16px;padding-right:16px}header{padding-top:26px}
.charts,.duos{grid-template-columns:minmax(0,1fr)}.cards{grid-template-columns:repeat(auto-fill,minmax(200px,1fr))}
.figures thead{display:none}.figures,.figures tbody{display:block}
.figures tr{display:grid;grid-template-columns:1fr 1fr;gap:10px 16px;padding:14px 0;border-bottom:1px solid var(--line)}
.figures th,.figures td{border:0;padding:0}.figures tbody th{grid-column:1/-1;max-width:none;font-weight:650}
.figures td::before{content:attr(data-head);display:block;font-size:.76rem;color:var(--soft)}
.facts-table th{width:8em}}
@media (max-width:460px){.sides{gap:10px}.duo .facts{gap:2px 8px}}
@media print{.card{break-inside:avoid}}
"""
