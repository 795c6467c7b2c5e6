"""Weigh the tokens of a prompt inside cross-attention, for the time of one evaluation of the network.

    A = softmax(b + c * Q K^T / sqrt(d))        b_l = log(token_weights_l),    c_l = key_scale_l

`exp(b_l)` multiplies token l's attention weight before the weights are normalised (0 hides the token); `c_l` multiplies its
logit, which is what multiplying its key does. Torch hooks on every `attn2` of diffusers' `BasicTransformerBlock`: the bias
enters as `attention_mask`, the scale at the output of `to_k`. No attention processor is replaced, so SDPA, sliced and
xformers processors, LoRA layers and offload hooks go on as they are.

Rows that are not weighted keep the very bits of an evaluation without hooks: an attention mask may choose another kernel, so
only the weighted rows are computed again. Not done: networks with joint attention (SD3, Flux), which have no cross-attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock

from ambient_sd.utils.errors import UserError


def cross_attentions(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return every cross-attention of a diffusers network, in its own order.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> len(cross_attentions(tiny_pipeline().unet))
        4
    """
    blocks = (module for module in network.modules() if isinstance(module, BasicTransformerBlock))
    return [block.attn2 for block in blocks if block.attn2 is not None and block.attn2.is_cross_attention]


def require_cross_attention(network: torch.nn.Module, what: str) -> None:
    """Raise a `UserError` if a policy that acts inside the cross-attention of a U-Net is given another network.

    Example:
        >>> require_cross_attention(torch.nn.Linear(2, 2), "AttentionGuard")
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: AttentionGuard on a Linear; it acts on the cross-attention of a U-Net, and this network is none; use a policy that acts on outputs, latents or embeddings
    """
    kind = type(getattr(network, "_orig_mod", network)).__name__
    if "UNet" not in kind and not cross_attentions(network):
        raise UserError(f"{what} on a {kind}", rule="it acts on the cross-attention of a U-Net, and this network is none",
                        remedy="use a policy that acts on outputs, latents or embeddings")  # fmt: skip


def require_weighable(network: torch.nn.Module, *, key_scale: bool) -> None:
    """Raise a `UserError` unless tokens can be weighed in this network (`key_scale`: their logits be scaled).

    Example:
        >>> try:
        ...     require_weighable(torch.nn.Linear(2, 2), key_scale=False)
        ... except UserError as error:
        ...     print(str(error).split(";")[0])
        Linear has no cross-attention
    """
    found = cross_attentions(network)
    if not found:
        raise UserError(
            f"{type(network).__name__} has no cross-attention",
            rule="token weights and key scales act on the cross-attention of a U-Net",
            remedy="use a policy that acts on outputs, latents or embeddings",
        )
    if key_scale and any(getattr(a, "fused_projections", False) or a.norm_k is not None for a in found):
        raise UserError(
            f"the attention of {type(network).__name__} has fused projections or normalised keys",
            rule="there a token's logit is not the product of its key alone",
            remedy="call pipe.unfuse_qkv_projections() before sampling",
        )


@contextlib.contextmanager
def weighed(
    network: torch.nn.Module,
    *,
    token_weights: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> Iterator[None]:
    """Weigh tokens in every cross-attention while the context lasts; whatever happens, no hook stays.

    Args:
        network: a diffusers network with `BasicTransformerBlock`s.
        token_weights: `(m, L)`, >= 0; None weighs all alike.
        key_scale: `(m, L)`; None scales nothing.
        rows: `(m,)` long: which rows of the network's batch; None: the batch has m rows, all of them.

    Raises:
        UserError: the network has no cross-attention that could be weighed.

    Example:
        >>> with weighed(torch.nn.Linear(2, 2)):  # nothing to weigh: nothing is hooked
        ...     pass
    """
    if token_weights is None and key_scale is None:
        yield
        return
    require_weighable(network, key_scale=key_scale is not None)
    with contextlib.ExitStack() as undo:
        for module in network.modules():
            # A graph that was compiled before the hooks came does not know them.
            if vars(module).get("_compiled_call_impl") is not None:
                undo.callback(vars(module).__setitem__, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
        for attention in cross_attentions(network):
            if rows is None:
                undo.callback(attention.register_forward_pre_hook(_biased(token_weights), with_kwargs=True).remove)
                undo.enter_context(_scaled(attention, key_scale))
            else:
                again = _computed_again(rows, token_weights, key_scale)
                undo.callback(attention.register_forward_hook(again, with_kwargs=True).remove)
        yield


def _biased(weights: torch.Tensor | None) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"attention_mask": _mask(kwargs.get("attention_mask"), weights, args[0])}

    return hook


def _mask(own: torch.Tensor | None, weights: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """Return `log(weights)` as `(m, 1, L)` on top of the mask that was there, in the dtype of the hidden states."""
    if weights is None:
        return own
    # The logarithm in float32: float16 has no number near log(1 + 1e-4). The lowest number, not -inf: a row whose
    # weights are all 0 would be 0/0.
    bias = weights.to(hidden.device, torch.promote_types(weights.dtype, torch.float32)).log()
    bias = bias.clamp(min=torch.finfo(hidden.dtype).min).to(hidden.dtype)[:, None]
    return bias if own is None else own + bias


@contextlib.contextmanager
def _scaled(attention: torch.nn.Module, scale: torch.Tensor | None) -> Iterator[None]:
    if scale is None:
        yield
        return
    keys: torch.nn.Module = attention.to_k  # type: ignore[assignment]
    handle = keys.register_forward_hook(lambda module, args, output: output * scale.to(output)[:, :, None])
    try:
        yield
    finally:
        handle.remove()


def _computed_again(
    rows: torch.Tensor, weights: torch.Tensor | None, scale: torch.Tensor | None
) -> Callable[..., torch.Tensor]:
    """Return a hook that evaluates the attention once more for these rows and puts them in place."""

    def hook(
        attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        batch, index = output.shape[0], rows.to(output.device)
        some = take(args, batch, index)
        more = take(kwargs, batch, index)
        more["attention_mask"] = _mask(more.get("attention_mask"), weights, some[0])
        with _scaled(attention, scale):
            # `forward`, not a call: this hook must not see it.
            return output.index_copy(0, index, attention.forward(*some, **more).to(output.dtype))

    return hook


def take(value: Any, batch: int, rows: torch.Tensor | slice) -> Any:
    """Return the value with only these rows of every tensor in it that has `batch` rows; dicts, lists, tuples are entered.

    Example:
        >>> take({"sample": torch.arange(4), "scale": 7.5}, 4, slice(0, 2))
        {'sample': tensor([0, 1]), 'scale': 7.5}
    """

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != batch:
            return tensor
        return tensor[rows] if isinstance(rows, slice) else tensor[rows.to(tensor.device)]

    return map_tensors(value, chosen)


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the value with `change` applied to every tensor in it; dicts, lists, tuples are entered.

    Example:
        >>> map_tensors([torch.ones(2), "as it is"], lambda tensor: 2 * tensor)
        [tensor([2., 2.]), 'as it is']
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return value
