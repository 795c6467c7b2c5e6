"""The families of models, one file each, and how a pipeline finds its own.

    Stable Diffusion 1.x, 2.x, SDXL, 3; FLUX.1, FLUX.2 klein, Chroma; Z-Image, Qwen-Image, Lumina-Image 2.0, Sana, AuraFlow

To add one: a file with a `Family`, and its name in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ambient_sd.families.auraflow import AURAFLOW
from ambient_sd.families.chroma import CHROMA
from ambient_sd.families.family import Family
from ambient_sd.families.flux import FLUX
from ambient_sd.families.flux2 import KLEIN
from ambient_sd.families.guidance import Guidance
from ambient_sd.families.lumina2 import LUMINA2
from ambient_sd.families.qwen_image import QWEN_IMAGE
from ambient_sd.families.sana import SANA
from ambient_sd.families.sd import SD
from ambient_sd.families.sd3 import SD3
from ambient_sd.families.sdxl import SDXL
from ambient_sd.families.z_image import Z_IMAGE
from ambient_sd.utils.errors import UserError

FAMILIES: tuple[Family, ...] = (SD, SDXL, SD3, FLUX, KLEIN, CHROMA, Z_IMAGE, QWEN_IMAGE, LUMINA2, SANA, AURAFLOW)
# What a guard can watch.
SUPPORTED = (*(kind for family in FAMILIES for kind in family.guidance), *(f.guarded for f in FAMILIES if f.guarded))


def of_class(kind: str) -> Family | None:
    """Return the family that a class of pipelines belongs to, or None.

    Example:
        >>> of_class("StableDiffusionXLPipeline").name
        'SDXL base'
    """
    return next((family for family in FAMILIES if kind in family.guidance), None)


def of_pipeline(pipe: Any) -> Family:
    """Return the family of a pipeline by its class and that class's bases.

    An unknown one is taken for Stable Diffusion: `guidance_of` refuses it without a U-Net, and the guard checks the rest
    when it samples.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> of_pipeline(tiny_pipeline()).name
        'Stable Diffusion 1.x or 2.x'
    """
    found = (of_class(kind.__name__) for kind in type(pipe).__mro__)
    return next((family for family in found if family is not None), SD)


def network_of(pipe: Any) -> Any:
    """Return the denoising network of a pipeline; None if it has none.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe = tiny_pipeline()
        >>> network_of(pipe) is pipe.unet
        True
    """
    return getattr(pipe, of_pipeline(pipe).network, None)


def layout_of(pipe: Any) -> Guidance:
    """Return how a pipeline calls its network, guided or not.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> layout_of(tiny_pipeline()).time
        'timestep'
    """
    family = of_pipeline(pipe)
    known = (family.guidance[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in family.guidance)
    layout = next(known, family.guidance[family.pipeline])
    # Sana 1.5's takes the scheduler's timestep times 0.001.
    scale = getattr(getattr(getattr(pipe, layout.network, None), "config", None), "timestep_scale", None) or 1.0
    return layout if scale == 1.0 else replace(layout, timesteps=layout.timesteps / scale)


def guidance_of(pipe: Any) -> Guidance:
    """Return how a pipeline lays out its guidance.

    Raises:
        UserError: the pipeline cannot be guarded, or is distilled and has no unconditional half.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> guidance_of(tiny_pipeline()).network
        'unet'
    """
    guidance = layout_of(pipe)
    for name in (guidance.network, "encode_prompt"):
        if getattr(pipe, name, None) is None:
            raise UserError(
                f"{type(pipe).__name__} has no {name}",
                rule="the guard hooks the network of a text-to-image pipeline with classifier-free guidance",
                remedy=f"use one of {', '.join(SUPPORTED)}",
            )
    refuse_distilled(pipe)
    return guidance


def tokenizers_of(pipe: Any) -> list[Any]:
    """Return the tokenizers of a pipeline, the first one first.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> [tokenizer.model_max_length for tokenizer in tokenizers_of(tiny_pipeline())]
        [24]
    """
    return list(named_tokenizers(pipe).values())


def named_tokenizers(pipe: Any) -> dict[str, Any]:
    """Return the tokenizers of a pipeline by name, the first one first.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> list(named_tokenizers(tiny_pipeline()))
        ['tokenizer']
    """
    family = of_pipeline(pipe)
    names = [name for name in family.text_parts if name.startswith("tokenizer")]
    return {name: one for name in names if (one := getattr(pipe, name, None)) is not None}


def reading(family: Family, tokenizers: Mapping[str, Any]) -> tuple[list[Any], list[int]]:
    """Return the tokenizers that decide what is read of a text, and how many of its tokens each reads.

    Where a family has `readers`, what another tokenizer cuts is read by them; without them (Stable Diffusion 3 without T5) by none.

    Args:
        family: of the model.
        tokenizers: that the model has, by name.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> reading(SD, {"tokenizer": tiny_pipeline().tokenizer})[1]
        [22]
    """
    chosen = [one for name, one in tokenizers.items() if name in family.readers]
    found = chosen or list(tokenizers.values())
    most = family.text_length if chosen or not family.readers else None
    return found, [min(one.model_max_length, most or one.model_max_length) - family.around(one) for one in found]


def refuse_distilled(pipe: Any) -> None:
    """Raise a `UserError` if a pipeline is distilled.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> refuse_distilled(tiny_pipeline())
    """
    why = distilled(pipe)
    if why is not None:
        raise UserError(
            why,
            rule="a distilled sampler has no unconditional half, so there is nothing to measure",
            remedy="use the model that it was distilled from, with DDIM, DPM++, Euler or PNDM",
        )


def distilled(pipe: Any) -> str | None:
    """Say what makes a pipeline one without classifier-free guidance (LCM and its kin), or return None.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> distilled(tiny_pipeline()) is None
        True
    """
    return of_pipeline(pipe).distilled(pipe)
