from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from diffusers import UNet2DConditionModel

from ambient_sd.audit import registration
from ambient_sd.training import validation
from ambient_sd.training.config import TrainConfig


@pytest.fixture(scope="package", autouse=True)
def few_sampling_steps() -> Iterator[None]:
    """No claim about training depends on how well its images are sampled or laid over others: 3 steps of 25, 16 of 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "INFERENCE_STEPS", 3)
        patch.setattr(registration, "_STEPS", 16)
        yield


def short(base: Path, images: Path, folder: Path) -> Callable[..., TrainConfig]:
    def make(name: str = "out", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(base), "train_data_dir": str(images), "resolution": 32,
            "train_batch_size": 4, "max_train_steps": 3, "report_to": "none", "output_dir": str(folder / name),
            "learning_rate": 1e-2, "lora": True,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


@pytest.fixture
def settings(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a short LoRA training that moves its weights far."""
    return short(tiny_base, tiny_images, tmp_path)


@pytest.fixture(scope="module")
def shared_settings(
    tiny_base: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrainConfig]:
    """The same for a training that the tests of a module share."""
    return short(tiny_base, tiny_images, tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="package")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose U-Net is compiled and acted out fast: one block down, with attention, and one up."""
    pipe, folder = tiny.tiny_pipeline(), tmp_path_factory.mktemp("small")
    pipe.unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder
