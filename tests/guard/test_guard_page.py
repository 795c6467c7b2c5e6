from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest

from ambient_sd.guard.layouts import SUPPORTED

PAGE = (Path(__file__).parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")


def test_the_pages_code_runs_as_written(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 6
    code, swapped = re.subn(r'^model = ".*$', "model = tiny_base", "\n".join(blocks), flags=re.MULTILINE)
    assert swapped == 1
    exec(compile(code, "docs/guard.md", "exec"), {"tiny_base": tiny_base})
    assert "a quetzal" in capsys.readouterr().out


def test_the_page_lists_the_supported_pipelines_and_they_exist() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| pipelines"))
    assert tuple(re.findall(r"`(\w+)`", row)) == SUPPORTED
    assert all(hasattr(diffusers, name) for name in SUPPORTED if name != "AmbientSDPipeline")
