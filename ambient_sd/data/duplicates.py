"""Groups of near-duplicate images, so that all copies of an image can share one noise.

m copies of an image under m noises average to noise sigma_n / sqrt(m) (Shah et al., ICML 2025, Lemma 4.2): a copy that
was re-encoded, resized, brightened a little or mirrored has another content key, and would be a second draw.

1. Each image becomes a 16 x 16 RGB thumbnail. Equal content keys are one image from here on.
2. Perceptual descriptor: the 20 lowest DCT-II coefficients of the thumbnail's luminance except the mean, divided by the
   length of all of them. Brightness and contrast drop out, re-encoding and resizing touch high frequencies first, and
   mirroring changes the sign of the odd horizontal frequencies. It is the perceptual hash "pHash" before its rounding to
   signs: an image that is symmetric has coefficients near zero, whose signs re-encoding draws anew.
3. A k-d tree gives the pairs with descriptors nearer than `RADIUS`, of the images and of their mirror images.
4. A pair counts if the thumbnails agree in colour up to a small gain and offset, on average and in the worst spot: a
   clock differs from another clock in its hands only.
5. Connected components, by a minimum spanning forest. The smallest content key of a group names it, so that order does not matter.

Cost for n images: n decodings, 0.75 KiB an image in an unnamed temporary file, 1 KiB an image in memory, and
O(n log n) in the tree, all in compiled code; images with more than `_MOST_NEIGHBOURS` look-alikes are linked to that
many of them only.

It does not find crops, rotations, vertical flips, recoloured copies, or images with added borders or text.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import scipy.fft
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree

from ambient_sd.data.noise import image_noise

Array = np.ndarray

SIDE = 16
RADIUS = 0.2  # of descriptors; those of unrelated photographs lie about 1 apart
# Error of a pair relative to its own contrast: root mean square over the thumbnail, over its worst spot of 2 x 2 pixels,
# and mean of its worst spot. Of 1,010 distinct emoji of 64 px (many faces differ in the mouth only) two pairs pass; of
# their copies in JPEG of quality 60, 97 of 100.
MEAN_ERROR, SPOT_ERROR, SHIFT_ERROR = 0.15, 0.5, 0.3
ASPECT = 1.06  # ratio of the aspect ratios of a pair
_FLOOR = 1.5  # of 255: what rounding and encoding leave in an image without contrast
_GAIN, _OFFSET = 1.25, 32.0
_MOST_NEIGHBOURS = 1024
_FREQUENCIES = [(v, u) for v in range(6) for u in range(6) if 0 < u + v <= 5]
_BLOCK = 4096


@dataclass(frozen=True)
class Group:
    """Hold a group of near-duplicates.

    Attributes:
        rows: indices of its images, ascending, two or more.
        mirrored: per row whether the image is the mirror image of the group's first by key.
        key: the smallest content key among them.

    Example:
        >>> Group(rows=(0, 4), mirrored=(False, True), key="a").rows
        (0, 4)
    """

    rows: tuple[int, ...]
    mirrored: tuple[bool, ...]
    key: str


class Thumbnails:
    """Collect the thumbnails and sizes of images, in an unnamed file that the system may keep in memory.

    Example:
        >>> thumbnails = Thumbnails()
        >>> thumbnails.add(Image.new("RGB", (64, 32), "red"))
        >>> thumbnails.array().shape, thumbnails.aspects
        ((1, 16, 16, 3), [2.0])
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
        self.sizes: list[tuple[int, int]] = []

    def add(self, image: Image.Image) -> None:
        """Append one RGB image."""
        # A mean over areas: symmetric, hence exact for mirror images, and about the same whatever the image's size.
        self._file.write(image.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes())
        self.sizes.append(image.size)

    def extend(self, thumbnails: bytes, sizes: Iterable[tuple[int, int]]) -> None:
        """Append images by their thumbnails, as `array` has them, one after the other, and sizes."""
        self._file.write(thumbnails)
        self.sizes += sizes

    @property
    def aspects(self) -> list[float]:
        """Return width / height of every image."""
        return [width / height for width, height in self.sizes]

    def array(self) -> Array:
        """Return all thumbnails, (n, 16, 16, 3) uint8, mapped from the file."""
        self._file.flush()
        shape = (len(self.sizes), SIDE, SIDE, 3)
        return np.memmap(self._file, np.uint8, "r", shape=shape) if self.sizes else np.empty(shape, np.uint8)


