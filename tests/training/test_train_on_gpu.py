"""Training on a pretended GPU: nothing is on the wrong device, the losses are the CPU's, and a step waits for the GPU as rarely as it can."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import PartialState
from diffusers.hooks import apply_group_offloading
from pretend_gpu import PretendGPU, pretend_gpu
from safetensors.torch import load_file

from ambient_sd.data import latents
from ambient_sd.data.views import ViewRule
from ambient_sd.families.sd import StableDiffusion
from ambient_sd.training import adapters, averaging, checkpoints, optimizers, quantized, sharding, validation
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import _Trainer, run
from ambient_sd.training.plan import plan_run
from ambient_sd.training.record import RunRecord
from ambient_sd.utils.devices import deterministic, fix_workspace
from ambient_sd.utils.errors import UserError

WAITS = 2  # a step: the losses, and what AGC, class images or random crops bring back beside them
Settings = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    xl = tmp_path_factory.mktemp("tiny-sdxl")
    tiny.tiny_sdxl_pipeline().save_pretrained(xl)
    return {"sd": str(tiny_base), "sdxl": str(xl), "embedded": "embedded"}


def on_gpu(config: TrainConfig) -> tuple[RunRecord, list[Counter[str]], PretendGPU]:
    """Train; return the record, the waits of every step by their place, and the GPU."""
    waits: list[Counter[str]] = []
    step = _Trainer._step
    with pretend_gpu() as gpu, pytest.MonkeyPatch.context() as patch:

        def counted(self: Any, *args: Any) -> Any:
            before = gpu.places.copy()
            record = step(self, *args)
            waits.append(gpu.places - before)
            return record

        patch.setattr(_Trainer, "_step", counted)
        return run(config, progress=False), waits, gpu


RUNS: dict[str, dict[str, Any]] = {
    "full": {"use_ema": True, "offload_ema": True, "gradient_checkpointing": True, "checkpointing_steps": 1},
    "cache": {"latent_cache_dir": "cache", "random_flip": True, "use_ema": True, "foreach_ema": True, "snr_gamma": 5.0},
    "lora": {"lora": True, "lora_dropout": 0.2, "caption_mitigation": "rt", "caption_mitigation_p": 0.5, "gradient_accumulation_steps": 2},
    "dora": {"lora": True, "use_dora": True, "validation_prompts": ["a dot"], "validation_steps": 1, "num_validation_images": 1},
    "probe": {"lora": True, "probe_steps": 2, "probe_images": 2},
    "keep best": {"lora": True, "probe_steps": 2, "probe_images": 2, "keep": "best", "probe_prompts": ["a dot", "a line"]},
    "buckets": {"aspect_ratio_buckets": "auto", "resolution": 64, "objective": "plain", "agc": 0.5},
    "class": {"lora": True, "with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a dot", "num_class_images": 1,
              "objective": "plain", "memorization_threshold": 50.0, "dropped_mean": "kept"},
    "sdxl": {"base": "sdxl", "lora": True, "train_text_encoder": True, "caption_mitigation": "gn", "caption_mitigation_p": 1.0},
    "by weight": {"fused_backward_pass": True, "max_grad_norm": 0.0, "offload_optimizer": True, "use_ema": True, "offload_ema": True, "checkpointing_steps": 1},
    "crops": {"data": "wide", "objective": "plain"},
    "distill": {"objective": "distill", "distill_level": 0.5, "train_batch_size": 4},
    "distill lora": {"objective": "distill", "distill_level": 1.0, "ambient_level": 0.5, "lora": True, "train_batch_size": 4},
    "embedded": {"base": "embedded", "resolution": 64, "max_train_steps": 1},
}  # fmt: skip


LONG = ("keep best", "class", "embedded")


@pytest.fixture(scope="module")
def make(bases: dict[str, str], tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tmp_path_factory.mktemp("runs")
    wide = tiny.image_folder(root / "wide", [tiny.noise_image(i, 48).resize((64, 48)) for i in range(4)], list("abcd"))

    def settings(name: str, *, base: str = "sd", data: str = "tiny", **values: Any) -> TrainConfig:
        for folder in ("latent_cache_dir", "class_data_dir"):
            if folder in values:
                values[folder] = str(root / values[folder] / name)
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": bases[base], "train_data_dir": str({"tiny": tiny_images, "wide": wide}[data]), "resolution": 32, "train_batch_size": 2,
            "max_train_steps": 2, "report_to": "none", "output_dir": str(root / name), "learning_rate": 1e-3,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return settings


@pytest.fixture(scope="module")
def on_cpu(make: Settings) -> Callable[[str], RunRecord]:
    return functools.cache(lambda name: run(make(f"{name}-cpu", **RUNS[name]), progress=False))


@pytest.fixture(scope="module")
def there(make: Settings) -> Callable[[str], tuple[RunRecord, list[Counter[str]], PretendGPU]]:
    return functools.cache(lambda name: on_gpu(make(name, **RUNS[name])))


@pytest.fixture
def one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are encoded one by one, as on the CPU: several at once round otherwise."""
    monkeypatch.setattr(latents, "_MOST_AT_ONCE", 1)


