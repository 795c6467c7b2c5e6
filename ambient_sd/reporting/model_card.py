"""The model card beside trained weights: what they are, what was measured, how to use them; nothing of this machine.

The run leaves `card.json`, the facts that a card needs, and README.md made from it. Pushing makes the card anew from the
facts, for then an audit may exist and the repository has a name. Whatever a user wrote (captions, prompts, names of
folders) is text to a reader of Markdown, HTML and YAML, never structure. It measures nothing and opens no weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.repocard import REGEX_YAML_BLOCK

import ambient_sd
from ambient_sd.audit.record import FILE_NAME as AUDIT_NAME
from ambient_sd.audit.record import AuditRecord
from ambient_sd.guard.calibration import FILE_NAME as THRESHOLD_NAME
from ambient_sd.guard.calibration import Calibration
from ambient_sd.reporting.report import show
from ambient_sd.training.config import LORA_KINDS, TrainConfig
from ambient_sd.training.record import CURVE_NAME
from ambient_sd.training.validation import read_scores
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.json_schema import load_json
from ambient_sd.utils.weight_files import adapter_files, network_files

if TYPE_CHECKING:
    from ambient_sd.data.sources import ImageDataset
    from ambient_sd.families.base import Base
    from ambient_sd.objective import AmbientObjective
    from ambient_sd.training import RunRecord

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
CARD_NAME, FACTS_NAME = "README.md", "card.json"
# `--out MODEL/audit`, and a copy of its audit.json beside the weights.
AUDIT_PLACES = (f"audit/{AUDIT_NAME}", AUDIT_NAME)
PLACEHOLDER = "THIS_FOLDER"  # the snippet's name of the weights until a repository has one
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LINK = re.compile(r"https?://[\w./~%#?=&+-]{1,300}", re.ASCII)
_UNKNOWN = {"license": "other", "license_name": "unknown-see-the-base"}
_SHOWN_PROMPTS = 12
_LARGEST = 16 * 2**20  # bytes of card.json
# Settings that change what the loss is or sees; a card names those that are not at their defaults.
_LOSS = ("snr_gamma", "weighting_scheme", "logit_mean", "logit_std", "noise_offset", "input_perturbation", "memorization_threshold", "agc", "dropped_mean",
         "caption_mitigation", "caption_mitigation_p", "caption_noise_std", "caption_dropout", "random_flip",
         "with_prior_preservation", "class_prompt", "num_class_images", "prior_loss_weight")  # fmt: skip
_STAMP = re.compile(r"\n*<!-- ambient_sd card ([0-9a-f]{64})[^\n]*-->\s*$")


@dataclass(frozen=True)
class Facts:
    """Hold what a card says of a run; all of it may be published.

    Attributes:
        base: public name of the base model; base_id: the same if the hub has it, else None.
        licence: license, license_name, license_link of the base, as in a card's head.
        objective: ambient, plain, gap, weighted or distill; level: s_n or the gap's lower edge; timestep: where `level` lies on the base's
            schedule of `timesteps` steps, None below its first.
        pipeline: the class that samples it, of this package or of diffusers; vae: public name of a VAE that stood in for the base's own, else None.
        lora: rank, alpha, dropout, dora, targets; None for a full fine-tune.
        batch: samples per optimizer step.
        images: how many; distinct: without exact copies; groups: near-duplicate groups, None where not looked for;
            grouped: images in them; captioned: those with a caption; fingerprint: SHA-256 over images and captions.
        dataset: hub id of the images, None if they are local.
        prompts: of the validation images, one row of the sheet each.
        finished: seconds since 1970; a threshold that is older was of other weights.
        level_proposed: `level` was measured on the images, not given.
        also: other settings of the loss that are not at their defaults, by flag.
        base_files: SHA-256 of the base's U-Net by file, for a LoRA: an audit of it on another base says nothing of this one.
        kept: where `--keep best` chose the step: what it says of that.
    """

    base: str
    base_id: str | None
    licence: dict[str, str]
    objective: str
    prediction_type: str
    level: float
    timestep: float | None
    timesteps: int
    gap_upper: float | None
    distill_level: float | None
    reweight: int | None
    pipeline: str
    vae: str | None
    lora: dict[str, Any] | None
    averaged: bool
    steps: int
    batch: int
    learning_rate: float
    lr_scheduler: str
    resolution: int
    images: int
    distinct: int
    groups: int | None
    grouped: int
    captioned: int
    fingerprint: str
    dataset: str | None
    prompts: list[str]
    finished: float
    fresh_copies: bool = False  # absent from the files of earlier versions, as what follows
    level_proposed: bool = False
    also: dict[str, Any] = dataclasses.field(default_factory=dict)
    base_files: dict[str, str] = dataclasses.field(default_factory=dict)
    kept: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Facts | None:
        """Return the facts of the run that filled `folder`, or None where it left none.

        Raises:
            UserError: the file is damaged.
        """
        path = folder / FACTS_NAME
        if not path.is_file():
            return None
        try:
            facts = cls(**load_json(path, _LARGEST), finished=path.stat().st_mtime)
            facts._check()
        except (OSError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300],
                            remedy=f"remove it: {CARD_NAME} then goes as it is") from None  # fmt: skip
        return facts

    def write(self, folder: Path) -> None:
        """Write the facts to `folder`; when they were written is the file's own time, so that equal runs leave equal files."""
        facts = dataclasses.asdict(self)
        del facts["finished"]
        text = json.dumps(facts, indent=1, ensure_ascii=True)
        (folder / FACTS_NAME).write_text(text + "\n", encoding="utf-8")

    def _check(self) -> None:
        """Refuse values of other kinds than `describe_run` gives: the card trusts them."""
        for name, hint in get_type_hints(type(self)).items():
            kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            allowed = tuple(
                kind for each in kinds for kind in ((int, float) if each is float else (get_origin(each) or each,))
            )
            if not isinstance(getattr(self, name), allowed):
                raise TypeError(f"{name} is {one_line(repr(getattr(self, name)), 40)}")
        if not self.pipeline.isidentifier():
            raise ValueError("pipeline is no name of a class")
        numbers = [value for value in vars(self).values() if isinstance(value, (int, float))]
        if not all(abs(number) <= sys.float_info.max for number in numbers) or self.images < 1:
            raise ValueError("a number is out of range")
        if any(not isinstance(p, str) for p in self.prompts) or any(
            name is not None and not HUB_ID.fullmatch(name) for name in (self.base_id, self.dataset)
        ):
            raise ValueError("a name or prompt is none")
        if self.lora is not None:
            for name, to in {"rank": int, "alpha": float, "dropout": float, "dora": bool, "targets": list}.items():
                to(self.lora[name])
            if not all(
                isinstance(self.lora.get(n), t)
                for n, t in {
                    "start": str | None,
                    "init": str | None,
                    "kind": str | None,
                    "quantized": str | None,
                    "min_rank": int | None,
                }.items()
            ):
                raise TypeError("lora")
        if self.licence != _clean_licence(self.licence, None):
            raise ValueError("licence is none")
        if any(not isinstance(digest, str) for digest in self.base_files.values()):
            raise TypeError("base_files")


