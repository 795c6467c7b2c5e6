"""Networks small enough to differentiate by hand, as the policies see them (`GuidanceBranches`), and one tiny real U-Net."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ambient_sd.guard.policies.base import Encoded, GuidanceBranches, Half, SamplingStart, Step

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class HandHalves(GuidanceBranches):
    """`network(sample, embeds)`, for both halves; what it was asked is kept."""

    def __init__(
        self, network: Network, sample: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, factor: float = 1.0
    ) -> None:
        self.network, self.sample = network, sample
        self.cond, self.uncond = Encoded(cond, None), Encoded(uncond, None)
        self.timestep, self.noise_factor = torch.tensor(999), torch.tensor(factor, dtype=torch.float64)
        self.asked: list[tuple[Half, list[int], torch.dtype]] = []

    def predict(
        self,
        half: Half,
        *,
        rows: torch.Tensor | None = None,
        sample: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        rows = torch.arange(len(self.sample)) if rows is None else rows
        sample = self.sample[rows] if sample is None else sample
        own = self.cond if half == "cond" else self.uncond
        self.asked.append((half, rows.tolist(), sample.dtype))
        return self.network(sample, own.embeds[rows] if embeds is None else embeds)

    def enable_grad(self) -> AbstractContextManager[None]:
        return self._grad()

    @contextlib.contextmanager
    def _grad(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.enable_grad():
            yield


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_network(matrix: torch.Tensor) -> Network:
    """`eps = (mean of the embedding) * D x`: with embeddings of ones and zeros, `eps_c - eps_u = D x`."""

    def network(sample: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        flat = sample.flatten(1) @ matrix.to(sample.dtype).T
        return (flat * embeds.to(sample.dtype).mean((1, 2)).unsqueeze(1)).view_as(sample)

    return network


def hand_start(
    network: Network, sample: torch.Tensor, active: list[bool] | None = None, factor: float = 1.0
) -> SamplingStart:
    """A start of `n` images whose conditional embeddings are ones and whose unconditional ones are zeros."""
    n = len(sample)
    halves = HandHalves(network, sample, torch.ones(n, 3, 2).to(sample), torch.zeros(n, 3, 2).to(sample), factor)
    ids = torch.tensor([[7, 1, 8]] * n)
    return SamplingStart(
        halves=halves, active=[True] * n if active is None else active, prompts=["a"] * n, encode=lambda texts: halves.cond,
        token_ids=ids, token_mask=torch.tensor([[True, True, False]] * n),
    )  # fmt: skip


def step_of(halves: GuidanceBranches, guidance_scale: float = 7.5, index: int = 0, total: int | None = 50) -> Step:
    cond, uncond = halves.predict("cond"), halves.predict("uncond")
    norm = (cond - uncond).flatten(1).norm(dim=1).float()
    return Step(index, halves.timestep, cond, uncond, [norm], guidance_scale, halves, output_norms=[norm], total=total)


def tiny_unet_halves(images: int = 2, tokens: int = 5, dtype: torch.dtype = torch.float64) -> HandHalves:
    """A real U-Net with cross-attention in a down, the mid and an up block, on 4 x 8 x 8 latents."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=12,
        attention_head_dim=(2, 4), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet = unet.to(dtype).eval().requires_grad_(False)

    def network(sample: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return unet(sample, torch.tensor(999), encoder_hidden_states=embeds, return_dict=False)[0]

    sample = randn(images, 4, 8, 8).to(dtype)
    halves = HandHalves(
        network, sample, randn(images, tokens, 12, seed=1).to(dtype), randn(1, tokens, 12, seed=2).to(dtype).repeat(images, 1, 1)
    )  # fmt: skip
    halves.unet = unet  # type: ignore[attr-defined]
    return halves


def start_of(halves: HandHalves, active: list[bool] | None = None, **given: Any) -> SamplingStart:
    n, length = halves.cond.embeds.shape[:2]
    ids = torch.arange(length).repeat(n, 1)
    values: dict[str, Any] = {
        "halves": halves, "active": [True] * n if active is None else active, "prompts": ["a"] * n,
        "encode": lambda texts: halves.cond, "token_ids": ids, "token_mask": ids < length - 1,
    }  # fmt: skip
    return SamplingStart(**(values | given))
