"""Mitigations, one file each, behind one interface (`base.Policy`)."""

from __future__ import annotations

from ambient_sd.guard.policies.base import Change, Encoded, Halves, Policy, SamplingStart, ScalePolicy, Step
from ambient_sd.guard.policies.prompt_optimization import PromptOptimization

__all__ = [
    "Change",
    "Encoded",
    "Halves",
    "Policy",
    "PromptOptimization",
    "SamplingStart",
    "ScalePolicy",
    "Step",
]
