"""LoRA files in the names of Black Forest Labs' own layers, as kohya, ComfyUI and others write them: taken whole, and as the stock pipeline takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_flow
import torch

from ambient_sd.families import of_pipeline
from ambient_sd.families.family import Family
from ambient_sd.families.lora import load_lora
from ambient_sd.families.sgm import layers_in
from ambient_sd.utils.errors import UserError

PIPES: dict[str, Callable[[], Any]] = {
    "flux": tiny_flow.tiny_flux_pipeline, "klein": tiny_flow.tiny_klein_pipeline, "chroma": tiny_flow.tiny_chroma_pipeline,
}  # fmt: skip
each = pytest.mark.parametrize("name", PIPES)


def in_their_names(
    pipe: Any, family: Family, rank: int = 3
) -> dict[str, tuple[tuple[str, ...], torch.Tensor, torch.Tensor]]:
    """A random update of every layer that has a name of theirs: our layers, A and B by that name."""
    network, layers = pipe.transformer, layers_in(pipe.transformer)
    theirs = {name: (path,) for path, name in family.original_names(network).items()} | family.fused_names(network)
    g, made = torch.Generator().manual_seed(1), {}
    for name, paths in theirs.items():
        rows, width = sum(layers[path].weight.shape[0] for path in paths), layers[paths[0]].weight.shape[1]
        made[name] = paths, torch.randn(rank, width, generator=g), torch.randn(rows, rank, generator=g) * 0.02
    return made


def sampled(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    family = of_pipeline(pipe)
    return pipe(prompt=["a red disc"], height=32, width=32, num_inference_steps=1, generator=g, output_type="latent",
                **family.guided(pipe, 1.0, 1)).images  # fmt: skip


def kohya(made: dict[str, Any], alpha: float) -> dict[str, torch.Tensor]:
    state = {}
    for name, (_, down, up) in made.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return state


def comfy(made: dict[str, Any]) -> dict[str, torch.Tensor]:
    pairs = [(f"diffusion_model.{name}.lora_A.weight", f"diffusion_model.{name}.lora_B.weight") for name in made]
    return {
        key: half
        for keys, (_, *halves) in zip(pairs, made.values(), strict=True)
        for key, half in zip(keys, halves, strict=True)
    }


@each
def test_every_layer_but_the_last_modulation_has_their_name(name: str) -> None:
    pipe = PIPES[name]()
    covered = {path for paths, *_ in in_their_names(pipe, of_pipeline(pipe)).values() for path in paths}
    missing = {path for path in layers_in(pipe.transformer) if path not in covered}
    assert {path for path in missing if not path.startswith("distilled_guidance_layer.")} <= {"norm_out.linear"}


@each
@pytest.mark.parametrize("scheme", ["kohya", "ComfyUI"])
def test_their_layers_are_taken_apart_exactly(name: str, scheme: str) -> None:
    """Merged by hand: W + s B A with the rows of B cut where ours are."""
    pipe, merged = PIPES[name](), PIPES[name]()
    made = in_their_names(pipe, of_pipeline(pipe))
    record = load_lora(pipe, kohya(made, 6.0) if scheme == "kohya" else comfy(made))
    assert record["scheme"] == scheme
    assert record["layers"] == sum(len(paths) for paths, *_ in made.values())
    layers, scale = layers_in(merged.transformer), 2.0 if scheme == "kohya" else 1.0
    with torch.no_grad():
        for paths, down, up in made.values():
            update, at = scale * up @ down, 0
            for path in paths:
                weight = layers[path].weight
                weight += update[at : at + len(weight)]
                at += len(weight)
            assert at == len(update)
    torch.testing.assert_close(sampled(pipe), sampled(merged), rtol=0, atol=1e-3)
    assert not torch.allclose(sampled(pipe), sampled(PIPES[name]()), atol=1e-2), "negative control: it does something"


@pytest.mark.parametrize(
    ("name", "scheme"), [("flux", "kohya"), ("chroma", "kohya"), ("klein", "kohya"), ("klein", "ComfyUI")]
)
def test_stock_pipeline_loads_the_same_images(name: str, scheme: str) -> None:
    ours, stock = PIPES[name](), PIPES[name]()
    made = in_their_names(ours, of_pipeline(ours))
    # diffusers knows the widths of FLUX.1's own single blocks alone.
    made = {
        key: value
        for key, value in made.items()
        if "double_blocks" in key or (name == "klein" and "single_blocks" in key)
    }
    state = kohya(made, 6.0) if scheme == "kohya" else comfy(made)
    load_lora(ours, dict(state))
    stock.load_lora_weights(dict(state))
    torch.testing.assert_close(sampled(ours), sampled(stock), rtol=0, atol=1e-4)
    assert not torch.allclose(sampled(ours), sampled(PIPES[name]()), atol=1e-3), "negative control"


def test_what_is_left_over_or_does_not_fit_is_refused() -> None:
    pipe = PIPES["flux"]()
    before = sampled(pipe)
    made = in_their_names(pipe, of_pipeline(pipe))
    good = kohya(made, 6.0)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    for change, words in (
        ({"lora_unet_double_blocks_9_img_attn_qkv.lora_down.weight": torch.ones(3, 32)}, "belong to no layer"),
        ({f"{stem}.lora_up.weight": torch.ones(64, 3)}, "have 96 rows"),
        ({f"{stem}.dora_scale": torch.ones(96, 1)}, "for 3 layers at once"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(3, 32)}, "two tensors for one place"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_lora(pipe, {**good, **change})
        assert "U-Net" not in str(caught.value)
    assert torch.equal(sampled(pipe), before), "the pipeline is as it was"
