"""ai-toolkit's configuration (YAML or JSON): the folders in `config.process[].datasets[]`, with caption files, repeats and a trigger word.

Its other sections say how it would train, and are not read. A text beside an image is its whole caption; `[trigger]` in it becomes the
trigger word, which goes before captions that lack it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ambient_sd.data.layouts.caption_files import Row, dotted, read_folder, table_of
from ambient_sd.data.layouts.layout import (
    REGULARISATION,
    TRAINING,
    Ask,
    Layout,
    Request,
    Table,
    read_text,
    with_trigger,
)
from ambient_sd.data.layouts.tool_file import Section, ask_if, find_folder, prefixes, scalar
from ambient_sd.utils.errors import UserError

_NO_EFFECT = (
    "type", "bucket_tolerance", "cache_latents", "cache_latents_to_disk", "cache_text_embeddings", "cache_clip_vision_to_disk",
    "cache_tensors_to_disk", "cache_latents_num_workers", "load_image_when_caching_latents", "num_workers", "prefetch_factor",
    "keep_tokens", "guidance_type", "extra_values", "debug", "replay_transforms", "num_controls_from_same_folder", "full_size_control_images",
    "control_transparent_color", "invert_mask", "mask_min_value", "fps", "shrink_video_to_frames", "trim_auto_frame_count_tail",
    "diff_output_preservation", "diff_output_preservation_class", "random_triggers_max", "shuffle_augmentations", "do_i2v",
)  # fmt: skip
_FRESH: dict[str, tuple[type, str, tuple[Any, ...], str]] = {
    "random_crop": (bool, "center_crop", (False,), "set random_crop: false; without --center_crop each image is cropped at one random place"),
    "random_scale": (bool, "", (), "set random_scale: false"),
    "augments": (list, "", (), "take augments out, and change the files once instead"),
    "augmentations": (list, "", (), "take augmentations out, and change the files once instead"),
}  # fmt: skip
_NOT_DONE: dict[str, type] = {
    "shuffle_tokens": bool, "token_dropout_rate": float, "flip_y": bool, "random_triggers": list, "replacements": list, "controls": list,
    "use_short_captions": bool, "alpha_mask": bool, "mask_path": str, "inpaint_path": str, "control_path": str, "unconditional_path": str,
    "clip_image_path": str, "clip_image_from_same_folder": bool, "control_from_same_folder": bool, "standardize_images": bool,
    "control_path_1": str, "control_path_2": str, "control_path_3": str, "auto_frame_count": bool, "square_crop": bool, "prior_reg": bool,
}  # fmt: skip


class AiToolkit(Layout):
    """Read the folders that a configuration of ai-toolkit's names.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> _ = (folder / "a.txt").write_text("a photo of [trigger]")
        >>> text = "config: {process: [{trigger_word: p3r5on, datasets: [{folder_path: ., caption_ext: txt, num_repeats: 2}]}]}"
        >>> _ = (folder / "train.yaml").write_text(text)
        >>> table = AiToolkit().read(Request(str(folder / "train.yaml")))
        >>> table.rows[0]["text"], table.repeats
        ('a photo of p3r5on', [2])
    """

    name, what = "ai_toolkit", "ai-toolkit's configuration"

    def detects(self, request: Request) -> bool:
        return request.path.suffix.lower() in (".yaml", ".yml")

    def read(self, request: Request) -> Table:
        import yaml

        file = request.path
        try:
            content = json.loads(read_text(file)) if file.suffix.lower() == ".json" else yaml.safe_load(read_text(file))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file} is no YAML", rule=" ".join(str(error).split())) from None
        config = Section(Section(content, str(file)).take("config", dict, {}), f"{file}, config")
        asks: dict[str, Ask] = {}
        notes: list[str] = []
        left: dict[str, str] = {}
        found: list[tuple[Section, Path, str | None]] = []
        for process in config.sections("process"):
            word = process.take("trigger_word", str)
            for dataset in process.sections("datasets"):
                given = dataset.take("folder_path", str) or dataset.take("dataset_path", str)
                if given is None:
                    raise UserError(f"{dataset.where} has no folder_path", rule="a dataset names a folder")
                found.append(
                    (dataset, find_folder(given, file, dataset.where), dataset.take("trigger_word", str, word))
                )
        if not found:
            raise UserError(f"{file} names no folder_path", rule="it must stand in config.process[].datasets[]",
                            remedy="give ai-toolkit's own file, or --layout")  # fmt: skip
        rows: list[Row] = []
        for (dataset, folder, word), prefix in zip(found, prefixes([folder for _, folder, _ in found]), strict=True):
            rows += _read_dataset(dataset, folder, word, prefix, request, asks, notes, left)
        notes.insert(0, "of ai-toolkit's file the datasets alone are read")
        return table_of(request, rows, left=left, notes=list(dict.fromkeys(notes)), asks=list(asks.values()))


def _read_dataset(
    dataset: Section, folder: Path, word: str | None, prefix: str, request: Request, asks: dict[str, Ask], notes: list[str], left: dict[str, str]
) -> list[Row]:  # fmt: skip
    for name, (kind, setting, values, remedy) in _FRESH.items():
        given = dataset.take(name, kind)
        ask_if(asks, given, f"{name}: {scalar(given)}", setting, values, fresh=True, remedy=remedy)
    for name, kind in _NOT_DONE.items():
        given = dataset.take(name, kind)
        ask_if(asks, given, f"{name}: {scalar(given)}")
    if dataset.take("flip_x", bool, False):
        ask_if(asks, True, "flip_x: true", "random_flip", [True])
        notes.append(
            "flip_x trains each image and its mirror image; --random_flip mirrors half of the images, under ambient always the same "
            "half. Mirrored files beside the images give both, and share one noise"
        )
    dropout, batch = dataset.take("caption_dropout_rate", float), dataset.take("batch_size", int)
    ask_if(asks, dropout is not None, f"caption_dropout_rate: {dropout}", "caption_dropout", [dropout])
    ask_if(asks, batch, f"batch_size: {batch}", "train_batch_size", [batch])
    for name in ("network_weight", "loss_multiplier", "scale", "num_frames"):
        value = dataset.take(name, float, 1.0)
        ask_if(asks, value != 1, f"{name}: {value:g}")
    given = dataset.values.get("resolution")
    sizes = dataset.take("resolution", list if isinstance(given, list) else int)
    sizes = sizes if isinstance(sizes, list) else [sizes] if sizes else []
    ask_if(
        asks, sizes, f"resolution: {scalar(sizes if len(sizes) > 1 else sizes[:1] and sizes[0])}", "resolution", sizes
    )
    if len(sizes) > 1:
        notes.append(f"of the resolutions {sizes} the one of --resolution is trained")
    buckets = dataset.take("buckets", bool)
    ask_if(asks, buckets, "buckets: true", "aspect_ratio_buckets", ["auto"])
    if buckets is None:
        notes.append(
            "ai-toolkit keeps the shape of images unless told otherwise; --aspect_ratio_buckets auto does so here"
        )
    role = REGULARISATION if dataset.take("is_reg", bool, False) else TRAINING
    ending = dataset.take("caption_ext", str) or dataset.take("caption_type", str) or "txt"
    default, repeats = dataset.take("default_caption", str), dataset.whole("num_repeats")
    dataset.refuse_unknown(_NO_EFFECT)
    endings = () if request.caption_extension else (dotted(ending),)
    rows = read_folder(
        folder, request, endings=endings, fallback=default, prefix=prefix, role=role, repeats=repeats, left=left
    )

    def caption(text: Any) -> Any:
        text = default if text == "" and default is not None else text
        if not isinstance(text, str) or word is None:
            return text
        text = text.replace("[name]", word)
        return with_trigger(text, word) if role == TRAINING else text.replace("[trigger]", word)

    return [dataclasses.replace(row, caption=caption(row.caption)) for row in rows]
