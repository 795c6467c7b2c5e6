"""Tables, charts and the page of a study, from its results.json alone: one can go on with the study, and write them again.

Copies are those of `ambient_sd.audit.decision` where every point has them, by one rule; else d1 / d2 < 1/3, which the published studies have. The
heads say which. What is compared, and how, is in `experiments.points`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ambient_sd.audit.shares import COPIES
from ambient_sd.reporting import pages
from ambient_sd.reporting.charts import PALETTE, SERIES, Line, Mark, chart, standalone
from ambient_sd.reporting.sheets import data_uri
from ambient_sd.utils.files import atomic_write
from experiments import contest
from experiments.points import (
    BASELINE,
    HIGH,
    PUBLISHED,
    Point,
    at_distance,
    at_equal_quality,
    at_least_error,
    best,
    front,
    high_error,
    points,
    share,
)
from experiments.style import NEW

_RAMPS = ("viridis", "plasma", "cividis")


def sections(results: Mapping[str, Any]) -> list[pages.Section]:
    """Return the tables with what must be said of them."""
    found = points(results)
    if not found:
        return []
    labels = list(dict.fromkeys(p.label for p in found))
    if is_style(results):
        return [*contest.sections(results), _stopped(found, labels)]
    decided = found[0].measure == COPIES
    return [
        _at_the_end(results, found, labels, decided),
        *([_at_best(found, labels)] if BASELINE in labels else []),
        *([_along_the_baseline(found, labels)] if BASELINE in labels and len(labels) > 1 else []),
        _stopped(found, labels),
        _along_training(found, labels, results["missing"]),
    ]


def tables(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    parts = sections(results)
    if not parts:
        return "Nothing is measured yet.\n"
    lines = []
    for part in parts:
        lines += [f"### {part.title}", ""]
        for text in part.text:
            lines += [text, ""]
        for table in part.tables:
            lines += [f"**{table.caption}**", ""] if table.caption else []
            lines += [_line(table.head), "|---" * len(table.head) + "|", *map(_line, table.rows), ""]
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _last(found: Sequence[Point], label: str) -> Point:
    return max((p for p in found if p.label == label), key=lambda p: p.step)


def _word(decided: bool) -> str:
    return "copy rate" if decided else "d1/d2 < 1/3"


def _at_the_end(
    results: Mapping[str, Any], found: Sequence[Point], labels: Sequence[str], decided: bool
) -> pages.Section:
    head = ["copy rate", "d1/d2 < 1/3"] if decided else ["d1/d2 < 1/3"]
    rows = []
    for label in labels:
        p = _last(found, label)
        seeds = sorted({run["seed"] for run in results["runs"] if run["label"] == label})
        both = [p.copied, p.figures[PUBLISHED]] if decided else [p.copied]
        rows.append([
            label, ", ".join(map(str, seeds)), p.step, p.copied.n, *map(share, both), share(p.figures["copied-coarsely"]), _recoloured(p),
            p.figures["ratio"].show(2), p.distance.show(1), p.figures["kid"].show(1, 1000),
        ])  # fmt: skip
    text = [
        f"A perfect model's distance at this n, half of the held-out images against the other: {found[0].figures['distance floor'].show(1)}."
    ]
    if decided:
        text = [
            "Copies: by the definition of the audit, held-out images as the null. The next three columns, and the median: by distances.",
            *text,
        ]
    columns = [
        "run",
        "seeds",
        "step",
        "n",
        *head,
        "at 16 px",
        "edge-based",
        "median d1/d2",
        "Fréchet distance",
        "KID x 1000",
    ]
    used = (
        *(["copy rate"] if decided else []),
        "d1/d2",
        "edge-based copy rate",
        "Fréchet distance (FD)",
        "Kernel distance (KID)",
        "interval",
    )
    return pages.Section("At the last step", text, tables=[pages.Table(columns, rows)], terms=pages.terms(*used))


def _at_best(found: Sequence[Point], labels: Sequence[str]) -> pages.Section:
    limit = best(found, BASELINE)
    rows = []
    for label in labels:
        top, equal = best(found, label), at_equal_quality(found, label)
        there = (
            ["none is as good", ""]
            if equal is None
            else [f"{share(equal.copied)} ({equal.step})", equal.distance.show(1)]
        )
        rows.append([label, f"{top.distance.show(1)} ({top.step})", share(top.copied), *there])
    return pages.Section(
        "Its best quality, and at equal quality",
        [f"Equal quality: distance at most {limit.distance.high:.1f}, the upper end of the interval of {BASELINE}'s best (step {limit.step})."],
        tables=[pages.Table(["run", "best distance (step)", f"{_word(limit.measure == COPIES)} there", "fewest copies at equal quality (step)",
                             "distance there"], rows)],
    )  # fmt: skip


def _along_the_baseline(found: Sequence[Point], labels: Sequence[str]) -> pages.Section:
    line = [p for p in found if p.label == BASELINE]
    rows = []
    for label in labels:
        reached = [at_distance(found, label, p.distance.value) for p in line]
        rows.append([label, *("" if there is None else share(there) for there in reached)])
    return pages.Section(
        f"Copies where a run first is as good as {BASELINE} at its steps",
        ["The copy rate by linear interpolation between a run's steps; an empty cell: it never is as good."],
        tables=[pages.Table(["run", *(f"{p.distance.value:.1f} (step {p.step})" for p in line)], rows)],
    )


def _stopped(found: Sequence[Point], labels: Sequence[str]) -> pages.Section:
    rows = []
    for label in labels:
        stop, end = at_least_error(found, label), _last(found, label)
        errors = [f"{high_error(stop, name):.3f} ({high_error(end, name):.3f})" for name in ("heldout", "training")]
        rows.append([label, stop.step, *errors, share(stop.copied), stop.distance.show(1)])
    return pages.Section(
        "Stopped at the least error on held-out images",
        [f"Mean error at noise levels from {HIGH} on, at that step and at the last; training images beside."],
        tables=[pages.Table(["run", "step", "held-out error (last)", "training error (last)", _word(found[0].measure == COPIES),
                             "Fréchet distance"], rows)],
    )  # fmt: skip


def _along_training(found: Sequence[Point], labels: Sequence[str], missing: Sequence[str]) -> pages.Section:
    steps = sorted({p.step for p in found})
    at = {(p.label, p.step): f"{100 * p.copied.value:.1f} %, {p.distance.value:.1f}" for p in found}
    text = ["The copy rate, then the Fréchet distance."]
    if missing:
        text.append(f"Not whole yet: {', '.join(missing)}.")
    return pages.Section(
        "Along training", text, tables=[pages.Table(["run", *map(str, steps)], [[label, *(at.get((label, s), "") for s in steps)] for label in labels])]
    )  # fmt: skip


def _recoloured(p: Point) -> str:
    """Write the edge-based copy rate, which not every published study has."""
    return share(p.figures["copied-recoloured"]) if "copied-recoloured" in p.figures else ""


def write_results(results: Mapping[str, Any], out: Path) -> Path:
    """Write OUT/results.html, the same tables as OUT/results.md, and every chart as a file; return the page."""
    best_run = _best_run(results)
    said = f"**{contest.sentence(points(results), contest.alone(results))}**\n\n" if is_style(results) else ""
    text = f"# {results['study']}\n\n{said}{tables(results)}"
    parts = sections(results)
    shown: list[pages.Section] = []
    for name, plots in draw_charts(results).items():
        sheets = [(out / chart_file("samples", name), "The same prompts in every run",
                   "Above what a run draws, below the training image that explains it best; framed: copies."),
                  (out / chart_file(f"samples{NEW}", name), "Captions that were not trained",
                   "Above what a run draws, below the real image of the caption; framed: copies of a training image.")]  # fmt: skip
        text += f"\n## {name}\n\n" if name else "\n"
        for kind, one in plots.items():
            atomic_write(out / chart_file(kind, name, "svg"), standalone(one.svg))
            text += f"![]({chart_file(kind, name, 'svg')})\n"
        pictures = []
        for sheet, title, note in sheets:
            if not sheet.exists():
                continue
            text += f"![]({sheet.name})\n"
            with Image.open(sheet) as image:
                pictures.append(pages.Picture(title, data_uri(image, 4000), note))
        shown.append(pages.Section(name or "Quality against copies", [], pictures, list(plots.values())))
    atomic_write(out / "results.md", text)
    return pages.write_article(
        out / "results.html", str(results["study"]), _answer(results, best_run), [*shown, *parts],
        lead="Each run is measured as it trains: how much it copies, and how far its images are from real ones.",
        next=_next(results, best_run), made={"command": "python -m experiments.sweep", "runs": len(results["runs"])},
    )  # fmt: skip


def _best_run(results: Mapping[str, Any]) -> Point | None:
    """Return the point that copies least at the baseline's best quality; without a baseline the one of the best quality."""
    found = points(results)
    if not found:
        return None
    labels = list(dict.fromkeys(p.label for p in found))
    if BASELINE not in labels:
        return min(found, key=lambda p: p.distance.value)
    equal = [p for label in labels if (p := at_equal_quality(found, label)) is not None]
    return min(equal, key=lambda p: (p.copied.value, p.distance.value))


