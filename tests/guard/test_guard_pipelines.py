"""Every supported pipeline under every kind of scheduler that it takes: stock images, true scores, policies that act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import guard_tools as tools
import pytest
import tiny_flow
import tiny_more
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)

from ambient_sd import AmbientSDPipeline
from ambient_sd.families import FAMILIES, SUPPORTED
from ambient_sd.guard.policies import Policy, PromptOptimization, SamplingStart, ScalePolicy, Step
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.utils.errors import UserError


def image(size: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def mask(size: int) -> torch.Tensor:
    half = torch.zeros(1, 1, size, size)
    half[..., : size // 2] = 1
    return half


def variant(kind: Any, base: Callable[[], Any], **extra: Any) -> Callable[[], Any]:
    def make() -> Any:
        pipe = kind(**base().components, **extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def of(prediction: str) -> Callable[[], Any]:
    return lambda: tools.pipeline(prediction)


PICTURE = {"image": image(32), "strength": 0.6, "num_inference_steps": 5}
HOLE = {"image": image(32), "mask_image": mask(32), "height": 32, "width": 32}
XL_PICTURE = {"image": image(16), "strength": 0.6, "num_inference_steps": 5}
XL_HOLE = {"image": image(16), "mask_image": mask(16), "height": 16, "width": 16}
FLUX = {"height": 32, "width": 32, "negative_prompt": ["", ""], "max_sequence_length": 24}
PLAIN = {"requires_safety_checker": False}
SIDES = {"height": 32, "width": 32}
# Not the name of the scale that all others have, and what scale the pipeline is given for 5.
SCALES = {"FluxPipeline": "true_cfg_scale", "QwenImagePipeline": "true_cfg_scale"}
TWO_CALLS = ("FluxPipeline", "Flux2KleinPipeline", "ChromaPipeline", "QwenImagePipeline", "Lumina2Pipeline")
WITHOUT_INTERRUPT = ("Lumina2Pipeline", "AuraFlowPipeline")

# name of the class -> how a tiny one is made, how it is called, which schedulers it is proven with
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], list[str]]] = {
    "StableDiffusionPipeline": (of("epsilon"), {}, ["ddim", "heun"]),
    "AmbientSDPipeline": (variant(AmbientSDPipeline, of("v_prediction"), **PLAIN), {}, ["ddim"]),
    "StableDiffusionImg2ImgPipeline": (
        variant(StableDiffusionImg2ImgPipeline, of("v_prediction"), **PLAIN), PICTURE, ["ddim", "euler"],
    ),
    "StableDiffusionInpaintPipeline": (
        variant(StableDiffusionInpaintPipeline, of("epsilon"), **PLAIN), HOLE, ["ddim", "pndm"],
    ),
    "StableDiffusionXLPipeline": (tools.tiny_sdxl, {}, ["ddim", "euler-ancestral", "heun"]),
    "StableDiffusionXLImg2ImgPipeline": (
        variant(StableDiffusionXLImg2ImgPipeline, tools.tiny_sdxl, add_watermarker=False), XL_PICTURE,
        ["ddim", "euler"],
    ),
    "StableDiffusionXLInpaintPipeline": (
        variant(StableDiffusionXLInpaintPipeline, tools.tiny_sdxl, add_watermarker=False), XL_HOLE,
        ["ddim", "dpm++"],
    ),
    "StableDiffusion3Pipeline": (tools.tiny_sd3, SIDES, ["flow-euler", "flow-heun"]),
    "FluxPipeline": (tools.tiny_flux, FLUX, ["flow-euler"]),
    "Flux2KleinPipeline": (tools.woken(tiny_flow.tiny_klein_pipeline), SIDES | {"max_sequence_length": 48}, ["flow-euler"]),
    "ChromaPipeline": (tools.woken(tiny_flow.tiny_chroma_pipeline), SIDES | {"max_sequence_length": 24}, ["flow-euler"]),
    "ZImagePipeline": (tools.woken(tiny_more.tiny_z_image_pipeline), SIDES, ["flow-euler"]),
    "QwenImagePipeline": (tools.woken(tiny_more.tiny_qwen_image_pipeline), SIDES | {"negative_prompt": ["", ""]}, ["flow-euler"]),
    "Lumina2Pipeline": (tools.woken(tiny_more.tiny_lumina2_pipeline), SIDES, ["flow-euler"]),
    "SanaPipeline": (tools.woken(tiny_more.tiny_sana_pipeline), SIDES | {"use_resolution_binning": False}, ["flow-dpm++", "flow-euler"]),
    "AuraFlowPipeline": (tools.woken(tiny_more.tiny_auraflow_pipeline), SIDES, ["flow-euler"]),
}  # fmt: skip
FLOW: dict[str, Any] = {
    "flow-euler": FlowMatchEulerDiscreteScheduler, "flow-heun": FlowMatchHeunDiscreteScheduler, "flow-dpm++": DPMSolverMultistepScheduler,
}  # fmt: skip
ROWS = [(name, scheduler) for name, (_, _, schedulers) in CASES.items() for scheduler in schedulers]


def case(name: str, scheduler: str | None = None) -> tuple[Any, dict[str, Any]]:
    make, call, schedulers = CASES[name]
    pipe = make()
    chosen = scheduler or schedulers[0]
    kind, options = (FLOW[chosen], {"shift": 3.0}) if chosen in FLOW else tools.SCHEDULERS[chosen]
    if chosen != "flow-dpm++":  # the pipeline's own
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    return pipe, call


def scaled(name: str, scale: float) -> dict[str, float]:
    """The option that means guidance by `uncond + scale (cond - uncond)`."""
    return {SCALES.get(name, "guidance_scale"): scale - 1 if name == "ZImagePipeline" else scale}


def run(pipe: Any, call: dict[str, Any], prompt: Any = None, scale: float = 5.0, **more: Any) -> torch.Tensor:
    steps = more.pop("steps", call.get("num_inference_steps", 3))
    call = {k: v for k, v in call.items() if k != "num_inference_steps"} | more
    call |= scaled(type(pipe).__name__, scale)
    # A list of its own: Z-Image's pipeline writes its template into it.
    return tools.sample(pipe, prompt or list(tools.PROMPTS), steps=steps, **call)


class Witness:
    """An independent count: the network's own outputs and timesteps, halves told apart by order, sums in float64."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.outputs, self.timesteps = pipe, [], []
        self.handle = tools.network(pipe).register_forward_hook(self, with_kwargs=True)

    def __call__(self, network: Any, args: Any, kwargs: Any, output: Any) -> None:
        found = torch.stack(output[0]) if isinstance(output[0], list) else output[0]
        self.outputs.append(found.double())
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        self.timesteps.append(float(torch.as_tensor(t).flatten()[0]))

    def curves(self) -> torch.Tensor:
        self.handle.remove()
        if type(self.pipe).__name__ in TWO_CALLS:
            pairs = list(zip(self.outputs[::2], self.outputs[1::2], strict=True))
        else:
            pairs = [tuple(out.chunk(2)) for out in self.outputs]
        norms = torch.stack([(a - b).flatten(1).norm(dim=1) for a, b in pairs], dim=1)
        if self.pipe.scheduler.config.get("prediction_type") == "v_prediction":
            alpha_bar = self.pipe.scheduler.alphas_cumprod.double()
            t = torch.tensor(self.timesteps, dtype=torch.float64)
            level = ((1 - alpha_bar) / alpha_bar).sqrt()
            s = level[t.floor().long()] * (1 - t % 1) + level[t.ceil().long()] * (t % 1)
            norms = norms / (1 + s * s).sqrt()
        return norms


