"""AdamW as a run asks for it: fused or in 8 bits, and weight by weight where memory is short.

    for each weight W with gradient g:      W, moments <- AdamW(W, g, moments);   g <- none

AdamW knows no other weight than the one it changes, so the order is free: the bits are those of one call over all weights. Weight by weight
  - the step can be part of the backward pass (LOMO, Lv et al. 2023): a gradient lives until its weight's turn, not until the last one's;
  - weights may be bfloat16: the step is made in float32 and rounded up or down by chance, so that small updates survive in the mean;
        P(up) = (W - down) / (up - down)      E[rounded] = W
  - moments may stay in CPU memory and visit the GPU.
Not here: clipping within the backward pass, for the norm over all gradients is known only after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ambient_sd.data.stream import keyed_seed
from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.errors import UserError


def check(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse a launch under which weights are not stepped one by one.

    Raises:
        UserError: several processes, or another precision than the weights'.

    Example:
        >>> from types import SimpleNamespace
        >>> check(TrainConfig("base-model", train_data_dir="my-images"), SimpleNamespace())  # one call for all weights
    """
    for name in ("fused_backward_pass", "full_bf16", "offload_optimizer"):
        if getattr(config, name) and accelerator.distributed_type != DistributedType.NO:
            raise UserError(f"{name} is given and accelerate is set to {accelerator.distributed_type.value}",
                            rule="weights are stepped one by one on one process only", remedy="leave it out, or launch one process")  # fmt: skip
    if config.full_bf16 and accelerator.mixed_precision != "bf16":
        raise UserError(f"full_bf16 is given and mixed_precision is {accelerator.mixed_precision}",
                        rule="weights in bfloat16 are computed with in bfloat16", remedy="add --mixed_precision bf16")  # fmt: skip
    if config.fused_backward_pass and accelerator.mixed_precision == "fp16":
        raise UserError("fused_backward_pass is given and mixed_precision is fp16",
                        rule="a step is skipped where any gradient is too large, known only after the pass", remedy="use bf16 or no")  # fmt: skip


