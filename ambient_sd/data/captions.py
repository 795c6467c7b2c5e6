"""Captions as texts: those that text encoders cut, new ones of the same words, and those without a word that a model does not know.

A text with more tokens than an encoder has positions (77 with start and end for CLIP) is cut, silently by diffusers and transformers. SDXL has
two tokenizers: a text is cut where either cuts it. Where another encoder reads on (T5 of Stable Diffusion 3 and FLUX.1), only what that one
does not read is cut.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ambient_sd.utils.errors import one_line

CLIP_TOKENS = 75  # of a text, beside its start and end
_BATCH = 1000
_SHARED = 0.9  # of the captions have a trigger word
_RARE = 0.1  # of a vocabulary; "sks" is within the last 3 % of CLIP's
# The pieces that CLIP's tokenizer splits a text into before anything else; each is one token or more.
_PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)(?=\W|$)|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


@dataclass(frozen=True)
class Cut:
    """Hold what one text loses.

    Attributes:
        index: its place among the texts.
        tokens: how many it has; without a tokenizer at least so many.
        limit: how many are read.
        lost: the end that is not read, as the tokenizer writes it (in small letters).

    Example:
        >>> Cut(index=0, tokens=77, limit=75, lost="the end").lost
        'the end'
    """

    index: int
    tokens: int
    limit: int
    lost: str


def find_cut(texts: Sequence[str], tokenizers: Sequence[Any], limits: Sequence[int] | None = None) -> list[Cut]:
    """Return the texts that at least one of the tokenizers cuts, in their order; of two losses the longer one.

    Args:
        texts: captions or prompts.
        tokenizers: of the model's text encoders, with `model_max_length`.
        limits: how many tokens of a text each of them reads at most (`families.reading`); None: as many as it takes.

    Example:
        >>> find_cut(["a cat"], [])
        []
    """
    distinct = list(dict.fromkeys(texts))
    found: dict[str, tuple[int, int, str]] = {}
    limits = limits or [t.model_max_length - t.num_special_tokens_to_add() for t in tokenizers]
    for tokenizer, limit in zip(tokenizers, limits, strict=True):
        for text, ids in _tokens(distinct, tokenizer):
            if len(ids) > limit and len(ids) - limit > found.get(text, (0, 0, ""))[0] - found.get(text, (0, 0, ""))[1]:
                found[text] = len(ids), limit, str(tokenizer.decode(ids[limit:])).strip()
    return [Cut(i, *found[text]) for i, text in enumerate(texts) if text in found]


def as_read(texts: Sequence[str], tokenizers: Sequence[Any], limits: Sequence[int] | None = None) -> list[str]:
    """Return for each text the first one of which the tokenizers read the same: texts that differ behind what is read are one to the model.

    Args:
        texts, tokenizers, limits: as of `find_cut`.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> as_read(["a cat on a mat", "a cat on a rug", "a dog"], [tiny_pipeline().tokenizer], [3])
        ['a cat on a mat', 'a cat on a mat', 'a dog']
    """
    limits = limits or [t.model_max_length - t.num_special_tokens_to_add() for t in tokenizers]
    kept: dict[str, list[tuple[int, ...]]] = {text: [] for text in texts}
    cut = False
    for tokenizer, limit in zip(tokenizers, limits, strict=True):
        for text, ids in _tokens(list(kept), tokenizer):
            kept[text].append(tuple(ids[:limit]))
            cut |= len(ids) > limit
    if not cut:
        return list(texts)
    first: dict[tuple[tuple[int, ...], ...], str] = {}
    of = {text: first.setdefault(tuple(ids), text) for text, ids in kept.items()}
    return [of[text] for text in texts]


def _tokens(texts: Sequence[str], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    """Yield each text with all of its tokens, neither cut nor framed by start and end."""
    for i in range(0, len(texts), _BATCH):
        batch = texts[i : i + _BATCH]
        # verbose: the tokenizer's own warning says neither which text nor what is lost.
        rows = tokenizer(batch, truncation=False, padding=False, add_special_tokens=False, verbose=False).input_ids
        yield from zip(batch, rows, strict=True)


def surely_cut(texts: Sequence[str], limit: int = CLIP_TOKENS) -> list[Cut]:
    """Return the texts that every CLIP tokenizer cuts: a lower bound, for which none is needed.

    Example:
        >>> [cut.lost for cut in surely_cut(["a red apple on a table"], limit=4)]
        ['a table']
    """
    found = []
    for i, text in enumerate(texts):
        pieces = list(_PIECE.finditer(text))
        if len(pieces) > limit:
            found.append(Cut(i, len(pieces), limit, text[pieces[limit].start() :]))
    return found


def in_one_line(cuts: Sequence[Cut], total: int, what: str, first: str) -> str:
    """Say in one line how many texts are cut, and what the first one loses.

    Args:
        cuts: what was found, at least one.
        total: number of texts.
        what: "captions" or "prompts".
        first: name of the first one.

    Example:
        >>> in_one_line([Cut(0, 77, 75, "a table")], total=9, what="captions", first="a.png")
        '1 of 9 captions are longer than the text encoder reads and are cut; the first, a.png, has 77 tokens of 75, lost: a table'
    """
    one = cuts[0]
    return one_line(
        f"{len(cuts)} of {total} {what} are longer than the text encoder reads and are cut; the first, {one_line(first, 80)}, has "
        f"{one.tokens} tokens of {one.limit}, lost: {one_line(one.lost, 160)}"
    )


def without(caption: str, phrases: Sequence[str]) -> str:
    """Return a caption without words or phrases, whole and in any case, and without the commas and spaces that they leave behind.

    Example:
        >>> without("sks, a cat", ["sks"]), without("a photo of SKS dog", ["sks"]), without("a risksome cat", ["sks"])
        ('a cat', 'a photo of dog', 'a risksome cat')
        >>> without("a dog in sks style", ["sks", "sks style"])
        'a dog in'
    """
    for phrase in sorted(phrases, key=len, reverse=True):  # one phrase may be a part of another
        caption = _whole(phrase).sub(" ", caption)
    return re.sub(r"(?: ?, ?)+", ", ", re.sub(r"\s+", " ", caption)).strip(", ")


def missing_from(captions: Sequence[str], phrases: Sequence[str]) -> list[str]:
    """Return the phrases that `without` finds in none of the captions.

    Example:
        >>> missing_from(["sks, a cat"], ["SKS", "ohwx"])
        ['ohwx']
    """
    return [phrase for phrase in phrases if not any(_whole(phrase).search(caption) for caption in captions)]


def _whole(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", re.IGNORECASE)


def perhaps_unknown(captions: Sequence[str], tokenizer: Any) -> list[str]:
    """Return the words of nine in ten captions or more that their tokenizer writes in several tokens, or in one of its rarest.

    That is how a trigger word looks: made up, and in every caption. Tokens of byte pair encoding are numbered by how often their text was
    seen; the rarest are the last tenth.

    Example:
        >>> class Letters:
        ...     def __len__(self): return 1000
        ...     def __call__(self, text, add_special_tokens): return type("Ids", (), {"input_ids": [1] * (3 if text == " ohwx" else 1)})
        >>> perhaps_unknown(["ohwx cat", "an OHWX dog", "ohwx bird"], Letters())
        ['ohwx']
    """
    seen = Counter(word for text in captions for word in set(re.findall(r"\w*[^\W\d_]\w*", text.lower())))
    found = []
    for word, times in seen.items():
        if times >= _SHARED * len(captions) and len(word) > 2:
            # With its space, as within a text: many tokenizers tell the two apart.
            ids = tokenizer(f" {word}", add_special_tokens=False).input_ids
            if len(ids) > 1 or max(ids, default=0) > (1 - _RARE) * len(tokenizer):
                found.append(word)
    return sorted(found)


def compose(captions: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Return captions that are not among the given ones, of their words: each is one of them with the rarest word of another in place of its own.

    Quality measured on trained captions rewards copies; on these nothing can be copied whole. Fewer than `count` come back where the captions
    do not give as many, none where all of them are equal.

    Args:
        captions: of the training images.
        count: how many at most.
        seed: of the choice.

    Example:
        >>> compose(["a red apple, flat", "a blue house, flat", "a green tree, flat"], count=2)
        ['a blue tree, flat', 'a red house, flat']
    """
    texts = list(dict.fromkeys(text for text in captions if text.strip()))
    words = {text: re.findall(r"\w+", text) for text in texts}
    seen = Counter(word.lower() for text in texts for word in set(words[text]))
    # Of equally rare words the last: in English the thing itself comes after what describes it.
    rarest = {text: min(reversed(found), key=lambda w: seen[w.lower()]) for text, found in words.items() if found}
    found, g, texts = dict[str, None](), random.Random(seed), list(rarest)
    for _ in range(20 * count if len(texts) > 1 else 0):
        frame, other = g.sample(texts, 2)
        new = rarest[other].join(re.split(rf"\b{re.escape(rarest[frame])}\b", frame))
        if new not in words and len(found) < count:
            found[new] = None
    return list(found)
