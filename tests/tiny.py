"""Tiny but real models and images for the tests: diffusers' and transformers' own classes at toy width, no network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image, ImageDraw
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from ambient_sd.assets.tiny import SIZE, tiny_tokenizer, unseeded_pipeline


def tiny_pipeline(prediction_type: str = "v_prediction", seed: int = 0) -> StableDiffusionPipeline:
    """A random StableDiffusionPipeline with SD2's classes and schedule, about 0.1M parameters; the global generator goes on from it."""
    torch.manual_seed(seed)
    pipe = unseeded_pipeline(prediction_type)
    pipe.set_progress_bar_config()
    return pipe


def tiny_sd15_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A random StableDiffusionPipeline with what is peculiar to 1.5: heads as one number, convolutions around attention,
    PNDM, a safety checker."""
    pipe = tiny_pipeline("epsilon", seed)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    # At random weights it finds something in everything.
    torch.nn.init.constant_(checker.concept_embeds_weights, 2.0)
    torch.nn.init.constant_(checker.special_care_embeds_weights, 2.0)
    return StableDiffusionPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=checker, feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
    )  # fmt: skip


def tiny_sdxl_pipeline(seed: int = 0, zero_empty: bool = True) -> StableDiffusionXLPipeline:
    """A random StableDiffusionXLPipeline with SDXL base's classes and schedule; no two widths of its texts are equal."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    common = {
        "vocab_size": len(tokenizer), "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 24, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=2,
        cross_attention_dim=16 + 24, attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIZE, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.13025,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        interpolation_type="linear",
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=16, **common)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, projection_dim=20, **common)),
        tokenizer=tokenizer, tokenizer_2=tokenizer_2, unet=unet, scheduler=scheduler, add_watermarker=False,
        force_zeros_for_empty_prompt=zero_empty,
    )  # fmt: skip


def tiny_folder(path: Path, count: int = 8, size: int = 48) -> Path:
    """An image folder with metadata.jsonl: `count` images of a coloured disc or square, each with its caption."""
    path.mkdir(parents=True, exist_ok=True)
    colours = ["red", "green", "blue", "orange", "purple", "black", "brown", "gray"]
    with (path / "metadata.jsonl").open("w") as rows:
        for i in range(count):
            image = Image.new("RGB", (size, size), "white")
            draw = ImageDraw.Draw(image)
            box = (4 + i % 5, 6, size - 6, size - 4 - i % 7)
            colour = colours[i % len(colours)]
            shape = "disc" if i % 2 else "square"
            (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=colour)
            image.save(path / f"{i:03d}.png")
            rows.write(json.dumps({"file_name": f"{i:03d}.png", "text": f"a {colour} {shape} {i}"}) + "\n")
    return path


def noise_image(seed: int, size: int = 24) -> Image.Image:
    """An image that resembles no other: large random patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((size, size), Image.Resampling.NEAREST)


def image_folder(path: Path, images: list[Image.Image], captions: list[str] | None = None) -> Path:
    """A folder of these images, with metadata.jsonl where captions are given."""
    path.mkdir(parents=True)
    names = [f"{i:03d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        image.save(path / name)
    if captions is not None:
        rows = [json.dumps({"file_name": n, "text": c}) for n, c in zip(names, captions, strict=True)]
        (path / "metadata.jsonl").write_text("\n".join(rows))
    return path
