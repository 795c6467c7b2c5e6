"""STP: no guidance before a fixed timestep, the pipeline's own after it.

    w_t = 0 for t > t*, g for t <= t*        eps = eps_u + w_t (eps_c - eps_u)

(Jain, Kobayashi, Shibuya, Takida, Memon, Togelius, Mitsufuji, *Classifier-free guidance inside the attraction basin may
cause memorization*, CVPR 2025, "static transition point".) While guided from the start, paths of different noises run into
one memorized image; unguided they leave its basin of attraction, and after t* guidance is harmless. t* = 500 is
published for SD2.1 fine-tuned on LAION-10k. Whether t = t* itself is guided is not stated: here it is.
"""

from __future__ import annotations

import math

import torch

from ambient_sd.guard.policies._common import number
from ambient_sd.guard.policies.base import ScalePolicy, Step


class StaticTransition(ScalePolicy):
    """Sample without guidance while `t > until`: `w_t = 0`, then `w_t = g`.

    Args:
        until: the transition point t*, a timestep of the scheduler (0 to 999), >= 0. Default as published for SD2.1.

    Raises:
        UserError: `until` is out of range.

    Source: Jain et al., CVPR 2025.

    Example:
        >>> StaticTransition(until=400).until
        400.0
    """

    def __init__(self, until: float = 500.0) -> None:
        self.until = number("until", until, least=0)

    def scale(self, step: Step) -> torch.Tensor:
        own = torch.full_like(step.norms[-1], math.nan)
        return torch.where(step.timestep > self.until, torch.zeros_like(own), own)
