"""Two processes and one: the same fixed noise for every image, the same fresh noise per sample, the same loss curve."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import DistributedDataParallelKwargs
from launching import launch
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from ambient_sd.training import plan, validation
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run

WORKER = f"""
import json, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_train_processes import train_all, train_and_record
settings = json.loads(sys.argv[1])
(train_all if "runs" in settings else train_and_record)(settings)
"""


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def train_and_record(settings: dict[str, Any]) -> None:
    """Train, and write what this process saw of it beside the run's folder."""
    rank = os.environ.get("RANK", "0")
    config = TrainConfig(**{k: v.replace("RANK", rank) if isinstance(v, str) else v for k, v in settings.items()})
    seen: dict[str, Any] = {"eps_n": {}, "fresh": {}, "timestep": {}}

    def watch(batch: TrainingBatch) -> None:
        assert batch.eps_n is not None
        for i, (position, key) in enumerate(zip(batch.positions, batch.keys, strict=True)):
            seen["eps_n"][key] = digest(batch.eps_n[i])
            seen["fresh"][position] = digest(batch.noise[i])
            seen["timestep"][position] = int(batch.timesteps[i])

    validation.INFERENCE_STEPS = 3  # as in conftest.py
    done = run(config, progress=False, on_batch=watch)
    seen |= {
        "losses": done.losses,
        "processes": done.processes,
        "data": done.fingerprint,
        "evaluations": done.evaluations,
    }
    Path(f"{config.output_dir}-rank{rank}.json").write_text(json.dumps(seen))


def train_all(settings: dict[str, Any]) -> None:
    """Train several runs one after another; write how gradients were held in each, and what they gave."""
    held: list[bool] = []
    begin = DistributedDataParallel.__init__

    def seen(self: Any, *args: Any, **options: Any) -> None:
        held.append(options.get("gradient_as_bucket_view", False))
        begin(self, *args, **options)

    DistributedDataParallel.__init__ = seen  # type: ignore[method-assign]
    folder = Path(settings["folder"])
    for name, port, values, copied in settings["runs"]:
        os.environ["MASTER_PORT"] = str(port)  # the last run's may not be free yet
        plan.DistributedDataParallelKwargs = DistributedDataParallelKwargs if not copied else partial(_copied, copied)  # type: ignore[misc]
        done = run(TrainConfig(**settings["common"] | values, output_dir=str(folder / name)), progress=False)
        if os.environ["RANK"] == "0":
            (folder / f"{name}.json").write_text(json.dumps({"losses": done.losses, "held": held[-1]}))


def _copied(changes: dict[str, Any], **options: Any) -> DistributedDataParallelKwargs:
    return DistributedDataParallelKwargs(**options | changes)


def launch_all(
    folder: Path, processes: int, common: dict[str, Any], runs: list[tuple[str, dict[str, Any], dict[str, Any]]]
) -> dict[str, Any]:
    """Return the whole U-Net, the losses and how gradients were held of each run: name, settings, changes of DDP's options."""
    (folder / "worker.py").write_text(WORKER)
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in runs]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    with_ports = [(name, port, values, changes) for (name, values, changes), port in zip(runs, ports, strict=True)]
    done = launch(processes, folder / "worker.py", {"folder": str(folder), "common": common, "runs": with_ports})
    assert done.returncode == 0, done.stderr[-3000:]
    weights = {name: load_file(folder / name / "unet/diffusion_pytorch_model.safetensors") for name, *_ in runs}
    return {name: {"weights": weights[name], **json.loads((folder / f"{name}.json").read_text())} for name in weights}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(torch.equal(one["weights"][k], other["weights"][k]) for k in other["weights"])
    return same and one["losses"] == other["losses"]


@pytest.fixture
def common(tiny_base: Path, tiny_images: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
        "train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none",
    }  # fmt: skip


@pytest.mark.slow
def test_gradients_held_in_buckets_keep_their_bits(common: dict[str, Any], tmp_path: Path) -> None:
    """Accumulated without summing, scaled by the samples that are kept, with class images and recomputed activations."""
    tiny.image_folder(tmp_path / "class", [tiny.noise_image(50 + i) for i in range(3)])
    common |= {
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_train_steps": 3, "objective": "plain", "memorization_threshold": 1e-3, "caption_dropout": 0.5,
        "dropped_mean": "kept", "with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a dot",
        "num_class_images": 3, "max_grad_norm": 0.1,
    }  # fmt: skip
    found = launch_all(tmp_path, 2, common, [
        ("held", {}, {}), ("copied", {}, {"gradient_as_bucket_view": False}), ("other", {"dropped_mean": "all"}, {}),
    ])  # fmt: skip
    assert [found[name]["held"] for name in ("held", "copied")] == [True, False]
    assert equal(found["held"], found["copied"])
    assert not equal(found["held"], found["other"]), "negative control: samples were dropped"


