"""Every detector and every mitigation on one model whose memorized prompts are known by measurement, side by side.

1. Every caption of the training images is sampled without mitigation, `num_images_per_prompt` times. A prompt is *memorized* if at least
   half of its images are copies (`audit.decision`, held-out images as the null), *ordinary* if none is. Detectors are tried on
   those of the ordinary ones whose images all keep clear of copying (p >= 5 %: no nearer than one in twenty of the held-out ones): a
   half copy is no false alarm. The rest is counted and left out of their table. No list of duplicates is consulted: ground truth is what came out.
2. Detectors score the same runs: Wen et al. over 1, 5 and all steps, 1 and all generations; anisotropy; Wen's norm beside that of
   the judge, a model that has not seen the images (`guard.relative`).
3. Mitigations sample the memorized prompts again from the same start noise. Settings that are per model (targets, caps,
   thresholds) come from the ordinary prompts' scores, by the rule written beside each.
4. Beside each: share of copies, and that with d1 / d2 < 1/3; similarity to the nearest training image, alignment with the prompt (`audit.alignment`, judged by a
   model that has not seen the images), Frechet distance to held-out images, processor time, memory (`memory`: on a GPU the
   allocator's peak, weights included; on Linux's CPU what a call adds to the resident size at its highest; elsewhere none).

Several models are held side by side on the memorized prompts of the first. Interrupted runs resume.
Above the wings: it uses guard, audit and data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ambient_sd.audit.alignment import DiffusionAlignment
from ambient_sd.audit.decision import RULE, CopyDecision, Decided
from ambient_sd.audit.detection import detection_figures
from ambient_sd.audit.features import Features, embed
from ambient_sd.audit.metrics import FEWEST_MEASURED, MEMORIZED_RATIO, bootstrap, memorized, quality_rows
from ambient_sd.audit.neighbours import Neighbours, nearest
from ambient_sd.audit.registry import choose, with_sscd
from ambient_sd.audit.shares import COPIES, copy_rate
from ambient_sd.commands.compare import CompareSettings
from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import drawn
from ambient_sd.guard import by_name, policies
from ambient_sd.guard.anisotropy import anisotropy, fitted
from ambient_sd.guard.calibration import ModelFingerprint
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.guard.relative import Relation
from ambient_sd.reporting import compare_page
from ambient_sd.reporting.sheets import contact_sheet, png_bytes
from ambient_sd.sampling import (
    Request,
    Sampled,
    SamplingConfig,
    generate,
    in_batches,
    load_pipeline,
    processes,
    requests_for,
)
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.memory import peak_memory
from ambient_sd.utils.output_folder import FILE, OutputFolder

EARLY = 5  # steps of the early detectors
CLEAR = 0.05  # least p of images that keep clear of copying


@dataclass(frozen=True)
class OrdinaryScores:
    """Hold what the scores of the ordinary prompts say about a model: the scale of every setting that is per model.

    Attributes:
        first_step: median of the first step's norm.
        first_step_high: its 99th percentile.
        all_steps_high: 95th percentile of the norm over all steps.
        guidance_scale: of the sampling.
    """

    first_step: float
    first_step_high: float
    all_steps_high: float
    guidance_scale: float


# Name -> (how it is made from the ordinary prompts' scores, the rule for what is per model).
Mitigation = tuple[Callable[[OrdinaryScores], policies.Policy | None], str]
MITIGATIONS: dict[str, Mitigation] = {
    "none": (lambda v: None, ""),
    "Wen": (lambda v: policies.PromptOptimization(target=v.first_step), "target: median first norm of ordinary prompts"),
    "STP": (lambda v: policies.StaticTransition(), "as published, until 500"),
    "STP until 400": (lambda v: policies.StaticTransition(until=400), "later than published"),
    "STP until 300": (lambda v: policies.StaticTransition(until=300), "later than published"),
    "DTP": (lambda v: policies.DynamicTransition(), "as published, of the raw outputs"),
    "OG": (lambda v: policies.OppositeGuidance(), "as published for SD2.1, -2 until 650"),
    "OG+STP": (lambda v: policies.Compose(policies.OppositeGuidance(), policies.StaticTransition()), "as published"),
    "cap": (lambda v: policies.ScaleCap(cap=v.all_steps_high), "cap: 95th percentile of ordinary norms"),
    "G_spe": (lambda v: policies.Despecification(strength=v.guidance_scale / (2 * v.all_steps_high), threshold=v.all_steps_high),
              "threshold: 95th percentile of ordinary norms; half the scale is lost at it"),
    "PRSS": (lambda v: policies.Reanchoring(threshold=v.first_step_high), "threshold: 99th percentile of ordinary first norms; steps from 3 to 5 times it, as published"),
    "GUARD": (lambda v: policies.AttentionGuard(), "as published"),
    "Han": (lambda v: policies.LatentOptimization(target=v.first_step, max_steps=10), "target and most steps as Wen's"),
    "SAIL": (lambda v: policies.SAIL(target=v.first_step**2 / 10), "target: a tenth of the squared median first norm"),
    "Ren": (lambda v: policies.AttentionRescaling(), "as published"),
    "RT": (lambda v: policies.RandomTokens(), "as published, 2 to 4 tokens"),
    "RT+STP": (lambda v: policies.Compose(policies.RandomTokens(), policies.StaticTransition()), "each as published"),
    "CWR": (lambda v: policies.CaptionWordRepetition(), "as published, 2 to 4 words"),
    "RNA": (lambda v: policies.RandomNumbers(), "as published, 2 to 4 numbers"),
    "GNI": (lambda v: policies.GaussianEmbeddingNoise(), "as published, std 0.1 on both halves"),
}  # fmt: skip


def chosen_mitigations(names: Sequence[str]) -> dict[str, Mitigation]:
    """Return the mitigations called `names` (all if there are none), those of the table with its settings, and none at all first.

    A name is one of the table, in short or long (`guard.by_name`); any other policy is taken with the settings that are given.

    Raises:
        UserError: there is no such policy.
    """
    if not names:
        return MITIGATIONS

    def spelled(name: str) -> str:
        return by_name.canonical(name.replace(" until ", ":until="))

    known = {spelled(name): name for name in MITIGATIONS}
    asked = [known.get(spelled(name), name) for name in names]
    own = {name: _as_given(name) for name in asked if name not in MITIGATIONS}
    return {name: made for name, made in MITIGATIONS.items() if name in asked or name == "none"} | own


def _as_given(name: str) -> Mitigation:
    by_name.make(name)  # a mistake ends it here
    return lambda scores: by_name.make(name), "as given"


@dataclass
class Samples:
    """Hold images of one model under one mitigation, prompt by prompt, and a record of each (curve, seconds, iterations)."""

    images: list[Image.Image]
    records: list[dict[str, Any]]

    def column(self, name: str) -> list[Any]:
        return [record[name] for record in self.records]


def sample_requests(
    pipe: Any,
    folder: Path,
    requests: Sequence[Request],
    config: SamplingConfig,
    policy: policies.Policy | None,
    title: str,
) -> Samples:
    """Sample images into `folder`; what is there already is kept.

    Every mitigation and every model starts from the same noise: an image's seed hangs on the place of its prompt among all captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [requests[i : i + config.batch_size] for i in range(0, len(requests), config.batch_size)]
    missing = [number for number in range(len(chunks)) if not (folder / f"{number:05d}.json").exists()]
    wanted = [request for number in missing for request in chunks[number]]
    batches = generate(pipe, wanted, config, guard=MemorizationGuard(pipe, policy), bar={"desc": title, "leave": False})
    for number, (batch, cost) in zip(missing, _with_cost(batches, pipe.device), strict=True):
        _keep(folder, number, batch, cost)
    images: list[Image.Image] = []
    records: list[dict[str, Any]] = []
    for number, chunk in enumerate(chunks):
        rows = _read_kept(folder / f"{number:05d}.json")
        if [row["prompt"] for row in rows] != [request.prompt for request in chunk]:
            raise UserError(f"{folder} holds images of other prompts", rule="a comparison goes on with what it began",
                            remedy="give another --output_dir, or remove the folder")  # fmt: skip
        sheet = np.asarray(Image.open(folder / f"{number:05d}.png"))
        side = sheet.shape[1] // len(rows)
        images += [Image.fromarray(sheet[:, i * side : (i + 1) * side]) for i in range(len(rows))]
        records += rows
    return Samples(images, records)


