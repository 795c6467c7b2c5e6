"""Alignment by a reference model: the formula against a slow loop, and real images against their own and others' captions."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.audit.alignment import LEVELS, DiffusionAlignment
from ambient_sd.data.sources import load_rows
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError

PROMPTS = ["a cat", "the red dog", "a", "dog"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_error_is_the_mean_over_levels_of_the_distance_to_the_noise(prediction_type: str) -> None:
    pipe = tiny.tiny_pipeline(prediction_type)
    images = [r.image for r in load_rows(IMAGES, max_samples=3)]
    measure = DiffusionAlignment(pipe, resolution=16)
    got = measure.errors(images, [PROMPTS[:2], PROMPTS[1:3], PROMPTS[2:]])
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    with torch.no_grad():
        for i, image in enumerate(images):
            pixels = pipe.image_processor.preprocess(image.convert("RGB").resize((16, 16), 3))
            x0 = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
            for j in range(2):
                tokens = pipe.tokenizer(PROMPTS[i + j], padding="max_length", truncation=True, return_tensors="pt")
                context, parts = pipe.text_encoder(tokens.input_ids)[0], []
                for noise, level in zip(measure.noise[:, 0], LEVELS, strict=True):
                    t = int(schedule.timestep(level))
                    abar = schedule.alphas_cumprod[t].double()
                    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
                    out = pipe.unet(x_t.float(), t, context).sample
                    eps = out if prediction_type == "epsilon" else abar.sqrt() * out + (1 - abar).sqrt() * x_t
                    parts.append((eps - noise).square().mean())
                assert float(got[i, j]) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-5)


def test_alignment_holds_the_own_prompt_against_fixed_other_ones() -> None:
    pipe = tiny.tiny_pipeline("epsilon")
    images = [r.image for r in load_rows(IMAGES, max_samples=4)]
    measure = DiffusionAlignment(pipe, resolution=16, others=2, batch_size=3)
    chosen = measure.choose(PROMPTS)
    assert all(len(set(o)) == 2 and c not in o for c, o in zip(PROMPTS, chosen, strict=True))
    assert chosen == measure.choose(PROMPTS)
    errors = measure.errors(images, [[c, *o] for c, o in zip(PROMPTS, chosen, strict=True)])
    got = measure(images, PROMPTS)
    assert torch.allclose(got.value, errors[:, 1:].mean(1) - errors[:, 0], atol=1e-7)
    assert got.hit.tolist() == [bool(e[0] < e[1:].min()) for e in errors]


def test_images_that_the_judge_knows_fit_their_captions_better_than_others() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    rows = list(load_rows(IMAGES, split="base"))[::180]
    measure = DiffusionAlignment(pipe, resolution=64)
    images, captions = [r.image for r in rows], [r.caption for r in rows]
    right, wrong = measure(images, captions), measure(images, captions[3:] + captions[:3])
    assert right.hit.double().mean() > 0.5  # 0.2 by chance
    assert right.value.mean() > 2 * right.value.std() / len(rows) ** 0.5
    assert wrong.value.mean() < right.value.mean() / 2


def test_what_cannot_be_scored_is_one_line() -> None:
    pipe = tiny.tiny_pipeline("epsilon")
    with pytest.raises(UserError, match="multiple of the VAE's factor"):
        DiffusionAlignment(pipe, resolution=15)
    with pytest.raises(UserError, match="one prompt per image"):
        DiffusionAlignment(pipe, resolution=16)([], ["a"])
    with pytest.raises(UserError, match="1 different prompts"):
        DiffusionAlignment(pipe, resolution=16)([r.image for r in load_rows(IMAGES, max_samples=1)], ["a"])
