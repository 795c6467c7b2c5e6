"""The demo's claim, as it stands in docs/demo.md, at full length: about ten minutes a seed on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambient_sd.audit.report import find
from ambient_sd.demo.run import COPIES, DemoSettings, run_demo


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ambient_copies_less_than_plain_and_its_pictures_are_no_worse(seed: int, tmp_path: Path) -> None:
    report = run_demo(DemoSettings(out=tmp_path / "out", seed=seed))
    plain, ambient = (run.row(COPIES).generated for run in report.runs)
    assert plain.value >= 0.3, "the control: without copies in the plain run there is nothing to reduce"
    assert ambient.value <= plain.value / 3
    assert find(report).kind == "better"
