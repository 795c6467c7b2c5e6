"""PRSS: a prompt that triggers memorization becomes the anchor to move away from, a softer prompt the one to move to.

    m = || eps(x, e_p) - eps(x, e_0) || at the first step
    m <= lambda:  eps = eps(e_0) + g (eps(e_p)    - eps(e_0))         as ever
    m  > lambda:  eps = eps(e_p) + g (eps(e_soft) - eps(e_p))         at every step

(Chen, Liu, Shah, Xu, *Enhancing privacy-utility trade-offs to mitigate memorization in diffusion models*, CVPR 2025: prompt
re-anchoring and semantic prompt search. Read from a detailed summary with its equations, not in the original.) The
published search asks GPT-4 for up to 25 texts of the same meaning, scores them at the first step in turn, takes the first
whose m is under lambda, else the one with the lowest. Here the search is the same but the texts are the caller's; a
library calls no language model. Without any, each text leaves out one run of the prompt's words (`leave_words_out`): a
memorized prompt often hangs on one or two trigger words. That is cruder than a paraphrase, and said so.

Where ours differs further: the masked magnitude m' of the same authors is not offered; a picture whose search ends under
lambda is re-anchored too, as in the paper's final equation. From the first step on the recorded norms are distances between the softer
and the original prompt: they do not compare with other scores (`first_score_before` does), and policies that read them
(`DynamicTransition`, `ScaleCap`, `Despecification`) mean something else together with this one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch

from ambient_sd.errors import UserError
from ambient_sd.guard.policies._common import number, require_signal, with_rows
from ambient_sd.guard.policies.base import Change, Encoded, Policy, SamplingStart
from ambient_sd.guard.scores import guidance_norm

Texts = str | Sequence[str]


def leave_words_out(prompt: str, most: int = 25) -> list[str]:
    """Return up to `most` texts, each the prompt without one run of its words; together the runs are the whole prompt.

    Args:
        prompt: any text. One without words is returned as it is.
        most: most texts, >= 1; with no more words than that every run is a single word.
    """
    words = prompt.split()
    if not words:
        return [prompt]
    parts = min(most, len(words))
    ends = [len(words) * k // parts for k in range(parts + 1)]
    return [" ".join(words[:a] + words[b:]) for a, b in itertools.pairwise(ends)]


class Reanchoring(Policy):
    """Where the first-step score exceeds `threshold`: `eps = eps(e_p) + g (eps(e_soft) - eps(e_p))`.

    Costs one evaluation of both halves, and for pictures above the threshold one of the conditional half for each softer text
    tried. It takes the unconditional slot, so a negative prompt no longer acts on such a picture.

    Args:
        threshold: lambda, >= 0, in the units of `ImageReport.curve`; it is compared with `curve[0]`.
        softer: the softer prompt: one text for every prompt, a dict from prompt to text, or a function of the prompt.
            A dict's values and a function's result may also be several texts, tried in turn: the first whose score is at
            most `threshold` is taken, else the one with the lowest. Default: `leave_words_out`.

    Raises:
        UserError: an argument is of the wrong kind; when sampling, a prompt above the threshold has no softer one, the pipeline
            was called with embeddings, or the schedule's first step has no signal.

    Source: Chen, Liu, Shah, Xu, CVPR 2025.
    """

    begins_at_signal = True
    begins_alone = True  # `Compose`: later ones would read the distance between two prompts as a score

    def __init__(
        self, threshold: float, softer: str | Mapping[str, Texts] | Callable[[str], Texts] | None = None
    ) -> None:
        self.threshold = number("threshold", threshold, least=0)
        if not (softer is None or isinstance(softer, (str, Mapping)) or callable(softer)):
            raise UserError(
                f"softer is a {type(softer).__name__}",
                rule="it must be a text, a dict from prompt to text, or a function of the prompt",
            )
        for prompt, texts in softer.items() if isinstance(softer, Mapping) else ():
            _checked(prompt, texts)
        self.softer = softer

    def begin(self, start: SamplingStart) -> Change:
        """Return the exchanged embeddings of the pictures whose first-step score exceeds the threshold."""
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
            after, best = list(before), [float("inf")] * len(before)
            chosen, left, attempt = halves.cond, list(texts), 0
            while left:
                rows = torch.tensor(left, device=cond.device)
                encoded = start.encode([texts[i][attempt] for i in left])
                soft = halves.predict("cond", rows=rows, embeds=encoded.embeds, pooled=encoded.pooled)
                scores = (guidance_norm(cond=soft, uncond=uncond[rows]) * halves.noise_factor).tolist()
                distances = (guidance_norm(cond=soft, uncond=cond[rows]) * halves.noise_factor).tolist()
                # The first text is taken whatever its score: a number that is none (NaN) is not below anything.
                better = [k for k, i in enumerate(left) if attempt == 0 or scores[k] < best[i]]
                for k in better:
                    best[left[k]], after[left[k]] = scores[k], distances[k]
                if better:
                    pooled = None if encoded.pooled is None else encoded.pooled[better]
                    chosen = with_rows(chosen, [left[k] for k in better], Encoded(encoded.embeds[better], pooled))
                attempt += 1
                left = [i for i in left if not best[i] <= self.threshold and attempt < len(texts[i])]
        return Change(
            changed=[i in texts for i in range(len(before))],
            embeds=chosen.embeds, pooled=chosen.pooled, uncond_embeds=halves.cond.embeds, uncond_pooled=halves.cond.pooled,
            first_score_before=before, first_score_after=after,
        )  # fmt: skip

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


def _checked(prompt: object, texts: object) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Sequence) else []
    if not found or not all(isinstance(text, str) for text in found):
        raise UserError(
            f"softer prompt of {prompt!r}: {texts!r}", rule="it must be a text, or a list of at least one text"
        )
    return found