def make(config: TrainConfig, groups: Sequence[dict[str, Any]], rate: float, step: int = 0) -> torch.optim.Optimizer:
    """Return the optimizer of a run.

    One fused kernel reads each weight once, where torch's default passes over all of them a dozen times: on a CPU a third of the
    optimizer's time, and no temporary copy of the weights.

    Args:
        config: the settings.
        groups: trained weights, as of torch's optimizers.
        rate: peak learning rate.
        step: optimizer steps done before.

    Example:
        >>> weights = torch.nn.Linear(2, 2).parameters()
        >>> make(TrainConfig("base-model", train_data_dir="my-images"), [{"params": list(weights)}], 1e-4).param_groups[0]["lr"]
        0.0001
    """
    if config.use_8bit_adam:
        import bitsandbytes

        kind: Any = bitsandbytes.optim.AdamW8bit
    else:
        kind = partial(torch.optim.AdamW, fused=True)
    adam = partial(kind, lr=rate, betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.adam_weight_decay, eps=config.adam_epsilon)  # fmt: skip
    by_weight = config.fused_backward_pass or config.full_bf16 or config.offload_optimizer
    optimizer: torch.optim.Optimizer = (
        ByWeight(adam, groups, seed=config.seed, step=step, in_backward=config.fused_backward_pass, offload=config.offload_optimizer)
        if by_weight
        else adam(groups)
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # what the schedule of a resumed run starts from
    return optimizer


def round_stochastically(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Round finite float32 to one of the two bfloat16 around it, the nearer one more likely, so that its mean is x.

    Args:
        x: float32, any shape.
        generator: on the device of x.

    Example:
        >>> x = torch.full((10_000,), 1 + 1 / 512)  # a quarter of the way from 1 to the next bfloat16
        >>> rounded = round_stochastically(x, torch.Generator().manual_seed(0))
        >>> sorted(set(rounded.tolist())), round(float((rounded > 1).float().mean()), 1)
        ([1.0, 1.0078125], 0.2)
    """
    # A bfloat16 is the upper half of a float32: random bits added to the lower half carry into it as often as they should.
    chance = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return chance.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class ByWeight(torch.optim.Optimizer):
    """Step each weight for itself: in `step`, or within the backward pass after `listen`.

    AdamW sees a stand-in of each weight: the weight itself, or of a bfloat16 one a copy in float32 that lives for its step. Random numbers
    are a function of (seed, step, place of the weight), so a resumed run rounds as the straight one does.

    Args:
        make: the optimizer's class with its options, which takes groups of weights.
        groups: trained weights, as of torch's optimizers; float32 or bfloat16.
        seed: of the rounding.
        step: steps done before.
        in_backward: weights change while `backward` goes on, and `step` only counts.
        offload: moments stay in CPU memory between steps.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> optimizer = ByWeight(torch.optim.SGD, [{"params": [weight], "lr": 1.0}], in_backward=True)
        >>> optimizer.listen()
        >>> weight.sum().backward()
        >>> weight.tolist(), weight.grad
        ([0.0, 0.0], None)
    """

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], groups: Sequence[dict[str, Any]], *, seed: int = 0, step: int = 0,
        in_backward: bool = False, offload: bool = False,
    ) -> None:  # fmt: skip
        # As accelerate's own wrapper, no call of the base's __init__: it would hold weights and state a second time.
        self.weights: list[torch.nn.Parameter] = [p for group in groups for p in group["params"]]
        self.stand_ins = [torch.nn.Parameter(torch.empty(0)) for _ in self.weights]
        ends, self._group = 0, list[int]()
        for i, group in enumerate(groups):
            self._group += [i] * len(group["params"])
            groups = [
                *groups[:i],
                {**group, "params": self.stand_ins[ends : (ends := ends + len(group["params"]))]},
                *groups[i + 1 :],
            ]
        self.inner = make(groups)
        self.seed, self.done, self.in_backward, self.offload = seed, step, in_backward, offload

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def listen(self) -> None:
        """Make each weight's step when its gradient is whole; to be called when the weights are where they stay."""
        for i, weight in enumerate(self.weights if self.in_backward else ()):
            weight.register_post_accumulate_grad_hook(lambda _, i=i: self._update(i))  # type: ignore[misc]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the weights that have not been, and count."""
        for i in range(len(self.weights)):
            self._update(i)
        self.done += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()  # what is on its way to the CPU is not there yet
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        for weight, stand_in in zip(
            self.weights, self.stand_ins, strict=True
        ):  # libraries bring moments to the weight's device
            stand_in.data = torch.empty(0, device="cpu" if self.offload else weight.device)
        self.inner.load_state_dict(state_dict)

    @torch.no_grad()
    def _update(self, i: int) -> None:
        weight, stand_in = self.weights[i], self.stand_ins[i]
        if weight.grad is None:
            return
        stand_in.data, stand_in.grad = weight.detach().float(), weight.grad.float()
        weight.grad = None
        groups = self.inner.param_groups
        all_of = [group["params"] for group in groups]
        for place, group in enumerate(groups):
            group["params"] = [stand_in] if place == self._group[i] else []
        try:
            self._visit(stand_in)
            self.inner.step()
            self._leave(stand_in)
        finally:
            for group, params in zip(groups, all_of, strict=True):
                group["params"] = params
        stand_in.grad = None
        if weight.dtype == torch.float32:  # the stand-in shares its memory, and autograd should know
            torch.autograd.graph.increment_version(weight)
        else:
            g = torch.Generator(weight.device).manual_seed(keyed_seed(self.seed, "rounding", self.done, i))
            weight.copy_(round_stochastically(stand_in, g))
        stand_in.data = torch.empty(0, device=weight.device)

    def _visit(self, stand_in: torch.nn.Parameter) -> None:
        """Bring the moments of a weight to it."""
        state = self.inner.state.get(stand_in, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = value.to(stand_in.device, non_blocking=True)

    def _leave(self, stand_in: torch.nn.Parameter) -> None:
        if not self.offload or stand_in.device.type == "cpu":
            return
        state = self.inner.state[stand_in]
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() == stand_in.numel() > 1:
                state[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(
                    value, non_blocking=True
                )
