"""A U-Net spread over the processes (FSDP2, torch's `fully_shard`), each weight cut along its first axis.

    w_r = rows of process r        gradients: mean over processes, then cut the same way; moments live with their rows

Each process holds 1 / N of weights, gradients and moments, and gathers a block's weights for as long as it computes with
them. What is written is whole: results and checkpoints are those of a run that was not spread, and continue in either kind.
accelerate does the spreading; this file holds what it leaves out or would do otherwise. Not done here: FSDP 1, DeepSpeed,
weights in CPU memory, tensor parallelism; they are refused because none was tested.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ambient_sd.training import averaging
from ambient_sd.training.config import LYCORIS, MOVED_BASE, TrainConfig
from ambient_sd.utils.errors import UserError


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def is_asked() -> bool:
    """Say whether accelerate was told to spread the model.

    Example:
        >>> is_asked()
        False
    """
    return _asked("ACCELERATE_USE_FSDP")


def check(config: TrainConfig) -> None:
    """Check what `accelerate launch` asks for, before anything else.

    Raises:
        UserError: DeepSpeed, or a kind of FSDP or a setting that does not go with it.

    Example:
        >>> check(TrainConfig("base-model", train_data_dir="my-images"))  # no FSDP is asked for
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        if config.use_ema:
            averaging.check_distribution(DistributedType.DEEPSPEED)
        raise UserError(
            "accelerate is set to DEEPSPEED",
            rule="this trainer was never tested under it",
            remedy="use configs/accelerate/fsdp2.yaml; with fsdp_reshard_after_forward: false it spreads what ZeRO-2 does",
        )
    if not is_asked():
        return
    if config.use_ema:
        averaging.check_distribution(DistributedType.FSDP)
    for wrong, what, rule, remedy in (
        (os.environ.get("FSDP_VERSION", "1") != "2", "fsdp_version is not 2", "version 1 hides the weights in flat tensors",
         "set fsdp_version: 2"),
        (_asked("FSDP_CPU_RAM_EFFICIENT_LOADING"), "fsdp_cpu_ram_efficient_loading is true",
         "all processes but the first would encode captions with a text encoder without weights", "set it to false"),
        (_asked("FSDP_OFFLOAD_PARAMS"), "fsdp_offload_params is true", "this trainer was never tested with it", "set it to false"),
        (_asked("FSDP_ACTIVATION_CHECKPOINTING"), "fsdp_activation_checkpointing is true",
         "it renames the weights", "set it to false, and give --gradient_checkpointing"),
        (_asked("ACCELERATE_USE_PARALLELISM_CONFIG"), "a parallelism_config is given", "this trainer was never tested with it",
         "leave it out"),
        ((config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16",
         "mixed_precision is fp16 under FSDP", "this trainer was never tested with it", "use bf16"),
        (_asked("ACCELERATE_USE_CPU") and torch.accelerator.is_available(),
         "FSDP on CPUs is asked for, and there is an accelerator", "torch would spread the model over that",
         "hide it, such as with CUDA_VISIBLE_DEVICES=''"),
        (config.lora_init in MOVED_BASE, f"lora_init is {config.lora_init} under FSDP", "the start of each weight would have to be cut as the weight is",
         "use gaussian, or no FSDP"),
        (config.lora_min_rank is not None, "lora_min_rank is given under FSDP", "this trainer was never tested with it", "leave it out"),
        (config.lora_kind in LYCORIS, f"lora_kind is {config.lora_kind} under FSDP", "this trainer was never tested with it", "use lora, or no FSDP"),
        (config.objective == "distill" and not config.lora, "objective is distill under FSDP", "the base would lie whole on each process",
         "use lora, objective ambient or plain, or no FSDP"),
        (config.train_text_encoder, "train_text_encoder is given under FSDP", "this trainer was never tested with it", "leave it out"),
        (config.quantize_base is not None, "quantize_base is given under FSDP", "codes are not cut", "leave it out"),
        (config.use_8bit_adam, "use_8bit_adam is given under FSDP", "its kernels know no cut weights", "leave it out"),
    ):  # fmt: skip
        if wrong:
            raise UserError(what, rule=rule, remedy=remedy)


def enable(accelerator: Accelerator) -> None:
    """Complete accelerate's choice of FSDP2: on CPUs too, with gradients summed in float32.

    Example:
        >>> from types import SimpleNamespace
        >>> enable(SimpleNamespace(state=None, distributed_type=DistributedType.NO, is_fsdp2=False))  # nothing to complete
    """
    state = accelerator.state
    if is_asked() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate 1.15 reads the FSDP settings for accelerators only, and keeps whole models on CPUs.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # accelerate would sum the gradients in bf16: eight bits, where processes with whole models sum in 24.
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )


