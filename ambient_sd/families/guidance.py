"""How a diffusers pipeline lays out classifier-free guidance: the names of its network's inputs, and where the halves are.

Two ways. "batch": one call on `[unconditional..., conditional...]`. "calls": two calls with equal inputs but for the texts,
told apart by the tensors that `encode_prompt` returned, not by their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Guidance:
    """Describe how one class of pipelines calls its network.

    Attributes:
        network: the pipeline's attribute that holds the network.
        sample, embeds: names of the network's input and of the embeddings.
        pooled: path to the pooled embeddings among the inputs; empty if there are none.
        outputs: positions in `encode_prompt`'s result of (embeds, pooled) for the conditional half; pooled may be None.
        timesteps: what the network's timestep is multiplied by to give the scheduler's.
        halves: "batch" or "calls".
        uncond: with "calls": how much further in the result of one `encode_prompt` the unconditional half's texts are; 0: it is
            called for each half.
        scale: "guidance_scale" (a property), or the local variable of the pipeline's `__call__` that holds the scale.
        texts: with "calls": inputs that belong to a half's text beside the embeddings, and their positions in
            `encode_prompt`'s result.
        shared: inputs that have no row per image, whatever their size.
        latents_end_early: whether a run with output_type="latent" returns without `maybe_free_model_hooks`.
        tokens: whether the first tokenizer's tokens are, one by one, the rows of the embeddings.

    Example:
        >>> Guidance(network="unet", sample="sample", embeds="encoder_hidden_states").halves
        'batch'
    """

    network: str
    sample: str
    embeds: str
    pooled: tuple[str, ...] = ()
    outputs: tuple[int, int | None] = (0, None)
    timesteps: float = 1.0
    halves: Literal["batch", "calls"] = "batch"
    uncond: int = 0
    scale: str = "guidance_scale"
    texts: dict[str, int] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    latents_end_early: bool = False
    tokens: bool = True
