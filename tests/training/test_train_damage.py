"""Damaged checkpoints: each of many ways is seen, named in one line, and the checkpoint before is used; nothing is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ambient_sd.training import checkpoints
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils import files
from ambient_sd.utils.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
EMA = "unet_ema/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def values(tiny_base: Path, tiny_images: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
        "train_batch_size": 3, "max_train_steps": 4, "checkpointing_steps": 2, "report_to": "none", "use_ema": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("trained") / "out"
    run(TrainConfig(**values, output_dir=str(out)), progress=False)
    return out


def cut(name: str, length: float) -> Callable[[Path], object]:
    return lambda c: (c / name).write_bytes((data := (c / name).read_bytes())[: int(length * len(data))])


def flip(name: str, at: float) -> Callable[[Path], object]:
    def change(c: Path) -> None:
        data = bytearray((c / name).read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x10
        (c / name).write_bytes(data)

    return change


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda c: (c / name).write_text(text)


def gone(name: str) -> Callable[[Path], object]:
    return lambda c: files.remove(c / name)


def other(name: str) -> Callable[[Path], object]:
    """The file of the checkpoint before."""
    return lambda c: shutil.copy(c.parent / "checkpoint-2" / name, c / name)


def file_in_place(c: Path) -> None:
    shutil.rmtree(c)
    c.write_bytes(b"not a folder")


def renamed(c: Path) -> None:
    shutil.rmtree(c)
    shutil.copytree(c.parent / "checkpoint-2", c)


def emptied(c: Path) -> None:
    shutil.rmtree(c)
    c.mkdir()


def half(c: Path) -> None:
    """What a copy that was broken off leaves."""
    for name in ("unet_ema", "trainer_state.json", "optimizer.safetensors", "manifest.json"):
        files.remove(c / name)


def folder_in_place(c: Path) -> None:
    (c / "optimizer.safetensors").unlink()
    (c / "optimizer.safetensors").mkdir()


def manifest_of_nothing(c: Path) -> None:
    (c / "manifest.json").write_text('{"files": {}}')


WAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (cut(UNET, 0.6), UNET),
    "weights empty": (cut(UNET, 0), UNET),
    "weights flipped at the start": (flip(UNET, 0), UNET),
    "weights flipped in the middle": (flip(UNET, 0.5), UNET),
    "weights flipped at the end": (flip(UNET, 1), UNET),
    "weights missing": (gone(UNET), UNET),
    "weights of another step": (other(UNET), UNET),
    "folder of weights missing": (gone("unet"), "unet/"),
    "average flipped": (flip(EMA, 0.7), EMA),
    "average missing": (gone("unet_ema"), "unet_ema/"),
    "average's configuration cut": (cut("unet_ema/config.json", 0.5), "unet_ema/config.json"),
    "configuration of another shape": (write("unet/config.json", "{}"), "unet/config.json"),
    "optimizer cut by a byte": (lambda c: os.truncate(p := c / "optimizer.safetensors", p.stat().st_size - 1), "optimizer"),
    "optimizer flipped": (flip("optimizer.safetensors", 0.9), "optimizer.safetensors"),
    "optimizer missing": (gone("optimizer.safetensors"), "optimizer.safetensors"),
    "optimizer of another step": (other("optimizer.safetensors"), "optimizer.safetensors"),
    "optimizer a folder": (folder_in_place, "optimizer.safetensors"),
    "state no JSON": (write("trainer_state.json", '{"step": 4,'), "trainer_state.json"),
    "state of another step": (other("trainer_state.json"), "trainer_state.json"),
    "state empty": (cut("trainer_state.json", 0), "trainer_state.json"),
    "losses cut": (cut("losses.jsonl", 0.5), "losses.jsonl"),
    "losses of another step": (other("losses.jsonl"), "losses.jsonl"),
    "manifest missing": (gone("manifest.json"), "manifest.json is missing"),
    "manifest of another": (other("manifest.json"), "losses.jsonl"),
    "manifest cut": (cut("manifest.json", 0.5), "manifest.json"),
    "manifest empty": (cut("manifest.json", 0), "manifest.json"),
    "manifest a list": (write("manifest.json", "[1]"), "manifest.json"),
    "manifest not text": (lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json"),
    "manifest of nothing": (manifest_of_nothing, "manifest.json does not list"),
    "weights too many": (write("unet/a.safetensors", "x"), "unet/a.s"),
    "another renamed": (renamed, "renamed"),
    "folder empty": (emptied, "empty"),
    "folder half there": (half, "manifest.json is missing"),
    "a file": (file_in_place, "no folder"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    change, named = WAYS[way]
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    assert checkpoints.find(out, "latest") == out / "checkpoint-4", "negative control: whole before"
    assert checkpoints.find(out, "checkpoint-4") == out / "checkpoint-4"
    change(out / "checkpoint-4")
    before = contents(out)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.find(out, "latest") == out / "checkpoint-2"
    (line,) = [r.getMessage() for r in caplog.records]
    assert "checkpoint-4" in line and named in line and "\n" not in line
    with pytest.raises(UserError, match="name another one, or use latest") as caught:
        checkpoints.find(out, "checkpoint-4")
    assert named in str(caught.value) and "\n" not in str(caught.value)
    (out / "checkpoint-2" / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole.*checkpoint-4 .*checkpoint-2 .*start anew"):
        checkpoints.find(out, "latest")
    assert contents(out) == {k: v for k, v in before.items() if k != "checkpoint-2/optimizer.safetensors"}


def test_a_run_goes_on_from_the_one_before_and_ends_the_same(
    values: dict[str, Any], trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    flip(UNET, 0.5)(out / "checkpoint-4")
    (out / "losses.jsonl").write_text('{"step": 1, "lo')
    files.remove(out / "unet")
    settings = values | {"output_dir": str(out)}
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        run(TrainConfig(**settings), progress=False)
    summary = run(TrainConfig(**settings, resume_from_checkpoint="latest"), progress=False)
    assert (summary.first_step, len(summary.losses)) == (2, 4)
    mine, theirs = contents(out), contents(trained)
    for held in (mine, theirs):
        del held["train_config.yaml"]
    assert mine == theirs, "the damaged one is replaced by a whole one, and all else is as it was"


def test_all_damaged_ends_the_run_before_it_begins_anew(values: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    for name in ("checkpoint-2", "checkpoint-4"):
        flip(UNET, 0.5)(out / name)
    before = contents(out)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        run(TrainConfig(**values, output_dir=str(out), resume_from_checkpoint="latest"), progress=False)
    assert contents(out) == before
    shutil.rmtree(out)
    assert checkpoints.find(out, "latest") is None, "negative control: no checkpoint at all is no damage"


def test_the_limit_spares_the_last_whole_checkpoint(trained: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])

    def save(step: int, limit: int) -> list[str]:
        state = {"identity": {}}
        checkpoints.save(
            out, step, write_weights=lambda _: None, optimizer=optimizer.state_dict(), state=state, limit=limit
        )
        return [p.name for p in checkpoints.find_all(out)]

    (out / "checkpoint-9").mkdir()
    shutil.copy(out / "checkpoint-2" / "trainer_state.json", out / "checkpoint-9")
    (out / "checkpoint-12").mkdir()  # somebody else's: nothing of ours in it
    assert save(5, limit=1) == ["checkpoint-5", "checkpoint-12"]
    assert checkpoints.damage(out / "checkpoint-5") is None
    assert save(6, limit=2) == ["checkpoint-5", "checkpoint-6", "checkpoint-12"]


@pytest.mark.parametrize("after", ["old set aside", "new in place"])
def test_a_kill_between_two_names_loses_no_checkpoint(trained: Path, tmp_path: Path, after: str) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    aside = out / ".checkpoint-4.ambient-old"
    shutil.copytree(out / "checkpoint-4", aside)
    if after == "old set aside":
        (out / "checkpoint-4").rename(out / ".checkpoint-4.part")
    assert checkpoints.find(out, "latest") == out / "checkpoint-4"
    assert not aside.exists()


def test_no_folder_is_half_replaced(tmp_path: Path) -> None:
    """Whichever of its calls on the disk `replace_all` dies in, old index and new parts never lie side by side."""
    for dies in range(20):
        out, staging = tmp_path / f"out{dies}", tmp_path / f"staging{dies}"
        for folder, text in ((out, "old"), (staging, "new")):
            for part in ("unet", "vae"):
                (folder / part).mkdir(parents=True)
                (folder / part / "weights").write_text(text)
            (folder / "index").write_text(text)
        calls = iter(range(dies + 1))

        def counted(real: Callable[..., Any], calls: Any = calls) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return real(*args, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "replace", "unlink"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            try:
                files.replace_all(staging, out, last="index")
                ended = True
            except KeyboardInterrupt:
                ended = False
        files.recover(out)
        texts = {(out / part / "weights").read_text() for part in ("unet", "vae")}
        if (out / "index").exists():
            assert texts == {(out / "index").read_text()}
        if ended:
            assert texts == {"new"}
            break
    assert ended and dies > 4


def test_a_manifest_holds_while_the_folder_moves_and_notes_are_added(trained: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(trained / "checkpoint-4", tmp_path / "the good one"))
    (kept / "note.txt").write_text("the good one")
    (kept / ".DS_Store").write_text("")
    assert checkpoints.damage(kept) is None
    save_file({"a": torch.zeros(1)}, kept / "unet" / "diffusion_pytorch_model-2.safetensors")
    assert "does not belong there" in str(checkpoints.damage(kept))


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: a write beyond fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_one_line_and_spares_the_checkpoint_before(
    values: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    shutil.rmtree(out / "checkpoint-4")
    before = contents(out / "checkpoint-2")
    config = TrainConfig(**values, output_dir=str(out), resume_from_checkpoint="latest")
    with (
        room(20_000),
        pytest.raises(UserError, match=r"^checkpoint-4 cannot be written to .*make room there") as caught,
    ):
        run(config, progress=False)
    assert "\n" not in str(caught.value)
    assert not (out / "checkpoint-4").exists()
    assert contents(out / "checkpoint-2") == before
    run(config, progress=False)
    assert contents(out / "checkpoint-4") == contents(trained / "checkpoint-4")
