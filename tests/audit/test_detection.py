"""ROC area and thresholds against torchmetrics, against sets whose answer is known, and over many draws."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from ambient_sd.audit.detection import auc, detection_figures, threshold_at, tpr_at
from ambient_sd.utils.errors import UserError


def draw(n: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_auc_equals_torchmetrics_also_with_ties() -> None:
    for digits in (6, 0):  # with 0 digits most pairs are ties
        memorized, ordinary = draw(40, 1.0, 1).round(decimals=digits), draw(90, 0.0, 2).round(decimals=digits)
        scores = torch.cat([memorized, ordinary])
        labels = torch.cat([torch.ones(40), torch.zeros(90)]).long()
        # Its argument must lie in [0, 1]; the rank of a score does not change under this map.
        expected = binary_auroc(((scores + 20) / 40).double(), labels)
        assert auc(memorized, ordinary) == pytest.approx(float(expected), abs=1e-6)
    assert auc(torch.tensor([2.0]), torch.tensor([1.0])) == 1 and auc(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5


@pytest.mark.parametrize(
    ("n", "rate", "flagged"), [(100, 0.01, 1), (100, 0.29, 29), (99, 0.01, 0), (500, 0.01, 5), (8, 0.5, 4)]
)
def test_threshold_lets_exactly_the_whole_part_of_rate_times_n_through(n: int, rate: float, flagged: int) -> None:
    ordinary = draw(n)
    threshold = threshold_at(ordinary, rate)
    assert int((ordinary >= threshold).sum()) == flagged
    # Rounding in the last digits of a score does not change the decision.
    assert int((ordinary * (1 + 1e-6) >= threshold).sum()) == flagged


def test_threshold_never_flags_more_than_asked_when_scores_are_equal() -> None:
    ordinary = torch.tensor([1.0] * 50 + [2.0] * 50)
    assert int((ordinary >= threshold_at(ordinary, 0.25)).sum()) == 0
    assert int((ordinary >= threshold_at(ordinary, 0.5)).sum()) == 50


def test_true_positives_at_a_rate_are_those_above_its_threshold() -> None:
    ordinary, memorized = torch.arange(100.0), torch.tensor([98.0, 98.4, 98.6, 150.0])
    assert tpr_at(memorized, ordinary, 0.01) == 0.5  # the threshold is 98.5


@pytest.mark.slow
def test_intervals_hold_the_true_auc_about_as_often_as_they_promise() -> None:
    # Two unit normals one apart: AUC = Phi(1 / sqrt 2).
    truth = 0.760250
    held = 0
    for seed in range(60):
        area, _ = detection_figures(draw(40, 1.0, seed), draw(60, 0.0, 1000 + seed), seed=seed, resamples=200)
        held += area.low <= truth <= area.high
    assert held >= 51  # 95 % promised; under 85 % has a chance of 0.2 % if true


def test_images_of_one_prompt_are_not_taken_for_independent_prompts() -> None:
    memorized, ordinary = draw(20, 1.0, 5).repeat_interleave(8), draw(20, 0.0, 6).repeat_interleave(8)
    groups = [i // 8 for i in range(160)]
    grouped, _ = detection_figures(memorized, ordinary, memorized_groups=groups, ordinary_groups=groups, resamples=300)
    naive, _ = detection_figures(memorized, ordinary, resamples=300)
    assert grouped.high - grouped.low > 2 * (naive.high - naive.low)


def test_perfect_separation_still_has_an_interval() -> None:
    area, rate = detection_figures(draw(10, 100.0), draw(30), resamples=50)
    assert area.value == rate.value == 1 and area.low < 0.8 and "Wilson" in area.detail
    with pytest.raises(UserError, match="0 memorized"):
        detection_figures(torch.zeros(0), draw(3))
