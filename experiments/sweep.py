"""Run a study: train every run up to each of its steps, measure there, keep what is done, on several processes.

OUT/study.yaml          the plan as it was read
OUT/runs/NAME/          one run: model/ (the trainer's own folder, at the last measured step), settings.json,
    step-000400/        figures.json (written last: the step is done), samples.png; of a study of a style samples-new.png too
OUT/base/step-000000/   the same of the base alone, of a study of a style
OUT/apart/NAME/         the same of recipes that are no settings of the trainer (`measure_apart`)
OUT/results.json        everything measured, for `experiments.results`, for `merge` and for other programs

A killed study goes on where it was: finished steps are kept, a training from its last checkpoint. Two commands on one OUT share
the work: a run belongs to the process that holds its lock. A study with more steps than before goes on as well, for each run keeps
its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ambient_sd.audit.decision import RULE
from ambient_sd.audit.features import embed
from ambient_sd.audit.shares import COPIES
from ambient_sd.commands.demo.work import NEW_SEEDS
from ambient_sd.data.conditions import split_condition
from ambient_sd.data.dataset_options import reading
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.reporting.sheets import contact_sheet
from ambient_sd.sampling import SamplingConfig, load_pipeline
from ambient_sd.training import run as train
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.plan import open_images, plan_run
from ambient_sd.utils.errors import UserError, exits_on_user_error, one_line
from ambient_sd.utils.files import atomic_write, json_safe
from ambient_sd.utils.hub_ids import resolve_model_id
from ambient_sd.utils.output_folder import OutputFolder
from ambient_sd.utils.quiet import quiet
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option
from experiments.fresh import fresh_base
from experiments.measures import (
    Reals,
    config_of,
    error_curves,
    in_turn,
    measure_samples,
    prompts_of,
    read_reals,
    sample,
)
from experiments.pages import COLUMNS, sample_page
from experiments.plan import Plan, Run, file_name, identity, parse_plan
from experiments.results import chart_file
from experiments.style import FIGURES, NEW, Classifier, measure_new, read_classifier

BASE = "base"  # folder of the base alone
APART = "apart"  # folder of recipes that are no settings of the trainer
_APART = "recipe of a study"


def sweep(plan: Plan, out: Path, *, workers: int = 1, only: Sequence[str] = ()) -> dict[str, Any]:
    """Do what is left of a study and return its results, and under `failed` which runs could not be finished, and why.

    Args:
        plan: the study.
        out: folder of the study.
        workers: runs that go on side by side, one thread each where there are several.
        only: labels of runs, or entries of the study's `runs` with all of their sweep; others are left for later. None: all.

    Raises:
        UserError: a run's settings or images are wrong, or `out` holds another study. Found before the first training.
    """
    chosen = plan.chosen(only)
    runs = [run for run in plan.runs if run.label in chosen]
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {out}", rule="it must be a folder")
    _check_folders(plan, out)
    todo = [run for run in runs if _steps_left(plan, run, out)]
    _check_reals(plan, todo)
    out.mkdir(parents=True, exist_ok=True)
    for run in todo:
        plan_run(_config(plan, run, out))
    for run in runs:
        _folder(run, out).claim(identity(plan, run))
    if plan.style is not None:
        _base_folder(out).claim(_base_identity(plan))
    atomic_write(out / "study.yaml", plan.text)
    threads = max(1, (torch.get_num_threads() if workers == 1 else (os.cpu_count() or 1) // workers))
    print(f"{plan.name}: {len(runs) - len(todo)} of {len(runs)} runs done", flush=True)
    failed: dict[str, str] = {}

    def finish(name: str, line: Callable[[], str]) -> None:
        try:
            print(line(), flush=True)
        except UserError as error:  # one run that went out of bounds must not cost a night's others
            failed[name] = str(error)
            print(f"{name} cannot be finished: {error}", flush=True)

    tasks: dict[str, Callable[[], str]] = {}
    if plan.style is not None and not _is_done(out / BASE, 0):
        tasks["the base"] = functools.partial(do_base, plan, out, threads)
    tasks |= {run.name: functools.partial(do_run, plan, run, out, threads, i % workers) for i, run in enumerate(todo)}
    if workers == 1:
        for name, task in tasks.items():
            finish(name, task)
    elif tasks:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(task): name for name, task in tasks.items()}
            try:
                for done in as_completed(waiting):
                    finish(waiting[done], done.result)
            except BaseException:
                for other in waiting:
                    other.cancel()
                raise
    return {**gather(plan, out), "failed": failed}


def do_run(plan: Plan, run: Run, out: Path, threads: int, position: int = 0) -> str:
    """Do what is left of one run; return a line that says what came out. A run that another process holds is left alone."""
    quiet()
    torch.set_num_threads(threads)
    folder = out / "runs" / run.folder
    with _locked(folder) as mine:
        if not mine:
            return f"{run.name}: another process is at it"
        reals: Reals | None = None
        for step in _steps_left(plan, run, out):
            config = _config(plan, run, out, step)
            begin = time.perf_counter()
            summary = train(config, bar={"desc": run.name, "position": position, "leave": False})
            write_run_card(summary)
            trained = time.perf_counter() - begin
            if reals is None:
                reals = open_reals(plan, config)
            base = str(config.pretrained_model_name_or_path)
            how = config_of(base, folder / "model", config.lora, plan.sampling, config.resolution, run.seed)
            _measure(plan, run.name, config, how, reals, step, folder, {
                "seconds_trained": round(trained, 1), "loss": summary.loss, "clean_loss": summary.means["clean_loss"],
                "ambient_loss": summary.means["ambient_loss"],
            })  # fmt: skip
        return _line(run.name, _read_step(plan, folder, plan.measure_at[-1]))


def do_base(plan: Plan, out: Path, threads: int) -> str:
    """Measure the base alone, by the images of the study's first run, with seed 0; return a line that says what came out."""
    quiet()
    torch.set_num_threads(threads)
    with _locked(out / BASE) as mine:
        if not mine:
            return "the base: another process is at it"
        config = _config(plan, plan.runs[0], out)
        base = str(config.pretrained_model_name_or_path)
        how = config_of(base, Path(base), False, plan.sampling, config.resolution, 0)
        _measure(plan, "the base", config, how, open_reals(plan, config), 0, out / BASE, {})
        return _line("the base", _read_step(plan, out / BASE, 0))


