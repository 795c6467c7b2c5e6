"""Wen et al.'s mitigation at sampling: move the prompt embedding until the first step no longer gives the copy away.

Before the first denoising step, AdamW on the conditional prompt embedding `e`, BOS position frozen, minimises
`|| eps_c(e) - eps_u ||_2` and stops as soon as it is at most `target`; that embedding serves all steps (Wen, Liu, Chen,
Lyu, ICLR 2024, section 4.2). Their code takes ONE norm over the whole batch, so that the target depends on how many
pictures are sampled together (their 3 with 4 pictures is about 1.5 per picture, since squared norms add up). Here every
picture has its own norm, its own optimizer state and its own stop: together or alone, it gets the same embedding.

Only the conditional half is optimised; the unconditional half is evaluated once, without gradients. SDXL's pooled
embedding is left alone. Nothing random happens.
"""

from __future__ import annotations

import math

import torch

from ambient_sd.errors import UserError
from ambient_sd.guard.policies.base import Policy, PromptChange, SamplingStart
from ambient_sd.guard.scores import guidance_norm

_NO_SIGNAL = 1e-3  # noise factors below this: the first step carries no score (alpha_t = 0 at zero terminal SNR)


class PromptOptimization(Policy):
    """Optimise each picture's prompt embedding until `|| eps_c - eps_u ||_2 <= target` at the first step.

    Args:
        target: the norm to reach, > 0, in the units of `ImageReport.curve`. It is per model and resolution (published:
            0.7 to 5 on SD1.4, 50 to 90 on SD2, over a batch).
        lr: AdamW's learning rate, > 0. Default as published.
        max_steps: most optimizer steps per picture, >= 1. Default as published.

    Raises:
        UserError: an argument is out of range; when sampling, the schedule's first step has no signal.

    Source: Wen, Liu, Chen, Lyu, ICLR 2024.
    """

    def __init__(self, target: float, lr: float = 0.05, max_steps: int = 10) -> None:
        for name, value in (("target", target), ("lr", lr)):
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} {value}", rule="it must be a finite number above 0")
        if int(max_steps) != max_steps or max_steps < 1:
            raise UserError(f"max_steps {max_steps}", rule="it must be a whole number, at least 1")
        self.target, self.lr, self.max_steps = float(target), float(lr), int(max_steps)

    def begin(self, start: SamplingStart) -> PromptChange:
        """Return the optimised embeddings; a picture that is under the target already keeps its own."""
        if start.noise_factor < _NO_SIGNAL:
            raise UserError(
                f"the first step (timestep {start.timestep:g}) carries no score",
                rule="with zero terminal SNR alpha_t is 0 there, so || eps_c - eps_u || is 0 for every prompt",
                remedy="use a scheduler without rescale_betas_zero_snr, or another policy",
            )
        n = start.prompt_embeds.shape[0]
        eps_u = start.predict_uncond()
        first, best = [0.0] * n, [0.0] * n
        iterations, changed = [0] * n, [False] * n

        with start.enable_grad():
            # float32 at least: a step of 0.05 must not be rounded away in half precision.
            wide = torch.promote_types(start.prompt_embeds.dtype, torch.float32)
            own = start.prompt_embeds.detach().to(wide)
            best_embeds = start.prompt_embeds.clone()
            # AdamW works element by element, and all active pictures have taken equally many steps: one parameter is as
            # good as one per picture. Rows of pictures that have stopped may drift; nothing reads them again.
            tail = own[:, 1:].clone().requires_grad_(True)
            optimizer = torch.optim.AdamW([tail], lr=self.lr)
            active = list(range(n))
            for iteration in range(self.max_steps + 1):
                last = iteration == self.max_steps
                with torch.set_grad_enabled(not last):
                    rows = torch.tensor(active, device=eps_u.device)
                    embeds = torch.cat([own[rows, :1], tail[rows]], dim=1).to(start.prompt_embeds.dtype)
                    norms = guidance_norm(cond=start.predict_cond(embeds, rows), uncond=eps_u[rows])
                    norms = norms * start.noise_factor
                values = norms.tolist()
                going_on = []
                for k, i in enumerate(active):
                    if iteration == 0:
                        first[i] = best[i] = values[k]
                    elif values[k] < best[i]:  # a step may overshoot: never serve a worse embedding than an earlier one
                        best[i], changed[i] = values[k], True
                        best_embeds[i] = embeds[k].detach()
                    if values[k] > self.target and not last:
                        going_on.append(k)
                if not going_on:
                    break
                active = [active[k] for k in going_on]
                # Pictures do not mix in the network, so the gradient of the sum is each picture's own gradient.
                (tail.grad,) = torch.autograd.grad(norms[going_on].sum(), [tail])
                for i in active:
                    iterations[i] += 1
                optimizer.step()
        return PromptChange(best_embeds, changed, first, best, iterations)
