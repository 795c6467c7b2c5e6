"""Two LoRA steps on a randomly initialised Stable Diffusion 2 of full size (865M U-Net, bf16, batch 1): time and peak memory.

    python benchmarks/sd2_size_lora.py --work build/sd2-size --resolution 512

The weights are noise, the classes, widths, schedule and code path those of configs/sd2-lora.yaml. The model is written
once (5 GB) and reused; latents and captions go to a cache first, as a user would do, so that VAE and text encoder are gone
before the U-Net comes. The figure is the peak of the training process, as the operating system counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def build(folder: Path) -> None:
    """Write the pipeline, part by part: no two of them are in memory at once."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ambient_sd.assets import BASE

    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        "vae": lambda: AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                hidden_act="gelu", bos_token_id=1868, eos_token_id=1869, pad_token_id=1869,
            )
        ),
        "tokenizer": lambda: CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=77),
        "scheduler": lambda: DDIMScheduler.from_pretrained(BASE / "scheduler"),
    }  # fmt: skip
    for name, make in parts.items():
        made = make()
        if isinstance(made, torch.nn.Module):
            print(f"{name}: {sum(p.numel() for p in made.parameters()) / 1e6:.0f}M parameters", flush=True)
        made.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None], "safety_checker": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False, "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/sd2-size"), help="folder of model, cache and result")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--images", type=int, default=4)
    args = parser.parse_args()
    from ambient_sd.assets import IMAGES

    if not (args.work / "model" / "model_index.json").exists():
        build(args.work / "model")
    command = [
        sys.executable, str(ROOT / "train_text_to_image_ambient.py"), "--lora", "--rank", "16", "--gradient_checkpointing",
        "--pretrained_model_name_or_path", str(args.work / "model"), "--train_data_dir", str(IMAGES),
        "--max_train_samples", str(args.images), "--latent_cache_dir", str(args.work / "cache"), "--mixed_precision", "bf16",
        "--train_batch_size", "1", "--gradient_accumulation_steps", "1", "--resolution", str(args.resolution),
        "--max_train_steps", str(args.steps), "--report_to", "none", "--output_dir", str(args.work / "out"),
    ]  # fmt: skip
    for what, steps in (("filling the cache, one step", 1), (f"{args.steps} steps from the cache", args.steps)):
        command[command.index("--max_train_steps") + 1] = str(steps)
        begin = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"training ended with {process.returncode}")
        peak = usage.ru_maxrss / 1024**2 / (1024 if sys.platform == "darwin" else 1)
        print(
            f"{what}: {time.perf_counter() - begin:.0f} s, peak memory {peak:.1f} GiB, {torch.get_num_threads()} threads",
            flush=True,
        )


if __name__ == "__main__":
    main()
