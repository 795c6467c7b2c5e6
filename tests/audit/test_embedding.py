"""Stores of embeddings: the extractor's own numbers, the same bytes after any kill and for any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from launching import launch_words
from PIL import Image

from ambient_sd.audit.embedding import EmbeddingStore, embed_set, load_set, main
from ambient_sd.audit.features import EffLite0, Pixels
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose
from ambient_sd.data.images import content_key
from ambient_sd.utils.errors import UserError

COUNT, BLOCK = 200, 64

# Dies by SIGKILL in the middle of a block, after the one before it was written.
KILLED = """
import os, signal, sys
from ambient_sd.audit import embedding
from ambient_sd.audit.features import Pixels
seen, pixels = 0, Pixels._embed
def dies(self, batch):
    global seen
    seen += len(batch)
    if seen > int(os.environ["DIES_AFTER"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return pixels(self, batch)
Pixels._embed = dies
embedding.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with captions."""
    return made(tmp_path_factory.mktemp("images"), COUNT)


def made(folder: Path, count: int) -> Path:
    noise = np.random.default_rng(0)
    lines = []
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (8, 8 + i % 3, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"<b>image\u2028 {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (out,) = embed_set(load_set(folder), [Pixels(8)], tmp_path_factory.mktemp("store"), block=BLOCK)
    return out


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "out" / store.name))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return launch_words(2, ["-m", "ambient_sd.audit.embedding", *arguments])


def test_rows_are_those_of_the_extractor_on_all_images_at_once(folder: Path, store: Path) -> None:
    images, opened = load_set(folder), EmbeddingStore.open(store)
    assert torch.equal(torch.cat(list(opened.blocks())), Pixels(8)([image.image for image in images]))
    assert (len(opened), opened.dim, opened.distance) == (COUNT, 192, "euclidean")
    assert [len(block) for block in opened.blocks()] == [64, 64, 64, 8]
    assert list(opened.rows()) == [(content_key(p.image), p.caption) for p in images]
    assert torch.equal(opened.gather(torch.tensor([199, 3, 3, 70])), torch.cat(list(opened.blocks()))[[199, 3, 3, 70]])
    table = pq.read_table(store / "part-00003.parquet")
    assert table.column("place").to_pylist() == list(range(192, 200))
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float not null>[192]"
    about = json.loads(table.schema.metadata[b"ambient_sd.embedding"])
    assert (about["feature"], about["resolution"], about["weights"], about["count"]) == ("pixels8", 8, "", COUNT)


def test_half_precision_rounds_by_two_to_the_minus_eleven(folder: Path, store: Path, tmp_path: Path) -> None:
    (half,) = embed_set(load_set(folder), [Pixels(8)], tmp_path, block=BLOCK, dtype="float16")
    whole, rounded = (torch.cat(list(EmbeddingStore.open(f).blocks())) for f in (store, half))
    assert ((whole - rounded).abs() <= 2**-11 * whole.abs()).all()
    assert not torch.equal(whole, rounded)


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    few = made(tmp_path / "few", 66)
    embed_set(load_set(few), [Pixels(8), EffLite0()], tmp_path / "one", block=BLOCK)
    done = launch(str(few), "--features", "pixels8,efflite0", "--block", str(BLOCK), "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "EffLite0: 66 x 1280 float32" in done.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 4


def test_a_killed_run_goes_on_with_other_processes_and_keeps_finished_blocks(
    folder: Path, store: Path, tmp_path: Path
) -> None:
    arguments = [str(folder), "--features", "pixels8", "--block", str(BLOCK), "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DIES_AFTER": "150"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -9, killed.stderr[-3000:]
    kept = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "pixels8").iterdir()}
    assert sorted(kept) == ["part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(UserError, match="2 of 4 blocks are missing"):
        EmbeddingStore.open(tmp_path)
    assert launch(*arguments).returncode == 0
    assert contents(tmp_path / "pixels8") == contents(store)
    # Finished blocks were not written again; a third run writes nothing at all.
    for name, before in kept.items():
        now = (tmp_path / "pixels8" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == before
    whole = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pixels8").iterdir()}
    embed_set(load_set(folder), [Pixels(8)], tmp_path, block=BLOCK)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pixels8").iterdir()} == whole


@pytest.mark.parametrize("size", [0, 10, 3000])
def test_a_block_cut_short_is_refused_by_readers_and_made_again_by_the_next_run(
    folder: Path, store: Path, copy: Path, size: int
) -> None:
    part = copy / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:size])
    with pytest.raises(UserError, match=r"part-00001.parquet cannot be read") as caught:
        EmbeddingStore.open(copy)
    assert "\n" not in str(caught.value)
    embed_set(load_set(folder), [Pixels(8)], copy.parent, block=BLOCK)
    assert contents(copy) == contents(store)


def test_one_flipped_bit_is_noticed_when_its_column_is_read(copy: Path) -> None:
    part = copy / "part-00002.parquet"
    whole = part.read_bytes()
    store = EmbeddingStore.open(copy)
    for column, read in (("embedding", lambda: store.block(2)), ("thumbnail", store.thumbnails)):
        read()
        group = pq.read_metadata(part).row_group(0)
        (chunk,) = (
            group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema.startswith(column)
        )
        raw = bytearray(whole)
        raw[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
        part.write_bytes(raw)
        store.block(1)
        with pytest.raises(UserError, match=r"part-00002.parquet cannot be read"):
            read()
        part.write_bytes(whole)


def test_parts_of_different_features_or_data_are_not_one_store(folder: Path, copy: Path, tmp_path: Path) -> None:
    (other,) = embed_set(load_set(folder, max_samples=150), [Pixels(8)], tmp_path / "other", block=BLOCK)
    shutil.copy(other / "part-00001.parquet", copy / "part-00001.parquet")
    with pytest.raises(UserError, match=r"belongs to other embeddings; data .* count 200 and 150"):
        EmbeddingStore.open(copy)


def test_a_folder_of_other_embeddings_is_not_added_to(folder: Path, copy: Path, tmp_path: Path) -> None:
    before = contents(copy)
    for images, block in ((load_set(folder), 128), (load_set(folder, max_samples=150), BLOCK)):
        with pytest.raises(UserError, match="holds other embeddings"):
            embed_set(images, [Pixels(8)], copy.parent, block=block)
    changed = shutil.copytree(folder, tmp_path / "changed")
    Image.new("RGB", (8, 8), "red").save(changed / "064.png")
    with pytest.raises(UserError, match=r"holds embeddings of other images; 064.png has changed"):
        embed_set(load_set(changed), [Pixels(8)], copy.parent, block=BLOCK)
    assert contents(copy) == before


def test_a_store_knows_the_set_that_it_was_made_from(folder: Path, store: Path, tmp_path: Path) -> None:
    opened = EmbeddingStore.open(store)
    opened.require(load_set(folder))
    assert opened.fingerprint() == load_set(folder).fingerprint()
    changed = shutil.copytree(folder, tmp_path / "changed")
    Image.new("RGB", (8, 8), "red").save(changed / "065.png")
    with pytest.raises(UserError, match="are not those of"):
        opened.require(load_set(changed))


def test_search_in_a_store_equals_brute_force(store: Path) -> None:
    opened = EmbeddingStore.open(store)
    rows = torch.cat(list(opened.blocks()))
    queries = torch.cat([rows[:3], torch.rand(20, opened.dim, generator=torch.Generator().manual_seed(1))])
    d = torch.stack([(rows.double() - query.double()).norm(dim=1) for query in queries]).sort(dim=1, stable=True)
    found = nearest(queries, opened, 3)
    assert torch.equal(found.index, d.indices[:, :3]) and torch.equal(found.distance, d.values[:, :3])


def test_a_store_refuses_other_extractors(store: Path) -> None:
    EmbeddingStore.open(store).require_feature(Pixels(8))
    with pytest.raises(UserError, match="would be embedded by pixels16"):
        EmbeddingStore.open(store).require_feature(Pixels(16))


def test_one_of_several_features_is_opened_by_its_name(folder: Path, tmp_path: Path) -> None:
    embed_set(load_set(folder, max_samples=5), choose(["pixels8", "pixels4"]), tmp_path, block=BLOCK)
    assert EmbeddingStore.open(tmp_path, "pixels4").dim == 48
    assert EmbeddingStore.open(tmp_path / "pixels4", "pixels4").dim == 48
    for where, name in ((tmp_path, None), (tmp_path, "SSCD"), (tmp_path / "pixels4", "SSCD"), (tmp_path / "x", None)):
        with pytest.raises(UserError):
            EmbeddingStore.open(where, name)


def test_a_plain_folder_of_images_is_embedded_by_name(tmp_path: Path) -> None:
    (tmp_path / "set" / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "deeper/c.PNG", "notes.txt"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / name, format="PNG")
    images = load_set(tmp_path / "set")
    assert images.names == ["a.jpg", "b.png", "deeper/c.PNG"]
    embed_set(images, [Pixels(8)], tmp_path / "out")
    assert EmbeddingStore.open(tmp_path / "out").fingerprint() == images.fingerprint()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere/at/all"], "no file or folder"),
        (["SET", "--features", "pixels8,pixels8"], "no name twice"),
        (["SET", "--features", "dino"], "feature 'dino'"),
        (["SET", "--features", "pixels8", "--block", "100"], "multiple of 64"),
        (["SET", "--features", "pixels8", "--out", "/proc/x"], "cannot be written"),
    ],
)
def test_mistakes_end_in_one_line_and_status_two(
    arguments: list[str], says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(tmp_path / "out"), *[str(folder) if a == "SET" else a for a in arguments]])
    error = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "\n" not in error and says in error
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_named_and_finished_blocks_stay(folder: Path, store: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "130.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"130\.png"):
        embed_set(load_set(broken), [Pixels(8)], tmp_path / "out", block=BLOCK)
    assert sorted(os.listdir(tmp_path / "out" / "pixels8")) == ["part-00000.parquet", "part-00001.parquet"]
    shutil.copy(folder / "130.png", broken / "130.png")
    embed_set(load_set(broken), [Pixels(8)], tmp_path / "out", block=BLOCK)
    assert contents(tmp_path / "out" / "pixels8") == contents(store)
