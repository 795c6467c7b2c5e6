"""AuraFlow: a transformer of double and single streams on SDXL's latents, UMT5 as text encoder, trained by flow matching.

conditioning   UMT5's last hidden state, 256 rows, those behind the caption zeros
x0             (mean + std * draw) * scale
timestep       t / 1000
output         the flow eps - x0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.flow import FlowTransformer
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.original import OriginalNames
from ambient_sd.families.sd import tokenize
from ambient_sd.utils.devices import send

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

_FEED = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
_ROLES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_TEXT_ROLES = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}
_NAMES = OriginalNames(
    blocks={"joint_transformer_blocks": "double_layers", "single_transformer_blocks": "single_layers"},
    inner={
        "joint_transformer_blocks": {
            "norm1.linear": "modX.1", "norm1_context.linear": "modC.1",
            **{f"attn.{ours}": f"attn.w2{role}" for role, ours in _ROLES.items()},
            **{f"attn.{ours}": f"attn.w1{role}" for role, ours in _TEXT_ROLES.items()},
            **{f"{ff}.{ours}": f"{mlp}.{theirs}" for ff, mlp in (("ff", "mlpX"), ("ff_context", "mlpC")) for ours, theirs in _FEED.items()},
        },
        "single_transformer_blocks": {
            "norm1.linear": "modCX.1", **{f"attn.{ours}": f"attn.w1{role}" for role, ours in _ROLES.items()},
            **{f"ff.{ours}": f"mlp.{theirs}" for ours, theirs in _FEED.items()},
        },
    },
    outer={
        "time_step_proj.linear_1": "t_embedder.mlp.0", "time_step_proj.linear_2": "t_embedder.mlp.2", "context_embedder": "cond_seq_linear",
        "proj_out": "final_linear", "pos_embed.proj": "init_x_linear",
    },
    swapped={"norm_out.linear": "modF.1"},
)  # fmt: skip


class AuraFlowFamily(FlowTransformer):
    """Describe AuraFlow.

    Example:
        >>> AURAFLOW.native_side({}, {})
        1024
    """

    name = "AuraFlow"
    pipeline = "AuraFlowPipeline"
    guidance: Mapping[str, Guidance] = {
        "AuraFlowPipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", timesteps=1000.0, tokens=False,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "AuraFlowTransformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "UMT5EncoderModel"), "tokenizer": ("transformers", "AutoTokenizer"),
    }  # fmt: skip
    originals = _NAMES
    shifted = False
    needs = ("in_channels", "patch_size", "joint_attention_dim")
    text_length = 256

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        self.check_width(model, network, "joint_attention_dim", model.text_config("text_encoder").d_model)

    def native_side(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return 1024  # whatever its parts say

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        model = parts["text_encoder"]
        given = tokenize(parts["tokenizer"], captions, self.text_length or 0)
        mask = send(given.attention_mask, model.device)
        hidden = model(input_ids=send(given.input_ids, model.device), attention_mask=mask)[0]
        return {"hidden": (hidden * mask.unsqueeze(-1)).float()}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        output: torch.Tensor = network(x_t, timestep=timesteps / 1000, return_dict=False, **inputs)[0]
        return output


AURAFLOW = AuraFlowFamily()
