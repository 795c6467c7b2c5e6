"""Thresholds of the detection score for one model and one way of sampling it, as a file beside the weights.

No threshold fits two models: the score grows with the latent's size and depends on weights, sampler and number of steps. So a
threshold is stored with what it was measured on, and is used for nothing else: the U-Net's weights and configuration,
image size, sampler with its settings, steps, guidance scale and prediction type. There is one threshold for each number of
evaluations (an early decision after 1 or 5, or all of them) and of images averaged per prompt.

Weights in the same precision are compared by SHA-256. In another precision no hash can agree: then one weight of each of up to
128 tensors must, within the rounding of the coarser precision. That finds another model and an ordinary fine-tune, not a change of
less than half a percent in all of them. A threshold is refused in another precision even for the same model: half-precision outputs
round the difference of two nearly equal predictions, and move single scores by up to 9 %.

Where memorized prompts were given and the AUC's 95 % interval reaches 0.5, the entry is useless and refused; where none were given,
`auc` is null and `origin` says that nothing shows that the detector works.

Each detector has a file of its own: the guard's norm, and anisotropy and what a fine-tune adds to its base, which are evaluated before
sampling (`anisotropy.screen`, `beside_base.screen`) and cannot flag while sampling.

Thresholds are found by `ambient_sd.commands.calibrate`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ambient_sd.families import network_of, of_pipeline, rank_schedule
from ambient_sd.guard.base_above import base_acts
from ambient_sd.guard.scores import SPACES, Space
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.json_schema import load_json

Detector = Literal["norm", "anisotropy", "beside_base"]
FILE_NAME = "memorization_threshold.json"
FILE_NAMES: dict[Detector, str] = {
    "norm": FILE_NAME, "anisotropy": "memorization_threshold_anisotropy.json", "beside_base": "memorization_threshold_beside_base.json",
}  # fmt: skip
_FORMAT = 1
_LARGEST = 16 * 2**20  # bytes
_PROBES = 128
_ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-8}  # a whole unit in the last place: two roundings of half of one
_ALL: Literal["all"] = "all"
_REMEDY = "calibrate for this: ambient-sd calibrate --help"


@dataclass(frozen=True)
class Entry:
    """Hold one threshold and its measured performance.

    Attributes:
        steps: evaluations of the network whose norms are averaged, the first ones that carry a signal (`scores`); "all": the whole run; 0: no step is
            taken (anisotropy, beside_base).
        images_per_prompt: images of one prompt whose scores are averaged before they are compared.
        value: a score of at least this is flagged.
        rate: share of ordinary scores that it flags.
        auc: probability that a memorized prompt scores higher than an ordinary one; None without memorized prompts.
        tpr: share of memorized scores above the threshold that flags 1 % of ordinary ones; None as above.

    Example:
        >>> entry = Entry("all", 1, value=5.0, rate=Estimate(0.01, 0.0, 0.05, 100), auc=Estimate(0.9, 0.8, 0.97, 20))
        >>> entry.tells, Entry.from_dict(entry.as_dict()) == entry
        (True, True)
    """

    steps: int | Literal["all"]
    images_per_prompt: int
    value: float
    rate: Estimate
    auc: Estimate | None = None
    tpr: Estimate | None = None

    @property
    def tells(self) -> bool | None:
        """Tell whether memorized prompts score higher: the AUC's interval lies above 0.5. None: not measured."""
        return None if self.auc is None else self.auc.low > 0.5

    def as_dict(self) -> dict[str, Any]:
        """Return the entry for JSON."""
        shares = {name: getattr(self, name) for name in ("rate", "auc", "tpr")}
        numbers = {"steps": self.steps, "images_per_prompt": self.images_per_prompt, "value": self.value}
        return {**numbers, **{name: None if one is None else one.as_dict() for name, one in shares.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entry:
        """Build an entry from `as_dict`."""
        shares = {
            name: None if values[name] is None else Estimate.from_dict(values[name]) for name in ("rate", "auc", "tpr")
        }
        return cls(**{**values, **shares})


@dataclass(frozen=True)
class AnisotropyTerms:
    """Hold the weights that make one score of anisotropy's two terms: `norm_weight * norm + alignment_weight * alignment`.

    Attributes:
        norm_weight, alignment_weight: of `Anisotropy.score`.
        low_timestep: at which the alignment is taken.

    Example:
        >>> AnisotropyTerms(norm_weight=1.0, alignment_weight=2.0, low_timestep=41).low_timestep
        41
    """

    norm_weight: float
    alignment_weight: float
    low_timestep: int


@dataclass(frozen=True)
class ModelFingerprint:
    """Tell one U-Net from another.

    Attributes:
        structure: SHA-256 of the configuration, and of names and shapes of the weights (those of adapters included).
        weights: SHA-256 of the structure and of every weight as loaded; None where they are not in memory (disk offload).
        dtype: of the weights as loaded ("float32", "float16", "bfloat16"; of the first where they differ).
        probe: one weight of each of up to 128 tensors, spread evenly over them.

    Example:
        >>> a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> ModelFingerprint.of(a).differs(ModelFingerprint.of(b))
        'its weights are others'
    """

    structure: str
    weights: str | None
    dtype: str
    probe: list[float]

    @classmethod
    def of(cls, unet: torch.nn.Module, *, whole: bool = True) -> ModelFingerprint:
        """Fingerprint a U-Net; without `whole` the weights are not hashed (seconds for a large model)."""
        unet = getattr(unet, "_orig_mod", unet)  # torch.compile
        # What the only adapter is called makes no other model: the commands leave the name to diffusers.
        only = list(getattr(unet, "peft_config", {}))
        called = re.compile(rf"(\.lora_\w+)\.{re.escape(only[0])}(?=\.|$)") if len(only) == 1 else None
        named = sorted((called.sub(r"\1.default_0", n) if called else n, tensor) for n, tensor in _weights(unet))
        config = {k: v for k, v in dict(getattr(unet, "config", {})).items() if not k.startswith("_")}
        # LoRA keeps its strength outside the weights.
        scales = {n: dict(m.scaling) for n, m in unet.named_modules() if isinstance(getattr(m, "scaling", None), dict)}
        # So it does whether one acts at all.
        off = {
            n: [bool(m.disable_adapters), list(m.active_adapters)]
            for n, m in unet.named_modules()
            if n in scales and (m.disable_adapters or set(m.active_adapters) != set(m.scaling))
        }
        if called:
            scales = {n: dict(zip(["default_0"], scale.values(), strict=False)) for n, scale in scales.items()}
        shapes = [[name, list(tensor.shape)] for name, tensor in named]
        ranks = {"default_0" if called else n: dataclasses.asdict(s) for n, s in rank_schedule.installed(unet).items()}
        facts = [config, shapes, scales, *([off] if off else []), *([ranks] if ranks else [])]
        structure = hashlib.sha256(_canonical(facts).encode()).hexdigest()
        dtype = str(named[0][1].dtype).removeprefix("torch.") if named else "float32"
        if any(tensor.is_meta for _, tensor in named):
            return cls(structure, None, dtype, [])
        weights = None
        if whole:
            digest = hashlib.sha256(structure.encode())
            for _, tensor in named:
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            weights = digest.hexdigest()
        picked = [named[i * len(named) // min(_PROBES, len(named))][1] for i in range(min(_PROBES, len(named)))]
        values = [t.detach().flatten()[t.numel() // 2].to(torch.float32) for t in picked if t.numel()]
        probe = torch.stack(values).cpu().double().tolist() if values else []
        return cls(structure, weights, dtype, probe)

    def differs(self, other: ModelFingerprint) -> str | None:
        """Return in what way `other` is another model, or None if it is the same."""
        if self.structure != other.structure:
            return "its layers, configuration or adapters are others"
        if self.dtype == other.dtype:
            known = self.weights is not None and other.weights is not None
            same = (
                self.weights == other.weights
                if known
                else not self.probe or not other.probe or self.probe == other.probe
            )
            return None if same else "its weights are others"
        tolerance = max(_ROUNDING.get(self.dtype, 0.0), _ROUNDING.get(other.dtype, 0.0))
        pairs = list(zip(self.probe, other.probe, strict=False))
        # The absolute part is for float16, which has no relative precision below 6e-5.
        same = all(abs(a - b) <= tolerance * max(abs(a), abs(b)) + 1e-7 for a, b in pairs)
        return None if same else "its weights are others"


@dataclass(frozen=True)
class Sampling:
    """Describe how images are sampled, as far as scores depend on it.

    Attributes:
        height, width: of the images, pixels.
        sampler: class of the scheduler; sampler_settings: its configuration.
        prediction_type: epsilon, v_prediction or sample.
        num_inference_steps, guidance_scale: as the pipeline takes them.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> how = Sampling.of(tiny_pipeline(), num_inference_steps=20, guidance_scale=7.5, height=None, width=None)
        >>> how.height, how.differs(dataclasses.replace(how, guidance_scale=3.0))
        (32, 'guidance_scale 7.5 was calibrated, not 3.0')
    """

    height: int
    width: int
    sampler: str
    sampler_settings: dict[str, Any]
    prediction_type: str
    num_inference_steps: int
    guidance_scale: float

    @classmethod
    def of(
        cls, pipe: Any, *, num_inference_steps: int, guidance_scale: float, height: int | None, width: int | None
    ) -> Sampling:
        """Describe a call of a pipeline; sizes that are None are the pipeline's own."""
        scheduler = pipe.scheduler
        names = inspect.signature(type(scheduler).__init__).parameters
        settings = {k: v for k, v in dict(scheduler.config).items() if k in names}
        # DPM++ has -inf among its defaults, which JSON does not know.
        settings = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in settings.items()}
        own = of_pipeline(pipe).native_size(pipe)
        return cls(
            height=int(height or own[1]),
            width=int(width or own[0]),
            sampler=type(scheduler).__name__,
            sampler_settings=json.loads(_canonical(settings)),
            prediction_type=NoiseSchedule.from_scheduler(scheduler).prediction_type,
            num_inference_steps=int(num_inference_steps),
            guidance_scale=float(guidance_scale),
        )

    @property
    def options(self) -> dict[str, Any]:
        """Return what a pipeline's call, and `of`, take to sample so."""
        return {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")}

    def differs(self, other: Sampling) -> str | None:
        """Name the first setting in which `other` differs from this one, with both values, or return None."""
        for name in ("sampler", "prediction_type", "height", "width", "num_inference_steps", "guidance_scale"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine} was calibrated, not {theirs}"
        for name in sorted(self.sampler_settings.keys() | other.sampler_settings.keys()):
            mine, theirs = self.sampler_settings.get(name), other.sampler_settings.get(name)
            if mine != theirs:
                return f"{self.sampler} with {name} {mine} was calibrated, not {theirs}"
        return None


@dataclass(frozen=True)
class Calibration:
    """Hold the thresholds of one model, sampled one way, with their provenance; `MemorizationGuard` takes it as `threshold`.

    Attributes:
        entries: the thresholds.
        model: which U-Net.
        sampling: how it was sampled.
        evaluations: of the network in a whole run that carry a signal, where "all" stops.
        rate_asked: the false-positive rate that was asked for.
        ordinary, memorized: number of prompts of each kind.
        prompts: SHA-256 of the ordinary and of the memorized prompts; None where there were none.
        seed: of the start noise and of the intervals.
        versions: of the libraries.
        anisotropy: how its terms add up; None: the thresholds are of another detector.
        beside_base: the thresholds are of what the fine-tune adds to its base (`guard.beside_base`).
        base: which network that was; None: the model without its LoRA.
        score_space: what the norm is of: "noise", or the network's "output" as it is (`scores`). The two do not mix.
        lora: record of the adapter that was loaded (`ambient_sd.families.lora`); None: none was.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe, how = tiny_pipeline(), {"num_inference_steps": 20, "guidance_scale": 7.5, "height": None, "width": None}
        >>> made = Calibration(
        ...     [Entry("all", 1, 5.0, Estimate(0.01, 0.0, 0.05, 100))], ModelFingerprint.of(pipe.unet), Sampling.of(pipe, **how), evaluations=20,
        ...     rate_asked=0.01, ordinary=100, memorized=0, prompts={}, seed=0, versions={},
        ... )
        >>> made.threshold(20, 1), made.misfit(pipe)
        (5.0, None)
    """

    entries: list[Entry]
    model: ModelFingerprint
    sampling: Sampling
    evaluations: int
    rate_asked: float
    ordinary: int
    memorized: int
    prompts: dict[str, str | None]
    seed: int
    versions: dict[str, str]
    anisotropy: AnisotropyTerms | None = None
    score_space: Space = "noise"
    lora: dict[str, Any] | None = None
    beside_base: bool = False
    base: ModelFingerprint | None = None

    @property
    def detector(self) -> Detector:
        """Say which detector's scores the thresholds are of."""
        return "beside_base" if self.beside_base else "norm" if self.anisotropy is None else "anisotropy"

    @property
    def origin(self) -> str:
        """Say in a few words where the thresholds come from."""
        said = f"calibrated: FPR {self.rate_asked * 100:g} % on {self.ordinary} ordinary prompts"
        known = [entry for entry in self.entries if entry.auc is not None]
        if not known:
            return f"{said}; AUC unknown: nothing shows that it works on this model"
        last = next((e for e in reversed(known) if e.images_per_prompt == 1), known[-1])
        assert last.auc is not None
        return f"{said}, AUC {last.auc.show(2)} on {self.memorized} memorized ones"

    def entry(self, steps: int, images_per_prompt: int, *, stopped: bool = False) -> Entry:
        """Return the entry for the mean over `steps` evaluations and `images_per_prompt` images.

        Args:
            steps: evaluations seen, from the first that carries a signal on; those of a whole run, or its number of steps, mean all.
            images_per_prompt: images whose scores were averaged.
            stopped: the run ended early: its number of steps is then no whole run where a sampler evaluates twice a step.

        Raises:
            UserError: that was not calibrated (the message says what was), or does not tell memorized prompts from ordinary ones.
        """
        whole = steps == self.evaluations or (not stopped and steps == self.sampling.num_inference_steps)
        for wanted in (_ALL, steps) if whole else (steps,):
            for entry in self.entries:
                if entry.steps == wanted and entry.images_per_prompt == images_per_prompt:
                    if entry.auc is not None and not entry.tells:
                        raise UserError(
                            f"the threshold for {steps} steps is useless: AUC {entry.auc.value:.3f}, 95 % interval from {entry.auc.low:.3f}",
                            rule="an interval that reaches 0.5 does not show that memorized prompts score higher",
                            remedy=_REMEDY,
                        )
                    return entry
        steps_known = ", ".join(
            dict.fromkeys(str(self.evaluations if e.steps == _ALL else e.steps) for e in self.entries)
        )
        images_known = ", ".join(map(str, dict.fromkeys(e.images_per_prompt for e in self.entries)))
        raise UserError(
            f"no threshold for {steps} steps and {images_per_prompt} images per prompt",
            rule=f"calibrated were {steps_known} steps, and {images_known} images per prompt",
            remedy=_REMEDY,
        )

    def threshold(self, steps: int, images_per_prompt: int, *, stopped: bool = False) -> float:
        """Return the score from which an image or prompt is flagged (see `entry`)."""
        return self.entry(steps, images_per_prompt, stopped=stopped).value

    def misfit(self, pipe: Any, sampling: Sampling | None = None, *, whole: bool = True) -> str | None:
        """Return why the thresholds do not hold for a pipeline, or None if they do.

        Args:
            pipe: a diffusers pipeline.
            sampling: how it will be sampled; None: only the model is compared.
            whole: compare every weight, not only the probe.
        """
        if (network := network_of(pipe)) is None:
            return f"{type(pipe).__name__} has no {of_pipeline(pipe).network}, and thresholds are kept for it"
        now = ModelFingerprint.of(network, whole=whole)
        model = self.model.differs(now)
        if model is not None:
            return f"another network was calibrated: {model}"
        if now.dtype != self.model.dtype:
            return f"it was calibrated in {self.model.dtype}, not {now.dtype}, whose rounding moves scores"
        if base_acts(getattr(network, "_orig_mod", network)):
            return "it was calibrated without base_above"
        return None if sampling is None else self.sampling.differs(sampling)

    def check(self, pipe: Any, sampling: Sampling | None = None) -> None:
        """Raise a `UserError` unless the thresholds hold for a pipeline and a way of sampling it (see `misfit`)."""
        why = self.misfit(pipe, sampling)
        if why is not None:
            raise UserError(
                f"the calibrated threshold does not fit: {why}", remedy=f"sample as calibrated, or {_REMEDY}"
            )

    # -- the file --------------------------------------------------------------------------------------------------

    def save(self, place: str | os.PathLike[str]) -> Path:
        """Write the file into a folder, or to a path that ends in .json; whole or not at all."""
        path = _path(place, self.detector)
        atomic_write(path, self.text())
        return path

    def text(self) -> str:
        """Return what the file holds: JSON, with nothing of this machine in it."""
        values = {**dataclasses.asdict(self), "entries": [entry.as_dict() for entry in self.entries]}
        return json.dumps({"format": _FORMAT, **values}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, place: str | os.PathLike[str], pipe: Any = None, *, detector: Detector = "norm") -> Calibration:
        """Read a detector's file from a folder or path, and check that it belongs to the U-Net of `pipe` if one is given.

        Raises:
            UserError: there is no file, it is damaged, or it is of another detector or model.
        """
        path = _path(place, detector)
        try:
            found = cls._from(load_json(path, _LARGEST))
        except FileNotFoundError:
            raise UserError(f"there is no {path}", rule="no threshold was calibrated there", remedy=_REMEDY) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} cannot be read", rule=one_line(f"{type(error).__name__}: {error}", 200),
                            remedy="calibrate anew, or remove it") from None  # fmt: skip
        if found.detector != detector:
            raise UserError(f"{path} holds thresholds of the detector {found.detector}", rule=f"{detector} is asked for",
                            remedy="see docs/guard.md, choosing a threshold")  # fmt: skip
        if pipe is not None:
            found.check(pipe)
        return found

    @classmethod
    def _from(cls, values: Any) -> Calibration:
        """Build it from JSON; values of other kinds than `save` writes are refused."""
        values = dict(values)
        if values.pop("format", None) != _FORMAT:
            raise ValueError(f"it must say format {_FORMAT}")
        found = cls(
            **{
                **values,
                "entries": [Entry.from_dict(entry) for entry in values["entries"]],
                "model": ModelFingerprint(**values["model"]),
                "sampling": Sampling(**values["sampling"]),
                "anisotropy": AnisotropyTerms(**values["anisotropy"]) if values.get("anisotropy") is not None else None,
                "base": ModelFingerprint(**values["base"]) if values.get("base") is not None else None,
            }
        )
        least = 1 if found.detector == "norm" else 0
        for entry in found.entries:
            if entry.steps != _ALL and not _whole(entry.steps, least):
                raise ValueError(f"steps {entry.steps}")
            shares = [share for share in (entry.rate, entry.auc, entry.tpr) if share is not None]
            if not _whole(entry.images_per_prompt) or entry.rate is None or not all(s.is_finite for s in shares):
                raise ValueError("an entry holds no finite numbers")
            if not _finite(entry.value) or (entry.value <= 0 and found.anisotropy is None):
                raise ValueError(f"threshold {entry.value}")
        if found.score_space not in SPACES:
            raise ValueError("score_space")
        if not isinstance(found.lora, dict | None):
            raise ValueError("lora")
        if not isinstance(found.beside_base, bool) or (found.beside_base and found.anisotropy is not None):
            raise ValueError("beside_base")
        if found.anisotropy is not None and not all(map(_finite, dataclasses.astuple(found.anisotropy))):
            raise ValueError("anisotropy")
        numbers = (found.ordinary, found.evaluations, found.sampling.num_inference_steps)
        if not found.entries or not all(map(_whole, numbers)) or not _finite(found.rate_asked):
            raise ValueError("entries, ordinary, evaluations or rate_asked")
        how = found.sampling
        if not (
            all(isinstance(text, str) for text in (how.sampler, how.prediction_type))
            and isinstance(how.sampler_settings, dict)
            and all(map(_whole, (how.height, how.width)))
            and _finite(how.guidance_scale)
        ):
            raise ValueError("sampling")
        for model in (found.model, found.base):
            if model is not None and (not isinstance(model.structure, str) or not all(map(_finite, model.probe))):
                raise ValueError("model")
        return found


def _path(place: str | os.PathLike[str], detector: Detector) -> Path:
    path = Path(place)
    return path if path.suffix == ".json" else path / FILE_NAMES[detector]


def _weights(unet: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from unet.named_parameters()
    yield from unet.named_buffers()


def _canonical(value: Any) -> str:
    """Write a value as JSON with sorted keys; what JSON does not know, as its own text."""

    def plain(other: Any) -> Any:
        if isinstance(other, Mapping):
            return dict(other)
        return other.tolist() if hasattr(other, "tolist") else str(other)

    return json.dumps(value, sort_keys=True, default=plain)


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
