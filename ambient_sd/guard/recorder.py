"""The memorization guard: hooks on a live pipeline that score every image it samples, and let a policy act.

A diffusers pipeline with classifier-free guidance asks its network for two predictions a step, `eps_u` and `eps_c`: in one
batch or in two calls (`families.guidance`). Hooks on the network therefore see exactly the tensors of the loop, and record
`|| eps_c - eps_u ||_2` per image and step (`scores`; Wen et al., ICLR 2024); the score of an image is the mean over
its steps. A policy (`policies`) may replace texts, latents and attention before the first step, and the two outputs after
every step, for the images that it may act on. The denoising loop is never copied: without a policy the images are
bit-identical to the stock pipeline's, and nothing leaves the device before the run ends.

Torch's own hooks are used, not `diffusers.hooks.HookRegistry`: the registry rewrites `unet.forward`, and so does
accelerate's CPU offload, which puts its own version back after every run and would drop ours.

An image is flagged by the network's outputs before anything was changed. Without a policy that is the whole run. A policy changes
the path from its first action on, and the norms there do not compare with a calibrated threshold (a path without guidance doubles
them): then the first step that carries a signal decides, with the pipeline's own inputs and outputs.

Not done here: pipelines with three branches (InstructPix2Pix), and finding thresholds (`calibration`).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from ambient_sd.families import SUPPORTED, guidance_of, refuse_distilled, tokenizers_of
from ambient_sd.guard import scores
from ambient_sd.guard.attention import require_cross_attention, require_weighable, weighed
from ambient_sd.guard.branches import (
    NetworkHalves,
    as_called,
    encoded,
    get,
    plain,
    put,
    rows_of,
    with_text,
)
from ambient_sd.guard.calibration import Calibration, Sampling
from ambient_sd.guard.policies.base import Change, Encoded, Half, Policy, SamplingStart, Step
from ambient_sd.utils.errors import UserError

logger = logging.getLogger(__name__)
GIVEN = "embeddings given by caller"  # in the unconditional slot


@runtime_checkable
class Thresholds(Protocol):
    """Thresholds for several numbers of steps, as `calibration` keeps them."""

    @property
    def origin(self) -> str:
        """Say where they come from."""

    def threshold(self, steps: int, images_per_prompt: int) -> float:
        """Return the threshold for the mean over the first `steps` evaluations and `images_per_prompt` images."""


@dataclass(frozen=True)
class ImageReport:
    """Hold what the guard measured while one image was sampled.

    Attributes:
        score: mean of `curve`: `|| eps_c - eps_u ||_2`, in units of the latent noise's standard deviation times
            `sqrt(C H W)`. It compares within one model, resolution and number of steps only.
        curve: the norm at each evaluation of the network that carries a signal, first step first (second-order samplers evaluate
            twice). At zero terminal SNR the first evaluation, where alpha_t is 0, carries none and is left out (`scores`).
        timesteps: the timestep of each entry of `curve`.
        flagged: `decision_score >= threshold`, or None without a threshold and where `undecided` says why.
        threshold: the threshold for `decision_steps` evaluations; None where nothing was compared.
        threshold_origin: where it comes from: "not calibrated", "given by caller", or what a calibration says.
        prompt: the prompt's text; None if the pipeline was called with embeddings.
        negative_prompt: the negative prompt's text, None if there is none. It takes the unconditional slot, so the
            score then measures the distance from that prompt and does not compare with scores without one.
        unconditional: what stood in the unconditional slot: "empty prompt", "zero embedding" (SDXL's default),
            "negative prompt", or "embeddings given by caller".
        guidance_scale: the scale at the first step.
        prompt_index: which prompt of the call this image belongs to.
        mitigated: whether a policy replaced one of this image's inputs.
        first_score_before: the norm at the first step with the pipeline's own inputs, if a policy measured it.
        first_score_after: the same with the replaced inputs.
        iterations: optimizer steps that the policy took for this image.
        quantity: what the norm is of: "noise", "velocity" (flow matching), "output" or "unguided" (`score_space`); they do not compare.
        active: whether the policy was allowed to act on this image: False without a policy, and with `when="flagged"`
            where the first step's norm was under its threshold.
        decision_score: what was compared with the threshold, never mitigated: without a policy `score`; under one the norm of the first
            step that carries a signal, with the pipeline's own inputs.
        decision_steps: over how many evaluations it is the mean.
        undecided: why `flagged` is None although there is a threshold: the score is NaN or Inf, the threshold does not
            fit, or the policy leaves no unmitigated score of its kind.

    Example:
        >>> report = ImageReport(3.0, [4.0, 2.0], [500.0, 0.0], True, 2.5, "given by caller", "a cat", None, "empty prompt", 7.5, 0)
        >>> report.score, report.flagged
        (3.0, True)
    """

    score: float
    curve: list[float]
    timesteps: list[float]
    flagged: bool | None
    threshold: float | None
    threshold_origin: str
    prompt: str | None
    negative_prompt: str | None
    unconditional: str
    guidance_scale: float
    prompt_index: int
    mitigated: bool = False
    first_score_before: float | None = None
    first_score_after: float | None = None
    iterations: int = 0
    quantity: scores.Quantity = "noise"
    active: bool = False
    decision_score: float | None = None
    decision_steps: int | None = None
    undecided: str | None = None


@dataclass(frozen=True)
class PromptReport:
    """The score of one prompt: the mean over the images sampled for it in one call (Wen's `n` generations).

    Example:
        >>> PromptReport(prompt_index=0, prompt="a cat", score=3.0, images=4).score
        3.0
    """

    prompt_index: int
    prompt: str | None
    score: float
    images: int


@dataclass
class _Call:
    """One run of the pipeline while it lasts. Norms and timesteps stay on the device until the run is over."""

    images: int
    images_per_prompt: int
    prompts: list[str] | None
    negative_prompts: list[str] | None
    unconditional: str  # where there is no negative prompt
    factor: scores.StepFactor
    encode: Callable[[Sequence[str]], Encoded]
    texts: dict[Half, Any] = field(default_factory=dict)  # what encode_prompt returned for each half ("calls")
    latents: torch.Tensor | None = None  # the very tensor that the loop starts from, until the first evaluation
    guidance_scale: float = 0.0
    norms: list[torch.Tensor] = field(default_factory=list)
    output_norms: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[torch.Tensor] = field(default_factory=list)
    threshold: float | Thresholds | None = None  # the guard's, where it fits this run
    undecided: str | None = None  # of all images
    signal: bool = False  # an evaluation that carries one has begun
    silent: int = 0  # evaluations before it
    begun: bool = False  # the policy was asked what to replace
    before: torch.Tensor | None = None  # norms of the first step with a signal, by the pipeline's own inputs
    touched: torch.Tensor | None = None  # images that a policy changed before the first step with a signal
    rescaled: float | None = None  # another guidance scale than at first
    active: list[bool] | None = None  # None: only the device knows (`mask`), or will
    mask: torch.Tensor | None = None
    change: Change | None = None
    rows: torch.Tensor | None = None  # images of which the change replaces something, on the device
    asked: Half | Literal["both"] | None = None  # the network is being evaluated for this
    inputs: dict[Half, dict[str, Any]] = field(
        default_factory=dict
    )  # of the evaluation under way, as the network got them
    outputs: dict[Half, torch.Tensor] = field(default_factory=dict)
    empty: Encoded | None = None  # the empty prompt, of a run without an unconditional half ("unguided")
    stopped: bool = False

    @property
    def weights(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Token weights and key scales of the conditional half, 1 for images that keep their own; None if not in place."""
        if self.change is None or self.rows is None:
            return None, None
        return tuple(  # type: ignore[return-value]
            None if w is None else torch.ones_like(w).index_copy(0, self.rows.to(w.device), w[self.rows.to(w.device)])
            for w in (self.change.token_weights, self.change.key_scale)
        )


@dataclass(frozen=True)
class _Decision:
    """What is compared with what; without a threshold nothing is."""

    score: float = math.nan
    threshold: float | None = None
    steps: int = 0
    undecided: str | None = None


class MemorizationGuard:
    """Score every image that a pipeline samples: `d = mean_t || eps_c - eps_u ||_2`; use as a context manager.

    Args:
        pipe: a diffusers pipeline with classifier-free guidance (`SUPPORTED`).
        policy: a mitigation from `ambient_sd.guard.policies`, or None to watch only.
        threshold: score from which an image is flagged, a finite number above 0 for the mean over the run, or thresholds with a
            method `threshold(steps, images_per_prompt)` (a `Calibration`, which is refused where it does not fit); None flags
            nothing. Under a policy the first step decides: thresholds are asked for one evaluation, which costs a policy that
            acts before it one evaluation more; a number flags nothing then, unless it is one of the first step.
        when: "always" lets the policy act on every image; "flagged" on those only whose norm at the FIRST step that carries a
            signal reaches the threshold (a number is taken as that of the first step). The other images stay the pipeline's
            own, bit by bit. A policy that acts before the first step then costs one evaluation more.
        stop_after: stop sampling after so many evaluations that carry a signal, >= 1. The report is complete for them; the
            images are unfinished, so call the pipeline with output_type="latent", or use `decide`.
        score_space: "noise" scores by `|| eps_c - eps_u ||`; "output" by the norm of the outputs as they are, as published, which
            on v-prediction models (SD2) is another number, and what published targets for them are of. Scores, thresholds and
            the targets of policies are all in it. "unguided" scores runs without an unconditional half (guidance off, or an input of
            the network) against the empty prompt, for which the network is evaluated once more at each step; policies need guidance.
            None: that of calibrated thresholds, else "noise".

    Attributes:
        image_indices: which image of its prompt each image of the next call is, counted from 0, for a caller that spreads the images of
            a prompt over several calls; policies with random numbers of their own go by it. None: counted within the call.

    Raises:
        UserError: the pipeline, its scheduler or an argument cannot be used.

    Source: Wen, Liu, Chen, Lyu, ICLR 2024.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe = tiny_pipeline()
        >>> with MemorizationGuard(pipe, threshold=1e9) as guard:
        ...     images = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
        >>> len(guard.report[0].curve), guard.report[0].flagged
        (2, False)
    """

    image_indices: Sequence[int] | None = None

    def __init__(
        self,
        pipe: Any,
        policy: Policy | None = None,
        threshold: float | Thresholds | None = None,
        *,
        when: Literal["always", "flagged"] = "always",
        stop_after: int | None = None,
        score_space: scores.Space | None = None,
    ) -> None:
        self._layout = guidance_of(pipe)
        if policy is not None and not isinstance(policy, Policy):
            raise UserError(
                f"policy is a {type(policy).__name__}",
                rule="it must be an object from ambient_sd.guard.policies",
                remedy="for example policies.PromptOptimization(target=3.0)",
            )
        if isinstance(threshold, (int, float)):
            if not (math.isfinite(threshold) and threshold > 0):
                raise UserError(f"threshold {threshold}", rule="it must be a finite number above 0")
            threshold = float(threshold)
        elif threshold is not None and not isinstance(threshold, Thresholds):
            raise UserError(
                f"threshold is a {type(threshold).__name__}", rule="it must be a number, or calibrated thresholds"
            )
        elif getattr(threshold, "detector", "norm") != "norm":
            raise UserError(
                f"the threshold was calibrated for the detector {getattr(threshold, 'detector', '')}",
                rule="while sampling the guard scores by the norm",
                remedy=f"ask before sampling with ambient_sd.guard.{getattr(threshold, 'detector', '')}.screen, or calibrate with --detector norm",
            )
        if when not in ("always", "flagged"):
            raise UserError(f"when {when!r}", rule='it must be "always" or "flagged"')
        if when == "flagged" and (policy is None or threshold is None):
            raise UserError(
                f'when="flagged" without a {"policy" if policy is None else "threshold"}',
                rule="the policy then acts on images whose first step reaches the threshold",
                remedy="give both, or leave `when` out",
            )
        if stop_after is not None and not (isinstance(stop_after, int) and stop_after >= 1):
            raise UserError(f"stop_after {stop_after!r}", rule="it must be a whole number, at least 1")
        if stop_after is not None and not isinstance(getattr(type(pipe), "interrupt", None), property):
            raise UserError(f"{type(pipe).__name__} cannot be interrupted", remedy="leave stop_after out")
        known: scores.Space = getattr(threshold, "score_space", "noise")
        self.score_space: scores.Space = known if score_space is None else score_space
        if self.score_space not in scores.SPACES:
            raise UserError(f"score_space {score_space!r}", rule=f"it must be one of {', '.join(scores.SPACES)}")
        if isinstance(threshold, Thresholds) and known != self.score_space:
            raise UserError(
                f"the threshold was calibrated in the score space {known}",
                rule=f"scores of the space {self.score_space} do not compare with it",
                remedy="leave score_space out, or calibrate in the other",
            )
        if self.score_space == "output" and policy is not None and policy.noise_only:
            raise UserError(
                f"{type(policy).__name__} with score_space output",
                rule="it is defined by the difference of predicted noise",
                remedy="leave score_space out",
            )
        if self.score_space == "unguided" and policy is not None:
            raise UserError(f"{type(policy).__name__} with score_space unguided", rule="there is no guidance that a policy could change",
                            remedy="sample with guidance, and leave score_space out")  # fmt: skip
        for part in getattr(policy, "policies", (policy,)):
            if part is not None and part.cross_attention:
                require_cross_attention(getattr(pipe, self._layout.network), type(part).__name__)
        scores.StepFactor(pipe.scheduler, self.score_space)
        self.pipe = pipe
        self.policy = policy
        self.threshold = threshold
        self.when = when
        self.stop_after = stop_after
        self.history: list[list[ImageReport]] = []
        self._undo = contextlib.ExitStack()
        self._evaluation = contextlib.ExitStack()  # what is in place for one evaluation of the network
        self._weighing = False  # hooks are inside the network, of which a compiled form knows nothing
        self._enabled = False
        self._expected = False  # with two calls: a run has begun, its texts are to come
        self._call: _Call | None = None
        self._strict = True  # a calibration that does not fit a run is an error; else a warning, and nothing is flagged

    # -- on and off ----------------------------------------------------------------------------------------------

    def enable(self) -> MemorizationGuard:
        """Install the hooks; `disable` removes every one of them."""
        if active_guard(self.pipe) is not None:
            raise UserError(
                "this pipeline is guarded already",
                rule="one guard at a time: two would act on each other's outputs",
                remedy="leave the first guard's `with` block, or call its disable(), first",
            )
        network = self._network = getattr(self.pipe, self._layout.network)
        # torch.compile(network) wraps it; policies ask the eager network within.
        self._eager = getattr(network, "_orig_mod", network)
        self._names = [*inspect.signature(type(self._eager).forward).parameters][1:]
        self._compiled = vars(network).get("_compiled_call_impl")
        with contextlib.ExitStack() as undo:
            if self._compiled is None:
                undo.callback(network.register_forward_pre_hook(self._before_network, with_kwargs=True).remove)
                undo.callback(network.register_forward_hook(self._after_network).remove)
            else:  # compiled in place: a hook of now is not in the graph of then
                undo.callback(vars(network).__setitem__, "_compiled_call_impl", self._compiled)
                vars(network)["_compiled_call_impl"] = self._around_compiled
            if self._eager is not network:
                undo.callback(vars(network).__setitem__, "forward", vars(network)["forward"])
                vars(network)["forward"] = self._compiled_or_eager(vars(network)["forward"])
            undo.enter_context(_wrapped(self.pipe, "encode_prompt", self._on_encode_prompt, guard=self))
            if self._layout.halves == "calls":  # every pipeline calls this first
                undo.enter_context(_wrapped(self.pipe, "check_inputs", self._on_start, guard=self))
            if self._begins and hasattr(self.pipe, "prepare_latents"):
                undo.enter_context(_wrapped(self.pipe, "prepare_latents", self._on_prepare_latents, guard=self))
            # Every pipeline calls this last: the one sign that a run has ended well.
            undo.enter_context(_wrapped(self.pipe, "maybe_free_model_hooks", self._on_end, guard=self))
            self._undo = undo.pop_all()
        self._enabled = True
        return self

    def disable(self) -> None:
        """Remove the hooks; the pipeline is as before `enable`. Reports stay. Calling it twice is harmless."""
        self._enabled = False
        self._abandon()
        self._undo.close()

    def __enter__(self) -> MemorizationGuard:
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._settle()
        self.disable()

    def decide(self, *args: Any, **kwargs: Any) -> list[ImageReport]:
        """Call the pipeline without decoding any image, and return the guard's reports.

        With `stop_after=1` that is the score of the first step that carries a signal, for the price of one evaluation of the
        network (two at zero terminal SNR).

        Args:
            *args, **kwargs: as the pipeline takes them; `output_type` is "latent".
        """
        with contextlib.nullcontext() if active_guard(self.pipe) is self else self:
            self.pipe(*args, **(kwargs | {"output_type": "latent"}))
            return self.report

    # -- what was seen -------------------------------------------------------------------------------------------

    @property
    def report(self) -> list[ImageReport]:
        """Return the last finished call's images, in the pipeline's order (`history` holds all calls).

        Raises:
            UserError: no call has finished under this guard, so there is nothing to report.
        """
        self._settle()
        if not self.history:
            raise UserError(
                "the guard has nothing to report",
                rule="no call of the pipeline has finished while it was on",
                remedy="sample inside `with MemorizationGuard(pipe) as guard:`",
            )
        return self.history[-1]

    @property
    def prompt_report(self) -> list[PromptReport]:
        """Return the last call's scores by prompt: the mean over `num_images_per_prompt` images, as Wen et al. do."""
        groups: dict[int, list[ImageReport]] = {}
        for image in self.report:
            groups.setdefault(image.prompt_index, []).append(image)
        return [
            PromptReport(index, images[0].prompt, sum(i.score for i in images) / len(images), len(images))
            for index, images in groups.items()
        ]

    # -- a run begins --------------------------------------------------------------------------------------------

    @property
    def _begins(self) -> bool:
        return self.policy is not None and self.policy.begins

    @property
    def _mitigates(self) -> bool:
        return self.policy is not None and self.policy.mitigates

    @property
    def _of_first_step(self) -> bool:
        """Say whether the threshold can be one of the first step."""
        return self.when == "flagged" or self.stop_after == 1 or isinstance(self.threshold, Thresholds)

    def _abandon(self) -> None:
        """Forget the run under way, and take back what was in place for it."""
        self._evaluation.close()
        if self._call is not None and self._call.stopped:
            self.pipe._interrupt = False
        self._call = None
        self._expected = False

    def _on_start(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._abandon()
        self._expected = True
        return original(*args, **kwargs)

    def _on_encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A run begins: learn the prompts, how many images there are, and what is in the unconditional slot."""
        calls = self._layout.halves == "calls"
        if not calls:
            self._settle()
            self._abandon()  # whatever ran before has not come to its end
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        # Copied before the call: Z-Image's writes its chat template into the list of prompts.
        given: dict[str, Any] = {n: list(v) if isinstance(v, list) else v for n, v in bound.arguments.items()}
        result = original(*args, **kwargs)
        if calls and not self._expected:
            return result
        if self._call is not None:  # the second text of a run with two calls
            negative = given.get("prompt")
            self._call.negative_prompts = _texts(negative, self._call.images // self._call.images_per_prompt)
            self._call.unconditional = GIVEN if negative is None else "empty prompt"
            self._call.texts["uncond"] = result
            self._expected = False
            return result
        if getattr(self.pipe, self._layout.network) is not self._network:
            raise UserError(
                f"pipe.{self._layout.network} was replaced while the guard was on",
                rule="the guard watches the network that it was enabled with",
                remedy="replace the network first, then enable the guard",
            )
        if self._compiled is None and vars(self._network).get("_compiled_call_impl") is not None:
            raise UserError(
                f"pipe.{self._layout.network} was compiled while the guard was on",
                remedy="compile the network first, then enable the guard",
            )
        refuse_distilled(self.pipe)
        repeats = "num_images_per_prompt" in given  # else the pipeline itself repeats them afterwards
        per_prompt = int((given if repeats else self._arguments()).get("num_images_per_prompt") or 1)
        images = len(result[0]) * (1 if repeats else per_prompt)
        prompts = _texts(given.get("prompt"), images // per_prompt)
        negative = given.get("negative_prompt")
        if given.get("negative_prompt_embeds") is not None:
            negative, unconditional = None, GIVEN
        elif negative is None and self.pipe.config.get("force_zeros_for_empty_prompt", False):
            unconditional = "zero embedding"  # SDXL then ignores negative_prompt_2 too
        else:
            negative, unconditional = negative or given.get("negative_prompt_2"), "empty prompt"
        negatives = _texts(negative, images // per_prompt)
        self._call = _Call(
            images, per_prompt, prompts, negatives, unconditional, scores.StepFactor(self.pipe.scheduler, self.score_space),
            self._encoder(original, given), {"cond": result},
        )  # fmt: skip
        if calls and (other := self._layout.uncond):  # both texts at once
            if result[other] is not None:
                self._call.texts["uncond"] = result[other:]
            self._expected = False
        return result

    def _encoder(self, original: Callable[..., Any], given: dict[str, Any]) -> Callable[[Sequence[str]], Encoded]:
        """Return the pipeline's own encoding of other texts, with the settings of this run."""
        keep = (
            "device", "lora_scale", "clip_skip", "max_sequence_length", "clean_caption", "complex_human_instruction", "system_prompt",
            "text_encoder_out_layers",
        )  # fmt: skip
        fixed: dict[str, Any] = {name: given[name] for name in keep if name in given}
        alone = {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        fixed |= {name: value for name, value in alone.items() if name in given}

        def encode(texts: Sequence[str]) -> Encoded:
            with torch.inference_mode(False), torch.no_grad():
                return encoded(original(prompt=list(texts), **fixed), self._layout)

        return encode

    def _on_prepare_latents(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Remember the tensor that the loop starts from, which a policy may change in place."""
        result = original(*args, **kwargs)
        if self._call is None:
            return result
        several = isinstance(result, tuple)
        latents = result[0] if several else result
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if any(value.untyped_storage().data_ptr() == latents.untyped_storage().data_ptr() for value in given):
            latents = latents.clone()  # the caller's own tensor is never written to
            result = (latents, *result[1:]) if several else latents
        self._call.latents = latents
        return result

    # -- one evaluation ------------------------------------------------------------------------------------------

    def _around_compiled(self, *args: Any, **kwargs: Any) -> Any:
        changed = self._before_network(self._network, args, kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
        run = self._network._call_impl if self._weighing else self._compiled
        output = run(*args, **kwargs)  # type: ignore[misc, operator]
        replaced = self._after_network(self._network, args, output)
        return output if replaced is None else replaced

    def _compiled_or_eager(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return a wrapped network's `forward` that leaves compilation aside while attention is weighed."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (self._eager if self._weighing else compiled)(*args, **kwargs)

        return forward

    def _before_network(
        self, network: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._evaluation.close()  # of an evaluation that did not come to its end
        call = self._call
        if call is None:  # the network is used outside a run of this pipeline
            return None
        inputs = plain(dict(zip(self._names, args, strict=False)) | kwargs, self._layout)
        call.asked = None
        if inputs.get("skip_layers") is not None:  # SD3's skip-layer guidance: a third evaluation, none of the halves
            return None
        half = self._half(call, inputs)
        if not call.inputs:
            t = torch.as_tensor(inputs[self._layout.time]).detach().flatten()[:1].to(inputs[self._layout.sample].device)
            call.timesteps.append(self._layout.scheduler_time(t))
            # Only a schedule with such steps is read off the device, and only until they are over.
            call.signal = call.signal or not (
                call.factor.may_be_silent and call.factor.silent(float(call.timesteps[-1]))
            )
            call.silent += not call.signal
            # With two calls the first evaluation has two parts: what is decided here is decided before either.
            if not call.norms:
                self._start(call, inputs)
            later = self.when == "flagged" or (self.policy is not None and self.policy.begins_at_signal)
            if self._begins and not call.begun and (call.signal or not later):
                self._begin(call, inputs, half)
        call.asked = half
        changed = self._changed(call, inputs, half)
        call.inputs |= self._split(call, changed, half)
        self._weigh(call, half)
        return None if changed is inputs else ((), as_called(changed, self._layout))

    def _after_network(self, network: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._evaluation.close()
        call = self._call
        if call is None or call.asked is None:
            return None
        out, half = self._layout.tensor(output[0]), call.asked
        call.asked = None
        if half == "both":
            uncond, cond = self._layout.halved(out)
        else:
            call.outputs[half] = out
            if call.empty is not None:
                call.outputs["uncond"] = self._beside(call)
            if len(call.outputs) < 2:
                return None
            cond, uncond = call.outputs["cond"], call.outputs["uncond"]
        inputs, call.inputs, call.outputs = call.inputs, {}, {}
        factor = call.factor(call.timesteps[-1])
        call.output_norms.append(scores.guidance_norm(cond=cond, uncond=uncond).detach())
        call.norms.append(call.output_norms[-1] * factor)
        scale = call.guidance_scale if half != "both" else self._guidance_scale()
        if scale != call.guidance_scale:
            call.rescaled = scale
        if self.stop_after is not None and len(call.norms) - call.silent >= self.stop_after:
            self.pipe._interrupt = call.stopped = True  # the loop of every diffusers pipeline looks at it
        if self.policy is None or type(self.policy).step is Policy.step:
            return None
        if call.active is None and call.mask is None:
            if not call.signal:
                return None
            # So that a score that is no number is acted on, too.
            call.mask = ~(call.norms[-1] < self._threshold(call, 1))
        if call.active is not None and not any(call.active):
            return None
        step = Step(
            index=len(call.norms) - 1, timestep=call.timesteps[-1][0], cond=cond, uncond=uncond, norms=list(call.norms),
            guidance_scale=scale, halves=self._halves(call, inputs, call.timesteps[-1], factor, call.weights),
            silent=not call.signal,
            output_norms=list(call.output_norms), total=getattr(self.pipe, "_num_timesteps", None), normalizes=self._layout.normalizes,
        )  # fmt: skip
        replaced = self.policy.step(step)
        if replaced is None:
            return None
        new_cond, new_uncond = (
            self._only_active(call, new.to(own), own) for new, own in zip(replaced, (cond, uncond), strict=True)
        )
        if not call.signal:
            moved = ((new_cond != cond) | (new_uncond != uncond)).flatten(1).any(1)
            call.touched = moved if call.touched is None else call.touched | moved
        if half == "both":
            new = torch.cat([new_uncond, new_cond] if self._layout.first == "uncond" else [new_cond, new_uncond])
        else:
            # The pipeline holds the first of the two outputs already: it is changed where it lies.
            new, first, earlier = (new_cond, uncond, new_uncond) if half == "cond" else (new_uncond, cond, new_cond)
            new = new.clone()
            first.copy_(earlier.clone())
        given = self._layout.as_given(new)
        return (given, *output[1:]) if isinstance(output, tuple) else type(output)(sample=given)

    def _beside(self, call: _Call) -> torch.Tensor:
        """Return what the network predicts of the evaluation under way for the empty prompt."""
        assert call.empty is not None
        inputs: dict[Half, dict[str, Any]] = {"cond": call.inputs["cond"], "uncond": call.inputs["cond"]}
        halves = self._halves(call, inputs, call.timesteps[-1], call.factor(call.timesteps[-1]))
        embeds, pooled, mask = (
            None if part is None else part.expand(call.images, *part.shape[1:]).to(halves.sample.device)
            for part in call.empty
        )
        with torch.no_grad():
            return halves.predict("cond", embeds=embeds, pooled=pooled, mask=mask)

    @staticmethod
    def _only_active(call: _Call, new: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return `own` with `new` in the rows of the images that the policy may act on."""
        mask = call.mask
        if mask is None:
            if call.active is None or all(call.active):
                return new
            mask = call.mask = torch.tensor(call.active, device=own.device)
        return torch.where(mask.view(-1, *[1] * (own.ndim - 1)), new, own)

    def _half(self, call: _Call, inputs: dict[str, Any]) -> Half | Literal["both"]:
        """Say which half the network is being asked for, or raise where guidance cannot be measured."""
        layout, batch = self._layout, int(inputs[self._layout.sample].shape[0])
        remedy = "sample with guidance_scale > 1 from the first step to the last, or without the guard"
        unguided = self.score_space == "unguided"
        if unguided and (batch != call.images or "uncond" in call.texts):
            raise UserError("score_space is unguided, and guidance is on", rule="the unconditional half is there to be measured",
                            remedy="leave score_space out")  # fmt: skip
        if unguided:
            call.empty = call.empty or call.encode([""])
            return "cond"
        if layout.halves == "calls":
            if "uncond" in call.texts:
                for half, texts in call.texts.items():
                    if inputs[layout.embeds] is texts[layout.outputs[0]] and half not in call.inputs:
                        return half
                raise UserError(
                    f"{type(self.pipe).__name__} called its network with embeddings that are not this run's prompts",
                    rule="the two halves are told apart by the embeddings that encode_prompt returned",
                    remedy="leave callbacks that replace prompt_embeds out, or sample without the guard",
                )
            if layout.scale != "guidance_scale":
                remedy = f"give a negative_prompt (it may be empty) and {layout.scale} > 1, or score_space='unguided'"
        elif batch == 2 * call.images:
            return "both"
        elif batch != call.images:
            raise UserError(
                f"{type(self.pipe).__name__} runs its network on {batch} rows for {call.images} images",
                rule="the guard reads one batch of two halves, unconditional then conditional",
                remedy=f"use one of {', '.join(SUPPORTED)}",
            )
        raise UserError(
            "classifier-free guidance is off",
            rule="without an unconditional half there is nothing to measure",
            remedy=remedy,
        )

    def _split(self, call: _Call, inputs: dict[str, Any], half: Half | Literal["both"]) -> dict[Half, dict[str, Any]]:
        """Return the inputs of each half that an evaluation holds."""
        if half != "both":
            return {half: inputs}
        n = call.images
        at: tuple[Half, Half] = ("uncond", "cond") if self._layout.first == "uncond" else ("cond", "uncond")
        return {half: rows_of(inputs, self._layout, 2 * n, slice(i * n, (i + 1) * n)) for i, half in enumerate(at)}

    def _halves(
        self,
        call: _Call,
        inputs: dict[Half, dict[str, Any]],
        timestep: torch.Tensor,
        factor: torch.Tensor,
        weights: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> NetworkHalves:
        return NetworkHalves(
            self._eager, self._layout, cond=inputs["cond"], uncond=inputs["uncond"], n=call.images, timestep=timestep[0],
            noise_factor=factor[0], weights=weights, checkpointing=self.policy is not None and self.policy.gradient_checkpointing,
            flow=call.factor.flow,
        )  # fmt: skip

    # -- what a policy changes -----------------------------------------------------------------------------------

    def _start(self, call: _Call, inputs: dict[str, Any]) -> None:
        """Before the first evaluation: find out whether there is anything to measure, and what it can be compared with."""
        call.guidance_scale = self._guidance_scale() if call.empty is None else float(self.pipe.guidance_scale)
        if self.policy is None or self.when == "always":
            call.active = [self.policy is not None] * call.images
        if not call.signal:
            self._require_later_signal(call)
        call.threshold = self.threshold
        if self.threshold is None:
            return
        why = self._misfit(call, inputs) if isinstance(self.threshold, Calibration) else None
        if why is not None and self._strict:
            raise UserError(
                f"the calibrated threshold does not fit: {why}",
                remedy="sample as calibrated, or calibrate for this: ambient-sd calibrate --help",
            )
        try:  # a number of steps without a threshold is known now, not after the run
            if why is None and self._mitigates and self._of_first_step:
                self._threshold(call, 1)
            elif why is None:
                steps = int(getattr(self.pipe, "_num_timesteps", 1))
                seen = min(steps, self.stop_after or steps)
                self._threshold(call, seen, stopped=seen < steps)
        except UserError as error:
            if self._strict:
                raise
            why = str(error)
        if why is not None:
            call.threshold, call.undecided = None, f"the calibrated threshold is not used: {why}"
            logger.warning("the calibrated threshold is not used, nothing is flagged: %s", why)

    def _require_later_signal(self, call: _Call) -> None:
        """The first step carries no score: refuse where that cannot be made good at a later one."""
        rule = "with zero terminal SNR alpha_t is 0 there, so || eps_c - eps_u || is 0 for every prompt"
        if call.factor.epsilon:
            raise UserError(
                f"the first step (timestep {float(call.timesteps[-1]):g}) carries no score, and the network predicts epsilon",
                rule="at alpha_t = 0 (zero terminal SNR) predicted noise says nothing about an image",
                remedy='use a scheduler without rescale_betas_zero_snr, or timestep_spacing="leading"',
            )
        if call.factor.silent(float(self.pipe.scheduler.timesteps.min())):
            raise UserError("no step of this run carries a score", rule=rule, remedy="sample with more steps")
        if self._begins and self.policy is not None and self.policy.moves_latent:
            raise UserError(
                f"the first step (timestep {float(call.timesteps[-1]):g}) carries no score, and the policy moves the initial latent",
                rule=rule,
                remedy="use a scheduler without rescale_betas_zero_snr, or another policy",
            )

    def _misfit(self, call: _Call, inputs: dict[str, Any]) -> str | None:
        """Say why a calibration does not hold for this run, or return None if it does."""
        pipe, calibration = self.pipe, self.threshold
        assert isinstance(calibration, Calibration)
        scheduler = pipe.scheduler
        if "strength" in inspect.signature(type(pipe).__call__).parameters:
            return f"it was calibrated on text to image, not on {type(pipe).__name__}"
        if any(call.negative_prompts or ()):
            return "it was calibrated without a negative prompt"
        if call.unconditional == GIVEN:
            return "it was calibrated against the empty prompt, not against embeddings"
        given = self._arguments()
        for name in ("guidance_rescale", "eta", "clip_skip", "ip_adapter_image", "ip_adapter_image_embeds"):
            if given.get(name) is not None and not (isinstance(given[name], (int, float)) and given[name] == 0):
                return f"it was calibrated without {name}"
        if (inputs.get("cross_attention_kwargs") or {}).get("scale", 1) != 1:
            return "it was calibrated with the adapter at its own strength, not at another scale"
        if call.factor.flow:  # whose timesteps depend on the image's size and on what the pipeline gives the sampler
            sampling = Sampling.of(
                pipe, num_inference_steps=given.get("num_inference_steps") or calibration.sampling.num_inference_steps,
                guidance_scale=call.guidance_scale, height=given.get("height"), width=given.get("width"),
            )  # fmt: skip
            return calibration.misfit(pipe, sampling, whole=False)
        steps = getattr(scheduler, "num_inference_steps", None)
        if steps is not None:
            fresh = type(scheduler).from_config(scheduler.config)
            fresh.set_timesteps(steps)
            own = scheduler.timesteps.cpu()
            if len(own) != getattr(pipe, "_num_timesteps", len(own)) or not torch.equal(own, fresh.timesteps.cpu()):
                return "it was calibrated on all of the sampler's own timesteps"
        height, width = (int(side) * pipe.vae_scale_factor for side in inputs[self._layout.sample].shape[-2:])
        sampling = Sampling.of(
            pipe, num_inference_steps=steps or calibration.sampling.num_inference_steps,
            guidance_scale=call.guidance_scale, height=height, width=width,
        )  # fmt: skip
        return calibration.misfit(pipe, sampling, whole=False)

    def _arguments(self) -> dict[str, Any]:
        """Return what the pipeline was called with, read off its running `__call__`; empty where there is none."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code is getattr(inspect.unwrap(_call_of(self.pipe)), "__code__", None):
                return dict(frame.f_locals)
            frame = frame.f_back  # type: ignore[assignment]
        return {}

    def _begin(self, call: _Call, inputs: dict[str, Any], half: Half | Literal["both"]) -> None:
        """Before the first evaluation at which the policy may act: find out on whom, and ask it what to replace."""
        assert self.policy is not None
        call.begun = True
        latents, call.latents = call.latents, None
        both = self._split(call, inputs, half)
        if half != "both":  # the other half differs in its texts only
            other: Half = "uncond" if half == "cond" else "cond"
            texts, (embeds, pooled) = call.texts[other], self._layout.outputs
            read = self._layout.mask
            both[other] = with_text(inputs, self._layout, None, texts[embeds], None if read is None else texts[read[1]])
            if read is not None and texts[read[1]] is None:
                both[other][read[0]] = None
            both[other] |= {name: texts[at] for name, at in self._layout.texts.items()}
            if pooled is not None:
                both[other] = put(both[other], self._layout.pooled, texts[pooled])
        factor = call.factor(call.timesteps[-1])
        halves = self._halves(call, both, call.timesteps[-1], factor)
        if call.signal and (
            self.when == "flagged" or (self._mitigates and self._of_first_step and call.threshold is not None)
        ):
            call.before = self._first_norms(inputs, half, halves)
        if call.active is None:
            assert call.before is not None
            call.active = (~(call.before < self._threshold(call, 1))).tolist()
            if not any(call.active):
                return
        prompts = None
        if call.prompts is not None:
            prompts = [call.prompts[i // call.images_per_prompt] for i in range(call.images)]
        ids, mask = self._tokens(call, halves.cond.embeds.shape[1])
        change = self.policy.begin(
            SamplingStart(halves, list(call.active), prompts, call.encode, ids, mask, self.image_indices)
        )
        if change is None:
            return
        call.change = change
        device = halves.sample.device
        rows = [i for i, (changed, may) in enumerate(zip(change.changed, call.active, strict=True)) if changed and may]
        if not rows:
            return
        call.rows = torch.tensor(rows, device=device)
        if not call.signal:
            call.touched = torch.zeros(call.images, dtype=torch.bool, device=device).index_fill(0, call.rows, True)
        if change.token_weights is not None or change.key_scale is not None:
            require_weighable(self._eager, key_scale=change.key_scale is not None)
        if change.sample is not None:
            if call.norms:
                raise UserError(
                    "the policy replaces the initial latent, and sampling has begun",
                    rule="the first step carries no score (zero terminal SNR), so the policy was asked at a later one",
                    remedy="use a scheduler without rescale_betas_zero_snr, or another policy",
                )
            own = inputs[self._layout.sample][: call.images]
            _replace(latents, own, change.sample.to(own)[call.rows], call.rows)

    def _first_norms(self, inputs: dict[str, Any], half: Half | Literal["both"], halves: NetworkHalves) -> torch.Tensor:
        """Evaluate both halves as the loop would without the policy; return each image's norm, `(n,)`."""
        if half == "both":
            # In one batch, as the loop: another batch size may give other last bits.
            out = self._eager.forward(**(as_called(inputs, self._layout) | {"return_dict": False}))[0]
            uncond, cond = self._layout.halved(self._layout.tensor(out))
        else:
            cond, uncond = halves.predict("cond"), halves.predict("uncond")
        return scores.guidance_norm(cond=cond, uncond=uncond).detach() * halves.noise_factor

    def _changed(self, call: _Call, inputs: dict[str, Any], half: Half | Literal["both"]) -> dict[str, Any]:
        """Return the network's inputs with what `begin` decided in place; the very same dict if that is nothing."""
        change, rows, layout = call.change, call.rows, self._layout
        if change is None or rows is None:
            return inputs
        shift = call.images if half == "both" else 0
        cond, uncond = (rows + shift, rows) if layout.first == "uncond" else (rows, rows + shift)
        if half != "uncond":
            inputs = self._other_text(inputs, cond, rows, Encoded(change.embeds, change.pooled, change.mask))  # type: ignore[arg-type]
        if half != "cond":
            found = Encoded(change.uncond_embeds, change.uncond_pooled, change.uncond_mask)  # type: ignore[arg-type]
            inputs = self._other_text(inputs, uncond, rows, found)
        if change.sample is not None and not call.norms:
            own = inputs[layout.sample]
            for at in (cond, uncond) if half == "both" else (rows,):
                own = own.index_copy(0, at, change.sample.to(own)[rows])
            inputs = inputs | {layout.sample: own}
        return inputs

    def _other_text(
        self, inputs: dict[str, Any], at: torch.Tensor, rows: torch.Tensor, text: Encoded
    ) -> dict[str, Any]:
        """Return the network's inputs with the rows of a change's text at places of the batch."""
        embeds, pooled, mask = (None if part is None else part.to(rows.device)[rows] for part in text)
        inputs = with_text(inputs, self._layout, at, embeds, mask)
        if pooled is not None:
            own = get(inputs, self._layout.pooled)
            inputs = put(inputs, self._layout.pooled, pooled if own is None else own.index_copy(0, at, pooled.to(own)))
        return inputs

    def _weigh(self, call: _Call, half: Half | Literal["both"]) -> None:
        """Put token weights and key scales in place for the evaluation that follows."""
        change, rows = call.change, call.rows
        if change is None or rows is None or half == "uncond":
            return
        weights, scale = (
            None if w is None else w.to(rows.device)[rows] for w in (change.token_weights, change.key_scale)
        )
        if weights is None and scale is None:
            return
        at = rows + call.images if half == "both" else rows
        self._evaluation.enter_context(weighed(self._eager, token_weights=weights, key_scale=scale, rows=at))
        self._weighing = True
        self._evaluation.callback(setattr, self, "_weighing", False)

    def _tokens(self, call: _Call, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return ids and mask of every image's prompt, or None where tokens are not the rows of the embeddings."""
        if call.prompts is None or not self._layout.tokens:
            return None, None
        tokenizer = tokenizers_of(self.pipe)[0]
        texts: Any = call.prompts
        if hasattr(self.pipe, "maybe_convert_prompt"):  # textual inversion: one word, several tokens
            texts = self.pipe.maybe_convert_prompt(texts, tokenizer)
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        ids = ids.repeat_interleave(call.images_per_prompt, 0)
        ended = (ids == tokenizer.eos_token_id).cumsum(1)
        return ids, (ended == 0) | ((ended == 1) & (ids == tokenizer.eos_token_id))

    def _guidance_scale(self) -> float:
        name = self._layout.scale
        if name == "guidance_scale":
            return float(self.pipe.guidance_scale) + self._layout.excess
        # Flux keeps it in a local variable of __call__ and nowhere else.
        frame = sys._getframe()
        while frame is not None:
            if name in frame.f_code.co_varnames and frame.f_locals.get("self") is self.pipe and name in frame.f_locals:
                return float(frame.f_locals[name])
            frame = frame.f_back  # type: ignore[assignment]
        raise UserError(f"{type(self.pipe).__name__} does not say its {name}", remedy="call the pipeline itself")

    def _threshold(self, call: _Call, steps: int, *, stopped: bool = False) -> float:
        given = call.threshold
        if isinstance(given, Calibration):
            return given.threshold(steps, 1, stopped=stopped)
        if not isinstance(given, Thresholds):
            assert given is not None
            return given
        value = float(given.threshold(steps=steps, images_per_prompt=1))
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"the threshold for {steps} steps is {value}", rule="it must be a finite number above 0")
        return value

    # -- a run ends ----------------------------------------------------------------------------------------------

    def _on_end(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A run has ended: bring norms and timesteps to the host in one transfer and turn them into reports."""
        self._finish()
        return original(*args, **kwargs)

    def _finish(self) -> None:
        call = self._call
        self._abandon()
        if call is not None and call.norms:
            self.history.append(self._reports(call))

    def _settle(self) -> None:
        """Finish a run of a pipeline that returns latents without a sign, if it has made all its steps."""
        call = self._call
        if not self._layout.latents_end_early or call is None or call.inputs:
            return
        if call.stopped or len(call.norms) == getattr(self.pipe, "_num_timesteps", None):
            self._finish()

    def _reports(self, call: _Call) -> list[ImageReport]:
        norms, times = call.norms[call.silent :], call.timesteps[call.silent :]
        if not norms:
            raise UserError(
                "no step of this run carried a score",
                rule="with zero terminal SNR alpha_t is 0 at the first, so || eps_c - eps_u || is 0 for every prompt",
                remedy="sample with more steps",
            )
        rows = [torch.cat([norm, t.to(norm)]) for norm, t in zip(norms, times, strict=True)]
        marks = {"mask": call.mask if call.active is None else None, "before": call.before, "touched": call.touched}
        beside = {name: value for name, value in marks.items() if value is not None}
        rows += [torch.cat([value, value[:1]]).to(rows[0]) for value in beside.values()]
        table = torch.stack(rows).cpu().double()  # the one transfer: (steps + what is beside, images + 1)
        found = dict(zip(beside, table[len(norms) :, :-1].tolist(), strict=True))
        table = table[: len(norms)]
        active = call.active
        if active is None:
            active = [value > 0 for value in found["mask"]]
        touched = [value > 0 for value in found.get("touched", [0] * call.images)]
        timesteps, change = table[:, -1].tolist(), call.change
        origin = "not calibrated" if call.threshold is None else "given by caller"
        if isinstance(call.threshold, Thresholds):
            origin = call.threshold.origin
        reports = []
        for i in range(call.images):
            curve = table[:, i].tolist()
            score = sum(curve) / len(curve)
            prompt_index = i // call.images_per_prompt
            negative = call.negative_prompts[prompt_index] if call.negative_prompts is not None else None
            seen = change if active[i] else None
            first = found["before"][i] if "before" in found else curve[0]
            decision = self._decide(call, curve, first, touched=touched[i])
            reports.append(
                ImageReport(
                    score=score,
                    curve=curve,
                    timesteps=timesteps,
                    flagged=None if decision.threshold is None else decision.score >= decision.threshold,
                    threshold=decision.threshold,
                    threshold_origin=_against(origin, negative, call.unconditional),
                    prompt=call.prompts[prompt_index] if call.prompts is not None else None,
                    negative_prompt=negative or None,
                    unconditional="negative prompt" if negative else call.unconditional,
                    guidance_scale=call.guidance_scale,
                    prompt_index=prompt_index,
                    mitigated=seen is not None and seen.changed[i],
                    first_score_before=_measured(None if seen is None else seen.first_score_before, i),
                    first_score_after=_measured(None if seen is None else seen.first_score_after, i),
                    iterations=0 if seen is None or seen.iterations is None else seen.iterations[i],
                    quantity=call.factor.quantity,
                    active=active[i],
                    decision_score=None if decision.threshold is None else decision.score,
                    decision_steps=None if decision.threshold is None else decision.steps,
                    undecided=decision.undecided,
                )
            )
        return reports

    def _decide(self, call: _Call, curve: list[float], first: float, *, touched: bool) -> _Decision:
        """Say what is compared with what for one image, or why nothing is."""
        if call.threshold is None:
            return _Decision(undecided=call.undecided)
        early = self._mitigates
        if early and not self._of_first_step:
            return _Decision(
                undecided="the threshold is one of the mean over a run, which the policy changes: give calibrated ones, or one of "
                'the first step with when="flagged"'
            )
        if early and touched:
            return _Decision(undecided="the policy acted before the first step that carries a score")
        if not early and call.rescaled is not None:
            return _Decision(
                undecided=f"guidance_scale changed from {call.guidance_scale:g} to {call.rescaled:g} on the way"
            )
        steps = 1 if early or (self.when == "flagged" and not isinstance(call.threshold, Thresholds)) else len(curve)
        score = first if steps == 1 else sum(curve) / len(curve)
        if not math.isfinite(score):
            return _Decision(undecided="the score is NaN or Inf: the network overflows in this precision")
        try:
            threshold = self._threshold(call, steps, stopped=call.stopped or steps < len(curve))
        except UserError as error:  # the run was cut short
            return _Decision(undecided=str(error))
        return _Decision(score, threshold, steps)


def active_guard(pipe: Any) -> MemorizationGuard | None:
    """Return the guard that is on for this pipeline, or None.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> active_guard(tiny_pipeline()) is None
        True
    """
    return getattr(vars(pipe).get("encode_prompt"), "guard", None)


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, around: Callable[..., Any], guard: MemorizationGuard) -> Iterator[None]:
    """Put `around(original, ...)` in front of a method of one object; afterwards the object is as before."""
    attributes = vars(owner)
    missing = object()
    before = attributes.get(name, missing)
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapper.guard = guard  # type: ignore[attr-defined]
    wrapper.__wrapped__ = original  # type: ignore[attr-defined]  # keeps inspect.signature truthful
    attributes[name] = wrapper
    try:
        yield
    finally:
        if before is missing:
            attributes.pop(name, None)
        else:
            attributes[name] = before


def _texts(prompt: str | list[str] | None, count: int) -> list[str] | None:
    if prompt is None:
        return None
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return texts * count if len(texts) == 1 else texts


def _against(origin: str, negative: str | None, unconditional: str) -> str:
    """Say of a number of the caller's what it was compared with where that is not a score against the empty prompt."""
    if origin != "given by caller":
        return origin
    if negative:
        return f"{origin}; the score is one against a negative prompt"
    return f"{origin}; the score is one against embeddings of the caller's" if unconditional == GIVEN else origin


def _call_of(pipe: Any) -> Callable[..., Any]:
    """Return the `__call__` that holds the denoising loop: of a subclass that wraps diffusers' own, diffusers'."""
    owners = [kind for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    known = [kind for kind in owners if kind.__module__.startswith("diffusers.")]
    return vars((known or owners)[0])["__call__"]  # type: ignore[no-any-return]


def _measured(values: list[float] | None, i: int) -> float | None:
    return None if values is None or math.isnan(values[i]) else values[i]


def _replace(latents: torch.Tensor | None, own: torch.Tensor, new: torch.Tensor, rows: torch.Tensor) -> None:
    """Put in place, in the loop's own latents, what the new inputs of the network stand for: `latent = input / k`.

    Samplers scale the latent before the network sees it by one number k, which is found from the two tensors.

    Raises:
        UserError: the network's input is not a multiple of the latents.
    """
    k = None
    if latents is not None and latents.shape == own.shape:
        wide = torch.float32 if own.device.type == "mps" else torch.float64
        x, y = latents.to(wide), own.to(wide)
        k = (x * y).sum() / (x * x).sum()
        rounding = max(torch.finfo(t.dtype).eps for t in (latents, own))
        if not bool((y - k * x).abs().max() <= 4 * rounding * y.abs().max()):
            k = None
    if k is None or latents is None:
        raise UserError(
            "the policy replaces the initial latent, and the network's input is not a multiple of it",
            rule="such a policy needs a pipeline whose network sees the latent alone, not masks or images beside it",
            remedy="use another policy, or a text-to-image pipeline",
        )
    latents.index_copy_(0, rows, (new.to(k) / k).to(latents.dtype))
