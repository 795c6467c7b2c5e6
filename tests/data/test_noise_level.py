"""The level that an image set proposes: against closed forms on sets whose geometry is known, and blind to duplicates."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.data import noise_level as levels
from ambient_sd.data.noise_level import GRID, NoiseLevels, measure, representatives
from ambient_sd.data.sources import load_rows
from ambient_sd.utils.errors import UserError


def cloud(count: int, side: int = 32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed))


def corners(count: int, distance: float, side: int = 8) -> torch.Tensor:
    """Images that all have one distance: scaled unit vectors."""
    x = torch.zeros(count, 4 * side * side)
    x[torch.arange(count), torch.arange(count)] = distance / math.sqrt(2)
    return x.reshape(count, 4, side, side)


@pytest.mark.parametrize("scale", [1.0, 0.2, 3.0])
def test_a_white_gaussian_cloud_gives_the_levels_of_the_closed_form(scale: float) -> None:
    # h = x / (1 + s^2) + ...: d1^2 = d s^2 / (1 + s^2), d2^2 = d / (1 + s^2) + d, so (d1 / d2)^2 = s^2 / (2 + s^2)
    # at unit variance: 1/9 at s = 1/2, 4/9 at s = sqrt(8/5); neighbours lie sqrt(2 d) apart.
    found = measure(cloud(64, scale=scale))
    assert found.copy == pytest.approx(0.5 * scale, rel=0.05)
    assert found.proposed == pytest.approx(math.sqrt(1.6) * scale, rel=0.06)
    assert found.overlap == pytest.approx(scale / math.sqrt(2), rel=0.05)
    for level, (_, ratio, _) in zip(found.levels, found.ratio_quantiles, strict=True):
        s = level / scale
        if s < 3:
            assert ratio == pytest.approx(s / math.sqrt(2 + s * s), rel=0.06)


def test_the_own_weight_is_that_of_two_equidistant_hypotheses() -> None:
    # With n images at one distance D the weight is 1 / (1 + sum_j exp(-D^2 / 2s^2 - D g_j / s)); the g_j are
    # Gaussian, correlated by 1/2. An independent draw of that expression in numpy is the reference.
    n, distance = 64, 6.0
    found = measure(corners(n, distance))
    generator = np.random.default_rng(0)
    common, each = generator.standard_normal((20_000, 1)), generator.standard_normal((20_000, n - 1))
    g = (common + each) / math.sqrt(2)
    for level, own in zip(found.levels, found.own, strict=True):
        expected = (1 / (1 + np.exp(-(distance**2) / (2 * level**2) - distance * g / level).sum(1))).mean()
        assert own == pytest.approx(expected, abs=0.06)
    assert found.nearest == pytest.approx((distance / 16,) * 3)
    assert found.overlap == pytest.approx(distance / 32)
    assert found.collapse is not None
    assert 1 < found.collapse < 4


def test_the_limits_are_certainty_and_chance() -> None:
    found = measure(corners(32, 1.0))
    assert found.own[0] == pytest.approx(1)
    assert found.own[-1] == pytest.approx(1 / 32, rel=0.05)


def test_images_left_out_lower_the_weight_as_if_they_were_there() -> None:
    m, n, distance = 200, 4000, 6.0
    drawn, alone = measure(corners(m, distance), total=n), measure(corners(m, distance))
    generator = np.random.default_rng(0)
    common, each = generator.standard_normal((1000, 1)), generator.standard_normal((1000, n - 1))
    g = (common + each) / math.sqrt(2)
    expected = [
        (1 / (1 + np.exp(-(distance**2) / (2 * s**2) - distance * g / s).sum(1))).mean() if s > 0.7 else 1.0
        for s in GRID
    ]
    wrong, uncorrected = (np.abs(np.array(found.own) - expected).max() for found in (drawn, alone))
    assert wrong < 0.15, "not zero: rare near misses among the 3,800 others are not among the 199"
    assert uncorrected > 2 * wrong, "without the correction it would be another set"


def test_a_lattice_overlaps_at_half_its_spacing() -> None:
    # 4 x 4 x 4 points of a lattice in 3 of 64 numbers, spacing 2: every nearest neighbour lies 2 away.
    x = torch.zeros(64, 64)
    x[:, :3] = 2.0 * torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    found = measure(x.reshape(64, 4, 4, 4))
    assert found.nearest == pytest.approx((2 / 8,) * 3, abs=1e-6)
    assert found.overlap == pytest.approx(2 / (2 * 8), abs=1e-6)


def test_speciation_is_the_root_of_the_largest_eigenvalue() -> None:
    x = cloud(200, side=8)
    direction = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    direction /= direction.norm()
    x = x + 30 * torch.randn(200, 1, 1, 1, generator=torch.Generator().manual_seed(6)) * direction
    expected = torch.linalg.eigvalsh(torch.cov(x.flatten(1).double().T, correction=0)).max().sqrt()
    assert measure(x).speciation == pytest.approx(float(expected), rel=1e-5)


def test_more_images_need_less_noise_and_the_schedule_bounds_it() -> None:
    x = cloud(512, side=4)
    few, many = measure(x[:32]), measure(x)
    assert many.proposed < few.proposed
    assert measure(x, max_level=0.456).proposed == 0.45


def test_where_no_copy_can_be_told_apart_the_level_is_no_higher_than_needed() -> None:
    # A thousandth of the images' contrast is their own: the collapse comes before anything is recovered.
    x = cloud(64, side=4, scale=10)[:1] + cloud(64, side=2, scale=0.02, seed=1).repeat(1, 1, 2, 2)
    found = measure(x)
    assert found.collapse is not None
    assert found.proposed <= found.collapse * 1.05


def test_the_same_latents_give_the_same_bits_and_equal_ones_count_once() -> None:
    x = cloud(40, side=8)
    assert measure(x) == measure(x.clone())
    twice = torch.cat([x, x])
    found: NoiseLevels = measure(twice)
    assert found.overlap == pytest.approx(measure(x).overlap, rel=0.02), "a copy at distance 0 is no neighbour"


def test_duplicates_do_not_change_the_level(tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path / "p", count=10)
    plain = load_rows(folder).check(near_duplicates=True)
    rows, total = representatives(plain)
    with (folder / "metadata.jsonl").open("a") as listing:
        for i in range(10):
            Image.open(folder / f"{i:03d}.png").resize((64, 64)).save(folder / f"again{i}.jpg", quality=95)
            listing.write(f'{{"file_name": "again{i}.jpg", "text": "again {i}"}}\n')
    doubled = load_rows(folder).check(near_duplicates=True)
    again, total_again = representatives(doubled)
    assert (len(rows), total) == (len(again), total_again) == (10, 10)
    assert len(load_rows(folder).check().one_of_each()) == 20, "without groups they would all count"


def test_a_large_set_is_represented_by_some_whatever_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "MOST", 20)
    images = load_rows(IMAGES, row_filter=[("subset_60", "=", "true")]).check()
    rows, total = representatives(images)
    turned = images.subset(range(59, -1, -1)).check()
    again, _ = representatives(turned)
    assert (len(rows), total) == (20, 60)
    assert [images.keys[i] for i in rows] == [turned.keys[i] for i in again]
    assert representatives(images, shapes=[i % 3 == 0 for i in range(60)])[1] == 40, "of the more frequent shape"


def test_too_few_images_and_broken_latents_are_refused(tmp_path: Path) -> None:
    few = load_rows(tiny.tiny_folder(tmp_path / "p", count=4)).check()
    for call, message in (
        (lambda: representatives(few), "4 distinct images"),
        (lambda: measure(cloud(4)), "m >= 8"),
        (lambda: measure(cloud(9) * math.nan), "not finite"),
        (lambda: measure(torch.ones(9, 4, 4, 4)), "same latent as all others"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_the_embedded_images_propose_a_level_between_a_copy_and_the_collapse() -> None:
    from diffusers import AutoencoderKL

    from ambient_sd.data.latents import encode_all
    from ambient_sd.data.views import ViewRule
    from ambient_sd.families.encoders import ImageEncoder
    from ambient_sd.families.sd import SD

    images = load_rows(IMAGES, row_filter=[("subset_60", "=", "true")]).check(near_duplicates=True)
    rows, total = representatives(images)
    encoder = ImageEncoder(SD, AutoencoderKL.from_pretrained(BASE / "vae").eval())
    found = measure(encode_all(encoder, images, ViewRule(64, True, False, True, 0), rows), total=total)
    assert found.proposed == pytest.approx(1.0, abs=0.05)
    assert found.copy and found.collapse
    assert found.copy < found.proposed < found.collapse
    assert GRID[0] < found.copy
