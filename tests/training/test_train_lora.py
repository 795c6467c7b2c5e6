"""LoRA: addressed dropout, DoRA, kohya's format with the right alpha."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ambient_sd.families.sd import SD
from ambient_sd.training import adapters
from ambient_sd.training.adapters import AddressedDropout
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.training.plan import base_of
from ambient_sd.utils.errors import UserError

Settings = Callable[..., TrainConfig]


def result(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / adapters.WEIGHTS_NAME)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def unet_output(unet: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 16, 16, generator=g), torch.tensor([10, 500]), torch.randn(2, 24, 16, generator=g))
    with torch.no_grad():
        return unet.eval()(*inputs).sample


def trained_unet(config: TrainConfig) -> Any:
    unet = base_of(config).load("unet")
    adapters.attach(unet, rank=config.rank or 4, alpha=config.lora_alpha or 4.0, seed=0, dora=config.use_dora,
                    targets=config.lora_target_modules or ())  # fmt: skip
    adapters.load(unet, Path(config.output_dir), SD)
    return unet


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dropout_resumes_bit_for_bit(settings: Settings, extra: dict[str, Any]) -> None:
    values: dict[str, Any] = {"lora_dropout": 0.3, "checkpointing_steps": 2, "max_train_steps": 4, **extra}
    config = settings("straight", **values)
    torch.manual_seed(1)
    whole, trained = run(config, progress=False).losses, result(config)
    (Path(config.output_dir) / adapters.WEIGHTS_NAME).unlink()
    torch.manual_seed(2)
    config.resume_from_checkpoint = "checkpoint-2"
    resumed = run(config, progress=False)
    assert resumed.first_step == 2 and resumed.losses == whole
    assert equal(trained, result(config))
    without = run(settings("without", **{**values, "lora_dropout": 0.0}), progress=False).losses
    assert without != whole, "negative control: it does drop"


def test_dropout_is_the_same_however_samples_are_batched_or_recomputed(settings: Settings) -> None:
    values: dict[str, Any] = {"lora_dropout": 0.3}
    whole = run(settings("w", **values), progress=False).losses
    cut = run(settings("c", train_batch_size=2, gradient_accumulation_steps=2, **values), progress=False).losses
    again = run(settings("g", gradient_checkpointing=True, **values), progress=False).losses
    assert whole == pytest.approx(cut, rel=1e-4)
    assert whole == pytest.approx(again, rel=1e-4)
    without = run(settings("n"), progress=False).losses
    assert whole != pytest.approx(without, rel=1e-4), "negative control: other masks give other losses"


def test_dropout_drops_its_share_keeps_the_mean_and_is_one_mask_per_seed_layer_and_place() -> None:
    def mask(**values: Any) -> torch.Tensor:
        options = {"seed": 0, "layer": "a", "place": 7, **values}
        layer = AddressedDropout(0.25, seed=options["seed"], layer=options["layer"])
        layer.positions = [options["place"]]
        return layer(torch.ones(1, 10000))

    one = mask()
    assert float((one == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(one.mean()) == pytest.approx(1.0, abs=0.02)
    torch.rand(3)
    assert torch.equal(one, mask())
    assert not any(torch.equal(one, mask(**other)) for other in ({"seed": 1}, {"layer": "b"}, {"place": 8}))
    layer = AddressedDropout(0.25, seed=0, layer="a").eval()
    assert torch.equal(layer(torch.ones(2, 3)), torch.ones(2, 3)), "not while drawing"
    with pytest.raises(ValueError, match="0 positions for 2 samples"):
        layer.train()(torch.ones(2, 3))


def test_dora_trains_lengths_and_reloads_in_a_stock_pipeline(settings: Settings, tiny_base: Path) -> None:
    config = settings(use_dora=True, rank=2, lora_alpha=6.0)
    run(config, progress=False)
    assert any("magnitude" in name for name in result(config))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    base = unet_output(pipe.unet)
    pipe.load_lora_weights(config.output_dir)
    torch.testing.assert_close(unet_output(pipe.unet), unet_output(trained_unet(config)), rtol=0, atol=1e-6)
    assert not torch.allclose(base, unet_output(pipe.unet), atol=1e-4)


def test_every_adapted_layer_comes_back_in_a_stock_pipeline(settings: Settings, tiny_base: Path) -> None:
    """Attention layers beside others: diffusers' own names for the former are lost where the first name is peft's."""
    config = settings(lora_target_modules=["to_q", "to_out.0", "proj_in", "conv1"], rank=2, lora_alpha=8.0)
    run(config, progress=False)
    trained = trained_unet(config)
    out = Path(config.output_dir)

    def stock(folder: Path) -> torch.Tensor:
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
        pipe.load_lora_weights(folder)
        return unet_output(pipe.unet)

    assert torch.equal(stock(out), unet_output(trained))
    (out / "mixed").mkdir()
    with safe_open(out / adapters.WEIGHTS_NAME, "pt") as file:
        metadata = file.metadata()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained))
    mixed = {f"unet.{k}": v.detach().contiguous() for k, v in layers.items()}
    save_file(mixed, out / "mixed" / adapters.WEIGHTS_NAME, metadata=metadata)
    assert not torch.allclose(stock(out / "mixed"), unet_output(trained), atol=1e-4), "negative control"


@pytest.mark.parametrize(
    "targets", [None, ["to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1"]], ids=["attention", "more"]
)
def test_kohya_export_has_our_alpha_and_draws_the_same_images(
    settings: Settings, tiny_base: Path, targets: list[str] | None
) -> None:
    config = settings(output_kohya_format=True, rank=2, lora_alpha=8.0, lora_target_modules=targets)
    run(config, progress=False)
    path = Path(config.output_dir) / adapters.KOHYA_NAME
    state = load_file(path)
    layers = [name for name in state if name.endswith(".alpha")]
    assert len(layers) == len([name for name in state if "lora_down" in name]) > 0
    assert {float(state[name]) for name in layers} == {8.0}
    assert all(name.startswith("lora_unet_") for name in state)
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_alpha"] == "8.0"

    def images(source: str, **options: Any) -> torch.Tensor:
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(source, **options)
        g = torch.Generator().manual_seed(0)
        made = pipe("a red disc", height=32, width=32, num_inference_steps=4, generator=g, output_type="pt").images
        return torch.as_tensor(made)

    ours = images(config.output_dir)
    torch.testing.assert_close(images(str(path.parent), weight_name=path.name), ours, rtol=0, atol=1e-4)
    # Negative control: diffusers' converter alone, which writes the rank as alpha.
    unet = trained_unet(config)
    wrong = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()})
    folder = path.parent / "wrong"
    folder.mkdir()
    save_file({k: v.detach().contiguous() for k, v in wrong.items()}, folder / "wrong.safetensors")
    bad = images(str(folder), weight_name="wrong.safetensors")
    assert not torch.allclose(bad, ours, atol=1e-3)


@pytest.mark.parametrize(
    "values",
    [{}, {"lora": False}, {"lora_min_rank": 2}],
    ids=["lora", "whole", "t-lora"],
)
def test_compiled_training_is_one_graph_with_equal_losses(
    settings: Callable[..., TrainConfig], small_base: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """Backend aot_eager: captured and differentiated as inductor's, without its kernels, so equal to the bit."""
    values = {"pretrained_model_name_or_path": str(small_base), "max_train_steps": 2, **values}
    plain = run(settings("plain", **values), progress=False)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(settings("compiled", compile=True, **values), progress=False)
    assert compiled.losses == plain.losses
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    name = (
        "pytorch_lora_weights.safetensors" if values.get("lora", True) else "unet/diffusion_pytorch_model.safetensors"
    )
    assert (plain.output / name).read_bytes() == (compiled.output / name).read_bytes()


@pytest.mark.parametrize("values", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_breaks_the_graph_is_refused(settings: Callable[..., TrainConfig], values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="compile is given with"):
        settings(compile=True, **values)
