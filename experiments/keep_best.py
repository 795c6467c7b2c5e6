"""What `--keep best` chooses against the best of all checkpoints by hindsight, on the embedded images.

    OMP_NUM_THREADS=1 python -m experiments.keep_best --output_dir build/keep-best --seeds 0 1 2

Each run trains to its end whatever the probe sees, and leaves a checkpoint at every evaluation. What `--keep best` would have kept follows from the
probe's records alone. Hindsight measures every checkpoint with several times the images: copies on training captions (held-out images as the
null), and the Frechet distance of images for captions of held-out images to those images. Its best is the smallest distance among
the checkpoints whose copy rate is not above that of held-out images with its whole interval.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from diffusers import DPMSolverMultistepScheduler

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.audit.decision import HELDOUT
from ambient_sd.audit.metrics import quality_rows
from ambient_sd.audit.shares import COPIES
from ambient_sd.data.sources import load_rows
from ambient_sd.sampling import SamplingConfig, own_device
from ambient_sd.training import TrainConfig, adapters, run
from ambient_sd.training.averaging import Average
from ambient_sd.training.keeping import decide
from ambient_sd.training.plan import base_of, open_images
from ambient_sd.utils.files import atomic_write
from experiments.measures import measure_samples, read_reals, sample

RUNS: dict[str, dict[str, Any]] = {
    "LoRA, ambient": {"objective": "ambient", "lora": True, "rank": 16, "learning_rate": 1e-3},
    "LoRA, plain": {"objective": "plain", "lora": True, "rank": 16, "learning_rate": 1e-3},
    "whole U-Net, plain": {"objective": "plain", "learning_rate": 1e-3},
}
SAMPLING: dict[str, Any] = {"scheduler": "dpm++", "num_inference_steps": 15, "guidance_scale": 1.5, "batch_size": 16}
PER_CAPTION, NEW, EVALUATIONS = 2, 96, 6


def config_of(label: str, seed: int, folder: Path, steps: int) -> TrainConfig:
    """Return the settings of a run: as `ambient-sd train` proposes them, but that nothing ends it."""
    return TrainConfig(
        str(BASE), train_data_dir=str(IMAGES), row_filter=["subset_60=true"], resolution=64, center_crop=True, train_batch_size=16,
        max_train_steps=steps, use_ema=True, probe_steps=steps // EVALUATIONS, probe_images=32, keep="best", stop_on_memorization=1.0,
        checkpointing_steps=10**9, report_to="none", seed=seed, output_dir=str(folder), resume_from_checkpoint="latest",
        latent_cache_dir=str(folder.parent / "latents"), **RUNS[label],
    )  # fmt: skip


def measure_run(config: TrainConfig, reals: Any, progress: Any = print) -> dict[str, Any]:
    """Train, then measure every checkpoint; return the probe's records and the figures by step."""
    record = run(config)
    figures_at = Path(config.output_dir) / "hindsight.json"
    found: dict[str, Any] = json.loads(figures_at.read_text()) if figures_at.is_file() else {}
    base = base_of(config)
    pipe = base.load_pipeline().to(own_device())
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if config.lora:
        adapters.attach(pipe.unet, rank=config.rank or 16, alpha=config.lora_alpha or 16.0, targets=config.lora_target_modules or (), seed=config.seed)  # fmt: skip
    average = Average(pipe.unet)
    sampling = SamplingConfig("checkpoint", seed=1000 + config.seed, resolution=64, **SAMPLING)
    for evaluation in record.evaluations:
        step = int(evaluation["step"])
        if str(step) in found or step == 0:
            continue
        average.resume(Path(config.output_dir) / f"checkpoint-{step}", step)
        average.give()
        captions = [caption for caption in reals.captions for _ in range(PER_CAPTION)]
        copies = measure_samples(sample(pipe, captions, sampling), captions, reals, config.seed)[0][COPIES]
        new = reals.heldout_captions[:NEW]
        deep = next(feature for feature in reals.features if feature.name == "EffLite0")
        quality = quality_rows(deep(sample(pipe, new, sampling)), reals.heldout["EffLite0"], name="EffLite0", seed=config.seed)  # fmt: skip
        found[str(step)] = {"copies": copies.as_dict(), "distance": quality[0].generated.as_dict(), "kid": quality[1].generated.as_dict()}  # fmt: skip
        atomic_write(figures_at, json.dumps(found, indent=1))
        progress(f"step {step}: probe {evaluation['copies']:.3f}, {copies.show(1, 100, ' %')}; {quality[0].generated.show(1)}", flush=True)  # fmt: skip
    return {"evaluations": record.evaluations, "figures": found}


def compare(evaluations: list[dict[str, float]], figures: dict[str, Any], by_chance: float) -> dict[str, Any]:
    """Return what the rule keeps, what hindsight would, and the last step."""
    kept = decide(evaluations)
    clean = [step for step, f in figures.items() if f["copies"]["low"] <= by_chance]
    best = min(clean, key=lambda step: figures[step]["distance"]["value"], default=None)
    return {
        "kept": kept.step,
        "began": kept.began,
        "best": None if best is None else int(best),
        "last": max(map(int, figures)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--steps", type=int, default=480)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    training = open_images(config_of(args.runs[0], 0, args.output_dir / "none", args.steps))
    vae = base_of(config_of(args.runs[0], 0, args.output_dir / "none", args.steps)).load("vae").eval().to(own_device())
    reals = read_reals(training.check(near_duplicates=True), load_rows(IMAGES, split="heldout"), vae, 64)
    chance = reals.decision.background(HELDOUT)
    assert chance is not None
    by_chance = float(chance.double().mean())
    path = args.output_dir / "keep-best.json"
    results: dict[str, Any] = {"by_chance": by_chance, "runs": {}}
    for seed in args.seeds:
        for label in args.runs:
            name = f"{label}, seed {seed}"
            print(name, flush=True)
            folder = args.output_dir / name.replace(", ", "-").replace(" ", "-")
            found = measure_run(config_of(label, seed, folder, args.steps), reals)
            results["runs"][name] = {**found, **compare(found["evaluations"], found["figures"], by_chance)}
            atomic_write(path, json.dumps(results, indent=1))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Return the outcome as a table in Markdown."""
    lines = ["| run | kept | copies | distance | best by hindsight | copies | distance | last | copies | distance |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in results["runs"].items():
        cells = [name]
        for which in ("kept", "best", "last"):
            f = one["figures"].get(str(one[which]))
            cells += [f"step {one[which]}"] + (["-", "-"] if f is None else [
                f"{100 * f['copies']['value']:.1f} % [{100 * f['copies']['low']:.1f}, {100 * f['copies']['high']:.1f}]",
                f"{f['distance']['value']:.1f} [{f['distance']['low']:.1f}, {f['distance']['high']:.1f}]"])  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
