"""A network that can be computed by hand, as the policies see it: linear in the latent, the embeddings and the pooled part."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from ambient_sd.guard.policies.base import Encoded, GuidanceBranches, Half, SamplingStart, Step

SHAPE = (2, 3, 3)  # C, H, W
TOKENS, WIDTH, POOLED = 4, 5, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LinearNetwork(GuidanceBranches):
    """`o = 0.5 x + sum_l w_l k_l e_l A + p B`, counting how often it is asked and for how many images."""

    def __init__(self, n: int = 3, factor: float = 1.0, pooled: bool = True) -> None:
        self.a, self.b = normal(WIDTH, 18, seed=1), normal(POOLED, 18, seed=2)
        self.sample = normal(n, *SHAPE, seed=3)
        self.cond = Encoded(normal(n, TOKENS, WIDTH, seed=4), normal(n, POOLED, seed=5) if pooled else None)
        self.uncond = Encoded(normal(n, TOKENS, WIDTH, seed=6), normal(n, POOLED, seed=7) if pooled else None)
        self.timestep, self.noise_factor = torch.tensor(981.0), torch.tensor(factor)
        self.asked: list[tuple[Half, int]] = []

    def predict(self, half: Half, *, rows: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
        encoded = self.cond if half == "cond" else self.uncond
        rows = torch.arange(len(self.sample)) if rows is None else rows
        own = {"sample": self.sample[rows], "embeds": encoded.embeds[rows]}
        own["pooled"] = None if encoded.pooled is None else encoded.pooled[rows]
        x = {
            name: own.get(name) if given.get(name) is None else given[name]
            for name in (*own, "token_weights", "key_scale")
        }
        self.asked.append((half, len(rows)))
        weights = torch.ones(len(rows), TOKENS) if x["token_weights"] is None else x["token_weights"]
        weights = weights if x["key_scale"] is None else weights * x["key_scale"]
        text = (weights[..., None] * x["embeds"]).sum(1) @ self.a
        text = text if x["pooled"] is None else text + x["pooled"] @ self.b
        return 0.5 * x["sample"] + text.view(-1, *SHAPE)

    def enable_grad(self) -> contextlib.AbstractContextManager[None]:
        return torch.enable_grad()  # type: ignore[return-value]


def encoded(texts: Sequence[str], pooled: bool = True) -> Encoded:
    """Encode each text by random numbers of its own."""
    seeds = [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts]
    embeds = torch.stack([normal(TOKENS, WIDTH, seed=seed) for seed in seeds])
    return Encoded(embeds, torch.stack([normal(POOLED, seed=seed) for seed in seeds]) if pooled else None)


def started(
    prompts: list[str] | None, network: LinearNetwork | None = None, active: list[bool] | None = None
) -> SamplingStart:
    """A first step of images whose conditional embeddings are those of their prompts."""
    n = 3 if prompts is None else len(prompts)
    network = network or LinearNetwork(n)
    pooled = network.cond.pooled is not None
    if prompts is not None:
        network.cond = encoded(prompts, pooled)
    ids = torch.zeros(n, TOKENS, dtype=torch.long)
    return SamplingStart(
        network, active or [True] * n, prompts, lambda texts: encoded(texts, pooled),
        None if prompts is None else ids, None if prompts is None else ids == 0,
    )  # fmt: skip


def step_of(norms: Sequence[Sequence[float]], timestep: float = 981.0, scale: float = 7.5, device: str = "cpu") -> Step:
    """An evaluation at which the curves so far are `norms` (evaluations x images), with arbitrary outputs."""
    n = len(norms[-1])
    network = LinearNetwork(n)
    return Step(
        index=len(norms) - 1, timestep=torch.tensor(timestep, device=device), cond=normal(n, *SHAPE, seed=8).to(device),
        uncond=normal(n, *SHAPE, seed=9).to(device), norms=[torch.tensor(row, device=device) for row in norms],
        guidance_scale=scale, halves=network, output_norms=[torch.tensor(row, device=device) for row in norms],
    )  # fmt: skip


def guided(outputs: tuple[torch.Tensor, torch.Tensor] | None, scale: float = 7.5) -> torch.Tensor:
    """What the pipeline goes on to compute from the two halves."""
    assert outputs is not None
    cond, uncond = outputs
    return uncond + scale * (cond - uncond)
