"""Z-Image: one stream of image and text tokens, Qwen3 as text encoder, trained by flow matching.

conditioning   Qwen3's last hidden state but one of the caption in its chat template, as many rows as tokens
x0             (mean - shift) * scale: the VAE is that of FLUX.1, and nothing is drawn from it
timestep       (1000 - t) / 1000: 1 at the image
output         the flow with the other sign, x0 - eps

The network takes lists: one tensor (C, 1, h, w) and one (L, D) for each image. Not here: Omni, which takes images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.flow import FlowTransformer, read_rows
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.original import OriginalNames
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

_BLOCKS = ("layers", "noise_refiner", "context_refiner")
_INNER, _FUSED = (
    {"attention.to_out.0": "attention.out"},
    {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")},
)
_NAMES = OriginalNames(
    blocks={kind: kind for kind in _BLOCKS},
    inner={kind: _INNER for kind in _BLOCKS},
    outer={
        "all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    },
    fused={kind: _FUSED for kind in _BLOCKS},
)  # fmt: skip


class ZImage(FlowTransformer):
    """Describe Z-Image.

    Example:
        >>> Z_IMAGE.image_tokens({}, (16, 128, 128))
        4096
    """

    name = "Z-Image"
    pipeline = "ZImagePipeline"
    guidance: Mapping[str, Guidance] = {
        "ZImagePipeline": Guidance(
            network="transformer", sample="x", embeds="cap_feats", time="t", timesteps=1000.0, reversed=True, halves="batch",
            first="cond", listed=True, excess=True, tokens=False,
        ),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "ZImageTransformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "Qwen3Model"), "tokenizer": ("transformers", "AutoTokenizer"),
    }  # fmt: skip
    draws = False
    exact_start = True
    originals = _NAMES
    needs = ("in_channels", "all_patch_size", "cap_feat_dim")
    text_length = 512

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        self.check_width(model, network, "cap_feat_dim", model.text_config("text_encoder").hidden_size)
        if network.get("siglip_feat_dim") is not None:
            raise UserError(f"the transformer of {model.name} has siglip_feat_dim = {network['siglip_feat_dim']!r}",
                            rule="Omni variants take images beside a caption", remedy="give a text-to-image base")  # fmt: skip
        if 2 not in network["all_patch_size"]:
            raise UserError(f"the transformer of {model.name} has all_patch_size = {network['all_patch_size']}",
                            rule="its pipeline uses patches of 2 x 2", remedy="fetch the base anew")  # fmt: skip

    def patch(self, network: Mapping[str, Any]) -> int:
        return 2

    def native_side(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return 1024  # whatever its parts say

    def guided(self, pipe: Any, scale: float, count: int) -> dict[str, Any]:
        # Its pipeline computes cond + scale (cond - uncond), and does so above 0.
        return {"guidance_scale": max(0.0, scale - 1.0)}

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        tokenizer, model = parts["tokenizer"], parts["text_encoder"]
        chats = [[{"role": "user", "content": caption}] for caption in captions]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        found = tokenizer(texts, padding="max_length", max_length=self.text_length, truncation=True)
        ids, mask = (send(torch.tensor(found[name]), model.device) for name in ("input_ids", "attention_mask"))
        states = model(
            input_ids=ids, attention_mask=mask.bool(), output_hidden_states=True, use_cache=False
        ).hidden_states
        return read_rows(states[-2].float(), found["attention_mask"])

    def around(self, tokenizer: Any) -> int:
        chat = [{"role": "user", "content": ""}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return len(tokenizer(text).input_ids)

    def inputs(
        self, embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
    ) -> dict[str, Any]:
        lengths = embeddings["mask"].sum(1).tolist()
        return {"cap_feats": [row[:n] for row, n in zip(send(embeddings["hidden"], device), lengths, strict=True)]}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        images = list(x_t.unsqueeze(2).unbind())
        output = network(images, (1000 - timesteps) / 1000, inputs["cap_feats"], return_dict=False)[0]
        return -torch.stack(output).squeeze(2)


Z_IMAGE = ZImage()
