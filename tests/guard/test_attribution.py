"""Which words trigger it: the gradient against finite differences, and what is made of it."""

from __future__ import annotations

import json
import math

import latent_tools as tools
import pytest
import torch
from transformers import CLIPTokenizer

from ambient_sd.guard.attribution import TokenAttribution, TokenGradients
from ambient_sd.guard.policies.base import Encoded, Step


def norms(halves: tools.HandHalves, embeds: torch.Tensor) -> torch.Tensor:
    return (halves.predict("cond", embeds=embeds) - halves.predict("uncond")).flatten(1).norm(dim=1)


def watched(halves: tools.HandHalves, steps: int = 1) -> TokenGradients:
    watch = TokenGradients()
    watch.begin(tools.start_of(halves))
    for _ in range(steps):
        assert watch.step(tools.step_of(halves)) is None  # type: ignore[func-returns-value]
    return watch


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_tokens_score_is_the_length_of_the_norms_gradient_by_finite_differences(factor: float) -> None:
    halves = tools.tiny_unet_halves()
    halves.noise_factor = torch.tensor(factor, dtype=torch.float64)
    watch = watched(halves)
    assert watch.total is not None and watch.total.shape == (2, 5)
    h, token = 1e-5, 3
    slopes = []
    for channel in range(12):
        shift = torch.zeros_like(halves.cond.embeds)
        shift[:, token, channel] = h
        slopes.append((norms(halves, halves.cond.embeds + shift) - norms(halves, halves.cond.embeds - shift)) / (2 * h))
    expected = factor * torch.stack(slopes).norm(dim=0)
    torch.testing.assert_close(watch.total[:, token], expected, rtol=1e-6, atol=0)
    assert (watch.total[:, token - 1] / expected - 1).abs().min() > 1e-3  # the control: another token has another score


def test_steps_add_up_and_a_new_run_begins_at_zero() -> None:
    halves = tools.tiny_unet_halves()
    once, twice = watched(halves), watched(halves, steps=2)
    assert once.total is not None and twice.total is not None and (once.steps, twice.steps) == (1, 2)
    torch.testing.assert_close(twice.total, 2 * once.total)
    twice.begin(tools.start_of(halves))
    assert (twice.total, twice.steps) == (None, 0)


def test_images_do_not_see_each_other() -> None:
    halves = tools.tiny_unet_halves(images=3)
    together = watched(halves).total
    one = tools.HandHalves(halves.network, halves.sample[1:2], halves.cond.embeds[1:2], halves.uncond.embeds[1:2])
    alone = watched(one).total
    assert together is not None and alone is not None
    torch.testing.assert_close(together[1:2], alone, rtol=1e-9, atol=0)


def test_a_token_that_the_network_does_not_read_has_the_score_zero() -> None:
    """The network reads token 0 only."""
    sample, embeds = tools.randn(1, 2, 2, 2), tools.randn(1, 3, 2, seed=1)
    halves = tools.HandHalves(lambda x, e: x * e[:, 0].sum(), sample, embeds, torch.zeros_like(embeds))
    total = watched(halves).total
    assert total is not None and total[0, 0] > 0 and total[0, 1:].tolist() == [0, 0]


def test_it_works_where_the_pipeline_forbids_gradients() -> None:
    halves = tools.tiny_unet_halves()
    free = watched(halves).total
    with torch.inference_mode():
        step = tools.step_of(halves)
        watch = TokenGradients()
        watch.begin(tools.start_of(halves))
        ordinary = Step(0, step.timestep, *(x.clone() for x in (step.cond, step.uncond)), step.norms, 7.5, halves)
        watch.step(ordinary)
    assert free is not None and watch.total is not None
    torch.testing.assert_close(watch.total, free)


def test_half_precision_is_summed_in_float32() -> None:
    sample, embeds = tools.randn(1, 2, 2, 2).bfloat16(), tools.randn(1, 3, 2, seed=1).bfloat16()
    halves = tools.HandHalves(lambda x, e: x * e.sum(), sample, embeds, torch.zeros_like(embeds))
    halves.cond = Encoded(embeds, None)
    total = watched(halves).total
    assert total is not None and total.dtype.itemsize >= 4


def test_a_words_score_is_that_of_its_tokens_together_and_a_character_of_several_tokens_is_whole() -> None:
    from ambient_sd.assets import BASE

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    ids = tokenizer("a quetzal, \U0001f389").input_ids
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces[2:6] == ["qu", "et", "z", "al"] and pieces[-2] == "\ufffd"  # control: tokens alone are no words
    watch = TokenGradients()
    watch.total, watch.steps = torch.arange(len(ids) * 2.0).view(2, -1), 2
    watch.token_ids, watch.token_mask = torch.tensor([ids, ids]), torch.ones(2, len(ids), dtype=torch.bool)
    found = watch.result("a quetzal, \U0001f389", tokenizer, [0])
    assert found.words == ["a", "quetzal", ",", "\U0001f389"] and found.images == 1
    assert found.word_scores[1] == pytest.approx(math.sqrt(2**2 + 3**2 + 4**2 + 5**2) / 2)
    assert found.word_scores[0] == 0.5 and watch.result("", tokenizer).scores[1] == pytest.approx(
        (1 + 1 + len(ids)) / 4
    )


# -- data, table, plot ---------------------------------------------------------------------------------------------

RESULT = TokenAttribution("a cat", ["<|startoftext|>", "a", "cat", "<|endoftext|>"], [0.0, 1.0, 4.0, 2.0], 0.5, 4, 50)


def test_the_json_holds_everything() -> None:
    assert json.loads(RESULT.to_json()) == {
        "prompt": "a cat", "tokens": ["<|startoftext|>", "a", "cat", "<|endoftext|>"], "scores": [0.0, 1.0, 4.0, 2.0],
        "padding_score": 0.5, "images": 4, "steps": 50, "words": [], "word_scores": [],
    }  # fmt: skip


def test_the_tables_bars_are_as_long_as_the_scores() -> None:
    lines = RESULT.table(width=8).splitlines()
    assert [line.count("#") for line in lines] == [0, 2, 8, 4, 1]
    assert lines[2].split() == ["cat", "4", "########"]
    assert lines[4].startswith("(padding, mean)")


def test_scores_of_zero_divide_nothing() -> None:
    flat = TokenAttribution("", ["x"], [0.0], None, 1, 1)
    assert "#" not in flat.table()


HOSTILE = ["</text><script>alert(1)</script>", "\x00\x1b[2J", "\n\n", "&amp;\"'", "\u202e", "x" * 10_000, "\ud800"]


def test_hostile_tokens_stay_text_on_one_line() -> None:
    hostile = TokenAttribution("".join(HOSTILE), HOSTILE, [1.0] * len(HOSTILE), 1.0, 1, 1)
    table = hostile.table()
    assert len(table.splitlines()) == len(HOSTILE) + 1 and max(map(len, table.splitlines())) < 100
    assert table.replace("\n", "").isprintable()
    assert json.loads(hostile.to_json())["tokens"] == HOSTILE and hostile.to_json().isascii()
