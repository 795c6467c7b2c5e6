"""How well an image shows its prompt, by a CLIP of transformers or of open_clip.

    cos(image embedding, text embedding)    Hessel et al., EMNLP 2021, arXiv 2104.08718, without its factor 2.5 and without
                                            clipping at 0: what the tables of Somepalli et al. print as 0.30

Figures of two CLIPs do not compare. A name that begins with `open_clip:` is of open_clip (the extra `clip`): a folder or hub id with
open_clip_config.json and open_clip_model.safetensors, or one of open_clip's own names with the tag of its weights, as
`open_clip:ViT-g-14/laion2b_s12b_b42k`, the network of Wen et al. Every other name is of transformers. The whole image is used, squeezed
to the network's side; a prompt beyond its length is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ambient_sd.audit.features import batches, scaled, square
from ambient_sd.audit.networks import pretrained
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.hub_ids import OPEN_CLIP

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CONFIG = "open_clip_config.json"
# open_clip takes these before any pickle that lies beside them.
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")


@dataclass(frozen=True)
class _Clip:
    """Hold one CLIP: the side of its images in pixels, their scale, and what embeds scaled images `(B, 3, H, W)` and texts."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    embed: Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]


class ClipScore:
    """Measure how near an image is to its prompt in CLIP: the cosine of both embeddings.

    Args:
        model: folder or hub id of a transformers `CLIPModel` with its tokenizer, or of open_clip's, after `open_clip:`.

    Raises:
        UserError: it cannot be loaded whole, is another model, or open_clip is not installed.

    Example:
        >>> try:
        ...     ClipScore("no/such/folder")
        ... except UserError as error:
        ...     print(str(error).split(";")[0])
        no/such/folder cannot be loaded
    """

    name = "CLIP score"

    def __init__(self, model: str, batch_size: int = 16, device: str | torch.device = "cpu") -> None:
        self.device, self.batch_size = torch.device(device), batch_size
        opened = _of_open_clip if model.startswith(OPEN_CLIP) else _of_transformers
        self.clip = opened(model.removeprefix(OPEN_CLIP), self.device)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], progress: bool = False) -> Tensor:
        """Return the cosine of each image with its own prompt (cut to the model's length), float64 `(N,)`.

        Raises:
            UserError: another number of prompts than of images.
        """
        if len(images) != len(prompts):
            raise UserError(f"{len(images)} images and {len(prompts)} prompts", rule="one prompt per image")
        mean, std = np.array(self.clip.mean, dtype=np.float32), np.array(self.clip.std, dtype=np.float32)
        rows: list[Tensor] = []
        left = iter(prompts)
        with torch.inference_mode(), tqdm(total=len(images), desc=self.name, unit="img", disable=not progress) as bar:
            for batch in batches(images, self.batch_size):
                x = torch.from_numpy(scaled(square(batch, self.clip.size), mean, std)).to(self.device)
                image, text = self.clip.embed(x, list(islice(left, len(batch))))
                rows.append(torch.nn.functional.cosine_similarity(image.double(), text.double(), dim=1).cpu())
                bar.update(len(batch))
        return torch.cat(rows).clone() if rows else torch.zeros(0, dtype=torch.float64)


def _of_transformers(model: str, device: torch.device) -> _Clip:
    from transformers import AutoTokenizer

    network = pretrained("CLIPModel", model, ("clip",)).to(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise UserError(f"{model} has no tokenizer", rule=one_line(f"{type(error).__name__}: {error}", 200)) from None
    tokens, known = len(tokenizer), network.config.text_config.vocab_size
    # Of a folder without tokenizer files transformers makes one of three tokens, without a word.
    if not 0.9 * known <= tokens <= known:
        raise UserError(f"the tokenizer of {model} does not fit its model",
                        rule=f"it has {tokens} tokens, the model {known} embeddings")  # fmt: skip
    longest = network.config.text_config.max_position_embeddings

    def embed(x: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        out = network(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=x)
        return out.image_embeds, out.text_embeds

    return _Clip(network.config.vision_config.image_size, _MEAN, _STD, embed)


def _of_open_clip(model: str, device: torch.device) -> _Clip:
    try:
        import open_clip
    except Exception as error:  # not installed, or a torchvision of another torch: an error of any kind
        raise UserError(f"{OPEN_CLIP}{model} needs open_clip", rule=one_line(f"{type(error).__name__}: {error}", 160),
                        remedy="pip install 'ambient_sd[clip]', with the torchvision of your torch; or name a CLIP of transformers") from None  # fmt: skip
    folder = _open_clip_folder(model, open_clip)
    try:
        network = open_clip.create_model(
            f"local-dir:{folder}", precision="fp32", device=device, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        network.eval().requires_grad_(False)
        size = network.visual.image_size
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) != 1:
            raise ValueError(f"its images are of {size} pixels; only square ones are served")

        def embed(x: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
            return network.encode_image(x), network.encode_text(tokenizer(texts).to(device))

        clip = _Clip(sides.pop(), network.visual.image_mean, network.visual.image_std, embed)
        # A tokenizer that does not fit its network is found here, not after the images are drawn.
        with torch.inference_mode():
            image, text = embed(torch.zeros(1, 3, clip.size, clip.size, device=device), ["an image"])
        if image.shape != text.shape:
            raise ValueError(f"it embeds an image as {tuple(image.shape)}, a text as {tuple(text.shape)}")
    except Exception as error:  # unreadable files, weights that do not fit the config: a dozen kinds
        raise UserError(f"{OPEN_CLIP}{model} cannot be loaded", rule=one_line(f"{type(error).__name__}: {error}", 200),
                        remedy=f"its {_CONFIG}, weights and tokenizer must belong together") from None  # fmt: skip
    return clip


def _open_clip_folder(model: str, open_clip: Any) -> Path:
    """Return the folder of an open_clip model, downloaded if `model` is no folder: its config, tokenizer and safetensors, no pickle."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        name, _, tag = model.partition("/")
        known: dict[str, Any] = (open_clip.get_pretrained_cfg(name, tag) if tag else None) or {}
        repo = str(known.get("hf_hub") or model).rstrip("/")
        try:
            folder = Path(
                snapshot_download(repo, allow_patterns=[_CONFIG, *_WEIGHTS, "*token*", "vocab*", "merges.txt"])
            )
        except Exception as error:  # no such id, no connection: a dozen kinds
            raise UserError(f"{OPEN_CLIP}{model} cannot be loaded", rule=one_line(f"{type(error).__name__}: {error}", 200),
                            remedy="give a folder, a hub id, or NAME/TAG of open_clip.list_pretrained()") from None  # fmt: skip
    if not (folder / _CONFIG).is_file() or not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(f"{OPEN_CLIP}{model} is not whole", rule=f"it must hold {_CONFIG} and {_WEIGHTS[0]}",
                        remedy="weights in another file: safetensors.torch.save_file(model.state_dict(), ...) writes them")  # fmt: skip
    return folder
