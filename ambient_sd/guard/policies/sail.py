"""SAIL: start the sampler where the density that the prompt adds is flat (Jeon, Kim, No, ICML 2025, section 5).

Memorized images sit on sharp peaks of `log p(x | c) - log p(x)`. With `s(x) = s(x, c) - s(x)`, the difference of the
conditional and the unconditional score, and `H` its Jacobian, the sharpness gap `|| H s ||^2` is approximated by a finite
difference along `s`, and the latent is moved to

    minimise over x_T   || s(x_T + d s(x_T)) - s(x_T) ||^2 + a || x_T ||^2   until it is at most `target`

(`L_SAIL`, section 5.1, Algorithm 2; `a` holds x_T near the Gaussian). The gradient runs through all evaluations of `s`.
Adam with lr 0.05 as published; at most 10 steps and `d` such that `d s` has length 1 as in their code ("normalize s with
delta", Algorithm 2, line 3).

**Their code minimises something else**, and the published numbers, a = 0.05 and targets 7.6 to 9 on SD1.4, a = 0.01 and 4 to 6 on
SD2.0 (appendix D.2), belong to it (`objective="code"`):

    || s(x_T + d u) || + a || x_T ||,    u = +-s(x_0) / || s(x_0) ||

Norms are not squared, nothing is subtracted (0.05 * 128 = 6.4 of the 7.6 is the norm of the latent), and the direction u is that at
the latent x_0 which the search starts from, at every iteration, while the gradient passes through it as if it were at x_T. On epsilon
models u points along `eps_c - eps_u`, against the score s = -(eps_c - eps_u) / sigma_t; on v models along s.

**Which sign is the paper's.** `s(x + d s) - s(x) = d H s + O(d^2)`: to first order either sign of the step gives the squared norm
`d^2 || H s ||^2`, so neither minimises it better; they differ in the next order. The formula has `+ s`, so `objective="paper"`, our
default, steps along the score, with the direction at the latent of the moment.

Where ours differs. (1) With "paper", the pull `2 a x` on the latent is as long as the code's at `a = 0.05 / (2 * 128)`, our
default. (2) Their code draws eight new latents, keeps whichever get under the threshold first, and raises the threshold when none does;
ours moves the sampler's own latent, and serves the best one seen if none got under it. (3) With "paper" sigma_t, 0.998 at the first
step of Stable Diffusion, is taken as 1, so that `s` is in the units of the score that the guard reports; with "code" it is as there: 1 on
epsilon models, sigma_t on v models.

With flow matching `s` is the velocity's, `-(o_c - o_u)`, which points as the score does: at pure noise the score itself vanishes.
"""

from __future__ import annotations

from typing import Literal

import torch

from ambient_sd.guard.policies._common import number
from ambient_sd.guard.policies.base import GuidanceBranches
from ambient_sd.guard.policies.latents import LatentPolicy, noise_difference, norm_of
from ambient_sd.utils.errors import UserError


class SAIL(LatentPolicy):
    """Optimise each image's initial latent until `|| s(x + d s(x)) - s(x) ||^2 + alpha || x ||^2 <= target`.

    Args:
        target: the loss to reach, > 0. Of it `alpha || x ||^2` is about `alpha C H W` (3.3 for a 4 x 64 x 64 latent); what is
            left is the sharpness, in squared units of `ImageReport.curve`. It is per model and resolution. With
            `objective="code"` of the code's loss, not squared: published 7.6 to 9 on SD1.4.
        alpha: the weight of the latent's own norm, > 0. None: 0.0002, with `objective="code"` 0.05 as published for SD1.4 (0.01
            for SD2.0).
        delta: the length of the step along `s`, > 0, in standard deviations of the latent.
        lr: Adam's learning rate, > 0. Default as published.
        max_steps: most optimizer steps per image, >= 1; each costs both halves twice, forward and backward.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        objective: the formula of the "paper", or what its "code" minimises (see the module; for epsilon and v-prediction models).

    Raises:
        UserError: an argument is out of range; when sampling, the schedule's first step has no signal.

    Source: Jeon, Kim, No, ICML 2025.

    Example:
        >>> SAIL(target=4.0).alpha, SAIL(target=8.0, objective="code").alpha
        (0.0002, 0.05)
    """

    noise_only = True

    def __init__(
        self,
        target: float,
        alpha: float | None = None,
        delta: float = 1.0,
        lr: float = 0.05,
        max_steps: int = 10,
        gradient_checkpointing: bool = False,
        objective: Literal["paper", "code"] = "paper",
    ) -> None:
        super().__init__(target, lr, max_steps, gradient_checkpointing)
        if objective not in ("paper", "code"):
            raise UserError(f"objective {objective!r}", rule='it must be "paper" or "code"')
        self.objective = objective
        alpha = {"paper": 2e-4, "code": 0.05}[objective] if alpha is None else alpha
        self.alpha, self.delta = number("alpha", alpha, above=0), number("delta", delta, above=0)

    def optimizer(self, x: torch.Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([x], lr=self.lr)

    def loss(self, halves: GuidanceBranches, row: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self._as_in_the_code(halves, row, x) if self.objective == "code" else self._as_in_the_paper(halves, row, x)
        )

    def _as_in_the_paper(
        self, halves: GuidanceBranches, row: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = -noise_difference(halves, row, x)
        norm = norm_of(s)
        unit = _unit(s, norm)
        moved = -noise_difference(halves, row, x + self.delta * unit)
        sharpness = (moved - s).square().flatten(1).sum(1)
        return sharpness + self.alpha * x.square().flatten(1).sum(1), norm

    def _as_in_the_code(
        self, halves: GuidanceBranches, row: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if halves.flow:
            raise UserError('SAIL with objective "code" on a model of flow matching', rule="the code is of models that predict epsilon or v",
                            remedy='use objective="paper"')  # fmt: skip
        # The value of the latent that the search starts from, with the gradient of the one of now.
        first = halves.sample[row].detach().to(x.dtype) + (x - x.detach())
        difference = noise_difference(halves, row, first)
        factor = float(halves.noise_factor)
        epsilon = factor == 1  # alpha_t of a v-prediction model is below 1 wherever there is noise
        unit = _unit(difference if epsilon else -difference, norm_of(difference))
        sharpness = norm_of(noise_difference(halves, row, x + self.delta * unit))
        sharpness = sharpness if epsilon else sharpness / max(1 - factor * factor, 0.0) ** 0.5
        with torch.no_grad():
            norm = norm_of(noise_difference(halves, row, x))
        return sharpness + self.alpha * norm_of(x), norm


def _unit(direction: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Return `direction / norm`. Where it is 0 (a prompt without effect) there is no direction: 0 then, not 0 / 0."""
    return direction / norm.clamp_min(torch.finfo(norm.dtype).tiny).view(-1, *[1] * (direction.ndim - 1))
