"""FLUX.1 dev with true guidance: how the guard reads its pipeline. Training is not there yet."""

from __future__ import annotations

from collections.abc import Mapping

from ambient_sd.families.family import Family
from ambient_sd.families.guidance import Guidance


class Flux(Family):
    """Describe FLUX.1, as far as the guard needs it: two calls, a timestep in [0, 1], packed latents.

    Example:
        >>> FLUX.guidance["FluxPipeline"].halves
        'calls'
    """

    name = "FLUX.1"
    pipeline = "FluxPipeline"
    guidance: Mapping[str, Guidance] = {
        "FluxPipeline": Guidance(
            network="transformer", sample="hidden_states", embeds="encoder_hidden_states", pooled=("pooled_projections",),
            outputs=(0, 1), timesteps=1000.0, halves="calls", scale="true_cfg_scale", texts={"txt_ids": 2},
            shared=frozenset({"txt_ids", "img_ids"}), tokens=False,
        ),
    }  # fmt: skip
    unready = "it has a transformer, and U-Nets are trained and sampled by name so far"


FLUX = Flux()
