"""Dropout whose mask is a function of (seed, layer, place in the run), not of whatever a generator did before.

    y = m x / (1 - p)        m ~ Bernoulli(1 - p), one draw per sample

`torch.nn.Dropout` takes from the global generator of its device: a resumed run, another cut into batches or a recomputed
activation would drop other entries. Masks are drawn on the device of x; another kind of device gives another mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ambient_sd.data.stream import keyed_seed


class AddressedDropout(torch.nn.Module):
    """Drop entries of x, (B, ...), in training; `positions` must name the B samples before each forward pass.

    Args:
        p: share that is dropped, in [0, 1).
        seed: seed of the run.
        layer: name of the layer, so that two layers drop other entries.
    """

    def __init__(self, p: float, *, seed: int, layer: str) -> None:
        super().__init__()
        self.p, self.seed, self.layer = p, seed, layer
        self.positions: Sequence[int] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        if len(self.positions) != len(x):
            raise ValueError(f"{len(self.positions)} positions for {len(x)} samples")
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for row, position in zip(keep, self.positions, strict=True):
            g = torch.Generator(x.device).manual_seed(keyed_seed(self.seed, "lora_dropout", self.layer, position))
            row.bernoulli_(1.0 - self.p, generator=g)
        return x * keep / (1.0 - self.p)


def install(unet: Any, *, p: float, seed: int) -> list[AddressedDropout]:
    """Put addressed dropout of share `p` in place of peft's own into every adapted layer, and return the modules."""
    placed = []
    for name, layer in unet.named_modules():
        if "default" in getattr(layer, "lora_dropout", {}):
            layer.lora_dropout["default"] = AddressedDropout(p, seed=seed, layer=name)
            placed.append(layer.lora_dropout["default"])
    return placed
