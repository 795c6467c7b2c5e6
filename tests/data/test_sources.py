"""Sources: the same images from a folder, a parquet file or the hub; broken ones are named in one line."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ambient_sd.data.images import Undecodable, content_key, decode
from ambient_sd.data.layouts.hub import Hub
from ambient_sd.data.layouts.layout import Request
from ambient_sd.data.sources import load_rows
from ambient_sd.utils.errors import UserError


def as_parquet(folder: Path, path: Path) -> Path:
    """The images of a folder as a parquet file with a split, a number and a yes/no column."""
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
def folder(tiny_images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_images, tmp_path / "images"))


def one_line(call: object, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def test_folder_parquet_and_hub_loader_give_the_same_images(folder: Path, tmp_path: Path) -> None:
    parquet = as_parquet(folder, tmp_path / "p.parquet")
    (tmp_path / "hub").mkdir()
    shutil.copy(parquet, tmp_path / "hub" / "train.parquet")
    from_folder, from_parquet = load_rows(folder).check(), load_rows(parquet).check()
    # The hub client reads a local data set by the same call.
    table = Hub().read(Request(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache")))
    assert len(from_folder) == len(from_parquet) == len(table.rows) == 8
    assert from_folder.keys == from_parquet.keys == [content_key(decode(table.image(i))) for i in range(8)]
    assert from_folder.captions == from_parquet.captions == [table.rows[i]["text"] for i in range(8)]
    assert (
        from_folder.fingerprint() == load_rows(parquet).fingerprint() != load_rows(folder, max_samples=7).fingerprint()
    )
    assert [p.key for p in from_parquet] == from_folder.keys


def test_the_key_is_the_content_whatever_the_file(folder: Path) -> None:
    image = load_rows(folder)[0]
    for name, options in {"a.bmp": {}, "b.webp": {"lossless": True}, "c.png": {"compress_level": 1}}.items():
        image.image.save(folder / name, **options)
        assert content_key(decode(folder / name)) == image.key
    changed = image.image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert content_key(changed) != image.key
    turned = Image.frombytes("RGB", (24, 96), image.image.tobytes())
    assert content_key(turned) != image.key, "equal bytes in another shape are another image"


def test_transparency_lies_on_white_and_exif_turns_upright() -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG")
    assert decode(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).size == (2, 4)


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
    one_line(lambda: load_rows(empty), str(empty), "no images")
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
    one_line(lambda: load_rows(parquet, image_column="photo"), "'photo'", "image")
    (empty / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": null}\n')
    one_line(lambda: load_rows(empty), "a.png", "no caption")


def test_a_hub_name_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    one_line(lambda: load_rows("someone/images"), "someone/images", "hub")


def test_check_finds_every_truncated_image_and_names_it(folder: Path) -> None:
    assert load_rows(folder).check().sizes == [(48, 48)] * 8
    for name in ("002.png", "005.png"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "006.png").write_bytes(b"no image")
    images = load_rows(folder)
    one_line(images.check, "3 of 8", "002.png", "005.png", "006.png")
    assert images.keys == [], "nothing half-done"
    one_line(lambda: images[2], "002.png")


def test_metadata_csv_is_read_like_metadata_jsonl(folder: Path) -> None:
    expected = load_rows(folder).check()
    (folder / "metadata.csv").write_text(
        "\ufefffile_name,text\r\n" + "".join(f'{n},"{c}"\r\n' for n, c in zip(expected.names, expected.captions, strict=True))
    )  # fmt: skip
    one_line(lambda: load_rows(folder), "metadata.jsonl and metadata.csv", "keep one")
    (folder / "metadata.jsonl").unlink()
    assert load_rows(folder).fingerprint() == expected.fingerprint()
    (folder / "metadata.csv").write_text('file_name,text\n000.png,"red, with ""quotes""\nand a line"\n')
    assert load_rows(folder, unlisted="ignore").captions == ['red, with "quotes"\nand a line']
    (folder / "metadata.csv").write_text("file_name,text\n000.png,red, round\n")
    one_line(lambda: load_rows(folder), "line 2", "quotes")
    (folder / "metadata.csv").write_text("file_name,text\n000.png\n")
    one_line(lambda: load_rows(folder), "000.png", "no caption")
    (folder / "metadata.csv").write_text("")
    one_line(lambda: load_rows(folder), "is empty")


def test_a_listing_reaches_only_what_lies_in_its_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "deep").mkdir()
    for path in folder.glob("00[1-7].png"):
        path.unlink()
    outside = shutil.copy(folder / "000.png", tmp_path / "outside.png")
    shutil.copy(folder / "000.png", folder / "deep" / "a.png")
    rows = folder / "metadata.jsonl"
    rows.write_text('\ufeff{"file_name": "deep/a.png", "text": "\u2028 h\u00e9 \u7ea2"}\r\n', encoding="utf-8")
    assert load_rows(folder, unlisted="ignore").check().captions == ["\u2028 h\u00e9 \u7ea2"], (
        "below it, with a mark of byte order"
    )
    for name in (str(outside), "../outside.png", "deep/../../outside.png"):
        rows.write_text(json.dumps({"file_name": name, "text": "x"}))
        one_line(lambda: load_rows(folder), "line 1", "outside.png", "inside")
    rows.write_text(json.dumps({"file_name": "a red apple " * 40, "text": "000.png"}))
    one_line(lambda: load_rows(folder), "1 of 1", "do not exist")
    rows.rename(folder / "deep" / "metadata.jsonl")
    one_line(lambda: load_rows(folder), "no metadata.jsonl", str(folder / "deep"))


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*_: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(Hub, "read", no_hub)
    one_line(lambda: load_rows("my-images", local=True), "my-images", "no file or folder")
    with pytest.raises(AssertionError, match="asked the hub"):
        load_rows("my-images")


def test_sixteen_bit_grey_keeps_its_greys_and_what_has_no_white_is_refused(tmp_path: Path) -> None:
    def decoded(name: str, mode: str, values: tuple[float, float]) -> Image.Image:
        image = Image.new(mode, (2, 1))
        for x, value in enumerate(values):
            image.putpixel((x, 0), value)
        image.save(tmp_path / name)
        return decode(tmp_path / name)

    grey = decoded("grey.png", "I;16", (20000, 60000))
    assert [grey.getpixel((x, 0)) for x in (0, 1)] == [(78,) * 3, (234,) * 3]
    for mode, values in (("F", (0.2, 0.7)), ("I", (70000, 90000))):
        with pytest.raises(Undecodable, match="white"):
            decoded("deep.tiff", mode, values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_usual_mode_of_image_decodes_to_rgb(tmp_path: Path, mode: str) -> None:
    name = tmp_path / {"CMYK": "a.jpg", "YCbCr": "a.jpg"}.get(mode, "a.png")
    Image.new("RGB", (16, 16), "white").convert(mode).save(name)
    image = decode(name)
    assert (image.mode, image.getpixel((5, 5))) == ("RGB", (255, 255, 255))


def test_the_first_frame_of_an_animation_is_the_image(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_images_reach_worker_processes_that_do_not_fork(folder: Path, tmp_path: Path) -> None:
    parquet = as_parquet(folder, tmp_path / "p.parquet")
    for images in (load_rows(folder), load_rows(parquet)):
        assert pickle.loads(pickle.dumps(images))[3].key == images[3].key


def test_a_folder_on_the_way_to_a_parquet_file_is_no_column(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text=7").mkdir()
    assert load_rows(as_parquet(folder, tmp_path / "text=7" / "p.parquet")).captions == load_rows(folder).captions


def test_a_folder_without_a_list_is_all_its_images_or_says_which_it_would_leave_out(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    seen = len(load_rows(folder, need_captions=False))
    assert seen == len(list(folder.glob("*.png"))) > 0

    # What a Mac leaves beside each image, a half-written file and a note are no images.
    for name in ("._1.png", "._1.HEIC", ".notes.txt", "notes.txt"):
        (folder / name).write_bytes(b"nothing")
    shutil.copy(folder / "000.png", folder / ".000.png.part")
    assert len(load_rows(folder, need_captions=False)) == seen

    (folder / "IMG_1.HEIC").write_bytes(b"a phone's image")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "000.png", folder / ".thumbnails" / "1.png")
    one_line(
        lambda: load_rows(folder, need_captions=False), "2 files", ".thumbnails/1.png (hidden)",
        "IMG_1.HEIC (a kind that is not read)", "--unlisted ignore",
    )  # fmt: skip
    ignored = load_rows(folder, need_captions=False, unlisted="ignore")
    assert (len(ignored), ignored.unlisted) == (seen, 2)
