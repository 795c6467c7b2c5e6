"""Wen's prompt optimization, per image: it reaches its target, touches only what it must; no image sees another."""

from __future__ import annotations

from typing import Any

import guard_tools as tools
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ambient_sd.guard.policies import Change, Policy, PromptOptimization, SamplingStart
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.guard.scores import guidance_norm
from ambient_sd.utils.errors import UserError


class Keeps(Policy):
    """Hand everything to another policy and keep what passes by."""

    def __init__(self, inner: Policy) -> None:
        self.inner = inner

    def begin(self, start: SamplingStart) -> Change | None:
        self.start, self.change = start, self.inner.begin(start)
        return self.change


class BatchWide(PromptOptimization):
    """Negative control: ONE norm over the batch decides when to stop, as in the published code."""

    def begin(self, start: SamplingStart) -> Change:
        n, halves = len(start.active), start.halves
        own, uncond = halves.cond.embeds, halves.predict("uncond")
        with halves.enable_grad():
            tail = own[:, 1:].detach().clone().requires_grad_(True)
            optimizer = torch.optim.AdamW([tail], lr=self.lr)
            for iteration in range(self.max_steps + 1):
                embeds = torch.cat([own[:, :1], tail], dim=1)
                norm = (
                    guidance_norm(cond=halves.predict("cond", embeds=embeds), uncond=uncond).norm()
                    * halves.noise_factor
                )
                if norm <= self.target or iteration == self.max_steps:
                    break
                (tail.grad,) = torch.autograd.grad(norm, [tail])
                optimizer.step()
        return Change([True] * n, embeds=embeds.detach(), iterations=[iteration] * n)


def latents(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def first_scores(pipe: Any, prompts: list[str], **kwargs: Any) -> list[float]:
    with MemorizationGuard(pipe) as guard:
        tools.sample(pipe, prompts, **kwargs)
    return [image.curve[0] for image in guard.report]


@pytest.mark.parametrize(("prediction_type", "scheduler"), [("epsilon", "pndm"), ("v_prediction", "euler")])
def test_the_first_score_falls_to_the_target_and_the_embedding_serves_all_steps(
    prediction_type: str, scheduler: str
) -> None:
    pipe = tools.pipeline(prediction_type, scheduler)
    before = first_scores(pipe, tools.PROMPTS)
    target = 0.8 * min(before)
    seen = []
    policy = Keeps(PromptOptimization(target, max_steps=30))
    with MemorizationGuard(pipe, policy) as guard:
        pipe.unet.register_forward_hook(lambda m, a, k, o: seen.append(k["encoder_hidden_states"]), with_kwargs=True)
        tools.sample(pipe, tools.PROMPTS)
    for image, score in zip(guard.report, before, strict=True):
        assert image.mitigated and 0 < image.iterations <= 30
        assert image.first_score_before == pytest.approx(score, rel=1e-4)
        assert image.first_score_after is not None and image.first_score_after <= target
        assert image.curve[0] == pytest.approx(image.first_score_after, rel=1e-4)
    assert policy.change is not None
    for embeds in seen:
        assert torch.equal(embeds[2:], policy.change.embeds)
        assert torch.equal(embeds[:2], policy.start.halves.uncond.embeds)


def test_the_bos_position_stays_and_the_rest_moves() -> None:
    pipe = tools.pipeline()
    policy = Keeps(PromptOptimization(1e-3, max_steps=2))
    with MemorizationGuard(pipe, policy):
        tools.sample(pipe)
    assert policy.change is not None
    old, new = policy.start.halves.cond.embeds[0], policy.change.embeds[0]
    assert torch.equal(old[0], new[0])
    assert (old[1:] != new[1:]).any(dim=1).all()


def test_an_image_under_the_target_is_bit_identical_beside_one_that_is_not() -> None:
    pipe = tools.pipeline()
    stock = tools.sample(pipe, tools.PROMPTS)
    low, high = first_scores(pipe, tools.PROMPTS)
    assert low < high
    with MemorizationGuard(pipe, PromptOptimization((low + high) / 2)) as guard:
        guarded = tools.sample(pipe, tools.PROMPTS)
    calm, mitigated = guard.report
    assert (calm.mitigated, calm.iterations, calm.first_score_before) == (False, 0, calm.first_score_after)
    assert mitigated.mitigated
    assert torch.equal(stock[0], guarded[0]) and not torch.equal(stock[1], guarded[1])


def difference_between_together_and_alone(kind: type[PromptOptimization]) -> float:
    """Optimise two images together and each alone, in float64, and return how far the embeddings are apart."""
    pipe = tools.pipeline("epsilon").to(torch.float64)
    x = latents(2)
    before = first_scores(pipe, tools.PROMPTS, latents=x)
    target = 0.93 * min(before)  # the two need different numbers of steps

    def run(prompts: list[str], x: torch.Tensor) -> Change:
        policy = Keeps(kind(target, max_steps=25))
        with MemorizationGuard(pipe, policy):
            tools.sample(pipe, prompts, latents=x, steps=1)
        assert policy.change is not None
        return policy.change

    together = run(tools.PROMPTS, x)
    alone = [run([prompt], x[i : i + 1]) for i, prompt in enumerate(tools.PROMPTS)]
    if kind is PromptOptimization:
        assert together.iterations == [change.iterations[0] for change in alone]
        assert together.iterations[0] != together.iterations[1]
    return max((together.embeds[i] - alone[i].embeds[0]).abs().max().item() for i in range(len(tools.PROMPTS)))


def test_two_images_together_get_the_embeddings_that_each_gets_alone() -> None:
    assert difference_between_together_and_alone(PromptOptimization) < 1e-9


def test_one_norm_over_the_batch_would_not() -> None:
    assert difference_between_together_and_alone(BatchWide) > 1e-2


def test_the_served_embedding_is_never_worse_than_the_prompts_own() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe, PromptOptimization(1e-3, lr=50.0, max_steps=3)) as guard:  # overshoots at once
        tools.sample(pipe, tools.PROMPTS)
    for image in guard.report:
        assert image.iterations == 3
        assert image.first_score_after is not None and image.first_score_before is not None
        assert image.first_score_after <= image.first_score_before
        assert image.mitigated == (image.first_score_after < image.first_score_before)


