"""Policies on cross-attention (Ren et al., GUARD): their formulas by hand, and on a real U-Net."""

from __future__ import annotations

import math
from typing import Any

import latent_tools as tools
import pytest
import torch
import torch.nn.functional as F

from ambient_sd.guard.policies.attention_rescaling import AttentionRescaling
from ambient_sd.guard.policies.guard_attenuation import AttentionGuard, SpikeAttenuation, spikes
from ambient_sd.utils.errors import UserError

# -- Ren et al. ----------------------------------------------------------------------------------------------------


def test_ren_scales_bos_and_hides_the_padding_of_active_images() -> None:
    start = tools.start_of(tools.tiny_unet_halves(), active=[False, True])
    change = AttentionRescaling().begin(start)
    assert change.changed == [False, True]
    assert change.key_scale is not None and change.token_weights is not None
    assert change.key_scale.tolist() == [[1.25, 1, 1, 1, 1]] * 2
    assert change.token_weights.tolist() == [[1, 1, 1, 1, 0]] * 2
    assert (change.embeds, change.sample) == (None, None)


def test_ren_without_a_prompt_is_refused_since_the_padding_is_unknown() -> None:
    start = tools.start_of(tools.tiny_unet_halves(), token_mask=None, token_ids=None, prompts=None)
    with pytest.raises(UserError, match="padding"):
        AttentionRescaling().begin(start)


@pytest.mark.parametrize("bad", [0, -1, math.nan])
def test_rens_scale_is_checked(bad: float) -> None:
    with pytest.raises(UserError, match="bos_scale"):
        AttentionRescaling(bad)


# -- GUARD: which tokens are spikes --------------------------------------------------------------------------------


def test_spikes_are_tokens_whose_largest_logit_stands_out_among_the_others() -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0, 0.0, 0.0], [9.0, 1.0, 4.0, 1.0, -5.0]])  # maxima: 9, 1, 4, 1, 0
    others = torch.tensor([1.0, 4.0, 1.0, 0.0])
    z = (others - others.mean()) / others.std()
    assert z.tolist() == pytest.approx([-0.289, 1.443, -0.289, -0.866], abs=1e-3)
    assert spikes(logits, 0.1, "logits").tolist() == [False, False, True, False, False]
    assert spikes(logits, -0.5, "logits").tolist() == [False, True, True, True, False]
    assert not spikes(logits, 1.5, "logits").any()


def test_bos_is_never_a_spike_and_does_not_hide_one() -> None:
    """With BOS in the statistics its 900 would raise mean and deviation so that token 2 is none."""
    logits = torch.tensor([[900.0, 1.0, 4.0, 1.0, 0.0]])
    assert spikes(logits, 1.0, "logits").tolist() == [False, False, True, False, False]
    z = (logits[0] - logits[0].mean()) / logits[0].std()
    assert z[2] < 1.0 < z[0]


def test_weights_instead_of_logits_can_name_other_spikes() -> None:
    """Token 1 has the largest logit; token 2 the largest share, of the query that has nothing else."""
    logits = torch.tensor([[5.0, 6.0, 0.0, 0.0], [-9.0, -9.0, 2.0, -9.0]])
    assert spikes(logits, 1.0, "logits").tolist() == [False, True, False, False]
    assert spikes(logits, 0.5, "weights").tolist() == [False, False, True, False]


# -- GUARD: the attention ------------------------------------------------------------------------------------------