def _answer(results: Mapping[str, Any], chosen: Point | None) -> str:
    if chosen is None:
        return "Nothing is measured yet."
    found = points(results)
    if is_style(results):
        return contest.sentence(found, contest.alone(results))
    rate, copies = (
        f"{100 * chosen.copied.value:.1f} %",
        "are copies" if chosen.measure == COPIES else "have d1/d2 below 1/3",
    )
    if all(p.label != BASELINE for p in found):
        return f"The best quality has {chosen.label} at step {chosen.step}; {rate} of its images {copies}."
    if chosen.label == BASELINE:
        return f"No run copies less than {BASELINE} at the best quality of {BASELINE}: {rate} of its images {copies}."
    plain = best(found, BASELINE)
    return (
        f"At the quality of {BASELINE}'s best, {chosen.label} copies least: {rate} of its images {copies} (step {chosen.step}), "
        f"against {100 * plain.copied.value:.1f} % of {BASELINE}'s."
    )


def _next(results: Mapping[str, Any], chosen: Point | None) -> list[pages.Next]:
    if chosen is None:
        return []
    differs = next((run.get("differs", {}) for run in results["runs"] if run["label"] == chosen.label), {})
    words = [word for name, value in differs.items() if value not in (None, False)
             for word in ((f"--{name}",) if value is True else (f"--{name}", value))]  # fmt: skip
    line = pages.command("accelerate", "launch", "train_text_to_image_ambient.py", "--pretrained_model_name_or_path", "MODEL", "--train_data_dir",
                         "IMAGES", *words, "--max_train_steps", chosen.step, "--output_dir", "my-model")  # fmt: skip
    return [pages.Next(f"Train with the settings of {chosen.label} on images of your own:", line)]


