"""What a study consists of: a YAML file that names trainings, seeds, steps at which they are measured, and how.

    name: text-60
    base:                       # settings of every run: keys of TrainConfig
      pretrained_model_name_or_path: ...
      train_data_dir: ...
    from_scratch: {...}         # optional: entries of the U-Net's config.json; its weights are then random
    heldout: {dataset_split: heldout, row_filter: [...]}    # images that no run sees; train_data_dir: another source
    runs:
      plain: {objective: plain}
      ambient: {objective: ambient, sweep: {ambient_level: [0.2, 0.4]}}    # one run for each value
    seeds: [0, 1]
    measure_at: [400, 800]      # optimizer steps
    sample: {images: 300, guidance_scale: 1.5, num_inference_steps: 15, captions: training}
    charts: {levels: [plain, ambient]}    # optional: which runs one set of plots shows; without it, one set of all
    style: {images: 300, others: {...}}   # optional: judge on the captions of the held-out images, which no run has seen

Levels, seeds and steps stand in the file, hence are fixed before anything is seen.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.errors import UserError, one_line

_KEYS = ("name", "base", "from_scratch", "heldout", "runs", "seeds", "measure_at", "sample", "charts", "style")
_OWNED = {
    "output_dir", "seed", "max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "report_to", "push_to_hub", "hub_token", "hub_model_id", "latent_cache_dir",
}  # fmt: skip
_LONGEST = 100
_SHORT = {"ambient_level": "level", "distill_level": "level", "ambient_timestep": "timestep", "reweight": "q", "learning_rate": "lr",
          "adam_weight_decay": "decay", "caption_mitigation": "kind", "logit_mean": "mean"}  # fmt: skip


def file_name(label: str) -> str:
    """Return a run's name or label as that of a file or folder."""
    return re.sub(r"[^\w.=+-]+", "_", label)


@dataclass(frozen=True)
class Sampling:
    """Say how a model is sampled where it is measured, with DPM-Solver++ from start noise that depends on seed and place.

    Attributes:
        images: how many; the prompts are taken in turn.
        captions: "training": the training captions, a draw by seed if there are more; "none": the empty prompt.
        guidance_scale: 1 is none.
        num_inference_steps, batch_size: of the sampler.
    """

    images: int = 300
    captions: str = "training"
    guidance_scale: float = 1.5
    num_inference_steps: int = 15
    batch_size: int = 16


@dataclass(frozen=True)
class Style:
    """Say how a study of a style is judged: on samples for the captions of its held-out images.

    Attributes:
        images: how many; the captions are taken in turn.
        others: images of other styles, as `heldout` names images. these: those of the style, by default all of the runs' source; a
            classifier that is trained on both says whether a sample shows the style.
        concept: column that says what an image shows: the classifier's training and test images share no concept.
    """

    images: int
    others: Mapping[str, Any]
    these: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    concept: str = "name"


@dataclass(frozen=True)
class Run:
    """Hold one training of a study: `label` names its settings, `name` is the label with the seed."""

    label: str
    seed: int
    settings: Mapping[str, Any]
    differs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.label} seed={self.seed}"

    @property
    def folder(self) -> str:
        return file_name(self.name)

    def config(self, output_dir: str | Path, **more: Any) -> TrainConfig:
        """Return the trainer's settings of this run."""
        return TrainConfig(**{**self.settings, "seed": self.seed, "output_dir": str(output_dir), **more})


@dataclass(frozen=True)
class Plan:
    """Hold a checked study."""

    name: str
    runs: Sequence[Run]
    measure_at: Sequence[int]
    sampling: Sampling
    heldout: Mapping[str, Any]
    from_scratch: Mapping[str, Any] | None
    text: str
    charts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    # An entry of the file's `runs`: the labels of its sweep.
    entries: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    style: Style | None = None

    @property
    def labels(self) -> list[str]:
        """Return the labels in the file's order."""
        return list(dict.fromkeys(run.label for run in self.runs))

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Return the labels of runs that `names` name, as labels or as entries of `runs` with all of their sweep; of all for none.

        Raises:
            UserError: a name is neither.
        """
        if not names:
            return self.labels
        known = {**{label: [label] for label in self.labels}, **self.entries}
        if wrong := sorted(set(names) - set(known)):
            raise UserError(f"run {wrong[0]!r} is not in the study", rule=f"its runs: {', '.join(known)}")
        return list(dict.fromkeys(label for name in names for label in known[name]))

    @property
    def checkpointing_steps(self) -> int:
        return math.gcd(*self.measure_at)


def read_plan(path: str | Path, changes: Mapping[str, Any] | None = None) -> Plan:
    """Read a study and check all of its runs' settings.

    Args:
        path: the YAML file.
        changes: entries that replace the file's, such as `seeds`.

    Raises:
        UserError: the file is no study, or the settings of a run are wrong; the run is named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"study {path} cannot be read", rule=one_line(str(error), 200)) from None
    return parse_plan(text, path, changes)


