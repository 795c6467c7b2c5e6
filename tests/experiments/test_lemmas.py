"""Lemmas 4.1 and 4.2 on numbers: the closed forms against draws, with what would happen if the lemma were false."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import tiny
import torch

from ambient_sd.data.noise import image_noise
from ambient_sd.data.sources import load_rows
from ambient_sd.families.base import check_base
from ambient_sd.utils.errors import UserError
from experiments import lemmas

KEYS = [f"{i:02d}" for i in range(12)]


@pytest.fixture(scope="module")
def x0() -> torch.Tensor:
    return 2 * torch.randn(12, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def test_the_ambient_optimum_keeps_the_noise_of_the_closed_form_and_the_plain_one_none(x0: torch.Tensor) -> None:
    s_n = 0.7
    y_n = x0.double() + s_n * image_noise(KEYS, (4, 16, 16), seed=0).double()
    found, outputs = lemmas.optima(x0, y_n, s_n, seed=0)
    for one in found[:6]:
        assert one.identified == 1.0
        assert one.plain.value < 1e-6
        assert one.ambient.expected == pytest.approx(s_n / math.sqrt(1 - (s_n / one.level) ** 2))
        assert one.ambient.value == pytest.approx(one.ambient.expected, rel=0.02)
        assert one.ambient.low <= one.ambient.value <= one.ambient.high
    # Control: were the copies clean, the ambient optimum would return the images, and the same code says so.
    clean, _ = lemmas.optima(x0, x0.double(), s_n, seed=0)
    assert clean[2].ambient.value < 0.9 * found[2].ambient.value
    assert set(outputs) == {one.level for one in found}


def test_the_average_of_m_copies_keeps_noise_over_root_m_and_comes_as_near_as_the_closed_form(x0: torch.Tensor) -> None:
    found, _ = lemmas.leakage(x0, KEYS, 1.5, seed=0, copies=(1, 4, 16, 64))
    for leak in found:
        assert leak.residual.value == pytest.approx(1.5 / math.sqrt(leak.copies), rel=0.02)
        assert leak.residual.expected == pytest.approx(1.5 / math.sqrt(leak.copies))
        assert leak.ratio.value == pytest.approx(leak.ratio.expected, rel=0.05)
    assert (found[0].share, found[-1].share) == (0.0, 1.0)


def test_each_way_to_a_second_copy_leaks_as_its_closed_form_says_and_ours_does_not(
    tiny_base: Path, tmp_path: Path
) -> None:
    folder = tiny.tiny_folder(tmp_path / "p", size=32)
    images = load_rows(folder).check(near_duplicates=True)
    base = check_base(str(tiny_base), resolution=32)
    found = lemmas.ways_to_leak(base.images(), images, 2.0, seed=0)
    for way in found:
        # Where the VAE sees another image its difference is left too.
        slack = 0.35 if "before the VAE" in way["way"] or "JPEG" in way["way"] else 0.03
        assert way["value"] == pytest.approx(way["expected"], rel=slack), way["way"]
    safe = [w["value"] for w in found if w["expected"] == 1.0]
    leaks = [w["value"] for w in found if w["expected"] < 1.0]
    assert len(safe) == 3
    assert min(safe) > 1.1 * max(leaks)


def test_the_page_loads_nothing_and_is_the_same_twice(tiny_base: Path, tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path / "p", size=32)
    options = {
        "data": str(folder),
        "model": str(tiny_base),
        "row_filter": [],
        "resolution": 32,
        "level": 1.0,
        "seed": 0,
        "shown": 3,
    }
    for name in ("a", "b"):
        lemmas.study(tmp_path / name, **options)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["index.html", "lemma-4-1.png", "lemma-4-1.svg", "lemma-4-2-ratio.svg", "lemma-4-2.png", "lemma-4-2.svg",
                     "lemmas.json"]  # fmt: skip
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    page, table = (tmp_path / "a" / "index.html").read_text(), json.loads((tmp_path / "a" / "lemmas.json").read_text())
    assert not re.search(r"<script|(?<!xmlns=\")https?://|url\(", page)
    assert str(tmp_path) not in page + json.dumps(table)
    assert [leak["copies"] for leak in table["lemma_4_2"]] == [2**k for k in range(11)]
    with pytest.raises(UserError, match="level is 0"):
        lemmas.study(tmp_path / "c", **{**options, "level": 0.0})
    assert not (tmp_path / "c").exists()
