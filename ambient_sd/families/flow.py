"""What the transformers that are trained by flow matching have in common.

    x_t = (1 - sigma) x0 + sigma eps,  output eps - x0,  noise level s = sigma / (1 - sigma)

A scheduler's shift moves the levels that are trained, not what a level means: `schedule.py` reads sigma off the timestep
that the network is called with, in which the shift is already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ambient_sd.families.kl import KLFamily
from ambient_sd.families.original import OriginalNames
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model


class FlowTransformer(KLFamily):
    """Describe what transformers with flow matching and an AutoencoderKL share; one token is `patch` by `patch` latents.

    Attributes:
        folded: how many channels of the network's input one channel of a latent is: patch^2 where the pipeline packs patches.
        needs: settings of the network that are computed with.
        shifted: whether the pipeline adds the VAE's shift to latents, as it is.
        originals: what the authors' own code calls its layers, where it differs; None: as diffusers, or not known.
        reads: what of a caption's embeddings is which input of the network.

    Example:
        >>> FlowTransformer().image_tokens({"patch_size": 2}, (16, 64, 64))
        1024
    """

    network = "transformer"
    flow = True
    lora_prefixes: Mapping[str, Mapping[str, str]] = {
        "transformer": {"lycoris_": "kohya", "lora_unet_": "kohya", "lora_transformer_": "OneTrainer", "diffusion_model.": "ComfyUI"}
    }  # fmt: skip
    needs: tuple[str, ...] = ("in_channels", "patch_size")
    folded = 1
    shifted = True
    originals: OriginalNames | None = None
    reads: Mapping[str, str] = {"encoder_hidden_states": "hidden"}

    def check(self, model: Model, network: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        self.check_parts(model, network, vae, self.needs)
        self.check_conditioning(model, network)
        shift = vae.get("shift_factor")
        if self.shifted and (isinstance(shift, bool) or not isinstance(shift, (int, float))):
            raise UserError(f"vae/config.json of {model.name} has shift_factor = {shift!r}", rule=f"{self.pipeline} adds it to latents",
                            remedy="give the VAE that belongs to the model, or write 0.0 there")  # fmt: skip
        channels = self.latent_shape(vae, (0, 0))[0] * self.folded
        if network["in_channels"] != channels:
            raise UserError(
                f"the transformer of {model.name} takes {network['in_channels']} channels and its VAE gives {channels}",
                rule="inpainting, depth, editing and control variants need more inputs than a caption",
                remedy="give a text-to-image base",
            )

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        """Check that the network takes the width of what `inputs` gives it."""

    def check_width(self, model: Model, network: Mapping[str, Any], key: str, width: int) -> None:
        """Check that a setting of the network is the width of the text encoder."""
        if network[key] != width:
            raise UserError(f"the transformer of {model.name} has {key} = {network[key]}", rule=f"its text encoder has {width}",
                            remedy="give a base whose parts belong together")  # fmt: skip

    def inputs(
        self, embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
    ) -> dict[str, Any]:
        return {name: send(embeddings[what], device) for name, what in self.reads.items()}

    def patch(self, network: Mapping[str, Any]) -> int:
        """Return the latents along the side of one token."""
        return int(network["patch_size"])

    def pixel_step(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return self.vae_factor(vae) * self.patch(network)

    def image_tokens(self, network: Mapping[str, Any], shape: Sequence[int]) -> int:
        patch = self.patch(network)
        return (shape[1] // patch) * (shape[2] // patch)

    def start_shape(self, pipe: Any, size: tuple[int, int]) -> tuple[int, ...]:
        return self.latent_shape(pipe.vae.config, size)

    def native_side(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return int(network["sample_size"]) * self.vae_factor(vae)

    def original_names(self, network: Any) -> dict[str, str]:
        return {} if self.originals is None else self.originals.single(network)

    def fused_names(self, network: Any) -> dict[str, tuple[str, ...]]:
        return {} if self.originals is None else self.originals.several(network)

    def swapped_names(self, network: Any) -> dict[str, str]:
        return {} if self.originals is None else self.originals.turned(network)


def read_rows(hidden: torch.Tensor, mask: Sequence[Sequence[int]], skip: int = 0) -> dict[str, torch.Tensor]:
    """Return the hidden states that a tokenizer's mask lets be read, but the first `skip`, and which of the rows they are.

    Args:
        hidden: (B, N, D).
        mask: B lists of N, with ones in one run.

    Example:
        >>> found = read_rows(torch.arange(6.0).view(2, 3, 1), [[1, 1, 0], [1, 1, 1]], skip=1)
        >>> found["hidden"].squeeze(2).tolist(), found["mask"].tolist()
        ([[1.0, 0.0], [4.0, 5.0]], [[1, 0], [1, 1]])
    """
    # From Python's numbers: those of a tensor would have to be waited for, and fake ones have none.
    rows = [row[one.index(1) + skip : one.index(1) + sum(one)] for row, one in zip(hidden, mask, strict=True)]
    told = [row.new_ones(len(row), dtype=torch.long) for row in rows]
    return {"hidden": pad_sequence(rows, batch_first=True), "mask": pad_sequence(told, batch_first=True)}