def chart_file(kind: str, chart: str, ending: str = "png") -> str:
    """Return the name of a chart's file in OUT; a plan without charts has one of no name."""
    return f"{kind}-{chart}.{ending}" if chart else f"{kind}.{ending}"


def draw_charts(results: Mapping[str, Any]) -> dict[str, dict[str, pages.Chart]]:
    """Draw for each chart of the plan the Pareto plane, the onset along training, and the errors by noise level.

    Returns:
        By chart's name (empty where the plan names none) and kind: front, onset, quality, errors-training, errors-heldout.
    """
    found = points(results)
    measured = list(dict.fromkeys(p.label for p in found))
    wanted = dict(results.get("charts") or {"": measured})
    if results.get("charts") and "apart" in results:
        wanted["apart"] = [BASELINE, *(run["label"] for run in results["apart"])]
    named = {name: [label for label in measured if label in labels] for name, labels in wanted.items()}
    if is_style(results):
        base = contest.alone(results)
        looks = {name: {label: _style(label, labels) for label in labels} for name, labels in named.items() if labels}
        return {name: contest.curves([p for p in found if p.label in look], base, look) for name, look in looks.items()}
    return {name: _draw([p for p in found if p.label in labels], labels) for name, labels in named.items() if labels}


def is_style(results: Mapping[str, Any]) -> bool:
    """Tell whether every measured step is that of a study of a style."""
    steps = [point for run in [*results["runs"], *results.get("apart", [])] for point in run["points"]]
    return bool(steps) and all("style" in step["figures"] for step in steps)


