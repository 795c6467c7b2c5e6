"""Memory at its highest: what a piece of work takes, whatever was there before and however it is given back."""

from __future__ import annotations

import sys

import pytest
import torch

from ambient_sd.utils.memory import peak_memory

CPU = torch.device("cpu")


def taken(megabytes: int, piece: int = 2**18) -> float:
    with peak_memory(CPU) as peak:
        assert peak.mb is None
        held = [torch.ones(piece) for _ in range(megabytes * 2**18 // piece)]
        del held
    assert peak.mb is not None
    return peak.mb


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_is_that_of_this_work_alone_although_the_memory_was_free_before_it_ended() -> None:
    before = torch.ones(60 * 2**18)  # what is held already does not count
    assert taken(120) == pytest.approx(120, abs=8)
    assert taken(20) == pytest.approx(20, abs=8)  # nor does a higher peak of before
    # Small pieces come from memory that the allocator keeps: without giving it back the second would seem to be free.
    assert taken(60, piece=2**12) == pytest.approx(60, abs=8)
    assert taken(60, piece=2**12) == pytest.approx(60, abs=8)
    assert len(before) and taken(0) < 8


def test_nothing_is_measured_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(
        "ambient_sd.utils.memory._CLEAR", tmp_path_factory.mktemp("proc")
    )  # a folder: cannot be written to
    with peak_memory(CPU) as peak:
        pass
    assert peak.mb is None
    with peak_memory(torch.device("meta")) as peak:
        pass
    assert peak.mb is None
