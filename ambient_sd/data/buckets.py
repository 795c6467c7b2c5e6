"""Aspect-ratio buckets: images keep their shape, a batch has one.

    bucket of an image = the one whose log(w / h) is nearest to that of the image
    bucket of step t    = the one that holds frac(u + t phi), phi = (sqrt(5) - 1) / 2, buckets laid on [0, 1) by their share

The golden-ratio sequence takes every bucket as often as its images deserve, to within a step or so at any time, and is a
function of t alone: no queue whose state a checkpoint would have to hold. All positions of an optimizer step share a bucket, so
any number of processes and accumulation steps trains the same samples, and no process waits for one with larger images.

Within a bucket the images come in one permutation after the other. An image is seen as often as any other in the long run,
but not once per pass over all of them: that would need steps with two shapes. Near-duplicates take the bucket of their
group's first image: two shapes would be two noises, which average out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ambient_sd.data.stream import SampleStream
from ambient_sd.utils.errors import UserError

Size = tuple[int, int]  # width, height in pixels
_GOLDEN = (math.sqrt(5) - 1) / 2
_WIDEST = 2.0


def make_buckets(resolution: int, step: int) -> tuple[Size, ...]:
    """Return the buckets of a resolution: sides in multiples of `step`, area at most resolution^2, 1:2 to 2:1.

    Args:
        resolution: side of the square bucket, pixels; a multiple of `step`.
        step: what sides are multiples of, pixels.

    Example:
        >>> make_buckets(128, 64)
        ((128, 128),)
    """
    found = set()
    for width in range(step, int(resolution * _WIDEST) + step, step):
        height = min(resolution**2 // width, int(resolution * _WIDEST)) // step * step
        if height and max(width, height) <= _WIDEST * min(width, height):
            found |= {(width, height), (height, width)}
    # Of two buckets of one width the lower one only wastes pixels.
    largest = {size for size in found if not any(o != size and o[0] >= size[0] and o[1] >= size[1] for o in found)}
    return tuple(sorted(largest | {(resolution, resolution)}))


def read_buckets(text: str, resolution: int, step: int) -> tuple[Size, ...]:
    """Return the buckets meant by `--aspect_ratio_buckets`: `auto`, or height,width pairs with semicolons between.

    Raises:
        UserError: a pair is no pair, or its sides are no multiples of `step`.

    Example:
        >>> read_buckets("512,768;640,640", 640, 64)  # height,width becomes (width, height)
        ((640, 640), (768, 512))
    """
    if text.strip() == "auto":
        if resolution % step:
            raise UserError(f"resolution is {resolution}", rule=f"with aspect_ratio_buckets it must be a multiple of {step}",
                            remedy=f"use {max(step, round(resolution / step) * step)}")  # fmt: skip
        return make_buckets(resolution, step)
    sizes = set()
    for pair in text.split(";"):
        sides = [side.strip() for side in pair.split(",")]
        if len(sides) != 2 or not all(side.isdecimal() and len(side) < 6 for side in sides):
            raise UserError(f"aspect_ratio_buckets holds {pair.strip()[:40]!r}", rule="it is `auto`, or height,width pairs",
                            remedy="write them as 512,768;640,640;768,512")  # fmt: skip
        height, width = map(int, sides)
        if not height or not width or height % step or width % step:
            raise UserError(f"aspect_ratio_buckets holds {height},{width}",
                            rule=f"sides are multiples of {step} pixels for this model", remedy="round them")  # fmt: skip
        sizes.add((width, height))
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose aspect ratio is nearest to an image's; of equals the larger.

    Example:
        >>> nearest_bucket((1920, 1080), [(512, 512), (704, 384)])
        (704, 384)
    """
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - shape), 9), -b[0] * b[1], b))


def assign(sizes: Sequence[Size], noise_keys: Sequence[str], buckets: Sequence[Size]) -> dict[str, Size]:
    """Return the bucket of every group of near-duplicates: that of its first image.

    Example:
        >>> assign([(1920, 1080), (500, 500)], ["a", "b"], [(512, 512), (704, 384)])
        {'a': (704, 384), 'b': (512, 512)}
    """
    found: dict[str, Size] = {}
    for size, key in zip(sizes, noise_keys, strict=True):
        found.setdefault(key, nearest_bucket(size, buckets))
    return found


class BucketStream(SampleStream):
    """Order the samples of a run so that the positions [t G, (t + 1) G) of every step t share a bucket.

    Args:
        bucket_of: the bucket of each image.
        global_batch: G, positions per optimizer step over all processes.
        seed: seed of the run.
        repeats: how often an epoch holds each image; once if not given.

    Example:
        >>> stream = BucketStream([(64, 64)] * 3 + [(128, 64)] * 3, global_batch=2, seed=0)
        >>> [stream.image(position) // 3 for position in range(8)]  # both images of a step have one bucket
        [0, 0, 1, 1, 0, 0, 1, 1]
    """

    def __init__(self, bucket_of: Sequence[Size], global_batch: int, seed: int, repeats: Sequence[int] = ()) -> None:
        super().__init__(len(bucket_of), seed, repeats)
        self.global_batch = global_batch
        members: dict[Size, list[int]] = {}
        for index in self.entries:
            members.setdefault(bucket_of[index], []).append(index)
        self._members = [members[bucket] for bucket in sorted(members)]
        self._edges = np.cumsum([len(rows) for rows in self._members])[:-1] / self.count
        self._start = torch.rand((), generator=self.generator("buckets", 0), dtype=torch.float64).item()
        self._buckets = np.empty(0, dtype=np.int64)
        self._earlier = np.empty(0, dtype=np.int64)
        self._orders: dict[tuple[int, int], torch.Tensor] = {}

    def image(self, position: int) -> int:
        """Return the index of the image at a position."""
        step, place = divmod(position, self.global_batch)
        if step >= len(self._buckets):
            self._plan(max(1024, 2 * (step + 1)))
        bucket = int(self._buckets[step])
        rows = self._members[bucket]
        turn, offset = divmod(int(self._earlier[step]) * self.global_batch + place, len(rows))
        if (bucket, turn) not in self._orders:
            if len(self._orders) > 4 * len(self._members) + self.global_batch:
                self._orders.clear()
            generator = self.generator(f"order of bucket {bucket}", turn)
            self._orders[bucket, turn] = torch.randperm(len(rows), generator=generator)
        return rows[int(self._orders[bucket, turn][offset])]

    def _plan(self, steps: int) -> None:
        """Compute the bucket of each step, and how many steps before it had the same."""
        # The product loses digits as steps grow: at 10^9 seven are left, far more than buckets need.
        points = (self._start + np.arange(steps, dtype=np.float64) * _GOLDEN) % 1.0
        self._buckets = np.searchsorted(self._edges, points, side="right")
        self._earlier = np.empty(steps, dtype=np.int64)
        for bucket in range(len(self._members)):
            here = np.flatnonzero(self._buckets == bucket)
            self._earlier[here] = np.arange(len(here))
