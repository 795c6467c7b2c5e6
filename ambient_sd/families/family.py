"""What differs between one family of models and the others, behind one protocol: a new family is one more file.

A `Family` holds no weights and no settings of a run; it says which parts a pipeline is made of and what each is for.
Everything else in the package asks it, and nothing outside this package branches on a model's name or class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Family:
    """Describe one family of text-to-image models.

    Attributes:
        name: what messages call it.
        network: the pipeline's attribute that holds the denoising network.
        parts: what it is trained and encoded with, in the form of model_index.json: (library, class) by name. Loaded
            as another class, a part gets random weights where names differ.
        takes_sizes: whether the network is told the sizes of the original, the crop and the target.
    """

    name: str
    network: str
    parts: Mapping[str, tuple[str, str]]
    takes_sizes: bool = False

    # --- captions to conditioning ---

    def embed(self, parts: Mapping[str, Any], caption: str) -> dict[str, torch.Tensor]:
        """Return one caption's embeddings as the stock pipeline makes them of a prompt, float32 on the CPU.

        Args:
            parts: tokenizers and text encoders by name.
            caption: any text.

        Returns:
            `hidden` (L, D), and under names of the family's own what else `inputs` needs.
        """
        raise NotImplementedError

    # --- images to latents ---

    def latent_shape(self, vae_config: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape (C, h, w) of one latent of an image of (width, height) pixels."""
        raise NotImplementedError

    def encode(self, vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        """Return the clean latents x0 of pixels, with a given draw from the VAE's posterior.

        Args:
            vae: the autoencoder.
            pixels: (B, 3, H, W) in [-1, 1].
            draw: (B, C, h, w) standard normal.

        Returns:
            (B, C, h, w) float32 on the CPU, shifted and scaled as the network sees it.
        """
        raise NotImplementedError

    # --- what the network is given and what it returns ---

    def inputs(
        self, embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
    ) -> dict[str, Any]:
        """Return what the network is given beside noisy latents and timestep, for one batch.

        Args:
            embeddings: (B, ...) each, as a `CaptionEncoder` returns them.
            sizes: (B, 6) pixels (`ViewRule.sizes`); None unless the family `takes_sizes`.
            device: where the network is.
        """
        raise NotImplementedError

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Run the network on unpacked latents and return its output in the schedule's parametrisation.

        Args:
            network: what is trained, or a wrapper around it (DDP, FSDP).
            x_t: (B, C, h, w) noisy latents.
            timesteps: (B,) of the schedule, in [0, N].
            inputs: from `inputs`.

        Returns:
            (B, C, h, w): epsilon, v, x0 or flow `eps - x0`, as the `NoiseSchedule` says.
        """
        raise NotImplementedError
