"""Several policies as one.

Before the first step, `begin` is called in the order given, and each policy sees the embeddings, latents and weights that
those before it put in place. Where two change the same field of the same image the later one wins. A policy that rewrites
the prompt (RT, CWR, RNA) would discard earlier changes of the embeddings, and re-anchoring leaves later ones no score to
read: such combinations are refused when they are built. The tokens of a rewritten prompt are unknown: later policies see
`token_ids` and `token_mask` as None, and those that need them refuse.

At every evaluation the policies that replace outputs act in turn, each on what the one before returned; then those that
only choose a guidance scale decide together, once: for each image the first one that acts (is not NaN) wins. So
`Compose(OppositeGuidance(until=650), StaticTransition(until=500))` is -2 down to 650, 0 down to 500, then the pipeline's
scale. All of them see the norms of what the network itself said.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager
from typing import Any

import torch

from ambient_sd.guard.policies.base import (
    Change,
    Encoded,
    GuidanceBranches,
    Half,
    Policy,
    SamplingStart,
    ScalePolicy,
    Step,
    wide,
)
from ambient_sd.utils.errors import UserError

_FIELDS = (
    "embeds", "pooled", "mask", "uncond_embeds", "uncond_pooled", "uncond_mask", "sample", "token_weights", "key_scale",
)  # fmt: skip


class Compose(Policy):
    """Apply several policies as one; the order matters (see the module).

    A policy with `rewrites_prompt` must stand before all others that override `begin`; one with `exclusive` must be the
    only one that does.

    Args:
        policies: one or more; a `Compose` among them counts as its parts in its place.

    Raises:
        UserError: there is none, one is not a policy, or two cannot be combined in this order.

    Example:
        >>> from ambient_sd.guard.policies import OppositeGuidance, StaticTransition
        >>> len(Compose(OppositeGuidance(until=650), StaticTransition(until=500)).policies)
        2
    """

    def __init__(self, *policies: Policy) -> None:
        self.policies: tuple[Policy, ...]
        parts: list[Policy] = []
        for policy in policies:
            if not isinstance(policy, Policy):
                raise UserError(
                    f"cannot compose a {type(policy).__name__}", rule="it takes objects from ambient_sd.guard.policies"
                )
            parts.extend(policy.policies if isinstance(policy, Compose) else [policy])
        if not parts:
            raise UserError("nothing to compose", rule="it takes one or more policies")
        self.policies = tuple(parts)
        self._beginners = [policy for policy in parts if policy.begins]
        # One network for all of them: it recomputes where one of them asks for it.
        self.noise_only = any(policy.noise_only for policy in parts)
        self.gradient_checkpointing = any(policy.gradient_checkpointing for policy in parts)
        self.begins_at_signal = any(policy.begins_at_signal for policy in self._beginners)
        self.moves_latent = any(policy.moves_latent for policy in self._beginners)
        self.mitigates = any(policy.mitigates for policy in parts)
        for place, policy in enumerate(self._beginners):
            name = type(policy).__name__
            if policy.exclusive and len(self._beginners) > 1:
                others = ", ".join(type(other).__name__ for other in self._beginners if other is not policy)
                raise UserError(
                    f"{name} does not combine with {others}",
                    rule="with it the two halves are two prompts, and no other policy may change them before the first step",
                    remedy="use one of them",
                )
            if policy.rewrites_prompt and place > 0:
                raise UserError(
                    f"{name} after {type(self._beginners[place - 1]).__name__}",
                    rule="it words the prompt anew, so what policies before it made of the embeddings would be lost",
                    remedy=f"put {name} first; two that word the prompt anew do not combine",
                )
        self._scale = _FirstScale([p for p in parts if isinstance(p, ScalePolicy) and _only_scales(p)])
        self._steppers = [p for p in parts if type(p).step is not Policy.step and not _only_scales(p)]

    @property
    def begins(self) -> bool:
        return bool(self._beginners)

    def begin(self, start: SamplingStart) -> Change | None:
        """Return what all of them put in place, as one change."""
        total, now = None, start
        for policy in self._beginners:
            change = policy.begin(now)
            if change is None:
                continue
            total = change if total is None else _merged(start, total, change)
            if any(change.changed):
                reworded = policy.rewrites_prompt
                now = dataclasses.replace(
                    start,
                    halves=_ChangedHalves(start.halves, total),
                    token_ids=None if reworded else now.token_ids,
                    token_mask=None if reworded else now.token_mask,
                )
        return total

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the outputs after all of them, or None if none acted."""
        result = None
        for policy in [*self._steppers, *([self._scale] if self._scale.policies else [])]:
            replaced = policy.step(step)
            if replaced is not None:
                result = replaced
                step = dataclasses.replace(step, cond=result[0], uncond=result[1])
        return result


