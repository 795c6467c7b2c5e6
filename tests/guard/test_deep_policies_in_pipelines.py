"""Latent and attention policies, and token attribution, on tiny real pipelines under the guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import guard_tools as tools
import pytest
import torch
from peft import LoraConfig

from ambient_sd.guard.attribution import TokenGradients, attribute
from ambient_sd.guard.policies import (
    GUARD,
    SAIL,
    AttentionGuard,
    AttentionRescaling,
    Compose,
    LatentOptimization,
    Policy,
    RandomTokens,
)
from ambient_sd.guard.recorder import ImageReport, MemorizationGuard
from ambient_sd.utils.errors import UserError

POLICIES: dict[str, Callable[[], Policy]] = {
    "han": lambda: LatentOptimization(1e-3, lr=0.05, max_steps=2),
    "sail": lambda: SAIL(1e-3, max_steps=2),
    "ren": AttentionRescaling,
    "guard": AttentionGuard,
    "watch": TokenGradients,
}


def reports(pipe: Any, policy: Policy | None = None, **kwargs: Any) -> tuple[list[ImageReport], torch.Tensor]:
    with MemorizationGuard(pipe, policy) as guard:
        images = tools.sample(pipe, tools.PROMPTS, **kwargs)
    return guard.report, images


def test_guard_is_short_for_attention_guard() -> None:
    assert GUARD is AttentionGuard


@pytest.mark.parametrize(("prediction_type", "scheduler"), [("epsilon", "ddim"), ("v_prediction", "euler")])
def test_han_reaches_its_target_and_the_sampler_starts_from_the_new_latent(
    prediction_type: str, scheduler: str
) -> None:
    pipe = tools.pipeline(prediction_type, scheduler)
    own, stock = reports(pipe)
    target = 0.9 * min(image.curve[0] for image in own)
    mitigated, images = reports(pipe, LatentOptimization(target, lr=0.05, max_steps=60))
    for image, before in zip(mitigated, own, strict=True):
        assert image.mitigated and 0 < image.iterations < 60
        assert image.first_score_before == pytest.approx(before.curve[0], rel=1e-3)
        assert image.first_score_after is not None and image.first_score_after <= target
        # What the loop itself measured: at the same latent, were another in place this would be another number.
        assert image.curve[0] == pytest.approx(image.first_score_after, rel=1e-3)
        assert image.curve[1] != pytest.approx(before.curve[1], rel=1e-3)
    assert (images - stock).abs().flatten(1).amax(1).min() > 1e-3


def test_sail_moves_the_latent_that_the_sampler_starts_from() -> None:
    pipe = tools.pipeline("epsilon")
    own, stock = reports(pipe)
    mitigated, images = reports(pipe, POLICIES["sail"]())
    for image, before in zip(mitigated, own, strict=True):
        assert image.mitigated and image.first_score_after is not None
        assert image.curve[0] == pytest.approx(image.first_score_after, rel=1e-3)
        assert image.curve[0] != pytest.approx(before.curve[0], rel=1e-3)
    assert not torch.equal(images, stock)


def test_gradient_checkpointing_gives_the_same_latents_and_leaves_no_trace() -> None:
    pipe = tools.pipeline("epsilon")
    tools.sample(pipe, steps=1)
    before = tools.state(pipe)
    (_, plain), (_, spared) = (
        reports(pipe, LatentOptimization(1e-3, max_steps=2, gradient_checkpointing=on), steps=2) for on in (False, True)
    )
    torch.testing.assert_close(plain, spared, rtol=1e-4, atol=1e-4)
    assert tools.state_differs(pipe, before) == []


def test_guard_without_attenuation_samples_as_the_stock_pipeline_at_s_minus_r() -> None:
    pipe = tools.pipeline("v_prediction")
    weaker = tools.sample(pipe, tools.PROMPTS, guidance_scale=5.5)
    plain = AttentionGuard(repulsion=2.0, attenuation=1.0, decay="none", orthogonalize=False)
    _, images = reports(pipe, plain, guidance_scale=7.5)
    torch.testing.assert_close(images, weaker, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(images, tools.sample(pipe, tools.PROMPTS, guidance_scale=7.5), rtol=1e-3, atol=1e-3)


def test_ren_leaves_the_padding_unread() -> None:
    """Whatever the padding's embeddings are, the conditional half no longer depends on them."""
    pipe = tools.pipeline("epsilon")
    seen = []

    class Asks(AttentionRescaling):
        def step(self, step: Any) -> None:
            halves, mask = step.halves, torch.ones_like(step.halves.cond.embeds)
            mask[:, -5:] = 0  # PROMPTS are far shorter than that
            other = halves.cond.embeds * mask
            seen.append((halves.predict("cond"), halves.predict("cond", embeds=other)))

    class Plain(Asks):
        def begin(self, start: Any) -> None:
            return None

    for policy in (Asks(), Plain()):
        reports(pipe, policy, steps=1)
    (hidden, hidden_other), (read, read_other) = seen
    torch.testing.assert_close(hidden, hidden_other, rtol=1e-5, atol=1e-6)
    assert (read - read_other).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["han", "sail", "ren", "guard"])
