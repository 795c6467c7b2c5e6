"""SDXL base: two CLIP text encoders, and sizes beside the caption.

conditioning   the last hidden state but one of both encoders side by side; the pooled, projected output of the second
time_ids       (height, width of the original, top, left of the crop, height, width of the target), pixels
               Podell et al., "SDXL" (2023), section 2.2; the order is that of StableDiffusionXLPipeline
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.guidance import Guidance
from ambient_sd.families.sd import LAYOUT, StableDiffusion, tokenize
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model

_SIZES = 6  # of time_ids; the refiner takes five
_XL = replace(LAYOUT, pooled=("added_cond_kwargs", "text_embeds"), outputs=(0, 2))


class StableDiffusionXL(StableDiffusion):
    """Describe SDXL base; the refiner is another model.

    Example:
        >>> SDXL.refuse({"requires_aesthetics_score": True})
        'the SDXL refiner starts from an image and is conditioned on an aesthetic score'
    """

    name = "SDXL base"
    pipeline = "StableDiffusionXLPipeline"
    guarded = None
    guidance: Mapping[str, Guidance] = {
        "StableDiffusionXLPipeline": _XL, "StableDiffusionXLImg2ImgPipeline": _XL,
        "StableDiffusionXLInpaintPipeline": replace(_XL, latents_end_early=True),
    }  # fmt: skip
    parts: Mapping[str, tuple[str, str]] = {
        **StableDiffusion.parts,
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"), "tokenizer_2": ("transformers", "CLIPTokenizer"),
    }  # fmt: skip
    single_file_texts: Mapping[str, tuple[str, ...]] = {
        "text_encoder": ("conditioner.embedders.0.transformer.",), "text_encoder_2": ("conditioner.embedders.1.model.",),
    }  # fmt: skip
    architectures: Mapping[tuple[Any, str], tuple[str, str]] = {(2048, "epsilon"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")}  # fmt: skip
    lora_prefixes: Mapping[str, Mapping[str, str]] = {
        "unet": StableDiffusion.lora_prefixes["unet"],
        "text_encoder": {"lora_te1_": "kohya", "lora_te_": "kohya", "text_encoders.clip_l.transformer.": "ComfyUI"},
        "text_encoder_2": {"lora_te2_": "kohya", "text_encoders.clip_g.transformer.": "ComfyUI"},
    }
    takes_sizes = True
    additions = (None, "text_time")

    def refuse(self, index: Mapping[str, Any]) -> str | None:
        if index.get("requires_aesthetics_score") or index.get("_class_name") == "StableDiffusionXLImg2ImgPipeline":
            return "the SDXL refiner starts from an image and is conditioned on an aesthetic score"
        return None

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        first, second = (model.text_config(part) for part in ("text_encoder", "text_encoder_2"))
        for key, needed in (
            ("addition_embed_type", "text_time"),
            ("cross_attention_dim", first.hidden_size + second.hidden_size),
            (
                "projection_class_embeddings_input_dim",
                second.projection_dim + _SIZES * (network.get("addition_time_embed_dim") or 0),
            ),
        ):
            if network.get(key) != needed:
                raise UserError(
                    f"the U-Net of {model.name} has {key} = {network.get(key)!r}",
                    rule=f"the base's text encoders and six sizes come to {needed!r} (the SDXL refiner takes five)",
                    remedy="give an SDXL base whose parts belong together",
                )

    def zero_empty(self, index: Mapping[str, Any]) -> bool:
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def assembly(self, zero_empty: bool) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": zero_empty, "add_watermarker": False}

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        outputs = []
        for end in ("", "_2"):
            model = parts[f"text_encoder{end}"]
            tokens = tokenize(parts[f"tokenizer{end}"], captions)
            outputs.append(model(send(tokens.input_ids, model.device), output_hidden_states=True))
        hidden = torch.cat([output.hidden_states[-2].float() for output in outputs], dim=-1)
        return {"hidden": hidden, "pooled": outputs[1].text_embeds.float()}

    def inputs(
        self, embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
    ) -> dict[str, Any]:
        assert sizes is not None
        added = {"text_embeds": send(embeddings["pooled"], device), "time_ids": send(sizes, device)}
        return {**super().inputs(embeddings, sizes, device), "added_cond_kwargs": added}

    def kohya_names(self, network: Any) -> dict[str, str]:
        return self.original_names(network)


SDXL = StableDiffusionXL()
