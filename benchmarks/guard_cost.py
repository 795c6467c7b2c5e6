"""What the guard and its mitigations cost: processor time and memory of sampling with them, over sampling without, in one run.

    python benchmarks/guard_cost.py --rounds 5
    python benchmarks/guard_cost.py --rounds 3 --only stock PromptOptimization PromptOptimization-checkpointing

The model is random, of Stable Diffusion 2's classes. Every variant samples in a process of its own, after one call that warms up;
memory is what the process held at most, less what it held before the first call, so that weights and libraries do not dilute
the ratio. Prompt optimization is held to all of its `--iterations` by a target that cannot be reached: a prompt that needs
fewer costs less. Published for SD1.4 on an A100, 50 steps (Han et al. 2025): none 3565 MB and 1.85 s, Wen et al. 8116 MB and 1.98 s.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from against_diffusers import SMALL, models


def pipeline() -> Any:
    """Return a random Stable Diffusion 2 pipeline (epsilon) with DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from ambient_sd.assets import BASE

    torch.manual_seed(0)
    unet, vae, text = models(SMALL)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=77)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def policy(variant: str, iterations: int) -> Any:
    from ambient_sd.guard import policies

    return {
        "guard": lambda: None,
        "PromptOptimization": lambda: policies.PromptOptimization(target=1e-9, max_steps=iterations),
        "PromptOptimization-checkpointing": lambda: policies.PromptOptimization(
            target=1e-9, max_steps=iterations, gradient_checkpointing=True
        ),
        "StaticTransition": policies.StaticTransition,
        "OppositeGuidance": policies.OppositeGuidance,
        "AttentionGuard": policies.AttentionGuard,
        "AttentionRescaling": policies.AttentionRescaling,
    }[variant]()


VARIANTS = ("stock", "guard", "PromptOptimization", "PromptOptimization-checkpointing", "StaticTransition", "OppositeGuidance",
            "AttentionGuard", "AttentionRescaling")  # fmt: skip


def measure(args: argparse.Namespace) -> None:
    """Sample one variant in this process and print its seconds and megabytes."""
    from ambient_sd import MemorizationGuard

    pipe = pipeline()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def once(seed: int) -> None:
        # Latents, not images: decoding costs the same with and without.
        pipe("a red apple on a table", num_inference_steps=args.steps, num_images_per_prompt=args.images, output_type="latent",
             generator=torch.Generator().manual_seed(seed))  # fmt: skip

    def run(seed: int) -> None:
        if args.measure == "stock":
            once(seed)
        else:
            with MemorizationGuard(pipe, policy(args.measure, args.iterations)):
                once(seed)

    run(0)
    clock, busy = time.perf_counter(), time.process_time()
    for seed in range(args.calls):
        run(seed)
    clock, busy = time.perf_counter() - clock, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"clock": clock / args.calls, "processor": busy / args.calls, "memory": (peak - held) / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3, help="timed calls of the pipeline in a round")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=1, help="images a call")
    parser.add_argument("--iterations", type=int, default=10, help="of prompt optimization")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    seen: dict[str, list[dict[str, float]]] = {variant: [] for variant in args.only}
    for number in range(args.rounds):
        for variant in args.only if number % 2 == 0 else args.only[::-1]:
            command = [sys.executable, __file__, "--measure", variant]
            for name in ("calls", "steps", "images", "iterations"):
                command += [f"--{name}", str(getattr(args, name))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{variant} failed:\n{done.stderr[-2000:]}")
            seen[variant].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(
                f"round {number + 1}, {variant}: " + ", ".join(f"{k} {v:.3f}" for k, v in seen[variant][-1].items()),
                flush=True,
            )
    first = args.only[0]
    for variant in args.only:
        parts = []
        for name in ("processor", "clock", "memory"):
            ratios = [a[name] / max(b[name], 1e-9) for a, b in zip(seen[variant], seen[first], strict=True)]
            parts.append(f"{name} {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
        print(f"{variant} / {first}: " + ", ".join(parts))
    print(
        f"n = {args.rounds} rounds of {args.calls} calls, {args.steps} steps, {args.images} images, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
