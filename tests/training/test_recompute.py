"""Gradient checkpointing of a share of the blocks: which are recomputed, with the same bits, in between of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ambient_sd.training.config import TrainConfig
from ambient_sd.training.footprint import predict
from ambient_sd.training.loop import run
from ambient_sd.training.plan import base_of
from ambient_sd.training.recompute import recompute
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]
RECOMPUTED: dict[str, Any] = {"gradient_checkpointing": True}


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_share_of_the_blocks_is_recomputed(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, found = tiny.tiny_sdxl_pipeline().unet.train(), list[str]()
    real = torch.utils.checkpoint.checkpoint

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        found.append(type(function.__self__).__name__)
        return real(function, *args, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    sizes = {"text_embeds": torch.zeros(1, 20), "time_ids": torch.zeros(1, 6)}
    counts = []
    for share in (1.0, fraction, fraction):
        recompute(unet, share)
        found.clear()
        unet(torch.zeros(1, 4, 16, 16), 0, torch.zeros(1, 5, 40), added_cond_kwargs=sizes)
        counts.append(len(found))
    assert counts[1] == counts[2] == int(counts[0] * fraction) > 2
    assert set(found) == {"ResnetBlock2D", "BasicTransformerBlock"}


def test_share_changes_memory_and_no_bit(settings: Settings) -> None:
    shares: dict[str, dict[str, Any]] = {"none": {}, "half": {**RECOMPUTED, "gradient_checkpointing_fraction": 0.5}, "all": RECOMPUTED}  # fmt: skip
    done = {name: run(settings(name, lora=False, **values), progress=False) for name, values in shares.items()}
    assert done["none"].losses == done["half"].losses == done["all"].losses
    file = "unet/diffusion_pytorch_model.safetensors"
    none, half = (load_file(Path(done[name].output) / file) for name in ("none", "half"))
    assert all(torch.equal(value, half[name]) for name, value in none.items())
    base = base_of(settings())
    bytes_of = [
        predict(settings(lora=False, train_batch_size=32, **values), base, (32, 32)).activations
        for values in shares.values()
    ]
    assert bytes_of == sorted(bytes_of, reverse=True) and len(set(bytes_of)) == 3


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"gradient_checkpointing_fraction": 0.5}, "gradient_checkpointing_fraction is given; it has no effect here"),
        ({**RECOMPUTED, "gradient_checkpointing_fraction": 0.0}, "gradient_checkpointing_fraction is 0.0; it must be above 0"),
        ({**RECOMPUTED, "gradient_checkpointing_fraction": 0.5, "compile": True}, "compile is given with gradient_checkpointing_fraction"),
    ],
)  # fmt: skip
def test_fractions_that_do_not_work_are_one_line(settings: Settings, values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings(**values)
    assert settings(**RECOMPUTED, gradient_checkpointing_fraction=1.0).gradient_checkpointing_fraction is None