def test_every_supported_pipeline_is_a_row_of_the_table() -> None:
    assert set(CASES) == set(SUPPORTED) and set(SUPPORTED) == {
        *(kind for family in FAMILIES for kind in family.guidance),
        "AmbientSDPipeline",
    }


@pytest.mark.parametrize(("name", "scheduler"), ROWS)
def test_images_are_the_stock_pipelines_and_scores_are_an_independent_count(name: str, scheduler: str) -> None:
    pipe, call = case(name, scheduler)
    stock = run(pipe, call, num_images_per_prompt=2)
    before = tools.state(pipe)
    witness = Witness(pipe)
    with MemorizationGuard(pipe) as guard:
        assert torch.equal(stock, run(pipe, call, num_images_per_prompt=2))
    expected = witness.curves()
    assert not tools.state_differs(pipe, before)
    assert [image.prompt for image in guard.report] == [p for p in tools.PROMPTS for _ in range(2)]
    assert len(guard.report) == len(expected) == 4 and (expected > 1e-4).all()
    for image, curve in zip(guard.report, expected, strict=True):
        assert image.curve == pytest.approx(curve.tolist(), rel=1e-5)
        assert image.score == pytest.approx(curve.mean().item(), rel=1e-5)
        assert image.quantity == ("velocity" if scheduler in FLOW else "noise")
        assert image.guidance_scale == 5.0 and image.active is False


