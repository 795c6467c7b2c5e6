"""Sample with the base at high noise and with the fine-tuned network below a noise level: other colours and tones, without training.

    s_t > level:  the base's prediction          composition, which the base has from elsewhere
    s_t <= level: the fine-tuned network's       style and detail, which it has from the training images

A fine-tuned network's memory of an image's composition and colours acts at high noise; a base trained on much data composes without
it. Shah et al. (ICML 2025) argue that memorization is needed at low noise only; nothing else of their method is used here. Contours known at
low noise come through: copies fall by measures of pixels, not by contours. docs/results.md has the figures.
"""

from __future__ import annotations

import math
from numbers import Real
from types import TracebackType
from typing import Any

import torch

from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError, one_line

_SAME = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "class_embed_type",
    "time_cond_proj_dim",
)


class BaseAbove:
    """Let a pipeline's fine-tuned U-Net act at noise levels up to `level` only, and its base above.

    It acts from construction to `remove()`, or as a context manager. Everything that calls the U-Net goes through it, the guard included:
    scores are then those of the two networks. The U-Net's weights are not touched, and it answers `state_dict` and the rest as before.
    Text encoder and VAE are the pipeline's own at all levels: what a fine-tune has changed there acts above the level too.

    Args:
        pipe: Stable Diffusion 1, 2 or XL, any pipeline with a U-Net.
        level: `s = sigma / alpha`, at least 0; from the model's largest level on the base is never used.
        base: the U-Net to use above, of the same kind (twice the memory); None: `pipe`'s own without its LoRA, which must be loaded
            and not fused.

    Raises:
        UserError: there is no U-Net or no adapter, the two U-Nets take other inputs, the level is no number, or one acts already.

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
        found = getattr(pipe, "unet", None)
        if not isinstance(found, torch.nn.Module):
            raise UserError(
                f"{type(pipe).__name__} has no U-Net",
                rule="Stable Diffusion 1, 2 and XL can be sampled with two networks",
            )
        unet: Any = found
        if not isinstance(level, Real) or isinstance(level, bool) or not level >= 0:
            raise UserError(f"level is {level!r}", rule="it must be a number of at least 0")
        if isinstance(unet.__dict__.get("forward"), _Switched):
            raise UserError("a base acts above a level already", remedy="call remove() first")
        if base is None:
            if not getattr(unet, "peft_config", None):
                raise UserError("the pipeline has no LoRA", rule="the base is the model without it",
                                remedy="load one and do not fuse it, or give the base's U-Net")  # fmt: skip
            if any(layer.disable_adapters for layer in _adapted(unet)):
                raise UserError(
                    "the LoRA is disabled", rule="it acts below the level", remedy="call enable_lora() first"
                )
            if getattr(pipe, "num_fused_loras", 0):
                raise UserError(
                    "the LoRA is fused", rule="the base is the model without it", remedy="call unfuse_lora() first"
                )
        elif not isinstance(base, torch.nn.Module) or not hasattr(base, "config"):
            raise UserError(
                f"base is {one_line(repr(base), 60)}",
                rule="it must be a U-Net",
                remedy="for example pipe.unet of the base's pipeline",
            )
        elif base is unet:
            raise UserError("the base is the pipeline's own U-Net", rule="above the level another one acts",
                            remedy="load the base's a second time, or leave base out for a LoRA")  # fmt: skip
        else:
            other = [name for name in _SAME if base.config.get(name) != unet.config.get(name)]
            if other:
                raise UserError(f"the base's U-Net has another {other[0]}: {one_line(base.config.get(other[0]), 60)}",
                                rule=f"it must be the fine-tuned one's, {one_line(unet.config.get(other[0]), 60)}")  # fmt: skip
            if base.dtype != unet.dtype:  # cast in place, it would no longer be what its owner has
                raise UserError(f"the base's U-Net is {base.dtype}", rule=f"it must be the fine-tuned one's, {unet.dtype}",
                                remedy="load both with the same dtype")  # fmt: skip
            base = base.to(unet.device).eval()
        schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        lowest = float(schedule.level(0))
        switch = -1.0 if level < lowest else math.inf if level >= schedule.max_level else schedule.timestep(level)
        self._unet: Any = unet
        self._before: Any = unet.__dict__.get("forward")  # some libraries put their own there
        self._own: _Switched = _Switched(unet, base, switch)
        unet.forward = self._own

    def remove(self) -> None:
        """Give the pipeline its U-Net back as it was; what others have put around it since stays, and the base acts no more."""
        self._own.off = True
        if self._unet.__dict__.get("forward") is self._own:
            if self._before is None:
                del self._unet.forward
            else:
                self._unet.forward = self._before

    def __enter__(self) -> BaseAbove:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def acting_base(unet: Any) -> torch.nn.Module | None:
    """Return the U-Net that stands in above a level, or None where none does (or it is the same one without its LoRA).

    Example:
        >>> acting_base(torch.nn.Linear(2, 2)) is None
        True
    """
    forward = unet.__dict__.get("forward")
    return forward.base if isinstance(forward, _Switched) and not forward.off else None


def base_acts(unet: Any) -> bool:
    """Say whether a base stands in above a level, be it another U-Net or the same one without its LoRA.

    Example:
        >>> base_acts(torch.nn.Linear(2, 2))
        False
    """
    forward = unet.__dict__.get("forward")
    return isinstance(forward, _Switched) and not forward.off


class _Switched:
    """Stand in for a U-Net's `forward`: that of the base at timesteps above the switch."""

    def __init__(self, unet: Any, base: Any, switch: float) -> None:
        self._unet, self._tuned, self.base, self._switch = unet, unet.forward, base, switch
        self.off = False

    def __call__(self, sample: torch.Tensor, timestep: Any, *args: Any, **options: Any) -> Any:
        if self.off:
            return self._tuned(sample, timestep, *args, **options)
        above = torch.as_tensor(timestep).flatten() > self._switch
        if not bool(above.any()):
            return self._tuned(sample, timestep, *args, **options)
        if not bool(above.all()):
            raise UserError(
                "timesteps of one call lie on both sides of the level", rule="images of a batch are denoised together"
            )
        if self.base is not None:
            return self.base(sample, timestep, *args, **options)
        # By hand: peft's switch turns gradients on as well, and all adapters, also of layers that were off.
        layers = [layer for layer in _adapted(self._unet) if not layer.disable_adapters]
        for layer in layers:
            layer._disable_adapters = True
        try:
            return self._tuned(sample, timestep, *args, **options)
        finally:
            for layer in layers:
                layer._disable_adapters = False


def _adapted(unet: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]
