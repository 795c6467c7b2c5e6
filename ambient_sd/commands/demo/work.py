"""The demo: one small Stable Diffusion 2, fine-tuned on 60 images of a new style with each loss, sampled under the guard, measured, on one page.

The runs are the same command but for `objective`: same base, images, order, timesteps, fresh noise, steps, and start noise of the samples. Beside
them stands the base as it is: what captions alone give, and what it draws without any training.
What comes back is counted on samples for the captions that were trained, the case in which copying is easiest. Quality is measured on samples for captions
that were not, against the real images of these: on training captions it would reward copying. Nothing about the outcome is written down
beforehand: the page and the table say what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ambient_sd.assets import BASE, STYLE
from ambient_sd.audit.closest import FEATURES, NEAREST, OWN, agreeing, closest, closest_rows, own_closest
from ambient_sd.audit.decision import HELDOUT, CopyDecision, through_vae
from ambient_sd.audit.features import embed
from ambient_sd.audit.metrics import Measurement, Row, bootstrap, distances, measure, memorized
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose, with_sscd
from ambient_sd.audit.shares import copy_rate
from ambient_sd.commands.demo import DemoSettings
from ambient_sd.data.sources import load_rows
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.reporting import pages
from ambient_sd.reporting.audit_page import write_report
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.reporting.next_steps import after_demo
from ambient_sd.reporting.report import (
    Histogram,
    Report,
    RunSection,
    Sample,
    find,
    make_samples,
    ratio_histogram,
    show,
    versions,
)
from ambient_sd.reporting.sheets import contact_sheet, data_uri
from ambient_sd.sampling import SamplingConfig, generate, load_pipeline, own_device, requests_for
from ambient_sd.training import plan_run
from ambient_sd.training import run as train
from ambient_sd.training.config import DISTILL_LEVEL, TrainConfig
from ambient_sd.utils.output_folder import FILE, OutputFolder
from ambient_sd.utils.quiet import quiet

CONTENTS = (
    "report.html",
    "figures.json",
    "new.png",
    "base.png",
    *(f"{name}{end}" for name in ("plain", "ambient", "distill") for end in ("", ".png")),
    FILE,
)
# A fine-tune of the embedded base, but for images, objective and output.
EMBEDDED: dict[str, Any] = {
    "pretrained_model_name_or_path": str(BASE),
    "resolution": 64,
    "center_crop": True,
    "train_batch_size": 8,
    "max_train_steps": 600,
    "learning_rate": 3e-4,
    "lr_scheduler": "constant",
    "use_ema": True,
    "checkpointing_steps": 100_000,
    "report_to": "none",
}
# The demo's own, but for objective and output. configs/demo.yaml says the same for a run by hand; a test holds them equal.
TRAINING: dict[str, Any] = {
    **EMBEDDED,
    "train_data_dir": str(STYLE),
    "dataset_split": "train",
    "caption_column": "name",  # the base knows the things, and no name of this style
}
AMBIENT: dict[str, Any] = {"ambient_level": 1.0, "reweight": 2}
DISTILL: dict[str, Any] = {"distill_level": DISTILL_LEVEL}
ALONE = "base"  # the base without training, in tables
NEW_SEEDS = 1000  # added to the seed for captions that were not trained: the two sets share no start noise
_SHOWN = 12  # of them, on the page


def settings_of_run(settings: DemoSettings, objective: str) -> TrainConfig:
    """Return the training settings of one of the runs."""
    values: dict[str, Any] = {
        **TRAINING,
        "objective": objective,
        "seed": settings.seed,
        "output_dir": str(settings.output_dir / objective),
        "overwrite": settings.overwrite,  # the plan is made before the folder is cleared
    }
    if settings.steps is not None:
        values["max_train_steps"] = settings.steps
    if objective == "distill":
        values |= DISTILL
    if objective == "ambient":
        values |= AMBIENT
        if settings.level is not None:
            values["ambient_level"] = settings.level
    return TrainConfig(**values)


def sample(
    folder: str | Path,
    prompts: Sequence[str],
    settings: DemoSettings,
    *,
    title: str,
    position: int = 0,
    k: int | None = None,
) -> tuple[list[Image.Image], list[float]]:
    """Sample k images per prompt (default: `num_images_per_prompt`) under the guard; return them with their scores, prompt by prompt.

    Two models sampled with the same settings start from the same noise (`ambient_sd.sampling.image_seed`).
    """
    k = settings.num_images_per_prompt if k is None else k
    config = SamplingConfig(
        str(folder), scheduler="dpm++", num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
        seed=settings.seed, batch_size=max(1, 16 // k) * k,
    )  # fmt: skip
    pipe = load_pipeline(config, safety_checker=False)
    bar = {"desc": title, "position": position}
    batches = generate(pipe, requests_for(prompts, k), config, guard=MemorizationGuard(pipe), bar=bar)
    made = [(one.image, one.report) for batch in batches for one in batch]
    return [i for i, _ in made if i is not None], [report.score for _, report in made if report is not None]


def _side_by_side(settings: DemoSettings, prompts: Sequence[str], new: Sequence[str]) -> dict[str, Any]:
    """Train and sample every objective, each in a process of its own, and sample the base; return images, scores, images of new captions and
    summary by name.

    Two networks this small make better use of two cores than one network with two threads: 1.5 times the steps a second.
    """
    threads = max(1, (os.cpu_count() or 1) // len(settings.objectives))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(settings.objectives), mp_context=context) as pool:
        # The base is last in line: it begins, on the first line of the terminal, where a run has ended.
        jobs = {
            pool.submit(
                _train_and_sample, settings, name, list(prompts), list(new), place % len(settings.objectives), threads
            ): name
            for place, name in enumerate([*settings.objectives, ALONE])
        }
        try:
            return {jobs[job]: job.result() for job in as_completed(jobs)}
        except BaseException:
            # One has failed or a person has had enough: the other's minutes would be spent for nothing.
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _train_and_sample(
    settings: DemoSettings, name: str, prompts: list[str], new: list[str], place: int, threads: int
) -> tuple[list[Image.Image], list[float], list[Image.Image], dict[str, Any]]:
    """Train with an objective, or take the base as it is, and sample for trained captions and for new ones."""
    torch.set_num_threads(threads)
    quiet()
    folder, summary = (BASE, dict[str, Any]()) if name == ALONE else _trained(settings, name, place)
    images, scores = sample(folder, prompts, settings, title=f"sample {name:7}", position=place)
    others = dataclasses.replace(settings, seed=settings.seed + NEW_SEEDS)
    fresh, _ = sample(folder, new, others, title=f"new captions {name:7}", position=place, k=1)
    return images, scores, fresh, summary


def _trained(settings: DemoSettings, objective: str, place: int) -> tuple[Path, dict[str, Any]]:
    """Train with an objective; return the model's folder and what the page says of the training."""
    config = settings_of_run(settings, objective)
    bar = {"desc": f"train {objective:7}", "position": place}  # each process owns one line of the terminal
    record = train(config, bar=bar)
    write_run_card(record)
    return Path(config.output_dir), {
        "optimizer steps": record.steps, "training seconds": round(record.seconds), "loss, last 100 steps": f"{record.loss:.4f}",
        "learning rate": config.learning_rate, "batch": config.train_batch_size,
    }  # fmt: skip


