"""What a policy replaces reaches the network and nothing else: every field of `Change`, flagged images only, no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import guard_tools as tools
import pytest
import tiny
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

from ambient_sd.guard.attention import weighed
from ambient_sd.guard.policies import Change, Policy, PromptOptimization, SamplingStart, ScalePolicy, Step
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.utils.errors import UserError

KINDS = ["embeds", "pooled", "uncond_embeds", "uncond_pooled", "sample", "token_weights", "key_scale"]
SECOND = torch.tensor([1])


def noise(like: torch.Tensor, seed: int = 9) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


class Replaces(Policy):
    """Replace one input of the second image (of all, with `every`); the rows of the others hold NaN, to be ignored."""

    def __init__(self, kind: str, every: bool = False) -> None:
        self.kind, self.every = kind, every

    def begin(self, start: SamplingStart) -> Change:
        halves = start.halves
        length = halves.cond.embeds.shape[:2]
        weights = torch.rand(length, generator=torch.Generator().manual_seed(9)) + 0.2
        own = {
            "embeds": halves.cond.embeds, "pooled": halves.cond.pooled, "uncond_embeds": halves.uncond.embeds,
            "uncond_pooled": halves.uncond.pooled, "sample": halves.sample,
        }.get(self.kind)  # fmt: skip
        new = weights if own is None else noise(own)
        if not self.every:
            new[0] = float("nan")
        self.new = new
        return Change([self.every, True], **{self.kind: new})  # type: ignore[arg-type]


class Reference:
    """Hooks of the test's own that do the same to the network: an independent way to the expected images."""

    def __init__(self, pipe: Any, kind: str, new: torch.Tensor) -> None:
        self.pipe, self.kind, self.new = pipe, kind, new[1:]

    def __enter__(self) -> None:
        if self.kind in ("token_weights", "key_scale"):
            self.context: Any = weighed(self.pipe.unet, rows=torch.tensor([3]), **{self.kind: self.new})
            self.context.__enter__()
        else:
            self.handle = self.pipe.unet.register_forward_pre_hook(self.replace, with_kwargs=True)

    def replace(self, unet: Any, args: Any, kwargs: Any) -> Any:
        row = 1 if self.kind.startswith("uncond") else 3
        if self.kind.endswith("embeds"):
            embeds = kwargs["encoder_hidden_states"].clone()
            embeds[row] = self.new[0]
            return args, kwargs | {"encoder_hidden_states": embeds}
        added = dict(kwargs["added_cond_kwargs"])
        added["text_embeds"] = added["text_embeds"].clone()
        added["text_embeds"][row] = self.new[0]
        return args, kwargs | {"added_cond_kwargs": added}

    def __exit__(self, *error: Any) -> None:
        if self.kind in ("token_weights", "key_scale"):
            self.context.__exit__(None, None, None)
        else:
            self.handle.remove()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "sample"])
