"""How much of a model's output is copied, and how good it is: figures with intervals, each beside held-out images.

    memorized fraction   share of samples with d1 / d2 < 1/3, d1 and d2 the distances to the nearest and the second
                         nearest training image (Yoon et al. 2023; Bonnaire et al. 2025)
    similarity           cosine to the nearest training image: mean, percentiles, share above 0.5 and 0.75 (SSCD:
                         Pizzi et al., CVPR 2022; protocol of Somepalli et al., CVPR 2023)
    Frechet distance     |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017), through torchmetrics
    density, coverage    of the held-out images, and MiFID: see `fidelity`
    KID                  unbiased squared MMD, kernel (x.y / D + 1)^3 (Binkowski et al. 2018), through torchmetrics

Intervals are 95 %: a bootstrap that resamples whole groups (all samples of one prompt stand or fall together), Wilson's
score interval where resampling shows no spread (a share of 0 or 1). `docs/measures.md` says what each is not.

None of these can tell whether copying is harmful, or prove that a model does not copy: they describe the n samples at hand.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor

from ambient_sd.audit.features import MIRROR, Features, embed
from ambient_sd.audit.fidelity import EPSILON, NEAREST, copy_distance, coverage, density, inside, mifid, radii
from ambient_sd.audit.neighbours import Neighbours, Rows
from ambient_sd.audit.originals import one_of_each, originals
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate, wilson

ABOVE = " > "  # between a cosine feature and its bound, in the names of rows
MEMORIZED_RATIO = 1 / 3
SSCD_THRESHOLDS = (0.5, 0.75)
PERCENTILES = (75, 90, 95)
PROJECT = 64
BACKGROUND = 2000  # training images at most whose own neighbours are looked for: all against all grows with the square
_MOST = 2000  # images a side for density and coverage, whose cost grows with the square
FEWEST_MEASURED = 4  # images, and twice as many held-out ones, that quality is measured on


@dataclass(frozen=True)
class Row:
    """Hold one measure of generated images beside the same measure of held-out images.

    Attributes:
        heldout: the same measure with held-out real images in place of generated ones; for distances between distributions the floor, one half
            of the held-out images against the other; None without held-out images.
        excess: generated minus held-out; None without.
        background: training images among themselves, each without itself, of at most `BACKGROUND` at random; None where that means nothing.

    Example:
        >>> Row("copies", Estimate(0.2, 0.1, 0.4, 50), heldout=None, excess=None).generated.value
        0.2
    """

    name: str
    generated: Estimate
    heldout: Estimate | None
    excess: Estimate | None
    background: Estimate | None = None


@dataclass(frozen=True)
class Measurement:
    """Hold the rows of one run, and neighbours by feature name: of the generated images, of the held-out ones (empty without), and of the
    training images among themselves.

    Example:
        >>> Measurement([Row("copies", Estimate(0.2, 0.1, 0.4, 50), None, None)], {}, {}).row("copies").generated.n
        50
    """

    rows: list[Row]
    neighbours: dict[str, Neighbours]
    heldout_neighbours: dict[str, Neighbours]
    training_neighbours: dict[str, Neighbours] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Return the row called `name`."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no measure {name!r}; measured: {', '.join(row.name for row in self.rows)}")


# --- intervals -------------------------------------------------------------------------------------------------------


class Resampler:
    """Draw rows with replacement by whole groups.

    Args:
        n: number of rows.
        groups: one label per row (its prompt); None: every row is its own group.
        seed: of the resampler's own generator; the global one is not touched.

    Example:
        >>> sorted(Resampler(4, ["a", "a", "b", "b"], seed=0).draw().tolist()) in ([0, 0, 1, 1], [0, 1, 2, 3], [2, 2, 3, 3])
        True
    """

    def __init__(self, n: int, groups: Sequence[Hashable] | None, seed: int) -> None:
        if groups is not None and len(groups) != n:
            raise UserError(f"{len(groups)} groups for {n} samples", rule="one group label per sample")
        members: dict[Hashable, list[int]] = {}
        for row, label in enumerate(range(n) if groups is None else groups):
            members.setdefault(label, []).append(row)
        self.members = [torch.tensor(rows) for rows in members.values()]
        self.count = len(self.members)
        self.generator = torch.Generator().manual_seed(seed)
        # Which rows stand together, not what they are called: two runs over the same prompts are resampled alike.
        layout = repr([rows.tolist() for rows in self.members]).encode()
        self.pairing = f"{seed}:{hashlib.sha256(layout).hexdigest()[:16]}"

    def draw(self) -> Tensor:
        """Return int64 row numbers of one resample."""
        chosen = torch.randint(self.count, (self.count,), generator=self.generator)
        return torch.cat([self.members[group] for group in chosen.tolist()])


def bootstrap(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    name: str,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    share: bool = False,
    detail: str = "",
) -> Estimate:
    """Estimate a statistic of per-sample values with a percentile interval (Efron 1979).

    Args:
        values: `(N,)`.
        statistic: `(N,) -> ()`.
        share: the statistic is a share of samples: where every resample agrees the bootstrap has nothing to say, and
            Wilson's interval on the number of GROUPS is given (samples of one prompt count once: conservative).

    Raises:
        UserError: there are no values.

    Example:
        >>> bootstrap(torch.arange(20.0), torch.mean, name="mean", resamples=100).value
        9.5
    """
    if len(values) == 0:
        raise UserError(f"{name} of 0 samples", rule="at least one sample is needed")
    values = values.to(torch.float64)
    resampler = Resampler(len(values), groups, seed)
    point = float(statistic(values))
    draws = torch.stack([statistic(values[resampler.draw()]) for _ in range(resamples)])
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if share and low == high:
        low, high = wilson(point, resampler.count)
        note = f"Wilson interval on {resampler.count} groups"
        return Estimate(point, low, high, len(values), name, seed, "; ".join(filter(None, (detail, note))))
    pairing = f"{resampler.pairing}:{resamples}"
    return Estimate(point, low, high, len(values), name, seed, detail, draws, pairing)


def difference(a: Estimate, b: Estimate, name: str | None = None) -> Estimate:
    """Estimate `a - b` with an interval.

    Figures resampled together (one pairing) are subtracted draw by draw, which keeps what they share: prompts,
    held-out images. Others are taken as independent and their intervals combined (MOVER: Newcombe 1998; Zou & Donner
    2008): `low = d - sqrt((a - a_low)^2 + (b_high - b)^2)`, `high` likewise.

    Example:
        >>> difference(Estimate(0.5, 0.4, 0.7, 9, "a"), Estimate(0.2, 0.1, 0.3, 9, "b")).show(2)
        '0.30 [0.16, 0.52]'
    """
    value = a.value - b.value
    if a.draws is not None and b.draws is not None and a.pairing and a.pairing == b.pairing:
        draws = a.draws - b.draws
        low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        detail = "paired bootstrap"
    else:
        low = value - math.hypot(a.value - a.low, b.high - b.value)
        high = value + math.hypot(a.high - a.value, b.value - b.low)
        detail = "independent intervals combined"
    return Estimate(value, low, high, min(a.n, b.n), name or f"{a.name}: difference", a.seed, detail)


# --- copying ---------------------------------------------------------------------------------------------------------


def memorized(neighbours: Neighbours, ratio: float = MEMORIZED_RATIO) -> Tensor:
    """Mark the samples that are copies: d1 / d2 < `ratio`, bool `(N,)`.

    An exact copy (d1 = 0) is marked whatever d2 is, so 0 / 0 - a copy of an image that the training set holds twice -
    is marked too. A NEAR copy of a duplicated image is not (d1 and d2 are both small): merge near-duplicates before
    the search (`originals`).

    Example:
        >>> memorized(Neighbours(torch.tensor([[1.0, 4.0], [2.0, 3.0]]), torch.tensor([[0, 1], [0, 1]]))).tolist()
        [True, False]
    """
    return neighbours.ratio < ratio


def copy_threshold(feature: Features) -> float:
    """Return the similarity above which a cosine feature calls an image a copy.

    Example:
        >>> from ambient_sd.audit.features import Sscd
        >>> copy_threshold(Sscd)
        0.5
    """
    return float(getattr(feature, "thresholds")[0])  # noqa: B009  (only cosine features have them)


def copied(feature: Features, neighbours: Neighbours) -> Tensor:
    """Mark the images that count as copies by a feature, bool `(N,)`.

    Example:
        >>> from ambient_sd.audit.features import Pixels
        >>> copied(Pixels(), Neighbours(torch.tensor([[1.0, 4.0]]), torch.tensor([[0, 1]]))).tolist()
        [True]
    """
    return neighbours.similarity > copy_threshold(feature) if feature.distance == "cosine" else memorized(neighbours)


def is_published(name: str) -> bool:
    """Tell whether a row of this name is the share of copies by a published measure of one feature: d1 / d2 < 1/3, or a cosine above a bound.

    Example:
        >>> [is_published(name) for name in ("memorized-pixels64", "SSCD > 0.5", "FD-EffLite0-pca64", "copies")]
        [True, True, False, False]
    """
    return name.startswith("memorized-") or ABOVE in name


def memorized_fraction(
    neighbours: Neighbours,
    ratio: float = MEMORIZED_RATIO,
    *,
    name: str = "memorized",
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Estimate:
    """Estimate the share of samples with d1 / d2 < `ratio`.

    Example:
        >>> near = Neighbours(torch.tensor([[1.0, 4.0], [2.0, 3.0]]), torch.tensor([[0, 1], [0, 1]]))
        >>> memorized_fraction(near, resamples=50).value
        0.5
    """
    return bootstrap(
        memorized(neighbours, ratio), torch.mean, name=name, groups=groups, seed=seed, resamples=resamples, share=True,
        detail=f"share with d1/d2 < {ratio:.3g}",
    )  # fmt: skip


def similarity_figures(
    neighbours: Neighbours,
    *,
    name: str = "SSCD",
    thresholds: Sequence[float] = SSCD_THRESHOLDS,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> list[Estimate]:
    """Estimate mean, percentiles and shares above the thresholds of the similarity to the nearest training image.

    Example:
        >>> near = Neighbours(torch.tensor([[0.1, 0.4], [0.7, 0.8]]), torch.tensor([[0, 1], [0, 1]]), "cosine")
        >>> [(figure.name, round(figure.value, 2)) for figure in similarity_figures(near, resamples=20)][-2:]
        [('SSCD > 0.5', 0.5), ('SSCD > 0.75', 0.5)]
    """
    values = neighbours.similarity
    options: dict[str, Any] = {"groups": groups, "seed": seed, "resamples": resamples}
    figures = [bootstrap(values, torch.mean, name=f"{name} mean", **options)]
    for p in PERCENTILES:
        figures.append(
            bootstrap(values, lambda v, p=p: torch.quantile(v, p / 100), name=f"{name} {p}th percentile", **options)  # type: ignore[misc]
        )
    for threshold in thresholds:
        figures.append(
            bootstrap(values > threshold, torch.mean, name=f"{name}{ABOVE}{threshold}", share=True, **options)
        )
    return figures


def copy_figures(feature: Features, neighbours: Neighbours, **options: Any) -> list[Estimate]:
    """Give the copying figures that suit a feature: similarities for a cosine one, the memorized fraction else.

    Example:
        >>> from ambient_sd.audit.features import Pixels
        >>> near = Neighbours(torch.tensor([[1.0, 4.0]]), torch.tensor([[0, 1]]))
        >>> [figure.name for figure in copy_figures(Pixels(), near, resamples=20)]
        ['memorized-pixels64']
    """
    if feature.distance == "cosine":
        thresholds = getattr(feature, "thresholds", SSCD_THRESHOLDS)
        return similarity_figures(neighbours, name=feature.name, thresholds=thresholds, **options)
    return [memorized_fraction(neighbours, name=f"memorized-{feature.name}", **options)]


# --- quality ---------------------------------------------------------------------------------------------------------


class _Given(torch.nn.Module):
    """Hand precomputed features to a torchmetrics metric: its "network" is the identity."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _pair(a: Tensor, b: Tensor, what: str) -> tuple[Tensor, Tensor]:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(f"{what} of {tuple(a.shape)} and {tuple(b.shape)}", rule="needs (n >= 2, D) twice, with one D")
    return a.to(torch.float64), b.to(torch.float64)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the Frechet distance between Gaussians fitted to two feature sets.

    `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, by torchmetrics' `FrechetInceptionDistance` in float64.
    The estimate is biased upwards, and more so as n approaches D: compare only figures of equal n, and see `project`.

    Args:
        a, b: `(n, D)`, `(m, D)`; symmetric.

    Example:
        >>> points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(points + 3, points), 6)
        18.0
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = _pair(a, b, "Frechet distance")
    # sync_on_compute: one process measures, and torchmetrics would wait for the others of a distributed run.
    # The metric accumulates sums of squares and subtracts n m m^T; a common shift changes nothing and saves the digits.
    shift = b.mean(dim=0)
    metric = FrechetInceptionDistance(feature=_Given(a.shape[1]), sync_on_compute=False)
    metric.update(b - shift, real=True)
    metric.update(a - shift, real=False)
    # Rounding can leave a distance of equal sets at -1e-13.
    return max(0.0, float(metric.compute()))


def kid(a: Tensor, b: Tensor) -> float:
    """Compute the unbiased squared MMD with the kernel `(x.y / D + 1)^3` (Binkowski et al., ICLR 2018, eq. 3 and 4).

    By `torchmetrics.image.kid.KernelInceptionDistance` on one subset that holds everything. Its estimator needs equal
    counts: of the larger set the first rows are used, so give equal sizes. Unbiased: equal distributions scatter around
    0, negative values included.

    Args:
        a, b: `(n, D)`, `(m, D)`; n = m uses all rows.

    Example:
        >>> points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> kid(points + 3, points) > 1 > abs(kid(points[:25], points[25:]))
        True
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = _pair(a, b, "KID")
    size = min(len(a), len(b))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        metric = KernelInceptionDistance(feature=_Given(a.shape[1]), subsets=1, subset_size=size, sync_on_compute=False)
    metric.update(b[:size], real=True)
    metric.update(a[:size], real=False)
    # It shuffles with the global generator; on one full subset the order is irrelevant, the caller's stream is not.
    with torch.random.fork_rng(devices=[]):
        return float(metric.compute()[0])


def pca_basis(reference: Tensor, dim: int) -> tuple[Tensor, float]:
    """Return the leading `dim` principal directions `(D, dim)` of real images and the share of variance they keep.

    No seed: the distance is the same for any sign or rotation of the basis.

    Example:
        >>> basis, kept = pca_basis(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), 1)
        >>> basis.shape, round(kept, 3)
        (torch.Size([2, 1]), 1.0)
    """
    rows = reference.to(torch.float64)
    _, s, vh = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    variance = s.square()
    return vh[:dim].T.contiguous(), float(variance[:dim].sum() / variance.sum().clamp_min(1e-300))


def quality_rows(
    generated: Tensor,
    heldout: Tensor,
    *,
    name: str,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 100,
    splits: int = 10,
    project: int = PROJECT,
    training: Tensor | Rows | None = None,
) -> list[Row]:
    """Estimate how far generated images are from held-out ones, beside the floor, at equal n: Frechet distance and KID; given
    the training images also MiFID, density and coverage (`fidelity`).

    The held-out images are cut at random into halves A and B, `splits` times, and m = min(n, |A|, |B|) rows are used
    on every side: generated is the mean of D(G, B), the floor the mean of D(A, B). Both carry the same finite-sample
    bias, so the floor is what a perfect model would get. The Frechet distance is taken in the `project` leading
    principal directions of the held-out images (m < D would leave the covariances singular), or fewer when m < 2
    project; the name says how many: "FD-EffLite0-pca64". KID uses all dimensions.

    The interval resamples groups of G, and the rows of A and of B apart (one image never lands in both halves), with
    B common to both figures. A resample repeats rows, which biases both distances upwards; the draws are therefore
    moved so that their mean is the estimate, and the interval says how far the figure scatters AT THIS m.

    Args:
        generated: `(N, D)`. heldout: `(M, D)`.
        groups: one label per generated row.
        training: `(T, D)`, or rows on disk.

    Returns:
        One Row per measure; empty when there are fewer than 4 images a side to compare.

    Example:
        >>> sets = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
        >>> [row.name for row in quality_rows(sets[0], sets[1], name="made", resamples=2, splits=1)]
        ['FD-made-pca3', 'KID-made']
    """
    m = min(len(generated), len(heldout) // 2)
    if m < FEWEST_MEASURED:
        return []
    project = min(project, generated.shape[1])
    while project > m // 2:
        project //= 2
    basis, kept = pca_basis(heldout, project)
    spaces = {
        f"FD-{name}-pca{project}": (frechet_distance, generated.double() @ basis, heldout.double() @ basis),
        f"KID-{name}": (kid, generated.double(), heldout.double()),
    }
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(len(heldout), generator=generator) for _ in range(splits)]
    orders = [torch.randperm(len(generated), generator=generator)[:m] for _ in range(splits)]
    resampler = Resampler(len(generated), groups, seed)
    picks = []
    for i in range(resamples):
        half = halves[i % splits]
        a, b = half[:m], half[m : 2 * m]
        rows = resampler.draw()
        rows = rows[torch.randperm(len(rows), generator=generator)[:m]]
        again = torch.randint(m, (2, m), generator=generator)
        picks.append((rows, a[again[0]], b[again[1]]))

    reference = hashlib.sha256(heldout.to(torch.float32).numpy().tobytes()).hexdigest()[:16]
    pairing = f"{resampler.pairing}:{resamples}:{splits}:{reference}:{project}"
    out = []
    distances: dict[str, Tensor] = {}
    if training is not None:
        distances = {"generated": copy_distance(generated, training), "heldout": copy_distance(heldout, training)}
    for measure_name, (distance, g, h) in spaces.items():
        detail = f"m = {m} a side, mean of {splits} halvings"
        if distance is frechet_distance:
            detail += f", {kept:.0%} of held-out variance"
        pairs = {
            "generated": [(g[o], h[s[m : 2 * m]]) for o, s in zip(orders, halves, strict=True)],
            "heldout": [(h[s[:m]], h[s[m : 2 * m]]) for s in halves],
        }
        again_pairs = {"generated": [(g[r], h[b]) for r, _, b in picks], "heldout": [(h[a], h[b]) for _, a, b in picks]}
        figures, charged = {}, {}
        for side in ("generated", "heldout"):
            value = sum(distance(x, y) for x, y in pairs[side]) / splits
            draws = torch.tensor([distance(x, y) for x, y in again_pairs[side]], dtype=torch.float64)
            n = len(generated) if side == "generated" else len(heldout)
            note = detail if side == "generated" else f"floor, half against half; {detail}"
            figures[side] = _figure(measure_name, value, draws, n, seed, note, pairing)
            if distances and distance is frechet_distance:
                drawn = [pick[0] if side == "generated" else pick[1] for pick in picks]
                moved = figures[side].draws
                assert moved is not None
                each = torch.tensor([mifid(float(v), distances[side][r]) for v, r in zip(moved, drawn, strict=True)])
                note = (
                    f"mean distance to a training image {distances[side].mean():.3g}, charged below {EPSILON:g}; {note}"
                )
                charged[side] = _figure(
                    f"MiFID-{name}-pca{project}", mifid(value, distances[side]), each.double(), n, seed, note, pairing
                )  # fmt: skip
        for sides in (figures, charged):
            if sides:
                gap = difference(sides["generated"], sides["heldout"])
                out.append(Row(sides["generated"].name, **sides, excess=gap))
    if training is not None and min(m, _MOST) > NEAREST:
        out += _density_rows(generated, heldout, name, orders, halves, picks, resampler.pairing, seed, m)
    return out


def distances(
    generated: Tensor,
    real: Tensor,
    rendered: Tensor,
    *,
    name: str,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 200,
) -> list[Row]:
    """Estimate the Frechet distance and KID of generated images to all of a fixed set of real ones, beside these as an autoencoder renders them.

    For several models beside each other. The real images are a test that all share, so the interval resamples groups of generated images
    alone. `quality_rows` halves the held-out images for a floor at equal n, which doubles the bias and widens the interval: for one model
    that is right, for many it hides what tells them apart. The Frechet distance is taken in the leading principal directions of the
    real images, 64 or half of their count. A resample repeats rows, which biases a distance upwards; the draws are moved so that their
    mean is the estimate.

    Args:
        generated, real, rendered: features, `(N, D)`, `(M, D)` and `(M, D)`; KID uses the first min(N, M) rows.

    Example:
        >>> sets = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
        >>> rows = distances(sets[0] + 1, sets[1], sets[1], name="made", resamples=5)
        >>> [row.name for row in rows], rows[0].generated.value > 1 > rows[0].heldout.value
        (['FD-made-pca3', 'KID-made'], True)
    """
    dim = min(PROJECT, len(real) // 2, real.shape[1])
    basis, kept = pca_basis(real, dim)
    near, count = real.double() @ basis, min(len(generated), len(real))
    measures: dict[str, Callable[[Tensor], float]] = {
        f"FD-{name}-pca{dim}": lambda rows: frechet_distance(rows.double() @ basis, near),
        f"KID-{name}": lambda rows: kid(rows[:count].double(), real[:count].double()),
    }
    out = []
    for measure_name, distance in measures.items():
        resampler = Resampler(len(generated), groups, seed)
        draws = torch.tensor([distance(generated[resampler.draw()]) for _ in range(resamples)], dtype=torch.float64)
        detail = f"to all {len(real)} real images" + (
            f", {kept:.0%} of their variance" if "FD-" in measure_name else ""
        )
        pairing = f"{resampler.pairing}:{resamples}:{measure_name}"
        made = _figure(measure_name, distance(generated), draws, len(generated), seed, detail, pairing)
        floor = distance(rendered)
        least = Estimate(floor, floor, floor, len(real), measure_name, seed, "the real images through the autoencoder")
        out.append(Row(measure_name, made, least, difference(made, least)))
    return out


def _figure(
    name: str, value: float, draws: Tensor, n: int, seed: int, detail: str, pairing: str, share: bool = False
) -> Estimate:
    """Make a figure of an estimate and draws that scatter about another mean; a share stays within 0 and 1."""
    draws = draws - draws.mean() + value
    if share:
        draws = draws.clamp(0, 1)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, n, name, seed, detail, draws, pairing)


def _density_rows(
    generated: Tensor,
    heldout: Tensor,
    name: str,
    orders: Sequence[Tensor],
    halves: Sequence[Tensor],
    picks: Sequence[tuple[Tensor, Tensor, Tensor]],
    pairing: str,
    seed: int,
    m: int,
) -> list[Row]:
    """Estimate density and coverage on the halves of `quality_rows`.

    The balls are those of half B; a resample would repeat rows of B and shrink them, so only the images inside are resampled, and
    the halvings vary B.
    """
    m = min(m, _MOST)
    hits: dict[str, list[Tensor]] = {"generated": [], "heldout": []}
    for half in halves:
        real = heldout[half[m : 2 * m]]
        radius = radii(real)
        hits["generated"].append(inside(generated, real, radius))
        # Rows of the other half stand at their own places, so that draws may name them; the rest is never asked for.
        table = torch.zeros(len(heldout), m, dtype=torch.bool)
        table[half[:m]] = inside(heldout[half[:m]], real, radius)
        hits["heldout"].append(table)
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for measure_name, statistic in ((f"density-{name}", density), (f"coverage-{name}", coverage)):
        figures = {}
        for side, found in hits.items():
            chosen = [o[:m] for o in orders] if side == "generated" else [half[:m] for half in halves]
            value = sum(statistic(h[r]) for h, r in zip(found, chosen, strict=True)) / len(found)
            draws = []
            for i, (drawn, _, _) in enumerate(picks):
                if side == "generated":
                    again = drawn[:m]
                else:
                    again = halves[i % len(halves)][:m][torch.randint(m, (m,), generator=generator)]
                draws.append(statistic(found[i % len(found)][again]))
            detail = f"more is better; k = {NEAREST}, m = {m} a side, mean of {len(halves)} halvings"
            n = len(generated) if side == "generated" else len(heldout)
            figures[side] = _figure(
                measure_name, value, torch.tensor(draws, dtype=torch.float64), n, seed,
                detail if side == "generated" else f"real against real; {detail}", f"{pairing}:{measure_name}:{m}",
                share=statistic is coverage,
            )  # fmt: skip
        rows.append(Row(measure_name, **figures, excess=difference(figures["generated"], figures["heldout"])))
    return rows


# --- everything ------------------------------------------------------------------------------------------------------


class Some(Protocol):
    """Give the vectors of some training images by their rows."""

    def gather(self, rows: Tensor) -> Tensor: ...


class Stored(Some, Rows, Protocol):
    """Give training vectors that do not fit memory: in blocks, and some by their rows."""


Images = Sequence[Image.Image] | Mapping[str, Tensor]
Training = Sequence[Image.Image] | Mapping[str, Tensor | Stored | Some]


def _some(vectors: Tensor | Some, rows: Tensor) -> Tensor:
    return vectors[rows] if isinstance(vectors, Tensor) else vectors.gather(rows)


def measure(
    generated: Images,
    training: Training,
    heldout: Images | None,
    features: Sequence[Features],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    *,
    duplicates: Sequence[Hashable] | None = None,
    mirrored: bool = False,
    progress: bool = False,
    resamples: int = 1000,
    quality_resamples: int = 100,
    project: int = PROJECT,
    quality: bool = True,
) -> Measurement:
    """Measure one run: copying and quality, every figure beside the same figure for held-out real images.

    Args:
        generated, training, heldout: images, or what `embed` made of them (embed the real sets once for many runs); of
            training images also `Stored` ones, and of their mirror images `Some`: at most `BACKGROUND` rows are asked for.
            `heldout` must come from the same source as `training` and share nothing with it; None: there are none, and
            no excess and no quality is given.
        features: extractors; Euclidean ones give memorized fractions, cosine ones similarities, those with `quality`
            Frechet distance, KID, MiFID, density and coverage.
        groups: one label per generated image, its prompt: samples of one prompt are not independent.
        seed: of all resampling. Use the same for runs that will be compared.
        duplicates: one label per training image, equal for copies of one image (`originals`); None: all differ.
        mirrored: an image's mirror image is searched for too (`originals`); vectors must come from `embed` with the
            same setting.
        progress: show bars of the searches.
        quality: give the measures of quality too.

    Returns:
        Measurement: `.rows`, and neighbours by feature name.

    Raises:
        UserError: a set is too small, or the groups do not match.

    Example:
        >>> from ambient_sd.audit.features import Pixels
        >>> training, drawn = torch.rand(5, 48), torch.rand(2, 48)
        >>> measure({"pixels4": drawn}, {"pixels4": training}, None, [Pixels(4)], resamples=20).rows[0].name
        'memorized-pixels4'
    """
    given: list[Images] = [generated, *([] if heldout is None else [heldout])]
    sets = [s if isinstance(s, Mapping) else embed(s, features, mirrored=mirrored) for s in given]
    known = training if isinstance(training, Mapping) else embed(training, features, mirrored=mirrored)
    rows: list[Row] = []
    near: dict[str, Neighbours] = {}
    held: dict[str, Neighbours] = {}
    within: dict[str, Neighbours] = {}
    quality_of: list[Row] = []
    options: dict[str, Any] = {"seed": seed, "resamples": resamples}
    for feature in features:
        name = feature.name
        views = [name, *([name + MIRROR] if mirrored else [])]
        g, *h = ([s[view] for view in views] for s in sets)
        t = cast("Tensor | Stored", known[name])
        found: dict[str, Any] = {"distance": feature.distance, "duplicates": duplicates, "progress": progress}
        near[name] = originals(g, t, **found)
        sampled = copy_figures(feature, near[name], groups=groups, **options)
        real: list[Estimate] | list[None] = [None] * len(sampled)
        if h:
            held[name] = originals(h[0], t, **found)
            real = copy_figures(feature, held[name], **options)
        background: list[Estimate] | list[None] = [None] * len(sampled)
        # Leave-one-out needs three different images to offer two neighbours.
        own = one_of_each(range(t.shape[0]) if duplicates is None else duplicates, BACKGROUND, seed)
        if len(own) > 2:
            within[name] = originals([_some(known[view], own) for view in views], t, own=own, **found)
            background = copy_figures(feature, within[name], **options)
        for a, b, c in zip(sampled, real, background, strict=True):
            rows.append(Row(a.name, a, b, None if b is None else difference(a, b), c))
        if quality and feature.quality and h:
            quality_of += quality_rows(
                g[0], h[0][0], name=name, groups=groups, seed=seed, resamples=quality_resamples, project=project,
                training=t,
            )  # fmt: skip
    return Measurement(rows + quality_of, near, held, within)
