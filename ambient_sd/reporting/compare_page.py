"""The page of `ambient-sd compare`: every mitigation on the same memorized prompts and the same noise, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ambient_sd.audit.shares import COPIES
from ambient_sd.reporting import pages
from ambient_sd.utils.estimate import Estimate

_ROWS = 16  # prompts whose images are shown
# Key, head, digits, factor, unit.
COLUMNS: tuple[tuple[str, str, int, float, str], ...] = (
    (COPIES, "copy rate", 1, 100, " %"),
    ("copied", "d1/d2 < 1/3", 1, 100, " %"),
    ("similarity", "similarity, 95th pct.", 3, 1, ""),
    ("alignment", "alignment x 1000", 2, 1, ""),
    ("hits", "5-way prompt accuracy", 0, 100, " %"),
    ("distance", "Fréchet distance", 1, 1, ""),
    ("seconds", "CPU s/image", 2, 1, ""),
)
MEMORY = "peak memory MB"


def row(found: Mapping[str, Any]) -> list[str]:
    """Return the cells of a mitigation: `COLUMNS`, then the memory."""
    peak = found.get("peak_memory_mb")
    cells = [
        Estimate.from_dict(found["figures"][key]).show(digits, factor, unit) for key, _, digits, factor, unit in COLUMNS
    ]
    return [*cells, "-" if peak is None else f"{peak:.0f}"]


def tables(result: Mapping[str, Any]) -> str:
    """Return both tables of every model as Markdown."""
    lines = []
    for model, found in result["models"].items():
        lines += [f"### {model}: detectors", "",
                  f"{found['memorized_prompts']} memorized prompts, {found['clear_prompts']} clear of copying, {found['between']} in between.",
                  "", "| detector | steps | generations | AUC | TPR@1%FPR |", "|---|---|---|---|---|"]  # fmt: skip
        lines += [f"| {' | '.join(map(str, cells))} |" for cells in map(_detector, found["detectors"])]
        lines += ["", f"### {model}: mitigations", "", "| | " + " | ".join(head for _, head, *_ in COLUMNS) + f" | {MEMORY} |",
                  "|---" * (len(COLUMNS) + 2) + "|"]  # fmt: skip
        lines += [f"| {name} | {' | '.join(row(one))} |" for name, one in found["mitigations"].items()]
        lines += (
            ["", *(f"- {name} left out: {why}" for name, why in found["left_out"].items())]
            if "left_out" in found
            else []
        )
        lines.append("")
    return "\n".join(lines)


def _detector(one: Mapping[str, Any]) -> list[object]:
    return [
        one["detector"],
        one["steps"],
        one["generations"],
        *(Estimate.from_dict(figure).show() for figure in one["figures"]),
    ]


def write(
    path: Path, result: Mapping[str, Any], originals: Sequence[Image.Image], shown: Mapping[str, Mapping[str, Sequence[Image.Image]]]
) -> Path:  # fmt: skip
    """Write the page.

    Args:
        path: of the page.
        result: what `comparison.json` holds.
        originals: the training image of each mitigated prompt.
        shown: by model and mitigation one image for each of these prompts.
    """
    return pages.write(path, "compare.html.j2", **_context(result, originals, shown))


def _context(
    result: Mapping[str, Any], originals: Sequence[Image.Image], shown: Mapping[str, Mapping[str, Sequence[Image.Image]]]
) -> dict[str, Any]:  # fmt: skip
    prompts = result["mitigated_prompts"][:_ROWS]
    models = []
    for model, found in result["models"].items():
        names = list(shown[model])
        models.append({
            "name": model,
            "said": f"{found['memorized_prompts']} of {result['prompts']} prompts are memorized; each row below is one of them.",
            "names": names,
            "strips": [(prompt, [originals[i], *(shown[model][name][i] for name in names)]) for i, prompt in enumerate(prompts)],
            "mitigations": pages.Table(["mitigation", *(head for _, head, *_ in COLUMNS), MEMORY],
                                       [(name, *row(one)) for name, one in found["mitigations"].items()]),
            "rules": [(name, one["rule"]) for name, one in found["mitigations"].items()]
            + [(name, f"left out: {why}") for name, why in found.get("left_out", {}).items()],
            "detectors": pages.Table(["detector", "steps", "images a prompt", "AUC", "TPR@1%FPR"], list(map(_detector, found["detectors"]))),
        })  # fmt: skip
    best = _best(result)
    return {
        "title": "Mitigations side by side", "answer": _answer(result, best), "models": models,
        "lead": "The same memorized prompts and the same start noise in every column.", "rule": result.get("rule", ""),
        "terms": pages.terms("copy rate", "d1/d2", "similarity", "alignment", "5-way prompt accuracy", "Fréchet distance (FD)", "CPU s/image",
                             "interval"),
        "detector_terms": pages.terms("AUC", "TPR@1%FPR"), "command": result["command"],
        "made": {name: value for name, value in result["settings"].items() if value not in (None, [], ())},
        "next": [pages.Next("Sample a prompt of your own with a mitigation; MODEL is the folder of the model, POLICY as in the rules above:",
                            pages.command("ambient-sd", "sample", "MODEL", "--prompt", "A PROMPT", "--policy", "POLICY", "--out", "mitigated"))],
    }  # fmt: skip


def _best(result: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first model and its mitigation of the fewest copies, if there is another than none."""
    for model, found in result["models"].items():
        rates = {name: one["figures"][COPIES]["value"] for name, one in found["mitigations"].items() if name != "none"}
        if rates:
            return model, min(rates, key=lambda name: rates[name])
    return None


def _answer(result: Mapping[str, Any], best: tuple[str, str] | None) -> str:
    if best is None:
        return f"{len(result['models'])} models were compared, without a mitigation."
    model, name = best
    rows = result["models"][model]["mitigations"]
    rate = {kept: f"{100 * rows[kept]['figures'][COPIES]['value']:.0f} %" for kept in (name, "none") if kept in rows}
    said = f"On {model}, {name} leaves the fewest copies: {rate[name]} of the images of memorized prompts"
    return said + (f", against {rate['none']} without a mitigation." if "none" in rate else ".")
