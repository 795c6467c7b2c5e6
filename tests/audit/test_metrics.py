"""Measures against closed forms, an independent matrix square root, and sets whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from ambient_sd.audit import metrics
from ambient_sd.audit.metrics import bootstrap, difference, frechet_distance, kid, measure
from ambient_sd.audit.neighbours import nearest
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate, wilson


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Vectors:
    """Stands for an extractor whose vectors are given; `measure` reads only its name, distance and quality."""

    def __init__(self, name: str = "vec", distance: str = "euclidean", quality: bool = True) -> None:
        self.name, self.distance, self.quality = name, distance, quality


# --- Frechet distance


def test_frechet_distance_equals_the_matrix_square_root_formula() -> None:
    a, b = draw(300, 12, seed=1) @ draw(12, 12, seed=2), draw(200, 12, seed=3) @ draw(12, 12, seed=4) + 1
    sa, sb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(sa @ sb).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(sa + sb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_approaches_the_closed_form_of_two_gaussians() -> None:
    # N(0, I) and N(mu, s^2 I): |mu|^2 + D (1 - s)^2.
    a, b = draw(40_000, 5, seed=5), 1.5 * draw(40_000, 5, seed=6) + 0.7
    assert frechet_distance(a, b) == pytest.approx(5 * 0.49 + 5 * 0.25, rel=0.02)


def test_frechet_distance_of_a_set_to_itself_is_zero_far_from_the_origin() -> None:
    a = (draw(80, 20, seed=7) + 1e4).float()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 1) == pytest.approx(20, rel=1e-3)


def test_frechet_distance_survives_fewer_samples_than_dimensions_and_is_then_biased_up() -> None:
    small = frechet_distance(draw(40, 100, seed=8), draw(40, 100, seed=9))
    large = frechet_distance(draw(4000, 100, seed=8), draw(4000, 100, seed=9))
    assert np.isfinite(small) and small > 10 * large  # one distribution: the truth is 0


# --- KID


def test_kid_equals_the_unbiased_estimator_written_as_a_double_loop() -> None:
    a, b = draw(9, 4, seed=10), draw(9, 4, seed=11) + 0.5
    k = lambda x, y: float((x @ y / 4 + 1) ** 3)  # noqa: E731
    n = 9
    within = sum(k(s[i], s[j]) for s in (a, b) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(k(x, y) for x in a for y in b) / n**2
    assert kid(a, b) == pytest.approx(within - 2 * across, rel=1e-10)


def test_kid_scatters_around_zero_for_one_distribution_and_not_for_two() -> None:
    same = torch.tensor([kid(draw(60, 8, seed=2 * s), draw(60, 8, seed=2 * s + 1)) for s in range(80)])
    assert same.mean().abs() < 3 * same.std() / 80**0.5
    assert (same < 0).any()
    moved = torch.tensor([kid(draw(60, 8, seed=2 * s), draw(60, 8, seed=2 * s + 1) + 0.5) for s in range(10)])
    assert (moved > same.max()).all()


def test_measures_leave_the_global_random_stream_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    rows = {"vec": draw(30, 6, seed=1)}
    measure(rows, rows, {"vec": draw(30, 6, seed=2)}, [Vectors()], resamples=5, quality_resamples=5)
    assert torch.equal(torch.rand(4), expected)


# --- intervals


@pytest.mark.slow
def test_bootstrap_interval_of_a_mean_covers_the_truth_about_95_percent_of_the_time() -> None:
    covered = 0
    for s in range(200):
        figure = bootstrap(draw(60, seed=s), torch.mean, name="mean", seed=s, resamples=200)
        covered += figure.low <= 0 <= figure.high
    assert 0.88 <= covered / 200 <= 0.99


def test_groups_widen_the_interval_of_samples_that_are_not_independent() -> None:
    # 20 prompts, 10 identical samples each: 200 rows carry the information of 20.
    values = draw(20, seed=1).repeat_interleave(10)
    groups = [i // 10 for i in range(200)]
    grouped = bootstrap(values, torch.mean, name="m", groups=groups)
    alone = bootstrap(values, torch.mean, name="m")
    assert (grouped.high - grouped.low) > 2.2 * (alone.high - alone.low)
    covered = 0
    for s in range(100):
        figure = bootstrap(draw(20, seed=s).repeat_interleave(10), torch.mean, name="m", groups=groups, resamples=100)
        covered += figure.low <= 0 <= figure.high
    assert covered >= 84


def test_share_of_zero_or_one_gets_a_wilson_interval_on_the_number_of_groups() -> None:
    figure = bootstrap(torch.zeros(40), torch.mean, name="share", groups=[i // 4 for i in range(40)], share=True)
    assert (figure.low, figure.high) == wilson(0.0, 10)
    assert figure.high == pytest.approx(1.959964**2 / (10 + 1.959964**2))
    assert "Wilson" in figure.detail and figure.draws is None
    assert wilson(1.0, 10) == (pytest.approx(1 - figure.high), 1.0)
    assert wilson(0.3, 50) == pytest.approx((0.19104, 0.43745), abs=2e-4)


def test_difference_is_paired_for_runs_resampled_together_and_combined_otherwise() -> None:
    base = draw(100, seed=1)
    a = bootstrap(base + 0.1, torch.mean, name="a", seed=4)
    b = bootstrap(base, torch.mean, name="b", seed=4)
    paired = difference(a, b)
    assert paired.value == pytest.approx(0.1) and paired.high - paired.low < 1e-9  # all that differs is the shift
    loose = difference(a, bootstrap(base, torch.mean, name="b", seed=5))
    assert loose.detail != paired.detail and loose.high - loose.low > 0.3
    # MOVER by hand on figures without draws.
    mover = difference(Estimate(0.5, 0.4, 0.7, 9, "a"), Estimate(0.2, 0.1, 0.3, 9, "b"))
    assert mover.low == pytest.approx(0.3 - (0.1**2 + 0.1**2) ** 0.5)
    assert mover.high == pytest.approx(0.3 + (0.2**2 + 0.1**2) ** 0.5)


@pytest.mark.slow
def test_frechet_interval_contains_its_expectation_at_this_sample_size() -> None:
    expected = np.mean([frechet_distance(draw(40, 6, seed=s), draw(40, 6, seed=s + 5000)) for s in range(100)])
    covered = 0
    for s in range(12):
        generated, heldout = draw(40, 6, seed=s + 100), draw(80, 6, seed=s + 300)
        row = metrics.quality_rows(generated, heldout, name="v", seed=s, resamples=40, project=6)[0]
        assert row.generated.low <= row.generated.value <= row.generated.high
        covered += row.generated.low <= expected <= row.generated.high
    assert covered >= 9


def test_resampling_is_reproducible_and_moves_with_its_seed() -> None:
    values = draw(50, seed=2)
    one, two, other = (bootstrap(values, torch.mean, name="m", seed=s) for s in (1, 1, 2))
    assert one == two and (one.low, one.high) != (other.low, other.high)


# --- copying


def test_exact_copies_are_all_memorized_and_held_out_images_are_not() -> None:
    training, heldout = draw(60, 32, seed=1), draw(120, 32, seed=2)
    copies = {"vec": training.repeat_interleave(2, 0)}
    groups = [i // 2 for i in range(120)]
    result = measure(
        copies, {"vec": training}, {"vec": heldout}, [Vectors()], groups, resamples=50, quality_resamples=10
    )
    row = result.row("memorized-vec")
    assert (row.generated.value, row.heldout.value, row.excess.value) == (1.0, 0.0, 1.0)
    assert row.excess.low > 0.8 and row.background is not None and row.background.value == 0.0
    assert row.generated.n == 120 and row.heldout.n == 120
    # Negative control: fresh draws from the same source are not copies either, and have no excess.
    fresh = measure({"vec": draw(120, 32, seed=3)}, {"vec": training}, {"vec": heldout}, [Vectors()], resamples=50)
    assert fresh.row("memorized-vec").generated.value == 0.0
    assert fresh.row("memorized-vec").excess.low < 0 < fresh.row("memorized-vec").excess.high


def test_copies_of_duplicates_count_when_exact_and_hide_when_near() -> None:
    training = torch.cat([draw(30, 16, seed=1), draw(30, 16, seed=1)[:5]])  # the first five images are there twice
    exact = nearest(training[:5], training)
    near = nearest(training[:5] + 1e-3 * draw(5, 16, seed=2), training)
    assert metrics.memorized(exact).all()
    assert not metrics.memorized(near).any()  # documented blindness: merge duplicates before the search
    merged = nearest(training[:5] + 1e-3 * draw(5, 16, seed=2), training[:30])
    assert metrics.memorized(merged).all()


def test_the_threshold_is_strict_and_one_third() -> None:
    training = torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    queries = torch.tensor([[1.0, 0.0], [0.999, 0.0], [1.001, 0.0]], dtype=torch.float64)
    assert metrics.memorized(nearest(queries, training)).tolist() == [False, True, False]


def test_cosine_features_give_similarities_with_thresholds() -> None:
    training, heldout = draw(40, 64, seed=1), draw(50, 64, seed=2)
    result = measure(
        {"SSCD": training * 3}, {"SSCD": training}, {"SSCD": heldout}, [Vectors("SSCD", "cosine", False)], resamples=20
    )
    assert result.row("SSCD mean").generated.value == pytest.approx(1)
    assert result.row("SSCD > 0.75").generated.value == 1.0 and result.row("SSCD > 0.75").heldout.value == 0.0
    assert result.row("SSCD 95th percentile").heldout.value < 0.6
    assert not any(row.name.startswith(("FD", "KID")) for row in result.rows)


# --- quality


def test_a_perfect_model_sits_on_the_floor_and_a_broken_one_above_it() -> None:
    heldout, training, sample = draw(120, 20, seed=1), draw(60, 20, seed=2), draw(60, 20, seed=3)
    perfect, broken = (
        measure({"vec": rows}, {"vec": training}, {"vec": heldout}, [Vectors()], resamples=20, quality_resamples=40)
        for rows in (sample, 1.5 * sample + 0.5)
    )
    for name in ("FD-vec-pca20", "KID-vec"):
        row = perfect.row(name)
        assert row.excess.low <= 0 <= row.excess.high, name
        assert broken.row(name).excess.low > 0, name
        assert "floor" in row.heldout.detail
    gain = difference(broken.row("KID-vec").generated, perfect.row("KID-vec").generated)
    assert gain.detail == "paired bootstrap" and gain.low > 0


def test_projection_is_named_and_shrinks_in_sight_when_samples_are_few() -> None:
    names = [row.name for row in metrics.quality_rows(draw(30, 100), draw(60, 100, seed=1), name="v", resamples=4)]
    assert names == ["FD-v-pca8", "KID-v"]
    assert metrics.quality_rows(draw(3, 100), draw(60, 100, seed=1), name="v") == []


def test_pca_basis_keeps_the_variance_it_claims() -> None:
    scale = torch.tensor([5.0, 3.0] + [0.1] * 18, dtype=torch.float64)
    basis, kept = metrics.pca_basis(draw(500, 20) * scale, 2)
    assert kept > 0.98 and basis.shape == (20, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("call", [
    lambda: frechet_distance(torch.zeros(1, 4), torch.zeros(9, 4)),
    lambda: kid(torch.zeros(5, 4), torch.zeros(9, 3)),
    lambda: bootstrap(torch.zeros(0), torch.mean, name="m"),
    lambda: bootstrap(torch.zeros(4), torch.mean, name="m", groups=["a"]),
])  # fmt: skip
def test_impossible_measures_are_refused_in_one_line(call: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_distances_wait_for_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def waits(*_: object, **__: object) -> None:
        raise AssertionError("it waits for the other processes")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "barrier", waits)
        points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
        assert kid(points + 1, points) > 0 and frechet_distance(points + 1, points) > 0
        with pytest.raises(AssertionError, match="waits"):  # what torchmetrics does by itself
            from torchmetrics.aggregation import CatMetric

            metric = CatMetric()
            metric.update(points)
            metric.compute()
    finally:
        dist.destroy_process_group()
