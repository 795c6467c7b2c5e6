"""Re-anchoring and the prompt perturbations: the published formulas, reproducible random numbers, active images only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from linear_network import POOLED, TOKENS, WIDTH, LinearNetwork, encoded, guided, normal, started

from ambient_sd.guard.policies import (
    CaptionWordRepetition,
    Change,
    GaussianEmbeddingNoise,
    Policy,
    RandomNumbers,
    RandomTokens,
    Reanchoring,
)
from ambient_sd.guard.policies.reanchoring import leave_words_out
from ambient_sd.guard.scores import guidance_norm
from ambient_sd.utils.errors import UserError

HOSTILE = [
    "",
    " \t\n",
    "a" * 10_000,
    "x " * 5_000,
    "\x00\x1b[31m\x7f\u202e",
    "<script>&amp;</script>",
    "\ud800",
    "é 雪 🦊",
]


def begun(policy: Policy, *args: Any, **kwargs: Any) -> Change:
    change = policy.begin(started(*args, **kwargs))
    assert change is not None
    return change


def distances(network: LinearNetwork, first: Any, second: Any) -> torch.Tensor:
    """`|| eps(first) - eps(second) ||` of every image, for two encoded prompts."""
    one = network.predict("cond", embeds=first.embeds, pooled=first.pooled)
    return guidance_norm(cond=one, uncond=network.predict("cond", embeds=second.embeds, pooled=second.pooled)) * 2


# -- re-anchoring ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [True, False])
def test_above_the_threshold_the_prompt_becomes_the_anchor_and_the_softer_one_the_goal(pooled: bool) -> None:
    prompts = ["a red cat", "b", "the dog of it"]
    network = LinearNetwork(3, factor=2.0, pooled=pooled)
    start = started(prompts, network)
    before = distances(network, network.cond, network.uncond)
    threshold = float(before.sort().values[1])  # the middle one is AT the threshold: not above it
    network.asked.clear()
    change = Reanchoring(threshold, softer="pet", rule="all").begin(start)
    assert change.changed == (before > threshold).tolist() and sum(change.changed) == 1
    assert network.asked == [("cond", 3), ("uncond", 3), ("cond", 1)]
    i, soft = change.changed.index(True), encoded(["pet"], pooled)
    assert change.embeds is not None and change.uncond_embeds is not None
    goal = network.predict("cond", embeds=change.embeds, pooled=change.pooled)
    anchor = network.predict("uncond", embeds=change.uncond_embeds, pooled=change.uncond_pooled)
    # eps = eps(e_p) + g (eps(e_soft) - eps(e_p)), written out
    x, e_p = network.sample[i], encoded([prompts[i]], pooled)
    eps = [
        0.5 * x + (e.embeds.sum(1) @ network.a + (e.pooled @ network.b if e.pooled is not None else 0)).view_as(x)
        for e in (e_p, soft)
    ]
    assert torch.allclose(guided((goal, anchor))[i], eps[0] + 7.5 * (eps[1] - eps[0]), atol=1e-3)
    assert not torch.allclose(
        guided((goal, anchor))[i], eps[1] + 7.5 * (eps[0] - eps[1]), atol=1e-3
    )  # control: the roles
    assert change.first_score_before == pytest.approx(before.tolist(), rel=1e-5)
    assert change.first_score_after is not None
    assert change.first_score_after[i] == pytest.approx(2 * float((eps[1] - eps[0]).norm()), rel=1e-4)


def test_the_first_softer_text_under_the_threshold_is_taken_else_the_lowest() -> None:
    texts = ["cc", "a", "zebra", "b", "yak"]
    network = LinearNetwork(1, factor=2.0)
    prompt = "a much longer red cat"
    start = started([prompt], network)
    of = {t: float(distances(network, encoded([t]), network.uncond)) for t in [*texts, prompt]}
    by_score = sorted(texts, key=lambda t: of[t])
    own = of[prompt]
    low = min(own, of[by_score[1]]) * 0.999
    assert of[by_score[0]] < low  # the fixture has a threshold that only one text, or none, is under

    def chosen(threshold: float, order: list[str]) -> tuple[str, int]:
        network.asked.clear()
        change = Reanchoring(threshold, lambda prompt: order).begin(start)
        assert change.embeds is not None
        [found] = [t for t in texts if torch.equal(change.embeds, encoded([t]).embeds)]
        return found, len(network.asked) - 2

    worst_first = by_score[::-1]
    assert chosen(low, worst_first) == (by_score[0], 5)
    assert chosen(low, by_score) == (by_score[0], 1)  # taken at once
    assert chosen(0.0, by_score) == (by_score[0], 5)  # none is under it: all are tried
    assert chosen(0.0, worst_first) == (by_score[0], 5)


def test_images_search_on_their_own_and_only_active_ones() -> None:
    prompts = ["one two three", "four five", "six", "one two three"]
    together = begun(Reanchoring(0.0), prompts, active=[True, False, True, True])
    assert together.changed == [True, False, True, True] and together.embeds is not None
    for i in (0, 2, 3):
        network = LinearNetwork(4)
        network.sample, network.uncond = (
            network.sample[i : i + 1],
            type(network.uncond)(*(None if t is None else t[i : i + 1] for t in network.uncond)),
        )
        alone = begun(Reanchoring(0.0), prompts[i : i + 1], network)
        assert alone.embeds is not None and torch.equal(alone.embeds[0], together.embeds[i])


def test_without_softer_texts_every_run_of_words_is_left_out_in_turn() -> None:
    assert leave_words_out("the red cat") == ["red cat", "the cat", "the red"]
    assert leave_words_out("one") == [""] and leave_words_out(" \n") == [" \n"]
    words = [str(k) for k in range(60)]
    texts = leave_words_out(" ".join(words))
    assert len(texts) == 25
    left_out = [[w for w in words if w not in text.split()] for text in texts]
    assert [w for run in left_out for w in run] == words and {len(run) for run in left_out} == {2, 3}
    for prompt in HOSTILE:
        assert 1 <= len(leave_words_out(prompt)) <= 25


def test_a_dict_gives_texts_by_prompt_and_one_that_lacks_a_risky_prompt_is_refused() -> None:
    change = begun(Reanchoring(0.0, {"a cat": ["pet"], "b": "c"}), ["a cat", "b"])
    assert change.embeds is not None and torch.equal(change.embeds, encoded(["pet", "c"]).embeds)
    begun(Reanchoring(1e9, {"a cat": "pet"}), ["a cat", "b"])  # not risky: nothing is asked of the dict
    with pytest.raises(UserError, match=r"no softer prompt for 'b'.*add it"):
        begun(Reanchoring(0.0, {"a cat": "pet"}), ["a cat", "b"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reanchoring(-1), "threshold -1.*at least 0"),
        (lambda: Reanchoring(1, rule="some"), "rule 'some'.*step"),  # type: ignore[arg-type]
        (lambda: Reanchoring(1, least=4, full=3), "full 3.*at least 4"),
        (lambda: Reanchoring(1, rule="all", least=4), 'rule "all".*at all steps'),
        (lambda: Reanchoring(1, softer=3), "softer is a int.*text, a dict"),  # type: ignore[arg-type]
        (lambda: Reanchoring(1, softer={"a": []}), "softer prompt of 'a'.*at least one text"),
        (lambda: Reanchoring(1, softer={"a": [3]}), "softer prompt of 'a'.*at least one text"),  # type: ignore[dict-item, list-item]
        (lambda: begun(Reanchoring(0, lambda p: None), ["a"]), "softer prompt of 'a'"),  # type: ignore[arg-type, return-value]
        (lambda: begun(Reanchoring(1), None), "called with embeddings.*prompt="),
        (lambda: begun(Reanchoring(1), ["a"], LinearNetwork(1, factor=0.0)), "carries no score.*zero terminal SNR"),
    ],
)
def test_re_anchoring_that_cannot_be_done_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# -- perturbations -----------------------------------------------------------------------------------------------

KINDS = [RandomTokens, CaptionWordRepetition, RandomNumbers]


def inserted(prompt: str, result: str) -> list[str]:
    """The words that were inserted; fails if the prompt's own words are not all there, in their order."""
    rest, own = [], prompt.split()
    for word in result.split():
        if own and word == own[0]:
            own.pop(0)
        else:
            rest.append(word)
    assert own == []
    return rest


