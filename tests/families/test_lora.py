"""The LoRA loader: five naming schemes are one model, what does not reach a layer is refused everywhere, and a refusal changes nothing.

References: the base with W + s B A written into its weights by hand, and diffusers' own loader for the files that it reads right.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ambient_sd import AmbientSDPipeline
from ambient_sd.cli import main
from ambient_sd.commands.audit import AuditSettings, Source
from ambient_sd.commands.audit.work import audit
from ambient_sd.commands.calibrate import CalibrateSettings
from ambient_sd.commands.calibrate.work import calibrate
from ambient_sd.commands.sample import SampleSettings
from ambient_sd.commands.sample.work import sample
from ambient_sd.families import lora, sgm
from ambient_sd.families.sd import SD
from ambient_sd.families.sdxl import SDXL
from ambient_sd.guard.calibration import FILE_NAME, Calibration
from ambient_sd.sampling import SamplingConfig, load_pipeline
from ambient_sd.training import adapters
from ambient_sd.utils.errors import UserError

ALPHA, RANK = 6.0, 2
TARGETS = ["attn1.to_q", "proj_in", "conv1", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in"]
SCHEMES = ("diffusers", "PEFT", "bare", "kohya", "ComfyUI")
KOHYA = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}
Tensors = dict[str, Tensor]


def adapted(pipe: Any, targets: list[str] = TARGETS, **config: Any) -> Any:
    """The U-Net with a LoRA of random A and B, strong enough to be seen in an image."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False, **config}
    pipe.unet.add_adapter(LoraConfig(target_modules=targets, **options))
    with torch.no_grad():
        for name, value in pipe.unet.named_parameters():
            if "lora_B" in name:
                value.mul_(0.3)
    return pipe.unet


def plain(unet: Any) -> Tensors:
    return {name: value.detach().clone().contiguous() for name, value in get_peft_model_state_dict(unet).items()}


def renamed(state: Tensors, name: Callable[[str, str], str], alpha: float | None = None) -> Tensors:
    """The same tensors as `name(layer, "A.weight" or "B.weight")`, with an alpha tensor each where one is given."""
    split = {key: key.split(".lora_", 1) for key in state}
    new = {name(layer, rest): state[key] for key, (layer, rest) in split.items()}
    if alpha is not None:
        new |= {
            name(layer, "A.weight").split(".lora_")[0] + ".alpha": torch.tensor(alpha) for layer, _ in split.values()
        }
    return new


def write(folder: Path, unet: Any, kind: Any) -> dict[str, Path]:
    """One LoRA under five naming schemes, each as its own tools write it."""
    state, theirs = plain(unet), sgm.names(unet)
    family = SDXL if kind is StableDiffusionXLPipeline else SD
    adapters.save(unet, folder / "diffusers", family)
    head = {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": ALPHA})}
    for name in ("PEFT", "bare", "kohya", "ComfyUI"):
        (folder / name).mkdir(parents=True)
    save_file(state, folder / "bare" / "mine.safetensors", metadata=head)
    adapters.save_kohya(unet, folder / "kohya", family)
    comfy = renamed(state, lambda layer, rest: f"diffusion_model.{theirs[layer]}.{KOHYA[rest]}", ALPHA)
    save_file(comfy, folder / "ComfyUI" / "any.safetensors")
    # peft's own files, from its own wrapper.
    fresh = tiny.tiny_sdxl_pipeline().unet if kind is StableDiffusionXLPipeline else tiny.tiny_pipeline().unet
    model: Any = get_peft_model(fresh, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=TARGETS))
    model.load_state_dict(
        {f"base_model.model.{k.replace('.weight', '.default.weight')}": v for k, v in state.items()}, strict=False
    )
    model.save_pretrained(folder / "PEFT")
    return {name: folder / name for name in SCHEMES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("schemes"), adapted(tiny.tiny_pipeline()), StableDiffusionPipeline)


