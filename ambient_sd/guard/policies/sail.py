"""SAIL: start the sampler where the density that the prompt adds is flat (Jeon, Kim, No, ICML 2025, section 5).

Memorized pictures sit on sharp peaks of `log p(x | c) - log p(x)`. With `s(x) = s(x, c) - s(x)`, the difference of the
conditional and the unconditional score, and `H` its Jacobian, the sharpness gap `|| H s ||^2` is approximated by a finite
difference along `s`, and the latent is moved to

    minimise over x_T   || s(x_T + d s(x_T)) - s(x_T) ||^2 + a || x_T ||^2   until it is at most `target`

(`L_SAIL`, section 5.1, Algorithm 2; `a` holds x_T near the Gaussian). The gradient runs through all evaluations of `s`.
Adam with lr 0.05 as published; at most 10 steps and `d` such that `d s` has length 1 as in their code ("normalize s with
delta", Algorithm 2, line 3).

Where ours differs. (1) The published numbers, a = 0.05 and targets 7.6 to 9 on SD1.4, a = 0.01 and 4 to 6 on SD2.0
(appendix D.2), belong to another formula, which their code minimises: `|| s(x + d s) || + a || x ||`, norms not squared and
nothing subtracted (0.05 * 128 = 6.4 of the 7.6 is the norm of the latent). Ours is the published formula. Its pull on the
latent, `2 a x`, is as long as theirs at `a = 0.05 / (2 * 128)`, our default. (2) Their code draws eight new latents, keeps
whichever get under the threshold first, and raises the threshold when none does; ours moves the sampler's own latent, and
serves the best one seen if none got under it. (3) `s = -(eps_c - eps_u) / sigma_t`; sigma_t, 0.998 at the first step
of Stable Diffusion, is taken as 1, so that `s` is in the units of the score that the guard reports.
"""

from __future__ import annotations

import torch

from ambient_sd.guard.policies._common import number
from ambient_sd.guard.policies.base import Halves
from ambient_sd.guard.policies.latents import LatentPolicy, noise_difference, norm_of


class SAIL(LatentPolicy):
    """Optimise each picture's initial latent until `|| s(x + d s(x)) - s(x) ||^2 + alpha || x ||^2 <= target`.

    Args:
        target: the loss to reach, > 0. Of it `alpha || x ||^2` is about `alpha C H W` (3.3 for a 4 x 64 x 64 latent); what is
            left is the sharpness, in squared units of `ImageReport.curve`. It is per model and resolution.
        alpha: the weight of the latent's own norm, > 0.
        delta: the length of the step along `s`, > 0, in standard deviations of the latent.
        lr: Adam's learning rate, > 0. Default as published.
        max_steps: most optimizer steps per picture, >= 1; each costs both halves twice, forward and backward.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.

    Raises:
        UserError: an argument is out of range; when sampling, the schedule's first step has no signal.

    Source: Jeon, Kim, No, ICML 2025.
    """

    def __init__(
        self,
        target: float,
        alpha: float = 2e-4,
        delta: float = 1.0,
        lr: float = 0.05,
        max_steps: int = 10,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(target, lr, max_steps, gradient_checkpointing)
        self.alpha, self.delta = number("alpha", alpha, above=0), number("delta", delta, above=0)

    def optimizer(self, x: torch.Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([x], lr=self.lr)

    def loss(self, halves: Halves, row: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = -noise_difference(halves, row, x)
        norm = norm_of(s)
        # Where s is 0 (a prompt without effect) there is no direction: the step is 0 then, not 0 / 0.
        unit = s / norm.clamp_min(torch.finfo(norm.dtype).tiny).view(-1, 1, 1, 1)
        moved = -noise_difference(halves, row, x + self.delta * unit)
        sharpness = (moved - s).square().flatten(1).sum(1)
        return sharpness + self.alpha * x.square().flatten(1).sum(1), norm
