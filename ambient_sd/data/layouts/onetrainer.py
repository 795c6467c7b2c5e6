"""OneTrainer's concepts (JSON): a list of folders, each with its kind, its source of prompts and how often an epoch holds its images.

Prompts come from the text beside an image ("sample"), from one file for all ("concept") or from the image's name ("filename"); several
lines are several captions, of which one is meant at a time (`--caption_mitigation mc`). Masks and condition images are not read.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ambient_sd.data.layouts.ai_toolkit import AiToolkit
from ambient_sd.data.layouts.caption_files import Row, read_folder, table_of
from ambient_sd.data.layouts.layout import HELDOUT, REGULARISATION, TRAINING, Ask, Layout, Request, Table, read_text
from ambient_sd.data.layouts.tool_file import Section, ask_if, find_folder, prefixes, read_json
from ambient_sd.utils.errors import UserError

_ROLES = {"STANDARD": TRAINING, "VALIDATION": HELDOUT, "PRIOR_PREDICTION": REGULARISATION}
_RANDOM = ("rotate", "brightness", "contrast", "saturation", "hue")
_NOT_DONE = (
    "enable_fixed_flip",
    *(f"enable_fixed_{name}" for name in _RANDOM),
    "enable_random_circular_mask_shrink",
    "enable_random_mask_rotate_crop",
)
_TEXT = ("enable_tag_shuffling", "tag_dropout_enable", "caps_randomize_enable")
_ENDINGS = ("-masklabel", "-condlabel")


class OneTrainer(Layout):
    """Read the folders that OneTrainer's concepts name.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a red apple.png").touch()
        >>> concepts = [{"path": str(folder), "balancing": 2.0, "text": {"prompt_source": "filename"}}]
        >>> _ = (folder / "concepts.json").write_text(json.dumps(concepts))
        >>> table = OneTrainer().read(Request(str(folder / "concepts.json")))
        >>> table.rows[0]["text"], table.repeats
        ('a red apple', [2])
    """

    name, what = "onetrainer", "OneTrainer's concepts"

    def detects(self, request: Request) -> bool:
        return request.path.suffix.lower() == ".json"

    def read(self, request: Request) -> Table:
        file = request.path
        content = read_json(file)
        if isinstance(content, dict) and isinstance(content.get("config"), dict) and not request.named:
            return AiToolkit().read(request)
        if isinstance(content, dict):  # a whole configuration
            config, content = content, content.get("concepts")
            if not content:  # its paths are relative to the file that has them
                file = _concepts_of(file, config)
                content, request = read_json(file), dataclasses.replace(request, source=str(file))
        top = Section({"concepts": content}, str(file))
        asks: dict[str, Ask] = {}
        notes: list[str] = []
        left: dict[str, str] = {}
        concepts = [concept for concept in top.sections("concepts") if concept.take("enabled", bool, True)]
        if not concepts:
            raise UserError(f"{file} has no concept that is enabled", rule="a concept names a folder of images")
        if nowhere := [concept.where for concept in concepts if not concept.take("path", str)]:
            raise UserError(f"{nowhere[0]} has no path", rule="a concept names a folder of images",
                            remedy="for another tool's file, give the folder of its images")  # fmt: skip
        folders = [find_folder(concept.take("path", str), file, concept.where) for concept in concepts]
        rows: list[Row] = []
        for concept, folder, prefix in zip(concepts, folders, prefixes(folders), strict=True):
            rows += _read_concept(concept, folder, prefix, request, asks, notes, left)
        return table_of(request, rows, left=left, notes=list(dict.fromkeys(notes)), asks=list(asks.values()))


def _concepts_of(file: Path, config: dict[str, Any]) -> Path:
    name = config.get("concept_file_name")
    if not isinstance(name, str):
        raise UserError(f"{file} has no concepts", rule="OneTrainer's file is a list of concepts, or names one in concept_file_name",
                        remedy="for another kind of file, give its folder")  # fmt: skip
    # The configuration lies in a sub-folder of the one that its paths are relative to.
    places = [file.parent / name, file.parent.parent / name, Path(name)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"{file} names the concepts {name}, which do not exist", remedy="give that file itself")
    return found


def _read_concept(
    concept: Section,
    folder: Path,
    prefix: str,
    request: Request,
    asks: dict[str, Ask],
    notes: list[str],
    left: dict[str, str],
) -> list[Row]:
    image = Section(concept.take("image", dict, {}), f"{concept.where}, image")
    text = Section(concept.take("text", dict, {}), f"{concept.where}, text")
    kind = concept.take("type", str, "VALIDATION" if concept.take("validation_concept", bool, False) else "STANDARD")
    if kind not in _ROLES:
        raise UserError(f"type is {kind!r} in {concept.where}", rule=f"it must be one of {', '.join(_ROLES)}")
    ask_if(asks, image.take("enable_random_flip", bool), "enable_random_flip", "random_flip", [True], fresh=True,
           remedy="switch enable_random_flip off and give --random_flip, which mirrors the same half of the images always")  # fmt: skip
    for name in _RANDOM:
        ask_if(asks, image.take(f"enable_random_{name}", bool), f"enable_random_{name}", fresh=True,
               remedy=f"switch enable_random_{name} off, and change the files once instead")  # fmt: skip
    for section, names in ((image, _NOT_DONE), (text, _TEXT)):
        for name in names:
            ask_if(asks, section.take(name, bool), name)
    if image.take("enable_resolution_override", bool, False):
        size = image.take("resolution_override", str, "")
        ask_if(
            asks,
            True,
            f"resolution_override {size}",
            "resolution" if size.isdecimal() else "",
            [int(size)] if size.isdecimal() else (),
        )
    if image.take("enable_crop_jitter", bool, True):
        notes.append(
            "crops are not jittered: without --center_crop one random place is taken (ambient: always the same)"
        )
    weight = concept.take("loss_weight", float, 1.0)
    ask_if(asks, weight != 1, f"loss_weight {weight:g}")
    source = text.take("prompt_source", str, "sample")
    if source not in ("sample", "concept", "filename"):
        raise UserError(
            f"prompt_source is {source!r} in {concept.where}", rule="it must be sample, concept or filename"
        )
    rows = read_folder(
        folder, request, endings=() if request.caption_extension else (".txt",), deep=concept.take("include_subdirectories", bool, False),
        prefix=prefix, role=_ROLES[kind], left=left,
    )  # fmt: skip
    rows = [row for row in rows if not os.path.splitext(row.name)[0].endswith(_ENDINGS)]
    shared = _prompts(text, request) if source == "concept" else None
    captions = {
        "sample": lambda row: _lines(row.caption),
        "concept": lambda row: shared,
        "filename": lambda row: Path(row.name).stem,
    }
    amount = concept.take("balancing", float, concept.take("repeats", float, 1.0))
    strategy = concept.take("balancing_strategy", str, "REPEATS")
    repeats = amount / len(rows) if strategy == "SAMPLES" and rows else amount
    if repeats != int(repeats) or repeats < 1:
        ask_if(asks, True, f"balancing {amount:g} {strategy}", remedy=f"{len(rows)} images are repeated whole times")
        repeats = 1
    return [dataclasses.replace(row, caption=captions[source](row), repeats=int(repeats)) for row in rows]


def _prompts(text: Section, request: Request) -> str | list[str] | None:
    given = text.take("prompt_path", str, "")
    path = next((p for p in (request.path.parent / given, Path(given)) if p.is_file()), None)
    if path is None:
        raise UserError(f"{text.where} names the prompts {given!r}, which do not exist", remedy="correct prompt_path")
    return _lines(read_text(path))


def _lines(caption: str | list[str] | None) -> str | list[str] | None:
    if not isinstance(caption, str):
        return caption
    lines = [line.strip() for line in caption.split("\n") if line.strip()]
    return lines if len(lines) > 1 else "".join(lines)
