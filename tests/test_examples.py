"""The examples in docstrings run and give what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    ["audit.decision", "audit.registration", "data.captions", "data.enlargement", "json_schema"],
)
def test_examples_in_docstrings_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ambient_sd.{name}"))
    assert found.attempted > 0 and found.failed == 0
