"""What the guard's tests share: a tiny SDXL, one way to sample, a snapshot of everything the guard could disturb."""

from __future__ import annotations

from typing import Any

import tiny
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


def sample(pipe: Any, prompt: Any = "a cat", seed: int = 3, steps: int = 3, **kwargs: Any) -> torch.Tensor:
    """Sample one seed; `pt` output in float32, so that equality is equality of the decoder's output."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="pt", **kwargs).images


def state(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline that a guard could leave changed, by identity where there is one."""
    unet = pipe.unet
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        "attributes": set(vars(pipe)),
        "encode_prompt": pipe.encode_prompt.__func__,
        "maybe_free_model_hooks": pipe.maybe_free_model_hooks.__func__,
        "unet attributes": set(vars(unet)),
        "unet forward": unet.forward.__func__,
        "hooks": {name: list(getattr(unet, name).items()) for name in hooks},
        "processors": {name: id(value) for name, value in unet.attn_processors.items()},
        "scheduler": (id(pipe.scheduler), type(pipe.scheduler), dict(pipe.scheduler.config)),
        "requires_grad": [p.requires_grad for p in unet.parameters()],
        "grad": [p.grad for p in unet.parameters()],
        "weights": [p._version for p in unet.parameters()],
        "grad mode": torch.is_grad_enabled(),
    }


def state_differs(pipe: Any, before: dict[str, Any]) -> list[str]:
    """Return the names of what changed since `before`. A wrapped method has no `__func__`: that is a change too."""
    try:
        now = state(pipe)
    except AttributeError as error:
        return [str(error)]
    return [name for name in before if before[name] != now[name]]
