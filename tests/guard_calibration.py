"""A calibration with known thresholds, for tests that need one."""

from __future__ import annotations

from typing import Any

import tiny
import torch

from ambient_sd.guard.calibration import Calibration, Entry, ModelFingerprint, Sampling
from ambient_sd.utils.estimate import Estimate

VALUES = {(1, 1): 3.0, (1, 4): 2.5, (5, 1): 2.0, ("all", 1): 1.5, ("all", 4): 1.0}


def calibration(pipe: Any = None, **changes: Any) -> Calibration:
    pipe = tiny.tiny_pipeline() if pipe is None else pipe
    values: dict[str, Any] = {
        "entries": [Entry(steps, n, value, Estimate(0.01, 0.0, 0.05, 500)) for (steps, n), value in VALUES.items()],  # type: ignore[arg-type]
        "model": ModelFingerprint.of(pipe.unet),
        "sampling": Sampling.of(pipe, num_inference_steps=20, guidance_scale=7.5, height=None, width=None),
        "evaluations": 21, "rate_asked": 0.01, "ordinary": 500, "memorized": 0,
        "prompts": {"ordinary": "00", "memorized": None}, "seed": 0, "versions": {"torch": torch.__version__},
    }  # fmt: skip
    return Calibration(**(values | changes))
