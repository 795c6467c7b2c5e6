"""The memorization guard: hooks on a live pipeline that score every picture it samples, and let a policy act.

A diffusers pipeline with classifier-free guidance runs its U-Net on one batch `[unconditional..., conditional...]`. A
forward hook on `pipe.unet` therefore sees exactly the two predictions of the loop, `eps_u` and `eps_c`, and records
`|| eps_c - eps_u ||_2` per image and step (`scores`; Wen et al., ICLR 2024); the score of a picture is the mean over
its steps. A policy (`policies`) may replace the prompt embeddings in a pre-forward hook and the two outputs in the
forward hook. The denoising loop is never copied: with no policy the pictures are bit-identical to the stock pipeline's.

Torch's own hooks are used, not `diffusers.hooks.HookRegistry`: the registry rewrites `unet.forward`, and so does
accelerate's CPU offload, which puts its own version back after every run and would drop ours.

Not done here: pipelines that run the two halves in two calls (SD3, Flux) or three branches (InstructPix2Pix),
calibration of thresholds (a number is taken as given), early stopping.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from ambient_sd.errors import UserError
from ambient_sd.guard import scores
from ambient_sd.guard.policies.base import Policy, PromptChange, SamplingStart, Step

SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "AmbientSDPipeline",
)
_UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states")


@dataclass(frozen=True)
class ImageReport:
    """What the guard saw while one picture was sampled.

    Attributes:
        score: mean of `curve`: `|| eps_c - eps_u ||_2`, in units of the latent noise's standard deviation times
            `sqrt(C H W)`. It compares within one model, resolution and number of steps only.
        curve: the norm at each evaluation of the network, first step first (second-order samplers evaluate twice).
        timesteps: the timestep of each entry of `curve`.
        flagged: `score >= threshold`, or None without a threshold.
        threshold: the threshold, or None.
        threshold_origin: where it comes from: "not calibrated" or "given by caller".
        prompt: the prompt's text; None if the pipeline was called with embeddings.
        negative_prompt: the negative prompt's text, None if there is none. It takes the unconditional slot, so the
            score then measures the distance from that prompt and does not compare with scores without one.
        unconditional: what stood in the unconditional slot: "empty prompt", "zero embedding" (SDXL's default),
            "negative prompt", or "embeddings given by caller".
        guidance_scale: the scale at the first step.
        prompt_index: which prompt of the call this picture belongs to.
        mitigated: whether a policy replaced this picture's prompt embedding.
        first_score_before: the norm at the first step with the original prompt, if a policy measured it.
        first_score_after: the same with the replaced embedding.
        iterations: optimizer steps that the policy took for this picture.
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


@dataclass(frozen=True)
class PromptReport:
    """The score of one prompt: the mean over the pictures sampled for it in one call (Wen's `n` generations)."""

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
    guidance_scale: float = 0.0
    norms: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[torch.Tensor] = field(default_factory=list)
    change: PromptChange | None = None


class MemorizationGuard:
    """Score every picture that a pipeline samples: `d = mean_t || eps_c - eps_u ||_2`; use as a context manager.

    Args:
        pipe: a diffusers pipeline with a U-Net and classifier-free guidance (`SUPPORTED`).
        policy: a mitigation from `ambient_sd.guard.policies`, or None to watch only.
        threshold: score from which a picture is flagged, finite and not negative; None flags nothing.

    Raises:
        UserError: the pipeline, its scheduler or the threshold cannot be used.

    Source: Wen, Liu, Chen, Lyu, ICLR 2024.
    """

    def __init__(self, pipe: Any, policy: Policy | None = None, threshold: float | None = None) -> None:
        lacking = "unet" if getattr(pipe, "unet", None) is None else "encode_prompt"
        if not hasattr(pipe, lacking) or getattr(pipe, lacking) is None:
            raise UserError(
                f"{type(pipe).__name__} has no {lacking}",
                rule="the guard hooks the U-Net of a text-to-image pipeline with classifier-free guidance",
                remedy=f"use one of {', '.join(SUPPORTED)}",
            )
        if policy is not None and not isinstance(policy, Policy):
            raise UserError(
                f"policy is a {type(policy).__name__}",
                rule="it must be an object from ambient_sd.guard.policies",
                remedy="for example policies.PromptOptimization(target=3.0)",
            )
        if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
            raise UserError(f"threshold {threshold}", rule="it must be a finite number, at least 0")
        scores.require_supported(pipe.scheduler)
        self.pipe = pipe
        self.policy = policy
        self.threshold = None if threshold is None else float(threshold)
        self.history: list[list[ImageReport]] = []
        self._undo = contextlib.ExitStack()
        self._enabled = False
        self._call: _Call | None = None

    # -- on and off ----------------------------------------------------------------------------------------------

    def enable(self) -> MemorizationGuard:
        """Put the hooks on; `disable` takes every one of them off again."""
        if active_guard(self.pipe) is not None:
            raise UserError(
                "this pipeline is guarded already",
                rule="one guard at a time: two would act on each other's outputs",
                remedy="leave the first guard's `with`, or call its disable(), before the next",
            )
        self._unet = self.pipe.unet
        with contextlib.ExitStack() as undo:
            undo.callback(self._unet.register_forward_pre_hook(self._before_unet, with_kwargs=True).remove)
            undo.callback(self._unet.register_forward_hook(self._after_unet).remove)
            undo.enter_context(_wrapped(self.pipe, "encode_prompt", self._on_encode_prompt, guard=self))
            # Every pipeline calls this last: the one sign that a run has ended well.
            undo.enter_context(_wrapped(self.pipe, "maybe_free_model_hooks", self._on_end, guard=self))
            self._undo = undo.pop_all()
        self._enabled = True
        return self

    def disable(self) -> None:
        """Take the hooks off; the pipeline is as it was before `enable`. Reports stay. Twice is harmless."""
        self._enabled = False
        self._call = None
        self._undo.close()

    def __enter__(self) -> MemorizationGuard:
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    # -- what was seen -------------------------------------------------------------------------------------------

    @property
    def report(self) -> list[ImageReport]:
        """Return the last finished call's pictures, in the pipeline's order (`history` holds all calls).

        Raises:
            UserError: no call has finished under this guard, so there is nothing to report.
        """
        if not self.history:
            raise UserError(
                "the guard has nothing to report",
                rule="no call of the pipeline has finished while it was on",
                remedy="sample inside `with MemorizationGuard(pipe) as guard:`",
            )
        return self.history[-1]

    @property
    def prompt_report(self) -> list[PromptReport]:
        """Return the last call's scores by prompt: the mean over `num_images_per_prompt` pictures, as Wen et al. do."""
        groups: dict[int, list[ImageReport]] = {}
        for image in self.report:
            groups.setdefault(image.prompt_index, []).append(image)
        return [
            PromptReport(index, images[0].prompt, sum(i.score for i in images) / len(images), len(images))
            for index, images in groups.items()
        ]

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _on_encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A run begins: learn the prompts, how many pictures there are, and what is in the unconditional slot."""
        self._call = None  # whatever ran before has not come to its end
        result = original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if self.pipe.unet is not self._unet:
            raise UserError(
                "pipe.unet was replaced while the guard was on",
                rule="the guard watches the U-Net that it was switched on with",
                remedy="replace the U-Net first, then enable the guard",
            )
        images, per_prompt = int(result[0].shape[0]), int(given.get("num_images_per_prompt") or 1)
        prompts = _texts(given.get("prompt"), images // per_prompt)
        negative = given.get("negative_prompt")
        if given.get("negative_prompt_embeds") is not None:
            negative, unconditional = None, "embeddings given by caller"
        elif negative is None and self.pipe.config.get("force_zeros_for_empty_prompt", False):
            unconditional = "zero embedding"  # SDXL then ignores negative_prompt_2 too
        else:
            negative, unconditional = negative or given.get("negative_prompt_2"), "empty prompt"
        negatives = _texts(negative, images // per_prompt)
        self._call = _Call(images, per_prompt, prompts, negatives, unconditional)
        return result

    def _before_unet(
        self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._call
        if call is None:  # the network is used outside a run of this pipeline
            return None
        inputs = dict(zip(_UNET_INPUTS, args, strict=False)) | kwargs
        self._require_guidance(call, int(inputs["sample"].shape[0]))
        call.timesteps.append(torch.as_tensor(inputs["timestep"]).detach().flatten()[:1])
        if not call.norms:
            call.guidance_scale = float(self.pipe.guidance_scale)
        if self.policy is None:
            return None
        if not call.norms:
            factor = float(scores.noise_factor(self.pipe.scheduler, call.timesteps[0])[0])
            call.change = self.policy.begin(_start(unet, inputs, call.images, factor))
        if call.change is None or not any(call.change.changed):
            return None
        embeds = inputs["encoder_hidden_states"].clone()
        for i, changed in enumerate(call.change.changed):
            if changed:
                embeds[call.images + i] = call.change.prompt_embeds[i].to(embeds)
        if len(args) > 2:
            return (*args[:2], embeds, *args[3:]), kwargs
        return args, kwargs | {"encoder_hidden_states": embeds}

    def _after_unet(self, unet: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._call
        if call is None:
            return None
        out = output[0]
        uncond, cond = out.chunk(2)
        norm = scores.guidance_norm(cond=cond, uncond=uncond).detach()
        call.norms.append(norm)
        if self.policy is None:
            return None
        step = Step(
            index=len(call.norms) - 1, timestep=call.timesteps[-1][0], cond=cond, uncond=uncond, norm=norm,
            guidance_scale=float(self.pipe.guidance_scale),
        )  # fmt: skip
        replaced = self.policy.step(step)
        if replaced is None:
            return None
        new = torch.cat([replaced[1], replaced[0]]).to(out)
        return (new, *output[1:]) if isinstance(output, tuple) else type(output)(sample=new)

    def _on_end(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A run has ended: bring norms and timesteps to the host in one transfer and turn them into reports."""
        call, self._call = self._call, None
        if call is not None and call.norms:
            self.history.append(self._reports(call))
        return original(*args, **kwargs)

    def _require_guidance(self, call: _Call, batch: int) -> None:
        if batch == 2 * call.images:
            return
        if batch == call.images:
            raise UserError(
                "classifier-free guidance is off",
                rule="without an unconditional half there is nothing to measure, and a score of 0 would be a lie",
                remedy="sample with guidance_scale > 1 from the first step to the last, or without the guard",
            )
        raise UserError(
            f"{type(self.pipe).__name__} runs its U-Net on {batch} rows for {call.images} pictures",
            rule="the guard reads one batch of two halves, unconditional then conditional",
            remedy=f"use one of {', '.join(SUPPORTED)}",
        )

    def _reports(self, call: _Call) -> list[ImageReport]:
        device = call.norms[0].device
        rows = [torch.cat([norm, t.to(device, norm.dtype)]) for norm, t in zip(call.norms, call.timesteps, strict=True)]
        table = torch.stack(rows).cpu().double()  # the one transfer: (steps, images + 1)
        timesteps = table[:, -1]
        curves = table[:, :-1] * scores.noise_factor(self.pipe.scheduler, timesteps)[:, None]
        reports, change = [], call.change
        for i in range(call.images):
            curve = curves[:, i].tolist()
            score = sum(curve) / len(curve)
            prompt_index = i // call.images_per_prompt
            negative = call.negative_prompts[prompt_index] if call.negative_prompts is not None else None
            reports.append(
                ImageReport(
                    score=score,
                    curve=curve,
                    timesteps=timesteps.tolist(),
                    flagged=None if self.threshold is None else score >= self.threshold,
                    threshold=self.threshold,
                    threshold_origin="not calibrated" if self.threshold is None else "given by caller",
                    prompt=call.prompts[prompt_index] if call.prompts is not None else None,
                    negative_prompt=negative or None,
                    unconditional="negative prompt" if negative else call.unconditional,
                    guidance_scale=call.guidance_scale,
                    prompt_index=prompt_index,
                    mitigated=change is not None and change.changed[i],
                    first_score_before=None if change is None else change.first_score_before[i],
                    first_score_after=None if change is None else change.first_score_after[i],
                    iterations=0 if change is None else change.iterations[i],
                )
            )
        return reports


def active_guard(pipe: Any) -> MemorizationGuard | None:
    """Return the guard that is on for this pipeline, or None."""
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


def _start(unet: torch.nn.Module, inputs: dict[str, Any], n: int, factor: float) -> SamplingStart:
    """Describe the first step to a policy, with the two halves of the batch as separate functions.

    `unet.forward` is called, not `unet(...)`: the guard's own hooks must not see these evaluations, while an offload
    wrapper, which lives in `forward`, must.
    """
    # A pipeline may run under torch.inference_mode, whose tensors cannot enter autograd: the policy gets ordinary ones.
    with torch.inference_mode(False):
        inputs = _map(inputs, lambda x: x.clone() if x.is_inference() else x)
        uncond = _rows(inputs, n, torch.arange(n))
        cond = _rows(inputs, n, torch.arange(n, 2 * n))

    def predict_cond(embeds: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        half = _rows(inputs, n, n + images)
        return unet.forward(**(half | {"encoder_hidden_states": embeds, "return_dict": False}))[0]

    def predict_uncond() -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return unet.forward(**(uncond | {"return_dict": False}))[0]

    return SamplingStart(
        prompt_embeds=cond["encoder_hidden_states"], negative_prompt_embeds=uncond["encoder_hidden_states"],
        timestep=float(torch.as_tensor(inputs["timestep"]).flatten()[0]), noise_factor=factor,
        predict_cond=predict_cond, predict_uncond=predict_uncond, enable_grad=lambda: _differentiable(unet),
    )  # fmt: skip


def _rows(inputs: dict[str, Any], n: int, rows: torch.Tensor) -> dict[str, Any]:
    """Return the inputs with only these rows of every tensor that has one row per entry of the doubled batch."""
    return _map(inputs, lambda x: x[rows.to(x.device)] if x.ndim > 0 and x.shape[0] == 2 * n else x)


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to every tensor in nested dicts, lists and tuples (SDXL keeps conditions in a dict)."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return value


@contextlib.contextmanager
def _differentiable(unet: torch.nn.Module) -> Iterator[None]:
    """Switch autograd on for the inputs of the network but not for its parameters; restore both afterwards.

    Pipelines run under `torch.no_grad`, callers possibly under `torch.inference_mode`: both are left for the while.
    Frozen parameters also spare autograd the activations that only their gradients would need.
    """
    if any(parameter.is_inference() for parameter in unet.parameters()):
        raise UserError(
            "the U-Net's weights were loaded under torch.inference_mode",
            rule="autograd cannot pass through such tensors",
            remedy="load the pipeline outside inference_mode",
        )
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
