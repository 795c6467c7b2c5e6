"""The same images and captions as each tool keeps them: a function per layout writes a folder and returns the source to read."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Row = tuple[str, bytes, str]  # file name, encoded image, caption


def rows_of(folder: Path) -> list[Row]:
    """The rows of a folder with metadata.jsonl."""
    listed = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [(row["file_name"], (folder / row["file_name"]).read_bytes(), row["text"]) for row in listed]


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    """Files by their path below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def images(root: Path, rows: Sequence[Row]) -> Path:
    return write(root, {name: data for name, data, _ in rows})


def metadata_jsonl(root: Path, rows: Sequence[Row]) -> Path:
    lines = [json.dumps({"file_name": name, "text": caption}) for name, _, caption in rows]
    return write(images(root, rows), {"metadata.jsonl": "\n".join(lines)})


def metadata_csv(root: Path, rows: Sequence[Row]) -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=";").writerows([("file_name", "text"), *((name, caption) for name, _, caption in rows)])
    return write(images(root, rows), {"metadata.csv": text.getvalue()})


def caption_files(root: Path, rows: Sequence[Row], ending: str = "txt") -> Path:
    return write(images(root, rows), {f"{Path(name).stem}.{ending}": f"{caption}\n" for name, _, caption in rows})


def table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"image": {"bytes": data, "path": name}, "text": caption} for name, data, caption in rows]
    )


def parquet(root: Path, rows: Sequence[Row]) -> Path:
    root.mkdir()
    pq.write_table(table(rows), root / "data.parquet")
    return root / "data.parquet"


def parquet_parts(root: Path, rows: Sequence[Row]) -> Path:
    (root / "data").mkdir(parents=True)
    for i, part in enumerate((rows[:3], rows[3:])):
        pq.write_table(table(part), root / "data" / f"train-{i:05d}-of-00002.parquet")
    return root


def arrow(root: Path, rows: Sequence[Row]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(table(rows)).cast_column("image", datasets.Image()).save_to_disk(root)
    return root


def webdataset(root: Path, rows: Sequence[Row]) -> Path:
    root.mkdir()
    with tarfile.open(root / "part-000.tar", "w") as tar:
        for name, data, caption in rows:
            for member, content in ((name, data), (f"{Path(name).stem}.txt", caption.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return root


def kohya(root: Path, rows: Sequence[Row]) -> Path:
    caption_files(root / "img" / "1_sks thing", rows)
    return root


def kohya_toml(root: Path, rows: Sequence[Row]) -> Path:
    caption_files(root / "images", rows, "caption")
    return write(root, {"data.toml": '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n'}) / "data.toml"


def ai_toolkit(root: Path, rows: Sequence[Row]) -> Path:
    folder = caption_files(root / "images", rows)
    process = {"type": "sd_trainer", "datasets": [{"folder_path": str(folder), "caption_ext": "txt", "buckets": False}]}
    return write(root, {"train.yaml": yaml.safe_dump({"job": "extension", "config": {"name": "mine", "process": [process]}})}) / "train.yaml"  # fmt: skip


def onetrainer(root: Path, rows: Sequence[Row]) -> Path:
    concept = {"path": str(caption_files(root / "images", rows)), "text": {"prompt_source": "sample"}}
    return write(root, {"concepts.json": json.dumps([concept])}) / "concepts.json"


WRITERS: dict[str, Callable[[Path, Sequence[Row]], Path]] = {
    "metadata": metadata_jsonl, "metadata csv": metadata_csv, "caption_files": caption_files, "parquet": parquet,
    "parquet parts": parquet_parts, "arrow": arrow, "webdataset": webdataset, "kohya": kohya, "kohya_toml": kohya_toml,
    "ai_toolkit": ai_toolkit, "onetrainer": onetrainer,
}  # fmt: skip
