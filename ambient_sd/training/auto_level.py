"""`ambient_level: auto` in a run: measured on the latents once, the same on every process, kept by the checkpoints.

Until the images are encoded the objective has `PROVISIONAL` as its level: what is checked and chosen before depends on
whether there is a level, not on its value. A resumed run takes the level of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ambient_sd.data.noise_level import measure, representatives
from ambient_sd.data.sources import ImageDataset
from ambient_sd.utils.errors import UserError

PROVISIONAL = 1.0


def of_checkpoint(state: Mapping[str, Any], name: str) -> tuple[float, str] | None:
    """Return the level that a checkpoint was trained with and where it is from; None if it is none of an ambient run.

    Example:
        >>> of_checkpoint({"identity": {"ambient_level": 0.8}}, "checkpoint-500")
        (0.8, 'as in checkpoint-500')
    """
    level = state["identity"].get("ambient_level")
    return (float(level), f"as in {name}") if isinstance(level, (int, float)) and level > 0 else None


def propose(
    images: ImageDataset,
    shapes: Sequence[Any],
    latents: Callable[[list[int]], torch.Tensor],
    accelerator: Accelerator,
    max_level: float,
) -> tuple[float, str]:
    """Measure the images on the first process; return its level and reason on all of them.

    Args:
        images: checked, with their groups.
        shapes: of each image's latent.
        latents: gives those of some rows; called by every process.
        accelerator: who is here.
        max_level: of the schedule.

    Raises:
        UserError: too few images, or their latents cannot be measured; on every process.

    Example:
        >>> from types import SimpleNamespace
        >>> images = ImageDataset([b""] * 8, [""] * 8, [""] * 8, "my-images")
        >>> images.keys = images.noise_keys = list("abcdefgh")
        >>> alone = SimpleNamespace(is_main_process=True, num_processes=1)
        >>> x0 = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> propose(images, [(4, 4, 4)] * 8, lambda rows: x0[rows], alone, max_level=14.6)[0]
        1.1
    """
    rows, total = representatives(images, shapes)
    x0 = latents(rows)
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            measured = measure(x0, total=total, max_level=max_level)
            found = [(measured.proposed, measured.reason)]
        except UserError as error:  # the others wait for an answer
            found = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    level, reason = found[0]
    return float(level), str(reason)