def find_groups(keys: Sequence[str], thumbnails: Thumbnails) -> list[Group]:
    """Find all groups of exact and near duplicates.

    Args:
        keys: content key of each image.
        thumbnails: of the same images in the same order.

    Returns:
        Groups of two or more, in the order of their first rows.

    Example:
        >>> ramp, thumbnails = Image.linear_gradient("L").convert("RGB"), Thumbnails()
        >>> for image in (ramp, ramp.resize((128, 128)), Image.new("RGB", (256, 256), "red")):
        ...     thumbnails.add(image)
        >>> find_groups(["a", "b", "c"], thumbnails)
        [Group(rows=(0, 1), mirrored=(False, False), key='a')]
    """
    if not keys:
        return []
    names, first, inverse = np.unique(np.asarray(keys), return_index=True, return_inverse=True)
    thumbs, aspects = thumbnails.array(), np.asarray(thumbnails.aspects)[first]
    a, b, flipped = _pairs(thumbs, first, aspects)
    # The spanning forest of the best links. Ranks as weights (from 1, for a zero is no link) tell the link afterwards.
    ranks = np.arange(1, len(a) + 1, dtype=np.float64)
    forest = minimum_spanning_tree(coo_array((ranks, (a, b)), shape=(len(names), len(names))).tocsr()).tocoo()
    beside: dict[int, list[tuple[int, bool]]] = {}
    for x, y, rank in zip(forest.row.tolist(), forest.col.tolist(), forest.data.astype(int).tolist(), strict=True):
        mirror = bool(flipped[rank - 1])
        beside.setdefault(x, []).append((y, mirror))
        beside.setdefault(y, []).append((x, mirror))
    rows_of: dict[int, list[int]] = {}
    counts = np.bincount(inverse, minlength=len(names))
    wanted = (counts > 1) | np.isin(np.arange(len(names)), list(beside))
    for row in np.flatnonzero(wanted[inverse]).tolist():
        rows_of.setdefault(int(inverse[row]), []).append(row)
    groups: list[Group] = []
    seen: set[int] = set()
    for root in sorted(rows_of):  # names are sorted: the first of a group to come is the one of the smallest key
        if root in seen:
            continue
        members, queue = {root: False}, [root]
        for node in queue:
            for other, mirror in beside.get(node, ()):
                if other not in members:
                    members[other] = members[node] != mirror
                    queue.append(other)
        seen.update(members)
        rows = sorted((row, mirror) for node, mirror in members.items() for row in rows_of[node])
        groups.append(Group(tuple(r for r, _ in rows), tuple(m for _, m in rows), str(names[root])))
    return sorted(groups, key=lambda group: group.rows)


def _descriptors(thumbs: Array, first: Array) -> Array:
    """Return the descriptors of the images in rows `first`, (n, 20) float32."""
    v, u = np.array(_FREQUENCIES).T
    out = np.empty((len(first), len(_FREQUENCIES)), dtype=np.float32)
    for start in range(0, len(first), _BLOCK):
        part = slice(start, start + _BLOCK)
        luminance = thumbs[first[part]].astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        waves = scipy.fft.dctn(luminance, axes=(1, 2), norm="ortho")
        waves[:, 0, 0] = 0.0
        length = np.sqrt(np.square(waves).sum((1, 2)))
        out[part] = waves[:, v, u] / np.maximum(length, _FLOOR * SIDE)[:, None]
    return out