@pytest.mark.parametrize("name", [name for name in CASES if name != "Flux2KleinPipeline"])  # it takes none
def test_negative_prompts_are_told_from_the_empty_one(name: str) -> None:
    pipe, call = case(name)
    call = {k: v for k, v in call.items() if k != "negative_prompt"}
    stock = run(pipe, call, negative_prompt=["", "text"])
    with MemorizationGuard(pipe) as guard:
        assert torch.equal(stock, run(pipe, call, negative_prompt=["", "text"]))
    assert [image.negative_prompt for image in guard.report] == [None, "text"]
    assert [image.unconditional for image in guard.report] == ["empty prompt", "negative prompt"]


class Fixed(ScalePolicy):
    """Scale 2 for the second image, the pipeline's own for the first."""

    def scale(self, step: Step) -> torch.Tensor:
        self.given = step.guidance_scale
        return torch.tensor([float("nan"), 2.0])


@pytest.mark.parametrize("name", CASES)
def test_a_scale_policy_samples_what_the_pipeline_samples_at_that_scale(name: str) -> None:
    pipe, call = case(name)
    stock, other = run(pipe, call), run(pipe, call, scale=2.0)
    policy = Fixed()
    with MemorizationGuard(pipe, policy):
        got = run(pipe, call)
    assert policy.given == 5.0
    assert torch.equal(got[0], stock[0])
    torch.testing.assert_close(got[1], other[1], rtol=0, atol=1e-4)
    assert (stock[1] - other[1]).abs().max() > 1e-3


class Asks(Policy):
    """Ask both halves again with their own inputs, at every evaluation."""

    def begin(self, start: SamplingStart) -> None:
        self.start, self.first = start, [start.halves.predict(half) for half in ("cond", "uncond")]
        self.own: list[Any] = []
        self.again: list[Any] = []
        self.some: list[Any] = []

    def step(self, step: Step) -> None:
        self.own.append((step.cond.clone(), step.uncond.clone()))
        self.again.append(tuple(step.halves.predict(half) for half in ("cond", "uncond")))
        self.some.append(step.halves.predict("cond", rows=torch.tensor([1])))


