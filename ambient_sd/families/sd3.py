"""Stable Diffusion 3 and 3.5: how the guard reads its pipeline. Training is not there yet."""

from __future__ import annotations

from collections.abc import Mapping

from ambient_sd.families.family import Family
from ambient_sd.families.guidance import Guidance


class StableDiffusion3(Family):
    """Describe Stable Diffusion 3 and 3.5, as far as the guard needs it.

    Example:
        >>> SD3.guidance["StableDiffusion3Pipeline"].outputs
        (0, 2)
    """

    name = "Stable Diffusion 3"
    pipeline = "StableDiffusion3Pipeline"
    guidance: Mapping[str, Guidance] = {
        "StableDiffusion3Pipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", pooled=("pooled_projections",),
            outputs=(0, 2), tokens=False,
        ),
    }  # fmt: skip
    unready = "it has a transformer, and U-Nets are trained and sampled by name so far"


SD3 = StableDiffusion3()
