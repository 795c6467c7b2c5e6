"""The image at the head of docs/results.md: copies against quality along training, a column a study.

    python tools/overview.py docs/study/text-60 docs/study/scratch-60 docs/study/text-300 --out docs/study/overview.png

Above, copies are counted in pixels as published; below, by contours (edge-based), for the seeds that were counted so. Each folder holds
a study's results.json and, where two networks were put together, by-noise-level.json. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ambient_sd.utils.estimate import Estimate
from experiments.points import points, sides

SHOWN: Mapping[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {"color": "black", "marker": "o", "lw": 2.2}),
    "ambient level=0.8": ("ambient, $s_n$ = 0.8", {"color": "#0a7d5a", "marker": "o", "lw": 2.2}),
    "weighted": ("control: clean images, ambient's weight", {"color": "#2b6cb0", "marker": "s", "lw": 1.2, "ls": "--"}),
    "fresh copies": ("control: a new noisy copy each step", {"color": "#dd6b20", "marker": "s", "lw": 1.2, "ls": "--"}),
}  # fmt: skip
AGAIN = {"color": "black", "marker": "o", "ms": 4, "lw": 1, "ls": ":", "mfc": "white"}
ABOVE = {"color": "#b83280", "marker": "*", "ms": 14, "ls": "none"}
MEASURES = {"copied": "copied, %", "copied-recoloured": "copied, edge-based, %"}
TITLES = {"text": "with captions", "scratch": "from scratch, no captions"}

Place = tuple[Estimate, Estimate]  # copies, distance


def lines(folder: Path, measure: str) -> dict[str, list[Place]]:
    """Return the runs of a study that have this measure, each in the order of its steps; the mean of the seeds that have it at every step."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    kept = [run for run in results["runs"] if all(measure in point["figures"] for point in run["points"])]
    found = sorted(points({**results, "runs": kept}), key=lambda p: p.step)
    runs = {label: [(p.figures[measure], p.distance) for p in found if p.label == label] for label in SHOWN}
    return {label: line for label, line in runs.items() if len(line) > 1}


def _pairs(folder: Path) -> list[dict[str, Any]]:
    path = folder / "by-noise-level.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def _place(row: Mapping[str, Any], measure: str) -> Place:
    figures = row["figures"]
    return Estimate.from_dict(figures[measure]), Estimate.from_dict(figures["distance"])


def panel(axes: Any, folder: Path, measure: str) -> None:
    """Draw one study by one measure, with the intervals of both figures at every point."""
    for label, line in lines(folder, measure).items():
        words, style = SHOWN[label]
        _draw(axes, line, words, {"ms": 5, **style})
    rows = _pairs(folder)
    again = [row for row in rows if row["name"].startswith("step ") and "above" not in row["name"]]
    above = [row for row in rows if row["name"].startswith("base above")]
    if rows:
        _draw(axes, [_place(row, measure) for row in again], "the plain run of the stars", AGAIN)
        _draw(
            axes,
            [_place(row, measure) for row in above],
            "plain, with its base above the noise level beside the star",
            ABOVE,
        )
    for row in above:
        copies, distance = _place(row, measure)
        level = row["name"].split()[2].rstrip(",")
        axes.annotate(
            level, (100 * copies.value, distance.value), xytext=(9, 3), textcoords="offset points", color=ABOVE["color"]
        )
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlim=(-0.1, 100), xlabel=MEASURES[measure])
    axes.set_xticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
    axes.grid(alpha=0.25)


def _draw(axes: Any, line: Sequence[Place], words: str, style: Mapping[str, Any]) -> None:
    copies, distances = [copied for copied, _ in line], [distance for _, distance in line]
    x, y = [100 * e.value for e in copies], [e.value for e in distances]
    axes.plot(x, y, label=words, **style)
    axes.errorbar(
        x, y, xerr=sides(copies, 100), yerr=sides(distances), fmt="none", color=style["color"], alpha=0.2, lw=1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure = Figure(figsize=(4.4 * len(args.studies), 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(MEASURES), len(args.studies), sharey=True, squeeze=False)
    for row, measure in zip(grid, MEASURES, strict=True):
        for axes, folder in zip(row, args.studies, strict=True):
            panel(axes, folder, measure)
        row[0].set_ylabel("Frechet distance (lower is better)")
    for axes, folder in zip(grid[0], args.studies, strict=True):
        kind, number = folder.name.split("-")
        axes.set_title(f"{number} images, {TITLES[kind]}")
    named: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, words in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(words, handle)
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=2, fontsize=10)
    figure.savefig(args.out, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
