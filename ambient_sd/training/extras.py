"""Settings that need a package which most people lack, and what must not change when a run resumes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import cast

import torch

from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.errors import UserError

# They change the samples, the loss or the weights: a checkpoint written with others belongs to another run.
IDENTITY = ("snr_gamma", "noise_offset", "input_perturbation", "use_ema", "use_8bit_adam", "lora_dropout", "use_dora",
            "aspect_ratio_buckets", "memorization_threshold", "agc", "dropped_mean", "caption_mitigation", "caption_mitigation_p",
            "caption_noise_std", "fresh_copies", "logit_mean", "logit_std")  # fmt: skip


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


def adamw(eight_bits: bool) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes the optimizer.

    One fused kernel reads each weight once, where the default passes over all of them a dozen times: on a CPU a third of
    the optimizer's time, and no temporary copy of the weights.
    """
    if not eight_bits:
        return partial(torch.optim.AdamW, fused=True)
    import bitsandbytes

    return cast("Callable[..., torch.optim.Optimizer]", bitsandbytes.optim.AdamW8bit)
