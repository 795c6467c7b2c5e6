from __future__ import annotations

from collections.abc import Iterator

import pytest

from ambient_sd.training import validation


@pytest.fixture(scope="package", autouse=True)
def few_sampling_steps() -> Iterator[None]:
    """No claim about training depends on how well its images are sampled: 3 steps in place of 25."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "INFERENCE_STEPS", 3)
        yield
