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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ambient_sd.errors import UserError, one_line
from ambient_sd.guard.calibration import FILE_NAME as THRESHOLD_NAME
from ambient_sd.guard.calibration import Calibration
from ambient_sd.training.config import TrainConfig

if TYPE_CHECKING:
    from ambient_sd.data.sources import PictureSet
    from ambient_sd.objective import AmbientObjective
    from ambient_sd.training.base import Base

logger = logging.getLogger(__name__)

CARD_NAME, FACTS_NAME = "README.md", "card.json"
PLACEHOLDER = "THIS_FOLDER"  # the snippet's name of the weights until a repository has one
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LINK = re.compile(r"https?://[\w./~%#?=&+-]{1,300}", re.ASCII)
_UNKNOWN = {"license": "other", "license_name": "unknown-see-the-base"}
_SHOWN_PROMPTS = 12
# Settings that change what the loss is or sees; a card names those that are not at their defaults.
_LOSS = ("snr_gamma", "weighting_scheme", "logit_mean", "logit_std", "noise_offset", "input_perturbation", "memorization_threshold", "agc",
         "caption_mitigation", "caption_mitigation_p", "caption_noise_std", "caption_dropout", "random_flip")  # fmt: skip
_STAMP = re.compile(r"\n*<!-- ambient_sd card ([0-9a-f]{64})[^\n]*-->\s*$")


@dataclass(frozen=True)
class Facts:
    """Hold what a card says of a run; all of it may be published.

    Attributes:
        base: public name of the base model; base_id: the same if the hub has it, else None.
        licence: license, license_name, license_link of the base, as in a card's head.
        objective: ambient, plain, gap or weighted; level: s_n or the gap's lower edge; timestep: where `level` lies on the base's
            schedule of `timesteps` steps, None below its first.
        xl: the base is an SDXL; vae: public name of a VAE that stood in for the base's own, else None.
        lora: rank, alpha, dropout, dora, targets; None for a full fine-tune.
        batch: samples per optimizer step.
        pictures: how many; distinct: without exact copies; groups: near-duplicate groups, None where not looked for;
            grouped: pictures in them; captioned: those with a caption; fingerprint: SHA-256 over pictures and captions.
        dataset: hub id of the pictures, None if they are local.
        prompts: of the validation pictures, one row of the sheet each.
        finished: seconds since 1970; an older audit was of other weights.
        level_proposed: `level` was measured on the pictures, not given.
        also: other settings of the loss that are not at their defaults, by flag.
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
    reweight: int | None
    xl: bool
    vae: str | None
    lora: dict[str, Any] | None
    averaged: bool
    steps: int
    batch: int
    learning_rate: float
    lr_scheduler: str
    resolution: int
    pictures: int
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
            facts = cls(**json.loads(path.read_text(encoding="utf-8")), finished=path.stat().st_mtime)
            facts._check()
        except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
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
        kinds: dict[type | tuple[type, ...], str] = {
            int: "timesteps steps batch resolution pictures distinct grouped captioned",
            (int, float): "level learning_rate finished",
            (int, float, type(None)): "timestep gap_upper reweight groups",
            str: "base objective prediction_type lr_scheduler fingerprint",
            (str, type(None)): "base_id dataset vae",
            bool: "xl averaged fresh_copies level_proposed",
            (dict, type(None)): "lora",
            dict: "also",
            list: "prompts",
        }
        for kind, names in kinds.items():
            for name in names.split():
                if not isinstance(getattr(self, name), kind):
                    raise TypeError(f"{name} is {one_line(repr(getattr(self, name)), 40)}")
        if any(not isinstance(p, str) for p in self.prompts) or any(
            name is not None and not HUB_ID.fullmatch(name) for name in (self.base_id, self.dataset)
        ):
            raise ValueError("a name or prompt is none")
        if self.lora is not None:
            for name, to in {"rank": int, "alpha": float, "dropout": float, "dora": bool, "targets": list}.items():
                to(self.lora[name])
        if self.licence != _clean_licence(self.licence, None):
            raise ValueError("licence is none")


def describe_run(
    config: TrainConfig,
    *,
    base: Base,
    objective: AmbientObjective,
    pictures: PictureSet,
    prompts: Sequence[str],
    steps: int,
    batch: int,
    level_proposed: bool = False,
) -> Facts:
    """Gather what the card will say; asks the hub for the licence of a base that lies there.

    Args:
        config: the run's settings; no path of it is used.
        base: the base model.
        objective: the loss on the base's schedule.
        pictures: the training pictures, checked.
        prompts: of the validation pictures.
        steps: optimizer steps done in all.
        batch: samples per optimizer step.
        level_proposed: the level was measured on the pictures.
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
        reweight=config.reweight,
        xl=base.is_xl,
        vae=_public(config.pretrained_vae_model_name_or_path),
        lora=None
        if not config.lora
        else {"rank": config.rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "dora": config.use_dora,
              "targets": list(config.lora_target_modules or ())},
        averaged=config.use_ema,
        fresh_copies=config.fresh_copies,
        level_proposed=level_proposed,
        also=given_settings(config),
        steps=steps,
        batch=batch,
        learning_rate=config.learning_rate * (batch if config.scale_lr else 1),
        lr_scheduler=config.lr_scheduler,
        resolution=config.resolution,
        pictures=len(pictures),
        distinct=len(set(pictures.keys)),
        groups=len(pictures.groups) if looked else None,
        grouped=sum(len(group.rows) for group in pictures.groups),
        captioned=sum(bool(caption.strip()) for caption in pictures.captions),
        fingerprint=pictures.fingerprint(),
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


