"""The figure of a style's page: quality on new captions against what comes back, from the published results of several studies of one style.

    python tools/style_curves.py docs/study/style-60 docs/study/style-60-early --runs plain "ambient level=1" "distill level=2.5" \\
      --out docs/study/style-60

A study that measures the first steps has its own file, since steps stand in it before anything is seen; here its lines are joined with the other's.
Writes OUT/own-pixels64.svg and OUT/own-edges16.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ambient_sd.audit.closest import FEATURES, OWN
from ambient_sd.reporting.charts import PALETTE, SERIES, Line, chart, standalone
from experiments.contest import ALONE, MEASURES, alone
from experiments.points import Point, points


def line_of(label: str, found: list[Point], measure: str, colour: str, *, dots: bool = False) -> Line:
    """Return the points of a label in the order of their steps, with their intervals."""
    found = sorted(found, key=lambda p: p.step)
    own = [p.figures[measure] for p in found]
    bars = [((p.distance.low, p.distance.high), (100 * o.low, 100 * o.high)) for p, o in zip(found, own, strict=True)]
    return Line(
        label, [p.distance.value for p in found], [100 * o.value for o in own], bars=bars, texts=[str(p.step) for p in found],
        marker="o", colour=colour, dots=dots,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "studies", type=Path, nargs="+", help="folders with results.json; the base alone is the first's"
    )
    parser.add_argument("--runs", nargs="+", default=["plain"], help="labels, in the order of the legend")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in args.studies]
    found = [p for one in results for p in points(one)]
    base = alone(results[0])
    for feature in FEATURES:
        measure = f"{OWN}-{feature}"
        lines = [] if base is None else [line_of(ALONE, [base], measure, PALETTE["held"], dots=True)]
        for place, label in enumerate(args.runs):
            colour = PALETTE["ink"] if place == 0 else SERIES[place]
            lines.append(line_of(label, [p for p in found if p.label == label], measure, colour))
        words = MEASURES[measure].axis
        svg = chart(
            words, lines, x_label="Fréchet distance on new captions", y_label=words, x_scale="linear", height=4.6
        )
        (args.out / f"{measure}.svg").write_text(standalone(svg), encoding="utf-8")


if __name__ == "__main__":
    main()