def test_every_input_is_replaced_at_every_step_and_for_the_chosen_image_only(kind: str) -> None:
    pipe = tools.tiny_sdxl()
    stock = tools.sample(pipe, tools.PROMPTS)
    before = tools.state(pipe)
    policy = Replaces(kind)
    with MemorizationGuard(pipe, policy) as guard:
        got = tools.sample(pipe, tools.PROMPTS)
    assert not tools.state_differs(pipe, before)
    with Reference(pipe, kind, policy.new):
        expected = tools.sample(pipe, tools.PROMPTS)
    assert torch.equal(got[0], stock[0]) and torch.equal(got, expected)
    assert not torch.equal(got[1], stock[1])
    assert [image.mitigated for image in guard.report] == [False, True]


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "pndm", "heun"])
def test_another_latent_is_where_the_sampler_starts_whatever_it_scales_by(scheduler: str) -> None:
    pipe = tools.pipeline(scheduler=scheduler)
    mine = noise(torch.empty(2, 4, 16, 16))
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    expected = tools.sample(pipe, tools.PROMPTS, latents=mine)  # scaled by the pipeline itself

    class Starts(Policy):
        def begin(self, start: SamplingStart) -> Change:
            assert start.halves.sample.shape == mine.shape
            return Change([False, True], sample=seen[0][:2])

    stock = tools.sample(pipe, tools.PROMPTS)
    with MemorizationGuard(pipe, Starts()):
        got = tools.sample(pipe, tools.PROMPTS)
    handle.remove()
    assert torch.equal(got[0], stock[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=2e-5)
    assert (stock[1] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [tools.tiny_sd3, tools.tiny_flux])
def test_latents_given_by_the_caller_are_never_written_to(make: Callable[[], Any]) -> None:
    pipe = make()
    call: dict[str, Any] = {"height": 32, "width": 32}
    if make is tools.tiny_flux:
        call |= {"negative_prompt": ["", ""], "true_cfg_scale": 4.0, "max_sequence_length": 24}
        latents, other = torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    else:
        latents, other = torch.randn(2, 16, 16, 16), torch.randn(2, 16, 16, 16)
    kept, expected = latents.clone(), tools.sample(pipe, tools.PROMPTS, latents=other, **call)
    policy = Replaces("sample", every=True)
    with MemorizationGuard(pipe, policy):
        got = tools.sample(pipe, tools.PROMPTS, latents=latents, **call)
    assert torch.equal(latents, kept)
    assert torch.equal(got, tools.sample(pipe, tools.PROMPTS, latents=policy.new, **call))
    assert not torch.equal(got, expected)


def test_a_latent_beside_a_mask_cannot_be_replaced_and_the_refusal_is_one_line() -> None:
    components = tools.pipeline().components
    config = {k: v for k, v in components["unet"].config.items() if not k.startswith("_")}
    components["unet"] = UNet2DConditionModel(**config | {"in_channels": 9})
    pipe = StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    half = torch.zeros(1, 1, 32, 32)
    half[..., :16] = 1
    call = {"image": torch.rand(1, 3, 32, 32), "mask_image": half, "height": 32, "width": 32}
    stock = tools.sample(pipe, tools.PROMPTS, **call)
    with MemorizationGuard(pipe, Replaces("embeds")) as guard:
        got = tools.sample(pipe, tools.PROMPTS, **call)
    assert torch.equal(got[0], stock[0]) and not torch.equal(got[1], stock[1]) and guard.report[1].mitigated
    with MemorizationGuard(pipe, Replaces("sample")), pytest.raises(UserError, match="not a multiple") as error:
        tools.sample(pipe, tools.PROMPTS, **call)
    assert "\n" not in str(error.value)


def test_pooled_embeddings_are_refused_where_the_network_takes_none() -> None:
    class Pools(Policy):
        def begin(self, start: SamplingStart) -> Change:
            assert start.halves.cond.pooled is None
            return Change([True], pooled=torch.zeros(1, 16))

    with MemorizationGuard(tools.pipeline(), Pools()) as guard, pytest.raises(UserError, match="takes none"):
        tools.sample(guard.pipe)


def test_what_begin_changed_is_in_place_when_a_step_asks_the_network_again() -> None:
    class Again(Replaces):
        def step(self, step: Step) -> None:
            again = step.halves.predict("cond", rows=SECOND)
            plain = step.halves.predict("cond", rows=SECOND, token_weights=torch.ones(1, 24))
            self.seen = (step.cond[1:].clone(), again, plain)

    policy = Again("token_weights")
    with MemorizationGuard(tools.pipeline(), policy) as guard:
        tools.sample(guard.pipe, tools.PROMPTS)
    own, again, plain = policy.seen
    torch.testing.assert_close(own, again, rtol=1e-4, atol=1e-5)
    assert (own - plain).abs().max() > 1e-3


# -- nothing is left behind ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl() -> tuple[Any, torch.Tensor]:
    """An SDXL, and what it samples."""
    pipe = tools.tiny_sdxl()
    return pipe, tools.sample(pipe, tools.PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failing_step", [0, 2])
def test_an_exception_at_any_step_with_any_change_leaves_the_pipeline_as_before(
    xl: tuple[Any, torch.Tensor], kind: str, failing_step: int
) -> None:
    pipe, stock = xl
    before = tools.state(pipe)

    def fail(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == failing_step:
            raise RuntimeError("in mid-sampling")
        return kwargs

    guard = MemorizationGuard(pipe, Replaces(kind))
    with pytest.raises(RuntimeError, match="mid-sampling"), guard:
        assert tools.state_differs(pipe, before)
        tools.sample(pipe, tools.PROMPTS, callback_on_step_end=fail)
    assert not tools.state_differs(pipe, before) and guard.history == []
    if failing_step == 0:
        assert torch.equal(stock, tools.sample(pipe, tools.PROMPTS))


@pytest.mark.parametrize("kind", ["token_weights", "key_scale"])
def test_an_exception_inside_the_network_takes_the_attention_hooks_away(kind: str) -> None:
    pipe = tools.pipeline()
    tools.sample(pipe)
    calls: list[int] = []

    def fail(module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("inside")

    handle = pipe.unet.conv_out.register_forward_hook(fail)
    before = tools.state(pipe)
    x, text = torch.zeros(2, 4, 16, 16), torch.zeros(2, 24, 16)
    with torch.no_grad():
        alone = pipe.unet.forward(x, 5, text)[0]
        calls.clear()
        with MemorizationGuard(pipe, Replaces(kind)) as guard:
            with pytest.raises(RuntimeError, match="inside"):
                tools.sample(pipe, tools.PROMPTS)
            guard._abandon()
            assert torch.equal(pipe.unet(x, 5, text)[0], alone)
    handle.remove()
    before["inner hooks"]["conv_out"]["_forward_hooks"] = []
    assert not tools.state_differs(pipe, before)


# -- whom a policy acts on -----------------------------------------------------------------------------------------


class Both(Policy):
    """Acts before the first step and at every one; keeps what it was told."""

    def begin(self, start: SamplingStart) -> Change:
        self.active = start.active
        return Change([True] * len(start.active), embeds=noise(start.halves.cond.embeds))

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        return step.cond * 1.5, step.uncond + 0.1


class Halved(ScalePolicy):
    def scale(self, step: Step) -> torch.Tensor:
        assert len(step.norms) == step.index + 1 and step.norms[0].dtype == torch.float32
        return torch.full_like(step.norms[0], step.guidance_scale / 2)


def evaluations(pipe: Any) -> list[int]:
    counted: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: counted.append(len(output)))
    return counted


@pytest.mark.parametrize(("kind", "extra"), [(Both, 1), (Halved, 0)])
@pytest.mark.parametrize("make", [tools.pipeline, tools.tiny_sdxl])
def test_only_flagged_images_are_acted_on_and_the_others_keep_their_bits(
    make: Callable[[], Any], kind: Any, extra: int
) -> None:
    pipe = make()
    with MemorizationGuard(pipe) as guard:
        stock = tools.sample(pipe, tools.PROMPTS)
    firsts = [image.curve[0] for image in guard.report]
    limit = sum(firsts) / 2
    high = firsts.index(max(firsts))
    counted = evaluations(pipe)
    with MemorizationGuard(pipe, kind(), limit, when="flagged") as guard:
        got = tools.sample(pipe, tools.PROMPTS)
    assert torch.equal(got[1 - high], stock[1 - high]) and not torch.equal(got[high], stock[high])
    assert [image.active for image in guard.report] == [i == high for i in range(2)]
    # The number is one of the first step, and that is what decides: by what the network said before anything was changed.
    assert [image.flagged for image in guard.report] == [image.active for image in guard.report]
    assert [image.decision_score for image in guard.report] == pytest.approx(firsts, rel=1e-5)
    assert {image.decision_steps for image in guard.report} == {1}
    assert counted == [4] * (3 + extra)
    with MemorizationGuard(pipe, kind()) as guard:
        everyone = tools.sample(pipe, tools.PROMPTS)
    assert not torch.equal(everyone[1 - high], stock[1 - high]) and all(image.active for image in guard.report)
    with MemorizationGuard(pipe, kind(), max(firsts) * 2, when="flagged") as guard:
        assert torch.equal(tools.sample(pipe, tools.PROMPTS), stock)
    assert not any(image.active or image.mitigated for image in guard.report)


class Table:
    """Thresholds by number of steps, as a calibration file holds them."""

    origin = "a table of the test"

    def __init__(self, **values: float) -> None:
        self.values = values
        self.asked: list[tuple[int, int]] = []

    def threshold(self, steps: int, images_per_prompt: int) -> float:
        self.asked.append((steps, images_per_prompt))
        if f"s{steps}" not in self.values:
            raise UserError(f"no threshold for {steps} steps")
        return self.values[f"s{steps}"]


def test_thresholds_are_those_of_the_steps_that_were_seen() -> None:
    pipe = tools.pipeline()
    table = Table(s1=1e-9, s3=1e9)
    with MemorizationGuard(pipe, Halved(), table, when="flagged") as guard:
        tools.sample(pipe)
    image = guard.report[0]
    # A policy acted: the first step decides.
    assert (image.flagged, image.threshold, image.threshold_origin) == (True, 1e-9, "a table of the test")
    assert image.active and set(table.asked) == {(1, 1)}
    with MemorizationGuard(pipe, threshold=table) as guard:
        tools.sample(pipe)
    assert (guard.report[0].flagged, guard.report[0].threshold) == (False, 1e9)
    early = MemorizationGuard(pipe, threshold=table, stop_after=1)
    assert early.decide("a cat", num_inference_steps=50)[0].flagged is True


def test_a_number_of_steps_without_a_threshold_is_refused_before_the_first_evaluation() -> None:
    pipe = tools.pipeline()
    counted = evaluations(pipe)
    with MemorizationGuard(pipe, threshold=Table(s1=1.0)), pytest.raises(UserError, match="no threshold for 4 steps"):
        tools.sample(pipe, steps=4)
    assert counted == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"when": "flagged", "threshold": 1.0}, "without a policy"),
        ({"when": "flagged", "policy": Halved()}, "without a threshold"),
        ({"when": "sometimes"}, "always"),
        ({"stop_after": 0}, "stop_after"),
        ({"stop_after": 1.5}, "stop_after"),
        ({"threshold": "high"}, "threshold is a str"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MemorizationGuard(tools.pipeline(), **arguments)


# -- prompt optimization under the same rules ----------------------------------------------------------------------


def test_prompt_optimization_looks_at_active_images_only_and_at_the_unconditional_half_once() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe) as guard:
        stock = tools.sample(pipe, tools.PROMPTS)
    low, high = (image.curve[0] for image in guard.report)
    assert low < high
    counted = evaluations(pipe)
    with MemorizationGuard(pipe, PromptOptimization(1e-3, max_steps=2), (low + high) / 2, when="flagged") as guard:
        got = tools.sample(pipe, tools.PROMPTS)
    calm, acted = guard.report
    assert torch.equal(got[0], stock[0])
    assert (calm.mitigated, calm.iterations, calm.first_score_before) == (False, 0, None)
    assert acted.mitigated and acted.iterations == 2 and acted.first_score_before == pytest.approx(high, rel=1e-4)
    # The decision on both halves of both; the unconditional half of one; that one's conditional half three times; the run.
    assert counted == [4, 1, 1, 1, 1, 4, 4, 4]


def test_gradient_checkpointing_gives_the_same_embeddings_and_is_taken_back_even_after_an_exception() -> None:
    pipe = tools.pipeline()
    tools.sample(pipe)
    before = tools.state(pipe)
    images = []
    for checkpointing in (False, True):
        policy = PromptOptimization(1e-3, max_steps=2, gradient_checkpointing=checkpointing)
        counted = evaluations(pipe)
        inner: list[int] = []
        handle = pipe.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda m, a: inner.append(1))  # noqa: B023
        with MemorizationGuard(pipe, policy):
            images.append(tools.sample(pipe, tools.PROMPTS))
        handle.remove()
        assert len(inner) == len(counted) + (2 if checkpointing else 0)  # recomputed in each backward pass
        pipe.unet.conv_in._forward_hooks.clear()
        assert not tools.state_differs(pipe, before)
    assert torch.equal(*images)

    def fail(module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("inside")

    handle = pipe.unet.conv_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"), MemorizationGuard(pipe, policy):
        tools.sample(pipe)
    handle.remove()
    assert not tools.state_differs(pipe, before)


def test_encode_is_the_pipelines_own_encoding_of_other_texts() -> None:
    pipe = tiny.tiny_sdxl_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seen: list[Any] = []

    class Encodes(Policy):
        def begin(self, start: SamplingStart) -> None:
            seen.extend([start.encode(["one text", "another", "third"]), start.prompts])

    with MemorizationGuard(pipe, Encodes()) as guard:
        tools.sample(pipe, "a cat", num_images_per_prompt=2, negative_prompt="blurry")
    embeds, _, pooled, _ = pipe.encode_prompt(["one text", "another", "third"], do_classifier_free_guidance=False)
    assert torch.equal(seen[0].embeds, embeds) and torch.equal(seen[0].pooled, pooled)
    assert seen[1] == ["a cat", "a cat"] and len(guard.report) == 2 and not seen[0].embeds.requires_grad
