"""Mitigations, one file each, behind one interface (`base.Policy`)."""

from __future__ import annotations

from ambient_sd.guard.policies.attention_rescaling import AttentionRescaling
from ambient_sd.guard.policies.base import Change, Encoded, Halves, Policy, SamplingStart, ScalePolicy, Step
from ambient_sd.guard.policies.guard_attenuation import AttentionGuard
from ambient_sd.guard.policies.latent_optimization import LatentOptimization
from ambient_sd.guard.policies.prompt_optimization import PromptOptimization
from ambient_sd.guard.policies.sail import SAIL

GUARD = AttentionGuard  # the name that its paper gives it

__all__ = [
    "GUARD",
    "SAIL",
    "AttentionGuard",
    "AttentionRescaling",
    "Change",
    "Encoded",
    "Halves",
    "LatentOptimization",
    "Policy",
    "PromptOptimization",
    "SamplingStart",
    "ScalePolicy",
    "Step",
]