def _pairs(thumbs: Array, first: Array, aspects: Array) -> tuple[Array, Array, Array]:
    """Return the confirmed pairs (a, b), a < b, and whether b is a's mirror image, the most alike first."""
    points = _descriptors(thumbs, first)
    sign = np.array([-1.0 if u % 2 else 1.0 for _, u in _FREQUENCIES], dtype=np.float32)
    tree = cKDTree(points)
    found: dict[str, list[Array]] = {"a": [], "b": [], "flip": [], "error": []}
    for flip in (False, True):
        pending, k = np.arange(len(points)), 16
        while len(pending) and k <= _MOST_NEIGHBOURS:
            full = []
            for start in range(0, len(pending), _BLOCK):
                rows = pending[start : start + _BLOCK]
                queries = points[rows] * sign if flip else points[rows]
                near, others = tree.query(queries, k=min(k, len(points)), distance_upper_bound=RADIUS, workers=-1)
                near, others = near.reshape(len(rows), -1), others.reshape(len(rows), -1)
                if near.shape[1] < len(points):
                    # The k nearest are not all that lie within the radius: ask again for more.
                    full.append(rows[np.isfinite(near[:, -1])])
                a, b = np.repeat(rows, near.shape[1]), others.ravel()
                keep = np.isfinite(near.ravel()) & (b != a)
                a, b = a[keep], b[keep]
                ratio = aspects[a] / aspects[b]
                keep = (a < b) & (ratio < ASPECT) & (ratio > 1 / ASPECT)
                a, b = a[keep], b[keep]
                for cut in range(0, len(a), _BLOCK):
                    x, y = a[cut : cut + _BLOCK], b[cut : cut + _BLOCK]
                    error = _errors(thumbs[first[x]], thumbs[first[y]], flip)
                    same = np.isfinite(error)
                    for name, values in (("a", x), ("b", y), ("error", error), ("flip", np.full(len(x), flip))):
                        found[name].append(values[same])
            pending, k = (np.concatenate(full) if full else np.empty(0, int)), 4 * k
    if not found["a"]:
        empty = np.empty(0, int)
        return empty, empty, empty.astype(bool)
    a, b, error, flips = (np.concatenate(found[name]) for name in ("a", "b", "error", "flip"))
    # The most alike first; of a symmetric image's two links the better one. By pair where errors are equal.
    order = np.lexsort((b, a, flips, error))
    a, b, flips = a[order], b[order], flips[order]
    _, best = np.unique(np.stack([a, b], axis=1), axis=0, return_index=True)
    best.sort()
    return a[best], b[best], flips[best].astype(bool)


