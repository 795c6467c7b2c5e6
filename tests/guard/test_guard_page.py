from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
from guard_calibration import calibration

from ambient_sd.families import SUPPORTED
from ambient_sd.guard.calibration import AnisotropyTerms, Entry
from ambient_sd.utils.estimate import Estimate

PAGE = (Path(__file__).parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")


def test_the_pages_code_runs_as_written(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 7
    code, swapped = re.subn(r'^model = ".*$', "model = tiny_base", "\n".join(blocks), flags=re.MULTILINE)
    assert swapped == 1
    assert code.count('"my-model"') == 1
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_base)
    entries, terms = [Entry(0, 4, 1.0, Estimate(0.01, 0.0, 0.05, 500))], AnisotropyTerms(1.0, 2.0, 41)
    calibration(pipe, entries=entries, anisotropy=terms).save(tmp_path)
    code = code.replace('"my-model"', "calibrated")
    exec(compile(code, "docs/guard.md", "exec"), {"tiny_base": tiny_base, "calibrated": tmp_path})
    assert "a quetzal" in capsys.readouterr().out


def test_the_page_lists_the_supported_pipelines_and_they_exist() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| pipelines"))
    assert tuple(re.findall(r"`(\w+)`", row)) == SUPPORTED
    assert all(hasattr(diffusers, name) for name in SUPPORTED if name != "AmbientSDPipeline")
