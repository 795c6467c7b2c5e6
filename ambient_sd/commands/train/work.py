"""What `ambient-sd train` and the training script do around a run: propose settings, launch, train, write card and curve, audit."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from tqdm.auto import tqdm

from ambient_sd.commands.train import TrainOptions, assumed, sketch
from ambient_sd.data.dataset_options import DatasetOptions
from ambient_sd.reporting.charts import write_training_curve
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.reporting.publishing import prepare, push
from ambient_sd.training import RunRecord, results, run, sharding
from ambient_sd.training.config import AUTO, TrainConfig
from ambient_sd.training.footprint import predict
from ambient_sd.training.plan import Plan, base_of, open_images, plan_run
from ambient_sd.training.probe import GUIDANCE_SCALE, INFERENCE_STEPS
from ambient_sd.training.processes import is_first
from ambient_sd.training.proposals import Proposal, propose
from ambient_sd.training.record import CURVE_NAME, describe_start
from ambient_sd.training.validation import images_at_once
from ambient_sd.utils.devices import fix_workspace
from ambient_sd.utils.memory import peak_memory

_LOOKED_AT = 256  # images whose sizes decide the resolution
_MEASURED = 3  # steps of a dry run
_LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "FORK_LAUNCHED")
_AUDITED = 128  # images that --audit samples


def train(options: TrainOptions, values: dict[str, Any], words: Sequence[str]) -> int:
    """Propose what is not given, say it, and train; return the exit status, which is the audit's where there is one.

    Raises:
        UserError: settings, images or base are unusable.
    """
    first, launched = is_first(), "WORLD_SIZE" in os.environ
    processes = options.num_processes or max(1, torch.cuda.device_count())
    if launched:
        processes = int(os.environ["WORLD_SIZE"])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ambient_sd").setLevel(logging.INFO)
    config, proposed = complete(values, processes=processes, progress=first)
    if not config.overwrite and config.resume_from_checkpoint is None:
        results.check_finished(Path(config.output_dir))
        config.resume_from_checkpoint = "latest"
    if first and (launched or processes == 1 or options.dry_run):
        for one in proposed:
            print(f"  {one}", flush=True)
    if options.dry_run:
        print(describe_plan(config, processes), flush=True)
        return 0
    if processes > 1 and not launched:
        launch(processes, words)
    record = fit(config)
    if not (first and options.audit):
        return 0
    return audit(record, config)


def complete(
    values: Mapping[str, Any], *, processes: int = 1, progress: bool = False
) -> tuple[TrainConfig, list[Proposal]]:
    """Return the settings of a run, with what is not given proposed from its images and base."""
    wanted = sketch(values)
    if wanted.deterministic:
        fix_workspace()  # what is proposed depends on the GPU, and asking it starts CUDA
    base, images = base_of(wanted), open_images(wanted)
    rows = range(0, len(images), max(1, len(images) // _LOOKED_AT))
    seen = [images[i] for i in tqdm(rows, desc="looking at images", disable=not progress, leave=False)]
    network = base.skeleton()[base.family.network]

    def memory(more: Mapping[str, Any]) -> int:
        config = TrainConfig(**{**assumed(values), **values, **more})
        return predict(config, base, (config.resolution,) * 2).peak

    proposed = propose(
        values, sizes=[row.image.size for row in seen], count=len(images), distinct=len({row.key for row in seen}),
        native=base.family.native_side(base.network_config, base.vae_config), step=base.pixel_step,
        parameters=sum(p.numel() for p in network.parameters()), device=device(), processes=processes,
        spread=sharding.is_asked(), keep=values.get("keep") or "best",
        objective=wanted.objective, lora=values.get("lora"), steps=wanted.max_train_steps,
        batch=wanted.train_batch_size * wanted.gradient_accumulation_steps if "train_batch_size" in values else None,
        memory=memory, room=torch.cuda.mem_get_info()[1] if device().type == "cuda" else 0,
    )  # fmt: skip
    config = TrainConfig(**values, **{one.name: one.value for one in proposed})
    config.resolution_given = True
    return config, proposed


def device() -> torch.device:
    """Return what a training on this machine runs on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def launch(processes: int, words: Sequence[str]) -> NoReturn:
    """Replace this process by `accelerate launch` of the same command on several devices."""
    where = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    command = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "-m",
        "ambient_sd.cli",
        *words,
    ]
    print(f"  accelerate launch on {processes} devices", flush=True)
    os.execve(sys.executable, [sys.executable, "-m", *command], {**os.environ, **where})


def fit(config: TrainConfig) -> RunRecord:
    """Train; then, on the first process, say what came of it, write curve and card, and push where asked."""
    repo = str(config.hub_model_id)
    access: dict[str, Any] = {"token": config.hub_token, "private": config.hub_private_repo or None}

    def ask_hub(_: Plan) -> None:
        if config.push_to_hub:
            prepare(repo, **access)

    # Token and repository are checked before hours of training.
    record = run(config, on_planned=ask_hub)
    if is_first():
        print(record.describe(), flush=True)
        if record.kept is not None:
            write_training_curve(record.output / CURVE_NAME, record.evaluations, record.kept)
        write_run_card(record)
        if config.push_to_hub:
            push(record.output, repo, **access)
    return record


