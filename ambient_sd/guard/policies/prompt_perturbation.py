"""Somepalli et al.'s perturbations of the prompt at sampling: the baselines that every later mitigation is compared with.

    RT   insert random tokens of the tokenizer's vocabulary between the words
    CWR  insert words of the prompt again
    RNA  insert random numbers, uniform in 0..99999
    GNI  e + std z, z ~ N(0, 1): Gaussian noise on the embeddings of both halves, std 0.1

(Somepalli, Singla, Goldblum, Geiping, Goldstein, *Understanding and mitigating copying in diffusion models*, NeurIPS 2023, the
mitigations at inference.) Each insertion stands before, between or after the words present by then, all places alike.
The published code inserts a fixed number, 2 or 4; here 2 to 4, drawn per image, unless told otherwise.

Where ours differs: random numbers are functions of (seed, method, prompt, which image of its prompt this one is), so an image gets
the same perturbation whatever else is sampled with it; images of one prompt are counted within a call unless the caller counts
them (`MemorizationGuard.image_indices`); without a prompt's text (embeddings
given) GNI takes the image's place in the batch. White space between words becomes one space, which CLIP's tokenizer does anyway. A
prompt without words has none to repeat: CWR leaves it alone. As published, words inserted beyond the text encoder's length
are cut off with the rest. GNI leaves SDXL's pooled embedding alone.

RT: a policy sees no tokenizer, only texts being encoded. Without one it inserts random strings of 2 to 5 small letters, which
any tokenizer turns into one to a few of its tokens: random, but not uniform over the vocabulary. With `tokenizer=pipe.tokenizer` it
draws as published, a token id uniform over the vocabulary, decoded to text; ids that decode to no printable text
(special tokens, parts of characters) pass the draw on to the next id.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ambient_sd.guard.policies._common import number, whole, with_rows
from ambient_sd.guard.policies.base import Change, Policy, SamplingStart
from ambient_sd.utils.errors import UserError

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class PromptPerturbation(Policy, abc.ABC):
    """Base of RT, CWR and RNA: insert words at random places of each active image's prompt, and encode it anew.

    Args:
        insertions: how many words to insert: one number >= 1, or (least, most), drawn uniformly per image.
        seed: whole number from which all random numbers follow.

    Raises:
        UserError: an argument is out of range; when sampling, the pipeline was called with embeddings.

    Source: Somepalli et al., NeurIPS 2023.

    Example:
        >>> class Again(PromptPerturbation):
        ...     def word(self, words, generator):
        ...         return words[0]
        >>> Again(insertions=1).perturb("cat").split()
        ['cat', 'cat']
    """

    rewrites_prompt = True  # `Compose`: what earlier policies made of the embeddings would be lost

    def __init__(self, insertions: int | tuple[int, int] = (2, 4), seed: int = 0) -> None:
        pair = insertions if isinstance(insertions, (tuple, list)) else (insertions, insertions)
        if len(pair) != 2:
            raise UserError(f"insertions {insertions!r}", rule="it must be one whole number, or (least, most)")
        self.least = whole("insertions", pair[0], least=1)
        self.most = whole("insertions", pair[1], least=self.least)
        self.seed = whole("seed", seed)

    @abc.abstractmethod
    def word(self, words: list[str], generator: torch.Generator) -> str:
        """Return one word to insert into a prompt of `words`, drawn from `generator`."""

    def perturb(self, prompt: str, place: int = 0) -> str:
        """Return the perturbed prompt of the `place`-th image (from 0) that has this prompt."""
        generator = _generator(self.seed, type(self).__name__, prompt, place)
        words = prompt.split()
        result = list(words)
        for _ in range(self.least + _below(self.most - self.least + 1, generator)):
            word = self.word(words, generator)
            result.insert(_below(len(result) + 1, generator), word)
        return " ".join(result)

    def begin(self, start: SamplingStart) -> Change | None:
        """Return the embeddings of the perturbed prompts of all active images."""
        if start.prompts is None:
            raise UserError(
                f"{type(self).__name__} needs the prompt's text",
                rule="the pipeline was called with embeddings, which have no words",
                remedy="call it with prompt=, or use policies.GaussianEmbeddingNoise",
            )
        places = start.image_indices or _places(start.prompts)
        texts = {i: self.perturb(start.prompts[i], places[i]) for i, active in enumerate(start.active) if active}
        rows = [i for i, text in texts.items() if text != start.prompts[i]]
        if not rows:
            return None
        new = with_rows(start.halves.cond, rows, start.encode([texts[i] for i in rows]))
        return Change(
            [i in rows for i in range(len(start.active))], embeds=new.embeds, pooled=new.pooled, mask=new.mask
        )


class RandomTokens(PromptPerturbation):
    """RT: insert random tokens.

    Args:
        insertions: how many tokens to insert: one number >= 1, or (least, most), drawn uniformly per image.
        seed: whole number from which all random numbers follow.
        tokenizer: `pipe.tokenizer`, whose vocabulary is drawn from as published; None draws strings of small letters.

    Raises:
        UserError: an argument is out of range; when sampling, the pipeline was called with embeddings.

    Source: Somepalli et al., NeurIPS 2023.

    Example:
        >>> len(RandomTokens(insertions=2).perturb("a red apple").split())
        5
    """

    def __init__(self, insertions: int | tuple[int, int] = (2, 4), seed: int = 0, tokenizer: Any = None) -> None:
        super().__init__(insertions, seed)
        if tokenizer is not None and not (hasattr(tokenizer, "decode") and hasattr(tokenizer, "__len__")):
            raise UserError(
                f"tokenizer is a {type(tokenizer).__name__}", rule="it must be a tokenizer of transformers, or None"
            )
        self.tokenizer = tokenizer

    def word(self, words: list[str], generator: torch.Generator) -> str:
        if self.tokenizer is None:
            return "".join(_LETTERS[_below(26, generator)] for _ in range(2 + _below(4, generator)))
        size = len(self.tokenizer)
        first = _below(size, generator)
        for token in range(first, first + size):
            text = str(self.tokenizer.decode([token % size], skip_special_tokens=True)).strip()
            if text and text.isprintable() and "\ufffd" not in text:
                return text
        raise UserError("the tokenizer decodes no token to text", rule="random tokens are inserted as text")


class CaptionWordRepetition(PromptPerturbation):
    """CWR: insert words of the prompt again; arguments and errors as in `PromptPerturbation`.

    Example:
        >>> set(CaptionWordRepetition().perturb("a red apple").split()) == {"a", "red", "apple"}
        True
    """

    def perturb(self, prompt: str, place: int = 0) -> str:
        return super().perturb(prompt, place) if prompt.split() else prompt

    def word(self, words: list[str], generator: torch.Generator) -> str:
        return words[_below(len(words), generator)]


class RandomNumbers(PromptPerturbation):
    """RNA: insert random numbers, uniform in 0..99999; arguments and errors as in `PromptPerturbation`.

    Example:
        >>> sum(word.isdigit() for word in RandomNumbers(insertions=3).perturb("a red apple").split())
        3
    """

    def word(self, words: list[str], generator: torch.Generator) -> str:
        return str(_below(100_000, generator))


class GaussianEmbeddingNoise(Policy):
    """GNI: add Gaussian noise to every position of the embeddings, `e + std z`; the noise serves all steps.

    The published code adds it to all that its pipeline encodes: the conditional and the unconditional half, each noise its own.

    Args:
        std: the noise's standard deviation, > 0, in the units of the text encoder's output. Default as published.
        seed: whole number from which all random numbers follow.
        halves: noise on "both" halves, as published, or on the conditional one alone, "cond".

    Raises:
        UserError: an argument is out of range.

    Source: Somepalli et al., NeurIPS 2023.

    Example:
        >>> GaussianEmbeddingNoise().std
        0.1
    """

    def __init__(self, std: float = 0.1, seed: int = 0, halves: Literal["both", "cond"] = "both") -> None:
        self.std = number("std", std, above=0)
        self.seed = whole("seed", seed)
        if halves not in ("both", "cond"):
            raise UserError(f"halves {halves!r}", rule='it must be "both" or "cond"')
        self.halves = halves

    def begin(self, start: SamplingStart) -> Change:
        """Return the noisy embeddings of all active images."""
        prompts = start.prompts if start.prompts is not None else [""] * len(start.active)
        places, purpose = start.image_indices or _places(prompts), type(self).__name__
        uncond = None
        if self.halves == "both":
            uncond = self._noisy(start.halves.uncond.embeds, prompts, places, f"{purpose} unconditional")
        embeds = self._noisy(start.halves.cond.embeds, prompts, places, purpose)
        return Change(list(start.active), embeds=embeds, uncond_embeds=uncond)

    def _noisy(self, own: torch.Tensor, prompts: list[str], places: Sequence[int], purpose: str) -> torch.Tensor:
        # On the CPU and in float32, so that one seed is one noise on every device and in every precision.
        noise = [
            torch.randn(own.shape[1:], generator=_generator(self.seed, purpose, prompt, place))
            for prompt, place in zip(prompts, places, strict=True)
        ]
        wide = torch.promote_types(own.dtype, torch.float32)
        return (own.to(wide) + self.std * torch.stack(noise).to(own.device, wide)).to(own.dtype)


def _places(prompts: list[str]) -> list[int]:
    """Return for each image how many before it have the same prompt."""
    seen: dict[str, int] = {}
    places = []
    for prompt in prompts:
        places.append(seen.get(prompt, 0))
        seen[prompt] = places[-1] + 1
    return places


def _generator(seed: int, purpose: str, prompt: str, place: int) -> torch.Generator:
    """Return a CPU generator that is a function of all four."""
    text = f"ambient_sd guard 1\n{seed}\n{purpose}\n{place}\n{prompt}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))