def _draw(found: Sequence[Point], labels: Sequence[str]) -> dict[str, pages.Chart]:
    copies = "copy rate, %" if found[0].measure == COPIES else "images with d1/d2 < 1/3, %"
    lines = {label: [p for p in found if p.label == label] for label in labels}
    style: dict[str, dict[str, Any]] = {label: _style(label, labels) for label in labels}
    rate: Callable[[Point], float] = lambda p: 100 * p.copied.value  # noqa: E731
    edge = front(found)
    plane = [
        Line(
            "no run is better in both",
            [rate(p) for p in edge],
            [p.distance.value for p in edge],
            colour=PALETTE["line"],
        )
    ]
    for label, line in lines.items():
        last = line[-1]
        ends = ((100 * last.copied.low, 100 * last.copied.high), (last.distance.low, last.distance.high))
        plane.append(
            Line(label, [rate(p) for p in line], [p.distance.value for p in line], bars=[ends], **style[label])
        )
    marks = (
        [Mark("equal quality: below", best(found, BASELINE).distance.high, upright=False)] if BASELINE in labels else []
    )
    errors = {
        name: [Line(label, line[-1].errors[name]["level"], line[-1].errors[name]["mean"], **{**style[label], "marker": ""})
               for label, line in lines.items()]
        for name in ("training", "heldout")
    }  # fmt: skip

    def along(value: Callable[[Point], float]) -> list[Line]:
        return [
            Line(label, [p.step for p in line], [value(p) for p in line], **style[label])
            for label, line in lines.items()
        ]

    distance = "Fréchet distance"
    charts = {
        "front": ("Quality against copies, along training", "interval at the last step; down and to the left is better",
                  {"lines": plane, "x_label": copies, "y_label": distance, "x_scale": "symlog", "marks": marks, "height": 4.2, "from_zero": False}),
        "onset": ("Copies along training", "", {"lines": along(rate), "x_label": "step", "y_label": copies, "x_scale": "linear"}),
        "quality": ("Quality along training", "less is better",
                    {"lines": along(lambda p: p.distance.value), "x_label": "step", "y_label": distance, "x_scale": "linear", "from_zero": False}),
    }  # fmt: skip
    for name, words in (("training", "training images"), ("heldout", "held-out images")):
        charts[f"errors-{name}"] = (f"Error of denoising, {words}", "at the last step, per dimension",
                                    {"lines": errors[name], "x_label": "noise level s", "y_label": "error", "y_scale": "log"})  # fmt: skip
    return {
        kind: pages.Chart(title, chart(title, options.pop("lines"), **options), note)
        for kind, (title, note, options) in charts.items()
    }


def _style(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """Levels of one objective go from light to dark; the baseline has the colour of text; others have colours of their own."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if label == BASELINE:
        return {"colour": PALETTE["ink"], "marker": "o"}
    swept = [other for other in labels if "level=" in other]
    if label in swept:
        kinds = list(dict.fromkeys(other.partition(" level=")[0] for other in swept))
        kind = kinds.index(label.partition(" level=")[0])
        alike = [other for other in swept if other.partition(" level=")[0] == kinds[kind]]
        place = alike.index(label) / (len(alike) - 1) if len(alike) > 1 else 0.5
        return {
            "colour": to_hex(colormaps[_RAMPS[kind % len(_RAMPS)]](0.25 + 0.6 * (1 - place))),
            "marker": "os"[kind % 2],
        }
    others = [other for other in labels if other not in swept and other != BASELINE]
    return {"colour": SERIES[others.index(label) % len(SERIES)], "marker": "s", "dashed": True}
