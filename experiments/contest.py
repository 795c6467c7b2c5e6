"""A study of a style as a contest: which recipe copies least at equal quality on captions that no run has seen.

Quality is the Frechet distance of samples for these captions and, since a distance does not tell a banana from a pipe, how many of them lie near
the real image of their own caption (`experiments.style`). What comes back is counted on samples for the training captions: copies by the audit's
decision and by contours alone, and samples whose closest real image is their caption's own training image, by pixels and by contours
(`ambient_sd.audit.closest`), which sees blurred copies. Equal quality: a distance of at most the upper end, and a caption agreement of at least the
lower end, of the intervals of plain's best step by distance; plain may stop early like every other recipe. A recipe copies less if the interval of
the difference excludes 0 (two intervals combined: `metrics.difference`). It covers the samples of these runs, not the choice of the best among many
recipes: that is what a second study, on other images, is for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ambient_sd.audit.closest import FEATURES, NEAREST, OWN
from ambient_sd.audit.closest import NEW as OTHER
from ambient_sd.audit.metrics import difference
from ambient_sd.audit.shares import COPIES, RETURNED
from ambient_sd.reporting import pages
from ambient_sd.reporting.charts import Line, Mark, chart
from ambient_sd.utils.estimate import Estimate
from experiments.measures import CONTOURS
from experiments.points import BASELINE, Point, at_equal_quality, best, point_of, points, share
from experiments.style import NEW

ALONE = "base alone"


@dataclass(frozen=True)
class Measure:
    """Say how one measure of what comes back is written: before a clause, as a noun, on an axis, in the head of a table, in a file's name."""

    begins: str
    noun: str
    axis: str
    head: str
    file: str


NEAR = "samples nearest to their own training image"
MEASURES = {
    COPIES: Measure("", "copies", "copy rate, %", "copies, by the decision (step)", "curves"),
    CONTOURS: Measure("by contours ", "copies", "copy rate by contours, %", "copies, by contours (step)", "curves-contours"),
    f"{OWN}-pixels64": Measure("by the closest image in pixels ", NEAR, "own training image closest (pixels), %",
                               "own image closest, pixels (step)", "curves-own"),
    f"{OWN}-edges16": Measure("by the closest image in contours ", NEAR, "own training image closest (contours), %",
                              "own image closest, contours (step)", "curves-own-contours"),
}  # fmt: skip


def measures_of(found: Sequence[Point]) -> list[str]:
    """Return the measures that every point has; a study measured before `own` was lacks it."""
    return [name for name in MEASURES if all(name in p.figures for p in found)]


@dataclass(frozen=True)
class Winner:
    """Hold, by one measure of copies, plain at its fewest copies at equal quality, the other recipe with the fewest, and how many less."""

    plain: Point
    other: Point
    less: Estimate


def alone(results: Mapping[str, Any]) -> Point | None:
    """Return the base without any training as a point, or None if it is not measured."""
    return point_of(ALONE, 0, [results["base"]], COPIES) if "base" in results else None


@dataclass(frozen=True)
class Bounds:
    """Hold what a point must reach to be as good as plain's best: its Frechet distance at most, its caption agreement at least."""

    distance: float
    agreement: float

    @classmethod
    def of(cls, found: Sequence[Point]) -> Bounds:
        """Return the bounds that the best point of plain sets."""
        top = best(found, BASELINE)
        return cls(top.distance.high, top.figures["agreement"].low)

    def __str__(self) -> str:
        return f"Fréchet distance at most {self.distance:.1f}, caption agreement at least {100 * self.agreement:.1f} %"

    def follows(self, p: Point) -> bool:
        """Tell whether a point's captions are followed as well."""
        return p.figures["agreement"].value >= self.agreement

    def reached(self, p: Point) -> bool:
        """Tell whether a point is as good."""
        return p.distance.value <= self.distance and self.follows(p)


def winner(found: Sequence[Point], measure: str) -> Winner | None:
    """Return who copies least at equal quality, of those that copy measurably less than plain if there is one; None if no recipe but plain gets there."""
    labels = dict.fromkeys(p.label for p in found)
    bounds = Bounds.of(found)
    found = [dataclasses.replace(p, measure=measure) for p in found if bounds.follows(p)]
    plain = at_equal_quality(found, BASELINE)
    others = [p for label in labels if label != BASELINE and (p := at_equal_quality(found, label)) is not None]
    if plain is None or not others:
        return None
    all_of_them = [Winner(plain, other, difference(plain.copied, other.copied)) for other in others]
    fewer = [
        one for one in all_of_them if one.less.low > 0
    ]  # the lowest value may be that of a single seed, and tell nothing
    return min(fewer or all_of_them, key=lambda one: (one.other.copied.value, one.other.distance.value))


