"""`ambient-sd audit`: how much of a model's output is copied from its training pictures, and how good the output is.

    OUT/generated/       the pictures, drawn under the guard for the training captions (`ambient_sd.sample`); not with --generated
    OUT/pictures.jsonl   one line a generated picture: prompt, score, nearest training picture by every feature, copy or not
    OUT/audit.json       figures with intervals, n and seeds; fingerprints of model and data; the verdict
    OUT/audit.html       the same to look at, with the most copied pictures beside their originals; one file, no script
    OUT/settings.json    what the folder belongs to: a run that was cut goes on, one of other pictures or another model is refused

Duplicates in the training set count as one picture in every search; mirror images are searched for unless told otherwise.
What is a copy is decided by the first feature: d1 / d2 < 1/3 for distances, its first threshold for similarities.

The share of copies that decides the exit status is the value itself, no end of its interval: every picture in it lies beside its
original on the page. A lower end would let a small audit pass on copies that it saw; an upper end would fail every small audit.

Above the wings: it uses data, guard and audit.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import platform
import shlex
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ambient_sd import __version__
from ambient_sd.audit.clip_score import ClipScore
from ambient_sd.audit.embedding import EmbeddingStore
from ambient_sd.audit.features import MIRROR, Features, embed
from ambient_sd.audit.metrics import (
    Figure,
    Measurement,
    Row,
    bootstrap,
    copied,
    copy_threshold,
    difference,
    measure,
)
from ambient_sd.audit.neighbours import Neighbours
from ambient_sd.audit.originals import one_of_each
from ambient_sd.audit.registry import DEFAULT, choose, labels
from ambient_sd.audit.registry import label as label_of
from ambient_sd.audit.report import (
    Histogram,
    Report,
    RunSection,
    TokenPull,
    find,
    make_samples,
    ratio_histogram,
    write_report,
)
from ambient_sd.audit.search import require_feature, search
from ambient_sd.audit.stored import missing_features, recall
from ambient_sd.data.sources import PictureSet, load_rows, not_listed, refuse_unlisted
from ambient_sd.data.stream import drawn
from ambient_sd.drawing import DrawSettings, digest, label, load, read_prompts
from ambient_sd.errors import UserError, one_line
from ambient_sd.files import finite, write_whole
from ambient_sd.sample import SampleSettings, sample

FORMAT = 1
_FILES = {"generated", "pictures.jsonl", "audit.json", "audit.html", "settings.json"}
_SHOWN = 24
_LIST = "samples.jsonl"  # of `ambient-sd sample`


@dataclass(frozen=True)
class Source:
    """Say where real pictures come from, in the words of `load_rows`."""

    place: str
    split: str | None = None
    row_filter: tuple[tuple[str, str, str], ...] = ()
    image_column: str = "image"
    caption_column: str = "text"
    unlisted: str = "refuse"

    def open(self, need_captions: bool) -> PictureSet:
        return load_rows(
            self.place, self.image_column, self.caption_column, self.split, row_filter=self.row_filter,
            need_captions=need_captions, unlisted=self.unlisted,
        )  # fmt: skip

    def public(self) -> dict[str, Any]:
        """Return it fit to be written down: of local places the last part of their name only."""
        return {"place": label(self.place), "split": self.split, "row_filter": ["".join(c) for c in self.row_filter]}


@dataclass(frozen=True)
class AuditSettings:
    """Say what is audited, against what, and how.

    Attributes:
        training: the pictures that the model was trained on.
        out: folder for everything.
        drawing: model and sampler, or None with `generated`.
        generated: folder of pictures made elsewhere: of `ambient-sd sample`, with metadata.jsonl, or of pictures alone.
        heldout: real pictures of the same kind that the model never saw; None: there is no background, no excess, no quality.
        prompts: file of prompts; None: the training captions.
        samples_per_prompt: pictures of each prompt.
        max_prompts: that many prompts at most, drawn by the seed; 0: all.
        features: names of `audit.registry`; the first decides what counts as a copy.
        files: weights of features by name.
        training_embeddings: folder of `audit.embedding` with the training pictures by every feature: they are not embedded again.
        clip: folder or hub id of a CLIP for the CLIP score, of transformers or, after `open_clip:`, of open_clip; None: none.
        judge: pipeline folder or hub id that judges how well pictures show their prompts (`audit.alignment`); None: none.
        mirrored: search for the mirror image of each picture too.
        attribution: for so many of the most copied prompts, which tokens pull; 0: none.
        limit: the audit fails if the share of copies exceeds this, or if another measure's excess over held-out pictures does
            with its whole interval; None: it never fails.
        seed: of choice of prompts and intervals (`drawing.seed` is that of the start noise).
        resamples: of every interval but those of quality, which take a tenth.
        unlisted: what becomes of files of `generated` that would not be read, as in `load_rows`; of the real pictures it is their
            `Source` that says so.
    """

    training: Source
    out: Path
    drawing: DrawSettings | None = None
    generated: Path | None = None
    heldout: Source | None = None
    prompts: str | None = None
    samples_per_prompt: int = 4
    max_prompts: int = 0
    features: tuple[str, ...] = DEFAULT
    files: Mapping[str, str | None] = field(default_factory=dict)
    training_embeddings: Path | None = None
    clip: str | None = None
    judge: str | None = None
    mirrored: bool = True
    attribution: int = 4
    limit: float | None = None
    seed: int = 0
    resamples: int = 1000
    unlisted: str = "refuse"

    def check(self) -> None:
        """Raise a `UserError` for what can be seen to be wrong without opening anything."""
        if (self.drawing is None) == (self.generated is None):
            raise UserError("a model and generated pictures are given " + ("both" if self.drawing else "neither"),
                            rule="an audit is of one of them")  # fmt: skip
        if self.samples_per_prompt < 1:
            raise UserError(f"samples_per_prompt is {self.samples_per_prompt}", rule="it must be at least 1")
        if abs(self.seed) >= 2**63:
            raise UserError(f"seed is {self.seed}", rule="it must be a whole number of at most 63 bits")
        for name in ("max_prompts", "attribution"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}", rule="it must be at least 0")
        if self.limit is not None and not 0 <= self.limit < 1:
            raise UserError(f"fail-over is {self.limit}", rule="it is a share of the pictures, from 0 to below 1")
        if self.generated is not None and self.prompts is not None:
            raise UserError("prompts with generated pictures", rule="their prompts are in the folder's own list")
        if self.drawing is not None:
            self.drawing.check()


@dataclass(frozen=True)
class Audit:
    """Hold the outcome: everything of `audit.json`, and whether the share of copies exceeds the limit."""

    found: dict[str, Any]
    exceeded: bool


@dataclass(frozen=True)
class Generated:
    """Hold generated pictures and what is known of each: prompt and score, None where nothing is."""

    pictures: PictureSet
    prompts: list[str] | None
    scores: list[float | None]
    weights: str | None = None
    base_weights: str | None = None

    @property
    def groups(self) -> Sequence[Hashable] | None:
        """Return the label by which pictures are resampled: their prompt; None, each by itself, where one prompt is all that is asked."""
        return None if self.prompts is None or len(set(self.prompts)) == 1 else self.prompts


class Images(Sequence[Image.Image]):
    """Show the pictures of a set, each decoded when it is asked for."""

    def __init__(self, rows: PictureSet) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._rows[i].image for i in range(*index.indices(len(self)))]
        picture = self._rows[index]
        if self._rows.keys and picture.key != self._rows.keys[index]:
            raise UserError(f"{picture.name} in {self._rows.source} is not the picture that it was",
                            remedy="leave the pictures alone while they are audited")  # fmt: skip
        return picture.image


@dataclass(frozen=True)
class MirrorVectors:
    """Embed the mirror images of the rows that are asked for."""

    images: Images
    feature: Features

    def gather(self, rows: Tensor) -> Tensor:
        """Return their vectors, float32 `(n, D)`."""
        return self.feature((ImageOps.mirror(self.images[row]) for row in rows.tolist()), progress=True)


def audit(settings: AuditSettings, command: str = "ambient-sd audit") -> Audit:
    """Draw what is missing, measure, and write everything into `settings.out`.

    Raises:
        UserError: settings, pictures or models cannot be used, or `out` belongs to something else or cannot be written.
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
            raise UserError(f"{settings.out} cannot be written", rule=str(error.strerror),
                            remedy="make room, or name another folder with --out; what is drawn is kept") from None  # fmt: skip
        raise