def _public(name: str | None) -> str | None:
    """Return a hub id as it is, and of a folder only that it is one."""
    return None if name is None else name if HUB_ID.fullmatch(name) and not Path(name).exists() else "another VAE"


def write_card(folder: Path, facts: Facts) -> None:
    """Write card.json and README.md to `folder`; a README.md that a person wrote or edited stays."""
    facts.write(folder)
    path = folder / CARD_NAME
    if path.exists() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        logger.warning("%s was written or edited by hand and stays as it is; remove it for a card of this run", path)
        return
    path.write_text(make_card(facts, folder), encoding="utf-8")


def is_ours(text: str) -> bool:
    """Tell whether a card is as this module wrote it, by the SHA-256 in its last line."""
    found = _STAMP.search(text.replace("\r\n", "\n"))
    return found is not None and found[1] == _digest(text)


def make_card(facts: Facts, folder: Path, *, repo: str | None = None, revision: str | None = None) -> str:
    """Return the text of a card.

    Args:
        facts: of the run.
        folder: holds the results; validation pictures and an audit are looked for there.
        repo: owner/name that the card will lie in, checked; None: on this machine.
        revision: branch of it.

    Raises:
        UserError: an audit or the guard's scores are there and cannot be read.
    """
    sheet = _sheet(facts, folder)
    parts = [
        f"# {inline(facts.base, 100)}, fine-tuned on {facts.pictures} pictures",
        _what(facts),
        *_usage(facts, repo, revision),
        *_data(facts),
        *_memorization(facts, folder),
        *([] if sheet is None else _samples(facts, sheet, folder)),
        *_limits(facts),
    ]
    text = f"---\n{_head(facts)}\n---\n\n" + "\n\n".join(parts) + "\n"
    return _stamped(text)


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


def _head(facts: Facts) -> str:
    tags = ["stable-diffusion", "text-to-image", "diffusers", "ambient-sd", *(["lora"] if facts.lora else [])]
    data = ModelCardData(
        license=facts.licence.get("license"),
        license_name=facts.licence.get("license_name"),
        license_link=facts.licence.get("license_link"),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=facts.base_id,
        base_model_relation=None if facts.base_id is None else "adapter" if facts.lora else "finetune",
        datasets=None if facts.dataset is None else [facts.dataset],
        tags=tags,
    )
    return data.to_yaml()


def _what(facts: Facts) -> str:
    if facts.lora:
        kind = "DoRA" if facts.lora["dora"] else "LoRA"
        kind += f", rank {int(facts.lora['rank'])}, alpha {float(facts.lora['alpha']):g}"
        if facts.lora["dropout"]:
            kind += f", dropout {float(facts.lora['dropout']):g}"
        kind += f", on {inline(' '.join(map(str, facts.lora['targets'])))}"
    else:
        kind = "Full fine-tune of the U-Net" + (", moving average of the weights" if facts.averaged else "")
    where = "" if facts.timestep is None else f" (timestep {facts.timestep:.4g} of {facts.timesteps} of this schedule)"
    proposed = ", proposed from the pictures" if facts.level_proposed else ""
    what = {
        "ambient": f"ambient, nature level {facts.level:.4g}{where}{proposed}, weight a^{facts.reweight}",
        "plain": "plain denoising",
        "gap": f"plain denoising without the noise levels {facts.level:.4g}{where} to {facts.gap_upper}",
        "weighted": f"plain denoising with weight a^{facts.reweight} above noise level {facts.level:.4g}{where}",
    }.get(facts.objective, inline(facts.objective))
    lines = [f"{kind}.", f"Objective: {what}; the U-Net predicts {inline(facts.prediction_type)}."]
    if facts.fresh_copies:
        lines.append("A control: every step saw a new noisy copy, which leaks the picture like clean training.")
    elif facts.objective == "ambient" and facts.level > 0:
        lines.append(
            "Above the nature level training never shows the network a clean picture, only one fixed noisy version of each."
        )
    if facts.also:
        given = ", ".join(f"`--{flag}` {inline(value)}" for flag, value in facts.also.items() if flag in _LOSS)
        lines.append(f"Also: {given}.")
    lines.append(
        f"{facts.steps} steps of {facts.batch} samples at {facts.resolution} px, learning rate {facts.learning_rate:g} "
        f"({inline(facts.lr_scheduler)})."
    )
    origin = (
        f"[{facts.base_id}](https://huggingface.co/{facts.base_id})"
        if facts.base_id
        else f"{inline(facts.base, 100)}, a local folder"
    )
    lines.append(f"Base model: {origin}. {_licence_line(facts.licence)}")
    return "\n".join(lines)


