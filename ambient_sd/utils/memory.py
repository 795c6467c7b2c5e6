"""The memory that a piece of work takes at its highest: on a GPU the allocator's peak, on Linux what the process grew by.

On CUDA: the most bytes that tensors held, weights included (`torch.cuda.max_memory_allocated`).

On the CPU of Linux: the highest resident size during the work (`VmHWM`, reset through `/proc/self/clear_refs`) above the resident
size before it. Before, glibc gives back what earlier work has freed (`malloc_trim`): memory that it keeps would be used
again without being seen. What was there before, weights, libraries and images, does not count; memory of a GPU that is not
CUDA and the files' cache of the system do not either. A first call pays for what libraries set up once.

Elsewhere nothing is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the current resident size


@dataclass
class Peak:
    """Hold what was measured, in MiB; None before the work is over, and where nothing can be measured.

    Example:
        >>> Peak().mb is None
        True
    """

    mb: float | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the work inside the `with`; `.mb` holds the figure afterwards.

    Example:
        >>> with peak_memory(torch.device("cpu")) as peak:
        ...     rows = torch.zeros(1000)
        >>> peak.mb is None or peak.mb >= 0
        True
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.mb = torch.cuda.max_memory_allocated(device) / 2**20
        return
    before = _reset() if device.type == "cpu" else None
    yield peak
    if before is not None:
        peak.mb = (_status("VmHWM") - before) / 1024


def _reset() -> int | None:
    """Let the peak start at the present resident size, and return that in KiB; None where Linux does not do it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK)
        return _status("VmRSS")
    except (OSError, KeyError, ValueError):
        return None


def _status(name: str) -> int:
    """Return a figure of the process in KiB."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0])
