"""The store on disk: entries come back as they went in, half-written and damaged shards are found, nothing is stale."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ambient_sd.data.cache import Store, entry_id, fingerprint
from ambient_sd.utils.errors import UserError

ABOUT = {"what": "numbers", "weights": "w1"}


def entry(i: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), float(i)), "b": torch.tensor([i, -i])}


def filled(root: Path, count: int = 10, per_shard: int = 4, about: dict[str, str] = ABOUT) -> Store:
    store = Store(root, "numbers", about)
    store.create()
    for first in range(0, count, per_shard):
        places = range(first, min(count, first + per_shard))
        store.add([entry_id(str(i)) for i in places], [entry(i) for i in places])
    return store


def test_entries_come_back_as_they_went_in_in_any_order(tmp_path: Path) -> None:
    store = filled(tmp_path)
    again = Store(tmp_path, "numbers", dict(reversed(ABOUT.items())))
    again.open(again.shards())
    assert len(again.shards()) == 3
    order = [7, 0, 9, 3, 3]
    for i, found in zip(order, again.read([entry_id(str(i)) for i in order]), strict=True):
        assert found.keys() == {"a", "b"}
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in entry(i).items()
        )
    assert again.missing([entry_id(s) for s in ("3", "x", "10", "x", "0")]) == [1, 2], "each missing one once"
    with pytest.raises(KeyError):
        again.read([entry_id("x")])
    assert json.loads((store.folder / "about.json").read_text()) == ABOUT
    assert Store(tmp_path, "numbers", ABOUT).missing([entry_id("3")]) == [0], "nothing is opened yet"


def test_ids_that_end_in_zeros_are_told_apart(tmp_path: Path) -> None:
    store = Store(tmp_path, "numbers", ABOUT)
    store.create()
    ids = [b"a" * 15 + b"\0", b"a" * 14 + b"\0\0", b"\0" * 16, b"a" * 16]
    store.add(ids[:3], [entry(i) for i in range(3)])
    store.open(store.shards())
    assert [found["b"][0].item() for found in store.read([ids[1], ids[0], ids[2]])] == [1, 0, 2]
    assert store.missing(ids) == [3]


def test_an_entry_written_twice_is_one(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.add([entry_id("0"), entry_id("new")], [entry(0), entry(5)])
    store.open(store.shards())
    assert torch.equal(store.read([entry_id("0")])[0]["a"], entry(0)["a"])
    assert store.missing([entry_id("0"), entry_id("new")]) == []


def test_other_weights_are_another_folder_and_a_shard_brought_from_there_is_no_good(tmp_path: Path) -> None:
    mine, other = filled(tmp_path), filled(tmp_path, about={**ABOUT, "weights": "w2"})
    assert mine.folder != other.folder
    name = other.shards()[0]
    (other.folder / name).rename(mine.folder / "ff.safetensors")
    assert "another cache" in str(mine.fault("ff.safetensors"))


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "id", "header", "sums", "missing", "garbage", "folder"])
def test_a_damaged_shard_is_found_and_only_that(damage: str, tmp_path: Path) -> None:
    store = filled(tmp_path)
    first, second, _ = store.shards()
    assert [store.fault(name) for name in store.shards()] == [None] * 3
    path = store.folder / first
    raw, tensors = bytearray(path.read_bytes()), load_file(path)
    if damage == "cut":
        path.write_bytes(raw[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage in ("bit", "id"):
        name = {"bit": "a", "id": "entry_ids"}[damage]
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        raw[8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0] + 5] ^= 4
        path.write_bytes(raw)
    elif damage == "header":
        path.write_bytes(raw[:8] + b"x" + raw[9:])
    elif damage == "sums":
        save_file({k: v for k, v in tensors.items() if "crc" not in k}, path, metadata={"about": store.digest})
    elif damage == "garbage":
        path.write_bytes(b"hello" * 100)
    else:
        path.unlink()
    if damage == "folder":
        path.mkdir()
    assert store.fault(first)
    assert store.fault(second) is None


def test_what_was_not_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    before = store.shards()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*latent_cache_dir"):
        store.add([entry_id("late")], [entry(1)])
    assert store.shards() == before
    assert [path.name for path in store.folder.iterdir() if "part" in path.name] == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file", "numbers", ABOUT).create()


def test_the_fingerprint_is_that_of_the_weights() -> None:
    torch.manual_seed(0)
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert fingerprint(a) != fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(a) != fingerprint(a, "with another tokenizer")
    with torch.no_grad():
        b.weight[1, 2] += 1e-7
    assert fingerprint(a) != fingerprint(b)
