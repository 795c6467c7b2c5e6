"""DTP: no guidance until the first local minimum of an image's own curve, then normal guidance.

    w_k = 0 until some d_{j-2} > d_{j-1} < d_j, j <= k; then g        d_k = || o_c - o_u || at evaluation k

with `o` the network's output as it is (Jain et al., *Classifier-free guidance inside the attraction basin may cause memorization*, CVPR 2025, "dynamic transition
point"; published with the squared norm, whose minima are the same). **On v-prediction models the minima of
`|| eps_c - eps_u || = alpha_t || v_c - v_u ||` lie elsewhere**: alpha_t grows along the run, so a falling `|| v_c - v_u ||` may be a
rising `|| eps_c - eps_u ||`. On one such model one curve turned at timestep 466, the other at 100. `norm="noise"` takes that curve, which is
the one that `ImageReport.curve` shows; for epsilon the two are one. A minimum shows one evaluation late, and guidance
begins at that evaluation, as published. A curve that rises from its first value has no minimum there; one that never
falls and rises again is never guided: the paper saw transition points in memorized prompts only, so act on flagged
images alone (`when="flagged"`).

Where ours differs: each image has its own minimum (the published loop samples one image at a time); a minimum may be
a plateau, `3 2 2 3`, which strict inequalities between neighbours would miss; before it `w` is 0 as in the paper, where the
authors' script for it has 1 (the conditional output alone). Samplers that evaluate one timestep twice (Heun) repeat values
with small changes, which may look like a minimum: the method is defined for one evaluation per step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ambient_sd.guard.policies._common import number
from ambient_sd.guard.policies.base import ScalePolicy, Step
from ambient_sd.utils.errors import UserError


class DynamicTransition(ScalePolicy):
    """Sample with the scale `scale` until the norm has fallen and risen again: `w = scale`, then `w = g`.

    Args:
        scale: the guidance scale before the transition point, finite: 0, the paper's, is none; a negative one is the
            paper's opposite guidance with a dynamic transition point; 1 is what the authors' script does.
        norm: whose minimum ends it: that of the network's "output" as published, or of the "noise", which carries alpha_t on
            v-prediction models.

    Raises:
        UserError: an argument is out of range.

    Source: Jain et al., CVPR 2025.

    Example:
        >>> DynamicTransition().begins
        False
    """

    def __init__(self, scale: float = 0.0, norm: Literal["output", "noise"] = "output") -> None:
        self.before = number("scale", scale)
        if norm not in ("output", "noise"):
            raise UserError(f"norm {norm!r}", rule='it must be "output" or "noise"')
        self.norm = norm

    def scale(self, step: Step) -> torch.Tensor:
        own = torch.full_like(step.norms[-1], math.nan)
        before = torch.full_like(own, self.before)
        curve = step.output_norms if self.norm == "output" else step.norms
        return torch.where(_passed(torch.stack(curve)), own, before)


def _passed(norms: torch.Tensor) -> torch.Tensor:
    """Return for each image whether its curve, `(k, n)`, has risen after it had fallen; `(n,)` bool."""
    change = norms[1:] - norms[:-1]
    fallen = (change < 0).cumsum(0) > 0
    return ((change > 0) & fallen).any(0)
