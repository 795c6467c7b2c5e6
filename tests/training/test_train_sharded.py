"""A U-Net spread over two processes (FSDP2) trains, clips, saves and resumes as a whole one on one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_flow
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops
from safetensors.torch import load_file

from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils.errors import UserError

ROOT = Path(__file__).parents[2]
CLIP = 1e-3  # far below the gradients' norm: every step is clipped

# Imports once and forks a process per rank, as the torture does: the launcher would import everything anew each time.
WORKER = """
import json, os, shutil, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
import torture
from ambient_sd.training import loop, sharding
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)
torture.spread_models()
real = sharding.whole_unet

def counted(unet):
    whole = real(unet)  # cuts again what a forward pass has gathered
    rank, weights = os.environ.get("RANK", "0"), list(unet.parameters())
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in weights)
    Path(f"{os.environ['OUT']}.held{rank}").write_text(json.dumps([held, sum(p.numel() for p in weights)]))
    return whole

sharding.whole_unet = counted
for processes, settings, origin in json.loads(sys.argv[2]):
    out = Path(settings["output_dir"])
    os.environ["OUT"] = str(out)
    if origin is not None:
        out.mkdir()
        shutil.copytree(origin, out / Path(origin).name)
    if torture.wait(torture.start(settings, processes), lambda: False):
        sys.exit(torture.log(out))
"""


def train(folder: Path, base: Path, images: Path, runs: Mapping[str, tuple[int, dict[str, Any], str | None]]) -> None:
    """Train several runs of one global batch: name -> processes (two are FSDP2's), settings, checkpoint to go on from."""
    common = {
        "pretrained_model_name_or_path": str(base), "train_data_dir": str(images), "resolution": 32, "report_to": "none",
        "gradient_accumulation_steps": 2, "max_train_steps": 2, "checkpointing_steps": 1, "max_grad_norm": CLIP,
        "learning_rate": 1e-3,
    }  # fmt: skip
    plan = [
        (n, common | {"train_batch_size": 4 // n, "output_dir": str(folder / name)}
         | ({"resume_from_checkpoint": "latest"} if origin else {}) | own, origin and str(folder / origin))
        for name, (n, own, origin) in runs.items()
    ]  # fmt: skip
    (folder / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, str(folder / "worker.py"), str(ROOT / "tools"), json.dumps(plan)], capture_output=True, text=True,
        timeout=1500, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


def apart(one: Path, two: Path) -> float:
    """Return the largest difference of two files' tensors, which have the same names, shapes and types."""
    a, b = load_file(one), load_file(two)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on one process, on two, and the second of the two's on one."""
    folder = tmp_path_factory.mktemp("sharded")
    taught = {"objective": "distill", "distill_level": 1.0, "lora": True, "max_train_steps": 4}
    train(folder, tiny_base, tiny_images, {
        "one": (1, {}, None), "two": (2, {}, None), "crossed": (1, {}, "two/checkpoint-1"),
        "taught one": (1, taught | {"train_batch_size": 2}, None), "taught two": (2, taught | {"train_batch_size": 1}, None),
    })  # fmt: skip
    return folder


@pytest.mark.slow
def test_each_of_two_processes_holds_half_of_the_weights(runs: Path) -> None:
    whole, everything = json.loads((runs / "one.held0").read_text())
    assert whole == everything
    parts = [json.loads((runs / f"two.held{rank}").read_text())[0] for rank in (0, 1)]
    assert sum(parts) == everything
    assert max(parts) < 0.55 * everything


@pytest.mark.slow
def test_a_spread_model_has_the_losses_weights_and_moments_of_a_whole_one(runs: Path) -> None:
    assert losses(runs / "two") == pytest.approx(losses(runs / "one"), rel=1e-6)
    for step in (1, 2):
        one, two = (runs / name / f"checkpoint-{step}" for name in ("one", "two"))
        assert (
            apart(one / "unet/diffusion_pytorch_model.safetensors", two / "unet/diffusion_pytorch_model.safetensors")
            < 1e-4
        )
        # Linear in the gradients, unlike Adam's step: another norm or another sum over the processes would show.
        assert apart(one / "optimizer.safetensors", two / "optimizer.safetensors") < 1e-4 * CLIP


@pytest.mark.slow
def test_a_process_without_a_sample_above_the_level_asks_the_base_too(runs: Path) -> None:
    """A spread network is gathered by all processes together: where one of them did not ask, the others waited for it."""
    assert losses(runs / "taught two") == pytest.approx(losses(runs / "taught one"), rel=1e-6)


@pytest.mark.slow
def test_gradients_of_a_spread_model_are_clipped_by_their_norm_over_all_processes(runs: Path) -> None:
    moments = load_file(runs / "two/checkpoint-1/optimizer.safetensors")
    norm = float(torch.stack([v.square().sum() for k, v in moments.items() if k.endswith("exp_avg")]).sum().sqrt())
    assert norm == pytest.approx(0.1 * CLIP, rel=1e-3)  # after one step (1 - beta1) times the clipped gradient


@pytest.mark.slow
def test_the_result_of_a_spread_model_is_the_stock_folder(runs: Path) -> None:
    names = [{p.relative_to(out).as_posix() for p in out.rglob("*")} for out in (runs / "one", runs / "two")]
    assert names[0] == names[1]
    assert (runs / "one/unet/config.json").read_bytes() == (runs / "two/unet/config.json").read_bytes()
    pipe = StableDiffusionPipeline.from_pretrained(runs / "two")
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"


@pytest.mark.slow
def test_a_checkpoint_of_a_spread_model_continues_on_one_process(runs: Path) -> None:
    assert losses(runs / "crossed") == pytest.approx(losses(runs / "two"), rel=1e-6)
    one, two = (runs / name / "checkpoint-2/optimizer.safetensors" for name in ("crossed", "two"))
    assert apart(one, two) < 1e-4 * CLIP


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "precision"),
    [({"gradient_checkpointing": True}, "no"), ({}, "bf16"), ({"lora": True, "output_kohya_format": True}, "bf16"),
     ({"lora": True, "rank": 1, "lora_dropout": 0.2, "use_dora": True, "lora_target_modules": ["to_q", "to_v", "conv1"]}, "no")],
    ids=["whole U-Net", "whole U-Net in bf16", "LoRA in bf16", "DoRA of rank 1 with dropout"],
)  # fmt: skip
def test_every_kind_of_training_survives_being_spread_and_resumed(
    own: dict[str, Any], precision: str, tiny_base: Path, tiny_images: Path, tmp_path: Path
) -> None:
    own = own | {"mixed_precision": precision, "validation_prompts": ["a red disc"], "num_validation_images": 3}
    # The step after a look must not see weights that the look gathered.
    own |= {"max_train_steps": 3, "checkpointing_steps": 2, "validation_steps": 2}
    train(tmp_path, tiny_base, tiny_images, {
        "one": (1, own, None), "two": (2, own, None), "again": (2, own, "two/checkpoint-2"),
        "crossed": (2, own, "one/checkpoint-2"),
    })  # fmt: skip
    close = 1e-6 if precision == "no" else 1e-3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=close)
    assert losses(tmp_path / "crossed") == pytest.approx(losses(tmp_path / "one"), rel=close)
    for path in (tmp_path / "two").rglob("*.safetensors"):
        name = path.relative_to(tmp_path / "two")
        assert path.read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert (tmp_path / "two/losses.jsonl").read_bytes() == (tmp_path / "again/losses.jsonl").read_bytes()
    names = [{p.relative_to(out).as_posix() for p in out.rglob("*")} for out in (tmp_path / "one", tmp_path / "two")]
    assert names[0] == names[1]
    if precision == "no":  # three images on two processes
        one, two = (Image.open(tmp_path / name / "validation/step-3.png") for name in ("one", "two"))
        row = (0, 17, one.width, 49)  # the images; below stand their scores
        assert max(high for _, high in ImageChops.difference(one.crop(row), two.crop(row)).getextrema()) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--lora"]], ids=["whole U-Net", "LoRA"])
