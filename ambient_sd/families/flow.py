"""What the transformers that are trained by flow matching have in common.

    x_t = (1 - sigma) x0 + sigma eps,  output eps - x0,  noise level s = sigma / (1 - sigma)

A scheduler's shift moves the levels that are trained, not what a level means: `schedule.py` reads sigma off the timestep
that the network is called with, in which the shift is already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ambient_sd.families.kl import KLFamily
from ambient_sd.utils.errors import UserError

if TYPE_CHECKING:
    from ambient_sd.families.base import Model


class FlowTransformer(KLFamily):
    """Describe what transformers with flow matching and an AutoencoderKL share; one token is `patch` by `patch` latents.

    Attributes:
        folded: how many channels of the network's input one channel of a latent is: patch^2 where the pipeline packs patches.
        needs: settings of the network that are computed with.

    Example:
        >>> FlowTransformer().image_tokens({"patch_size": 2}, (16, 64, 64))
        1024
    """

    network = "transformer"
    flow = True
    lora_prefixes: Mapping[str, Mapping[str, str]] = {"transformer": {"diffusion_model.": "ComfyUI"}}
    needs: tuple[str, ...] = ("in_channels", "patch_size")
    folded = 1

    def check(self, model: Model, network: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        self.check_parts(model, network, vae, self.needs)
        self.check_conditioning(model, network)
        if network["in_channels"] != vae["latent_channels"] * self.folded:
            raise UserError(
                f"the transformer of {model.name} takes {network['in_channels']} channels and its VAE gives {vae['latent_channels'] * self.folded}",
                rule="inpainting, depth, editing and control variants need more inputs than a caption",
                remedy="give a text-to-image base",
            )

    def check_conditioning(self, model: Model, network: Mapping[str, Any]) -> None:
        """Check that the network takes the width of what `inputs` gives it."""

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


def tokens(tokenizer: Any, captions: Sequence[str], length: int) -> Any:
    """Tokenize captions, padded and cut to a length, as these pipelines do.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_tokenizer
        >>> tokens(tiny_tokenizer(), ["a cat"], 12).input_ids.shape
        torch.Size([1, 12])
    """
    return tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
