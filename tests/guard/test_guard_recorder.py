"""The guard on real tiny pipelines: it changes nothing, measures the loop's own tensors, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import guard_tools as tools
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DModel,
)

from ambient_sd.guard.policies import Change, Policy, PromptOptimization, SamplingStart, Step
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.utils.errors import UserError


class RecordedHalves:
    """An independent witness: a plain hook that keeps both halves and the scheduler's own sigma of every evaluation."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.norms, self.timesteps = pipe, [], []
        self.handle = pipe.unet.register_forward_hook(self, with_kwargs=True)

    def __call__(self, unet: Any, args: Any, kwargs: Any, output: Any) -> None:
        half = output[0].shape[0] // 2
        self.norms.append((output[0][half:].double() - output[0][:half].double()).flatten(1).norm(dim=1))
        self.timesteps.append(float(args[1]))


# -- nothing changes -----------------------------------------------------------------------------------------------


# Of v-predictions every sampler's timesteps count, whole or not; of noise none does.
@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    [*((name, "v_prediction") for name in tools.SCHEDULERS), ("euler-karras", "epsilon")],
)
def test_guarded_images_are_bit_identical_and_scores_are_the_loops_own(scheduler: str, prediction_type: str) -> None:
    pipe = tools.pipeline(prediction_type, scheduler)
    stock = tools.sample(pipe, tools.PROMPTS, num_images_per_prompt=2)
    witness = RecordedHalves(pipe)
    with MemorizationGuard(pipe) as guard:
        guarded = tools.sample(pipe, tools.PROMPTS, num_images_per_prompt=2)
    witness.handle.remove()
    assert torch.equal(stock, guarded)
    assert not torch.equal(stock, tools.sample(pipe, tools.PROMPTS, num_images_per_prompt=2, seed=4))

    alpha_bar = pipe.scheduler.alphas_cumprod.double()
    expected = torch.stack(witness.norms)
    if prediction_type == "v_prediction":
        levels = ((1 - alpha_bar) / alpha_bar).sqrt()
        t = torch.tensor(witness.timesteps, dtype=torch.float64)
        s = levels[t.floor().long()] * (1 - t % 1) + levels[t.ceil().long()] * (t % 1)
        expected = expected / (1 + s[:, None] ** 2).sqrt()
    got = torch.tensor([image.curve for image in guard.report], dtype=torch.float64).T
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    for i, image in enumerate(guard.report):
        assert image.score == pytest.approx(expected[:, i].mean().item(), rel=1e-5)
        assert image.timesteps == pytest.approx(witness.timesteps)
        assert (image.prompt, image.prompt_index) == (tools.PROMPTS[i // 2], i // 2)
        assert (image.flagged, image.threshold, image.threshold_origin) == (None, None, "not calibrated")
        assert (image.negative_prompt, image.unconditional, image.mitigated) == (None, "empty prompt", False)


def test_guidance_rescale_and_a_live_guidance_scale_are_left_alone() -> None:
    pipe = tools.pipeline()
    stock = tools.sample(pipe, guidance_rescale=0.7, guidance_scale=3.0)
    with MemorizationGuard(pipe) as guard:
        assert torch.equal(stock, tools.sample(pipe, guidance_rescale=0.7, guidance_scale=3.0))
    assert guard.report[0].guidance_scale == 3.0


def test_img2img_images_are_bit_identical_and_scored() -> None:
    pipe = StableDiffusionImg2ImgPipeline(**tools.pipeline().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    run = lambda: tools.sample(pipe, image=image, strength=0.6, steps=5)  # noqa: E731
    stock = run()
    with MemorizationGuard(pipe) as guard:
        assert torch.equal(stock, run())
    assert len(guard.report[0].curve) == 3 and guard.report[0].score > 0


def test_inpainting_images_are_bit_identical_and_scored() -> None:
    pipe = StableDiffusionInpaintPipeline(**tools.pipeline().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    run = lambda: tools.sample(pipe, image=image, mask_image=mask, height=32, width=32)  # noqa: E731
    stock = run()
    with MemorizationGuard(pipe) as guard:
        assert torch.equal(stock, run())
    assert guard.report[0].score > 0


def test_sdxl_images_are_bit_identical_scored_and_mitigated() -> None:
    pipe = tools.tiny_sdxl()
    stock = tools.sample(pipe, tools.PROMPTS)
    with MemorizationGuard(pipe) as guard:
        assert torch.equal(stock, tools.sample(pipe, tools.PROMPTS))
    assert [image.prompt for image in guard.report] == tools.PROMPTS
    assert {image.unconditional for image in guard.report} == {"zero embedding"}
    with MemorizationGuard(pipe, PromptOptimization(1e-3, max_steps=2)) as guard:
        assert not torch.equal(stock, tools.sample(pipe, tools.PROMPTS))
    for image in guard.report:
        assert image.mitigated and image.first_score_after < image.first_score_before
        assert image.curve[0] == pytest.approx(image.first_score_after, rel=1e-4)


# -- what is reported ----------------------------------------------------------------------------------------------


def test_prompt_report_averages_over_the_generations_of_each_prompt() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe, tools.PROMPTS, num_images_per_prompt=3)
    first, second = guard.prompt_report
    assert (first.prompt, second.prompt, first.images, second.images) == (*tools.PROMPTS, 3, 3)
    assert first.score == pytest.approx(sum(image.score for image in guard.report[:3]) / 3)
    assert second.score == pytest.approx(sum(image.score for image in guard.report[3:]) / 3)


def test_a_negative_prompt_is_reported_because_it_changes_what_the_score_means() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe, tools.PROMPTS)
        tools.sample(pipe, tools.PROMPTS, negative_prompt=["blurry", "text"], num_images_per_prompt=2)
    plain, negative = guard.history[0], guard.report
    assert [image.negative_prompt for image in negative] == ["blurry", "blurry", "text", "text"]
    assert {image.unconditional for image in negative} == {"negative prompt"}
    assert negative[0].curve[0] != pytest.approx(plain[0].curve[0], rel=1e-3)
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe, tools.PROMPTS, negative_prompt=["", "text"])
    assert [image.negative_prompt for image in guard.report] == [None, "text"]
    assert [image.unconditional for image in guard.report] == ["empty prompt", "negative prompt"]


def test_a_pipeline_called_with_embeddings_is_scored_without_texts() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe, tools.PROMPTS)
        cond, uncond = pipe.encode_prompt(tools.PROMPTS, "cpu", 1, True)
        tools.sample(pipe, None, prompt_embeds=cond, negative_prompt_embeds=uncond)
    assert len(guard.history) == 2
    for texts, embeds in zip(*guard.history, strict=True):
        assert embeds.score == texts.score
        assert (embeds.prompt, embeds.unconditional) == (None, "embeddings given by caller")


