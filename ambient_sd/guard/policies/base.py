"""The one interface of every mitigation: what a policy sees of a sampling run and what it may replace.

A policy is a small object without state between runs. The guard calls `begin` once, before the first denoising step,
and `step` after every evaluation of the network. Both may do nothing. A policy never sees the denoising loop, so it
works in every pipeline and with every scheduler that the guard supports.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingStart:
    """What is known before the first step, for `n` images. Tensors are the pipeline's own: do not write to them.

    Attributes:
        prompt_embeds: conditional prompt embeddings, `(n, L, D)`, in the pipeline's dtype.
        negative_prompt_embeds: embeddings in the unconditional slot, `(n, L, D)`.
        timestep: the first timestep.
        noise_factor: what turns a norm of output differences into one of noise differences at this timestep (`scores`).
        predict_cond: `(embeds (m, L, D), images (m,) long) -> (m, C, H, W)`: the network on the conditional half alone,
            for these images. Gradients flow to `embeds` where the caller enables them.
        predict_uncond: `() -> (n, C, H, W)`: the unconditional half, without gradients.
        enable_grad: `() -> context manager` under which `predict_cond` can be differentiated with respect to `embeds`,
            whatever the pipeline runs under; the network's parameters get no gradients.
    """

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor
    timestep: float
    noise_factor: float
    predict_cond: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    predict_uncond: Callable[[], torch.Tensor]
    enable_grad: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class PromptChange:
    """What `Policy.begin` decided, image by image.

    Attributes:
        prompt_embeds: `(n, L, D)`; rows of changed images serve every step, the other rows are ignored.
        changed: for each image, whether its row replaces the pipeline's.
        first_score_before: for each image, `|| eps_c - eps_u ||` at the first step with its own prompt.
        first_score_after: the same with the replaced prompt (equal for an image that is left alone).
        iterations: for each image, the optimizer steps taken.
    """

    prompt_embeds: torch.Tensor
    changed: list[bool]
    first_score_before: list[float]
    first_score_after: list[float]
    iterations: list[int]


@dataclass(frozen=True)
class Step:
    """One evaluation of the network. Tensors are the pipeline's own: do not write to them.

    Attributes:
        index: 0 for the first evaluation of this run.
        timestep: `()` tensor on the device: reading it with `.item()` costs a synchronisation.
        cond: output of the conditional half, `(n, C, H, W)`, in the network's parametrisation.
        uncond: output of the unconditional half, same shape.
        norm: `|| cond - uncond ||` per image, `(n,)`, float32, on the device, without the noise factor.
        guidance_scale: the pipeline's scale: it goes on to compute `uncond + guidance_scale (cond - uncond)`.
    """

    index: int
    timestep: torch.Tensor
    cond: torch.Tensor
    uncond: torch.Tensor
    norm: torch.Tensor
    guidance_scale: float


class Policy:
    """Base of all mitigations; override one method or both."""

    def begin(self, start: SamplingStart) -> PromptChange | None:
        """Look at the first step before it is taken; return new prompt embeddings, or None to change nothing."""
        return None

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return `(cond, uncond)` to put in place of the network's two outputs, or None to leave them alone."""
        return None
