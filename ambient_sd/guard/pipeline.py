"""AmbientSDPipeline: Stable Diffusion's stock pipeline with the memorization guard on.

Images are bit-identical to `StableDiffusionPipeline`'s with the same seed; each comes with its `ImageReport`. What it
saves is a stock folder: `model_index.json` names `StableDiffusionPipeline`, because a class unknown to diffusers cannot
be loaded by `DiffusionPipeline.from_pretrained`. It adds no component and no copied loop. A calibrated threshold beside the
weights (`calibration`), of the model or of a LoRA, is loaded with them, and used where a call samples as was calibrated. A LoRA is
loaded whole or not at all (`ambient_sd.families.lora`).
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ambient_sd.families import FAMILIES, distilled, of_class
from ambient_sd.families.lora import load_lora
from ambient_sd.families.sd import SD
from ambient_sd.guard.calibration import FILE_NAME, Calibration
from ambient_sd.guard.policies.base import Policy
from ambient_sd.guard.recorder import ImageReport, MemorizationGuard, active_guard
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.hub_ids import resolve_model_id

logger = logging.getLogger(__name__)

_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass
class AmbientSDPipelineOutput(StableDiffusionPipelineOutput):
    """`StableDiffusionPipelineOutput` plus `memorization`: a report per image, None where guidance was off.

    Example:
        >>> AmbientSDPipelineOutput(images=[], nsfw_content_detected=None).memorization is None
        True
    """

    memorization: list[ImageReport] | None = None


class AmbientSDPipeline(StableDiffusionPipeline):
    """Sample from Stable Diffusion 1 or 2 and say of every image how strongly its prompt pulled (Wen et al. 2024).

    Attributes:
        calibration: thresholds found beside the weights, or None; a guard that a call makes by itself uses them.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> pipe = AmbientSDPipeline.from_pretrained(BASE, safety_checker=None)
        >>> out = pipe("cat face", num_inference_steps=1)
        >>> out.images[0].size, len(out.memorization)
        ((64, 64), 1)
    """

    calibration: Calibration | None = None
    _own_calibration: Calibration | None = None  # without an adapter

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> AmbientSDPipeline:
        """Load a pipeline folder or a hub id, as diffusers does; removed Stable Diffusion 2 ids lead to their mirrors.

        Args:
            pretrained_model_name_or_path: a folder with `model_index.json`, or a hub id.
            **kwargs: as in `StableDiffusionPipeline.from_pretrained`.

        Raises:
            UserError: a folder is missing, or is not a Stable Diffusion 1 or 2 pipeline; its threshold file is damaged.
        """
        name = resolve_model_id(pretrained_model_name_or_path)
        check_folder(name, given=set(kwargs))
        if "safety_checker" in kwargs and kwargs["safety_checker"] is None:
            kwargs.setdefault("requires_safety_checker", False)
        pipe = super().from_pretrained(name, **kwargs)
        pipe.calibration = pipe._own_calibration = pipe._beside(threshold_file(name, kwargs))
        return pipe

    def load_lora_weights(  # type: ignore[override]
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Load a LoRA whole or not at all, and the threshold that was calibrated beside it, as the commands do.

        diffusers warns about tensors that it finds no layer for and goes on without them; here they are refused, and after a refusal
        the pipeline is as it was. A folder's choice of file, names and refusals: `ambient_sd.families.lora`.

        Args:
            pretrained_model_name_or_path_or_dict: folder, .safetensors file, hub id or state dict.
            adapter_name: as in diffusers.
            hotswap: must be False.
            **kwargs: weight_name, subfolder, revision, token, cache_dir, local_files_only, force_download, low_cpu_mem_usage.

        Returns:
            What was loaded: file, sha256, scheme of names, tensors, layers, rank, alpha (`ambient_sd.families.lora.Adapter.record`).

        Raises:
            UserError: it cannot be loaded whole; or the threshold file beside it is damaged.
        """
        if hotswap:
            raise UserError("hotswap is True", rule="an adapter is checked as it is loaded, not over another one",
                            remedy="call unload_lora_weights() or delete_adapters() first")  # fmt: skip
        if not kwargs.pop("use_safetensors", True):
            raise UserError("use_safetensors is False", rule="pickle can run any code", remedy="leave it out")
        source = pretrained_model_name_or_path_or_dict
        place = None if isinstance(source, Mapping) else os.fspath(source)
        # Before the adapter is loaded: a damaged file refuses both.
        path = None if place is None else threshold_file(place, kwargs)
        if path is not None:
            Calibration.load(path)
        record = load_lora(
            self, source if isinstance(source, Mapping) else os.fspath(source), adapter_name=adapter_name, **kwargs
        )
        # The model's own was measured without the adapter.
        self.calibration = self._beside(path)
        return record

    def unload_lora_weights(self) -> None:
        """Remove all adapters, as diffusers does; the threshold is the model's own again."""
        super().unload_lora_weights()
        self.calibration = self._own_calibration

    def _beside(self, path: Path | None) -> Calibration | None:
        """Return the thresholds of a file if they are of this model as it is now; if not, say why and return None."""
        if path is None:
            return None
        found = Calibration.load(path)
        why = found.misfit(self)
        if why is None:
            return found
        logger.warning("the threshold in %s is not used: %s", FILE_NAME, why)
        return None

    def to_json_string(self) -> str:
        """Return `model_index.json` under the stock class's name: the folder then loads everywhere, here included."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = StableDiffusionPipeline.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def __call__(  # type: ignore[override]
        self, *args: Any, guard: MemorizationGuard | Policy | bool | None = None, **kwargs: Any
    ) -> AmbientSDPipelineOutput | tuple[Any, Any]:
        """Sample images as `StableDiffusionPipeline` does, under the guard.

        Args:
            *args: as in `StableDiffusionPipeline.__call__`.
            guard: None scores the images where guidance is on; True does so and raises where it is off; False leaves
                the guard off; a policy also mitigates; a `MemorizationGuard` of this pipeline is used as it is. But for the
                last, images are flagged by `calibration`, if there is one that fits this call; where it does not a warning
                says why, and so does each report (`undecided`).
            **kwargs: as in `StableDiffusionPipeline.__call__`.

        Returns:
            `AmbientSDPipelineOutput` with `.images` and `.memorization`; with `return_dict=False` the stock tuple
            (give a `MemorizationGuard` and read its `report`).

        Raises:
            UserError: the guard cannot measure (guidance off), or does not belong to this pipeline.
        """
        chosen = self._choose_guard(guard, args, kwargs)
        if chosen is None:
            return _with_reports(super().__call__(*args, **kwargs), None)
        if active_guard(self) is chosen:
            return _with_reports(super().__call__(*args, **kwargs), chosen)
        with chosen:
            return _with_reports(super().__call__(*args, **kwargs), chosen)

    def _choose_guard(self, guard: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MemorizationGuard | None:
        active = active_guard(self)
        if isinstance(guard, MemorizationGuard):
            if guard.pipe is not self:
                raise UserError(
                    "the guard belongs to another pipeline", remedy="make one with MemorizationGuard(this pipeline)"
                )
            return guard
        if isinstance(guard, Policy):
            return self._own_guard(guard)
        if guard is True:
            return active or self._own_guard()
        if guard is None:
            # The same rule as the pipeline's do_classifier_free_guidance, which is known only once sampling has begun.
            guided = self._given(args, kwargs)["guidance_scale"] > 1 and distilled(self) is None
            if active is not None or not guided:
                return active
            return self._own_guard()
        if guard is False:
            return None
        raise UserError(
            f"guard is a {type(guard).__name__}",
            rule="it must be None, True, False, a policy or a MemorizationGuard",
            remedy="for example guard=policies.PromptOptimization(target=3.0)",
        )

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by name, defaults included."""
        given = inspect.signature(StableDiffusionPipeline.__call__).bind(self, *args, **kwargs)
        given.apply_defaults()
        return given.arguments

    def _own_guard(self, policy: Policy | None = None) -> MemorizationGuard:
        """Return a guard by the calibrated thresholds; where they do not fit a call it warns and flags nothing."""
        guard = MemorizationGuard(self, policy, self.calibration)
        guard._strict = False
        return guard


