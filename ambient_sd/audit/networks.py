"""Features of networks whose weights the user brings: DINOv2, Inception.

    Dinov2      the pooled class token of DINOv2 (Oquab et al. 2023, arXiv 2304.07193), cosine. The paper's small-data tables call
                S > 0.9 a copy, and give 0.875 beside it, with ViT-g/14 and the largest similarity over the training set. Those thresholds
                belong to its preprocessing (`preprocessing="paper"`); with ours they are carried over, not calibrated
    Inception   the pooled features of a TorchScript Inception-v3, Euclidean: Frechet distances on them

Weights are folders or hub ids of transformers, in safetensors, or one TorchScript file; nothing is downloaded that was not named. A
network with weights that the file lacks is refused: transformers would fill them at random. The whole image is used.

A Frechet distance carries the name of its network. It is FID only where the network is the one that FID is defined with, which
nothing here can tell of a file: figures on `Inception` are called FD-Inception, and say which file by its digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ambient_sd.audit.features import Batched, Distance, imagenet
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.sheets import as_rgb
from ambient_sd.utils.weight_files import file_digest


def pretrained(kind: str, name: str, wanted: Sequence[str]) -> Any:
    """Load a transformers model of one of the `wanted` types, whole; raise a `UserError` where that cannot be.

    Example:
        >>> try:
        ...     pretrained("Dinov2Model", "no/such/folder", ("dinov2",))
        ... except UserError as error:
        ...     str(error).split(";")[0]
        'no/such/folder cannot be loaded'
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in wanted:
            raise UserError(f"{name} is a {config.model_type}", rule=f"it must be a {' or '.join(wanted)}")
        model, loading = getattr(transformers, kind).from_pretrained(
            name, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # no such folder or id, no connection, unreadable files: a dozen kinds
        raise UserError(f"{name} cannot be loaded", rule=one_line(f"{type(error).__name__}: {error}", 200),
                        remedy=f"give a folder or hub id of a {kind} with safetensors weights") from None  # fmt: skip
    # A mask token serves the training of DINOv2 only.
    missing = sorted(key for key in loading["missing_keys"] if "mask_token" not in key)
    if missing or loading.get("mismatched_keys"):
        raise UserError(
            f"{name} lacks weights, such as {missing[0] if missing else next(iter(loading['mismatched_keys']))}",
            rule="they would be random",
        )
    return model.eval().requires_grad_(False)


class Dinov2(Batched):
    """Describe images by the pooled class token of DINOv2; cosine similarity.

        imagenet   squeezed to 224 x 224, bicubic; ImageNet mean and deviation: as DINOv2 was trained
        paper      each image at its own size, padded by reflection to multiples of the patch size (the larger half to the right and
                   below), in [0, 1] without normalisation: as the authors of *Does Generation Require Memorization?* (ICML 2025) do.
                   Images of one size only go through the network together

    The name of the feature says which: DINOv2, DINOv2-paper. The published thresholds 0.9 and 0.875 belong to "paper" and ViT-g/14. transformers
    stretches the position embeddings to other sizes a little differently than the authors' torch.hub model.

    Args:
        model: folder or hub id of a transformers `Dinov2Model`.
        size: side in pixels; brought down to a multiple of the patch size; of "imagenet" only. None: 224.
        preprocessing: how images are brought to the network.

    Raises:
        UserError: it cannot be loaded whole, or is another model; with "paper", an image is too small to be padded.

    Example:
        >>> Dinov2.thresholds
        (0.9, 0.875)
    """

    distance: Distance = "cosine"
    thresholds: tuple[float, ...] = (0.9, 0.875)
    quality = True

    def __init__(
        self,
        model: str,
        size: int | None = None,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        preprocessing: Literal["imagenet", "paper"] = "imagenet",
    ) -> None:
        if preprocessing not in ("imagenet", "paper"):
            raise UserError(f"Dinov2 preprocessing={preprocessing!r}", rule="there are imagenet, paper")
        if size is not None and preprocessing == "paper":
            raise UserError(f"Dinov2 size={size} with preprocessing paper", rule="every image keeps its own size")
        self.network = pretrained("Dinov2Model", model, ("dinov2",)).to(device)
        self.device = torch.device(device)
        patch = self.network.config.patch_size
        self.name = "DINOv2" if preprocessing == "imagenet" else "DINOv2-paper"
        self.batch_size, self.dim, self.preprocessing = batch_size, self.network.config.hidden_size, preprocessing
        self.size = max(patch, (224 if size is None else size) // patch * patch)

    def _rows(self, images: Sequence[Image.Image]) -> Tensor:
        if self.preprocessing == "imagenet":
            return super()._rows(images)
        rgb = [as_rgb(image) for image in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, image in enumerate(rgb):
            by_size.setdefault(image.size, []).append(place)
        rows = torch.empty(len(rgb), self.dim)
        for places in by_size.values():
            batch = np.stack([np.asarray(rgb[place], dtype=np.uint8) for place in places])
            rows[places] = self.network(pixel_values=self._padded(batch)).pooler_output.float().cpu()
        return rows

    def _padded(self, batch: np.ndarray) -> Tensor:
        x = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255
        patch = self.network.config.patch_size
        down, right = (-x.shape[2] % patch, -x.shape[3] % patch)
        if (down + 1) // 2 >= x.shape[2] or (right + 1) // 2 >= x.shape[3]:
            raise UserError(
                f"an image of {x.shape[3]} x {x.shape[2]} pixels for {self.name}",
                rule=f"it is padded by reflection to a multiple of {patch}, which takes more pixels than it has",
                remedy="use dinov2, which enlarges images",
            )
        return functional.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2), mode="reflect")

    def _embed(self, batch: np.ndarray) -> Tensor:
        x = torch.from_numpy(imagenet(batch)).to(self.device)
        return self.network(pixel_values=x).pooler_output


class Inception(Batched):
    """Pool the features of an Inception-v3 in one TorchScript file that takes uint8 `(B, 3, 299, 299)` in [0, 255].

    The files of the common FID implementations are such; those with an argument `return_features` are called with it.

    Raises:
        UserError: the file is not there, is no TorchScript, or gives no features `(B, D)`.

    Example:
        >>> try:
        ...     Inception("inception.pt")
        ... except UserError as error:
        ...     print(error)
        Inception model inception.pt; the file does not exist
    """

    quality = True

    def __init__(self, path: str | Path, batch_size: int = 16, device: str | torch.device = "cpu") -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"Inception model {path}", rule="the file does not exist")
        self.digest = file_digest(path)
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"Inception model {path.name}", rule="must be a TorchScript file",
                            remedy=one_line(error, 160)) from None  # fmt: skip
        self.device = torch.device(device)
        self.name, self.size, self.batch_size = "Inception", 299, batch_size
        names = [a.name for a in self.network.forward.schema.arguments]
        self.options: dict[str, bool] = {"return_features": True} if "return_features" in names else {}
        try:
            with torch.inference_mode():
                out = self._embed(np.zeros((1, self.size, self.size, 3), dtype=np.uint8))
            if out.dim() != 2 or len(out) != 1:
                raise ValueError(f"it gives {tuple(out.shape)} for one image")
        except Exception as error:
            raise UserError(f"Inception model {path.name} does not take uint8 (1, 3, 299, 299)",
                            rule=one_line(str(error).strip().splitlines()[-1] if str(error).strip() else error, 160)) from None  # fmt: skip
        self.dim = out.shape[1]

    def _embed(self, batch: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(self.device)
        out = self.network(x, **self.options)
        return out[0] if isinstance(out, (tuple, list)) else out
