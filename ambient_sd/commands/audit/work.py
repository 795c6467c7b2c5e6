"""`ambient-sd audit`: how much of a model's output is copied from its training images, and how good the output is.

    OUT/generated/       the images, sampled under the guard for the training captions (`ambient_sd.commands.sample`); not with --generated
    OUT/base/            images of the base model for the same captions, which cannot be copies: they calibrate the decision
    OUT/images.jsonl   one line a generated image: prompt, score, nearest training image by every feature, copy or not
    OUT/audit.json       figures with intervals, n and seeds; fingerprints of model and data; the verdict
    OUT/audit.html       the same to look at, with the most copied images beside their originals; one file, no script
    OUT/settings.json    what the folder belongs to (`utils.output_folder`): interrupted audits resume, those of other images or another model are refused

Under `accelerate launch` the processes share the sampling out; the rest is the main one's.

Duplicates in the training set count as one image in every search; mirror images are searched for unless told otherwise.
What is a copy is decided by `ambient_sd.audit.decision`, calibrated by held-out images, by images of the base model, or both; d1 / d2 < 1/3 and
similarities stand beside it as published measures.

The share of copies that decides the exit status is the value itself, no end of its interval: every image in it lies beside its
original on the page. A lower end would let a small audit pass on copies that it saw; an upper end would fail every small audit.

Above the wings: it uses data, guard and audit.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shlex
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ambient_sd.audit.clip_score import ClipScore
from ambient_sd.audit.closest import FEATURES, OWN, draws_its_images, own_rows
from ambient_sd.audit.decision import BASE, EACH, HELDOUT, RATE, RENDERED, SAME, CopyDecision, Decided, Null
from ambient_sd.audit.embedding import EmbeddingStore, weights_digest
from ambient_sd.audit.features import MIRROR, Features, embed
from ambient_sd.audit.metrics import (
    ABOVE,
    Measurement,
    Row,
    bootstrap,
    copied,
    copy_threshold,
    difference,
    is_published,
    measure,
    memorized,
)
from ambient_sd.audit.originals import one_of_each
from ambient_sd.audit.record import AuditRecord, measures
from ambient_sd.audit.registry import choose, labels
from ambient_sd.audit.registry import label as label_of
from ambient_sd.audit.shares import COPIES, by_group, copy_rate, nothing_to_compare, returned
from ambient_sd.audit.stored import missing_features, recall
from ambient_sd.commands.audit import AuditSettings, Source
from ambient_sd.commands.sample import SampleSettings
from ambient_sd.commands.sample.work import sample
from ambient_sd.data.captions import as_read
from ambient_sd.data.dataset_options import AUTO
from ambient_sd.data.layouts.layout import not_listed, refuse_unlisted
from ambient_sd.data.shards import has_shards
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.data.stream import drawn
from ambient_sd.data.walk import METADATA
from ambient_sd.families.base import Model
from ambient_sd.families.lora import PEFT_NAME, WEIGHTS_NAME
from ambient_sd.families.origin import adapter_file, read_origin
from ambient_sd.reporting.audit_page import write_report
from ambient_sd.reporting.next_steps import after_audit
from ambient_sd.reporting.report import (
    Histogram,
    Report,
    RunSection,
    TokenAttribution,
    decided_sample,
    find,
    rank,
    ratio_histogram,
    versions,
)
from ambient_sd.sampling import (
    SamplingConfig,
    digest,
    from_main,
    image_seed,
    label,
    load_pipeline,
    own_device,
    processes,
    read_prompts,
    say,
)
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.files import atomic_write, json_safe
from ambient_sd.utils.output_folder import FILE, OutputFolder
from ambient_sd.utils.weight_files import adapter_files, network_files

_SHOWN = 24
SEARCHED = (
    5000  # training images that are laid over the generated ones: beyond, those that a feature finds near, and a draw
)
_LEAST_P = -6  # log10, on the page
_LIST = "samples.jsonl"  # of `ambient-sd sample`
CONTENTS = ("generated", "base", "images.jsonl", "audit.json", "audit.html", FILE)


@dataclass(frozen=True)
class Audit:
    """Hold the outcome: everything of `audit.json`, and whether the share of copies exceeds the limit."""

    found: dict[str, Any]
    exceeded: bool


@dataclass(frozen=True)
class Generated:
    """Hold generated images and what is known of each: prompt and score, None where nothing is."""

    images: ImageDataset
    prompts: list[str] | None
    scores: list[float | None]
    weights: str | None = None
    base_weights: str | None = None

    @property
    def groups(self) -> Sequence[Hashable] | None:
        """Return the label by which images are resampled: their prompt; None, each by itself, where one prompt is all that is asked."""
        return None if self.prompts is None or len(set(self.prompts)) == 1 else self.prompts


@dataclass(frozen=True)
class MirrorVectors:
    """Embed the mirror images of the rows that are asked for."""

    images: Sequence[Image.Image]
    feature: Features

    def gather(self, rows: Tensor) -> Tensor:
        """Return their vectors, float32 `(n, D)`."""
        return self.feature((ImageOps.mirror(self.images[row]) for row in rows.tolist()), progress=True)


def audit(settings: AuditSettings, command: str = "ambient-sd audit") -> Audit | None:
    """Sample what is missing, measure, and write everything into `settings.output_dir`.

    Returns:
        The outcome; None on processes other than the main one, whose part ends with the sampling.

    Raises:
        UserError: settings, images or models cannot be used, or `out` belongs to something else or cannot be written.
    """
    try:
        return _audit(settings, command)
    except OSError as error:
        if error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.ENOTDIR,
        ):
            raise UserError(f"{settings.output_dir} cannot be written", rule=str(error.strerror),
                            remedy="make room, or name another folder with --output_dir; what is sampled is kept") from None  # fmt: skip
        raise


def _audit(settings: AuditSettings, command: str) -> Audit | None:
    begun = time.time()
    settings.check()
    folder = OutputFolder(settings.output_dir, "audit", CONTENTS, overwrite=settings.overwrite)
    folder.check({})
    device = _device(settings)
    stored = _stored(settings)
    training, triggers = _training(settings)
    heldout = None if settings.heldout is None else settings.heldout.open(need_captions=False)
    features = choose(settings.features, settings.files, device)
    compared = 0
    if stored:
        for feature in features:
            stored[feature.name].require_feature(feature)
        compared = recall(list(stored.values()), training, settings.seed, progress=True)
    else:
        training.check(progress=True, near_duplicates=True)
    if heldout is not None:
        heldout.check(progress=True)
    if len(set(training.noise_keys)) < 2:
        raise UserError(f"{len(set(training.noise_keys))} different training image in {training.source}",
                        rule="the nearest is held against the second nearest", remedy="give the whole training set")  # fmt: skip
    if heldout is not None and (seen := len(set(heldout.keys) & set(training.keys))):
        raise UserError(f"{seen} of {len(heldout)} held-out images are training images",
                        rule="the background is what a model that never saw them would hit",
                        remedy="give other images, or the right split with --heldout_split")  # fmt: skip
    grouped = None if settings.group_column is None else training.column(settings.group_column)
    prompts = None if settings.sampling is None else _prompts(settings, triggers or training.captions)
    existing = None if settings.generated is None else read_generated(settings.generated, settings.unlisted)
    from_main(lambda: folder.claim(_contents_depend_on(settings, training, heldout, prompts, existing)))
    known = prompts if existing is None else existing.prompts
    align = _aligners(settings, known, device)

    files: dict[str, Any] = {}
    place, base_place = settings.output_dir / "generated", None
    if settings.sampling is not None:
        assert prompts is not None
        before = _weight_files(settings.sampling)
        # What a safety checker blanks was drawn all the same, and may be a copy.
        sample(SampleSettings(settings.sampling, place, prompts, settings.num_images_per_prompt), safety_checker=False)
        files = _weight_files(settings.sampling)
        # Files of the hub may have come only now; what was here must be what was sampled.
        if changed := [name for name, digests in before.items() if digests and digests != files[name]]:
            raise UserError(f"the weight files of the {changed[0]} changed while they were audited",
                            rule="figures are of one model", remedy="audit again, into another folder with --output_dir")  # fmt: skip
        base_place = _sample_base(settings, prompts, settings.num_images_per_prompt if triggers else 1)
    if not processes().is_main_process:
        return None
    generated = read_generated(place) if existing is None else existing
    of_base = None if base_place is None else read_generated(base_place)
    base = None if of_base is None else of_base.images
    # Equal images have equal vectors: a set that repeats its images is embedded and searched once.
    different = list(range(len(training))) if stored else one_of_each(training.keys).tolist()
    of_training = (training if stored else training.subset(different)).images
    known_vectors: dict[str, Any] = dict(stored or embed(of_training, features, progress=True))
    if settings.mirrored:
        known_vectors |= {feature.name + MIRROR: MirrorVectors(of_training, feature) for feature in features}
    made, real = (
        None if rows is None else embed(rows.images, features, progress=True, mirrored=settings.mirrored)
        for rows in (generated.images, heldout)
    )
    assert made is not None
    measured = measure(
        made, known_vectors, real, features, generated.groups, settings.seed,
        duplicates=[training.noise_keys[i] for i in different], mirrored=settings.mirrored, resamples=settings.resamples,
        progress=True, quality_resamples=max(settings.resamples // 10, 10),
    )  # fmt: skip
    measured = _with_rows(measured, different)
    measured.rows.extend(row for one in align for row in one(generated, heldout))
    verdict = _decide(settings, training, heldout, generated, base, measured, grouped)
    own = _own(settings, training, different, generated, of_base, features, known_vectors, made, real)
    measured.rows[:0] = [*verdict.rows, *own]
    pulls = _attributions(settings, generated, verdict.decided) if settings.attributed_prompts else []
    used = _used(stored, compared)
    outcome = _write(
        settings, command, begun, training, heldout, generated, features, measured, verdict, pulls, used, files
    )
    folder.finish()
    return outcome


# --- what goes in ----------------------------------------------------------------------------------------------------


def _stored(settings: AuditSettings) -> dict[str, EmbeddingStore]:
    """Open the embeddings of the training images, by feature; none where none are given."""
    if settings.training_embeddings is None:
        return {}
    folder, source = settings.training_embeddings.expanduser(), settings.training
    names = dict(zip(labels(settings.features), settings.features, strict=True))
    if not (missing := missing_features(folder, list(names))):
        return {name: EmbeddingStore.open(folder / name) for name in names}
    words = ["accelerate", "launch", "-m", "ambient_sd.audit.embedding", source.place]
    if source.split is not None:
        words += ["--dataset_split", source.split]
    if source.skip_broken:
        words.append("--skip_broken")
    if source.row_filter:
        words += ["--row_filter", *("".join(condition) for condition in source.row_filter)]
    options = (
        "unlisted",
        "image_column",
        "caption_column",
        "layout",
        "caption_extension",
        "instance_prompt",
        "trigger_word",
    )
    given = {name: getattr(source, name) for name in options if getattr(source, name) != getattr(Source, name)}
    given |= {name: file for name, file in settings.files.items() if file and label_of(name) in missing}
    given |= {"features": ",".join(names[name] for name in missing), "output_dir": str(folder)}
    words += [word for name, value in given.items() for word in (f"--{name}", value)]
    raise UserError(f"{folder} holds no embeddings of {', '.join(missing)}", rule="an audit needs each of its features",
                    remedy=f"make them: {shlex.join(words)}")  # fmt: skip


def _training(settings: AuditSettings) -> tuple[ImageDataset, list[str]]:
    """Open the training images; with them the trigger words of an adapter whose images have no captions, else none."""
    config = settings.sampling
    own = config is not None and settings.prompts is None
    file = None if config is None or not own or config.lora_weights is None else adapter_file(config.lora_weights)
    place = label(settings.training.place)
    if file is not None and (triggers := read_origin(file, file.name).triggers) is not None:
        rows = settings.training.open(need_captions=False)
        if not any(rows.captions):
            say(
                f"prompts: the trigger words {one_line(', '.join(triggers[0]), 120)!r} ({triggers[1]}), for no image in {place} has a caption"
            )
            return rows, triggers[0]
    rows = settings.training.open(need_captions=own)
    if config is not None and config.lora_weights is not None:
        if own:
            say(f"prompts: the captions of {place}")
        if settings.heldout is None and (base := settings.base()) is not None:
            say(
                f"what cannot be a copy: images of the base {label(base.model)} for the same prompts, from the same seeds"
            )
    return rows, []


def _sample_base(settings: AuditSettings, prompts: Sequence[str], images: int) -> Path | None:
    """Sample the base for the same prompts, from the same seeds: a model that cannot have copied. Return the images' folder."""
    if (base := settings.base()) is None:
        return None
    chosen = list(prompts)
    if settings.base_images < len(chosen):
        chosen = [chosen[i] for i in drawn(len(chosen), settings.base_images, settings.seed, "base prompts")]
    folder = settings.output_dir / "base"
    sample(SampleSettings(base, folder, chosen, min(images, settings.base_images)), safety_checker=False)
    return folder