def audit(record: RunRecord, config: TrainConfig) -> int:
    """Audit the result with the training's own base, resolution and captions, and make the card anew; return the status."""
    folder = record.output / "audit"
    prompts = min(_AUDITED // 2, len(set(record.plan.images.captions)))
    options = [
        "--output_dir", str(folder), "--overwrite", "--resolution", str(config.resolution), "--num_prompts", str(prompts),
        "--num_images_per_prompt", str(max(1, _AUDITED // prompts)), "--num_inference_steps", str(INFERENCE_STEPS),
        "--guidance_scale", f"{GUIDANCE_SCALE:g}", *([] if record.plan.base.family.flow else ["--scheduler", "dpm++"]), "--seed", str(config.seed), "--base_images", str(_AUDITED // 2), "--batch_size", str(images_at_once(config.resolution)),
    ]  # fmt: skip
    # A LoRA alone is a model to the audit: base, revision and variant come from its train_config.yaml.
    for item in dataclasses.fields(DatasetOptions):
        value = getattr(config, item.name)
        if value is True:
            options.append(f"--{item.name}")
        elif value != item.default:
            options += [f"--{item.name}", *([str(one) for one in value] if isinstance(value, list) else [str(value)])]
    words = ["audit", str(record.output), config.source, *options]
    print(f"ambient-sd {shlex.join(words)}", flush=True)
    if "WORLD_SIZE" in os.environ:  # the other processes of the launch are gone, and the audit would wait for them
        alone = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "TORCHELASTIC_", "GROUP_")) and k not in _LAUNCHED}  # fmt: skip
        status = subprocess.run([sys.executable, "-m", "ambient_sd.cli", *words], env=alone, check=False).returncode
    else:
        command = importlib.import_module("ambient_sd.commands.audit")
        status = int(command.run(command.make_parser().parse_args(words[1:]), words) or 0)
    write_run_card(record)  # now with what was measured
    return status


def describe_plan(config: TrainConfig, processes: int) -> str:
    """Return what a run would do, with time and memory of a few of its steps on this machine."""
    plan = plan_run(config, progress=True)
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    steps = plan.steps(batch)
    measured = _measure(config, plan)
    looks = 0 if config.probe_steps is None else steps // config.probe_steps + (2 if config.keep == "best" else 1)
    each = (config.probe_images or 0) + len(plan.new_captions)
    # A pass without gradient is about a third of a step's work, and guidance makes two of each sampler step.
    looking = looks * each * INFERENCE_STEPS * 2 * measured.seconds / config.train_batch_size / 3
    shapes = Counter((config.resolution,) * 2 if plan.buckets is None else plan.buckets[k] for k in plan.images.noise_keys)  # fmt: skip
    # In the precision that would be proposed on a GPU if none is given; what is trained is float32 in each.
    precision = config.mixed_precision or "bf16"
    predicted = predict(config, plan.base, max(shapes, key=math.prod), precision=precision)
    written = ["pytorch_lora_weights.safetensors" if config.lora else "the pipeline", "train_config.yaml", "README.md, card.json", "losses.jsonl"]  # fmt: skip
    written += ["probe/ (sheets of sampled images, curve.png), probe.jsonl"] if looks else []
    written += ["validation/"] if plan.prompts else []
    rows = {
        "buckets": ", ".join(f"{w} x {h} px: {n}" for (w, h), n in shapes.most_common(6))
        + (f" and {len(shapes) - 6} more" if len(shapes) > 6 else ""),
        "time": f"about {_minutes(steps * measured.seconds)} of training ({measured.seconds:.2g} s a step, measured on {_MEASURED} steps here)"
        + (f" and {_minutes(looking)} of {looks} evaluations" if looks else ""),
        "memory": "not measured on this system" if measured.peak is None else f"about {measured.peak:,.0f} MiB at the highest of {_MEASURED} steps, measured here",
        "on a GPU": f"about {predicted.describe()} in {'float32' if precision == 'no' else precision}, predicted; driver and workspaces come on top",
        "writes": f"{config.output_dir}: {'; '.join(written)}; checkpoints of {predicted.checkpoint / 2**20:,.0f} MiB",
    }  # fmt: skip
    start = describe_start(plan, steps=steps, first_step=0, global_batch=batch, processes=processes, trained=predicted.trained,
                           device=str(device()), precision=config.mixed_precision or "no")  # fmt: skip
    lines = [*plan.notes, *(line for line in start.splitlines() if not line.startswith("output"))]
    return "\n".join([*lines, *(f"{name:<10} {text}" for name, text in rows.items()), "nothing was trained or written (--dry_run)"])  # fmt: skip


class _Measured(NamedTuple):
    seconds: float
    peak: float | None


def _measure(config: TrainConfig, plan: Plan) -> _Measured:
    """Make a few real steps aside, and return what they took."""
    at: list[float] = []
    few = min(len(plan.images), max(16, config.train_batch_size))
    # distill_without: the few images need not have its words.
    off = dict.fromkeys(("probe_steps", "probe_images", "probe_prompts", "stop_on_memorization", "validation_prompts", "num_validation_images",
                         "validation_epochs", "validation_steps", "resume_from_checkpoint", "hub_model_id", "latent_cache_dir",
                         "distill_without"))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        aside: dict[str, Any] = {
            **off, "keep": "last", "push_to_hub": False, "overwrite": False, "report_to": "none", "output_dir": f"{folder}/run",
            "checkpointing_steps": 10**9, "max_train_steps": _MEASURED + 1, "max_train_samples": few,
        }  # fmt: skip
        if config.ambient_level == AUTO:
            aside["ambient_level"] = 1.0
        # What the base would draw is drawn aside, and only a few.
        if config.with_prior_preservation and plan.prior is None:
            aside |= {"class_data_dir": f"{folder}/class", "num_class_images": min(config.num_class_images or 4, 4)}
        with _silent(), peak_memory(device()) as peak:  # the plan's notes are printed with the plan
            run(dataclasses.replace(config, **aside), progress=False, on_step=lambda *_: at.append(time.perf_counter()))
    return _Measured((at[-1] - at[0]) / (len(at) - 1), peak.mb)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    logger = logging.getLogger("ambient_sd")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"  # fmt: skip
