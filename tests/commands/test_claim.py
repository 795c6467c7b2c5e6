"""The demo's claim, as it stands in docs/demo.md, at full length: about eight minutes a seed on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambient_sd.commands.demo import DemoSettings
from ambient_sd.commands.demo.work import COPIES, run_demo
from ambient_sd.reporting.report import find


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ambient_copies_a_third_of_what_plain_copies_at_a_price_in_quality(seed: int, tmp_path: Path) -> None:
    report = run_demo(DemoSettings(output_dir=tmp_path / "out", seed=seed))
    plain, ambient = (run.row(COPIES).generated for run in report.runs)
    assert plain.value >= 0.3, "the control: without copies in the plain run there is nothing to reduce"
    assert ambient.value <= plain.value / 3
    assert find(report).kind in ("better", "trade"), "by the interval of the difference"
    # Broken samples copy nothing: the price is said, and bounded.
    distances = [run.row(report.quality).generated.value for run in report.runs]
    assert distances[1] <= 1.5 * distances[0]
