"""The figure of a style's page: quality on new captions against what comes back, from the published results of several studies of one style.

    python -m experiments.style_curves docs/study/style-60 docs/study/style-60-early --runs plain "ambient level=1" "distill level=2.5" \\
      --out docs/study/style-60

A study that measures the first steps has its own file, since steps stand in it before anything is seen; here its lines are joined with the other's.
Writes OUT/own-pixels64.svg and OUT/own-edges16.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ambient_sd.audit.closest import FEATURES, OWN
from ambient_sd.reporting.charts import PALETTE, SERIES, standalone
from experiments.contest import MEASURES, alone, curves
from experiments.points import points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "studies", type=Path, nargs="+", help="folders with results.json; the base alone is the first's"
    )
    parser.add_argument("--runs", nargs="+", default=["plain"], help="labels, in the order of the legend")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in args.studies]
    found = sorted((p for one in results for p in points(one) if p.label in args.runs), key=lambda p: p.step)
    colours = [PALETTE["ink"], *SERIES[1:]]
    measured = {p.label for p in found}
    charts = curves(
        found,
        alone(results[0]),
        {label: {"colour": colours[i], "marker": "o"} for i, label in enumerate(args.runs) if label in measured},
    )
    for feature in FEATURES:
        measure = f"{OWN}-{feature}"
        (args.out / f"{measure}.svg").write_text(standalone(charts[MEASURES[measure].file].svg), encoding="utf-8")


if __name__ == "__main__":
    main()