def weights(record: RunRecord) -> dict[str, torch.Tensor]:
    lora = Path(record.output) / adapters.WEIGHTS_NAME
    return load_file(lora if lora.exists() else Path(record.output) / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in RUNS])
@pytest.mark.usefixtures("one_at_once")
def test_training_gives_the_losses_of_the_cpu(
    there: Callable[[str], tuple[RunRecord, list[Counter[str]], PretendGPU]],
    on_cpu: Callable[[str], RunRecord],
    name: str,
) -> None:
    record, waits, _ = there(name)
    assert max(sum(step.values()) for step in waits) <= WAITS, waits[-1]
    assert record.losses == pytest.approx(on_cpu(name).losses, rel=1e-5)
    ours, theirs = weights(record), weights(on_cpu(name))
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in theirs) < 1e-6


@pytest.mark.parametrize(("name", "precision"), [("full", "fp16"), ("by weight", "bf16"), ("sdxl", "bf16")])
def test_mixed_precision_trains_near_the_cpus_losses(
    make: Settings, on_cpu: Callable[[str], RunRecord], name: str, precision: str
) -> None:
    record, waits, _ = on_gpu(make(f"{name}-{precision}", mixed_precision=precision, **RUNS[name]))
    assert max(sum(step.values()) for step in waits) <= WAITS, waits[-1]
    assert record.losses == pytest.approx(on_cpu(name).losses, rel=5e-2)
    assert record.losses != on_cpu(name).losses, "negative control: nothing was computed in half precision"


@pytest.mark.usefixtures("one_at_once")
def test_a_resumed_run_gives_the_straight_ones_losses(
    make: Settings, there: Callable[[str], tuple[RunRecord, list[Counter[str]], PretendGPU]]
) -> None:
    straight, _, _ = there("full")
    (Path(straight.output) / "checkpoint-2").rename(Path(straight.output) / "gone")
    resumed, waits, _ = on_gpu(make("full", resume_from_checkpoint="latest", **RUNS["full"]))
    assert resumed.first_step == 1 and len(waits) == 1
    assert resumed.losses == straight.losses


def test_offloaded_moments_and_bf16_weights_resume_bit_for_bit(make: Settings) -> None:
    values = {**RUNS["by weight"], "full_bf16": True, "mixed_precision": "bf16"}
    straight, waits, _ = on_gpu(make("halves", **values))
    before = weights(straight)
    assert max(sum(step.values()) for step in waits) <= WAITS, waits[-1]
    (Path(straight.output) / "checkpoint-2").rename(Path(straight.output) / "gone")
    resumed, _, gpu = on_gpu(make("halves", resume_from_checkpoint="latest", **values))
    assert resumed.losses == straight.losses
    assert all(torch.equal(before[name], value) for name, value in weights(resumed).items())
    assert torch.equal(gpu.generator.get_state(), PretendGPU().generator.get_state()), "rounding leaves its generator"


def test_offloaded_moments_leave_the_gpu_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu() as gpu:
        weight = torch.nn.Parameter(torch.ones(4, 4, device="cuda"))
        for offload in (False, True):
            optimizer = optimizers.ByWeight(
                functools.partial(torch.optim.AdamW, fused=True), [{"params": [weight]}], offload=offload
            )
            gpu.waits.clear()
            for _ in range(2):
                weight.grad = torch.ones_like(weight)
                optimizer.step()
            moments = optimizer.state[optimizer.stand_ins[0]]["exp_avg"]
            assert gpu.has(moments) != offload and not gpu.waits
        optimizer.state_dict()["state"][0]["exp_avg"].tolist()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        with pytest.raises(RuntimeError, match="before its copy from the GPU was waited for"):
            optimizer.state_dict()["state"][0]["exp_avg"].tolist()


def test_a_tensor_left_behind_is_found(make: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion, "inputs", lambda _, found, *__: {"encoder_hidden_states": found["hidden"]})
    with pytest.raises(RuntimeError, match="same device"):
        on_gpu(make("left"))