@pytest.mark.parametrize("kind", KINDS)
def test_two_to_four_words_are_inserted_at_all_places_and_the_prompts_words_stay(kind: Any) -> None:
    prompt, counts, places = "red cat on mat", set(), set()
    for place in range(200):
        result = kind().perturb(prompt, place)
        words = inserted(prompt, result)
        counts.add(len(words))
        places |= {"start"} if not result.startswith("red") else set()
        places |= {"end"} if not result.endswith("mat") else set()
        if kind is RandomNumbers:
            assert all(w.isdigit() and int(w) < 100_000 for w in words)
        elif kind is CaptionWordRepetition:
            assert set(words) <= set(prompt.split())
        else:
            assert all(2 <= len(w) <= 5 and w.isalpha() and w.islower() for w in words)
    assert counts == {2, 3, 4}
    assert "end" in places and (kind is CaptionWordRepetition or "start" in places)
    assert len(inserted(prompt, kind(insertions=4).perturb(prompt))) == 4


def test_random_tokens_are_drawn_from_the_tokenizers_vocabulary() -> None:
    tokenizer = tiny.tiny_tokenizer()
    policy = RandomTokens(insertions=1, tokenizer=tokenizer)
    drawn = [inserted("0cat", policy.perturb("0cat", place)) for place in range(400)]
    assert all(len(words) == 1 for words in drawn)
    found = {words[0] for words in drawn}
    # The tiny vocabulary is the printable ASCII, each with and without the mark of a word's end; special tokens never.
    assert found <= {chr(c) for c in range(33, 127)} and len(found) > 70
    ids = {token for words in drawn for token in tokenizer(words[0]).input_ids[1:-1]}
    assert len(ids) > 50 and not ids & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    "policy", [*(kind(seed=5) for kind in KINDS), GaussianEmbeddingNoise(seed=5)], ids=lambda p: type(p).__name__
)
def test_an_image_is_perturbed_alike_whatever_else_is_in_the_batch(policy: Policy) -> None:
    prompts = ["red cat", "b c d", "red cat", "one more"]
    together = begun(policy, prompts).embeds
    assert together is not None and not torch.equal(together[0], together[2])  # two images of one prompt differ
    again = begun(policy, prompts).embeds
    assert again is not None and torch.equal(together, again)
    for part, places in ((["b c d"], [1]), (["one more", "red cat", "red cat"], [3, 0, 2])):
        alone = begun(policy, part).embeds
        assert alone is not None and torch.equal(alone, together[places])
    part_active = begun(policy, prompts, active=[False, True, True, False])
    assert part_active.changed == [False, True, True, False] and part_active.embeds is not None
    assert torch.equal(part_active.embeds[1:3], together[1:3])
    other = type(policy)(seed=6)  # type: ignore[call-arg]
    assert not torch.equal(begun(other, prompts).embeds, together)  # type: ignore[arg-type]


