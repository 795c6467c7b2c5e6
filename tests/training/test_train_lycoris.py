"""LoHa and LoKr that are trained: resumed to the bit, saved for stock diffusers and in LyCORIS's format, continued.

References: the network that was trained, stock diffusers' loader, and LyCORIS's formula on the tensors of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ambient_sd.families.lora import load_lora
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.training import adapters, results, sharding
from ambient_sd.training.adapters import KOHYA_NAME, WEIGHTS_NAME
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.training.plan import base_of, plan_run
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]
LAYERS = ["to_q", "to_out.0", "proj_in", "conv1", "downsamplers.0.conv"]
KINDS = ("loha", "lokr")


def result(config: TrainConfig, name: str = KOHYA_NAME) -> dict[str, Tensor]:
    return load_file(Path(config.output_dir) / name)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def output(unet: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 16, 16, generator=g), torch.tensor([10, 500]), torch.randn(2, 24, 16, generator=g))
    with torch.no_grad():
        return unet.eval()(*inputs).sample


@pytest.fixture
def kind_of(settings: Settings) -> Settings:
    def make(kind: str, name: str = "out", **values: Any) -> TrainConfig:
        return settings(
            name, **{"lora_kind": kind, "rank": 2, "lora_alpha": 3.0, "lora_target_modules": LAYERS} | values
        )

    return make


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig], tuple[Any, dict[str, Any]]]:
    """Train; return the network that was trained, and its text encoders."""

    def train(config: TrainConfig) -> tuple[Any, dict[str, Any]]:
        seen: list[Any] = []
        write = results.write

        def look(folder: Path, unet: Any, base: Any, config: TrainConfig, text: Any) -> None:
            seen.append((unet, text))
            write(folder, unet, base, config, text)

        monkeypatch.setattr(results, "write", look)
        run(config, progress=False)
        return seen[0]

    return train


def by_formula(path: Path, unet: Any) -> Any:
    """The base with each layer's update added as LyCORIS, ComfyUI and AUTOMATIC1111 compute it from the file."""
    tensors, layers = load_file(path), {n.replace(".", "_"): m for n, m in unet.named_modules() if hasattr(m, "weight")}
    for key in {name.partition(".")[0] for name in tensors}:
        mine = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{key}.")}
        layer = layers[key.removeprefix("lora_unet_")]

        def half(stem: str, mine: dict[str, Tensor] = mine) -> Tensor:
            return mine[stem] if stem in mine else mine[f"{stem}_a"] @ mine[f"{stem}_b"]

        ranks = [value.shape[0] for name, value in mine.items() if name.endswith("_b")]
        scale = float(mine["alpha"]) / ranks[0] if ranks else 1.0
        if any(name.startswith("hada") for name in mine):
            update = half("hada_w1") * half("hada_w2")
        else:
            update = torch.kron(half("lokr_w1"), half("lokr_w2").flatten(1))
        layer.weight.data += scale * update.reshape(layer.weight.shape)
    return unet


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_gives_the_trained_networks_output(
    kind_of: Settings, trained: Callable[..., Any], tiny_base: Path, kind: str
) -> None:
    config = kind_of(kind)
    unet, _ = trained(config)
    wanted, base = output(unet), output(base_of(config).load("unet"))
    assert not torch.allclose(wanted, base, atol=1e-3), "control: it was trained"
    close: dict[str, Any] = {"rtol": 0, "atol": 2e-5}
    stock = StableDiffusionPipeline.from_pretrained(tiny_base)
    stock.load_lora_weights(config.output_dir)
    torch.testing.assert_close(output(stock.unet), wanted, **close)
    hand = by_formula(Path(config.output_dir) / KOHYA_NAME, StableDiffusionPipeline.from_pretrained(tiny_base).unet)
    torch.testing.assert_close(output(hand), wanted, **close)
    for name, said in ((WEIGHTS_NAME, "LoRA"), (KOHYA_NAME, {"loha": "LoHa", "lokr": "LoKr"}[kind])):
        ours = StableDiffusionPipeline.from_pretrained(tiny_base)
        record = load_lora(ours, config.output_dir, weight_name=name)
        torch.testing.assert_close(output(ours.unet), wanted, **close)
        assert record["kind"] == said
    other = result(config)
    save_file(
        {n: v * 2 if n.endswith(("w1_a", "w1")) else v for n, v in other.items()},
        tiny_base.parent / f"{kind}.safetensors",
    )
    wrong = by_formula(
        tiny_base.parent / f"{kind}.safetensors", StableDiffusionPipeline.from_pretrained(tiny_base).unet
    )
    assert not torch.allclose(output(wrong), wanted, atol=1e-3), "control"
    with safe_open(Path(config.output_dir) / KOHYA_NAME, "pt") as file:
        head = file.metadata()
    assert (head["ss_network_module"], head["ss_network_dim"], head["ss_network_alpha"]) == (
        "lycoris.kohya",
        "2",
        "3.0",
    )
    with pytest.raises(ValueError):  # what stock diffusers does with LyCORIS's names
        stock.load_lora_weights(config.output_dir, weight_name=KOHYA_NAME)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_resume_to_the_bit(kind_of: Settings, kind: str) -> None:
    values: dict[str, Any] = {
        "checkpointing_steps": 2,
        "max_train_steps": 4,
        "use_ema": True,
        "gradient_checkpointing": True,
    }
    config, names = kind_of(kind, "straight", **values), (KOHYA_NAME, WEIGHTS_NAME)
    torch.manual_seed(1)
    losses, weights = run(config, progress=False).losses, [result(config, name) for name in names]
    for name in names:
        (Path(config.output_dir) / name).unlink()
    torch.manual_seed(2)
    config.resume_from_checkpoint = "checkpoint-2"
    resumed = run(config, progress=False)
    assert resumed.first_step == 2 and resumed.losses == losses
    assert all(equal(ours, result(config, name)) for ours, name in zip(weights, names, strict=True))
    plain = run(kind_of("lora", "plain", **values), progress=False).losses
    assert plain != losses, "control: another kind has other losses"
    with pytest.raises(UserError, match=f"was written with lora_kind = '{kind}'"):
        run(kind_of("lora", "straight", resume_from_checkpoint="latest", **values), progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_a_factor_missing_is_refused(kind_of: Settings, kind: str) -> None:
    config = kind_of(kind, checkpointing_steps=1, max_train_steps=1)
    run(config, progress=False)
    place = Path(config.output_dir) / "checkpoint-1"

    def fresh() -> Any:
        unet = base_of(config).load("unet")
        adapters.attach(unet, rank=2, alpha=3.0, targets=LAYERS, seed=7, kind=kind)
        return unet

    family = base_of(config).family
    unet = fresh()
    adapters.load(unet, place, family)
    assert equal(adapters._factors(unet).popitem()[1], adapters._factors(unet).popitem()[1])
    before = {n: v for n, v in load_file(place / KOHYA_NAME).items() if not n.endswith(".alpha")}
    adapters.save_kohya(unet, place, family)
    assert equal({n: v for n, v in load_file(place / KOHYA_NAME).items() if not n.endswith(".alpha")}, before)
    name = next(n for n in before if n.endswith("w1_a") or n.endswith("w1"))
    for changed in ({n: v for n, v in before.items() if n != name}, before | {"lora_unet_conv_out.hada_w1_a": torch.ones(4, 2)},
                    before | {name: before[name][:1]}):  # fmt: skip
        save_file(changed, place / KOHYA_NAME)
        with pytest.raises(UserError, match="belongs to another adapter; 1 weights are missing, unknown"):
            adapters.load(fresh(), place, family)


def test_the_start_is_the_base_and_draws_from_its_seed_alone(kind_of: Settings) -> None:
    for kind in KINDS:
        found = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            unet = base_of(kind_of(kind)).load("unet")
            before, state = output(unet), torch.get_rng_state()
            adapters.attach(unet, rank=2, alpha=3.0, targets=LAYERS, seed=5, kind=kind)
            assert torch.equal(torch.get_rng_state(), state) and torch.equal(output(unet), before)
            found.append(get_peft_model_state_dict(unet))
        assert equal(*found)
        other = base_of(kind_of(kind)).load("unet")
        adapters.attach(other, rank=2, alpha=3.0, targets=LAYERS, seed=6, kind=kind)
        assert not equal(found[0], get_peft_model_state_dict(other)), "control"
        assert all(
            torch.zeros(1) > m.module_dropout["default"] for m in unet.modules() if hasattr(m, "module_dropout")
        ), "never skipped"


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders_are_trained_and_come_back(
    kind_of: Settings, trained: Callable[..., Any], tmp_path: Path, family: str, kind: str
) -> None:
    base = {}
    if family == "sdxl":
        tiny.tiny_sdxl_pipeline().save_pretrained(tmp_path / "sdxl")
        base = {"pretrained_model_name_or_path": str(tmp_path / "sdxl")}
    config = kind_of(kind, train_text_encoder=True, checkpointing_steps=3, **base)
    _, text = trained(config)
    ids = torch.arange(6)[None]

    def seen(parts: Any) -> list[Tensor]:
        with torch.no_grad():
            return [parts[name].eval()(ids)[0] for name in text]

    pipeline = getattr(diffusers, base_of(config).family.pipeline)
    before = pipeline.from_pretrained(config.pretrained_model_name_or_path)
    for name in (WEIGHTS_NAME, KOHYA_NAME):
        pipe = pipeline.from_pretrained(config.pretrained_model_name_or_path)
        load_lora(pipe, config.output_dir, weight_name=name)
        for ours, wanted, untrained in zip(seen(pipe.components), seen(text), seen(before.components), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
            assert not torch.allclose(untrained, wanted, atol=1e-4), "control: they were trained"
    again = {name: getattr(pipeline.from_pretrained(config.pretrained_model_name_or_path), name) for name in text}
    fresh = base_of(config).load("unet")
    for part, module in {"unet": fresh, **again}.items():
        targets = LAYERS if part == "unet" else adapters.TEXT_TARGETS
        adapters.attach(module, rank=2, alpha=3.0, targets=targets, seed=9, kind=kind, part=part)
    adapters.load(fresh, Path(config.output_dir) / "checkpoint-3", base_of(config).family, again)
    assert all(torch.equal(a, b) for a, b in zip(seen(again), seen(text), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_is_bit_exact_and_keeps_its_kind(kind_of: Settings, settings: Settings, kind: str) -> None:
    own = kind_of(kind)
    run(own, progress=False)
    place = str(Path(own.output_dir) / KOHYA_NAME)
    config = settings("again", lora_weights=place, learning_rate=1e-30, max_train_steps=1)
    plan = plan_run(config)
    assert (plan.config.lora_kind, plan.config.rank, plan.config.lora_alpha) == (kind, 2, 3.0)
    write_run_card(run(config, progress=False))
    assert equal(result(config), result(own))
    assert {"loha": "LoHa, rank 2", "lokr": "LoKr, rank 2"}[kind] in (Path(config.output_dir) / "README.md").read_text()
    with pytest.raises(UserError, match=f"lora_kind is lora; the adapter of lora_weights has {kind}"):
        plan_run(settings("other", lora_weights=place, lora_kind="lora"))
    as_lora = plan_run(settings("plain", lora_weights=own.output_dir))
    assert as_lora.config.lora_kind == "lora", "the same as a LoRA"


def test_a_start_of_any_shape_is_continued(settings: Settings, tmp_path: Path) -> None:
    """Cores, other factorizations and whole halves that this trainer would not choose itself."""
    torch.manual_seed(0)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    found = {
        f"{key}.lokr_w1": torch.randn(2, 16),
        f"{key}.lokr_w2": torch.randn(16, 2),
        f"{key}.alpha": torch.tensor(9.0),
    }
    key = "lora_unet_conv_in"
    found |= {f"{key}.lokr_w1_a": torch.randn(2, 3), f"{key}.lokr_w1_b": torch.randn(3, 2), f"{key}.lokr_t2": torch.randn(3, 3, 3, 3),
              f"{key}.lokr_w2_a": torch.randn(3, 8), f"{key}.lokr_w2_b": torch.randn(3, 2), f"{key}.alpha": torch.tensor(1.5)}  # fmt: skip
    save_file(found, tmp_path / "any.safetensors")
    config = settings(lora_weights=str(tmp_path / "any.safetensors"), learning_rate=1e-30, max_train_steps=1)
    run(config, progress=False)
    kept = {name: value for name, value in result(config).items() if not name.endswith(".alpha")}
    assert equal(kept, {name: value for name, value in found.items() if not name.endswith(".alpha")})
    outputs = []
    for source in (found, config.output_dir, Path(config.output_dir) / KOHYA_NAME):
        pipe = StableDiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path)
        load_lora(pipe, source)
        outputs.append(output(pipe.unet))
    assert torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=2e-6 * float(outputs[0].abs().max()))


def test_a_start_of_several_kinds_is_refused(settings: Settings, tmp_path: Path) -> None:
    loha = {
        f"lora_unet_conv_in.hada_w{i}_{end}": torch.ones(16, 2) if end == "a" else torch.ones(2, 36)
        for i in (1, 2)
        for end in "ab"
    }
    plain = {
        "lora_unet_conv_out.lora_down.weight": torch.ones(2, 16, 3, 3),
        "lora_unet_conv_out.lora_up.weight": torch.ones(4, 2, 1, 1),
    }
    save_file(loha | plain, tmp_path / "mixed.safetensors")
    with pytest.raises(UserError, match="holds LoHa and LoRA; one kind of adapter is trained"):
        plan_run(settings(lora_weights=str(tmp_path / "mixed.safetensors")))
    save_file(loha, tmp_path / "one.safetensors")
    plan_run(settings(lora_weights=str(tmp_path / "one.safetensors")))  # control


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_factors_in_full(kind_of: Settings, precision: str) -> None:
    if precision == "fp16" and not torch.cuda.is_available():
        pytest.skip("fp16 needs a GPU")
    for kind in KINDS:
        config = kind_of(kind, precision + kind, mixed_precision=precision)
        losses = run(config, progress=False).losses
        full = run(kind_of(kind, "full" + kind), progress=False).losses
        assert all(value.dtype == torch.float32 for value in result(config).values())
        assert losses == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "use_dora is given with lora_kind"),
        ({"use_rslora": True}, "use_rslora is given with lora_kind"),
        ({"lora_init": "pissa"}, "lora_init is given with lora_kind"),
        ({"lora_dropout": 0.1}, "lora_dropout is given with lora_kind"),
        ({"lora_min_rank": 1}, "lora_min_rank is given with lora_kind"),
        ({"lora": False}, "lora_kind is given; it has no effect here: lora is off"),
        ({"lora_kind": "oft"}, "lora_kind is 'oft'"),
    ],
)
def test_what_does_not_fit_a_kind_is_refused(settings: Settings, values: dict[str, Any], message: str) -> None:
    for kind in KINDS:
        settings(lora_kind=kind)  # control
        with pytest.raises(UserError, match=message):
            settings(**{"lora_kind": kind, **values})


def test_kinds_are_refused_under_fsdp(kind_of: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharding.check(kind_of("lora"))  # control
    for kind in KINDS:
        with pytest.raises(UserError, match=f"lora_kind is {kind} under FSDP"):
            sharding.check(kind_of(kind))