@pytest.mark.parametrize("name", CASES)
def test_a_half_asked_again_gives_what_the_loop_got(name: str) -> None:
    pipe, call = case(name)
    stock = run(pipe, call)
    policy = Asks()
    with MemorizationGuard(pipe, policy) as guard:
        assert torch.equal(run(pipe, call), stock)
    assert len(policy.own) == len(guard.report[0].curve)
    close = {"rtol": 1e-3, "atol": 1e-4}
    for own, again, some in zip(policy.own, policy.again, policy.some, strict=True):
        for a, b in zip(own, again, strict=True):
            torch.testing.assert_close(a, b, **close)
        torch.testing.assert_close(own[0][1:], some, **close)
        assert (own[0] - own[1]).abs().max() > 1e-3
    for a, b in zip(policy.first, policy.own[0], strict=True):
        torch.testing.assert_close(a, b, **close)
    cond = policy.start.halves.cond
    encoded = policy.start.encode(tools.PROMPTS)
    assert torch.equal(encoded.embeds, cond.embeds)
    assert (encoded.pooled is None and cond.pooled is None) or torch.equal(encoded.pooled, cond.pooled)  # type: ignore[arg-type]
    assert (cond.pooled is None) == (name in SUPPORTED[:3] or name not in SUPPORTED[:8])
    assert (encoded.mask is None and cond.mask is None) or torch.equal(encoded.mask, cond.mask)  # type: ignore[arg-type]
    assert policy.start.prompts == tools.PROMPTS and policy.start.active == [True, True]
    if name in SUPPORTED[:6]:
        ids, real = policy.start.token_ids, policy.start.token_mask
        assert ids is not None and real is not None and ids.shape == real.shape == cond.embeds.shape[:2]
        # BOS, "a cat" and "the red dog" letter by letter, EOS.
        assert real.sum(1).tolist() == [1 + 4 + 1, 1 + 9 + 1]
        assert ids[0, 0] == pipe.tokenizer.bos_token_id and ids[0, 5] == pipe.tokenizer.eos_token_id
    else:
        assert name == "AmbientSDPipeline" or policy.start.token_ids is None


def test_latents_that_a_pipeline_returns_without_a_sign_are_reported_too() -> None:
    pipe, call = case("StableDiffusionXLInpaintPipeline")
    with MemorizationGuard(pipe) as guard:
        pipe(tools.PROMPTS, output_type="latent", **call, num_inference_steps=3)
        pipe("a cat", output_type="latent", **call, num_inference_steps=2)
        assert len(guard.report) == 1
        pipe("a cat", output_type="latent", **call, num_inference_steps=2)
    assert [len(images) for images in guard.history] == [2, 1, 1]


@pytest.mark.parametrize("name", CASES)
def test_stopping_after_one_evaluation_gives_the_first_score_and_calls_the_network_no_more(name: str) -> None:
    pipe, call = case(name)
    with MemorizationGuard(pipe) as guard:
        stock = run(pipe, call)
    before, witness = tools.state(pipe), Witness(pipe)
    if name in WITHOUT_INTERRUPT:
        with pytest.raises(UserError, match="cannot be interrupted"):
            MemorizationGuard(pipe, stop_after=1)
        return
    early = MemorizationGuard(pipe, stop_after=1)
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    scale = scaled(name, 5.0)
    steps = CASES[name][1].get("num_inference_steps", 3)
    for _ in range(2):
        report = early.decide(
            prompt=list(tools.PROMPTS),
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(3),
            **call,
            **scale,
        )
        assert [image.curve for image in report] == [image.curve[:1] for image in guard.report]
    witness.handle.remove()
    assert len(witness.outputs) == (4 if name in TWO_CALLS else 2)
    assert not tools.state_differs(pipe, before)
    assert torch.equal(run(pipe, call | CASES[name][1]), stock)  # all steps again


TRANSFORMERS = [name for name, (_, _, schedulers) in CASES.items() if schedulers[0] in FLOW]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_prompt_optimization_works_on_transformers_too(name: str) -> None:
    pipe, call = case(name)
    with MemorizationGuard(pipe, PromptOptimization(1e-3, max_steps=4, lr=1e-4)) as guard:
        run(pipe, call)
    image = guard.report[1]
    assert image.mitigated and image.curve[0] == pytest.approx(image.first_score_after, rel=1e-4)
    assert image.first_score_after < image.first_score_before  # type: ignore[operator]


# -- two calls a step ----------------------------------------------------------------------------------------------


