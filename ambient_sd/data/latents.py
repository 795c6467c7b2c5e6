"""Images to clean latents x0, captions to text embeddings: computed once where they fit in memory.

    x0 = (mean + std * eps_v - shift) * scaling          mean, std: the VAE's posterior of ONE view of the image

What must not leak (Shah et al., ICML 2025, Lemma 4.2: m noisy copies of an image average to noise sigma_n / sqrt(m)):
under the ambient objective each image has one view (crop and mirror) for ever, drawn from its key (that of its group of
near-duplicates), and eps_v is fixed by key and view. x_n is then one tensor per image. A mirrored copy with its own noise would be a second draw, for it
can be mirrored back; and mirroring x0 but not its noise (as the paper's code does) is just that. The other objectives
use no fixed noise, so their views are drawn anew at each position.

Images and captions are encoded one at a time: the result then has the same bits in memory and on the fly, alone and
in a batch, on one process and on two. `cache.py` keeps them on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ambient_sd.data.noise import image_noise
from ambient_sd.data.sources import ImageDataset, ImageRow
from ambient_sd.data.stream import SampleStream, keyed_generator

# Above this many bytes per process latents (or embeddings) are not held but computed when needed: 2 GiB are 32,768
# latents of SD at 512 px, or 6,800 captions of SD2, or 3,300 of SDXL.
MAX_HELD_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class View:
    """Say which part of a resized image is seen: mirrored or not, and where the crop lies, as fractions in [0, 1)."""

    flip: bool = False
    top: float = 0.5
    left: float = 0.5


class Sample(NamedTuple):
    """Hold an image ready for the VAE: pixels (3, H, W) float32 in [-1, 1], its key and the key of its VAE draw."""

    pixels: torch.Tensor
    key: str
    draw_key: str


@dataclass(frozen=True)
class ViewRule:
    """Decide the view of each sample.

    Args:
        resolution: side of the square crop, pixels.
        center_crop: always crop the centre.
        random_flip: mirror half of the samples.
        per_image: draw once per image from its key and `noise_seed` (ambient), not at each position.
        noise_seed: seed of everything that is fixed per image.
        buckets: (width, height) of the crop by noise key, in place of the square; None: all are square.
    """

    resolution: int
    center_crop: bool
    random_flip: bool
    per_image: bool
    noise_seed: int
    buckets: Mapping[str, tuple[int, int]] | None = None

    def target(self, noise_key: str) -> tuple[int, int]:
        """Return (width, height) of what is seen of an image, pixels."""
        return (self.resolution, self.resolution) if self.buckets is None else self.buckets[noise_key]

    def uncropped(self, images: ImageDataset) -> bool:
        """Tell whether every image has the shape of its target, so that nothing is cut off."""
        rows = zip(images.sizes, images.noise_keys, images.mirrored, strict=True)
        return all(self.place(size, View(), key, mirrored)[0] == self.target(key) for size, key, mirrored in rows)

    def fixed(self, images: ImageDataset) -> bool:
        """Tell whether an image's view can never change, so that its latent can be kept."""
        return self.per_image or (not self.random_flip and (self.center_crop or self.uncropped(images)))

    def view(self, key: str, stream: SampleStream, position: int) -> View:
        """Return the view of the image `key` at a position."""
        # Purpose tags keep this stream apart from that of the image's noise.
        g = keyed_generator(self.noise_seed, "view", key) if self.per_image else stream.generator("view", position)
        flip, top, left = torch.rand(3, generator=g, dtype=torch.float64).tolist()
        if self.center_crop:
            top = left = 0.5
        return View(self.random_flip and flip < 0.5, top, left)

    def views(self, images: ImageDataset) -> Callable[[int], list[View]] | None:
        """Return the function that lists the views of image i that a run can meet; None where crops are drawn anew."""
        if self.per_image:
            stream = SampleStream(len(images), 0)  # has no say: the view hangs on the key
            return lambda i: [self.view(images.noise_keys[i], stream, 0)]
        if self.center_crop or self.uncropped(images):
            both = [View(False), View(True)] if self.random_flip else [View(False)]
            return lambda i: both
        return None

    def place(
        self, size: tuple[int, int], view: View, noise_key: str, mirrored: bool
    ) -> tuple[tuple[int, int], tuple[int, int], str]:
        """Return what a view of an image comes to, without the image.

        Args:
            size: (width, height) of the image, pixels.
            view: what is seen of it.
            noise_key: key of its group of near-duplicates, or its own.
            mirrored: it is the mirror image of its group's first image.

        Returns:
            (width, height) after resizing, the crop's (top, left) corner, and the key of the VAE draw.
        """
        wide, high = self.target(noise_key)
        scale = max(wide / size[0], high / size[1])
        width, height = max(wide, round(size[0] * scale)), max(high, round(size[1] * scale))
        top, left = int(view.top * (height - high + 1)), int(view.left * (width - wide + 1))
        # Of a mirror image the mirrored place, so that the group's noise (mirrored too) meets the same content.
        left = width - wide - left if mirrored and self.per_image else left
        shape = "" if self.buckets is None else f" {wide}x{high}"
        draw_key = f"vae-draw{shape} {(top, left)} {'mirrored' if view.flip else 'upright'} {noise_key}"
        return (width, height), (top, left), draw_key

    def see(self, row: ImageRow, view: View) -> Sample:
        """Return the pixels of a view of an image: resized to cover its target (Lanczos), cropped, mirrored."""
        key = row.noise_key or row.key
        wide, high = self.target(key)
        size, (top, left), draw_key = self.place(row.image.size, view, key, row.mirrored)
        image = row.image
        if image.size != size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + wide, top + high))
        if view.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = flat.reshape(high, wide, 3).permute(2, 0, 1).float() / 127.5 - 1.0
        return Sample(pixels, row.key, draw_key)

    def sample(self, image: ImageRow, stream: SampleStream, position: int) -> Sample:
        """Return the pixels of an image as seen at a position."""
        return self.see(image, self.view(image.noise_key or image.key, stream, position))