def test_an_image_that_is_not_flagged_is_bit_identical_beside_one_that_is(name: str) -> None:
    pipe = tools.pipeline("epsilon")
    own, stock = reports(pipe, steps=2)
    low, high = sorted(range(2), key=lambda i: own[i].curve[0])
    threshold = (own[low].curve[0] + own[high].curve[0]) / 2
    with MemorizationGuard(pipe, POLICIES[name](), threshold, when="flagged"):
        images = tools.sample(pipe, tools.PROMPTS, steps=2)
    assert torch.equal(images[low], stock[low])
    assert not torch.equal(images[high], stock[high])


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_exception_inside_leaves_the_pipeline_as_it_was(name: str, at: int) -> None:
    pipe = tools.pipeline("epsilon")
    stock = tools.sample(pipe, tools.PROMPTS, steps=4)
    before = tools.state(pipe)
    forward, calls = pipe.unet.mid_block.forward, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > at:
            raise ZeroDivisionError
        return forward(*args, **kwargs)

    pipe.unet.mid_block.forward = fails
    with pytest.raises(ZeroDivisionError), MemorizationGuard(pipe, POLICIES[name]()):
        tools.sample(pipe, tools.PROMPTS, steps=4)
    del pipe.unet.mid_block.forward
    assert len(calls) == at + 1
    assert tools.state_differs(pipe, before) == []
    assert torch.equal(tools.sample(pipe, tools.PROMPTS, steps=4), stock)


# -- attribution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_watching_changes_no_bit(scheduler: str) -> None:
    pipe = tools.pipeline("v_prediction", scheduler)
    stock = tools.sample(pipe, tools.PROMPTS)
    before = tools.state(pipe)
    own, images = reports(pipe, TokenGradients())
    assert torch.equal(images, stock) and not any(image.mitigated for image in own)
    assert tools.state_differs(pipe, before) == []


def test_attribution_names_the_tokens_of_the_prompt_and_their_pull() -> None:
    pipe = tools.pipeline("epsilon")
    found = attribute(pipe, "a cat", num_inference_steps=3, num_images=2, seed=3)
    assert found.tokens == ["<|startoftext|>", "a", "c", "a", "t", "<|endoftext|>"]
    assert len(found.scores) == 6 and all(score > 0 for score in found.scores)
    assert found.padding_score is not None and found.padding_score > 0
    assert (found.prompt, found.images, found.steps) == ("a cat", 2, 3)
    assert attribute(pipe, "a cat", num_inference_steps=3, num_images=2, seed=3) == found
    assert attribute(pipe, "a cat", num_inference_steps=3, num_images=2, seed=4).scores != found.scores


def test_attribution_is_the_mean_over_steps_and_images() -> None:
    pipe = tools.pipeline("epsilon")
    watch, generator = TokenGradients(), torch.Generator().manual_seed(3)
    with MemorizationGuard(pipe, watch):
        pipe("a cat", num_inference_steps=2, num_images_per_prompt=2, generator=generator, output_type="latent")
    found = attribute(pipe, "a cat", num_inference_steps=2, num_images=2, seed=3)
    assert watch.total is not None
    assert found.scores == pytest.approx((watch.total[0] + watch.total[1])[:6].div(2 * 2).tolist(), rel=1e-5)


