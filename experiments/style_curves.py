"""Figure and table of a style's page: quality on new captions against what comes back, from the published results of several studies of one style.

    python -m experiments.style_curves docs/study/style-60 docs/study/style-60-early --runs plain "ambient level=1" "distill level=2.5" \\
      --out docs/study/style-60

A study that measures the first steps has its own file, since steps stand in it before anything is seen; here its lines are joined with the other's.
Writes OUT/own-pixels64.svg, OUT/own-edges16.svg and OUT/own.txt: every measured step in one row, and each run at its best distance beside plain
of the same seeds, stopped where its own curve first comes down to that distance.
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
from experiments.contest import MEASURES, alone, curves
from experiments.points import BASELINE, Point, best, points, where_as_good

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
    """Return a Markdown table, a row for each run but plain: its figures at its best distance, and plain's where it first is as good.

    Plain's are of the same seeds, for seeds differ by more than their intervals; between two of its steps they are interpolated linearly in the
    distance (`points.where_as_good`).
    """
    names = [name for name in SHARES if not name.startswith(NEW)]
    rows = [
        ["run", "step", "distance", *(SHARES[name] for name in names)],
        ["---"] * (len(names) + 3),
    ]
    found = joined(studies, labels)
    for label in dict.fromkeys(p.label for p in found if p.label != BASELINE):
        top = best(found, label)
        plain = [p for p in joined(studies, [BASELINE], top.seeds) if p.seeds == top.seeds]
        its = [top.figures[name] for name in names]
        there = [where_as_good([(p.figures[name], p.distance) for p in plain], top.distance.value) for name in names]
        rows.append(
            [label.replace(" level=", " "), str(top.step), f"{top.distance.value:.1f}", *(e.show(1, 100) for e in its)]
        )
        rows.append(
            ["plain, stopped there", "", "", *("never as good" if e is None else e.show(1, 100) for e in there)]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "studies", type=Path, nargs="+", help="folders with results.json; the base alone is the first's"
    )
    parser.add_argument("--runs", nargs="+", default=["plain"], help="labels, in the order of the legend")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in args.studies]
    found = joined(results, args.runs)
    base = alone(results[0])
    colours = [PALETTE["ink"], *SERIES[1:]]
    measured = {p.label for p in found}
    charts = curves(
        found,
        base,
        {label: {"colour": colours[i], "marker": "o"} for i, label in enumerate(args.runs) if label in measured},
    )
    for feature in FEATURES:
        measure = f"{OWN}-{feature}"
        (args.out / f"{measure}.svg").write_text(standalone(charts[MEASURES[measure].file].svg), encoding="utf-8")
    found.sort(key=lambda p: args.runs.index(p.label))  # stable: the steps stay in order
    text = f"{table([*([] if base is None else [base]), *found])}\n{at_equal_distance(results, args.runs)}"
    (args.out / "own.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