def _errors(a: Array, b: Array, flip: bool) -> Array:
    """Return the relative error of each pair of thumbnails after the best small gain and offset, inf if too large."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    if flip:
        y = y[:, :, ::-1]
    mean_x, mean_y = (z.mean((1, 2, 3), keepdims=True) for z in (x, y))
    offset = np.abs(mean_y - mean_x).ravel()
    x, y = x - mean_x, y - mean_y
    power_x, power_y = (np.square(z).mean((1, 2, 3), keepdims=True) for z in (x, y))
    # Both scaled to their common contrast, within the gain that a slight change of exposure may have.
    gain = np.clip(np.sqrt(power_y / np.maximum(power_x, 1e-6)), 1 / _GAIN, _GAIN)
    rest = x * gain - y
    contrast = np.sqrt(np.maximum(power_x, power_y)).ravel()
    square = np.square(rest).mean(3)
    error = np.sqrt(square.mean((1, 2)))
    spots = np.sqrt(square.reshape(len(x), SIDE // 2, 2, SIDE // 2, 2).mean((2, 4)).max((1, 2)))
    shifts = rest.reshape(len(x), SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4))
    shift = np.sqrt(np.square(shifts).mean(3).max((1, 2)))
    fits = error <= MEAN_ERROR * contrast + _FLOOR
    fits &= (spots <= SPOT_ERROR * contrast + 2 * _FLOOR) & (shift <= SHIFT_ERROR * contrast + 2 * _FLOOR)
    return np.where(fits & (offset <= _OFFSET), error / (contrast + _FLOOR), np.inf)


def noise_keys(keys: Sequence[str], groups: Sequence[Group]) -> tuple[list[str], list[bool]]:
    """Return per image the key of its noise (its group's, else its own) and whether that noise is mirrored.

    Example:
        >>> noise_keys(["b", "a"], [Group((0, 1), (True, False), "a")])
        (['a', 'a'], [True, False])
    """
    shared, mirrored = list(keys), [False] * len(keys)
    for group in groups:
        for row, mirror in zip(group.rows, group.mirrored, strict=True):
            shared[row], mirrored[row] = group.key, mirror
    return shared, mirrored


def shared_noise(keys: Sequence[str], mirrored: Sequence[bool], shape: Sequence[int], seed: int) -> torch.Tensor:
    """Return the fixed noise of images by the keys of their groups, mirrored with the images.

    A mirrored copy under the unmirrored noise can be mirrored back, and is then the image under a second noise.

    Args:
        keys: noise key of each of B images.
        mirrored: per image whether it is the mirror image of its group's first.
        shape: (C, h, w).
        seed: the run's noise seed.

    Returns:
        eps_n, (B, C, h, w) float32 on the CPU.

    Example:
        >>> noise = shared_noise(["a", "a"], [False, True], (4, 2, 2), seed=0)
        >>> torch.equal(noise[0].flip(-1), noise[1])
        True
    """
    noise = image_noise(keys, shape, seed=seed)
    turned = torch.tensor(list(mirrored), dtype=torch.bool)
    noise[turned] = noise[turned].flip(-1)
    return noise


class FixedNoise:
    """Give the fixed noise of a dataset's images, each made once and kept where all of it fits.

    Args:
        keys: noise key of each image.
        mirrored: per image whether it is the mirror image of its group's first.
        seed: the run's noise seed.
        limit: bytes that may be kept.

    Example:
        >>> noise = FixedNoise(["a", "b"], [False, True], seed=0, limit=2**20)
        >>> torch.equal(noise([1, 0], (4, 2, 2)), shared_noise(["b", "a"], [True, False], (4, 2, 2), seed=0))
        True
    """

    def __init__(self, keys: Sequence[str], mirrored: Sequence[bool], seed: int, limit: int) -> None:
        self.keys, self.mirrored, self.seed, self.limit = keys, mirrored, seed, limit
        self._held: dict[int, torch.Tensor] = {}

    def __call__(self, rows: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Return eps_n of some images, whose latents have one shape; (len(rows), C, h, w) float32 on the CPU."""
        missing = [i for i in dict.fromkeys(rows) if i not in self._held]
        if missing:
            made = shared_noise([self.keys[i] for i in missing], [self.mirrored[i] for i in missing], shape, self.seed)
            found = dict(zip(missing, made, strict=True))
            if 4 * math.prod(shape) * len(self.keys) > self.limit:
                return torch.stack([found[i] for i in rows])
            # Copies: of a tensor of several all would stay as long as one does.
            self._held |= {i: noise.clone() for i, noise in found.items()}
        return torch.stack([self._held[i] for i in rows])


def noise_fingerprint(keys: Sequence[str], mirrored: Sequence[bool]) -> str:
    """Return a SHA-256 over noise keys and mirrorings in their order: another grouping would be other noises.

    Example:
        >>> noise_fingerprint(["a"], [False]) == noise_fingerprint(["a"], [True])
        False
    """
    digest = hashlib.sha256()
    for key, mirror in zip(keys, mirrored, strict=True):
        digest.update(f"{key} {'mirrored' if mirror else 'upright'}\n".encode())
    return digest.hexdigest()