def test_attribution_can_end_after_the_first_step_of_many() -> None:
    pipe = tools.pipeline("epsilon")
    calls: list[None] = []
    tools.sample(pipe, steps=1)
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(None))
    before = tools.state(pipe)
    found = attribute(pipe, "a cat", num_inference_steps=5, stop_after=1)
    assert (found.steps, len(calls)) == (1, 1)
    assert tools.state_differs(pipe, before) == []
    handle.remove()
    assert found.scores != attribute(pipe, "a cat", num_inference_steps=5).scores


@pytest.mark.parametrize("prompt", ["", "x" * 10_000, "\x00\x1b[2J\n\u202e", "</text><script>alert(1)</script>", "😀"])
def test_hostile_prompts_are_attributed_as_text(prompt: str) -> None:
    found = attribute(tools.pipeline("epsilon"), prompt, num_inference_steps=1)
    assert found.prompt == prompt and 2 <= len(found.tokens) <= 24
    assert len(found.table().splitlines()) <= 25
    assert found.to_json().isascii()


@pytest.mark.parametrize(
    "bad", [{"prompt": ["a", "b"]}, {"num_images": 0}, {"num_inference_steps": 0}, {"stop_after": 0}]
)
def test_attributions_arguments_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        attribute(tools.pipeline("epsilon"), **({"prompt": "a cat"} | bad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_work_under_inference_mode_and_in_half_precision(name: str, dtype: torch.dtype) -> None:
    pipe = tools.pipeline("v_prediction").to(dtype)
    policy = POLICIES[name]()
    with torch.inference_mode():
        _, images = reports(pipe, policy, steps=2)
    assert images.dtype == dtype and images.isfinite().all()
    stock = tools.sample(pipe, tools.PROMPTS, steps=2)
    assert torch.equal(images, stock) == (name == "watch")


def test_attention_slicing_is_refused_by_guard_alone() -> None:
    pipe = tools.pipeline("epsilon")
    pipe.enable_attention_slicing("max")
    with pytest.raises(UserError, match="attention slicing"), MemorizationGuard(pipe, AttentionGuard()):
        tools.sample(pipe)
    reports(pipe, AttentionRescaling(), steps=1)


def test_guard_reads_the_attention_of_a_network_with_a_lora() -> None:
    pipe = tools.pipeline("epsilon")
    _, plain = reports(pipe, AttentionGuard(), steps=2)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))  # it begins at zero
    _, with_lora = reports(pipe, AttentionGuard(), steps=2)
    torch.testing.assert_close(with_lora, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["han", "sail", "ren", "guard"])
def test_every_policy_works_on_sdxl(name: str) -> None:
    pipe = tools.tiny_sdxl()
    stock = tools.sample(pipe, steps=2)
    with MemorizationGuard(pipe, POLICIES[name]()):
        images = tools.sample(pipe, steps=2)
    assert images.isfinite().all() and not torch.equal(images, stock)


def test_attribution_works_on_sdxl() -> None:
    found = attribute(tools.tiny_sdxl(), "a cat", num_inference_steps=2)
    assert found.tokens[1:-1] == ["a", "c", "a", "t"] and all(score > 0 for score in found.scores)


def test_networks_with_joint_attention_are_refused_where_tokens_matter_and_served_where_not() -> None:
    pipe = tools.tiny_sd3()
    for policy, why in (
        (
            AttentionRescaling(),
            "AttentionRescaling on a SD3Transformer2DModel; it acts on the cross-attention of a U-Net",
        ),
        (Compose(RandomTokens(), AttentionGuard()), "AttentionGuard on a SD3Transformer2DModel"),
        (TokenGradients(), "token"),
    ):
        with pytest.raises(UserError, match=why) as error, MemorizationGuard(pipe, policy):
            tools.sample(pipe, steps=2)
        assert "\n" not in str(error.value)
    stock = tools.sample(pipe, steps=2)
    with MemorizationGuard(pipe, LatentOptimization(1e-6, lr=0.05, max_steps=2)) as guard:
        images = tools.sample(pipe, steps=2)
    assert guard.report[0].mitigated and not torch.equal(images, stock)


def test_attribution_with_embeddings_is_refused_before_it_samples() -> None:
    pipe = tools.pipeline("epsilon")
    embeds = torch.zeros(1, 24, 16)
    with pytest.raises(UserError, match="token"), MemorizationGuard(pipe, TokenGradients()) as guard:
        pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=2, output_type="latent")
    assert guard.history == []
