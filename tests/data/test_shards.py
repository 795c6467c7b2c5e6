"""WebDataset shards: the same rows as a folder, bit for bit; damage of every kind is named in one line."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch.utils.data import DataLoader

from ambient_sd.cli import main
from ambient_sd.commands.inspect import inspect
from ambient_sd.data import shards
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.data.stream import SampleStream
from ambient_sd.data.views import Samples, ViewRule
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils.errors import UserError


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def rows_of(folder: Path) -> Iterator[tuple[str, bytes, str]]:
    """(key, encoded image, caption) of an image folder."""
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield row["file_name"].removesuffix(".png"), (folder / row["file_name"]).read_bytes(), row["text"]


def as_shards(folder: Path, out: Path, each: int = 3, json_captions: bool = False) -> Path:
    """The images of a folder as shards s-000.tar, s-001.tar, ..."""
    out.mkdir()
    rows = list(rows_of(folder))
    for number, first in enumerate(range(0, len(rows), each)):
        members = []
        for i, (key, image, text) in enumerate(rows[first : first + each], first):
            caption = (f"{key}.json", json.dumps({"text": text, "size": i}).encode())
            members += [(f"{key}.png", image), caption if json_captions else (f"{key}.txt", f"{text}\n".encode())]
        write_tar(out / f"s-{number:03d}.tar", members)
    return out


@pytest.fixture
def set_of_shards(tiny_images: Path, tmp_path: Path) -> Path:
    return as_shards(tiny_images, tmp_path / "shards")


@pytest.fixture
def members(tiny_images: Path) -> list[tuple[str, bytes]]:
    """Members of a good shard: 000.png 000.txt 001.png ..."""
    rows = rows_of(tiny_images)
    return [m for key, image, text in rows for m in ((f"{key}.png", image), (f"{key}.txt", text.encode()))]


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("json_captions", [False, True])
def test_shards_hold_the_same_rows_as_the_folder(tiny_images: Path, tmp_path: Path, json_captions: bool) -> None:
    folder = load_rows(tiny_images).check(near_duplicates=True)
    out = as_shards(tiny_images, tmp_path / "shards", json_captions=json_captions)
    for source in (out, out / "s-{000..002}.tar"):
        images = load_rows(source, local=True).check(near_duplicates=True)
        assert images.fingerprint() == folder.fingerprint()
        assert (images.keys, images.noise_keys, images.sizes) == (folder.keys, folder.noise_keys, folder.sizes)
        assert [p.image.tobytes() for p in images] == [p.image.tobytes() for p in folder]
    assert load_rows(out / "s-001.tar").captions == folder.captions[3:6]
    assert load_rows(out / "s-{1..1}.tar".replace("1", "001")).names == [f"s-001.tar/00{i}.png" for i in (3, 4, 5)]


@pytest.mark.parametrize("values", [{}, {"objective": "plain", "random_flip": True}], ids=["held", "from workers"])
def test_a_run_on_shards_has_the_losses_of_the_run_on_the_folder(
    tiny_base: Path, tiny_images: Path, set_of_shards: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    losses = []
    for name, source, workers in (("a", tiny_images, 0), ("b", set_of_shards, 2)):
        config = TrainConfig(
            pretrained_model_name_or_path=str(tiny_base), train_data_dir=str(source), resolution=32, train_batch_size=4,
            max_train_steps=3, report_to="none", output_dir=str(tmp_path / name), dataloader_num_workers=workers, **values,
        )  # fmt: skip
        losses.append(run(config, progress=False).losses)
    assert losses[0] == losses[1]


def test_members_may_come_in_any_order_and_others_are_left_alone(members: Any, tmp_path: Path) -> None:
    extra = [
        ("README", b"x"),
        ("._000.png", b"x"),
        ("000.seg.png", b"x"),
        ("000.cls", b"7"),
        ("deep/000.JPG", members[0][1]),
    ]
    late = [("deep/000.txt", "é \u2028 red\r\n".encode())]
    path = write_tar(tmp_path / "a.tar", [*extra, *members[::-1], *late, *[(f"./{n}", b"") for n in ("x/.keep",)]])
    images = load_rows(path).check()
    assert sorted(images.names) == [f"a.tar/00{i}.png" for i in range(8)] + ["a.tar/deep/000.JPG"]
    assert "é \u2028 red" in images.captions


def test_names_and_captions_longer_than_a_header_are_read(members: Any, tmp_path: Path) -> None:
    key = "é" * 150 + "/" + "k" * 200
    path = write_tar(tmp_path / "a.tar", [(f"{key}.png", members[0][1]), (f"{key}.txt", b"w" * 5000)])
    images = load_rows(path).check()
    assert images.names == [f"a.tar/{key}.png"] and images.captions == ["w" * 5000]


def test_columns_of_json_members_choose_rows(tiny_images: Path, tmp_path: Path) -> None:
    out = as_shards(tiny_images, tmp_path / "shards", json_captions=True)
    assert len(load_rows(out, row_filter=[("size", ">=", "5")])) == 3
    assert "'caption'" in (told := message(lambda: load_rows(out, caption_column="caption"))) and "text, size" in told


def test_the_column_of_a_json_is_taken_before_the_text(members: Any, tmp_path: Path) -> None:
    row = [members[0], ("000.txt", b"short"), ("000.json", b'{"long": "a long one", "width": 3}')]
    path = write_tar(tmp_path / "a.tar", row)
    assert load_rows(path, caption_column="long").captions == ["a long one"]
    assert load_rows(path).captions == ["short"]


# ---- damage: what the member list of a shard becomes, and words of the message


def image(members: Any) -> bytes:
    return members[0][1]


DAMAGED_MEMBERS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "no caption": (lambda m: m[:-1], ["1 of 8 images have no caption", "s.tar/007.png", "KEY.txt"]),
    "caption without image": (lambda m: m[1:], ["000.txt", "no image"]),
    "two images of one key": (lambda m: [*m, ("000.jpg", image(m))], ["000.png and 000.jpg", "two images"]),
    "the same name twice": (lambda m: [*m, m[0]], ["000.png and 000.png", "two images"]),
    "two captions": (lambda m: [*m, m[1]], ["000.txt and 000.txt", "two captions"]),
    "dots in keys": (lambda m: [("a.v1.png", image(m)), ("a.v1.txt", b"x")], ["a.v1.png", "first dot"]),
    "absolute name": (lambda m: [*m, ("/etc/a.png", image(m))], ["/etc/a.png", "out of the shard"]),
    "name that climbs": (lambda m: [*m, ("a/../../b.png", image(m))], ["a/../../b.png", "out of the shard"]),
    "caption no UTF-8": (lambda m: [*m[:-1], ("007.txt", b"\xff\xfe")], ["007.png", "utf-8"]),
    "broken JSON": (lambda m: [*m[:-1], ("007.json", b'{"text": ')], ["007.png", "Expecting value"]),
    "JSON list": (lambda m: [*m[:-1], ("007.json", b'["text"]')], ["007.png", "holds a list"]),
    "deep JSON": (lambda m: [*m[:-1], ("007.json", b"[" * 100_000)], ["007.png", "cannot be read"]),
    "caption null": (lambda m: [*m[:-1], ("007.json", b'{"text": null}')], ["007.png", "NoneType"]),
    "huge caption": (lambda m: [*m[:-1], ("007.txt", b"x" * 2**21)], ["007.txt", "2097152 bytes"]),
    "no members": (lambda m: [], ["no images"]),
    "no row": (lambda m: [("readme.md", b"x")], ["no images"]),
}


@pytest.mark.parametrize("kind", DAMAGED_MEMBERS)
def test_a_shard_whose_members_make_no_rows_is_one_line(kind: str, members: Any, tmp_path: Path) -> None:
    change, parts = DAMAGED_MEMBERS[kind]
    path = write_tar(tmp_path / "s.tar", change(members))
    told = message(lambda: load_rows(path))
    assert all(part in told for part in [*parts, "s.tar"]), told
    found, _ = inspect(path, resolution=32)
    assert found.faults, "inspect lists it and goes on"
    assert len(found.names) == {"no caption": 8, "caption null": 8, "absolute name": 8, "name that climbs": 8,
                                "dots in keys": 0, "no members": 0, "no row": 0}.get(kind, 7)  # fmt: skip


DAMAGED_BYTES: dict[str, tuple[Callable[[bytes], bytes], list[str]]] = {
    "empty": (lambda b: b"", ["empty"]),
    "one block": (lambda b: b[:512], ["out of the file"]),
    "in a header": (lambda b: b[:100], ["truncated"]),
    "in a member": (lambda b: b[:1200], ["cut short"]),
    "in a later header": (lambda b: b[: 512 + blocks(b) + 300], ["cut short"]),
    "between two members": (lambda b: b[: 512 + blocks(b)], ["neither a member nor the end mark"]),
    "a later header damaged": (lambda b: flipped(b, 512 + blocks(b) + 150), ["neither a member nor the end mark"]),
    "the first header damaged": (lambda b: flipped(b, 150), ["cut short"]),
    "garbage": (lambda b: b"no tar file" * 999, ["cut short"]),
    "garbage at the end": (lambda b: b + b"x", ["continues after its end mark"]),
    "two joined": (lambda b: b + b, ["continues after its end mark"]),
    "compressed": (gzip.compress, ["compressed (gzip)", "decompress"]),
    "negative size": (lambda b: with_size(b, b"\xff" * 12), ["damaged"]),
    "giant size": (lambda b: with_size(b, b"\x80" + b"\x7f" * 11), ["damaged"]),
}


def blocks(data: bytes) -> int:
    """Size of the first member, whole blocks."""
    return -(-tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict").size // 512) * 512


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def with_size(data: bytes, size: bytes) -> bytes:
    header = bytearray(data[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize("kind", DAMAGED_BYTES)
def test_a_damaged_tar_file_is_one_line(kind: str, members: Any, tmp_path: Path) -> None:
    change, parts = DAMAGED_BYTES[kind]
    good = write_tar(tmp_path / "a.tar", members)
    bad = tmp_path / "b.tar"
    bad.write_bytes(change(good.read_bytes()))
    told = message(lambda: load_rows(tmp_path))
    assert all(part in told for part in [*parts, str(bad)]), told
    assert "a.tar" not in told
    found, _ = inspect(tmp_path, resolution=32)
    assert len(found.names) >= 8 and any("b.tar" in f.name for f in found.faults), "the whole shard is still read"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_refused(kind: bytes, members: Any, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    info = tarfile.TarInfo("link.png")
    info.type, info.linkname = kind, "/etc/hostname"
    with tarfile.open(path, "a") as tar:
        tar.addfile(info)
    assert "link.png" in message(lambda: load_rows(path))


def test_names_of_compressed_missing_and_mixed_sources_are_one_line(set_of_shards: Path, tiny_images: Path) -> None:
    for name in ("x.tar.gz", "x.tgz", "x.tar.zst"):
        shutil.copy(set_of_shards / "s-000.tar", set_of_shards / name)
        for source in (set_of_shards, set_of_shards / name):
            assert "compressed" in message(lambda s=source: load_rows(s))
        (set_of_shards / name).unlink()
    load_rows(set_of_shards)  # the control
    told = message(lambda: load_rows(set_of_shards / "s-{000..004}.tar"))
    assert "2 of 5 shards" in told and "s-003.tar, s-004.tar" in told
    for pattern in ("s-{5..1}.tar", "s-{0..99999999999999999999}.tar", "s-{0..9999}{0..9999}.tar"):
        assert "counts upwards" in message(lambda p=pattern: load_rows(set_of_shards / p))
    assert "no file or folder" in message(lambda: load_rows(set_of_shards / "none.tar"))
    (set_of_shards / "z.tar").mkdir()
    assert "z.tar is no file" in message(lambda: load_rows(set_of_shards))
    (set_of_shards / "z.tar").rmdir()
    shutil.copy(tiny_images / "metadata.jsonl", set_of_shards)
    assert "two image datasets" in message(lambda: load_rows(set_of_shards))


def test_a_broken_image_in_a_shard_is_named(members: Any, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("000.png", members[0][1][:60]), *members[1:]])
    assert "a.tar/000.png" in message(load_rows(path).check)
    images = load_rows(path)
    path.write_bytes(path.read_bytes()[:4096])
    assert "ends" in message(lambda: images[7]), "a shard that became shorter after it was indexed"
    path.unlink()
    assert "a.tar/007.png" in message(lambda: images[7])


def test_the_command_inspects_shards(set_of_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "found.json"
    main(["inspect", str(set_of_shards), "--resolution", "32", "--json", str(data)])
    assert "8 readable images" in capsys.readouterr().out
    (set_of_shards / "s-001.tar").write_bytes((set_of_shards / "s-001.tar").read_bytes()[:700])
    main(["inspect", str(set_of_shards), "--resolution", "32", "--json", str(data)])
    assert [f["name"] for f in json.loads(data.read_text())["faults"]] == ["s-001.tar"]


def test_worker_processes_read_the_right_images_at_once(set_of_shards: Path) -> None:
    images = load_rows(set_of_shards).check()
    images[0]  # in the parent first: what a fork would inherit
    rule = ViewRule(32, center_crop=True, random_flip=False, per_image=True, noise_seed=0)
    stream = SampleStream(8, 0)
    places = [[p] for p in range(400)]
    loader = DataLoader(Samples(images, rule, stream), batch_sampler=places, num_workers=2, collate_fn=list)
    assert [s.key for (s,) in loader] == [images.keys[stream.image(p)] for p in range(400)]


def _keys(images: ImageDataset, indices: list[int]) -> list[str]:
    return [images[i].key for i in indices]


def test_a_worker_that_does_not_fork_can_read(set_of_shards: Path) -> None:
    images = load_rows(set_of_shards).check()
    assert _keys(pickle.loads(pickle.dumps(images)), [7, 0, 3]) == [images.keys[i] for i in (7, 0, 3)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.apply(_keys, (images, [1, 2])) == images.keys[1:3]


def test_the_index_takes_a_few_dozen_bytes_a_row_and_reads_no_image(tmp_path: Path) -> None:
    count, hole = 4000, 2**20
    path = tmp_path / "big.tar"
    with path.open("wb") as file:  # 4 GB of holes: an index that read them would take seconds, and their memory
        for i in range(count):
            for name, size in ((f"{i:06d}.jpg", hole), (f"{i:06d}.txt", 4)):
                info = tarfile.TarInfo(name)
                info.size = size
                file.write(info.tobuf() + (b"text".ljust(512, b"\0") if size == 4 else b""))
                if size != 4:
                    file.seek(hole, os.SEEK_CUR)
        file.write(b"\0" * 1024)
    tracemalloc.start()
    rows = shards.index_shards([path], "text")
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count and rows[count - 1] == {"text": "text"}
    names = sum(len(n) + 57 for n in rows.names)  # Python's own 49 bytes a text and 8 for its place in the list
    assert (now - names) / count < 60
    assert rows.image(count - 1) == b"\0" * hole


def test_a_tiny_folder_is_no_set_of_shards(tmp_path: Path) -> None:
    """The control for the refusal of folders that are both."""
    folder = tiny.tiny_folder(tmp_path / "p")
    assert len(load_rows(folder)) == 8