def run_demo(settings: DemoSettings) -> Report:
    """Train, sample, measure, and write `report.html`, `figures.json` and the sample sheets into `settings.output_dir`.

    Raises:
        UserError: settings are out of range, or `settings.output_dir` holds a finished demo or something else.
    """
    from diffusers import AutoencoderKL

    begun = time.time()
    folder = OutputFolder(settings.output_dir, "demo", CONTENTS, overwrite=settings.overwrite, resumable=False)
    folder.check({})
    configs = {objective: settings_of_run(settings, objective) for objective in settings.objectives}
    # Both runs train on these images; they are decoded and checked here, before anything is removed or trained.
    plans = [plan_run(config) for config in configs.values()]
    training = plans[0].images
    folder.claim(
        {
            f.name: getattr(settings, f.name)
            for f in dataclasses.fields(settings)
            if f.name not in ("output_dir", "overwrite", "open")
        }
    )
    heldout = load_rows(STYLE, split="heldout", caption_column=plans[0].config.caption_column)
    training_images = [row.image for row in training]
    captions = [row.caption for row in training]
    features = choose(with_sscd("pixels", "edges", "efflite0"), device=own_device())
    step = "of 4"
    print(f"1 {step}: looking at {len(training)} training and {len(heldout)} held-out images", flush=True)
    real = embed(training_images, features, progress=True)
    heldout_images = [row.image for row in heldout]
    unseen = embed(heldout_images, features, progress=True)
    vae: Any = AutoencoderKL.from_pretrained(BASE / "vae").eval()
    vae.to(own_device())
    decide = CopyDecision.of(
        training_images, training.noise_keys, heldout=heldout_images, vae=vae, side=plans[0].config.resolution, progress=True
    )  # fmt: skip
    by_chance = decide.background(HELDOUT)

    assert decide.rendered is not None
    decoded = decide.rendered.permute(0, 2, 3, 1).flatten(1)  # as Pixels lays them out
    ceiling = memorized(nearest(decoded, real["pixels64"])).double().mean().item()
    deep = next(feature for feature in features if feature.name == "EffLite0")
    rendered = embed(through_vae(vae, plans[0].config.resolution)(heldout_images), [deep])
    prompts, new = captions[: settings.num_prompts or None], heldout.captions[: settings.num_prompts or None]
    groups = [i for i in range(len(prompts)) for _ in range(settings.num_images_per_prompt)]
    print(f"2 {step}: fine-tuning {' and '.join(configs)} side by side, then sampling both under the guard", flush=True)
    runs = _side_by_side(settings, prompts, new)
    print(f"3 {step}: measuring", flush=True)
    sections: list[RunSection] = []
    measured: dict[str, Measurement] = {}
    said_of = {**{objective: describe(config) for objective, config in configs.items()}, ALONE: "the base as it is, without training"}  # fmt: skip
    for objective, what in said_of.items():
        images, scores, fresh, summary = runs[objective]
        drawn, drawn_new = (embed(some, features, progress=True) for some in (images, fresh))
        on_new = drawn_new[deep.name]
        measured[objective] = measure(drawn, real, unseen, features, groups=groups, seed=settings.seed, quality=False)
        near = measured[objective].neighbours["pixels64"]
        asked = drawn, [prompts[i] for i in groups]
        sides = (real, captions), (unseen, heldout.captions)
        came_back = closest(asked, (drawn_new, new), *sides, seed=settings.seed)
        own = own_closest(asked, *sides, FEATURES[0]).tolist()
        decided = decide(images, memorized(near))
        copies = copy_rate(decided, by_chance, groups, seed=settings.seed)
        shown = range(0, len(images), settings.num_images_per_prompt)
        said = [f"{prompts[groups[i]]}\nscore {scores[i]:.3g}{', copy' if decided.copy[i] else ''}" for i in shown]
        contact_sheet([images[i] for i in shown], 10, said).save(settings.output_dir / f"{objective}.png")
        sections.append(
            RunSection(
                name=objective,
                objective=what,
                figures=[
                    *closest_rows(came_back),
                    copies,
                    *measured[objective].rows,
                    *distances(
                        on_new, unseen[deep.name], rendered[deep.name], name=deep.name, groups=new, seed=settings.seed
                    ),
                    _agreement(on_new, unseen[deep.name], new, heldout.captions, settings.seed),
                ],
                samples=_beside_own(
                    make_samples(
                        images,
                        asked[1],
                        training_images,
                        near,
                        scores=scores,
                        training_prompts=captions,
                        decided=decided,
                    ),
                    [training_images[i] for i in groups],
                    own,
                ),
                settings=summary,
            )
        )
    print(f"4 {step}: writing the page", flush=True)
    sheet = _sheet_of_new(heldout_images, new, {name: one[2] for name, one in runs.items()}, list(said_of))
    sheet.save(settings.output_dir / "new.png")
    report = Report(
        title=f"A small Stable Diffusion 2, fine-tuned on {len(training)} images of a new style",
        command="ambient-sd demo",
        runs=sections,
        training_n=len(training),
        copies=f"{OWN}-{FEATURES[0]}",
        beside="its training image",
        quality=next(row.name for row in sections[0].figures if row.name.startswith("FD-")),
        histograms=[_published(measured)],
        pictures=[
            pages.Picture(
                "Captions that were not trained",
                data_uri(sheet, 4000),
                f"The first ones, not selected. Above the real images, below them what {', '.join(configs)} and the base alone draw.",
            )
        ],
        floor="For distances held-out is the floor: the same real images as the autoencoder renders them.",
        next=after_demo(),
        made=_made(settings, begun, training.fingerprint()),
        notes=(
            decide.rule,
            *NOTES,
            f"The VAE alone, given the training images themselves, reaches a share with d1/d2 < 1/3 of {ceiling:.0%}: the "
            "ceiling of what any run could show here by that measure.",
        ),
    )
    write_report(settings.output_dir / "report.html", report)
    (settings.output_dir / "figures.json").write_text(json.dumps(_figures(report), indent=1) + "\n")
    folder.finish()
    return report


