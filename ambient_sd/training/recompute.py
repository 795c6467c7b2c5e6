"""Gradient checkpointing of a share of the blocks (Chen et al. 2016): activations of those are computed again in the backward pass.

    block i of the forward pass is recomputed where floor((i + 1) f) > floor(i f)         spread evenly for any share f

A block is what diffusers recomputes as one: a resnet, a transformer block. Losses and weights are the same bits for every share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils.checkpoint


def recompute(network: Any, fraction: float = 1.0) -> None:
    """Let a network of diffusers recompute the activations of a share of its blocks.

    Args:
        network: a U-Net or transformer.
        fraction: share of the blocks, in (0, 1].

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> recompute(tiny_pipeline().unet, 0.5)
    """
    if fraction >= 1:
        network.enable_gradient_checkpointing()
        return
    places: dict[int, int] = {}  # blocks in the order of the first pass; the network keeps them alive

    def run(block: torch.nn.Module, *args: Any) -> Any:
        i = places.setdefault(id(block), len(places))
        if math.floor((i + 1) * fraction) > math.floor(i * fraction):
            return torch.utils.checkpoint.checkpoint(block.__call__, *args, use_reentrant=False)
        return block(*args)

    network.enable_gradient_checkpointing(run)