def test_sigkills_of_a_spread_run_change_no_byte(options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "tools/torture.py", "--sharded", "--kills", "4", "--accumulation", "2", *options],
        capture_output=True, text=True, timeout=1500, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "\n0 differences in " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", ["fsdp2", "zero2"])
def test_the_launcher_spreads_a_model_as_the_file_says(
    file: str, tiny_base: Path, tiny_images: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{file}.yaml",
        "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", "train_text_to_image_ambient.py",
        "--pretrained_model_name_or_path", str(tiny_base), "--train_data_dir", str(tiny_images), "--resolution", "32",
        "--train_batch_size", "2", "--max_train_steps", "2", "--report_to", "none", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 600, "cwd": ROOT, "env": environment}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/model_index.json").exists()
    done = subprocess.run([*command, "--use_ema"], check=False, **options)  # refused: FSDP is what it asked for
    assert done.returncode != 0
    assert "use_ema is given and accelerate is set to FSDP" in done.stderr


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("asked", "own", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "set to DEEPSPEED; .*never tested.*fsdp2.yaml"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            {"use_ema": True},
            "use_ema is given and accelerate is set to DEEPSPEED",
        ),
        (FSDP, {"use_ema": True}, "use_ema is given and accelerate is set to FSDP"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "fsdp_version is not 2"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading is true"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params is true"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "fsdp_activation_checkpointing is true"),
        (FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "a parallelism_config is given"),
        (FSDP, {"mixed_precision": "fp16"}, "mixed_precision is fp16 under FSDP"),
        (FSDP | {"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "mixed_precision is fp16 under FSDP"),
    ],
)
def test_what_does_not_go_with_a_spread_model_is_refused_before_anything_is_read(
    asked: dict[str, str], own: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in asked.items():
        monkeypatch.setenv(variable, value)
    absent = {
        "pretrained_model_name_or_path": str(tmp_path / "no-base"),
        "train_data_dir": str(tmp_path / "no-images"),
    }
    with pytest.raises(UserError, match=said) as caught:
        run(TrainConfig(**absent, output_dir=str(tmp_path / "out"), report_to="none", **own), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    for variable in asked:
        monkeypatch.delenv(variable)
    with pytest.raises(UserError, match="no-base"):  # it is what was asked for that was refused
        run(TrainConfig(**absent, output_dir=str(tmp_path / "out"), report_to="none"), progress=False)


def test_processors_are_not_mistaken_for_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (FSDP | {"ACCELERATE_USE_CPU": "true"}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(UserError, match="FSDP on CPUs is asked for"):
        run(TrainConfig(pretrained_model_name_or_path="no-base", train_data_dir="no-images"), progress=False)


@pytest.mark.slow
def test_a_transformer_is_spread_by_its_own_blocks(tiny_images: Path, tmp_path: Path) -> None:
    tiny_flow.tiny_sd3_pipeline().save_pretrained(tmp_path / "base")
    train(tmp_path, tmp_path / "base", tiny_images, {"one": (1, {}, None), "two": (2, {}, None)})
    parts = [json.loads((tmp_path / f"two.held{rank}").read_text()) for rank in (0, 1)]
    assert max(held for held, _ in parts) < 0.6 * parts[0][1]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    name = "checkpoint-2/transformer/diffusion_pytorch_model.safetensors"
    assert apart(tmp_path / "one" / name, tmp_path / "two" / name) < 1e-4
