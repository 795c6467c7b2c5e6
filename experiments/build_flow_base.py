"""Build a small Stable Diffusion 3 on the embedded base's VAE and text encoder, its transformer random: what `configs/emoji-sd3.yaml` trains.

    python -m experiments.build_flow_base --out build/flow-base [--seed 0] [--width 192] [--depth 4]

Everything is diffusers' own classes: SD3Transformer2DModel with query norms, FlowMatchEulerDiscreteScheduler, no T5. Both CLIP text
encoders are the embedded base's, with the identity as their projection.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ambient_sd.assets import BASE
from ambient_sd.families.base import Model


def text_encoder() -> CLIPTextModelWithProjection:
    """Return the embedded base's text encoder with a projection that changes nothing."""
    own = Model(str(BASE)).load("text_encoder")
    config = CLIPTextConfig.from_dict({**own.config.to_dict(), "projection_dim": own.config.hidden_size})
    made = CLIPTextModelWithProjection(config)
    made.text_model.load_state_dict(getattr(own, "text_model", own).state_dict())
    made.text_projection.weight.data.copy_(torch.eye(config.hidden_size))
    return made.eval()


def build(width: int, depth: int, seed: int, shift: float) -> StableDiffusion3Pipeline:
    """Return the pipeline; its transformer's weights are a function of the seed."""
    base = Model(str(BASE))
    encoder, tokenizer, vae = text_encoder(), base.load("tokenizer"), base.load("vae")
    vae.register_to_config(shift_factor=0.0)  # which the pipeline adds
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=depth, attention_head_dim=32,
            num_attention_heads=width // 32, caption_projection_dim=width, joint_attention_dim=2 * encoder.config.hidden_size,
            pooled_projection_dim=2 * encoder.config.projection_dim, pos_embed_max_size=24, qk_norm="rms_norm",
        )  # fmt: skip
        # As in DiT: a network that begins at zero output trains faster.
        torch.nn.init.zeros_(transformer.proj_out.weight)
        torch.nn.init.zeros_(transformer.proj_out.bias)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=vae, text_encoder=encoder,
        tokenizer=tokenizer, text_encoder_2=text_encoder(), tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--seed", type=int, default=0, help="of the transformer's weights")
    parser.add_argument("--width", type=int, default=192, help="channels of a token, a multiple of 32")
    parser.add_argument("--depth", type=int, default=4, help="blocks")
    parser.add_argument("--shift", type=float, default=1.0, help="of the scheduler; images of 64 pixels want little")
    arguments = parser.parse_args()
    build(arguments.width, arguments.depth, arguments.seed, arguments.shift).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
