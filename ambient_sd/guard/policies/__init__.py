"""Mitigations, one file each, behind one interface (`base.Policy`)."""

from __future__ import annotations

from ambient_sd.guard.policies.attention_rescaling import AttentionRescaling
from ambient_sd.guard.policies.base import Change, Encoded, GuidanceBranches, Policy, SamplingStart, ScalePolicy, Step
from ambient_sd.guard.policies.compose import Compose
from ambient_sd.guard.policies.dynamic_transition import DynamicTransition
from ambient_sd.guard.policies.guard_attenuation import AttentionGuard
from ambient_sd.guard.policies.latent_optimization import LatentOptimization
from ambient_sd.guard.policies.opposite_guidance import OppositeGuidance
from ambient_sd.guard.policies.prompt_optimization import PromptOptimization
from ambient_sd.guard.policies.prompt_perturbation import (
    CaptionWordRepetition,
    GaussianEmbeddingNoise,
    RandomNumbers,
    RandomTokens,
)
from ambient_sd.guard.policies.reanchoring import Reanchoring
from ambient_sd.guard.policies.sail import SAIL
from ambient_sd.guard.policies.scale_cap import Despecification, ScaleCap
from ambient_sd.guard.policies.static_transition import StaticTransition

GUARD = AttentionGuard  # the name that its paper gives it

__all__ = [
    "GUARD",
    "SAIL",
    "AttentionGuard",
    "AttentionRescaling",
    "CaptionWordRepetition",
    "Change",
    "Compose",
    "Despecification",
    "DynamicTransition",
    "Encoded",
    "GaussianEmbeddingNoise",
    "GuidanceBranches",
    "LatentOptimization",
    "OppositeGuidance",
    "Policy",
    "PromptOptimization",
    "RandomNumbers",
    "RandomTokens",
    "Reanchoring",
    "SamplingStart",
    "ScaleCap",
    "ScalePolicy",
    "StaticTransition",
    "Step",
]
