"""SDXL base: two CLIP text encoders, and sizes beside the caption.

conditioning   the last hidden state but one of both encoders side by side; the pooled, projected output of the second
time_ids       (height, width of the original, top, left of the crop, height, width of the target), pixels
               Podell et al., "SDXL" (2023), section 2.2; the order is that of StableDiffusionXLPipeline
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ambient_sd.families.sd import StableDiffusion, tokenize


class StableDiffusionXL(StableDiffusion):
    """Describe SDXL base; the refiner is another model."""

    name = "SDXL base"
    parts: Mapping[str, tuple[str, str]] = {
        **StableDiffusion.parts,
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"), "tokenizer_2": ("transformers", "CLIPTokenizer"),
    }  # fmt: skip
    takes_sizes = True

    def embed(self, parts: Mapping[str, Any], caption: str) -> dict[str, torch.Tensor]:
        outputs = []
        for end in ("", "_2"):
            model = parts[f"text_encoder{end}"]
            tokens = tokenize(parts[f"tokenizer{end}"], caption)
            outputs.append(model(tokens.input_ids.to(model.device), output_hidden_states=True))
        hidden = torch.cat([output.hidden_states[-2][0].float().cpu() for output in outputs], dim=-1)
        return {"hidden": hidden, "pooled": outputs[1].text_embeds[0].float().cpu()}

    def inputs(
        self, embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
    ) -> dict[str, Any]:
        assert sizes is not None
        added = {"text_embeds": embeddings["pooled"].to(device), "time_ids": sizes.to(device)}
        return {**super().inputs(embeddings, sizes, device), "added_cond_kwargs": added}


SDXL = StableDiffusionXL()
