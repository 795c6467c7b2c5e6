"""Captions and images become what the stock pipelines make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_flow import tiny_sd3_pipeline

from ambient_sd.families import base as base_module
from ambient_sd.families.base import check_base
from ambient_sd.families.encoders import CaptionEncoder, ImageEncoder
from ambient_sd.families.sd import SD


@pytest.fixture(scope="module")
def pipe(tiny_base: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_base)


def test_captions_are_embedded_as_the_pipeline_embeds_a_prompt(pipe: StableDiffusionPipeline) -> None:
    encoder = CaptionEncoder(SD, {"tokenizer": pipe.tokenizer, "text_encoder": pipe.text_encoder})
    captions = ["a red disc 1", "", "a caption much longer than the context of the tokenizer allows"]
    expected = [pipe.encode_prompt(c, "cpu", 1, False)[0][0] for c in captions]
    assert torch.allclose(encoder(captions)["hidden"], torch.stack(expected), atol=1e-6)
    on_the_fly = encoder(captions)
    assert not encoder.hold(captions, limit=100)
    assert encoder.held == {}
    assert encoder.hold(captions, limit=2**30)
    assert torch.equal(encoder(captions)["hidden"], on_the_fly["hidden"])


def test_latents_are_the_posterior_s_mean_and_spread(pipe: StableDiffusionPipeline) -> None:
    """With a draw of zeros x0 is the posterior's mean, scaled as `vae.config` says."""
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = ImageEncoder(SD, pipe.vae)
    assert encoder.shape((48, 32)) == (4, 16, 24)
    x0, one = encoder(pixels, torch.zeros(2, 4, 16, 24)), encoder(pixels, torch.ones(2, 4, 16, 24))
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(x0, posterior.mode() * pipe.vae.config.scaling_factor)
    torch.testing.assert_close(one - x0, posterior.std * pipe.vae.config.scaling_factor)


def test_a_large_text_encoder_is_held_in_bfloat16_where_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_sd3_pipeline().save_pretrained(tmp_path)
    base = check_base(str(tmp_path))
    whole = base.captions(half=True)(["a cat"])
    assert {p.dtype for m in base.captions(half=True).models for p in m.parameters()} == {torch.float32}, (
        "none is large"
    )
    size = sum(p.numel() for p in base.outline("text_encoder_3").parameters())
    monkeypatch.setattr(base_module, "LARGE_ENCODER", size - 1)
    halved, alike = base.captions(half=True), base.captions()
    dtypes = {name: m.dtype for name, m in halved.parts.items() if name.startswith("text_encoder")}
    assert dtypes["text_encoder_3"] == torch.bfloat16
    assert {m.dtype for m in alike.models} == {torch.float32}
    found = halved(["a cat"])
    assert {v.dtype for v in found.values()} == {torch.float32}
    torch.testing.assert_close(found["hidden"], whole["hidden"], rtol=0.05, atol=0.05)
    assert not torch.equal(found["hidden"], whole["hidden"]), "negative control"
