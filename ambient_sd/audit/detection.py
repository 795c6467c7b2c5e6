"""How well a score tells memorized prompts from ordinary ones: ROC area, true positives at a false-positive rate, threshold.

    AUC         P(memorized > ordinary) + P(equal) / 2: the Mann-Whitney statistic over all pairs (Hanley & McNeil 1982)
    threshold   with k = floor(rate * n): halfway between the k-th and (k + 1)-th largest ordinary score, so that at most k of
                n ordinary scores reach it; just above the largest where k = 0
    TPR@FPR     share of memorized scores that reach that threshold

Intervals are 95 % and resample memorized and ordinary prompts apart, each prompt with all its images; the threshold is
found anew in every resample, since it is uncertain too. A score must be higher for memorized prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ambient_sd.audit.metrics import Resampler
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate, wilson

# Above the largest score by this part of it: the same image in another batch differs in its last digits.
_MARGIN = 1e-4


def auc(memorized: Tensor, ordinary: Tensor) -> float:
    """Compute `P(memorized > ordinary) + P(equal) / 2` over all pairs.

    Args:
        memorized: `(P,)` scores. ordinary: `(N,)` scores.

    Example:
        >>> auc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 3.0]))
        0.875
    """
    rising, scores = ordinary.double().sort().values, memorized.double()
    wins = torch.searchsorted(rising, scores, side="left")
    ties = torch.searchsorted(rising, scores, side="right") - wins
    return float((wins.double() + ties.double() / 2).sum() / (len(memorized) * len(ordinary)))


def threshold_at(ordinary: Tensor, rate: float) -> float:
    """Return the lowest threshold that at most `floor(rate * n)` of the n ordinary scores reach, as described above.

    Args:
        ordinary: `(N,)` scores, N >= 1.
        rate: in [0, 1).

    Example:
        >>> threshold_at(torch.arange(100.0), 0.05)
        94.5
    """
    falling = ordinary.double().sort(descending=True).values
    # 0.29 * 100 is 28.999999999999996: what is a whole number but for rounding is that number.
    k = math.floor(rate * len(falling) + 1e-9)
    while k > 0 and falling[k - 1] == falling[k]:  # equal scores are flagged together or not at all
        k -= 1
    if k == 0:
        return float(falling[0]) + _MARGIN * abs(float(falling[0]))
    return float((falling[k - 1] + falling[k]) / 2)


def tpr_at(memorized: Tensor, ordinary: Tensor, rate: float) -> float:
    """Compute the share of memorized scores that reach the threshold for `rate`.

    Example:
        >>> tpr_at(torch.tensor([50.0, 98.0]), torch.arange(100.0), 0.05)
        0.5
    """
    return float((memorized.double() >= threshold_at(ordinary, rate)).double().mean())


def detection_figures(
    memorized: Tensor,
    ordinary: Tensor,
    *,
    rate: float = 0.01,
    memorized_groups: Sequence[Hashable] | None = None,
    ordinary_groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[Estimate, Estimate]:
    """Estimate AUC and TPR at a false-positive rate, with intervals.

    Args:
        memorized: `(P,)` scores. ordinary: `(N,)` scores.
        rate: the false-positive rate of the second figure.
        memorized_groups, ordinary_groups: the prompt of each score; None: each its own.

    Raises:
        UserError: there are no scores of one kind.

    Example:
        >>> area, rate = detection_figures(torch.arange(90.0, 130.0), torch.arange(100.0), resamples=50)
        >>> area.show(2), rate.n
        ('0.99 [0.97, 1.00]', 40)
    """
    if len(memorized) == 0 or len(ordinary) == 0:
        raise UserError(f"{len(memorized)} memorized and {len(ordinary)} ordinary scores", rule="both kinds are needed")
    first, second = (
        Resampler(len(memorized), memorized_groups, seed),
        Resampler(len(ordinary), ordinary_groups, seed + 1),
    )
    picks = [(memorized[first.draw()], ordinary[second.draw()]) for _ in range(resamples)]
    measures: tuple[tuple[str, Callable[[Tensor, Tensor], float]], ...] = (
        ("AUC", auc),
        (f"TPR@{rate * 100:g}%FPR", lambda m, o: tpr_at(m, o, rate)),
    )
    figures = []
    for name, measure in measures:
        value = measure(memorized, ordinary)
        draws = torch.tensor([measure(m, o) for m, o in picks], dtype=torch.float64)
        low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        detail = f"{first.count} memorized, {second.count} ordinary prompts"
        if low == high:  # every resample agrees: resampling has nothing to say
            low, high = wilson(value, min(first.count, second.count))
            detail += f"; Wilson interval on {min(first.count, second.count)} prompts"
        figures.append(Estimate(value, low, high, len(memorized), name, seed, detail, draws))
    return figures[0], figures[1]
