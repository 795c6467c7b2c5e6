from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import tiny
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ambient_sd.guard import policies

PAGE = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")


def test_the_code_on_the_policies_page_runs_as_written(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = tiny.tiny_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
    code, swapped = re.subn(r'^model = ".*$', "model = tiny_base", code, flags=re.MULTILINE)
    code, also = re.subn(r'^lora = ".*$', "lora = my_lora", code, flags=re.MULTILINE)
    assert swapped == also == 1
    exec(compile(code, "docs/policies.md", "exec"), {"tiny_base": tiny_base, "my_lora": str(tmp_path)})
    assert "a quetzal" in capsys.readouterr().out


def test_the_policies_page_gives_the_signatures_and_defaults_of_classes_that_exist() -> None:
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", PAGE, flags=re.MULTILINE)
    assert len(rows) >= 11
    for name, given in rows:
        if name == "Compose":
            continue
        found = [
            p.name
            if p.default is p.empty
            else f"{p.name}={p.default:g}"
            if isinstance(p.default, float)
            else f"{p.name}={p.default}"
            for p in inspect.signature(getattr(policies, name)).parameters.values()
        ]
        # A row may leave out arguments from the end.
        assert ", ".join(found).startswith(given), name
