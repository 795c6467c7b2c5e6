"""What a report holds, and the finding: the sentence that its figures and their intervals say.

Nothing about the outcome is written down beforehand. `audit_page` lays a report out as a page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from ambient_sd.audit.closest import NEW, OWN, draws_its_images
from ambient_sd.audit.decision import Decided
from ambient_sd.audit.metrics import MEMORIZED_RATIO, Row, difference, is_published, memorized
from ambient_sd.audit.neighbours import Neighbours
from ambient_sd.audit.record import is_share
from ambient_sd.audit.shares import COPIES, RETURNED
from ambient_sd.reporting.pages import Next, Picture
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate

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
    left_out: int = 0  # images that show too little to be compared
    exact: int = 0  # images that differ from a training image by colour, blur or pose alone

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
        shown: images of each gallery before the reader opens it.
        groups: what comes back of each group of training images (`shares.by_group`).
        next: commands that follow from the outcome.
        pictures: sheets that stand between the galleries.
        floor: what the held-out column has for distances between sets.
        beside: what the image beside a sample is.
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
    next: Sequence[Next] = ()
    pictures: Sequence[Picture] = ()
    floor: str = "For distances between sets held-out is the floor: one half of the held-out images against the other at equal n."
    beside: str = "nearest training"


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
    if decided is not None:
        order = rank(decided)
        return [
            decided_sample(
                decided, i, neighbours, image=images[i], prompt=prompts[i], originals=training_images,
                captions=training_prompts, score=scores[i] if scores is not None else None, order=float(order[i]),
            )
            for i in range(len(images))
        ]  # fmt: skip
    ratio, index = neighbours.ratio.tolist(), neighbours.index[:, 0].tolist()
    similar = None if threshold is None else neighbours.similarity.tolist()
    copied = memorized(neighbours).tolist() if similar is None else [s > threshold for s in similar]
    return [
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


def rank(decided: Decided) -> Tensor:
    """Return what sorts images, lowest first: copies, then by p, among equal p by the ratio."""
    return decided.p + 1e-6 * decided.ratio.clamp(max=1e3) - 2 * decided.copy.double()


def decided_sample(
    decided: Decided,
    i: int,
    published: Neighbours,
    *,
    image: Image.Image,
    prompt: str,
    originals: Sequence[Image.Image],
    captions: Sequence[str] | None,
    score: float | None,
    order: float,
) -> Sample:
    """Put generated image `i` beside the training image that explains it best, with the published measure among the facts.

    Args:
        published: neighbours of all generated images by a feature.
        originals, captions: of the training set; only the one image that is shown is read.
        order: from `rank`.
    """
    row, p = int(decided.row[i]), float(decided.p[i])
    beside = (
        f"similarity {float(published.similarity[i]):.2f}"
        if published.metric == "cosine"
        else f"d1/d2 {float(published.ratio[i]):.2f}"
    )
    return Sample(
        image=image,
        prompt=prompt,
        nearest_image=originals[row],
        ratio=float(decided.ratio[i]),
        distance=float(decided.residual[i]),
        memorized=bool(decided.copy[i]),
        score=score,
        nearest_prompt=captions[row] if captions is not None else "",
        order=order,
        facts=(f"p {p:.2g}" if p >= 1e-4 else "p < 0.0001", f"residual {float(decided.residual[i]):.2f}", beside),
    )


def versions() -> dict[str, str]:
    """Return the versions of this package and of what its figures depend on, for how a page was made."""
    import platform

    import diffusers
    import torch
    import transformers

    from ambient_sd import __version__

    return {
        "ambient_sd": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


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
        found = _find_alone(base, copies_base, report.quality)
        if not base.left_out:
            return found
        left = f" {base.left_out} more show too little to be compared and count for nothing: look at them."
        return Finding(found.kind, found.sentence, found.detail + left)
    other = report.runs[1]
    copies = other.row(report.copies)
    fewer = difference(copies.generated, copies_base.generated)
    of_own = report.copies.startswith(f"{OWN}-")  # closeness to the own training image, which is less than a copy
    nearer = " are closest to the training image of their caption," if of_own else ""
    share = f"{show(copies.generated)} of {copies.generated.n} samples{nearer} against {show(copies_base.generated)}"
    words = ("gives fewer training images back", "gives more training images back", "what comes back") if of_own else (
        "copies fewer training images", "copies more training images", "copying")  # fmt: skip
    this, that = f"the {other.name} run", f"the {base.name} run"
    good = [run.row(report.quality).generated for run in (other, base)]
    frechet = f"({label_of(report.quality).split(',')[0].split(' (')[0]} {show(good[0])} against {show(good[1])})"
    worse = difference(good[0], good[1])

    if fewer.high < 0:
        kind = "trade" if worse.low > 0 else "better"
        sentence = f"{this} {words[0]} than {that}: {share}"
        if kind == "trade":
            sentence += f", but its images are worse {frechet}."
        elif worse.high < 0:
            sentence += f", and its images are better {frechet}."
        else:
            sentence += f", at no measurably worse quality {frechet}."
    else:
        if fewer.low > 0:
            kind, sentence = "worse", f"{this} {words[1]} than {that}: {share}."
        else:
            kind, sentence = "unclear", f"no clear difference in {words[2]} between {this} and {that}: {share}."
        verdict = "worse" if worse.low > 0 else "better" if worse.high < 0 else "not measurably different"
        sentence += f" Its images are {verdict} {frechet}."
    detail = (
        f"Difference in {'what comes back' if of_own else 'copies'} {show(fewer, signed=True)} (95 % interval {span(fewer)}), in {label_of(report.quality)} "
        f"{show(worse, signed=True)} ({span(worse)})."
    )
    if of_own:
        new = other.row(f"{NEW}-{report.copies.removeprefix(f'{OWN}-')}")
        detail += f" For captions that were not trained it is {show(new.generated)} of {this}."
    elif copies.heldout is not None and copies.excess is not None:
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
        others = [row for row in run.figures if is_published(row.name) and row.generated.value > copies.generated.value]
        most = max(others, key=lambda row: row.generated.value, default=None)
        by = "" if most is None else f"; by {most.name.removeprefix('memorized-')} {show(most.generated)}"
        back = _back(run)
        if (drawing := _drawing(run)) is not None:
            return Finding(
                "copies-otherwise",
                _draws(drawing, name, copies),
                f"{back}95 % interval of copies {span(copies.generated)}.{_known(run, copies)}",
            )
        return Finding(
            "no-background",
            f"{name}: {share}{by}; how often unseen real images would be called copies is not known.",
            f"{back}95 % interval {span(copies.generated)}. No unseen real images were given, so there is nothing to subtract: "
            "training images that resemble each other make chance hits. Give images of the same kind that the model "
            f"never saw with --heldout.{_known(run, copies)}",
        )
    more = [
        (row.excess.value, row, row.heldout)
        for row in run.figures
        if is_published(row.name) and row.excess and row.heldout and row.excess.low > max(0.0, copies.excess.value)
    ]
    # What the decision calls a copy is one where it calls no unseen image so, however few: a rate's interval is another question.
    surely = copies.excess.low > 0 or (copies.generated.value > 0 and copies.heldout.value == 0) or run.exact > 0
    kind = "copies" if surely else "copies-otherwise" if more else "no-copies"
    verb = "copies training images" if kind == "copies" else "shows no copying beyond chance"
    sentence = f"{name} {verb}: {share}, against {show(copies.heldout)} of unseen real images."
    detail = f"{_back(run)}Excess {show(copies.excess, signed=True)} (95 % interval {span(copies.excess)})."
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
            detail = f"By the calibrated decision: excess {show(copies.excess, signed=True)} (95 % interval {span(copies.excess)})."
    if kind == "no-copies" and (drawing := _drawing(run)) is not None:
        kind, sentence = "copies-otherwise", _draws(drawing, name, copies)
    detail += _known(run, copies)
    if any(row.name == quality for row in run.figures):
        row = run.row(quality)
        assert row.heldout is not None and row.excess is not None
        worse = "its images are far from real ones" if row.excess.low > 0 else "its images are about as near to real ones as these to each other"  # fmt: skip
        detail += (
            f" Quality: {worse} ({label_of(quality)} {show(row.generated)}, real against real {show(row.heldout)})."
        )
        if kind == "no-copies" and row.excess.low > 0:
            detail += " Broken images copy nothing: look at them before trusting a share of copies that is low."
    return Finding(kind, sentence, detail)


def _drawing(run: RunSection) -> Row | None:
    """Return the row that says most clearly that the model draws its training images, or None if none does."""
    return max((row for row in run.figures if draws_its_images(row)), key=lambda row: row.generated.value, default=None)


def _draws(row: Row, name: str, copies: Row) -> str:
    """Say that a model draws its training images where the decision finds few copies."""
    assert row.heldout is not None
    return (
        f"{name} draws its training images: by {row.name.removeprefix('own-')} {show(row.generated)} of {row.generated.n} images are nearest to the "
        f"training image of their own prompt, against {show(row.heldout)} of the base's; the calibrated decision calls {show(copies.generated)} copies."
    )


def _known(run: RunSection, copies: Row) -> str:
    """Say how many samples are nearest to their own training image, where that is more than copies, and more than the base's."""
    if _drawing(run) is not None:
        return " Look at them: blurred and redrawn copies are not counted as copies."
    rows = [
        row
        for row in run.figures
        if row.name.startswith("own-")
        and row.generated.low > copies.generated.value
        and (row.excess is None or row.excess.low > 0)
    ]
    if not rows:
        return ""
    most = max(rows, key=lambda row: row.generated.value)
    beside = "" if most.heldout is None else f", against {show(most.heldout)} of the base's"
    return (
        f" Look at them: by {most.name.removeprefix('own-')} {show(most.generated)} are nearest to the training image of their own prompt{beside}. "
        "Blurred and redrawn copies are not counted as copies."
    )


