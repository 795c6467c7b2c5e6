"""The page of an audit or a demo: what was found, the generated images beside their originals, the figures, the method.

Images in the galleries are evidence to look at, not the measurement: "most copied first" shows the extremes, "same prompt" the first
sample of each prompt, chosen by position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ambient_sd.audit.metrics import Row, difference
from ambient_sd.audit.record import is_share
from ambient_sd.audit.shares import COPIES
from ambient_sd.reporting import charts, pages
from ambient_sd.reporting.report import Report, RunSection, Sample, find, label_of, ratio_histogram, show, span

_GROUPS = 200  # rows of the table of groups
_BACKGROUND = "training images, each left out"


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page to `path` (folders are made) and return it; an interrupted write leaves no half page."""
    return pages.write(path, "report.html.j2", **context(report))


def context(report: Report) -> dict[str, Any]:
    """Return what the template prints of a report."""
    finding = find(report)
    samples = ", ".join(
        f"{run.counted[1] if run.counted else len(run.samples)} samples from {run.name}" for run in report.runs
    )
    return {
        "title": report.title,
        "answer": finding.sentence,
        "lead": finding.detail,
        "about": f"{report.training_n} training images; {samples}.",
        "report": report,
        "together": _side_by_side(report),
        "galleries": [_gallery(run, report.shown) for run in report.runs],
        "charts": _charts(report),
        "columns": _columns(report),
        "rows": [_row(report, row) for row in report.runs[0].figures],
        "seeds": ", ".join(map(str, sorted({row.generated.seed for run in report.runs for row in run.figures}))),
        "gallery_terms": pages.terms("p", "residual", "d1/d2", *(["similarity"] if _similar(report) else []), *(["score"] if _scored(report) else [])),
        "figure_terms": _figure_terms(report),
        "tokens": [_tokens(one) for one in report.tokens],
        "token_terms": pages.terms("token attribution"),
        "groups": report.groups[:_GROUPS],
        "hidden_groups": max(0, len(report.groups) - _GROUPS),
        "rule": _copy_rule(report.copies),
        "next": report.next,
        "made": {},
    }  # fmt: skip


def _scored(report: Report) -> bool:
    return any(sample.score is not None for run in report.runs for sample in run.samples)


def _similar(report: Report) -> bool:
    return any(sample.similarity is not None or any("similarity" in fact for fact in sample.facts)
               for run in report.runs for sample in run.samples)  # fmt: skip


def _figure_terms(report: Report) -> list[tuple[str, str]]:
    kinds = {
        COPIES: ("copy", "copy rate"), "memorized": ("d1/d2",), "memorized-edges": ("edge-based copy rate",), "FD-": ("Fréchet distance (FD)",),
        "KID-": ("Kernel distance (KID)",), "MiFID": ("MiFID",), "density": ("density",), "coverage": ("coverage",), "CLIP": ("CLIP score",),
        "alignment": ("alignment",),
    }  # fmt: skip
    names = [row.name for row in report.runs[0].figures]
    used = [term for start, words in kinds.items() for term in words if any(name.startswith(start) for name in names)]
    return pages.terms(*used, "held-out", "interval")


# --- figures ---------------------------------------------------------------------------------------------------------


def _charts(report: Report) -> list[pages.Chart]:
    found = []
    for name, note in ((report.copies, "share of samples; less is better"), (report.quality, "to unseen real images; less is better")):  # fmt: skip
        if not any(row.name == name for row in report.runs[0].figures):
            continue
        first = report.runs[0].row(name)
        rows = [(run.name, f"run{i % 5}", run.row(name).generated) for i, run in enumerate(report.runs)]
        if first.heldout is not None:
            rows.append(("held-out real images" if is_share(name) else "real against real", "held", first.heldout))
        if len(report.runs) == 1 and first.background is not None:
            rows.append(("training images among themselves", "train", first.background))
        found.append(
            pages.Chart(label_of(name), charts.intervals(label_of(name), rows), f"{note}; bars: 95 % intervals")
        )
    shown = report.histograms
    if not shown:
        rows_of = [(run.name, f"run{i % 5}", [s.ratio for s in run.samples]) for i, run in enumerate(report.runs)]
        shown = [ratio_histogram([*rows_of, ("held-out", "held", list(report.heldout_ratios))])]
    for one in shown:
        if (svg := charts.histograms(one)) is not None:
            found.append(pages.Chart(one.title, svg, one.note))
    return found