def _beside_own(samples: Sequence[Sample], originals: Sequence[Image.Image], own: Sequence[bool]) -> list[Sample]:
    """Put each sample beside the training image of its caption, and say whether that one is the closest of all real images."""
    return [
        dataclasses.replace(
            one, nearest_image=image, nearest_prompt=one.prompt, order=(one.order or 0.0) - hit,
            facts=("closest: its own" if hit else "closest: another", *one.facts),
        )
        for one, image, hit in zip(samples, originals, own, strict=True)
    ]  # fmt: skip


def _sheet_of_new(
    real: Sequence[Image.Image],
    captions: Sequence[str],
    drawn: dict[str, list[Image.Image]],
    names: Sequence[str],
) -> Image.Image:
    """Return the first new captions: a row of real images, then a row of each run."""
    n = min(_SHOWN, len(captions))
    tiles, said = [*real[:n]], [*captions[:n]]
    for name in names:
        tiles += drawn[name][:n]
        said += [name] * n
    return contact_sheet(tiles, n, said)


def _agreement(drawn: Tensor, real: Tensor, prompts: Sequence[str], captions: Sequence[str], seed: int) -> Row:
    """Return the share of samples whose caption's own real image is among the `NEAREST` nearest."""
    near = nearest(drawn, real, min(NEAREST, len(real))).index
    chance = min(1.0, NEAREST / len(real))
    return Row("agreement", bootstrap(
        agreeing(near, prompts, captions), torch.mean, name="agreement", groups=prompts, seed=seed, share=True,
        detail=f"more is better; by chance {chance:.1%}",
    ), None, None)  # fmt: skip