def _licence_line(licence: dict[str, str]) -> str:
    if licence == _UNKNOWN:
        return "Its licence: unknown, see the base."
    name = inline(licence.get("license_name") or licence["license"])
    return (
        f"Its licence: [{name}]({licence['license_link']})." if "license_link" in licence else f"Its licence: {name}."
    )


def _usage(facts: Facts, repo: str | None, revision: str | None) -> list[str]:
    # ascii(): a Python literal on one line, whatever the name holds.
    source = ascii(repo or PLACEHOLDER).replace("'", '"')
    at = "" if revision is None else f", revision={revision!a}"
    pipeline = "StableDiffusionXLPipeline" if facts.xl else "AmbientSDPipeline"
    if facts.lora:
        base = f'"{facts.base_id or "BASE_MODEL"}"'
        load = [
            f"pipe = {pipeline}.from_pretrained({base})",
            f"{'load_lora(pipe, ' if facts.xl else 'pipe.load_lora_weights('}{source}, "
            f'weight_name="pytorch_lora_weights.safetensors"{at})',
        ]
    else:
        load = [f"pipe = {pipeline}.from_pretrained({source}{at})"]
    high = "  # how strongly the prompt pulled: high where a picture may be copied"
    if facts.xl:
        code = [
            "from ambient_sd import MemorizationGuard",
            *(["from ambient_sd.lora import load_lora"] if facts.lora else []),
            "from diffusers import StableDiffusionXLPipeline",
            "",
            *load,
            "with MemorizationGuard(pipe) as guard:",
            '    output = pipe("a caption")',
            'output.images[0].save("picture.png")',
            f"print(guard.report[0].score){high}",
        ]
    else:
        code = [
            "from ambient_sd import AmbientSDPipeline",
            "",
            *load,
            'output = pipe("a caption")',
            'output.images[0].save("picture.png")',
            f"print(output.memorization[0].score){high}",
        ]
    said = []
    if facts.lora and facts.base_id is None:
        said.append(f"BASE_MODEL stands for the base that this was trained on, {inline(facts.base, 100)}.")
    if facts.lora and facts.vae is not None:
        said.append(f"It was trained with {inline(facts.vae, 100)} in place of the base's VAE: draw with it too.")
    if repo is None:
        said.append(f"{PLACEHOLDER} stands for the folder that holds this page.")
    return ["## Usage", "\n".join(["```python", *code, "```"]), *([" ".join(said)] if said else [])]


def _data(facts: Facts) -> list[str]:
    n = facts.pictures
    rows = [
        ("pictures", f"{n}" + ("" if facts.distinct == n else f", of which {n - facts.distinct} are exact copies of others")),
        ("source", f"[{facts.dataset}](https://huggingface.co/datasets/{facts.dataset})" if facts.dataset else "local"),
        ("resolution", f"{facts.resolution} x {facts.resolution} px"),
        ("with a caption", f"{facts.captioned / n:.0%}"),
        ("groups of near-duplicates", "not looked for" if facts.groups is None
         else f"{facts.groups}, {facts.grouped} pictures in all; a group shares one noise" if facts.groups else "none found"),
        ("SHA-256 of pictures and captions", inline(facts.fingerprint)),
    ]  # fmt: skip
    return ["## Training data", _table(["", ""], rows)]


def _memorization(facts: Facts, folder: Path) -> list[str]:
    rows, threshold = _audit(facts, folder), _threshold(facts, folder)
    if not rows:
        return [
            "## Memorization",
            "How much of the training pictures it hands back has not been measured here.",
            *threshold,
        ]
    table = _table(["measure", "this model, 95 % interval", "n", "held-out pictures, 95 % interval", "n"], rows)
    return ["## Memorization", table,
            "Held-out: the same measure on real pictures that training has not seen. Less is better.", *threshold]  # fmt: skip


