"""Chroma: FLUX.1's transformer with true guidance and T5 alone.

conditioning   T5's last hidden state under its own mask; the network gets a mask too, 1 at the caption and the first padding
tokens, x0, timestep, output    as FLUX.1's

The mask is given as its pipeline gives it, as numbers: attention adds 0 or 1 to its logits and hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.bfl import NAMES
from ambient_sd.families.flux import FLUX, Packed, pack, places, unpack
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.sd import tokenize
from ambient_sd.utils.devices import send

if TYPE_CHECKING:
    from ambient_sd.families.base import Model


class Chroma(Packed):
    """Describe Chroma.

    Example:
        >>> CHROMA.text_parts
        ['text_encoder', 'tokenizer']
    """

    name = "Chroma"
    pipeline = "ChromaPipeline"
    guidance: Mapping[str, Guidance] = {
        "ChromaPipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", timesteps=1000.0, halves="calls",
            mask=("attention_mask", 2), texts={"txt_ids": 1}, shared=frozenset({"txt_ids", "img_ids"}), tokens=False, uncond=3,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "ChromaTransformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "T5EncoderModel"), "tokenizer": ("transformers", "T5TokenizerFast"),
    }  # fmt: skip
    lora_targets = FLUX.lora_targets
    originals = NAMES
    reads: Mapping[str, str] = {"encoder_hidden_states": "hidden", "attention_mask": "mask"}
    text_length = text_most = 512

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        self.check_width(model, network, "joint_attention_dim", model.text_config("text_encoder").d_model)

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        model = parts["text_encoder"]
        found = tokenize(parts["tokenizer"], captions, self.text_length or 0)
        mask = send(found.attention_mask, model.device)
        hidden = model(send(found.input_ids, model.device), attention_mask=mask)[0].float()
        read = torch.arange(mask.shape[1], device=mask.device) <= mask.sum(1, keepdim=True)
        return {"hidden": hidden, "mask": read.float()}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        hidden, mask, rows = inputs["encoder_hidden_states"], inputs["attention_mask"], pack(x_t)
        mask = torch.cat([mask, mask.new_ones(rows.shape[:2])], dim=1)
        _checkpoint_with(network, mask)
        output = network(
            hidden_states=rows, timestep=timesteps / 1000, encoder_hidden_states=hidden, attention_mask=mask, return_dict=False,
            txt_ids=x_t.new_zeros(hidden.shape[1], 3), img_ids=places(x_t),
        )[0]  # fmt: skip
        return unpack(output, x_t.shape[-2] // 2)


def _checkpoint_with(network: Any, mask: torch.Tensor) -> None:
    """Let gradient checkpointing hand the mask to the single blocks too: ChromaTransformer2DModel leaves it out there, and only there."""
    while not hasattr(network, "single_transformer_blocks"):
        network = network.module if hasattr(network, "module") else network._orig_mod
    if network.gradient_checkpointing:
        known = network._gradient_checkpointing_func
        plain = known.args[0] if getattr(known, "func", None) is _checkpoint else known
        network._gradient_checkpointing_func = partial(_checkpoint, plain, mask)


def _checkpoint(checkpoint: Callable[..., Any], mask: torch.Tensor, block: Any, *given: Any) -> Any:
    return checkpoint(block, *given, mask) if len(given) == 3 else checkpoint(block, *given)


CHROMA = Chroma()
