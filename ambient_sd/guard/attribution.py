"""Token attribution: the pull of each token of a prompt on the guard's score.

    score of token i = mean over steps and images of || d || eps_c - eps_u ||_2 / d e_i ||_2

with `e_i` the token's embedding as the network reads it (the text encoder's output), the inner norm over channels and pixels
as in `scores`, the outer one over the embedding's channels (Wen, Liu, Chen, Lyu, ICLR 2024, section 3: "trigger tokens").
A memorized prompt has a few tokens far above the others; changing those gives the copy up.

A policy that only watches takes the gradient: the images are the stock pipeline's, bit for bit. The text encoder is causal, so the end
of text and the padding summarise the prompt and can have the largest pull; the mean over the padding is kept apart. The published code
takes the gradient of one norm over the batch and divides by the rows of both halves, 2n: with one image half of ours (`norm="batch"`).
A gradient is a first-order statement: it does not prove that a word alone brings the image back. Not here: SDXL's pooled embedding,
which has no tokens.

A word of several tokens has the length of its tokens' scores taken together, `sqrt(sum of squares)`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from ambient_sd.guard.policies.base import Policy, SamplingStart, Step
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.guard.scores import guidance_norm
from ambient_sd.utils.errors import UserError, one_line

_LABEL = 24  # characters of a token in table and chart


@dataclass(frozen=True)
class TokenAttribution:
    """Hold the pull of each token of one prompt, from BOS to the first end of text.

    Attributes:
        prompt: the prompt's text.
        tokens: each token's text, as the (first) tokenizer gives it.
        scores: each token's score, >= 0, in units of `ImageReport.curve` per unit of the embedding.
        padding_score: the mean score of the padding's positions; None if there is no padding.
        images: over how many images the mean is taken.
        steps: over how many evaluations of the network.
        words: the text between beginning and end, word by word; a token by itself may be part of a character.
        word_scores: each word's score, the root of the sum of its tokens' squared scores.

    Example:
        >>> found = TokenAttribution("a cat", ["a", "cat"], [1.0, 4.0], padding_score=None, images=1, steps=50)
        >>> print(found.table(width=8))
        a           1  ##
        cat         4  ########
    """

    prompt: str
    tokens: list[str]
    scores: list[float]
    padding_score: float | None
    images: int
    steps: int
    words: list[str] = field(default_factory=list)
    word_scores: list[float] = field(default_factory=list)

    def to_json(self) -> str:
        """Return everything as one JSON object, ASCII only."""
        return json.dumps(asdict(self), allow_nan=False)

    def table(self, width: int = 40) -> str:
        """Return one line per token, in the prompt's order: text, score, bar; the longest bar has `width` characters."""
        rows = self.rows()
        label = max(len(text) for text, _ in rows)
        longest = max(score for _, score in rows) or 1.0
        return "\n".join(
            f"{text:<{label}}  {score:8.4g}  {'#' * round(width * score / longest)}".rstrip() for text, score in rows
        )

    def rows(self) -> list[tuple[str, float]]:
        """Return each token's text, on one line, with its score; the padding last."""
        rows = list(zip(self.tokens, self.scores, strict=True))
        if self.padding_score is not None:
            rows.append(("(padding, mean)", self.padding_score))
        # A prompt may hold anything: control characters would break the line, and are not allowed in XML at all.
        return [(one_line(text, _LABEL) or repr(text)[:_LABEL], score) for text, score in rows]


