"""The anisotropy detector by hand-made tensors, and on a pipeline against the network's own outputs."""

from __future__ import annotations

import math
from typing import Any

import guard_tools as tools
import pytest
import torch

from ambient_sd.guard.anisotropy import Anisotropy, alignment, anisotropy
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError


def grid(*channels: float) -> torch.Tensor:
    """One image of 2 x 2 latent pixels, all with these channels."""
    return torch.tensor(channels).view(1, -1, 1, 1).repeat(1, 1, 2, 2)


def test_alignment_is_the_cosine_of_guidance_and_unconditional_prediction_at_each_pixel() -> None:
    uncond = grid(1.0, 0.0)
    for guidance, expected in (((2.0, 0.0), 1.0), ((-0.5, 0.0), -1.0), ((0.0, 3.0), 0.0), ((1.0, 1.0), math.sqrt(0.5))):
        assert alignment(cond=uncond + grid(*guidance), uncond=uncond).item() == pytest.approx(expected, abs=1e-6)
    # The mean over pixels of cosines over channels, not one cosine of everything: a pixel counts whatever its length.
    guidance = grid(1.0, 0.0)
    guidance[0, :, 0, 0] = torch.tensor([0.0, 100.0])
    assert alignment(cond=uncond + guidance, uncond=uncond).item() == pytest.approx(0.75, abs=1e-6)
    assert alignment(cond=uncond, uncond=uncond).item() == 0  # an empty prompt has no guidance


def test_alignment_is_per_image_and_in_float32_for_half_precision() -> None:
    uncond = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = uncond + torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = alignment(cond=cond, uncond=uncond)
    assert whole.shape == (3,) and torch.allclose(whole[1:2], alignment(cond=cond[1:2], uncond=uncond[1:2]))
    assert alignment(cond=cond.half(), uncond=uncond.half()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_is_recovered_from_every_parametrisation(kind: str) -> None:
    schedule = NoiseSchedule.from_scheduler(tools.pipeline(kind if kind != "sample" else "epsilon").scheduler)
    schedule = NoiseSchedule(schedule.num_train_timesteps, kind, schedule.alphas_cumprod)
    alpha, sigma = (float(x) for x in schedule.coefficients(41))
    x0, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]
    found = schedule.predicted_noise(output, sample=alpha * x0 + sigma * eps, timestep=41)
    assert torch.allclose(found, eps, atol=1e-9)


def test_score_weighs_both_terms() -> None:
    assert Anisotropy(norm=3.0, alignment=0.5, prompt_index=0).score() == 4.0
    assert Anisotropy(norm=3.0, alignment=0.5, prompt_index=0).score(1.0, 0.1) == pytest.approx(3.05)


@pytest.mark.parametrize(
    ("kind", "scheduler"), [("epsilon", "ddim"), ("v_prediction", "ddim"), ("v_prediction", "euler")]
)
def test_on_a_pipeline_it_is_the_same_from_the_networks_own_outputs(kind: str, scheduler: str) -> None:
    pipe = tools.pipeline(kind, scheduler)
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    tools.sample(pipe, steps=1)  # a pipeline's first call leaves attributes of its own
    before, seen = tools.state(pipe), []
    handle = pipe.unet.register_forward_hook(lambda *_: seen.append(1))
    found = anisotropy(pipe, tools.PROMPTS, num_images_per_prompt=2, latents=noise, num_inference_steps=50)
    handle.remove()
    assert len(seen) == 0  # nothing was sampled
    assert tools.state_differs(pipe, before) == [] and [a.prompt_index for a in found] == [0, 0, 1, 1]

    pipe.scheduler.set_timesteps(50)
    first = pipe.scheduler.timesteps[0]
    sample = pipe.scheduler.scale_model_input(noise * pipe.scheduler.init_noise_sigma, first)
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(tools.PROMPTS, "cpu", 2, True)
        high = [pipe.unet(sample, first, encoder_hidden_states=e).sample for e in (cond, uncond)]
        low = [pipe.unet(sample, 41, encoder_hidden_states=e).sample for e in (cond, uncond)]
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    alpha, sigma = (float(x) for x in schedule.coefficients(41))
    factor = float(schedule.alpha(int(first))) if kind == "v_prediction" else 1.0
    if kind == "v_prediction":
        low = [alpha * o + sigma * sample for o in low]
    for i, one in enumerate(found):
        assert one.norm == pytest.approx(factor * float((high[0][i] - high[1][i]).norm()), rel=1e-3)
        guidance, own = (low[0][i] - low[1][i]).flatten(1), low[1][i].flatten(1)
        cosines = (guidance * own).sum(0) / (guidance.norm(dim=0) * own.norm(dim=0))
        assert one.alignment == pytest.approx(float(cosines.mean()), abs=1e-4)


def test_an_empty_prompt_has_neither_norm_nor_alignment_and_bad_timesteps_are_refused() -> None:
    pipe: Any = tools.pipeline()
    (empty,) = anisotropy(pipe, "")
    assert empty.norm == pytest.approx(0, abs=1e-5)
    with pytest.raises(UserError, match="low_timestep is 1000"):
        anisotropy(pipe, "a cat", low_timestep=1000)
