"""Each family names classes that exist, a model finds its own, and no other package branches on a model's name."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch

from ambient_sd.families import FAMILIES, SUPPORTED, guidance_of, of_class, of_pipeline, tokenizers_of
from ambient_sd.families.base import Model, check_base
from ambient_sd.families.sd import SD
from ambient_sd.families.sdxl import SDXL
from ambient_sd.sampling import SamplingConfig, load_pipeline
from ambient_sd.utils.errors import UserError

PACKAGE = Path(__file__).parents[2] / "ambient_sd"
# What only a family may know: classes of pipelines but the plain one, and parts that only some have.
NAMES = re.compile(r"(StableDiffusionXL|StableDiffusion3|Flux)\w*|is_xl|(tokenizer|text_encoder)_\d")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_names_classes_that_exist(family: Any) -> None:
    assert all(hasattr(diffusers, kind) for kind in family.guidance)
    assert family.pipeline in family.guidance
    assert all(hasattr(importlib.import_module(library), kind) for library, kind in family.parts.values())
    assert {g.network for g in family.guidance.values()} == {family.network}
    assert bool(family.parts) == bool(family.lora_prefixes) == (not family.unready)


def test_no_class_belongs_to_two_families() -> None:
    kinds = [kind for family in FAMILIES for kind in family.guidance]
    assert len(kinds) == len(set(kinds)) == len(SUPPORTED) - 1
    assert of_class("KandinskyPipeline") is None


def test_a_pipeline_finds_its_family_by_its_bases() -> None:
    pipe = tiny.tiny_sdxl_pipeline()

    class Mine(type(pipe)):  # type: ignore[misc]
        pass

    pipe.__class__ = Mine
    assert of_pipeline(pipe) is SDXL and guidance_of(pipe).pooled
    assert tokenizers_of(pipe) == [pipe.tokenizer, pipe.tokenizer_2]
    assert of_pipeline(tiny.tiny_pipeline()) is SD, "control"


def named(text: str) -> list[str]:
    """The names in a module's code and texts that only a family may know; docstrings may say them."""
    tree, found = ast.parse(text), []
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        texts = [getattr(node, key, None) for key in ("attr", "arg", "name")]
        texts += [node.id] if isinstance(node, ast.Name) else []
        texts += [node.value] if isinstance(node, ast.Constant) and id(node) not in told else []
        found += [text for text in texts if isinstance(text, str) and NAMES.search(text)]
    return found


def test_nothing_outside_families_names_a_model_class() -> None:
    seen = {str(path.relative_to(PACKAGE)): named(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name: found for name, found in seen.items() if found and not name.startswith("families")} == {}
    assert seen["families/sdxl.py"], "control: there they are"
    code = 'if pipe.is_xl and kind == "FluxPipeline": pipe.tokenizer_2'
    assert sorted(named(code)) == ["FluxPipeline", "is_xl", "tokenizer_2"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds its weights in the variant fp16 alone."""
    folder = tmp_path_factory.mktemp("half")
    tiny.tiny_pipeline().to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


def test_a_model_in_a_variant_loads_whole(half: Path) -> None:
    pipe = Model(str(half), variant="fp16").load_pipeline(torch.float16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float16}
    loaded = check_base(str(half), variant="fp16").load("unet")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.conv_in.weight.half(), pipe.unet.conv_in.weight)
    with pytest.raises(OSError, match="no file named"):
        Model(str(half)).load_pipeline()  # control: without it there are none
    for variant, words in (
        (None, "holds weights of the variant fp16 alone; give --variant fp16"),
        ("bf16", "it has fp16; leave variant out"),
    ):
        for check in (check_base, lambda name, variant: SamplingConfig(name, variant=variant).check()):
            with pytest.raises(UserError, match=words):
                check(str(half), variant=variant)


def test_a_part_without_the_variant_has_plain_weights(half: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "mixed"))
    shutil.rmtree(folder / "vae")
    tiny.tiny_pipeline().vae.save_pretrained(folder / "vae")
    base = check_base(str(folder), variant="fp16")
    plain = tiny.tiny_pipeline().vae.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in base.load("vae").state_dict().items())
    sampled = load_pipeline(SamplingConfig(str(folder), variant="fp16", device="cpu"))
    assert torch.equal(sampled.vae.decoder.conv_in.weight, plain["decoder.conv_in.weight"])


def test_a_skeleton_has_the_model_s_layers_without_weights(half: Path) -> None:
    parts = Model(str(half)).skeleton()
    assert parts.keys() == {"unet", "text_encoder"}
    assert {p.device.type for part in parts.values() for p in part.parameters()} == {"meta"}
    pipe = tiny.tiny_pipeline()
    for name, part in parts.items():
        assert {n: p.shape for n, p in part.named_parameters()} == {
            n: p.shape for n, p in getattr(pipe, name).named_parameters()
        }


@pytest.mark.parametrize("entry", [None, 3, "UNet2DConditionModel", ["os", "system"], ["diffusers", None], []])
def test_an_index_entry_that_is_no_class_builds_nothing(half: Path, tmp_path: Path, entry: Any) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "copy"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": entry}))
    assert Model(str(folder)).skeleton().keys() == {"unet"}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"_class_name": "FluxFillPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}, "its transformer is of a family that is not trained"),
        ({"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "x"]}, "its transformer is of a family that is not trained"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "inpainting"),
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "refiner"),
        ({"_class_name": "KandinskyPipeline"}, "StableDiffusionPipeline or a StableDiffusionXLPipeline"),
        ({"_class_name": None}, "_class_name = None"), ({}, "_class_name = None"),
    ],
)  # fmt: skip
def test_a_model_of_another_kind_is_refused_by_name(index: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words) as caught:
        assert Model(str(tmp_path)).family
    assert "\n" not in str(caught.value)


def test_a_place_that_is_no_model_is_named(tmp_path: Path) -> None:
    for name, words in (
        (str(tmp_path / "gone"), "there is no folder"), ("a/b/c", "there is no folder"), (str(tmp_path), "has no model_index"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            assert Model(name).family