def test_two_calls_are_told_apart_by_their_texts_not_by_their_order() -> None:
    pipe, _ = case("FluxPipeline")
    guard = MemorizationGuard(pipe, Asks())
    with guard:
        pipe.check_inputs("x", None, 32, 32)
        texts = [pipe.encode_prompt(prompt=p, prompt_2=None, device="cpu", max_sequence_length=24) for p in ("x", "")]
        run_call = guard._call
        assert run_call is not None
        inputs = [{"hidden_states": torch.zeros(1, 4, 64), "encoder_hidden_states": t[0]} for t in texts]
        assert [guard._half(run_call, i) for i in inputs] == ["cond", "uncond"]
        assert [guard._half(run_call, i) for i in reversed(inputs)] == ["uncond", "cond"]
        with pytest.raises(UserError, match="not this run's prompts"):
            guard._half(run_call, inputs[0] | {"encoder_hidden_states": texts[0][0].clone()})


class Multiplies(Policy):
    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        return step.cond * 2, step.uncond * 3


def one_step(self: Any, texts: list[Any], order: list[int], true_cfg_scale: float = 4.0) -> list[torch.Tensor]:
    """One step of a loop as Flux writes it, the two calls of the network in either order; the outputs as it holds them."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 64, 64, generator=g)
    self.check_inputs("x", None, 32, 32)
    encoded = [self.encode_prompt(prompt=t, prompt_2=None, device="cpu", max_sequence_length=24) for t in texts]
    _, ids = self.prepare_latents(1, 16, 32, 32, torch.float32, "cpu", g, latents)
    outputs = [torch.empty(0)] * 2
    for half in order:
        embeds, pooled, text_ids = encoded[half]
        outputs[half] = self.transformer(
            hidden_states=latents, timestep=torch.ones(1), pooled_projections=pooled, encoder_hidden_states=embeds,
            txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
    self.maybe_free_model_hooks()
    return outputs


def test_both_outputs_of_two_calls_are_replaced_in_either_order() -> None:
    pipe, _ = case("FluxPipeline")
    with torch.no_grad():
        own = one_step(pipe, ["x", ""], [0, 1])
        for order in ([0, 1], [1, 0]):
            with MemorizationGuard(pipe, Multiplies()) as guard:
                got = one_step(pipe, ["x", ""], order)
            torch.testing.assert_close(got, [own[0] * 2, own[1] * 3])
            expected = (own[0] - own[1]).norm().item()
            assert guard.report[0].curve == pytest.approx([expected], rel=1e-5)
            assert guard.report[0].prompt == "x" and guard.report[0].guidance_scale == 4.0


def test_flux_without_a_negative_prompt_has_no_guidance_to_measure() -> None:
    pipe, call = case("FluxPipeline")
    call = {k: v for k, v in call.items() if k != "negative_prompt"}
    with MemorizationGuard(pipe) as guard:
        with pytest.raises(UserError, match=r"guidance is off.*negative_prompt.*true_cfg_scale"):
            run(pipe, call)
        run(pipe, call, negative_prompt=["", ""])  # the aborted run leaves nothing behind
    assert len(guard.history) == 1


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"])
def test_without_guidance_the_empty_prompt_is_asked_once_more(name: str) -> None:
    pipe, call = case(name)
    plain_call = {k: v for k, v in call.items() if k != "negative_prompt"}
    off = scaled(name, 1.0)
    stock = tools.sample(pipe, list(tools.PROMPTS), **plain_call, **off)
    witness = Witness(pipe)
    with MemorizationGuard(pipe, score_space="unguided") as guard:
        assert torch.equal(stock, tools.sample(pipe, list(tools.PROMPTS), **plain_call, **off))
    witness.handle.remove()
    assert len(witness.outputs) == 3, "what is asked beside the loop is not the loop's"
    assert {image.quantity for image in guard.report} == {"unguided"} and len(guard.report[0].curve) == 3
    with MemorizationGuard(pipe, stop_after=1) as guided:
        run(pipe, call)
    # At the first step both runs ask for the same: the prompt and the empty one, of the same noise.
    for one, other in zip(guard.report, guided.report, strict=True):
        assert one.curve[0] == pytest.approx(other.curve[0], rel=1e-3)
    with MemorizationGuard(pipe, score_space="unguided"), pytest.raises(UserError, match="guidance is on"):
        run(pipe, call)
    with pytest.raises(UserError, match="no guidance that a policy could change"):
        MemorizationGuard(pipe, Asks(), score_space="unguided")


def test_texts_encoded_between_runs_are_not_taken_for_a_half() -> None:
    pipe, call = case("FluxPipeline")
    with MemorizationGuard(pipe) as guard:
        run(pipe, call)
        pipe.encode_prompt(prompt="x", prompt_2=None, device="cpu", max_sequence_length=24)
        run(pipe, call)
    assert guard.history[0] == guard.history[1]


def test_skip_layer_guidance_of_sd3_is_a_third_evaluation_and_is_not_scored() -> None:
    pipe, call = case("StableDiffusion3Pipeline")
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    stock = run(pipe, call, **more)
    assert not torch.equal(stock, run(pipe, call))
    with MemorizationGuard(pipe) as guard:
        assert torch.equal(stock, run(pipe, call, **more))
    assert len(guard.report[0].curve) == 3


# -- refused -------------------------------------------------------------------------------------------------------


def test_models_that_take_the_scale_as_an_input_are_refused_in_one_line_and_unmeasured_by_default() -> None:
    pipe, call = case("AmbientSDPipeline")
    guard = MemorizationGuard(pipe)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    pipe.unet = UNet2DConditionModel(**config | {"time_cond_proj_dim": 8})
    with pytest.raises(UserError, match="takes the guidance scale as an input") as error:
        MemorizationGuard(pipe)
    assert "\n" not in str(error.value)
    with guard, pytest.raises(UserError, match="time_cond_proj_dim"):  # swapped after the guard was made
        run(pipe, call)
    assert pipe("a cat", num_inference_steps=2, output_type="latent").memorization is None
    parts = {**pipe.components, "scheduler": LCMScheduler.from_config(pipe.scheduler.config)}
    with pytest.raises(UserError, match="takes the guidance scale as an input"):
        MemorizationGuard(LatentConsistencyModelPipeline(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
def test_an_lcm_sampler_with_guidance_is_scored_like_any_other(scheduler: Any) -> None:
    """As with an LCM LoRA: the network gets both halves, so the score is the norm between the rows that it returns."""
    pipe, _ = case("StableDiffusionPipeline")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    call = {"num_inference_steps": 3, "output_type": "latent"}
    seen: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with MemorizationGuard(pipe) as guard:
        guarded = pipe("a cat", guidance_scale=4.0, generator=torch.Generator().manual_seed(0), **call).images
    hook.remove()
    assert [len(rows) for rows in seen] == [2, 2, 2]
    expected = [float((rows[1] - rows[0]).norm()) for rows in seen]
    assert guard.report[0].curve == pytest.approx(expected, rel=1e-5)
    stock = pipe("a cat", guidance_scale=4.0, generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(guarded, stock)
    with MemorizationGuard(pipe), pytest.raises(UserError, match="classifier-free guidance is off"):
        pipe("a cat", guidance_scale=1.0, **call)


class Weighs(Policy):
    def begin(self, start: SamplingStart) -> Any:
        n, length = start.halves.cond.embeds.shape[:2]
        start.halves.predict("cond", token_weights=torch.ones(n, length))


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_policies_that_need_cross_attention_are_refused_where_there_is_none(name: str) -> None:
    pipe, call = case(name)
    run(pipe, call)
    before = tools.state(pipe)
    with MemorizationGuard(pipe, Weighs()), pytest.raises(UserError, match="has no cross-attention") as error:
        run(pipe, call)
    assert "\n" not in str(error.value) and not tools.state_differs(pipe, before)