def parse_plan(text: str, path: str | Path, changes: Mapping[str, Any] | None = None) -> Plan:
    """Read a study as `read_plan` does, from the text of the file `path`."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"study {path} cannot be read", rule=one_line(str(error), 200)) from None
    if not isinstance(raw, dict):
        raise _wrong("", "must be a mapping", path)
    raw = {**raw, **(changes or {})}
    unknown = sorted(str(k) for k in set(raw) - set(_KEYS))
    if unknown:
        raise _wrong(unknown[0], f"entries are {', '.join(_KEYS)}", path)
    for key, kind in (("base", dict), ("runs", dict), ("seeds", list), ("measure_at", list)):
        if not isinstance(raw.get(key), kind) or not raw[key]:
            raise _wrong(key, f"must be a {'list' if kind is list else 'mapping'} with something in it", path)
    for key in ("seeds", "measure_at"):
        low = 0 if key == "seeds" else 1
        values = raw[key]
        if any(type(v) is not int or v < low for v in values) or len(set(values)) < len(values):
            raise _wrong(key, f"must hold different whole numbers of at least {low}", path)
    for key in ("heldout", "sample", "from_scratch", "charts", "style"):
        if not isinstance(raw.get(key) or {}, dict):
            raise _wrong(key, "must be a mapping", path)
    sampling = _sampling(raw.get("sample") or {}, path)
    base = dict(raw["base"])
    entries = {str(name): _expand(str(name), given, path) for name, given in raw["runs"].items()}
    runs = [
        Run(label, seed, {**base, **differs}, differs)
        for entry in entries.values()
        for label, differs in entry
        for seed in raw["seeds"]
    ]
    name = str(raw.get("name") or Path(path).stem)
    _check_name(name, "name", path)
    _check(runs, path)
    plan = Plan(
        name, runs, sorted(raw["measure_at"]), sampling, raw.get("heldout") or {}, raw.get("from_scratch"), text,
        entries={entry: [label for label, _ in expanded] for entry, expanded in entries.items()}, style=_style(raw, path),
    )  # fmt: skip
    return dataclasses.replace(plan, charts=_charts(raw.get("charts") or {}, plan, path))


def _expand(name: str, given: Any, path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (label, settings) of a named entry: one, or one for each combination of its `sweep`."""
    if not isinstance(given, dict):
        raise _wrong(f"runs: {name}", "must be a mapping of settings", path)
    settings = {k: v for k, v in given.items() if k != "sweep"}
    axes = given.get("sweep") or {}
    if not isinstance(axes, dict) or any(not isinstance(values, list) or not values for values in axes.values()):
        raise _wrong(f"runs: {name}: sweep", "must map settings to lists of values", path)
    out = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        words = [name, *(f"{_SHORT.get(k, k)}={v}" for k, v in chosen.items())]
        out.append((" ".join(words), {**settings, **chosen}))
    return out


def _charts(given: Mapping[Any, Any], plan: Plan, path: str | Path) -> dict[str, list[str]]:
    """Return the labels of each chart; a chart names entries of `runs`, or labels of their sweeps."""
    out: dict[str, list[str]] = {}
    for name, wanted in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise _wrong(f"charts: {name}", "a chart's name is of letters, digits, - and _: it becomes a file's", path)
        if not isinstance(wanted, list) or not wanted:
            raise _wrong(f"charts: {name}", "must be a list of runs", path)
        try:
            out[name] = plan.chosen([str(one) for one in wanted])
        except UserError as error:
            raise _wrong(f"charts: {name}", str(error), path) from None
    return out


