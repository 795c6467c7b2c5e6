"""LoRA files in the names of the authors' own layers, as kohya, ComfyUI and others write them: taken whole, and as diffusers' own converters take them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tiny_flow
import tiny_more
import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.loaders import lora_conversion_utils, single_file_utils

from ambient_sd.families import of_pipeline
from ambient_sd.families.family import Family
from ambient_sd.families.lora import fit, load_lora, read_state_dict
from ambient_sd.families.lumina2 import LUMINA2
from ambient_sd.families.sgm import layers_in
from ambient_sd.utils.errors import UserError

PIPES: dict[str, Callable[[], Any]] = {
    "flux": tiny_flow.tiny_flux_pipeline, "klein": tiny_flow.tiny_klein_pipeline, "chroma": tiny_flow.tiny_chroma_pipeline,
    "sd3": tiny_flow.tiny_sd3_pipeline, "z-image": tiny_more.tiny_z_image_pipeline, "lumina2": tiny_more.tiny_lumina2_pipeline,
    "auraflow": tiny_more.tiny_auraflow_pipeline,
}  # fmt: skip
CONVERTERS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "z-image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "auraflow": single_file_utils.convert_auraflow_transformer_checkpoint_to_diffusers,
}
each = pytest.mark.parametrize("name", PIPES)


def in_their_names(
    pipe: Any, family: Family, rank: int = 3
) -> dict[str, tuple[tuple[str, ...], torch.Tensor, torch.Tensor]]:
    """A random update of every layer that has a name of theirs: our layers, A and B by that name."""
    network, layers = pipe.transformer, layers_in(pipe.transformer)
    theirs = {name: (path,) for path, name in family.original_names(network).items()} | family.fused_names(network)
    theirs |= {name: (path,) for path, name in family.swapped_names(network).items()}
    g, made = torch.Generator().manual_seed(1), {}
    for name, paths in theirs.items():
        weights = [layers[path].weight for path in paths]
        rows, ones = sum(weight.shape[0] for weight in weights), [1] * (weights[0].dim() - 2)
        down = torch.randn(rank, *weights[0].shape[1:], generator=g)
        made[name] = paths, down, torch.randn(rows, rank, *ones, generator=g) * 0.02
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
def test_layers_without_their_name_are_called_alike(name: str) -> None:
    pipe = PIPES[name]()
    covered = {path for paths, *_ in in_their_names(pipe, of_pipeline(pipe)).values() for path in paths}
    missing = {path for path in layers_in(pipe.transformer) if path not in covered}
    alike = {
        "sd3": r"context_embedder", "chroma": r"distilled_guidance_layer\..*", "lumina2": r"x_embedder",
        "z-image": r"(\w+\.\d\.(feed_forward\.w\d|adaLN_modulation\.0)|cap_embedder\.1|t_embedder\.mlp\.\d)",
    }  # fmt: skip
    assert {path for path in missing if not re.fullmatch(alike.get(name, ""), path)} == set()


@pytest.mark.parametrize("name", CONVERTERS)
def test_updates_are_those_of_diffusers_own_conversion(name: str) -> None:
    """Their whole model of updates B A, converted as a checkpoint is: every layer's is the one that we read."""
    pipe = PIPES[name]()
    made, family = in_their_names(pipe, of_pipeline(pipe)), of_pipeline(pipe)
    adapter = fit(read_state_dict(comfy(made)), {"transformer": pipe.transformer}, family)
    whole = Whole({f"{key}.weight": product(up, down) for key, (_, down, up) in made.items()})
    whole |= {f"{path}.weight": torch.zeros_like(layer.weight) for path, layer in layers_in(pipe.transformer).items() if path == "context_embedder"}  # fmt: skip
    expected = CONVERTERS[name](whole)
    assert len(adapter.layers) > len(made) / 2
    for layer in adapter.layers:
        assert torch.equal(product(layer.up, layer.down), expected[f"{layer.path}.weight"]), layer.path
    for path, key in family.swapped_names(pipe.transformer).items():
        _, down, up = made[key]
        assert not torch.equal(product(up, down), expected[f"{path}.weight"]), "negative control: as the file has it"


class Whole(dict[str, torch.Tensor]):
    """A checkpoint whose other tensors, which no update changes, are zeros."""

    def pop(self, key: str, default: Any = None) -> torch.Tensor:  # type: ignore[override]
        return super().pop(key, torch.zeros(6))


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def test_lumina_s_updates_are_those_of_diffusers_own_conversion() -> None:
    """Its converter knows the published widths alone."""
    with torch.device("meta"):
        network = Lumina2Transformer2DModel(num_layers=1, num_refiner_layers=1, cap_feat_dim=8)
    layers, names = layers_in(network), LUMINA2.originals
    assert names is not None
    theirs = {name: (path,) for path, name in names.single(network).items()} | names.several(network)
    g, state = torch.Generator().manual_seed(0), {}
    for name, paths in theirs.items():
        if name.split(".")[0] in names.blocks:
            state[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(
                1, layers[paths[0]].weight.shape[1], generator=g
            )
            state[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(sum(layers[path].weight.shape[0] for path in paths), 1, generator=g)  # fmt: skip
    adapter = fit(read_state_dict(dict(state)), {"transformer": network}, LUMINA2)
    expected = lora_conversion_utils._convert_non_diffusers_lumina2_lora_to_diffusers(dict(state))
    ours = {f"transformer.{layer.path}.{key}": value for layer in adapter.layers for key, value in layer.tensors()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())


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
            update, at = scale * product(up, down), 0
            if paths[0] in of_pipeline(pipe).swapped_names(pipe.transformer):
                update = torch.cat(update.chunk(2)[::-1])
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
        ({"lora_unet_final_layer_adaLN_modulation_1.dora_scale": torch.ones(64, 1)}, "whose halves are swapped"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(3, 32)}, "two tensors for one place"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_lora(pipe, {**good, **change})
        assert "U-Net" not in str(caught.value)
    assert torch.equal(sampled(pipe), before), "the pipeline is as it was"
