"""The network at one evaluation, as policies see it: two halves with their inputs, which can be evaluated again with others.

`forward` of the network is called, not the network: the guard's own hooks must not see these evaluations, while an offload
wrapper, which lives in `forward`, must. A compiled network is asked in its eager form, whose inner hooks and gradients work.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ambient_sd.families.guidance import Guidance
from ambient_sd.guard.attention import map_tensors, take, weighed
from ambient_sd.guard.policies.base import Encoded, GuidanceBranches, Half, wide
from ambient_sd.utils.errors import UserError


class NetworkHalves(GuidanceBranches):
    """Evaluate either half of one evaluation again.

    Args:
        network: the eager network.
        layout: how the pipeline calls it.
        cond, uncond: the inputs of each half by name, `n` rows each.
        n: images.
        timestep: `()`, the scheduler's units, on the device.
        noise_factor: `()`, on the device.
        weights: `(token_weights, key_scale)` of the conditional half that `begin` put in place, `(n, L)` each, or None.
        checkpointing: whether `enable_grad` also turns gradient checkpointing on.
        flow: whether the network was trained by flow matching.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.guard.policies.base import Policy
        >>> from ambient_sd.guard.recorder import MemorizationGuard
        >>> class Ask(Policy):
        ...     def step(self, step):
        ...         print(tuple(step.halves.predict("uncond").shape))
        >>> pipe = tiny_pipeline()
        >>> with MemorizationGuard(pipe, Ask(), stop_after=1):
        ...     out = pipe("a cat", num_inference_steps=1, output_type="latent")
        (1, 4, 16, 16)
    """

    def __init__(
        self,
        network: torch.nn.Module,
        layout: Guidance,
        *,
        cond: dict[str, Any],
        uncond: dict[str, Any],
        n: int,
        timestep: torch.Tensor,
        noise_factor: torch.Tensor,
        weights: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        checkpointing: bool = False,
        flow: bool = False,
    ) -> None:
        # A pipeline may run under torch.inference_mode, whose tensors cannot enter autograd: policies get ordinary ones.
        self._inputs = {"cond": ordinary(cond), "uncond": ordinary(uncond)}
        self._network, self._layout, self._n, self._weights = network, layout, n, weights
        self._checkpointing = checkpointing
        self.sample = self._inputs["cond"][layout.sample]
        self.cond, self.uncond = (
            Encoded(
                half[layout.embeds], get(half, layout.pooled), _told(half[layout.embeds], _mask(half, layout), layout)
            )
            for half in self._inputs.values()
        )
        self.timestep, self.noise_factor = ordinary(timestep), ordinary(noise_factor)
        self.flow = 0 if not flow else -1 if layout.reversed else 1

    def predict(
        self,
        half: Half,
        *,
        rows: torch.Tensor | None = None,
        sample: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        key_scale: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Evaluate one half of the network for some images; see `GuidanceBranches.predict`."""
        layout, inputs = self._layout, self._inputs[half]
        if rows is not None:
            inputs = rows_of(inputs, layout, self._n, rows)
        inputs = dict(inputs)
        if sample is not None:
            inputs[layout.sample] = sample
        inputs = with_text(inputs, layout, None, embeds, mask)
        if pooled is not None:
            inputs = put(inputs, layout.pooled, pooled)
        if timestep is not None:
            own, other = torch.as_tensor(inputs[layout.time]), layout.network_time(timestep)
            inputs[layout.time] = other.to(own.device, torch.promote_types(own.dtype, other.dtype)).expand(own.shape)
        if half == "cond":  # what `begin` put in place, unless the policy says otherwise
            own_weights, own_scale = (w if w is None or rows is None else w[rows.to(w.device)] for w in self._weights)
            token_weights = own_weights if token_weights is None else token_weights
            key_scale = own_scale if key_scale is None else key_scale
        grad = torch.is_grad_enabled()
        # Leaving inference mode turns autograd on, whatever it was.
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            weighed(self._network, token_weights=token_weights, key_scale=key_scale),
        ):
            return layout.tensor(self._network.forward(**(as_called(inputs, layout) | {"return_dict": False}))[0])  # type: ignore[operator]

    def of(self, network: torch.nn.Module) -> NetworkHalves:
        """Return the same evaluation as another network of the same kind would be asked it."""
        other = copy.copy(self)
        other._network = network
        return other

    def enable_grad(self) -> AbstractContextManager[None]:
        """Return a context under which `predict` can be differentiated with respect to its inputs."""
        return _differentiable(self._network, self._checkpointing)


