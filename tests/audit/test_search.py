"""Search in a store: exact equals brute force; through an index, what is found is exact and what is copied is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ambient_sd.audit import search as module
from ambient_sd.audit.embedding import About, EmbeddingStore, embed_set, load_set, write_block
from ambient_sd.audit.features import Distance, Pixels
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.search import build_index, main, neighbours_in_store, search
from ambient_sd.utils.errors import UserError

ROWS, DIM, BLOCK = 6000, 32, 512


def clustered(count: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(60, DIM, generator=torch.Generator().manual_seed(99))
    return centres[torch.randint(60, (count,), generator=draw)] + 0.5 * torch.randn(count, DIM, generator=draw)


def stored(folder: Path, vectors: torch.Tensor, distance: Distance = "euclidean") -> EmbeddingStore:
    about = About(
        "made", distance, vectors.shape[1], "float32", 1, "", "cpu", f"{vectors.sum():.9f}", len(vectors), BLOCK
    )
    for part in range(about.parts):
        rows = about.rows_of(part)
        some = vectors[rows.start : rows.stop].numpy()
        # Keys that follow the vectors, as content keys do.
        write_block(folder / f"part-{part:05d}.parquet", about, rows, [v.tobytes().hex()[:64] for v in some], [""] * len(rows), some)  # fmt: skip
    return EmbeddingStore.open(folder)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return clustered(ROWS, 0)


@pytest.fixture(scope="module")
def plain(rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return stored(tmp_path_factory.mktemp("plain"), rows)


@pytest.fixture(scope="module", params=["euclidean", "cosine"])
def indexed(
    rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[EmbeddingStore]:
    pytest.importorskip("faiss")
    store = stored(tmp_path_factory.mktemp("indexed"), rows, request.param)
    build_index(store)
    yield store


def test_exact_search_in_a_store_equals_brute_force(plain: EmbeddingStore, rows: torch.Tensor) -> None:
    queries = clustered(40, 1)
    d = torch.stack([(rows.double() - query.double()).norm(dim=1) for query in queries]).sort(dim=1, stable=True)
    for method in ("exact", "auto"):
        found = search(queries, plain, 3, distance="euclidean", method=method)  # type: ignore[arg-type]
        assert (
            torch.equal(found.index, d.indices[:, :3]) and torch.equal(found.distance, d.values[:, :3]) and found.exact
        )


def test_an_index_finds_near_copies_with_the_exact_distances(indexed: EmbeddingStore, rows: torch.Tensor) -> None:
    copied = torch.arange(0, ROWS, 30)
    queries = rows[copied] + 0.05 * torch.randn(len(copied), DIM, generator=torch.Generator().manual_seed(3))
    exact = nearest(queries, rows, 2, distance=indexed.distance)
    found = search(queries, indexed, 2, distance=indexed.distance, method="ivfpq")
    assert not found.exact
    assert torch.equal(found.index[:, 0], copied)
    same = found.index == exact.index
    assert torch.equal(found.distance[same], exact.distance[same])
    assert same[:, 1].float().mean() > 0.9


def test_an_index_never_reports_a_nearer_row_than_there_is(indexed: EmbeddingStore, rows: torch.Tensor) -> None:
    queries = clustered(200, 4)
    exact = nearest(queries, rows, 2, distance=indexed.distance)
    good = search(queries, indexed, 2, distance=indexed.distance, method="ivfpq")
    # Negative control: one list and two candidates miss rows, so what is tested can fail.
    poor = search(queries, indexed, 2, distance=indexed.distance, method="ivfpq", probes=1, candidates=2)
    for found in (good, poor):
        assert (found.distance >= exact.distance).all()
        assert (found.distance[:, 0] <= found.distance[:, 1]).all()
    recall = [(found.index[:, 0] == exact.index[:, 0]).float().mean() for found in (good, poor)]
    assert recall[0] > 0.9 > recall[1]


def test_all_lists_and_all_rows_as_candidates_are_the_exact_search(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    rows = clustered(900, 5)
    store = stored(tmp_path, rows)
    build_index(store)
    queries = torch.cat([clustered(30, 6), rows[:5]])
    found = search(queries, store, 4, distance="euclidean", method="ivfpq", probes=10_000, candidates=900)
    exact = nearest(queries, rows, 4)
    assert torch.equal(found.index, exact.index) and torch.equal(found.distance, exact.distance)


def test_queries_whose_lists_hold_too_few_rows_are_searched_exactly(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    rows = clustered(2000, 5)
    rows[0] = 1000.0  # alone in its list, if it has one
    store = stored(tmp_path, rows)
    build_index(store)
    found = search(rows[:1], store, 64, distance="euclidean", method="ivfpq", probes=1)
    assert torch.equal(found.distance, nearest(rows[:1], rows, 64).distance)


def test_one_index_is_built_from_the_same_embeddings(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    files = []
    for name in ("a", "b"):
        folder = build_index(stored(tmp_path / name, clustered(2000, 5)))
        files.append({f.name: f.read_bytes() for f in folder.iterdir()})
    assert files[0] == files[1] and set(files[0]) == {"index.faiss", "index.json", "vectors.npy"}


def test_auto_uses_an_index_only_above_the_measured_size(
    indexed: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = clustered(3, 1)
    assert search(queries, indexed, distance=indexed.distance).exact
    monkeypatch.setattr(module, "EXACT_UP_TO", 1000)
    assert not search(queries, indexed, distance=indexed.distance).exact


@pytest.mark.parametrize("damage", ["other", "short", "vectors", "json", "version", "none"])
def test_a_damaged_or_foreign_index_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    store = stored(tmp_path / "a", clustered(1000, 5))
    folder = build_index(store)
    if damage == "other":
        other = clustered(1000, 5)
        other[700] += 1
        shutil.copytree(folder, (tmp_path / "b" / folder.name))
        store = stored(tmp_path / "b", other)
    elif damage == "short":
        (folder / "index.faiss").write_bytes((folder / "index.faiss").read_bytes()[:-1])
    elif damage == "vectors":
        (folder / "vectors.npy").write_bytes((folder / "vectors.npy").read_bytes()[:-8])
    elif damage == "json":
        (folder / "index.json").write_text("{")
    elif damage == "version":
        (folder / "index.json").write_text(
            json.dumps({**json.loads((folder / "index.json").read_text()), "version": 0})
        )
    else:
        shutil.rmtree(folder)
    with pytest.raises(UserError) as caught:
        search(clustered(3, 1), store, distance="euclidean", method="ivfpq")
    assert "\n" not in str(caught.value)
    assert search(clustered(3, 1), store, distance="euclidean").exact


def test_impossible_searches_are_refused(indexed: EmbeddingStore, rows: torch.Tensor) -> None:
    wrong: Distance = "cosine" if indexed.distance == "euclidean" else "euclidean"
    nan = torch.full((1, DIM), torch.nan)
    for queries, reference, options in (
        (rows[:3], rows, {"distance": "euclidean"}),
        (rows[:3, :5], indexed, {"distance": indexed.distance}),
        (rows[:3], indexed, {"distance": wrong}),
        (nan, indexed, {"distance": indexed.distance}),
        (rows[:3], indexed, {"distance": indexed.distance, "k": 300}),
    ):
        with pytest.raises(UserError):
            search(queries, reference, method="ivfpq", **options)  # type: ignore[arg-type]


def test_generated_images_find_the_training_images_that_they_are(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(20)]
    (tmp_path / "set").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "set" / f"{i:02d}.png")
    embed_set(load_set(tmp_path / "set"), [Pixels(8)], tmp_path / "out")
    training = EmbeddingStore.open(tmp_path / "out", "pixels8")
    found = neighbours_in_store([images[7], images[3]], Pixels(8), training)
    assert found.index[:, 0].tolist() == [7, 3] and found.distance[:, 0].tolist() == [0, 0]
    with pytest.raises(UserError, match="would be embedded by pixels16"):
        neighbours_in_store(images[:1], Pixels(16), training)


def test_the_command_builds_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    stored(tmp_path, clustered(1000, 5))
    main([str(tmp_path)])
    assert "1000 x 32 made" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "nowhere")])
    assert caught.value.code == 2
