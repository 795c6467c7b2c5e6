"""Which part of an image a sample shows: crop and mirror, and what follows from them without decoding the image.

What must not leak (Shah et al., ICML 2025, Lemma 4.2: m noisy copies of an image average to noise sigma_n / sqrt(m)):
under the ambient objective each image keeps one view (crop and mirror), drawn from its key (that of its group of
near-duplicates), and the VAE's draw is fixed by key and view. x_n is then one tensor per image. A mirrored copy with its
own noise would be a second draw, for it can be mirrored back; and mirroring x0 but not its noise (as the paper's code
does) is just that. The other objectives use no fixed noise, so their views are drawn anew at each position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ambient_sd.data.sources import ImageDataset, ImageRow
from ambient_sd.data.stream import SampleStream, keyed_generator


@dataclass(frozen=True)
class View:
    """Say which part of a resized image is seen: mirrored or not, and where the crop lies, as fractions in [0, 1).

    Example:
        >>> View(flip=True)
        View(flip=True, top=0.5, left=0.5)
    """

    flip: bool = False
    top: float = 0.5
    left: float = 0.5


class Sample(NamedTuple):
    """Hold an image ready for the VAE: pixels (3, H, W) float32 in [-1, 1], its key and the key of its VAE draw.

    Example:
        >>> Sample(torch.zeros(3, 8, 8), key="a", draw_key="a upright").key
        'a'
    """

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
        interpolation: the filter that resizes, a name of PIL's in small letters.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ambient_sd.data.sources import load_rows
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (96, 64), "red").save(folder / "a.png")
        >>> rows = load_rows(folder, need_captions=False).check()
        >>> rule = ViewRule(resolution=32, center_crop=True, random_flip=False, per_image=True, noise_seed=0)
        >>> rule.target("a"), rule.fixed(rows), rule.see(rows[0], View()).pixels.shape
        ((32, 32), True, torch.Size([3, 32, 32]))
    """

    resolution: int
    center_crop: bool
    random_flip: bool
    per_image: bool
    noise_seed: int
    buckets: Mapping[str, tuple[int, int]] | None = None
    interpolation: str = "lanczos"

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
        """Return the pixels of a view of an image: resized to cover its target, cropped, mirrored."""
        key = row.noise_key or row.key
        wide, high = self.target(key)
        size, (top, left), draw_key = self.place(row.image.size, view, key, row.mirrored)
        image = row.image
        if image.size != size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        image = image.crop((left, top, left + wide, top + high))
        if view.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = flat.reshape(high, wide, 3).permute(2, 0, 1).float() / 127.5 - 1.0
        return Sample(pixels, row.key, draw_key)

    def sizes(self, images: ImageDataset, stream: SampleStream, positions: Sequence[int]) -> torch.Tensor:
        """Return the sizes of the samples at these positions, (B, 6) float32, pixels; no image is decoded for them.

        `(height, width of the original, top, left of the crop, height, width of the crop)`, the order of
        StableDiffusionXLPipeline's time ids. The corner is counted in the resized image as the network sees it: in a
        mirrored view from the mirrored image's left.

        Args:
            images: checked (their sizes and keys are known).
            stream: order of the samples.
            positions: places in the run, B of them.
        """
        rows = []
        for position in positions:
            index = stream.image(position)
            key, (width, height) = images.noise_keys[index], images.sizes[index]
            view, (wide, high) = self.view(key, stream, position), self.target(key)
            (resized_width, _), (top, left), _ = self.place((width, height), view, key, images.mirrored[index])
            left = resized_width - wide - left if view.flip else left
            rows.append([height, width, top, left, high, wide])
        return torch.tensor(rows, dtype=torch.float32)

    def sample(self, image: ImageRow, stream: SampleStream, position: int) -> Sample:
        """Return the pixels of an image as seen at a position."""
        return self.see(image, self.view(image.noise_key or image.key, stream, position))


class Samples(Dataset[Sample]):
    """Give the sample at each position of a run; a map-style data set for torch's DataLoader.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ambient_sd.data.sources import load_rows
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (96, 64), "red").save(folder / "a.png")
        >>> rows = load_rows(folder, need_captions=False).check()
        >>> rule = ViewRule(resolution=32, center_crop=True, random_flip=False, per_image=True, noise_seed=0)
        >>> Samples(rows, rule, SampleStream(1, seed=0))[0].pixels.shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, images: ImageDataset, rule: ViewRule, stream: SampleStream) -> None:
        self.images, self.rule, self.stream = images, rule, stream

    def __getitem__(self, position: int) -> Sample:
        return self.rule.sample(self.images[self.stream.image(position)], self.stream, position)