_LENGTHS = "rows of the listed embeddings"  # as a mask, for networks that take none


def plain(inputs: dict[str, Any], layout: Guidance) -> dict[str, Any]:
    """Return the network's inputs by name as one tensor each, where it takes lists of them.

    Example:
        >>> layout = Guidance(network="transformer", sample="x", embeds="cap_feats", listed=True)
        >>> given = {"x": [torch.zeros(4, 1, 2, 2)] * 2, "cap_feats": [torch.ones(1, 8), torch.ones(3, 8)]}
        >>> found = plain(given, layout)
        >>> found["x"].shape, found["cap_feats"].shape, [len(text) for text in as_called(found, layout)["cap_feats"]]
        (torch.Size([2, 4, 2, 2]), torch.Size([2, 3, 8]), [1, 3])
    """
    if not layout.listed:
        return inputs
    texts = inputs[layout.embeds]
    return inputs | {
        layout.sample: layout.tensor(inputs[layout.sample]), layout.embeds: pad_sequence(texts, batch_first=True),
        _LENGTHS: pad_sequence([text.new_ones(len(text)) for text in texts], batch_first=True),
    }  # fmt: skip


def as_called(inputs: dict[str, Any], layout: Guidance) -> dict[str, Any]:
    """Return inputs as the network takes them: `plain`, back.

    Example:
        >>> from ambient_sd.families.sd import LAYOUT
        >>> as_called({"sample": torch.zeros(1, 4, 8, 8)}, LAYOUT)["sample"].shape
        torch.Size([1, 4, 8, 8])
    """
    if not layout.listed:
        return inputs
    lengths = inputs[_LENGTHS].sum(1).long().tolist()
    texts = [text[:n] for text, n in zip(inputs[layout.embeds], lengths, strict=True)]
    rest = {name: value for name, value in inputs.items() if name != _LENGTHS}
    return rest | {layout.sample: layout.as_given(inputs[layout.sample]), layout.embeds: texts}


def encoded(result: Any, layout: Guidance) -> Encoded:
    """Return the conditional half of what a pipeline's `encode_prompt` gives.

    Example:
        >>> from ambient_sd.families.sd import LAYOUT
        >>> encoded((torch.zeros(1, 77, 768), None), LAYOUT).embeds.shape
        torch.Size([1, 77, 768])
    """
    embeds, pooled = layout.outputs
    if layout.listed:
        texts = result[embeds]
        told = pad_sequence([text.new_ones(len(text)) for text in texts], batch_first=True)
        return Encoded(pad_sequence(texts, batch_first=True), None, told)
    mask = None if layout.mask is None else _told(result[embeds], result[layout.mask[1]], layout)
    return Encoded(result[embeds], None if pooled is None else result[pooled], mask)