def describe_run(
    config: TrainConfig,
    *,
    base: Base,
    objective: AmbientObjective,
    images: ImageDataset,
    prompts: Sequence[str],
    steps: int,
    batch: int,
    level_proposed: bool = False,
    kept: str | None = None,
) -> Facts:
    """Gather what the card will say; asks the hub for the licence of a base that lies there.

    Args:
        config: the run's settings; no path of it is used.
        base: the base model.
        objective: the loss on the base's schedule.
        images: the training images, checked.
        prompts: of the validation images.
        steps: optimizer steps done in all.
        batch: samples per optimizer step.
        level_proposed: the level was measured on the images.
        kept: which evaluation the weights are of, and why.
    """
    local = Path(base.name).exists()
    base_id = base.name if not local and HUB_ID.fullmatch(base.name) else None
    source = config.dataset_name
    known = source is not None and HUB_ID.fullmatch(source) and not Path(source).exists()
    try:
        timestep = objective.schedule.timestep(objective.level)
    except UserError:  # level 0, below the first timestep
        timestep = None
    looked = config.near_duplicates == "share" and objective.level > 0
    return Facts(
        base=one_line(base.label, 100),
        base_id=base_id,
        licence=read_licence(base),
        objective=config.objective,
        prediction_type=objective.prediction_type,
        level=float(objective.level),
        timestep=timestep,
        timesteps=objective.schedule.num_train_timesteps,
        gap_upper=config.gap_upper,
        distill_level=objective.distill_level,
        reweight=config.reweight,
        pipeline=base.family.guarded or base.family.pipeline,
        vae=_public(config.pretrained_vae_model_name_or_path, "another VAE"),
        lora=None
        if not config.lora
        else {"rank": config.rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "dora": config.use_dora, "min_rank": config.lora_min_rank,
              "targets": list(config.lora_target_modules or ()), "start": _public(config.lora_weights, "another adapter"),
              "init": config.lora_init, "kind": LORA_KINDS[config.lora_kind or "lora"], "rslora": config.use_rslora, "quantized": config.quantize_base, "text": config.train_text_encoder},
        averaged=config.use_ema,
        fresh_copies=config.fresh_copies,
        level_proposed=level_proposed,
        kept=kept,
        also=given_settings(config),
        base_files=network_files(base.name, revision=base.revision, variant=base.variant, cache_dir=base.cache_dir) if config.lora else {},
        steps=steps,
        batch=batch,
        learning_rate=config.learning_rate * (batch if config.scale_lr else 1),
        lr_scheduler=config.lr_scheduler,
        resolution=config.resolution,
        images=len(images),
        distinct=len(set(images.keys)),
        groups=len(images.groups) if looked else None,
        grouped=sum(len(group.rows) for group in images.groups),
        captioned=sum(bool(caption.strip()) for caption in images.captions),
        fingerprint=images.fingerprint(),
        dataset=source if known else None,
        prompts=list(prompts),
        finished=time.time(),
    )  # fmt: skip


