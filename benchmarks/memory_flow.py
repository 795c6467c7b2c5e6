"""What cards today's transformers need: the predicted peak of a training by model, method and resolution (`ambient_sd.training.footprint`).

    python benchmarks/memory_flow.py [--models flux sd35 ...] [--sides 512 1024]

Configurations alone, as the models are published; no weights. A minute or two a cell on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import card

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import tiny_flow  # noqa: E402
import tiny_more  # noqa: E402

from ambient_sd.families.base import check_base  # noqa: E402
from ambient_sd.training import TrainConfig  # noqa: E402
from ambient_sd.training.footprint import predict  # noqa: E402

_KL = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77}  # fmt: skip
_CLIP_G = {**_CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}  # fmt: skip
_T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_QWEN3_4B = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "layer_types": ["full_attention"] * 36}  # fmt: skip
_SD3 = {"sample_size": 128, "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}

# A tiny pipeline of the class, and what of its parts' settings the published model has otherwise.
MODELS: dict[str, tuple[str, Callable[[], Any], dict[str, dict[str, Any]]]] = {
    "sd35": ("Stable Diffusion 3.5 medium", tiny_flow.tiny_sd3_pipeline, {
        "transformer": {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
                        "dual_attention_layers": list(range(13))},
        "vae": _KL, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL,
    }),
    "sd35-large": ("Stable Diffusion 3.5 large", tiny_flow.tiny_sd3_pipeline, {
        "transformer": {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
                        "dual_attention_layers": []},
        "vae": _KL, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL,
    }),
    "flux": ("FLUX.1 dev", tiny_flow.tiny_flux_pipeline, {
        "transformer": {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
                        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56]},
        "vae": {**_KL, "latent_channels": 16}, "text_encoder": _CLIP_L, "text_encoder_2": _T5_XXL,
    }),
    "klein": ("FLUX.2 klein 4B", tiny_flow.tiny_klein_pipeline, {
        "transformer": {"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
                        "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "axes_dims_rope": [32, 32, 32, 32]},
        "vae": {**_KL, "latent_channels": 32}, "text_encoder": _QWEN3_4B,
    }),
    "z-image": ("Z-Image", tiny_more.tiny_z_image_pipeline, {
        "transformer": {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560,
                        "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]},
        "vae": _KL, "text_encoder": _QWEN3_4B,
    }),
    "qwen-image": ("Qwen-Image", tiny_more.tiny_qwen_image_pipeline, {
        "transformer": {"in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24,
                        "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56]},
        "vae": {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True],
                "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
        "text_encoder": {"text_config": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                                         "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000,
                                         "rope_parameters": {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6}},
                         "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}},
    }),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "LoRA of rank 16, gradient checkpointing": {"lora": True, "rank": 16, "gradient_checkpointing": True},
    "the same on a base in 4 bits": {"lora": True, "rank": 16, "gradient_checkpointing": True, "quantize_base": "nf4"},
}


def write(name: str, folder: Path) -> tuple[str, float]:
    """Write a published model's settings; return its title and how many billions of weights its network has."""
    title, make, settings = MODELS[name]
    make().save_pretrained(folder)
    for part, values in settings.items():
        path = folder / part / "config.json"
        held = json.loads(path.read_text())
        path.write_text(json.dumps(held | values))
    network = check_base(str(folder)).outline("transformer")
    return title, sum(p.numel() for p in network.parameters()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="pixels")
    args = parser.parse_args()
    print("| LoRA, bf16, batch 1 | weights | method | " + " | ".join(f"{side} px" for side in args.sides) + " |")
    print("|---" * (3 + len(args.sides)) + "|")
    for name in args.models:
        with tempfile.TemporaryDirectory() as place:
            torch.manual_seed(0)
            title, billions = write(name, Path(place))
            base = check_base(place)
            for method, options in METHODS.items():
                cells = []
                for side in args.sides:
                    config = TrainConfig(place, train_data_dir="images", resolution=side, train_batch_size=1, **options)
                    found = predict(config, base, (side, side), precision="bf16")
                    step, peak = found.step / 2**30, found.peak / 2**30
                    cells.append(f"{step:.1f}, with encoding {peak:.1f} ({card(peak)})")
                print(f"| {title} | {billions:.1f} B | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
