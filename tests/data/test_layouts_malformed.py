"""Whatever is wrong with a source ends in one line that names it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layout_folders import arrow, write
from PIL import Image

from ambient_sd.data.sources import load_rows
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.plan import check_asks
from ambient_sd.utils.errors import UserError


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
PAIR: dict[str, bytes | str] = {"a/1.png": PNG, "a/1.txt": "a cat"}
SUBSET = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n'


def listed(**columns: Any) -> dict[str, bytes | str]:
    return {"a.png": PNG, "metadata.jsonl": json.dumps({"file_name": "a.png", "text": "a cat", **columns})}


def yaml_of(dataset: str) -> dict[str, bytes | str]:
    return {**PAIR, "c.yaml": f"config: {{process: [{{datasets: [{dataset}]}}]}}"}


def concepts(**given: Any) -> dict[str, bytes | str]:
    return {**PAIR, "c.json": json.dumps([{"path": "a", **given}])}


def refused(read: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


# what is wrong: files, the source among them ("" is the folder), parts of the line
WRONG: dict[str, tuple[dict[str, bytes | str], str, tuple[str, ...]]] = {
    "no such folder": ({}, "gone", ("gone", "no file or folder")),
    "no images": ({"notes.md": "text"}, "", ("no images",)),
    "images of no kind that is read": ({"a.heic": b"x"}, "", ("a.heic", "not read")),
    # caption files
    "an image without caption": ({**PAIR, "a/2.png": PNG}, "a", ("1 of 2 images", "2.png", "no caption")),
    "two captions that differ": ({**PAIR, "a/1.caption": "a dog"}, "a", ("1.caption and 1.txt", "they differ")),
    "two images of one caption": ({**PAIR, "a/1.jpg": PNG}, "a", ("1.jpg and 1.png", "share the caption file")),
    "utf-16 without its mark": ({**PAIR, "a/1.txt": "a cat".encode("utf-16-le")}, "a", ("1.txt", "UTF-8")),
    "latin-1": ({**PAIR, "a/1.txt": "a café".encode("latin-1")}, "a", ("1.txt", "UTF-8")),
    # lists
    "two lists": ({**listed(), "metadata.csv": "file_name,text\na.png,a cat"}, "", ("metadata.jsonl and metadata.csv", "keep one")),
    "a line that is no JSON": ({**listed(), "metadata.jsonl": '{"file_name": '}, "", ("line 1", "no JSON")),
    "a line that is a list": ({**listed(), "metadata.jsonl": '["a.png"]'}, "", ("line 1", "names no image")),
    "a key twice": ({**listed(), "metadata.jsonl": '{"file_name": "a.png", "file_name": "b.png"}'}, "", ("line 1", "given twice")),
    "a nested caption": (listed(text={"en": "a cat"}), "", ("a.png", "must hold a text", "dict")),
    "a caption that is a number": (listed(text=7), "", ("a.png", "must hold a text", "int")),
    "a path out of the folder": (listed(file_name="../a.png"), "", ("../a.png", "inside")),
    "a list of its own further down": ({f"deep/{name}": data for name, data in listed().items()}, "", ("no metadata.jsonl", "deep")),
    "images that a list does not name": ({**listed(), "b.png": PNG}, "", ("b.png", "not in metadata.jsonl", "--unlisted")),
    # kohya
    "kohya folders of no repeats": ({"0_cat/1.png": PNG, "0_cat/1.txt": "a cat"}, "", ("no folder N_name",)),
    "wrong TOML": ({"c.toml": "[[datasets]"}, "c.toml", ("no TOML",)),
    "a path of Windows in double quotes": ({"c.toml": '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\mine"'}, "c.toml", ("no TOML", "single quotes")),
    "an empty TOML": ({"c.toml": ""}, "c.toml", ("no image_dir",)),
    "datasets that are no list": ({"c.toml": 'datasets = "a"'}, "c.toml", ("datasets is 'a'", "a list")),
    "a dataset that is no section": ({"c.toml": "datasets = [1]"}, "c.toml", ("datasets 1 is 1", "a table of settings")),
    "a subset without image_dir": ({"c.toml": "[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1"}, "c.toml", ("subsets 1 has no image_dir",)),
    "an image_dir that is absent": ({"c.toml": SUBSET}, "c.toml", ("the folder a", "does not exist")),
    "repeats of zero": ({**PAIR, "c.toml": f"{SUBSET}num_repeats = 0"}, "c.toml", ("num_repeats is 0", "at least 1")),
    "repeats below zero": ({**PAIR, "c.toml": f"{SUBSET}num_repeats = -2"}, "c.toml", ("num_repeats is -2",)),
    "repeats that are a text": ({**PAIR, "c.toml": f'{SUBSET}num_repeats = "3"'}, "c.toml", ("num_repeats is '3'", "an integer")),
    "a key that is not known": ({**PAIR, "c.toml": f"{SUBSET}shuffle_captions = true"}, "c.toml", ("subsets 1 has shuffle_captions", "not known")),
    "all held out": ({**PAIR, "c.toml": f"{SUBSET}validation_split = 1.0"}, "c.toml", ("validation_split is 1.0",)),
    "a metadata_file that is absent": ({**PAIR, "c.toml": f'{SUBSET}metadata_file = "m.json"'}, "c.toml", ("metadata_file m.json", "does not exist")),
    "a metadata_file of absent images": (
        {**PAIR, "c.toml": f'{SUBSET}metadata_file = "m.json"', "m.json": '{"9": {"caption": "x"}}'}, "c.toml", ("names 9", "does not exist")),
    # ai-toolkit
    "wrong YAML": ({"c.yaml": "config: ["}, "c.yaml", ("no YAML",)),
    "YAML with Python's tags": ({"c.yaml": "config: !!python/object/apply:os.getcwd []"}, "c.yaml", ("no YAML", "python")),
    "YAML that is a text": ({"c.yaml": "images"}, "c.yaml", ("'images'", "a table of settings")),
    "YAML without datasets": ({"c.yaml": "config: {process: [{type: sd_trainer}]}"}, "c.yaml", ("names no folder_path",)),
    "a dataset without folder_path": (yaml_of("{caption_ext: txt}"), "c.yaml", ("has no folder_path",)),
    "a setting of another type": (yaml_of("{folder_path: a, is_reg: 'no'}"), "c.yaml", ("is_reg is 'no'", "true or false")),
    # OneTrainer
    "wrong JSON": ({"c.json": "[{"}, "c.json", ("no JSON",)),
    "concepts that are no list": ({"c.json": '{"path": "a"}'}, "c.json", ("has no concepts", "a list")),
    "concepts that are texts": ({"c.json": '["a"]'}, "c.json", ("concepts 1 is 'a'",)),
    "no concept at all": ({"c.json": "[]"}, "c.json", ("no concept",)),
    "a concept without path": (concepts(path=None), "c.json", ("concepts 1 has no path",)),
    "SimpleTuner's list": ({"c.json": '[{"id": "a", "type": "local", "instance_data_dir": "a"}]'}, "c.json", ("has no path", "give the folder")),
    "a kind of concept that is not known": (concepts(type="OTHER"), "c.json", ("type is 'OTHER'", "STANDARD")),
    "a source of prompts that is not known": (concepts(text={"prompt_source": "tags"}), "c.json", ("prompt_source is 'tags'",)),
    "prompts that are absent": (concepts(text={"prompt_source": "concept", "prompt_path": "p.txt"}), "c.json", ("'p.txt'", "do not exist")),
    # tables
    "a pattern that matches nothing": ({}, "data/train-*.parquet", ("train-*.parquet", "there is no parquet file")),
    "a truncated parquet file": ({"d.parquet": b"PAR1\0\0"}, "d.parquet", ("d.parquet", "cannot be read as parquet")),
    "a file of no layout": ({"d.bin": b"x"}, "d.bin", ("d.bin", "cannot be read as parquet")),
    "a shard that is no tar file": ({"d.tar": b"x"}, "d.tar", ("d.tar",)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named_in_one_line(wrong: str, tmp_path: Path) -> None:
    files, source, parts = WRONG[wrong]
    write(tmp_path, files)
    refused(lambda: load_rows(tmp_path / source, local=True), *parts)


@pytest.mark.parametrize(
    ("files", "source"),
    [(PAIR, "a"), (listed(), ""), ({**PAIR, "c.toml": SUBSET}, "c.toml"), (yaml_of("{folder_path: a}"), "c.yaml"), (concepts(), "c.json")],
    ids=["texts", "list", "toml", "yaml", "json"],
)  # fmt: skip
def test_the_same_sources_without_the_fault_are_read(files: dict[str, bytes | str], source: str, tmp_path: Path) -> None:  # fmt: skip
    assert load_rows(write(tmp_path, files) / source).captions == ["a cat"]


def test_a_folder_in_a_captions_place_is_no_caption(tmp_path: Path) -> None:
    write(tmp_path, {"1.png": PNG, "2.png": PNG, "2.txt": "a cat", "1.txt/note.md": "text"})
    refused(lambda: load_rows(tmp_path), "1.png", "no caption")


def test_links_that_lead_nowhere_or_round_are_named(tmp_path: Path) -> None:
    write(tmp_path, PAIR)
    (tmp_path / "a" / "2.png").symlink_to("gone.png")
    refused(lambda: load_rows(tmp_path / "a"), "2.png", "link")
    (tmp_path / "a" / "2.png").unlink()
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a")
    refused(lambda: load_rows(tmp_path / "a"), "round", "link")
    (tmp_path / "a" / "round").unlink()
    assert len(load_rows(tmp_path / "a")) == 1


def test_a_named_layout_must_be_one_and_fit(tmp_path: Path) -> None:
    write(tmp_path, {**PAIR, "c.toml": SUBSET})
    refused(lambda: load_rows(tmp_path, layout="folders"), "layout is 'folders'", "kohya_toml")
    refused(lambda: load_rows(tmp_path / "a", layout="metadata"), "no metadata.jsonl")
    refused(lambda: load_rows(tmp_path / "a", layout="kohya"), "no folder N_name")
    refused(lambda: load_rows(tmp_path / "a", layout="class_folders"), "no folders of images")
    refused(lambda: load_rows(tmp_path / "a", layout="arrow"), "save_to_disk")
    refused(lambda: load_rows(tmp_path / "c.toml", layout="onetrainer"), "no JSON")


@pytest.mark.parametrize("layout", ["kohya_toml", "ai_toolkit", "onetrainer", "parquet"])
def test_a_folder_is_no_file_of_settings(layout: str, tmp_path: Path) -> None:
    write(tmp_path, PAIR)
    refused(lambda: load_rows(tmp_path / "a", layout=layout), str(tmp_path / "a"))


@pytest.mark.parametrize("layout", ["metadata", "caption_files", "class_folders", "images", "kohya", "arrow"])
def test_a_file_is_no_folder_of_images(layout: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG})
    refused(lambda: load_rows(tmp_path / "a.png", layout=layout), str(tmp_path / "a.png"))


def test_parquet_needs_its_columns_and_like_parts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [PNG], "text": ["a cat"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"text": ["a cat"]}), tmp_path / "2.parquet")
    refused(lambda: load_rows(tmp_path / "2.parquet"), "no column 'image'", "--image_column")
    refused(lambda: load_rows(tmp_path), "2.parquet has other columns than 1.parquet")
    pq.write_table(pa.table({"image": ["../a.png"], "text": ["a cat"]}), tmp_path / "2.parquet")
    refused(load_rows(tmp_path / "2.parquet").check, "row 0", "inside the folder")
    data = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(data[: len(data) // 2])
    refused(lambda: load_rows(tmp_path / "1.parquet"), "cannot be read as parquet")


def test_a_damaged_arrow_folder_is_named(tmp_path: Path) -> None:
    folder = arrow(tmp_path / "data", [("a.png", PNG, "a cat")])
    refused(lambda: load_rows(folder, caption_column="caption"), "no column 'caption'")
    (folder / "state.json").rename(folder / "kept.json")
    refused(lambda: load_rows(folder), "data-00000-of-00001.arrow", "archive")
    refused(lambda: load_rows(folder, layout="arrow"), "save_to_disk", "save it again")
    write(folder, {"state.json": "{"})
    refused(lambda: load_rows(folder), "save_to_disk", "save it again")
    (folder / "kept.json").rename(folder / "state.json")
    write(folder, {"data-00000-of-00001.arrow": b"cut"})
    refused(lambda: load_rows(folder), "save_to_disk", "save it again")


@pytest.mark.parametrize(
    ("files", "source", "ask", "flags"),
    [
        ({**PAIR, "c.toml": f"{SUBSET}shuffle_caption = true"}, "c.toml", "shuffle_caption = true", None),
        ({**PAIR, "c.toml": f"{SUBSET}color_aug = true"}, "c.toml", "color_aug = true", None),
        ({**PAIR, "c.toml": f"[general]\nresolution = 64\n{SUBSET}"}, "c.toml", "--resolution 64", {"resolution": 64}),
        ({**PAIR, "c.toml": f"{SUBSET}caption_dropout_rate = 0.2"}, "c.toml", "--caption_dropout 0.2", {"caption_dropout": 0.2}),
        ({**PAIR, "c.toml": f"{SUBSET}flip_aug = true"}, "c.toml", "flip_aug = true", {"random_flip": True}),
        (yaml_of("{folder_path: a, flip_x: true}"), "c.yaml", "--random_flip", {"random_flip": True}),
        (yaml_of("{folder_path: a, mask_path: masks}"), "c.yaml", "mask_path: masks", None),
        (yaml_of("{folder_path: a, resolution: [768, 1024]}"), "c.yaml", "resolution: [768, 1024]", {"resolution": 1024}),
        (concepts(text={"enable_tag_shuffling": True}), "c.json", "enable_tag_shuffling", None),
        (concepts(loss_weight=0.5), "c.json", "loss_weight 0.5", None),
        (concepts(balancing=0.5), "c.json", "balancing 0.5", None),
    ],
)  # fmt: skip
def test_what_a_file_asks_of_training_is_not_left_out(
    files: dict[str, bytes | str], source: str, ask: str, flags: dict[str, Any] | None, tmp_path: Path
) -> None:
    images = load_rows(write(tmp_path, files) / source)
    config = {"pretrained_model_name_or_path": "base", "train_data_dir": "mine"}
    refused(lambda: check_asks(TrainConfig(**config), images, fixed=False), ask)
    if flags is not None:
        check_asks(TrainConfig(**config, **flags), images, fixed=False)


@pytest.mark.parametrize("setting", ["flip_aug = true", "random_crop = true", "color_aug = true"])
def test_fresh_changes_are_refused_under_a_fixed_noise(setting: str, tmp_path: Path) -> None:
    images = load_rows(write(tmp_path, {**PAIR, "c.toml": f"{SUBSET}{setting}"}) / "c.toml")
    config = TrainConfig("base", train_data_dir="mine", random_flip=True)
    refused(lambda: check_asks(config, images, fixed=True), setting, "gives itself away")
    off = load_rows(write(tmp_path, {"c.toml": f"{SUBSET}{setting.replace('true', 'false')}"}) / "c.toml")
    check_asks(config, off, fixed=True)
