"""The guard beside what users switch on for speed and memory: compilation, slicing, offload, half precision; hostile texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import guard_tools as tools
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from ambient_sd.guard.policies import Change, Policy, PromptOptimization, SamplingStart, ScalePolicy, Step
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.utils.errors import UserError


class Hides(Policy):
    """Hide a token and scale another's logit, for the second image: needs hooks inside the network."""

    def begin(self, start: SamplingStart) -> Change:
        weights, scale = (torch.ones(start.halves.cond.embeds.shape[:2]) for _ in range(2))
        weights[:, 3], scale[:, 2] = 0, 2.0
        return Change([False, True], token_weights=weights, key_scale=scale)


class Weaker(ScalePolicy):
    def scale(self, step: Step) -> torch.Tensor:
        return torch.full_like(step.norms[-1], 2.0)


POLICIES: list[Callable[[], Policy | None]] = [
    lambda: None, Hides, Weaker, lambda: PromptOptimization(1e-3, max_steps=1)
]  # fmt: skip


def guarded(pipe: Any, policy: Policy | None = None) -> tuple[torch.Tensor, list[Any]]:
    with MemorizationGuard(pipe, policy) as guard:
        images = tools.sample(pipe, tools.PROMPTS)
    return images, guard.report


# -- compilation ---------------------------------------------------------------------------------------------------


class Graphs:
    """A torch.compile backend that runs the graphs as they are and counts how often."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return module.forward(*args)

        return run


def small() -> Any:
    """A pipeline whose U-Net compiles fast."""
    pipe = tools.pipeline()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )  # fmt: skip
    return pipe


@pytest.mark.parametrize("way", ["wrapped", "in place", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_compiled_network_stays_compiled_is_scored_and_can_be_acted_on(way: str) -> None:
    torch._dynamo.reset()
    plain = small()
    pipe, graphs = small(), Graphs()
    if way == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend=graphs)
    elif way == "in place":
        pipe.unet.compile(backend=graphs)
    else:
        for module in pipe.unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":
                module.compile(backend=graphs)
    stock = tools.sample(pipe, tools.PROMPTS)  # compiled before any guard is on
    before, graphs.runs = tools.state(pipe), 0
    images, report = guarded(pipe)
    assert torch.equal(images, stock) and graphs.runs >= 3 and len(report[0].curve) == 3
    assert not tools.state_differs(pipe, before)
    for make in POLICIES[1:]:
        expected, expected_report = guarded(plain, make())
        images, report = guarded(pipe, make())
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
        assert [image.curve for image in report] == [pytest.approx(i.curve, rel=1e-3) for i in expected_report]
        assert [image.mitigated for image in report] == [image.mitigated for image in expected_report]
        assert not tools.state_differs(pipe, before)
    graphs.runs = 0
    assert torch.equal(tools.sample(pipe, tools.PROMPTS), stock) and graphs.runs >= 3


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_an_exception_in_a_compiled_network_leaves_it_as_before(way: str) -> None:
    torch._dynamo.reset()
    pipe = small()
    if way == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    stock = tools.sample(pipe, tools.PROMPTS)
    before = tools.state(pipe)

    def fail(*args: Any) -> Any:
        raise RuntimeError("inside")

    handle = pipe.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"), MemorizationGuard(pipe, Hides()):
        tools.sample(pipe, tools.PROMPTS)
    handle.remove()
    assert not tools.state_differs(pipe, before)
    assert torch.equal(tools.sample(pipe, tools.PROMPTS), stock)


def test_compiling_under_the_guard_is_refused() -> None:
    pipe = small()
    with MemorizationGuard(pipe):
        pipe.unet.compile(backend="eager")
        with pytest.raises(UserError, match="compiled while the guard was on"):
            tools.sample(pipe)


def test_aot_graphs_are_scored_too() -> None:
    torch._dynamo.reset()
    pipe = small()
    expected = guarded(pipe)[1]
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    stock = tools.sample(pipe, tools.PROMPTS)
    images, report = guarded(pipe)
    assert torch.equal(images, stock)
    assert report[0].curve == pytest.approx(expected[0].curve, rel=1e-3)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", POLICIES)
def test_attention_slicing_goes_on(make: Callable[[], Policy | None]) -> None:
    expected, _ = guarded(tools.pipeline(), make())
    pipe = tools.pipeline()
    pipe.enable_attention_slicing(1)
    stock = tools.sample(pipe, tools.PROMPTS)
    before = tools.state(pipe)
    images, _ = guarded(pipe, make())
    assert not tools.state_differs(pipe, before)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert torch.equal(images, stock) is (make() is None)


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offload_hooks_that_rewrite_forward_go_on(way: str, make: Callable[[], Policy | None]) -> None:
    """What enable_model_cpu_offload and enable_sequential_cpu_offload do to a network, with the CPU as the device."""
    expected, report = guarded(tools.pipeline(), make())
    pipe = tools.pipeline()
    if way == "model":
        cpu_offload_with_hook(pipe.unet, "cpu")
    else:
        cpu_offload(pipe.unet, "cpu", offload_buffers=True)
        assert all(p.is_meta for p in pipe.unet.parameters())
    images, got = guarded(pipe, make())
    assert torch.equal(images, expected) and got == report
    remove_hook_from_module(pipe.unet, recurse=True)


@pytest.mark.parametrize(
    ("way", "make"), [*(("model", make) for make in POLICIES), ("dispatch", POLICIES[0]), ("dispatch", POLICIES[3])]
)
def test_pipelines_that_offload_themselves_are_scored_and_go_on_offloading(
    way: str, make: Callable[[], Policy | None]
) -> None:
    """`enable_model_cpu_offload` itself, and accelerate's dispatch of a network, with the CPU as the device that runs.

    `enable_sequential_cpu_offload` fails there in accelerate, guard or no guard: of it there is only what the test above has.
    """
    expected, report = guarded(tools.pipeline(), make())
    pipe = tools.pipeline()
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        parts = {name: "cpu" for name, _ in pipe.unet.named_children()}
        dispatch_model(pipe.unet, parts, main_device="cpu", force_hooks=True)
    # The pipeline itself puts model hooks on anew after every run: what they are, not which objects.
    hooks = {name: type(getattr(module, "_hf_hook", None)) for name, module in pipe.unet.named_modules()}
    assert any(kind is not type(None) for kind in hooks.values())
    stock = tools.sample(pipe, tools.PROMPTS)
    for _ in range(2):  # the first run's end puts the hooks on anew
        images, got = guarded(pipe, make())
        assert torch.equal(images, expected) and got == report
        assert {n: type(getattr(m, "_hf_hook", None)) for n, m in pipe.unet.named_modules()} == hooks
    assert torch.equal(tools.sample(pipe, tools.PROMPTS), stock)

    class Fails(Policy):
        def step(self, step: Step) -> None:
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        guarded(pipe, Fails())
    assert torch.equal(tools.sample(pipe, tools.PROMPTS), stock)


def test_bfloat16_outputs_are_summed_in_float32() -> None:
    pipe = tools.pipeline("epsilon").to(torch.bfloat16)
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output[0].double()))
    stock = tools.sample(pipe, tools.PROMPTS)
    seen.clear()
    images, report = guarded(pipe)
    handle.remove()
    assert torch.equal(images, stock) and images.dtype == torch.bfloat16
    for i, image in enumerate(report):
        exact = [(out[2 + i] - out[i]).norm().item() for out in seen]
        assert image.curve == pytest.approx(exact, rel=1e-6)
        coarse = [(out[2 + i] - out[i]).bfloat16().square().sum().sqrt().item() for out in seen]
        assert coarse != pytest.approx(exact, rel=1e-6)
    for make in POLICIES[1:]:
        assert guarded(pipe, make())[0].dtype == torch.bfloat16


class Reads(TorchDispatchMode):
    """Count what makes a device wait: a number read off a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


