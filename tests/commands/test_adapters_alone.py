"""A LoRA alone is enough: `audit` and `sample` find base, size and prompts, and the figures are those of every flag given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from hub_server import HubServer, reach
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ambient_sd.cli import main
from ambient_sd.families.base import check_base
from ambient_sd.families.lora import WEIGHTS_NAME, locate, read
from ambient_sd.sampling import SamplingConfig, adapted
from ambient_sd.training import adapters
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils.errors import UserError

QUICK = ["--features", "pixels", "--max_prompts", "3", "--samples_per_prompt", "1", "--num_inference_steps", "1", "--attributed_prompts", "0",
         "--base_images", "3", "--device", "cpu"]  # fmt: skip


def kohya(name: str) -> str:
    layer, _, end = name.removeprefix("unet.").partition(".lora_")
    return f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if end == 'A.weight' else 'up'}.weight"


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(TrainConfig(str(tiny_base), train_data_dir=str(tiny_images), resolution=40, train_batch_size=4, max_train_steps=2, lora=True,
                    report_to="none", output_dir=str(folder), learning_rate=1e-1))  # fmt: skip
    return folder


@pytest.fixture
def audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], str]]:
    def audited(*words: object) -> tuple[dict[str, Any], str]:
        out = tmp_path / f"audit-{len(list(tmp_path.glob('audit-*')))}"
        main(["audit", *QUICK, "--output_dir", str(out), *map(str, words)])
        found = json.loads((out / "audit.json").read_text())
        found["page"] = (out / "audit.html").read_text()
        found["base images"] = len((out / "base" / "samples.jsonl").read_text().splitlines())
        return found, capsys.readouterr().out

    return audited


def test_a_lora_of_ours_is_audited_by_its_file_alone(
    trained: Path, tiny_base: Path, tiny_images: Path, audit: Callable[..., Any]
) -> None:
    file = trained / "pytorch_lora_weights.safetensors"
    alone, said = audit(file, tiny_images)
    told, _ = audit(tiny_base, tiny_images, "--lora_weights", file, "--resolution", "40")
    for key in ("model", "measures", "images", "copies", "finding"):
        assert alone[key] == told[key], key
    assert alone["model"]["resolution"] == 40 and alone["base images"] == 3
    assert f"Audit of {tiny_base.name} with {trained.name} against" in alone["page"], (
        "and not the name that every LoRA has"
    )
    for line in (
        f"is a LoRA: its base is {tiny_base.name} (train_config.yaml)", "resolution: 40 (train_config.yaml)",
        f"prompts: the captions of {tiny_images.name}", f"what cannot be a copy: images of the base {tiny_base.name}",
    ):  # fmt: skip
        assert line in said
    other, _ = audit(tiny_base, tiny_images, "--lora_weights", file)  # control: the base's own size
    assert (
        other["model"]["resolution"] is None
        and other["images"]["generated"]["fingerprint"] != alone["images"]["generated"]["fingerprint"]
    )


def test_a_lora_of_kohya_is_audited_by_its_trigger_words(
    trained: Path, tiny_base: Path, tmp_path: Path, audit: Callable[..., Any]
) -> None:
    lora = tmp_path / "kohya.safetensors"
    head = {
        "ss_sd_model_name": str(tiny_base),
        "ss_resolution": "(32, 32)",
        "ss_dataset_dirs": json.dumps({"10_sks dog": {}}),
    }
    state = load_file(trained / "pytorch_lora_weights.safetensors")
    save_file({kohya(name): tensor for name, tensor in state.items()}, lora, head)
    images = tiny.image_folder(tmp_path / "images", [tiny.noise_image(i) for i in range(4)])
    found, said = audit(lora, images, "--samples_per_prompt", "2")
    assert found["images"]["generated"]["source"] == "trigger words" and found["images"]["generated"]["prompts"] == 1
    assert found["base images"] == 2, "the base's images are as many as the model's"
    assert "prompts: the trigger words 'sks dog' (ss_dataset_dirs in the file's head)" in said
    assert found["model"]["lora"]["scheme"] == "kohya" and found["model"]["resolution"] == 32


def pixels(out: Path, *words: object) -> bytes:
    """The image that `sample` makes; its file names its model."""
    main(["sample", *map(str, words), "--prompt", "a disc", "--num_inference_steps", "1", "--output_dir", str(out), "--device", "cpu",
          "--attribution", "none"])  # fmt: skip
    return Image.open(out / "images" / "00000-00.png").tobytes()


def test_a_lora_is_decoded_by_the_vae_of_its_training(
    tiny_base: Path, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.tiny_pipeline(seed=1).vae.save_pretrained(tmp_path / "vae")
    run(TrainConfig(str(tiny_base), pretrained_vae_model_name_or_path=str(tmp_path / "vae"), train_data_dir=str(tiny_images), resolution=32,
                    max_train_steps=1, lora=True, report_to="none", output_dir=str(tmp_path / "out"), learning_rate=1e-1))  # fmt: skip
    told = [tiny_base, "--lora_weights", tmp_path / "out", "--resolution", "32"]
    alone = pixels(tmp_path / "alone", tmp_path / "out")
    assert "trained with the VAE vae (train_config.yaml), sampled with it" in capsys.readouterr().out
    assert alone == pixels(tmp_path / "told", *told, "--pretrained_vae_model_name_or_path", tmp_path / "vae")
    assert alone != pixels(tmp_path / "own", *told)
    # Of the file alone nothing knows where the VAE is, and that is said.
    shutil.copy(tmp_path / "out" / WEIGHTS_NAME, tmp_path / "my.safetensors")
    assert (
        adapted(SamplingConfig(str(tmp_path / "my.safetensors"), base=str(tiny_base))).pretrained_vae_model_name_or_path
        is None
    )
    assert (
        "trained with the VAE vae (ss_vae_name in the file's head), sampled with the base's own"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="pretrained_vae_model_name_or_path"):
        SamplingConfig(str(tiny_base), pretrained_vae_model_name_or_path=str(tiny_images)).check()


def test_a_lora_is_sampled_alone(trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    told = pixels(tmp_path / "told", tiny_base, "--lora_weights", trained, "--resolution", "40")
    assert pixels(tmp_path / "alone", trained) == told


def test_a_lora_of_another_family_is_refused_unloaded(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "xl"
    tiny.tiny_sdxl_pipeline().save_pretrained(folder)
    lora = shutil.copy(trained / "pytorch_lora_weights.safetensors", tmp_path / "my.safetensors")
    monkeypatch.setattr("ambient_sd.families.base.Model.load_pipeline", None)
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(lora), "--base", str(folder), "--prompt", "a", "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "the adapter" in error


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the tiny base as owner/base, and nothing of it in the cache."""
    with HubServer() as server:
        server.others["owner/base"] = {
            path.relative_to(tiny_base).as_posix(): path.read_bytes() for path in tiny_base.rglob("*") if path.is_file()
        }
        reach(monkeypatch, server.url, tmp_path / "home")
        yield server


