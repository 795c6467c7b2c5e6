"""LoHa, LoKr and Tucker forms are read as the LoRA that they are.

References: the papers' formulas, `W + s (B1 A1) o (B2 A2)` and `W + s W1 (x) W2`, written into the base's weights, and peft's own layers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from ambient_sd.families import lora, lycoris, sgm
from ambient_sd.families.sd import SD
from ambient_sd.utils.errors import UserError

Tensors = dict[str, Tensor]
RANK, ALPHA = 2, 6.0
LINEAR, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.downsamplers.0.conv"
PLACES = (LINEAR, CONV, "conv_in")


def output(unet: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 16, 16, generator=g), torch.tensor([10, 500]), torch.randn(2, 24, 16, generator=g))
    with torch.no_grad():
        return unet.eval()(*inputs).sample


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_ij t[i, j, k] a[i, o] b[j, x], element by element of the core."""
    found = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            found += (a[i, :, None] * b[j])[..., None, None].double() * core[i, j].double()
    return found


def loha(shape: torch.Size, core: bool = False, rank: int = RANK) -> tuple[Tensors, Tensor]:
    """One layer's tensors, and dW / s by the formula."""
    out, inner, kernel = shape[0], shape[1], shape[2:]
    tensors: Tensors = {}
    halves = []
    for i in ("1", "2"):
        if core and kernel:
            t, a, b = torch.randn(rank, rank, *kernel), torch.randn(rank, out), torch.randn(rank, inner)
            tensors |= {f"hada_t{i}": t, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
            halves.append(tucker(t, a, b))
        else:
            a, b = torch.randn(out, rank), torch.randn(rank, shape[1:].numel())
            tensors |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b}
            halves.append((a.double() @ b.double()).reshape(shape))
    return tensors, halves[0] * halves[1]


