from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ambient_sd.training import validation
from ambient_sd.training.config import TrainConfig


@pytest.fixture(scope="package", autouse=True)
def few_sampling_steps() -> Iterator[None]:
    """No claim about training depends on how well its images are sampled: 3 steps in place of 25."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "INFERENCE_STEPS", 3)
        yield


@pytest.fixture
def settings(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a short LoRA training that moves its weights far."""

    def make(name: str = "out", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 3, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-2, "lora": True,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make
