"""OG: guide away from the prompt at first, to leave the basin of attraction sooner.

    w_t = -s for t > t*, g for t <= t*        eps = eps_u + w_t (eps_c - eps_u)

(Jain et al., *Classifier-free guidance inside the attraction basin may cause memorization*, CVPR 2025, "opposite guidance".)
Published for SD2.1 fine-tuned on LAION-10k: -2 until 650, which the authors' README calls "opposite guidance and static
transition point" and which is this policy alone. `Compose(OppositeGuidance(), StaticTransition(500))` puts a stretch
without guidance, 650 to 500, between the two. For a transition point of each image's own see `DynamicTransition(scale=-2)`.
Whether t = t* itself is guided is not stated: here it is.
"""

from __future__ import annotations

import math

import torch

from ambient_sd.guard.policies._common import number
from ambient_sd.guard.policies.base import ScalePolicy, Step
from ambient_sd.utils.errors import UserError


class OppositeGuidance(ScalePolicy):
    """Sample with a negative guidance scale while `t > until`: `w_t = scale`, then `w_t = g`.

    Args:
        scale: the guidance scale before `until`, finite, < 0. Default as published for SD2.1.
        until: the transition point t*, a timestep of the scheduler (0 to 999), >= 0. Default as published for SD2.1.

    Raises:
        UserError: an argument is out of range.

    Source: Jain et al., CVPR 2025.

    Example:
        >>> OppositeGuidance(until=600).until
        600.0
    """

    def __init__(self, scale: float = -2.0, until: float = 650.0) -> None:
        self.opposite = number("scale", scale)
        if self.opposite >= 0:
            raise UserError(
                f"scale {scale!r}",
                rule="opposite guidance needs a scale below 0",
                remedy="for none at all (0) use policies.StaticTransition",
            )
        self.until = number("until", until, least=0)

    def scale(self, step: Step) -> torch.Tensor:
        own = torch.full_like(step.norms[-1], math.nan)
        return torch.where(step.timestep > self.until, torch.full_like(own, self.opposite), own)