def test_report_is_the_last_call_and_history_holds_all() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe, "a cat")
        tools.sample(pipe, tools.PROMPTS, steps=2)
    assert [len(call) for call in guard.history] == [1, 2]
    assert guard.report is guard.history[-1] and len(guard.report[0].curve) == 2


def test_a_threshold_flags_at_or_above_it_and_names_its_origin() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe)
    score = guard.report[0].score
    for threshold, flagged in ((score, True), (score * 1.01, False)):
        with MemorizationGuard(pipe, threshold=threshold) as guard:
            tools.sample(pipe)
        image = guard.report[0]
        assert (image.flagged, image.threshold, image.threshold_origin) == (flagged, threshold, "given by caller")


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, PromptOptimization(1.0)])
def test_guidance_off_raises_and_never_scores_zero(policy: Policy | None) -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe, policy) as guard:
        with pytest.raises(UserError, match="guidance is off"):
            tools.sample(pipe, tools.PROMPTS, guidance_scale=1.0)
        with pytest.raises(UserError, match="nothing to report"):
            _ = guard.report
    # Two images without guidance are the batch of one with guidance: that one is measured.
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe, "a cat", guidance_scale=1.1)
    assert guard.report[0].score > 0


def test_guidance_switched_off_on_the_way_raises() -> None:
    pipe = tools.pipeline()

    def switch_off(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}

    with MemorizationGuard(pipe), pytest.raises(UserError, match="guidance is off"):
        tools.sample(pipe, callback_on_step_end=switch_off, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_an_object_that_cannot_be_guarded_is_refused_with_the_supported_classes() -> None:
    unconditional = DDPMPipeline(
        UNet2DModel(
            sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ), DDPMScheduler(),
    )  # fmt: skip
    for pipe, lacking in ((object(), "unet"), (unconditional, "encode_prompt")):
        with pytest.raises(UserError, match=f"has no {lacking}.*StableDiffusionPipeline.*StableDiffusionXLPipeline"):
            MemorizationGuard(pipe)


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_no_norm_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="threshold"):
        MemorizationGuard(tools.pipeline(), threshold=threshold)


def test_a_policy_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(UserError, match="policies"):
        MemorizationGuard(tools.pipeline(), policy="wen")  # type: ignore[arg-type]


def test_a_second_guard_on_a_guarded_pipeline_is_refused_and_the_first_goes_on() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe) as guard:
        for second in (guard, MemorizationGuard(pipe)):
            with pytest.raises(UserError, match="guarded already"):
                second.enable()
        tools.sample(pipe)
    assert len(guard.history) == 1
    with guard:  # and again after it is off
        tools.sample(pipe)
    assert len(guard.history) == 2


def test_a_network_swapped_under_the_guard_is_refused() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe):
        pipe.unet = tools.pipeline().unet
        with pytest.raises(UserError, match="replaced"):
            tools.sample(pipe)


# -- nothing is left behind ----------------------------------------------------------------------------------------


class Doubtful(Policy):
    """Acts everywhere a policy can act."""

    def begin(self, start: SamplingStart) -> Change:
        return PromptOptimization(1e-3, max_steps=1).begin(start)

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        return step.cond * 1.01, step.uncond


