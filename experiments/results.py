"""Tables and plots of a study, from its results.json alone: one can go on with the study, and write them again.

A *point* is a run's label at one step. Its figures are means over seeds; its interval combines the runs' own (prompts resampled) as of
independent runs, `half = sqrt(sum_i half_i^2) / k`, and the values of single seeds stand beside it: two seeds say little about their
spread, and no interval is made of it.

*Equal quality*: of the points whose Frechet distance is at most the upper end of the interval of the baseline's best, the one with the
fewest copies. The baseline has the same right: stopped early it copies less too. That compares single points; `at_distance` compares whole
curves: the copies of each run where it first is as good as the baseline was at some step.

Copies are those of `ambient_sd.audit.decision` where every point has them, by one rule; else d1 / d2 < 1/3, which the published studies have. The
heads say which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambient_sd.audit.shares import COPIES
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write

PUBLISHED = "copied"  # d1 / d2 < 1/3, pixels
BASELINE = "plain"
HIGH = 2.9  # noise levels from here on show that the noisy copies are learned


@dataclass(frozen=True)
class MeanOverSeeds(Estimate):
    """Hold a mean over seeds, its 95 % interval within runs, and the value of each seed."""

    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Point:
    """Hold a label at a step."""

    label: str
    step: int
    figures: Mapping[str, Estimate]
    errors: Mapping[str, Mapping[str, Sequence[float]]]
    measure: str = PUBLISHED  # of copies, the same for all points of a study

    @property
    def copied(self) -> Estimate:
        return self.figures[self.measure]

    @property
    def distance(self) -> Estimate:
        return self.figures["distance"]


def points(results: Mapping[str, Any]) -> list[Point]:
    """Return the points of a study in its order; a step that not all seeds of a label have reached is made of those that have."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in results["runs"]:
        for point in run["points"]:
            found.setdefault((run["label"], point["step"]), []).append(point)
    measured = [point for group in found.values() for point in group]
    decided = all(COPIES in point["figures"] for point in measured) and len({p.get("rule") for p in measured}) == 1
    measure = COPIES if decided else PUBLISHED
    return [
        Point(
            label, step, {name: _mean([p["figures"][name] for p in group]) for name in _shared(group)},
            _mean_errors([p["errors"] for p in group]), measure,
        )
        for (label, step), group in found.items()
    ]  # fmt: skip