class TokenGradients(Policy):
    """Watch a run and sum `|| d || eps_c - eps_u || / d e_i ||` of every token; change nothing.

    One backward pass of the conditional half per image and step, in the precision of the pipeline.

    Args:
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        norm: of each "image", or as the published code has it of the "batch": for the n images of one prompt together,
            `|| d (sum_k d_k^2)^(1/2) / d e_i || / (2 n)` with d_k the norm of image k. With one image that is half of ours.

    Attributes:
        total: `(n, L)` float32 or wider, on the device: the sum over the evaluations so far.
        steps: how many there were.
        token_ids: `(n, L)` long, on the CPU, as in `SamplingStart`.
        token_mask: `(n, L)` bool, on the CPU, as in `SamplingStart`.

    Raises:
        UserError: when sampling, it is unknown which token each embedding belongs to.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe, watch = tiny_pipeline(), TokenGradients()
        >>> with MemorizationGuard(pipe, watch, stop_after=1):
        ...     drawn = pipe("a cat", num_inference_steps=2, output_type="latent")
        >>> watch.result("a cat", pipe.tokenizer).words
        ['a', 'cat']
    """

    mitigates = False

    def __init__(self, gradient_checkpointing: bool = False, norm: Literal["image", "batch"] = "image") -> None:
        if norm not in ("image", "batch"):
            raise UserError(f"norm {norm!r}", rule='it must be "image" or "batch"')
        self.gradient_checkpointing, self.norm = gradient_checkpointing, norm
        self.total: torch.Tensor | None = None
        self.steps = 0
        self.token_ids: torch.Tensor | None = None
        self.token_mask: torch.Tensor | None = None

    def begin(self, start: SamplingStart) -> None:
        if start.token_ids is None:
            raise UserError(
                "it is unknown which token each embedding belongs to",
                rule="prompt_embeds do not say it, nor do networks that read several encoders end to end, or prompts in a template",
                remedy="call a Stable Diffusion 1, 2 or XL pipeline with prompt=...",
            )
        self.total, self.steps = None, 0
        self.token_ids, self.token_mask = start.token_ids, start.token_mask

    def step(self, step: Step) -> None:
        if step.silent:  # no score, no slope
            return
        halves = step.halves
        rows, norms = [], []
        with halves.enable_grad():
            for i in range(len(step.cond)):  # one by one: the memory of one backward pass
                row = torch.tensor([i], device=step.cond.device)
                embeds = halves.cond.embeds[i : i + 1].detach().clone().requires_grad_(True)
                cond = halves.predict("cond", rows=row, embeds=embeds)
                # The unconditional half does not read the prompt: what the loop had of it will do. As a copy, since the
                # loop's may have been made under torch.inference_mode.
                norm = guidance_norm(cond=cond, uncond=step.uncond[i : i + 1].clone()) * halves.noise_factor
                (gradient,) = torch.autograd.grad(norm.sum(), [embeds])
                rows.append(gradient.to(norm.dtype) if self.norm == "batch" else gradient.to(norm.dtype).norm(dim=-1))
                norms.append(norm.detach())
            scores = self._of_batches(torch.cat(rows), torch.cat(norms)) if self.norm == "batch" else torch.cat(rows)
            self.total = scores if self.total is None else self.total + scores
        self.steps += 1

    def _of_batches(self, gradients: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Return the published score from `d d_k / d e`, `(n, L, D)`, and d_k, `(n,)`: images of one prompt share it, `(n, L)`."""
        assert self.token_ids is not None
        _, prompt = torch.unique(self.token_ids, dim=0, return_inverse=True)
        same = (prompt[:, None] == prompt[None]).to(norms)
        # d (sum_k d_k^2)^(1/2) = sum_k d_k d(d_k) / (sum_k d_k^2)^(1/2); without any norm there is no gradient either.
        whole = (same @ norms.square()).sqrt().clamp_min(torch.finfo(norms.dtype).tiny)
        weighed = torch.einsum("ij,j,jld->ild", same, norms, gradients) / whole.view(-1, 1, 1)
        return weighed.norm(dim=-1) / (2 * same.sum(1, keepdim=True))

    def result(self, prompt: str, tokenizer: Any, images: Sequence[int] | None = None) -> TokenAttribution:
        """Return the mean over the images of one prompt of the last run.

        Args:
            prompt: the prompt's text.
            tokenizer: the pipeline's.
            images: their places in the run; None: all.

        Raises:
            UserError: the gradient is not finite.
        """
        assert self.total is not None and self.token_ids is not None and self.token_mask is not None
        chosen = list(range(len(self.total))) if images is None else list(images)
        scores = (self.total[chosen].double().mean(0) / self.steps).tolist()
        if not all(math.isfinite(score) for score in scores):
            raise UserError(
                "the gradient of || eps_c - eps_u || is not finite",
                rule="the network's outputs, or their gradient, overflow in this precision",
                remedy="load the pipeline in float32 or bfloat16",
            )
        mask = self.token_mask[chosen[0]].tolist()
        ids = [i for i, real in zip(self.token_ids[chosen[0]].tolist(), mask, strict=True) if real]
        padding = [score for score, real in zip(scores, mask, strict=True) if not real]
        scores = [score for score, real in zip(scores, mask, strict=True) if real]
        words = _words(tokenizer, ids)
        return TokenAttribution(
            prompt=prompt,
            tokens=[tokenizer.decode([i]) for i in ids],
            scores=scores,
            padding_score=sum(padding) / len(padding) if padding else None,
            images=len(chosen),
            steps=self.steps,
            words=[tokenizer.decode([ids[i] for i in places]).strip() for places in words],
            word_scores=[math.hypot(*(scores[i] for i in places)) for places in words],
        )


def _words(tokenizer: Any, ids: Sequence[int]) -> list[list[int]]:
    """Return the places of each word's tokens. CLIP marks the last one of a word; without marks each token is a word."""
    texts = tokenizer.convert_ids_to_tokens(list(ids))
    marked = any(text.endswith("</w>") for text in texts)
    words: list[list[int]] = [[]]
    for place, (token, text) in enumerate(zip(ids, texts, strict=True)):
        if token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            continue
        words[-1].append(place)
        if text.endswith("</w>") or not marked:
            words.append([])
    return [places for places in words if places]


def attribute(
    pipe: Any,
    prompt: str,
    *,
    num_inference_steps: int = 50,
    num_images: int = 1,
    seed: int = 0,
    stop_after: int | None = None,
    gradient_checkpointing: bool = False,
    norm: Literal["image", "batch"] = "image",
    **call: Any,
) -> TokenAttribution:
    """Sample a prompt and return the pull of each of its tokens on `|| eps_c - eps_u ||`.

    Args:
        pipe: a diffusers pipeline that `MemorizationGuard` supports, with no guard on.
        prompt: one prompt.
        num_inference_steps: of the sampler, >= 1.
        num_images: over how many images the mean is taken, >= 1.
        seed: of the images' noise, drawn on the CPU.
        stop_after: use only the first N evaluations that carry a signal, and leave the images unfinished; None: all.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        norm: "image", or "batch" as in the published code (`TokenGradients`): half as large for one image.
        call: further arguments of the pipeline (`guidance_scale`, `negative_prompt`, `height`, `generator`, ...).

    Raises:
        UserError: an argument is out of range; the embeddings are not tokens, one by one; the gradient is not finite.

    Source: Wen, Liu, Chen, Lyu, ICLR 2024.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> attribute(tiny_pipeline(), "a cat", num_inference_steps=2, stop_after=1).tokens
        ['<|startoftext|>', 'a', 'c', 'a', 't', '<|endoftext|>']
    """
    if not isinstance(prompt, str):
        raise UserError(f"prompt is a {type(prompt).__name__}", rule="attribution explains one prompt, a string")
    counts = {"num_inference_steps": num_inference_steps, "num_images": num_images, "stop_after": stop_after}
    for name, value in counts.items():
        if value is not None and (int(value) != value or value < 1):
            raise UserError(f"{name} {value}", rule="it must be a whole number, at least 1")
    watch = TokenGradients(gradient_checkpointing, norm)
    given = {"generator": torch.Generator().manual_seed(seed), "output_type": "latent"} | call
    with MemorizationGuard(pipe, watch, stop_after=stop_after):
        pipe(prompt=prompt, num_inference_steps=num_inference_steps, num_images_per_prompt=num_images, **given)
    return watch.result(prompt, pipe.tokenizer)
