"""Train a student on a teacher's samples that are no copies, and measure it along its training, as a recipe of the same study.

    python -m experiments.private_distillation configs/study/style-60.yaml --output_dir build/study/style-60 --teacher plain
    python -m experiments.private_distillation configs/study/style-60.yaml --output_dir build/study/style-60 --teacher plain \
        --teacher_steps 300 --others "twemoji emoji of {}"

After "Privacy Distillation" (Fernandez et al. 2023, arXiv 2306.01322): teacher on the images -> samples for the training captions ->
those that the filter takes for training images are dropped -> student, from the base, on the rest. Their filter is a learned
re-identification; ours is the audit's decision of what a copy is. No image of the dataset reaches the student, but what the filter lets
pass does: a copy that is called none is trained as often as any other sample.

With `--others` the teacher draws other things instead: concepts of the study's `style: others`, which are the base's own, in the caption's
place. So the student sees neither a training image nor a training caption, and of the images only what the teacher puts into other things.
Captions of the study's training and held-out images are left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ambient_sd.sampling import load_pipeline
from ambient_sd.training import run as train
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.quiet import quiet
from experiments.arguments import plan_of, study_parser
from experiments.measures import Reals, config_of, in_turn, sample
from experiments.plan import Plan, Run, file_name
from experiments.sweep import measure_apart, open_reals, open_rows

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


@dataclass(frozen=True)
class Recipe:
    """Say what a student is made of.

    Attributes:
        samples: drawn by the teacher. others: caption of a concept that was not trained, `{}` in its place; None: the training captions.
        teacher_steps: of training; None: the finished run of the study. guidance: of the teacher's samples; None: the study's.
    """

    samples: int
    others: str | None = None
    teacher_steps: int | None = None
    guidance: float | None = None

    def label(self, teacher: str) -> str:
        """Return the student's name in tables."""
        steps = "" if self.teacher_steps is None else f" {self.teacher_steps}"
        guidance = "" if self.guidance is None else f" guidance={self.guidance:g}"
        return f"{teacher}{steps} distilled{'' if self.others is None else ', other things'}{guidance}"


def other_captions(plan: Plan, run: Run, reals: Reals, caption: str) -> list[str]:
    """Return `caption` of each concept that the base knows from other styles and the study neither trains nor measures, by name."""
    if plan.style is None or "{}" not in caption:
        raise UserError(f"others is {caption!r}", rule="a caption with {} for a concept, in a study of a style")
    names = open_rows(plan.style.others, "style: others", run.config("study")).column(plan.style.concept)
    taken = {*reals.captions, *reals.heldout_captions}
    return sorted({made for name in names if (made := caption.replace("{}", str(name))) not in taken})


def distil(plan: Plan, run: Run, out: Path, recipe: Recipe, steps: Sequence[int]) -> None:
    """Sample the teacher `run`, drop the copies, train the student and measure it at `steps`."""
    label, count = recipe.label(run.label), recipe.samples
    work = out / "distilled" / file_name(f"{label} seed={run.seed}")
    settings: dict[str, Any] = {"report_to": "none", "resume_from_checkpoint": "latest", "checkpoints_total_limit": 1,
                                "checkpointing_steps": plan.checkpointing_steps}  # fmt: skip
    config = run.config(out / "runs" / run.folder / "model", **settings)
    base = str(config.pretrained_model_name_or_path)
    teacher = Path(config.output_dir)
    if recipe.teacher_steps is not None:
        teacher = work / "teacher"
    elif not teacher.is_dir():
        raise UserError(
            f"{run.name} is not in {out}",
            rule="a finished run is the teacher",
            remedy="run the study first, or give --teacher_steps",
        )
    made_as = work / "recipe.json"
    if made_as.exists() and (before := json.loads(made_as.read_text(encoding="utf-8"))) != dataclasses.asdict(recipe):
        raise UserError(f"{work} has images of another recipe: {before}", rule="a student is trained on its own recipe's",
                        remedy="remove that folder, or name another with --output_dir")  # fmt: skip
    if not (work / "images" / "metadata.jsonl").exists():
        work.mkdir(parents=True, exist_ok=True)
        atomic_write(made_as, json.dumps(dataclasses.asdict(recipe)) + "\n")
        if recipe.teacher_steps is not None:
            train(run.config(teacher, **settings, max_train_steps=recipe.teacher_steps))
        reals = open_reals(plan, config)
        how = config_of(base, teacher, config.lora, plan.sampling, config.resolution, run.seed + _SEEDS)
        if recipe.guidance is not None:
            how = dataclasses.replace(how, guidance_scale=recipe.guidance)
        captions = reals.captions if recipe.others is None else other_captions(plan, run, reals, recipe.others)
        prompts = in_turn(captions, count, run.seed)
        images = sample(load_pipeline(how, safety_checker=False), prompts, how)
        copies = reals.decision(images).copy.tolist()
        kept = [i for i, copy in enumerate(copies) if not copy]
        if not kept:
            raise UserError(f"all {count} samples of {run.name} are copies", rule="nothing is left to train on")
        write_images(work / "images", [images[i] for i in kept], [prompts[i] for i in kept])
    left = len((work / "images" / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    print(f"{label} seed={run.seed}: {left} of {count} samples are no copies", flush=True)
    for step in steps:
        student = run.config(work / "student", **{**settings, "train_data_dir": str(work / "images"), "row_filter": None,
                                                  "dataset_split": None, "max_train_steps": step})  # fmt: skip
        train(student)
        made = {"teacher": run.name, "left": left, **dataclasses.asdict(recipe)}
        print(measure_apart(plan, out, label, run.seed, step, Path(student.output_dir), made, lora=student.lora), flush=True)  # fmt: skip


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--teacher", default="plain", help="label of a run")
    parser.add_argument("--samples", type=int, default=480)
    parser.add_argument("--others", metavar="CAPTION", help="draw other things: a caption with {} for the concept")
    parser.add_argument(
        "--teacher_steps", type=int, help="train the teacher for it, in place of the study's finished run"
    )
    parser.add_argument(
        "--teacher_guidance", type=float, help="guidance of the teacher's samples; default: the study's"
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", help="of the student, at which it is measured; default: the study's"
    )
    args = parser.parse_args(argv)
    quiet()
    plan = plan_of(args)
    labels = plan.chosen([args.teacher])
    recipe = Recipe(args.samples, args.others, args.teacher_steps, args.teacher_guidance)
    for run in plan.runs:
        if run.label in labels:
            distil(plan, run, args.output_dir, recipe, args.steps or plan.measure_at)


if __name__ == "__main__":
    main()
