"""Sana: linear attention on latents of a deep-compression autoencoder (32 x 32 pixels each), Gemma 2 as text encoder, trained by flow matching.

conditioning   Gemma's last hidden state of an instruction and the caption in small letters: the first row and the last 299 of them;
               the empty caption stands alone, as in the pipeline (Xie et al., "SANA" (2024), section 3.1)
x0             z * scale: the autoencoder has no posterior
timestep       t times the network's `timestep_scale`
output         the flow eps - x0

Not here: Sprint, which is distilled, and ControlNet.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.family import config_of
from ambient_sd.families.flow import FlowTransformer
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.sd import tokenize
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model


class SanaFamily(FlowTransformer):
    """Describe Sana.

    Example:
        >>> SANA.latent_shape({"latent_channels": 32, "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}, (1024, 512))
        (32, 16, 32)
    """

    name = "Sana"
    pipeline = "SanaPipeline"
    guidance: Mapping[str, Guidance] = {
        "SanaPipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", mask=("encoder_attention_mask", 1), tokens=False,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "SanaTransformer2DModel"), "vae": ("diffusers", "AutoencoderDC"),
        "text_encoder": ("transformers", "Gemma2Model"), "tokenizer": ("transformers", "AutoTokenizer"),
    }  # fmt: skip
    shifted = False
    draws = False
    exact_start = True
    lora_targets = ("to_k", "to_q", "to_v")
    needs = ("in_channels", "patch_size", "sample_size", "caption_channels")
    vae_needs = ("latent_channels", "encoder_block_out_channels")
    reads: Mapping[str, str] = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "mask"}
    text_length = 300

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        self.check_width(model, network, "caption_channels", model.text_config("text_encoder").hidden_size)
        if network.get("guidance_embeds"):
            raise UserError(f"the transformer of {model.name} has guidance_embeds", rule="Sana Sprint is distilled, and is not trained by flow matching",
                            remedy="give a base of Sana itself")  # fmt: skip
        if network.get("out_channels") not in (None, network["in_channels"]):
            raise UserError(f"the transformer of {model.name} has out_channels = {network['out_channels']}",
                            rule="a learned variance is not trained here", remedy="give another base")  # fmt: skip

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        return int(2 ** (len(vae["encoder_block_out_channels"]) - 1))

    def encode(self, vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = vae.encode(send(pixels.to(vae.dtype), vae.device)).latent.float()
        return (z * vae.config.scaling_factor).cpu()

    def decode(self, vae: Any, x0: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = vae.decode(
            send(x0.to(vae.dtype), vae.device) / vae.config.scaling_factor, return_dict=False
        )[0]
        return pixels

    def guided(self, pipe: Any, scale: float, count: int) -> dict[str, Any]:
        # Start noise of the size that is asked for is given: nothing has to be resized to one of its list.
        return {"guidance_scale": scale, "use_resolution_binning": False}

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        # One at a time: with the instruction and without a text has another length.
        found = [self._embed_one(parts["tokenizer"], parts["text_encoder"], caption) for caption in captions]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def _embed_one(self, tokenizer: Any, model: Any, caption: str) -> dict[str, torch.Tensor]:
        tokenizer.padding_side = "right"
        text, length = caption.lower().strip(), self.text_length or 0
        if caption:
            text = _instruction() + text
            # Two of the instruction's tokens are counted with the caption: its first, and the end that is not there.
            length += len(tokenizer.encode(_instruction())) - 2
        given = tokenize(tokenizer, [text], length)
        mask = send(given.attention_mask, model.device)
        hidden = model(send(given.input_ids, model.device), attention_mask=mask, use_cache=False)[0].float()
        rows = [0, *range(1 - (self.text_length or 0), 0)]
        return {"hidden": hidden[:, rows], "mask": mask[:, rows]}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        scaled = timesteps * config_of(network).timestep_scale
        output: torch.Tensor = network(x_t, timestep=scaled, return_dict=False, **inputs)[0]
        return output


@functools.cache
def _instruction() -> str:
    """Return the instruction that the pipeline puts before a prompt."""
    import diffusers

    lines = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


SANA = SanaFamily()
