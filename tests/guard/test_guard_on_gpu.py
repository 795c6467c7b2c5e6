"""The guard on a pretended GPU: an idle one changes no bit, and no policy makes the host wait more often for more steps."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
from pretend_gpu import PretendGPU, pretend_gpu

from ambient_sd import MemorizationGuard
from ambient_sd.guard.by_name import available
from ambient_sd.guard.policies.base import Policy

# What a policy must be given, and what lets it act at all on a random network.
OPTIONS: dict[str, dict[str, Any]] = {
    "prompt_optimization": {"target": 1e-6, "max_steps": 2},
    "latent_optimization": {"target": 1e-6, "max_steps": 2},
    "sail": {"target": 1e-6, "max_steps": 2},
    "scale_cap": {"cap": 1.0},
    "despecification": {"strength": 1.0, "threshold": 0.0},
    "reanchoring": {"threshold": 0.0, "softer": "a dot"},
}
PIPELINES: dict[str, Callable[[], Any]] = {"sd": tiny.tiny_pipeline, "sdxl": tiny.tiny_sdxl_pipeline}


def sampled(
    pipe: Any, policy: Policy | None, *, steps: int = 3, guarded: bool = True, output_type: str = "np",
    prompts: Sequence[str] = ("a red dot", "a square"),
) -> tuple[Any, MemorizationGuard]:  # fmt: skip
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    options = {
        "num_inference_steps": steps,
        "height": 32,
        "width": 32,
        "output_type": output_type,
        "generator": generators,
    }
    guard = MemorizationGuard(pipe, policy)
    with guard if guarded else contextlib.nullcontext():
        return pipe(list(prompts), **options).images, guard


def waits(gpu: PretendGPU, sample: Callable[[], Any]) -> Counter[str]:
    gpu.places.clear()
    sample()
    return gpu.places.copy()


def on_device(name: str, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Any:
    pipe = PIPELINES[name]().to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "dtype"), [*(("sd", d) for d in (torch.float32, torch.bfloat16)), ("sdxl", torch.float32)]
)
def test_idle_guard_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    with pretend_gpu() as gpu:
        pipe = on_device(name, dtype)
        stock, _ = sampled(pipe, None, guarded=False)
        guarded, guard = sampled(pipe, None)
        assert (stock == guarded).all()
        ask = [lambda g=g: sampled(pipe, None, guarded=g) for g in (False, True)]
        without, watched = (waits(gpu, one) for one in ask)
        assert sum((watched - without).values()) <= 1, watched - without
    if dtype == torch.float32:
        _, off = sampled(on_device(name, device="cpu"), None)
        assert [r.score for r in guard.report] == pytest.approx([r.score for r in off.report], rel=1e-6)


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_policies_cost_no_wait_per_step(name: str) -> None:
    with pretend_gpu() as gpu:
        pipe, short = on_device(name), {"prompts": ["a dot"], "output_type": "latent"}
        own = {n: waits(gpu, lambda: sampled(pipe, None, steps=n, guarded=False, **short)) for n in (2, 3)}  # noqa: B023
        for kind, make in available().items():
            policy = make(**OPTIONS.get(kind, {}))
            few, many = (waits(gpu, lambda: sampled(pipe, policy, steps=n, **short)) - own[n] for n in (2, 3))  # noqa: B023
            assert sum(many.values()) == sum(few.values()), f"{kind}: {many - few}"


def test_a_policy_acts_as_on_the_cpu() -> None:
    policy = available()["prompt_optimization"](target=1e-6, max_steps=2)
    with pretend_gpu():
        images, guard = sampled(on_device("sd"), policy)
    off, other = sampled(on_device("sd", device="cpu"), policy)
    assert abs(images - off).max() < 1e-5
    assert [r.mitigated for r in guard.report] == [r.mitigated for r in other.report] == [True, True]


def test_a_wait_per_step_is_seen() -> None:
    """Negative control: a policy that looks at a number at every step."""

    class Looks(Policy):
        def step(self, step: Any) -> None:
            step.cond.sum().item()

    with pretend_gpu() as gpu:
        pipe = on_device("sd")
        few, many = (waits(gpu, lambda: sampled(pipe, Looks(), steps=steps)) for steps in (2, 3))  # noqa: B023
    assert sum(n for place, n in (many - few).items() if "test_guard_on_gpu" in place) == 1
