"""Sample with the base at high noise and with the fine-tuned network below a noise level: other colours and tones, without training.

    s_t > level:  the base's prediction          composition, which the base has from elsewhere
    s_t <= level: the fine-tuned network's       style and detail, which it has from the training images

A fine-tuned network's memory of an image's composition and colours acts at high noise; a base trained on much data composes without
it. Shah et al. (ICML 2025) argue that memorization is needed at low noise only; nothing else of their method is used here. Contours known at
low noise come through: copies fall by measures of pixels, not by contours. docs/results.md has the figures.
"""

from __future__ import annotations

import inspect
import math
from numbers import Real
from types import TracebackType
from typing import Any

import torch

from ambient_sd.families import layout_of, lora, network_of
from ambient_sd.families.guidance import Guidance
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError, one_line

_SAME = (
    "in_channels",
    "out_channels",
    "patch_size",
    "cross_attention_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "cap_feat_dim",
    "caption_channels",
    "guidance_embeds",
    "addition_embed_type",
    "class_embed_type",
    "time_cond_proj_dim",
)


class BaseAbove:
    """Let a pipeline's fine-tuned network act at noise levels up to `level` only, and its base above.

    It acts from construction to `remove()`, or as a context manager. Everything that calls the network goes through it, the guard included:
    scores are then those of the two networks. The network's weights are not touched, and it answers `state_dict` and the rest as before.
    Text encoder and VAE are the pipeline's own at all levels: what a fine-tune has changed there acts above the level too.

    Args:
        pipe: of any family (`ambient_sd.families`), with a U-Net or a transformer.
        level: `s = sigma / alpha`, of flow matching `sigma / (1 - sigma)`, at least 0; from the model's largest level on the base is never used.
        base: the network to use above, of the same kind (twice the memory); None: `pipe`'s own without its LoRA, which must be loaded
            and not fused.

    Raises:
        UserError: there is no network or no adapter, the two networks take other inputs, the level is no number, or one acts already.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe, base = tiny_pipeline(seed=1), tiny_pipeline(seed=0)
        >>> with BaseAbove(pipe, level=2.0, base=base.unet):
        ...     base_acts(pipe.unet)
        True
        >>> base_acts(pipe.unet)
        False
    """

    def __init__(self, pipe: Any, level: float, base: Any = None) -> None:
        network: Any = network_of(pipe)
        if not isinstance(network, torch.nn.Module):
            raise UserError(f"{type(pipe).__name__} has no network that is known here", rule="a fine-tuned U-Net or transformer acts below the level")  # fmt: skip
        if not isinstance(level, Real) or isinstance(level, bool) or not level >= 0:
            raise UserError(f"level is {level!r}", rule="it must be a number of at least 0")
        if isinstance(network.__dict__.get("forward"), _Switched):
            raise UserError("a base acts above a level already", remedy="call remove() first")
        if base is None:
            if not getattr(network, "peft_config", None):
                raise UserError("the pipeline has no LoRA", rule="the base is the model without it",
                                remedy="load one and do not fuse it, or give the base's network")  # fmt: skip
            if any(layer.disable_adapters for layer in _adapted(network)):
                raise UserError(
                    "the LoRA is disabled", rule="it acts below the level", remedy="call enable_lora() first"
                )
            if getattr(pipe, "num_fused_loras", 0):
                raise UserError(
                    "the LoRA is fused", rule="the base is the model without it", remedy="call unfuse_lora() first"
                )
        else:
            base = ready_base(network, base)
        schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        lowest = float(schedule.level(0))
        switch = -1.0 if level < lowest else math.inf if level >= schedule.max_level else schedule.timestep(level)
        self._network: Any = network
        self._before: Any = network.__dict__.get("forward")  # some libraries put their own there
        self._own: _Switched = _Switched(network, layout_of(pipe), base, switch)
        network.forward = self._own

    def remove(self) -> None:
        """Give the pipeline its network back as it was; what others have put around it since stays, and the base acts no more."""
        self._own.off = True
        if self._network.__dict__.get("forward") is self._own:
            if self._before is None:
                del self._network.forward
            else:
                self._network.forward = self._before

    def __enter__(self) -> BaseAbove:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def ready_base(network: Any, base: Any) -> torch.nn.Module:
    """Return the network of a fine-tune's base, on its device, or refuse what is none.

    Raises:
        UserError: it is no network, the fine-tuned one itself, or of another kind, with other inputs, or in another precision.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> ready_base(tiny_pipeline().unet, tiny_pipeline(seed=1).unet).training
        False
    """
    if not isinstance(base, torch.nn.Module) or not hasattr(base, "config"):
        raise UserError(
            f"base is {one_line(repr(base), 60)}",
            rule="it must be a U-Net or transformer",
            remedy="for example pipe.unet of the base's pipeline",
        )
    found: Any = base
    if found is network:
        raise UserError("the base is the pipeline's own network", rule="it must be another one",
                        remedy="load the base's a second time, or leave base out for a LoRA")  # fmt: skip
    if type(found) is not type(network):
        raise UserError(
            f"the base is a {type(found).__name__}",
            rule=f"it must be the fine-tuned one's kind, {type(network).__name__}",
        )
    other = [name for name in _SAME if found.config.get(name) != network.config.get(name)]
    if other:
        raise UserError(f"the base's network has another {other[0]}: {one_line(found.config.get(other[0]), 60)}",
                        rule=f"it must be the fine-tuned one's, {one_line(network.config.get(other[0]), 60)}")  # fmt: skip
    if found.dtype != network.dtype:  # cast in place, it would no longer be what its owner has
        raise UserError(f"the base's network is {found.dtype}", rule=f"it must be the fine-tuned one's, {network.dtype}",
                        remedy="load both with the same dtype")  # fmt: skip
    found = found.to(network.device).eval()
    assert isinstance(found, torch.nn.Module)
    return found


