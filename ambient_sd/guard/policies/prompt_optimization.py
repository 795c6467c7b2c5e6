"""Wen et al.'s mitigation at sampling: move the prompt embedding until the first step no longer gives the copy away.

Before the first denoising step, AdamW on the conditional prompt embedding `e`, BOS position frozen, minimises
`|| eps_c(e) - eps_u ||_2` and stops as soon as it is at most `target`; that embedding serves all steps (Wen, Liu, Chen,
Lyu, ICLR 2024, section 4.2). Their code takes ONE norm over the whole batch, so that the target depends on how many
images are sampled together (their 3 with 4 images is about 1.5 per image, since squared norms add up). Here every
image has its own norm, its own optimizer state and its own stop: together or alone, it gets the same embedding.

Where the first steps carry no score (zero terminal SNR) "the first step" is the first that does, and the embedding serves from there on.
Only the conditional half is optimised; the unconditional half is evaluated once, without gradients. SDXL's pooled
embedding is left alone. Nothing random happens.

Where ours differs further. (1) AdamW's decay: their code sets the gradient of the BOS row to zero and leaves the row in the
parameter, so that each step still multiplies it by `1 - lr weight_decay = 1 - 0.0005`, 0.5 % in ten steps; ours is frozen, as the paper
says (`freeze_bos=False`: theirs). (2) They serve the embedding after the last step, whose norm was not looked at; ours the one with the
lowest norm (`serve="last"`: theirs). (3) They optimise in the pipeline's precision, bfloat16 or float16, where a step of 0.05 loses
digits; ours in float32 at least. (4) On v-prediction models the norm carries alpha_t; theirs is of the raw outputs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ambient_sd.guard.policies._common import number, require_signal, whole
from ambient_sd.guard.policies.base import Change, Policy, SamplingStart
from ambient_sd.guard.scores import guidance_norm
from ambient_sd.utils.errors import UserError


class PromptOptimization(Policy):
    """Optimise each image's prompt embedding until `|| eps_c - eps_u ||_2 <= target` at the first step.

    Args:
        target: the norm to reach, > 0, in the units of `ImageReport.curve`. It is per model and resolution (published:
            0.7 to 5 on SD1.4, 50 to 90 on SD2, over a batch).
        lr: AdamW's learning rate, > 0. Default as published.
        max_steps: most optimizer steps per image, >= 1. Default as published.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        serve: the "best" embedding seen, or the "last" as in the published code, worse or not.
        freeze_bos: leave the first position alone; False: let AdamW's decay move it, as in the published code.

    Raises:
        UserError: an argument is out of range; when sampling, the schedule's first step has no signal.

    Source: Wen, Liu, Chen, Lyu, ICLR 2024.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.guard.recorder import MemorizationGuard
        >>> pipe = tiny_pipeline()
        >>> with MemorizationGuard(pipe, PromptOptimization(target=1e-6, max_steps=1)) as guard:
        ...     drawn = pipe("a cat", num_inference_steps=1, output_type="latent")
        >>> guard.report[0].iterations
        1
    """

    begins_at_signal = True

    def __init__(
        self,
        target: float,
        lr: float = 0.05,
        max_steps: int = 10,
        gradient_checkpointing: bool = False,
        serve: Literal["best", "last"] = "best",
        freeze_bos: bool = True,
    ) -> None:
        if serve not in ("best", "last"):
            raise UserError(f"serve {serve!r}", rule='it must be "best" or "last"')
        self.serve, self.freeze_bos = serve, bool(freeze_bos)
        self.target, self.lr = number("target", target, above=0), number("lr", lr, above=0)
        self.max_steps = whole("max_steps", max_steps, least=1)
        self.gradient_checkpointing = gradient_checkpointing

    def begin(self, start: SamplingStart) -> Change:
        """Return the optimised embeddings; an image that is under the target already keeps its own."""
        halves = start.halves
        require_signal(halves)
        n = len(start.active)
        first, best = [math.nan] * n, [math.nan] * n  # of images that nobody asked about nothing is measured
        iterations, changed = [0] * n, [False] * n
        chosen = [i for i, active in enumerate(start.active) if active]
        device = halves.sample.device
        given = halves.cond.embeds
        with torch.no_grad():
            eps_u = halves.predict("uncond", rows=torch.tensor(chosen, device=device))

        with halves.enable_grad():
            # float32 at least: a step of 0.05 must not be rounded away in half precision.
            own = given.detach().to(torch.promote_types(given.dtype, torch.float32))[chosen]
            best_embeds = given.detach().clone()
            # AdamW works element by element, and all images that go on have taken equally many steps: one parameter is
            # as good as one per image. Rows of images that have stopped may drift; nothing reads them again.
            head, tail = own[:, :1].clone(), own[:, 1:].clone().requires_grad_(True)
            optimizer = torch.optim.AdamW([tail], lr=self.lr)
            going = list(range(len(chosen)))  # rows of `own`
            for iteration in range(self.max_steps + 1):
                last = iteration == self.max_steps
                with torch.set_grad_enabled(not last):
                    embeds = torch.cat([head[going], tail[going]], dim=1).to(given.dtype)
                    rows = torch.tensor([chosen[k] for k in going], device=device)
                    eps_c = halves.predict("cond", rows=rows, embeds=embeds)
                    norms = guidance_norm(cond=eps_c, uncond=eps_u[going]) * halves.noise_factor
                values = norms.tolist()
                going_on = []
                for place, k in enumerate(going):
                    i = chosen[k]
                    if iteration == 0:
                        first[i] = best[i] = values[place]
                    # A step may overshoot: never serve a worse embedding than an earlier one, unless told to.
                    elif values[place] < best[i] or self.serve == "last":
                        best[i], changed[i] = values[place], True
                        best_embeds[i] = embeds[place].detach()
                    if values[place] > self.target and not last:
                        going_on.append(place)
                if not going_on:
                    break
                going = [going[place] for place in going_on]
                # Images do not mix in the network, so the gradient of the sum is each image's own gradient.
                (tail.grad,) = torch.autograd.grad(norms[going_on].sum(), [tail])
                for k in going:
                    iterations[chosen[k]] += 1
                optimizer.step()
                if not self.freeze_bos:  # AdamW's step where the gradient is 0 is its decay, to the bit
                    head.mul_(1 - self.lr * optimizer.param_groups[0]["weight_decay"])
        return Change(
            changed, embeds=best_embeds, first_score_before=first, first_score_after=best, iterations=iterations
        )
