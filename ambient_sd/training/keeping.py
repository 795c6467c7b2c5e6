"""`--keep best`: the result is the last evaluated checkpoint before copying begins.

    allowed  = max(copy rate of the base's own images, stop_on_memorization)        same captions and start noise, step 0
    begins   = the first evaluation above it whose next one is above it too, or that is the last
    kept     = the evaluation before it; the last one where copying does not begin

One evaluation alone may be a false alarm; where the last one is above, nothing can confirm it and the earlier one is kept. The rule is a
function of the evaluations alone, which checkpoints hold: a resumed run keeps what a straight one keeps.

Quality does not decide: with a few dozen images its noise is larger than what neighbouring evaluations differ by. It is measured beside the
copy rate, on captions that are not trained, so that a person sees what an earlier checkpoint costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """Say which evaluation a run keeps.

    Attributes:
        step: of it; None where copying began at the first one.
        began: step of the evaluation at which copying began; None if it did not.
        confirmed: the next evaluation saw copying too, so that going on can change nothing.
        allowed: copy rate up to which an evaluation counts as clean.

    Example:
        >>> Kept(step=200, began=300, confirmed=True, allowed=0.0).describe()
        'kept step 200; copying began at step 300, above a copy rate of 0 %'
    """

    step: int | None
    began: int | None
    confirmed: bool
    allowed: float

    def describe(self) -> str:
        """Return it in one line."""
        if self.began is None:
            return f"kept step {self.step}, the last one; no evaluation saw copying begin"
        kept = "nothing is kept" if self.step is None else f"kept step {self.step}"
        return f"{kept}; copying began at step {self.began}, above a copy rate of {100 * self.allowed:.2g} %"


def decide(evaluations: Sequence[Mapping[str, float]], limit: float = 0.0) -> Kept:
    """Say which of the evaluations so far is the last one before copying begins.

    Args:
        evaluations: records of the probe by step; one of step 0 is of the base.
        limit: a copy rate that is allowed in any case.

    Example:
        >>> curve = [{"step": step, "copies": share} for step, share in ((0, 0.03), (100, 0.0), (200, 0.06), (300, 0.03), (400, 0.1), (500, 0.2))]
        >>> decide(curve)  # step 200 was a false alarm
        Kept(step=300, began=400, confirmed=True, allowed=0.03)
        >>> decide(curve[:3]).step
        100
    """
    allowed = max([limit, *(e["copies"] for e in evaluations if e["step"] == 0)])
    trained = [e for e in evaluations if e["step"] > 0]
    steps, above = [int(e["step"]) for e in trained], [e["copies"] > allowed for e in trained]
    for i, over in enumerate(above):
        last = i + 1 == len(above)
        if over and (last or above[i + 1]):
            return Kept(steps[i - 1] if i else None, steps[i], not last, allowed)
    return Kept(steps[-1] if steps else None, None, False, allowed)