def _with_cost(
    batches: Iterator[list[Sampled]], device: torch.device
) -> Iterator[tuple[list[Sampled], dict[str, float | None]]]:
    """Yield each batch with what it took: seconds and processor seconds per image, and the highest memory."""
    while True:
        with peak_memory(device) as peak:
            clock, busy = time.perf_counter(), time.process_time()
            batch = next(batches, None)
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock, busy = time.perf_counter() - clock, time.process_time() - busy
        if batch is None:
            return
        n = len(batch)
        yield batch, {"seconds": clock / n, "processor_seconds": busy / n, "memory_mb": peak.mb}


def _keep(folder: Path, number: int, batch: Sequence[Sampled], cost: Mapping[str, Any]) -> None:
    """Write one call's images side by side into one PNG; the JSON beside it says that they are whole."""
    names = ("curve", "timesteps", "iterations", "mitigated")
    rows = [{"prompt": one.request.prompt, **{n: getattr(one.report, n) for n in names}, **cost} for one in batch]
    images = [np.asarray(one.image.convert("RGB")) for one in batch if one.image is not None]
    atomic_write(folder / f"{number:05d}.png", png_bytes(Image.fromarray(np.concatenate(images, axis=1))))
    atomic_write(folder / f"{number:05d}.json", json.dumps(rows))


