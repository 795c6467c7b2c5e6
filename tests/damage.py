"""Damaged inputs, made anew for each test: images, lists, parquet files, shards, settings, base models.

A case gets a place with a whole base model and a whole image dataset and damages one of them, or returns flags. Each says
which words the one line of the error must have. To add a family (checkpoints, caches): one more dict of cases in
`FAMILIES`, by name; the tests of `test_damaged_inputs.py` run over all of them.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ambient_sd.training.config import TrainConfig


@dataclasses.dataclass
class Place:
    """Where a case may do damage.

    Attributes:
        inputs: folder that holds everything below; a run must leave it as it is.
        base: a whole base model in it, `inputs/base`.
        images: a whole image dataset in it, `inputs/images`: 000.png .. 007.png and metadata.jsonl.
        data: what --train_data_dir gets; a case may point it elsewhere.
    """

    inputs: Path
    base: Path
    images: Path
    data: Path


@dataclasses.dataclass(frozen=True)
class Case:
    """One damage.

    Attributes:
        make: does it, and returns flags to add (None: none).
        words: must be in the error's line.
        inspect: what `ambient-sd inspect` does: "refuse" with one line and status 2, "list" the rows and go on, or
            "" where the data are whole.
    """

    make: Callable[[Place], list[str] | None]
    words: tuple[str, ...]
    inspect: str = ""


# ---- images


def encoded(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (48, 48), **options: Any) -> bytes:
    data = io.BytesIO()
    image = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 60).convert("RGB")
    image.convert(mode).save(data, kind, **options)
    return data.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def flip(data: bytes, at: float) -> bytes:
    i = int(len(data) * at)
    return data[:i] + bytes(b ^ 0xFF for b in data[i : i + 8]) + data[i + 8 :]


def image(content: Callable[[bytes], bytes] | bytes, name: str = "000.png") -> Case:
    """The first image's file gets another content."""

    def make(place: Place) -> None:
        path = place.images / "000.png"
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return Case(make, (name, "cannot be read"), "list")


def cut(kind: str, **options: Any) -> Case:
    data = encoded(kind, **options)
    return image(data[: len(data) // 2])


def instead(make_it: Callable[[Path], Any], *words: str) -> Case:
    """Something else lies where the first image was."""

    def make(place: Place) -> None:
        (place.images / "000.png").unlink()
        make_it(place.images / "000.png")

    return Case(make, words or ("000.png", "do not exist"), "list")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\n0 0 48 48 rectfill\nshowpage\n"
IMAGES = {
    "empty": image(b""),
    "one byte": image(b"\x89"),
    "signature alone": image(b"\x89PNG\r\n\x1a\n"),
    "garbage": image(bytes(range(256)) * 20),
    "zeros": image(bytes(5000)),
    "a page": image(b"<!doctype html><title>404</title>"),
    "vector drawing": image(b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "text pointer of a large-file store": image(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    "zip": image(b"PK\x03\x04" + bytes(100)),
    "PostScript, which Pillow would run": dataclasses.replace(image(EPS), words=("000.png", "PostScript")),
    "png cut": cut("PNG"),
    "png without its last chunk": image(lambda b: b[:-20]),
    "jpeg cut": cut("JPEG"),
    "webp cut": cut("WEBP"),
    "gif cut": cut("GIF"),
    "tiff cut": cut("TIFF", compression="tiff_deflate"),
    "bmp cut": cut("BMP"),
    "png of another checksum": image(lambda b: b[:20] + b"\x01" + b[21:]),
    "png with damaged pixels": image(lambda b: flip(b, 0.5)),
    "png without pixels": image(png(48, 48)),
    "png of no width": image(png(0, 48, chunk(b"IDAT", zlib.compress(b"")))),
    "png bomb of pixels": image(png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(9999))))),
    "png bomb of text that may hold an orientation": image(png(8, 8, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**27))), chunk(b"IDAT", zlib.compress(bytes(200))))),
    "tiff that points into itself": image(b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 330, 4, 1, 8) + b"\x08\0\0\0"),
    "floating point without a white": image(encoded("TIFF", "F")),
    "32 bits without a white": image(encoded("TIFF", "I")),
    "missing": instead(lambda p: None),
    "a folder": instead(Path.mkdir),
    "a link to itself": instead(lambda p: p.symlink_to(p)),
    "a link to nowhere": instead(lambda p: p.symlink_to("gone.png")),
    "a pipe": instead(os.mkfifo),
    "wrong ending in the list": Case(
        lambda p: rows(p, lambda r: r[0].update(file_name="000.jpg")), ("000.jpg", "do not exist"), "list"
    ),
}  # fmt: skip


# ---- lists of a folder


def rows(place: Place, change: Callable[[list[Any]], Any]) -> None:
    listing = place.images / "metadata.jsonl"
    values = [json.loads(line) for line in listing.read_text().splitlines()]
    changed = change(values)
    values = changed if isinstance(changed, list) else values
    listing.write_text("".join(json.dumps(v) + "\n" for v in values))


