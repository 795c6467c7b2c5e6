"""A LoRA whose rank depends on the noise level: few components at high noise, all at t = 0 (T-LoRA, Soboleva et al., AAAI 2026).

    W' x = W x + s B M(t) A x,   M(t) = diag(1, .., 1, 0, .., 0) with r(t) ones,   r(t) = r_min + floor((r - r_min) (T - t) / T)

Each sample of a batch has the mask of its own timestep, in training and in sampling alike; the schedule lies in the head of the adapter's
file. r is the rank of the layer, T the number of timesteps that the base was trained on. Text encoders see no timestep: their adapters
keep their whole rank. Ortho-LoRA, the paper's start from an SVD of noise, is not here.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sd.utils.errors import UserError, one_line

_KEY = "lora_rank_schedule"  # in the head of a file; diffusers refuses keys that it does not know only inside its own


@dataclass(frozen=True)
class RankSchedule:
    """Hold how many components of a LoRA act at a timestep.

    Attributes:
        min_rank: r_min, at t = T; a layer of no higher rank is never masked.
        num_train_timesteps: T.

    Example:
        >>> RankSchedule(min_rank=1).ranks(torch.tensor([0, 1, 500, 999]), 4).tolist()
        [4, 3, 2, 1]
    """

    min_rank: int
    num_train_timesteps: int = 1000

    def ranks(self, timesteps: Tensor, rank: int) -> Tensor:
        """Return r(t), `(B,)` long, of a layer of this rank at timesteps `(B,)`, whole or fractional."""
        total = self.num_train_timesteps
        left = (total - (timesteps.float() if timesteps.is_floating_point() else timesteps)).clamp(0, total)
        return self.min_rank + (max(rank - self.min_rank, 0) * left).floor_divide(total).long()

    @classmethod
    def read(cls, head: Mapping[str, str], label: str) -> RankSchedule | None:
        """Return the schedule that the head of an adapter's file states, or None.

        Raises:
            UserError: it cannot be read.
        """
        if _KEY not in head:
            return None
        try:
            found = cls(**json.loads(head[_KEY]))
            if not all(type(value) is int and value >= 1 for value in dataclasses.astuple(found)):
                raise ValueError("two whole numbers of at least 1 are needed")
        except (TypeError, ValueError, RecursionError):
            raise UserError(f"the adapter {label} has a head that cannot be read: {_KEY} is {one_line(head[_KEY], 80)}",
                            rule="without it the rank at a noise level is unknown", remedy="give the file as it was saved") from None  # fmt: skip
        return found


def install(network: Any, name: str, schedule: RankSchedule) -> None:
    """Mask the components of a loaded LoRA by timestep, from the next call of the network until the adapter is deleted or unloaded.

    Args:
        network: a U-Net of diffusers.
        name: of the adapter, plain LoRA.
        schedule: how many act when.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from peft import LoraConfig
        >>> unet = tiny_pipeline().unet
        >>> unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]), "mine")
        >>> install(unet, "mine", RankSchedule(min_rank=1))
        >>> installed(unet)
        {'mine': RankSchedule(min_rank=1, num_train_timesteps=1000)}
    """
    masks = _Masks(schedule)
    layers = [m for m in network.modules() if name in getattr(m, "lora_A", ())]
    if not layers:
        return
    # Not on the network itself: policies call its `forward`, which passes by hooks.
    handle = network.time_proj.register_forward_pre_hook(masks.begin)
    network.fuse_lora = _refuse  # before diffusers scales the first layer
    owner, others = weakref.ref(network), iter(range(len(layers) - 1))

    def end() -> None:
        if next(others, None) is None:  # the last layer's
            handle.remove()
            vars(owner() or masks).pop("fuse_lora", None)

    for layer in layers:
        layer.lora_variant[name] = masks
        weakref.finalize(layer.lora_A[name], end).atexit = False


def installed(network: nn.Module) -> dict[str, RankSchedule]:
    """Return the schedules that act in a network, by adapter.

    Example:
        >>> installed(nn.Linear(2, 2))
        {}
    """
    variants = [(m, name, v) for m in network.modules() for name, v in getattr(m, "lora_variant", {}).items()]
    return {name: v.schedule for m, name, v in variants if isinstance(v, _Masks) and name in m.lora_A}  # type: ignore[operator]


def head(network: nn.Module, name: str) -> dict[str, str]:
    """Return what the head of an adapter's file says of its schedule.

    Example:
        >>> head(nn.Linear(2, 2), "default")
        {}
    """
    found = installed(network).get(name)
    return {} if found is None else {_KEY: json.dumps(dataclasses.asdict(found), sort_keys=True)}


def _refuse(*_: Any, **__: Any) -> Any:
    raise UserError("a LoRA is fused whose rank depends on the noise level", rule="fused weights have one rank",
                    remedy="leave it loaded, or unload it before others are fused")  # fmt: skip


class _Masks:
    """Stand in for peft's LoRA forward in every layer of one adapter (its `LoraVariant`), and hold the timesteps of the call under way.

    They stay until the next call: gradient checkpointing evaluates layers again in the backward pass.
    """

    merge_safe = merge_unsafe = staticmethod(_refuse)

    def __init__(self, schedule: RankSchedule) -> None:
        self.schedule, self._timesteps = schedule, torch.empty(0)
        self._off: dict[tuple[int, torch.device], Tensor] = {}

    def begin(self, _: nn.Module, args: tuple[Tensor]) -> None:
        """Take the timesteps of a batch, `(B,)`; of one timestep for all only that, so that parts of the batch may be evaluated again."""
        self._timesteps, self._off = args[0][:1] if args[0].stride(0) == 0 else args[0], {}

    def forward(self, layer: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        down: Tensor = layer.lora_A[active_adapter](layer.lora_dropout[active_adapter](x))
        rank, place = layer.r[active_adapter], (layer.r[active_adapter], down.device)
        if place not in self._off:
            ranks = self.schedule.ranks(self._timesteps, rank)
            self._off[place] = (torch.arange(rank, device=ranks.device) >= ranks[:, None]).to(down.device)
        off = self._off[place]
        if len(off) not in (1, len(down)):
            raise RuntimeError(f"{len(off)} timesteps for {len(down)} samples")
        # (B, ..., r) of a linear layer, (B, r, h, w) of a convolution
        ones = [1] * (down.dim() - 2)
        off = off.view(len(off), rank, *ones) if isinstance(layer.lora_A[active_adapter], nn.Conv2d) else off.view(len(off), *ones, rank)  # fmt: skip
        return result + layer.lora_B[active_adapter](down.masked_fill(off, 0.0)) * layer.scaling[active_adapter]
