"""`ambient-sd audit --training_embeddings`: the figures of an audit that embeds the training images itself, without embedding them."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import image_folder, noise_image

from ambient_sd.audit import embedding as embedding_module
from ambient_sd.audit import metrics, stored
from ambient_sd.audit.embedding import EmbeddingStore, embed_set, load_set, write_block
from ambient_sd.audit.registry import choose
from ambient_sd.cli import main
from ambient_sd.commands.audit import AuditSettings, Source
from ambient_sd.commands.audit.work import audit
from ambient_sd.data import sources
from ambient_sd.data.sources import load_rows
from ambient_sd.utils.errors import UserError

FEATURES = ("pixels8", "standardized", "efflite0")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images, two of them twice and one a little brighter; held-out ones; copies, mirrored copies and fresh ones."""
    root = tmp_path_factory.mktemp("world")
    training = [noise_image(i) for i in range(20)]
    training += [training[3], training[0], training[5].point(lambda v: min(255, round(v * 1.05)))]
    image_folder(root / "training", training, [f"image {i}" for i in range(len(training))])
    image_folder(root / "heldout", [noise_image(100 + i) for i in range(12)])
    mirrored = noise_image(5).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    between = training[5].point(lambda v: min(255, round(v * 1.02)))
    made = [training[0], training[3], training[7], between, mirrored, *(noise_image(200 + i) for i in range(5))]
    image_folder(root / "made", made, ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"])
    embed_set(load_set(root / "training"), choose(FEATURES), root / "stored", block=64)
    return root


def settings(world: Path, out: Path, **changes: Any) -> AuditSettings:
    values: dict[str, Any] = {
        "training": Source(str(world / "training")), "heldout": Source(str(world / "heldout")), "output_dir": out,
        "generated": world / "made", "features": FEATURES, "resamples": 20,
    }  # fmt: skip
    return AuditSettings(**(values | changes))


def without(found: dict[str, Any]) -> dict[str, Any]:
    """Return an audit.json without what may differ: time and machine, and what is said of stored embeddings."""
    kept = json.loads(json.dumps({**found, "made": None, "notes": [n for n in found["notes"] if "mbedd" not in n]}))
    kept["images"]["training"]["embeddings"] = None
    return dict(rounded(kept))


def rounded(value: Any) -> Any:
    """Leave out a float64's last digits: some BLAS add up in another order when a block lies elsewhere in memory."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


@pytest.mark.parametrize("mirrored", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_figures_neighbours_and_verdict_are_those_of_an_audit_that_embeds(
    world: Path, tmp_path: Path, mirrored: bool
) -> None:
    plain = audit(settings(world, tmp_path / "plain", mirrored=mirrored)).found
    told = audit(settings(world, tmp_path / "told", mirrored=mirrored, training_embeddings=world / "stored")).found
    assert without(told) == without(plain)
    lines = [(tmp_path / name / "images.jsonl").read_bytes() for name in ("plain", "told")]
    assert lines[0] == lines[1]
    # There was something to find: copies, duplicates among the training images, quality, a background.
    rows = {row["name"]: row for row in told["measures"]}
    assert told["verdict"]["value"] == (0.5 if mirrored else 0.4) and told["copies"]["searched"] == 21
    assert rows["memorized-pixels8"]["generated"]["value"] == (0.5 if mirrored else 0.4)
    assert told["images"]["training"]["groups_of_duplicates"] == 3 and rows["memorized-pixels8"]["background"]
    assert any(name.startswith("MiFID-EffLite0") for name in rows)
    used = told["images"]["training"]["embeddings"]
    assert plain["images"]["training"]["embeddings"] is None
    assert used["compared"] == 23 and list(used["features"]) == ["pixels8", "pixels64-standardized", "EffLite0"]
    assert all(one["dtype"] == "float32" for one in used["features"].values())
    assert any("were embedded before" in note for note in told["notes"])
    page = (tmp_path / "told" / "audit.html").read_text()
    assert "were embedded before" in page and str(world) not in page + json.dumps(told)


@pytest.mark.slow
def test_a_folder_of_results_may_be_made_again_with_stored_embeddings(world: Path, tmp_path: Path) -> None:
    audit(settings(world, tmp_path, features=("pixels8",)))
    audit(settings(world, tmp_path, features=("pixels8",), training_embeddings=world / "stored"))


def test_vectors_come_from_the_store(world: Path, tmp_path: Path) -> None:
    """Negative control: with its vectors moved by a row, every copy is found a row beside its original."""
    store = EmbeddingStore.open(world / "stored" / "pixels8")
    keys, captions = zip(*store.rows(), strict=True)
    path = tmp_path / "moved" / "pixels8" / "part-00000.parquet"
    moved = store.block(0).roll(1, 0).numpy()
    write_block(path, store.about, range(23), keys, captions, moved, store.thumbnails())
    audit(settings(world, tmp_path / "out", features=("pixels8",), training_embeddings=tmp_path / "moved"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [line["nearest"]["pixels8"]["row"] for line in lines[:3]] == [1, 4, 8]


@pytest.mark.slow
def test_training_images_are_decoded_once_and_only_mirror_images_embedded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path / "many", [noise_image(i) for i in range(80)], [str(i) for i in range(80)])
    embed_set(load_set(tmp_path / "many"), choose(["pixels8"]), tmp_path / "stored", block=64)
    monkeypatch.setattr(stored, "CHECKED", 4)
    monkeypatch.setattr(metrics, "BACKGROUND", 6)
    seen: list[str] = []
    decode = sources.decode

    def counted(source: Any) -> Image.Image:
        if isinstance(source, Path) and source.parent.name == "many":
            seen.append(source.name)
        return decode(source)

    monkeypatch.setattr(sources, "decode", counted)
    changes: dict[str, Any] = {"training": Source(str(tmp_path / "many")), "features": ("pixels8",)}
    told = audit(settings(world, tmp_path / "told", **changes, training_embeddings=tmp_path / "stored")).found
    few = len(seen)
    # Compared, background, one original for each generated image; and each once, laid over the generated ones.
    assert 4 + 6 < few - 80 <= 4 + 6 + 10
    assert told["images"]["training"]["embeddings"]["compared"] == 4
    plain = audit(settings(world, tmp_path / "plain", **changes)).found
    assert len(seen) - few >= 240  # negative control: checked and embedded too
    assert without(told) == without(plain)
    (row,) = (row for row in told["measures"] if row["name"] == "memorized-pixels8")
    assert row["background"]["n"] == 6


# --- what is refused: one line, before anything is drawn, embedded or written


def changed(world: Path, path: Path) -> Path:
    shutil.copytree(world / "training", path)
    return path


def other_image(world: Path, tmp: Path) -> dict[str, Any]:
    noise_image(999).save(changed(world, tmp / "t") / "011.png")
    return {"training": Source(str(tmp / "t"))}


def other_caption(world: Path, tmp: Path) -> dict[str, Any]:
    path = changed(world, tmp / "t") / "metadata.jsonl"
    path.write_text(path.read_text().replace("image 4", "image IV"))
    return {"training": Source(str(tmp / "t"))}


def other_order(world: Path, tmp: Path) -> dict[str, Any]:
    path = changed(world, tmp / "t") / "metadata.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    return {"training": Source(str(tmp / "t"))}


def fewer_rows(world: Path, tmp: Path) -> dict[str, Any]:
    path = changed(world, tmp / "t") / "metadata.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    return {"training": Source(str(tmp / "t"), unlisted="ignore")}


def two_sets(world: Path, tmp: Path) -> dict[str, Any]:
    shutil.copytree(world / "stored", tmp / "s")
    shutil.rmtree(tmp / "s" / "EffLite0")
    noise_image(999).save(changed(world, tmp / "t") / "011.png")
    embed_set(load_set(tmp / "t"), choose(["efflite0"]), tmp / "s", block=64)
    return {"training_embeddings": tmp / "s"}


class Mean(torch.nn.Module):
    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32).pow(self.power).mean(dim=(2, 3))


def other_weights(world: Path, tmp: Path) -> dict[str, Any]:
    for power in (1, 2):
        torch.jit.script(Mean(power)).save(str(tmp / f"{power}.pt"))
    features = choose(["inception"], {"inception": str(tmp / "1.pt")})
    embed_set(load_set(world / "training"), features, tmp / "s", block=64)
    mine = settings(world, tmp / "fits", features=("inception",), files={"inception": str(tmp / "1.pt")})
    audit(settings(world, mine.output_dir, features=mine.features, files=mine.files, training_embeddings=tmp / "s"))
    return {"features": ("inception",), "files": {"inception": str(tmp / "2.pt")}, "training_embeddings": tmp / "s"}


def cut_block(world: Path, tmp: Path) -> dict[str, Any]:
    shutil.copytree(world / "stored", tmp / "s")
    part = tmp / "s" / "pixels8" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:3000])
    return {"training_embeddings": tmp / "s"}


REFUSED: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "another image under a name": (other_image, "011.png in"),
    "another caption": (other_caption, "names or captions of"),
    "another order": (other_order, "names or captions of"),
    "fewer rows": (fewer_rows, "23 images were embedded, 22 are in"),
    "other rows of the set": (lambda w, t: {"training": Source(str(w / "made"))}, "23 images were embedded, 10 are in"),
    "a feature that is missing": (lambda w, t: {"features": ("pixels8", "pixels16")}, "no embeddings of pixels16"),
    "no folder": (lambda w, t: {"training_embeddings": t / "none"}, "no embeddings of pixels8, pixels64-standardized, EffLite0"),
    "features of two sets": (two_sets, "hold embeddings of different images"),
    "other weights": (other_weights, "images would be embedded by Inception"),
    "a block that was cut": (cut_block, "part-00000.parquet cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_embeddings_of_something_else_are_refused_in_one_line(world: Path, tmp_path: Path, case: str) -> None:
    change, says = REFUSED[case]
    given = {"training_embeddings": world / "stored"} | change(world, tmp_path)
    with pytest.raises(UserError) as error:
        audit(settings(world, tmp_path / "out", **given))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_refusal_of_a_missing_feature_is_mended_by_the_command_that_it_names(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "with space" / "set"
    shutil.copytree(world / "training", place)
    given = settings(
        world, tmp_path / "out", training=Source(str(place)), features=("pixels8", "standardized"), training_embeddings=tmp_path / "s"
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        audit(given)
    words = shlex.split(str(error.value).split("make them: ")[-1])
    assert words[:4] == ["accelerate", "launch", "-m", "ambient_sd.audit.embedding"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    embedding_module.main(words[4:])
    assert audit(given).found["verdict"]["value"] == 0.5


def test_a_replaced_original_that_no_draw_met_is_noticed_when_it_is_shown(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "CHECKED", 1)
    given = settings(
        world, tmp_path / "out", features=("pixels8",), training_embeddings=world / "stored", mirrored=False
    )
    place = changed(world, tmp_path / "t")
    rows = load_rows(place)
    (met,) = stored.drawn(23, 1, 0, "stored embeddings")
    for name in {"000.png", "003.png", "007.png"} - {rows.names[met]}:
        noise_image(999).save(place / name)
    with pytest.raises(UserError, match=r"is not the image that it was"):
        audit(settings(world, given.output_dir, features=("pixels8",), training_embeddings=world / "stored", mirrored=False,
                       training=Source(str(place))))  # fmt: skip
    assert not list(given.output_dir.glob("audit.*"))


def test_half_precision_and_its_note_leave_copies_found(world: Path, tmp_path: Path) -> None:
    embed_set(load_set(world / "training"), choose(["pixels8"]), tmp_path / "s", block=64, dtype="float16")
    found = audit(settings(world, tmp_path / "out", features=("pixels8",), training_embeddings=tmp_path / "s")).found
    assert found["verdict"]["value"] == 0.5 and any("rounded to another precision" in note for note in found["notes"])
    assert found["images"]["training"]["embeddings"]["features"]["pixels8"]["dtype"] == "float16"


def test_weights_are_named_only_with_the_features_that_are_missing(world: Path, tmp_path: Path) -> None:
    """The embedding refuses weights of a feature that it does not make."""
    given = {"training_embeddings": world / "stored", "files": {"inception": "i.pt", "sscd": None}}
    for features, has in ((("pixels8", "inception"), True), (("pixels8", "pixels16"), False)):
        with pytest.raises(UserError) as error:
            audit(
                settings(
                    world,
                    tmp_path / "out",
                    features=features,
                    training=Source("nowhere.parquet", "train", (("a", "=", "b c"),)),
                    **given,
                )
            )
        command = str(error.value).split("make them: ")[-1]
        assert ("--inception i.pt" in command) == has and f"--features {features[1]} " in command
        assert "nowhere.parquet --dataset_split train --row_filter 'a=b c'" in command


def test_the_two_commands_work_together(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    embedding_module.main([str(world / "training"), "--features", "pixels,standardized", "--out", str(tmp_path / "s")])
    main(["audit", "--generated", str(world / "made"), str(world / "training"), "--features", "pixels,standardized", "--out",
          str(tmp_path / "out"), "--training_embeddings", str(tmp_path / "s")])  # fmt: skip
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["images"]["training"]["embeddings"]["compared"] == 23
