"""Composed policies: each begins on what the ones before put in place; one scale per image; refused where impossible."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_network import TOKENS, LinearNetwork, encoded, guided, normal, started, step_of

from ambient_sd.guard.policies import (
    CaptionWordRepetition,
    Change,
    Compose,
    GaussianEmbeddingNoise,
    OppositeGuidance,
    Policy,
    PromptOptimization,
    RandomNumbers,
    RandomTokens,
    Reanchoring,
    SamplingStart,
    ScalePolicy,
    StaticTransition,
    Step,
)
from ambient_sd.utils.errors import UserError


class Puts(Policy):
    """Put given fields in place for given images, and keep what was seen."""

    def __init__(self, changed: list[bool], **fields: Any) -> None:
        self.changed, self.fields = changed, fields

    def begin(self, start: SamplingStart) -> Change:
        halves = start.halves
        self.start, self.outputs = start, [halves.predict("cond"), halves.predict("uncond")]
        self.last = halves.predict("cond", rows=torch.tensor([2]))
        return Change(self.changed, **self.fields)


class Scales(ScalePolicy):
    def __init__(self, *values: float) -> None:
        self.values = torch.tensor(values)

    def scale(self, step: Step) -> torch.Tensor:
        return self.values


class Adds(Policy):
    def __init__(self, value: float) -> None:
        self.value = value

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen = step
        return step.cond * 2 + self.value, step.uncond + self.value


def merged(first: torch.Tensor, second: torch.Tensor, rows: list[int]) -> torch.Tensor:
    result = first.clone()
    result[rows] = second[rows]
    return result


def test_each_begins_on_what_the_ones_before_put_in_place_and_the_later_wins() -> None:
    network = LinearNetwork(3)
    new = {"embeds": normal(3, TOKENS, 5, seed=20), "sample": normal(3, 2, 3, 3, seed=21)}
    weights, later = normal(3, TOKENS, seed=22).abs(), normal(3, TOKENS, 5, seed=23)
    own = network.cond.embeds
    first, second = Puts([True, True, False], **new), Puts([False, True, True], embeds=later, token_weights=weights)
    third = Puts([True, False, False], uncond_embeds=normal(3, TOKENS, 5, seed=24), iterations=[1, 2, 3])
    start = started(None, network)
    change = Compose(first, second, third).begin(start)
    assert change is not None and change.changed == [True, True, True] and change.iterations == [1, 2, 3]
    embeds, sample = merged(own, new["embeds"], [0, 1]), merged(network.sample, new["sample"], [0, 1])
    assert torch.equal(second.start.halves.cond.embeds, embeds) and torch.equal(second.start.halves.sample, sample)
    final, all_weights = merged(embeds, later, [1, 2]), merged(torch.ones(3, TOKENS), weights, [1, 2])
    for halves in (third.start.halves, change):
        found = halves.embeds if isinstance(halves, Change) else halves.cond.embeds
        assert torch.equal(found, final) and torch.equal(halves.sample, sample)  # type: ignore[arg-type]
    assert torch.equal(change.token_weights, all_weights)  # type: ignore[arg-type]
    assert torch.equal(change.uncond_embeds, merged(network.uncond.embeds, third.fields["uncond_embeds"], [0]))  # type: ignore[arg-type]
    assert change.pooled is None and change.key_scale is None
    # The network that a policy asks has the earlier changes in place, for all images and for some.
    expected = network.predict("cond", sample=sample, embeds=final, token_weights=all_weights)
    assert torch.equal(third.outputs[0], expected) and torch.equal(third.last, expected[2:])
    assert torch.equal(third.outputs[1], network.predict("uncond", sample=sample))
    assert not torch.equal(first.outputs[0], third.outputs[0])  # control: the first one saw the pipeline's own
    # What a policy passes itself goes before what is in place, and gradients flow to it.
    mine = normal(1, TOKENS, 5, seed=25).requires_grad_(True)
    with third.start.halves.enable_grad():
        output = third.start.halves.predict("cond", rows=torch.tensor([1]), embeds=mine)
    (grad,) = torch.autograd.grad(output.sum(), [mine])
    assert grad.abs().sum() > 0


def test_inputs_put_in_place_under_inference_mode_can_be_differentiated() -> None:
    class Differentiates(Policy):
        def begin(self, start: SamplingStart) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                embeds = start.halves.cond.embeds.clone().requires_grad_(True)
                output = start.halves.predict("cond", embeds=embeds)
                self.grad = torch.autograd.grad((output * output).sum(), [embeds])[0]

    start, policy = started(["a b", "c d", "e"]), Differentiates()
    with torch.inference_mode():
        Compose(GaussianEmbeddingNoise(), policy).begin(start)
        assert start.encode(["a"]).embeds.is_inference()  # control: a tensor from here could not be
    assert policy.grad.abs().sum() > 0


def test_scores_are_kept_only_where_they_describe_the_first_and_the_last() -> None:
    yes, part, no, nan = [True] * 3, [True, False, False], [False] * 3, math.nan
    measured = {"first_score_before": [1.0, 2, 3], "first_score_after": [4.0, 5, 6]}
    again = {"first_score_before": [7.0, 8, 9], "first_score_after": [nan, 11.0, 12]}

    def scores(*policies: Policy) -> tuple[Any, Any]:
        change = Compose(*policies).begin(started(None))
        assert change is not None
        return change.first_score_before, change.first_score_after

    def same(found: tuple[Any, Any], before: list[float], after: list[float]) -> None:
        assert found[0] == pytest.approx(before, nan_ok=True) and found[1] == pytest.approx(after, nan_ok=True)

    plain, some = (Puts(which, embeds=normal(3, TOKENS, 5)) for which in (yes, part))
    same(scores(Puts(no, **measured), Puts(no)), [1, 2, 3], [4, 5, 6])
    same(scores(Puts(yes, **measured), some), [1, 2, 3], [nan, 5, 6])
    same(scores(some, Puts(yes, **measured)), [nan, 2, 3], [4, 5, 6])
    same(scores(Puts(yes, **measured), Puts(yes, **again)), [1, 2, 3], [nan, 11, 12])
    assert scores(plain, plain) == (None, None)


def test_one_scale_per_image_the_first_that_acts_wins() -> None:
    step, nan = step_of([[1.0] * 4]), math.nan
    first, second = Scales(0, nan, nan, 2), Scales(1, 3, nan, 3)
    found = guided(Compose(first, second).step(step))
    g = torch.tensor([0, 3, 7.5, 2]).view(4, 1, 1, 1)
    assert torch.allclose(found, step.uncond + g * (step.cond - step.uncond), atol=1e-4)
    swapped = guided(Compose(second, first).step(step))
    assert not torch.allclose(swapped[0], found[0], atol=1e-2)  # control
    # Applied one after the other, each would scale what the one before had scaled.
    naive = first.step(step)
    step2 = step_of([[1.0] * 4])
    object.__setattr__(step2, "cond", naive[0])
    assert not torch.allclose(guided(second.step(step2)), found, atol=1e-2)


def test_policies_that_replace_outputs_act_in_turn_and_the_scale_is_chosen_last() -> None:
    step = step_of([[1.0] * 2])
    one, two = Adds(1.0), Adds(10.0)
    found = Compose(Scales(3, math.nan), one, two).step(step)
    cond, uncond = 2 * (2 * step.cond + 1) + 10, step.uncond + 11
    assert torch.equal(two.seen.cond, 2 * step.cond + 1) and two.seen.norms is step.norms
    g = torch.tensor([3, 7.5]).view(2, 1, 1, 1)
    assert torch.allclose(guided(found), uncond + g * (cond - uncond), atol=1e-3)
    alone = Compose(one, two).step(step)
    assert alone is not None and torch.allclose(alone[0], cond) and torch.allclose(alone[1], uncond)


def test_what_nobody_changes_is_left_alone() -> None:
    assert Compose(StaticTransition()).begin(started(["a"])) is None
    assert Compose(GaussianEmbeddingNoise()).step(step_of([[1.0]])) is None
    single, composed = GaussianEmbeddingNoise(), Compose(GaussianEmbeddingNoise())
    one, other = single.begin(started(["a", "b"])), composed.begin(started(["a", "b"]))
    assert other is not None and torch.equal(one.embeds, other.embeds)  # type: ignore[arg-type]


def test_noise_follows_a_reworded_prompt_whose_tokens_later_policies_do_not_see() -> None:
    start, last = started(["red cat", "b c", "d"]), Puts([False] * 3)
    change = Compose(RandomNumbers(), GaussianEmbeddingNoise(), last).begin(start)
    noise = GaussianEmbeddingNoise().begin(start).embeds - start.halves.cond.embeds  # type: ignore[operator]
    texts = [RandomNumbers().perturb(prompt) for prompt in start.prompts or []]
    assert change is not None and torch.allclose(change.embeds, encoded(texts).embeds + noise, atol=1e-6)  # type: ignore[arg-type]
    assert last.start.prompts == start.prompts and last.start.token_ids is None and last.start.token_mask is None
    Compose(GaussianEmbeddingNoise(), last).begin(start)
    assert last.start.token_ids is start.token_ids  # control: noise moves no token


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([], "nothing to compose"),
        ([3], "cannot compose a int"),
        ([RandomTokens(), CaptionWordRepetition()], "CaptionWordRepetition after RandomTokens.*first"),
        ([GaussianEmbeddingNoise(), RandomTokens()], "RandomTokens after GaussianEmbeddingNoise.*first"),
        ([Reanchoring(1), GaussianEmbeddingNoise()], "Reanchoring does not combine with GaussianEmbeddingNoise"),
        ([Compose(StaticTransition(), RandomTokens()), Reanchoring(1)], "Reanchoring|RandomTokens"),
        ([Reanchoring(1), Reanchoring(2)], "does not combine"),
    ],
)
def test_what_cannot_be_combined_is_refused_when_it_is_made(policies: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Compose(*policies)


def test_what_can_be_combined_is_taken_and_nesting_changes_nothing() -> None:
    Compose(RandomTokens(), GaussianEmbeddingNoise(), StaticTransition())
    Compose(StaticTransition(), Reanchoring(1), OppositeGuidance())
    inner = Compose(OppositeGuidance(), StaticTransition())
    assert Compose(RandomTokens(), inner).begins and not inner.begins  # as the guard asks
    assert RandomTokens().begins and not StaticTransition().begins
    assert [type(p) for p in Compose(RandomTokens(), inner).policies] == [
        RandomTokens,
        OppositeGuidance,
        StaticTransition,
    ]


def test_activations_are_recomputed_where_one_of_them_asks_for_it() -> None:
    saving = PromptOptimization(target=1.0, gradient_checkpointing=True)
    assert Compose(StaticTransition(), saving).gradient_checkpointing
    assert Compose(StaticTransition(), Compose(saving)).gradient_checkpointing
    assert not Compose(StaticTransition(), PromptOptimization(target=1.0)).gradient_checkpointing