class Samples(Dataset[Sample]):
    """Give the sample at each position of a run; a map-style data set for torch's DataLoader."""

    def __init__(self, images: ImageDataset, rule: ViewRule, stream: SampleStream) -> None:
        self.images, self.rule, self.stream = images, rule, stream

    def __getitem__(self, position: int) -> Sample:
        return self.rule.sample(self.images[self.stream.image(position)], self.stream, position)


@torch.no_grad()
def encode(vae: Any, samples: Sequence[Sample], *, noise_seed: int) -> torch.Tensor:
    """Encode samples to clean latents with the one VAE draw of each view.

    Args:
        vae: a diffusers AutoencoderKL, float32.
        samples: B samples.
        noise_seed: seed of the draws.

    Returns:
        x0, (B, C, h, w) float32 on the CPU, shifted and scaled as the U-Net sees it.
    """
    latents = []
    for sample in samples:
        posterior = vae.encode(sample.pixels[None].to(vae.device, vae.dtype)).latent_dist
        draw = image_noise([sample.draw_key], tuple(posterior.mean.shape[1:]), seed=noise_seed)
        z = posterior.mean.float().cpu() + posterior.std.float().cpu() * draw
        latents.append((z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)
    return torch.cat(latents)


def latent_shape(vae_config: Any, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of one latent of an image of (width, height) pixels."""
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    return int(vae_config["latent_channels"]), size[1] // factor, size[0] // factor


def encode_all(
    vae: Any, images: ImageDataset, rule: ViewRule, indices: Sequence[int], *, progress: bool = False
) -> torch.Tensor:
    """Encode the fixed views of some images of one target size, (len(indices), C, h, w) float32 on the CPU."""
    # A fixed view is the same at every position, so any will do.
    stream = SampleStream(len(images), 0)
    bar = tqdm(indices, desc="encoding images", disable=not progress, leave=False)
    held: torch.Tensor | None = None
    for row, index in enumerate(bar):
        latent = encode(vae, [rule.sample(images[index], stream, 0)], noise_seed=rule.noise_seed)
        held = latent.new_empty((len(indices), *latent.shape[1:])) if held is None else held
        held[row] = latent[0]
    assert held is not None
    return held


class CaptionEncoder:
    """Turn captions into the frozen text encoders' embeddings, as the stock pipelines do for a prompt.

    Stable Diffusion 1 and 2: the last hidden state. SDXL: the last hidden state but one of both encoders side by side,
    and the pooled, projected output of the second.

    Args:
        tokenizer: a CLIP tokenizer.
        text_encoder: a CLIP text model, float32.
        tokenizer_2: the tokenizer of SDXL's second encoder.
        text_encoder_2: a CLIP text model with projection, float32; makes the embeddings SDXL's.
        zero_empty: the empty caption is all zeros, as SDXL's pipeline samples its unconditional half.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        tokenizer_2: Any = None,
        text_encoder_2: Any = None,
        *,
        zero_empty: bool = False,
    ) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.tokenizer_2, self.text_encoder_2 = tokenizer_2, text_encoder_2
        self.zero_empty = zero_empty
        self.held: dict[str, dict[str, torch.Tensor]] = {}

    def parts(self) -> dict[str, Any]:
        """Return tokenizers and text encoders under the names that pipelines give them."""
        one = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        two = {"tokenizer_2": self.tokenizer_2, "text_encoder_2": self.text_encoder_2}
        return one if self.tokenizer_2 is None else {**one, **two}

    def to(self, device: torch.device | str) -> CaptionEncoder:
        """Move the text encoders and return self."""
        for name, part in self.parts().items():
            if name.startswith("text_encoder"):
                part.to(device)
        return self

    def release(self) -> None:
        """Let the text encoders go; only held captions can be asked for from now on."""
        self.text_encoder = self.text_encoder_2 = None

    @torch.no_grad()
    def encode(self, caption: str) -> dict[str, torch.Tensor]:
        """Return one caption's embedding: `hidden` (L, D), of SDXL also `pooled` (P,), float32 on the CPU."""
        if self.tokenizer_2 is None:
            masked = getattr(self.text_encoder.config, "use_attention_mask", False)
            tokens, device = _tokens(self.tokenizer, caption), self.text_encoder.device
            mask = tokens.attention_mask.to(device) if masked else None
            hidden = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0][0]
            return {"hidden": hidden.float().cpu()}
        outputs = [
            encoder(_tokens(tokenizer, caption).input_ids.to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        ]
        hidden = torch.cat([output.hidden_states[-2][0].float().cpu() for output in outputs], dim=-1)
        found = {"hidden": hidden, "pooled": outputs[1].text_embeds[0].float().cpu()}
        if caption == "" and self.zero_empty:
            return {name: torch.zeros_like(value) for name, value in found.items()}
        return found

    def hold(self, captions: Sequence[str], *, limit: int = MAX_HELD_BYTES, progress: bool = False) -> bool:
        """Encode all distinct captions and the empty one now, if they fit in `limit` bytes; tell whether they do."""
        # dict keeps the order of the first use, so that progress and memory do not depend on hashing.
        distinct = list(dict.fromkeys(["", *captions]))
        if len(distinct) * sum(value.nbytes for value in self.encode("").values()) > limit:
            return False
        for caption in tqdm(distinct, desc="encoding captions", disable=not progress, leave=False):
            self.held[caption] = self.encode(caption)
        return True

    def __call__(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings of captions: `hidden` (B, L, D), of SDXL also `pooled` (B, P), float32 on the CPU."""
        found = [self.held[c] if c in self.held else self.encode(c) for c in captions]
        return {name: torch.stack([entry[name] for entry in found]) for name in found[0]}


def _tokens(tokenizer: Any, caption: str) -> Any:
    """Tokenize as the pipelines do: padded and cut to the encoder's length."""
    length = tokenizer.model_max_length
    return tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