def test_the_perturbations_do_not_share_their_random_numbers() -> None:
    prompt = "a a a a"  # only places and counts can differ
    patterns = {
        tuple(w == "a" for w in kind(seed=0).perturb(prompt, k).split())
        for k in range(8)
        for kind in (RandomTokens, RandomNumbers)
    }
    assert len(patterns) > 8


def test_gaussian_noise_has_its_standard_deviation_and_leaves_the_pooled_embedding() -> None:
    prompts = [f"prompt {k}" for k in range(500)]
    network = LinearNetwork(500)
    change = begun(GaussianEmbeddingNoise(), prompts, network)
    assert change.embeds is not None and change.pooled is None and change.changed == [True] * 500
    noise = (change.embeds - network.cond.embeds).flatten()  # 10,000 numbers
    assert float(noise.std()) == pytest.approx(0.1, rel=0.03) and abs(float(noise.mean())) < 0.004
    assert float((noise / 0.1).pow(4).mean()) == pytest.approx(3, abs=0.25)  # Gaussian: a uniform's is 1.8
    double = begun(GaussianEmbeddingNoise(std=0.2), prompts).embeds
    assert double is not None and torch.allclose(
        double - network.cond.embeds, 2 * (change.embeds - network.cond.embeds), atol=1e-6
    )


def test_gaussian_noise_works_on_given_embeddings_and_in_half_precision() -> None:
    network = LinearNetwork(3)
    network.cond = type(network.cond)(normal(3, TOKENS, WIDTH).half(), normal(3, POOLED).half())
    change = begun(GaussianEmbeddingNoise(), None, network)
    assert change.embeds is not None and change.embeds.dtype == torch.float16
    wide = network.cond.embeds.float()
    noise = change.embeds.float() - wide
    assert not torch.equal(noise[0], noise[1])
    network.cond = type(network.cond)(wide, None)
    full = begun(GaussianEmbeddingNoise(), None, network).embeds
    assert full is not None and torch.equal(full.half(), change.embeds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_prompts_are_perturbed_like_others(kind: Any, prompt: str) -> None:
    result = kind().perturb(prompt)
    if kind is CaptionWordRepetition and not prompt.split():
        assert result == prompt and CaptionWordRepetition().begin(started([prompt])) is None
    else:
        assert len(inserted(prompt, result)) in (2, 3, 4)
        assert result == kind().perturb(prompt)
        assert kind is CaptionWordRepetition or result != kind(seed=1).perturb(prompt)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomNumbers(insertions=0), "insertions 0.*whole number, at least 1"),
        (lambda: RandomNumbers(insertions=(3, 2)), "insertions 2.*at least 3"),
        (lambda: RandomNumbers(insertions=(1, 2, 3)), "insertions.*least, most"),  # type: ignore[arg-type]
        (lambda: CaptionWordRepetition(insertions=2.5), "insertions 2.5.*whole number"),  # type: ignore[arg-type]
        (lambda: CaptionWordRepetition(seed=None), "seed None.*whole number"),  # type: ignore[arg-type]
        (lambda: RandomTokens(tokenizer=3), "tokenizer is a int"),
        (lambda: GaussianEmbeddingNoise(std=0), "std 0.*above 0"),
        (lambda: GaussianEmbeddingNoise(std=math.nan), "std nan.*finite"),
        (lambda: begun(RandomTokens(), None), "called with embeddings"),
    ],
)
def test_perturbations_refuse_arguments_with_their_rule(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