def lokr(shape: torch.Size, first: str = "whole", second: str = "factors", rank: int = RANK) -> tuple[Tensors, Tensor]:
    out, inner, kernel = shape[0] // 4, shape[1] // 2, shape[2:]
    tensors: Tensors = {}
    if first == "whole":
        tensors["lokr_w1"] = w1 = torch.randn(4, 2)
    else:
        a, b = torch.randn(4, rank), torch.randn(rank, 2)
        tensors |= {"lokr_w1_a": a, "lokr_w1_b": b}
        w1 = a @ b
    if second == "whole":
        tensors["lokr_w2"] = w2 = torch.randn(out, inner, *kernel)
    elif second == "core" and kernel:
        t, a, b = torch.randn(rank, rank, *kernel), torch.randn(rank, out), torch.randn(rank, inner)
        tensors |= {"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}
        w2 = tucker(t, a, b)
    else:
        a, b = torch.randn(out, rank), torch.randn(rank, inner * kernel.numel() if kernel else inner)
        tensors |= {"lokr_w2_a": a, "lokr_w2_b": b}
        w2 = (a @ b).reshape(out, inner, *kernel)
    blocks = [torch.cat([w1[i, j].double() * w2.double() for j in range(2)], dim=1) for i in range(4)]
    return tensors, torch.cat(blocks)


FORMS: dict[str, Callable[[torch.Size], tuple[Tensors, Tensor]]] = {
    "loha": loha, "loha-core": lambda s: loha(s, core=True), "loha-beyond-full-rank": lambda s: loha(s, rank=7),
    "lokr": lokr, "lokr-core": lambda s: lokr(s, second="core"), "lokr-factors": lambda s: lokr(s, "factors"),
    "lokr-whole": lambda s: lokr(s, second="whole"), "lokr-first-alone": lambda s: lokr(s, "factors", "whole"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(16, 12), (12, 36), (16, 12, 3, 3), (16, 12, 1, 1), (64, 2, 3, 3)])
def test_the_product_is_the_formula(form: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors, wanted = FORMS[form](torch.Size(shape))
    kind, down, up = lycoris.as_lora(tensors, shape)
    assert kind.lower() == form.partition("-")[0] and down.dtype == up.dtype == torch.float32
    assert up.shape[1] == down.shape[0] <= min(shape[0], torch.Size(shape)[1:].numel())
    found = (up.flatten(1).double() @ down.flatten(1).double()).reshape(shape)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    name = next(name for name in tensors if name.endswith(("_b", "w2")))
    other = lycoris.as_lora({**tensors, name: tensors[name].flip(0)}, shape)
    assert not torch.allclose((other[2].flatten(1) @ other[1].flatten(1)).double(), wanted.flatten(1), atol=1e-2), (
        "control"
    )


def test_small_factors_survive_half_precision() -> None:
    torch.manual_seed(0)
    tensors, wanted = loha(torch.Size((64, 64)))
    small = {name: value * (1e-4 if name.endswith("_a") else 1.0) for name, value in tensors.items()}
    _, down, up = lycoris.as_lora(small, (64, 64))
    error = (up.half().double() @ down.half().double()) / 1e-8 - wanted
    assert float(error.abs().max() / wanted.abs().max()) < 2e-3
    naive = torch.einsum("oi,oj->oij", small["hada_w1_a"], small["hada_w2_a"]).half()
    assert not bool(naive.double().abs().max() > 2e-7), "control: as they stand they round to nothing"


def layers(form: str, unet: Any) -> tuple[dict[str, Tensors], Any]:
    """Three layers in one form, and the base with dW added by hand at the scale that LyCORIS gives it."""
    torch.manual_seed(3)
    found: dict[str, Tensors] = {}
    for path in PLACES:
        weight = unet.get_submodule(path).weight
        tensors, update = FORMS[form](weight.shape)
        tensors = {name: value * 0.3 for name, value in tensors.items()}
        found[path] = tensors | {"alpha": torch.tensor(ALPHA)}
        scale = (
            1.0 if form == "lokr-whole" else ALPHA / next(v for n, v in tensors.items() if n.endswith("_b")).shape[0]
        )
        weight.data += (scale * update * 0.3 ** len(tensors)).float()
    return found, unet


def file(found: dict[str, Tensors], name: Callable[[str], str]) -> Tensors:
    return {f"{name(path)}.{key}": value for path, tensors in found.items() for key, value in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_formulas_output(form: str) -> None:
    pipe = tiny.tiny_pipeline()
    before = output(pipe.unet)
    found, hand = layers(form, tiny.tiny_pipeline().unet)
    record = lora.load_lora(pipe, file(found, lambda path: "lora_unet_" + path.replace(".", "_")))
    wanted = output(hand)
    torch.testing.assert_close(output(pipe.unet), wanted, rtol=0, atol=3e-6 * max(1.0, float(wanted.abs().max())))
    assert not torch.allclose(wanted, before, atol=1e-2), "control: it is seen"
    whole = form == "lokr-whole"
    assert (record["kind"].lower(), record["layers"]) == (form.partition("-")[0], 3)
    assert (record["rank"], record["alpha"]) == (("whole", 1.0) if whole else (7 if "beyond" in form else RANK, ALPHA))
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.unet), before)


@pytest.mark.parametrize("form", ["loha", "lokr"])
def test_names_of_every_tool_are_one_model(form: str) -> None:
    found, _ = layers(form, tiny.tiny_pipeline().unet)
    theirs = sgm.names(tiny.tiny_pipeline().unet)
    expected = None
    for scheme, name in {
        "kohya": lambda path: "lora_unet_" + path.replace(".", "_"), "sgm": lambda path: "lora_unet_" + theirs[path].replace(".", "_"),
        "simpletuner": lambda path: "lycoris_" + path.replace(".", "_"), "ComfyUI": lambda path: "diffusion_model." + theirs[path],
        "PEFT": lambda path: "base_model.model." + path,
    }.items():  # fmt: skip
        pipe = tiny.tiny_pipeline()
        lora.load_lora(pipe, file(found, name))
        expected = output(pipe.unet) if expected is None else expected
        assert torch.equal(output(pipe.unet), expected), scheme


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("core", [False, True], ids=["flat", "core"])
def test_files_of_peft_give_its_own_output(config: Any, core: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ranks = {"rank_pattern": {"proj_in": 3}, "alpha_pattern": {"conv1": 1.5}}
    settings = config(r=RANK, alpha=6, target_modules=["to_q", "conv1", "proj_in", "conv_in"], use_effective_conv2d=core,
                      init_weights=False, **ranks)  # fmt: skip
    model: Any = get_peft_model(tiny.tiny_pipeline().unet, settings)
    model.save_pretrained(tmp_path)
    pipe, before = tiny.tiny_pipeline(), output(tiny.tiny_pipeline().unet)
    record = lora.load_lora(pipe, tmp_path)
    wanted = output(model)
    torch.testing.assert_close(output(pipe.unet), wanted, rtol=0, atol=5e-6 * max(1.0, float(wanted.abs().max())))
    assert not torch.allclose(wanted, before, atol=1e-3) and record["alpha_from"] == "adapter_config.json"
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"alpha": 6', '"alpha": 9'))
    other = tiny.tiny_pipeline()
    lora.load_lora(other, tmp_path)
    assert not torch.allclose(output(other.unet), wanted, atol=1e-4), "control: peft's alpha counts"


def test_a_mixed_file_is_read_layer_by_layer() -> None:
    """As LyCORIS's presets write it: another kind for attention, for convolutions, and a LoRA with a core."""
    pipe, hand = tiny.tiny_pipeline(), tiny.tiny_pipeline().unet
    torch.manual_seed(1)
    found: Tensors = {}
    for path, form in ((LINEAR, "loha"), ("conv_in", "lokr")):
        tensors, update = FORMS[form](hand.get_submodule(path).weight.shape)
        hand.get_submodule(path).weight.data += update.float()
        found |= {f"lora_unet_{path.replace('.', '_')}.{key}": value for key, value in tensors.items()}
    weight = hand.get_submodule(CONV).weight
    t, up, down = torch.randn(3, 3, 3, 3), torch.randn(3, weight.shape[0]), torch.randn(3, weight.shape[1])
    weight.data += tucker(t, up, down).float()
    name = "lora_unet_" + CONV.replace(".", "_")
    found |= {f"{name}.lora_mid.weight": t, f"{name}.lora_down.weight": down[..., None, None],
              f"{name}.lora_up.weight": up.T.contiguous()[..., None, None]}  # fmt: skip
    assert lora.load_lora(pipe, found)["kind"] == "LoHa + LoKr + LoRA"
    wanted = output(hand)
    torch.testing.assert_close(output(pipe.unet), wanted, rtol=0, atol=5e-6 * float(wanted.abs().max()))


def test_text_encoders_take_loha_and_lokr() -> None:
    pipe, hand = tiny.tiny_pipeline(), tiny.tiny_pipeline().text_encoder
    torch.manual_seed(1)
    found: Tensors = {}
    for i, form in enumerate(("loha", "lokr")):
        layer = dict(sgm.layers_in(hand))[next(n for n in sgm.layers_in(hand) if f"layers.{i}.mlp.fc1" in n)]
        tensors, update = FORMS[form](layer.weight.shape)
        layer.weight.data += update.float()
        found |= {f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.{key}": value for key, value in tensors.items()}
    assert lora.load_lora(pipe, found)["parts"] == {"text_encoder": 2}
    ids = torch.arange(6)[None]
    with torch.no_grad():
        ours, wanted = pipe.text_encoder(ids)[0], hand(ids)[0]
        assert not torch.allclose(wanted, tiny.tiny_pipeline().text_encoder(ids)[0], atol=1e-2), "control"
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


HADA = "lora_unet_conv_in.hada_w1_a"
REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "a factor missing": ("loha", lambda s: {k: v for k, v in s.items() if "w2_b" not in k}, "lacks 'hada_w2_a' or 'hada_w2_b'"),
    "a half missing": ("lokr", lambda s: {k: v for k, v in s.items() if "w1" not in k}, "lacks 'lokr_w1_a' or 'lokr_w1_b'"),
    "whole and factors": ("lokr", lambda s: s | {"lora_unet_conv_in.lokr_w1_a": torch.ones(4, 2)}, "lokr_w1"),
    "two ranks": ("loha", lambda s: s | {"lora_unet_conv_in.hada_w2_b": torch.ones(3, 36)}, "has factors of ranks [2, 3]"),
    "two kinds": ("loha", lambda s: s | {"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, "tensors of two kinds"),
    "LoRA too": ("loha", lambda s: s | {"lora_unet_conv_in.lora_up.weight": torch.ones(16, 2)}, "tensors of two kinds"),
    "another layer's shape": ("loha", lambda s: s | {HADA: torch.ones(15, 2)}, "for unet.conv_in"),
    "a core of another kernel": ("loha-core", lambda s: s | {"lora_unet_conv_in.hada_t1": torch.ones(2, 2, 1, 9)}, "the core of 'hada_w1' is"),
    "not a product": ("lokr-whole", lambda s: s | {"lora_unet_conv_in.lokr_w1": torch.ones(3, 2)}, "gives 12 x 36 where 16 x 36 is needed"),
    "another kernel": ("lokr-whole", lambda s: s | {"lora_unet_conv_in.lokr_w2": torch.ones(4, 2, 9, 1)}, "'lokr_w2' is (4, 2, 9, 1)"),
    "not finite": ("loha", lambda s: s | {HADA: s[HADA] * float("nan")}, "not finite"),
    "no layer": ("loha", lambda s: s | {"lora_unet_conv_end.hada_w1_a": s[HADA]}, "belong to no layer"),
    "no tensor of it": ("loha", lambda s: s | {"lora_unet_conv_in.hada_w3_a": s[HADA]}, "belong to no layer"),
    "zero": ("loha", lambda s: {k: v * ("hada_w2_b" not in k) for k, v in s.items()}, "changes no weight"),
    "columns": ("loha", lambda s: s | {f"lora_unet_{LINEAR.replace('.', '_')}.dora_scale": torch.ones(1, 32)}, "scales the columns"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_whole_is_refused_in_one_line(case: str) -> None:
    form, change, words = REFUSED[case]
    pipe = tiny.tiny_pipeline()
    found = file(layers(form, tiny.tiny_pipeline().unet)[0], lambda path: "lora_unet_" + path.replace(".", "_"))
    found = {name: value for name, value in found.items() if not name.endswith("alpha")}
    with pytest.raises(UserError) as error:
        lora.fit(lora.read_state_dict(change(found)), lora.parts_of(pipe), SD)
    assert words in str(error.value) and "\n" not in str(error.value)
    lora.fit(lora.read_state_dict(found), lora.parts_of(pipe), SD)  # control


@pytest.mark.parametrize("form", FORMS)
def test_no_malformed_file_raises_anything_else(form: str) -> None:
    draw = random.Random(form)
    found = file(layers(form, tiny.tiny_pipeline().unet)[0], lambda path: "lora_unet_" + path.replace(".", "_"))
    parts, refused = lora.parts_of(tiny.tiny_pipeline()), 0
    for _ in range(60):
        changed = dict(found)
        name = draw.choice(list(found))
        value = changed[name]
        match draw.randrange(6):
            case 0:
                del changed[name]
            case 1:
                shape = [draw.randrange(0, 4) for _ in range(draw.randrange(0, 5))]
                changed[name] = torch.ones(shape)
            case 2:
                changed[name] = value.flatten()
            case 3:
                changed[name] = value.T if value.dim() == 2 else value[None]
            case 4:
                changed[name] = value * 1e38
            case 5:
                changed[name.rpartition(".")[0] + "." + draw.choice(sorted(lycoris.NAMES))] = value
        try:
            lora.fit(lora.read_state_dict(changed), parts, SD)
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 30


def test_the_kind_that_settings_name_is_the_tensors() -> None:
    found = file(layers("loha", tiny.tiny_pipeline().unet)[0], lambda path: "unet." + path)
    given = lora.read_state_dict(found)
    for kind, fits in (("LOHA", True), ("LOKR", False), ("LORA", False)):
        head = {"lora_adapter_metadata": json.dumps({"unet.peft_type": kind, "unet.r": RANK, "unet.alpha": ALPHA})}
        adapter = lora.LoraFile("a", "a", "0", given.tensors, head)
        if fits:
            assert lora.fit(adapter, lora.parts_of(tiny.tiny_pipeline()), SD).record()["alpha"] == ALPHA
        else:
            with pytest.raises(UserError, match=r"of the kind LOKR|of the kind LORA|alpha"):
                lora.fit(adapter, lora.parts_of(tiny.tiny_pipeline()), SD)


def test_row_lengths_of_dora_act_on_loha() -> None:
    pipe, hand = tiny.tiny_pipeline(), tiny.tiny_pipeline().unet
    torch.manual_seed(2)
    layer = hand.get_submodule(LINEAR)
    tensors, update = loha(layer.weight.shape)
    lengths = torch.rand(layer.weight.shape[0], 1) + 0.5
    moved = layer.weight.data + update.float()
    layer.weight.data = lengths * moved / moved.norm(dim=1, keepdim=True)
    name = "lora_unet_" + LINEAR.replace(".", "_")
    lora.load_lora(pipe, {f"{name}.{key}": value for key, value in tensors.items()} | {f"{name}.dora_scale": lengths})
    torch.testing.assert_close(output(pipe.unet), output(hand), rtol=0, atol=1e-5)


def test_a_lycoris_file_stands_for_its_model(tmp_path: Path) -> None:
    """`sample my-loha.safetensors`: by its names alone it is an adapter, not a model."""
    found = file(layers("lokr", tiny.tiny_pipeline().unet)[0], lambda path: "lora_unet_" + path.replace(".", "_"))
    save_file(found, tmp_path / "mine.safetensors")
    assert lora.holds_lora(found) and lora.read(tmp_path / "mine.safetensors").tensors.keys() == found.keys()
    assert not lora.holds_lora({"lora_unet_conv_in.boft_blocks": torch.ones(1)})