def listing(content: bytes, *words: str, inspect: str = "list") -> Case:
    return Case(lambda p: (p.images / "metadata.jsonl").write_bytes(content) and None, words, inspect)


def row(value: Any, *words: str, inspect: str = "list") -> Case:
    """The list's second row is another."""
    return Case(lambda p: rows(p, lambda r: [r[0], value, *r[2:]]), words, inspect)


def table(content: str | bytes, *words: str, inspect: str = "list") -> Case:
    """metadata.csv in place of metadata.jsonl."""

    def make(place: Place) -> None:
        (place.images / "metadata.jsonl").unlink()
        data = content if isinstance(content, bytes) else content.encode()
        (place.images / "metadata.csv").write_bytes(data)

    return Case(make, words, inspect)


def other_list(place: Place, make_it: Callable[[Path], Any]) -> None:
    (place.images / "metadata.jsonl").unlink()
    make_it(place.images / "metadata.jsonl")


def emptied(place: Place) -> None:
    shutil.rmtree(place.images)
    place.images.mkdir()


def source(value: str, *words: str, make: Callable[[Place], Any] = lambda p: None) -> Case:
    """The source is given as another path, below `inputs` unless absolute."""

    def build(place: Place) -> None:
        make(place)
        place.data = Path(value) if "/" in value[:1] else place.inputs / value

    return Case(build, words, "refuse")


def beside(make_it: Callable[[Path], Any], *words: str) -> Case:
    """Something lies beside the listed images."""
    return Case(lambda p: make_it(p.images) and None, words, "list")


def linked(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "y.png").write_bytes(encoded())
    (folder / "more").symlink_to(folder.parent / "elsewhere")