@pytest.mark.parametrize(
    ("base", "name"), [("embedded", WEIGHTS_NAME), ("owner/base", WEIGHTS_NAME), ("owner/base", adapters.KOHYA_NAME)]
)
def test_one_file_of_ours_names_its_base(
    base: str, name: str, hub: HubServer, tiny_images: Path, tmp_path: Path, audit: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run(TrainConfig(base, train_data_dir=str(tiny_images), resolution=32, train_batch_size=4, max_train_steps=1, lora=True,
                    report_to="none", output_dir=str(tmp_path / "out"), learning_rate=1e-1, output_kohya_format=True))  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(tmp_path / "out" / name, empty / "my.safetensors")
    monkeypatch.chdir(empty)
    alone, said = audit("my.safetensors", tiny_images)
    for line in (f"its base is {base} (ss_sd_model_name in the file's head)", "resolution: 32 (ss_resolution in"):
        assert line in said
    told, _ = audit(base, tiny_images, "--lora_weights", "my.safetensors", "--resolution", "32")
    for key in ("model", "measures", "images", "copies", "finding"):
        assert alone[key] == told[key], key
    with safe_open("my.safetensors", "pt") as file:
        tensors, head = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    assert str(tmp_path) not in json.dumps(head) and str(tiny_images) not in json.dumps(head)
    # Without the head no base is found; peft's settings are those of before.
    save_file(
        tensors, empty / "bare.safetensors", {k: v for k, v in head.items() if not k.startswith(("ss_sd", "model"))}
    )
    with pytest.raises(SystemExit):
        audit("bare.safetensors", tiny_images)
    assert all(key.startswith("unet.") for key in json.loads(head.get("lora_adapter_metadata", "{}")))
    if base != "embedded":
        pipe = StableDiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(".", weight_name="my.safetensors")
        layers = [m for m in pipe.unet.modules() if hasattr(m, "lora_A")]
        assert len(layers) == len(tensors) // (3 if "kohya" in name else 2)


# --- LoRAs on the hub


@pytest.fixture
def on_hub(hub: HubServer, trained: Path) -> Callable[..., None]:
    """Put a LoRA of owner/base there as owner/lora, under a name of its file, with files beside it."""

    def put(name: str, **beside: bytes) -> None:
        with safe_open(trained / WEIGHTS_NAME, "pt") as file:
            head = file.metadata() | {"ss_sd_model_name": "owner/base"}
        save_file(load_file(trained / WEIGHTS_NAME), trained / "hub.safetensors", head)
        hub.others["owner/lora"] = {name: (trained / "hub.safetensors").read_bytes(), "notes.txt": b"", **beside}

    return put


@pytest.mark.parametrize(
    ("name", "model"),
    [(WEIGHTS_NAME, "owner/lora"), ("mine.safetensors", "owner/lora"), ("a/mine.safetensors", "owner/lora/a/mine.safetensors"),
     ("mine.safetensors", "https://huggingface.co/owner/lora/blob/main/mine.safetensors")],
)  # fmt: skip
def test_a_lora_on_the_hub_is_sampled_alone(
    name: str, model: str, on_hub: Callable[..., None], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    on_hub(name)
    told = pixels(tmp_path / "told", "owner/base", "--lora_weights", trained, "--resolution", "40")
    assert pixels(tmp_path / "alone", model) == told
    shown = model.removeprefix("https://huggingface.co/").replace("blob/main/", "")
    assert f"{shown} is a LoRA: its base is owner/base (ss_sd_model_name in the file's head)" in capsys.readouterr().out


def test_a_model_on_the_hub_is_no_lora(hub: HubServer) -> None:
    config = SamplingConfig("owner/base")
    assert adapted(config) is config
    assert not [line for line in hub.log if "resolve" in line], "nothing is fetched to see it"
    with pytest.raises(UserError, match="MODEL is no LoRA"):
        adapted(SamplingConfig("owner/base", base="owner/base"))


def test_a_whole_file_on_the_hub_is_to_be_fetched_first(hub: HubServer, tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.bias": torch.ones(4)}, tmp_path / "whole.safetensors")
    hub.others["owner/whole"] = {"whole.safetensors": (tmp_path / "whole.safetensors").read_bytes()}
    for name in (
        "owner/whole",
        "owner/whole/whole.safetensors",
        "https://huggingface.co/owner/whole/resolve/main/whole.safetensors",
    ):
        for ask in (lambda n: adapted(SamplingConfig(n)), check_base):
            with pytest.raises(UserError, match=r"fetch it: hf download owner/whole whole.safetensors"):
                ask(name)


def test_a_lora_on_the_hub_is_no_base(on_hub: Callable[..., None]) -> None:
    on_hub("mine.safetensors")
    for name in ("owner/lora", "owner/lora/mine.safetensors"):
        with pytest.raises(UserError, match="is a LoRA of owner/base; a whole model is needed here; give its base"):
            check_base(name)
    with pytest.raises(UserError, match="revision is given"):
        adapted(SamplingConfig("owner/lora", revision="v2"))


def test_one_of_several_files_is_named(on_hub: Callable[..., None], trained: Path) -> None:
    on_hub("one.safetensors", **{"two.safetensors": b""})
    with pytest.raises(UserError, match=r"holds 2 .safetensors files .* name it, as owner/lora/one.safetensors"):
        adapted(SamplingConfig("owner/lora"))
    on_hub("one.safetensors", **{WEIGHTS_NAME: (trained / WEIGHTS_NAME).read_bytes()})
    assert locate("owner/lora").name == WEIGHTS_NAME


def test_alpha_of_a_peft_file_on_the_hub_is_its_own(on_hub: Callable[..., None]) -> None:
    on_hub("a/adapter_model.safetensors", **{"a/adapter_config.json": b'{"r": 4, "lora_alpha": 8}'})
    assert read(locate("owner/lora/a/adapter_model.safetensors")).config == {"r": 4, "lora_alpha": 8}


def test_a_slip_in_a_local_path_asks_no_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for ask in (locate, check_base):
        with pytest.raises(UserError, match=r"there is no"):
            ask("out/run/mine.safetensors")
    assert not hub.log