def given_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of the loss besides its objective that are not at their defaults, by flag."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name in _LOSS and getattr(config, f.name) not in (None, f.default)
    }


def _public(name: str | None, local: str) -> str | None:
    """Return a hub id as it is, and for what lies on this machine the words `local`."""
    return None if name is None else name if HUB_ID.fullmatch(name) and not Path(name).exists() else local


def write_run_card(record: RunRecord) -> None:
    """Write card.json and README.md of a finished training beside its result.

    The weights are on disk by then: what goes wrong here is a warning.
    """
    plan = record.plan
    try:
        facts = describe_run(
            plan.config, base=plan.base, objective=plan.objective, images=plan.images, prompts=plan.prompts,
            steps=record.steps if record.kept is None else record.kept.step or record.steps, batch=record.global_batch,
            level_proposed=plan.level_reason is not None, kept=None if record.kept is None else record.kept.describe(),
        )  # fmt: skip
        write_card(record.output, facts)
    except Exception as error:
        logger.warning("no model card: %s; the results in %s are whole", one_line(error, 300), record.output)


def write_card(folder: Path, facts: Facts) -> None:
    """Write card.json and README.md to `folder`; a README.md that a person wrote or edited stays."""
    facts.write(folder)
    path = folder / CARD_NAME
    if path.exists() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        logger.warning("%s was written or edited by hand and stays as it is; remove it for a card of this run", path)
        return
    try:
        text = make_card(facts, folder)
    except UserError as error:  # what lies here from earlier must not end a training that is done
        logger.warning("left out of %s: %s", path, error)
        text = make_card(facts, folder, measured=False)
    path.write_text(text, encoding="utf-8")


def is_ours(text: str) -> bool:
    """Tell whether a card is as this module wrote it, by the SHA-256 in its last line."""
    found = _STAMP.search(text.replace("\r\n", "\n"))
    return found is not None and found[1] == _digest(text)


