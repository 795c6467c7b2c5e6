"""The loop that the policies on the initial latent share: optimise it, image by image, before the first step.

A subclass says what is minimised and with which optimizer (`latent_optimization`: Han et al.; `sail`: Jeon et al.). Here:
the stop as soon as the loss is at most `target`, the limit of steps, the choice of the best latent seen. What is optimised
is the network's input at the first evaluation, which has unit variance in every sampler (`GuidanceBranches.sample`).

One image after the other, as in the published code: memory is that of one image's backward pass, and an image gets the
same bits beside any others. Only images that the policy may act on are looked at. Nothing random happens.
"""

from __future__ import annotations

import abc
import math

import torch

from ambient_sd.guard.policies._common import number, require_signal, whole
from ambient_sd.guard.policies.base import Change, GuidanceBranches, Policy, SamplingStart
from ambient_sd.guard.scores import guidance_norm


class LatentPolicy(Policy, abc.ABC):
    """Base of the mitigations that move the initial latent until `loss <= target`.

    Args:
        target: the loss to reach, a finite number above 0.
        lr: the optimizer's learning rate, a finite number above 0, in standard deviations of the latent.
        max_steps: most optimizer steps per image, >= 1. If they are too few, the best latent seen is used.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.

    Raises:
        UserError: an argument is out of range; when sampling, the schedule's first step has no signal.

    Example:
        >>> from ambient_sd.guard.policies import SAIL
        >>> issubclass(SAIL, LatentPolicy), SAIL.moves_latent
        (True, True)
    """

    moves_latent = True

    def __init__(self, target: float, lr: float, max_steps: int, gradient_checkpointing: bool) -> None:
        self.target, self.lr = number("target", target, above=0), number("lr", lr, above=0)
        self.max_steps = whole("max_steps", max_steps, least=1)
        self.gradient_checkpointing = gradient_checkpointing

    @abc.abstractmethod
    def optimizer(self, x: torch.Tensor) -> torch.optim.Optimizer:
        """Return the optimizer of one image's latent `(1, C, H, W)`."""

    @abc.abstractmethod
    def loss(self, halves: GuidanceBranches, row: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is minimised, and `|| eps_c - eps_u ||`, both `(1,)`, at the latent `x` of the image `row`."""

    def begin(self, start: SamplingStart) -> Change:
        """Return the optimised latents; an image that is under the target already keeps its own."""
        halves = start.halves
        require_signal(halves, "latent")
        n = len(start.active)
        changed, iterations = [False] * n, [0] * n
        before, after = [math.nan] * n, [math.nan] * n  # of images that nobody asked about nothing is measured
        with halves.enable_grad():
            sample = halves.sample.detach().clone()
            for i, active in enumerate(start.active):
                if active:
                    best, before[i], after[i], iterations[i] = self._descend(halves, i)
                    if best is not None:
                        sample[i], changed[i] = best[0].to(sample), True
        return Change(changed, sample=sample, first_score_before=before, first_score_after=after, iterations=iterations)

    def _descend(self, halves: GuidanceBranches, i: int) -> tuple[torch.Tensor | None, float, float, int]:
        """Return one image's best latent (None: its own), the score before and with it, and the steps taken."""
        own = halves.sample[i : i + 1].detach()
        row = torch.tensor([i], device=own.device)
        # float32 at least: a step of 0.01 must not be rounded away in half precision.
        x = own.to(torch.promote_types(own.dtype, torch.float32)).clone().requires_grad_(True)
        optimizer = self.optimizer(x)
        best: torch.Tensor | None = None
        lowest = before = after = math.nan
        for iteration in range(self.max_steps + 1):
            last = iteration == self.max_steps
            with torch.set_grad_enabled(not last):
                loss, norm = self.loss(halves, row, x)
            value = loss.item()
            if iteration == 0:
                lowest, before = value, norm.item()
                after = before
            elif value < lowest:  # a step may overshoot: never serve a worse latent than an earlier one
                best, lowest, after = x.detach().clone(), value, norm.item()
            # Without a finite loss there is no gradient to follow.
            if value <= self.target or last or not math.isfinite(value):
                break
            (x.grad,) = torch.autograd.grad(loss.sum(), [x])
            optimizer.step()
        return best, before, after, iteration


def noise_difference(halves: GuidanceBranches, row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `eps_c - eps_u`, of flow matching the difference of velocities, at another input `x` `(m, C, H, W)` of the images `row` `(m,)`, in x's precision.

    Example:
        >>> from types import SimpleNamespace
        >>> halves = SimpleNamespace(
        ...     sample=torch.ones(1, 4, 2, 2), noise_factor=torch.tensor(0.5), flow=0,
        ...     predict=lambda half, rows, sample: sample if half == "cond" else torch.zeros_like(sample),
        ... )
        >>> float(noise_difference(halves, torch.tensor([0]), torch.ones(1, 4, 2, 2)).mean())
        0.5
    """
    sample = x.to(halves.sample.dtype)
    cond = halves.predict("cond", rows=row, sample=sample).to(x.dtype)
    uncond = halves.predict("uncond", rows=row, sample=sample).to(x.dtype)
    return (cond - uncond) * halves.noise_factor.to(x.dtype) * (halves.flow or 1)


def norm_of(difference: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each image's `(m, C, H, W)`, `(m,)`.

    Example:
        >>> norm_of(torch.ones(1, 4, 2, 2)).tolist()
        [4.0]
    """
    return guidance_norm(cond=difference, uncond=torch.zeros_like(difference))
