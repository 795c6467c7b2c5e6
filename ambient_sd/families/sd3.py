"""Stable Diffusion 3 and 3.5: a transformer on 16-channel latents, two CLIP text encoders and T5, trained by flow matching.

conditioning   CLIP's last hidden states but one side by side, padded to T5's width, and below them T5's last; pooled: both CLIPs'
               Esser et al., "Scaling Rectified Flow Transformers" (2024), appendix B.3. Without T5 its rows are zeros
x0             (mean + std * draw - shift) * scale
timestep       that of the schedule, in [0, 1000]
output         the flow eps - x0

A model without T5 is one whose index has [null, null] for it. Not here: image prompts (IP adapter), skip-layer guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.family import config_of
from ambient_sd.families.flow import FlowTransformer
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.original import OriginalNames
from ambient_sd.families.sd import tokenize
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

# Stability's own code, and with it ComfyUI and kohya; the last modulations hold shift and scale there.
_NAMES = OriginalNames(
    blocks={"transformer_blocks": "joint_blocks"},
    inner={"transformer_blocks": {
        "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj", "attn.to_add_out": "context_block.attn.proj",
        "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    }},
    outer={
        "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
        **{f"time_text_embed.{kind}_embedder.linear_{n}": f"{theirs}_embedder.mlp.{m}"
           for kind, theirs in (("timestep", "t"), ("text", "y")) for n, m in ((1, 0), (2, 2))},
    },
    fused={"transformer_blocks": {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }},
    swapped={
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "transformer_blocks.{last}.norm1_context.linear": "joint_blocks.{last}.context_block.adaLN_modulation.1",
    },
)  # fmt: skip
_CLIP = ("CLIPTextModelWithProjection", "CLIPTokenizer")


class StableDiffusion3(FlowTransformer):
    """Describe Stable Diffusion 3 and 3.5.

    Example:
        >>> SD3.guidance["StableDiffusion3Pipeline"].outputs
        (0, 2)
    """

    name = "Stable Diffusion 3"
    pipeline = "StableDiffusion3Pipeline"
    guidance: Mapping[str, Guidance] = {
        "StableDiffusion3Pipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", pooled=("pooled_projections",),
            outputs=(0, 2), tokens=False,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "SD3Transformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", _CLIP[0]), "tokenizer": ("transformers", _CLIP[1]),
        "text_encoder_2": ("transformers", _CLIP[0]), "tokenizer_2": ("transformers", _CLIP[1]),
        "text_encoder_3": ("transformers", "T5EncoderModel"), "tokenizer_3": ("transformers", "T5TokenizerFast"),
    }  # fmt: skip
    optional = frozenset({"text_encoder_3", "tokenizer_3"})
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    reads: Mapping[str, str] = {"encoder_hidden_states": "hidden", "pooled_projections": "pooled"}
    lora_prefixes: Mapping[str, Mapping[str, str]] = {
        **FlowTransformer.lora_prefixes,
        "text_encoder": {"lora_te1_": "kohya", "text_encoders.clip_l.transformer.": "ComfyUI"},
        "text_encoder_2": {"lora_te2_": "kohya", "text_encoders.clip_g.transformer.": "ComfyUI"},
    }
    originals = _NAMES
    readers = ("tokenizer_3",)
    text_length, text_most = 256, 512

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        clips = [model.text_config(part) for part in ("text_encoder", "text_encoder_2")]
        pooled = sum(one.projection_dim for one in clips)
        if network.get("pooled_projection_dim") != pooled:
            raise UserError(f"the transformer of {model.name} has pooled_projection_dim = {network.get('pooled_projection_dim')!r}",
                            rule=f"its CLIP text encoders come to {pooled}", remedy="give a base whose parts belong together")  # fmt: skip
        width, clip = network["joint_attention_dim"], sum(one.hidden_size for one in clips)
        t5 = model.text_config("text_encoder_3").d_model if model.has("text_encoder_3") else width
        if t5 != width or clip > width:
            raise UserError(f"the transformer of {model.name} has joint_attention_dim = {width}",
                            rule=f"its T5 has {t5} and its CLIP text encoders come to {clip}", remedy="give a base whose parts belong together")  # fmt: skip

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        clips, pooled = [], []
        for end in ("", "_2"):
            model = parts[f"text_encoder{end}"]
            # The first one's length for both, as the pipeline has it.
            ids = tokenize(parts[f"tokenizer{end}"], captions, parts["tokenizer"].model_max_length).input_ids
            output = model(send(ids, model.device), output_hidden_states=True)
            clips.append(output.hidden_states[-2].float())
            pooled.append(output.text_embeds.float())
        hidden = torch.cat(clips, dim=-1)
        rows = hidden.new_zeros(len(hidden), self.text_length or 0, hidden.shape[-1])
        if (model := parts.get("text_encoder_3")) is not None:
            ids = tokenize(parts["tokenizer_3"], captions, self.text_length or 0).input_ids
            rows = model(send(ids, model.device))[0].float()
        hidden = torch.nn.functional.pad(hidden, (0, rows.shape[-1] - hidden.shape[-1]))
        return {"hidden": torch.cat([hidden, rows], dim=1), "pooled": torch.cat(pooled, dim=-1)}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        hidden = inputs["encoder_hidden_states"]
        # Without T5 nothing before the network knows its width.
        wide = torch.nn.functional.pad(hidden, (0, config_of(network).joint_attention_dim - hidden.shape[-1]))
        output: torch.Tensor = network(x_t, wide, inputs["pooled_projections"], timesteps, return_dict=False)[0]
        return output


SD3 = StableDiffusion3()
