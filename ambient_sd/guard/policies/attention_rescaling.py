"""Ren et al.'s mitigation: less attention for the tokens that carry the copy, more for the one that says nothing.

Images are recalled through the summary tokens at the prompt's end and its padding, on which cross-attention then
concentrates. In every cross-attention of the conditional branch, for the logits `l` of a query over the tokens,

    l'_BOS = C l_BOS,      l'_i = -inf for padding,      weights = softmax(l')

with C = 1.25: the beginning-of-text token, which is the same for every prompt, takes up attention (Ren, Li, Zeng, Xu, Lyu,
Xing, Tang, *Unveiling and mitigating memorization in text-to-image diffusion models through cross attention*, ECCV 2024,
section 5; C from 1.1 to 1.5 is compared by others). The first end-of-text token stays.

The paper itself could not be read here: procedure and C are those of its released code. Where ours differs: that code
hides the padding positions of the prompt in the unconditional branch too; ours leaves that branch alone. As published, a
negative logit becomes smaller by the factor, not larger.
"""

from __future__ import annotations

import torch

from ambient_sd.guard.policies._common import number
from ambient_sd.guard.policies.base import Change, Policy, SamplingStart
from ambient_sd.utils.errors import UserError


class AttentionRescaling(Policy):
    """Multiply the attention logit of BOS by `bos_scale` and hide the padding, in the conditional half.

    Args:
        bos_scale: C, a finite number above 0. Default as published.

    Raises:
        UserError: `bos_scale` is out of range; when sampling, it is unknown which positions are padding.

    Source: Ren et al., ECCV 2024.

    Example:
        >>> AttentionRescaling().bos_scale
        1.25
    """

    cross_attention = True

    def __init__(self, bos_scale: float = 1.25) -> None:
        self.bos_scale = number("bos_scale", bos_scale, above=0)

    def begin(self, start: SamplingStart) -> Change:
        if start.token_mask is None:
            raise UserError(
                "AttentionRescaling cannot tell which positions are padding",
                rule="prompt_embeds do not say it",
                remedy="call a Stable Diffusion pipeline with prompt=..., or use another policy",
            )
        embeds = start.halves.cond.embeds
        weights = start.token_mask.to(embeds.device, torch.float32)
        scale = torch.ones_like(weights)
        scale[:, 0] = self.bos_scale
        return Change(list(start.active), token_weights=weights, key_scale=scale)