@dataclass(frozen=True)
class Decision:
    """Hold what was decided of the generated images, with `decided.row` counted in the rows of the whole training set.

    `chance` holds p of the images of each null, each judged without itself.
    """

    decided: Decided
    rule: str
    nulls: list[Null]
    rows: list[Row]
    groups: list[dict[str, Any]]
    searched: int
    chance: dict[str, list[float]]


def _decide(
    settings: AuditSettings, training: ImageDataset, heldout: ImageDataset | None, generated: Generated, base: ImageDataset | None,
    measured: Measurement, grouped: Sequence[str] | None,
) -> Decision:  # fmt: skip
    """Decide which generated images are copies, and count both shares."""
    rows = one_of_each(training.keys).tolist()  # equal images would be one another's surroundings
    if len(rows) > SEARCHED:
        # Of very large sets those that any feature finds near, and a draw of the others: surroundings and null need no more.
        close = {
            int(i)
            for side in (measured.neighbours, measured.heldout_neighbours)
            for n in side.values()
            for i in n.index.flatten()
        }
        drawn_rows = {rows[i] for i in drawn(len(rows), SEARCHED // 2, settings.seed, "searched training images")}
        rows = sorted(close | drawn_rows)
    vae, side = _vae(settings)
    decide = CopyDecision.of(
        training.subset(rows).images, [training.noise_keys[row] for row in rows], heldout=heldout.images if heldout else (),
        base=base.images if base else (), vae=vae, side=side, mirrored=settings.mirrored, progress=True,
    )  # fmt: skip
    near = next((n for n in measured.neighbours.values() if n.metric == "euclidean"), None)
    found = decide(generated.images.images, None if near is None else memorized(near))
    decided = dataclasses.replace(found, row=torch.tensor(rows)[found.row])
    if 2 * int(decided.compared.sum()) < len(decided):
        raise nothing_to_compare(decided)
    background = None
    if heldout is not None:
        background = decide.background(HELDOUT)
        background = decide(heldout.images).copy if background is None else background
    options: dict[str, Any] = {"seed": settings.seed}
    given = [
        copy_rate(decided, background, generated.groups, resamples=settings.resamples, **options),
        returned(decided, training.noise_keys, **options),
    ]
    groups = [] if grouped is None else by_group(decided, training.noise_keys, grouped)
    chance = {null.name: p.tolist() for null in decide.nulls if (p := decide.p_of_null(null.name)) is not None}
    return Decision(decided, decide.rule, decide.nulls, given, groups, len(rows), chance)


def _own(
    settings: AuditSettings, training: ImageDataset, different: Sequence[int], generated: Generated, base: Generated | None,
    features: Sequence[Features], known: Mapping[str, Any], made: Mapping[str, Tensor], real: Mapping[str, Tensor] | None,
) -> list[Row]:  # fmt: skip
    """Count the images that are nearest to their caption's own training image, beside the base's: blurred copies, which the decision misses."""
    if generated.prompts is None:
        return []
    some = [feature for feature in features if feature.name in FEATURES]
    of_base = None if base is None or base.prompts is None else (embed(base.images.images, some), base.prompts)
    captions = [training.captions[i] for i in different]
    asked = [captions, generated.prompts, *([] if of_base is None else [of_base[1]])]
    if settings.sampling is not None:  # captions that the model cuts to one text ask for the same images
        texts = [text for some in asked for text in some]
        one = dict(zip(texts, as_read(texts, *settings.sampling.source().reading()), strict=True))
        asked = [[one[text] for text in some] for some in asked]
    return own_rows(
        (made, asked[1]), (known, asked[0]), real, None if of_base is None else (of_base[0], asked[2]),
        duplicates=[training.noise_keys[i] for i in different], seed=settings.seed, resamples=settings.resamples,
    )  # fmt: skip


def _vae(settings: AuditSettings) -> tuple[Any, int]:
    """Return the model's autoencoder and the side that it is sampled at; None where that is more than `RENDERED`."""
    config = settings.sampling
    if config is None:
        return None, 0
    model = config.source()
    side = config.resolution or _own_resolution(model)
    return (None if side > RENDERED else model.load("vae").to(_device(settings))), side


def _own_resolution(model: Model) -> int:
    """Return the side that a pipeline samples at by default, from its configuration."""
    return model.family.native_side(model.read(f"{model.family.network}/config.json"), model.vae_settings)


def _used(stored: Mapping[str, EmbeddingStore], compared: int) -> dict[str, Any] | None:
    """Return what audit.json says of stored embeddings; None where there are none."""
    if not stored:
        return None
    return {
        "compared": compared,
        "features": {
            name: {"weights": store.about.weights, "dtype": store.about.dtype, "device": store.about.device,
                   "digest": store.digest}
            for name, store in stored.items()
        },
    }  # fmt: skip


def _contents_depend_on(
    settings: AuditSettings, training: ImageDataset, heldout: ImageDataset | None, prompts: Sequence[str] | None,
    existing: Generated | None,
) -> dict[str, Any]:  # fmt: skip
    """Return what the folder belongs to; figures of the same images may be made again in other ways."""
    return {
        "training": training.fingerprint(),
        "heldout": None if heldout is None else heldout.fingerprint(),
        "prompts": None if prompts is None else digest(prompts),
        "num_images_per_prompt": None if prompts is None else settings.num_images_per_prompt,
        "sampling": None if settings.sampling is None else settings.sampling.public(),
        "generated": None if existing is None else existing.images.fingerprint(),
        "base": None if (base := settings.base()) is None else {**base.public(), "images": settings.base_images},
    }


def _prompts(settings: AuditSettings, own: Sequence[str]) -> list[str]:
    """Return the prompts to draw, `own` where none are given: each once, in their order, or as many of them as wanted, drawn by the seed."""
    given = own if settings.prompts is None else read_prompts(settings.prompts)
    prompts = list(dict.fromkeys(given))
    if settings.num_prompts and settings.num_prompts < len(prompts):
        prompts = [prompts[i] for i in drawn(len(prompts), settings.num_prompts, settings.seed, "audit prompts")]
    return prompts


def _prompt_source(settings: AuditSettings, training: ImageDataset) -> str:
    if settings.sampling is None or settings.prompts is not None:
        return "given"
    return "training captions" if any(training.captions) else "trigger words"


def _device(settings: AuditSettings) -> str:
    given = settings.sampling.device if settings.sampling is not None else None
    return given or own_device()


def read_generated(folder: Path, unlisted: str = "refuse") -> Generated:
    """Open a folder of generated images: of `ambient-sd sample`, with metadata.jsonl or .csv, or of images alone.

    Args:
        folder: the images.
        unlisted: what becomes of images in it that would not be read, as in `load_rows`.

    Raises:
        UserError: there is no such folder, it holds no images, one cannot be read or would be left out, or its list is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", remedy="give a folder of generated images")
    listing = folder / _LIST
    if not listing.is_file():
        # A text beside a generated image is not its prompt alone: A1111 writes every parameter there.
        listed = has_shards(folder) or any((folder / name).is_file() for name in METADATA)
        layout = AUTO if listed else "images"
        rows = load_rows(folder, need_captions=False, local=True, unlisted=unlisted, layout=layout).check(progress=True)
        prompts = rows.captions if any(rows.captions) else None
        return Generated(rows, prompts, [None] * len(rows))
    records = []
    try:
        for line in listing.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                record = json.loads(line)
                name, prompt, score = record["file"], record["prompt"], record.get("score")
                if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(prompt, str):
                    raise ValueError(f"{one_line(name, 60)!r} is no image of this folder")
                of, above = record.get("weights"), record.get("base_weights")
                if not all(value is None or isinstance(value, str) for value in (of, above)):
                    raise ValueError("weights are no text")
                records.append((str(name), prompt, None if score is None else float(score), (of, above)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{listing} cannot be read", rule=one_line(f"{type(error).__name__}: {error}", 160)) from None
    if not records:
        raise UserError(f"{listing} names no image", rule="at least one is needed")
    names = [name for name, *_ in records]
    left = not_listed(folder, names, listing)
    if left and unlisted != "ignore":
        raise refuse_unlisted(folder, left)
    rows = ImageDataset([folder / name for name in names], [r[1] for r in records], names, str(folder)).check(True)
    rows.unlisted = len(left)
    drawn_by = {r[3] for r in records}
    weights, base_weights = drawn_by.pop() if len(drawn_by) == 1 else (None, None)
    return Generated(rows, rows.captions, [r[2] for r in records], weights, base_weights)


Aligner = Callable[[Generated, ImageDataset | None], list[Row]]


def _aligners(settings: AuditSettings, prompts: Sequence[str] | None, device: str) -> list[Aligner]:
    """Load what measures how well images show their prompts, before anything is sampled."""
    for name in ("clip", "judge"):
        if getattr(settings, name) is not None and prompts is None:
            raise UserError(f"{name} for images without prompts", rule="it measures how well an image shows its prompt",
                            remedy=f"leave --{name} out, or give the prompts in metadata.jsonl")  # fmt: skip
    found: list[Aligner] = []
    if settings.clip is not None:
        score = ClipScore(settings.clip, device=device)
        detail = f"more is better; cosine of image and prompt, {label(settings.clip)}"

        def clip(generated: Generated, heldout: ImageDataset | None) -> list[Row]:
            return [_aligned(settings, generated, heldout, lambda p, c: score(p, c, True), score.name, detail)]

        found.append(clip)
    if settings.judge is not None:
        from ambient_sd.audit.alignment import DiffusionAlignment

        judging = (settings.sampling or SamplingConfig(settings.judge)).of(settings.judge)
        pipe = load_pipeline(dataclasses.replace(judging, scheduler=None, device=device))
        judge = DiffusionAlignment(pipe, resolution=_own_resolution(judging.source()), seed=settings.seed)
        assert prompts is not None
        judge.choose(prompts[:1], prompts)  # are there others to hold a prompt against?
        told = f"more is better; error with other prompts minus error with its own, judged by {label(settings.judge)}"

        def aligned(generated: Generated, heldout: ImageDataset | None) -> list[Row]:
            return [
                _aligned(settings, generated, heldout, lambda p, c: judge(p, c).value * 1000, "alignment x 1000", told)
            ]

        found.append(aligned)
    return found


def _aligned(
    settings: AuditSettings,
    generated: Generated,
    heldout: ImageDataset | None,
    score: Callable[[Sequence[Image.Image], list[str]], Tensor],
    name: str,
    detail: str,
) -> Row:
    """Estimate a mean score of images with their prompts, beside that of held-out images with their captions."""
    options: dict[str, Any] = {"name": name, "seed": settings.seed, "resamples": settings.resamples, "detail": detail}
    assert generated.prompts is not None
    made = bootstrap(score(generated.images.images, generated.prompts), torch.mean, groups=generated.groups, **options)
    if heldout is None or not all(heldout.captions):
        return Row(name, made, None, None)
    real = bootstrap(score(heldout.images, heldout.captions), torch.mean, **options)
    return Row(name, made, real, difference(made, real))


def _with_rows(measured: Measurement, rows: Sequence[int]) -> Measurement:
    """Return the measurement with neighbours counted in the rows of the whole training set."""
    place = torch.tensor(rows)
    sides = ("neighbours", "heldout_neighbours", "training_neighbours")
    moved: dict[str, Any] = {
        side: {
            name: dataclasses.replace(near, index=place[near.index]) for name, near in getattr(measured, side).items()
        }
        for side in sides
    }
    return dataclasses.replace(measured, **moved)


# --- what comes out --------------------------------------------------------------------------------------------------


def copies_row(feature: Features) -> str:
    """Return the name of the measure by which a feature says what is a copy."""
    return (
        f"{feature.name}{ABOVE}{copy_threshold(feature)}"
        if feature.distance == "cosine"
        else f"memorized-{feature.name}"
    )


def _attributions(settings: AuditSettings, generated: Generated, decided: Decided) -> list[TokenAttribution]:
    """Return the pull of the tokens of the most copied prompts, by the mean rank of their images."""
    from ambient_sd.guard.attribution import attribute

    config = settings.sampling
    if config is None or generated.prompts is None or config.scale <= 1:  # without guidance no prompt pulls
        return []
    ranks: dict[str, list[float]] = {}
    for prompt, value in zip(generated.prompts, decided.ratio.clamp(max=10).tolist(), strict=True):
        ranks.setdefault(prompt, []).append(value)
    copies: dict[str, int] = {}
    for prompt, copy in zip(generated.prompts, decided.copy.tolist(), strict=True):
        copies[prompt] = copies.get(prompt, 0) + int(copy)
    order = sorted(ranks, key=lambda prompt: (sum(ranks[prompt]) / len(ranks[prompt]), prompt))
    places = {prompt: place for place, prompt in enumerate(ranks)}
    pipe = load_pipeline(config)
    sampling = config.describe(pipe)
    pulls = []
    for prompt in order[: settings.attributed_prompts]:
        try:
            seen = attribute(
                pipe, prompt, num_inference_steps=config.num_inference_steps, 
                seed=image_seed(config.seed, places[prompt]), guidance_scale=config.scale, height=sampling.height, width=sampling.width,
            )  # fmt: skip
        except (
            UserError
        ) as error:  # a pipeline or precision that it does not know: the audit has its figures all the same
            print(f"ambient-sd: no token attribution: {error}", flush=True)
            break
        note = f"{copies[prompt]} of its {len(ranks[prompt])} images are copies"
        pulls.append(TokenAttribution(prompt, seen.tokens, seen.scores, seen.padding_score, note))
    return pulls


def _write(
    settings: AuditSettings,
    command: str,
    begun: float,
    training: ImageDataset,
    heldout: ImageDataset | None,
    generated: Generated,
    features: Sequence[Features],
    measured: Measurement,
    decision: Decision,
    pulls: Sequence[TokenAttribution],
    used: Mapping[str, Any] | None,
    files: Mapping[str, Any],
) -> Audit:
    name = COPIES
    share = measured.row(name).generated
    others = [] if settings.fail_over is None else _certainly_above(settings.fail_over, measured, name)
    verdict: dict[str, Any] = {
        "measure": name, "value": share.value, "bound": "value", "limit": settings.fail_over, "others": others,
        "exceeded": None if settings.fail_over is None else share.value > settings.fail_over or bool(others),
    }  # fmt: skip
    report = _report(
        settings, command, training, heldout, generated, features, measured, decision, pulls, verdict, used
    )
    finding = find(report)
    found = {
        "finding": dataclasses.asdict(finding),
        "verdict": verdict,
        "model": None
        if settings.sampling is None
        else {**settings.sampling.public(), "weights": generated.weights, **_of_base(generated), "files": files},
        "images": {
            "generated": {
                "n": len(generated.images), "fingerprint": generated.images.fingerprint(),
                "prompts": None if generated.prompts is None else len(set(generated.prompts)),
                "num_images_per_prompt": None if settings.sampling is None else settings.num_images_per_prompt,
                "source": _prompt_source(settings, training),
                "weights": generated.weights, "unlisted": generated.images.unlisted,
            },
            "training": {**settings.training.public(), **_counted(training), "groups_of_duplicates": len(training.groups),
                         "embeddings": used},
            "heldout": None if heldout is None or settings.heldout is None
            else {**settings.heldout.public(), **_counted(heldout)},
        },
        "copies": {
            "rule": decision.rule, "false_discoveries": RATE, "each": EACH, "same": SAME,
            "nulls": [{"name": null.name, "n": null.n, "twins": null.twins} for null in decision.nulls],
            "searched": decision.searched, "compared": int(decision.decided.compared.sum()), "groups": decision.groups,
        },
        "features": {f.name: {"distance": f.distance, "copy": copies_row(f), **_file(f)} for f in features},
        "mirrored": settings.mirrored,
        "duplicates_of_one_image_count_once": True,
        "seed": settings.seed,
        "resamples": settings.resamples,
        "measures": measures(measured.rows),
        "tokens": [dataclasses.asdict(pull) for pull in pulls],
        "notes": list(report.notes),
        "made": {**versions(), "command": command, "device": _device(settings), "seconds": round(time.time() - begun, 1)},
    }  # fmt: skip
    lines = _lines(training, generated, features, measured, decision.decided)
    atomic_write(settings.output_dir / "images.jsonl", "".join(json.dumps(json_safe(line)) + "\n" for line in lines))
    write_report(settings.output_dir / "audit.html", report)
    # Last: where it lies, the others are whole.
    record = AuditRecord.of(found)
    record.write(settings.output_dir)
    return Audit(record.as_dict(), bool(verdict["exceeded"]))


def _weight_files(config: SamplingConfig) -> dict[str, Any]:
    """Return the digests of the files that are sampled: the network's and the adapter's, None without one."""
    return {
        "network": network_files(config.model, revision=config.revision, variant=config.variant),
        "lora_weights": None if config.lora_weights is None else adapter_files(config.lora_weights),
    }


def _of_base(generated: Generated) -> dict[str, str]:
    return {} if generated.base_weights is None else {"base_weights": generated.base_weights}


def _certainly_above(limit: float, measured: Measurement, deciding: str) -> list[str]:
    """Return the other shares of copies whose excess over held-out images is above the limit with its whole interval, and those that say
    that the model draws its training images.

    A gate that looks at pixels alone would open for copies in other colours, which the page's first sentence calls copies.
    """
    return [
        row.name
        for row in measured.rows
        if (is_published(row.name) and row.name != deciding and row.excess is not None and row.excess.low > limit)
        or draws_its_images(row)
    ]


def _counted(rows: ImageDataset) -> dict[str, Any]:
    return {
        "n": len(rows), "different": len(set(rows.noise_keys)), "fingerprint": rows.fingerprint(), "unlisted": rows.unlisted,
    }  # fmt: skip


def _file(feature: Features) -> dict[str, str]:
    """Return the digest of a feature's weights where the file is the user's."""
    given = hasattr(feature, "path") or hasattr(feature, "digest")
    return {"weights": weights_digest(feature)} if given else {}


def _lines(
    training: ImageDataset, generated: Generated, features: Sequence[Features], measured: Measurement, decided: Decided
) -> list[dict[str, Any]]:
    columns = []
    for feature in features:
        near = measured.neighbours[feature.name]
        marks = copied(feature, near).tolist()
        cosine = feature.distance == "cosine"
        seen = near.similarity.tolist() if cosine else near.ratio.tolist()
        columns.append([
            {"row": i, "name": training.names[i], "d1": d, ("similarity" if cosine else "ratio"): s, "copy": m}
            for i, d, s, m in zip(near.index[:, 0].tolist(), near.distance[:, 0].tolist(), seen, marks, strict=True)
        ])  # fmt: skip
    return [
        {
            "name": generated.images.names[i],
            "prompt": None if generated.prompts is None else generated.prompts[i],
            "score": generated.scores[i],
            "copy": bool(decided.copy[i]),
            "p": float(decided.p[i]),
            "residual": float(decided.residual[i]),
            "ratio": float(decided.ratio[i]),
            "original": {"row": int(decided.row[i]), "name": training.names[int(decided.row[i])]},
            "nearest": {feature.name: column[i] for feature, column in zip(features, columns, strict=True)},
        }
        for i in range(len(generated.images))
    ]


def _report(
    settings: AuditSettings,
    command: str,
    training: ImageDataset,
    heldout: ImageDataset | None,
    generated: Generated,
    features: Sequence[Features],
    measured: Measurement,
    decision: Decision,
    pulls: Sequence[TokenAttribution],
    verdict: Mapping[str, Any],
    used: Mapping[str, Any] | None,
) -> Report:
    decided = decision.decided
    published = measured.neighbours[features[0].name]
    order = rank(decided)
    # Only what is shown is decoded again.
    samples = [
        decided_sample(
            decided, i, published, image=generated.images[i].image, prompt="" if generated.prompts is None else generated.prompts[i],
            originals=training.images, captions=training.captions, score=generated.scores[i], order=float(order[i]),
        )
        for i in order.argsort(stable=True)[: 3 * _SHOWN].tolist()
    ]  # fmt: skip
    name = "this folder" if settings.sampling is None else _model_name(settings.sampling)
    run = RunSection(
        name=name,
        objective="",
        figures=measured.rows,
        samples=samples,
        counted=(int(decided.copy.sum()), int(decided.compared.sum())),
        left_out=int((~decided.compared).sum()),
        exact=int((decided.residual <= SAME).sum()),
    )
    quality = next((row.name for row in measured.rows if row.name.startswith("FD-")), "")
    report = Report(
        title=f"Audit of {name} against {len(training)} training images",
        command=command,
        runs=[run],
        training_n=len(training),
        copies=COPIES,
        quality=quality,
        histograms=[_decision_histogram(decision, name), *(_histogram(f, measured, name) for f in features)],
        tokens=pulls,
        made=_made(settings, training, heldout, generated),
        notes=_notes(settings, training, heldout, generated, measured, decision, verdict, used),
        groups=decision.groups,
        shown=_SHOWN,
    )
    model = None if settings.sampling is None else settings.sampling.public()
    return dataclasses.replace(report, next=after_audit(find(report).kind, model))


def _model_name(config: SamplingConfig) -> str:
    if config.lora_weights is None:
        return label(config.model)
    place = Path(config.lora_weights)
    # Of a file under the name that every tool gives it the folder says more.
    usual = place.is_file() and place.name in (WEIGHTS_NAME, PEFT_NAME)
    return f"{label(config.model)} with {label(str(place.resolve().parent) if usual else config.lora_weights)}"


def _decision_histogram(decision: Decision, name: str) -> Histogram:
    def logs(values: Sequence[float]) -> list[float]:
        return [math.log10(max(value, 10.0**_LEAST_P)) for value in values]

    decided = decision.decided
    rows = [(name, "run0", logs(decided.p.tolist()))]
    tones = {HELDOUT: "held", BASE: "train"}
    rows += [(null, tones.get(null, "train"), logs(values)) for null, values in decision.chance.items()]
    marked = decided.p[decided.copy & (decided.p <= EACH)]
    cut = math.log10(max(float(marked.max()), 10.0**_LEAST_P)) if len(marked) else math.log10(EACH / 10)
    return Histogram(
        "How often does an image that is no copy come this near?",
        f"log10 of p, at least {_LEAST_P}; images that cannot be copies are judged without themselves. Copies lie left of the line, or have a "
        f"residual of at most {SAME:g}.",
        rows, cut + 1e-9, f"{cut:.2g}", low=float(_LEAST_P), high=0.0,
    )  # fmt: skip


def _histogram(feature: Features, measured: Measurement, name: str) -> Histogram:
    sets = (
        (name, "run0", measured.neighbours.get(feature.name)),
        ("held-out, never seen", "held", measured.heldout_neighbours.get(feature.name)),
        ("training images among themselves", "train", measured.training_neighbours.get(feature.name)),
    )
    cosine = feature.distance == "cosine"
    rows = [
        (title, tone, (near.similarity if cosine else near.ratio).tolist())
        for title, tone, near in sets
        if near is not None
    ]
    if not cosine:
        return ratio_histogram(rows, feature.name)
    cut = copy_threshold(feature)
    least = min((min(values) for _, _, values in rows if values), default=0.0)
    return Histogram(
        f"How similar is the most similar? ({feature.name})",
        f"cosine to the most similar training image, share of images; copies lie right of {cut:g}.",
        rows, cut, f"{cut:g}", low=0.0 if least >= 0 else -1.0, high=1.0, below=False,
    )  # fmt: skip


def _notes(
    settings: AuditSettings, training: ImageDataset, heldout: ImageDataset | None, generated: Generated, measured: Measurement,
    decision: Decision, verdict: Mapping[str, Any], used: Mapping[str, Any] | None,
) -> list[str]:  # fmt: skip
    share, n, device = (
        measured.row(COPIES).generated,
        measured.row(COPIES).generated.n,
        torch.device(_device(settings)).type,
    )
    notes = [decision.rule]
    if n < len(generated.images):
        notes.append(
            f"{len(generated.images) - n} of {len(generated.images)} generated images are black, blank or so faint that nothing can be compared: they "
            "count neither as copies nor as free of them, and the copy rate is of the others. Look at them."
        )
    if settings.fail_over is not None:
        said = (
            "fails: it exceeds"
            if share.value > settings.fail_over
            else "does not exceed"
            if verdict["others"]
            else "passes: it does not exceed"
        )
        notes.append(
            f"The audit {said} the limit of {settings.fail_over:.2%} ({share.value:.2%} of {n} are copies; the value "
            f"itself is held against the limit). By its interval up to {share.high:.2%} would be no surprise."
        )
        if verdict["others"]:
            notes.append(
                f"The audit fails by {' and '.join(verdict['others'])}: the excess over held-out images (of own: over the base's) is above the limit "
                "(of own: above half of the images) with its whole interval."
            )
    if settings.fail_over is not None and not any(
        row.name.startswith(f"{OWN}-") and row.excess is not None for row in measured.rows
    ):
        notes.append(
            "Not tested by the limit: whether most images are nearest to the training image of their own caption, blurred and redrawn copies among them. That needs "
            "the training captions as prompts, captions that tell the images apart, pixels or edges among the features, and the base's images beside them "
            "(--base_model)."
        )
    near, by_chance = int((decision.decided.p <= EACH).sum()), EACH * n
    if decision.nulls and near > by_chance + 2 * math.sqrt(by_chance) and near > int(decision.decided.copy.sum()):
        notes.append(
            f"{near} of {n} images are nearer than {1 - EACH:.0%} of the images that cannot be copies come, where {by_chance:.1f} would be by chance: too "
            "few to tell which are copies, too many for none. Look at the first ones, and sample more."
        )
    for null in decision.nulls:
        if null.twins:
            notes.append(
                f"{null.twins} of the {null.n + null.twins} {null.name} are copies of training images themselves, but for colour, blur or "
                "pose; they calibrate nothing."
            )
    if decision.searched < len(set(training.noise_keys)):
        notes.append(
            f"{decision.searched} training images were laid over the generated ones: those that a feature found near, and a draw of the others. "
            "A changed copy of another one is found by the features alone."
        )
    if any(row.name.startswith(f"{OWN}-") for row in measured.rows):
        notes.append(
            "Own training image closest: of all real images, trained and held out, the nearest to a generated one is the training image of its prompt. It sees "
            "blurred and redrawn copies that the decision does not count. Its held-out column has the base's images for the same prompts, where there are any: "
            "what captions alone give, but for the style."
        )
    if heldout is None:
        notes.append(
            "No held-out images were given: nothing says how many hits are chance, and quality is not measured. "
            "Give real images of the same kind that the model never saw: --heldout FOLDER."
        )
    if (source := _prompt_source(settings, training)) != "given":
        notes.append(f"Prompts are the {source}: the case in which copying is easiest.")
    for seen, name in ((generated.images, "generated"), (training, "training"), (heldout, "held-out")):
        if seen is not None and seen.unlisted:
            notes.append(
                f"{seen.unlisted} files in the folder of the {name} images hold or may hold images and were left out, as asked for "
                "(--unlisted ignore): nothing here is said of them."
            )
        notes += [f"Of the {name} images: {note}." for note in (seen.notes if seen is not None else ())]
        if seen is not None and seen.animated:
            notes.append(
                f"{len(seen.animated)} {name} images have several frames, of which only the first was looked at: "
                f"{one_line(seen.animated[0], 80)}{' and others' if len(seen.animated) > 1 else ''}."
            )
    captions = {caption for caption in training.captions if caption}
    if generated.prompts is not None and (untried := captions - set(generated.prompts)):
        notes.append(f"{len(untried)} of {len(captions)} different training captions were not tried as prompts.")
    if generated.prompts is None:
        notes.append("No prompts are known: every image is resampled by itself, as if no two came from one prompt.")
    if training.groups:
        rows = sum(len(group.rows) for group in training.groups)
        notes.append(
            f"{rows} of {len(training)} training images have duplicates ({len(training.groups)} groups); those of a group count as "
            "one: d2 is the distance to the nearest image of another group."
        )
    if settings.mirrored:
        notes.append("The mirror image of every image was searched for too, also of the held-out and training images.")
    if used is not None:
        notes.append(
            f"The training images were embedded before: vectors, duplicates and fingerprint are those of the stored embeddings. {used['compared']} "
            f"of the {len(training)} images were decoded and compared with them."
        )
        if coarse := [
            name for name, one in used["features"].items() if one["dtype"] != "float32" or one["device"] != device
        ]:
            notes.append(
                f"Stored embeddings of {', '.join(coarse)} were rounded to another precision, or computed on another kind of device than those "
                "of the generated images: distances differ in their last digits, and an exact copy is near 0 instead of at it."
            )
    notes.append(
        f"These are {n} images of one model: few copies among them do not prove that it never copies, and prompts that were not "
        "tried were not tried."
    )
    return notes


def _made(
    settings: AuditSettings, training: ImageDataset, heldout: ImageDataset | None, generated: Generated
) -> dict[str, object]:
    config = settings.sampling
    made: dict[str, object] = {**versions(), "seed": settings.seed}
    if config is not None:
        steps = (
            f"{config.scheduler or 'its own sampler'}, {config.num_inference_steps} steps, guidance {config.scale:g}"
        )
        above = "" if config.base_above is None else f", its base above noise level {config.base_above:g}"
        made["model"] = _model_name(config) + above
        made["sampling"] = f"{steps}, seed {config.seed}, {settings.num_images_per_prompt} images a prompt"
    made["weights of the network (sha256)"] = generated.weights or "not known"
    if generated.base_weights is not None:
        made["weights of the base's network (sha256)"] = generated.base_weights
    made["training images (sha256)"] = training.fingerprint()
    if heldout is not None:
        made["held-out images (sha256)"] = heldout.fingerprint()
    made["generated images (sha256)"] = generated.images.fingerprint()
    return made
