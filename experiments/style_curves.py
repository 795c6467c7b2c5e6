"""Figure and table of a style's page: quality on new captions against what comes back, from the published results of several studies of one style.

    python -m experiments.style_curves docs/study/style-60 docs/study/style-60-early --runs plain "ambient level=1" "distill level=2.5" \\
      --out docs/study/style-60

A study that measures the first steps has its own file, since steps stand in it before anything is seen; here its lines are joined with the other's.
Writes OUT/own-pixels64.svg, OUT/own-edges16.svg and OUT/own.txt: every measured step in one row, and each run at its best distance and at its last
step beside plain of the same seeds, stopped where its own curve first comes down to that distance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ambient_sd.audit.closest import FEATURES, NEW, OWN
from ambient_sd.audit.shares import COPIES
from ambient_sd.reporting.charts import PALETTE, SERIES, standalone
from ambient_sd.utils.errors import UserError, exits_on_user_error
from experiments.contest import MEASURES, alone, curves
from experiments.points import BASELINE, Point, best, first_as_good, points, where_as_good

SHARES = {
    "agreement": "agreement, %",
    "style": "style, %",
    f"{OWN}-pixels64": "own, pixels, %",
    f"{OWN}-edges16": "own, contours, %",
    f"{NEW}-pixels64": "new, pixels, %",
    f"{NEW}-edges16": "new, contours, %",
    COPIES: "copies, %",
}


def table(found: Sequence[Point]) -> str:
    """Return a Markdown table, a row for each point: its seeds, and every figure as a mean over them with its 95 % interval."""
    head = ["run", "step", "seeds", "distance", *SHARES.values()]
    rows = [head, ["---"] * len(head)]
    for p in found:
        seeds = len(getattr(p.distance, "seeds", ())) or 1
        cells = (p.figures[name].show(1, 100) for name in SHARES)
        rows.append([p.label.replace(" level=", " "), str(p.step), str(seeds), p.distance.show(1), *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def joined(
    studies: Sequence[Mapping[str, Any]], labels: Collection[str], seeds: Collection[int] | None = None
) -> list[Point]:
    """Return the points of some labels from several studies, by step."""
    return sorted((p for one in studies for p in points(one, seeds) if p.label in labels), key=lambda p: p.step)


def at_equal_distance(studies: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """Return a Markdown table: each run but plain at its best distance and at its last step, and below it plain where it first is as good.

    Both are of the seeds that both have, for seeds differ by more than their intervals; between two of its steps plain is interpolated linearly
    in the distance (`points.where_as_good`), and its row names the two. Where plain is better from its first measured step on, that step stands
    there with its own distance: plain may have been as good before, with fewer images.
    """
    names = [name for name in SHARES if not name.startswith(NEW)]
    rows = [["run", "step", "seeds", "distance", *(SHARES[name] for name in names)]]
    rows.append(["---"] * len(rows[0]))
    found = joined(studies, labels)
    for label in dict.fromkeys(p.label for p in found if p.label != BASELINE):
        steps = dict.fromkeys([best(found, label).step, max(p.step for p in found if p.label == label)])
        for step in steps:
            rows += _beside_plain(studies, label, step, names)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _beside_plain(studies: Sequence[Mapping[str, Any]], label: str, step: int, names: Sequence[str]) -> list[list[str]]:
    """Return two rows: a run at a step, and plain of the same seeds where it first is as good."""
    whole = next(p for p in joined(studies, [label]) if p.step == step)
    shared = sorted({seed for p in joined(studies, [BASELINE]) for seed in p.seeds} & set(whole.seeds))
    top = next(p for p in joined(studies, [label], shared or None) if p.step == step)
    line = [p for p in joined(studies, [BASELINE], shared) if list(p.seeds) == shared]  # not steps that a seed lacks
    named = label.replace(" level=", " ")
    its = [
        named,
        str(step),
        str(len(top.seeds)),
        f"{top.distance.value:.1f}",
        *(top.figures[n].show(1, 100) for n in names),
    ]
    if not line:
        return [its, ["plain, stopped there", "", "", "", *["not measured with these seeds"] * len(names)]]
    at = first_as_good([p.distance.value for p in line], top.distance.value)
    if at is None:
        return [
            its,
            ["plain, stopped there", "", str(len(shared)), "", *[f"not as good by step {line[-1].step}"] * len(names)],
        ]
    there = [where_as_good([(p.figures[name], p.distance) for p in line], top.distance.value) for name in names]
    steps = f"{line[at - 1].step} to {line[at].step}" if at else f"{line[0].step}, its first"
    distance = top.distance.value if at else line[0].distance.value
    return [
        its,
        ["plain, stopped there", steps, str(len(shared)), f"{distance:.1f}", *(e.show(1, 100) for e in there if e)],
    ]


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "studies", type=Path, nargs="+", help="folders with results.json; the base alone is the first's"
    )
    parser.add_argument("--runs", nargs="+", default=["plain"], help="labels, in the order of the legend")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in args.studies]
    measured = {p.label: None for one in results for p in points(one)}
    if unknown := [label for label in args.runs if label not in measured]:
        raise UserError(
            f"--runs {unknown[0]!r}",
            rule=f"the studies have {', '.join(map(repr, measured))}",
            remedy="name one of these",
        )
    found = joined(results, args.runs)
    base = alone(results[0])
    if lacking := [
        p.label for p in [*found, *([base] if base else [])] if any(name not in p.figures for name in SHARES)
    ]:
        raise UserError(f"{args.studies[0]}: run {lacking[0]!r} has no {OWN}", rule="this page is for studies of a style (docs/study.md)",
                        remedy="give such a study")  # fmt: skip
    colours = [PALETTE["ink"], *SERIES[1:]]
    charts = curves(found, base, {label: {"colour": colours[i], "marker": "o"} for i, label in enumerate(args.runs)})
    for feature in FEATURES:
        measure = f"{OWN}-{feature}"
        (args.out / f"{measure}.svg").write_text(standalone(charts[MEASURES[measure].file].svg), encoding="utf-8")
    found.sort(key=lambda p: args.runs.index(p.label))  # stable: the steps stay in order
    text = f"{table([*([] if base is None else [base]), *found])}\n{at_equal_distance(results, args.runs)}"
    (args.out / "own.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