class _FirstScale(ScalePolicy):
    def __init__(self, policies: list[ScalePolicy]) -> None:
        self.policies = policies

    def scale(self, step: Step) -> torch.Tensor:
        scale = self.policies[0].scale(step)
        for policy in self.policies[1:]:
            scale = torch.where(scale.isnan(), policy.scale(step), scale)
        return scale


class _ChangedHalves(GuidanceBranches):
    """The network with the rows of a change in place."""

    def __init__(self, inner: GuidanceBranches, change: Change) -> None:
        # The pipeline may run under torch.inference_mode, whose tensors cannot enter autograd.
        with torch.inference_mode(False), torch.no_grad():
            now = {name: _now(inner, change, name) for name in _FIELDS}
        cond, uncond = now["embeds"], now["uncond_embeds"]
        assert cond is not None and uncond is not None and now["sample"] is not None
        self.inner = inner
        self.sample, self.timestep, self.noise_factor = now["sample"], inner.timestep, inner.noise_factor
        self.flow = inner.flow
        self.cond = Encoded(cond, now["pooled"], now["mask"])
        self.uncond = Encoded(uncond, now["uncond_pooled"], now["uncond_mask"])
        self.token_weights, self.key_scale = now["token_weights"], now["key_scale"]

    def predict(self, half: Half, *, rows: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
        encoded = self.cond if half == "cond" else self.uncond
        own = {"sample": self.sample, "embeds": encoded.embeds, "pooled": encoded.pooled, "mask": encoded.mask}
        if half == "cond":
            own |= {"token_weights": self.token_weights, "key_scale": self.key_scale}
        for name, value in own.items():
            if given.get(name) is None and value is not None:
                given[name] = value if rows is None else value[rows.to(value.device)]
        return self.inner.predict(half, rows=rows, **given)

    def enable_grad(self) -> AbstractContextManager[None]:
        return self.inner.enable_grad()


def _only_scales(policy: Policy) -> bool:
    return type(policy).step is ScalePolicy.step


def _own(halves: GuidanceBranches, name: str) -> torch.Tensor | None:
    """Return what stands where a change has the field `name`; None: no weights, that is weights of 1, or no such input."""
    own = {
        "embeds": halves.cond.embeds,
        "pooled": halves.cond.pooled,
        "uncond_embeds": halves.uncond.embeds,
        "uncond_pooled": halves.uncond.pooled,
        "mask": halves.cond.mask,
        "uncond_mask": halves.uncond.mask,
        "sample": halves.sample,
    }
    return own[name] if name in own else getattr(halves, name, None)


def _now(halves: GuidanceBranches, change: Change, name: str) -> torch.Tensor | None:
    """Return the field `name` for all images: the change's rows where it changed an image, else the pipeline's own."""
    own, new = _own(halves, name), getattr(change, name)
    if new is None:
        return own
    new = new.detach().clone() if new.is_inference() else new.detach()
    if own is None and name.endswith("mask"):  # what has no mask is read whole
        text = halves.cond if name == "mask" else halves.uncond
        own = new.new_ones(text.embeds.shape[:2])
    if own is None:
        own = torch.ones_like(new)
    if name.endswith(("embeds", "mask")):
        length = max(own.shape[1], new.shape[1])
        own, new = wide(own, length), wide(new, length)
    changed = torch.tensor(change.changed, device=new.device).view(-1, *[1] * (new.ndim - 1))
    return torch.where(changed, new, own.to(new))


def _merged(start: SamplingStart, first: Change, second: Change) -> Change:
    """Return one change with the effect of two, the second over the first."""
    base = _ChangedHalves(start.halves, first)
    with torch.inference_mode(False), torch.no_grad():
        fields = {
            name: _now(base, second, name)
            for name in _FIELDS
            if getattr(first, name) is not None or getattr(second, name) is not None
        }
    iterations = [x.iterations for x in (first, second) if x.iterations is not None]
    return Change(
        changed=[a or b for a, b in zip(first.changed, second.changed, strict=True)],
        **fields,
        first_score_before=_scores(first.first_score_before, second.first_score_before, first.changed),
        first_score_after=_scores(second.first_score_after, first.first_score_after, second.changed),
        iterations=[sum(each) for each in zip(*iterations, strict=True)] if iterations else None,
    )


def _scores(best: list[float] | None, other: list[float] | None, changed: list[bool]) -> list[float] | None:
    """Return the scores of `best`; where there is none (NaN), those of `other`, unless the image was `changed` between.

    A score from before describes the pipeline's own inputs, one from after what is in place in the end.
    """
    if best is None and other is None:
        return None
    one, two = best or [math.nan] * len(changed), other or [math.nan] * len(changed)
    return [b if not math.isnan(b) else math.nan if moved else o for b, o, moved in zip(one, two, changed, strict=True)]
