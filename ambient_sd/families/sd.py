"""Stable Diffusion 1.x and 2.x: a U-Net, one CLIP text encoder, four-channel latents.

conditioning   the last hidden state of the text encoder
x0             (mean + std * draw - shift) * scale
output         epsilon or v, as the scheduler's prediction_type says
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ambient_sd.families.family import Family


class StableDiffusion(Family):
    """Describe Stable Diffusion 1.x and 2.x."""

    name = "Stable Diffusion 1.x or 2.x"
    network = "unet"
    parts: Mapping[str, tuple[str, str]] = {
        "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
    }  # fmt: skip

    def embed(self, parts: Mapping[str, Any], caption: str) -> dict[str, torch.Tensor]:
        model = parts["text_encoder"]
        tokens = tokenize(parts["tokenizer"], caption)
        masked = getattr(model.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(model.device) if masked else None
        hidden = model(tokens.input_ids.to(model.device), attention_mask=mask)[0][0]
        return {"hidden": hidden.float().cpu()}

    def latent_shape(self, vae_config: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
        factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        return int(vae_config["latent_channels"]), size[1] // factor, size[0] // factor

    def encode(self, vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        z: torch.Tensor = posterior.mean.float().cpu() + posterior.std.float().cpu() * draw
        return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def inputs(
        self, embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
    ) -> dict[str, Any]:
        return {"encoder_hidden_states": embeddings["hidden"].to(device)}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        output: torch.Tensor = network(x_t, timesteps, **inputs, return_dict=False)[0]
        return output


def tokenize(tokenizer: Any, caption: str) -> Any:
    """Tokenize as the pipelines do: padded and cut to the encoder's length."""
    length = tokenizer.model_max_length
    return tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


SD = StableDiffusion()
