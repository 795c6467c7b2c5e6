"""Density, coverage and MiFID: closed cases, a loop over the definitions, torchmetrics' own charge for copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from ambient_sd.audit.fidelity import copy_distance, coverage, density, inside, mifid, radii
from ambient_sd.audit.metrics import Row, _Given, frechet_distance, quality_rows
from ambient_sd.utils.errors import UserError


def test_density_and_coverage_of_a_case_that_can_be_counted_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # k = 1: radii 1, 1, 2, 7
    assert radii(real, 1).tolist() == [1.0, 1.0, 2.0, 7.0]
    made = torch.tensor([[0.5], [0.9], [4.5], [50.0]])
    hits = inside(made, real, radii(real, 1))
    # 0.5 and 0.9 lie in the balls of 0 and 1; 4.5 in those of 3 and 10; 50 in none.
    assert hits.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, True],
        [False] * 4,
    ]
    assert density(hits, 1) == 6 / 4 and coverage(hits) == 1.0
    assert coverage(hits[:2]) == 0.5  # two images at one place: as faithful, half as diverse
    assert density(hits[3:], 1) == 0.0


def test_density_and_coverage_equal_a_loop_over_their_definitions() -> None:
    g = torch.Generator().manual_seed(0)
    real, made, k = torch.randn(23, 4, generator=g), torch.randn(17, 4, generator=g) * 0.8, 5
    balls = [
        sorted(float((y - z).double().norm()) for j, z in enumerate(real) if j != i)[k - 1] for i, y in enumerate(real)
    ]
    near = [[float((x - y).double().norm()) < r for y, r in zip(real, balls, strict=True)] for x in made]
    hits = inside(made, real, radii(real, k))
    assert density(hits, k) == pytest.approx(sum(map(sum, near)) / (k * 17), abs=1e-12)
    assert coverage(hits) == pytest.approx(sum(any(row[i] for row in near) for i in range(23)) / 23, abs=1e-12)


def test_copies_of_the_real_images_have_density_and_coverage_one() -> None:
    real = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    hits = inside(real, real, radii(real))
    assert density(hits) == 1.0 and coverage(hits) == 1.0


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_mifid_equals_torchmetrics(spread: float) -> None:
    g = torch.Generator().manual_seed(2)
    training = torch.randn(60, 12, generator=g).double()
    made = (training[:50] + spread * torch.randn(50, 12, generator=g)).double()
    metric = MemorizationInformedFrechetInceptionDistance(feature=_Given(12), normalize=False)
    # torchmetrics takes the mean over its real set, the paper over the generated one: hand them over the other way round.
    metric.update(made, real=True)
    metric.update(training, real=False)
    ours = mifid(frechet_distance(made, training), copy_distance(made, training))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)
    charged = ours > 1.01 * frechet_distance(made, training)
    assert charged == (spread == 0.01)  # only near copies are charged for


def rows_of(made: Tensor, heldout: Tensor, training: Tensor) -> dict[str, Row]:
    found = quality_rows(made, heldout, name="vec", resamples=20, splits=4, training=training)
    return {row.name.removesuffix("-pca8"): row for row in found}


def test_quality_rows_tell_good_broken_and_copied_images_apart() -> None:
    g = torch.Generator().manual_seed(3)
    training, heldout, fresh = (torch.randn(n, 8, generator=g) for n in (100, 120, 90))
    good = rows_of(fresh, heldout, training)
    assert good["density-vec"].generated.value == pytest.approx(1.0, abs=0.25)
    assert (
        good["density-vec"].excess is not None and good["density-vec"].excess.low < 0 < good["density-vec"].excess.high
    )
    assert good["coverage-vec"].generated.value > 0.9
    broken = rows_of(fresh + 6, heldout, training)
    assert broken["density-vec"].generated.value < 0.05 and broken["coverage-vec"].generated.value < 0.1
    one = rows_of(fresh[:1] + 0.01 * fresh, heldout, training)  # the same image again and again
    assert one["coverage-vec"].generated.value < 0.5
    assert all("more is better" in good[name].generated.detail for name in ("density-vec", "coverage-vec"))
    copier = rows_of(training[:90] + 0.01 * fresh, heldout, training)
    assert copier["MiFID-vec"].generated.value > 20 * copier["FD-vec"].generated.value
    assert good["MiFID-vec"].generated.value == pytest.approx(good["FD-vec"].generated.value)


def test_too_few_real_images_are_refused() -> None:
    with pytest.raises(UserError, match="more than k = 5"):
        radii(torch.randn(5, 3))
