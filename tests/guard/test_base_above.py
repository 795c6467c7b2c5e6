"""Base above a level, fine-tuned network below: the ends are the two networks to the bit, the middle is switching by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from ambient_sd import BaseAbove, MemorizationGuard, NoiseSchedule, policies
from ambient_sd.guard.base_above import acting_base
from ambient_sd.utils.errors import UserError

STEPS = 6


def drawn(pipe: Any, **options: Any) -> torch.Tensor:
    given = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "latent"}
    found: torch.Tensor = pipe(
        ["a cat", "a dog"], generator=torch.Generator().manual_seed(3), **(given | options)
    ).images
    return found


def with_lora(make: Callable[[], Any] = tiny.tiny_pipeline) -> Any:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return pipe


def by_hand(pipe: Any, level: float, on: Callable[[], None], off: Callable[[], None]) -> torch.Tensor:
    """Sample with the adapter switched between steps, by the timesteps of the schedule."""
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    pipe.scheduler.set_timesteps(STEPS)
    above = [float(schedule.level(int(t))) > level for t in pipe.scheduler.timesteps]
    assert 0 < sum(above) < STEPS  # otherwise the test says nothing

    def between(_: Any, step: int, __: Any, ___: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < STEPS:
            (off if above[step + 1] else on)()
        return {}

    (off if above[0] else on)()
    try:
        return drawn(pipe, callback_on_step_end=between)
    finally:
        on()


def test_ends_are_the_networks_themselves_and_the_middle_is_switching_by_hand() -> None:
    pipe = with_lora()
    tuned = drawn(pipe)
    pipe.unet.disable_adapters()
    base = drawn(pipe)
    pipe.unet.enable_adapters()
    assert not torch.equal(tuned, base)  # control: the adapter does something
    for level, expected in ((0, base), (1e9, tuned)):
        with BaseAbove(pipe, level):
            assert torch.equal(drawn(pipe), expected)
    with BaseAbove(pipe, 1.0):
        both = drawn(pipe)
    assert torch.equal(both, by_hand(pipe, 1.0, pipe.unet.enable_adapters, pipe.unet.disable_adapters))
    assert not torch.equal(both, tuned) and not torch.equal(both, base)
    assert torch.equal(drawn(pipe), tuned)  # everything is as before


def test_a_whole_fine_tune_takes_its_bases_u_net() -> None:
    pipe, other = tiny.tiny_pipeline(), tiny.tiny_pipeline(seed=1)
    tuned, base = drawn(pipe), drawn(other)
    text = tiny.tiny_pipeline()
    text.unet = other.unet
    base = drawn(text)  # the base's U-Net with the fine-tuned one's other parts
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    for level, expected in ((0, base), (1e9, tuned)):
        with BaseAbove(pipe, level, other.unet):
            assert torch.equal(drawn(pipe), expected)
            assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    acting = BaseAbove(pipe, 1.0, other.unet)
    both = drawn(pipe)
    assert not torch.equal(both, tuned) and not torch.equal(both, base)
    acting.remove()
    acting.remove()  # twice does no harm
    assert torch.equal(drawn(pipe), tuned) and "forward" not in pipe.unet.__dict__


@pytest.mark.parametrize("make", [tiny.tiny_sd15_pipeline, tiny.tiny_pipeline, tiny.tiny_sdxl_pipeline])
def test_it_works_under_the_guard_with_a_policy_and_other_samplers(make: Callable[[], Any]) -> None:
    pipe = with_lora(make)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # fractions of timesteps
    plain = drawn(pipe)
    with BaseAbove(pipe, 1.0), MemorizationGuard(pipe) as guard:
        watched = drawn(pipe)
        scores = [report.score for report in guard.report]
    with BaseAbove(pipe, 1.0):
        assert torch.equal(drawn(pipe), watched)  # watching changes nothing
    assert not torch.equal(watched, plain)
    with MemorizationGuard(pipe) as guard:
        drawn(pipe)
        assert [report.score for report in guard.report] != scores  # the guard sees the two networks
    with BaseAbove(pipe, 1.0), MemorizationGuard(pipe, policies.PromptOptimization(target=1e-6, max_steps=2)) as guard:
        assert not torch.equal(drawn(pipe), watched) and guard.report[0].mitigated


def test_mistakes_are_one_line_and_leave_the_pipeline_as_it_was() -> None:
    pipe = tiny.tiny_pipeline()
    for level, base, says in (
        (1.0, None, "has no LoRA"), (float("nan"), None, "level is nan"), (-1, None, "level is -1"),
        ("1.6", None, "level is '1.6'"), (None, None, "level is None"), (True, None, "level is True"),
        (1.0, tiny.tiny_sdxl_pipeline().unet, "the base's network has another"), (1.0, pipe.unet, "the pipeline's own network"),
        (1.0, "owner/base", "must be a U-Net"), (1.0, tiny.tiny_pipeline(seed=1).unet.to(torch.bfloat16), "is torch.bfloat16"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            BaseAbove(pipe, level, base)
    with pytest.raises(UserError, match="has no network"):
        BaseAbove(object(), 1.0)
    assert "forward" not in pipe.unet.__dict__
    adapted = with_lora()
    with BaseAbove(adapted, 1.0), pytest.raises(UserError, match="acts above a level already"):
        BaseAbove(adapted, 2.0)
    with BaseAbove(adapted, 1.0), pytest.raises(UserError, match="both sides of the level"):
        adapted.unet(torch.zeros(2, 4, 8, 8), torch.tensor([999, 0]), encoder_hidden_states=torch.zeros(2, 24, 16))
    adapted.unet.disable_adapters()
    with pytest.raises(UserError, match="the LoRA is disabled"):
        BaseAbove(adapted, 1.0)


def test_it_leaves_gradients_and_the_states_of_adapters_alone() -> None:
    pipe = with_lora()
    pipe.unet.requires_grad_(False)
    layers = [m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer)]
    layers[0].enable_adapters(False)
    tuned = drawn(pipe)
    with pytest.raises(UserError, match="the LoRA is disabled"):  # in one layer: below the level is not the whole LoRA
        BaseAbove(pipe, 1.0)
    layers[0].enable_adapters(True)
    pipe.unet.requires_grad_(False)
    assert not torch.equal(drawn(pipe), tuned)
    with BaseAbove(pipe, 1.0):
        drawn(pipe)
        with pytest.raises(RuntimeError, match="out of steps"):
            drawn(pipe, callback_on_step_end=out_of_steps)
    assert not any(p.requires_grad for p in pipe.unet.parameters()) and not any(m.disable_adapters for m in layers)


def out_of_steps(*_: Any) -> dict[str, Any]:
    raise RuntimeError("out of steps")


def test_removing_is_of_ones_own_and_works_under_what_others_put_around_the_network() -> None:
    pipe, other = tiny.tiny_pipeline(), tiny.tiny_pipeline(seed=1)
    tuned = drawn(pipe)
    stale = BaseAbove(pipe, 1.0, other.unet)
    stale.remove()
    with BaseAbove(pipe, 0, other.unet):
        base = drawn(pipe)
        stale.remove()
        assert torch.equal(drawn(pipe), base) and acting_base(pipe.unet) is other.unet
    assert torch.equal(drawn(pipe), tuned) and acting_base(pipe.unet) is None

    acting = BaseAbove(pipe, 0, other.unet)
    pipe.unet.forward = functools.partial(pipe.unet.forward)  # as a hook of accelerate puts another around it
    assert torch.equal(drawn(pipe), base)
    acting.remove()
    assert torch.equal(drawn(pipe), tuned)
