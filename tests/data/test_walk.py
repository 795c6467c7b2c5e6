"""Folders: what lies behind links is read, what would be left out is a mistake, and lists of every spelling are understood."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tiny import image_folder, noise_image

from ambient_sd.cli import main
from ambient_sd.commands.audit import AuditSettings, Source
from ambient_sd.commands.audit.work import audit, read_generated
from ambient_sd.commands.inspect import inspect
from ambient_sd.data import walk
from ambient_sd.data.images import decode
from ambient_sd.data.sources import load_rows
from ambient_sd.utils.errors import UserError


def refused(call: Any, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert [w for w in words if w not in str(caught.value)] == []


def names(folder: Path, **options: Any) -> list[str]:
    return load_rows(folder, need_captions=False, **options).names


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of two images without a list, and one elsewhere of three."""
    return image_folder(tmp_path / "set", [noise_image(i) for i in range(2)]), image_folder(
        tmp_path / "elsewhere", [noise_image(10 + i) for i in range(3)]
    )


def test_images_behind_links_are_read(two: tuple[Path, Path], tmp_path: Path) -> None:
    folder, elsewhere = two
    (folder / "run1").symlink_to(elsewhere)
    (folder / "one.PNG").symlink_to(elsewhere / "000.png")
    (tmp_path / "root").symlink_to(folder)
    found = ["000.png", "001.png", "one.PNG", "run1/001.png", "run1/002.png"]
    assert names(folder) == names(tmp_path / "root") == found


def test_a_file_that_two_paths_reach_counts_once_under_its_own_name(two: tuple[Path, Path]) -> None:
    folder, elsewhere = two
    (folder / "run3").mkdir()
    noise_image(50).save(folder / "run3" / "x.png")
    (folder / "latest").symlink_to("run3")
    (folder / "a").symlink_to(elsewhere)
    (folder / "b").symlink_to(elsewhere)
    assert names(folder) == ["000.png", "001.png", "a/000.png", "a/001.png", "a/002.png", "run3/x.png"]
    (folder / "copy.png").hardlink_to(folder / "000.png")  # control: a file of its own
    assert "copy.png" in names(folder)


def test_cycles_and_links_to_nothing_are_refused(two: tuple[Path, Path]) -> None:
    folder, elsewhere = two
    (folder / "up").symlink_to("..")
    refused(lambda: names(folder), "link up", "leads back")
    (folder / "up").unlink()
    (folder / "there").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    refused(lambda: names(folder), "leads back")
    (elsewhere / "back").unlink()
    (elsewhere / "gone").symlink_to("nowhere")
    refused(lambda: names(folder), "there/gone", "a link to nothing")


def test_a_folder_that_cannot_be_listed_is_refused(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (two[0] / "deep").mkdir()
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", denied)  # modes do not bind the superuser, who may run this
    refused(lambda: names(two[0]), "deep", "cannot be listed", "Permission denied")


def test_images_by_their_bytes_are_images_and_other_files_are_not(two: tuple[Path, Path]) -> None:
    folder, _ = two
    data = (folder / "000.png").read_bytes()
    for name, content in {"bare": data, "x.png_large": data, "notes": b"BM notes", "x.py": b"import os"}.items():
        (folder / name).write_bytes(content)
    assert names(folder) == ["000.png", "001.png", "bare", "x.png_large"]
    (folder / "phone").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    refused(lambda: names(folder), "phone (a kind that is not read)")


def test_copies_behind_a_link_fail_the_audit(tmp_path: Path) -> None:
    originals = [noise_image(i) for i in range(8)]
    training = image_folder(tmp_path / "t", originals, [f"p {i}" for i in range(8)])
    fresh = image_folder(tmp_path / "gen", [noise_image(100 + i) for i in range(4)])
    options: dict[str, Any] = {"features": ("pixels",), "resamples": 20, "fail_over": 0.1, "generated": fresh}
    clean = audit(AuditSettings(training=Source(str(training)), output_dir=tmp_path / "clean", **options))
    assert not clean.exceeded
    (fresh / "run1").symlink_to(image_folder(tmp_path / "elsewhere", originals[:4]))
    found = audit(AuditSettings(training=Source(str(training)), output_dir=tmp_path / "linked", **options))
    assert found.exceeded and found.found["verdict"]["value"] == 0.5


def unlisted(folder: Path) -> Path:
    """Six of eight images are listed."""
    image_folder(folder, [noise_image(i) for i in range(8)])
    rows = [json.dumps({"file_name": f"{i:03d}.png", "text": f"p {i}"}) for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_unlisted_images_are_refused_or_counted_everywhere(tmp_path: Path, capsys: Any) -> None:
    folder = unlisted(tmp_path / "t")
    refused(lambda: load_rows(folder), "2 files", "006.png (not in metadata.jsonl), 007.png", "--unlisted ignore")
    assert load_rows(folder, unlisted="ignore").unlisted == 2
    found, _ = inspect(folder, resolution=8)
    assert [f.name for f in found.faults if f.kind == "unlisted"] == ["006.png", "007.png"] and not found.clean
    assert inspect(folder, resolution=8, unlisted="ignore")[0].unlisted == 2

    copies = image_folder(tmp_path / "gen", [noise_image(6), noise_image(7)])
    heldout = image_folder(tmp_path / "h", [noise_image(100 + i) for i in range(4)])
    words = ["audit", "--generated", str(copies), str(folder), "--features", "pixels", "--fail-over", "0.1"]
    for more in ([], ["--heldout", str(heldout)]):
        with pytest.raises(SystemExit) as end:
            main([*words, *more, "--out", str(tmp_path / "out")])
        assert end.value.code == 2 and "006.png (not in metadata.jsonl)" in capsys.readouterr().err
    main([*words, "--out", str(tmp_path / "told"), "--unlisted", "ignore"])
    told = json.loads((tmp_path / "told" / "audit.json").read_text())
    assert told["images"]["training"]["unlisted"] == 2 and told["images"]["generated"]["unlisted"] == 0
    assert "2 files in the folder of the training images" in " ".join(told["notes"])
    assert "were left out" in (tmp_path / "told" / "audit.html").read_text()
    # The list complete, the same command fails: the model copies what was not listed.
    with (folder / "metadata.jsonl").open("a") as listing:
        listing.write("".join("\n" + json.dumps({"file_name": f"00{i}.png", "text": "x"}) for i in (6, 7)))
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(tmp_path / "whole")])
    assert end.value.code == 1


