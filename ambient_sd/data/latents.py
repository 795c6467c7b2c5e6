"""Images of a dataset to clean latents x0, with the one VAE draw of each view.

    x0 = the family's latent of (pixels, eps_v)          eps_v fixed by (key, view, seed): `ambient_sd.data.views` says why

Images are encoded one at a time: the result then has the same bits in memory and on the fly, alone and in a batch, on
one process and on two. `cache.py` keeps them on disk.
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


def encode(encoder: ImageEncoder, samples: Sequence[Sample], *, noise_seed: int) -> torch.Tensor:
    """Encode samples to clean latents with the one VAE draw of each view.

    Args:
        encoder: of the base, its VAE in float32.
        samples: B samples.
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
    latents = []
    for sample in samples:
        shape = encoder.shape((sample.pixels.shape[2], sample.pixels.shape[1]))
        latents.append(encoder(sample.pixels[None], image_noise([sample.draw_key], shape, seed=noise_seed)))
    return torch.cat(latents)


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
    bar = tqdm(indices, desc="encoding images", disable=not progress, leave=False)
    held: torch.Tensor | None = None
    for row, index in enumerate(bar):
        latent = encode(encoder, [rule.sample(images[index], stream, 0)], noise_seed=rule.noise_seed)
        held = latent.new_empty((len(indices), *latent.shape[1:])) if held is None else held
        held[row] = latent[0]
    assert held is not None
    return held
