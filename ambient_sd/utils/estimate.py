"""An estimated number: value, 95 % interval, sample count. The one type in which measures, thresholds and studies state a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """Hold an estimated number with its 95 % interval.

    Attributes:
        value, low, high: the estimate and the ends of its interval.
        n: how many samples it is of.
        name: of the measure; empty where whoever holds the estimate names it.
        seed: of the resampling behind the interval.
        detail: how it was made, in words.
        draws: bootstrap values behind the interval. pairing: names the resampling that made them: two estimates with one pairing were
            resampled together, so their difference may be taken draw by draw.

    Example:
        >>> Estimate.of_share(3, 60).show(1, 100, " %")
        '5.0 % [1.7, 13.7]'
    """

    value: float
    low: float
    high: float
    n: int
    name: str = ""
    seed: int = 0
    detail: str = ""
    draws: Tensor | None = field(default=None, repr=False, compare=False)
    pairing: str = field(default="", repr=False, compare=False)

    @classmethod
    def of_share(cls, hits: int, n: int, **more: Any) -> Estimate:
        """Estimate a share of `n` independent trials, with Wilson's interval.

        Example:
            >>> Estimate.of_share(0, 10).value
            0.0
        """
        share = hits / n
        return cls(share, *wilson(share, n), n, **more)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON: value, low, high, n; name, seed and detail where it has a name.

        Example:
            >>> Estimate(0.5, 0.25, 0.75, 8).as_dict()
            {'value': 0.5, 'low': 0.25, 'high': 0.75, 'n': 8}
        """
        numbers = {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
        return {"name": self.name, **numbers, "seed": self.seed, "detail": self.detail} if self.name else numbers

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """Build an estimate from `as_dict`; an end that is None, which JSON has for what is not finite, is NaN.

        Raises:
            TypeError, ValueError, KeyError: the values are of another kind.

        Example:
            >>> Estimate.from_dict({"value": 0.5, "low": None, "high": 0.75, "n": 8}).low
            nan
        """
        numbers = {}
        for end in ("value", "low", "high"):
            if isinstance(values[end], (bool, str)):
                raise TypeError(f"{end} is {values[end]!r}")
            numbers[end] = math.nan if values[end] is None else float(values[end])
        if not isinstance(values["n"], int) or isinstance(values["n"], bool) or values["n"] < 0:
            raise TypeError(f"n is {values['n']!r}")
        return cls(**{**values, **numbers})

    @property
    def is_finite(self) -> bool:
        """Tell whether value and interval are finite numbers.

        Example:
            >>> Estimate(0.5, 0.25, float("inf"), 8).is_finite
            False
        """
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    def show(self, digits: int = 3, factor: float = 1, unit: str = "") -> str:
        """Write value and interval.

        Args:
            digits: after the point.
            factor: what the numbers are multiplied by: 100 for per cent.
            unit: behind the value, with its space.

        Example:
            >>> Estimate(0.5, 0.25, 0.75, 8).show(2)
            '0.50 [0.25, 0.75]'
        """
        value, low, high = (f"{factor * number:.{digits}f}" for number in (self.value, self.low, self.high))
        return f"{value}{unit} [{low}, {high}]"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share of `n` independent trials (Wilson 1927).

    `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`; for share 0 the upper end is z^2 / (n + z^2).

    Example:
        >>> [round(end, 3) for end in wilson(0.3, 50)]
        [0.191, 0.438]
    """
    z2 = _Z95 * _Z95
    middle = share + z2 / (2 * n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The formula gives exactly 0 and 1 at the ends; rounding must not push the interval past the value.
    low = 0.0 if share == 0 else (middle - half) / (1 + z2 / n)
    high = 1.0 if share == 1 else (middle + half) / (1 + z2 / n)
    return low, high
