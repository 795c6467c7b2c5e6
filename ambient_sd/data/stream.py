"""Which image is trained on when, and with which random numbers: functions of a seed and a position alone.

A run is an endless sequence of samples. Position p lies in epoch `p // n` and takes the entry `p % n` of that epoch's
permutation of the n images (of each, as often as it is repeated). Timestep, fresh noise, caption dropout and view of a sample come from a generator
seeded by (seed, purpose, p). So no generator has a state to save: a run that resumes, or uses another number of
processes or accumulation steps, sees the same samples with the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch


def keyed_seed(*parts: object) -> int:
    """Return the first 8 bytes of the SHA-256 of `parts` as a seed.

    Example:
        >>> keyed_seed(0, "noise", 7) == keyed_seed(0, "noise", 7) != keyed_seed(0, "noise", 8)
        True
    """
    text = "\n".join(["ambient_sd stream 1", *map(str, parts)])
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def keyed_generator(*parts: object) -> torch.Generator:
    """Return a CPU generator that begins with the `keyed_seed` of `parts`.

    Example:
        >>> torch.rand(1, generator=keyed_generator("a")) == torch.rand(1, generator=keyed_generator("a"))
        tensor([True])
    """
    return torch.Generator().manual_seed(keyed_seed(*parts))


def drawn(count: int, wanted: int, seed: int, purpose: str) -> list[int]:
    """Return `wanted` of the places 0 to count - 1 in their order, without replacement; all where there are no more.

    Example:
        >>> len(drawn(10, 3, seed=0, purpose="prompts")), drawn(2, 3, seed=0, purpose="prompts")
        (3, [0, 1])
    """
    return sorted(torch.randperm(count, generator=keyed_generator(seed, purpose, 0))[:wanted].tolist())


class SampleStream:
    """Order the samples of a run.

    Args:
        count: number n of images.
        seed: seed of the run.
        repeats: how often an epoch holds each image; once if not given.

    Attributes:
        count: entries of an epoch.

    Example:
        >>> stream = SampleStream(count=3, seed=0)
        >>> sorted(stream.image(position) for position in range(3))  # each once an epoch
        [0, 1, 2]
    """

    def __init__(self, count: int, seed: int, repeats: Sequence[int] = ()) -> None:
        self.entries: Sequence[int] = range(count)
        if any(n != 1 for n in repeats):
            self.entries = [i for i, n in enumerate(repeats) for _ in range(n)]
        self.count, self.seed = len(self.entries), seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def image(self, position: int) -> int:
        """Return the index of the image at a position."""
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            self._order = torch.randperm(self.count, generator=self.generator("order", epoch))
            self._epoch = epoch
        return self.entries[int(self._order[offset])]

    def generator(self, purpose: str, position: int) -> torch.Generator:
        """Return the generator for one purpose at one position, from its start."""
        return keyed_generator(self.seed, purpose, position)


def process_batches(
    first_step: int, last_step: int, *, batch_size: int, accumulation: int, rank: int, processes: int
) -> Iterator[list[int]]:
    """Yield the positions of each forward pass of one process, from optimizer step `first_step` up to `last_step`.

    Optimizer step k takes the positions `[k G, (k + 1) G)`, `G = batch_size * processes * accumulation`, each once:
    every step is full, across the ends of epochs too, so ranks never disagree about how many batches there are.

    Example:
        >>> list(process_batches(0, 2, batch_size=2, accumulation=1, rank=1, processes=2))
        [[2, 3], [6, 7]]
    """
    for step in range(first_step, last_step):
        for part in range(accumulation):
            start = ((step * accumulation + part) * processes + rank) * batch_size
            yield list(range(start, start + batch_size))
