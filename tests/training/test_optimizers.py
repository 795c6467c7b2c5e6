"""AdamW weight by weight: the bits of one call, steps within the backward pass, bfloat16 weights, moments in CPU memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from ambient_sd.training import footprint, optimizers
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.footprint import Footprint, predict
from ambient_sd.training.loop import run
from ambient_sd.training.optimizers import ByWeight, round_stochastically
from ambient_sd.training.plan import base_of, plan_run
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]
UNET = "diffusion_pytorch_model.safetensors"
FUSED: dict[str, Any] = {"fused_backward_pass": True, "max_grad_norm": 0.0}
BF16: dict[str, Any] = {"full_bf16": True, "mixed_precision": "bf16"}
EIGHT: dict[str, Any] = {"use_8bit_adam": True}


@pytest.fixture
def full(settings: Settings) -> Settings:
    """Settings of a short training of all weights."""
    return lambda name="out", **values: settings(name, **{"lora": False, "learning_rate": 1e-3, **values})


def needs(values: dict[str, Any]) -> None:
    if values.get("use_8bit_adam"):
        pytest.importorskip("bitsandbytes")


def weights(folder: str | Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / part / UNET)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "values", [{}, EIGHT, {"gradient_checkpointing": True, "use_ema": True}], ids=["adam", "8bit", "ema"]
)
def test_step_within_the_backward_pass_changes_no_bit(full: Settings, values: dict[str, Any]) -> None:
    needs(values)
    plain, fused, clipped = (
        full("plain", max_grad_norm=0.0, **values), full("fused", **FUSED, **values), full("clipped", max_grad_norm=1e-2, **values),
    )  # fmt: skip
    losses = [run(config, progress=False).losses for config in (plain, fused, clipped)]
    ours, theirs, other = (weights(config.output_dir) for config in (fused, plain, clipped))
    assert losses[1] == losses[0] and equal(ours, theirs)
    assert losses[2] != losses[0] and not equal(other, theirs), "negative control"


@pytest.mark.parametrize("values", [FUSED, BF16, {**FUSED, **BF16, **EIGHT, "use_ema": True}, {"offload_optimizer": True}],
                         ids=["fused", "bf16", "all", "offload"])  # fmt: skip
def test_resumed_run_is_bit_equal(full: Settings, values: dict[str, Any]) -> None:
    needs(values)
    options = {"checkpointing_steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 1, "max_train_steps": 4, **values}
    straight = run(full("straight", **options), progress=False)
    out, trained = Path(straight.output), weights(straight.output)
    (out / "checkpoint-4").rename(out / "gone")
    (out / "unet" / UNET).unlink()
    resumed = run(full("straight", resume_from_checkpoint="latest", **options), progress=False)
    assert resumed.first_step == 2 and resumed.losses == straight.losses
    assert equal(weights(resumed.output), trained)
    moments = [load_file(out / name / "optimizer.safetensors") for name in ("gone", "checkpoint-4")]
    assert equal(*moments)


def test_bfloat16_weights_stay_near_those_in_float32(full: Settings) -> None:
    values = {"mixed_precision": "bf16", "learning_rate": 1e-4, "max_train_steps": 6}
    half, whole = full("half", full_bf16=True, **values), full("whole", **values)
    losses = [run(config, progress=False).losses for config in (half, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]
    ours = weights(half.output_dir)
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert half.full_bf16 and {v.dtype for v in weights(whole.output_dir).values()} == {torch.float32}


def test_rounding_keeps_the_mean_where_the_nearest_does_not() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).repeat(4096, 1)
    rounded = round_stochastically(x, torch.Generator().manual_seed(1)).float()
    apart = (rounded - x).abs()
    assert float((apart / x.abs()).max()) < 2**-7, "one of the two around it"
    bias = ((rounded - x).mean(0) / apart.mean(0)).abs().mean()
    nearest = x.bfloat16().float()
    assert bias < 0.05 < ((nearest - x).mean(0) / (nearest - x).abs().mean(0)).abs().mean()


def test_what_bfloat16_holds_is_not_changed() -> None:
    x = torch.cat(
        [torch.randn(1000).bfloat16().float(), torch.tensor([0.0, -0.0, 2.0**-130, float("inf"), -float("inf")])]
    )
    assert torch.equal(round_stochastically(x).float(), x)


def test_small_steps_survive_in_bfloat16() -> None:
    """Steps of a tenth of the distance of two numbers: rounded to the nearest, none would ever be made."""
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = ByWeight(torch.optim.SGD, [{"params": [weight], "lr": 2.0**-7 / 10}])
    for _ in range(40):
        weight.sum().backward()
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 4 * 2.0**-7, abs=2e-3)
    assert float(torch.ones((), dtype=torch.bfloat16) + 2.0**-7 / 10) == 1.0, "negative control"


def test_rounding_is_a_function_of_seed_and_step() -> None:
    def step(seed: int, done: int) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = ByWeight(torch.optim.SGD, [{"params": [weight], "lr": 1e-3}], seed=seed, step=done)
        torch.manual_seed(id(weight))
        weight.sum().backward()
        optimizer.step()
        return weight.detach()

    assert torch.equal(step(0, 3), step(0, 3))
    assert not torch.equal(step(0, 3), step(0, 4)) and not torch.equal(step(0, 3), step(1, 3))


def test_gradients_are_gone_when_the_pass_is_over() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(128, 128, bias=False) for _ in range(8)))
    peaks = []
    for in_backward in (False, True):
        optimizer = ByWeight(
            torch.optim.SGD, [{"params": list(layers.parameters()), "lr": 0.1}], in_backward=in_backward
        )
        optimizer.listen()
        x = torch.ones(1, 128)
        peaks.append(footprint._peak(lambda x=x: layers(x).sum().backward(), [layers]))  # type: ignore[misc]
        assert all((p.grad is None) == in_backward for p in layers.parameters())
        optimizer.zero_grad()
    one = 4 * 128**2
    assert peaks[0] > (8 + 8) * one > (8 + 3) * one > peaks[1]


def test_a_weight_that_is_used_after_its_step_is_noticed() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = ByWeight(torch.optim.SGD, [{"params": [weight], "lr": 0.1}], in_backward=True)
    optimizer.listen()
    x = torch.ones(2, requires_grad=True)
    y = weight @ x
    (weight * 1.0).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({**FUSED, "max_grad_norm": 1.0}, "fused_backward_pass is given with max_grad_norm 1"),
        ({**FUSED, "gradient_accumulation_steps": 2}, "fused_backward_pass is given with gradient_accumulation_steps 2"),
        ({**FUSED, "compile": True}, "fused_backward_pass is given with compile"),
        ({**FUSED, "agc": 0.8, "dropped_mean": "kept"}, "fused_backward_pass is given with dropped_mean"),
        ({**FUSED, "with_prior_preservation": True, "class_data_dir": "a", "class_prompt": "b"}, "fused_backward_pass is given with with_prior"),
        *(({name: True, "max_grad_norm": 0.0, "lora": True}, f"{name} is on; .* leave it out, or leave lora out") for name in ("fused_backward_pass", "full_bf16", "offload_optimizer")),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0; it must be at least 0"),
    ],
)  # fmt: skip
def test_combinations_that_do_not_work_are_one_line(full: Settings, values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        full(**values)


@pytest.mark.parametrize(
    ("values", "kind", "precision", "line"),
    [
        (FUSED, DistributedType.MULTI_GPU, "no", "fused_backward_pass is given and accelerate is set to MULTI_GPU"),
        (BF16, DistributedType.FSDP, "bf16", "full_bf16 is given and accelerate is set to FSDP"),
        ({"offload_optimizer": True}, DistributedType.MULTI_CPU, "no", "offload_optimizer is given and accelerate"),
        (BF16, DistributedType.NO, "no", "full_bf16 is given and mixed_precision is no"),
        (FUSED, DistributedType.NO, "fp16", "fused_backward_pass is given and mixed_precision is fp16"),
    ],
)
def test_launches_that_do_not_work_are_one_line(
    full: Settings, values: dict[str, Any], kind: DistributedType, precision: str, line: str
) -> None:
    launched: Any = SimpleNamespace(distributed_type=kind, mixed_precision=precision)
    with pytest.raises(UserError, match=line):
        optimizers.check(full(**values), launched)
    optimizers.check(full(), launched)


def test_class_images_of_a_dataset_refuse_the_fused_pass(full: Settings, tmp_path: Path) -> None:
    import tiny

    data = tmp_path / "kohya"
    for folder in ("img/1_a", "reg/1_b"):
        tiny.image_folder(data / folder, [tiny.noise_image(len(folder))])
        (data / folder / "000.txt").write_text("a caption")
    plan_run(full(train_data_dir=str(data), layout="kohya"))
    with pytest.raises(UserError, match="fused_backward_pass is given with class images"):
        plan_run(full(train_data_dir=str(data), layout="kohya", **FUSED))


def test_prediction_of_each_option_in_closed_form(full: Settings, small_base: Path) -> None:
    def of(**values: Any) -> Footprint:
        config = full(pretrained_model_name_or_path=str(small_base), **values)
        return predict(config, base_of(config), (32, 32), precision="bf16")

    plain, fused, half, away = of(), of(**FUSED), of(use_ema=True, **BF16), of(offload_optimizer=True)
    count = plain.trained
    assert plain.weights == plain.gradients == 4 * count and plain.moments == 8 * count
    assert fused.gradients == 0 and fused.step <= plain.step
    assert half.weights == half.gradients == 2 * count and half.moments == 8 * count
    assert away.moments == 0 and away.checkpoint == plain.checkpoint == 12 * count
    assert half.average == 4 * count and half.checkpoint == (10 + 4) * count and plain.average == 0
