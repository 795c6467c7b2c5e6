"""Propose a noise level s_n for a dataset: measured on its latents before any training, without a network.

For images x_i in d numbers, a noisy copy is `y = x_i + s z`. By noise level s:

    own weight    w = 1 / (1 + sum_{j != i} exp(-|x_i - x_j|^2 / (2 s^2) - z.(x_i - x_j) / s))
                  the posterior weight of the true image under the plain oracle (`ambient_sd.oracle`). Where its mean falls
                  below 1/2 a copy no longer tells which image it came from: the collapse of Biroli, Bonnaire, de Bortoli,
                  Mezard, "Dynamical regimes of diffusion models" (2024), measured and not estimated from an entropy
    overlap       s = delta / (2 sqrt(d)), delta the distance to the nearest other image: the noise of a copy has length
                  s sqrt(d), so there the spheres of two neighbours touch
    recovered     d1 / d2 of `h = m + W (y - m)`, d1 its distance to x_i, d2 to the nearest other image,
                  W = P / (P + s^2) per frequency, P the mean power spectrum of the set: the best linear filter that knows
                  what the images share (spectrum and mean m of each channel) and none of them
    speciation    s = sqrt(largest eigenvalue of the covariance), where the gross structure appears (the same paper)

The proposal is the level at which the median of d1 / d2 reaches `TARGET` = 2/3. Why not the collapse? Ambient training can
at most memorize noisy copies (Shah et al., ICML 2025, Lemma 4.1), and a network that knows every image by heart below s_n
names the image of a copy at any level below the collapse. But on real latents the collapse is so high (5 to 10) that nothing is
left to learn from. Below s_n networks generalize first; a copy then gives away what a denoiser that has not seen the
image recovers of it, and d1 / d2 < 1/3 is the published criterion of a copy. A trained network denoises better than a linear
filter, hence twice that ratio. `docs/level.md` says how far to trust it.

At most `MOST` images are measured, chosen by their keys: time and memory stay flat. The weights of the others are made up for
in the mean, `(n - 1) / (m - 1)`; near neighbours among them are not, so a level comes out too high rather than too low. Leave
near-duplicates out (`ImageDataset.one_of_each`): two copies are equally near.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import keyed_generator
from ambient_sd.utils.errors import UserError

MOST = 2048  # images that stand for all
PROBES = 256  # of them noisy copies are made
FEWEST = 8
COPY, TARGET = 1 / 3, 2 / 3  # of d1 / d2
IDENTIFIED = 0.5  # of the mean own weight
GRID = tuple(0.05 * 2 ** (k / 2) for k in range(21))  # 0.05 to 51
_QUANTILES = (0.05, 0.5, 0.95)
_SAME = 1e-3  # of the latents' length: nearer ones are equal

Quantiles = tuple[float, float, float]


@dataclass(frozen=True)
class NoiseLevels:
    """Hold the measurement and the proposal.

    Attributes:
        images: n, distinct ones of the set.
        used: m of them, measured.
        numbers: d, of one latent.
        levels: the noise levels of the three lists that follow.
        own: mean posterior weight of the true image.
        own_quantiles: 5, 50 and 95 % of it.
        ratio_quantiles: 5, 50 and 95 % of d1 / d2 of the recovered image.
        nearest: 5, 50 and 95 % of the distance to the nearest other image, per number: `delta / sqrt(d)`.
        overlap: where the spheres of the median neighbours touch.
        copy: where the median of d1 / d2 reaches 1/3: below, noisy copies are copies.
        collapse: where the mean own weight falls below 1/2; None: not within `GRID`.
        speciation: root of the largest eigenvalue.
        proposed: s_n, two significant digits.
        reason: one line.

    Example:
        >>> latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> found = measure(latents)
        >>> found.images, found.as_dict()["numbers"]
        (8, 64)
    """

    images: int
    used: int
    numbers: int
    levels: tuple[float, ...]
    own: tuple[float, ...]
    own_quantiles: tuple[Quantiles, ...]
    ratio_quantiles: tuple[Quantiles, ...]
    nearest: Quantiles
    overlap: float
    copy: float | None
    collapse: float | None
    speciation: float
    proposed: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return asdict(self)


def representatives(images: ImageDataset, shapes: Sequence[Any] | None = None) -> tuple[list[int], int]:
    """Return the rows to measure, at most `MOST`, and the number of distinct images that they stand for.

    One of each group of duplicates; of several latent shapes those of the most frequent one. Keys are hashes, so the
    smallest are a random draw that depends on no order, seed or number of processes.

    Args:
        images: checked.
        shapes: of each image's latent; all alike if not given.

    Raises:
        UserError: fewer than `FEWEST` are left.

    Example:
        >>> class Nine:
        ...     noise_keys = keys = [f"{i}" for i in range(9)]
        ...     def one_of_each(self):
        ...         return list(range(9))
        >>> representatives(Nine())[1]
        9
    """
    rows = images.one_of_each()
    if shapes is not None:
        kinds = [shapes[i] for i in rows]
        most = max(sorted(set(kinds)), key=kinds.count)
        rows = [i for i, kind in zip(rows, kinds, strict=True) if kind == most]
    if len(rows) < FEWEST:
        raise UserError(f"the level of {len(rows)} distinct images is asked for",
                        rule=f"it is measured between neighbours, at least {FEWEST}",
                        remedy="give ambient_level as a number")  # fmt: skip
    keys = images.noise_keys or images.keys
    return sorted(rows, key=lambda i: (keys[i], i))[:MOST], len(rows)


@torch.no_grad()
def measure(latents: torch.Tensor, *, total: int | None = None, max_level: float = math.inf) -> NoiseLevels:
    """Measure a set by its latents and propose a noise level s_n.

    Args:
        latents: (m, C, h, w) clean latents of distinct images, as the network sees them.
        total: n, how many images they were drawn from at random; m if not given.
        max_level: of the schedule; the proposal does not exceed it.

    Returns:
        The same for the same latents: noise is a function of (place, size) alone.

    Raises:
        UserError: fewer than `FEWEST` images, all alike, or values that are not finite.

    Example:
        >>> latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> measure(latents).proposed
        1.1
    """
    m, n = len(latents), total or len(latents)
    if latents.ndim != 4 or m < FEWEST:
        raise UserError(f"latents of shape {tuple(latents.shape)}", rule=f"(m, C, h, w) with m >= {FEWEST}")
    x = latents.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(x).all()):
        raise UserError("latents hold values that are not finite", rule="there is no distance to them")
    center, spectrum = x.mean((0, 2, 3), keepdim=True), torch.zeros(x.shape[1:])
    for part in x.split(64):
        spectrum += torch.fft.fft2(part - center, norm="ortho").abs().square().sum(0) / m
    flat, probes = x.flatten(1), min(m, PROBES)
    squares = flat.double().square().sum(1)
    apart = _squared(flat[:probes], flat, squares, exact=True)
    own = torch.arange(probes)
    # Images may differ only in what the crop cuts off: they are one image here.
    same = apart <= _SAME**2 * squares.mean()
    apart[same] = math.inf
    nearest = apart.min(1).values.sqrt()
    if not bool(torch.isfinite(nearest).all()):
        raise UserError("an image has the same latent as all others", rule="the level is measured between neighbours",
                        remedy="give ambient_level as a number")  # fmt: skip
    noise = torch.stack([torch.randn(x.shape[1:], generator=keyed_generator("level", i, m)) for i in range(probes)])
    # z.(x_i - x_j): one product serves all levels.
    along = noise.flatten(1) @ flat.T
    along = (along[own, own][:, None] - along).double()
    weights, ratios = [], []
    for level in GRID:
        others = torch.logsumexp(-apart / (2 * level**2) - along / level, 1) + math.log((n - 1) / (m - 1))
        weights.append(torch.sigmoid(-others))
        copies = torch.fft.fft2(x[:probes] + level * noise - center, norm="ortho")
        found = torch.fft.ifft2(copies * (spectrum / (spectrum + level**2)), norm="ortho").real + center
        found = found.flatten(1)
        mine = (found - flat[:probes]).double().square().sum(1).sqrt()  # small: by difference
        distance = _squared(found, flat, squares).sqrt()
        distance[same] = math.inf
        ratios.append(mine / distance.min(1).values)
    medians = [float(r.median()) for r in ratios]
    means = [float(w.mean()) for w in weights]
    copy, target = _crossing(medians, COPY), _crossing(medians, TARGET)
    collapse = _crossing([-v for v in means], -IDENTIFIED)
    deviations = (flat[:PROBES] - flat.mean(0)).double()
    size = math.sqrt(flat.shape[1])
    proposed, reason = _propose(target, collapse, max_level, n)
    return NoiseLevels(
        images=n,
        used=m,
        numbers=flat.shape[1],
        levels=GRID,
        own=tuple(means),
        own_quantiles=tuple(_quantiles(w) for w in weights),
        ratio_quantiles=tuple(_quantiles(r) for r in ratios),
        nearest=_quantiles(nearest / size),
        overlap=float(nearest.median()) / (2 * size),
        copy=copy,
        collapse=collapse,
        speciation=float(torch.linalg.matrix_norm(deviations, 2)) / math.sqrt(len(deviations)),
        proposed=proposed,
        reason=reason,
    )


def _propose(target: float | None, collapse: float | None, max_level: float, n: int) -> tuple[float, str]:
    reason = f"there a noisy copy of one of {n} images, linearly denoised, has d1/d2 = {TARGET:.2f} (a copy: below {COPY:.2f})"
    level = target
    if level is None:
        level, reason = GRID[-1], f"noisy copies of the {n} images can be told apart at every level"
    if collapse is not None and collapse < level:
        level, reason = collapse, f"above it a noisy copy of one of {n} images does not tell which one it was"
    level = float(f"{level:.2g}")
    if level > max_level:
        # Down, not to the nearest: the schedule ends there.
        digits = 1 - math.floor(math.log10(max_level))
        level = math.floor(max_level * 10**digits) / 10**digits
        reason += "; more than the schedule's largest level"
    return level, reason


def _squared(a: torch.Tensor, b: torch.Tensor, b_squared: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """Return squared distances of float32 rows, float64; the product of each pair in float64 only if `exact`."""
    blocks = [slice(start, start + 256) for start in range(0, len(b), 256)]  # in float64 a copy of all would be large
    left = a.double() if exact else a
    products = [left @ (b[s].double() if exact else b[s]).T for s in blocks]
    return (a.double().square().sum(1)[:, None] + b_squared - 2 * torch.cat(products, 1).double()).clamp(min=0)


def _crossing(values: Sequence[float], threshold: float) -> float | None:
    """Return the first level of `GRID` at which rising `values` reach a threshold, between two by log s; None: they do not."""
    for k, (value, level) in enumerate(zip(values, GRID, strict=True)):
        if value >= threshold:
            if k == 0:
                return level
            share = (threshold - values[k - 1]) / (value - values[k - 1])
            return float(GRID[k - 1] * (level / GRID[k - 1]) ** share)
    return None


def _quantiles(values: torch.Tensor) -> Quantiles:
    low, middle, high = torch.quantile(values.double(), torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    return low, middle, high


def as_text(found: NoiseLevels) -> str:
    """Return the table for the terminal.

    Example:
        >>> latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> as_text(measure(latents)).splitlines()[0]
        '8 distinct images, 64 numbers each'
    """
    drawn = "" if found.used == found.images else f" ({found.used} of them measured)"
    low, middle, high = found.nearest
    lines = [
        f"{found.images} distinct images{drawn}, {found.numbers} numbers each",
        f"nearest other image: {middle:.2f} per number (5 to 95 %: {low:.2f} to {high:.2f})",
        "",
        "  level  own weight (5 to 95 %)   recovered d1/d2 (5 to 95 %)",
    ]
    for level, own, (a, _, b), (c, ratio, d) in zip(
        found.levels, found.own, found.own_quantiles, found.ratio_quantiles, strict=True
    ):
        lines.append(f"{level:7.3g}  {own:5.3f}  ({a:.3f} to {b:.3f})   {ratio:5.2f}  ({c:.2f} to {d:.2f})")
    lines += ["", *(f"{_number(level):>7}  {meaning}" for level, meaning in marks(found))]
    lines += ["", f"proposed: s_n = {found.proposed:g}: {found.reason}"]
    return "\n".join(lines)


def marks(found: NoiseLevels) -> list[tuple[float | None, str]]:
    """Return the levels that mean something, each with its meaning.

    Example:
        >>> latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> [meaning for _, meaning in marks(measure(latents))][1]
        'the noise of neighbouring images overlaps'
    """
    return [
        (found.copy, "below, a noisy copy is a copy: linearly denoised, d1/d2 < 1/3 for half of them"),
        (found.overlap, "the noise of neighbouring images overlaps"),
        (found.proposed, "proposed"),
        (found.collapse, "above, a noisy copy does not tell which image it was (mean own weight 1/2)"),
        (found.speciation, "the set's gross structure appears"),
    ]


def _number(level: float | None) -> str:
    return "none" if level is None else f"{level:.2g}"
