"""Training: `run(config)` trains a Stable Diffusion U-Net, whole or by LoRA, so that it does not copy its images.

The names load on first use: `config` must come without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ambient_sd.training.config import TrainConfig as TrainConfig
    from ambient_sd.training.loop import run as run
    from ambient_sd.training.plan import Plan as Plan
    from ambient_sd.training.plan import plan_run as plan_run
    from ambient_sd.training.record import RunRecord as RunRecord

_HOME = {"TrainConfig": "config", "run": "loop", "Plan": "plan", "plan_run": "plan", "RunRecord": "record"}
__all__ = ["Plan", "RunRecord", "TrainConfig", "plan_run", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"ambient_sd.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ambient_sd.training' has no attribute {name!r}")