def _published(measured: dict[str, Measurement]) -> Histogram:
    """Return the histogram of d1 / d2 of every run and of the held-out images."""
    rows = [(name, f"run{i}", m.neighbours["pixels64"].ratio.tolist()) for i, (name, m) in enumerate(measured.items())]
    held = next(iter(measured.values())).heldout_neighbours["pixels64"].ratio.tolist()
    return ratio_histogram([*rows, ("held-out", "held", held)], "pixels64")


NOTES = (
    "Copies are counted on samples for the captions of the training images: the case in which copying is easiest.",
    "Distances and caption agreement are those of samples for captions that were not trained, against the real images of these captions. "
    "Caption agreement: the real image of a sample's caption is among its 10 nearest of them.",
    "Own training image closest: of all real images, trained and held out, the nearest to a sample is the training image of its caption. It sees "
    "blurred copies that the decision does not count, and decides the sentence. Beside it the same for captions that were not trained. What captions give "
    "without any training is the base's column.",
    "The held-out column shows real images of the same kind that no run has seen.",
    "The guard's score compares within one model, size and number of steps; no threshold has been calibrated here.",
    "One seed, one small model, small images: what it says of a large model is for a run of that model to show.",
)


def describe(config: TrainConfig) -> str:
    if config.objective == "distill":
        return (
            f"the base's own prediction as target above noise level {config.distill_level:g}; ordinary denoising below"
        )
    if config.objective == "ambient":
        return (
            f"ambient loss above s_n = {config.ambient_level:g}, weight a^{config.reweight}; ordinary denoising below"
        )
    return "ordinary denoising loss at all noise levels"


def table(report: Report) -> str:
    """Return the figures as plain text, a row a measure, a column a run, the held-out images last."""
    head = ["", *(run.name for run in report.runs), "held-out"]
    lines = [head]
    for row in report.runs[0].figures:
        cells = [_cell(run.row(row.name)) for run in report.runs]
        lines.append([row.name, *cells, "" if row.heldout is None else show(row.heldout)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def finding(report: Report) -> str:
    return find(report).sentence


def _cell(row: Row) -> str:
    low, high = (show(dataclasses.replace(row.generated, value=v)) for v in (row.generated.low, row.generated.high))
    return f"{show(row.generated)} [{low}, {high}]"


def _made(settings: DemoSettings, begun: float, fingerprint: str) -> dict[str, object]:
    return {
        **versions(),
        "threads": torch.get_num_threads(),
        "seed": settings.seed,
        "training images (sha256)": fingerprint,
        "samples": f"{settings.num_images_per_prompt} for each training caption, 1 for each new one, DPM-Solver++ {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}",
        "minutes in all": round((time.time() - begun) / 60, 1),
    }


def _figures(report: Report) -> dict[str, Any]:
    def row(r: Row) -> dict[str, Any]:
        parts = {"generated": r.generated, "heldout": r.heldout, "excess": r.excess, "background": r.background}
        return {name: figure.as_dict() for name, figure in parts.items() if figure is not None}

    return {
        "finding": find(report).sentence,
        "made": dict(report.made),
        "runs": {run.name: {r.name: row(r) for r in run.figures} for run in report.runs},
    }
