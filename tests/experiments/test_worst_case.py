"""The worst-case audit: the search finds the embedding under which a network denoises an image best, each image by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler

from ambient_sd.schedule import NoiseSchedule
from experiments.build_base import SCHEDULE
from experiments.worst_case import search


class SaysItsEmbedding(torch.nn.Module):
    """Predict the embedding itself, whatever the noise: the best one is then E[v] = -E[sigma_t] x0, in closed form."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> Any:
        return SimpleNamespace(sample=embeds.view_as(x))


def test_the_search_finds_the_best_embedding_of_each_image_by_itself() -> None:
    scheduler = DDIMScheduler(**SCHEDULE)
    pipe = SimpleNamespace(unet=SaysItsEmbedding(), scheduler=scheduler)
    latents = 3 * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    start = torch.zeros(3, 1, 16)
    found, losses = search(pipe, latents, start, seed=0, steps=300, draws=8, rate=0.05)
    wanted = -float(NoiseSchedule.from_scheduler(scheduler).sigma(torch.arange(1000)).mean()) * latents
    torch.testing.assert_close(found.view_as(latents), wanted, rtol=0, atol=0.25)  # the last draws move it still
    assert losses[-1] < losses[0] - 1 and not found.requires_grad
    again, _ = search(pipe, latents, start, seed=0, steps=300, draws=8, rate=0.05)
    assert torch.equal(found, again)
    other, _ = search(
        pipe, latents * torch.tensor([1, 1, -1]).view(3, 1, 1, 1), start, seed=0, steps=300, draws=8, rate=0.05
    )
    assert torch.equal(other[:2], found[:2]) and not torch.equal(other[2], found[2])
