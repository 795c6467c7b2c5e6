"""Wen et al.'s norm of a fine-tune, relative to its base's for the same prompt and start noise.

    score = d - (a d_base + b)          a, b: least squares of d on d_base over ordinary prompts

A plain image in strong colours has a large norm in any model that knows it, so the norm of a fine-tune alone confuses such prompts with
memorized ones. The base explains that part; the rest came with the fine-tune. It needs the base, and the first evaluation of both
from the same noise. It is ours, not published; docs/comparison.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ambient_sd.utils.errors import UserError


@dataclass(frozen=True)
class Relation:
    """Hold how the norm of a fine-tune depends on its base's for prompts that are not memorized: `slope d_base + offset`.

    Example:
        >>> import torch
        >>> base = torch.tensor([1.0, 2.0, 3.0])
        >>> relation = Relation.fit(norms=2 * base + 1, base=base)
        >>> relation.score(torch.tensor([9.0]), torch.tensor([2.0])).round(decimals=3).tolist()
        [4.0]
    """

    slope: float
    offset: float

    @classmethod
    def fit(cls, norms: Tensor, base: Tensor) -> Relation:
        """Fit to ordinary prompts by least squares.

        Args:
            norms: `(N,)` of the fine-tune, a mean over the same steps and generations as `base`.
            base: `(N,)` of its base.

        Raises:
            UserError: fewer than 3 prompts, norms that are NaN or Inf, or a base whose norms are all alike.
        """
        x, y = base.double(), norms.double()
        if not bool(x.isfinite().all() and y.isfinite().all()):
            raise UserError("a norm is NaN or Inf", rule="no relation can be fitted to it",
                            remedy="load both pipelines in float32 or bfloat16")  # fmt: skip
        spread = x - x.mean()
        if len(x) < 3 or float(spread.square().sum()) <= 1e-12 * float(x.square().sum()):
            raise UserError(f"a relation of {len(x)} norms", rule="at least 3, and not all alike in the base",
                            remedy="give more ordinary prompts")  # fmt: skip
        slope = float((spread * (y - y.mean())).sum() / spread.square().sum())
        return cls(slope, float(y.mean()) - slope * float(x.mean()))

    def score(self, norms: Tensor, base: Tensor) -> Tensor:
        """Return what the base does not explain, float64, shaped like `norms`."""
        return norms.double() - (self.slope * base.double() + self.offset)