def image(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(
        pipe("a cat", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt").images
    )


def config(base: Path, adapter: Path | None, **values: Any) -> SamplingConfig:
    return SamplingConfig(
        str(base), None if adapter is None else str(adapter), num_inference_steps=2, device="cpu", **values
    )


def by_hand(pipe: Any, state: Tensors, scale: float) -> Any:
    """The base with the updates added to its weights."""
    for name, down in state.items():
        if name.endswith("lora_A.weight"):
            layer, up = pipe.unet.get_submodule(name.split(".lora_")[0]), state[name.replace("lora_A", "lora_B")]
            update = up.flatten(1) @ down.flatten(1)
            layer.weight.data += scale * update.view_as(layer.weight)
    return pipe


# --- one model under five names


@pytest.mark.parametrize(
    "kind",
    [StableDiffusionPipeline, pytest.param(StableDiffusionXLPipeline, marks=pytest.mark.slow)],
    ids=["sd2", "sdxl"],
)
def test_five_naming_schemes_are_one_model(kind: Any, tiny_base: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    base, made = tiny_base, files
    if kind is StableDiffusionXLPipeline:
        base = tmp_path / "base"
        tiny.tiny_sdxl_pipeline().save_pretrained(base)
        made = write(tmp_path, adapted(tiny.tiny_sdxl_pipeline()), kind)
    stock = kind.from_pretrained(base)
    start, by_stock, ours = image(stock), {}, {}
    for name in ("diffusers", "kohya"):
        stock.load_lora_weights(made[name])
        by_stock[name] = image(stock)
        stock.unload_lora_weights()
    hand = image(by_hand(stock, load_file(made["bare"] / "mine.safetensors"), ALPHA / RANK))
    assert not torch.allclose(start, hand, atol=1e-2), "control: it is seen"
    python = AmbientSDPipeline.from_pretrained(base) if kind is StableDiffusionPipeline else None
    for name, place in made.items():
        settings = config(base, place)
        ours[name] = image(load_pipeline(settings))
        record = settings.lora()
        assert record is not None and (record["scheme"], record["rank"], record["alpha"]) == (name, RANK, ALPHA)
        tensors = load_file(next(place.glob("*.safetensors")))
        assert record["tensors"] == len(tensors)
        assert record["layers"] == sum(k.endswith(("lora_A.weight", "lora_down.weight")) for k in tensors)
        if python is not None:
            assert python.load_lora_weights(place) == record
            assert torch.equal(image(python), ours[name])
            python.unload_lora_weights()
    for name, found in ours.items():
        assert torch.equal(found, ours["diffusers"]), name
    assert all(torch.equal(found, ours[name]) for name, found in by_stock.items())
    torch.testing.assert_close(ours["diffusers"], hand, rtol=0, atol=2e-5)


def test_stock_diffusers_draws_the_base_for_three_of_them(tiny_base: Path, files: dict[str, Path]) -> None:
    """The fault: no tensor is loaded, a warning is logged, and images are the base's."""
    start = image(StableDiffusionPipeline.from_pretrained(tiny_base))
    for name in ("PEFT", "bare", "ComfyUI"):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
        # With alpha tensors diffusers raises: none of their names holds "lora".
        tensors = load_file(next(files[name].glob("*.safetensors")))
        pipe.load_lora_weights({name: value for name, value in tensors.items() if not name.endswith(".alpha")})
        assert torch.equal(image(pipe), start), name


@pytest.mark.slow
def test_audit_says_the_same_of_all_five(
    tiny_base: Path, tiny_images: Path, tmp_path: Path, files: dict[str, Path]
) -> None:
    def figures(adapter: Path | None, name: str) -> tuple[Any, Any]:
        found = audit(AuditSettings(
            Source(str(tiny_images)), tmp_path / name, config(tiny_base, adapter), num_images_per_prompt=1, num_prompts=1,
            features=("pixels",), resamples=10, attributed_prompts=0,
        )).found  # fmt: skip
        seen = (tmp_path / name / "images.jsonl").read_text()  # with the distance of each image
        return (found["verdict"], found["measures"], seen), found["model"].get("lora")

    measured = {name: figures(place, name) for name, place in files.items()}
    assert all(measured[name][0] == measured["diffusers"][0] for name in SCHEMES)
    assert [measured[name][1]["scheme"] for name in SCHEMES] == list(SCHEMES)
    base, none = figures(None, "base")
    assert base[2] != measured["diffusers"][0][2] and none is None, "control: another model has other figures"


@pytest.mark.parametrize("make", [tiny.tiny_pipeline, tiny.tiny_sd15_pipeline, tiny.tiny_sdxl_pipeline])
def test_text_encoders_are_loaded_as_stock_diffusers_does(make: Any, tmp_path: Path) -> None:
    pipe = make()
    kind, unet = type(pipe), plain(adapted(pipe, ["to_k"], lora_alpha=RANK))
    layers = {}
    for part in ("text_encoder", "text_encoder_2"):
        if (encoder := getattr(pipe, part, None)) is not None:
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False, target_modules=["q_proj", "fc1", "out_proj"]), encoder, "default")  # fmt: skip
            encoder.peft_config = {"default": LoraConfig()}
            layers[part] = plain(encoder)
    kind.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=unet, **{f"{part}_lora_layers": v for part, v in layers.items()}
    )
    make().save_pretrained(tmp_path / "base")
    stock, ours, flat = (kind.from_pretrained(tmp_path / "base", safety_checker=None) if kind is StableDiffusionPipeline
                         else kind.from_pretrained(tmp_path / "base") for _ in range(3))  # fmt: skip
    stock.load_lora_weights(tmp_path / "lora")
    record = lora.load_lora(ours, tmp_path / "lora")
    assert record["parts"].keys() == {"unet", *layers}
    assert torch.equal(image(stock), image(ours))
    # The same in kohya's names, with text_model, which newer encoders do not have.
    names = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te_" if len(layers) == 1 else "lora_te1_",
        "text_encoder_2": "lora_te2_",
    }
    kohya: Tensors = {}
    for part, state in {"unet": unet, **layers}.items():
        kohya |= renamed(state, lambda layer, rest, part=part: names[part] + ("" if part == "unet" else "text_model_")
                         + layer.removeprefix("text_model.").replace(".", "_") + "." + KOHYA[rest])  # fmt: skip
    assert lora.load_lora(flat, kohya)["scheme"] == "kohya"
    assert torch.equal(image(flat), image(ours))


