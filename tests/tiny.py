"""Tiny but real models and pictures for the tests: diffusers' and transformers' own classes at toy width, no network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 32  # pixels; the tiny VAE divides by 2, so latents are 4 x 16 x 16


def tiny_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every character is a token, nothing is unknown."""
    letters = sorted({chr(c) for c in range(33, 127)})
    vocab: dict[str, int] = {}
    for symbol in letters + [s + "</w>" for s in letters] + ["<|startoftext|>", "<|endoftext|>"]:
        vocab[symbol] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def tiny_pipeline(prediction_type: str = "v_prediction", seed: int = 0) -> StableDiffusionPipeline:
    """A random StableDiffusionPipeline with SD2's classes and schedule, about 0.1M parameters."""
    torch.manual_seed(seed)
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
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def tiny_folder(path: Path, count: int = 8, size: int = 48) -> Path:
    """A picture folder with metadata.jsonl: `count` pictures of a coloured disc or square, each with its caption."""
    path.mkdir(parents=True, exist_ok=True)
    colours = ["red", "green", "blue", "orange", "purple", "black", "brown", "gray"]
    with (path / "metadata.jsonl").open("w") as rows:
        for i in range(count):
            picture = Image.new("RGB", (size, size), "white")
            draw = ImageDraw.Draw(picture)
            box = (4 + i % 5, 6, size - 6, size - 4 - i % 7)
            colour = colours[i % len(colours)]
            shape = "disc" if i % 2 else "square"
            (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=colour)
            picture.save(path / f"{i:03d}.png")
            rows.write(json.dumps({"file_name": f"{i:03d}.png", "text": f"a {colour} {shape} {i}"}) + "\n")
    return path