def _back(run: RunSection) -> str:
    row = next((row for row in run.figures if row.name == RETURNED), None)
    return (
        ""
        if row is None
        else f"{show(row.generated)} of {row.generated.n} training images come back ({span(row.generated)}). "
    )


def unit_of(name: str) -> tuple[float, str]:
    """Return the factor and the sign of a measure's unit; a difference of two shares is in percentage points."""
    if is_share(name):
        return 100, " points" if name.endswith(": difference") else " %"
    return (1000, " × 10⁻³") if name.startswith("KID") else (1, "")


def _number(value: float, name: str, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    value *= unit_of(name)[0]
    digits = 1 if is_share(name) or 100 > abs(value) >= 10 else 0 if abs(value) >= 100 else 2
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def show(figure: Estimate, signed: bool = False) -> str:
    """Write a figure's value: shares in per cent, KID in thousandths, others with three digits."""
    return _number(figure.value, figure.name, signed) + unit_of(figure.name)[1]


def span(figure: Estimate) -> str:
    """Write the interval of a figure, in its unit."""
    return f"{_number(figure.low, figure.name)} to {_number(figure.high, figure.name)}"


def label_of(name: str) -> str:
    """Return a measure's name in words, the abbreviation after them."""
    kind, _, features = name.partition("-")
    words = {
        COPIES: "Copy rate", RETURNED: "Training images that come back", "agreement": "Caption agreement",
        "memorized-edges16": "Edge-based copy rate (edges16)",
        "memorized-pixels64-standardized": "Copy rate by d1/d2, standardized pixels",
    }  # fmt: skip
    kinds = {
        "memorized": "Copy rate by d1/d2", "FD": "Fréchet distance (FD)", "KID": "Kernel distance (KID)", "density": "Density",
        "coverage": "Coverage",
    }  # fmt: skip
    if kind == OWN:
        return f"Own training image closest, {features}"
    if kind == NEW:
        return f"Own image closest, captions that were not trained, {features}"
    return words.get(name) or (f"{kinds[kind]}, {features}" if kind in kinds and features else name)


def ratio_histogram(rows: Sequence[tuple[str, str, Sequence[float]]], features: str = "") -> Histogram:
    """Describe the histogram of d1 / d2 of several sets of images."""
    return Histogram(
        "How near is the nearest training image?" + (f" ({features})" if features else ""),
        "d1/d2, share of images; by this measure copies lie left of 1/3.",
        rows, MEMORIZED_RATIO, "1/3",
    )  # fmt: skip
