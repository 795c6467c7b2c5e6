"""Every name that is written is one that ComfyUI and AUTOMATIC1111 look up, and for the layer that it is of.

The rules of their tables are written out here from reading `comfy/lora.py`, `comfy/utils.py` (`unet_to_diffusers`) and
`extensions-builtin/Lora/networks.py` (`convert_diffusers_name_to_compvis`): names on the left, the original model's layers on the right.
diffusers' own single-file conversion says which original layer is which of diffusers'.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from ambient_sd.families import sgm
from ambient_sd.families.family import Family
from ambient_sd.families.sd import SD
from ambient_sd.families.sdxl import SDXL
from ambient_sd.training import adapters

Names = dict[str, str]
_WIDTHS: dict[str, Any] = {
    "sample_size": 16,
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": {
        "block_out_channels": (8, 8, 8), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
}  # fmt: skip
CONFIGS["sd2"] = {**CONFIGS["sd1"], "use_linear_projection": True}
FAMILIES: dict[str, Family] = {"sd1": SD, "sd2": SD, "sdxl": SDXL}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = [*(f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")), "ff.net.0.proj", "ff.net.2"]
BASIC = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
CLIP = {f"{block}.{x}": f"{block}_{x}".replace(".", "_") for block, names in
        {"mlp": ("fc1", "fc2"), "self_attn": ("q_proj", "k_proj", "v_proj", "out_proj")}.items() for x in names}  # fmt: skip


def original(config: dict[str, Any]) -> Names:
    """ComfyUI's unet_to_diffusers: diffusers' layers -> the original model's."""
    depths = config.get("transformer_layers_per_block", (1,) * len(config["block_out_channels"]))
    found = dict(BASIC)

    def block(ours: str, theirs: str, i: int, depth: int) -> None:
        found.update({f"{ours}.resnets.{i}.{a}": f"{theirs}.0.{b}" for a, b in RESNET.items()})
        attend(f"{ours}.attentions.{i}", f"{theirs}.1", depth)

    def attend(ours: str, theirs: str, depth: int) -> None:
        if depth:
            found.update({f"{ours}.{x}": f"{theirs}.{x}" for x in ("proj_in", "proj_out")})
        inner = [f"transformer_blocks.{t}.{x}" for t in range(depth) for x in ATTENTION]
        found.update({f"{ours}.{x}": f"{theirs}.{x}" for x in inner})

    down, up, per = config["down_block_types"], config["up_block_types"], 2
    for x, kind in enumerate(down):
        for i in range(per):
            block(f"down_blocks.{x}", f"input_blocks.{1 + 3 * x + i}", i, depths[x] if "Attn" in kind else 0)
        found[f"down_blocks.{x}.downsamplers.0.conv"] = f"input_blocks.{3 + 3 * x}.0.op"
    attend("mid_block.attentions.0", "middle_block.1", depths[-1])
    for i, n in enumerate((0, 2)):
        found.update({f"mid_block.resnets.{i}.{a}": f"middle_block.{n}.{b}" for a, b in RESNET.items()})
    for x, kind in enumerate(up):
        depth = depths[::-1][x] if "Attn" in kind else 0
        for i in range(per + 1):
            block(f"up_blocks.{x}", f"output_blocks.{3 * x + i}", i, depth)
        found[f"up_blocks.{x}.upsamplers.0.conv"] = f"output_blocks.{3 * x + 2}.{2 if depth else 1}.conv"
    return found


def comfy(kind: str) -> Callable[[str], str | None]:
    """ComfyUI's key maps of U-Net and text encoders: a name in the file -> the layer of the original model."""
    table = original(CONFIGS[kind])
    known = {
        "lora_unet_" + name.replace(".", "_"): layer
        for pair in table.items()
        for name, layer in ((pair[0], pair[1]), (pair[1], pair[1]))
    }
    # diffusers' names of its first years, without which nothing follows `unet.`
    for name, layer in table.items():
        older = name.replace(".to_", ".processor.to_")
        older = older.removesuffix(".0") if older.endswith(".to_out.0") else older
        known |= {older: layer, f"unet.{older}": layer}
    first = {"sd1": "clip_l", "sd2": "clip_h", "sdxl": "clip_l"}[kind]
    for i in range(32):
        for name, flat in CLIP.items():
            for prefix, clip in (
                ("lora_te_", first),
                ("lora_te1_", first),
                ("lora_te2_", "clip_g" if kind == "sdxl" else ""),
            ):
                if clip:
                    known[f"{prefix}text_model_encoder_layers_{i}_{flat}"] = f"{clip}.{i}.{name}"
    return known.get


