"""LoRA on the U-Net through peft: attach, save, load.

    W' = W + (alpha / rank) B A          A gaussian, B zero: training starts at the base model

The saved file holds rank, alpha and target modules as metadata; without them a reader must guess alpha = rank and the
update comes back at the wrong scale. Merging and other programs' formats are not done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from ambient_sd.errors import UserError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def check_targets(unet_config: dict[str, Any], targets: Sequence[str]) -> None:
    """Check that every target names a layer of the U-Net, without building its weights.

    Raises:
        UserError: a name fits no layer.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    names = [name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names if not name[-1].isdigit()})
            raise UserError(
                f"lora_target_modules names {target!r}",
                rule="no linear or convolution layer of the U-Net has this name or ending",
                remedy=f"some that exist: to_out.0, {', '.join(ends[:12])}",
            )


def attach(unet: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Add a LoRA in float32 to a U-Net whose own weights are frozen from here on.

    Args:
        unet: UNet2DConditionModel, any dtype.
        rank: r.
        alpha: the update is scaled by alpha / r.
        targets: layer names.
        seed: seed of the gaussian start of A.
    """
    unet.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))  # type: ignore[arg-type]
    # peft draws from the global generator: borrow it with our seed, and give it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(settings)
    # Trained weights in half precision lose small updates, and the fp16 scaler refuses them.
    cast_training_params(unet, dtype=torch.float32)


def save(unet: Any, folder: Path) -> None:
    """Write the LoRA with its metadata to `folder/pytorch_lora_weights.safetensors`."""
    settings = unet.peft_config["default"].to_dict()
    # The base's path on this machine is nobody's business, and neither are sets JSON.
    settings["base_model_name_or_path"] = None
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        unet_lora_adapter_metadata=plain,
    )


def load(unet: Any, folder: Path) -> None:
    """Read weights that `save` wrote into a U-Net with the same adapter attached.

    Raises:
        UserError: the file is missing or damaged, or belongs to another adapter.
    """
    path = folder / WEIGHTS_NAME
    try:
        state = {k.removeprefix("unet."): v for k, v in load_file(path).items()}
        result: Any = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(state), adapter_name="default")
    except Exception as error:  # SafetensorError, OSError, shape mismatch (RuntimeError)
        raise UserError(
            f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300], remedy="use another checkpoint"
        ) from None
    if getattr(result, "unexpected_keys", None):
        raise UserError(f"{path} belongs to another adapter", rule=f"unknown weight {result.unexpected_keys[0]}")
