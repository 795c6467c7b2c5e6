"""How far images are enlarged to the training resolution, and from which factor on that is refused.

    f = max(W / w, H / h)          w, h: of the image; W, H: of its crop

An enlarged image holds no more detail than the small one, costs f^2 times the arithmetic, and has smooth latents: the model
learns the blur, and a noise level measured on it (`noise_level`) is wrong. The median over the images counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ambient_sd.utils.errors import UserError

WARNED, REFUSED = 1.5, 4.0


def median_enlargement(sizes: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]) -> float:
    """Return the median of f over images.

    Args:
        sizes: (width, height) of each image, pixels.
        targets: (width, height) of each crop, pixels.

    Example:
        >>> median_enlargement([(64, 96)], [(512, 512)])
        8.0
    """
    return statistics.median(max(W / w, H / h) for (w, h), (W, H) in zip(sizes, targets, strict=True))


def check_enlargement(
    sizes: Sequence[tuple[int, int]],
    targets: Sequence[tuple[int, int]],
    *,
    resolution: int,
    step: int = 8,
    given: bool = True,
    allowed: bool = False,
) -> str | None:
    """Return a warning in one line where most images are enlarged, or None.

    Args:
        sizes: (width, height) of each image, pixels.
        targets: (width, height) of each crop, pixels.
        resolution: of the training, pixels.
        step: what the model's sides must be multiples of, pixels.
        given: the user chose the resolution; a default is refused from a median of 1.5 on, a choice from 4 on.
        allowed: the user wants it: warn only.

    Raises:
        UserError: the median is too large.

    Example:
        >>> check_enlargement([(400, 400)], [(512, 512)], resolution=512) is None  # 1.28 times: nothing to say
        True
    """
    factor = median_enlargement(sizes, targets)
    if factor < WARNED:
        return None
    side = round(statistics.median(min(size) for size in sizes))
    proposed = max(step, side // step * step)
    said = f"resolution is {resolution}{'' if given else ', the default'}: half of the images are enlarged {factor:.3g} times or more"
    rule = f"their shorter side is {side} px in the median"
    if allowed or (given and factor < REFUSED):
        return f"{said}; {rule}: is --resolution {proposed} meant?"
    raise UserError(said, rule=rule, remedy=f"give --resolution {proposed}, or --allow_upscaling")
