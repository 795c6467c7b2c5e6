"""A base's VAE and text encoders, frozen and on a device, as makers of latents and embeddings.

Captions are encoded one at a time: the result has the same bits held in memory and made on the fly, alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ambient_sd.families.family import Family
from ambient_sd.utils.devices import send


class ImageEncoder:
    """Turn pixels into the clean latents that the network sees.

    Args:
        family: of the base; its `encode` and `latent_shape` are used.
        vae: the base's autoencoder, float32.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families import SD
        >>> ImageEncoder(SD, tiny_pipeline().vae)(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 16, 16)).shape
        torch.Size([1, 4, 16, 16])
    """

    def __init__(self, family: Family, vae: Any) -> None:
        self.family, self.vae = family, vae

    def to(self, device: torch.device | str) -> ImageEncoder:
        """Move the VAE and return self."""
        self.vae.to(device)
        return self

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one latent of an image of (width, height) pixels."""
        return self.family.latent_shape(self.vae.config, size)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        """Return x0 of pixels, float32 on the CPU.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            draw: (B, C, h, w) standard normal, what is drawn from the VAE's posterior.
        """
        return self.family.encode(self.vae, pixels, draw)


class CaptionEncoder:
    """Turn captions into the frozen text encoders' embeddings, as the stock pipelines do for a prompt.

    Args:
        family: of the base; its `embed` is used.
        parts: tokenizers and text encoders (float32) under the names that pipelines give them.
        zero_empty: the empty caption is all zeros, as SDXL's pipeline samples its unconditional half.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families import SD
        >>> CaptionEncoder(SD, tiny_pipeline().components)(["a cat", "a dog"])["hidden"].shape
        torch.Size([2, 24, 16])
    """

    def __init__(self, family: Family, parts: Mapping[str, Any], *, zero_empty: bool = False) -> None:
        self.family, self.parts, self.zero_empty = family, dict(parts), zero_empty
        self.held: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def tokenizers(self) -> list[Any]:
        """Return the tokenizers, the first one first."""
        return [part for name, part in self.parts.items() if name.startswith("tokenizer")]

    @property
    def models(self) -> list[Any]:
        """Return the text encoders, in the order of `tokenizers`; none after `release`."""
        return [part for name, part in self.parts.items() if name.startswith("text_encoder")]

    def to(self, device: torch.device | str) -> CaptionEncoder:
        """Move the text encoders and return self."""
        for model in self.models:
            model.to(device)
        return self

    def release(self) -> None:
        """Let the text encoders go; only held captions can be asked for from now on."""
        self.parts = {name: part for name, part in self.parts.items() if name.startswith("tokenizer")}

    @torch.no_grad()
    def encode(self, caption: str) -> dict[str, torch.Tensor]:
        """Return one caption's embedding, float32 on the CPU: `hidden` (L, D), and what else the family has."""
        return {name: value[0].cpu() for name, value in self.embed([caption]).items()}

    def embed(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings of captions, on the encoders' device: through the encoders together and with their gradient."""
        found = self.family.embed(self.parts, captions)
        if self.zero_empty and "" in captions:
            told = send(torch.tensor([caption != "" for caption in captions]), found["hidden"].device)
            return {n: torch.where(told.view(-1, *[1] * (v.dim() - 1)), v, 0.0) for n, v in found.items()}
        return found

    def hold(self, captions: Sequence[str], *, limit: int, progress: bool = False) -> bool:
        """Encode all distinct captions and the empty one now, if they fit in `limit` bytes; tell whether they do."""
        # dict keeps the order of the first use, so that progress and memory do not depend on hashing.
        distinct = list(dict.fromkeys(["", *captions]))
        if len(distinct) * sum(value.nbytes for value in self.encode("").values()) > limit:
            return False
        used = 0
        for caption in tqdm(distinct, desc="encoding captions", disable=not progress, leave=False):
            entry = self.held[caption] = self.encode(caption)
            used += sum(value.nbytes for value in entry.values())
            if used > limit:  # where the empty caption is shorter than others
                self.held.clear()
                return False
        return True

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings of captions, float32: `hidden` (B, L, D), and what else the family has; see `stacked` for where."""
        return stacked([self.held.get(c) or {n: v[0] for n, v in self.embed([c]).items()} for c in captions])


def stacked(entries: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return embeddings one below the other, shorter ones with zeros behind: on the CPU where all are there, else on the device of the others.

    Example:
        >>> stacked([{"hidden": torch.zeros(24, 16)}] * 2)["hidden"].shape
        torch.Size([2, 24, 16])
        >>> stacked([{"mask": torch.ones(2)}, {"mask": torch.ones(3)}])["mask"].tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    device = next((v.device for entry in entries for v in entry.values() if v.device.type != "cpu"), "cpu")
    found = {name: [send(entry[name], device) for entry in entries] for name in entries[0]}
    # Of one shape by `stack`, which takes numbers without a shape, too.
    alike = {name: len({row.shape for row in rows}) == 1 for name, rows in found.items()}
    return {n: torch.stack(rows) if alike[n] else pad_sequence(rows, batch_first=True) for n, rows in found.items()}


def rendered(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels as an autoencoder gives them back, its mode decoded.

    Args:
        vae: of diffusers: of images, without a posterior (Sana's), or of videos (Qwen-Image's), which get one frame.
        pixels: (B, 3, H, W) in [-1, 1], on its device and in its precision.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> rendered(tiny_pipeline().vae, torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 3, 32, 32])
    """
    frames = "temperal_downsample" in vae.config
    found = vae.encode(pixels.unsqueeze(2) if frames else pixels)
    out: torch.Tensor = vae.decode(found.latent if hasattr(found, "latent") else found.latent_dist.mode()).sample
    return out.squeeze(2) if frames else out
