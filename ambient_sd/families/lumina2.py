"""Lumina-Image 2.0: one stream of text and image tokens, Gemma 2 as text encoder, trained by flow matching.

conditioning   Gemma's last hidden state but one of a system prompt and the caption; the empty caption stands alone, as in the pipeline
x0             (mean + std * draw - shift) * scale
timestep       1 - t / 1000: 1 at the image
output         the flow with the other sign, x0 - eps

diffusers' training script draws sigma by its scheduler and lets it be the share of the image: its shift favours little noise, against
the direction in which the pipeline samples. Here the shift is the pipeline's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.flow import FlowTransformer
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.original import OriginalNames
from ambient_sd.families.sd import tokenize
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

_BLOCKS = ("layers", "noise_refiner", "context_refiner")
_INNER = {
    "attn.to_out.0": "attention.out", "norm1.linear": "adaLN_modulation.1", **{f"feed_forward.linear_{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
}  # fmt: skip
_NAMES = OriginalNames(
    blocks={kind: kind for kind in _BLOCKS},
    inner={kind: _INNER for kind in _BLOCKS},
    outer={
        "time_caption_embed.caption_embedder.1": "cap_embedder.1", "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2", "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    },
    fused={kind: {"attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v")} for kind in _BLOCKS},
)  # fmt: skip


class Lumina2(FlowTransformer):
    """Describe Lumina-Image 2.0.

    Example:
        >>> LUMINA2.pixel_step({"patch_size": 2}, {"block_out_channels": [128, 256, 512, 512]})
        16
    """

    name = "Lumina-Image 2.0"
    pipeline = "Lumina2Pipeline"
    guidance: Mapping[str, Guidance] = {
        "Lumina2Pipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", timesteps=1000.0, reversed=True,
            halves="calls", normalizes=True, mask=("encoder_attention_mask", 1), uncond=2, tokens=False,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "Lumina2Transformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "Gemma2Model"), "tokenizer": ("transformers", "AutoTokenizer"),
    }  # fmt: skip
    originals = _NAMES
    needs = ("in_channels", "patch_size", "sample_size", "cap_feat_dim")
    reads: Mapping[str, str] = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "mask"}
    text_length, text_most = 256, 512

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        self.check_width(model, network, "cap_feat_dim", model.text_config("text_encoder").hidden_size)
        if (factor := self.vae_factor(model.vae_settings)) != 8:
            raise UserError(f"the VAE of {model.name} makes one latent of {factor} x {factor} pixels",
                            rule="the pipeline of Lumina-Image 2.0 counts on 8 x 8", remedy="leave another VAE out")  # fmt: skip

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        tokenizer, model = parts["tokenizer"], parts["text_encoder"]
        tokenizer.padding_side = "right"
        texts = [f"{_system_prompt()} <Prompt Start> {caption}" if caption else "" for caption in captions]
        found = tokenize(tokenizer, texts, self.text_length or 0)
        mask = send(found.attention_mask, model.device)
        states = model(
            send(found.input_ids, model.device), attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        return {"hidden": states.hidden_states[-2].float(), "mask": mask}

    def around(self, tokenizer: Any) -> int:
        return len(tokenizer(f"{_system_prompt()} <Prompt Start> ").input_ids)

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        output: torch.Tensor = network(
            hidden_states=x_t, timestep=1 - timesteps / 1000, return_dict=False, **inputs
        )[0]  # fmt: skip
        return -output


@functools.cache
def _system_prompt() -> str:
    """Return the system prompt of the pipeline."""
    import diffusers

    stock: Any = diffusers.Lumina2Pipeline(None, None, None, None, None)  # type: ignore[arg-type]
    return str(stock.system_prompt)


LUMINA2 = Lumina2()
