"""Every public class and function has an example in its docstring, and the examples give what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import ambient_sd

# No library: one runs the commands and looks at the pages. All that others import has examples.
NO_LIBRARY = {"cli", "commands", "reporting"}


def modules() -> list[str]:
    """Return the modules of the package, without private ones."""
    found = pkgutil.walk_packages(ambient_sd.__path__, "ambient_sd.")
    return [m.name.removeprefix("ambient_sd.") for m in found if "._" not in m.name]


def is_no_library(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in NO_LIBRARY)


def public(name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a module defines for others: no protocol, which is a shape, and no `main`, which is a command."""
    module = importlib.import_module(f"ambient_sd.{name}")
    for key, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        shown = own and not key.startswith("_") and key != "main" and not getattr(value, "_is_protocol", False)
        if shown and (inspect.isclass(value) or inspect.isfunction(value)):
            yield key, value


def has_example(value: Any) -> bool:
    parts = [value, *(vars(value).values() if inspect.isclass(value) else ())]
    return any(">>>" in (inspect.getdoc(part) or "") for part in parts if part is value or callable(part))


@pytest.mark.parametrize("name", [name for name in modules() if not is_no_library(name)])
def test_public_names_have_examples_that_hold(name: str) -> None:
    module = importlib.import_module(f"ambient_sd.{name}")
    assert [key for key, value in public(name) if not has_example(value)] == []
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0 and (found.attempted > 0 or not list(public(name)))


def test_a_name_without_an_example_is_found() -> None:
    def bare() -> None:
        """Do nothing."""

    assert not has_example(bare)