def cross(text: torch.Tensor, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A cross-attention of one head whose keys are the text itself, read by a linear layer as in diffusers."""
    key = F.linear(text, torch.eye(text.shape[-1], dtype=text.dtype))
    return F.scaled_dot_product_attention(query, key, value)


def test_the_logits_of_spikes_are_multiplied_before_the_softmax() -> None:
    text, query, value = tools.randn(1, 1, 5, 3), tools.randn(1, 1, 4, 3, seed=1), tools.randn(1, 1, 5, 2, seed=2)
    logits = query @ text.mT / math.sqrt(3)
    found = spikes(logits, 0.1, "logits")
    assert 0 < found.sum() < 4
    with SpikeAttenuation((5, 3), lambda logits: spikes(logits, 0.1, "logits"), 0.3) as mode:
        out = cross(text, query, value)
    expected = torch.where(found.unsqueeze(-2), 0.3 * logits, logits).softmax(-1) @ value
    torch.testing.assert_close(out, expected)
    assert mode.seen == 1
    assert (out - cross(text, query, value)).abs().max() > 1e-3


def test_attention_that_reads_no_text_is_left_alone_even_with_as_many_keys() -> None:
    query, key = tools.randn(1, 1, 5, 3), tools.randn(1, 1, 5, 3, seed=1)
    with SpikeAttenuation((5, 3), lambda logits: torch.ones(1, 1, 5, dtype=torch.bool), 0.0) as mode:
        out = F.scaled_dot_product_attention(query, key, key)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, key)) and mode.seen == 0


@pytest.mark.parametrize(("all_blocks", "attenuated"), [(False, [True, True, False, False]), (True, [True] * 4)])
def test_attenuation_ends_where_the_number_of_queries_grows_again(all_blocks: bool, attenuated: list[bool]) -> None:
    text = tools.randn(1, 1, 5, 3)
    changed = []
    calls = [(tools.randn(1, 1, count, 3, seed=count), tools.randn(1, 1, 5, 2)) for count in (8, 2, 4, 8)]
    with SpikeAttenuation((5, 3), lambda logits: torch.ones(1, 1, 5, dtype=torch.bool), 0.0, all_blocks):
        inside = [cross(text, query, value) for query, value in calls]
    for out, (query, value) in zip(inside, calls, strict=True):
        changed.append(not torch.equal(out, cross(text, query, value)))
    assert changed == attenuated


# -- GUARD: the guidance -------------------------------------------------------------------------------------------


def guided(policy: AttentionGuard, halves: tools.HandHalves, s: float) -> torch.Tensor:
    """What the pipeline makes of a policy's two outputs."""
    cond, uncond = policy.step(tools.step_of(halves, s))
    return uncond + s * (cond - uncond)


def test_without_attenuation_guard_is_plain_guidance_with_the_scale_s_minus_r() -> None:
    halves = tools.tiny_unet_halves()
    cond, uncond = halves.predict("cond"), halves.predict("uncond")
    out = guided(AttentionGuard(repulsion=2.0, attenuation=1.0, decay="none", orthogonalize=False), halves, 7.5)
    torch.testing.assert_close(out, uncond + 5.5 * (cond - uncond), rtol=1e-9, atol=1e-12)
    assert (guided(AttentionGuard(), halves, 7.5) - out).abs().max() > 1e-6


def test_the_guidance_is_the_published_sum_of_three_branches() -> None:
    halves = tools.tiny_unet_halves()
    cond, uncond = halves.predict("cond"), halves.predict("uncond")
    with SpikeAttenuation((5, 12), lambda logits: spikes(logits, 0.1, "logits"), 0.3) as mode:
        plus = halves.predict("cond")
    assert mode.seen == 4 and (plus - cond).abs().max() > 1e-6  # one down, one mid, two in the up block
    halves.asked.clear()
    for r in (0.0, 2.0):
        out = guided(AttentionGuard(repulsion=r, threshold=0.1, decay="none", orthogonalize=False), halves, 7.5)
        torch.testing.assert_close(out, uncond + 7.5 * (plus - uncond) - r * (cond - uncond), rtol=1e-9, atol=1e-12)


def test_guard_asks_for_one_extra_branch_and_leaves_no_trace() -> None:
    halves = tools.tiny_unet_halves()
    step = tools.step_of(halves)
    halves.asked.clear()
    AttentionGuard().step(step)
    assert [(half, rows) for half, rows, _ in halves.asked] == [("cond", [0, 1])]
    assert torch.equal(halves.predict("cond"), step.cond)


def test_an_exception_inside_leaves_attention_as_it_was() -> None:
    halves = tools.tiny_unet_halves()
    step = tools.step_of(halves)
    handle = halves.unet.mid_block.register_forward_hook(lambda *_: 1 / 0)  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        AttentionGuard().step(step)
    handle.remove()
    assert torch.equal(halves.predict("cond"), step.cond)


def test_images_do_not_see_each_other() -> None:
    halves = tools.tiny_unet_halves(images=3)
    together = AttentionGuard().step(tools.step_of(halves))[0]
    one = tools.HandHalves(halves.network, halves.sample[1:2], halves.cond.embeds[1:2], halves.uncond.embeds[1:2])
    alone = AttentionGuard().step(tools.step_of(one))[0]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-9, atol=1e-12)


def test_attention_that_cannot_be_read_is_refused_and_not_passed_over() -> None:
    halves = tools.tiny_unet_halves()
    halves.unet.set_attention_slice("max")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="attention slicing"):
        AttentionGuard().step(tools.step_of(halves))


@pytest.mark.parametrize(
    "bad",
    [{"repulsion": -1}, {"repulsion": math.inf}, {"attenuation": 1.5}, {"attenuation": math.nan},
     {"threshold": math.nan}, {"statistic": "mass"}, {"decay": "linear"}],
)  # fmt: skip
def test_guards_arguments_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        AttentionGuard(**bad)