def _shared(group: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the figures that every seed has."""
    return [name for name in group[0]["figures"] if all(name in other["figures"] for other in group)]


def _mean(figures: Sequence[Mapping[str, Any]]) -> MeanOverSeeds:
    values = [f["value"] for f in figures]
    mean, k = sum(values) / len(values), len(values)
    below = math.sqrt(sum((f["value"] - f["low"]) ** 2 for f in figures)) / k
    above = math.sqrt(sum((f["high"] - f["value"]) ** 2 for f in figures)) / k
    n = sum(f["n"] for f in figures)
    return MeanOverSeeds(mean, mean - below, mean + above, n, seeds=tuple(values))


def _mean_errors(curves: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    return {
        name: {
            "level": list(curves[0][name]["level"]),
            "mean": [sum(c) / len(c) for c in zip(*(curve[name]["mean"] for curve in curves), strict=True)],
        }
        for name in curves[0]
    }


def best(found: Sequence[Point], label: str) -> Point:
    """Return the label's point of the least Frechet distance."""
    return min((p for p in found if p.label == label), key=lambda p: p.distance.value)


def at_equal_quality(found: Sequence[Point], label: str, baseline: str = BASELINE) -> Point | None:
    """Return the label's point of the fewest copies among those as good as the baseline's best, or None if there is none."""
    limit = best(found, baseline).distance.high
    good = [p for p in found if p.label == label and p.distance.value <= limit]
    return min(good, key=lambda p: (p.copied.value, p.distance.value)) if good else None


def at_distance(found: Sequence[Point], label: str, distance: float) -> Estimate | None:
    """Return the copied share with which the label's run first comes down to a Frechet distance, or None if it never does."""
    line = sorted((p for p in found if p.label == label), key=lambda p: p.step)
    return where_as_good([(p.copied, p.distance) for p in line], distance)


def where_as_good(line: Sequence[tuple[Estimate, Estimate]], distance: float) -> Estimate | None:
    """Return the copies with which a line of (copies, distance), in the order of its steps, first comes down to a distance, or None.

    Between two steps share and ends of its interval are interpolated linearly in the distance. A line that is better than that from its
    first step on has the share of its first step.
    """
    for i, (now, reached) in enumerate(line):
        if reached.value <= distance:
            if i == 0:
                return Estimate(now.value, now.low, now.high, now.n)
            before, last = line[i - 1]
            w = (last.value - distance) / (last.value - reached.value)
            value, low, high = (
                (1 - w) * getattr(before, end) + w * getattr(now, end) for end in ("value", "low", "high")
            )
            return Estimate(value, low, high, now.n)
    return None


def at_least_error(found: Sequence[Point], label: str, above: float = HIGH) -> Point:
    """Return the label's point of the least error on held-out images at noise levels from `above` on: an early stop that
    a trainer can make, for it looks at no sample."""
    return min((p for p in found if p.label == label), key=lambda p: _high_error(p, "heldout", above))


def front(found: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both copies and distance, by falling distance."""
    kept = [
        p
        for p in found
        if not any(
            q.copied.value <= p.copied.value
            and q.distance.value <= p.distance.value
            and (q.copied.value, q.distance.value) != (p.copied.value, p.distance.value)
            for q in found
        )
    ]
    return sorted(kept, key=lambda p: (p.copied.value, p.distance.value))


def tables(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    found = points(results)
    if not found:
        return "Nothing is measured yet.\n"
    labels = list(dict.fromkeys(p.label for p in found))
    seeds = {label: sorted({r["seed"] for r in results["runs"] if r["label"] == label}) for label in labels}
    decided = found[0].measure == COPIES
    word, title = ("copies", "Share of copies") if decided else ("copied", "Copied share")
    head = "copies | d1/d2 < 1/3" if decided else "copied"
    lines = ["### At the last step", "", f"| run | seeds | step | n | {head} | at 16 px | in any colour | median d1/d2 | Frechet distance | KID x 1000 |",
             "|---" * (11 if decided else 10) + "|"]  # fmt: skip
    for label in labels:
        p = max((p for p in found if p.label == label), key=lambda p: p.step)
        both = [p.copied, p.figures[PUBLISHED]] if decided else [p.copied]
        lines.append(
            f"| {label} | {_numbers(seeds[label])} | {p.step} | {p.copied.n} | {' | '.join(share(e) for e in both)} | {share(p.figures['copied-coarsely'])} | {_recoloured(p)} | {p.figures['ratio'].show(2)} | "
            f"{p.distance.show(1)} | {p.figures['kid'].show(1, 1000)} |"
        )
    floor = found[0].figures["distance floor"]
    if decided:
        lines += [
            "",
            "Copies: by the definition of the audit, held-out images as the null. The next three columns, and the median: by distances.",
        ]
    lines += [
        "",
        f"A perfect model's distance at this n, half of the held-out images against the other: {floor.show(1)}.",
        "",
    ]
    if BASELINE in labels:
        limit = best(found, BASELINE)
        lines += [
            "### Its best quality, and at equal quality", "",
            f"Equal quality: distance at most {limit.distance.high:.1f}, the upper end of the interval of {BASELINE}'s best (step {limit.step}).",
            "", f"| run | best distance (step) | {word} there | fewest copies at equal quality (step) | distance there |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for label in labels:
            top, equal = best(found, label), at_equal_quality(found, label)
            there = (
                "none is as good | "
                if equal is None
                else f"{share(equal.copied)} ({equal.step}) | {equal.distance.show(1)}"
            )
            lines.append(f"| {label} | {top.distance.show(1)} ({top.step}) | {share(top.copied)} | {there} |")
        lines.append("")
    if BASELINE in labels and len(labels) > 1:
        line = [p for p in found if p.label == BASELINE]
        lines += [
            f"### Copies where a run first is as good as {BASELINE} at its steps", "",
            f"{title} by linear interpolation between a run's steps; an empty cell: it never is as good.", "",
            "| run | " + " | ".join(f"{p.distance.value:.1f} (step {p.step})" for p in line) + " |", "|---" * (1 + len(line)) + "|",
        ]  # fmt: skip
        for label in labels:
            reached = [at_distance(found, label, p.distance.value) for p in line]
            cells = ["" if there is None else share(there) for there in reached]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["### Stopped at the least error on held-out images", "",
              f"Mean error at noise levels from {HIGH} on, at that step and at the last; training images beside.", "",
              f"| run | step | held-out error (last) | training error (last) | {word} | Frechet distance |", "|---|---|---|---|---|---|"]  # fmt: skip
    for label in labels:
        stop, end = at_least_error(found, label), max((p for p in found if p.label == label), key=lambda p: p.step)
        cells = [f"{_high_error(stop, name):.3f} ({_high_error(end, name):.3f})" for name in ("heldout", "training")]
        lines.append(
            f"| {label} | {stop.step} | {' | '.join(cells)} | {share(stop.copied)} | {stop.distance.show(1)} |"
        )
    lines.append("")
    lines += ["### Along training", "", "| run | " + " | ".join(str(s) for s in sorted({p.step for p in found})) + " |",
              "|---" * (1 + len({p.step for p in found})) + "|"]  # fmt: skip
    for label in labels:
        cells = []
        for step in sorted({p.step for p in found}):
            at = next((p for p in found if p.label == label and p.step == step), None)
            cells.append("" if at is None else f"{at.copied.value:.1%}, {at.distance.value:.1f}".replace("%", " %"))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", f"{title}, Frechet distance.", ""]
    if results["missing"]:
        lines += [f"Not whole yet: {', '.join(results['missing'])}.", ""]
    return "\n".join(lines)


def _recoloured(p: Point) -> str:
    """Write the edge-based copy rate, which not every published study has."""
    return share(p.figures["copied-recoloured"]) if "copied-recoloured" in p.figures else ""


def _high_error(p: Point, name: str, above: float = HIGH) -> float:
    curve = p.errors[name]
    chosen = [m for s, m in zip(curve["level"], curve["mean"], strict=True) if s >= above]
    return sum(chosen) / len(chosen) if chosen else math.nan  # a schedule may end below


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def share(e: Estimate) -> str:
    """Return a share in per cent with its interval, and the value of each seed where there are several."""
    seeds = getattr(e, "seeds", ())
    single = f"; {', '.join(f'{100 * v:.1f}' for v in seeds)}" if len(seeds) > 1 else ""
    return f"{100 * e.value:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}{single}]"


def write_results(results: Mapping[str, Any], out: Path) -> Path:
    """Write OUT/results.md and, where matplotlib is installed, three plots for each chart of the plan; return the first."""
    text = f"# {results['study']}\n\n{tables(results)}"
    if results["runs"]:
        try:
            for name, plots in plot(results, out).items():
                files = [*plots, chart_file("samples", name)]
                text += f"\n## {name}\n" if name else ""
                text += "\n" + "".join(f"![]({file})\n" for file in files if (out / file).exists())
        except ImportError:
            print("no plots: pip install matplotlib (the extra `study`)", flush=True)
    atomic_write(out / "results.md", text)
    return out / "results.md"


def chart_file(kind: str, chart: str) -> str:
    """Return the name of a chart's image in OUT; a plan without charts has one of no name."""
    return f"{kind}-{chart}.png" if chart else f"{kind}.png"


def plot(results: Mapping[str, Any], out: Path) -> dict[str, list[str]]:
    """Draw for each chart the Pareto plane, the onset along training, and the errors by noise level.

    Returns:
        The files' names by chart: front-NAME.png and so on; front.png where the plan names no charts.
    """
    found = points(results)
    measured = list(dict.fromkeys(p.label for p in found))
    charts = {
        name: [label for label in labels if label in measured]
        for name, labels in (results.get("charts") or {"": measured}).items()
    }
    return {name: _plot(found, labels, str(results["study"]), name, out) for name, labels in charts.items() if labels}


def _plot(found: Sequence[Point], labels: Sequence[str], study: str, chart: str, out: Path) -> list[str]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [p for p in found if p.label in labels]
    copies = "copies, %" if found and found[0].measure == COPIES else "copied images, %"
    style = {label: _style(label, labels) for label in labels}
    written: list[str] = []

    def save(figure: Any, name: str) -> None:
        name = chart_file(name, chart)
        FigureCanvasAgg(figure)
        figure.savefig(out / f".{name}.part", dpi=110, format="png", metadata={"Software": None})
        (out / f".{name}.part").replace(out / name)
        written.append(name)

    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axes = figure.subplots()
    for label in labels:
        line = [p for p in found if p.label == label]
        axes.plot([100 * p.copied.value for p in line], [p.distance.value for p in line], label=label, **style[label])
        last = line[-1]
        axes.errorbar(
            100 * last.copied.value, last.distance.value, color=style[label]["color"], alpha=0.6, lw=1,
            xerr=sides([last.copied], 100), yerr=sides([last.distance]),
        )  # fmt: skip
    edge = front(found)
    axes.plot([100 * p.copied.value for p in edge], [p.distance.value for p in edge], color="black", lw=5, alpha=0.12,
              label="Pareto front", zorder=0)  # fmt: skip
    if BASELINE in labels:
        limit = best(found, BASELINE).distance.high
        axes.axhline(limit, color="black", lw=0.8, ls=":", label="equal quality: below")
    axes.set(xlabel=f"{copies} (interval at the last step)", ylabel="Frechet distance to held-out images",
             title=f"{study}: {chart}" if chart else study)  # fmt: skip
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    save(figure, "front")

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label in labels:
        line = [p for p in found if p.label == label]
        left.plot([p.step for p in line], [100 * p.copied.value for p in line], label=label, **style[label])
        right.plot([p.step for p in line], [p.distance.value for p in line], **style[label])
    left.set(xlabel="step", ylabel=copies)
    right.set(xlabel="step", ylabel="Frechet distance")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, "onset")

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("training", "heldout"), strict=True):
        for label in labels:
            last = [p for p in found if p.label == label][-1]
            curve = last.errors[name]
            axes.plot(curve["level"], curve["mean"], label=label if name == "training" else None, **style[label])
        axes.set(xlabel="noise level s", xscale="log", yscale="log", title=f"{name} images, last step")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("error of the denoised image, per dimension")
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, "errors")
    return written


def sides(estimates: Sequence[Estimate], factor: float = 1) -> list[list[float]]:
    """Return how far each interval reaches below and above its value, as matplotlib takes error bars; never less than nothing."""
    return [
        [factor * max(0.0, e.value - e.low) for e in estimates],
        [factor * max(0.0, e.high - e.value) for e in estimates],
    ]


def _style(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """Levels of one objective go from light to dark; the baseline is black; others have colours of their own."""
    from matplotlib import colormaps

    if label == BASELINE:
        return {"color": "black", "marker": "o", "ms": 4, "lw": 2}
    swept = [other for other in labels if "level=" in other]
    if label in swept:
        place = swept.index(label) / (len(swept) - 1) if len(swept) > 1 else 0.5
        return {"color": colormaps["viridis"](0.95 * (1 - place)), "marker": "o", "ms": 4, "lw": 1.5}
    others = [other for other in labels if other not in swept and other != BASELINE]
    return {"color": colormaps["tab10"](others.index(label) % 10), "marker": "s", "ms": 4, "lw": 1.2, "ls": "--"}