def reads(pipe: Any, policy: Policy | None, on: bool = True, steps: int = 2, **how: Any) -> int:
    with Reads() as counter:
        if on:
            with MemorizationGuard(pipe, policy, **how):
                tools.sample(pipe, steps=steps)
        else:
            tools.sample(pipe, steps=steps)
    return counter.count


def test_watching_and_scaling_read_nothing_off_the_device_while_sampling() -> None:
    pipe = tools.pipeline("v_prediction", "dpm++")
    start = reads(pipe, None) - reads(pipe, None, on=False)  # the schedule's own checks, before the first step
    own = reads(pipe, None, on=False, steps=4)
    more = {"threshold": 1.0, "when": "flagged"}
    assert reads(pipe, None, steps=4) == own + start  # whatever the number of steps
    assert reads(pipe, Weaker(), steps=4) == reads(pipe, Weaker(), steps=4, **more) == own + start

    class Looks(Weaker):
        def scale(self, step: Step) -> torch.Tensor:
            float(step.norms[-1][0])
            return super().scale(step)

    assert reads(pipe, Looks(), steps=4) == own + start + 4  # negative control


# -- hostile texts -------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    "a" * 10_000,
    "\x00\x1b[2J\r\n\t\u202e",
    "<script>alert(1)</script>|`$(rm -rf)`",
    "../../etc/passwd",
    "é" * 50,
]


def test_hostile_prompts_pass_through_as_they_are() -> None:
    pipe = tools.pipeline()

    class Looks(PromptOptimization):
        def begin(self, start: SamplingStart) -> Change:
            ids, mask = start.token_ids, start.token_mask
            assert ids is not None and mask is not None and mask[:, 0].all() and ids.shape == (2 * len(HOSTILE), 24)
            assert mask.sum(1)[0] == 2 and mask.sum(1)[2] == 24  # nothing but BOS and EOS; cut off
            return super().begin(start)

    stock = tools.sample(pipe, HOSTILE, num_images_per_prompt=2, steps=1, negative_prompt=HOSTILE[::-1])
    with MemorizationGuard(pipe) as guard:
        images = tools.sample(pipe, HOSTILE, num_images_per_prompt=2, steps=1, negative_prompt=HOSTILE[::-1])
    assert torch.equal(images, stock)
    assert [image.prompt for image in guard.report] == [text for text in HOSTILE for _ in range(2)]
    assert [image.negative_prompt or "" for image in guard.report[::2]] == HOSTILE[::-1]
    assert json.loads(json.dumps([asdict(image) for image in guard.report]))[2]["prompt"] == "a" * 10_000
    with MemorizationGuard(pipe, Looks(1e-3, max_steps=1)) as guard:
        tools.sample(pipe, HOSTILE, num_images_per_prompt=2, steps=1)
    assert all(image.score >= 0 for image in guard.report)
