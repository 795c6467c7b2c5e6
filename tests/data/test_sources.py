"""Sources: the same pictures from a folder, a parquet file or the hub; broken ones are named in one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ambient_sd.data import sources
from ambient_sd.data.sources import content_key, load_rows
from ambient_sd.errors import UserError


def as_parquet(folder: Path, path: Path) -> Path:
    """The pictures of a folder as a parquet file with a split, a number and a yes/no column."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    table = [
        {
            "image": {"bytes": (folder / r["file_name"]).read_bytes(), "path": r["file_name"]},
            "text": r["text"],
            "split": "finetune" if i < 6 else "heldout",
            "size": i,
            "subset_4": i < 4,
        }
        for i, r in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


@pytest.fixture
def folder(tiny_pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pictures, tmp_path / "pictures"))


def one_line(call: object, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def test_folder_parquet_and_hub_loader_give_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    parquet = as_parquet(folder, tmp_path / "p.parquet")
    (tmp_path / "hub").mkdir()
    shutil.copy(parquet, tmp_path / "hub" / "train.parquet")
    from_folder, from_parquet = load_rows(folder).check(), load_rows(parquet).check()
    # The hub client reads a local data set by the same call.
    table = sources._from_hub(str(tmp_path / "hub"), "image", "text", "train", None, str(tmp_path / "cache"))
    assert len(from_folder) == len(from_parquet) == len(table.rows) == 8
    assert from_folder.keys == from_parquet.keys == [content_key(sources.decode(table.image(i))) for i in range(8)]
    assert from_folder.captions == from_parquet.captions == [table.rows[i]["text"] for i in range(8)]
    assert (
        from_folder.fingerprint() == load_rows(parquet).fingerprint() != load_rows(folder, max_samples=7).fingerprint()
    )
    assert [p.key for p in from_parquet] == from_folder.keys


def test_the_key_is_the_content_whatever_the_file(folder: Path) -> None:
    picture = load_rows(folder)[0]
    for name, options in {"a.bmp": {}, "b.webp": {"lossless": True}, "c.png": {"compress_level": 1}}.items():
        picture.image.save(folder / name, **options)
        assert content_key(sources.decode(folder / name)) == picture.key
    changed = picture.image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert content_key(changed) != picture.key
    turned = Image.frombytes("RGB", (24, 96), picture.image.tobytes())
    assert content_key(turned) != picture.key, "equal bytes in another shape are another picture"


def test_transparency_lies_on_white_and_exif_turns_upright() -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG")
    assert sources.decode(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "JPEG", exif=exif)
    assert sources.decode(buffer.getvalue()).size == (2, 4)


def test_split_and_row_filters_choose_rows(folder: Path, tmp_path: Path) -> None:
    path = as_parquet(folder, tmp_path / "p.parquet")
    assert len(load_rows(path, split="finetune")) == 6
    assert len(load_rows(path, row_filter=[("subset_4", "=", "true")])) == 4
    assert len(load_rows(path, split="finetune", row_filter=[("size", ">=", "2"), ("size", "<=", "3")])) == 2
    one_line(lambda: load_rows(path, split="test"), "split=test", "no row")
    one_line(lambda: load_rows(path, row_filter=[("subset", "=", "1")]), "'subset'", "subset_4")
    one_line(lambda: load_rows(path, row_filter=[("text", "<=", "1")]), "numbers")


def test_max_samples_is_a_draw_by_seed(folder: Path) -> None:
    first, again, other = (load_rows(folder, max_samples=3, seed=s).names for s in (1, 1, 2))
    assert first == again != other
    assert len(first) == 3
    assert load_rows(folder, max_samples=3).names == ["000.png", "001.png", "002.png"]
    assert len(load_rows(folder, max_samples=99)) == 8


def test_broken_sources_are_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line(lambda: load_rows(empty), str(empty), "no pictures")
    (empty / "a.png").write_bytes(b"")
    one_line(lambda: load_rows(empty), "no metadata.jsonl")
    (empty / "metadata.jsonl").write_text("\n")
    one_line(lambda: load_rows(empty), "is empty")
    (empty / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": \n')
    one_line(lambda: load_rows(empty), "line 2", "JSON")
    (empty / "metadata.jsonl").write_text('{"text": "x"}\n')
    one_line(lambda: load_rows(empty), "line 1", "file_name")
    (empty / "metadata.jsonl").write_text('{"file_name": "b\\n.png", "text": "x"}\n')
    one_line(lambda: load_rows(empty), "b .png", "do not exist")
    one_line(lambda: load_rows(folder, caption_column="caption"), "'caption'", "file_name, text", "--caption_column")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    one_line(lambda: load_rows(tmp_path / "x.parquet"), "x.parquet", "parquet")
    one_line(lambda: load_rows(tmp_path / "nowhere"), "nowhere", "no file or folder")
    parquet = as_parquet(folder, tmp_path / "p.parquet")
    one_line(lambda: load_rows(parquet, image_column="picture"), "'picture'", "image")
    (empty / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": null}\n')
    one_line(lambda: load_rows(empty), "a.png", "no caption")


def test_a_hub_name_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    one_line(lambda: load_rows("someone/pictures"), "someone/pictures", "hub")


def test_check_finds_every_truncated_picture_and_names_it(folder: Path) -> None:
    assert load_rows(folder).check().sizes == [(48, 48)] * 8
    for name in ("002.png", "005.png"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "006.png").write_bytes(b"no picture")
    pictures = load_rows(folder)
    one_line(pictures.check, "3 of 8", "002.png", "005.png", "006.png")
    assert pictures.keys == [], "nothing half-done"
    one_line(lambda: pictures[2], "002.png")