def test_names_of_older_diffusers_are_read(tiny_base: Path) -> None:
    state = plain(adapted(tiny.tiny_pipeline(), ["to_q", "to_out.0"], lora_alpha=RANK))
    half = {"A.weight": "down.weight", "B.weight": "up.weight"}

    def oldest(layer: str, rest: str) -> str:
        block, _, last = layer.removesuffix(".0").rpartition(".")
        return f"unet.{block}.processor.{last}_lora.{half[rest]}"

    expected, pipe = None, StableDiffusionPipeline.from_pretrained(tiny_base)
    for named in (renamed(state, lambda layer, rest: f"unet.{layer}.lora_{rest}"), renamed(state, oldest),
                  renamed(state, lambda layer, rest: f"unet.{layer}.lora.{half[rest]}")):  # fmt: skip
        assert lora.load_lora(pipe, named)["scheme"] == "diffusers"
        ours = image(pipe)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(named)
        expected = ours if expected is None else expected
        assert torch.equal(ours, expected) and torch.equal(image(pipe), expected)
        pipe.unload_lora_weights()


def test_ranks_and_alphas_of_single_layers_are_kept(tiny_base: Path) -> None:
    unet = adapted(tiny.tiny_pipeline(), ["to_q", "to_k", "conv1"], rank_pattern={"to_k": 3, "conv1": 1})
    state = plain(unet)
    given = renamed(state, lambda layer, rest: f"lora_unet_{layer.replace('.', '_')}.{KOHYA[rest]}")
    alphas = {}
    for i, name in enumerate(sorted({name.split(".lora_")[0] for name in state})):
        if i % 3:  # a third says no alpha: its scale is 1
            alphas[name] = 0.5 + i
            given[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(alphas[name])
    pipe, hand = (StableDiffusionPipeline.from_pretrained(tiny_base) for _ in range(2))
    record = lora.load_lora(pipe, given)
    assert record["rank"] == [1, 2, 3] and record["alpha_from"] == "alpha tensors + not stated: the rank"
    for name in {name.split(".lora_")[0] for name in state}:
        rank = state[f"{name}.lora_A.weight"].shape[0]
        by_hand(hand, {k: v for k, v in state.items() if k.startswith(f"{name}.lora_")}, alphas.get(name, rank) / rank)
    torch.testing.assert_close(image(pipe), image(hand), rtol=0, atol=2e-5)
    stock = StableDiffusionPipeline.from_pretrained(tiny_base)
    stock.load_lora_weights(dict(given))
    assert not torch.allclose(image(stock), image(hand), atol=1e-3), "diffusers gives layers without alpha another's"


def test_rslora_dropout_and_convolution_shapes_follow_the_file(tiny_base: Path, tmp_path: Path) -> None:
    unet = adapted(tiny.tiny_pipeline(), ["to_q", "proj_in"], use_rslora=True, lora_dropout=0.5)
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in unet.peft_config["default"].to_dict().items()}
    head = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    save_file({f"unet.{k}": v for k, v in plain(unet).items()}, tmp_path / lora.WEIGHTS_NAME, metadata=head)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.load_lora_weights(tmp_path)
    assert not torch.equal(image(pipe), image(pipe)), "diffusers goes on dropping inputs while it samples"
    pipe.unload_lora_weights()
    lora.load_lora(pipe, tmp_path)
    hand = image(by_hand(StableDiffusionPipeline.from_pretrained(tiny_base), plain(unet), ALPHA / RANK**0.5))
    torch.testing.assert_close(image(pipe), hand, rtol=0, atol=2e-5)
    adapters.save(unet, tmp_path / "ours", SD)  # what we write is safe in diffusers too
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "ours")
    torch.testing.assert_close(image(pipe), hand, rtol=0, atol=2e-5)
    # Linear layers as 1 x 1 convolutions, as some trainers save them.
    flat = {f"unet.{k}": v[..., None, None] if v.dim() == 2 else v for k, v in plain(unet).items()}
    one, two = (StableDiffusionPipeline.from_pretrained(tiny_base) for _ in range(2))
    lora.load_lora(one, flat)
    lora.load_lora(two, {f"unet.{k}": v for k, v in plain(unet).items()})
    assert torch.equal(image(one), image(two))


