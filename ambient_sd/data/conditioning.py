"""What a U-Net is given beside noisy latents and timestep: the caption's embedding and, of SDXL, sizes.

    SDXL       time_ids = (height, width of the original, top, left of the crop, height, width of the target), pixels
               Podell et al., "SDXL" (2023), section 2.2; the order is that of StableDiffusionXLPipeline
    SD 1, 2    the embedding alone

The corner is counted in the resized image as the network sees it: in a mirrored view from the mirrored image's left.
The ids follow from an image's size and view, and a view from the image's key (ambient) or the place in the run: no
image is decoded for them, and any number of processes finds the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ambient_sd.data.latents import ViewRule
from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import SampleStream


def time_ids(images: ImageDataset, rule: ViewRule, stream: SampleStream, positions: Sequence[int]) -> torch.Tensor:
    """Return SDXL's sizes of the samples at these positions, (B, 6) float32, pixels.

    Args:
        images: checked (their sizes and keys are known).
        rule: of the views.
        stream: order of the samples.
        positions: places in the run, B of them.
    """
    rows = []
    for position in positions:
        index = stream.image(position)
        key, mirrored = images.noise_keys[index], images.mirrored[index]
        view = rule.view(key, stream, position)
        (resized_width, _), (top, left), _ = rule.place(images.sizes[index], view, key, mirrored)
        wide, high = rule.target(key)
        if view.flip:
            left = resized_width - wide - left
        width, height = images.sizes[index]
        rows.append([height, width, top, left, high, wide])
    return torch.tensor(rows, dtype=torch.float32)


def unet_inputs(
    embeddings: Mapping[str, torch.Tensor], sizes: torch.Tensor | None, device: torch.device | str
) -> dict[str, Any]:
    """Return the keyword arguments of a UNet2DConditionModel for one batch.

    Args:
        embeddings: `hidden` (B, L, D); of SDXL also `pooled` (B, P): what a `CaptionEncoder` returns.
        sizes: `time_ids` of SDXL, (B, 6); None for Stable Diffusion 1 and 2.
        device: where the U-Net is.
    """
    inputs: dict[str, Any] = {"encoder_hidden_states": embeddings["hidden"].to(device)}
    if sizes is not None:
        inputs["added_cond_kwargs"] = {"text_embeds": embeddings["pooled"].to(device), "time_ids": sizes.to(device)}
    return inputs
