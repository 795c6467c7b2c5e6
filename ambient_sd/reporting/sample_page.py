"""Contact sheet and page of `ambient-sd sample`: the images with their scores, and the token attribution of flagged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ambient_sd.reporting import pages
from ambient_sd.reporting.next_steps import model_words
from ambient_sd.reporting.sheets import contact_sheet, data_uri, png_bytes, thumbnail
from ambient_sd.utils.errors import one_line
from ambient_sd.utils.files import atomic_write

_SHOWN = 600  # images on sheet and page
_SIDE = 256
_STRONGEST = 3  # words whose scores stand on the page as numbers
Record = Mapping[str, Any]


def write(out: Path, records: Sequence[Record], num_images_per_prompt: int) -> None:
    """Write OUT/contact_sheet.png and OUT/index.html, of the first images where there are very many.

    Args:
        out: holds the images that the records name.
        records: of all images, prompt by prompt.
        num_images_per_prompt: images in a row of the sheet, or a part of one.
    """
    shown = records[:_SHOWN]
    small = []
    for record in shown:
        with Image.open(out / record["file"]) as image:
            small.append(thumbnail(image, _SIDE))
    per = num_images_per_prompt
    columns = per if 4 <= per <= 10 else max(1, 8 // per) * per if per < 4 else 8
    captions = [f"{one_line(r['prompt'], 120) or '(empty prompt)'}\n{caption(r)}".rstrip() for r in shown]
    atomic_write(out / "contact_sheet.png", png_bytes(contact_sheet(small, columns, captions)))
    atomic_write(out / "index.html", page(shown, small, len(records)))


def page(records: Sequence[Record], images: Sequence[Image.Image], total: int) -> str:
    """Return the page of these images, of `total` in all."""
    scored = any(record["curve"] is not None for record in records)
    explained = any(record.get("attribution") for record in records)
    threshold = any(record["threshold"] is not None for record in records)
    groups: list[dict[str, Any]] = []
    for record, image in zip(records, images, strict=True):
        if not groups or groups[-1]["index"] != record["prompt_index"]:
            groups.append({"index": record["prompt_index"], "prompt": record["prompt"], "tiles": []})
        groups[-1]["tiles"].append(
            {"uri": data_uri(image, _SIDE), "side": max(image.width, 128), "caption": caption(record), "flagged": bool(record["flagged"]),
             "words": _words(record.get("attribution")), "notes": _notes(record)}
        )  # fmt: skip
    title = f"{total} image{'s' * (total != 1)}" + (" under the guard" if scored else "")
    used = pages.terms(
        *(["score"] if scored else []),
        *(["threshold"] if threshold else []),
        *(["token attribution"] if explained else []),
    )
    return pages.render(
        "sample.html.j2", title=title, answer=_answer(records, total, scored, threshold), lead=_flags(records) if scored else "",
        hidden=total - len(records), groups=groups, single=all(len(group["tiles"]) == 1 for group in groups), terms=used,
        next=_next(records, scored, threshold), made=_made(records[0]),
    )  # fmt: skip


def caption(record: Record) -> str:
    """Return what stands below an image: its score, and whether it is flagged."""
    if record["score"] is None:
        return "" if record["curve"] is None else "no finite score"
    return f"score {record['score']:.4g}" + (", flagged" if record["flagged"] else "")


def _answer(records: Sequence[Record], total: int, scored: bool, threshold: bool) -> str:
    images = f"{total} image{'s' * (total != 1)}"
    if not scored:
        return f"{images}. No scores: the guard measures guidance, and these images are sampled without."
    flagged = sum(bool(record["flagged"]) for record in records)
    if flagged:
        be = "image is" if flagged == 1 else "images are"
        return f"{flagged} of {images} {'is' if flagged == 1 else 'are'} flagged: look whether the {be} copied from the training set."
    if threshold:
        return f"None of {images} is flagged."
    return f"{images}, each with its score. Nothing is flagged, for there is no threshold."


def _flags(records: Sequence[Record]) -> str:
    """Say from which score of what images are flagged."""
    compared = next((record for record in records if record["threshold"] is not None), None)
    if compared is None:
        why = next((record["undecided"] for record in records if record["undecided"]), None)
        return "No threshold: nothing is flagged." if why is None else f"Flagged or not: not known: {why}."
    of = "an unmitigated first step" if compared["policy"] else "a score"
    return f"An image is flagged from {of} of {compared['threshold']:.4g} on ({compared['threshold_origin']})."


def _made(first: Record) -> dict[str, str]:
    facts = {
        "model": first["model"] + (f" with {first['lora_weights']}" if first["lora_weights"] else ""),
        "sampler": f"{first['sampler']}, {first['num_inference_steps']} steps, guidance {first['guidance_scale']:g}, seed {first['run_seed']}",
        "policy": "none" if not first["policy"] else first["policy"] + (", on flagged images only" if first["when"] == "flagged" else ""),
    }  # fmt: skip
    if "base_above" in first:
        facts["base"] = f"Above noise level {first['base_above']:g} the base, {first['base'] or 'without the adapter'}"
    return facts


def _notes(record: Record) -> list[str]:
    notes = [Path(record["file"]).name]
    if record["mitigated"]:
        notes.append("changed by the policy")
    if record["first_score_before"] is not None and record["first_score_after"] is not None:
        notes.append(f"first step {record['first_score_before']:.3g} to {record['first_score_after']:.3g}")
    if record["policy"] and record["decision_score"] is not None:
        said = "flagged by the unmitigated first step:" if record["flagged"] else "unmitigated first step"
        notes.append(f"{said} {record['decision_score']:.4g}")
    if record["undecided"]:
        notes.append(f"flagged or not: not known: {one_line(record['undecided'], 160)}")
    if record.get("truncated"):
        notes.append("the end of the prompt was not read")
    if record["nsfw"]:
        notes.append("blanked by the model's safety checker")
    return notes


def _words(found: Record | None) -> dict[str, Any] | None:
    """Return an image's prompt word by word, each with its share of the largest score; and the largest as numbers."""
    if not found:
        return None
    words = list(zip(found["words"], found["word_scores"], strict=True))
    longest = max((score for _, score in words), default=0.0)
    numbers = [
        f"{one_line(word, 24) or '□'} {score:.3g}"
        for word, score in sorted(words, key=lambda pair: -pair[1])[:_STRONGEST]
    ]
    if found["padding_score"] is not None:
        numbers.append(f"padding {found['padding_score']:.3g}")
    return {
        "words": [(word, f"{score / longest if longest else 0:.2f}") for word, score in words],
        "numbers": ", ".join(numbers),
    }


def _next(records: Sequence[Record], scored: bool, threshold: bool) -> list[pages.Next]:
    first = records[0]
    if not scored or first["policy"]:
        return []
    words = model_words(first)
    flagged = next((record for record in records if record["flagged"]), None)
    if flagged is not None:
        return [pages.Next("Sample the flagged prompt again, around what would be copied:", pages.command(
            "ambient-sd", "sample", *words, "--prompt", flagged["prompt"], "--policy", "static_transition", "--out", "mitigated"))]  # fmt: skip
    if threshold:
        return [pages.Next("Measure how much the model copies its training images:", pages.command(
            "ambient-sd", "audit", words[0], "TRAINING_IMAGES", "--heldout", "OTHER_IMAGES", *words[1:], "--out", "audit"))]  # fmt: skip
    return [pages.Next("Find the score from which images are flagged, for this model and sampler:", pages.command(
        "ambient-sd", "calibrate", *words, "--ordinary", "prompts/validation.jsonl", "--out", "threshold"))]  # fmt: skip
