"""A frozen base in 8 or 4 bits: what its layers compute, what is trained on it, what is saved, and what memory it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ambient_sd.training import footprint, quantized, sharding
from ambient_sd.training.adapters import WEIGHTS_NAME
from ambient_sd.training.config import QUANTIZED, TrainConfig
from ambient_sd.training.footprint import predict
from ambient_sd.training.loop import run
from ambient_sd.training.plan import base_of
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: torch.nn.Linear(96, 64), (2, 5, 96)),
    "without bias": (lambda: torch.nn.Linear(64, 48, bias=False), (3, 64)),
    "strided": (lambda: torch.nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 9)),
    "grouped": (lambda: torch.nn.Conv2d(16, 32, 3, groups=2, dilation=2), (1, 16, 9, 9)),
}
ERROR = {"int8": 0.01, "fp8": 0.03, "nf4": 0.1}  # of a weight, relative to its standard deviation
LOSS = {"int8": 0.01, "fp8": 0.02, "nf4": 0.06}  # of a random base's losses; relative


@pytest.fixture(autouse=True)
def packs_the_tiny_base(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(quantized, "FEWEST", 64)


def tensors(config: TrainConfig) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(Path(config.output_dir) / WEIGHTS_NAME, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_layer_computes_as_its_unpacked_weight(kind: str, name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, plain = make().requires_grad_(False), make().requires_grad_(False)
    before = layer.weight.clone()
    assert quantized.quantize(torch.nn.Sequential(layer), kind, "cpu") == 1
    plain.load_state_dict({"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias})})
    assert float((layer.weight - before).std() / before.std()) < ERROR[kind]
    x = torch.randn(shape, requires_grad=True)
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            y, expected = layer(x), plain(x)
        assert y.dtype == precision and torch.equal(y, expected)
        ours, theirs = (torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (y, expected))
        assert torch.equal(ours, theirs)
    plain.weight.copy_(before)
    assert not torch.equal(layer(x), plain(x)), "negative control: nothing was packed"


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.02), ("fp8", 1.02), ("nf4", 0.52)])
def test_bytes_of_a_weight(kind: str, most: float) -> None:
    layer = torch.nn.Linear(512, 512, bias=False).requires_grad_(False)
    quantized.quantize(torch.nn.Sequential(layer), kind, "cpu")
    held = sum(p.nbytes for p in layer.parameters()) - layer.table.nbytes
    assert most - 0.03 < held / 512**2 < most


def test_no_unpacked_weight_stays_between_the_passes() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4)))
    x = torch.zeros(1, 256, requires_grad=True)
    with footprint._Alive() as plain:
        unpacked = [layer.weight * 1.0 for layer in layers]
    layers.requires_grad_(False)
    quantized.quantize(layers, "int8", "cpu")
    with footprint._Alive() as alive:
        y = layers(x)
        kept = alive.now
        y.sum().backward()
    one = 4 * 256**2
    assert kept < one / 4 and alive.peak < 1.5 * one < len(unpacked) * one <= plain.peak


def test_what_is_trained_or_small_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, frozen = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64).requires_grad_(False)
    monkeypatch.setattr(quantized, "FEWEST", 64**2)
    assert quantized.quantize(torch.nn.Sequential(trained, frozen), "nf4", "cpu") == 1
    assert isinstance(trained.weight, torch.nn.Parameter) and not isinstance(frozen.weight, torch.nn.Parameter)
    monkeypatch.setattr(quantized, "FEWEST", 64**2 + 1)
    small = torch.nn.Linear(64, 64).requires_grad_(False)
    assert quantized.quantize(torch.nn.Sequential(small), "nf4", "cpu") == 0


@pytest.fixture
def plain(settings: Settings) -> list[float]:
    return run(settings("plain"), progress=False).losses


@pytest.mark.parametrize("kind", QUANTIZED)
def test_losses_are_near_those_of_the_base(settings: Settings, plain: list[float], kind: str) -> None:
    losses = run(settings(kind, quantize_base=kind), progress=False).losses
    assert losses == pytest.approx(plain, rel=LOSS[kind]) and losses != plain


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_dora": True, "offload_base": True},
        {"lora_kind": "loha"},
        {"lora_kind": "lokr"},
        {"lora_init": "pissa"},
        {"lora_target_modules": ["to_q", "conv1"], "lora_dropout": 0.2, "mixed_precision": "bf16"},
        {"lora_min_rank": 1, "gradient_checkpointing": True, "train_text_encoder": True},
        {"deterministic": True, "use_8bit_adam": True},
    ],
    ids=lambda values: "-".join(values) or "lora",
)
def test_resumed_run_is_bit_equal_and_file_of_equal_form(settings: Settings, values: dict[str, Any]) -> None:
    options = {"quantize_base": "nf4", "checkpointing_steps": 2, **values}
    straight, other = settings("straight", **options), settings("other", **values)
    losses = run(straight, progress=False).losses
    run(other, progress=False)
    stopped = settings("stopped", **options, max_train_steps=2)
    run(stopped, progress=False)
    (Path(stopped.output_dir) / WEIGHTS_NAME).unlink()
    resumed = run(settings("stopped", resume_from_checkpoint="latest", **options), progress=False)
    assert resumed.first_step == 2 and resumed.losses == losses
    (ours, head), (again, _), (theirs, their_head) = tensors(straight), tensors(stopped), tensors(other)
    assert all(torch.equal(again[name], value) for name, value in ours.items())
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()} and head == their_head
    assert any(not torch.equal(ours[name], value) for name, value in theirs.items()), "negative control"


def test_checkpoint_of_another_base_precision_is_refused(settings: Settings) -> None:
    run(settings("one", quantize_base="int8", checkpointing_steps=2), progress=False)
    with pytest.raises(UserError, match=r"checkpoint-2 was written with quantize_base = 'int8'; this run has None"):
        run(settings("one", resume_from_checkpoint="latest", checkpointing_steps=2), progress=False)


def test_probe_and_validation_sample_from_it(settings: Settings) -> None:
    values = {"probe_steps": 3, "probe_images": 2, "validation_prompts": ["a dot"], "num_validation_images": 1}
    seen = [
        run(settings(str(kind), quantize_base=kind, **values), progress=False).evaluations for kind in (None, "nf4")
    ]
    folders = [Path(settings(str(kind)).output_dir) / "validation" for kind in (None, "nf4")]
    scores = [json.loads((folder / "scores.json").read_text()) for folder in folders]
    assert len(seen[1]) == 1 and seen[0] != seen[1] and scores[0] != scores[1], "sampled from the other weights"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"lora": False}, "quantize_base is given; it has no effect here: lora is off"),
        ({"compile": True}, "compile is given with quantize_base"),
        (
            {"quantize_base": None, "offload_base": True},
            "offload_base is given; it has no effect here: quantize_base is off",
        ),
        ({"quantize_base": "int4"}, "quantize_base is 'int4'"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(settings: Settings, values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings(**{"quantize_base": "nf4", **values})


def test_fsdp_refuses_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharding.check(settings())
    with pytest.raises(UserError, match="quantize_base is given under FSDP"):
        sharding.check(settings(quantize_base="nf4"))


def test_prediction_counts_the_codes(settings: Settings) -> None:
    def weights(kind: str | None, offload: bool = False) -> int:
        config = settings(quantize_base=kind, rank=1, offload_base=offload)
        return predict(config, base_of(config), (32, 32)).weights

    plain, int8, nf4, away = weights(None), weights("int8"), weights("nf4"), weights("nf4", offload=True)
    assert away < nf4 < int8 < 0.6 * plain
