"""Work and memory of Stable Diffusion 2's parts by their configurations: counted, not timed, and without weights.

    python benchmarks/sd2_flops.py

FLOPs by torch's FlopCounterMode (2 per multiplication and addition) of one image on the meta device: no weights, no arithmetic, any
machine. Saved activations are the bytes that autograd keeps of one forward pass in float32, weights left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

STEPS, BATCH, IMAGES, GENERATED, SAMPLING = 100_000, 16, 10_000, 10_000, 50


def parts() -> dict[str, Any]:
    """Return U-Net, VAE and text encoder of Stable Diffusion 2 on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(
                sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=768,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                    hidden_act="gelu",
                )
            ),
        }  # fmt: skip


def flops(call: Callable[[], Any]) -> int:
    """Return the FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def saved_bytes(unet: Any, call: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps for the backward pass of a call, each storage once, weights left out."""
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holds the tensors: a storage that is gone gives its number to another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def count(resolution: int) -> dict[str, float]:
    """Return TFLOP per image, weights in millions and activations in GB at a resolution."""
    made, side = parts(), resolution // 8
    with torch.device("meta"):
        x, e, t = torch.randn(1, 4, side, side), torch.randn(1, 77, 1024), torch.tensor([5])
        pixels, tokens = torch.randn(1, 3, resolution, resolution), torch.zeros(1, 77, dtype=torch.long)
    unet, vae, text = made["unet"], made["vae"], made["text_encoder"]
    forward = lambda: unet(x, t, encoder_hidden_states=e).sample  # noqa: E731
    found = {
        "unet_forward": flops(forward) / 1e12,
        "unet_step": flops(lambda: forward().sum().backward()) / 1e12,
        "vae_encode": flops(lambda: vae.encode(pixels)) / 1e12,
        "vae_decode": flops(lambda: vae.decode(x)) / 1e12,
        "text": flops(lambda: text(tokens)) / 1e12,
        "activations_gb": saved_bytes(unet, forward) / 1e9,
    }
    unet.enable_gradient_checkpointing()
    unet.train()
    found["activations_checkpointed_gb"] = saved_bytes(unet, forward) / 1e9
    return found | {f"{name}_million": sum(p.numel() for p in m.parameters()) / 1e6 for name, m in made.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the counts and what the protocol of docs/sd2.md comes to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=256, help="pixels")
    args = parser.parse_args(argv)
    found = count(args.resolution)
    found["training_pflop"] = found["unet_step"] * STEPS * BATCH / 1e3
    found["encoding_pflop"] = (found["vae_encode"] + found["text"]) * IMAGES / 1e3
    found["generating_pflop"] = (2 * SAMPLING * found["unet_forward"] + found["vae_decode"]) * GENERATED / 1e3
    print(json.dumps({k: round(v, 4) for k, v in found.items()}, indent=1))


if __name__ == "__main__":
    main()