def test_dora_is_loaded_under_three_names(tiny_base: Path) -> None:
    unet = adapted(tiny.tiny_pipeline(), ["to_q", "conv1"], use_dora=True, lora_alpha=RANK)
    state = plain(unet)
    for name in state:
        if "magnitude" in name:
            state[name] = state[name] * 1.5
    stock, ours, kohya = (StableDiffusionPipeline.from_pretrained(tiny_base) for _ in range(3))
    stock.load_lora_weights({f"unet.{k}": v for k, v in state.items()})
    assert lora.load_lora(ours, state)["kind"] == "DoRA"
    assert torch.equal(image(stock), image(ours))
    ends = {**KOHYA, "magnitude_vector": "dora_scale"}
    named = renamed(state, lambda layer, rest: f"lora_unet_{layer.replace('.', '_')}.{ends[rest]}")
    named = {
        k: v.reshape(-1, *[1] * (v.dim() if v.dim() > 1 else 2))[..., 0] if "dora" in k else v for k, v in named.items()
    }
    lora.load_lora(kohya, named)
    assert torch.equal(image(kohya), image(ours))
    dropped = StableDiffusionPipeline.from_pretrained(tiny_base)
    dropped.load_lora_weights(named)
    assert not torch.allclose(image(dropped), image(ours), atol=1e-3), "diffusers drops kohya's lengths with a warning"
    scale = next(k for k in named if "dora_scale" in k and "to_q" in k)
    with pytest.raises(UserError, match="scales the columns"):
        lora.load_lora(tiny.tiny_pipeline(), named | {scale: named[scale].T})


# --- what is refused


def first(state: Tensors, word: str = "lora_A") -> str:
    return next(name for name in state if word in name)


def without(state: Tensors, *names: str) -> Tensors:
    return {name: value for name, value in state.items() if name not in names}


def half_unknown(state: Tensors) -> Tensors:
    return {(name if i % 4 < 2 else name.replace("_blocks", "_stages").replace("mid_block", "mid_stage").replace("conv_in", "conv_begin")): value
            for i, (name, value) in enumerate(state.items())}  # fmt: skip


def swap(state: Tensors, word: str, change: Callable[[Tensor], Tensor]) -> Tensors:
    return state | {first(state, word): change(state[first(state, word)]).contiguous()}


