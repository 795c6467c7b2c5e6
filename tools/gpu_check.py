"""The first run on a GPU: what was only ever tried on processors, in order of value, each check in a process of its own.

    python tools/gpu_check.py --budget 560                          # one CUDA GPU; writes build/gpu/gpu.json, or --out
    python tools/gpu_check.py --device cpu --size toy --budget 360  # tries the script itself, without a GPU

A check has a budget: it does not begin where less than its `need` is left, and is ended at its `limit`. What it has found by
then is kept: the file is written after every check, the checks write theirs after every figure, and what libraries and
tracebacks say goes to a log beside it. Verdicts: `pass`; `look`, it ran and a figure is not what was expected; `fail`, an
error or a broken promise; `cut`, ended at its limit; `skipped`, with the reason. The exit status is 1 if a check failed.

TF32 is off except where it is named. The next check's process imports while a check runs; it touches no GPU before its turn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = next(p for p in (Path(__file__).resolve().parents[1], Path.cwd()) if (p / "ambient_sd").is_dir())
PROMPTS = ["red apple", "dog face"]
# Adam divides by the size of each gradient: with its usual epsilon two kernels that round differently are 1e-2 apart after a
# dozen steps, on processors too. A large epsilon keeps the step smooth in the gradient: 1e-5 apart after 20 steps (LoRA: less)
# that move the losses by 1e-2 (LoRA: 2e-3).
KINDS: dict[str, dict[str, Any]] = {
    "full": {"adam_epsilon": 3e-2},
    "lora": {"lora": True, "rank": 16, "adam_epsilon": 1e-3},
}
# Largest relative differences from the processor's float32: of the loss of any step, and of the guard's scores.
LOSS_LIMIT = {"no": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
SCORE_LIMIT = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 2e-2}
# What a policy must be given, and what keeps it short. All others are built without arguments.
POLICIES: dict[str, dict[str, Any]] = {
    "prompt_optimization": {"target": 1e-6, "max_steps": 2},
    "latent_optimization": {"target": 1e-6, "max_steps": 2},
    "sail": {"target": 1e-6, "max_steps": 2},
    "scale_cap": {"cap": 1.0},
    "despecification": {"strength": 1.0, "threshold": 0.0},
    "reanchoring": {"threshold": 0.0, "softer": "an image"},
}


class Enough(Exception):
    """All steps that are wanted are done: nothing needs saving."""


class NotHere(Exception):
    """The check cannot run on this machine."""


@dataclass
class Context:
    """Hold what a check needs: where it runs, how large, its folder, and where its figures go.

    Attributes:
        device: cuda or cpu.
        toy: small sizes, to try the script.
        work: folder of this call, shared by the checks.
        found: the figures so far.
        file: where they are written.
        deadline: `time.monotonic()` at which the check is ended.
    """

    device: str
    toy: bool
    work: Path
    file: Path
    deadline: float
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def pick(self, full: Any, toy: Any) -> Any:
        return toy if self.toy else full

    def note(self, **figures: Any) -> None:
        """Keep figures, on disk too."""
        self.found.update(figures)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.found, default=str))
        part.replace(self.file)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


Outcome = tuple[str, str]  # verdict, figure
Check = Callable[[Context], Outcome]


# --- what the checks share --------------------------------------------------------------------------------------------------


def tf32(matmul: bool, convolutions: bool) -> None:
    """Let float32 products run in TF32, or not. torch's own setting is (False, True)."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolutions


def wait(ctx: Context) -> None:
    """Wait until the GPU has done what it was told."""
    if ctx.cuda:
        import torch

        torch.cuda.synchronize()


def config(ctx: Context, name: str, **values: Any) -> Any:
    """Return the settings of a short run on the embedded base and its 60 images."""
    from ambient_sd.assets import IMAGES
    from ambient_sd.commands.demo.work import EMBEDDED
    from ambient_sd.training.config import TrainConfig

    folder = Path(tempfile.mkdtemp(prefix=name, dir=ctx.work)) / "run"
    common = {"train_data_dir": str(IMAGES), "row_filter": ["subset_60=true"], "train_batch_size": ctx.pick(16, 4),
              "learning_rate": 1e-3, "use_ema": False, "output_dir": str(folder)}  # fmt: skip
    return TrainConfig(**{**EMBEDDED, **common, **values})


def train(settings: Any, on_step: Callable[[int, dict[str, float]], None] | None = None) -> Any:
    """Run the project's trainer in this process, and return its record."""
    from ambient_sd.training.loop import run

    return run(settings, progress=False, on_step=on_step)


def side(ctx: Context, task: str, name: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a task on the processor, in a process that sees no GPU; return it and the file that it will write."""
    result = ctx.work / name
    cores = os.cpu_count() or 1
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if cores >= 8:
        env["OMP_NUM_THREADS"] = str(cores // 3)
    command = [sys.executable, __file__, "--side", task, "--child-file", str(result), "--work", str(ctx.work)]
    command += ["--size", "toy" if ctx.toy else "full", "--device", "cpu"]
    return subprocess.Popen(command, env=env, stdout=sys.stderr), result


def joined(ctx: Context, started: tuple[subprocess.Popen[bytes], Path]) -> Any:
    """Wait for a task on the processor and return what it found."""
    import torch

    process, result = started
    if process.wait(timeout=max(1.0, ctx.left())):
        raise RuntimeError(f"the reference on the processor ended with {process.returncode}; see the log")
    return torch.load(result, weights_only=True)


def apart(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference of two runs' losses."""
    if len(a) != len(b):
        return float("inf")
    return max(abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True))