def test_the_networks_parameters_are_untouched_and_hold_no_gradients() -> None:
    pipe = tools.pipeline()
    tools.sample(pipe)
    parameters = list(pipe.unet.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before, weights = tools.state(pipe), [p.detach().clone() for p in parameters]
    with MemorizationGuard(pipe, PromptOptimization(1e-3)) as guard:
        tools.sample(pipe)
    assert guard.report[0].iterations == 10
    assert not tools.state_differs(pipe, before)
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))


def test_it_is_deterministic_and_leaves_the_global_random_state_alone() -> None:
    pipe = tools.pipeline()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    runs = []
    for _ in range(2):
        with MemorizationGuard(pipe, PromptOptimization(1e-3, max_steps=3)) as guard:
            runs.append((tools.sample(pipe, tools.PROMPTS), guard.report))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert torch.equal(state, torch.get_rng_state())


def test_inference_mode_gives_the_same_images() -> None:
    pipe = tools.pipeline()
    with MemorizationGuard(pipe, PromptOptimization(1e-3, max_steps=3)) as guard:
        normal = tools.sample(pipe, tools.PROMPTS)
        with torch.inference_mode():
            assert torch.equal(normal, tools.sample(pipe, tools.PROMPTS))
    assert guard.history[0] == guard.history[1]


def test_weights_loaded_under_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        pipe = tools.pipeline()
    with MemorizationGuard(pipe, PromptOptimization(1e-3)), pytest.raises(UserError, match="inference_mode"):
        tools.sample(pipe)


def test_half_precision_pipelines_are_optimised_in_float32() -> None:
    pipe = tools.pipeline().to(torch.bfloat16)
    with MemorizationGuard(pipe, PromptOptimization(1e-3, max_steps=3)) as guard:
        assert tools.sample(pipe).dtype == torch.bfloat16
    image = guard.report[0]
    assert image.mitigated and image.first_score_after < image.first_score_before  # type: ignore[operator]


def test_zero_terminal_snr_is_optimised_at_the_first_step_that_has_a_score() -> None:
    pipe = tools.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    own = first_scores(pipe, tools.PROMPTS)
    assert min(own) > 0.01
    with MemorizationGuard(pipe, PromptOptimization(1e-3, max_steps=2)) as guard:
        tools.sample(pipe, tools.PROMPTS)
    for image, before in zip(guard.report, own, strict=True):
        assert image.timesteps[0] == 666 and image.first_score_before == pytest.approx(before, rel=1e-4)
        assert image.curve[0] == pytest.approx(image.first_score_after, rel=1e-4) and image.curve[0] < before * 0.99


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": 0},
        {"target": float("nan")},
        {"target": 1, "lr": -1},
        {"target": 1, "max_steps": 0},
        {"target": 1, "max_steps": 2.5},
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=list(arguments)[-1]):
        PromptOptimization(**arguments)


def test_numbers_that_come_out_of_arrays_are_numbers() -> None:
    policy = PromptOptimization(np.float32(3.0), max_steps=np.int64(4))
    assert (policy.target, policy.max_steps) == (3.0, 4) and type(policy.max_steps) is int
