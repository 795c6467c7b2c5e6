"""Images of a dataset to clean latents x0, with the one VAE draw of each view.

    x0 = the family's latent of (pixels, eps_v)          eps_v fixed by (key, view, seed): `ambient_sd.data.views` says why

On a CPU images are encoded one at a time: the result then has the same bits in memory and on the fly, alone and in a batch, on
one process and on two. A GPU takes several of one shape at once, and rounds them as that batch does. `cache.py` keeps them on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from ambient_sd.data.noise import image_noise
from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import SampleStream
from ambient_sd.data.views import Sample, ViewRule
from ambient_sd.families.encoders import ImageEncoder

# Above this many bytes per process latents (or embeddings) are not held but computed when needed: 2 GiB are 32,768
# latents of SD at 512 px, or 6,800 captions of SD2, or 3,300 of SDXL.
MAX_HELD_BYTES = 2 * 1024**3
_PIXELS_AT_ONCE, _MOST_AT_ONCE = 2**20, 16  # of a GPU's batch: four images of 512 px


def encode(encoder: ImageEncoder, samples: Sequence[Sample], *, noise_seed: int) -> torch.Tensor:
    """Encode samples to clean latents with the one VAE draw of each view.

    Args:
        encoder: of the base, its VAE in float32.
        samples: B samples of one shape.
        noise_seed: seed of the draws.

    Returns:
        x0, (B, C, h, w) float32 on the CPU, shifted and scaled as the network sees it.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.sd import StableDiffusion
        >>> encoder = ImageEncoder(StableDiffusion(), tiny_pipeline().vae)
        >>> encode(encoder, [Sample(torch.zeros(3, 32, 32), "a", "a upright")], noise_seed=0).shape
        torch.Size([1, 4, 16, 16])
    """
    latents, pixels = [], samples[0].pixels
    shape, many = encoder.shape((pixels.shape[2], pixels.shape[1])), at_once(encoder, pixels.shape[1] * pixels.shape[2])
    for start in range(0, len(samples), many):
        some = samples[start : start + many]
        draw = image_noise([sample.draw_key for sample in some], shape, seed=noise_seed)
        latents.append(encoder(torch.stack([sample.pixels for sample in some]), draw))
    return torch.cat(latents)


def at_once(encoder: ImageEncoder, pixels: int) -> int:
    """Return how many images of so many pixels the encoder takes together: on a CPU one.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.sd import StableDiffusion
        >>> at_once(ImageEncoder(StableDiffusion(), tiny_pipeline().vae), 512 * 512)
        1
    """
    return 1 if encoder.vae.device.type == "cpu" else most_at_once(pixels)


def most_at_once(pixels: int) -> int:
    """Return how many images of so many pixels a GPU encodes together.

    Example:
        >>> most_at_once(512 * 512), most_at_once(64 * 64)
        (4, 16)
    """
    return max(1, min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // pixels))


def encode_all(
    encoder: ImageEncoder, images: ImageDataset, rule: ViewRule, indices: Sequence[int], *, progress: bool = False
) -> torch.Tensor:
    """Encode the fixed views of some images of one target size, (len(indices), C, h, w) float32 on the CPU.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from ambient_sd.data.sources import load_rows
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (96, 64), "red").save(folder / "a.png")
        >>> rows = load_rows(folder, need_captions=False).check()
        >>> rule = ViewRule(resolution=32, center_crop=True, random_flip=False, per_image=True, noise_seed=0)
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.sd import StableDiffusion
        >>> encoder = ImageEncoder(StableDiffusion(), tiny_pipeline().vae)
        >>> encode_all(encoder, rows, rule, [0]).shape
        torch.Size([1, 4, 16, 16])
    """
    # A fixed view is the same at every position, so any will do.
    stream = SampleStream(len(images), 0)
    bar = tqdm(total=len(indices), desc="encoding images", disable=not progress, leave=False)
    held: torch.Tensor | None = None
    width, height = rule.target(images.noise_keys[indices[0]])
    many = at_once(encoder, width * height)
    for row in range(0, len(indices), many):
        some = [rule.sample(images[index], stream, 0) for index in indices[row : row + many]]
        latent = encode(encoder, some, noise_seed=rule.noise_seed)
        held = latent.new_empty((len(indices), *latent.shape[1:])) if held is None else held
        held[row : row + len(some)] = latent
        bar.update(len(some))
    assert held is not None
    return held
