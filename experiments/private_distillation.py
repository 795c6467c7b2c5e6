"""Train a student on a finished run's samples that are no copies, and measure it along its training, as a recipe of the same study.

    python -m experiments.private_distillation configs/study/style-60.yaml --output_dir build/study/style-60 --teacher plain

After "Privacy Distillation" (Fernandez et al. 2023, arXiv 2306.01322): teacher on the images -> samples for the training captions ->
those that the filter takes for training images are dropped -> student, from the base, on the rest. Their filter is a learned
re-identification; ours is the audit's decision of what a copy is. No image of the dataset reaches the student, but what the filter lets
pass does: a copy that is called none is trained as often as any other sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ambient_sd.sampling import load_pipeline
from ambient_sd.training import run as train
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.quiet import quiet
from experiments.arguments import plan_of, study_parser
from experiments.measures import config_of, in_turn, sample
from experiments.plan import Plan, Run
from experiments.sweep import measure_apart, open_reals

_SEEDS = 2000  # added to a run's seed: samples to train on share no start noise with those that are measured


def write_images(folder: Path, images: Sequence[Image.Image], captions: Sequence[str]) -> Path:
    """Write images with their captions as a dataset; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.convert("RGB").save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def distil(plan: Plan, run: Run, out: Path, count: int) -> None:
    """Sample the teacher `run`, drop the copies, train the student and measure it at the study's steps."""
    work = out / "distilled" / run.folder
    settings: dict[str, Any] = {"report_to": "none", "resume_from_checkpoint": "latest", "checkpoints_total_limit": 1,
                                "checkpointing_steps": plan.checkpointing_steps}  # fmt: skip
    config = run.config(out / "runs" / run.folder / "model", **settings)
    base = str(config.pretrained_model_name_or_path)
    if not Path(config.output_dir).is_dir():
        raise UserError(
            f"{run.name} is not in {out}", rule="a finished run is the teacher", remedy="run the study first"
        )
    if not (work / "images" / "metadata.jsonl").exists():
        reals = open_reals(plan, config)
        how = config_of(base, Path(config.output_dir), config.lora, plan.sampling, config.resolution, run.seed + _SEEDS)
        prompts = in_turn(reals.captions, count, run.seed)
        images = sample(load_pipeline(how, safety_checker=False), prompts, how)
        copies = reals.decision(images).copy.tolist()
        kept = [i for i, copy in enumerate(copies) if not copy]
        if not kept:
            raise UserError(f"all {count} samples of {run.name} are copies", rule="nothing is left to train on")
        write_images(work / "images", [images[i] for i in kept], [prompts[i] for i in kept])
    left = len((work / "images" / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    print(f"{run.name}: {left} of {count} samples are no copies", flush=True)
    for step in plan.measure_at:
        student = run.config(work / "student", **{**settings, "train_data_dir": str(work / "images"), "row_filter": None,
                                                  "dataset_split": None, "max_train_steps": step})  # fmt: skip
        train(student)
        made = {"teacher": run.name, "samples": count, "left": left}
        print(measure_apart(plan, out, f"{run.label} distilled", run.seed, step, Path(student.output_dir), made, lora=student.lora), flush=True)  # fmt: skip


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--teacher", default="plain", help="label of a run")
    parser.add_argument("--samples", type=int, default=480)
    args = parser.parse_args(argv)
    quiet()
    plan = plan_of(args)
    labels = plan.chosen([args.teacher])
    for run in plan.runs:
        if run.label in labels:
            distil(plan, run, args.output_dir, args.samples)


if __name__ == "__main__":
    main()
