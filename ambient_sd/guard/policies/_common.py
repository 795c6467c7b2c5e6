"""What several policies share: checks of their arguments and of the first step, and rows of encoded prompts."""

from __future__ import annotations

import math
from numbers import Integral, Real  # numpy's scalars are of these kinds as well
from typing import Any

import torch

from ambient_sd.guard.policies.base import Encoded, GuidanceBranches, wide
from ambient_sd.guard.scores import NO_SIGNAL
from ambient_sd.utils.errors import UserError


def number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """Return `value` as a finite float that is `>= least` and `> above`, or raise a `UserError` naming the rule."""
    bounds = [f"at least {least:g}"] if least is not None else []
    bounds += [f"above {above:g}"] if above is not None else []
    valid = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    valid = valid and (least is None or value >= least) and (above is None or value > above)
    if not valid:
        raise UserError(f"{name} {value!r}", rule=", ".join(["it must be a finite number", *bounds]))
    return float(value)


def whole(name: str, value: Any, *, least: int | None = None) -> int:
    """Return `value` as an int that is `>= least`, or raise a `UserError` naming the rule."""
    if not isinstance(value, Integral) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f", at least {least}"
        raise UserError(f"{name} {value!r}", rule=f"it must be a whole number{bound}")
    return int(value)


def require_signal(halves: GuidanceBranches, what: str = "prompt") -> None:
    """Raise a `UserError` where the first step has no score to read, whatever the `what`; this waits for the device."""
    if float(halves.noise_factor) < NO_SIGNAL:
        raise UserError(
            f"the first step (timestep {float(halves.timestep):g}) carries no score",
            rule=f"with zero terminal SNR alpha_t is 0 there, so || eps_c - eps_u || is 0 for every {what}",
            remedy="use a scheduler without rescale_betas_zero_snr, or another policy",
        )


def with_rows(own: Encoded, rows: list[int], new: Encoded) -> Encoded:
    """Return a copy of `own` (`n` rows) in which the rows `rows` are those of `new` (`len(rows)` rows)."""
    index = torch.tensor(rows, device=own.embeds.device)
    length = max(own.embeds.shape[1], new.embeds.shape[1])

    def put(mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return mine.index_copy(0, index, other.to(mine))

    masks = own.mask, new.mask
    if own.mask is not None or new.mask is not None:  # what has no mask is read whole
        masks = tuple(e.embeds.new_ones(e.embeds.shape[:2]) if e.mask is None else e.mask for e in (own, new))  # type: ignore[assignment]
    return Encoded(
        put(wide(own.embeds, length), wide(new.embeds, length)),
        own.pooled if own.pooled is None or new.pooled is None else put(own.pooled, new.pooled),
        None if masks[0] is None or masks[1] is None else put(wide(masks[0], length), wide(masks[1], length)),
    )