# --- truth and detectors ---------------------------------------------------------------------------------------------


@dataclass
class Reals:
    """Hold the training and held-out images as features, one row an image that differs, and the captions."""

    training: Mapping[str, torch.Tensor]
    heldout: Mapping[str, torch.Tensor]
    images: list[Image.Image]
    captions: list[str]
    features: list[Features]
    decision: CopyDecision

    @property
    def similar(self) -> Features:
        """The feature for similarities: SSCD where it is, else the one whose cosine stands in for it."""
        return next((f for f in self.features if f.distance == "cosine"), self.features[-1])


def read_reals(training: ImageDataset, heldout: ImageDataset, vae: Any = None, side: int = 0) -> Reals:
    """Embed both sets; of equal images one, so that the second nearest is another image. `vae` and `side`: as in `CopyDecision.of`."""
    training.fingerprint()  # fills in the keys that tell equal images, if nothing has
    once = training.one_of_each()
    features = choose(with_sscd("pixels", "efflite0"), device="cpu" if vae is None else vae.device)
    images = [training[i].image for i in once]
    real = embed(images, features, progress=True)
    others = [row.image for row in heldout]
    unseen = embed(others, features, progress=True)
    labels = [training.noise_keys[i] for i in once]
    decision = CopyDecision.of(images, labels, heldout=others, vae=vae, side=side, progress=True)
    return Reals(real, unseen, images, [training.captions[i] for i in once], features, decision)


def truth(copied: torch.Tensor, generations: int) -> tuple[list[int], list[int]]:
    """Return places of the memorized prompts (at least half of their images are copies) and the ordinary ones (none).

    Args:
        copied: `(prompts * generations,)` bool, prompt by prompt.
    """
    share = copied.double().view(-1, generations).mean(1)
    return torch.nonzero(share >= 0.5).flatten().tolist(), torch.nonzero(share == 0).flatten().tolist()


def clear_of_copying(values: torch.Tensor, generations: int, ordinary: Sequence[int], bound: float) -> list[int]:
    """Return those of the ordinary prompts whose images all have values (p, or d1 / d2) >= `bound`; `values` is prompt by prompt."""
    least = values.view(-1, generations).amin(1)
    return [i for i in ordinary if float(least[i]) >= bound]


def decide(images: Sequence[Image.Image], reals: Reals) -> tuple[Decided, Neighbours]:
    """Return which images are copies, and their nearest training images in pixels, for the published measure."""
    near = nearest(reals.features[0](images), reals.training["pixels64"])
    return reals.decision(images, memorized(near)), near