def sentence(found: Sequence[Point], base: Point | None) -> str:
    """Say in one sentence, from the numbers alone, which recipe copies how much less at equal quality, or that none does."""
    labels = list(dict.fromkeys(p.label for p in found))
    if BASELINE not in labels:
        return f"{BASELINE} is not measured yet: there is nothing to compare with."
    bounds = Bounds.of(found)
    if base is not None and bounds.reached(base):
        return (
            f"The base alone is as good as {BASELINE}'s best on captions that were not trained (distance {base.distance.value:.1f}, caption agreement "
            f"{100 * base.figures['agreement'].value:.1f} %; {bounds}): quality does not tell a trained run from it, and the recipes cannot be compared."
        )
    if len(labels) == 1:
        return f"Only {BASELINE} is measured yet."
    where = f"at equal quality on captions that were not trained ({bounds})"
    found_by = {measure: winner(found, measure) for measure in measures_of(found)}
    if all(one is None for one in found_by.values()):
        return f"No recipe but {BASELINE} itself is as good as {BASELINE}'s best on captions that were not trained ({bounds})."
    parts = [_clause(MEASURES[measure], one) for measure, one in found_by.items() if one is not None]
    return f"{where[0].upper()}{where[1:]}, {'; '.join(parts)}."


def _clause(measure: Measure, one: Winner) -> str:
    plain = f"{100 * one.plain.copied.value:.1f} % of {BASELINE} (step {one.plain.step})"
    other = f"{100 * one.other.copied.value:.1f} %"
    if one.less.low > 0:
        less = f"{100 * one.less.value:.1f} points fewer [{100 * one.less.low:.1f}, {100 * one.less.high:.1f}]"
        if one.plain.seeds != one.other.seeds:  # runs of one recipe differ by more than their intervals
            less += f" (seeds {_listed(one.other)} against {_listed(one.plain)})"
        return f"{measure.begins}{one.other.label} (step {one.other.step}) gives {other} {measure.noun} against {plain}: {less}"
    return f"{measure.begins}no recipe gives measurably fewer {measure.noun} than the {plain}; the fewest has {one.other.label} (step {one.other.step}), {other}"


def _listed(p: Point) -> str:
    return ", ".join(map(str, p.seeds))


def sections(results: Mapping[str, Any]) -> list[pages.Section]:
    """Return the comparison at equal quality and a table of every measured step, a run each."""
    found, base = points(results), alone(results)
    labels = list(dict.fromkeys(p.label for p in found))
    return [
        *([_at_equal_quality(found, labels, base)] if BASELINE in labels else []),
        _every_step(found, labels, base, results["missing"]),
    ]


def _at_equal_quality(found: Sequence[Point], labels: Sequence[str], base: Point | None) -> pages.Section:
    bounds = Bounds.of(found)
    follow = [p for p in found if bounds.follows(p)]
    rows: list[list[object]] = []
    by = measures_of([*found, *([] if base is None else [base])])
    if base is not None:
        rows.append([base.label, f"{base.distance.show(1)} (0)", *(share(base.figures[name]) for name in by), "", ""])
    for label in labels:
        top, cells = best(found, label), []
        for measure in by:
            of_measure = [dataclasses.replace(p, measure=measure) for p in follow]
            there = at_equal_quality(of_measure, label)
            cells.append("none is as good" if there is None else f"{share(there.copied)} ({there.step})")
        there = at_equal_quality(follow, label)
        also = ["", ""] if there is None else [share(there.figures["agreement"]), share(there.figures["style"])]
        rows.append([label, f"{top.distance.show(1)} ({top.step})", *cells, *also])
    return pages.Section(
        "Fewest copies at equal quality on new captions",
        [f"Equal quality, of samples for captions that were not trained: {bounds}, the ends of the intervals of {BASELINE}'s best by distance "
         f"(step {best(found, BASELINE).step}). What comes back is counted on samples for training captions. Steps in brackets."],
        tables=[pages.Table(["run", "best distance (step)", *(MEASURES[name].head for name in by),
                             "caption agreement there", "style agreement there"], rows)],
    )  # fmt: skip