def random_pipeline(ctx: Context) -> Any:
    """Return a random pipeline with the U-Net and VAE of Stable Diffusion 2 on the device; its text encoder has two layers."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ambient_sd.assets import BASE

    torch.manual_seed(0)
    width = ctx.pick(1024, 32)
    sizes: dict[str, Any] = ctx.pick(
        {"sample_size": 96, "attention_head_dim": (5, 10, 20, 20)},
        {"sample_size": 8, "attention_head_dim": 8, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1,
         "norm_num_groups": 8},
    )  # fmt: skip
    with torch.device(ctx.device):  # 865M draws are slow on a processor
        unet = UNet2DConditionModel(cross_attention_dim=width, use_linear_projection=True, **sizes)
    channels = ctx.pick((128, 256, 512, 512), (8, 8, 8, 8))
    vae = AutoencoderKL(
        block_out_channels=channels, layers_per_block=ctx.pick(2, 1), latent_channels=4, sample_size=512,
        norm_num_groups=ctx.pick(32, 4), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, hidden_act="gelu",
            num_attention_heads=ctx.pick(16, 2), bos_token_id=1868, eos_token_id=1869, pad_token_id=1869,
        )
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=unet, scheduler=DDIMScheduler.from_pretrained(BASE / "scheduler"),
        tokenizer=CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=77), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(ctx.device)


def random_base(ctx: Context) -> Path:
    """Return the folder of that pipeline; it is written once (4.5 GB)."""
    folder = ctx.work / "sd2"
    if not (folder / "model_index.json").exists():
        random_pipeline(ctx).save_pretrained(folder)
        if ctx.cuda:
            import torch

            torch.cuda.empty_cache()
    return folder


# --- the checks -------------------------------------------------------------------------------------------------------------


def environment(ctx: Context) -> Outcome:
    """Say what runs here."""
    import importlib.metadata

    import torch

    names = (
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "triton",
    )
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    disk = shutil.disk_usage(ctx.work).free / 2**30
    ctx.note(versions=versions, python=platform.python_version(), cores=os.cpu_count(), disk_free_gib=round(disk, 1))
    if not ctx.cuda:
        return "pass", f"no GPU, torch {versions['torch']}"
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    ctx.note(
        card=card.name, capability=f"{card.major}.{card.minor}", cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
        memory_gib=round(total / 2**30, 1), memory_free_gib=round(free / 2**30, 1), bf16=torch.cuda.is_bf16_supported(),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )  # fmt: skip
    side_ = 8192
    rates = {}
    for name, dtype, allow in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        tf32(allow, allow)
        a, b = (torch.randn(side_, side_, device="cuda", dtype=dtype) for _ in range(2))
        for _ in range(2):
            a @ b
        wait(ctx)
        begin = time.perf_counter()
        for _ in range(5):
            a @ b
        wait(ctx)
        rates[name] = round(5 * 2 * side_**3 / (time.perf_counter() - begin) / 1e12)
        ctx.note(matmul_tflops=rates)
    return "pass", f"{card.name}, {total / 2**30:.0f} GiB, torch {versions['torch']}, TFLOP/s {rates}"


def reference(ctx: Context, kernels: str) -> Any:
    """Return the losses of both kinds of training in float32 on the processor; `plain` kernels round otherwise."""
    import torch

    losses = {}
    with torch.backends.mkldnn.flags(enabled=kernels == "onednn"):
        for kind, values in KINDS.items():
            losses[kind] = train(config(ctx, kind, max_train_steps=ctx.pick(20, 4), **values)).losses
    return losses


def training(ctx: Context) -> Outcome:
    """Train the embedded base in every precision; the losses must be the processor's."""
    started = [side(ctx, f"reference:{kernels}", f"reference-{kernels}.pt") for kernels in ("onednn", "plain")]
    losses: dict[str, dict[str, list[float]]] = {}
    errors: dict[str, str] = {}
    runs = [(kind, precision) for precision in ("no", "bf16", "fp16") for kind in KINDS]
    if ctx.cuda:
        runs.append(("full", "torch's own TF32"))
    seconds = {}
    for kind, precision in runs:
        if not ctx.cuda and (precision == "fp16" or (kind, precision) == ("lora", "bf16")):
            continue  # processors have no fp16 training, nor a layer norm whose input is float32 and its weights bf16
        own = precision.startswith("torch")
        tf32(False, own)
        values = {"max_train_steps": ctx.pick(20, 4), "mixed_precision": "no" if own else precision, **KINDS[kind]}
        begin = time.perf_counter()
        try:
            summary = train(config(ctx, kind, **values))
        except Exception as error:  # the other precisions are worth having
            errors[f"{kind} {precision}"] = f"{type(error).__name__}: {error}"[:600]
            ctx.note(errors=errors)
            traceback.print_exc()
            continue
        losses.setdefault(precision, {})[kind] = summary.losses
        seconds[f"{kind} {precision}"] = [round(summary.seconds, 2), round(time.perf_counter() - begin, 2)]
        ctx.note(losses=losses, seconds_steps_and_all=seconds)
    cpu, other = (joined(ctx, s) for s in started)
    floor = {kind: apart(other[kind], cpu[kind]) for kind in KINDS}
    differences = {
        f"{kind} {precision}": apart(losses[precision][kind], cpu[kind])
        for precision, kinds in losses.items()
        for kind in kinds
    }
    moved = {kind: abs(cpu[kind][-1] - cpu[kind][0]) / cpu[kind][0] for kind in KINDS}
    ctx.note(reference=cpu, between_two_kernels_of_the_processor=floor, differences=differences, moved=moved)
    wrong = [
        name
        for name, value in differences.items()
        if not value <= max(LOSS_LIMIT.get(name.split(" ", 1)[1], 1.0), 10 * floor[name.split(" ", 1)[0]])
    ]
    figure = "largest relative difference " + ", ".join(f"{k} {v:.1e}" for k, v in differences.items())
    for what, names in (("above the limit", wrong), ("errors", list(errors))):
        figure += f"; {what}: {', '.join(names)}" if names else ""
    return ("fail" if errors else "look" if wrong else "pass"), figure


