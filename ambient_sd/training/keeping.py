"""`--keep best`: the result is the last evaluated checkpoint before copying begins.

    allowed    = max(copy rate of the base's own images, stop_on_memorization)      same captions and start noise, step 0
    drawn      = share of images nearest to their caption's own training image, less the same share of the base's images
    copying    : copy rate > allowed  or  drawn > `MOSTLY`                          `MOSTLY` is what fails an audit, 0.5
    begins     = the first evaluation that sees copying and whose next one does too, or that is the last
    kept       = the evaluation before it; the last one where copying does not begin

The second clause, because a small network redraws its images long before they are copies by the decision: in one study it had 29 % nearest to
their own image when quality on new captions was at its best, and 92 % when the first copies came (docs/results/style-60.md). An audit fails a
model that lies above the same bound with its whole interval; the probe is small, so its value decides. Where captions hardly tell images
apart, or the base was not measured, it says nothing.

An evaluation of which most images show too little to be compared (black or blank: the network or the autoencoder overflows) says nothing: it is
neither kept nor counted as clean.

One evaluation alone may be a false alarm; where the last one is above, nothing can confirm it and the earlier one is kept. The rule is a
function of the evaluations alone, which checkpoints hold: a resumed run keeps what a straight one keeps.

Quality does not decide: with a few dozen images its noise is larger than what neighbouring evaluations differ by. It is measured beside the
copy rate, on captions that are not trained, so that a person sees what an earlier checkpoint costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ambient_sd.audit.closest import MOSTLY


@dataclass(frozen=True)
class Kept:
    """Say which evaluation a run keeps.

    Attributes:
        step: of it; None where copying began at the first one.
        began: step of the evaluation at which copying began; None if it did not.
        confirmed: the next evaluation saw copying too, so that going on can change nothing.
        allowed: copy rate up to which an evaluation counts as clean.
        drawn: the evaluation that began it has no more copies than that, but this share of images nearest to their own training image; else None.
        undecided: evaluations whose images could not be compared.
        base_own: share of the base's images nearest to their own training image where it is above `MOSTLY`, so that nothing more can be told; else None.

    Example:
        >>> Kept(step=200, began=300, confirmed=True, allowed=0.0).describe()
        'kept step 200; copying began at step 300, above a copy rate of 0 %'
    """

    step: int | None
    began: int | None
    confirmed: bool
    allowed: float
    drawn: float | None = None
    undecided: int = 0
    base_own: float | None = None

    def describe(self) -> str:
        """Return it in one line."""
        return "; ".join([self._chosen(), *self._reservations()])

    def _reservations(self) -> list[str]:
        found = []
        if self.base_own is not None:
            found.append(
                f"the base itself draws {100 * self.base_own:.2g} % of the probe's images nearest to their own training image"
            )
        if self.undecided:
            found.append(
                f"{self.undecided} evaluation{'s' if self.undecided > 1 else ''} drew images that show too little to be compared: look at probe/"
            )
        return found

    def _chosen(self) -> str:
        if self.step is None and self.began is None:
            return "nothing is kept; no evaluation could be compared"
        if self.began is None:
            beyond = (
                "copying begin"
                if not self.allowed
                else f"a copy rate above {100 * self.allowed:.2g} %, which is allowed or the base's own"
            )
            return f"kept step {self.step}, the last one{' that could be compared' if self.undecided else ''}; no evaluation saw {beyond}"
        kept = "nothing is kept" if self.step is None else f"kept step {self.step}"
        why = f"above a copy rate of {100 * self.allowed:.2g} %"
        if self.drawn is not None:
            why = f"with {100 * self.drawn:.2g} % of the probe's images nearest to their own training image"
        return f"{kept}; copying began at step {self.began}, {why}"


def decide(evaluations: Sequence[Mapping[str, float]], limit: float = 0.0) -> Kept:
    """Say which of the evaluations so far is the last one before copying begins.

    Args:
        evaluations: records of the probe by step; one of step 0 is of the base.
        limit: a copy rate that is allowed in any case.

    Example:
        >>> curve = [{"step": step, "copies": share} for step, share in ((0, 0.03), (100, 0.0), (200, 0.06), (300, 0.03), (400, 0.1), (500, 0.2))]
        >>> decide(curve).describe()  # step 200 was a false alarm
        'kept step 300; copying began at step 400, above a copy rate of 3 %'
        >>> decide(curve[:3]).step
        100
        >>> redrawn = [{"step": step, "copies": 0.0, "own": own} for step, own in ((0, 0.02), (100, 0.3), (200, 0.7), (300, 0.9))]
        >>> decide(redrawn).describe()
        "kept step 100; copying began at step 200, with 70 % of the probe's images nearest to their own training image"
    """
    undecided = sum(_undecided(e) for e in evaluations)
    evaluations = [e for e in evaluations if not _undecided(e)]
    base = [e for e in evaluations if e["step"] == 0]
    allowed = max([limit, *(e["copies"] for e in base)])
    known = min([math.inf, *(e["own"] for e in base if "own" in e)])
    more: dict[str, Any] = {"undecided": undecided, "base_own": known if MOSTLY < known < math.inf else None}
    trained = [e for e in evaluations if e["step"] > 0]
    steps, copies = [int(e["step"]) for e in trained], [e["copies"] > allowed for e in trained]
    above = [over or e.get("own", 0.0) - known > MOSTLY for e, over in zip(trained, copies, strict=True)]
    for i, over in enumerate(above):
        last = i + 1 == len(above)
        if over and (last or above[i + 1]):
            drawn = None if copies[i] else trained[i]["own"]
            return Kept(steps[i - 1] if i else None, steps[i], not last, allowed, drawn, **more)
    return Kept(steps[-1] if steps else None, None, False, allowed, **more)


def _undecided(evaluation: Mapping[str, float]) -> bool:
    """Tell whether most images of an evaluation could not be compared; `n` counts the others."""
    return evaluation.get("blank", 0) > evaluation.get("n", math.inf)
