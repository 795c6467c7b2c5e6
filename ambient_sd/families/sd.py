"""Stable Diffusion 1.x and 2.x: a U-Net, one CLIP text encoder, four-channel latents.

conditioning   the last hidden state of the text encoder
x0             (mean + std * draw - shift) * scale
output         epsilon or v, as the scheduler's prediction_type says
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families import sgm
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.kl import KLFamily
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

# Settings of U-Nets that need more than noisy latents, a timestep and a caption (unCLIP, image variations).
_MORE_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")
LAYOUT = Guidance(network="unet", sample="sample", embeds="encoder_hidden_states")


class StableDiffusion(KLFamily):
    """Describe Stable Diffusion 1.x and 2.x.

    Example:
        >>> SD.latent_shape({"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}, (512, 768))
        (4, 96, 64)
    """

    name = "Stable Diffusion 1.x or 2.x"
    pipeline = "StableDiffusionPipeline"
    guarded: str | None = "AmbientSDPipeline"
    guidance: Mapping[str, Guidance] = {
        "StableDiffusionPipeline": LAYOUT, "StableDiffusionImg2ImgPipeline": LAYOUT, "StableDiffusionInpaintPipeline": LAYOUT,
    }  # fmt: skip
    network = "unet"
    parts: Mapping[str, tuple[str, str]] = {
        "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
    }  # fmt: skip
    single_file_texts: Mapping[str, tuple[str, ...]] = {
        "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.model.")
    }
    architectures: Mapping[tuple[Any, str], tuple[str, str]] = {
        (768, "epsilon"): ("sd_v1", "stable-diffusion-v1"), (1024, "epsilon"): ("sd_v2", "stable-diffusion-v2-512"),
        (1024, "v_prediction"): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    }  # fmt: skip
    lora_prefixes: Mapping[str, Mapping[str, str]] = {
        "unet": {"lora_unet_": "kohya", "lycoris_": "kohya", "diffusion_model.": "ComfyUI"},
        "text_encoder": {
            "lora_te_": "kohya", "lora_te1_": "kohya",
            "text_encoders.clip_l.transformer.": "ComfyUI", "text_encoders.clip_h.transformer.": "ComfyUI",
        },
    }  # fmt: skip
    usual_scale = 7.5  # of SDXL's pipeline 5, but images of its runs stay what they were
    # What of `addition_embed_type` it can be given: "text" pools the caption's own embedding, and nothing more is needed.
    additions: tuple[str | None, ...] = (None, "text")

    def check(self, model: Model, network: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        self.check_parts(model, network, vae, ("in_channels", "block_out_channels", "cross_attention_dim"))
        if more := [key for key in _MORE_INPUTS if network.get(key) not in self.additions]:
            raise UserError(
                f"the U-Net of {model.name} has {more[0]} = {network[more[0]]!r}",
                rule=f"as a {self.pipeline} it is given noisy latents, a timestep and a caption"
                + (", with sizes" if self.takes_sizes else ""),
                remedy="give a text-to-image base: Stable Diffusion 1.x or 2.x, or SDXL base",
            )
        self.check_conditioning(model, network)
        if network["in_channels"] != vae["latent_channels"]:
            raise UserError(
                f"the U-Net of {model.name} takes {network['in_channels']} channels and its VAE gives {vae['latent_channels']}",
                rule="inpainting, depth and upscaling variants need more inputs than a caption",
                remedy="give a text-to-image base",
            )

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        """Check that the U-Net takes the width of what `inputs` gives it."""

    def distilled(self, pipe: Any) -> str | None:
        # The U-Net says it, not the sampler: with an LCM LoRA and LCMScheduler a stock pipeline asks its network for both
        # halves at every scale above 1, and that is guidance like any other.
        config = getattr(getattr(pipe, "unet", None), "config", None)
        if getattr(config, "time_cond_proj_dim", None) is not None:
            return f"the U-Net of {type(pipe).__name__} takes the guidance scale as an input (time_cond_proj_dim)"
        return None

    def assembly(self, zero_empty: bool) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        model = parts["text_encoder"]
        tokens = tokenize(parts["tokenizer"], captions)
        masked = getattr(model.config, "use_attention_mask", False)
        mask = send(tokens.attention_mask, model.device) if masked else None
        hidden = model(send(tokens.input_ids, model.device), attention_mask=mask)[0]
        return {"hidden": hidden.float()}

    def pixel_step(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        # Each level of the U-Net halves the sides too.
        return self.vae_factor(vae) * int(2 ** (len(network["block_out_channels"]) - 1))

    def start_shape(self, pipe: Any, size: tuple[int, int]) -> tuple[int, ...]:
        factor = pipe.vae_scale_factor
        return pipe.unet.config.in_channels, size[1] // factor, size[0] // factor

    def native_size(self, pipe: Any) -> tuple[int, int]:
        own = pipe.unet.config.sample_size
        height, width = own if isinstance(own, (list, tuple)) else (own, own)
        return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor

    def native_side(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return int(network["sample_size"]) * self.vae_factor(vae)

    def inputs(
        self, embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
    ) -> dict[str, Any]:
        return {"encoder_hidden_states": send(embeddings["hidden"], device)}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        output: torch.Tensor = network(x_t, timesteps, **inputs, return_dict=False)[0]
        return output

    def original_names(self, network: Any) -> dict[str, str]:
        return sgm.names(network)


def tokenize(tokenizer: Any, captions: str | Sequence[str], length: int | None = None) -> Any:
    """Tokenize as the pipelines do: padded and cut to a length, by default the encoder's.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_tokenizer
        >>> tokenize(tiny_tokenizer(), "a cat").input_ids.shape
        torch.Size([1, 24])
    """
    length = tokenizer.model_max_length if length is None else length
    return tokenizer(
        captions if isinstance(captions, str) else list(captions),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )


SD = StableDiffusion()