@pytest.mark.parametrize("policy", [None, Doubtful()])
@pytest.mark.parametrize("failing_step", [0, 3])
def test_an_exception_at_any_step_leaves_the_pipeline_as_before(failing_step: int, policy: Policy | None) -> None:
    pipe = tools.pipeline(scheduler="dpm++")
    stock = tools.sample(pipe, steps=4)
    before = tools.state(pipe)

    def fail(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == failing_step:
            raise RuntimeError("in mid-sampling")
        return kwargs

    guard = MemorizationGuard(pipe, policy)
    with pytest.raises(RuntimeError, match="mid-sampling"), guard:
        assert tools.state_differs(pipe, before)  # negative control: the snapshot does see a guard
        tools.sample(pipe, steps=4, callback_on_step_end=fail)
    assert not tools.state_differs(pipe, before)
    assert torch.equal(stock, tools.sample(pipe, steps=4))
    assert guard.history == []  # an aborted image has no score
    with guard:
        tools.sample(pipe, steps=4)
    assert len(guard.report[0].curve) == 4
    assert not tools.state_differs(pipe, before)


def test_an_exception_inside_the_network_while_a_policy_optimises_restores_the_parameters() -> None:
    pipe = tools.pipeline()
    tools.sample(pipe)
    next(pipe.unet.parameters()).requires_grad_(False)
    before = tools.state(pipe)
    calls = []

    def fail(module: Any, args: Any, output: Any) -> None:
        calls.append(torch.is_grad_enabled())
        if len(calls) == 3:
            raise RuntimeError("inside the network")

    handle = pipe.unet.conv_in.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"), MemorizationGuard(pipe, PromptOptimization(1e-3)):
        tools.sample(pipe)
    handle.remove()
    assert calls == [False, True, True]
    assert not tools.state_differs(pipe, before)


def test_an_aborted_call_does_not_leak_into_the_next_one_under_the_same_guard() -> None:
    pipe = tools.pipeline()

    def fail(*args: Any) -> dict[str, Any]:
        raise RuntimeError

    with MemorizationGuard(pipe) as guard:
        with pytest.raises(RuntimeError):
            tools.sample(pipe, tools.PROMPTS, callback_on_step_end=fail)
        tools.sample(pipe)
    assert len(guard.report) == 1 and len(guard.report[0].curve) == 3


def test_disable_twice_is_harmless_and_an_instances_own_method_comes_back() -> None:
    pipe = tools.pipeline()
    own = pipe.encode_prompt
    pipe.encode_prompt = own
    guard = MemorizationGuard(pipe).enable()
    guard.disable()
    guard.disable()
    assert vars(pipe)["encode_prompt"] is own


def test_the_guard_survives_a_forward_that_accelerate_rewrites_on_the_way() -> None:
    # CPU offload puts its own `forward` in place and takes it away again after every run.
    pipe = tools.pipeline()
    stock = tools.sample(pipe)
    with MemorizationGuard(pipe) as guard:
        add_hook_to_module(pipe.unet, ModelHook())
        assert torch.equal(stock, tools.sample(pipe))
        remove_hook_from_module(pipe.unet)
        assert torch.equal(stock, tools.sample(pipe))
    assert guard.history[0] == guard.history[1]


# -- policies can act on the outputs -------------------------------------------------------------------------------


class Unguided(Policy):
    """Put the unconditional output in both halves."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((step.index, float(step.timestep), step.guidance_scale))
        return step.uncond, step.uncond


def test_a_policy_that_replaces_both_outputs_by_the_unconditional_one_samples_the_empty_prompt() -> None:
    pipe = tools.pipeline()
    policy = Unguided()
    with MemorizationGuard(pipe, policy) as guard:
        replaced = tools.sample(pipe, "a cat")
    empty, guided = tools.sample(pipe, ""), tools.sample(pipe, "a cat")
    torch.testing.assert_close(replaced, empty, rtol=0, atol=1e-5)
    assert (guided - empty).abs().max() > 1e-3
    assert policy.seen == [(i, t, 7.5) for i, t in enumerate(guard.report[0].timesteps)]
    assert all(norm > 0 for norm in guard.report[0].curve)  # the score is what the network said, not what was put back


class GuidanceBranches(Policy):
    """Put the two outputs back, as they were or swapped."""

    def __init__(self, swapped: bool) -> None:
        self.swapped = swapped

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        return (step.uncond, step.cond) if self.swapped else (step.cond, step.uncond)


def test_what_a_policy_puts_back_lands_in_the_half_that_it_names() -> None:
    pipe = tools.pipeline()
    stock = tools.sample(pipe, tools.PROMPTS)
    for swapped in (False, True):
        with MemorizationGuard(pipe, GuidanceBranches(swapped)):
            assert torch.equal(stock, tools.sample(pipe, tools.PROMPTS)) is not swapped


def test_a_network_used_on_its_own_under_the_guard_is_not_counted() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe)
        pipe.unet(torch.zeros(3, 4, 16, 16), 5, encoder_hidden_states=torch.zeros(3, 24, 16))
    assert len(guard.history) == 1 and len(guard.report[0].curve) == 3