COMMANDS = {
    "transformer": (lambda s: {k.replace("unet.", "transformer."): v for k, v in s.items()}, "made for a transformer"),
    "half": (half_unknown, "belong to no layer"),
    "unknown": (
        lambda s: s | {"unet.conv_end.lora_A.weight": torch.zeros(2, 4)},
        "the first is 'unet.conv_end.lora_A.weight'",
    ),
    "missing": (lambda s: without(s, first(s)), "no down (lora_A)"),
    "shape": (lambda s: swap(s, "lora_A", lambda v: torch.cat([v, v], 1)), "a shape that does not fit"),
}
REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = COMMANDS | {
    "no B": (lambda s: without(s, first(s, "lora_B")), "no up (lora_B)"),
    "no LoRA": (lambda s: {k.replace(".lora_A", "").replace(".lora_B", ".b"): v for k, v in s.items()}, "holds no LoRA"),
    "empty": (lambda s: {}, "holds no LoRA: 0 tensors"),
    "twice": (lambda s: s | {first(s).removeprefix("unet."): s[first(s)]}, "two tensors for one place"),
    "rank": (lambda s: swap(s, "lora_B", lambda v: torch.cat([v, v], 1)), "a shape that does not fit"),
    "not finite": (lambda s: swap(s, "lora_B", lambda v: v * float("nan")), "not finite"),
    "whole numbers": (lambda s: swap(s, "lora_B", lambda v: v.to(torch.int8)), "numbers of type torch.int8"),
    "zero": (lambda s: {k: v * ("lora_A" in k) for k, v in s.items()}, "changes no weight"),
    "alpha 0": (lambda s: s | {f"{first(s).split('.lora_')[0]}.alpha": torch.tensor(0.0)}, "alpha 0"),
    "alpha below 0": (lambda s: s | {f"{first(s).split('.lora_')[0]}.alpha": torch.tensor(-1.0)}, "below 0"),
    "alphas": (lambda s: s | {f"{first(s).split('.lora_')[0]}.alpha": torch.ones(3)}, "alpha is one number"),
    "lone alpha": (lambda s: s | {"unet.conv_out.alpha": torch.tensor(1.0)}, "no down (lora_A) for unet.conv_out"),
    "some lengths": (lambda s: s | {"unet.conv_in.lora_magnitude_vector": torch.ones(16)}, "magnitude in 1 of"),
    "another text encoder": (lambda s: s | {"text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 16)}, "belong to no layer"),
    "OFT": (lambda s: s | {"lora_unet_conv_in.oft_blocks": torch.ones(2, 2)}, "holds OFT"),
    "core": (lambda s: s | {"lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": torch.ones(2, 3, 3, 3)}, "a shape that does not fit"),
    "IA3": (lambda s: {"lora_unet_conv_in.on_input": torch.ones(1)}, "holds IA3"),
    "whole layers": (lambda s: s | {"base_model.model.conv_in.modules_to_save.weight": torch.ones(2)}, "layers trained whole"),
    "differences": (lambda s: s | {"lora_unet_conv_in.diff": torch.ones(2)}, "differences of whole weights"),
    "embedding": (lambda s: s | {"bundle_emb.cat.string_to_param.*": torch.ones(2)}, "textual inversion"),
}  # fmt: skip


@pytest.fixture(scope="module")
def state(files: dict[str, Path]) -> Tensors:
    return load_file(files["diffusers"] / lora.WEIGHTS_NAME)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return lora.parts_of(tiny.tiny_pipeline())


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_reach_a_layer_is_refused_in_one_line(case: str, state: Tensors, parts: dict[str, Any]) -> None:
    change, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        lora.fit(lora.read_state_dict(change(state)), parts, SD)
    assert words in str(error.value) and "\n" not in str(error.value)
    lora.fit(lora.read_state_dict(state), parts, SD)  # control


def test_an_adapter_with_any_unknown_tensor_cannot_pass(state: Tensors, parts: dict[str, Any]) -> None:
    draw_ = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz_.0123456789é\u202e"
    for _ in range(150):
        name = draw_.choice(list(state))
        kind = draw_.randrange(4)
        if kind == 0:  # a letter more
            at = draw_.randrange(len(name) + 1)
            name = name[:at] + draw_.choice(letters) + name[at:]
        elif kind == 1:  # a letter less
            at = draw_.randrange(len(name))
            name = name[:at] + name[at + 1 :]
        elif kind == 2:  # another layer, another scheme
            name = draw_.choice(["", "unet.", "lora_unet_", "diffusion_model.", "base_model.model.", "text_encoder."]) + "".join(
                draw_.choices(letters, k=12)) + draw_.choice(list(lora._ENDINGS))  # fmt: skip
        else:
            name = "".join(draw_.choices(letters, k=draw_.randrange(1, 30)))
        if name in state:
            continue
        rows = list(state.items())
        rows.insert(draw_.randrange(len(rows) + 1), (name, torch.ones(draw_.randrange(1, 3), 16)))
        with pytest.raises(UserError):
            lora.fit(lora.read_state_dict(dict(rows)), parts, SD)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 3}, "its settings say 3"), ({"use_dora": True}, "without all its magnitudes"),
        ({"lora_alpha": "much"}, "no finite number"), ({"peft_type": "LOHA"}, "of the kind LOHA"),
        ({"bias": "all"}, "trained with bias all"), ({"init_lora_weights": "pissa_niter_4"}, "began from pissa_niter_4"),
        ({"target_modules": ["to_q", "to_v"]}, "layers that its settings name"), ({"alpha_pattern": {"(a+)+$": 2}}, "no name of a layer"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"new_kind": 3}, "new_kind 3"),
    ],
)  # fmt: skip
def test_settings_that_change_the_meaning_are_refused(
    settings: dict[str, Any], words: str, state: Tensors, parts: dict[str, Any]
) -> None:
    file = lora.read_state_dict(state)
    head = {
        "lora_adapter_metadata": json.dumps(
            {f"unet.{k}": v for k, v in ({"r": RANK, "lora_alpha": 6} | settings).items()}
        )
    }
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        lora.fit(lora.LoraFile("a", "a", "0", file.tensors, head), parts, SD)
    head = {
        "lora_adapter_metadata": json.dumps(
            {"unet.r": RANK, "unet.alpha_pattern": {"to_q": 9.0}, "unet.lora_alpha": 6.0}
        )
    }
    found = lora.fit(lora.LoraFile("a", "a", "0", file.tensors, head), parts, SD)  # control
    assert {layer.alpha for layer in found.layers if layer.path.endswith("to_q")} == {9.0} and found.record()[
        "alpha"
    ] == [6.0, 9.0]
    for name in ("text_encoder_2.r", "transformer.r"):
        head = {"lora_adapter_metadata": json.dumps({name: 2})}
        with pytest.raises(UserError, match="which the base has not"):
            lora.fit(lora.LoraFile("a", "a", "0", file.tensors, head), parts, SD)


