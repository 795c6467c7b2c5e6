"""PRSS: a prompt that triggers memorization becomes the anchor to move away from, a softer prompt the one to move to.

An image whose first step has `m = || eps(e_p) - eps(e_0) || > lambda` gets a softer prompt in place of its own. Whether it is
re-anchored is decided at every evaluation anew, by the softer prompt's own magnitude d = || eps(e_soft) - eps(e_0) ||:

    d <= L:  eps = eps(e_0) + g (eps(e_soft) - eps(e_0))                                       plain guidance by the softer prompt
    d  > L:  eps = eps(e_p) + s (eps(e_soft) - eps(e_p)) + (g - s) (eps(e_soft) - eps(e_0))
             s = 1 + (g - 1) min((d - L) / (M - L), 1)                                         from 1, which is the line above, to g

(`rule="step"`: the released code of Chen, Liu, Shah, Xu, *Enhancing privacy-utility trade-offs to mitigate memorization in diffusion
models*, CVPR 2025, prompt re-anchoring and semantic prompt search; there lambda = 1, L = 3, M = 5 on SD1.4.) The paper's equation, of
which we know a detailed summary only, is the second line with s = g at every step (`rule="all"`).

The published search asks GPT-4 for up to 25 texts of the same meaning, scores them at the first step in turn, takes the first
whose m is at most lambda, else the one with the lowest; the original is among them, so that an image of which no text is softer
keeps its own prompt, and where d > L is guided less: `eps(e_p) + (g - s) (eps(e_p) - eps(e_0))`. Here the search is the same but the
texts are the caller's; a library calls no language model. Without any, each text leaves out one run of the prompt's words
(`leave_words_out`): a memorized prompt often hangs on one or two trigger words. That is cruder than a paraphrase, and said so.

Where ours differs further: magnitudes are each image's own (theirs one norm over the batch, which they sample with one image) and on
v-prediction models carry alpha_t; the masked magnitude m' of the same authors is not offered. With `rule="all"` the original is not
among the texts, and from the first step on the recorded norms are distances between the softer and the original prompt: they do not
compare with other scores (`first_score_before` does), and policies that read them (`DynamicTransition`, `ScaleCap`,
`Despecification`) mean something else together with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from ambient_sd.guard.policies._common import number, require_signal, with_rows
from ambient_sd.guard.policies.base import Change, Encoded, Policy, SamplingStart, Step
from ambient_sd.guard.scores import guidance_norm
from ambient_sd.utils.errors import UserError

Texts = str | Sequence[str]

_LEAST, _FULL = 3.0, 5.0  # L and M in units of lambda, as published


def leave_words_out(prompt: str, most: int = 25) -> list[str]:
    """Return up to `most` texts, each the prompt without one run of its words; together the runs are the whole prompt.

    Args:
        prompt: any text. One without words is returned as it is.
        most: most texts, >= 1; with no more words than that every run is a single word.

    Example:
        >>> leave_words_out("a red apple")
        ['red apple', 'a apple', 'a red']
    """
    words = prompt.split()
    if not words:
        return [prompt]
    parts = min(most, len(words))
    ends = [len(words) * k // parts for k in range(parts + 1)]
    return [" ".join(words[:a] + words[b:]) for a, b in itertools.pairwise(ends)]


class Reanchoring(Policy):
    """Where the first-step score exceeds `threshold`, guide by a softer prompt, away from the original while the pull is strong.

    Costs one evaluation of both halves, and for images above the threshold one of the conditional half for each softer text
    tried; with `rule="step"` one more of the conditional half at every step.

    Args:
        threshold: lambda, >= 0, in the units of `ImageReport.curve`; it is compared with `curve[0]`.
        softer: the softer prompt: one text for every prompt, a dict from prompt to text, or a function of the prompt.
            A dict's values and a function's result may also be several texts, tried in turn: the first whose score is at
            most `threshold` is taken, else the one with the lowest. Default: `leave_words_out`.
        rule: "step" decides at every step, as in the authors' code; "all" re-anchors at all steps, as in the paper's equation: the
            original prompt takes the unconditional slot, so a negative prompt no longer acts on such an image.
        least: L, >= 0: the softer prompt's norm from which a step is re-anchored. None: 3 times `threshold`, as published.
        full: M, >= `least`: the norm from which it is so wholly. None: 5 times `threshold`, as published. Both are of "step".

    Raises:
        UserError: an argument is of the wrong kind; when sampling, a prompt above the threshold has no softer one, the pipeline
            was called with embeddings, or the schedule's first step has no signal.

    Source: Chen, Liu, Shah, Xu, CVPR 2025.

    Example:
        >>> Reanchoring(threshold=2.0, softer="a photo").least
        6.0
    """

    begins_at_signal = True
    exclusive = True  # `Compose`: later ones would read the distance between two prompts as a score

    def __init__(
        self,
        threshold: float,
        softer: str | Mapping[str, Texts] | Callable[[str], Texts] | None = None,
        rule: Literal["step", "all"] = "step",
        least: float | None = None,
        full: float | None = None,
    ) -> None:
        self.threshold = number("threshold", threshold, least=0)
        if rule not in ("step", "all"):
            raise UserError(f"rule {rule!r}", rule='it must be "step" or "all"')
        if rule == "all" and not (least is None and full is None):
            raise UserError(
                'least and full are given with rule "all"', rule="it re-anchors at all steps, whatever the norm"
            )
        self.rule = rule
        self.least = _LEAST * self.threshold if least is None else number("least", least, least=0)
        self.full = max(_FULL * self.threshold, self.least) if full is None else number("full", full, least=self.least)
        self._rows: torch.Tensor | None = None  # images of this run with a softer prompt, and the prompts they had
        self._anchor: Encoded | None = None
        if not (softer is None or isinstance(softer, (str, Mapping)) or callable(softer)):
            raise UserError(
                f"softer is a {type(softer).__name__}",
                rule="it must be a text, a dict from prompt to text, or a function of the prompt",
            )
        for prompt, texts in softer.items() if isinstance(softer, Mapping) else ():
            _checked(prompt, texts)
        self.softer = softer

    def begin(self, start: SamplingStart) -> Change:
        """Return the softer prompts of the images whose first-step score exceeds the threshold."""
        self._rows = self._anchor = None
        anchored = self.rule == "all"
        if start.prompts is None:
            raise UserError(
                "re-anchoring needs the prompt's text",
                rule="the pipeline was called with embeddings, which have no softer wording",
                remedy="call it with prompt=",
            )
        halves = start.halves
        require_signal(halves)
        with torch.no_grad():
            cond, uncond = halves.predict("cond"), halves.predict("uncond")
            before: list[float] = (guidance_norm(cond=cond, uncond=uncond) * halves.noise_factor).tolist()
            texts = {
                i: self._texts(start.prompts[i])
                for i, (score, active) in enumerate(zip(before, start.active, strict=True))
                if active and score > self.threshold
            }
            # The original prompt is one of the texts of "step": only what is softer than it is taken.
            after, best = list(before), [float("inf")] * len(before) if anchored else list(before)
            chosen, left, attempt = halves.cond, list(texts), 0
            while left:
                rows = torch.tensor(left, device=cond.device)
                encoded = start.encode([texts[i][attempt] for i in left])
                soft = halves.predict(
                    "cond", rows=rows, embeds=encoded.embeds, pooled=encoded.pooled, mask=encoded.mask
                )
                scores = (guidance_norm(cond=soft, uncond=uncond[rows]) * halves.noise_factor).tolist()
                distances = (guidance_norm(cond=soft, uncond=cond[rows]) * halves.noise_factor).tolist()
                # With "all" the first is taken whatever its score: a number that is none (NaN) is not below anything.
                better = [k for k, i in enumerate(left) if (anchored and attempt == 0) or scores[k] < best[i]]
                for k in better:
                    best[left[k]], after[left[k]] = scores[k], distances[k] if anchored else scores[k]
                if better:
                    chosen = with_rows(chosen, [left[k] for k in better], _some(encoded, better))
                attempt += 1
                left = [i for i in left if not best[i] <= self.threshold and attempt < len(texts[i])]
        if texts and not anchored:
            self._rows = torch.tensor(list(texts), device=cond.device)
            self._anchor = _some(halves.cond, self._rows)
        return Change(
            changed=[i in texts for i in range(len(before))],
            embeds=chosen.embeds, pooled=chosen.pooled, mask=chosen.mask,
            uncond_embeds=halves.cond.embeds if anchored else None, uncond_pooled=halves.cond.pooled if anchored else None,
            uncond_mask=halves.cond.mask if anchored else None,
            first_score_before=before, first_score_after=after,
        )  # fmt: skip

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return outputs that the pipeline's guidance turns into the published sum; None where no image has a softer prompt."""
        if step.silent or self._rows is None or self._anchor is None:  # before `begin`: what is kept is of another run
            return None
        g = number("guidance_scale", step.guidance_scale, above=0)
        rows, soft, uncond = self._rows, step.cond[self._rows], step.uncond[self._rows]
        embeds, pooled, mask = self._anchor
        anchor = step.halves.predict("cond", rows=rows, embeds=embeds, pooled=pooled, mask=mask).to(soft)
        d = step.norms[-1][rows]
        # Where L = M every step above L is re-anchored wholly.
        share = (
            ((d - self.least) / (self.full - self.least)).clamp(0, 1) if self.full > self.least else torch.ones_like(d)
        )
        share = torch.where(d > self.least, share, torch.zeros_like(d)).to(soft.dtype).view(-1, *[1] * (soft.ndim - 1))
        # s = 1 + (g - 1) share. With s = 1 the sum is eps_u + g (soft - u), so that what is added to `soft` is the rest over g.
        moved = soft + (g - 1) / g * share * (uncond - anchor)
        return step.cond.index_copy(0, rows, torch.where(share > 0, moved, soft)), step.uncond

    def _texts(self, prompt: str) -> list[str]:
        if self.softer is None:
            return leave_words_out(prompt)
        if isinstance(self.softer, str):
            return [self.softer]
        if not isinstance(self.softer, Mapping):
            return _checked(prompt, self.softer(prompt))
        if prompt not in self.softer:
            raise UserError(
                f"no softer prompt for {prompt!r}",
                rule="its first-step score exceeds the threshold, and the dict of softer prompts does not have it",
                remedy="add it, or pass a function of the prompt",
            )
        return _checked(prompt, self.softer[prompt])


def _some(text: Encoded, rows: list[int] | torch.Tensor) -> Encoded:
    return Encoded(*(None if part is None else part[rows] for part in text))  # type: ignore[arg-type]


def _checked(prompt: object, texts: object) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Sequence) else []
    if not found or not all(isinstance(text, str) for text in found):
        raise UserError(
            f"softer prompt of {prompt!r}: {texts!r}", rule="it must be a text, or a list of at least one text"
        )
    return found