def threshold_file(name: str, options: dict[str, Any]) -> Path | None:
    """Return the threshold file of a folder, beside a file, or of a hub repository (which diffusers leaves there), if it has one.

    Example:
        >>> import tempfile
        >>> threshold_file(tempfile.mkdtemp(), {}) is None
        True
    """
    inside = options.get("subfolder") or ""
    if os.path.exists(name):
        path = (Path(name) / inside if os.path.isdir(name) else Path(name).parent) / FILE_NAME
        return path if path.is_file() else None
    asked = {key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options}
    try:
        return Path(hf_hub_download(name, FILE_NAME, subfolder=inside or None, **asked))
    except (
        HfHubHTTPError,
        OSError,
        ValueError,
    ):  # no such file, no connection and none in the cache: a model without one
        return None


def _with_reports(output: Any, guard: MemorizationGuard | None) -> Any:
    if isinstance(output, tuple):
        return output
    reports = None if guard is None else guard.report
    return AmbientSDPipelineOutput(output.images, output.nsfw_content_detected, reports)


def check_folder(name: str, given: Set[str] = frozenset()) -> None:
    """Refuse a local folder that is no Stable Diffusion 1 or 2 pipeline, before anything is loaded.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> check_folder(str(BASE))
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(f"there is no folder {name!r}", remedy="give an existing pipeline folder or a hub id")
        return
    remedy = "give the folder that StableDiffusionPipeline.save_pretrained wrote"
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        components = set(index)
    except FileNotFoundError:
        raise UserError(f"{name!r} has no model_index.json", rule="it is no pipeline folder", remedy=remedy) from None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{folder / 'model_index.json'} cannot be read: {error}", remedy=remedy) from None
    others = {part for family in FAMILIES for part in family.parts} - set(SD.parts)
    if of_class(str(index.get("_class_name"))) not in (None, SD) or others & components:
        raise UserError(
            f"{name!r} is a {index.get('_class_name')}",
            rule="AmbientSDPipeline is Stable Diffusion 1 and 2",
            remedy="load it with its own class and use MemorizationGuard(pipe)",
        )
    for component in _COMPONENTS:
        if component not in given and (component not in components or not (folder / component).is_dir()):
            raise UserError(f"{name!r} has no {component}", rule="a pipeline needs all its parts", remedy=remedy)