@pytest.mark.parametrize("verb", ["sample", "calibrate", "audit"])
@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_refuses_with_status_two(
    verb: str, case: str, state: Tensors, tiny_base: Path, tiny_images: Path, tmp_path: Path, capsys: Any
) -> None:
    change, words = COMMANDS[case]
    save_file(change(state), tmp_path / "a.safetensors", metadata={"format": "pt"})
    (tmp_path / "o.txt").write_text("a cat\n")
    more = {
        "sample": ["--prompt", "a"],
        "calibrate": ["--ordinary", str(tmp_path / "o.txt")],
        "audit": [str(tiny_images)],
    }
    with pytest.raises(SystemExit) as stop:
        main(
            [
                verb,
                str(tiny_base),
                *more[verb],
                "--adapter",
                str(tmp_path / "a.safetensors"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_compare_asks_for_the_base_of_an_adapter(
    files: dict[str, Path], tiny_base: Path, tiny_images: Path, tmp_path: Path, capsys: Any
) -> None:
    for place in (files["ComfyUI"], files["diffusers"]):
        with pytest.raises(SystemExit) as stop:
            main(["compare", f"a={place}", "--data", str(tiny_images), "--heldout", str(tiny_images), "--judge", str(tiny_base),
                  "--resolution", "32", "--out", str(tmp_path / "out")])  # fmt: skip
        assert stop.value.code == 2 and "is a LoRA of a base that nothing names" in capsys.readouterr().err


def test_a_dora_that_was_never_trained_changes_nothing_and_is_refused(tiny_base: Path, parts: dict[str, Any]) -> None:
    pipe = tiny.tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], use_dora=True))  # B is zero
    fresh = plain(pipe.unet)
    base = StableDiffusionPipeline.from_pretrained(tiny_base)
    before = image(base)
    with pytest.raises(UserError, match="changes no weight: its update is zero in all 16 layers"):
        lora.load_lora(base, fresh)
    assert torch.equal(image(base), before) and not hasattr(base.unet, "peft_config")
    longer = {k: v * 1.01 if "magnitude" in k else v for k, v in fresh.items()}
    lora.load_lora(base, longer)
    assert not torch.equal(image(base), before), "control: lengths alone are a change"


# --- a refusal leaves the pipeline as it was


def snapshot(pipe: Any) -> tuple[Any, ...]:
    parts = lora.parts_of(pipe)
    names = [
        (part, name, type(m).__name__, m.training) for part, net in parts.items() for name, m in net.named_modules()
    ]
    flags = [(part, name, p.requires_grad) for part, net in parts.items() for name, p in net.named_parameters()]
    peft = [
        (part, getattr(net, "_hf_peft_config_loaded", None), sorted(getattr(net, "peft_config", {})))
        for part, net in parts.items()
    ]
    return names, flags, peft, pipe.get_active_adapters() if peft[0][2] else None