def test_training_leaves_the_gpus_generator(make: Settings) -> None:
    _, _, gpu = on_gpu(make("seeded", lora=True, max_train_steps=1))
    assert torch.equal(gpu.generator.get_state(), PretendGPU().generator.get_state())
    with pretend_gpu() as gpu:
        torch.manual_seed(1)
    assert not torch.equal(gpu.generator.get_state(), PretendGPU().generator.get_state()), "negative control"


def test_an_offloaded_average_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pretend_gpu() as gpu:
        average = averaging.Average(tiny.tiny_pipeline().unet.to("cuda"), offload=True)
        gpu.waits.clear()
        average.update()
        assert not gpu.waits, "neither way is waited for"
        average.save(tmp_path)
        average.update()
        monkeypatch.setattr(averaging.Average, "_arrived", lambda _: None)
        with pytest.raises(RuntimeError, match="before its copy from the GPU was waited for"):
            average.save(tmp_path)


def test_8bit_adam_resumes_bit_for_bit(make: Settings) -> None:
    pytest.importorskip("bitsandbytes")
    values: dict[str, Any] = {
        "lora": True,
        "rank": 64,
        "use_8bit_adam": True,
        "checkpointing_steps": 1,
        "learning_rate": 1e-2,
    }
    straight, _, _ = on_gpu(make("8bit", **values))
    before = weights(straight)
    (Path(straight.output) / "checkpoint-2").rename(Path(straight.output) / "gone")
    resumed, _, _ = on_gpu(make("8bit", resume_from_checkpoint="latest", **values))
    assert resumed.first_step == 1 and resumed.losses == straight.losses
    assert all(torch.equal(before[name], value) for name, value in weights(resumed).items())


@pytest.mark.parametrize(("kind", "offload"), [("int8", True), ("nf4", False), ("nf4", True)])
def test_quantized_base_trains_as_on_the_cpu(
    make: Settings, monkeypatch: pytest.MonkeyPatch, kind: str, offload: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(quantized, "FEWEST", 64)
    values: dict[str, Any] = {
        "lora": True,
        "quantize_base": kind,
        "offload_base": offload,
        "validation_prompts": ["a dot"],
        "num_validation_images": 1,
    }
    there, waits, _ = on_gpu(make(f"{kind}-gpu-{offload}", **values))
    here = run(make(f"{kind}-cpu-{offload}", **values), progress=False)
    assert max(sum(step.values()) for step in waits) <= WAITS, waits[-1]
    assert there.losses == pytest.approx(here.losses, rel=1e-5)


def test_offloaded_codes_stay_off_the_gpu() -> None:
    pytest.importorskip("bitsandbytes")
    for offload in (False, True):
        with pretend_gpu() as gpu:
            layer: Any = torch.nn.Linear(256, 256).requires_grad_(False)
            quantized.quantize(torch.nn.Sequential(layer), "nf4", "cuda", offload=offload)
            layer.to("cuda")
            assert gpu.has(layer.codes) != offload and layer.codes.is_pinned() == offload
            x = torch.ones(1, 256, device="cuda", requires_grad=True)
            gpu.waits.clear()
            layer(x).sum().backward()
            assert x.grad is not None and gpu.has(x.grad) and not gpu.waits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_offloading_of_diffusers_cannot_train(checkpointing: bool) -> None:
    """Why there is no flag for it: what it brings for the forward pass of a block is gone in the backward pass."""
    with pretend_gpu():
        unet = tiny.tiny_pipeline().unet.train()
        adapters.attach(unet, rank=1, alpha=1.0, targets=["to_q"], seed=0)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        apply_group_offloading(unet, torch.device("cuda"), offload_type="leaf_level")
        noise, words = torch.zeros(1, 4, 8, 8, device="cuda"), torch.zeros(1, 2, 16, device="cuda")
        output = unet(noise, torch.tensor([5], device="cuda"), words).sample
        assert output.is_cuda
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            output.square().mean().backward()


class _Nested(torch.optim.AdamW):
    """AdamW whose state looks as bitsandbytes' 8-bit optimizers write theirs: nested, tables shared, steps a Python number."""

    table = torch.arange(4.0)

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        state = {
            i: {"step": int(slots["step"]), "nested": {"exp_avg": slots["exp_avg"], "table": self.table}}
            for i, slots in packed["state"].items()
        }
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: Any) -> None:
        self.seen = state_dict["state"]


