"""Which words an image is trained with: the caption mitigations of Somepalli et al.

    mc    one of the row's captions, chosen anew at each visit (with probability 1 - p its first one)
    gn    embedding + std z, z ~ N(0, I)                                       published: std 0.1, every sample
    rc    with probability p the caption is replaced by 4 random tokens        published: p = 0.1
    rt    with probability p two random tokens are put in at random places     published: p = 0.1
    cwr   with probability p two of its words are repeated at random places    published: p = 0.1

Somepalli, Singla, Goldblum, Geiping, Goldstein, "Understanding and Mitigating Copying in Diffusion Models" (NeurIPS 2023),
mitigation in training. The paper itself was out of reach; counts and probabilities are those of the authors' released
training code. It describes rt as replacing or adding words; the release adds, and so do we. Differences:

- Tokens are chosen from the vocabulary without its special ones, and go through text: what the tokenizer makes of the text of
  four tokens may be three or five. Of SDXL both encoders read that text.
- A caption that caption dropout took away stays empty, without noise: it is the unconditional branch. The release has no dropout.
- Of SDXL gn moves the pooled embedding too.

Every random choice is a function of (seed, place in the run) with a purpose of its own: it changes no other random number.

A changed caption of rc, rt and cwr is a new text nearly each time. It is encoded when it comes up, on the device of training,
also beside held or cached embeddings: the text encoder stays in memory, and is asked for the share p of the samples only.
mc's captions are held and cached like any others, and gn's noise comes on top of what is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import SampleStream
from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

LIVE = ("rc", "rt", "cwr")  # their texts cannot all be known beforehand
_RANDOM_TOKENS = 4
_PUT_IN = 2


class CaptionAugmentation:
    """Give the caption of each sample, and its embedding's noise.

    Args:
        kind: mc, gn, rc, rt, cwr, or None: captions as they are.
        p: share of samples whose caption is changed, in [0, 1].
        noise_std: of gn.
        images: rows with captions.
        stream: the run's samples.
        tokenizer: a CLIP tokenizer; the first of SDXL's.

    Example:
        >>> images = ImageDataset([b""], ["a red cat"], ["a.png"], "my-images")
        >>> stream = SampleStream(count=1, seed=0)
        >>> repeated = CaptionAugmentation("cwr", 1.0, 0.0, images=images, stream=stream, tokenizer=None)
        >>> len(repeated.caption(0).split()), set(repeated.caption(0).split()) == {"a", "red", "cat"}
        (5, True)
    """

    def __init__(
        self,
        kind: str | None,
        p: float,
        noise_std: float,
        *,
        images: ImageDataset,
        stream: SampleStream,
        tokenizer: Any,
    ) -> None:
        self.kind, self.p, self.noise_std = kind, p, noise_std
        self.images, self.stream, self.tokenizer = images, stream, tokenizer
        self._tokens: list[int] = []
        if kind in ("rc", "rt"):
            # Sorted: a set of a dictionary's values has an order of its own.
            self._tokens = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))

    def caption(self, position: int) -> str:
        """Return the caption of the sample at a position."""
        row = self.stream.image(position)
        caption = self.images.captions[row]
        if self.kind in (None, "gn"):
            return caption
        g = self.stream.generator("caption_mitigation", position)
        if not _happens(self.p, g):
            return caption
        if self.kind == "mc":
            several = self.images.captions_of(row)
            return several[_draw(len(several), g)]
        if self.kind == "rc":
            return self._random_text(_RANDOM_TOKENS, g)
        words = caption.split()
        if self.kind == "cwr" and not words:
            return caption
        changed = list(words)
        for _ in range(_PUT_IN):
            word = words[_draw(len(words), g)] if self.kind == "cwr" else self._random_text(1, g)
            changed.insert(_draw(len(changed) + 1, g), word)
        return " ".join(changed)

    def embeddings(
        self, found: dict[str, torch.Tensor], captions: Sequence[str], positions: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Return the embeddings of a batch with gn's noise on them; of another kind `found` itself.

        Args:
            found: what a `CaptionEncoder` returns for `captions`: (B, ...) each.
            captions: of the B samples; an empty one gets no noise.
            positions: their places in the run.
        """
        if self.kind != "gn":
            return found
        noisy = {name: value.clone() for name, value in found.items()}
        for i, (caption, position) in enumerate(zip(captions, positions, strict=True)):
            g = self.stream.generator("caption_mitigation", position)
            if caption and _happens(self.p, g):
                for name, value in noisy.items():
                    if not value.is_floating_point():
                        continue
                    # What is padded is no word, and would make the draw depend on the batch.
                    own = (
                        value[i] if name != "hidden" or "mask" not in found else value[i, : int(found["mask"][i].sum())]
                    )
                    own += send(self.noise_std * torch.randn(own.shape, generator=g), own.device)
        return noisy

    def _random_text(self, count: int, g: torch.Generator) -> str:
        ids = [self._tokens[_draw(len(self._tokens), g)] for _ in range(count)]
        return str(self.tokenizer.decode(ids)).strip()


def check(config: TrainConfig, images: ImageDataset) -> None:
    """Check that the images have what the chosen mitigation needs.

    Raises:
        UserError: mc, and no row has more than one caption.

    Example:
        >>> images = ImageDataset([b""], ["a cat"], ["a.png"], "my-images", more_captions=[["a red cat"]])
        >>> check(TrainConfig("base-model", train_data_dir="my-images", caption_mitigation="mc"), images)
    """
    if config.caption_mitigation == "mc" and len(images.all_captions) == len(images):
        raise UserError(
            f"caption_mitigation is mc and no row of {images.source} has more than one caption",
            rule="it draws one of several",
            remedy=f"put lists of texts into column {config.caption_column}, or choose another one",
        )


def _happens(p: float, g: torch.Generator) -> bool:
    return float(torch.rand((), generator=g)) < p


def _draw(count: int, g: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=g))
