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
from ambient_sd.families.sd import tokenize
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

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
    readers = ("tokenizer_3",)
    text_length = 256

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
