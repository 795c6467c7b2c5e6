"""Samples per second and peak memory beside diffusers' own script: ratios in one run, same model, images, batch, steps.

    python benchmarks/against_diffusers.py --script diffusers/examples/text_to_image/train_text_to_image.py --rounds 3

The script comes from a checkout of diffusers and needs torchvision. The model is random: Stable Diffusion 2's classes at a
size at which VAE and text encoder have the share of the work that they have in SD2 at 512 px (printed beside it). A variant
trains `--short` and `--long` steps in processes of their own; the difference of the two times is steps alone, the rest of
the short one start and end. Variants take turns, and each round gives one ratio, so that a slow minute slows all.

    diffusers   their script: VAE and text encoder in every step
    encoding    ours, plain, crops drawn anew each epoch: VAE in every step, captions held
    memory      ours, ambient, the default: latents and captions held in memory
    cache       ours, ambient, --latent_cache_dir, filled before the clock starts
    released    ours, ambient, --fused_backward_pass: each gradient goes as soon as its weight has made its step (all weights only)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# Widths of U-Net, VAE and text encoder; layers of the text encoder; resolution. SD2's at 512 px, and ours.
SD2 = ((320, 640, 1280, 1280), (128, 256, 512, 512), 1024, 23, 512)
PICTURE_COUNT = 64
SMALL = ((96, 192, 384, 384), (32, 96, 128, 128), 256, 2, 128)


def models(size: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Return U-Net, VAE and text encoder of a size, random."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, vae, text, layers, resolution = size
    return (
        UNet2DConditionModel(
            sample_size=resolution // 8, block_out_channels=unet, attention_head_dim=tuple(max(1, w // 64) for w in unet),
            cross_attention_dim=text, use_linear_projection=True,
        ),
        AutoencoderKL(
            block_out_channels=vae, layers_per_block=2, latent_channels=4, sample_size=resolution,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=1870, hidden_size=text, intermediate_size=4 * text, num_hidden_layers=layers, num_attention_heads=4,
                bos_token_id=1868, eos_token_id=1869, pad_token_id=1869,
            )
        ),
    )  # fmt: skip


def shares(size: tuple[Any, ...]) -> str:
    """Return the FLOPs of VAE encoder and text encoder, as shares of the U-Net's forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return int(counter.get_total_flops())

    resolution, width = size[4], size[2]
    with torch.device("meta"):
        unet, vae, text = models(size)
        x, context = torch.empty(1, 4, resolution // 8, resolution // 8), torch.empty(1, 77, width)
        flops = (
            3 * count(lambda: unet(x, torch.zeros(1, dtype=torch.long), context)),
            count(lambda: vae.encoder(torch.empty(1, 3, resolution, resolution))),
            count(lambda: text(torch.zeros(1, 77, dtype=torch.long))),
        )
    most = (flops[0] + flops[1] + flops[2]) / flops[0]
    return (f"VAE {flops[1] / flops[0]:.2f}, text encoder {flops[2] / flops[0]:.3f} of the U-Net's {flops[0] / 1e9:.0f} GFLOPs; "
            f"caching alone can bring {most:.2f}")  # fmt: skip


def prepare(folder: Path, count: int) -> None:
    """Write the model and a folder of images, wider than high, with captions."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from ambient_sd.assets import BASE, IMAGES
    from ambient_sd.data.sources import load_rows

    torch.manual_seed(0)
    unet, vae, text = models(SMALL)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=77)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler.from_pretrained(BASE / "scheduler"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    images = folder / "images"
    images.mkdir()
    with (images / "metadata.jsonl").open("w") as rows:
        for i, image in enumerate(load_rows(IMAGES, max_samples=count)):
            image.image.resize((SMALL[4] * 3 // 2, SMALL[4])).save(images / f"{i:04d}.png")
            rows.write(json.dumps({"file_name": f"{i:04d}.png", "text": image.caption}) + "\n")


def variants(folder: Path, script: Path | None, batch: int, lora: bool) -> dict[str, list[str]]:
    """Return the command of each variant, but for steps and output."""
    same = ["--pretrained_model_name_or_path", str(folder / "model"), "--train_data_dir", str(folder / "images"),
            "--resolution", str(SMALL[4]), "--train_batch_size", str(batch), "--learning_rate", "1e-4", "--seed", "0",
            "--checkpointing_steps", "1000000"]  # fmt: skip
    ours = [sys.executable, str(ROOT / "train_text_to_image_ambient.py"), *same, "--report_to", "none"]
    ours += ["--lora"] if lora else []
    ambient = [*ours, "--objective", "ambient"]
    commands = {
        "encoding": [*ours, "--objective", "plain"],
        "memory": ambient,
        "cache": [*ambient, "--latent_cache_dir", str(folder / "cache")],
    }
    if not lora:
        commands["released"] = [*ambient, "--fused_backward_pass", "--max_grad_norm", "0"]
    theirs = {} if script is None else {"diffusers": [sys.executable, str(script), *same]}
    return {**theirs, **commands}


def timed(command: list[str], steps: int) -> tuple[float, float, float]:
    """Run a training in a process of its own; return wall seconds, peak memory in MB, and CPU seconds, which a busy machine changes less."""
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        process = subprocess.Popen([*command, "--max_train_steps", str(steps), "--output_dir", out], stdout=log, stderr=log,
                                   env={**os.environ, "ACCELERATE_USE_CPU": "true"} if not torch.cuda.is_available() else None)  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command[:2])} ended with {process.returncode}:\n{log.read()[-3000:]}")
    peak = usage.ru_maxrss / 1024 / (1024 if sys.platform == "darwin" else 1)
    return seconds, peak, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, help="diffusers' train_text_to_image.py (or _lora.py with --lora)")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 4 instead of all weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, default=3, help="steps of the short run")
    parser.add_argument("--long", type=int, default=15, help="steps of the long run")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="+", help="some of the variants")
    args = parser.parse_args()
    print(f"SD2 at 512 px: {shares(SD2)}\nthis model:    {shares(SMALL)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, PICTURE_COUNT)
        commands = variants(folder, args.script, args.batch, args.lora)
        commands = {k: v for k, v in commands.items() if not args.only or k in args.only}
        if "cache" in commands:
            filling, again = (timed(commands["cache"], 1)[0] for _ in range(2))
            print(f"filling the cache: {PICTURE_COUNT / (filling - again):.1f} images/s; a run that finds it full starts and ends "
                  f"in {again:.1f} s", flush=True)  # fmt: skip
        rates: dict[str, list[float]] = {k: [] for k in commands}
        starts: dict[str, list[float]] = {k: [] for k in commands}
        peaks: dict[str, list[float]] = {k: [] for k in commands}
        work: dict[str, list[float]] = {k: [] for k in commands}
        for turn in range(args.rounds):
            for variant in list(commands) if turn % 2 == 0 else list(commands)[::-1]:
                short, _, before = timed(commands[variant], args.short)
                long, peak, after = timed(commands[variant], args.long)
                work[variant].append((after - before) / (args.long - args.short))
                step = (long - short) / (args.long - args.short)
                rates[variant].append(args.batch / step)
                starts[variant].append(short - args.short * step)
                peaks[variant].append(peak)
                print(f"round {turn + 1}: {variant:9} {args.batch / step:6.2f} samples/s, start and end {starts[variant][-1]:5.1f} s, "
                      f"peak {peak:5.0f} MB", flush=True)  # fmt: skip
        first = next(iter(commands))
        for variant in commands:
            speed = [a / b for a, b in zip(rates[variant], rates[first], strict=True)]
            memory = [a / b for a, b in zip(peaks[variant], peaks[first], strict=True)]
            effort = [a / b for a, b in zip(work[variant], work[first], strict=True)]
            start = [a / b for a, b in zip(starts[variant], starts[first], strict=True)]
            print(
                f"{variant:9} / {first}: samples per second {_span(speed)}, CPU time a step {_span(effort)}, peak memory {_span(memory)}, start and end {_span(start)}"
            )
    print(
        f"n = {args.rounds} rounds, batch {args.batch}, {torch.get_num_threads()} threads, {'LoRA' if args.lora else 'all weights'}"
    )


def _span(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


if __name__ == "__main__":
    main()
