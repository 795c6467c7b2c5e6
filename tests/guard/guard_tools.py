"""What the guard's tests share: a tiny SDXL, one way to sample, a snapshot of everything the guard could disturb."""

from __future__ import annotations

from typing import Any

import tiny
import tiny_flow
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "heun": (HeunDiscreteScheduler, {}),
}
PROMPTS = ["a cat", "the red dog"]


def pipeline(prediction_type: str = "v_prediction", scheduler: str = "ddim") -> Any:
    pipe = tiny.tiny_pipeline(prediction_type)
    kind, options = SCHEDULERS[scheduler]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = tiny.tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def woken(make: Any) -> Any:
    """Return a maker of the same pipeline, quiet, whose text has an effect that can be seen."""

    def made() -> Any:
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        _wake(pipe.transformer)
        return pipe

    return made


def _wake(transformer: torch.nn.Module) -> None:
    """Give a fresh transformer an effect of the text that can be seen: its first weights are tiny."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)


# One batch of halves without T5, which SD3 can do without, and two calls a step on packed latents.
tiny_sd3 = woken(lambda: tiny_flow.tiny_sd3_pipeline(t5=False))
tiny_flux = woken(lambda: tiny_flow.tiny_flux_pipeline(dev=False))


def sample(pipe: Any, prompt: Any = "a cat", seed: int = 3, steps: int = 3, **kwargs: Any) -> torch.Tensor:
    """Sample one seed; `pt` output in float32, so that equality is equality of the decoder's output."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, num_inference_steps=steps, generator=generator, output_type="pt", **kwargs).images


HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_always_called",
)  # fmt: skip
METHODS = ("encode_prompt", "prepare_latents", "check_inputs", "maybe_free_model_hooks")


def network(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def state(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline that a guard could leave changed, by identity where there is one."""
    outer = network(pipe)
    eager = getattr(outer, "_orig_mod", outer)
    modules = dict(eager.named_modules())

    def own(names: tuple[str, ...], module: Any) -> dict[str, Any]:
        return {name: vars(module)[name] for name in names if name in vars(module)}

    kept = ("gradient_checkpointing", "_gradient_checkpointing_func", "_compiled_call_impl", "forward")
    return {
        "attributes": set(vars(pipe)),
        "interrupt": getattr(pipe, "interrupt", None),
        "methods": [getattr(pipe, name).__func__ for name in METHODS if hasattr(pipe, name)],
        "network attributes": set(vars(outer)),
        "network forward": vars(outer).get("forward", outer.forward.__func__ if outer is eager else None),
        "hooks": {name: list(getattr(outer, name).items()) for name in HOOKS},
        "inner hooks": {n: {h: list(getattr(m, h).items()) for h in HOOKS} for n, m in modules.items() if n},
        "inner attributes": {n: own(kept, m) for n, m in modules.items()},
        "processors": {name: id(value) for name, value in getattr(eager, "attn_processors", {}).items()},
        "scheduler": (id(pipe.scheduler), type(pipe.scheduler), dict(pipe.scheduler.config)),
        "requires_grad": [p.requires_grad for p in eager.parameters()],
        "grad": [p.grad for p in eager.parameters()],
        "weights": [p._version for p in eager.parameters()],
        "grad mode": torch.is_grad_enabled(),
    }


def state_differs(pipe: Any, before: dict[str, Any]) -> list[str]:
    """Return the names of what changed since `before`. A wrapped method has no `__func__`: that is a change too."""
    try:
        now = state(pipe)
    except AttributeError as error:
        return [str(error)]
    return [name for name in before if before[name] != now[name]]
