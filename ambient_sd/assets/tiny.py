"""A Stable Diffusion pipeline at toy width with random weights, for examples and tests: diffusers' own classes, no files, no network."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 32  # pixels; the VAE divides by 2, so latents are 4 x 16 x 16


def tiny_tokenizer(**options: str) -> CLIPTokenizer:
    """Build a byte-level CLIP tokenizer without merges: every character is a token, nothing is unknown.

    Example:
        >>> len(tiny_tokenizer()("a cat").input_ids)  # four letters, a beginning and an end
        6
    """
    letters = sorted({chr(c) for c in range(33, 127)})
    vocab: dict[str, int] = {}
    for symbol in letters + [s + "</w>" for s in letters] + ["<|startoftext|>", "<|endoftext|>"]:
        vocab[symbol] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24, **options)


def tiny_pipeline(prediction_type: str = "v_prediction", seed: int = 0) -> StableDiffusionPipeline:
    """Build a random StableDiffusionPipeline with SD2's classes and schedule, about 0.1M parameters.

    Example:
        >>> tiny_pipeline().unet.config.sample_size
        16
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return unseeded_pipeline(prediction_type)


def unseeded_pipeline(prediction_type: str) -> StableDiffusionPipeline:
    """Build the pipeline with weights from torch's global generator.

    Example:
        >>> unseeded_pipeline("epsilon").scheduler.config.prediction_type
        'epsilon'
    """
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIZE, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=(2, 4), use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipe: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    built: StableDiffusionPipeline = pipe
    return built
