"""The protocol fits flow-matching transformers: a family of a few lines reads a tiny Flux as its own pipeline does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline
from guard import guard_tools as tools

from ambient_sd.families.family import Family
from ambient_sd.objective import AmbientObjective
from ambient_sd.schedule import NoiseSchedule


class PackedFlux(Family):
    """What FLUX.1 needs of the protocol to be trained: packed patches, a timestep in [0, 1], places of tokens."""

    name, pipeline = "a tiny Flux", "FluxPipeline"

    def inputs(self, embeddings: Mapping[str, torch.Tensor], sizes: Any, device: Any) -> dict[str, Any]:
        return {"encoder_hidden_states": embeddings["hidden"], "pooled_projections": embeddings["pooled"]}

    def predict(
        self, network: Any, x_t: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        batch, channels, high, wide = x_t.shape
        output = network(
            hidden_states=FluxPipeline._pack_latents(x_t, batch, channels, high, wide), timestep=timesteps / 1000, **inputs,
            txt_ids=torch.zeros(inputs["encoder_hidden_states"].shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, high // 2, wide // 2, "cpu", x_t.dtype), return_dict=False,
        )[0]  # fmt: skip
        return FluxPipeline._unpack_latents(output, 2 * high, 2 * wide, 2)


@torch.no_grad()
def test_a_packed_flow_network_is_read_as_its_pipeline_reads_it() -> None:
    pipe, family = tools.tiny_flux(), PackedFlux()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden, pooled, _ = pipe.encode_prompt(["a cat", "a dog"], None, "cpu")
    packed = FluxPipeline._pack_latents(noise, 2, 4, 8, 8)
    # One step from sigma 1 to 0 leaves x - v.
    out = pipe(prompt_embeds=hidden, pooled_prompt_embeds=pooled, latents=packed, num_inference_steps=1, height=16, width=16,
               output_type="latent").images  # fmt: skip
    flow = noise - FluxPipeline._unpack_latents(out, 16, 16, 2)
    inputs = family.inputs({"hidden": hidden, "pooled": pooled}, None, "cpu")
    found = family.predict(pipe.transformer, noise, torch.full((2,), 1000.0), inputs)
    torch.testing.assert_close(found, flow, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, -flow, atol=1e-2), "negative control: the sign matters"
    assert not torch.allclose(family.predict(pipe.transformer, noise, torch.full((2,), 1.0), inputs), flow, atol=1e-3)


@torch.no_grad()
def test_the_ambient_objective_takes_a_flow_family_s_output() -> None:
    pipe, family = tools.tiny_flux(), PackedFlux()
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    assert schedule.prediction_type == "flow_prediction"
    g = torch.Generator().manual_seed(1)
    x0, eps_n = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    timesteps = torch.tensor([800.0, 300.0])  # s = 4 and 0.43: on both sides of s_n
    batch = AmbientObjective(schedule, level=1.0).corrupt(x0, eps_n, timesteps, generator=g)
    assert batch.clean.tolist() == [False, True]
    hidden, pooled, _ = pipe.encode_prompt(["a cat", "a dog"], None, "cpu")
    inputs = family.inputs({"hidden": hidden, "pooled": pooled}, None, "cpu")
    assert family.predict(pipe.transformer, batch.x_t, timesteps, inputs).shape == batch.target.shape