def make_card(
    facts: Facts, folder: Path, *, repo: str | None = None, revision: str | None = None, measured: bool = True
) -> str:
    """Return the text of a card.

    Args:
        facts: of the run.
        folder: holds the results; validation images, an audit and a threshold are looked for there.
        repo: owner/name that the card will lie in, checked; None: on this machine.
        revision: branch of it.
        measured: say what an audit and the guard measured here.

    Raises:
        UserError: an audit or the guard's scores are there and cannot be read.
    """
    sheet = _sheet(facts, folder)
    audit, left_out = _find_audit(facts, folder) if measured else (None, [])
    unknown = facts.licence == _UNKNOWN
    card = ModelCard.from_template(
        _head(facts, audit, repo), template_path=str(_TEMPLATE), facts=facts, inline=inline, code=_code(facts, repo, revision), repo=repo,
        placeholder=PLACEHOLDER, licence=None if unknown else facts.licence, settings={k: v for k, v in facts.also.items() if k in _LOSS},
        audit=None if audit is None else _audit_facts(audit), left_out=left_out, threshold=_threshold(facts, folder) if measured else None,
        threshold_name=THRESHOLD_NAME, sheet=sheet, step=None if sheet is None else Path(sheet).stem.removeprefix("step-"),
        curve=CURVE_NAME if facts.kept and (folder / CURVE_NAME).is_file() else None,
        shown_prompts=_SHOWN_PROMPTS, scores=[] if sheet is None or not measured else _scores(sheet, folder),
    )  # fmt: skip
    return _stamped(str(card))


def renamed(text: str, repo: str) -> str:
    """Return a card with the name of its repository in the snippet, its stamp renewed if it had a true one."""
    named = text.replace(PLACEHOLDER, repo)
    return _stamped(_STAMP.sub("", named)) if is_ours(text) else named


def inline(text: object, limit: int = 200) -> str:
    """Return text for a paragraph, heading or table cell that no reader of Markdown or HTML takes for markup.

    Control characters and those that turn the direction of writing become spaces, what is longer than `limit` is cut, and
    every ASCII sign but space, comma and a hyphen or underscore inside a word becomes a numeric entity.
    """
    flat = one_line(text, limit)
    return "".join(
        c if not c.isascii() or c.isalnum() or c in " ," or (c in "-_" and _inside(flat, i)) else f"&#{ord(c)};"
        for i, c in enumerate(flat)
    )


def _inside(text: str, place: int) -> bool:
    return text[place - 1 : place].isalnum() and text[place + 1 : place + 2].isalnum()


def _stamped(text: str) -> str:
    return (
        f"{text.rstrip()}\n\n<!-- ambient_sd card {_digest(text)}: written by the trainer, and anew by it as long as nobody has "
        "edited this page -->\n"
    )


def _digest(text: str) -> str:
    body = _STAMP.sub("", text.replace("\r\n", "\n")).strip()
    return hashlib.sha256(body.encode("utf-8", errors="replace")).hexdigest()


def _head(facts: Facts, audit: AuditRecord | None, repo: str | None) -> ModelCardData:
    tags = ["stable-diffusion", "text-to-image", "diffusers", "ambient-sd", *(["lora"] if facts.lora else [])]
    return ModelCardData(
        license=facts.licence.get("license"),
        license_name=facts.licence.get("license_name"),
        license_link=facts.licence.get("license_link"),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=facts.base_id,
        base_model_relation=None if facts.base_id is None else "adapter" if facts.lora else "finetune",
        datasets=None if facts.dataset is None else [facts.dataset],
        tags=tags,
        model_name=None if audit is None else repo or PLACEHOLDER,
        eval_results=None if audit is None else _results(facts, audit),
    )