GOOD = b'{"file_name": "000.png", "text": "a"}\n'
NAME, TEXT = "001.png", "text"
LISTS = {
    "no list": Case(lambda p: (p.images / "metadata.jsonl").unlink(), ("no metadata.jsonl",), "refuse"),
    "empty folder": Case(emptied, ("images", "no images"), "refuse"),
    "empty list": listing(b"", "metadata.jsonl", "is empty", inspect="refuse"),
    "blank list": listing(b"\n \n\n", "metadata.jsonl", "is empty", inspect="refuse"),
    "list is a folder": Case(lambda p: other_list(p, Path.mkdir), ("no metadata.jsonl",), "refuse"),
    "list is a link to itself": Case(lambda p: other_list(p, lambda q: q.symlink_to(q)), ("metadata.jsonl",), "refuse"),
    "two lists": Case(lambda p: (p.images / "metadata.csv").write_text("file_name,text\n000.png,a\n") and None, ("metadata.jsonl and metadata.csv", "keep one"), "refuse"),
    "Latin-1": listing('{"file_name": "000.png", "text": "é"}\n'.encode("latin-1"), "metadata.jsonl", "utf-8", inspect="refuse"),
    "UTF-16 without its mark": listing(GOOD.decode().encode("utf-16-le"), "line 1", "JSON", inspect="list"),
    "binary": listing(bytes(range(256)), "metadata.jsonl", "utf-8", inspect="refuse"),
    "zero bytes": listing(GOOD + b"\0\0\0\n", "line 2", "JSON"),
    "no JSON": listing(GOOD + b"001.png: a red disc\n", "line 2", "JSON"),
    "line cut short": listing(GOOD + b'{"file_name": "001.png", "te', "line 2", "JSON"),
    "one JSON array": listing(b'[{"file_name": "000.png", "text": "a"}]', "line 1", "file_name"),
    "deep nesting": listing(GOOD + b"[" * 200_000 + b"\n", "line 2", "JSON"),
    "endless number": listing(GOOD + b'{"file_name": ' + b"9" * 5000 + b"}\n", "line 2", "JSON"),
    "a key twice": listing(GOOD + b'{"file_name": "001.png", "text": "a", "text": "b"}\n', "line 2", "twice"),
    "row is a list": row(["001.png", "a"], "line 2", "file_name"),
    "row is a text": row("001.png", "line 2", "file_name"),
    "row is a number": row(3, "line 2", "file_name"),
    "row is null": row(None, "line 2", "file_name"),
    "no name": row({TEXT: "a"}, "line 2", "file_name"),
    "name null": row({"file_name": None, TEXT: "a"}, "line 2", "file_name"),
    "name a number": row({"file_name": 1, TEXT: "a"}, "line 2", "file_name"),
    "name a list": row({"file_name": ["001.png"], TEXT: "a"}, "line 2", "file_name"),
    "name empty": row({"file_name": "", TEXT: "a"}, "line 2", "file_name"),
    "name absolute": row({"file_name": "/etc/hostname", TEXT: "a"}, "line 2", "/etc/hostname", "inside"),
    "name climbs": row({"file_name": "../base/model_index.json", TEXT: "a"}, "line 2", "inside"),
    "name climbs later": row({"file_name": "a/../../x.png", TEXT: "a"}, "line 2", "inside"),
    "name with a zero byte": row({"file_name": "0\0.png", TEXT: "a"}, "do not exist"),
    "name too long": row({"file_name": "x" * 5000, TEXT: "a"}, "do not exist"),
    "name a surrogate": row({"file_name": "\ud800.png", TEXT: "a"}, "do not exist"),
    "name with line breaks": row({"file_name": "a\r\nb\u2028.png", TEXT: "a"}, "do not exist"),
    "name a folder": row({"file_name": ".", TEXT: "a"}, "do not exist"),
    "caption absent": row({"file_name": NAME}, NAME, "no caption", "'text'"),
    "caption null": row({"file_name": NAME, TEXT: None}, NAME, "no caption", "NoneType"),
    "caption a number": row({"file_name": NAME, TEXT: 1.5}, NAME, "no caption", "float"),
    "caption a yes": row({"file_name": NAME, TEXT: True}, NAME, "no caption", "bool"),
    "captions in a list": row({"file_name": NAME, TEXT: ["a", "b"]}, NAME, "no caption", "list"),
    "captions in keys": row({"file_name": NAME, TEXT: {"en": "a"}}, NAME, "no caption", "dict"),
    "caption with half a character": row({"file_name": NAME, TEXT: "a \ud83d red disc"}, NAME, "caption"),
    "captions under another name": Case(lambda p: rows(p, lambda r: [{"file_name": v["file_name"], "caption": "a"} for v in r]), ("'text'", "caption, file_name", "--caption_column"), "refuse"),
    "csv without names": table("000.png,a\n001.png,b\n", "the header of", "columns are 000.png, a", "file_name", inspect="refuse"),
    "csv with two columns of files": table("image;path\n000.png;b\n", "the header of", "2 columns of file names", "image, path", inspect="refuse"),
    "an image that is not listed": listing(GOOD, "7 files", "001.png (not in metadata.jsonl)", "--unlisted ignore"),
    "an image of a kind that is not read": beside(lambda p: (p / "x.HEIC").write_bytes(b"phone"), "x.HEIC (a kind that is not read)"),
    "an image of no ending": beside(lambda p: (p / "deep").mkdir() or (p / "deep" / "x").write_bytes(encoded()), "deep/x (not in metadata.jsonl)"),
    "a hidden image": beside(lambda p: (p / ".x.png").write_bytes(encoded()), ".x.png (hidden)"),
    "an archive": beside(lambda p: (p / "more.zip").write_bytes(b"PK"), "more.zip (an archive)"),
    "an image behind a link": beside(linked, "more/y.png (not in metadata.jsonl)"),
    "a link to nowhere beside": beside(lambda p: (p / "more").symlink_to("gone"), "more in", "a link to nothing"),
    "a link to itself beside": beside(lambda p: (p / "more").symlink_to("more"), "more in", "a link to itself"),
    "a link to the folder above": dataclasses.replace(beside(lambda p: (p / "up").symlink_to(".."), "link up", "leads back"), inspect="refuse"),
    "a pipe beside": beside(lambda p: os.mkfifo(p / "x.png"), "x.png in", "no regular file"),
    "csv without captions": table("file_name,caption\n000.png,a\n", "'text'", "--caption_column", inspect="refuse"),
    "csv with more cells": table("file_name,text\n000.png,a, b\n", "line 2", "quotes"),
    "csv with a cell less": table("file_name,text\n000.png\n", "000.png", "no caption"),
    "csv with an open quote": table('file_name,text\n000.png,"a\n', "CSV"),
    "csv with a column twice": table("file_name,text,text\n000.png,a,b\n", "text", "twice", inspect="refuse"),
    "csv empty": table("", "is empty", inspect="refuse"),
    "csv with its first line alone": table("file_name,text\n", "is empty", inspect="refuse"),
    "csv in Latin-1": table("file_name,text\n000.png,é\n".encode("latin-1"), "utf-8", inspect="refuse"),
    "csv with an endless cell": table("file_name,text\n000.png," + "x" * 200_000 + "\n", "CSV"),
    "nowhere": source("gone", "gone", "no file or folder"),
    "nowhere, with a tilde": source("/~nobody-of-this-name/x", "no file or folder"),
    "a link to itself": source("loop", "loop", "no file or folder", make=lambda p: (p.inputs / "loop").symlink_to("loop")),
    "a path too long": source("x" * 5000, "no file or folder"),
    "a device": source("/dev/null", "no file or folder"),
    "an image": source("images/000.png", "000.png", "parquet"),
    "the list itself": source("images/metadata.jsonl", "metadata.jsonl", "parquet"),
    "the base model": source("base", "base", "no images"),
}  # fmt: skip


# ---- parquet