def test_nested_state_of_an_optimizer_survives_a_checkpoint(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = _Nested(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = checkpoints.save(tmp_path, 1, write_weights=lambda _: None, optimizer=sharding.whole_state(optimizer),
                                  state={"identity": {}}, limit=None)  # fmt: skip
    checkpoints.load_optimizer(checkpoint, checkpoints.read_state(checkpoint), optimizer)
    assert [type(slots["step"]) for slots in optimizer.seen.values()] == [int, int]
    assert torch.equal(optimizer.seen[0]["exp_avg"], optimizer.state[layer.weight]["exp_avg"])
    assert torch.equal(optimizer.seen[1]["table"], _Nested.table)


def test_the_pretended_gpu_is_gone_afterwards() -> None:
    with pretend_gpu():
        assert PartialState().device.type == "cuda" and torch.zeros(1, device="cuda").is_cuda
    assert PartialState().device.type == "cpu" and not torch.cuda.is_available()


def test_latents_are_encoded_several_at_once(make: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_run(make("latents"))
    rule = ViewRule(32, True, False, True, 0)
    here = latents.encode_all(plan.base.images(), plan.images, rule, range(8))
    monkeypatch.setattr(latents, "_MOST_AT_ONCE", 4)
    with pretend_gpu() as gpu:
        encoder = plan.base.images().to("cuda")
        gpu.waits.clear()
        there = latents.encode_all(encoder, plan.images, rule, range(8))
    assert dict(gpu.waits) == {"device to host": 2}, "once for every four images"
    assert torch.allclose(here, there, atol=1e-6)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_the_runs_choice_and_goes_with_it(make: Settings, allowed: bool) -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    seen: list[tuple[bool, bool]] = []
    before = flags()
    run(
        make(f"tf32-{allowed}", allow_tf32=allowed, max_train_steps=1),
        progress=False,
        on_step=lambda *_: seen.append(flags()),
    )
    assert seen == [(allowed, allowed)] and flags() == before


def kernels() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return *asked, cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_kernels_are_the_runs_and_go(
    make: Settings, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[tuple[bool, ...]] = []
    before = kernels()

    def stop(*_: Any) -> None:
        seen.append((*kernels(), "CUBLAS_WORKSPACE_CONFIG" in os.environ))
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        run(make(f"kernels-{wanted}", deterministic=wanted, max_train_steps=1), progress=False, on_step=stop)
    assert seen == [(True, False, True, False, True) if wanted else (*before, False)]
    assert kernels() == before


def test_deterministic_is_refused_once_cuda_has_started(make: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(UserError, match="CUDA has started here without CUBLAS_WORKSPACE_CONFIG"):
        on_gpu(make("late", deterministic=True))
    assert not Path(make("late").output_dir).exists()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is :0:0"):
        fix_workspace()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert on_gpu(make("early", deterministic=True, lora=True, max_train_steps=1))[0].steps == 1


def test_an_operation_without_deterministic_kernel_is_named() -> None:
    before, x, put = kernels(), torch.zeros(2), lambda x: x.put_(torch.tensor([0]), torch.ones(1))
    put(x)
    with (
        pytest.raises(UserError, match=r"deterministic is given; put_ does not have.*leave it out"),
        deterministic(True),
    ):
        put(x)
    assert kernels() == before


@pytest.mark.parametrize("other", ["compile", "enable_xformers_memory_efficient_attention"])
def test_kernels_that_differ_are_refused_together(make: Settings, other: str) -> None:
    with pytest.raises(UserError, match=f"deterministic is given with {other}"):
        make("rivals", deterministic=True, **{other: True})


@pytest.mark.parametrize("half", [True, False])
def test_images_on_the_way_are_decoded_in_bfloat16(monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    def sampled(device: str) -> Any:
        pipe = tiny.tiny_pipeline()
        pipe.unet.to(device)
        pipe.vae.post_quant_conv.register_forward_hook(lambda _, __, found: seen.append(found.dtype))
        accelerator = PartialState()
        assert accelerator.device.type == device
        found = validation.sample(pipe, ["a dot"], 2, resolution=32, seed=0, accelerator=accelerator, steps=2).rows[0]
        assert "decode" not in vars(pipe.vae), "left as it was"
        return np.stack(found).astype(int)

    seen: list[torch.dtype] = []
    with pretend_gpu(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: half)
        there = sampled("cuda")
    off = abs(there - sampled("cpu")).max()
    assert seen == [torch.bfloat16 if half else torch.float32, torch.float32]
    assert (0 < off <= 4) if half else off == 0