def _line(name: str, step: Mapping[str, Any]) -> str:
    figures = step["figures"]
    copies = f"copies {figures[COPIES]['value']:.1%} (d1/d2 {figures['copied']['value']:.1%})"
    return f"{name}: {copies}, distance {figures['distance']['value']:.1f}"


def _measure(
    plan: Plan,
    name: str,
    config: TrainConfig,
    how: SamplingConfig,
    reals: Reals,
    step: int,
    folder: Path,
    facts: Mapping[str, Any],
) -> None:
    begin = time.perf_counter()
    pipe = load_pipeline(how, safety_checker=False)
    prompts = prompts_of(reals, plan.sampling, how.seed)
    images = sample(pipe, prompts, how)
    drawn = embed(images, reals.features)
    figures, each = measure_samples(images, prompts, reals, how.seed, drawn=drawn)
    errors = error_curves(pipe, reals, plan.sampling, config.resolution, how.seed)
    into = folder / f"step-{step:06d}"
    into.mkdir(exist_ok=True)
    contact_sheet(images, COLUMNS).save(into / "samples.png")
    new: dict[str, Any] = {}
    if plan.style is not None:
        captions = in_turn(reals.heldout_captions, plan.style.images, how.seed)
        images = sample(pipe, captions, dataclasses.replace(how, seed=how.seed + NEW_SEEDS))
        contact_sheet(images, COLUMNS).save(into / f"samples{NEW}.png")
        more, new["new"] = measure_new(
            images, captions, reals, open_classifier(plan, config, reals), how.seed, trained=(drawn, prompts)
        )
        figures |= more  # quality is that on new captions
    record = {
        "step": step, **facts, "seconds_measured": round(time.perf_counter() - begin, 1),
        "figures": {name: figure.as_dict() for name, figure in figures.items()}, "errors": errors, "rule": RULE, **each, **new,
    }  # fmt: skip
    record = json_safe(record)
    try:
        _check_step(plan, record, least=min(step, 1))
    except (KeyError, TypeError):  # kept, it would read as a damaged file, and the whole study with it
        raise UserError(f"{name} has figures at step {step} that are no finite numbers", rule="its network has gone out of bounds",
                        remedy="lower its learning_rate") from None  # fmt: skip
    atomic_write(into / "figures.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def gather(plan: Plan, out: Path) -> dict[str, Any]:
    """Read what is measured so far, write OUT/results.json and return it; runs without a measured step are left out.

    Raises:
        UserError: a run in `out` has other settings than the plan's, or a file of its is damaged.
    """
    _check_folders(plan, out)
    runs = []
    for run in plan.runs:
        folder = out / "runs" / run.folder
        points = [_published(plan, folder, step) for step in plan.measure_at if _is_done(folder, step)]
        if points:
            runs.append({"label": run.label, "seed": run.seed, "differs": dict(run.differs), "points": points})
    apart = _apart(plan, out)
    base = {"base": _published(plan, out / BASE, 0)} if plan.style is not None and _is_done(out / BASE, 0) else {}
    results = {
        "study": plan.name, "plan": plan.text, "charts": dict(plan.charts), "runs": runs, **base, **apart,
        "missing": [run.name for run in plan.runs if _steps_left(plan, run, out)],
    }  # fmt: skip
    atomic_write(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def _apart(plan: Plan, out: Path) -> dict[str, Any]:
    """Return under `apart` the runs of recipes that are no settings of the trainer, as `runs` holds the others; nothing if there are none."""
    runs = []
    for folder in sorted((out / APART).glob("*")):
        OutputFolder(folder, _APART, ()).check(_base_identity(plan))
        steps = sorted(
            int(step.name.removeprefix("step-")) for step in folder.glob("step-*") if (step / "figures.json").exists()
        )
        if points := [_published(plan, folder, step) for step in steps]:
            runs.append({"label": points[0]["label"], "seed": points[0]["seed"], "differs": {}, "points": points})
    return {"apart": runs} if runs else {}


def measure_apart(
    plan: Plan, out: Path, label: str, seed: int, step: int, model: Path, settings: Mapping[str, Any], *, lora: bool
) -> str:
    """Measure a model that no run of a study of a style has left as its runs are measured, unless that is done; return a line about it.

    Args:
        label: its name in tables. step: optimizer steps behind it, of all its models together.
        model: pipeline folder, or with `lora` that of an adapter of the study's base.
        settings: what it was made with.

    Raises:
        UserError: the folder holds other settings, or a run of the study has this name.
    """
    if plan.style is None or label in plan.labels:
        raise UserError(f"study {plan.name}: {label}", rule="the study has a run of this name, or is of no style")
    config = _config(plan, dataclasses.replace(plan.runs[0], seed=seed), out)
    folder = out / APART / file_name(f"{label} seed={seed}")
    OutputFolder(folder, _APART, ()).claim(
        {**_base_identity(plan), "made with": json.loads(json.dumps(dict(settings)))}
    )
    if not _is_done(folder, step):
        how = config_of(str(config.pretrained_model_name_or_path), model, lora, plan.sampling, config.resolution, seed)
        _measure(plan, label, config, how, open_reals(plan, config), step, folder, {"label": label, "seed": seed})
    return _line(f"{label} seed={seed}", _read_step(plan, folder, step))


def _published(plan: Plan, folder: Path, step: int) -> dict[str, Any]:
    """Read a measured step without what it holds of each image, which a merged one has not."""
    return {
        k: v for k, v in _read_step(plan, folder, step).items() if k not in ("copies", "originals", "ratios", "new")
    }


def merge(plan: Plan, out: Path, path: Path) -> int:
    """Take in the steps of another folder's results.json, which then count as done here; return how many were new.

    So one study is shared by machines that share no disk, and a published one is gone on with. Figures come along, samples and models do not:
    a merged run that is made longer is trained from its beginning.

    Raises:
        UserError: `path` is no results.json, or of no run of this plan, or holds one with other settings; nothing is taken in then.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        theirs = {(run["label"], run["seed"]): run["points"] for run in given["runs"]}
        seeds = sorted({seed for _, seed in theirs})
        text = given["plan"]
        if not isinstance(text, str):
            raise TypeError("plan")
        base = given.get("base") if plan.style is not None else None
        for step in (step for points in theirs.values() for step in points):
            _check_step(plan, step)
        if base is not None:
            _check_step(plan, base, least=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be merged", rule=f"must be the results.json of a study ({type(error).__name__})"
        ) from None
    known = {(run.label, run.seed): identity(plan, run) for run in plan.runs}
    other = parse_plan(text, path, {"seeds": seeds}) if seeds else plan
    planned = {(run.label, run.seed): run for run in other.runs}
    if (strange := sorted(set(theirs) - set(planned))) or not set(theirs) & set(known):
        raise UserError(
            f"{path} cannot be merged",
            rule=f"its own plan has no run {one_line(strange[0][0], 60)!r}"
            if strange
            else "it holds no run of this study",
        )
    for key, run in planned.items():
        if key in theirs and key in known and identity(other, run) != known[key]:
            raise UserError(
                f"{path}: run {run.name!r} has other settings than this study's", rule="only equal runs can be merged"
            )
    for run in plan.runs:
        if (run.label, run.seed) in theirs:
            _folder(run, out).claim(identity(plan, run))
    if base is not None and not _is_done(out / BASE, 0):
        _base_folder(out).claim(_base_identity(plan))
        _take(base, out / BASE)
    taken = 0
    for run in plan.runs:
        for step in theirs.get((run.label, run.seed), []):
            if step["step"] not in plan.measure_at:
                continue
            folder = out / "runs" / run.folder
            if not _is_done(folder, step["step"]):
                _take(step, folder)
                taken += 1
    return taken


def _take(step: Mapping[str, Any], folder: Path) -> None:
    into = folder / f"step-{step['step']:06d}"
    into.mkdir(exist_ok=True)
    atomic_write(into / "figures.json", json.dumps(step, indent=1, allow_nan=False) + "\n")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _check_step(plan: Plan, step: Any, least: int = 1) -> None:
    """Raise one of the errors that reading a damaged file raises unless this is a measured step as `_measure` writes it."""
    if type(step["step"]) is not int or step["step"] < least:
        raise TypeError("step")
    for figure in step["figures"].values():
        if not all(
            isinstance(figure[key], (int, float)) and math.isfinite(figure[key])
            for key in ("value", "low", "high", "n")
        ):
            raise TypeError("figure")
    missing = {COPIES, "copied", "copied-coarsely", "ratio", "distance", "distance floor", "kid",
               *(FIGURES if plan.style is not None else ())} - set(step["figures"])  # fmt: skip
    curves = [step["errors"][name][key] for name in ("training", "heldout") for key in ("level", "mean")]
    if (
        missing
        or len({len(curve) for curve in curves}) != 1
        or not all(math.isfinite(v) for curve in curves for v in curve)
    ):
        raise TypeError("step")


def write_pages(plan: Plan, out: Path) -> list[Path]:
    """Write OUT/samples-CHART.png (samples.png where the plan names no charts), each run at the last step whose samples are here.

    Of a study of a style also samples-new-CHART.png, of captions that were not trained.
    """
    written = []
    for name, labels in (plan.charts or {"": plan.labels}).items():
        steps, run = _sampled(plan, out, labels)
        if run is None:
            continue
        config = _config(plan, run, out)
        training = open_images(config)
        path = out / chart_file("samples", name)
        sample_page(steps, training, config.resolution).save(path)
        written.append(path)
        if plan.style is not None:
            path = out / chart_file(f"samples{NEW}", name)
            sample_page(steps, open_rows(plan.heldout, "heldout", config), config.resolution, part=NEW).save(path)
            written.append(path)
    return written


def _sampled(plan: Plan, out: Path, labels: Sequence[str]) -> tuple[list[tuple[str, Path]], Run | None]:
    """Return the labels whose samples are here with the last such step, the base alone first, and the first run among them."""

    def here(step: Path) -> bool:
        # A merged step has figures of elsewhere, also where a cut measurement left its samples here.
        kept = (step / "samples.png").exists() and (step / "figures.json").exists()
        return kept and "copies" in _read_json(step / "figures.json")

    steps: dict[str, Path] = {}
    first: Run | None = None
    if plan.style is not None and here(alone := out / BASE / "step-000000"):
        steps[BASE] = alone
    for run in (r for label in labels for r in plan.runs if r.label == label):
        done = [s for step in plan.measure_at if here(s := out / "runs" / run.folder / f"step-{step:06d}")]
        if done and run.label not in steps:
            steps[run.label] = done[-1]
            first = first or run
    return list(steps.items()), first


def _config(plan: Plan, run: Run, out: Path, step: int | None = None) -> TrainConfig:
    """Return the settings of a run up to a step (its last, if not given)."""
    more: dict[str, Any] = {
        "max_train_steps": step or plan.measure_at[-1], "checkpointing_steps": plan.checkpointing_steps,
        "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest", "report_to": "none",
        "latent_cache_dir": str(out / "latents"),
    }  # fmt: skip
    config = run.config(out / "runs" / run.folder / "model", **more)
    if config.class_data_dir is not None and not Path(config.class_data_dir).is_dir():
        config.class_data_dir = str(out / f"{config.class_data_dir}-{run.seed}")
    if plan.from_scratch is not None:
        base = fresh_base(
            str(config.pretrained_model_name_or_path), plan.from_scratch, run.seed, out / f"base-{run.seed}"
        )
        config.pretrained_model_name_or_path = str(base)
    return config


_known: dict[tuple[object, ...], Reals] = {}


def open_reals(plan: Plan, config: TrainConfig) -> Reals:
    """Return the embedded real images of a run; the next run on the same ones in this process finds them embedded."""
    training, heldout = open_images(config), open_rows(plan.heldout, "heldout", config)
    base = resolve_model_id(str(config.pretrained_model_name_or_path))
    key = training.fingerprint(), heldout.fingerprint(), base, config.resolution
    if key not in _known:
        vae: Any = AutoencoderKL.from_pretrained(base, subfolder="vae").eval()
        _known.clear()
        _known[key] = read_reals(
            training, heldout, vae.to("cuda" if torch.cuda.is_available() else "cpu"), config.resolution
        )
    return _known[key]


def open_classifier(plan: Plan, config: TrainConfig, reals: Reals) -> Classifier:
    """Return what tells the study's style from others; it is trained once in a study."""
    assert plan.style is not None
    these, others = (open_rows(getattr(plan.style, side), f"style: {side}", config) for side in ("these", "others"))
    return read_classifier(these, others, plan.style.concept, reals.vae, reals.side, Path(str(config.latent_cache_dir)))


def open_rows(given: Mapping[str, Any], where: str, config: TrainConfig) -> ImageDataset:
    """Open images that a study names under `where`; what it does not say is as in a run's settings."""
    given = dict(given)
    source = given.pop("train_data_dir", None) or given.pop("dataset_name", None) or config.source
    terms = [split_condition(term) for term in given.pop("row_filter", [])]
    split = given.pop("dataset_split", None)
    if given:
        raise UserError(f"study: {where}: {sorted(given)[0]}", rule="entries are train_data_dir, dataset_name, dataset_split, row_filter")  # fmt: skip
    return load_rows(source, **{**reading(config), "split": split, "row_filter": terms})


def _check_folders(plan: Plan, out: Path) -> None:
    """Refuse runs of other settings that lie where the plan's would: their figures would pass for the plan's."""
    for run in plan.runs:
        if (folder := _folder(run, out)).claimed:
            folder.check(identity(plan, run))
    if plan.style is not None and _base_folder(out).claimed:
        _base_folder(out).check(_base_identity(plan))


def _base_folder(out: Path) -> OutputFolder:
    return OutputFolder(out / BASE, "base of a study", ())


def _base_identity(plan: Plan) -> dict[str, Any]:
    """Return what the figures of the base alone depend on."""
    config = plan.runs[0].config("study")
    given = identity(plan, plan.runs[0])
    return {
        "model": config.pretrained_model_name_or_path,
        "data": _data(config),
        **{k: given[k] for k in ("heldout", "sample", "style")},
    }


def _data(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that say what images a run is trained on."""
    names = [f.name for f in dataclasses.fields(config) if f.metadata.get("group") == "data"]
    return dict(json.loads(json.dumps({name: getattr(config, name) for name in names}, default=str)))


def _check_reals(plan: Plan, runs: Sequence[Run]) -> None:
    """Open the images that runs will be measured by, before anything is trained: a mistake here is found after hours otherwise."""
    seen: set[str] = set()
    for run in runs:
        config = run.config("study")
        data = json.dumps(_data(config))
        if data in seen:
            continue
        seen.add(data)
        training, heldout = open_images(config), open_rows(plan.heldout, "heldout", config)
        training.fingerprint(), heldout.fingerprint()  # fill in the keys, and find images that cannot be read
        if shared := len(set(training.keys) & set(heldout.keys)):
            raise UserError(f"study {plan.name}: heldout: {shared} of {len(heldout)} images are training images of {run.label!r}",
                            rule="held-out images are ones that no run has seen", remedy="give others, for example dataset_split: heldout")  # fmt: skip
        if plan.style is None:
            continue
        if shared := len(set(training.captions) & set(heldout.captions)):
            raise UserError(f"study {plan.name}: style: {shared} captions of held-out images are trained by {run.label!r}",
                            rule="a style is judged on captions that no run has seen", remedy="give other held-out images")  # fmt: skip
        for side in ("these", "others"):
            open_rows(getattr(plan.style, side), f"style: {side}", config).column(plan.style.concept)


def _folder(run: Run, out: Path) -> OutputFolder:
    """Return the folder of a run, which belongs to one identity."""
    return OutputFolder(out / "runs" / run.folder, "run of a study", ())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the run's lock while inside; yield False where another process holds it. The system drops it with the process."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _is_done(folder: Path, step: int) -> bool:
    return (folder / f"step-{step:06d}" / "figures.json").exists()


def _steps_left(plan: Plan, run: Run, out: Path) -> list[int]:
    return [step for step in plan.measure_at if not _is_done(out / "runs" / run.folder, step)]


def _read_step(plan: Plan, folder: Path, step: int) -> dict[str, Any]:
    path = folder / f"step-{step:06d}" / "figures.json"
    record = _read_json(path)
    try:
        _check_step(plan, record, least=min(step, 1))
    except (KeyError, TypeError, AttributeError):
        raise _damaged(path) from None
    return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged",
        rule="a study reads what it has measured",
        remedy=f"remove {path.parent}, which is then made again",
    )


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """Say which study is run, where its results go, and which part of it is done now.

    Raises:
        UserError: a value breaks its rule, or two contradict each other.
    """

    study: Path = option(REQUIRED, "YAML file of the study", positional=True, metavar="STUDY")
    output_dir: Path = option(REQUIRED, "folder for everything", alias="out")
    workers: int = option(1, "runs side by side; on a CPU one a core is fastest", low=1)
    only: list[str] = option(
        [], "runs to do now: labels, or entries of the study's runs with all of their sweep", metavar="RUN"
    )
    seeds: list[int] | None = option(None, "seeds in place of the file's")
    merge: list[Path] = option([], "results.json of the same study in other folders, of other machines or published: their steps count as done", metavar="RESULTS")  # fmt: skip
    results_only: bool = option(False, "train nothing; write results of what is measured")

    def __post_init__(self) -> None:
        check(self)
        if self.results_only and self.only:
            raise UserError("only with results_only", rule="it says what is trained", remedy="leave one of them out")
        if self.results_only and not self.merge and not (self.output_dir / "runs").is_dir():
            raise UserError(f"{self.output_dir} holds no runs", rule="results are written of what is measured",
                            remedy="name the study's folder with --output_dir")  # fmt: skip


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run a study from the command line."""
    parser = Parser(
        prog="python -m experiments.sweep",
        description="Train every run of a study (a YAML file such as those in configs/study/), measure copies, quality and "
        "errors at its steps, and write OUT/results.json, results.md and plots. Interrupted runs resume; two commands on one OUT "
        "share the work.",
    )
    add_flags(parser, SweepSettings)
    settings = from_flags(SweepSettings, parser.parse_args(argv))
    quiet()
    from experiments.plan import read_plan
    from experiments.results import write_results

    out = settings.output_dir
    plan = read_plan(settings.study, {} if settings.seeds is None else {"seeds": settings.seeds})
    plan.chosen(settings.only)  # a wrong name is found before anything is taken in
    for path in settings.merge:
        print(f"{path}: {merge(plan, out, path)} steps taken in", flush=True)
    results = (
        gather(plan, out) if settings.results_only else sweep(plan, out, workers=settings.workers, only=settings.only)
    )
    write_pages(plan, out)
    print(f"Look at it: {write_results(results, out)}", flush=True)
    if failed := results.get("failed"):
        name, why = next(iter(failed.items()))
        raise UserError(f"{len(failed)} runs could not be finished, {name} among them", rule=why,
                        remedy="the others are done: change the study's settings, or leave it")  # fmt: skip


if __name__ == "__main__":
    main()
