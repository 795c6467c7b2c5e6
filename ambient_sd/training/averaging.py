"""Moving average of the U-Net's weights: diffusers' `EMAModel`, saved and resumed without pickle and to the bit.

    shadow <- shadow - (1 - d)(shadow - weights)        d = min(0.9999, (1 + k) / (10 + k)) after k + 1 steps

Checkpoints hold `unet_ema/` in the layout of `EMAModel.save_pretrained`. A model that is spread over devices is not averaged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from ambient_sd.utils.errors import UserError

FOLDER = "unet_ema"
_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def check_distribution(kind: DistributedType) -> None:
    """Check that each process holds the whole model.

    Raises:
        UserError: it is spread over the processes (FSDP, DeepSpeed).

    Example:
        >>> check_distribution(DistributedType.MULTI_GPU)
    """
    if kind not in _WHOLE:
        raise UserError(
            f"use_ema is given and accelerate is set to {kind.value}",
            rule="the average needs every weight whole on each process, and there they are spread out",
            remedy="leave --use_ema out, or choose no distribution or multi-GPU in `accelerate config`",
        )


class Average:
    """Average a U-Net's weights over the steps of a run.

    Args:
        unet: the trained U-Net, weights in float32, already on its device.
        offload: keep the average in CPU memory between steps.
        foreach: update all tensors in one call.
        checkpoint: folder of a checkpoint to continue from; else the average begins as a copy of the weights.
        step: optimizer steps that the checkpoint must have averaged.

    Raises:
        UserError: the checkpoint's average is missing, damaged, or of another step.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> unet = tiny_pipeline().unet
        >>> average = Average(unet)
        >>> average.update()  # after each optimizer step
        >>> average.give()
    """

    def __init__(
        self, unet: Any, *, offload: bool = False, foreach: bool = False, checkpoint: Path | None = None, step: int = 0
    ) -> None:
        self.unet, self.offload = unet, offload
        self.device = next(unet.parameters()).device
        source, settings = unet, dict[str, Any]()
        if checkpoint is not None:
            source, settings = _read(checkpoint / FOLDER, step)
        self.model: Any = EMAModel(
            source.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, foreach=foreach
        )
        if len(self.model.shadow_params) != len(list(unet.parameters())) or any(
            a.shape != b.shape for a, b in zip(self.model.shadow_params, unet.parameters(), strict=True)
        ):
            raise UserError(f"{checkpoint}/{FOLDER} belongs to another U-Net", remedy="resume from another checkpoint")
        self.model.load_state_dict(settings)
        self.model.to("cpu" if offload else self.device)

    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        if self.offload:
            self.model.to(self.device)
        self.model.step(self.unet.parameters())
        if self.offload:
            self.model.to("cpu")

    def save(self, checkpoint: Path) -> None:
        """Write `checkpoint/unet_ema/`."""
        # It builds a fresh model to fill, and a fresh model draws from the global generator.
        with torch.random.fork_rng(devices=[]):
            self.model.save_pretrained(checkpoint / FOLDER)

    def give(self) -> None:
        """Replace the trained weights of the U-Net by their average, for good."""
        self.model.copy_to(self.unet.parameters())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Lend the averaged weights to the U-Net; the trained ones are put back whatever happens."""
        self.model.store(self.unet.parameters())
        try:
            self.model.copy_to(self.unet.parameters())
            yield
        finally:
            self.model.restore(self.unet.parameters())


def _read(folder: Path, step: int) -> tuple[Any, dict[str, Any]]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
        settings = {name: config[name] for name in names}
        # EMAModel.from_pretrained would fall back to .bin files, which are pickles.
        model = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # OSError, JSON errors, KeyError, SafetensorError, RuntimeError
        raise UserError(f"{folder} cannot be read", rule=f"{type(error).__name__}: {error}"[:300],
                        remedy="resume from another checkpoint, or without --use_ema in another folder") from None  # fmt: skip
    if settings["optimization_step"] != step:
        raise UserError(f"{folder} averages {settings['optimization_step']} steps", rule=f"its checkpoint has {step}",
                        remedy="resume from another checkpoint")  # fmt: skip
    return model, settings
