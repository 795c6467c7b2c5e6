"""Mitigations, one file each, behind one interface (`base.Policy`)."""

from __future__ import annotations

from ambient_sd.guard.policies.base import Policy, PromptChange, SamplingStart, Step
from ambient_sd.guard.policies.prompt_optimization import PromptOptimization

__all__ = ["Policy", "PromptChange", "PromptOptimization", "SamplingStart", "Step"]