def with_text(
    inputs: dict[str, Any],
    layout: Guidance,
    rows: torch.Tensor | None,
    embeds: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Return the network's inputs, as `plain` has them, with other embeddings; shorter ones get zeros behind that are not read.

    Args:
        inputs: by name.
        layout: how the pipeline calls the network.
        rows: which rows of the batch they are; None: all.
        embeds: `(m, L, D)`; None changes nothing.
        mask: `(m, L)`, which rows of them are read; None: those that were, or all.

    Example:
        >>> from ambient_sd.families.sd import LAYOUT
        >>> given = {"encoder_hidden_states": torch.zeros(2, 3, 1)}
        >>> with_text(given, LAYOUT, torch.tensor([1]), torch.ones(1, 3, 1))["encoder_hidden_states"].flatten().tolist()
        [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    """
    if embeds is None:
        return inputs
    own, read = inputs[layout.embeds], _mask(inputs, layout)
    if rows is not None:
        length = max(own.shape[1], embeds.shape[1])
        if mask is not None and (read is not None or length > own.shape[1] or not bool(mask.all())):
            # What has no mask is read whole.
            told = own.new_ones(own.shape[:2]) if read is None else read
            mask = wide(told, length).index_copy(0, rows, wide(mask, length).to(told))
        else:
            mask = None
        embeds = wide(own, length).index_copy(0, rows, wide(embeds, length).to(own))
    name = _LENGTHS if layout.mask is None else layout.mask[0]
    # Where nothing is to be hidden Qwen-Image's pipeline gives no mask, which spares attention one.
    if mask is not None and (inputs.get(name) is not None or not bool(mask.all())):
        if (before := inputs.get(name)) is not None:  # behind the text's part some have one of the image
            mask = torch.cat([mask.to(before), before[:, own.shape[1] :]], dim=1)
        inputs = inputs | {name: mask}
    return inputs | {layout.embeds: embeds}


def _told(embeds: torch.Tensor, mask: torch.Tensor | None, layout: Guidance) -> torch.Tensor | None:
    """Return a mask, of ones where a network that takes one is given none: all rows are read."""
    return embeds.new_ones(embeds.shape[:2]) if mask is None and layout.mask is not None else mask


def _mask(inputs: dict[str, Any], layout: Guidance) -> torch.Tensor | None:
    """Return which rows of the embeddings are read; None: all."""
    name = _LENGTHS if layout.mask is None else layout.mask[0]
    mask: torch.Tensor | None = inputs.get(name)
    return None if mask is None else mask[:, : inputs[layout.embeds].shape[1]]


def rows_of(inputs: dict[str, Any], layout: Guidance, batch: int, rows: torch.Tensor | slice) -> dict[str, Any]:
    """Return the network's inputs for some rows of a batch.

    Example:
        >>> from ambient_sd.families.sd import LAYOUT
        >>> rows_of({"sample": torch.arange(4)}, LAYOUT, 4, slice(2, 4))["sample"].tolist()
        [2, 3]
    """
    return {name: value if name in layout.shared else take(value, batch, rows) for name, value in inputs.items()}


def get(inputs: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Return what lies at a path of names, None for the empty path or if it is not there.

    Example:
        >>> get({"added": {"text_embeds": 7}}, ("added", "text_embeds"))
        7
    """
    value: Any = inputs if path else None
    for name in path:
        value = None if value is None else value.get(name)
    return value


def put(inputs: dict[str, Any], path: tuple[str, ...], value: torch.Tensor) -> dict[str, Any]:
    """Return the inputs with another tensor at a path of names.

    Raises:
        UserError: the network has no such input.

    Example:
        >>> put({"added": {"text_embeds": torch.zeros(1)}}, ("added", "text_embeds"), torch.ones(1))
        {'added': {'text_embeds': tensor([1.])}}
    """
    if get(inputs, path) is None:
        raise UserError(
            "the policy replaces pooled embeddings",
            rule="this network takes none",
            remedy="leave `pooled` None",
        )
    first, *rest = path
    return inputs | {first: put(inputs[first], tuple(rest), value) if rest else value}


def ordinary(value: Any) -> Any:
    """Return the value with copies in place of the tensors made under `torch.inference_mode`.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.ones(1)
        >>> ordinary(x).is_inference()
        False
    """
    with torch.inference_mode(False), torch.no_grad():
        return map_tensors(value, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


@contextlib.contextmanager
def _differentiable(network: torch.nn.Module, checkpointing: bool) -> Iterator[None]:
    """Switch autograd on for the inputs of the network but not for its parameters; restore both afterwards.

    Pipelines run under `torch.no_grad`, callers possibly under `torch.inference_mode`: both are left for the while.
    Frozen parameters also spare autograd the activations that only their gradients would need.
    """
    if any(parameter.is_inference() for parameter in network.parameters()):
        raise UserError(
            "the network's weights were loaded under torch.inference_mode",
            rule="autograd cannot pass through such tensors",
            remedy="load the pipeline outside inference_mode",
        )
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with contextlib.ExitStack() as undo:
        for parameter in trainable:
            undo.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        if checkpointing:
            undo.enter_context(_checkpointed(network))
        with torch.inference_mode(False), torch.enable_grad():
            yield


@contextlib.contextmanager
def _checkpointed(network: Any) -> Iterator[None]:
    """Turn diffusers' gradient checkpointing on; afterwards every module has the attributes that it had."""
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(network).__name__} knows no gradient checkpointing", remedy="use gradient_checkpointing=False"
        )
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(vars(m), {k: vars(m)[k] for k in names if k in vars(m)}) for m in network.modules()]
    try:
        network.enable_gradient_checkpointing()
        yield
    finally:
        for attributes, had in before:
            for name in names:
                attributes.pop(name, None)
            attributes.update(had)
