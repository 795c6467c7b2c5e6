"""Every layout is read as its tool means it: captions, repeats, roles; the same images give the same dataset and training."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_folders import (
    WRITERS,
    Row,
    arrow,
    caption_files,
    images,
    kohya,
    metadata_jsonl,
    parquet_parts,
    rows_of,
    write,
)

from ambient_sd.data.layouts import LAYOUTS
from ambient_sd.data.layouts.layout import Request
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.data.stream import SampleStream
from ambient_sd.families.lora import WEIGHTS_NAME
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils.errors import UserError


@pytest.fixture(scope="session")
def rows(tiny_images: Path) -> list[Row]:
    return rows_of(tiny_images)


def refused(*parts: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(**options)
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def read(source: Path, **options: Any) -> dict[str, tuple[str, int]]:
    """Caption and repeats of each row, by its name."""
    found = load_rows(source, **options)
    return dict(zip(found.names, zip(found.captions, found.repeats, strict=True), strict=True))


# --- all layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_dataset(layout: str, rows: list[Row], tiny_images: Path, tmp_path: Path) -> None:
    expected = load_rows(tiny_images).fingerprint()
    source = WRITERS[layout](tmp_path / "same", rows)
    assert load_rows(source).fingerprint() == expected
    assert load_rows(source, layout=layout.split(maxsplit=1)[0]).fingerprint() == expected, "named, and not detected"
    name, data, _ = rows[0]
    other = WRITERS[layout](tmp_path / "other", [(name, data, "another"), *rows[1:]])
    assert load_rows(other).fingerprint() != expected


@pytest.mark.parametrize("layout", WRITERS)
def test_each_layout_is_told_from_its_files(layout: str, rows: list[Row], tmp_path: Path) -> None:
    request = Request(str(WRITERS[layout](tmp_path / "source", rows[:2])))
    first = next(one for one in LAYOUTS if one.detects(request))
    assert first.name == layout.split(maxsplit=1)[0]


def first_step(base: Path, source: Path, out: Path) -> tuple[list[float], list[Any], bytes]:
    """What one step of a training sees and comes to: its loss, its batch, and the weights after it."""
    seen: list[Any] = []
    config = TrainConfig(
        str(base), train_data_dir=str(source), resolution=32, train_batch_size=8, max_train_steps=1, report_to="none",
        output_dir=str(out), lora=True,
    )  # fmt: skip
    losses = run(config, progress=False, on_batch=lambda b: seen.append((b.keys, b.captions, b.x0, b.eps_n))).losses
    return losses, seen, (out / WEIGHTS_NAME).read_bytes()


@pytest.fixture(scope="module")
def expected_step(tiny_base: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return first_step(tiny_base, tiny_images, tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("layout", WRITERS)
def test_the_first_step_is_equal_in_every_layout(
    layout: str, rows: list[Row], tiny_base: Path, tmp_path: Path, expected_step: Any
) -> None:
    losses, (batch,), weights = first_step(tiny_base, WRITERS[layout](tmp_path / "same", rows), tmp_path / "out")
    expected, (reference,), trained = expected_step
    assert losses == expected and batch[:2] == reference[:2] and weights == trained
    assert all(torch.equal(mine, its) for mine, its in zip(batch[2:], reference[2:], strict=True))


def test_another_caption_gives_another_first_loss(
    rows: list[Row], tiny_base: Path, tmp_path: Path, expected_step: Any
) -> None:
    (name, data, _), *rest = rows
    source = caption_files(tmp_path / "other", [(name, data, "another"), *rest])
    assert first_step(tiny_base, source, tmp_path / "out")[0] != expected_step[0]


def test_an_epoch_holds_each_image_as_often_as_repeated() -> None:
    stream = SampleStream(3, seed=0, repeats=[3, 1, 2])
    assert stream.count == 6
    epochs = [[stream.image(6 * epoch + i) for i in range(6)] for epoch in range(2)]
    assert [Counter(epoch) for epoch in epochs] == [Counter({0: 3, 1: 1, 2: 2})] * 2
    assert epochs[0] != epochs[1]


def test_repeats_of_one_leave_the_order() -> None:
    plain, ones, twos = (SampleStream(5, seed=3, repeats=r) for r in ((), [1] * 5, [2] * 5))
    order = [[stream.image(p) for p in range(15)] for stream in (plain, ones, twos)]
    assert order[0] == order[1] != order[2]


# --- kohya ----------------------------------------------------------------------------------------------------------


def test_kohya_folders_carry_repeats_class_and_regularisation(rows: list[Row], tmp_path: Path) -> None:
    caption_files(tmp_path / "img" / "10_sks dog", rows[:2])
    images(tmp_path / "img" / "10_sks dog", rows[2:3])
    images(tmp_path / "img" / "2_sks cat", rows[3:4])
    images(tmp_path / "reg" / "1_dog", rows[4:6])
    write(tmp_path / "img", {"10_sks dog/000.txt": "first line\nsecond line"})
    found = load_rows(tmp_path)
    assert list(zip(found.names, found.captions, found.repeats, strict=True)) == [
        ("img/10_sks dog/000.png", "first line", 10), ("img/10_sks dog/001.png", rows[1][2], 10), ("img/10_sks dog/002.png", "sks dog", 10),
        ("img/2_sks cat/003.png", "sks cat", 2),
    ]  # fmt: skip
    assert found.regularisation is not None
    assert found.regularisation.captions == ["dog", "dog"]
    assert any("1 caption files have several lines" in note for note in found.notes)
    alone = load_rows(tmp_path / "img")
    assert alone.regularisation is None
    assert any("reg beside it is not read" in note for note in alone.notes)


def test_kohya_leaves_no_image_beside_its_folders(rows: list[Row], tmp_path: Path) -> None:
    kohya(tmp_path, rows[:2])
    write(tmp_path / "img" / "1_sks thing", {"deeper/a.png": rows[2][1]})
    refused("deeper/a.png", "sub-folder", source=tmp_path)
    assert len(load_rows(tmp_path, unlisted="ignore")) == 2


def test_a_year_is_no_number_of_repeats(rows: list[Row], tmp_path: Path) -> None:
    images(tmp_path / "2020_summer", rows[:1])
    refused("no metadata.jsonl", source=tmp_path)
    assert read(tmp_path, layout="kohya") == {"2020_summer/000.png": ("summer", 2020)}


def toml(root: Path, *subsets: str, general: str = "", dataset: str = "") -> Path:
    parts = (f"[general]\n{general}", f"[[datasets]]\n{dataset}", *(f"[[datasets.subsets]]\n{one}" for one in subsets))
    return write(root, {"data.toml": "\n".join(parts) + "\n"}) / "data.toml"


def test_kohya_toml_reads_subsets_by_their_own_values_first(rows: list[Row], tmp_path: Path) -> None:
    caption_files(tmp_path / "a", rows[:1])
    caption_files(tmp_path / "b", rows[1:2], "cap")
    images(tmp_path / "c", rows[2:3])
    images(tmp_path / "elsewhere" / "reg", rows[3:4])
    path = toml(
        tmp_path / "config",
        'image_dir = "../a"\ncaption_prefix = "oil,"\ncaption_suffix = "4k"',
        f"image_dir = '{tmp_path / 'b'}'\ncaption_extension = '.cap'\nnum_repeats = 7",
        f"image_dir = '{tmp_path / 'c'}'\nclass_tokens = 'sks dog'",
        f"image_dir = '{tmp_path / 'elsewhere' / 'reg'}'\nclass_tokens = 'dog'\nis_reg = true",
        general="num_repeats = 2\nkeep_tokens = 1", dataset="num_repeats = 3\nbatch_size = 4\nresolution = [512, 512]\nenable_bucket = true",
    )  # fmt: skip
    found = load_rows(path)
    assert read(path) == {
        "a/000.png": (f"oil, {rows[0][2]} 4k", 3), "b/001.png": (rows[1][2], 7), "c/002.png": ("sks dog", 3),
    }  # fmt: skip
    assert found.regularisation is not None
    assert (found.regularisation.captions, found.regularisation.repeats) == (["dog"], [3])
    assert {(ask.setting, ask.values) for ask in found.asks} == {
        ("resolution", (512,)), ("train_batch_size", (4,)), ("aspect_ratio_buckets", ("auto",)),
    }  # fmt: skip


def test_kohya_toml_passes_a_folder_named_twice_over(rows: list[Row], tmp_path: Path) -> None:
    caption_files(tmp_path / "a", rows[:1])
    found = load_rows(toml(tmp_path, 'image_dir = "a"', 'image_dir = "a"\nnum_repeats = 5'))
    assert (len(found), found.repeats) == (1, [1])
    assert any("passed over, as kohya does" in note for note in found.notes)


def test_kohya_toml_sets_a_share_apart_for_validation(rows: list[Row], tmp_path: Path) -> None:
    caption_files(tmp_path / "a", rows)
    text = 'image_dir = "a"\nnum_repeats = 3\nvalidation_split = 0.25\nvalidation_seed = {}'
    found, again, other = (load_rows(toml(tmp_path, text.format(seed))) for seed in (0, 0, 2))
    assert found.heldout is not None
    assert again.heldout is not None
    assert other.heldout is not None
    assert (len(found), len(found.heldout), found.heldout.repeats) == (6, 2, [1, 1])
    assert not set(found.names) & set(found.heldout.names)
    assert found.heldout.names == again.heldout.names != other.heldout.names


def test_kohya_toml_reads_its_metadata_file(rows: list[Row], tmp_path: Path) -> None:
    images(tmp_path / "a", rows[:2])
    listed = {"000": {"caption": "a cat", "tags": "soft, red"}, str(tmp_path / "a" / "001.png"): {"caption": "a dog"}}
    write(tmp_path, {"meta.json": json.dumps(listed)})
    path = toml(tmp_path, 'image_dir = "a"\nmetadata_file = "meta.json"\nnum_repeats = 2')
    assert read(path) == {"a/000.png": ("a cat, soft, red", 2), "a/001.png": ("a dog", 2)}


# --- ai-toolkit and OneTrainer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_ai_toolkit_gives_captions_its_trigger_word(rows: list[Row], tmp_path: Path, ending: str) -> None:
    caption_files(tmp_path / "a" / "deep", rows[:1])
    write(tmp_path / "a", {"b.png": rows[1][1], "b.txt": "a [trigger] house", "c.png": rows[2][1]})
    images(tmp_path / "reg", rows[3:4])
    datasets = [
        {"folder_path": str(tmp_path / "a"), "caption_ext": ".txt", "default_caption": "a photo", "num_repeats": 4},
        {"folder_path": "reg", "is_reg": True, "default_caption": "a [trigger]"},
    ]
    content = {"config": {"process": [{"trigger_word": "p3r", "train": {"steps": 9}, "datasets": datasets}]}}
    path = write(tmp_path, {f"train.{ending}": json.dumps(content)}) / f"train.{ending}"  # JSON is YAML
    assert read(path) == {
        "a/b.png": ("a p3r house", 4), "a/c.png": ("p3r a photo", 4), "a/deep/000.png": (f"p3r {rows[0][2]}", 4),
    }  # fmt: skip
    regularisation = load_rows(path).regularisation
    assert regularisation is not None
    assert regularisation.captions == ["a p3r"]


def test_flip_x_is_no_random_flip_and_a_note_says_so(rows: list[Row], tmp_path: Path) -> None:
    path = WRITERS["ai_toolkit"](tmp_path, rows)
    assert not any("flip_x" in note for note in load_rows(path).notes)
    path.write_text(path.read_text().replace("buckets: false", "flip_x: true"))
    found = load_rows(path)
    assert [(ask.text, ask.setting) for ask in found.asks] == [("flip_x: true", "random_flip")]
    assert any("trains each image and its mirror image" in note for note in found.notes)


def concepts(root: Path, *given: dict[str, Any]) -> Path:
    return write(root, {"concepts.json": json.dumps(given)}) / "concepts.json"


def test_onetrainer_takes_prompts_where_each_concept_says(rows: list[Row], tmp_path: Path) -> None:
    caption_files(tmp_path / "sample", rows[:1])
    write(tmp_path, {"sample/000-masklabel.png": rows[1][1], "sample/deep/b.png": rows[2][1], "sample/deep/b.txt": "deep",
                     "names/a red fox.png": rows[3][1], "one/c.png": rows[4][1], "prompts.txt": "a painting\n",
                     "check/d.png": rows[5][1], "check/d.txt": "held", "class/e.png": rows[6][1], "class/e.txt": "a class", "off/f.png": b""})  # fmt: skip
    path = concepts(
        tmp_path,
        {"path": str(tmp_path / "sample"), "include_subdirectories": True, "balancing": 3.0},
        {"path": "names", "text": {"prompt_source": "filename"}, "balancing": 4, "balancing_strategy": "SAMPLES"},
        {"path": "one", "text": {"prompt_source": "concept", "prompt_path": "prompts.txt"}},
        {"path": "check", "type": "VALIDATION"}, {"path": "class", "type": "PRIOR_PREDICTION"}, {"path": "off", "enabled": False},
    )  # fmt: skip
    expected = {
        "sample/000.png": (rows[0][2], 3), "sample/deep/b.png": ("deep", 3), "names/a red fox.png": ("a red fox", 4),
        "one/c.png": ("a painting", 1),
    }  # fmt: skip
    assert read(path) == expected
    found = load_rows(path)
    assert found.heldout is not None
    assert found.regularisation is not None
    assert (found.heldout.captions, found.regularisation.captions) == (["held"], ["a class"])
    write(tmp_path, {"config/run.json": json.dumps({"concept_file_name": "concepts.json"})})
    assert read(tmp_path / "config" / "run.json") == expected


def test_several_lines_are_several_captions_in_onetrainer(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, {"a/a.png": rows[0][1], "a/a.txt": "a cat\n\na dog\n"})
    path = concepts(tmp_path, {"path": "a"})
    assert load_rows(path, several_captions=True).captions_of(0) == ["a cat", "a dog"]
    refused("a/a.png", "no caption", "--caption_mitigation mc", source=path)


# --- the others -----------------------------------------------------------------------------------------------------


def test_a_list_names_nested_files_and_its_own_column(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, {"deep/a.png": rows[0][1], "metadata.jsonl": '{"image_path": "deep/a.png", "caption": "a cat"}'})
    assert read(tmp_path, caption_column="caption") == {"deep/a.png": ("a cat", 1)}


def test_a_pattern_names_parquet_files_of_one_split(rows: list[Row], tmp_path: Path) -> None:
    data = parquet_parts(tmp_path / "p", rows) / "data"
    assert len(load_rows(data / "train-*.parquet")) == len(rows)
    assert len(load_rows(data / "*-00000-*.parquet")) == 3
    shutil.copy(data / "train-00000-of-00002.parquet", data / "test-00000-of-00001.parquet")
    refused("splits test, train", "one is read", source=tmp_path / "p")


def test_arrow_reads_the_split_that_is_asked_for(rows: list[Row], tmp_path: Path) -> None:
    import datasets

    one = datasets.load_from_disk(str(arrow(tmp_path / "one", rows)))
    datasets.DatasetDict({"train": one, "test": one.select([5])}).save_to_disk(tmp_path / "both")
    assert len(load_rows(tmp_path / "both")) == len(rows)
    assert load_rows(tmp_path / "both", split="test").captions == [rows[5][2]]
    refused("no split 'dev'", "train, test", source=tmp_path / "both", split="dev")


def test_class_folders_are_read_only_when_named(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, {"golden retriever/a.png": rows[0][1], "animals/cat/b.png": rows[1][1]})
    refused("no metadata.jsonl", source=tmp_path)
    assert read(tmp_path, layout="class_folders") == {
        "animals/cat/b.png": ("cat", 1),
        "golden retriever/a.png": ("golden retriever", 1),
    }


def test_an_instance_prompt_captions_what_has_none(rows: list[Row], tmp_path: Path) -> None:
    images(tmp_path / "alone", rows[:2])
    assert load_rows(tmp_path / "alone", instance_prompt="a photo of sks dog").captions == ["a photo of sks dog"] * 2
    caption_files(tmp_path / "some", rows[:1])
    images(tmp_path / "some", rows[1:2])
    assert load_rows(tmp_path / "some", instance_prompt="sks").captions == [rows[0][2], "sks"]
    refused("1 of 2 images", "001.png", "--instance_prompt", source=tmp_path / "some")


def test_a_trigger_word_goes_before_captions_without_it(rows: list[Row], tmp_path: Path) -> None:
    texts = ("a dog", "the sks dog", "[trigger] runs", "sksy")
    caption_files(tmp_path, [(name, data, text) for (name, data, _), text in zip(rows, texts, strict=False)])
    assert load_rows(tmp_path, trigger_word="sks").captions == ["sks a dog", "the sks dog", "sks runs", "sks sksy"]
    assert load_rows(tmp_path).captions == list(texts)


def test_a_caption_extension_chooses_between_two_files(rows: list[Row], tmp_path: Path) -> None:
    caption_files(tmp_path, rows[:1])
    write(tmp_path, {"000.caption": "another", "000.wd14": "tags"})
    refused("000.caption and 000.txt", "--caption_extension", source=tmp_path)
    assert load_rows(tmp_path, caption_extension="caption").captions == ["another"]
    assert load_rows(tmp_path, caption_extension=".wd14").captions == ["tags"]
    write(tmp_path, {"000.caption": f" {rows[0][2]}\r\n"})
    assert load_rows(tmp_path).captions == [rows[0][2]], "two files that agree"


def test_two_tools_captions_that_differ_are_refused(rows: list[Row], tmp_path: Path) -> None:
    caption_files(metadata_jsonl(tmp_path, rows), rows)
    assert len(load_rows(tmp_path)) == len(rows), "they agree"
    write(tmp_path, {"003.txt": "another"})
    refused("1 captions in", "003.png", "--layout metadata or --layout caption_files", source=tmp_path)
    assert load_rows(tmp_path, layout="metadata").captions[3] == rows[3][2]
    assert load_rows(tmp_path, layout="caption_files").captions[3] == "another"


@pytest.mark.parametrize(("on_disk", "said"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_unicode_form(rows: list[Row], tmp_path: Path, on_disk: Any, said: Any) -> None:
    stored, named = (unicodedata.normalize(form, "café") for form in (on_disk, said))
    assert stored != named
    write(tmp_path, {f"list/{stored}.png": rows[0][1], f"texts/{stored}.png": rows[0][1], f"texts/{named}.txt": "beside",
                     "list/metadata.jsonl": json.dumps({"file_name": f"{named}.png", "text": "listed"})})  # fmt: skip
    assert load_rows(tmp_path / "list").check().captions == ["listed"]
    assert load_rows(tmp_path / "texts").check().captions == ["beside"]
    write(tmp_path, {f"list/{named}.png": rows[1][1]})
    refused("two such files", "NFC, NFD", source=tmp_path / "list")


def check_skipped(found: ImageDataset, kept: int, *skipped: str) -> None:
    assert len(found.check()) == kept
    assert [fault.name for fault in found.skipped] == list(skipped)
    assert any(f"{len(skipped)} images are skipped" in note for note in found.notes)


def test_broken_files_are_left_out_on_request_and_named(rows: list[Row], tmp_path: Path) -> None:
    source = metadata_jsonl(tmp_path / "list", rows)
    (source / "001.png").unlink()
    write(source, {"002.png": rows[2][1][:60]})
    refused("001.png", "do not exist", source=source)
    check_skipped(load_rows(source, skip_broken=True), len(rows) - 2, "001.png", "002.png")
    for name, _, _ in rows:
        write(source, {name: "no image"})
    refused("no image of", "at least one", source=source, skip_broken=True)


def test_broken_regularisation_images_are_left_out_too(rows: list[Row], tmp_path: Path) -> None:
    kohya(tmp_path, rows[:2])
    images(tmp_path / "reg" / "1_thing", rows[2:4])
    write(tmp_path, {"reg/1_thing/002.png": "no image"})
    found = load_rows(tmp_path, skip_broken=True)
    check_skipped(found, 2, "reg/1_thing/002.png")
    assert found.regularisation is not None
    assert found.regularisation.check().names == ["reg/1_thing/003.png"]
