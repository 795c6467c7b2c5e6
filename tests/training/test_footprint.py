"""The predicted memory of a training: closed forms, and the same counter on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ambient_sd.training import footprint, quantized
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.footprint import Footprint, predict
from ambient_sd.training.plan import base_of

_SIZE = (32, 32)


@pytest.fixture
def predicted(settings: Callable[..., TrainConfig], small_base: Path) -> Callable[..., Footprint]:
    def make(**values: Any) -> Footprint:
        config = settings(**{"lora": False, "pretrained_model_name_or_path": str(small_base), **values})
        return predict(config, base_of(config), _SIZE)

    return make


def test_counter_knows_when_a_tensor_dies() -> None:
    with footprint._Alive() as alive:
        a = torch.zeros(1024)
        assert alive.now == 4096
        b = a.view(32, 32)[1:]  # another view of the same storage
        assert alive.now == 4096
        c = a + 1
        del c
        assert (alive.now, alive.peak) == (4096, 8192)
        del a, b
        assert (alive.now, alive.peak) == (0, 8192)
        assert torch.zeros(1).nbytes == 4 and alive.peak == 8192  # 512 bytes at least, and gone at once


def test_chain_of_layers_in_closed_form() -> None:
    """A linear chain without bias keeps each layer's input: n b w of activations beside its weights."""
    layers, batch, width = 3, 256, 64
    chain = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    x = torch.zeros(batch, width)

    def step() -> None:
        output = chain(x)
        output.backward(torch.ones_like(output))

    weights, activation = layers * width * width * 4, batch * width * 4
    # At the highest: inputs of the layers behind the first, output and its gradient, and at the last layer the gradient of its
    # weights with that of its input.
    most = footprint._peak(step, [chain]) - weights
    assert (
        (layers - 1 + 2 + 1) * activation + width * width * 4
        <= most
        <= (layers + 3) * activation + 3 * width * width * 4
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gradient_checkpointing": True},
        {"lora": True, "rank": 4},
        *({"lora": True, "lora_kind": k, "rank": 1} for k in ("loha", "lokr")),
        {"lora": True, "quantize_base": "nf4"},
    ],
)
def test_fake_step_counts_as_a_real_one(
    values: dict[str, Any], settings: Callable[..., TrainConfig], small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "quantize_base" in values:
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr(quantized, "FEWEST", 64)
    config = settings(**{"lora": False, "pretrained_model_name_or_path": str(small_base), **values})
    base = base_of(config)
    faked = predict(config, base, _SIZE)

    def real(module: torch.nn.Module) -> Any:
        module.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.zero_()
        return module

    class Real:
        def __init__(self, **_: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(footprint, "_fake", real)
    monkeypatch.setattr(footprint, "FakeTensorMode", Real)
    assert predict(config, base, _SIZE) == faked


def test_what_is_trained_and_kept(predicted: Callable[..., Footprint]) -> None:
    whole, lora = predicted(), predicted(lora=True, rank=1)
    assert whole.gradients == whole.weights and whole.moments == 2 * whole.weights
    assert lora.gradients < whole.gradients / 4 and lora.moments == 2 * lora.gradients
    assert predicted(use_ema=True).average == whole.weights


def test_an_average_on_the_cpu_visits_one_tensor_at_a_time(
    predicted: Callable[..., Footprint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "_peak", lambda *_: 0)  # between the passes alone
    stays, away, together = (
        predicted(use_ema=True, offload_ema=offload, foreach_ema=foreach)
        for offload, foreach in ((False, False), (True, False), (True, True))
    )
    held = away.weights + away.gradients + away.moments
    assert away.average == together.average == 0 and stays.step == held + stays.average
    assert held < away.step < held + stays.average < together.step == held + 2 * stays.average


def test_activations_grow_with_the_batch(predicted: Callable[..., Footprint]) -> None:
    one, two, four = (predicted(train_batch_size=n).activations for n in (8, 16, 32))
    assert (four - two) / (two - one) == pytest.approx(2, rel=0.15)
    assert predicted(train_batch_size=32, gradient_checkpointing=True).activations < four


def test_sampling_counts_where_images_are_sampled(predicted: Callable[..., Footprint]) -> None:
    assert predicted().sampling == 0
    found = predicted(probe_steps=1, probe_images=2)
    assert found.sampling > found.weights and found.peak == max(found.encoding, found.step, found.sampling)


def test_bf16_halves_frozen_weights_on_a_gpu(settings: Callable[..., TrainConfig], small_base: Path) -> None:
    config = settings(pretrained_model_name_or_path=str(small_base), mixed_precision="bf16", rank=1)
    base = base_of(config)
    gpu, cpu = predict(config, base, _SIZE), predict(config, base, _SIZE, on_cpu=True)
    assert gpu.weights < 0.6 * cpu.weights


def test_moments_in_eight_bits() -> None:
    assert footprint._moments(torch.empty(4096), quantized=True) == 2 * (4096 + 4 * 16)
    assert footprint._moments(torch.empty(4095), quantized=True) == 8 * 4095
    assert footprint._moments(torch.empty(4096), quantized=False) == 8 * 4096


def test_describe_names_the_phase() -> None:
    told = Footprint(2**30, 0, 0, 0, 0, 3 * 2**30, 2**30, 0).describe()
    assert "3.0 GiB at the highest (where images are encoded; a step takes 1.0 GiB" in told


def test_nothing_is_loaded(settings: Callable[..., TrainConfig], small_base: Path) -> None:
    """Weights may be of any size: only configurations are read."""
    config = settings(pretrained_model_name_or_path=str(small_base))
    base = base_of(config)
    base_type = type(base)

    def refuse(self: Any, part: str, *args: Any) -> Any:
        if not part.startswith("tokenizer"):
            raise AssertionError(f"{part} was loaded")
        return load(self, part, *args)

    load = base_type.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_type, "load", refuse)
        assert predict(config, base, _SIZE).peak > 0
