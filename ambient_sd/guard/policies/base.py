"""The interface of every mitigation: what a policy sees of a sampling run and what it may replace.

A policy is a small object without state between runs. The guard calls `begin` once, before the first denoising step,
and `step` after every evaluation of the network; either may do nothing. A policy never sees the denoising loop, so it
works in every pipeline and with every scheduler that the guard supports. Nor does it decide which images it acts on:
rows of images that are not `active` (`MemorizationGuard(..., when="flagged")`) stay the pipeline's own, to the bit.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

Half = Literal["cond", "uncond"]


class Encoded(NamedTuple):
    """Hold a text encoder's output: `(m, L, D)`, the pooled `(m, P)` where the network takes one (SDXL), else None, and the mask
    `(m, L)` of the rows that are read, where it is told; None: all.

    Example:
        >>> Encoded(torch.zeros(1, 77, 768), pooled=None).embeds.shape[1]
        77
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None
    mask: torch.Tensor | None = None


def wide(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Return `(m, L, ...)` with zeros behind, up to a length.

    Example:
        >>> wide(torch.ones(1, 2), 3).tolist()
        [[1.0, 1.0, 0.0]]
    """
    missing = length - rows.shape[1]
    return rows if missing <= 0 else torch.cat([rows, rows.new_zeros(rows.shape[0], missing, *rows.shape[2:])], dim=1)


class GuidanceBranches(abc.ABC):
    """Evaluate the network of one step again: one half of guidance, some of the images, other inputs.

    Attributes:
        sample: the network's input, equal for both halves, `(n, C, H, W)` (scaled as the scheduler does).
        cond: conditional embeddings, `n` rows.
        uncond: what stands in the unconditional slot, `n` rows.
        timestep: `()` tensor on the device, in the scheduler's units: reading it with `.item()` costs a synchronisation.
        noise_factor: `()` tensor on the device: what turns a norm of output differences into the score's: one of noise (`scores`), or 1
            with `score_space="output"`.
        flow: 1 where the network predicts the flow `eps - x0`, -1 where it predicts `x0 - eps`, 0 elsewhere.

    Example:
        >>> class Fake(GuidanceBranches):
        ...     def predict(self, half, **other):
        ...         return torch.ones(1) if half == "cond" else torch.zeros(1)
        ...     def enable_grad(self):
        ...         return torch.enable_grad()
        >>> Fake().predict("cond").tolist()
        [1.0]
    """

    sample: torch.Tensor
    cond: Encoded
    uncond: Encoded
    timestep: torch.Tensor
    noise_factor: torch.Tensor
    flow: int = 0

    @abc.abstractmethod
    def predict(
        self,
        half: Half,
        *,
        rows: torch.Tensor | None = None,
        sample: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        key_scale: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Evaluate one half of the network for `m` images.

        Args:
            half: whose remaining inputs are taken ("cond" or "uncond").
            rows: `(m,)` long: which images; all if None.
            sample: `(m, C, H, W)` instead of the network's input; gradients flow to it.
            embeds: `(m, L, D)` instead of the half's embeddings; gradients flow to them.
            pooled: `(m, P)` instead of the half's pooled embeddings.
            mask: `(m, L)` of these embeddings, where the network is told which rows are read; None: as the half's.
            token_weights: `(m, L)`, >= 0: every cross-attention weight of token l is multiplied by it before the weights
                are normalised (a bias of its logarithm; 0 hides the token).
            key_scale: `(m, L)`: every cross-attention logit of token l is multiplied by it.
            timestep: `()`, another timestep than this evaluation's.

        Returns:
            `(m, C, H, W)` in the network's parametrisation.

        Raises:
            UserError: the network has no cross-attention that could be weighted.
        """

    def of(self, network: torch.nn.Module) -> GuidanceBranches:
        """Return the same evaluation as another network of the same kind would be asked it."""
        raise NotImplementedError

    @abc.abstractmethod
    def enable_grad(self) -> AbstractContextManager[None]:
        """Return a context under which `predict` can be differentiated, whatever the pipeline runs under.

        Gradients flow to `sample` and `embeds`, never to the network's weights.
        """


@dataclass(frozen=True)
class SamplingStart:
    """Hold what is known before the first step, for `n` images. Tensors are the pipeline's own: do not write to them.

    Attributes:
        halves: the network at the first evaluation.
        active: for each image, whether the policy may act on it.
        prompts: the prompt's text of each image; None if the pipeline was called with embeddings.
        encode: `(m texts) -> Encoded`: the pipeline's own encoding of other texts, as for the conditional half.
        token_ids: `(n, L)` long, on the CPU: the tokens of each image's prompt as the (first) tokenizer gives them, padding
            included; None if the pipeline was called with embeddings.
        token_mask: `(n, L)` bool, on the CPU: True from BOS to the first EOS, False on padding; None as above.
        image_indices: which image of its prompt each image is, where the caller says so (`MemorizationGuard.image_indices`).

    Example:
        >>> start = SamplingStart(None, [True], ["a cat"], encode=lambda texts: None, token_ids=None, token_mask=None)
        >>> start.prompts
        ['a cat']
    """

    halves: GuidanceBranches
    active: list[bool]
    prompts: list[str] | None
    encode: Callable[[Sequence[str]], Encoded]
    token_ids: torch.Tensor | None
    token_mask: torch.Tensor | None
    image_indices: Sequence[int] | None = None


@dataclass(frozen=True)
class Change:
    """Hold what `Policy.begin` decided, image by image. A tensor that is None leaves the pipeline's own in place.

    Attributes:
        changed: for each image, whether its rows below replace the pipeline's; the other rows are ignored.
        embeds: `(n, L, D)` for the conditional half, at every step.
        pooled: `(n, P)` for the conditional half.
        uncond_embeds: `(n, L, D)` for the unconditional half.
        uncond_pooled: `(n, P)` for the unconditional half.
        mask, uncond_mask: `(n, L)`, which rows of `embeds` and `uncond_embeds` are read, where the network is told.
        sample: `(n, C, H, W)`, another input of the first evaluation: the sampler starts from the latent that it stands for.
        token_weights: `(n, L)`, as in `GuidanceBranches.predict`, for the conditional half at every step.
        key_scale: `(n, L)`, as in `GuidanceBranches.predict`, for the conditional half at every step.
        first_score_before: for each image, `|| eps_c - eps_u ||` at the first step as the pipeline had it, if measured.
        first_score_after: the same with what is now in place.
        iterations: for each image, the optimizer steps taken.

    Example:
        >>> Change([True, False], embeds=torch.zeros(2, 77, 768)).changed
        [True, False]
    """

    changed: list[bool]
    embeds: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    uncond_embeds: torch.Tensor | None = None
    uncond_pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    uncond_mask: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    first_score_before: list[float] | None = None
    first_score_after: list[float] | None = None
    iterations: list[int] | None = None


@dataclass(frozen=True)
class Step:
    """Hold one evaluation of the network, for `n` images. Tensors are the pipeline's own: do not write to them.

    Attributes:
        index: 0 for the first evaluation of this run.
        timestep: `()` tensor on the device, in the scheduler's units.
        cond: output of the conditional half, `(n, C, H, W)`, in the network's parametrisation.
        uncond: output of the unconditional half, same shape.
        norms: `|| eps_c - eps_u ||` per image, `(n,)` each, float32, on the device: of every evaluation so far, this one last.
            They are of what the network said, before any policy replaced it; 0 or next to it where a step carries no signal.
        guidance_scale: the pipeline's scale: it goes on to compute `uncond + guidance_scale (cond - uncond)`.
        halves: the network at this evaluation, to be asked again, with what `begin` changed in place.
        silent: whether this step carries no signal (`scores.NO_SIGNAL`): the last of `norms` then says nothing.
        output_norms: as `norms`, of the outputs as the network gives them: `|| o_c - o_u ||`, the same for epsilon.
        total: how many evaluations the whole run has (the sampler's timesteps); None if unknown.
        normalizes: whether the pipeline then gives the guided prediction the norm of `cond`.

    Example:
        >>> one = torch.ones(1, 4, 2, 2)
        >>> step = Step(0, torch.tensor(999), one, 0 * one, norms=[torch.tensor([4.0])], guidance_scale=7.5, halves=None)
        >>> step.silent, step.norms[-1].tolist()
        (False, [4.0])
    """

    index: int
    timestep: torch.Tensor
    cond: torch.Tensor
    uncond: torch.Tensor
    norms: list[torch.Tensor] = field(repr=False)
    guidance_scale: float
    halves: GuidanceBranches
    silent: bool = False
    output_norms: list[torch.Tensor] = field(default_factory=list, repr=False)
    total: int | None = None
    normalizes: bool = False


class Policy:
    """Subclass this for a mitigation; override one method or both.

    Attributes:
        rewrites_prompt: `begin` rewrites the prompt; in a `Compose` it must come before all others that begin.
        exclusive: `begin` leaves others no score to read; in a `Compose` it must be the only one that begins.
        noise_only: it is defined by predicted noise, not by outputs as they are (`MemorizationGuard(score_space="output")`).
        begins_at_signal: `begin` reads the score: where the first steps carry none (zero terminal SNR) it is called at the first step
            that does, and what it replaces is in place from there on.
        moves_latent: `begin` replaces the initial latent, which it cannot once sampling has begun.
        mitigates: it changes images; a policy that only watches says False, and images are then flagged as without it.
        gradient_checkpointing: under `GuidanceBranches.enable_grad` activations are recomputed; the guard, which owns the network, reads it.
        cross_attention: it acts inside the cross-attention of a U-Net.

    Example:
        >>> class Halve(Policy):
        ...     def step(self, step):
        ...         return step.uncond + (step.cond - step.uncond) / 2, step.uncond
        >>> Halve().begins, Halve().mitigates
        (False, True)
    """

    rewrites_prompt = False
    exclusive = False
    noise_only = False
    begins_at_signal = False
    moves_latent = False
    mitigates = True
    gradient_checkpointing = False
    cross_attention = False

    @property
    def begins(self) -> bool:
        """Tell whether `begin` does anything; if not, the guard need not decide before the first step which images it acts on."""
        return type(self).begin is not Policy.begin

    def begin(self, start: SamplingStart) -> Change | None:
        """Inspect the first step before it is taken; return what to replace, or None to change nothing."""
        return None

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return `(cond, uncond)` to put in place of the network's two outputs, or None to leave them alone."""
        return None


class ScalePolicy(Policy):
    """Subclass this for a mitigation that only chooses another guidance scale `w` for an image at a step.

    The pipeline computes `uncond + g (cond' - uncond)`; `cond' = uncond + (w / g) (cond - uncond)` makes that `uncond +
    w (cond - uncond)`. Where the pipeline goes on to give that the norm of `cond`, which must stay, `uncond` is what changes. Nothing on
    the way leaves the device.

    Example:
        >>> class Gentle(ScalePolicy):
        ...     def scale(self, step):
        ...         return torch.full_like(step.norms[-1], 2.0)
        >>> Gentle().begins
        False
    """

    def scale(self, step: Step) -> torch.Tensor:
        """Return each image's scale at this step, `(n,)` float32 on the device; NaN leaves the pipeline's own in place."""
        raise NotImplementedError

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scale(step)
        own = scale.isnan()
        # Where nothing changes the very bits of `cond` go on; zero guidance is exactly `uncond`.
        part = (torch.where(own, torch.ones_like(scale), scale / step.guidance_scale)).to(step.cond.dtype)
        shape = (-1,) + (1,) * (step.cond.ndim - 1)
        if step.normalizes:
            w, g = scale.to(step.cond.dtype).view(shape), step.guidance_scale
            moved = ((w - 1) * step.uncond + (g - w) * step.cond) / (g - 1)
            return step.cond, torch.where(own.view(shape), step.uncond, moved)
        scaled = step.uncond + part.view(shape) * (step.cond - step.uncond)
        return torch.where(own.view(shape), step.cond, scaled), step.uncond
