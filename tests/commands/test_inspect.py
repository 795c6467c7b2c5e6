"""`ambient-sd inspect`: every fault of a damaged set is listed, the rest is read, and strangers' texts stay texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from PIL import Image, ImageOps

from ambient_sd.cli import main
from ambient_sd.commands.inspect import inspect
from ambient_sd.data.sources import load_rows
from ambient_sd.utils.errors import UserError


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Four good images of 48 px and one of each fault."""
    folder = tiny.tiny_folder(tmp_path / "set", count=4)
    original = Image.open(folder / "003.png")
    original.save(folder / "again.jpg", quality=80)
    original.save(folder / "copy.bmp")
    ImageOps.mirror(original).save(folder / "mirror.png")
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:60])
    (folder / "text.png").write_text("no image")
    Image.effect_mandelbrot((24, 24), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "small.png")
    Image.effect_mandelbrot((150, 50), (-1.4, -1, 1, 0.2), 50).convert("RGB").save(folder / "long.png")
    rows = [
        json.dumps({"file_name": n, "text": n})
        for n in ("again.jpg", "copy.bmp", "mirror.png", "cut.png", "text.png", "small.png", "long.png", "absent.png")
    ]
    rows += ['{"file_name": ', '{"text": "nameless"}', '{"file_name": "../x.png", "text": "out"}']
    Image.effect_mandelbrot((50, 50), (-1.0, 0, -0.5, 0.6), 50).convert("RGB").save(folder / "mute.png")
    Image.effect_mandelbrot((50, 50), (-0.2, 0.5, 0.3, 1.1), 50).convert("RGB").save(folder / "null.png")
    rows += [json.dumps({"file_name": "mute.png", "text": " "}), json.dumps({"file_name": "null.png", "text": None})]
    with (folder / "metadata.jsonl").open("a") as listing:
        listing.write("\n".join(rows) + "\n")
    return folder


def test_every_fault_is_listed_where_training_stops_at_the_first(damaged: Path) -> None:
    with pytest.raises(UserError):
        load_rows(damaged)
    found, _ = inspect(damaged, resolution=32)
    assert all(f.name not in f.text for f in found.faults if f.name in ("cut.png", "text.png")), (
        "the name stands before the text"
    )
    by_kind = {k: {f.name for f in found.faults if f.kind == k} for k in ("broken", "captionless", "small", "extreme")}
    assert by_kind == {
        "broken": {"cut.png", "text.png", "absent.png", "line 13", "line 14", "line 15"},
        "captionless": {"mute.png", "null.png"},
        "small": {"small.png"},
        "extreme": {"long.png"},
    }
    assert len(found.faults) == 10
    assert [{found.names[i] for i in g.rows} for g in found.groups] == [
        {"003.png", "again.jpg", "copy.bmp", "mirror.png"}
    ]
    assert (found.exact, found.near, len(found.names)) == (1, 1, 11)


def test_a_clean_set_has_no_findings(tiny_images: Path) -> None:
    found, _ = inspect(tiny_images, resolution=32)
    assert found.clean


def test_the_command_writes_table_page_and_json(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page, data = tmp_path / "page.html", tmp_path / "found.json"
    main(["inspect", str(damaged), "--resolution", "32", "--html", str(page), "--json", str(data)])
    table = capsys.readouterr().out
    assert "6  broken" in table and "2  captionless" in table and "near: 003.png, again.jpg" in table
    machine = json.loads(data.read_text())
    assert machine["counts"] == {
        "broken": 6, "unlisted": 0, "captionless": 2, "cut": 0, "small": 1, "extreme": 1, "animated": 0, "exact_copies": 1, "near_groups": 1,
    }  # fmt: skip
    images = {p["name"]: p["mirrored"] for p in machine["groups"][0]["images"]}
    assert images["003.png"] != images["mirror.png"] and images["003.png"] == images["again.jpg"]
    html = page.read_text()
    assert html.count('src="data:image/') == 4 and "absent.png" in html
    assert "http" not in html.replace("http-equiv", "") and "<script" not in html, "it loads nothing"


def test_captions_and_names_are_escaped(tmp_path: Path) -> None:
    evil = '<img src=x onerror=alert(1)>"{title}'
    name = "<b>bold&.png"
    folder = tiny.tiny_folder(tmp_path / "set", count=1)
    Image.open(folder / "000.png").save(folder / name)
    with (folder / "metadata.jsonl").open("a") as listing:
        listing.write(json.dumps({"file_name": name, "text": evil}) + "\n")
    page = tmp_path / "page.html"
    main(["inspect", str(folder), "--resolution", "32", "--html", str(page)])
    html = page.read_text()
    assert "&lt;img src=x" in html and "&lt;b&gt;bold&amp;.png" in html
    assert "<img src=x" not in html and "<b>bold" not in html


def test_status_is_1_only_when_asked_and_2_when_nothing_can_be_opened(
    damaged: Path, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def status(*arguments: str) -> int:
        try:
            main(["inspect", *arguments])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert status(str(damaged)) == 0
    assert status(str(damaged), "--fail_on", "problems") == 1
    assert status(str(tiny_images), "--resolution", "32", "--fail_on", "problems") == 0
    assert status(str(tmp_path / "nowhere")) == 2
    capsys.readouterr()
    assert status(str(damaged), "--html", str(tmp_path / "no" / "page.html")) == 2
    lines = capsys.readouterr()
    assert lines.out == "" and lines.err.count("\n") == 1, "before any image is read"


def test_a_set_without_one_usable_row_is_still_reported(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}\nnonsense\n')
    found, _ = inspect(tmp_path)
    assert (found.count("broken"), len(found.names)) == (2, 0)


def test_damaged_lines_of_a_csv_are_listed_too(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,red\na.png,one,too many\n,nameless\n")
    found, _ = inspect(tmp_path, resolution=32)
    assert (found.count("broken"), list(found.names)) == (2, ["a.png"])
