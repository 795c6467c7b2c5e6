from __future__ import annotations

from collections.abc import Iterator

import pytest

from ambient_sd.audit import registration


@pytest.fixture(scope="package", autouse=True)
def few_registration_steps() -> Iterator[None]:
    """No claim about commands depends on how closely an image is laid over its original: 32 steps in place of 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "_STEPS", 32)
        yield