def acting_base(network: Any) -> torch.nn.Module | None:
    """Return the network that stands in above a level, or None where none does (or it is the same one without its LoRA).

    Example:
        >>> acting_base(torch.nn.Linear(2, 2)) is None
        True
    """
    forward = network.__dict__.get("forward")
    return forward.base if isinstance(forward, _Switched) and not forward.off else None


def base_acts(network: Any) -> bool:
    """Say whether a base stands in above a level, be it another network or the same one without its LoRA.

    Example:
        >>> base_acts(torch.nn.Linear(2, 2))
        False
    """
    forward = network.__dict__.get("forward")
    return isinstance(forward, _Switched) and not forward.off


class _Switched:
    """Stand in for a network's `forward`: that of the base at timesteps above the switch."""

    def __init__(self, network: Any, layout: Guidance, base: Any, switch: float) -> None:
        self._network, self._layout, self._tuned, self.base, self._switch = (
            network,
            layout,
            network.forward,
            base,
            switch,
        )
        self._place = [*inspect.signature(type(network).forward).parameters].index(layout.time) - 1
        self.off = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.off:
            return self._tuned(*args, **options)
        given = options[self._layout.time] if self._layout.time in options else args[self._place]
        time = torch.as_tensor(given).flatten()
        # A timestep that went through the network's units is that of the schedule but for rounding.
        slack = 0.0 if self._layout.timesteps == 1 else 4 * self._layout.timesteps * torch.finfo(time.dtype).eps
        above = self._layout.scheduler_time(time) > self._switch + slack
        if not bool(above.any()):
            return self._tuned(*args, **options)
        if not bool(above.all()):
            raise UserError(
                "timesteps of one call lie on both sides of the level", rule="images of a batch are denoised together"
            )
        if self.base is not None:
            return self.base(*args, **options)
        with lora.switched_off(self._network):
            return self._tuned(*args, **options)


def _adapted(network: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
