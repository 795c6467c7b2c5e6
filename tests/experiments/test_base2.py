"""Version 2 of the base: a stock pipeline, in the latent space of version 1."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

from ambient_sd.assets import BASE

BASE2 = Path(__file__).parents[2] / "experiments" / "base2"


def test_a_stock_pipeline_reads_it_and_it_draws_what_the_caption_says() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(BASE2)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
    prompts = ["red circle", "blue square", "green apple", "red heart"]
    images = pipe(prompts, num_inference_steps=10, guidance_scale=4, generator=generator, output_type="pt").images
    middle = images[:, :, 24:40, 24:40].mean((2, 3))  # (4, RGB)
    assert middle.argmax(1).tolist() == [0, 2, 1, 0]
    assert images[:, :, :4, :4].mean() > 0.9, "the ground is white"


def test_latents_are_those_of_version_1() -> None:
    """So the cached latents, noise levels and captions of one mean the same in the other."""
    one, two = (load_file(base / "vae" / "diffusion_pytorch_model.safetensors") for base in (BASE, BASE2))
    shared = [name for name in one if name.startswith(("encoder.", "quant_conv."))]
    assert shared and all(torch.equal(one[name], two[name]) for name in shared)
    assert any(not torch.equal(one[name], two[name]) for name in one if name.startswith("decoder."))
    scales = [AutoencoderKL.load_config(base / "vae")["scaling_factor"] for base in (BASE, BASE2)]
    assert scales[0] == scales[1] == 1
    assert len({(base / "tokenizer" / "tokenizer.json").read_bytes() for base in (BASE, BASE2)}) == 1