def test_images_that_samples_jsonl_does_not_name_are_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "gen", [noise_image(i) for i in range(3)])
    rows = [{"file": f"{i:03d}.png", "prompt": f"p{i}"} for i in range(2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    noise_image(9).save(folder / "contact_sheet.png")  # its own sheet is none of them
    refused(lambda: read_generated(folder), "1 files", "002.png (not in samples.jsonl)")
    assert read_generated(folder, "ignore").images.unlisted == 1


def test_untried_captions_are_said(tmp_path: Path) -> None:
    training = image_folder(tmp_path / "t", [noise_image(i) for i in range(5)], [f"p {i}" for i in range(5)])
    made = image_folder(tmp_path / "g", [noise_image(100 + i) for i in range(2)], ["p 0", "p 3"])
    result = audit(
        AuditSettings(Source(str(training)), tmp_path / "o", generated=made, features=("pixels",), resamples=20)
    )
    assert "3 of 5 different training captions were not tried as prompts." in result.found["notes"]


def test_what_lies_beside_shards_or_in_them_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    data = io.BytesIO()
    noise_image(0).save(data, "PNG")

    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    with tarfile.open(folder / "a.tar", "w") as tar:
        add(tar, "0.png", data.getvalue())
        add(tar, "0.txt", b"a cat")
    (folder / "b.tar").symlink_to("a.tar")
    assert load_rows(folder).names == ["a.tar/0.png"]
    noise_image(1).save(folder / "x.png")
    refused(lambda: load_rows(folder), "x.png (not in a shard)")
    assert load_rows(folder, unlisted="ignore").unlisted == 1
    with tarfile.open(folder / "a.tar", "a") as tar:
        add(tar, "1.bmp", b"BM")
    refused(lambda: load_rows(folder, unlisted="ignore"), "1.bmp", "not read there")


# --- lists


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("column", ["file_name", "image", "file", "path", "image_path"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_every_spelling_are_read(tmp_path: Path, delimiter: str, column: str, encoding: str) -> None:
    folder = image_folder(tmp_path / "set", [noise_image(i) for i in range(2)])
    captions = ["a, b; c\td", 'é "quoted"\nin two lines']
    rows = [[column, "text"], *([f"{i:03d}.png", c.replace('"', '""')] for i, c in enumerate(captions))]
    text = "\r\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    (folder / "metadata.csv").write_bytes(text.encode(encoding))
    found = load_rows(folder)
    assert (found.names, found.captions) == (["000.png", "001.png"], captions)


def test_a_list_without_a_column_of_files_names_its_header(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", [noise_image(0)])
    (folder / "metadata.csv").write_text("bild;text\n000.png;a\n")
    refused(lambda: load_rows(folder), "the header of", "its columns are bild, text", '"file_name"')
    assert load_rows(folder, image_column="bild").names == ["000.png"]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_bytes('{"image": "000.png", "text": "é"}\r\n'.encode("utf-16"))
    assert load_rows(folder).captions == ["é"]
    (folder / "metadata.jsonl").write_text('{"bild": "000.png", "text": "a"}\n')
    refused(lambda: load_rows(folder), "line 1 of", "its columns are bild, text")


# --- images


def test_a_png_with_a_large_text_is_read(tmp_path: Path) -> None:
    image, info = noise_image(0), PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 5_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", pnginfo=info, exif=exif)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"), Image.open(tmp_path / "a.png") as opened:
        opened.load()
    expected = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(decode(tmp_path / "a.png")), np.asarray(expected))


def test_grey_of_sixteen_bits_keeps_its_transparency(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[20000, 60000]], dtype=np.uint16))
    grey.save(tmp_path / "a.png", transparency=20000)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode == "I;16" and opened.info["transparency"] == 20000
    assert [decode(tmp_path / "a.png").getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (234,) * 3]


def test_too_many_pixels_are_refused_in_our_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(lambda: load_rows(tmp_path, need_captions=False).check(), "a.png", "more than 200 pixels", "scale it down")


def test_other_frames_are_said(tmp_path: Path) -> None:
    frames = [noise_image(i) for i in range(2)]
    folder = image_folder(tmp_path / "g", [noise_image(5)])
    frames[0].save(folder / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert load_rows(folder, need_captions=False).check().animated == ["a.webp"]
    training = image_folder(tmp_path / "t", [noise_image(i) for i in range(10, 14)])
    result = audit(
        AuditSettings(Source(str(training)), tmp_path / "o", generated=folder, features=("pixels",), resamples=20)
    )
    assert (
        "1 generated images have several frames, of which only the first was looked at: a.webp."
        in result.found["notes"]
    )