@pytest.mark.parametrize("earlier", [False, True], ids=["bare", "after another"])
def test_a_refusal_changes_nothing(
    earlier: bool, tiny_base: Path, state: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = AmbientSDPipeline.from_pretrained(tiny_base)
    if earlier:
        pipe.load_lora_weights({k: v for k, v in state.items() if "to_q" in k}, adapter_name="one")
    kept, drawn = snapshot(pipe), image(pipe)
    with pytest.raises(UserError, match="belong to no layer"):
        pipe.load_lora_weights(half_unknown(state))
    assert snapshot(pipe) == kept
    # And where it is seen only afterwards: one value of one layer differs, or diffusers fails on the way.
    inject = type(pipe.unet).load_lora_adapter

    def spoilt(unet: Any, tensors: Tensors, **options: Any) -> None:
        name = first(tensors, "mid_block")
        inject(unet, {**tensors, name: tensors[name] + 1e-6}, **options)

    def broken(unet: Any, tensors: Tensors, **options: Any) -> None:
        inject(unet, tensors, **options)
        raise RuntimeError("the disk is gone")

    for wrong, words in ((spoilt, "did not reach the model whole: unet.mid_block"), (broken, "the disk is gone")):
        monkeypatch.setattr(type(pipe.unet), "load_lora_adapter", wrong)
        with pytest.raises(UserError, match=words):
            pipe.load_lora_weights(state)
        assert snapshot(pipe) == kept and torch.equal(image(pipe), drawn)
    monkeypatch.undo()
    pipe.load_lora_weights(state, adapter_name="two")
    assert not torch.equal(image(pipe), drawn), "control: it can still be loaded"
    with pytest.raises(UserError, match="there is an adapter 'two' already"):
        pipe.load_lora_weights(state, adapter_name="two")


def test_the_state_of_the_model_is_what_is_believed(tiny_base: Path, state: Tensors) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    adapter = lora.fit(lora.read_state_dict(state), lora.parts_of(pipe), SD)
    lora.attach(pipe, adapter, "mine")
    parts = lora.parts_of(pipe)
    assert lora.misplaced(parts, adapter, "mine") is None
    layer: Any = pipe.unet.mid_block.attentions[0].proj_in

    def spoil(change: Callable[[Any], object]) -> str | None:
        before = copy.deepcopy(layer.__dict__)
        change(layer)
        said = lora.misplaced(parts, adapter, "mine")
        layer.__dict__.clear()
        layer.__dict__.update(before)
        return said

    assert "scaled by 0.5" in str(spoil(lambda m: m.scaling.update(mine=0.5)))
    assert "not switched on" in str(spoil(lambda m: m.enable_adapters(False)))
    assert "not switched on" in str(spoil(lambda m: m.merge()))
    assert "other values for lora_B" in str(spoil(lambda m: m.lora_B["mine"].weight.data.mul_(1.001)))
    assert "has no update" in str(spoil(lambda m: m.delete_adapter("mine")))
    fewer = lora.fit(lora.read_state_dict({k: v for k, v in state.items() if "proj_in" not in k}), parts, SD)
    assert "the file has none for it" in str(lora.misplaced(parts, fewer, "mine"))


def test_half_precision_keeps_the_files_values(tiny_base: Path, state: Tensors) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.bfloat16)
    stock = StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.bfloat16)
    lora.load_lora(pipe, state)
    stock.load_lora_weights(dict(state))
    found = {k: v.dtype for k, v in pipe.unet.state_dict().items() if "lora_" in k}
    assert found == {k: v.dtype for k, v in stock.unet.state_dict().items() if "lora_" in k} and found


# --- which file


