"""Fine-tune Stable Diffusion without the model handing the training images back, and guard models that exist.

The public names load on first use, so that `import ambient_sd` and `ambient-sd --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ambient_sd.data.noise import image_noise as image_noise
    from ambient_sd.guard import policies as policies
    from ambient_sd.guard.base_above import BaseAbove as BaseAbove
    from ambient_sd.guard.pipeline import AmbientSDPipeline as AmbientSDPipeline
    from ambient_sd.guard.recorder import MemorizationGuard as MemorizationGuard
    from ambient_sd.objective import AmbientObjective as AmbientObjective
    from ambient_sd.schedule import NoiseSchedule as NoiseSchedule

_HOME = {
    "NoiseSchedule": "ambient_sd.schedule",
    "AmbientObjective": "ambient_sd.objective",
    "image_noise": "ambient_sd.data.noise",
    "BaseAbove": "ambient_sd.guard.base_above",
    "MemorizationGuard": "ambient_sd.guard.recorder",
    "AmbientSDPipeline": "ambient_sd.guard.pipeline",
}
__all__ = [
    "AmbientObjective",
    "AmbientSDPipeline",
    "BaseAbove",
    "MemorizationGuard",
    "NoiseSchedule",
    "image_noise",
    "policies",
]


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("ambient_sd.guard.policies")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ambient_sd' has no attribute {name!r}")
