"""FLUX.1 dev and schnell: a transformer on packed 16-channel latents, one CLIP text encoder and T5, trained by flow matching.

conditioning   T5's last hidden state; pooled: CLIP's
x0             (mean + std * draw - shift) * scale
tokens         patches of 2 x 2 latents side by side, 4 C wide, with the places (0, row, column)
timestep       t / 1000
output         the flow eps - x0, in patches

dev is distilled from guidance, whose scale it takes as an input (`guidance_embeds`): it is trained at the scale at which its pipeline
samples. True guidance, two calls with the empty prompt in one, is another thing and works with either. Not here: Fill, Kontext, Control,
Redux, IP adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.bfl import NAMES
from ambient_sd.families.family import config_of
from ambient_sd.families.flow import FlowTransformer
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.sd import tokenize
from ambient_sd.utils.devices import send

if TYPE_CHECKING:
    from ambient_sd.families.base import Model


class Packed(FlowTransformer):
    """Describe transformers that take patches of 2 x 2 latents as rows (B, N, 4 C) with their places.

    Example:
        >>> Packed().pixel_step({}, {"block_out_channels": [128, 256, 512, 512]})
        16
    """

    folded = 4
    needs: tuple[str, ...] = ("in_channels", "joint_attention_dim")

    def patch(self, network: Mapping[str, Any]) -> int:
        return 2  # the pipeline packs; the network's own patch_size is 1

    def native_side(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return 128 * self.vae_factor(vae)

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        return pack(noise)


class Flux(Packed):
    """Describe FLUX.1 dev and schnell.

    Example:
        >>> FLUX.guidance["FluxPipeline"].halves
        'calls'
    """

    name = "FLUX.1"
    pipeline = "FluxPipeline"
    guidance: Mapping[str, Guidance] = {
        "FluxPipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", pooled=("pooled_projections",),
            outputs=(0, 1), timesteps=1000.0, halves="calls", scale="true_cfg_scale", texts={"txt_ids": 2},
            shared=frozenset({"txt_ids", "img_ids"}), tokens=False,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "FluxTransformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
        "text_encoder_2": ("transformers", "T5EncoderModel"), "tokenizer_2": ("transformers", "T5TokenizerFast"),
    }  # fmt: skip
    lora_prefixes: Mapping[str, Mapping[str, str]] = {
        **FlowTransformer.lora_prefixes,
        "text_encoder": {"lora_te1_": "kohya", "lora_te_": "kohya", "text_encoders.clip_l.transformer.": "ComfyUI"},
    }
    lora_targets = (
        "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
        "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    needs = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    reads: Mapping[str, str] = {"encoder_hidden_states": "hidden", "pooled_projections": "pooled"}
    originals = NAMES
    readers = ("tokenizer_2",)
    text_length = text_most = 512
    usual_scale = (
        2.0  # its pipeline has none by default, and the guard needs some; beside the embedded one a little is enough
    )
    embedded_guidance = 3.5  # the default of its pipeline, and of diffusers' training script

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        self.check_width(model, network, "pooled_projection_dim", model.text_config("text_encoder").hidden_size)
        self.check_width(model, network, "joint_attention_dim", model.text_config("text_encoder_2").d_model)

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        found = []
        for end, length in (("", parts["tokenizer"].model_max_length), ("_2", self.text_length or 0)):
            model = parts[f"text_encoder{end}"]
            found.append(model(send(tokenize(parts[f"tokenizer{end}"], captions, length).input_ids, model.device)))
        return {"hidden": found[1][0].float(), "pooled": found[0].pooler_output.float()}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        guidance = None
        if self.guidance_embeds(config_of(network)):
            scale = float(self.embedded_guidance or 0.0)
            guidance = torch.full((len(x_t),), scale, dtype=torch.float32, device=x_t.device)
        output = network(
            hidden_states=pack(x_t), timestep=timesteps / 1000, guidance=guidance, **inputs, return_dict=False,
            txt_ids=x_t.new_zeros(inputs["encoder_hidden_states"].shape[1], 3), img_ids=places(x_t),
        )[0]  # fmt: skip
        return unpack(output, x_t.shape[-2] // 2)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return patches of 2 x 2 latents, (B, C, h, w), as rows, (B, h w / 4, 4 C).

    Example:
        >>> pack(torch.arange(8.0).view(1, 1, 2, 4)).tolist()
        [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(rows: torch.Tensor, high: int) -> torch.Tensor:
    """Return the latents that `pack` made rows of, `high` patches one below the other.

    Example:
        >>> x = torch.randn(2, 3, 4, 6)
        >>> torch.equal(unpack(pack(x), high=2), x)
        True
    """
    return torch.nn.functional.pixel_shuffle(rows.transpose(1, 2).unflatten(2, (high, -1)), 2)


def places(latents: torch.Tensor) -> torch.Tensor:
    """Return the place (0, row, column) of each patch of (B, C, h, w), (h w / 4, 3) of its type and device.

    Example:
        >>> places(torch.zeros(1, 1, 2, 4)).tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    high, wide = (torch.arange(side // 2, device=latents.device, dtype=latents.dtype) for side in latents.shape[-2:])
    return torch.cartesian_prod(high.new_zeros(1), high, wide)


FLUX = Flux()