def detector_figures(
    curves: torch.Tensor, generations: int, memorized_prompts: Sequence[int], ordinary: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """Score prompts by the mean norm over the first steps and generations; return AUC and TPR@1%FPR of each detector.

    Args:
        curves: `(prompts, generations, steps)`.
    """
    rows = []
    steps = curves.shape[2]
    for n in sorted({1, generations}):
        for k in sorted({1, min(EARLY, steps), steps}):
            scores = curves[:, :n, :k].mean((1, 2))
            figures = detection_figures(scores[list(memorized_prompts)], scores[list(ordinary)], seed=seed)
            rows.append({"detector": "norm", "steps": k, "generations": n, "figures": [f.as_dict() for f in figures]})
    return rows


def _of_each_image(
    pipe: Any,
    path: Path,
    requests: Sequence[Request],
    config: SamplingConfig,
    ask: Callable[[list[str], dict[str, Any]], list[list[float]]],
) -> torch.Tensor:
    """Return what `ask` says of each image, from the noise that it was sampled from, `(images, numbers)`; kept in a file."""
    if not path.exists():
        batches = in_batches(pipe, requests, config, lambda batch, options: ask([r.prompt for r in batch], options))
        atomic_write(path, json.dumps([row for batch in batches for row in batch]))
    return torch.tensor(_read_kept(path), dtype=torch.float64).view(len(requests), -1)


def anisotropy_terms(pipe: Any, path: Path, requests: Sequence[Request], config: SamplingConfig) -> torch.Tensor:
    """Return norm and alignment of each image, `(images, 2)`; kept in a file."""

    def ask(prompts: list[str], options: dict[str, Any]) -> list[list[float]]:
        return [[found.norm, found.alignment] for found in anisotropy(pipe, prompts, **options)]

    return _of_each_image(pipe, path, requests, config, ask)


def anisotropy_figures(
    terms: torch.Tensor, generations: int, memorized_prompts: Sequence[int], ordinary: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """Score prompts by norm + alignment, each over its spread on the ordinary prompts: published weights are of other models."""
    rows = []
    fit = fitted(terms[list(ordinary)])  # at which timestep the alignment was taken makes no difference to it
    weights = torch.tensor([fit.norm_weight, fit.alignment_weight], dtype=torch.float64)
    for n in sorted({1, generations}):
        both = (terms[:, :n] * weights).mean(1)
        for name, scores in (("anisotropy", both.sum(1)), ("anisotropy, alignment alone", both[:, 1])):
            figures = detection_figures(scores[list(memorized_prompts)], scores[list(ordinary)], seed=seed)
            rows.append({"detector": name, "steps": 0, "generations": n, "figures": [f.as_dict() for f in figures]})
    return rows


def base_norms(pipe: Any, path: Path, requests: Sequence[Request], config: SamplingConfig) -> torch.Tensor:
    """Return the norms of a model that has not seen the images, `(images, EARLY)`, from the same noise; kept in a file."""
    guard = MemorizationGuard(pipe, stop_after=min(EARLY, config.num_inference_steps))

    def ask(prompts: list[str], options: dict[str, Any]) -> list[list[float]]:
        return [report.curve for report in guard.decide(prompts, **options)]

    return _of_each_image(pipe, path, requests, config, ask)


def relative_figures(
    curves: torch.Tensor,
    base: torch.Tensor,
    generations: int,
    memorized_prompts: Sequence[int],
    ordinary: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:
    """Score prompts by what the base's norms do not explain of theirs (`guard.relative`), fitted on the ordinary ones.

    Args:
        curves: `(prompts, generations, steps)`. base: `(prompts, generations, EARLY)`.
    """
    rows = []
    for n in sorted({1, generations}):
        for k in sorted({1, base.shape[2]}):
            norms, before = (c[:, :n, :k].mean((1, 2)) for c in (curves, base))
            scores = Relation.fit(norms[list(ordinary)], before[list(ordinary)]).score(norms, before)
            figures = detection_figures(scores[list(memorized_prompts)], scores[list(ordinary)], seed=seed)
            rows.append(
                {
                    "detector": "norm beside the base's",
                    "steps": k,
                    "generations": n,
                    "figures": [f.as_dict() for f in figures],
                }
            )
    return rows


def ordinary_scores(curves: torch.Tensor, ordinary: Sequence[int], guidance_scale: float) -> OrdinaryScores:
    """Return what the ordinary prompts' norms are like. `curves` as in `detector_figures`."""
    chosen = curves[list(ordinary)].double()
    first = chosen[:, :, 0].flatten()
    high = torch.quantile(first, 0.99)
    # torch.quantile stops at 2**24 values, numpy does not.
    return OrdinaryScores(float(first.median()), float(high), float(np.quantile(chosen.numpy(), 0.95)), guidance_scale)


def peak_of(samples: Samples) -> float | None:
    """Return the peak of the median call, MiB; None if it was not measured at every call.

    The median, because the first call of a process pays for what libraries set up once, whichever mitigation it is of.
    """
    measured = [record["memory_mb"] for record in samples.records if record.get("memory_mb") is not None]
    return float(np.median(measured)) if measured and len(measured) == len(samples.records) else None


# --- mitigations -----------------------------------------------------------------------------------------------------


def mitigation_figures(
    samples: Samples,
    reals: Reals,
    prompts: Sequence[str],
    captions: Sequence[str],
    judge: DiffusionAlignment,
    settings: CompareSettings,
) -> dict[str, Estimate]:
    """Measure one model under one mitigation; intervals resample prompts."""
    groups = [c for c in prompts for _ in range(settings.num_images_per_prompt)]
    made = embed(samples.images, reals.features)
    decided, near = decide(samples.images, reals)
    similar = reals.similar
    close = nearest(made[similar.name], reals.training[similar.name], distance="cosine").similarity
    aligned = judge(samples.images, groups, captions)
    options: dict[str, Any] = {"groups": groups, "seed": settings.seed}
    quality = quality_rows(
        made["EffLite0"], reals.heldout["EffLite0"], name="EffLite0", groups=groups, seed=settings.seed
    )
    seconds = torch.tensor(samples.column("processor_seconds"), dtype=torch.float64)
    return {
        COPIES: copy_rate(decided, None, **options).generated,
        "copied": bootstrap(memorized(near), torch.mean, name="d1/d2 < 1/3", share=True, **options),
        "similarity": bootstrap(close, lambda v: torch.quantile(v, 0.95), name=f"{similar.name} 95th percentile", **options),
        "alignment": bootstrap(aligned.value * 1000, torch.mean, name="alignment x 1000", **options),
        "hits": bootstrap(aligned.hit, torch.mean, name=f"own prompt first of {judge.others + 1}", share=True, **options),
        "distance": quality[0].generated,
        "seconds": bootstrap(seconds, torch.mean, name="processor seconds per image", **options),
    }  # fmt: skip


def compare(
    settings: CompareSettings, training: ImageDataset, heldout: ImageDataset, command: str = ""
) -> dict[str, Any]:
    """Run the comparison and write `comparison.json`, `comparison.html` and `comparison.md` into `settings.output_dir`.

    Raises:
        UserError: a mitigation's name is unknown, the folder holds another comparison, or nothing is memorized.
    """
    tried = chosen_mitigations(settings.mitigations)
    if processes().num_processes > 1:
        raise UserError(
            "compare on several processes",
            rule="it measures what each image costs",
            remedy="start it without accelerate launch",
        )
    if len(heldout) < 2 * FEWEST_MEASURED:
        raise UserError(f"there are {len(heldout)} held-out images", rule=f"quality is measured against {2 * FEWEST_MEASURED} at least",
                        remedy="give more with --heldout")  # fmt: skip
    configs = {name: config_of(settings, place, name) for name, place in settings.models.items()}
    judging = config_of(settings, settings.judge)
    for config in (*configs.values(), judging):  # the last one is loaded an hour after the first
        source = config.source()
        if config is judging and source.family.guarded is None:
            raise UserError(f"judge is {source.label}, of {source.family.name}", rule="how well images show their prompts is measured with Stable Diffusion 1 or 2",
                            remedy="give such a model that has not seen the images")  # fmt: skip
        config.check()
    for name in ("variant", "single_file_config"):
        if getattr(settings, name) is not None and all(getattr(c, name) is None for c in (*configs.values(), judging)):
            raise UserError(f"{name} is {getattr(settings, name)!r}", rule="no model and no judge takes it", remedy="leave it out")  # fmt: skip
    out = _claim(settings, training, heldout)
    judge_pipe = load_pipeline(judging, safety_checker=False)
    reals = read_reals(training, heldout, judge_pipe.vae, settings.resolution)
    captions = sorted(set(reals.captions))
    if settings.num_prompts and settings.num_prompts < len(captions):
        captions = [
            captions[i] for i in drawn(len(captions), settings.num_prompts, settings.seed, "comparison prompts")
        ]
    k = settings.num_images_per_prompt
    judge = DiffusionAlignment(judge_pipe, resolution=settings.resolution, seed=settings.seed)
    result: dict[str, Any] = {"settings": _described(settings), "command": command, "rule": reals.decision.rule, "training": len(reals.images),
                              "heldout": len(heldout), "prompts": len(captions), "models": {}}  # fmt: skip
    shown: dict[str, dict[str, list[Image.Image]]] = {}
    chosen: list[int] = []
    requests = requests_for(captions, k)
    cells = settings.output_dir / "cells"
    for model, config in configs.items():
        pipe = load_pipeline(config, safety_checker=False)
        base = sample_requests(pipe, cells / model / "all", requests, config, None, f"{model}, all prompts")
        decided, near = decide(base.images, reals)
        known, ordinary = truth(decided.copy, k)
        clear = clear_of_copying(decided.p, k, ordinary, CLEAR)
        if not reals.decision.nulls:  # p says nothing then; d1 / d2 midway between a copy and 1 does
            clear = clear_of_copying(near.ratio, k, ordinary, (1 + MEMORIZED_RATIO) / 2)
        curves = torch.tensor(base.column("curve"), dtype=torch.float64).view(len(captions), k, -1)
        if not bool(curves.isfinite().all()):
            raise UserError(f"a score of {model} is no finite number", rule="detectors cannot be held side by side on it",
                            remedy="load the model in float32 or bfloat16")  # fmt: skip
        found: dict[str, Any] = {"memorized_prompts": len(known), "ordinary_prompts": len(ordinary),
                                 "clear_prompts": len(clear), "between": len(captions) - len(known) - len(clear), "detectors": []}  # fmt: skip
        if known and clear:
            found["detectors"] = detector_figures(curves, k, known, clear, settings.seed)
            terms = anisotropy_terms(pipe, cells / model / "anisotropy.json", requests, config).view(
                len(captions), k, -1
            )
            found["detectors"] += anisotropy_figures(terms, k, known, clear, settings.seed)
        if known and len(clear) >= 3:
            unseen = base_norms(judge_pipe, cells / "base.json", requests, judging).view(len(captions), k, -1)
            found["detectors"] += relative_figures(curves, unseen, k, known, clear, settings.seed)
        if not chosen:
            if not known or len(ordinary) < 2:
                raise UserError(f"{len(known)} memorized and {len(ordinary)} ordinary prompts of {model}",
                                rule="without both kinds there is nothing to compare",
                                remedy="train longer, or repeat images (experiments.memorized)")  # fmt: skip
            chosen = known[: settings.mitigated]
            if len(chosen) * k < FEWEST_MEASURED:
                raise UserError(f"{len(chosen) * k} images of memorized prompts would be mitigated", rule=f"quality is measured on {FEWEST_MEASURED} at least",
                                remedy="raise mitigated or num_images_per_prompt")  # fmt: skip
        prompts = [captions[i] for i in chosen]
        mitigated = [request for request in requests if request.prompt_index in chosen]
        scores = ordinary_scores(curves, ordinary, config.scale)
        found["ordinary_scores"] = dataclasses.asdict(scores)
        found["mitigations"] = {}
        shown[model] = {}
        for name, (make, rule) in tried.items():
            if (why := _refused(pipe, make(scores))) is not None:
                found.setdefault("left_out", {})[name] = why
                print(f"{model}, {name}: left out: {why}", flush=True)
                continue
            place = cells / model / re.sub(r"[^\w+. -]", "-", name)
            samples = sample_requests(pipe, place, mitigated, config, make(scores), f"{model}, {name}")
            figures = _kept_figures(
                place / "figures.json",
                prompts,
                lambda samples=samples, prompts=prompts: mitigation_figures(  # type: ignore[misc]
                    samples, reals, prompts, captions, judge, settings
                ),
            )
            found["mitigations"][name] = {
                "rule": rule, "figures": figures, "iterations": float(np.mean(samples.column("iterations"))),
            }  # fmt: skip
            found["mitigations"][name]["peak_memory_mb"] = peak_of(samples)
            shown[model][name] = samples.images[::k]
            sheet = contact_sheet(samples.images[::k], 10, prompts)
            atomic_write(settings.output_dir / _sheet(model, name), png_bytes(sheet))
            print(
                f"{model}, {name}: " + ", ".join(f"{f['name']} {f['value']:.3g}" for f in figures.values()), flush=True
            )
        result["models"][model] = found
    originals = [reals.images[reals.captions.index(captions[i])] for i in chosen]
    result["mitigated_prompts"] = [captions[i] for i in chosen]
    atomic_write(settings.output_dir / "comparison.json", json.dumps(result, indent=1) + "\n")
    atomic_write(settings.output_dir / "comparison.md", compare_page.tables(result))
    compare_page.write(settings.output_dir / "comparison.html", result, originals, shown)
    out.finish()
    return result


def _refused(pipe: Any, policy: policies.Policy | None) -> str | None:
    """Say why a policy cannot act on a pipeline, or return None."""
    try:
        MemorizationGuard(pipe, policy)
    except UserError as error:
        return str(error)
    return None


def _read_kept(path: Path, remedy: str = "remove it, which is then made again") -> Any:
    """Read what an earlier, interrupted command left in the folder."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read", rule=one_line(error, 200), remedy=remedy) from None


def _kept_figures(
    path: Path, prompts: Sequence[str], measure: Callable[[], dict[str, Estimate]]
) -> dict[str, dict[str, Any]]:
    """Return a mitigation's figures, measured once: the judge takes longer than the sampler."""
    if path.exists():
        kept = _read_kept(path)
        if kept["prompts"] == list(prompts):
            return dict(kept["figures"])
    figures = {name: figure.as_dict() for name, figure in measure().items()}
    atomic_write(path, json.dumps({"prompts": list(prompts), "figures": figures}))
    return figures


def config_of(settings: CompareSettings, model: str, name: str | None = None) -> SamplingConfig:
    """Say how a model is sampled, with the adapter and revision of its name; whole prompts share a batch."""
    k = settings.num_images_per_prompt
    config = SamplingConfig(
        model, None, None, settings.num_inference_steps, settings.guidance_scale, settings.resolution, settings.seed,
        batch_size=max(1, settings.batch_size // k) * k, variant=settings.variant, single_file_config=settings.single_file_config,
    ).of(model)  # fmt: skip
    if not config.source().family.flow:  # those are sampled by their own
        config = dataclasses.replace(config, scheduler="dpm++")
    if name is None:
        return config
    return dataclasses.replace(
        config, lora_weights=settings.lora_weights.get(name), revision=settings.revision.get(name)
    )


def _described(settings: CompareSettings) -> dict[str, Any]:
    """Return the settings without local paths: models by name."""
    fields = dataclasses.asdict(settings)
    places = {"models", "judge", "output_dir", "lora_weights", "overwrite", "revision", "variant", "single_file_config"}
    return {name: value for name, value in fields.items() if name not in places} | {"names": list(settings.models)}


def _claim(settings: CompareSettings, training: ImageDataset, heldout: ImageDataset) -> OutputFolder:
    """Let the folder belong to this comparison: the images in it are kept, and must be of the same settings and models."""
    configs = {name: config_of(settings, place, name) for name, place in settings.models.items()}
    models = {name: _digest(config) for name, config in configs.items()}
    for name in settings.lora_weights:
        models[name] += " " + configs[name].lora()["sha256"]  # type: ignore[index]
    free = {"names", "mitigations", "mitigated"}
    own = {key: value for key, value in _described(settings).items() if key not in free} | {
        "models": models, "training": training.fingerprint(), "heldout": heldout.fingerprint(), "definition of a copy": RULE,
    }  # fmt: skip
    if (dtype := next(iter(configs.values())).dtype) != "float32":
        own["dtype"] = dtype
    sheets = [
        _sheet(model, name)
        for model in settings.models
        for name in {**MITIGATIONS, **chosen_mitigations(settings.mitigations)}
    ]
    contents = ("cells", "comparison.json", "comparison.md", "comparison.html", *sheets, FILE)
    folder = OutputFolder(settings.output_dir, "comparison", contents, overwrite=settings.overwrite, grows=("models",))
    folder.claim(own)
    return folder


def _digest(config: SamplingConfig) -> str:
    """Tell one model's network from another's: a folder by its files, of the hub's the weights."""
    source, place = config.source(), Path(config.model)
    files = [place] if source.is_file else sorted((place / source.family.network).glob("*.safetensors"))
    if not files:
        found = ModelFingerprint.of(source.load(source.family.network))
        return found.weights or found.structure
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sheet(model: str, mitigation: str) -> str:
    return f"{model}-{''.join(c if c.isalnum() else '-' for c in mitigation)}.png"
