"""The base model as the teacher of its own fine-tune.

    s_t > s_d    loss = || f(x_t, t, c) - f_base(x_t, t, c) ||^2          f_base: the network before training, without gradient

Above `distill_level` the target is what the base already says, so no image is learnt there; what the base knows stays. It is the loss of
"Learning without Forgetting" (Li and Hoiem, ECCV 2016), at some noise levels. Under an adapter the base is the network without it; of
a whole fine-tune a frozen copy is held, in the precision of the run's arithmetic.

`c` of the base may lack words that it does not know (`distill_without`): of a trigger word it would draw what that word happens to mean to it, and
this would be learnt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ambient_sd.families.base import Base
from ambient_sd.families.lora import switched_off


class Teacher:
    """Give the base's network, as it was before training.

    Args:
        base: of the run.
        network: the one that is trained.
        text: text encoders whose adapters are trained, by name.
        lora: an adapter is trained; else the base's weights are loaded once more.
        dtype: of the copy.
        device: of the copy.

    Example:
        >>> import tempfile
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.base import check_base
        >>> (pipe := tiny_pipeline()).save_pretrained(folder := tempfile.mkdtemp())
        >>> teacher = Teacher(check_base(folder), pipe.unet, {}, lora=False)
        >>> with teacher.acting() as network:
        ...     network is pipe.unet, torch.equal(network.conv_in.weight, pipe.unet.conv_in.weight)
        (False, True)
    """

    def __init__(
        self,
        base: Base,
        network: Any,
        text: Mapping[str, Any],
        *,
        lora: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._network, self._text = network, tuple(text.values())
        self._copy = None
        if not lora:
            copy = base.load(base.family.network).requires_grad_(False).eval()
            # diffusers' own `to` warns of parts that it would rather keep in float32.
            self._copy = torch.nn.Module.to(copy, device, dtype)

    @contextlib.contextmanager
    def acting(self) -> Iterator[Any]:
        """Lend the base's network, without gradients; text encoders are the base's meanwhile."""
        with torch.no_grad(), switched_off(self._network, *self._text):
            yield self._network if self._copy is None else self._copy
