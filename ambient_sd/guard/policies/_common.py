"""What several policies share: checks of their arguments and of the first step, and rows of encoded prompts."""

from __future__ import annotations

import math
from numbers import Integral, Real  # numpy's scalars are of these kinds as well
from typing import Any

import torch

from ambient_sd.guard.policies.base import Encoded, GuidanceBranches
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
    embeds = own.embeds.clone()
    embeds[index] = new.embeds.to(embeds)
    if own.pooled is None or new.pooled is None:
        return Encoded(embeds, own.pooled)
    pooled = own.pooled.clone()
    pooled[index] = new.pooled.to(pooled)
    return Encoded(embeds, pooled)