def _threshold(facts: Facts, folder: Path) -> list[str]:
    """Say from which score the guard flags a picture, if that was calibrated for these weights."""
    path = folder / THRESHOLD_NAME
    if not path.is_file():
        return []
    found = Calibration.load(path)
    if path.stat().st_mtime < facts.finished:
        logger.warning("%s is older than the weights, and left out of the card", path)
        return []
    how, single = found.sampling, found.entry(found.evaluations, 1)
    return [
        f"The memorization guard flags a picture from a score of {single.value:.4g} over the whole run ({inline(found.origin)}; "
        f"of them it flags {single.rate:.1%}, 95 % interval {single.rate_low:.1%} to {single.rate_high:.1%}): "
        f"{inline(how.sampler)}, {how.num_inference_steps} steps, guidance {how.guidance_scale:g}, "
        f"{how.height} x {how.width} px. All thresholds: {inline(THRESHOLD_NAME)}."
    ]


def _audit(facts: Facts, folder: Path) -> list[tuple[str, ...]]:
    """Return the table of the first audit that is of these weights: beside them, or a demo's one folder up."""
    for path in (folder / "audit.json", folder / "figures.json", folder.resolve().parent / "figures.json"):
        if not path.is_file():
            continue
        beside = path.parent == folder
        try:
            if path.stat().st_mtime < facts.finished:
                if beside:
                    logger.warning("%s is older than the weights, and left out of the card", path)
                continue
            audit = json.loads(path.read_text(encoding="utf-8"))
            of = audit.get("made", {}).get("training pictures (sha256)")
            runs = audit["runs"]
            figures = runs.get(folder.resolve().name) or (
                next(iter(runs.values())) if beside and len(runs) == 1 else None
            )
            # Up there lies another's audit as likely as ours: it must name our pictures.
            if figures is None or (of is None and not beside) or of not in (None, facts.fingerprint):
                continue
            return [
                (inline(name), *_figure(name, row["generated"]), *_figure(name, row["heldout"]))
                for name, row in figures.items()
            ]
        except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300],
                            remedy="measure anew, or remove it") from None  # fmt: skip
    return []


def _figure(name: str, figure: dict[str, Any]) -> tuple[str, str]:
    value, low, high = (float(figure[key]) for key in ("value", "low", "high"))
    if not all(map(math.isfinite, (value, low, high))):
        raise ValueError(f"{name} is no finite number")
    share = name.startswith("memorized")
    shown = [f"{v:.1%}" if share else f"{v:.4g}" for v in (value, low, high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})", str(int(figure["n"]))


def _sheet(facts: Facts, folder: Path) -> str | None:
    """Return the name of the last sheet of validation pictures of this run."""
    steps = [
        int(path.stem.removeprefix("step-"))
        for path in (folder / "validation").glob("step-*.png")
        if re.fullmatch(r"step-[0-9]{1,12}", path.stem) and not path.is_symlink()
    ]
    last = max((step for step in steps if step <= facts.steps), default=None)
    return f"validation/step-{last}.png" if facts.prompts and last is not None else None


def _samples(facts: Facts, sheet: str, folder: Path) -> list[str]:
    shown = [f"- {inline(prompt) or '(empty)'}" for prompt in facts.prompts[:_SHOWN_PROMPTS]]
    if len(facts.prompts) > _SHOWN_PROMPTS:
        shown.append(f"- and {len(facts.prompts) - _SHOWN_PROMPTS} more")
    step = Path(sheet).stem.removeprefix("step-")
    return ["## Samples", f"![validation pictures]({sheet})", f"Drawn at step {step}, one row for each prompt:", "\n".join(shown),
            *_guard(folder)]  # fmt: skip


def _guard(folder: Path) -> list[str]:
    path = folder / "validation" / "scores.json"
    if not path.is_file():
        return []
    try:
        scores = [float(score) for score in json.loads(path.read_text(encoding="utf-8"))["scores"]]
        if not scores or not all(map(math.isfinite, scores)):
            raise ValueError("no finite scores")
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300], remedy="remove it") from None  # fmt: skip
    return [
        f"Score of the memorization guard on them: mean {sum(scores) / len(scores):.3g}, highest {max(scores):.3g} "
        f"(n = {len(scores)}). It compares within one model, size and number of steps."
    ]


def _limits(facts: Facts) -> list[str]:
    return ["## Limits", "\n".join([
        "- Less copying is measured, not proven: no privacy guarantee. Do not train on pictures that must never come out.",
        "- Figures speak of the samples that were drawn; other prompts, seeds and samplers may hand back more.",
        "- The base model's own training pictures, faults and biases remain, and so do the terms of its licence.",
    ])]  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
