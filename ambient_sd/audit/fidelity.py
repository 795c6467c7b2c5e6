"""Density and coverage, and the Frechet distance that charges for copying: measures of features, `(n, D)`.

    B(y)       the ball around the real image y whose radius is the distance to its k-th nearest OTHER real image
    density    1 / (k M) sum over generated x, real y of [x in B(y)]        fidelity: 1 for equal distributions, may exceed it
    coverage   1 / N sum over real y of [some generated x in B(y)]          diversity: 1 - 1 / 2^k for equal distributions, M = N
    MiFID      FD / m  where m < eps, else FD; m = mean over generated x of min over training t of 1 - |cos(x, t)|

Density and coverage: Naeem, Oh, Uh, Choi, Yoo, ICML 2020 (arXiv 2002.09797, eq. 3 and 4), k = 5. MiFID: Bai, Lin, Raffel, Kan, KDD 2021
(arXiv 2106.03062), eps = 0.1 (torchmetrics takes m the other way round,
over its real images). The published MiFID is on Inception features; on others it carries their name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ambient_sd.audit.neighbours import Rows, blocks_of
from ambient_sd.utils.errors import UserError

NEAREST = 5
EPSILON = 0.1


def radii(real: Tensor, k: int = NEAREST) -> Tensor:
    """Return the radius of B(y) for every real image, float64 `(N,)`.

    Raises:
        UserError: there are no more than k real images.

    Example:
        >>> radii(torch.arange(4.0)[:, None], k=1).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if len(real) <= k:
        raise UserError(f"{len(real)} real images", rule=f"density and coverage need more than k = {k}")
    # The same arithmetic as in `inside`: what lies on the edge of a ball must not fall inside by rounding.
    return _distances(real, real).kthvalue(k + 1, dim=1).values


def inside(generated: Tensor, real: Tensor, radius: Tensor) -> Tensor:
    """Tell for every generated image in which balls it lies (open, as in the authors' code: a copy of y's k-th neighbour is outside), bool `(M, N)`.

    Example:
        >>> real = torch.arange(3.0)[:, None]
        >>> inside(torch.tensor([[0.5]]), real, radii(real, k=1)).tolist()
        [[True, True, False]]
    """
    return _distances(generated, real) < radius


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def density(hits: Tensor, k: int = NEAREST) -> float:
    """Compute the density from `inside`.

    Example:
        >>> density(torch.tensor([[True, True], [False, True]]), k=1)
        1.5
    """
    return float(hits.double().sum() / (k * len(hits)))


def coverage(hits: Tensor) -> float:
    """Compute the coverage from `inside`.

    Example:
        >>> coverage(torch.tensor([[True, False], [True, False]]))
        0.5
    """
    return float(hits.any(0).double().mean())


def copy_distance(generated: Tensor, training: Tensor | Rows) -> Tensor:
    """Return min over t of 1 - |cos(x, t)| for every generated image, float64 `(M,)`.

    Example:
        >>> copy_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])).tolist()
        [0.0]
    """
    if not training.shape[0]:
        raise UserError("0 training images", rule="at least one is needed")
    x = torch.nn.functional.normalize(generated.double(), dim=1)
    least = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for block in blocks_of(training, 8192):
        t = torch.nn.functional.normalize(block.double(), dim=1)
        least = torch.minimum(least, (1 - (x @ t.T).abs()).amin(1))
    return least.clamp_min(0)


def mifid(frechet: float, distances: Tensor, epsilon: float = EPSILON) -> float:
    """Compute FD / m where m, the mean of `distances`, is below `epsilon`, else FD.

    Example:
        >>> mifid(2.0, torch.tensor([0.5])), mifid(2.0, torch.tensor([0.05], dtype=torch.float64))
        (2.0, 40.0)
    """
    m = float(distances.mean())
    return frechet if m >= epsilon else frechet / max(m, 1e-15)
