"""Han et al.'s mitigation per sample: move the initial latent until the first step no longer gives the copy away.

    minimise over x_T   || eps_theta(x_T, T, y) - eps_theta(x_T, T, null) ||_2   until it is at most `target`

with AdamW (Han, Kim, Joo, Hong, Lee, *Adjusting initial noise to mitigate memorization in text-to-image diffusion models*,
NeurIPS 2025, section 3.2.2 and the pseudocode of appendix A), from the sampler's own latent, whose trajectory then starts
outside the basin that leads to the copy; guidance is applied from the first step on. Published: lr 0.01 and targets 0.7 to
1.5 on SD1.4, lr 0.1 and targets 5 to 20 on SD2.0 (appendix B); AdamW's default weight decay of 0.01 holds the latent near
the Gaussian (appendix C).

Where ours differs: the paper's loop has no limit of steps (its code stops at 1,000, our default), and serves the last latent
where ours serves the best; on v-prediction models the norm carries alpha_t, so SD2.0's published targets, which are of the
raw output, do not apply. The batch-wise variant (Algorithm 1) is not here: it needs delayed guidance as well.
"""

from __future__ import annotations

import torch

from ambient_sd.guard.policies.base import GuidanceBranches
from ambient_sd.guard.policies.latents import LatentPolicy, noise_difference, norm_of


class LatentOptimization(LatentPolicy):
    """Optimise each image's initial latent until `|| eps_c - eps_u ||_2 <= target` at the first step.

    Args:
        target: the norm to reach, > 0, in the units of `ImageReport.curve`. It is per model and resolution.
        lr: AdamW's learning rate, > 0. Default as published for SD1.4.
        max_steps: most optimizer steps per image, >= 1; each costs both halves, forward and backward.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.

    Raises:
        UserError: an argument is out of range; when sampling, the schedule's first step has no signal.

    Source: Han, Kim, Joo, Hong, Lee, NeurIPS 2025.

    Example:
        >>> LatentOptimization(target=1.0).lr
        0.01
    """

    def __init__(
        self, target: float, lr: float = 0.01, max_steps: int = 1000, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__(target, lr, max_steps, gradient_checkpointing)

    def optimizer(self, x: torch.Tensor) -> torch.optim.Optimizer:
        return torch.optim.AdamW([x], lr=self.lr)

    def loss(self, halves: GuidanceBranches, row: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm = norm_of(noise_difference(halves, row, x))
        return norm, norm
