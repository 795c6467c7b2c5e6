"""Two ways to lower the guidance scale where the score is high: a cap, and AMG's despecification guidance.

The cap, ours, bounds how far guidance can move a prediction. With `d = || eps_c - eps_u ||` of this evaluation,

    w = g min(1, c / d)        hence || w (eps_c - eps_u) || <= g c

Despecification, G_spe (Chen, Liu, Xu, *Towards memorization-free diffusion models*, CVPR 2024, equations 10, 13 and 14):

    eps <- eps + 1[sigma_t > lambda_t] G_spe,   G_spe = -s_1 (eps_c - eps_u),   s_1 = max(min(c_1 sigma_t, s_0 - 1), 0)

with s_0 = g the pipeline's scale: `w = g - s_1`, never below 1. Where ours differs: the paper's sigma_t is the similarity of
the predicted image to its nearest neighbour in the TRAINING SET (SSCD or a normalised distance), which a live pipeline
does not have; ours is the score d, so c_1 and lambda are per model and resolution and no published number fits. The
paper's lambda_t is a parabola in t whose coefficients its main text does not give; ours is constant. G_dup and G_sim, which
need the training captions and a gradient through a similarity network, are not here.
"""

from __future__ import annotations

import math

import torch

from ambient_sd.guard.policies._common import number
from ambient_sd.guard.policies.base import ScalePolicy, Step


class ScaleCap(ScalePolicy):
    """Lower an image's scale in proportion to its score: `w = g min(1, cap / || eps_c - eps_u ||)`.

    Args:
        cap: the norm above which the scale falls, > 0, in the units of `ImageReport.curve`. A high percentile of `curve` over
            ordinary prompts leaves those alone.

    Raises:
        UserError: `cap` is out of range.

    Example:
        >>> ScaleCap(cap=5.0).cap
        5.0
    """

    def __init__(self, cap: float) -> None:
        self.cap = number("cap", cap, above=0)

    def scale(self, step: Step) -> torch.Tensor:
        norm = step.norms[-1]
        return torch.where(norm > self.cap, step.guidance_scale * self.cap / norm, math.nan)


class Despecification(ScalePolicy):
    """Subtract a multiple of the score from the scale: `w = g - max(min(strength d, g - 1), 0)` where `d > threshold`.

    Args:
        strength: c_1, > 0, scale per unit of `ImageReport.curve`.
        threshold: lambda, >= 0, in the units of `ImageReport.curve`: at or below it nothing changes.

    Raises:
        UserError: an argument is out of range.

    Source: G_spe of AMG, Chen, Liu, Xu, CVPR 2024; the score takes the place of the similarity to the training set.

    Example:
        >>> Despecification(strength=0.5, threshold=4.0).threshold
        4.0
    """

    def __init__(self, strength: float, threshold: float) -> None:
        self.strength = number("strength", strength, above=0)
        self.threshold = number("threshold", threshold, least=0)

    def scale(self, step: Step) -> torch.Tensor:
        norm, g = step.norms[-1], step.guidance_scale
        less = (self.strength * norm).clamp(max=g - 1).clamp(min=0)
        return torch.where(norm > self.threshold, g - less, math.nan)