@pytest.mark.slow
def test_three_processes_resume_bit_for_bit_deterministically(common: dict[str, Any], tmp_path: Path) -> None:
    common |= {"max_train_steps": 4, "checkpointing_steps": 2}
    again = {"resume_from_checkpoint": str(tmp_path / "straight" / "checkpoint-2")}
    later = {"resume_from_checkpoint": str(tmp_path / "default" / "checkpoint-2")}
    found = launch_all(tmp_path, 3, common, [
        ("straight", {"deterministic": True}, {}), ("resumed", {"deterministic": True, **again}, {}),
        ("default", {}, {}), ("default-resumed", later, {}),
    ])  # fmt: skip
    assert equal(found["straight"], found["resumed"])
    assert not equal(found["default"], found["default-resumed"]), "negative control: torch rebuilds its buckets"


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same four steps on one process and on two, drawing validation images and writing checkpoints on the way."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(WORKER)
    for processes in (1, 2):
        settings = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 8 // processes, "max_train_steps": 4, "checkpointing_steps": 2, "report_to": "none",
            "output_dir": str(folder / f"out{processes}"), "validation_prompts": ["a red disc"],
            "num_validation_images": 3, "validation_steps": 4,
            "probe_steps": 4, "probe_images": 3,
        }  # fmt: skip
        if processes == 1:
            train_and_record(settings)
        else:
            done = launch(processes, folder / "worker.py", settings)
            assert done.returncode == 0, done.stderr[-3000:]
    return {1: folder / "out1", 2: folder / "out2"}


def record(out: Path, rank: int) -> dict:  # type: ignore[type-arg]
    return json.loads(Path(f"{out}-rank{rank}.json").read_text())


def test_two_processes_and_one_draw_the_same_noise(runs: dict[int, Path]) -> None:
    one, first, second = record(runs[1], 0), record(runs[2], 0), record(runs[2], 1)
    assert (one["processes"], first["processes"], second["processes"]) == (1, 2, 2)
    assert one["data"] == first["data"] == second["data"]
    assert len(one["eps_n"]) == 8
    assert {**first["eps_n"], **second["eps_n"]} == one["eps_n"]
    shared = first["eps_n"].keys() & second["eps_n"].keys()
    assert shared, "some images were seen by both processes"
    assert all(first["eps_n"][k] == second["eps_n"][k] for k in shared)
    for kind in ("fresh", "timestep"):
        assert {**first[kind], **second[kind]} == one[kind]
        assert first[kind].keys().isdisjoint(second[kind]), "each sample is trained on once"
    assert len(set(one["fresh"].values())) == len(one["fresh"]) == 32


def test_the_same_global_batch_gives_the_same_curve_and_weights(runs: dict[int, Path]) -> None:
    assert record(runs[1], 0)["losses"] == pytest.approx(record(runs[2], 0)["losses"], rel=1e-4)
    one, two = (load_file(runs[n] / "unet/diffusion_pytorch_model.safetensors") for n in (1, 2))
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 2e-4
    assert {p.name for p in runs[2].glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_validation_images_do_not_depend_on_who_draws_them(runs: dict[int, Path]) -> None:
    one, two = (Image.open(runs[n] / "validation" / "step-4.png") for n in (1, 2))
    assert one.size == two.size == (3 * 100 + 4, 32 + 26 + 8)
    row = (0, 17, one.width, 49)  # the images; below stand their scores
    assert max(high for _, high in ImageChops.difference(one.crop(row), two.crop(row)).getextrema()) <= 8


def test_every_process_gets_the_share_of_copies_that_one_decides_and_the_same_as_alone(runs: dict[int, Path]) -> None:
    (one,), (first,), (second,) = (record(runs[n], rank)["evaluations"] for n, rank in ((1, 0), (2, 0), (2, 1)))
    assert first == second
    assert {k: first[k] for k in ("step", "copies", "published", "n")} == {
        k: one[k] for k in ("step", "copies", "published", "n")
    }
    assert first["ratio"] == pytest.approx(one["ratio"], rel=1e-2)
    assert (runs[2] / "probe" / "step-4.png").is_file()


@pytest.mark.slow
def test_processes_that_decode_other_images_do_not_train(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    for rank in (0, 1):
        tiny.tiny_folder(tmp_path / f"images{rank}", count=4, size=48 + rank)
    done = launch(2, tmp_path / "worker.py", {
        "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tmp_path / "imagesRANK"), "resolution": 32,
        "train_batch_size": 1, "max_train_steps": 1, "report_to": "none", "output_dir": str(tmp_path / "out"),
    })  # fmt: skip
    assert done.returncode != 0
    assert "the processes of this run decode different images" in done.stderr
    assert not (tmp_path / "out").exists()