def _audit(settings: AuditSettings, command: str) -> Audit:
    begun = time.time()
    settings.check()
    _own(settings.out)
    own_prompts = settings.drawing is not None and settings.prompts is None
    device = _device(settings)
    stored = _stored(settings)
    training = settings.training.open(need_captions=own_prompts)
    heldout = None if settings.heldout is None else settings.heldout.open(need_captions=False)
    features = choose(settings.features, settings.files, device)
    compared = 0
    if stored:
        for feature in features:
            require_feature(stored[feature.name], feature)
        compared = recall(list(stored.values()), training, settings.seed, progress=True)
    else:
        training.check(progress=True, near_duplicates=True)
    if heldout is not None:
        heldout.check(progress=True)
    if len(set(training.noise_keys)) < 2:
        raise UserError(f"{len(set(training.noise_keys))} different training picture in {training.source}",
                        rule="the nearest is held against the second nearest", remedy="give the whole training set")  # fmt: skip
    if heldout is not None and (seen := len(set(heldout.keys) & set(training.keys))):
        raise UserError(f"{seen} of {len(heldout)} held-out pictures are training pictures",
                        rule="the background is what a model that never saw them would hit",
                        remedy="give other pictures, or the right split with --heldout_split")  # fmt: skip
    prompts = None if settings.drawing is None else _prompts(settings, training)
    existing = None if settings.generated is None else read_generated(settings.generated, settings.unlisted)
    _claim(settings, training, heldout, prompts, existing)
    known = prompts if existing is None else existing.prompts
    align = _aligners(settings, known, device)

    if settings.drawing is not None:
        assert prompts is not None
        folder = settings.out / "generated"
        sample(SampleSettings(settings.drawing, folder, prompts, settings.samples_per_prompt))
        generated = read_generated(folder)
    else:
        assert existing is not None
        generated = existing
    # Equal pictures have equal vectors: a set that repeats its pictures is embedded and searched once.
    different = list(range(len(training))) if stored else one_of_each(training.keys).tolist()
    of_training = Images(training if stored else training.subset(different))
    known_vectors: dict[str, Any] = dict(stored or embed(of_training, features, progress=True))
    if settings.mirrored:
        known_vectors |= {feature.name + MIRROR: MirrorVectors(of_training, feature) for feature in features}
    made, real = (
        None if rows is None else embed(Images(rows), features, progress=True, mirrored=settings.mirrored)
        for rows in (generated.pictures, heldout)
    )
    assert made is not None
    measured = measure(
        made, known_vectors, real, features, generated.groups, settings.seed,
        duplicates=[training.noise_keys[i] for i in different], mirrored=settings.mirrored, resamples=settings.resamples,
        search=partial(search, progress=True), quality_resamples=max(settings.resamples // 10, 10),
    )  # fmt: skip
    measured = _with_rows(measured, different)
    measured.rows.extend(row for one in align for row in one(generated, heldout))
    pulls = _pulls(settings, generated, measured.neighbours[features[0].name]) if settings.attribution else []
    used = _used(stored, compared, measured)
    return _write(settings, command, begun, training, heldout, generated, features, measured, pulls, used)


# --- what goes in ----------------------------------------------------------------------------------------------------


def _stored(settings: AuditSettings) -> dict[str, EmbeddingStore]:
    """Open the embeddings of the training pictures, by feature; none where none are given."""
    if settings.training_embeddings is None:
        return {}
    folder, source = settings.training_embeddings.expanduser(), settings.training
    names = dict(zip(labels(settings.features), settings.features, strict=True))
    if not (missing := missing_features(folder, list(names))):
        return {name: EmbeddingStore.open(folder / name) for name in names}
    words = ["accelerate", "launch", "-m", "ambient_sd.audit.embedding", source.place]
    if source.split is not None:
        words += ["--split", source.split]
    if source.unlisted != "refuse":
        words += ["--unlisted", source.unlisted]
    if source.row_filter:
        words += ["--row_filter", *("".join(condition) for condition in source.row_filter)]
    options = {"image_column": source.image_column, "caption_column": source.caption_column}
    given = {name: value for name, value in options.items() if value != getattr(Source, name)}
    given |= {name: file for name, file in settings.files.items() if file and label_of(name) in missing}
    given |= {"features": ",".join(names[name] for name in missing), "out": str(folder)}
    words += [word for name, value in given.items() for word in (f"--{name}", value)]
    raise UserError(f"{folder} holds no embeddings of {', '.join(missing)}", rule="an audit needs each of its features",
                    remedy=f"make them: {shlex.join(words)}")  # fmt: skip


def _used(stored: Mapping[str, EmbeddingStore], compared: int, measured: Measurement) -> dict[str, Any] | None:
    """Return what audit.json says of stored embeddings; None where there are none."""
    if not stored:
        return None
    return {
        "compared": compared,
        "features": {
            name: {"weights": store.about.weights, "dtype": store.about.dtype, "device": store.about.device,
                   "digest": store.digest, "exact": measured.neighbours[name].exact}
            for name, store in stored.items()
        },
    }  # fmt: skip


def _own(out: Path) -> None:
    """Refuse a folder that holds anything else, before anything is read."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {out}", rule="it must be a folder")
    if out.is_dir() and not (out / "settings.json").is_file():
        foreign = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
        if foreign:
            raise UserError(f"{out} holds {foreign[0]!r} and no settings.json", rule="an audit goes into a folder of its own",
                            remedy="name another with --out")  # fmt: skip


def _claim(
    settings: AuditSettings, training: PictureSet, heldout: PictureSet | None, prompts: Sequence[str] | None,
    existing: Generated | None,
) -> None:  # fmt: skip
    """Write what the folder belongs to, or refuse to go on with something else; figures may be made again in other ways."""
    given: dict[str, Any] = {
        "training": training.fingerprint(),
        "heldout": None if heldout is None else heldout.fingerprint(),
        "prompts": None if prompts is None else digest(prompts),
        "samples_per_prompt": None if prompts is None else settings.samples_per_prompt,
        "drawing": None if settings.drawing is None else settings.drawing.public(),
        "generated": None if existing is None else existing.pictures.fingerprint(),
    }
    path = settings.out / "settings.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["given"]
            other = next((name for name in given if before[name] != given[name]), None)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not an audit's", remedy="name another folder with --out") from None
        if other is not None:
            shown = {"training": "the training pictures are others", "heldout": "the held-out pictures are others",
                     "prompts": "the prompts are others", "generated": "the generated pictures are others"}  # fmt: skip
            raise UserError(f"{settings.out} belongs to another audit: {shown.get(other, f'{other} differs')}",
                            rule="a folder holds one audit", remedy="name another with --out")  # fmt: skip
        return
    write_whole(path, json.dumps({"given": given}, indent=1) + "\n")


def _prompts(settings: AuditSettings, training: PictureSet) -> list[str]:
    """Return the prompts to draw: each once, in their order, or as many of them as wanted, drawn by the seed."""
    given = training.captions if settings.prompts is None else read_prompts(settings.prompts)
    prompts = list(dict.fromkeys(given))
    if settings.max_prompts and settings.max_prompts < len(prompts):
        prompts = [prompts[i] for i in drawn(len(prompts), settings.max_prompts, settings.seed, "audit prompts")]
    return prompts


def _device(settings: AuditSettings) -> str:
    given = settings.drawing.device if settings.drawing is not None else None
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def read_generated(folder: Path, unlisted: str = "refuse") -> Generated:
    """Open a folder of generated pictures: of `ambient-sd sample`, with metadata.jsonl or .csv, or of pictures alone.

    Args:
        folder: the pictures.
        unlisted: what becomes of images in it that would not be read, as in `load_rows`.

    Raises:
        UserError: there is no such folder, it holds no pictures, one cannot be read or would be left out, or its list is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", remedy="give a folder of generated pictures")
    listing = folder / _LIST
    if not listing.is_file():
        rows = load_rows(folder, need_captions=False, local=True, unlisted=unlisted).check(progress=True)
        prompts = rows.captions if any(rows.captions) else None
        return Generated(rows, prompts, [None] * len(rows))
    records = []
    try:
        for line in listing.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                record = json.loads(line)
                name, prompt, score = record["file"], record["prompt"], record.get("score")
                if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(prompt, str):
                    raise ValueError(f"{one_line(name, 60)!r} is no picture of this folder")
                of, above = record.get("weights"), record.get("base_weights")
                if not all(value is None or isinstance(value, str) for value in (of, above)):
                    raise ValueError("weights are no text")
                records.append((str(name), prompt, None if score is None else float(score), (of, above)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{listing} cannot be read", rule=one_line(f"{type(error).__name__}: {error}", 160)) from None
    if not records:
        raise UserError(f"{listing} names no picture", rule="at least one is needed")
    names = [name for name, *_ in records]
    left = not_listed(folder, names, listing)
    if left and unlisted != "ignore":
        raise refuse_unlisted(folder, left)
    rows = PictureSet([folder / name for name in names], [r[1] for r in records], names, str(folder)).check(True)
    rows.unlisted = len(left)
    drawn_by = {r[3] for r in records}
    weights, base_weights = drawn_by.pop() if len(drawn_by) == 1 else (None, None)
    return Generated(rows, rows.captions, [r[2] for r in records], weights, base_weights)


Aligner = Callable[[Generated, PictureSet | None], list[Row]]


def _aligners(settings: AuditSettings, prompts: Sequence[str] | None, device: str) -> list[Aligner]:
    """Load what measures how well pictures show their prompts, before anything is drawn."""
    for name in ("clip", "judge"):
        if getattr(settings, name) is not None and prompts is None:
            raise UserError(f"{name} for pictures without prompts", rule="it measures how well a picture shows its prompt",
                            remedy=f"leave --{name} out, or give the prompts in metadata.jsonl")  # fmt: skip
    found: list[Aligner] = []
    if settings.clip is not None:
        score = ClipScore(settings.clip, device=device)
        detail = f"more is better; cosine of picture and prompt, {label(settings.clip)}"

        def clip(generated: Generated, heldout: PictureSet | None) -> list[Row]:
            return [_aligned(settings, generated, heldout, lambda p, c: score(p, c, True), score.name, detail)]

        found.append(clip)
    if settings.judge is not None:
        from ambient_sd.audit.alignment import DiffusionAlignment

        pipe = load(
            dataclasses.replace(
                settings.drawing or DrawSettings(""),
                model=settings.judge,
                adapter=None,
                base_above=None,
                base=None,
                scheduler=None,
                device=device,
            )
        )
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        judge = DiffusionAlignment(pipe, resolution=pipe.unet.config.sample_size * factor, seed=settings.seed)
        assert prompts is not None
        judge.choose(prompts[:1], prompts)  # are there others to hold a prompt against?
        told = f"more is better; error with other prompts minus error with its own, judged by {label(settings.judge)}"

        def aligned(generated: Generated, heldout: PictureSet | None) -> list[Row]:
            return [
                _aligned(settings, generated, heldout, lambda p, c: judge(p, c).value * 1000, "alignment x 1000", told)
            ]

        found.append(aligned)
    return found


def _aligned(
    settings: AuditSettings,
    generated: Generated,
    heldout: PictureSet | None,
    score: Callable[[Images, list[str]], Tensor],
    name: str,
    detail: str,
) -> Row:
    """Estimate a mean score of pictures with their prompts, beside that of held-out pictures with their captions."""
    options: dict[str, Any] = {"name": name, "seed": settings.seed, "resamples": settings.resamples, "detail": detail}
    assert generated.prompts is not None
    made = bootstrap(
        score(Images(generated.pictures), generated.prompts), torch.mean, groups=generated.groups, **options
    )
    if heldout is None or not all(heldout.captions):
        return Row(name, made, None, None)
    real = bootstrap(score(Images(heldout), heldout.captions), torch.mean, **options)
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
        f"{feature.name} > {copy_threshold(feature)}" if feature.distance == "cosine" else f"memorized-{feature.name}"
    )


def _pulls(settings: AuditSettings, generated: Generated, near: Neighbours) -> list[TokenPull]:
    """Return the pull of the tokens of the most copied prompts, by the mean rank of their pictures."""
    from ambient_sd.guard.attribution import attribute

    drawing = settings.drawing
    if drawing is None or generated.prompts is None or drawing.guidance_scale <= 1:  # without guidance no prompt pulls
        return []
    rank = -near.similarity if near.metric == "cosine" else near.ratio
    ranks: dict[str, list[float]] = {}
    for prompt, value in zip(generated.prompts, rank.tolist(), strict=True):
        ranks.setdefault(prompt, []).append(value)
    order = sorted(ranks, key=lambda prompt: (sum(ranks[prompt]) / len(ranks[prompt]), prompt))
    pipe = load(drawing)
    sampling = drawing.sampling(pipe)
    pulls = []
    for prompt in order[: settings.attribution]:
        try:
            seen = attribute(
                pipe, prompt, num_inference_steps=drawing.num_inference_steps, seed=drawing.seed,
                guidance_scale=drawing.guidance_scale, height=sampling.height, width=sampling.width,
            )  # fmt: skip
        except (
            UserError
        ) as error:  # a pipeline or precision that it does not know: the audit has its figures all the same
            print(f"ambient-sd: no token attribution: {error}", flush=True)
            break
        what = "mean d1/d2" if near.metric == "euclidean" else "mean similarity"
        mean = abs(sum(ranks[prompt]) / len(ranks[prompt]))
        note = f"{what} of its {len(ranks[prompt])} pictures: {mean:.2f}"
        pulls.append(TokenPull(prompt, seen.tokens, seen.scores, seen.padding_score, note))
    return pulls


def _write(
    settings: AuditSettings,
    command: str,
    begun: float,
    training: PictureSet,
    heldout: PictureSet | None,
    generated: Generated,
    features: Sequence[Features],
    measured: Measurement,
    pulls: Sequence[TokenPull],
    used: Mapping[str, Any] | None,
) -> Audit:
    deciding = features[0]
    name = copies_row(deciding)
    share = measured.row(name).generated
    others = [] if settings.limit is None else _certainly_above(settings.limit, measured, name)
    verdict: dict[str, Any] = {
        "measure": name, "value": share.value, "bound": "value", "limit": settings.limit, "others": others,
        "exceeded": None if settings.limit is None else share.value > settings.limit or bool(others),
    }  # fmt: skip
    report = _report(settings, command, training, heldout, generated, features, measured, pulls, verdict, used)
    finding = find(report)
    found = {
        "format": FORMAT,
        "finding": dataclasses.asdict(finding),
        "verdict": verdict,
        "model": None
        if settings.drawing is None
        else {**settings.drawing.public(), "weights": generated.weights, **_of_base(generated)},
        "pictures": {
            "generated": {
                "n": len(generated.pictures), "fingerprint": generated.pictures.fingerprint(),
                "prompts": None if generated.prompts is None else len(set(generated.prompts)),
                "samples_per_prompt": None if settings.drawing is None else settings.samples_per_prompt,
                "source": "training captions" if settings.drawing is not None and settings.prompts is None else "given",
                "weights": generated.weights, "unlisted": generated.pictures.unlisted,
            },
            "training": {**settings.training.public(), **_counted(training), "groups_of_duplicates": len(training.groups),
                         "embeddings": used},
            "heldout": None if heldout is None or settings.heldout is None
            else {**settings.heldout.public(), **_counted(heldout)},
        },
        "features": {f.name: {"distance": f.distance, "copy": copies_row(f), **_file(f)} for f in features},
        "mirrored": settings.mirrored,
        "duplicates_of_one_picture_count_once": True,
        "seed": settings.seed,
        "resamples": settings.resamples,
        "measures": [_row(row) for row in measured.rows],
        "tokens": [dataclasses.asdict(pull) for pull in pulls],
        "notes": list(report.notes),
        "made": {**_versions(), "command": command, "device": _device(settings), "seconds": round(time.time() - begun, 1)},
    }  # fmt: skip
    lines = _lines(training, generated, features, measured)
    write_whole(settings.out / "pictures.jsonl", "".join(json.dumps(finite(line)) + "\n" for line in lines))
    write_report(settings.out / "audit.html", report)
    # Last: where it lies, the others are whole.
    write_whole(settings.out / "audit.json", json.dumps(finite(found), indent=1, allow_nan=False) + "\n")
    return Audit(found, bool(verdict["exceeded"]))


def _of_base(generated: Generated) -> dict[str, str]:
    return {} if generated.base_weights is None else {"base_weights": generated.base_weights}


def _certainly_above(limit: float, measured: Measurement, deciding: str) -> list[str]:
    """Return the other shares of copies whose excess over held-out pictures is above the limit with its whole interval.

    A gate that looks at pixels alone would open for copies in other colours, which the page's first sentence calls copies.
    """
    return [
        row.name
        for row in measured.rows
        if row.name.startswith("memorized-")
        and row.name != deciding
        and row.excess is not None
        and row.excess.low > limit
    ]


def _counted(rows: PictureSet) -> dict[str, Any]:
    return {
        "n": len(rows), "different": len(set(rows.noise_keys)), "fingerprint": rows.fingerprint(), "unlisted": rows.unlisted,
    }  # fmt: skip


def _file(feature: Features) -> dict[str, str]:
    """Return the digest of a feature's weights where the file is the user's."""
    path = getattr(feature, "path", None)
    known = getattr(feature, "digest", None) or (
        hashlib.sha256(Path(path).read_bytes()).hexdigest() if path is not None else None
    )
    return {} if known is None else {"weights": str(known)}


def _row(row: Row) -> dict[str, Any]:
    parts: dict[str, Figure | None] = {
        "generated": row.generated, "heldout": row.heldout, "excess": row.excess, "background": row.background,
    }  # fmt: skip
    return {"name": row.name, **{side: None if f is None else f.as_dict() for side, f in parts.items()}}


def _lines(
    training: PictureSet, generated: Generated, features: Sequence[Features], measured: Measurement
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
            "name": generated.pictures.names[i],
            "prompt": None if generated.prompts is None else generated.prompts[i],
            "score": generated.scores[i],
            "copy": columns[0][i]["copy"],
            "nearest": {feature.name: column[i] for feature, column in zip(features, columns, strict=True)},
        }
        for i in range(len(generated.pictures))
    ]


def _report(
    settings: AuditSettings,
    command: str,
    training: PictureSet,
    heldout: PictureSet | None,
    generated: Generated,
    features: Sequence[Features],
    measured: Measurement,
    pulls: Sequence[TokenPull],
    verdict: Mapping[str, Any],
    used: Mapping[str, Any] | None,
) -> Report:
    deciding = features[0]
    near = measured.neighbours[deciding.name]
    cosine = deciding.distance == "cosine"
    rank = -near.similarity if cosine else near.ratio
    shown = rank.argsort(stable=True)[: 3 * _SHOWN].tolist()
    # Only what is shown is decoded again.
    decoded = Images(training)
    originals = {row: decoded[row] for row in {int(near.index[i, 0]) for i in shown}}
    picked = Neighbours(near.distance[shown], near.index[shown], near.metric)
    samples = make_samples(
        [generated.pictures[i].image for i in shown],
        ["" if generated.prompts is None else generated.prompts[i] for i in shown],
        _Sparse(originals, len(training)),
        picked,
        scores=[generated.scores[i] for i in shown],
        training_prompts=training.captions,
        threshold=copy_threshold(deciding) if cosine else None,
    )
    name = "this folder" if settings.drawing is None else _model_name(settings.drawing)
    run = RunSection(
        name=name,
        objective="",
        figures=measured.rows,
        samples=samples,
        features=deciding.name,
        counted=(int(copied(deciding, near).sum()), len(generated.pictures)),
    )
    quality = next((row.name for row in measured.rows if row.name.startswith("FD-")), "")
    return Report(
        title=f"Audit of {name} against {len(training)} training pictures",
        command=command,
        runs=[run],
        training_n=len(training),
        copies=copies_row(deciding),
        quality=quality,
        histograms=[_histogram(f, measured, name) for f in features],
        tokens=pulls,
        made=_made(settings, training, heldout, generated),
        notes=_notes(settings, training, heldout, generated, measured.row(copies_row(deciding)), verdict, used),
        shown=_SHOWN,
    )


def _model_name(drawing: DrawSettings) -> str:
    return label(drawing.model) + (f" with {label(drawing.adapter)}" if drawing.adapter else "")


class _Sparse(Sequence[Image.Image]):
    """Stand for all training pictures where only some are asked for."""

    def __init__(self, images: Mapping[int, Image.Image], length: int) -> None:
        self._images, self._length = images, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        return self._images[index]


def _histogram(feature: Features, measured: Measurement, name: str) -> Histogram:
    sets = (
        (name, "run0", measured.neighbours.get(feature.name)),
        ("held-out, never seen", "held", measured.heldout_neighbours.get(feature.name)),
        ("training pictures among themselves", "train", measured.training_neighbours.get(feature.name)),
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
        f"cosine to the most similar training picture, share of pictures; copies lie right of {cut:g}.",
        rows, cut, f"{cut:g}", low=0.0 if least >= 0 else -1.0, high=1.0, below=False,
    )  # fmt: skip


def _notes(
    settings: AuditSettings, training: PictureSet, heldout: PictureSet | None, generated: Generated, copies: Row,
    verdict: Mapping[str, Any], used: Mapping[str, Any] | None,
) -> list[str]:  # fmt: skip
    share, n, device = copies.generated, len(generated.pictures), torch.device(_device(settings)).type
    notes = []
    if settings.limit is not None:
        said = (
            "fails: it exceeds"
            if share.value > settings.limit
            else "does not exceed"
            if verdict["others"]
            else "passes: it does not exceed"
        )
        notes.append(
            f"The audit {said} the limit of {settings.limit:.2%} (share of copies by {share.name}, {share.value:.2%} of {n}; the value "
            f"itself is held against the limit). By its interval up to {share.high:.2%} would be no surprise."
        )
        if verdict["others"]:
            notes.append(
                f"The audit fails by {' and '.join(verdict['others'])}: the excess over held-out pictures is above the limit with its whole interval."
            )
    if heldout is None:
        notes.append(
            "No held-out pictures were given: nothing says how many hits are chance, and quality is not measured. "
            "Give real pictures of the same kind that the model never saw: --heldout FOLDER."
        )
    if settings.drawing is not None and settings.prompts is None:
        notes.append("Prompts are the training captions: the case in which copying is easiest.")
    for seen, name in ((generated.pictures, "generated"), (training, "training"), (heldout, "held-out")):
        if seen is not None and seen.unlisted:
            notes.append(
                f"{seen.unlisted} files in the folder of the {name} pictures hold or may hold images and were left out, as asked for "
                "(--unlisted ignore): nothing here is said of them."
            )
        if seen is not None and seen.animated:
            notes.append(
                f"{len(seen.animated)} {name} pictures have several frames, of which only the first was looked at: "
                f"{one_line(seen.animated[0], 80)}{' and others' if len(seen.animated) > 1 else ''}."
            )
    captions = {caption for caption in training.captions if caption}
    if generated.prompts is not None and (untried := captions - set(generated.prompts)):
        notes.append(f"{len(untried)} of {len(captions)} different training captions were not tried as prompts.")
    if generated.prompts is None:
        notes.append("No prompts are known: every picture is resampled by itself, as if no two came from one prompt.")
    if training.groups:
        rows = sum(len(group.rows) for group in training.groups)
        notes.append(
            f"{rows} of {len(training)} training pictures have duplicates ({len(training.groups)} groups); those of a group count as "
            "one: d2 is the distance to the nearest picture of another group."
        )
    if settings.mirrored:
        notes.append(
            "The mirror image of every picture was searched for too, also of the held-out and training pictures."
        )
    if used is not None:
        notes.append(
            f"The training pictures were embedded before: vectors, duplicates and fingerprint are those of the stored embeddings. {used['compared']} "
            f"of the {len(training)} pictures were decoded and compared with them."
        )
        if coarse := [
            name for name, one in used["features"].items() if one["dtype"] != "float32" or one["device"] != device
        ]:
            notes.append(
                f"Stored embeddings of {', '.join(coarse)} were rounded to another precision, or computed on another kind of device than those "
                "of the generated pictures: distances differ in their last digits, and an exact copy is near 0 instead of at it."
            )
        if missed := [name for name, one in used["features"].items() if not one["exact"]]:
            notes.append(
                f"The search by {', '.join(missed)} went through an index and can miss a neighbour: no pair is called more alike than it "
                "is, but a missed nearest picture hides a copy."
            )
    notes.append(
        f"These are {n} pictures of one model: few copies among them do not prove that it never copies, and prompts that were not "
        "tried were not tried."
    )
    return notes


def _made(
    settings: AuditSettings, training: PictureSet, heldout: PictureSet | None, generated: Generated
) -> dict[str, object]:
    drawing = settings.drawing
    made: dict[str, object] = {**_versions(), "seed": settings.seed}
    if drawing is not None:
        steps = f"{drawing.scheduler or 'its own sampler'}, {drawing.num_inference_steps} steps, guidance {drawing.guidance_scale:g}"
        above = "" if drawing.base_above is None else f", its base above noise level {drawing.base_above:g}"
        made["model"] = _model_name(drawing) + above
        made["sampling"] = f"{steps}, seed {drawing.seed}, {settings.samples_per_prompt} pictures a prompt"
    made["weights of the U-Net (sha256)"] = generated.weights or "not known"
    if generated.base_weights is not None:
        made["weights of the base's U-Net (sha256)"] = generated.base_weights
    made["training pictures (sha256)"] = training.fingerprint()
    if heldout is not None:
        made["held-out pictures (sha256)"] = heldout.fingerprint()
    made["generated pictures (sha256)"] = generated.pictures.fingerprint()
    return made


def _versions() -> dict[str, str]:
    import diffusers
    import transformers

    return {
        "ambient_sd": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip
