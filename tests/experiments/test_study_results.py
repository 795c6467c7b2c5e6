"""Tables and choices of a study, on figures made by hand."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from ambient_sd.utils.estimate import Estimate
from experiments.points import at_distance, at_equal_quality, at_least_error, best, front, points
from experiments.results import tables, write_results


def run(label: str, seed: int, *steps: tuple[int, float, float], half: float = 1.0) -> dict[str, Any]:
    def figure(name: str, value: float, h: float) -> dict[str, Any]:
        return {"name": name, "value": value, "low": value - h, "high": value + h, "n": 100, "seed": seed, "detail": ""}

    curve = {"level": [0.2, 4.0], "mean": [0.1, 0.5 + seed], "error": [0.0, 0.0]}
    return {
        "label": label, "seed": seed, "differs": {},
        "points": [
            {"step": step, "errors": {"training": curve, "heldout": curve},
             "figures": {"copied": figure("copied", copied, 0.03), "copied-coarsely": figure("copied", copied, 0.03), "distance": figure("distance", distance, half),
                         "distance floor": figure("distance", 10.0, 1.0), "kid": figure("kid", 0.1, 0.01),
                         "ratio": figure("ratio", 0.5, 0.1)}}
            for step, copied, distance in steps
        ],
    }  # fmt: skip


RESULTS: dict[str, Any] = {
    "study": "by hand", "missing": ["gap seed=1"],
    "runs": [
        run("plain", 0, (100, 0.1, 40.0), (200, 0.5, 30.0)), run("plain", 1, (100, 0.2, 42.0), (200, 0.7, 34.0)),
        run("ambient level=0.8", 0, (100, 0.0, 41.0), (200, 0.04, 33.0)),
        run("ambient level=8", 0, (100, 0.0, 90.0)),
    ],
}  # fmt: skip


def test_a_point_is_the_mean_of_its_seeds_with_the_interval_of_independent_runs() -> None:
    found = points(RESULTS)
    last = next(p for p in found if p.label == "plain" and p.step == 200)
    assert (last.copied.value, last.copied.seeds, last.copied.n) == (pytest.approx(0.6), (0.5, 0.7), 200)
    assert last.copied.high - last.copied.value == pytest.approx(0.03 / 2**0.5)
    assert last.distance.value == 32.0 and last.errors["training"]["mean"] == [0.1, 1.0]
    single = next(p for p in found if p.label == "ambient level=0.8" and p.step == 100)
    assert single.distance.high - single.distance.value == pytest.approx(1.0)


@pytest.mark.parametrize("newer", [0, 1])
def test_a_figure_that_only_one_seed_was_measured_by_is_left_out(newer: int) -> None:
    seeds = [run("plain", 0, (100, 0.1, 40.0)), run("plain", 1, (100, 0.2, 42.0))]
    figures = seeds[newer]["points"][0]["figures"]
    figures["copied-recoloured"] = dict(figures["copied"])
    (point,) = points({"runs": seeds})
    assert "copied-recoloured" not in point.figures and point.copied.seeds == (0.1, 0.2)
    (alone,) = points({"runs": [seeds[newer]]})
    assert alone.figures["copied-recoloured"].value == alone.copied.value


def decided(results: dict[str, Any], *, rules: tuple[str, ...] = ("one",), but: int = -1) -> dict[str, Any]:
    """The same with shares of copies by the decision beside d1/d2: a tenth more; one point without."""
    found = copy.deepcopy(results)
    for i, point in enumerate(point for one in found["runs"] for point in one["points"]):
        if i != but:
            figure = point["figures"]["copied"]
            point["figures"]["copies"] = figure | {k: figure[k] + 0.1 for k in ("value", "low", "high")}
            point["rule"] = rules[i % len(rules)]
    return found


def test_copies_are_those_of_the_decision_where_all_points_have_it_by_one_rule() -> None:
    last = next(p for p in points(decided(RESULTS)) if p.label == "plain" and p.step == 200)
    assert (last.measure, last.copied.value) == ("copies", pytest.approx(0.7))
    for mixed in (decided(RESULTS, but=2), decided(RESULTS, rules=("one", "two"))):
        assert all(p.measure == "copied" for p in points(mixed))
        assert tables(mixed) == tables(RESULTS)
    new, old = tables(decided(RESULTS)), tables(RESULTS)
    assert "| n | copy rate | d1/d2 < 1/3 | at 16 px |" in new and "| n | d1/d2 < 1/3 | at 16 px |" in old
    assert "by the definition of the audit" in new and "by the definition of the audit" not in old
    assert "70.0 % [67.9, 72.1; 60.0, 80.0] | 60.0 % [57.9, 62.1; 50.0, 70.0]" in new
    # What is chosen, too: by d1/d2 the earlier step copies least.
    swapped = decided({**RESULTS, "runs": [run("plain", 0, (100, 0.1, 30.5), (200, 0.5, 30.0))]})
    swapped["runs"][0]["points"][0]["figures"]["copies"]["value"] = 0.9
    equal = at_equal_quality(points(swapped), "plain")
    assert equal is not None and equal.step == 200


def test_equal_quality_is_within_the_interval_of_the_best_baseline_and_the_baseline_may_stop_early_too() -> None:
    found = points(RESULTS)
    assert best(found, "plain").step == 200  # 32.0, up to 32.7
    assert at_equal_quality(found, "ambient level=0.8") is None  # 33.0
    wide = points({**RESULTS, "runs": [run("plain", 0, (100, 0.1, 30.5), (200, 0.5, 30.0)), *RESULTS["runs"][2:]]})
    stopped = at_equal_quality(wide, "plain")
    assert stopped is not None and (stopped.step, stopped.copied.value) == (100, 0.1)
    near = points({**RESULTS, "runs": [run("plain", 0, (200, 0.5, 30.0), half=3.5), *RESULTS["runs"][2:]]})
    equal = at_equal_quality(near, "ambient level=0.8")
    assert equal is not None and equal.step == 200


def share(found: Estimate | None) -> tuple[float, float, float]:
    assert found is not None
    return found.value, found.low, found.high


def test_copies_at_a_distance_are_interpolated_along_training() -> None:
    runs = [
        run("plain", 0, (100, 0.1, 40.0), (200, 0.5, 30.0)),
        run("ambient level=0.8", 0, (100, 0.0, 41.0), (200, 0.04, 33.0), (300, 0.2, 36.0)),
    ]
    found = points({**RESULTS, "runs": runs})
    assert share(at_distance(found, "plain", 35.0)) == pytest.approx((0.3, 0.27, 0.33))  # half way
    assert share(at_distance(found, "plain", 50.0)) == pytest.approx((0.1, 0.07, 0.13))  # better from the first step on
    assert share(at_distance(found, "ambient level=0.8", 37.0)) == pytest.approx(
        (0.02, -0.01, 0.05)
    )  # the first time, not step 300
    assert at_distance(found, "ambient level=0.8", 32.9) is None
    text = tables({**RESULTS, "runs": runs})
    assert "| run | 40.0 (step 100) | 30.0 (step 200) |" in text
    assert (
        "| plain | 10.0 % [7.0, 13.0] | 50.0 % [47.0, 53.0] |" in text
        and "| ambient level=0.8 | 0.5 % [-2.5, 3.5] |  |" in text
    )


def test_an_early_stop_is_the_step_of_the_least_heldout_error_at_high_noise() -> None:
    results = {**RESULTS, "runs": [run("plain", 0, (100, 0.1, 40.0), (200, 0.5, 30.0), (300, 0.6, 29.0))]}
    for point, low, high in zip(results["runs"][0]["points"], (0.3, 0.2, 0.1), (0.9, 0.7, 0.8), strict=True):
        point["errors"] = {
            n: {"level": [0.2, 4.0], "mean": [low, high], "error": [0, 0]} for n in ("training", "heldout")
        }
    assert at_least_error(points(results), "plain").step == 200  # the error at 0.2 would say 300
    assert "| plain | 200 | 0.700 (0.800) | 0.700 (0.800) |" in tables(results)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    kept = [(p.label, p.step) for p in front(points(RESULTS))]
    assert kept == [("ambient level=0.8", 100), ("ambient level=0.8", 200), ("plain", 200)]


def test_tables_name_what_is_missing_and_plots_are_written(tmp_path: Path) -> None:
    text = tables(RESULTS)
    assert "60.0 % [57.9, 62.1; 50.0, 70.0]" in text and "none is as good" in text and "gap seed=1" in text
    path = write_results(RESULTS, tmp_path)
    assert (tmp_path / "results.md").read_text().startswith("# by hand")
    page = path.read_text()
    assert path.name == "results.html" and "plain" in page and not re.search(r"<script|https?://|url\(", page)
    assert all(
        (tmp_path / f"{name}.svg").stat().st_size > 4000 for name in ("front", "onset", "quality", "errors-heldout")
    )
    first = (tmp_path / "front.svg").read_bytes()
    write_results(RESULTS, tmp_path)
    assert (tmp_path / "front.svg").read_bytes() == first and path.read_text() == page
    write_results({**RESULTS, "charts": {"levels": ["plain", "ambient level=0.8"], "gone": ["gap"]}}, tmp_path)
    charted = (tmp_path / "results.md").read_text()
    assert (
        "## levels" in charted and "![](front-levels.svg)" in charted and "gone" not in charted
    )  # gap is not measured
    assert (tmp_path / "front-levels.svg").read_bytes() != first  # a level less
    assert tables({**RESULTS, "runs": []}) == "Nothing is measured yet.\n"
