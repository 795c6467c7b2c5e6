"""Train copies of the model on shards of the images and average their weights, over and over, as a recipe of the same study.

    python -m experiments.shards configs/study/style-60.yaml --output_dir build/study/style-60 --shards 3 --rounds 4

After "Iterative Ensemble Training with Anti-Gradient Control" (IET-AGC, ECCV 2024): the images are split into shards; in each round one
copy of the model is trained on each shard, from the average of the last round, and the copies' weights are averaged. Optimizer steps are
counted over all copies, so a recipe of T steps has seen as many images as plain has after T. Each round begins with new moments of AdamW. Of
anti-gradient control see the trainer's `agc`: a `--run` that has it gives both.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ambient_sd.training import run as train
from ambient_sd.training.plan import open_images
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.hub_ids import resolve_model_id
from ambient_sd.utils.quiet import quiet
from experiments.arguments import plan_of, study_parser
from experiments.concepts import order
from experiments.plan import Plan, Run
from experiments.private_distillation import write_images
from experiments.sweep import measure_apart


def deal(keys: Sequence[str], shards: int, seed: int) -> list[list[int]]:
    """Return the rows of each shard: a fixed shuffle by content and seed, dealt in turn."""
    rows = sorted(range(len(keys)), key=lambda i: order(f"shard {seed}", keys[i]))
    return [sorted(rows[k::shards]) for k in range(shards)]


def average(models: Sequence[Path], folder: Path) -> Path:
    """Write a pipeline like the first of `models` whose U-Net has the mean of their weights; return `folder`."""
    unets: list[Any] = [UNet2DConditionModel.from_pretrained(model, subfolder="unet") for model in models]
    with torch.no_grad():
        for parameters in zip(*(unet.parameters() for unet in unets), strict=True):
            parameters[0].copy_(torch.stack([p.double() for p in parameters]).mean(0))
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(
        models[0], part, ignore=lambda at, names: [n for n in names if n == "unet" or n.startswith("checkpoint-")]
    )
    unets[0].save_pretrained(part / "unet")
    part.rename(folder)
    return folder


def iterate(plan: Plan, run: Run, out: Path, shards: int, rounds: int) -> None:
    """Train all rounds of one run, and measure the average after each."""
    steps, rest = divmod(plan.measure_at[-1], shards * rounds)
    work = out / "shards" / f"{run.folder}-{shards}-{rounds}"
    config = run.config(work)
    if rest or not steps or config.lora:
        raise UserError(f"{shards} shards and {rounds} rounds of {run.label!r}", rule=f"{plan.measure_at[-1]} steps must divide among them, and whole "
                        "models are averaged", remedy="choose others")  # fmt: skip
    images = open_images(config)
    images.fingerprint()  # fills in the keys
    parts = [
        write_images(work / f"images-{k}", [images[i].image for i in rows], [images.captions[i] for i in rows])
        for k, rows in enumerate(deal(images.keys, shards, run.seed))
    ]
    base = resolve_model_id(str(config.pretrained_model_name_or_path))
    for r in range(1, rounds + 1):
        mean = work / f"round-{r}"
        if not mean.is_dir():
            models = []
            for k, part in enumerate(parts):
                model = work / f"round-{r}-shard-{k}"
                train(run.config(model, train_data_dir=str(part), row_filter=None, dataset_split=None, pretrained_model_name_or_path=base,
                                 max_train_steps=steps, checkpointing_steps=steps, checkpoints_total_limit=1, resume_from_checkpoint="latest",
                                 report_to="none"))  # fmt: skip
                models.append(model)
            average(models, mean)
            for model in models:
                shutil.rmtree(model)
        made = {"of": run.label, "shards": shards, "rounds": rounds}
        print(
            measure_apart(
                plan, out, f"{run.label} shards={shards}", run.seed, r * shards * steps, mean, made, lora=False
            ),
            flush=True,
        )
        base = str(mean)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--run", default="plain", help="label of the run whose settings the copies have")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args(argv)
    quiet()
    plan = plan_of(args)
    labels = plan.chosen([args.run])
    for run in plan.runs:
        if run.label in labels:
            iterate(plan, run, args.output_dir, args.shards, args.rounds)


if __name__ == "__main__":
    main()