def weights_of(settings: Any) -> dict[str, Any]:
    """Return the trained tensors of a finished run."""
    from safetensors.torch import load_file

    name = "pytorch_lora_weights.safetensors" if settings.lora else "unet/diffusion_pytorch_model.safetensors"
    return load_file(Path(settings.output_dir) / name)


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Return the largest absolute difference of two sets of tensors; 0 only where all bits agree."""
    import torch

    if all(torch.equal(a[k], b[k]) for k in a):
        return 0.0
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a) or float("nan")


def resumed(ctx: Context, label: str, deterministic: bool) -> dict[str, Any]:
    """Train straight twice, and once from the middle of the first run; return the largest differences of the weights."""
    steps = ctx.pick(12, 4)
    result: dict[str, Any] = {}
    for kind, precision in (("full", "no"), ("lora", "bf16" if ctx.cuda else "no")):
        values = {
            "lora": kind == "lora",
            "mixed_precision": precision,
            "max_train_steps": steps,
            "checkpointing_steps": steps // 2,
            "deterministic": deterministic,
        }
        straight, again = (config(ctx, f"{kind}-{n}", **values) for n in ("straight", "again"))
        whole = train(straight)
        checkpoint = str(Path(straight.output_dir) / f"checkpoint-{steps // 2}")
        half = config(ctx, f"{kind}-half", resume_from_checkpoint=checkpoint, **values)
        rest = train(half)
        assert rest.first_step == steps // 2
        train(again)
        first = weights_of(straight)
        result[f"{kind} {precision}"] = {
            "resumed": distance(weights_of(half), first),
            "repeated": distance(weights_of(again), first),
            "losses equal": rest.losses == whole.losses,
        }
        ctx.note(**{label: result})
        for settings in (straight, again, half):
            shutil.rmtree(settings.output_dir)
    return result


def judge_resume(result: dict[str, Any], exact: bool) -> Outcome:
    """Bits must be equal where algorithms are deterministic; elsewhere a resume may differ as much as a repetition does."""
    figure = ", ".join(f"{k}: resumed {v['resumed']:.1e}, repeated {v['repeated']:.1e}" for k, v in result.items())
    worst = max(v["resumed"] for v in result.values())
    if worst == 0:
        return "pass", f"bits equal ({figure})"
    suspicious = exact or any(v["repeated"] == 0 < v["resumed"] for v in result.values())
    return ("fail" if suspicious else "look"), figure


def resume(ctx: Context) -> Outcome:
    """Resume with torch's own settings."""
    tf32(False, True)
    return judge_resume(resumed(ctx, "differences", deterministic=False), exact=False)


def resume_deterministic(ctx: Context) -> Outcome:
    """Resume with `--deterministic`; an operation that has no such kernel ends it, and is named."""
    return judge_resume(resumed(ctx, "differences", deterministic=True), exact=True)


def drawn(ctx: Context, pipe: Any, guard: Any = None) -> tuple[Any, list[float], list[Any]]:
    """Draw two images from fixed noise; return them, their scores and reports."""
    import torch

    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options = {"num_inference_steps": ctx.pick(10, 3), "guidance_scale": 4.0, "output_type": "pt"}
    with guard or contextlib.nullcontext():
        images = pipe(PROMPTS, generator=generators, **options).images
    reports = guard.report if guard is not None else []
    return images.float().cpu(), [r.score for r in reports], reports


