"""Timesteps, shift and weights of flow matching: diffusers' numbers where it has them, closed forms where it has none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ambient_sd.data.stream import SampleStream
from ambient_sd.families import SD, SD3
from ambient_sd.objective import AmbientObjective
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.training import noising
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.noising import FlowTimesteps, flow_weight
from ambient_sd.training.plan import check_family
from ambient_sd.utils.errors import UserError

FLOW = NoiseSchedule(1000, "flow_prediction")
DYNAMIC: dict[str, Any] = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.7])
def test_the_table_is_the_scheduler_s_own(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert torch.equal(FlowTimesteps(scheduler, "none", None, SD3.shift).table(1024), scheduler.timesteps)


@pytest.mark.parametrize("tokens", [64, 1024, 4096])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_shift_by_resolution_is_the_pipeline_s(tokens: int, kind: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type=kind)
    table = FlowTimesteps(scheduler, "none", None, SD3.shift).table(tokens)
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=[s / 1000 for s in range(1000, 0, -1)], mu=mu)
    torch.testing.assert_close(table, scheduler.timesteps, rtol=1e-5, atol=1e-3)
    plain = FlowTimesteps(scheduler, "none", 1.0, SD3.shift).table(tokens)
    assert torch.equal(plain, FlowMatchEulerDiscreteScheduler().timesteps), "a given shift stands in its place"
    assert not torch.allclose(table, plain, atol=1.0), "negative control"


def test_a_shift_multiplies_the_noise_level() -> None:
    one, three = (
        FlowTimesteps(FlowMatchEulerDiscreteScheduler(), "none", shift, SD3.shift).table(1) for shift in (1.0, 3.0)
    )
    inner = slice(1, None)  # the first is pure noise
    torch.testing.assert_close(FLOW.level(three[inner]), 3 * FLOW.level(one[inner]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("scheme", "options"), [("none", {}), ("cosmap", {}), ("logit_normal", {"logit_mean": -0.5, "logit_std": 0.8}), ("mode", {"mode_scale": 1.29})]
)  # fmt: skip
def test_draws_have_the_law_of_diffusers_scripts(scheme: str, options: dict[str, float]) -> None:
    draw, stream = (
        FlowTimesteps(FlowMatchEulerDiscreteScheduler(), scheme, None, SD3.shift, **options),
        SampleStream(1, 0),
    )
    mine = torch.stack([draw(stream, p, 1) for p in range(1500)]).sort().values
    given = {"logit_mean": None, "logit_std": None, "mode_scale": None} | options
    u = compute_density_for_timestep_sampling(scheme, 20_000, **given, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    theirs = FlowMatchEulerDiscreteScheduler().timesteps[(u * 1000).long()]
    gap = max(abs(float((theirs <= t).double().mean()) - (i + 0.5) / len(mine)) for i, t in enumerate(mine.tolist()))
    assert gap < 1.63 * math.sqrt(1 / len(mine) + 1 / len(theirs)), "Kolmogorov and Smirnov's distance at 1 %"


def test_u_shaped_draws_follow_their_density() -> None:
    draw, stream = FlowTimesteps(FlowMatchEulerDiscreteScheduler(), "u_shaped", None, SD3.shift), SampleStream(1, 0)
    v = 1 - torch.stack([draw(stream, p, 1) for p in range(1500)]).sort().values / 1000
    # The integral of cosh(4 (2u - 1)) from 0 to u, over that to 1.
    wanted = (1 + torch.sinh(4 * (2 * v.flip(0) - 1)) / math.sinh(4)) / 2
    placed = (torch.arange(len(v)) + 0.5) / len(v)
    assert float((wanted - placed).abs().max()) < 1.63 / math.sqrt(len(v)) + 0.01
    assert float(((v - 0.5).abs() < 0.1).float().mean()) < 0.05, "the middle is rare"


def test_a_place_has_one_timestep() -> None:
    draw, stream = (
        FlowTimesteps(FlowMatchEulerDiscreteScheduler(), "mode", None, SD3.shift, mode_scale=1.29),
        SampleStream(3, 0),
    )
    assert torch.equal(draw(stream, 5, 64), draw(stream, 5, 64))
    assert not torch.equal(draw(stream, 5, 64), draw(stream, 6, 64))


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers_scripts(scheme: str) -> None:
    sigma = torch.rand(64, generator=torch.Generator().manual_seed(0)).clamp(min=0.01)
    assert torch.equal(flow_weight(sigma, scheme), compute_loss_weighting_for_sd3(scheme, sigma))


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt"])
def test_the_preconditioned_loss_is_that_of_the_x0_prediction(scheme: str) -> None:
    g = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(6, 4, 8, 8, generator=g) for _ in range(3))
    t = torch.tensor([20.0, 100.0, 333.0, 500.0, 900.0, 1000.0])
    batch = noising.corrupt(AmbientObjective(FLOW, mode="plain"), x0, None, t, noise=noise, scheme=scheme, preconditioned=True)  # fmt: skip
    ours = batch.weight * (output - batch.target).square().flatten(1).mean(1)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * x0 + sigma * noise
    weight = compute_loss_weighting_for_sd3(scheme, sigma)
    theirs = (weight * (output * -sigma + noisy - x0).square()).flatten(1).mean(1)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-6)


def test_a_scheme_multiplies_the_ambient_weight() -> None:
    objective = AmbientObjective(FLOW, level=1.0)
    x0, t = torch.ones(3, 4, 2, 2), torch.tensor([300.0, 700.0, 900.0])
    plain, got = (noising.corrupt(objective, x0, x0, t, noise=x0, scheme=s) for s in ("none", "cosmap"))
    torch.testing.assert_close(got.weight, plain.weight * flow_weight(FLOW.sigma(t), "cosmap").float())
    assert torch.equal(got.target, plain.target)


@pytest.mark.parametrize(
    "given", [{"flow_shift": 3.0}, {"precondition_outputs": True}, {"weighting_scheme": "mode"}, {"weighting_scheme": "cosmap"}, {"max_sequence_length": 77}]
)  # fmt: skip
def test_options_of_flow_matching_are_refused_for_stable_diffusion(given: dict[str, Any]) -> None:
    config = TrainConfig("base", train_data_dir="images", **given)
    check_family(config, SD3)
    with pytest.raises(UserError, match=r"belongs to flow matching|read a fixed number of tokens"):
        check_family(config, SD)


@pytest.mark.parametrize(
    "given", [{"train_text_encoder": True, "lora": True}, {"lora": True, "lora_min_rank": 1}, {"lora": True, "output_kohya_format": True}]
)  # fmt: skip
def test_options_of_a_unet_are_refused_for_a_transformer(given: dict[str, Any]) -> None:
    config = TrainConfig("base", train_data_dir="images", **given)
    check_family(config, SD)
    with pytest.raises(UserError, match=r"is given for Stable Diffusion 3; .*; leave it out"):
        check_family(config, SD3)


def test_the_scale_of_the_mode_needs_the_mode() -> None:
    assert TrainConfig("base", train_data_dir="images", weighting_scheme="mode").mode_scale == 1.29
    with pytest.raises(UserError, match="mode_scale"):
        TrainConfig("base", train_data_dir="images", mode_scale=0.5)
