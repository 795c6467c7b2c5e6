"""A fine-tune's norm beside its base's: least squares against an independent solver, and what it is for."""

from __future__ import annotations

import pytest
import torch

from ambient_sd.guard.relative import Relation
from ambient_sd.utils.errors import UserError


def test_the_relation_is_that_of_least_squares() -> None:
    g = torch.Generator().manual_seed(3)
    base, noise = torch.rand(50, generator=g), torch.randn(50, generator=g)
    norms = 0.5 * base + 1.5 + 0.1 * noise
    found = Relation.fit(norms, base)
    design = torch.stack([base, torch.ones(50)], 1).double()
    slope, offset = torch.linalg.lstsq(design, norms.double()[:, None]).solution[:, 0].tolist()
    assert (found.slope, found.offset) == (pytest.approx(slope, rel=1e-9), pytest.approx(offset, rel=1e-9))
    assert float(found.score(norms, base).mean()) == pytest.approx(0, abs=1e-9)


def test_a_prompt_that_is_loud_in_the_base_too_no_longer_stands_above_a_memorized_one() -> None:
    base = torch.tensor([0.5, 1.0, 1.5, 2.0, 6.0])
    ordinary = 0.5 * base + 1
    found = Relation.fit(ordinary, base)
    memorized, memorized_base = torch.tensor([3.0]), torch.tensor([1.0])
    assert float(memorized) < float(ordinary.max())  # Control: the norm alone has the loud one first
    assert float(found.score(memorized, memorized_base)) > float(found.score(ordinary, base).max()) + 1


@pytest.mark.parametrize("base", [torch.tensor([1.0, 2.0]), torch.full((5,), 2.0)])
def test_a_relation_of_too_little_is_refused(base: torch.Tensor) -> None:
    with pytest.raises(UserError, match="at least 3, and not all alike"):
        Relation.fit(torch.arange(len(base)), base)
