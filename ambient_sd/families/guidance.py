"""How a diffusers pipeline lays out classifier-free guidance: the names of its network's inputs, and where the halves are.

Two ways. "batch": one call on `[unconditional..., conditional...]`, or the other way round. "calls": two calls with equal inputs but for the texts,
told apart by the tensors that `encode_prompt` returned, not by their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Guidance:
    """Describe how one class of pipelines calls its network.

    Attributes:
        network: the pipeline's attribute that holds the network.
        sample, embeds, time: names of the network's input, of the embeddings and of the timestep.
        pooled: path to the pooled embeddings among the inputs; empty if there are none.
        outputs: positions in `encode_prompt`'s result of (embeds, pooled) for the conditional half; pooled may be None.
        timesteps: what the network's timestep is multiplied by to give the scheduler's.
        reversed: whether the network's timestep, times that, is subtracted from that to give the scheduler's.
        halves: "batch" or "calls".
        first: with "batch": which half comes first.
        listed: whether sample, embeddings and output are lists, of one tensor for each row.
        uncond: with "calls": how much further in the result of one `encode_prompt` the unconditional half's texts are; 0: it is
            called for each half.
        scale: "guidance_scale" (a property), or the local variable of the pipeline's `__call__` that holds the scale.
        excess: whether the pipeline computes `cond + scale (cond - uncond)`: its scale is one less than others'.
        normalizes: whether the pipeline gives the guided prediction the norm of the conditional one.
        mask: the input that tells which rows of the embeddings are read, where it is one, and its position in `encode_prompt`'s result.
        texts: with "calls": other inputs that belong to a half's text beside the embeddings, and their positions in
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
    time: str = "timestep"
    pooled: tuple[str, ...] = ()
    outputs: tuple[int, int | None] = (0, None)
    timesteps: float = 1.0
    reversed: bool = False
    halves: Literal["batch", "calls"] = "batch"
    first: Literal["uncond", "cond"] = "uncond"
    listed: bool = False
    uncond: int = 0
    scale: str = "guidance_scale"
    excess: bool = False
    normalizes: bool = False
    mask: tuple[str, int] | None = None
    texts: dict[str, int] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    latents_end_early: bool = False
    tokens: bool = True

    def scheduler_time(self, time: torch.Tensor) -> torch.Tensor:
        """Return the scheduler's timestep of the network's."""
        if self.reversed:
            return self.timesteps - time.float() * self.timesteps
        return time if self.timesteps == 1 else time.float() * self.timesteps

    def network_time(self, time: torch.Tensor) -> torch.Tensor:
        """Return the network's timestep of the scheduler's."""
        if self.reversed:
            return (self.timesteps - time) / self.timesteps
        return time if self.timesteps == 1 else time / self.timesteps

    def halved(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of (uncond, cond) of a batch of both."""
        one, other = both.chunk(2)
        return (one, other) if self.first == "uncond" else (other, one)

    def tensor(self, images: Any) -> torch.Tensor:
        """Return the network's input or output as (B, C, h, w) or as it is, if it is no list of (C, 1, h, w)."""
        found: torch.Tensor = torch.stack(images).squeeze(2) if self.listed else images
        return found

    def as_given(self, images: torch.Tensor) -> Any:
        """Return what `tensor` made, as the network takes and returns it."""
        return list(images.unsqueeze(2).unbind()) if self.listed else images