def _results(facts: Facts, audit: AuditRecord) -> list[EvalResult]:
    """Return an audit's figures as the hub's `model-index` holds them."""
    return [
        EvalResult(
            task_type="text-to-image", dataset_type=facts.dataset or "images", dataset_name=facts.dataset or "the training images",
            metric_type=row.name, metric_name=row.name, metric_value=row.generated.value,
            metric_args={"low": row.generated.low, "high": row.generated.high, "n": row.generated.n, "seed": row.generated.seed},
        )
        for row in audit.rows if math.isfinite(row.generated.value)
    ]  # fmt: skip


def _code(facts: Facts, repo: str | None, revision: str | None) -> str:
    """Return the snippet that samples these weights under the guard."""
    # ascii(): a Python literal on one line, whatever the name holds.
    source = ascii(repo or PLACEHOLDER).replace("'", '"')
    at = "" if revision is None else f", revision={revision!a}"
    pipeline, guarded = facts.pipeline, facts.pipeline in ambient_sd.__all__
    if facts.lora:
        start = "pipe.load_lora_weights(" if guarded else "load_lora(pipe, "
        load = [
            f'pipe = {pipeline}.from_pretrained("{facts.base_id or "BASE_MODEL"}")',
            f'{start}{source}, weight_name="pytorch_lora_weights.safetensors"{at})',
        ]
    else:
        load = [f"pipe = {pipeline}.from_pretrained({source}{at})"]
    high = "  # how strongly the prompt changes the image: high where it may be a copy"
    if guarded:
        begin, sample = [f"from ambient_sd import {pipeline}"], ['output = pipe("a caption")']
        score = "output.memorization[0]"
    else:
        begin = ["from ambient_sd import MemorizationGuard",
                 *(["from ambient_sd.families.lora import load_lora"] if facts.lora else []), f"from diffusers import {pipeline}"]  # fmt: skip
        sample = ["with MemorizationGuard(pipe) as guard:", '    output = pipe("a caption")']
        score = "guard.report[0]"
    return "\n".join([*begin, "", *load, *sample, 'output.images[0].save("image.png")', f"print({score}.score){high}"])


def _audit_facts(audit: AuditRecord) -> dict[str, Any]:
    """Return what the template prints of an audit of these weights: the outcome, what was compared, every figure."""
    (file, digest), *more = _own_files(audit).items()
    rows = [
        (row.name, *_cells(row.generated), *_cells(row.heldout), _cells(row.excess, signed=True)[0])
        for row in audit.rows
    ]
    return {
        "finding": audit.finding, "verdict": audit.verdict, "model": audit.model or {}, "made": audit.images["generated"], "images": audit.images,
        "mirrored": audit.mirrored, "seed": audit.seed, "resamples": audit.resamples, "file": file, "digest": digest, "more": len(more),
        "rows": rows, "notes": audit.notes,
    }  # fmt: skip


def _cells(figure: Estimate | None, signed: bool = False) -> tuple[str, str]:
    """Return a figure with its interval, and its n, for a table."""
    if figure is None:
        return "not measured", ""
    value, low, high = (
        show(dataclasses.replace(figure, value=v), signed) if math.isfinite(v) else "not known"
        for v in (figure.value, figure.low, figure.high)
    )
    return f"{value} ({low} to {high})", str(figure.n)


def _find_audit(facts: Facts, folder: Path) -> tuple[AuditRecord | None, list[str]]:
    """Return the first audit that is of the weights in `folder`, and why others that lie there are not shown.

    Raises:
        UserError: one is damaged.
    """
    left_out = []
    for place in AUDIT_PLACES:
        if not (folder / place).is_file():
            continue
        audit = AuditRecord.read(folder / place)
        if (why := _misfit(audit, facts, folder)) is None:
            return audit, []
        logger.warning("%s is left out of the card: %s", folder / place, why)
        left_out.append(why)
    return None, left_out


