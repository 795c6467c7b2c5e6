"""The network at one evaluation, as policies see it: two halves with their inputs, which can be evaluated again with others.

`forward` of the network is called, not the network: the guard's own hooks must not see these evaluations, while an offload
wrapper, which lives in `forward`, must. A compiled network is asked in its eager form, whose inner hooks and gradients work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ambient_sd.families.guidance import Guidance
from ambient_sd.guard.attention import map_tensors, take, weighed
from ambient_sd.guard.policies.base import Encoded, GuidanceBranches, Half
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
    ) -> None:
        # A pipeline may run under torch.inference_mode, whose tensors cannot enter autograd: policies get ordinary ones.
        self._inputs = {"cond": ordinary(cond), "uncond": ordinary(uncond)}
        self._network, self._layout, self._n, self._weights = network, layout, n, weights
        self._checkpointing = checkpointing
        self.sample = layout.tensor(self._inputs["cond"][layout.sample])
        self.cond, self.uncond = (
            Encoded(_padded(half[layout.embeds]), get(half, layout.pooled)) for half in self._inputs.values()
        )
        self.timestep, self.noise_factor = ordinary(timestep), ordinary(noise_factor)

    def predict(
        self,
        half: Half,
        *,
        rows: torch.Tensor | None = None,
        sample: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
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
            inputs[layout.sample] = layout.as_given(sample)
        if embeds is not None:
            refuse_masked(layout)
            inputs[layout.embeds] = embeds
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
            return layout.tensor(self._network.forward(**(inputs | {"return_dict": False}))[0])  # type: ignore[operator]

    def enable_grad(self) -> AbstractContextManager[None]:
        """Return a context under which `predict` can be differentiated with respect to its inputs."""
        return _differentiable(self._network, self._checkpointing)


def rows_of(inputs: dict[str, Any], layout: Guidance, batch: int, rows: torch.Tensor | slice) -> dict[str, Any]:
    """Return the network's inputs for some rows of a batch.

    Example:
        >>> from ambient_sd.families.sd import LAYOUT
        >>> rows_of({"sample": torch.arange(4)}, LAYOUT, 4, slice(2, 4))["sample"].tolist()
        [2, 3]
    """
    found = {name: value if name in layout.shared else take(value, batch, rows) for name, value in inputs.items()}
    for name in (layout.sample, layout.embeds) if layout.listed else ():
        # Each tensor of the list is a row, whatever its own first side is.
        found[name] = inputs[name][rows] if isinstance(rows, slice) else [inputs[name][i] for i in rows.tolist()]
    return found


def refuse_masked(layout: Guidance) -> None:
    """Raise a `UserError` if the network is told apart from the embeddings which of their rows it reads.

    Example:
        >>> from ambient_sd.families.sd import LAYOUT
        >>> refuse_masked(LAYOUT)
    """
    if layout.masks or layout.listed:
        raise UserError(
            "the policy replaces the embeddings of prompts",
            rule="this network reads as many of their rows as the prompt has tokens, and those of another text would be cut or padded",
            remedy="use a policy that acts on outputs or latents",
        )


def _padded(embeds: Any) -> torch.Tensor:
    padded: torch.Tensor = embeds if isinstance(embeds, torch.Tensor) else pad_sequence(embeds, batch_first=True)
    return padded


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
            remedy="use the policy with SDXL, or leave `pooled` None",
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