def _check_name(name: str, where: str, path: str | Path) -> None:
    """A name stands in tables, plots and a folder's name: found wrong there, it would be after all training."""
    if not name.isprintable() or not 0 < len(name) <= _LONGEST or set(name) & set("$|<>\\`"):
        raise _wrong(
            f"{where}: {one_line(name, 60)}",
            f"a name is of at most {_LONGEST} printable characters, without $ | < > \\ and `",
            path,
        )


def _check(runs: Sequence[Run], path: str | Path) -> None:
    if len({run.folder for run in runs}) < len(runs):
        raise _wrong("runs", "two of them have one name", path)
    for run in runs:
        _check_name(run.label, "runs", path)
        owned = sorted(set(run.settings) & _OWNED)
        if owned:
            raise _wrong(f"runs: {run.label}: {owned[0]}", "the study sets it", path)
        unknown = sorted(set(run.settings) - {f.name for f in dataclasses.fields(TrainConfig)})
        if unknown:
            raise _wrong(f"runs: {run.label}: {unknown[0]}", "is no setting of the trainer", path)
        try:
            config = run.config("study")
        except UserError as error:
            raise _wrong(f"runs: {run.label}", str(error), path) from None
        if config.lr_scheduler not in ("constant", "constant_with_warmup"):
            raise _wrong(f"runs: {run.label}: lr_scheduler", "must be constant or constant_with_warmup: a run is measured as it "
                         "goes, and may be made longer", path)  # fmt: skip


def _sampling(given: Mapping[str, Any], path: str | Path) -> Sampling:
    kinds = {"images": int, "captions": str, "guidance_scale": (int, float), "num_inference_steps": int,
             "batch_size": int}  # fmt: skip
    for key, value in given.items():
        if key not in kinds:
            raise _wrong(f"sample: {key}", f"entries are {', '.join(kinds)}", path)
        if not isinstance(value, kinds[key]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise _wrong(f"sample: {key}", f"{value!r} is of another kind", path)
    sampling = Sampling(**given)
    if sampling.captions not in ("training", "none"):
        raise _wrong("sample: captions", "must be training or none", path)
    numbers = (sampling.num_inference_steps, sampling.batch_size)
    if sampling.images < 16 or min(numbers) < 1 or not 1 <= sampling.guidance_scale < math.inf:
        raise _wrong("sample", "needs at least 16 images, 1 step, a finite guidance_scale of at least 1", path)
    return sampling


def _style(raw: Mapping[str, Any], path: str | Path) -> Style | None:
    if raw.get("style") is None:
        return None
    kinds = {"images": int, "others": dict, "these": dict, "concept": str}
    for key, value in raw["style"].items():
        if key not in kinds or type(value) is not kinds[key]:
            raise _wrong(
                f"style: {key}",
                "entries are images (a whole number), others, these (mappings), concept (a column)",
                path,
            )
    for key in ("images", "others"):
        if not raw["style"].get(key):
            raise _wrong(f"style: {key}", "is needed", path)
    if raw["style"]["images"] < 16:
        raise _wrong("style: images", "needs at least 16", path)
    if (raw.get("sample") or {}).get("captions") == "none" or raw.get("from_scratch"):
        raise _wrong("style", "needs a base and its captions: without from_scratch and captions: none", path)
    return Style(**raw["style"])


def identity(plan: Plan, run: Run) -> dict[str, Any]:
    """Return what must be equal for a run's folder to be gone on with."""
    sample = dataclasses.asdict(plan.sampling)
    settings = {k: v for k, v in run.config("study").to_dict().items() if k not in _OWNED}
    style = {} if plan.style is None else {"style": dataclasses.asdict(plan.style)}
    return dict(json.loads(json.dumps({
        "settings": settings, "seed": run.seed, "from_scratch": plan.from_scratch, "heldout": dict(plan.heldout),
        "sample": sample, **style,
    })))  # fmt: skip


def _wrong(what: str, rule: str, path: str | Path) -> UserError:
    return UserError(f"study {Path(path).name}" + (f": {what}" if what else ""), rule=rule)
