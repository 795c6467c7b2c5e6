"""Settings that need a package which most people lack, and what must not change when a run resumes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ambient_sd.errors import UserError
from ambient_sd.training.config import TrainConfig

# They change the samples, the loss or the weights: a checkpoint written with others belongs to another run.
IDENTITY = ("snr_gamma", "noise_offset", "input_perturbation", "use_ema", "use_8bit_adam", "lora_dropout", "use_dora")


def check_packages(config: TrainConfig) -> None:
    """Check that the packages of optional settings are installed, before anything else.

    Raises:
        UserError: one is missing.
    """
    for given, flag, package in (
        (config.use_8bit_adam, "use_8bit_adam", "bitsandbytes"),
        (config.enable_xformers_memory_efficient_attention, "enable_xformers_memory_efficient_attention", "xformers"),
        (config.report_to == "wandb", "report_to wandb", "wandb"),
    ):
        if given and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} is given", rule=f"the package {package} is not installed",
                            remedy=f"pip install {package}, or leave it out")  # fmt: skip


def adamw(eight_bits: bool) -> Any:
    """Return the class of the optimizer."""
    if not eight_bits:
        return torch.optim.AdamW
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit
