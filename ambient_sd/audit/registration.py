"""The residual of an image after a training image is fitted to it: small for a changed copy.

    x      the image, brought to the frame of t: mirrored or not, scaled, rotated, shifted (a similarity transform)
    t_b    training image t, blurred by b; or another rendition of it, for example through the model's autoencoder
    e(u) = min over b, A, c of |x(u) - A t_b(u) - c|^2          A: 3 x 3 and c: 3, one affine map of colours for the whole image
    D    = sqrt(max_u (g * e)(u) - median_u (g * e)(u)) / s_x   g: a Gaussian window; s_x: deviation of x

Recolouring, brightness, contrast and greyscale are affine maps of colours; blur and resizing are in b; crop, border, rotation, shift and mirroring are in
the transform. The rest of a copy is spread evenly, since noise and encoding are the same everywhere, and the median removes it. A NEW member of
a series differs in one place - another mouth, another hand of the clock - and e stands out there. d1 / d2 cannot see this: in a series
both distances are those of the encoding.

D alone decides nothing. Images that cannot be copies say what is small: `ambient_sd.audit.decision`.

The transform is found by correlating brightness over a grid of poses at 16 x 16, then by gradient descent on 1 - NCC^2 (Lewis 1995) at 32 x 32
from the best pose. Everything is deterministic; nothing is learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ambient_sd.audit.features import square

SIDE = 64
SCALES = (0.7, 1.5)  # blur before the comparison, pixels of SIDE: fine for encoding, coarse for noise
BLURS = (0.0, 1.0, 1.6, 2.4)
WINDOW = 3.0  # deviation of the window in which a difference stands out, pixels of SIDE
FLAT = 0.02  # an image with less deviation than this shows nothing that could be compared
COVER = 0.45  # share of the training image that a pose must cover
CANDIDATES = 4  # training images compared closely, of each of the two ways in which they are found
_COARSE, _FINE = 16, 32
_STEPS, _RATE = 64, 0.02
_GREY = torch.tensor([0.299, 0.587, 0.114])


def prepare(images: Sequence[Image.Image]) -> Tensor:
    """Return RGB in [0, 1], float32 `(N, 3, SIDE, SIDE)`; images that are not square are squeezed.

    Example:
        >>> prepare([Image.new("RGB", (96, 64))]).shape
        torch.Size([1, 3, 64, 64])
    """
    if not len(images):
        return torch.empty(0, 3, SIDE, SIDE)
    parts = [square(images[i : i + 256], SIDE) for i in range(0, len(images), 256)]
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).to(torch.float32) / 255


def deviation(x: Tensor) -> Tensor:
    """Return s_x at the finest blur, `(N,)`: root of the variance over pixels, summed over channels; below `FLAT` nothing can be compared.

    Example:
        >>> deviation(prepare([Image.new("RGB", (64, 64), "red")])).tolist()
        [0.0]
    """
    blurred = _blur(x, SCALES[0]).flatten(2)
    return (blurred - blurred.mean(2, keepdim=True)).square().mean(2).sum(1).sqrt()


@dataclass(frozen=True)
class Registered:
    """Hold the closest training images of each query.

    Attributes:
        index: int64 `(N, K)`, rows of the training set; one can stand there twice.
        residual: D of each pair by blur, `{scale: (N, K)}`; infinite where nothing can be compared.

    Example:
        >>> found = Registered(torch.tensor([[4, 2]]), {0.7: torch.tensor([[0.3, 0.05]])})
        >>> int(found.index[0, found.residual[0.7][0].argmin()])
        2
    """

    index: Tensor
    residual: dict[float, Tensor]


def register(
    queries: Tensor, training: Tensor, *, not_allowed: Tensor | None = None, renditions: Sequence[Tensor] = (),
    poses: Poses | None = None, mirrored: bool = True, batch: int = 16,
) -> Registered:  # fmt: skip
    """Find for each query the training images that explain it best, and their residuals.

    Args:
        queries: `(N, 3, SIDE, SIDE)` of `prepare`.
        training: `(M, 3, SIDE, SIDE)`.
        not_allowed: bool `(N, M)`, pairs to leave out: an image and itself, or its duplicates.
        renditions: further versions of the training images in their order, each `(M, 3, SIDE, SIDE)`.
        poses: `Poses(training)`, made once for many calls; None: it is made here.
        mirrored: search for mirror images too.
        batch: queries at a time.

    Example:
        >>> t = torch.rand(8, 3, SIDE, SIDE, generator=torch.manual_seed(0))
        >>> found = register(t[2:3].flip(3), t)
        >>> int(found.index[0, found.residual[0.7][0].argmin()])
        2
    """
    poses = poses or Poses(training)
    versions = [training, *renditions]
    inks = _whitened(_small(training))
    found: list[tuple[Tensor, dict[float, Tensor]]] = []
    with torch.no_grad():
        for start in range(0, len(queries), batch):
            x = queries[start : start + batch]
            barred = None if not_allowed is None else not_allowed[start : start + batch]
            found.append(_register(x, versions, inks, poses, barred, mirrored))
    index = torch.cat([i for i, _ in found]) if found else torch.empty(0, CANDIDATES, dtype=torch.int64)
    residual = {s: torch.cat([r[s] for _, r in found]) if found else torch.empty(0, CANDIDATES) for s in SCALES}
    return Registered(index, residual)


def _register(
    x: Tensor, versions: Sequence[Tensor], inks: Tensor, poses: Poses, barred: Tensor | None, mirrored: bool
) -> tuple[Tensor, dict[float, Tensor]]:
    training = versions[0]
    k = min(CANDIDATES, len(training))
    views = [x, x.flip(3)] if mirrored else [x]
    explained = _explained(_small(torch.stack(views, 1).flatten(0, 1)), inks).view(len(x), len(views), -1)
    if barred is not None:
        explained = explained.masked_fill(barred[:, None], -1)
    best = explained.flatten(1).topk(k, 1).indices
    still = torch.eye(2, 3).expand(len(x), k, 2, 3)
    index, flipped, theta = best % len(training), best >= len(training), still
    more, turned, start = poses.search(x, k, barred, mirrored)
    theta = torch.cat([theta, _refined(x, training, more, turned, start)], 1)
    index, flipped = torch.cat([index, more], 1), torch.cat([flipped, turned], 1)
    rows = torch.arange(len(x)).repeat_interleave(index.shape[1])
    pairs = torch.where(flipped.flatten()[:, None, None, None], x[rows].flip(3), x[rows])
    moved, inside = _moved(pairs, theta.flatten(0, 1), SIDE)
    out = {}
    for scale in SCALES:
        d = [_residual(moved, version[index.flatten()], inside, scale) for version in versions]
        out[scale] = torch.stack(d).amin(0).view(index.shape)
    if barred is not None:
        no = barred.gather(1, index)
        out = {scale: d.masked_fill(no, torch.inf) for scale, d in out.items()}
    return index, out


# --- the residual ----------------------------------------------------------------------------------------------------


def _residual(x: Tensor, t: Tensor, inside: Tensor, scale: float) -> Tensor:
    """Return D of pairs, `(B,)`: x and t `(B, 3, S, S)` in one frame, compared where `inside` `(B, 1, S, S)` is 1."""
    weight = inside.flatten(2)
    count = weight.sum(2).clamp_min(1)
    blurred = _blur(x, scale).flatten(2)
    best = torch.full((len(x), blurred.shape[2]), torch.inf)
    least = torch.full((len(x),), torch.inf)
    for blur in BLURS:
        known = torch.cat([_blur(t, math.hypot(scale, blur)).flatten(2), torch.ones_like(weight)], 1)
        left = (known * weight) @ known.transpose(1, 2) + 1e-2 * torch.eye(4)
        fit = torch.linalg.solve(left, (known * weight) @ blurred.transpose(1, 2))
        e = (blurred - fit.transpose(1, 2) @ known).square().sum(1) * weight[:, 0]
        mean = e.sum(1) / count[:, 0]
        better = mean < least
        best, least = torch.where(better[:, None], e, best), torch.minimum(mean, least)
    middle = (blurred * weight).sum(2, keepdim=True) / count[:, :, None]
    spread = (((blurred - middle) * weight).square().sum((1, 2)) / count[:, 0]).sqrt()
    share = _blur(inside, WINDOW).flatten(1)
    local = _blur(best.view(inside.shape), WINDOW).flatten(1) / share.clamp_min(0.05)
    seen = (weight[:, 0] > 0) & (share > 0.3)
    most = local.masked_fill(~seen, -torch.inf).amax(1)
    middle = local.masked_fill(~seen, torch.nan).nanmedian(1).values.nan_to_num(0.0)
    d = (most - middle).clamp_min(0).sqrt() / spread.clamp_min(FLAT)
    return d.masked_fill((spread < FLAT) | (weight.mean((1, 2)) < COVER), torch.inf)


def _blur(x: Tensor, deviation: float) -> Tensor:
    radius = int(3 * deviation + 0.5)
    if radius < 1:
        return x
    at = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-at.square() / (2 * deviation * deviation))
    kernel = kernel / kernel.sum()
    # A banded matrix from either side: what lies beyond the edge is the edge.
    place = (torch.arange(x.shape[-1])[:, None] + at.long()).clamp(0, x.shape[-1] - 1)
    band = torch.zeros(x.shape[-1], x.shape[-1]).scatter_add_(1, place, kernel.expand(len(place), -1).contiguous())
    return band @ x @ band.T


# --- which training images, still ------------------------------------------------------------------------------------


def _small(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, SIDE // _COARSE).flatten(2)


def _whitened(t: Tensor) -> Tensor:
    """Return channels of unit length at right angles to one another, centred: what affine maps of colours can make of t."""
    t = t - t.mean(2, keepdim=True)
    value, vector = torch.linalg.eigh((t @ t.transpose(1, 2)).double())
    kept = value > value[:, -1:].clamp_min(1e-9) * 1e-3
    turn = vector * (value.clamp_min(1e-12).rsqrt() * kept)[:, None, :]
    return turn.transpose(1, 2).float() @ t


def _explained(x: Tensor, inks: Tensor) -> Tensor:
    """Return the share of x's variance that an affine map of colours of each training image explains, `(N, M)`."""
    x = x - x.mean(2, keepdim=True)
    total = x.square().sum((1, 2)).clamp_min(1e-9)
    products = x.flatten(0, 1) @ inks.flatten(0, 1).T
    return products.view(len(x), 3, len(inks), -1).square().sum((1, 3)) / total[:, None]


