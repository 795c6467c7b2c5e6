"""Tokens weighed inside cross-attention: against a softmax written out by hand, in every processor; nothing stays."""

from __future__ import annotations

import math
from typing import Any

import guard_tools as tools
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

from ambient_sd.guard.attention import cross_attentions, weighed
from ambient_sd.utils.errors import UserError

HIDDEN, TOKENS, WIDTH, HEADS = 12, 5, 16, 2
PROCESSORS = {"sdpa": AttnProcessor2_0(), "plain": AttnProcessor(), "sliced": SlicedAttnProcessor(1)}


class Block(torch.nn.Module):
    """A network with one cross-attention, found as in a U-Net's transformer block."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        pipe = tools.pipeline()
        self.block = next(m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock")
        self.block.attn2 = Attention(HIDDEN, cross_attention_dim=WIDTH, heads=HEADS, dim_head=HIDDEN // HEADS)
        self.to(dtype)

    def forward(self, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.block.attn2(hidden, encoder_hidden_states=text)  # type: ignore[no-any-return]


def by_hand(attention: Any, hidden: torch.Tensor, text: torch.Tensor, weights: Any, scale: Any) -> torch.Tensor:
    """Attention of one row of the batch with explicit sums: weights times exponentials, divided by their sum."""
    q, k, v = (layer(x) for layer, x in ((attention.to_q, hidden), (attention.to_k, text), (attention.to_v, text)))
    heads = []
    for h in range(HEADS):
        part = slice(h * HIDDEN // HEADS, (h + 1) * HIDDEN // HEADS)
        logits = q[:, part] @ k[:, part].T / math.sqrt(HIDDEN // HEADS)
        mass = weights * torch.exp(logits * scale)
        heads.append(mass / mass.sum(1, keepdim=True) @ v[:, part])
    return attention.to_out[0](torch.cat(heads, 1))  # type: ignore[no-any-return]


def inputs(batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden, text = torch.randn(batch, 7, HIDDEN, generator=g), torch.randn(batch, TOKENS, WIDTH, generator=g)
    weights, scale = torch.rand(batch, TOKENS, generator=g) * 3, torch.rand(batch, TOKENS, generator=g) + 0.5
    weights[:, 2] = 0
    return hidden.to(dtype), text.to(dtype), weights.double(), scale.double()


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", ["weights", "scale", "both"])
def test_weighed_attention_is_the_softmax_with_weights_and_scaled_logits(processor: str, kind: str) -> None:
    network = Block()
    network.block.attn2.set_processor(PROCESSORS[processor])
    hidden, text, weights, scale = inputs()
    with torch.no_grad():
        stock = network(hidden, text)
        given = {
            "token_weights": weights if kind != "scale" else None,
            "key_scale": scale if kind != "weights" else None,
        }
        one = torch.ones(3, TOKENS, dtype=torch.float64)
        used = [one if value is None else value for value in given.values()]
        expected = torch.stack([by_hand(network.block.attn2, *row) for row in zip(hidden, text, *used, strict=True)])
        with weighed(network, **given):
            got = network(hidden, text)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert (got - stock).abs().max() > 1e-3

        # Some rows only: the same numbers there, the very bits of the stock evaluation elsewhere.
        rows = torch.tensor([2, 0])
        with weighed(network, rows=rows, **{k: None if v is None else v[rows] for k, v in given.items()}):
            some = network(hidden, text)
        torch.testing.assert_close(some[rows], expected[rows], rtol=1e-10, atol=1e-10)
        assert torch.equal(some[1], stock[1])
        assert torch.equal(network(hidden, text), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_a_token_exactly(dtype: torch.dtype) -> None:
    network = Block(dtype)
    hidden, text, _, _ = inputs(2, dtype)
    hidden_token = torch.ones(2, TOKENS)
    hidden_token[:, 3] = 0
    other = text.clone()
    other[:, 3] += 5
    with torch.no_grad(), weighed(network, token_weights=hidden_token):
        assert torch.equal(network(hidden, text), network(hidden, other))
    with torch.no_grad():
        assert not torch.equal(network(hidden, text), network(hidden, other))
        with weighed(network, token_weights=torch.zeros(2, TOKENS)):
            assert network(hidden, text).isfinite().all()


def test_gradients_flow_through_weighed_attention() -> None:
    network = Block()
    hidden, text, weights, scale = inputs()
    text.requires_grad_(True)
    with weighed(network, token_weights=weights, key_scale=scale):
        network(hidden, text).sum().backward()
    assert text.grad is not None and text.grad.abs().max() > 0
    assert text.grad[:, 2].abs().max() == 0  # of a hidden token


def test_no_hook_and_no_processor_changes_even_after_an_exception() -> None:
    pipe = tools.pipeline()
    tools.sample(pipe)
    before = tools.state(pipe)
    ones = torch.ones(1, 24)
    with pytest.raises(RuntimeError), weighed(pipe.unet, token_weights=ones, key_scale=ones, rows=torch.tensor([1])):
        assert tools.state_differs(pipe, before) == ["inner hooks"]
        raise RuntimeError
    assert not tools.state_differs(pipe, before)
    assert len(cross_attentions(pipe.unet)) == 4


def test_networks_without_cross_attention_and_fused_keys_are_refused_in_one_line() -> None:
    with (
        pytest.raises(UserError, match="Linear has no cross-attention"),
        weighed(torch.nn.Linear(2, 2), token_weights=torch.ones(1, 2)),
    ):
        pass
    pipe = tools.pipeline()
    pipe.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused"), weighed(pipe.unet, key_scale=torch.ones(1, 24)):
        pass