def _every_step(
    found: Sequence[Point], labels: Sequence[str], base: Point | None, missing: Sequence[str]
) -> pages.Section:
    some = found[0].figures
    text = [
        f"The held-out images themselves, as the autoencoder renders them, have a distance of {some['distance floor'].value:.1f}. Caption agreement: the real image of a sample's caption is among the "
        f"{NEAREST} nearest of {_of_one(some['agreement chance'])}; by chance {100 * some['agreement chance'].value:.1f} %. Style agreement: a classifier calls a "
        f"sample this style; of real images of concepts that it was not trained on it calls {share(some['style, real'])} of this style so, and "
        f"{share(some['style, others'])} of others.",
        "Copies by the decision and by contours: first of samples for training captions, then of samples for new ones. Returned: "
        "training images that come back at least once.",
    ]
    near = [f"{kind}-{feature}" for feature in FEATURES for kind in (OWN, OTHER)]
    near = [name for name in near if all(name in p.figures for p in [*found, *([] if base is None else [base])])]
    if near:
        text.append("Own: the closest of all real images is the training image of the sample's own caption, by pixels and by contours (edges). New: "
                    "the same for captions that were not trained, so what a caption alone can do.")  # fmt: skip
    begun = set(labels)
    if part := [name for name in missing if name.rsplit(" seed=", 1)[0] in begun]:
        text.append(f"Not whole yet: {', '.join(part)}.")
    if rest := list(dict.fromkeys(name.rsplit(" seed=", 1)[0] for name in missing if name not in part)):
        text.append(f"Not begun: {', '.join(rest)}.")
    head = [
        "step",
        "copies",
        "by contours",
        "returned",
        "copies, new",
        "by contours, new",
        "distance",
        "KID x 1000",
        "caption agreement",
        "style agreement",
        *near,
    ]
    tables = [
        pages.Table(
            head,
            [_row(p, near) for p in ([base] if base is not None and label == ALONE else found) if p.label == label],
            label,
        )
        for label in ([ALONE] if base is not None else []) + list(labels)
    ]
    return pages.Section(
        "Every measured step",
        text,
        tables=tables,
        terms=pages.terms("copy rate", "edge-based copy rate", "Fréchet distance (FD)", "interval"),
    )


def _of_one(figure: Estimate) -> int:
    """Return the n of one seed's figure, where the n of all were added."""
    return figure.n // max(1, len(getattr(figure, "seeds", ())))


def _row(p: Point, near: Sequence[str]) -> list[object]:
    f = p.figures
    shares = [share(f[name]) for name in (COPIES, CONTOURS, RETURNED, COPIES + NEW, CONTOURS + NEW)]
    more = (share(f[name]) for name in ("agreement", "style", *near))
    return [p.step, *shares, p.distance.show(1), f["kid"].show(1, 1000), *more]


def curves(
    found: Sequence[Point], base: Point | None, style: Mapping[str, Mapping[str, Any]]
) -> dict[str, pages.Chart]:
    """Draw quality against what comes back along training, a line a recipe with its steps and light intervals, by every measure."""
    limit = best(found, BASELINE).distance.high if any(p.label == BASELINE for p in found) else None
    marks = [] if limit is None else [Mark("equal quality: to the left", limit)]
    dots = {"dots": True, "colour": style[BASELINE]["colour"] if BASELINE in style else None}
    out = {}
    for measure in measures_of([*found, *([] if base is None else [base])]):
        words = MEASURES[measure].axis
        lines = [] if base is None else [_line(ALONE, [base], measure, dots)]
        lines += [_line(label, [p for p in found if p.label == label], measure, look) for label, look in style.items()]
        # Copies begin at nothing and then double; `own` does not, and a linear axis shows it as it is.
        scale = "linear" if measure.startswith(OWN) else "symlog"
        svg = chart(words, lines, x_label="Fréchet distance on new captions", y_label=words, x_scale="linear", y_scale=scale,
                    marks=marks, height=5)  # fmt: skip
        out[MEASURES[measure].file] = pages.Chart(
            f"Quality on new captions, along training: {words.removesuffix(', %')}", svg, "numbers are steps; down and to the left is better"
        )  # fmt: skip
    return out


def _line(label: str, line: Sequence[Point], measure: str, look: Mapping[str, Any]) -> Line:
    copies = [p.figures[measure] for p in line]
    return Line(
        label, [p.distance.value for p in line], [100 * c.value for c in copies], texts=[str(p.step) for p in line],
        bars=[((p.distance.low, p.distance.high), (100 * max(0.0, c.low), 100 * c.high)) for p, c in zip(line, copies, strict=True)], **look,
    )  # fmt: skip