def _misfit(audit: AuditRecord, facts: Facts, folder: Path) -> str | None:
    """Say why an audit's figures are not those of the weights in `folder`, sampled as the card says; None if they are."""
    model = audit.model
    if model is None:
        return "it is of images that were made elsewhere, and nothing ties them to these weights"
    files = adapter_files(str(folder)) if facts.lora else network_files(str(folder))
    if not files or set(_own_files(audit).values()) != set(files.values()):
        return "it is of other weights"
    if facts.lora and (
        not facts.base_files or set(model["files"]["network"].values()) != set(facts.base_files.values())
    ):
        return "it is of this LoRA on another base than the one that it was trained on"
    if "base_above" in model:
        return f"the base stood in for these weights above noise level {model['base_above']:g}"
    if audit.images["training"]["fingerprint"] != facts.fingerprint:
        return "it is against other images or captions than those of the training"
    return None


def _own_files(audit: AuditRecord) -> dict[str, str]:
    """Return the digests of what was trained: the adapter's file, or without one the network's."""
    files = (audit.model or {})["files"]
    found: dict[str, str] = files["network"] if files["lora_weights"] is None else files["lora_weights"]
    return found


def _threshold(facts: Facts, folder: Path) -> dict[str, Any] | None:
    """Return from which score the guard flags an image, if that was calibrated for these weights."""
    path = folder / THRESHOLD_NAME
    if not path.is_file():
        return None
    found = Calibration.load(path)
    if path.stat().st_mtime < facts.finished:
        logger.warning("%s is older than the weights, and left out of the card", path)
        return None
    try:
        return {"how": found.sampling, "entry": found.entry(found.evaluations, 1), "origin": found.origin}
    except UserError as error:  # calibrated, and useless over the whole run
        logger.warning("%s is left out of the card: %s", path, error)
        return None


def _sheet(facts: Facts, folder: Path) -> str | None:
    """Return the name of the last sheet of validation images of this run."""
    steps = [
        int(path.stem.removeprefix("step-"))
        for path in (folder / "validation").glob("step-*.png")
        if re.fullmatch(r"step-[0-9]{1,12}", path.stem) and not path.is_symlink()
    ]
    last = max((step for step in steps if step <= facts.steps), default=None)
    return f"validation/step-{last}.png" if facts.prompts and last is not None else None


def _scores(sheet: str, folder: Path) -> list[float]:
    return read_scores(folder / "validation", int(Path(sheet).stem.removeprefix("step-")))


def read_licence(base: Base) -> dict[str, str]:
    """Return license, license_name and license_link as the card of the base states them, or as unknown."""
    try:
        if (folder := Path(base.name)).exists():
            path = folder / CARD_NAME
            if not path.is_file():
                return dict(_UNKNOWN)
        else:
            path = Path(hf_hub_download(base.name, CARD_NAME, revision=base.revision, cache_dir=base.cache_dir))
        head = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8"))
        values = yaml.safe_load(head[2]) if head else None
    except Exception as error:  # offline, no card, broken YAML: the weights count, and the card says that it is unknown
        logger.warning("the licence of %s cannot be read: %s", base.label, one_line(error, 200))
        return dict(_UNKNOWN)
    return _clean_licence(values, base.name if not Path(base.name).exists() else None)


def _clean_licence(values: Any, base_id: str | None) -> dict[str, str]:
    """Keep of a card's head what the hub takes as a licence."""
    values = values if isinstance(values, dict) else {}
    found = {key: values.get(key) for key in ("license", "license_name", "license_link")}
    if isinstance(found["license_name"], str):
        found["license_name"] = re.sub(r"[^a-z0-9.+]+", "-", found["license_name"].lower()).strip("-")
    if isinstance(found["license_link"], str) and re.fullmatch(r"LICEN[SC]E(\.\w+)?", found["license_link"]):
        # A file beside the base's card, not beside ours.
        found["license_link"] = (
            f"https://huggingface.co/{base_id}/blob/main/{found['license_link']}" if base_id else None
        )
    kept = {
        key: value
        for key, value in found.items()
        if isinstance(value, str) and (_LINK if key == "license_link" else _LICENCE).fullmatch(value)
    }
    return kept if "license" in kept and (kept["license"] != "other" or "license_name" in kept) else dict(_UNKNOWN)