# --- in another pose -------------------------------------------------------------------------------------------------


def _theta(scale: Tensor, angle: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Return the map from the training image's frame to the query's, in [-1, 1], `(..., 2, 3)`."""
    c, s = scale * torch.cos(angle), scale * torch.sin(angle)
    return torch.stack([torch.stack([c, -s, dx], -1), torch.stack([s, c, dy], -1)], -2)


def _grid_of_poses() -> Iterator[tuple[float, float, float, float]]:
    near, far = (-0.125, 0.0, 0.125), (-0.25, -0.125, 0.0, 0.125, 0.25)
    for scale in (0.72, 0.79, 0.87, 0.93, 1.0, 1.07, 1.15, 1.26, 1.38):
        for dx in far:
            for dy in far:
                yield scale, 0.0, dx, dy
    for scale in (0.87, 1.0, 1.15):
        for degrees in (-12, -6, 6, 12):
            for dx in near:
                for dy in near:
                    yield scale, math.radians(degrees), dx, dy


class Poses:
    """Correlate queries in every pose of a grid with all training images, by brightness at 16 x 16.

    Example:
        >>> x = torch.rand(3, 3, SIDE, SIDE, generator=torch.manual_seed(0))
        >>> Poses(x).search(x[1:2], 1, None)[0].tolist()
        [[1]]
    """

    def __init__(self, training: Tensor) -> None:
        self.grid = torch.tensor(list(_grid_of_poses()))
        self.theta = _theta(*self.grid.T)
        small = _grey(training, _COARSE)
        self.mask = _moved(torch.ones(1, 1, _COARSE, _COARSE).expand(len(self.grid), -1, -1, -1), self.theta, _COARSE)[
            1
        ]
        self.mask = self.mask.flatten(1)
        self.flat = small.flatten(1)
        covered = self.mask.sum(1, keepdim=True).clamp_min(1)
        spread = self.mask @ self.flat.square().T - (self.mask @ self.flat.T).square() / covered
        self.length = spread.clamp_min(0).sqrt()  # (poses, M)
        self.usable = self.mask.mean(1) >= COVER

    def search(self, x: Tensor, k: int, barred: Tensor | None, both: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return the k best (row, mirrored, theta) of each query, one pose a training image."""
        index, mirrored, theta = [], [], []
        for i, one in enumerate(x):
            views = torch.cat([one[None], one[None].flip(3)]) if both else one[None]
            found = []
            for view in _grey(views, _COARSE):
                moved, _ = _moved(view[None].expand(len(self.theta), -1, -1, -1), self.theta, _COARSE)
                flat = moved.flatten(1) * self.mask
                flat = (flat - flat.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp_min(1)) * self.mask
                length = flat.norm(dim=1, keepdim=True)
                ncc = (flat @ self.flat.T).abs() / (length * self.length).clamp_min(1e-2)
                found.append(ncc.masked_fill(~self.usable[:, None], 0))
            score, pose = torch.cat(found).max(0)
            if barred is not None:
                score = score.masked_fill(barred[i], -1)
            rows = score.topk(k).indices
            index.append(rows)
            mirrored.append(pose[rows] >= len(self.theta))
            theta.append(self.grid[pose[rows] % len(self.theta)])
        return torch.stack(index), torch.stack(mirrored), torch.stack(theta)


def _refined(x: Tensor, training: Tensor, index: Tensor, mirrored: Tensor, start: Tensor) -> Tensor:
    """Return theta `(N, K, 2, 3)` after descending 1 - NCC^2 from the poses in `start` `(N, K, 4)`."""
    rows = torch.arange(len(x)).repeat_interleave(index.shape[1])
    pairs = torch.where(mirrored.flatten()[:, None, None, None], x[rows].flip(3), x[rows])
    source, target = _grey(pairs, _FINE), _grey(training[index.flatten()], _FINE)
    pose = start.flatten(0, 1).clone()
    pose[:, 0] = pose[:, 0].log()
    with torch.enable_grad():
        pose.requires_grad_(True)
        optimizer = torch.optim.Adam([pose], lr=_RATE)
        for step in range(_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * (1 - step / _STEPS)
            moved, inside = _moved(source, _theta(pose[:, 0].exp(), *pose[:, 1:].T), _FINE)
            count = inside.sum((1, 2, 3), keepdim=True).clamp_min(1)
            a = (moved - (moved * inside).sum((1, 2, 3), keepdim=True) / count) * inside
            b = (target - (target * inside).sum((1, 2, 3), keepdim=True) / count) * inside
            ncc2 = (a * b).sum((1, 2, 3)).square() / (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3)) + 1e-6)
            optimizer.zero_grad()
            (1 - ncc2).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    pose = pose.detach()
    return _theta(pose[:, 0].exp(), *pose[:, 1:].T).view(*index.shape, 2, 3)


def _moved(x: Tensor, theta: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return x in another frame, `(B, C, side, side)`, and where it has something to show, `(B, 1, side, side)`."""
    grid = functional.affine_grid(theta, [len(x), x.shape[1], side, side], align_corners=False)
    inside = (grid.detach().abs().amax(-1) <= 1).to(x.dtype)[:, None]
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False), inside


def _grey(x: Tensor, side: int) -> Tensor:
    return functional.avg_pool2d((x * _GREY[:, None, None]).sum(1, keepdim=True), SIDE // side)