def parquet(change: Callable[[dict[str, Any]], Any] = lambda columns: None, *words: str, inspect: str = "list",
            damage: Callable[[bytes], bytes] = lambda b: b) -> Case:  # fmt: skip
    """A parquet file of three rows; `change` edits its columns, `damage` its bytes."""

    def make(place: Place) -> None:
        columns: dict[str, Any] = {
            "image": [{"bytes": (place.images / f"00{i}.png").read_bytes(), "path": f"{i}"} for i in range(3)],
            "text": ["a", "b", "c"],
        }
        change(columns)
        place.data = place.inputs / "set.parquet"
        pq.write_table(pa.table(columns), place.data, compression="none")
        place.data.write_bytes(damage(place.data.read_bytes()))

    return Case(make, words, inspect)


def column(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.update({name: value})


def broken_parquet(damage: Callable[[bytes], bytes]) -> Case:
    return parquet(lambda c: None, "set.parquet", "cannot be read", inspect="refuse", damage=damage)


PARQUET = {
    "empty file": broken_parquet(lambda b: b""),
    "garbage": broken_parquet(lambda b: b"garbage" * 200),
    "ends alone": broken_parquet(lambda b: b"PAR1PAR1"),
    "cut": broken_parquet(lambda b: b[: len(b) // 2]),
    "footer longer than the file": broken_parquet(lambda b: b[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "footer damaged": broken_parquet(lambda b: b[:-60] + bytes(50) + b[-10:]),
    "a csv": broken_parquet(lambda b: b"image,text\n000.png,a\n"),
    "no rows": parquet(lambda c: c.update(image=pa.array([], pa.binary()), text=pa.array([], pa.string())), "no rows", inspect="refuse"),
    "no images": parquet(lambda c: c.pop("image"), "'image'", "text", inspect="refuse"),
    "no captions": parquet(lambda c: c.pop("text"), "'text'", inspect="refuse"),
    "images are numbers": parquet(column("image", [1, 2, 3]), "row 0", "int"),
    "images are missing": parquet(column("image", pa.array([None] * 3, pa.binary())), "row 0", "NoneType"),
    "one image is missing": parquet(lambda c: c["image"].__setitem__(1, None), "1 of 3", "row 1"),
    "structs without bytes": parquet(column("image", [{"bytes": None, "path": None}] * 3), "row 0", "NoneType"),
    "images are pixels": parquet(column("image", [[[0, 0], [255, 255]]] * 3), "row 0", "list"),
    "images are empty": parquet(column("image", [b"", b"", b""]), "row 0"),
    "an image is cut": parquet(lambda c: c["image"][1].update(bytes=c["image"][1]["bytes"][:90]), "1 of 3", "row 1"),
    "paths to nowhere": parquet(column("image", ["gone.png"] * 3), "row 0", "gone.png"),
    "paths that are absolute": parquet(column("image", ["/etc/hostname"] * 3), "row 0", "/etc/hostname", "inside"),
    "paths that climb": parquet(column("image", [{"bytes": None, "path": "../inputs/images/000.png"}] * 3), "row 0", "inside"),
    "paths to a folder": parquet(column("image", ["images"] * 3), "row 0"),
    "caption null": parquet(column("text", ["a", None, "c"]), "row 1", "no caption"),
    "captions are numbers": parquet(column("text", [1, 2, 3]), "row 0", "int"),
    "captions are lists": parquet(column("text", [["a", "b"]] * 3), "row 0", "list"),
    "captions are bytes": parquet(column("text", [b"a", b"b", b"c"]), "row 0", "bytes"),
    "captions are no UTF-8": parquet(column("text", pa.array([b"a", b"\xff", b"c"]).view(pa.string())), "set.parquet", "utf-8", inspect="refuse"),
    "a date that no calendar has": parquet(column("day", pa.array([2**31 - 1] * 3, pa.date32())), "set.parquet", inspect="refuse"),
}  # fmt: skip


# ---- shards (test_shards.py has more)


def shard(*members: tuple[str, bytes], words: tuple[str, ...], inspect: str = "list",
          damage: Callable[[bytes], bytes] = lambda b: b, name: str = "s.tar") -> Case:  # fmt: skip
    def make(place: Place) -> None:
        place.data = place.inputs / "shards"
        place.data.mkdir()
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for member, content in [("a.png", encoded()), ("a.txt", b"a"), *members]:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        (place.data / name).write_bytes(damage(data.getvalue()))

    return Case(make, words, inspect)


SHARDS = {
    "cut": shard(words=("s.tar", "cut short"), damage=lambda b: b[:700]),
    "empty": shard(words=("s.tar", "empty"), damage=lambda b: b""),
    "garbage": shard(words=("s.tar", "damaged"), damage=lambda b: bytes(range(256)) * 9),
    "compressed": shard(words=("s.tar.gz", "compressed", "decompress"), name="s.tar.gz", inspect="refuse"),
    "compressed under a plain name": shard(words=("s.tar", "compressed (gzip)"), damage=lambda b: b"\x1f\x8b" + b),
    "no caption": shard(("b.png", encoded()), words=("s.tar/b.png", "no caption")),
    "no image": shard(("b.txt", b"b"), words=("b.txt", "no image")),
    "two images": shard(("a.webp", encoded("WEBP")), words=("a.png and a.webp", "two images")),
    "an image is cut": shard(("b.png", encoded()[:60]), ("b.txt", b"b"), words=("s.tar/b.png", "cannot be read")),
    "a name that climbs": shard(("../b.png", encoded()), words=("../b.png", "out of the shard")),
    "caption with half a character": shard(("b.png", encoded()), ("b.json", b'{"text": "\\ud83d"}'), words=("s.tar/b.png", "caption")),
}  # fmt: skip


# ---- settings


def settings(text: str | bytes, *words: str) -> Case:
    """--config names a file with this text."""

    def make(place: Place) -> list[str]:
        path = place.inputs / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(path)]

    return Case(make, words)


def config_at(make_it: Callable[[Path], Any], *words: str) -> Case:
    def make(place: Place) -> list[str]:
        path = place.inputs / "c.yaml"
        return ["--config", str(make_it(path) or path)]

    return Case(make, words)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
YAML = {
    "list": settings("- seed: 1\n", "c.yaml", "list"),
    "text": settings("train it\n", "c.yaml", "str"),
    "number": settings("3\n", "c.yaml", "int"),
    "yes": settings("true\n", "c.yaml", "bool"),
    "two documents": settings("seed: 1\n---\nseed: 2\n", "c.yaml", "YAML"),
    "open bracket": settings("validation_prompts: [a\n", "c.yaml", "YAML"),
    "open quote": settings('output_dir: "a\n', "c.yaml", "YAML"),
    "tabs": settings("seed:\n\t1\n", "c.yaml", "YAML"),
    "no space": settings("seed:1\n", "c.yaml", "str"),
    "indented": settings("seed: 1\n  rank: 2\n", "c.yaml", "YAML"),
    "key twice": settings("seed: 1\nseed: 2\n", "c.yaml", "seed is given twice"),
    "unknown key": settings("trian_batch_size: 4\n", "trian_batch_size", "train_batch_size"),
    "key a number": settings("1: 2\n", "unknown key 1"),
    "key null": settings("~: 2\n", "unknown key None"),
    "key a list": settings("? [a, b]\n: 1\n", "c.yaml", "YAML"),
    "key a mapping": settings("? {a: b}\n: 1\n", "c.yaml", "YAML"),
    "nested": settings("optimisation:\n  seed: 1\n", "unknown key 'optimisation'"),
    "value a mapping": settings("seed: {a: 1}\n", "seed", "integer"),
    "value a list": settings("seed: [1]\n", "seed", "integer"),
    "text a list": settings("output_dir: [a]\n", "output_dir", "text"),
    "text a number": settings("output_dir: 3\n", "output_dir", "text"),
    "list of numbers": settings("validation_prompts: [1, 2]\n", "validation_prompts", "list of texts"),
    "list of nothing": settings("validation_prompts: []\n", "validation_prompts", "list of texts"),
    "list a mapping": settings("validation_prompts: {a: b}\n", "validation_prompts", "list of texts"),
    "yes for a number": settings("train_batch_size: true\n", "train_batch_size", "integer"),
    "number for yes": settings("lora: 1\n", "lora", "true or false"),
    "text for yes": settings("lora: 'true'\n", "lora", "true or false"),
    "nothing for a number": settings("seed:\n", "seed", "integer"),
    "nan": settings("learning_rate: .nan\n", "learning_rate", "finite"),
    "nan as a text": settings("learning_rate: nan\n", "learning_rate", "finite"),
    "infinite": settings("learning_rate: .inf\n", "learning_rate", "finite"),
    "infinite for a whole number": settings("resolution: .inf\n", "resolution", "integer"),
    "fraction": settings("resolution: 64.5\n", "resolution", "integer"),
    "endless": settings(f"seed: {'9' * 400}\n", "seed", "integer"),
    "endless beyond Python's limit": settings(f"seed: {'9' * 9000}\n", "c.yaml"),
    "endless for a fraction": settings(f"learning_rate: {'9' * 400}\n", "learning_rate", "finite"),
    "date": settings("output_dir: 2026-02-03\n", "output_dir", "text"),
    "no such date": settings("output_dir: 2026-02-30\n", "c.yaml", "YAML"),
    "unknown anchor": settings("seed: *s\n", "c.yaml", "YAML"),
    "anchor of itself": settings("validation_prompts: &a [*a]\n", "validation_prompts", "list of texts"),
    "mapping of itself": settings("seed: &a {b: *a}\n", "seed", "integer"),
    "anchors that multiply": settings("validation_prompts:\n" + "".join(f"- {line.split(': ')[1]}\n" for line in LAUGHS.splitlines()), "validation_prompts", "list of texts"),
    "keys whose values multiply": settings(LAUGHS.replace("k: ", "seed: "), "unknown key 'a'"),
    "merge of a text": settings("<<: a\n", "c.yaml", "YAML"),
    "code": settings("seed: !!python/object/apply:os.getpid []\n", "c.yaml", "YAML"),
    "own tag": settings("seed: !seed 1\n", "c.yaml", "YAML"),
    "binary tag": settings("output_dir: !!binary aGk=\n", "output_dir", "text"),
    "zero byte": settings(b"seed: 1\0\n", "c.yaml", "YAML"),
    "Latin-1": settings("output_dir: é\n".encode("latin-1"), "c.yaml", "YAML"),
    "UTF-16": settings("seed: 1\n".encode("utf-16"), "c.yaml", "YAML"),
    "garbage": settings(bytes(range(256)), "c.yaml", "YAML"),
    "deep": settings("a: " + "[" * 20_000, "c.yaml", "YAML"),
    "JSON cut": settings('{"seed": 1, "rank"', "c.yaml"),
    "missing": config_at(lambda p: None, "c.yaml", "cannot be read"),
    "a folder": config_at(Path.mkdir, "c.yaml", "cannot be read"),
    "a link to itself": config_at(lambda p: p.symlink_to(p), "c.yaml", "cannot be read"),
    "a path too long": config_at(lambda p: "x" * 5000, "config", "no such file"),
    "no name": config_at(lambda p: " ", "config", "no such file"),
}  # fmt: skip


def flags(text: str, *words: str) -> Case:
    return Case(lambda place: text.format(inputs=place.inputs, base=place.base).split(" "), words)


def out_of_range() -> dict[str, Case]:
    """A value beyond each bound, and outside each list of choices, of every setting that has one."""
    cases = {}
    for item in dataclasses.fields(TrainConfig):
        meta = item.metadata
        bad = {
            "below": None if meta["low"] is None else int(meta["low"]) - 1,
            "at": None if meta["above"] is None else meta["above"],
            "above": None if meta["high"] is None else int(meta["high"]) + 1,
            "none of the choices of": "7" if meta["choices"] else None,
        }
        for where, value in bad.items():
            if value is not None:
                cases[f"{where} {item.name}"] = flags(f"--{item.name}={value}", item.name, "must be")
    return cases


FLAGS = {
    "unknown": flags("--ambient_levle 1", "--ambient_levle", "--ambient_level"),
    "no value": flags("--seed", "--seed", "argument"),
    "two values": flags("--seed 1 2", "2"),
    "lonely word": flags("images", "images"),
    "empty value": flags("--output_dir ", "output_dir", "text"),
    "a text for a number": flags("--resolution big", "resolution", "integer"),
    "a fraction for a whole number": flags("--train_batch_size 1.5", "train_batch_size", "integer"),
    "yes with a value": flags("--lora yes", "yes"),
    "an option of another mode": flags("--rank 4", "rank", "--lora"),
    "a level beyond the schedule": flags("--ambient_level 99", "ambient_level is 99"),
    "a timestep beyond the schedule": flags("--ambient_timestep 1000", "ambient_timestep is 1000"),
    "an odd resolution": flags("--resolution 33", "resolution is 33", "multiple of 2"),
    "a layer that is none": flags("--lora --lora_target_modules nothing", "nothing"),
    "a column that is none": flags("--row_filter size=3", "'size'", "file_name"),
    "a filter that keeps nothing": flags("--row_filter text=none", "no row"),
    "a filter of no form": flags("--row_filter size", "row_filter", "column=value"),
    "no prompts": flags("--validation_prompts {inputs}/none.jsonl", "none.jsonl", "cannot be read"),
    "no checkpoint": flags("--resume_from_checkpoint {inputs}/checkpoint-3", "checkpoint-3"),
    "results into the base": flags("--output_dir {base}", "output_dir", "pretrained_model_name_or_path"),
    "results into the images": flags("--output_dir {inputs}/images", "output_dir", "train_data_dir"),
    "results into a file": flags("--output_dir {inputs}/images/000.png/x", "output_dir", "no folder"),
    "results into a path too long": Case(lambda p: ["--output_dir", "x" * 5000], ("output_dir",)),
    "base model nowhere": flags("--pretrained_model_name_or_path {inputs}/gone", "no such folder"),
    "base model a file": flags("--pretrained_model_name_or_path {inputs}/images/000.png", "only .safetensors files"),
    "base model a path too long": Case(lambda p: ["--pretrained_model_name_or_path", "/" + "x" * 5000], ("pretrained_model_name_or_path", "no such folder")),
    **out_of_range(),
}  # fmt: skip


# ---- base models


def file(name: str, content: Callable[[bytes], bytes] | bytes | None, *words: str) -> Case:
    """A file of the base gets another content, or goes."""

    def make(place: Place) -> None:
        path = place.base / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return Case(make, words or (Path(name).parts[0],))


def values(name: str, *words: str, **changed: Any) -> Case:
    """Keys of a JSON file of the base get other values; `...` takes one out."""

    def make(place: Place) -> None:
        path = place.base / name
        keys = {**json.loads(path.read_text()), **changed}
        path.write_text(json.dumps({k: v for k, v in keys.items() if v is not ...}))

    return Case(make, words or (Path(name).parts[0],))


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any], *words: str) -> Case:
    def make(place: Place) -> None:
        held = load_file(place.base / name)
        change(held)
        save_file({k: v.contiguous() for k, v in held.items()}, place.base / name, metadata={"format": "pt"})

    return Case(make, words or (Path(name).parts[0],))


def fewer_words(place: Place, told: bool) -> None:
    path = "text_encoder/model.safetensors"
    tensors(path, lambda h: h.update({k: h[k][:20] for k in h if k.endswith("token_embedding.weight")})).make(place)
    if told:
        values("text_encoder/config.json", vocab_size=20).make(place)


def pickled(place: Place, part: str, name: str) -> None:
    path = place.base / part / name
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def gone(place: Place, part: str, then: Callable[[Path], Any] = lambda p: None) -> None:
    shutil.rmtree(place.base / part)
    then(place.base / part)


WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
           "text_encoder": "model.safetensors"}  # fmt: skip
CONFIGS = {"unet": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"}


def first(held: Mapping[str, torch.Tensor]) -> str:
    return next(k for k in sorted(held) if held[k].ndim > 1)


def base_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        cases[f"no {part}"] = Case(lambda p, part=part: gone(p, part), (f"no {part}/",))
        cases[f"{part} is a file"] = Case(
            lambda p, part=part: gone(p, part, lambda q: q.write_text("x")), (f"no {part}/",)
        )
        cases[f"{part} is a link to itself"] = Case(
            lambda p, part=part: gone(p, part, lambda q: q.symlink_to(q)), (f"no {part}/",)
        )
    for part, name in WEIGHTS.items():
        path = f"{part}/{name}"
        cases[f"{part} weights missing"] = file(path, None, part, "safetensors")
        cases[f"{part} weights pickled"] = Case(lambda p, a=part, n=name: pickled(p, a, n), (part, "safetensors"))
        cases[f"{part} weights empty"] = file(path, b"")
        cases[f"{part} weights garbage"] = file(path, bytes(range(256)) * 40)
        cases[f"{part} weights cut"] = file(path, lambda b: b[: len(b) // 2])
        cases[f"{part} weights with a giant header"] = file(path, lambda b: b"\xff" * 7 + b"\x7f" + b[8:])
        cases[f"{part} weights with a damaged header"] = file(path, lambda b: b[:9] + b"\xff" * 20 + b[29:])
        cases[f"{part} weights a web page"] = file(path, b"<!doctype html><title>login</title>")
        cases[f"{part} weights a pointer"] = file(
            path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        )
        cases[f"{part} weights without a tensor"] = tensors(path, lambda h: h.pop(first(h)), part, "missing")
        cases[f"{part} weights of another shape"] = tensors(path, lambda h: h.update({first(h): h[first(h)][:-1]}))
        cases[f"{part} weights under other names"] = tensors(
            path, lambda h: [h.update({f"x.{k}": h.pop(k)}) for k in list(h)], part
        )
        cases[f"{part} weights no numbers"] = tensors(path, lambda h: h[first(h)].fill_(float("nan")), part, "finite")
    for part, name in [*CONFIGS.items(), ("text_encoder", "config.json"), ("tokenizer", "tokenizer.json")]:
        path = f"{part}/{name}"
        cases[f"{path} missing"] = file(path, None)
        cases[f"{path} empty"] = file(path, b"")
        cases[f"{path} cut"] = file(path, lambda b: b[: len(b) // 2])
        cases[f"{path} binary"] = file(path, bytes(range(256)))
        cases[f"{path} a list"] = file(path, b"[1, 2]")
        cases[f"{path} null"] = file(path, b"null")
        cases[f"{path} without keys"] = file(path, b"{}")
    return cases  # fmt: skip


BASES = {
    **base_cases(),
    "no index": file("model_index.json", None),
    "index empty": file("model_index.json", b""),
    "index cut": file("model_index.json", lambda b: b[:40]),
    "index a list": file("model_index.json", b"[]"),
    "index of a transformer": values("model_index.json", "FluxFillPipeline", _class_name="FluxFillPipeline", transformer=["diffusers", "FluxTransformer2DModel"]),
    "index without a class": values("model_index.json", _class_name=...),
    "index whose class is a number": values("model_index.json", _class_name=3),
    "index with another U-Net": values("model_index.json", "UNet2DModel", unet=["diffusers", "UNet2DModel"]),
    "index with another VAE": values("model_index.json", "VQModel", vae=["diffusers", "VQModel"]),
    "index with another text encoder": values("model_index.json", "T5EncoderModel", text_encoder=["transformers", "T5EncoderModel"]),
    "index whose part is empty": values("model_index.json", unet=[]),
    "index whose part is a text": values("model_index.json", unet="UNet2DConditionModel"),
    "index whose part is null": values("model_index.json", unet=[None, None]),
    "U-Net for inpainting": values("unet/config.json", "9 channels", in_channels=9),
    "U-Net whose channels are a text": values("unet/config.json", in_channels="four"),
    "U-Net whose blocks are a number": values("unet/config.json", block_out_channels=3),
    "U-Net with an unknown block": values("unet/config.json", down_block_types=["CrossAttnDownBlock2D", "NoBlock"]),
    "U-Net with fewer blocks": values("unet/config.json", down_block_types=["DownBlock2D"]),
    "U-Net that gives more channels": values("unet/config.json", out_channels=8),
    "U-Net of another width": values("unet/config.json", cross_attention_dim=24),
    "U-Net whose width is a text": values("unet/config.json", cross_attention_dim="wide"),
    "U-Net that wants classes": values("unet/config.json", "class_embed_type", class_embed_type="timestep"),
    "U-Net that wants pooled texts": values("unet/config.json", "addition_embed_type", addition_embed_type="text_image"),
    "VAE whose blocks are a text": values("vae/config.json", block_out_channels="8"),
    "VAE without blocks": values("vae/config.json", block_out_channels=[]),
    "VAE whose channels are a text": values("vae/config.json", latent_channels="4"),
    "VAE of more channels": values("vae/config.json", "VAE gives 16", latent_channels=16),
    "VAE with an unknown block": values("vae/config.json", down_block_types=["NoBlock", "NoBlock"]),
    "VAE whose scale is a text": values("vae/config.json", scaling_factor="much"),
    "VAE whose scale is zero": values("vae/config.json", scaling_factor=0),
    "text encoder of another width": values("text_encoder/config.json", hidden_size=24),
    "text encoder of shorter texts": values("text_encoder/config.json", "text encoder", "8 tokens", max_position_embeddings=8),
    "text encoder whose layers are a text": values("text_encoder/config.json", num_hidden_layers="two"),
    "scheduler unknown": values("scheduler/scheduler_config.json", "NoScheduler", _class_name="NoScheduler"),
    "scheduler that is none": values("scheduler/scheduler_config.json", "UNet2DModel", _class_name="UNet2DModel"),
    "scheduler whose class is a number": values("scheduler/scheduler_config.json", _class_name=3),
    "scheduler without steps": values("scheduler/scheduler_config.json", num_train_timesteps=0),
    "scheduler of minus one step": values("scheduler/scheduler_config.json", num_train_timesteps=-1),
    "scheduler of a text of steps": values("scheduler/scheduler_config.json", num_train_timesteps="many"),
    "scheduler of half a step": values("scheduler/scheduler_config.json", num_train_timesteps=0.5),
    "scheduler with an unknown shape": values("scheduler/scheduler_config.json", beta_schedule="steep"),
    "scheduler whose betas are a text": values("scheduler/scheduler_config.json", beta_start="small"),
    "scheduler whose betas are above one": values("scheduler/scheduler_config.json", beta_start=2, beta_end=3),
    "scheduler whose betas are not finite": values("scheduler/scheduler_config.json", beta_end=float("nan")),
    "scheduler whose table is a text": values("scheduler/scheduler_config.json", trained_betas="x"),
    "scheduler of an unknown prediction": values("scheduler/scheduler_config.json", "scheduler", "score", prediction_type="score"),
    "scheduler of the EDM family": values("scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"),
    "tokenizer without a length": values("tokenizer/tokenizer_config.json", model_max_length=...),
    "tokenizer of endless texts": values("tokenizer/tokenizer_config.json", model_max_length=int(1e30)),
    "tokenizer of longer texts": values("tokenizer/tokenizer_config.json", model_max_length=77),
    "tokenizer whose length is a text": values("tokenizer/tokenizer_config.json", model_max_length="long"),
    "tokenizer of no texts": values("tokenizer/tokenizer_config.json", model_max_length=0),
    "text encoder of fewer words": Case(lambda p: fewer_words(p, told=False), ("text_encoder",)),
    "text encoder of fewer words, and it says so": Case(lambda p: fewer_words(p, told=True), ("tokens", "20")),
}  # fmt: skip


FAMILIES: dict[str, dict[str, Case]] = {
    "images": IMAGES,
    "lists": LISTS,
    "parquet": PARQUET,
    "shards": SHARDS,
    "yaml": YAML,
    "flags": FLAGS,
    "base": BASES,
    # Checkpoints and caches belong here: a case may train one step first (in `make`), then damage what was written.
}