def _alone(report: Report) -> bool:
    return len(report.runs) == 1 and any(row.excess is not None for row in report.runs[0].figures)


def _columns(report: Report) -> list[str]:
    base = report.runs[0]
    compared = ["above held-out"] if _alone(report) else [f"{run.name} − {base.name}" for run in report.runs[1:]]
    return [*(run.name for run in report.runs), *compared, "held-out", _BACKGROUND]


def _row(report: Report, row: Row) -> dict[str, Any]:
    """Return a measure's cells, one a column."""
    cells: list[dict[str, Any] | None] = []
    for i, run in enumerate(report.runs):
        one = run.row(row.name).generated
        cells.append({"tone": f"run{i % 5}", "value": show(one), "span": span(one), "detail": f"n = {one.n}"})
    gaps = (
        [row.excess]
        if _alone(report)
        else [difference(run.row(row.name).generated, row.generated) for run in report.runs[1:]]
    )
    for gap in gaps:
        cells.append(
            None if gap is None else {"value": show(gap, signed=True), "span": span(gap), "detail": gap.detail}
        )
    for real in (row.heldout, row.background):
        cells.append(None if real is None else {"value": show(real), "span": span(real), "detail": f"n = {real.n}"})
    return {
        "name": label_of(row.name), "detail": row.generated.detail, "key": row.name in (report.copies, report.quality), "cells": cells,
    }  # fmt: skip


# --- images ----------------------------------------------------------------------------------------------------------


def _gallery(run: RunSection, shown: int) -> dict[str, Any]:
    """Return a run's samples, the most copied first, and how many of them stay away."""
    ordered = sorted(run.samples, key=lambda sample: (sample.rank, sample.prompt))
    copies, total = run.counted or (sum(sample.memorized for sample in ordered), len(ordered))
    first, rest = ordered[:shown], ordered[shown : 3 * shown]
    return {
        "run": run, "first": first, "rest": rest, "copies": copies, "total": total, "hidden": total - len(first) - len(rest),
    }  # fmt: skip


def _side_by_side(report: Report) -> list[tuple[str, list[Sample]]]:
    """Return the first sample of each prompt that all runs share, in the order of the prompts."""
    if len(report.runs) < 2:
        return []
    by_run: list[dict[str, Sample]] = []
    for run in report.runs:
        found: dict[str, Sample] = {}
        for sample in run.samples:
            found.setdefault(sample.prompt, sample)
        by_run.append(found)
    return [(prompt, [found[prompt] for found in by_run]) for prompt in by_run[0] if all(prompt in f for f in by_run)]


def _tokens(one: Any) -> dict[str, Any]:
    """Return a prompt's tokens with their scores, and each score against the largest."""
    pairs: Sequence[tuple[str, float]] = list(zip(one.tokens, one.scores, strict=True))
    if one.padding is not None:
        pairs = [*pairs, ("(padding, mean)", one.padding)]
    most = max((score for _, score in pairs), default=0.0) or 1.0
    return {
        "prompt": one.prompt, "note": one.note,
        "tokens": [(text, f"{score:.3g}", f"{score / most:.2f}") for text, score in pairs],
    }  # fmt: skip


def _copy_rule(name: str) -> str:
    if name == COPIES:
        return "A copy: the first note says what counts as one. d1/d2, the published measure, stands beside it."
    if name.startswith("memorized"):
        return "A copy: the nearest training image is less than a third as far away as the second nearest."
    feature, _, bound = name.partition(" ")
    return f"A copy: the similarity to the nearest training image is {bound} ({feature})."