def choose_blocks(accelerator: Accelerator, network: Any) -> None:
    """Have FSDP2 gather the network block by block: by those of the settings' classes that it has, else by its own (`_no_split_modules`).

    accelerate takes the settings' alone, and refuses a class that the network lacks: a file for U-Nets would not do for transformers.

    Example:
        >>> from types import SimpleNamespace
        >>> choose_blocks(SimpleNamespace(is_fsdp2=False), torch.nn.Linear(2, 2))  # nothing to choose
    """
    if not accelerator.is_fsdp2:
        return
    plugin, there = accelerator.state.fsdp_plugin, {type(module).__name__ for module in network.modules()}
    own = [name for name in plugin.transformer_cls_names_to_wrap or () if name in there]
    plugin.transformer_cls_names_to_wrap = own or [name for name in network._no_split_modules or () if name in there]


def is_spread(unet: Any) -> bool:
    """Say whether a U-Net's weights are cut.

    Example:
        >>> is_spread(torch.nn.Linear(2, 2))
        False
    """
    # Its parameters do not tell: those outside of all blocks stay gathered from a forward pass to the next backward one.
    return isinstance(unet, FSDPModule)


def whole_unet(unet: Any) -> Any:
    """Return a U-Net that can be saved; to be called by every process.

    Returns:
        `unet` itself if it is not spread. Else, on the first process, another one with the weights gathered in
        CPU memory (of a LoRA only the trained ones: the others stay without storage); None on the others.

    Example:
        >>> unet = torch.nn.Linear(2, 2)
        >>> whole_unet(unet) is unet  # it is not spread
        True
    """
    if not is_spread(unet):
        return unet
    lora = bool(getattr(unet, "peft_config", None))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=lora)
    weights = get_model_state_dict(unet, options=options)
    if torch.distributed.get_rank() != 0:
        return None
    # A fresh model could draw from the global generator.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        whole: Any = _plain_class(unet).from_config(unet.config)
        if lora:
            whole.add_adapter(unet.peft_config["default"])
    whole.register_to_config(_name_or_path=unet.config._name_or_path)
    absent, unknown = whole.load_state_dict(weights, strict=not lora, assign=True)
    assert not unknown and not any("lora_" in name for name in absent)
    return whole


def _plain_class(unet: Any) -> Any:
    """Return the class of a network from before it was spread: FSDP2 puts one of its own in front."""
    return next(kind for kind in type(unet).__mro__ if kind.__module__.startswith("diffusers."))


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's `state_dict` with every tensor whole, on the first process; to be called by every process.

    Example:
        >>> sorted(whole_state(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())))
        ['param_groups', 'state']
    """
    packed = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for i, slots in packed["state"].items():
        state[i] = {}  # not `slots`, which the optimizer still needs
        for name, value in _flat(slots).items():
            # Every process takes part, one tensor at a time; the others drop what they got, or need not copy what they hold.
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if first:
                state[i][name] = whole.cpu()
    return {**packed, "state": state}


def _flat(slots: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state of one weight as tensors by name: bitsandbytes nests its own, shares tables and counts steps in a Python number."""
    found: dict[str, torch.Tensor] = {}
    for name, value in slots.items():
        if isinstance(value, Mapping):
            found |= {inner: tensor.clone() for inner, tensor in _flat(value).items()}
        else:
            found[name] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def cut(slots: Mapping[int, Mapping[str, torch.Tensor]], optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """Cut whole moments as the weights of `optimizer` are cut; as they are where those are whole.

    Args:
        slots: by number of the weight, as in `state_dict`, the state's tensors. Every process has all of them.
        optimizer: after `Accelerator.prepare`.

    Example:
        >>> optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
        >>> cut({0: {"exp_avg": torch.zeros(2, 2)}}, optimizer)[0]["exp_avg"].shape  # its weights are whole
        torch.Size([2, 2])
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        i: {
            name: distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            if isinstance(p := weights[i], DTensor) and value.shape == p.shape and value.ndim
            else value
            for name, value in named.items()
        }
        for i, named in slots.items()
    }