def test_the_file_of_a_folder_is_chosen_by_a_rule_that_is_said(
    files: dict[str, Path], state: Tensors, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(files["diffusers"], tmp_path / "ours")
    shutil.copy(files["kohya"] / adapters.KOHYA_NAME, tmp_path / "ours")
    assert lora.locate(tmp_path / "ours").name == lora.WEIGHTS_NAME
    assert lora.locate(tmp_path / "ours", weight_name=adapters.KOHYA_NAME).name == adapters.KOHYA_NAME
    assert lora.locate(tmp_path, subfolder="ours").name == lora.WEIGHTS_NAME
    assert lora.locate(files["bare"]).name == "mine.safetensors"  # the only one
    (tmp_path / "ours" / lora.WEIGHTS_NAME).rename(tmp_path / "ours" / "a.safetensors")
    (tmp_path / "pickle").mkdir()
    torch.save(state, tmp_path / "pickle" / "pytorch_lora_weights.bin")
    (tmp_path / "empty").mkdir()
    for place, words in {
        "ours": "holds 2 .safetensors files, 'a.safetensors'", "pickle": "pickle can run any code", "empty": "no .safetensors file",
        "pickle/pytorch_lora_weights.bin": "pickle can run any code", "nowhere/at/all": "no .safetensors file",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words):
            config(tiny_base, tmp_path / place).check()
    for options, words in (({"weight_name": "a.pt"}, "pickle"), ({"weight_name": "b.safetensors"}, "has no file"),
                           ({"use_safetensors": False}, "pickle"), ({"hotswap": True}, "hotswap")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            AmbientSDPipeline.from_pretrained(tiny_base).load_lora_weights(tmp_path / "ours", **options)


# --- what is written down, and the threshold beside it


def test_another_adapter_under_one_name_does_not_go_on(
    tiny_base: Path, tmp_path: Path, files: dict[str, Path], state: Tensors
) -> None:
    place = tmp_path / "mine.safetensors"
    shutil.copy(files["diffusers"] / lora.WEIGHTS_NAME, place)
    settings = SampleSettings(config(tiny_base, place), tmp_path / "out", ["a cat"])
    (record,) = sample(settings)
    known = settings.sampling.lora()
    assert known is not None and known["sha256"] == lora.read(place).sha256 and record["lora"] == known
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]["lora"] == known
    assert sample(settings) == [record]
    save_file({k: v * 1.0001 for k, v in state.items()}, place, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lora\.sha256 changed"):
        sample(settings)


def test_a_threshold_beside_a_lora_is_used_by_commands_and_python_alike(
    tiny_base: Path, tmp_path: Path, files: dict[str, Path]
) -> None:
    base, folder = (
        Path(shutil.copytree(tiny_base, tmp_path / "base")),
        Path(shutil.copytree(files["kohya"], tmp_path / "lora")),
    )
    calibrate(CalibrateSettings(config(base, None), ["a cat", "a dog"], num_images_per_prompt=1, fpr=0.5))
    found, _ = calibrate(CalibrateSettings(config(base, folder), ["a cat", "a dog"], num_images_per_prompt=1, fpr=0.5))
    assert found.lora is not None and found.lora["scheme"] == "kohya" and Calibration.load(folder) == found
    (record,) = sample(SampleSettings(config(base, folder), tmp_path / "out", ["a cat"]))
    assert record["threshold"] == found.threshold(2, 1)
    pipe = AmbientSDPipeline.from_pretrained(base)
    own = pipe.calibration
    assert own is not None and own != found
    for name in (None, "style"):
        pipe.load_lora_weights(folder, adapter_name=name)
        assert pipe.calibration == found
        (report,) = pipe("a cat", num_inference_steps=2, height=32, width=32).memorization
        assert report.threshold == record["threshold"] and report.threshold_origin == found.origin
        pipe.unload_lora_weights()
        assert pipe.calibration == own
    pipe.load_lora_weights(folder / adapters.KOHYA_NAME)
    assert pipe.calibration == found
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files["kohya"])
    assert pipe.calibration is None, "the model's own was measured without the adapter"
    (folder / FILE_NAME).write_text("{")
    pipe.unload_lora_weights()
    with pytest.raises(UserError, match="cannot be read"):
        pipe.load_lora_weights(folder)
    assert not hasattr(pipe.unet, "peft_config") and pipe.calibration == own


def test_a_checkpoint_with_a_weight_missing_does_not_resume(
    tmp_path: Path, files: dict[str, Path], state: Tensors
) -> None:
    def fresh() -> Any:
        unet = tiny.tiny_pipeline().unet
        adapters.attach(unet, rank=RANK, alpha=ALPHA, targets=TARGETS, seed=0)
        return unet

    unet = fresh()
    adapters.load(unet, files["diffusers"], SD)
    assert all(torch.equal(v, state[f"unet.{k}"]) for k, v in plain(unet).items())
    for change in (
        lambda s: without(s, first(s)),
        lambda s: s | {"unet.conv_out.lora_A.weight": torch.ones(2, 16, 3, 3)},
    ):
        save_file(change(state), tmp_path / lora.WEIGHTS_NAME, metadata={"format": "pt"})
        with pytest.raises(UserError, match="belongs to another adapter; 1 weights are missing, unknown"):
            adapters.load(fresh(), tmp_path, SD)
