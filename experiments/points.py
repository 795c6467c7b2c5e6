"""The points of a study, from its results.json alone, and how its runs compare at equal quality.

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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ambient_sd.audit.shares import COPIES
from ambient_sd.utils.estimate import Estimate

PUBLISHED = "copied"  # d1 / d2 < 1/3, pixels
BASELINE = "plain"
HIGH = 2.9  # noise levels from here on show that the noisy copies are learned


@dataclass(frozen=True)
class MeanOverSeeds(Estimate):
    """Hold a mean over seeds, its 95 % interval within runs, and the value of each seed."""

    seeds: tuple[float, ...] = ()

    @classmethod
    def of(cls, figures: Sequence[Estimate]) -> MeanOverSeeds:
        """Return the mean of independent runs' figures, and their intervals combined."""
        values, k = [f.value for f in figures], len(figures)
        mean = sum(values) / k
        below = math.sqrt(sum((f.value - f.low) ** 2 for f in figures)) / k
        above = math.sqrt(sum((f.high - f.value) ** 2 for f in figures)) / k
        return cls(mean, mean - below, mean + above, sum(f.n for f in figures), seeds=tuple(values))


@dataclass(frozen=True)
class Point:
    """Hold a label at a step."""

    label: str
    step: int
    figures: Mapping[str, Estimate]
    errors: Mapping[str, Mapping[str, Sequence[float]]]
    measure: str = PUBLISHED  # of copies, the same for all points of a study
    seeds: tuple[int, ...] = ()  # whose mean it is

    @property
    def copied(self) -> Estimate:
        return self.figures[self.measure]

    @property
    def distance(self) -> Estimate:
        return self.figures["distance"]


def points(results: Mapping[str, Any], seeds: Collection[int] | None = None) -> list[Point]:
    """Return the points of a study in its order, of all seeds or of some; a step that not all seeds of a label have reached is made of those that have."""
    runs = [run for run in [*results["runs"], *results.get("apart", [])] if seeds is None or run["seed"] in seeds]
    found: dict[tuple[str, int], list[tuple[int, Mapping[str, Any]]]] = {}
    for run in runs:
        for point in run["points"]:
            found.setdefault((run["label"], point["step"]), []).append((run["seed"], point))
    measured = [point for run in runs for point in run["points"]]
    decided = all(COPIES in point["figures"] for point in measured) and len({p.get("rule") for p in measured}) == 1
    measure = COPIES if decided else PUBLISHED
    return [point_of(*place, [p for _, p in group], measure, [s for s, _ in group]) for place, group in found.items()]


def point_of(
    label: str, step: int, group: Sequence[Mapping[str, Any]], measure: str, seeds: Sequence[int] = ()
) -> Point:
    """Return a point made of the measured steps of its seeds."""
    figures = {name: _mean([p["figures"][name] for p in group]) for name in _shared(group)}
    return Point(label, step, figures, _mean_errors([p["errors"] for p in group]), measure, tuple(sorted(seeds)))


def _shared(group: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the figures that every seed has."""
    return [name for name in group[0]["figures"] if all(name in other["figures"] for other in group)]


def _mean(figures: Sequence[Mapping[str, Any]]) -> MeanOverSeeds:
    return MeanOverSeeds.of([Estimate.from_dict(f) for f in figures])


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
    i = first_as_good([reached.value for _, reached in line], distance)
    if i is None:
        return None
    now, reached = line[i]
    if i == 0:
        return Estimate(now.value, now.low, now.high, now.n)
    before, last = line[i - 1]
    w = (last.value - distance) / (last.value - reached.value)
    value, low, high = ((1 - w) * getattr(before, end) + w * getattr(now, end) for end in ("value", "low", "high"))
    return Estimate(value, low, high, now.n)


def first_as_good(line: Sequence[float], distance: float) -> int | None:
    """Return the place of the first distance of a line that is at most the given one, or None.

    Example:
        >>> first_as_good([70.0, 64.0, 66.0], 65.0), first_as_good([70.0], 65.0)
        (1, None)
    """
    return next((i for i, reached in enumerate(line) if reached <= distance), None)


def at_least_error(found: Sequence[Point], label: str, above: float = HIGH) -> Point:
    """Return the label's point of the least error on held-out images at noise levels from `above` on: an early stop that
    a trainer can make, for it looks at no sample."""
    return min((p for p in found if p.label == label), key=lambda p: high_error(p, "heldout", above))


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


def high_error(p: Point, name: str, above: float = HIGH) -> float:
    """Return the mean error of denoising at noise levels from `above` on."""
    curve = p.errors[name]
    chosen = [m for s, m in zip(curve["level"], curve["mean"], strict=True) if s >= above]
    return sum(chosen) / len(chosen) if chosen else math.nan  # a schedule may end below


def share(e: Estimate) -> str:
    """Return a share in per cent with its interval, and the value of each seed where there are several."""
    seeds = getattr(e, "seeds", ())
    single = f"; {', '.join(f'{100 * v:.1f}' for v in seeds)}" if len(seeds) > 1 else ""
    return f"{100 * e.value:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}{single}]"


def sides(estimates: Sequence[Estimate], factor: float = 1) -> list[list[float]]:
    """Return how far each interval reaches below and above its value, as matplotlib takes error bars; never less than nothing."""
    return [
        [factor * max(0.0, e.value - e.low) for e in estimates],
        [factor * max(0.0, e.high - e.value) for e in estimates],
    ]
