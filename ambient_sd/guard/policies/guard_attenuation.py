"""GUARD: guidance away from what the prompt recalls, towards what it says when no token shouts.

At every step, with the prompt's own prediction as the negative target and one more branch as the positive one,

    eps = eps_u + s p - r_k (eps_c - eps_u)        r_k = r cos(pi k / 2K), evaluation k of K        p = eps_plus - eps_u

where `s` is the pipeline's guidance scale, r = 2 at the first evaluation and nearly 0 at the last, and eps_plus is the conditional branch with the attention to spike tokens
attenuated (Zhao, Triantafillou, Triantafillou, *You don't need all that attention: surgical memorization mitigation in
text-to-image diffusion models*, ICML 2026: "CA-in-GUARD"). In each cross-attention, for the logits `l[q, i]` of query q and
token i,

    M_i = max_q l[q, i],   Z_i = (M_i - mean M) / (std M + 1e-6),   spikes = {i : Z_i > tau},   l'[q, i] = a l[q, i] on spikes

for each head by itself, BOS in neither the statistics nor the spikes, padding in both; then softmax. In the down and mid
blocks only: later ones cost quality. Where the two directions are nearly one, the positive loses its part along the negative,

    p <- p - c n    where cos(p, n) > 0.9,    n = eps_c - eps_u,    c = <p, n> / <n, n>, held in [-2, 2]

for each image by itself, of the outputs as the network gives them (`orthogonalize`).

The paper itself could not be read here; formula and r are from its abstract and summaries of it, and everything they leave
open follows its released code: the cosine, the orthogonal part, tau = 0.1 (0.01 for the attenuated branch alone, `repulsion=0`, which
their code neither repels nor makes orthogonal), a = 0.3, logits in M (a summary says "attention mass", weights after the softmax:
`statistic="weights"`), spikes found in the positive branch itself, which is why there is one extra branch and not two.
They chose tau, a and r for each model and kind of memorization. `decay="none", orthogonalize=False` is the sum of its abstract. Where ours differs: blocks are told apart by the number of
queries, which grows where the up blocks begin; in SDXL the first up block has as many as the middle, and counts as middle.

The attention is read where PyTorch computes it, in `scaled_dot_product_attention`. Networks whose attention goes another way
(attention slicing, xformers) or has text and image in one sequence (SD3) are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ambient_sd.guard.policies._common import number
from ambient_sd.guard.policies.base import Policy, Step
from ambient_sd.utils.errors import UserError

Statistic = Literal["logits", "weights"]

_PARALLEL, _MOST = 0.9, 2.0  # the cosine above which two directions count as one, and the largest part taken out


class AttentionGuard(Policy):
    """Guide by `eps_u + s (eps_plus - eps_u) - r (eps_c - eps_u)`, eps_plus with the attention to spikes attenuated.

    Args:
        repulsion: r, a finite number, at least 0. 0 leaves the attenuated branch alone ("CA attenuation").
        attenuation: a, the factor of a spike's logits, in [0, 1]. 1 attenuates nothing.
        threshold: tau, a finite number: how many standard deviations make a spike. None: as published, 0.1, and 0.01 with
            `repulsion=0`.
        statistic: M is the maximum of the "logits" or of the "weights" after the softmax.
        all_blocks: attenuate in the up blocks too.
        decay: r falls along a "cosine" to 0 over the run, as in the released code, or stays ("none").
        orthogonalize: take out of `eps_plus - eps_u` its part along `eps_c - eps_u` where the two are nearly parallel, as in the
            released code. With `repulsion=0` there is nothing to do.

    Raises:
        UserError: an argument is out of range; when sampling, the network's cross-attention cannot be read.

    Source: Zhao, Triantafillou, Triantafillou, ICML 2026.

    Example:
        >>> AttentionGuard().threshold, AttentionGuard(repulsion=0).threshold
        (0.1, 0.01)
    """

    cross_attention = True

    def __init__(
        self,
        repulsion: float = 2.0,
        attenuation: float = 0.3,
        threshold: float | None = None,
        statistic: Statistic = "logits",
        all_blocks: bool = False,
        decay: Literal["cosine", "none"] = "cosine",
        orthogonalize: bool = True,
    ) -> None:
        if not (math.isfinite(repulsion) and repulsion >= 0):
            raise UserError(f"repulsion {repulsion}", rule="it must be a finite number, at least 0")
        if not 0 <= attenuation <= 1:
            raise UserError(f"attenuation {attenuation}", rule="it must lie between 0 and 1")
        threshold = (0.1 if repulsion else 0.01) if threshold is None else threshold
        if not math.isfinite(threshold):
            raise UserError(f"threshold {threshold}", rule="it must be a finite number")
        if statistic not in ("logits", "weights"):
            raise UserError(f"statistic {statistic!r}", rule='it must be "logits" or "weights"')
        if decay not in ("cosine", "none"):
            raise UserError(f"decay {decay!r}", rule='it must be "cosine" or "none"')
        self.repulsion, self.attenuation, self.threshold = float(repulsion), float(attenuation), float(threshold)
        self.statistic, self.all_blocks = statistic, bool(all_blocks)
        self.decay, self.orthogonalize = decay, bool(orthogonalize)

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        number("guidance_scale", step.guidance_scale, above=0)
        embeds = step.halves.cond.embeds
        with SpikeAttenuation(
            (embeds.shape[-2], embeds.shape[-1]),
            lambda logits: spikes(logits, self.threshold, self.statistic),
            self.attenuation,
            self.all_blocks,
        ) as attention:
            plus = step.halves.predict("cond")
        if not attention.seen:
            raise UserError(
                "the network's cross-attention cannot be read",
                rule="AttentionGuard acts where PyTorch computes attention, text and image apart",
                remedy="switch attention slicing and xformers off, or use another policy",
            )
        away = step.cond - step.uncond
        if self.repulsion and self.orthogonalize:
            plus = plus - _parallel_part(plus - step.uncond, away).to(away) * away
        # The pipeline goes on to compute uncond + s (cond - uncond).
        return plus - self._repulsion(step) / step.guidance_scale * away, step.uncond

    def _repulsion(self, step: Step) -> float:
        if not self.repulsion or self.decay == "none":
            return self.repulsion
        if step.total is None:
            raise UserError(
                "the number of steps is unknown",
                rule="the repulsion falls along a cosine over the whole run",
                remedy='use decay="none"',
            )
        return self.repulsion * math.cos(math.pi / 2 * step.index / max(step.total, 1))


def _parallel_part(plus: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
    """Return the published coefficient c of `plus - c away`, `(n, 1, ...)`: 0 where the two are not nearly parallel."""
    wide = torch.promote_types(plus.dtype, torch.float32)
    p, n = plus.to(wide).flatten(1), away.to(wide).flatten(1)
    dot, pp, nn = (p * n).sum(1), (p * p).sum(1) + 1e-8, (n * n).sum(1) + 1e-8
    part = torch.where(dot / (pp * nn).sqrt() > _PARALLEL, (dot / nn).clamp(-_MOST, _MOST), torch.zeros_like(dot))
    return part.view(-1, *[1] * (plus.ndim - 1))


def spikes(logits: torch.Tensor, threshold: float, statistic: Statistic) -> torch.Tensor:
    """Return which tokens are spikes: `(max_q l[q, i] - mean) / (std + 1e-6) > threshold`, never the first (BOS).

    Args:
        logits: `(..., Q, L)`, float32 or wider, queries by tokens.
        threshold: in standard deviations over the tokens without the first.
        statistic: take the maximum of the "logits", or of the "weights" after the softmax over tokens.

    Returns:
        `(..., L)` bool.

    Example:
        >>> spikes(torch.tensor([[9.0, 0.0, 0.0, 5.0]]), threshold=1.0, statistic="logits").tolist()
        [False, False, False, True]
    """
    peak = (logits.softmax(-1) if statistic == "weights" else logits).amax(-2)
    others = peak[..., 1:]
    z = (peak - others.mean(-1, keepdim=True)) / (others.std(-1, keepdim=True) + 1e-6)
    found = z > threshold
    found[..., 0] = False
    return found


class SpikeAttenuation(TorchFunctionMode):
    """While on, scale the keys of spike tokens in every cross-attention: logits are linear in the keys.

    A call of `scaled_dot_product_attention` is a cross-attention if a linear layer has read the text since the last call
    and there are as many keys as tokens.

    Args:
        text: the text's `(L, D)`.
        find: `(B, heads, Q, L)` float32 logits -> `(B, heads, L)` bool, the spikes.
        factor: of the spikes' logits.
        all_blocks: go on when the number of queries grows, which it does where the up blocks begin.

    Attributes:
        seen: how many cross-attentions there were.

    Example:
        >>> q, k, text = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 3, 8)
        >>> with SpikeAttenuation((3, 8), lambda logits: torch.ones(logits.shape[:-2] + (3,), dtype=torch.bool), 0.5) as mode:
        ...     keys = F.linear(text, torch.ones(4, 8))  # reads the text
        ...     out = F.scaled_dot_product_attention(q, k, k)
        >>> mode.seen
        1
    """

    def __init__(
        self,
        text: tuple[int, int],
        find: Callable[[torch.Tensor], torch.Tensor],
        factor: float,
        all_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.text, self.find, self.factor, self.all_blocks = text, find, factor, all_blocks
        self.seen, self._text_read, self._up, self._queries = 0, False, False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            read = args[0] if args else kwargs["input"]
            self._text_read |= tuple(read.shape[-2:]) == self.text
        elif func is F.scaled_dot_product_attention and self._text_read:
            self._text_read = False
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            if given["key"].shape[-2] == self.text[0]:  # joint attention has the image's keys beside the text's
                given["key"] = self._attenuated(given["query"], given["key"], given.get("scale"))
            return func(**given)
        return func(*args, **kwargs)

    def _attenuated(self, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
        self.seen += 1
        self._up |= 0 < self._queries < query.shape[-2]
        self._queries = query.shape[-2]
        if self._up and not self.all_blocks:
            return key
        wide = torch.promote_types(query.dtype, torch.float32)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        found = self.find(query.to(wide) @ key.to(wide).mT * factor)
        return torch.where(found.unsqueeze(-1), key * self.factor, key)