def webui(kind: str) -> Callable[[str], str | None]:
    """AUTOMATIC1111's conversion, and the names of the original model's modules among which it looks the result up."""
    layers = original(CONFIGS[kind])
    modules = {"diffusion_model_" + layer.replace(".", "_"): layer for layer in layers.values()}
    open_clip = {"self_attn.out_proj": "attn_out_proj", "mlp.fc1": "mlp_c_fc", "mlp.fc2": "mlp_c_proj"}
    for i in range(2):
        for name, flat in CLIP.items():
            there = open_clip.get(name, "attn")  # one nn.MultiheadAttention holds q, k and v
            if kind == "sd1":
                modules[f"transformer_text_model_encoder_layers_{i}_{flat}"] = f"clip_l.{i}.{name}"
            elif kind == "sd2":
                modules[f"model_transformer_resblocks_{i}_{there}"] = (
                    f"clip_h.{i}.{name if there != 'attn' else 'attn'}"
                )
            else:
                modules[f"0_transformer_text_model_encoder_layers_{i}_{flat}"] = f"clip_l.{i}.{name}"
                modules[f"1_model_transformer_resblocks_{i}_{there}"] = (
                    f"clip_g.{i}.{name if there != 'attn' else 'attn'}"
                )
    suffix = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }

    def inside(what: str, rest: str) -> str:
        return f"{1 if what == 'attentions' else 0}_{suffix.get(rest, rest) if what == 'resnets' else rest}"

    def text(rest: str) -> str:
        return rest.replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")

    rules: list[tuple[str, Callable[[Any], str]]] = [
        (r"lora_unet_conv_in(.*)", lambda m: f"diffusion_model_input_blocks_0_0{m[1]}"),
        (r"lora_unet_conv_out(.*)", lambda m: f"diffusion_model_out_2{m[1]}"),
        (r"lora_unet_time_embedding_linear_(\d+)(.*)", lambda m: f"diffusion_model_time_embed_{int(m[1]) * 2 - 2}{m[2]}"),
        (r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
         lambda m: f"diffusion_model_input_blocks_{1 + int(m[1]) * 3 + int(m[3])}_{inside(m[2], m[4])}"),
        (r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
         lambda m: f"diffusion_model_middle_block_{1 if m[1] == 'attentions' else int(m[2]) * 2}_{inside(m[1], m[3])[2:]}"),
        (r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
         lambda m: f"diffusion_model_output_blocks_{int(m[1]) * 3 + int(m[3])}_{inside(m[2], m[4])}"),
        (r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"diffusion_model_input_blocks_{3 + int(m[1]) * 3}_0_op"),
        (r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
         lambda m: f"diffusion_model_output_blocks_{2 + int(m[1]) * 3}_{2 if int(m[1]) > 0 else 1}_conv"),
        (r"lora_te_text_model_encoder_layers_(\d+)_(.+)",
         lambda m: f"model_transformer_resblocks_{m[1]}_{text(m[2])}" if kind == "sd2" else f"transformer_text_model_encoder_layers_{m[1]}_{m[2]}"),
        (r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", lambda m: f"1_model_transformer_resblocks_{m[1]}_{text(m[2])}"),
    ]  # fmt: skip

    def look_up(key: str) -> str | None:
        found = next((make(m) for rule, make in rules if (m := re.match(rule, key))), key)
        if found not in modules and (m := re.match(r"(.*)_([qkv]_proj)$", found)):
            found = m[1]
        if found not in modules and "lora_unet" in key:
            found = key.replace("lora_unet", "diffusion_model")
        elif found not in modules and "lora_te1_text_model" in key:
            found = key.replace("lora_te1_text_model", "0_transformer_text_model")
        return modules.get(found)

    return look_up


TENSORS = {
    "lora": {"lora_up.weight", "lora_down.weight", "alpha"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "lokr": {"lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "alpha"},
}


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    """A U-Net with a published model's blocks at toy width, and text encoders."""
    pipe = tiny.tiny_sdxl_pipeline() if request.param == "sdxl" else tiny.tiny_pipeline()
    names = ("text_encoder", "text_encoder_2")[: 1 + (request.param == "sdxl")]
    unet: Any = UNet2DConditionModel(**{**_WIDTHS, **CONFIGS[request.param]})
    return request.param, unet, {name: getattr(pipe, name) for name in names}


def test_the_original_layers_are_those_of_diffusers_conversion(model: tuple[str, Any, dict[str, Any]]) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    kind, unet, _ = model
    table = {name: layer for name, layer in original(CONFIGS[kind]).items() if name in sgm.layers_in(unet)}
    assert table.keys() == sgm.layers_in(unet).keys()
    given = {
        f"model.diffusion_model.{layer}.{end}": torch.tensor(float(i))
        for i, layer in enumerate(table.values())
        for end in ("weight", "bias")
    }
    config = {**unet.config, "class_embed_type": None}
    found = convert_ldm_unet_checkpoint(dict(given), config)
    for i, name in enumerate(table):
        assert float(found[f"{name}.weight"]) == i, name


@pytest.mark.parametrize(
    ("model", "adapter"),
    [("sd1", "lora"), ("sd2", "lora"), ("sdxl", "lora"), ("sd1", "loha"), ("sdxl", "lokr")],
    indirect=["model"],
)
def test_every_name_written_is_looked_up(model: tuple[str, Any, dict[str, Any]], adapter: str, tmp_path: Path) -> None:
    kind, unet, text = copy.deepcopy(model)
    family, own = FAMILIES[kind], original(CONFIGS[kind])
    paths = list(sgm.layers_in(unet))
    adapters.attach(unet, rank=1, alpha=2.0, targets=paths, seed=0, kind=adapter)
    for part, encoder in text.items():
        adapters.attach(
            encoder, rank=1, alpha=2.0, targets=[*adapters.TEXT_TARGETS, "fc1", "fc2"], seed=0, kind=adapter, part=part
        )
    adapters.save_kohya(unet, tmp_path, family, text)
    names = list(load_file(tmp_path / adapters.KOHYA_NAME))
    assert {name.partition(".")[2] for name in names} <= TENSORS[adapter]
    keys = {name.partition(".")[0] for name in names}
    expected = {own[path] for path in paths}
    clips = {"text_encoder": "clip_h" if kind == "sd2" else "clip_l", "text_encoder_2": "clip_g"}
    expected |= {f"{clips[part]}.{i}.{name}" for part in text for i in range(2) for name in CLIP}
    seen = {key: comfy(kind)(key) for key in keys}
    assert set(seen.values()) == expected and len(keys) == len(expected), "ComfyUI"
    merged = {"clip_h", "clip_g"}  # of open_clip: q, k and v are one layer
    by_webui = {re.sub(r"self_attn\.[qkv]_proj", "attn", x) if x.partition(".")[0] in merged else x for x in expected}
    found = {key: webui(kind)(key) for key in keys}
    assert set(found.values()) == by_webui, "AUTOMATIC1111"
    for look_up in (comfy(kind), webui(kind)):
        assert look_up("lora_unet_down_blocks_7_resnets_0_conv1") is None, "control: not every name"
    # Of the file for diffusers ComfyUI would take the layers outside attention alone, and AUTOMATIC1111 none: it is not theirs.
    family.save_lora(tmp_path, {"unet": adapters.plain(unet)})
    other = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / adapters.WEIGHTS_NAME)}
    assert {name for name in other if comfy(kind)(name) is None} == {name for name in other if ".to_" in name}
    assert not any(webui(kind)(name.replace(".", "_")) for name in other)


def output(unet: Any, added: dict[str, Any]) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    inputs = (torch.randn(2, 4, 16, 16, generator=g), torch.tensor([10, 500]), torch.randn(2, 24, width, generator=g))
    with torch.no_grad():
        return unet.eval()(*inputs, added_cond_kwargs=added).sample


@pytest.mark.parametrize(
    ("make", "adapter"),
    [(tiny.tiny_pipeline, "loha"), (tiny.tiny_sdxl_pipeline, "lora"), (tiny.tiny_sdxl_pipeline, "lokr")],
    ids=["sd-loha", "sdxl-lora", "sdxl-lokr"],
)
def test_stock_diffusers_gives_every_layers_update(make: Callable[[], Any], adapter: str, tmp_path: Path) -> None:
    pipe = make()
    family = SDXL if isinstance(pipe, StableDiffusionXLPipeline) else SD
    added = {"text_embeds": torch.ones(2, 20), "time_ids": torch.ones(2, 6)} if family is SDXL else {}
    before = output(pipe.unet, added)
    adapters.attach(pipe.unet, rank=2, alpha=3.0, targets=list(sgm.layers_in(pipe.unet)), seed=0, kind=adapter)
    with torch.no_grad():
        for parameter in [p for p in pipe.unet.parameters() if p.requires_grad]:
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    wanted = output(pipe.unet, added)
    adapters.save(pipe.unet, tmp_path, family)
    adapters.save_kohya(pipe.unet, tmp_path, family)
    close = {"rtol": 0, "atol": 1e-5 * float(wanted.abs().max())}
    assert not torch.allclose(before, wanted, atol=1e-2), "control"
    for name in (adapters.WEIGHTS_NAME, *([adapters.KOHYA_NAME] if adapter == "lora" else [])):
        stock = make()
        stock.load_lora_weights(tmp_path, weight_name=name)
        torch.testing.assert_close(output(stock.unet, added), wanted, **close)
