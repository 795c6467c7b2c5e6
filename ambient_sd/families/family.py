"""What differs between one family of models and the others, behind one protocol: a new family is one more file.

A `Family` holds no weights and no settings of a run; it says which parts a pipeline is made of and what each is for.
Everything else in the package asks it, and nothing outside this package branches on a model's name or class.

Tensors that cross this border are unpacked: latents are (B, C, h, w) and timesteps those of the schedule. Whatever a
network wants instead (packed patches, timesteps in [0, 1], a list of images, the opposite sign) `predict` converts both
ways, so the objective sees one parametrisation: epsilon, v, x0, or the flow `eps - x0` at `s = sigma / (1 - sigma)`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ambient_sd.families.guidance import Guidance

if TYPE_CHECKING:
    from ambient_sd.families.base import Model


class Family:
    """Describe one family of text-to-image models.

    Attributes:
        name: what messages call it.
        pipeline: the class that samples from a caption alone, as model_index.json names it.
        guarded: the class of this package that samples with the guard built in, if there is one.
        guidance: by class of pipeline, how it calls its network; what a `MemorizationGuard` can watch.
        unready: why its models cannot be loaded by name, trained or adapted yet; empty: they can. With a reason only
            `guidance` is described.
        network: the pipeline's attribute that holds the denoising network, and its folder.
        parts: what it is trained and encoded with, in the form of model_index.json: (library, class) by name. Loaded
            as another class, a part gets random weights where names differ.
        optional: parts that a model may leave out, or have as [null, null].
        takes_sizes: whether the network is told the sizes of the original, the crop and the target.
        flow: whether its networks know flow matching alone.
        draws: whether latents are drawn from the VAE's posterior; else they are its mode, and `encode` ignores the draw.
        exact_start: whether the pipeline draws start noise in float32 whatever its precision.
        lora_targets: names or endings of layers of the network that a LoRA usually changes; see `usual_targets`.
        readers: tokenizers whose end of a long caption nothing else reads; empty: every one.
        text_length: tokens that the pipeline gives to the readers by default; None: as many as they take.
        text_most: tokens that the pipeline gives them at most; None: any number.
        embedded_guidance: the guidance scale that a network which takes one as an input is trained at; None: none does.
        single_file_texts: by text encoder, how the names of its tensors may begin in a file that holds a whole model.
        architectures: by `cross_attention_dim` of the network and what it predicts, what sd-scripts and Stability's model
            specification call the first models.
        lora_prefixes: by part that a LoRA can change, what other programs' names for its layers begin with, and whose
            they are; behind a prefix that ends in "_" stands "_" for each ".".

    Example:
        >>> from ambient_sd.families import SDXL
        >>> SDXL.text_parts
        ['text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2']
    """

    name: str
    pipeline: str
    guarded: str | None = None
    guidance: Mapping[str, Guidance]
    unready: str = ""
    network: str = "transformer"
    parts: Mapping[str, tuple[str, str]] = {}
    optional: frozenset[str] = frozenset()
    takes_sizes: bool = False
    flow: bool = False
    draws: bool = True
    exact_start: bool = False
    lora_targets: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    readers: tuple[str, ...] = ()
    text_length: int | None = None
    text_most: int | None = None
    embedded_guidance: float | None = None
    single_file_texts: Mapping[str, tuple[str, ...]] = {}
    architectures: Mapping[tuple[Any, str], tuple[str, str]] = {}
    lora_prefixes: Mapping[str, Mapping[str, str]] = {}

    @property
    def usual_scale(self) -> float:
        """Return the scale of classifier-free guidance that the pipeline samples at by default, as commands count it."""
        import diffusers

        layout = self.guidance[self.pipeline]
        own = inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters[layout.scale].default
        return float(own) + layout.excess

    @property
    def text_parts(self) -> list[str]:
        """Return the names of the parts that turn a caption into embeddings."""
        return [part for part in self.parts if part.startswith(("text_encoder", "tokenizer"))]

    def trained_with(self, text_length: int | None, embedded_guidance: float | None) -> Family:
        """Return the family as a run trains it: with so many tokens, and at that guidance scale; None: as it is."""
        given = {"text_length": text_length, "embedded_guidance": embedded_guidance}
        changed = copy.copy(self)
        changed.__dict__ |= {name: value for name, value in given.items() if value is not None}
        return changed

    def guidance_embeds(self, network: Mapping[str, Any]) -> bool:
        """Tell by its settings whether a network takes the guidance scale as an input."""
        return self.embedded_guidance is not None and bool(network.get("guidance_embeds"))

    # --- checks before weights load ---

    def refuse(self, index: Mapping[str, Any]) -> str | None:
        """Say why a model_index.json that names a class of this family is not a text-to-image model, or return None."""
        return None

    def check(self, model: Model, network: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        """Check that the parts of a model belong together and take what this family gives them.

        Args:
            model: read as far as needed; no weights.
            network: config.json of the network.
            vae: config.json of the autoencoder that the run uses.

        Raises:
            UserError: a setting is missing, damaged, or that of another kind of model.
        """

    def zero_empty(self, index: Mapping[str, Any]) -> bool:
        """Tell whether the pipeline samples its unconditional half with zeros, not with the empty prompt."""
        return False

    def assembly(self, zero_empty: bool) -> dict[str, Any]:
        """Return what the pipeline's constructor needs beside the parts."""
        return {}

    def distilled(self, pipe: Any) -> str | None:
        """Say what makes a pipeline one without classifier-free guidance (LCM and its kin), or return None."""
        return None

    # --- captions to conditioning ---

    def embed(self, parts: Mapping[str, Any], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return captions' embeddings as the stock pipeline makes them of a prompt, float32 on the encoders' device.

        Args:
            parts: tokenizers and text encoders by name.
            captions: any B texts; they go through the encoders together.

        Returns:
            `hidden` (B, L, D), and under names of the family's own what else `inputs` needs. Where L differs between
            captions, `mask` (B, L) tells which rows are read, and all (B, L, ...) are padded with zeros behind.
        """
        raise NotImplementedError(self.unready)

    def around(self, tokenizer: Any) -> int:
        """Return how many of the tokens that a caption may have go to what stands around it: marks, a template."""
        return int(tokenizer.num_special_tokens_to_add())

    # --- images to latents ---

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        """Return the pixels per latent along a side; a resolution is a multiple of it."""
        raise NotImplementedError(self.unready)

    def pixel_step(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Return what both sides of an image of any shape must be multiples of, pixels."""
        raise NotImplementedError(self.unready)

    def latent_shape(self, vae: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape (C, h, w) of one latent of an image of (width, height) pixels."""
        raise NotImplementedError(self.unready)

    def image_tokens(self, network: Mapping[str, Any], shape: Sequence[int]) -> int:
        """Return the tokens that the network makes of a latent of shape (C, h, w): schedulers shift levels by their number."""
        raise NotImplementedError(self.unready)

    def shift(self, scheduler: Mapping[str, Any], tokens: int) -> float:
        """Return mu, by which the pipeline shifts the levels of an image of so many tokens, from the scheduler's settings.

        That of most: a straight line through two points.
        """
        few, many = scheduler.get("base_image_seq_len") or 256, scheduler.get("max_image_seq_len") or 4096
        low, high = scheduler.get("base_shift") or 0.5, scheduler.get("max_shift") or 1.15
        return float(low + (high - low) / (many - few) * (tokens - few))

    def encode(self, vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        """Return the clean latents x0 of pixels, with a given draw from the VAE's posterior.

        Args:
            vae: the autoencoder.
            pixels: (B, 3, H, W) in [-1, 1].
            draw: (B, C, h, w) standard normal; ignored by a family that `draws` nothing.

        Returns:
            (B, C, h, w) float32 on the CPU, shifted and scaled as the network sees it.
        """
        raise NotImplementedError(self.unready)

    def decode(self, vae: Any, x0: torch.Tensor) -> torch.Tensor:
        """Return the pixels of latents as the pipeline makes them: `encode`, back."""
        raise NotImplementedError(self.unready)

    def start_shape(self, pipe: Any, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape in which the pipeline draws one image's start noise, for (width, height) pixels."""
        raise NotImplementedError(self.unready)

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        """Return start noise (B, ...) of that shape as the pipeline's `latents` takes it."""
        return noise

    def guided(self, pipe: Any, scale: float, count: int) -> dict[str, Any]:
        """Return the options with which the pipeline samples `count` prompts under classifier-free guidance against the empty one."""
        name = self.guidance[self.pipeline].scale
        # Where it is not the pipeline's first way of guidance it needs the empty prompt spelt out.
        return {name: scale} if name == "guidance_scale" else {name: scale, "negative_prompt": [""] * count}

    def native_size(self, pipe: Any) -> tuple[int, int]:
        """Return the (width, height) in pixels that a live pipeline samples at by default."""
        side = self.native_side(getattr(pipe, self.network).config, pipe.vae.config)
        return side, side

    def native_side(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Return the side that the pipeline samples at by default, pixels, from the parts' settings."""
        raise NotImplementedError(self.unready)

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
        raise NotImplementedError(self.unready)

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Run the network and return its output in the schedule's parametrisation.

        Args:
            network: what is trained, or a wrapper around it (DDP, FSDP).
            x_t: (B, C, h, w) noisy latents.
            timesteps: (B,) of the schedule, in [0, N]; float32 with flow matching.
            inputs: from `inputs`.

        Returns:
            (B, C, h, w): epsilon, v, x0 or flow, as the `NoiseSchedule` of the model's scheduler says.
        """
        raise NotImplementedError(self.unready)

    # --- adapters ---

    def usual_targets(self, network: Any) -> list[str]:
        """Return the names or endings of the layers that a LoRA changes where nothing else is asked for."""
        return list(self.lora_targets)

    def original_names(self, network: Any) -> dict[str, str]:
        """Return what the authors' own code calls the network's layers, by diffusers' name, where it differs."""
        return {}

    def fused_names(self, network: Any) -> dict[str, tuple[str, ...]]:
        """Return layers whose rows, one below the other, are one layer of the authors' own code, by its name there."""
        return {}

    def swapped_names(self, network: Any) -> dict[str, str]:
        """Return layers whose two halves of rows stand in the other order in the authors' own code, with their names there."""
        return {}

    def kohya_names(self, network: Any) -> dict[str, str]:
        """Return what sd-scripts calls the network's layers in its files, by diffusers' name, where it differs."""
        return {}

    def save_lora(
        self, folder: Path, parts: Mapping[str, tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]]
    ) -> None:
        """Write a LoRA as the stock pipeline does, with peft's settings in the file's head.

        Args:
            folder: gets pytorch_lora_weights.safetensors.
            parts: by part of the pipeline, its layers by peft's names in it, and peft's settings, plain JSON.
        """
        import diffusers

        given: dict[str, Any] = {}
        for part, (layers, settings) in parts.items():
            given |= {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": settings}
        getattr(diffusers, self.pipeline).save_lora_weights(folder, **given)

    def kohya_prefix(self, part: str) -> str:
        """Return what sd-scripts puts before the names of a part's layers."""
        return next(prefix for prefix, scheme in self.lora_prefixes[part].items() if scheme == "kohya")


def config_of(network: Any) -> Any:
    """Return the settings of a network, through what wraps it (DDP, a compiled module).

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> config_of(torch.nn.parallel.DataParallel(tiny_pipeline().unet)).in_channels
        4
    """
    while not hasattr(network, "config"):
        network = network.module if hasattr(network, "module") else network._orig_mod
    return network.config