def embedded_pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    from ambient_sd.assets import BASE

    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_policies(ctx: Context, pipe: Any, keep: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
    """Draw with every policy; return the images by name."""
    from ambient_sd import MemorizationGuard
    from ambient_sd.guard.by_name import available
    from ambient_sd.guard.policies import Compose, OppositeGuidance, StaticTransition

    makers: dict[str, Callable[[], Any]] = {
        name: (lambda kind=kind, name=name: kind(**POLICIES.get(name, {})))
        for name, kind in sorted(available().items())
    }
    makers["composed"] = lambda: Compose(OppositeGuidance(), StaticTransition())
    images = {}
    for name, make in makers.items():
        begin = time.perf_counter()
        try:
            images[name], scores, reports = drawn(ctx, pipe, MemorizationGuard(pipe, make()))
            finite = bool(images[name].isfinite().all()) and all(s == s and s < float("inf") for s in scores)
            record: dict[str, Any] = {"scores": scores, "finite": finite, "iterations": [r.iterations for r in reports]}
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {error}"[:400]}
            traceback.print_exc()
        keep(name, record | {"seconds": round(time.perf_counter() - begin, 2)})
    return images


def guard_reference(ctx: Context) -> Any:
    """Return images and scores of the embedded base on the processor, with and without policies."""
    from ambient_sd import MemorizationGuard

    pipe = embedded_pipeline()
    images, scores, _ = drawn(ctx, pipe, MemorizationGuard(pipe))
    return {"images": images, "scores": scores, "policies": with_policies(ctx, pipe, lambda *_: None)}


def guard(ctx: Context) -> Outcome:
    """Hold images and scores under the guard against the stock pipeline's and the processor's; try every policy."""
    import torch

    from ambient_sd import MemorizationGuard

    started = side(ctx, "guard_reference", "guard.pt")
    bits: dict[str, Any] = {}
    scores: dict[str, list[float]] = {}
    plain = None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        pipe = embedded_pipeline().to(ctx.device, dtype)
        stock, again = drawn(ctx, pipe)[0], drawn(ctx, pipe)[0]
        watched, scores[name], _ = drawn(ctx, pipe, MemorizationGuard(pipe))
        bits[name] = {
            "guarded": torch.equal(stock, watched),
            "repeated": torch.equal(stock, again),
            "finite": bool(stock.isfinite().all()),
            "largest difference": float((stock - watched).abs().max()),
        }
        plain = watched if plain is None else plain
        ctx.note(bits=bits, scores=scores)
    policies: dict[str, dict[str, Any]] = {}

    def keep(name: str, record: dict[str, Any]) -> None:
        policies[name] = record
        ctx.note(policies=policies)

    images = with_policies(ctx, embedded_pipeline().to(ctx.device), keep)
    cpu = joined(ctx, started)
    off = {name: apart(found, cpu["scores"]) for name, found in scores.items()}
    assert plain is not None
    ctx.note(processor_scores=cpu["scores"], score_differences=off,
             image_difference=float((plain - cpu["images"]).abs().max()))  # fmt: skip
    for name, seen in images.items():
        other = cpu["policies"].get(name)
        policies[name]["difference from the processor's"] = (
            float((seen - other).abs().max()) if other is not None else None
        )
    ctx.note(policies=policies)
    errors = [name for name, p in policies.items() if "error" in p or not p["finite"]]
    far = [n for n, p in policies.items() if (p.get("difference from the processor's") or 0) > 0.02]
    far += [name for name, value in off.items() if not value <= SCORE_LIMIT[name]]
    broken = [name for name, b in bits.items() if not b["guarded"] and b["repeated"]]
    unsteady = [name for name, b in bits.items() if not b["repeated"] or not b["finite"]]
    figure = (
        f"images equal to the bit: {', '.join(n for n, b in bits.items() if b['guarded']) or 'none'}; scores off by "
    )
    figure += (
        ", ".join(f"{n} {v:.0e}" for n, v in off.items())
        + f"; {len(policies) - len(errors)} of {len(policies)} policies"
    )
    for what, names in (
        ("broken", broken),
        ("unsteady", unsteady),
        ("errors", errors),
        ("far from the processor", far),
    ):
        figure += f"; {what}: {', '.join(names)}" if names else ""
    return ("fail" if broken or errors else "look" if unsteady or far else "pass"), figure


@contextlib.contextmanager
def kept(found: dict[str, Any], what: str) -> Iterator[None]:
    """Keep an error among the figures: what is measured besides must not be lost with it."""
    try:
        yield
    except Exception as error:
        found[f"no {what}"] = f"{type(error).__name__}: {error}"[:300]


def kernel_seconds(profiler: Any) -> float | None:
    """Return the summed seconds of a profiled step's kernels and copies, None if the profiler has none."""
    from torch.autograd import DeviceType

    try:
        events = profiler.profiler.kineto_results.events()
        total = sum(e.duration_ns() for e in events if e.device_type() == DeviceType.CUDA) / 1e9
    except AttributeError:  # another version of torch
        total = sum(e.self_device_time_total for e in profiler.key_averages()) / 1e6
    return total or None


def rate(ctx: Context, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Train the random pipeline of Stable Diffusion 2's size; return samples a second, peak memory and the GPU's busy share."""
    import torch

    from ambient_sd.assets import IMAGES

    common = {
        "pretrained_model_name_or_path": str(random_base(ctx)), "train_data_dir": str(IMAGES), "row_filter": None,
        "max_train_samples": 16, "max_train_steps": 1000, "validation_prompts": None, "validation_steps": None,
        "num_validation_images": None, "checkpoints_total_limit": None, "report_to": "none",
    }  # fmt: skip
    if ctx.toy:
        common |= {"resolution": 64, "gradient_accumulation_steps": 1}
    if not ctx.cuda:
        common |= {"mixed_precision": "no"}
    settings = config(ctx, name, **{k: v for k, v in (values | common).items() if k != "output_dir"})
    samples = settings.train_batch_size * settings.gradient_accumulation_steps
    warm, least, seconds = ctx.pick((2, 3, 8.0), (1, 2, 0.0))
    stamps: list[float] = []
    driver: list[float] = []  # percent of its last moments in which something ran, as the driver has it
    found: dict[str, Any] = {}
    if ctx.cuda:
        found["held before, GiB"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    profiler: Any = None

    def on_step(step: int, record: dict[str, float]) -> None:
        nonlocal profiler
        if profiler is not None:
            wait(ctx)
            with kept(found, "profiler"):
                profiler.stop()
                found["kernel seconds a step"] = kernel_seconds(profiler)
            raise Enough
        if step < warm:
            return
        wait(ctx)
        stamps.append(time.perf_counter())
        if len(stamps) == 1 and ctx.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif ctx.cuda:
            with kept(found, "driver"):
                driver.append(torch.cuda.utilization())
        if len(stamps) > least and stamps[-1] - stamps[0] >= seconds:
            found["loss"] = record["loss"]
            if ctx.cuda:
                found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                found["reserved GiB"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
            kinds = [torch.profiler.ProfilerActivity.CUDA if ctx.cuda else torch.profiler.ProfilerActivity.CPU]
            with kept(found, "profiler"):
                profiler = torch.profiler.profile(activities=kinds)
                profiler.start()
            if "no profiler" in found:
                raise Enough

    begin = time.perf_counter()
    with contextlib.suppress(Enough):
        train(settings, on_step)
    step_seconds = statistics.median(b - a for a, b in itertools.pairwise(stamps))
    found |= {
        "samples a second": round(samples / step_seconds, 2), "seconds a step": round(step_seconds, 4), "samples a step": samples,
        "steps timed": len(stamps) - 1, "seconds before the first timed step": round(stamps[0] - begin, 1),
    }  # fmt: skip
    if driver:
        found["busy share by the driver"] = statistics.median(driver) / 100
    if found.get("kernel seconds a step"):
        found["busy share"] = round(min(1.0, found["kernel seconds a step"] / step_seconds), 3)
    return found


def variants() -> dict[str, dict[str, Any]]:
    """Return the settings whose speed is measured, by name."""
    import yaml

    lora, full = (yaml.safe_load((ROOT / "configs" / name).read_text()) for name in ("sd2-lora.yaml", "sd2-full.yaml"))
    # The paper's loss, as in the runs that are compared with: distillation adds a forward pass.
    for values in (lora, full):
        values |= {"objective": "ambient", "ambient_level": 1.0}
        del values["distill_level"]
    plain = {"train_batch_size": 8, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    return {"lora": lora, "lora-8": lora | plain, "full-ema": full}


def rates(ctx: Context, names: list[str]) -> Outcome:
    """Measure variants; one that has no room is tried with half of its batch."""
    import torch

    measured: dict[str, Any] = {}
    for name in names:
        values = variants()[name]
        while True:
            label = f"{name}, batch {values['train_batch_size']}"
            try:
                measured[label] = rate(ctx, name, values)
            except torch.OutOfMemoryError as error:
                measured[label] = {"no room": str(error)[:300]}
            except Exception as error:  # the other variants are worth having
                measured[label] = {"error": f"{type(error).__name__}: {error}"[:600]}
                traceback.print_exc()
            ctx.note(variants=measured)
            gc.collect()
            if ctx.cuda:
                torch.cuda.empty_cache()
            if "no room" not in measured[label] or values["train_batch_size"] == 1:
                break
            values = values | {"train_batch_size": values["train_batch_size"] // 2}
    parts = [
        f"{k}: {v['samples a second']} samples/s, {v.get('peak GiB', '?')} GiB, busy {v.get('busy share', '?')}"
        if "samples a second" in v
        else f"{k}: {'no room' if 'no room' in v else v['error'][:60]}"
        for k, v in measured.items()
    ]
    failed = any("error" in v for v in measured.values())
    look = any("no room" in v or v.get("busy share", 1.0) < 0.8 for v in measured.values())
    return ("fail" if failed else "look" if look and ctx.cuda else "pass"), "; ".join(parts)


def throughput(ctx: Context) -> Outcome:
    """Measure training at Stable Diffusion 2's size, as the configuration files have it."""
    return rates(ctx, ["lora", "lora-8", "full-ema"])


def compiled(ctx: Context) -> Outcome:
    """Measure the same under torch.compile, which accelerate does where ACCELERATE_DYNAMO_BACKEND says so."""
    return rates(ctx, ["lora-8"])


def sampling(ctx: Context) -> Outcome:
    """Measure sampling at Stable Diffusion 2's size and 512 px, latents only, and what the guard costs there."""
    import torch

    from ambient_sd import MemorizationGuard

    pipe = random_pipeline(ctx)
    side_, steps, images = ctx.pick((512, 20, 4), (64, 3, 2))
    speeds: dict[str, Any] = {}

    def call(count: int, guarded: bool = False) -> float:
        options = {
            "num_inference_steps": steps,
            "height": side_,
            "width": side_,
            "num_images_per_prompt": count,
            "output_type": "latent",
        }
        wait(ctx)
        begin = time.perf_counter()
        with MemorizationGuard(pipe) if guarded else contextlib.nullcontext():
            out = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images
        wait(ctx)
        assert out.isfinite().all(), "latents are not finite"
        return time.perf_counter() - begin

    for name, dtype, allow in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        tf32(allow, allow)
        pipe.to(dtype=dtype)
        if ctx.cuda:
            torch.cuda.reset_peak_memory_stats()
        call(images)
        seconds = statistics.median(call(images) for _ in range(ctx.pick(3, 1)))
        speeds[name] = {"images a second": round(images / seconds, 3)}
        if ctx.cuda:
            speeds[name]["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        ctx.note(speeds=speeds, steps=steps, pixels=side_, images=images)
    ratios = {}
    for count in (1, images):  # bf16, in turns
        call(count, guarded=True)
        pairs = [(call(count), call(count, guarded=True)) for _ in range(ctx.pick(5, 2))]
        ratios[f"{count} a call"] = [round(guarded / stock, 4) for stock, guarded in pairs]
        ctx.note(guarded_over_stock=ratios)
    middle = {name: statistics.median(values) for name, values in ratios.items()}
    figure = "images/s " + ", ".join(f"{k} {v['images a second']}" for k, v in speeds.items())
    figure += "; guard costs " + ", ".join(f"{v:.3f} times at {k}" for k, v in middle.items())
    return ("look" if ctx.cuda and max(middle.values()) > 1.05 else "pass"), figure


@contextlib.contextmanager
def launched(ctx: Context, fsdp: bool) -> Iterator[None]:
    """Set what `accelerate launch` sets for one process of several, as configs/accelerate/fsdp2.yaml says or without it."""
    import yaml

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": str(not ctx.cuda).lower()}  # fmt: skip
    if fsdp:
        env["ACCELERATE_USE_FSDP"] = "true"
        file = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
        for key, value in yaml.safe_load(file.read_text())["fsdp_config"].items():
            env[key.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS")] = str(value)
    before = dict(os.environ)
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def distributed(ctx: Context) -> Outcome:
    """Make one step and save a checkpoint as one process of one: under NCCL (gloo without a GPU), and spread by FSDP2."""
    from ambient_sd.training import loop

    kinds: dict[str, str] = {}
    real = loop.make_accelerator

    def watched(settings: Any) -> Any:
        import torch

        accelerator = real(settings)
        kinds[current] = str(accelerator.distributed_type.value)
        if torch.distributed.is_initialized():
            kinds[current] += f" {torch.distributed.get_backend()}"
            given = torch.ones(4, device=accelerator.device)
            torch.distributed.all_reduce(given)
            assert given.tolist() == [1.0] * 4
        return accelerator

    losses: dict[str, Any] = {}
    loop.make_accelerator = watched
    # Not "no" alone: bf16 is what the configuration says, and goes through another path under FSDP2.
    runs = [(name, p) for p in ("no", "bf16") for name in ("alone", "one rank", "FSDP2")]
    try:
        for name, precision in runs[: None if ctx.cuda else 3]:
            current = f"{name}, {precision}"
            settings = config(
                ctx,
                "distributed",
                max_train_steps=2,
                checkpointing_steps=1,
                mixed_precision=precision,
                adam_epsilon=1e-2,
            )
            try:
                with launched(ctx, name == "FSDP2") if name != "alone" else contextlib.nullcontext():
                    losses[current] = train(settings).losses
            except Exception as error:
                losses[current] = f"{type(error).__name__}: {error}"[:600]
                traceback.print_exc()
            ctx.note(losses=losses, kinds=kinds)
    finally:
        loop.make_accelerator = real
    errors = [name for name, value in losses.items() if isinstance(value, str)]
    off = {n: apart(v, losses[f"alone, {n.rpartition(' ')[2]}"]) for n, v in losses.items() if n not in errors}
    figure = ", ".join(f"{n} ({kinds.get(n)}) {off[n]:.0e}" if n in off else f"{n}: {losses[n][:60]}" for n in losses)
    far = [n for n, value in off.items() if value > (1e-5 if n.endswith("no") else 1e-2)]
    return ("fail" if errors else "look" if far else "pass"), "loss against one process alone: " + figure


def tests(ctx: Context) -> Outcome:
    """Run the project's own tests of training, which use the GPU where there is one."""
    import importlib.util

    file = ctx.work / "tests.xml"
    names = ["tests/training/test_train_loop.py", "tests/training/test_train_lora.py"]
    command = [sys.executable, "-m", "pytest", *names, "-p", "no:cacheprovider", f"--junitxml={file}", "--tb=short"]
    if ctx.toy:
        command += ["-k", "clipping or rank or level_zero"]
    elif importlib.util.find_spec("xdist"):
        command += ["--numprocesses", str(max(1, min(6, (os.cpu_count() or 1) // 2)))]
    env = {**os.environ, "AMBIENT_SD_TEST_GPU": str(int(ctx.cuda))}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=sys.stderr)
    try:
        code = process.wait(timeout=max(1.0, ctx.left() - 5))
    except subprocess.TimeoutExpired:
        process.kill()
        return "cut", "no counts: the tests took too long; the log has those that failed before"
    if not file.exists():
        return "fail", f"pytest ended with {code} and wrote nothing"
    cases = list(ElementTree.parse(file).iter("testcase"))
    bad = {
        f"{case.get('classname')}::{case.get('name')}": " ".join((child.get("message") or "").split())[:300]
        for case in cases
        for child in case
        if child.tag in ("failure", "error")
    }
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    passed = len(cases) - len(bad) - skipped
    ctx.note(passed=passed, failed=bad, skipped=skipped)
    figure = f"{passed} passed, {len(bad)} failed, {skipped} skipped"
    return ("fail" if bad or not cases else "pass"), figure + (
        f": {', '.join(b.split('::')[1] for b in bad)}" if bad else ""
    )


def study(ctx: Context) -> Outcome:
    """Fine-tune the embedded base plain and ambient as the demo does, with a look for copies at the end."""
    found: dict[str, Any] = {}
    for objective in ("plain", "ambient"):
        stamps: list[float] = []
        steps = ctx.pick(400, 6)
        values = {
            "objective": objective,
            "max_train_steps": steps,
            "probe_steps": steps,
            "probe_images": ctx.pick(60, 2),
        }
        begin = time.perf_counter()
        summary = train(config(ctx, objective, **values), lambda *_, stamps=stamps: stamps.append(time.perf_counter()))
        late = stamps[len(stamps) // 10 :]  # without the warm-up
        look = summary.evaluations[-1]
        found[objective] = {
            "steps a second": round((len(late) - 1) / (late[-1] - late[0]), 2), "seconds": round(time.perf_counter() - begin, 1),
            "seconds of the look": round(time.perf_counter() - stamps[-1], 1), "loss": summary.loss,
            "copies": look["copies"], "published": look["published"], "probed": look["n"],
        }  # fmt: skip
        ctx.note(runs=found, steps=steps)
    return "pass", ", ".join(
        f"{k}: {v['steps a second']} steps/s, copies {v['copies']:.0%} of {v['probed']}" for k, v in found.items()
    )


def waits(ctx: Context) -> Outcome:
    """Count what makes the host wait in a training step; hold the search and batches of latents against the processor's."""
    import warnings

    import torch

    from ambient_sd.audit.neighbours import nearest
    from ambient_sd.data import latents
    from ambient_sd.data.views import ViewRule
    from ambient_sd.training.loop import _Trainer
    from ambient_sd.training.plan import plan_run

    counts: dict[str, list[int]] = {}
    real = _Trainer._step

    def counted(self: Any, *args: Any) -> Any:
        if ctx.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                return real(self, *args)
        finally:
            if ctx.cuda:
                torch.cuda.set_sync_debug_mode("default")
            counts[current].append(sum("synchronizing CUDA operation" in str(one.message) for one in seen))

    _Trainer._step = counted  # type: ignore[method-assign]
    runs: dict[str, dict[str, Any]] = {
        "full, average offloaded": {"use_ema": True, "offload_ema": True},
        "LoRA, bf16": {"lora": True, "lora_dropout": 0.1, "mixed_precision": "bf16" if ctx.cuda else "no"},
    }
    try:
        for current, values in runs.items():
            counts[current] = []
            train(config(ctx, "waits", **{"use_ema": False, "max_train_steps": ctx.pick(6, 2), **values}))
            ctx.note(waits=counts)
    finally:
        _Trainer._step = real  # type: ignore[method-assign]

    g = torch.Generator().manual_seed(0)
    queries, rows = (
        torch.randn(ctx.pick(500, 20), 3072, generator=g),
        torch.randn(ctx.pick(40_000, 200), 3072, generator=g),
    )
    found, seconds = {}, {}
    for device in ("cpu", ctx.device):
        begin = time.perf_counter()
        found[device] = nearest(queries, rows, 2, device=device)
        seconds[device] = round(time.perf_counter() - begin, 2)
    here, there = found["cpu"], found[ctx.device]
    equal = bool(torch.equal(here.index, there.index) and torch.equal(here.distance, there.distance))

    plan = plan_run(config(ctx, "latents", max_train_samples=ctx.pick(32, 4)))
    encoder, rule = plan.base.images().to(ctx.device), ViewRule(64, True, False, True, 0)
    made = []
    for many in (1, 16):
        latents._MOST_AT_ONCE = many
        made.append(latents.encode_all(encoder, plan.images, rule, range(len(plan.images))))
    off = float((made[0] - made[1]).abs().max())
    ctx.note(search_equal=equal, search_seconds=seconds, latents_in_batches_off_by=off)
    most = {name: max(steps[1:]) for name, steps in counts.items()}
    figure = f"waits a step {most}; search {'equal' if equal else 'NOT equal'} in {seconds} s; latents in batches off by {off:.0e}"
    return ("fail" if not equal else "look" if max(most.values()) > 2 or off > 1e-2 else "pass"), figure


@dataclass(frozen=True)
class Plan:
    """Hold a check and its seconds: what must be left for it to begin, and where it is ended."""

    run: Check
    need: float
    limit: float
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    cuda_only: str = ""  # why


CHECKS: dict[str, Plan] = {
    "environment": Plan(environment, 5, 60),
    "training": Plan(training, 40, 120),
    "resume": Plan(resume, 30, 90),
    "resume_deterministic": Plan(resume_deterministic, 30, 90),
    "waits": Plan(waits, 20, 60),
    "guard": Plan(guard, 40, 120),
    "throughput": Plan(throughput, 60, 180),
    "sampling": Plan(sampling, 30, 90),
    "distributed": Plan(distributed, 20, 60),
    "tests": Plan(tests, 40, 120),
    "study": Plan(study, 40, 120),
    "compiled": Plan(
        compiled, 60, 180, {"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "compiling for a processor says nothing"
    ),
}


# --- processes --------------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Import what every check needs. Nothing here may touch the GPU."""
    sys.path.insert(0, str(ROOT))
    import torch  # noqa: F401

    import ambient_sd.commands.demo.work
    import ambient_sd.training.loop  # noqa: F401
    from ambient_sd.utils.quiet import quiet

    quiet()


def context(args: argparse.Namespace, limit: float) -> Context:
    return Context(args.device, args.size == "toy", args.work, args.child_file, time.monotonic() + limit)


def as_side(args: argparse.Namespace) -> None:
    """Do a task on the processor and write what it found."""
    prepare()
    import torch

    task, _, argument = args.side.partition(":")
    ctx = context(args, 600)
    result = reference(ctx, argument) if task == "reference" else guard_reference(ctx)
    torch.save(result, args.child_file)


def as_child(args: argparse.Namespace) -> None:
    """Prepare, wait for the word, run one check and write its record."""
    prepare()
    word = sys.stdin.readline().split()
    if not word:
        return
    ctx = context(args, float(word[0]))
    try:
        if ctx.cuda:
            import torch

            if not torch.cuda.is_available():
                raise NotHere("torch sees no GPU")
        tf32(False, False)
        verdict, figure = CHECKS[args.child].run(ctx)
    except NotHere as error:
        verdict, figure = "skipped", str(error)
    except BaseException as error:
        traceback.print_exc()
        verdict, figure = "fail", " ".join(f"{type(error).__name__}: {error}".split())[:300]
        ctx.note(traceback=traceback.format_exc()[-3000:])
    ctx.note(verdict=verdict, figure=figure)


def start(args: argparse.Namespace, name: str, log: Any) -> subprocess.Popen[str]:
    """Start a check's process; it waits for the word."""
    command = [sys.executable, __file__, "--child", name, "--child-file", str(args.work / f"{name}.json")]
    command += ["--work", str(args.work), "--device", args.device, "--size", args.size]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, **CHECKS[name].env, **hidden, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, process_group=0, cwd=ROOT
    )


def end(process: subprocess.Popen[str]) -> None:
    """End a check's process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judge(args: argparse.Namespace, name: str, process: subprocess.Popen[str], limit: float) -> dict[str, Any]:
    """Let a check run, for `limit` seconds at most; return its record."""
    assert process.stdin is not None
    why = ""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{limit}\n")
        process.stdin.close()
    try:
        process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        why = f"ended after {limit:.0f} s"
    end(process)
    file = args.work / f"{name}.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if "verdict" not in record:
        record["verdict"] = "cut" if why else "fail"
        record["figure"] = why or f"the process ended with {process.returncode}; see the log"
    return record


def as_parent(args: argparse.Namespace) -> int:
    """Run the checks one after another and keep what they found."""
    begin = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in CHECKS if name in (args.only or CHECKS)]
    report: dict[str, Any] = {
        "device": args.device,
        "size": args.size,
        "budget": args.budget,
        "machine": re.sub(r"\s+", " ", f"{platform.system()} {platform.machine()}"),
        "checks": {},
    }

    def show(name: str, record: dict[str, Any], seconds: float) -> None:
        report["checks"][name] = {
            "verdict": record["verdict"],
            "figure": record["figure"],
            "seconds": round(seconds, 1),
        } | record
        report["seconds"] = round(time.monotonic() - begin, 1)
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(args.out)
        print(f"{name:20} {record['verdict']:8} {seconds:6.1f} s  {record['figure']}", flush=True)

    runnable = []
    for name in names:
        if args.device == "cpu" and CHECKS[name].cuda_only:
            show(name, {"verdict": "skipped", "figure": f"needs a GPU: {CHECKS[name].cuda_only}"}, 0.0)
        else:
            runnable.append(name)
    waiting: dict[str, subprocess.Popen[str]] = {}
    with args.out.with_suffix(".log").open("w") as log:
        try:
            for place, name in enumerate(runnable):
                left = args.budget - (time.monotonic() - begin)
                if left < CHECKS[name].need:
                    why = f"needs {CHECKS[name].need:.0f} s, {max(left, 0):.0f} are left of the budget"
                    show(name, {"verdict": "skipped", "figure": why}, 0.0)
                    continue
                process = waiting.pop(name, None) or start(args, name, log)
                for later in runnable[place + 1 : place + 2]:
                    waiting[later] = start(args, later, log)
                since = time.monotonic()
                log.write(f"\n=== {name}\n")
                log.flush()
                try:
                    record = judge(args, name, process, min(CHECKS[name].limit, left))
                finally:
                    end(process)
                show(name, record, time.monotonic() - since)
        finally:
            for process in waiting.values():
                end(process)
    verdicts = [c["verdict"] for c in report["checks"].values()]
    print(
        ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)),
        f"in {time.monotonic() - begin:.0f} s: {args.out}",
    )
    return int("fail" in verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--budget", type=float, default=560.0, help="seconds in all; a check that would not fit is skipped"
    )
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="NAME", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/gpu.json"))
    parser.add_argument("--work", type=Path, help="folder for models and runs, 10 GB; default: a temporary one")
    for hidden in ("--child", "--side"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--child-file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        as_side(args)
    elif args.child:
        as_child(args)
    else:
        args.out = args.out.absolute()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=args.work) as folder:
            args.work = Path(folder)
            code = as_parent(args)
        sys.exit(code)


if __name__ == "__main__":
    main()
