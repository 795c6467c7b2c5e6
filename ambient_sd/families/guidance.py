"""How each diffusers pipeline calls its network: names of the inputs, and where the two halves of guidance are.

Two ways. "batch": one call on `[unconditional..., conditional...]`. "calls": two calls with equal inputs but for the texts,
told apart by the tensors that `encode_prompt` returned, not by their order. A pipeline is looked up by the names of its
class and of its bases; an unknown one with a U-Net is taken for Stable Diffusion and checked when it samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ambient_sd.utils.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Describe one family of pipelines.

    Attributes:
        network: the pipeline's attribute that holds the network.
        sample, embeds: names of the network's input and of the embeddings.
        pooled: path to the pooled embeddings among the inputs; empty if there are none.
        outputs: positions in `encode_prompt`'s result of (embeds, pooled) for the conditional half; pooled may be None.
        timesteps: what the network's timestep is multiplied by to give the scheduler's.
        halves: "batch" or "calls".
        scale: "guidance_scale" (a property), or the local variable of the pipeline's `__call__` that holds the scale.
        texts: with "calls": inputs that belong to a half's text beside the embeddings, and their positions in
            `encode_prompt`'s result.
        shared: inputs that have no row per image, whatever their size.
        latents_end_early: whether a run with output_type="latent" returns without `maybe_free_model_hooks`.
        tokens: whether the first tokenizer's tokens are, one by one, the rows of the embeddings.
    """

    network: str
    sample: str
    embeds: str
    pooled: tuple[str, ...] = ()
    outputs: tuple[int, int | None] = (0, None)
    timesteps: float = 1.0
    halves: Literal["batch", "calls"] = "batch"
    scale: str = "guidance_scale"
    texts: dict[str, int] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    latents_end_early: bool = False
    tokens: bool = True


STABLE_DIFFUSION = Layout(network="unet", sample="sample", embeds="encoder_hidden_states")
SDXL = replace(STABLE_DIFFUSION, pooled=("added_cond_kwargs", "text_embeds"), outputs=(0, 2))

LAYOUTS: dict[str, Layout] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusionXLImg2ImgPipeline": SDXL,
    "StableDiffusionXLInpaintPipeline": replace(SDXL, latents_end_early=True),
    "StableDiffusion3Pipeline": Layout(
        network="transformer", sample="hidden_states", embeds="encoder_hidden_states", pooled=("pooled_projections",), outputs=(0, 2),
        tokens=False,
    ),
    "FluxPipeline": Layout(
        network="transformer", sample="hidden_states", embeds="encoder_hidden_states", pooled=("pooled_projections",), outputs=(0, 1),
        timesteps=1000.0, halves="calls", scale="true_cfg_scale", texts={"txt_ids": 2},
        shared=frozenset({"txt_ids", "img_ids"}), tokens=False,
    ),
}  # fmt: skip
SUPPORTED = (*LAYOUTS, "AmbientSDPipeline")


def layout_of(pipe: Any) -> Layout:
    """Return the layout of a pipeline.

    Raises:
        UserError: the pipeline cannot be guarded, or is distilled and has no unconditional half.
    """
    known = (LAYOUTS[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in LAYOUTS)
    layout = next(known, STABLE_DIFFUSION)
    for name in (layout.network, "encode_prompt"):
        if getattr(pipe, name, None) is None:
            raise UserError(
                f"{type(pipe).__name__} has no {name}",
                rule="the guard hooks the network of a text-to-image pipeline with classifier-free guidance",
                remedy=f"use one of {', '.join(SUPPORTED)}",
            )
    refuse_distilled(pipe)
    return layout


def refuse_distilled(pipe: Any) -> None:
    """Raise a `UserError` if a pipeline is distilled."""
    why = distilled(pipe)
    if why is not None:
        raise UserError(
            why,
            rule="a distilled sampler has no unconditional half, so there is nothing to measure",
            remedy="use the model that it was distilled from, with DDIM, DPM++, Euler or PNDM",
        )


def distilled(pipe: Any) -> str | None:
    """Say what makes a pipeline one without classifier-free guidance (LCM and its kin), or return None.

    The U-Net says it, not the sampler: with an LCM LoRA and LCMScheduler a stock pipeline asks its network for both halves
    at every scale above 1, and that is guidance like any other.
    """
    config = getattr(getattr(pipe, "unet", None), "config", None)
    if getattr(config, "time_cond_proj_dim", None) is not None:
        return f"the U-Net of {type(pipe).__name__} takes the guidance scale as an input (time_cond_proj_dim)"
    return None
