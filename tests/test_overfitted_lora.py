"""A LoRA that gives its training images back has one verdict under five naming schemes; the base alone has another. Minutes of training: slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_lora import KOHYA, renamed

from ambient_sd.assets import BASE, IMAGES
from ambient_sd.commands.audit import AuditSettings, Source
from ambient_sd.commands.audit.work import audit
from ambient_sd.data.sources import load_rows
from ambient_sd.families import sgm
from ambient_sd.sampling import SamplingConfig
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils.sheets import as_rgb

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


@pytest.mark.slow
def test_an_overfitted_lora_has_one_verdict_under_five_names(tmp_path: Path) -> None:
    rows = load_rows(IMAGES, row_filter=[("subset_60", "=", "true")])
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i in range(0, 60, 5):
        as_rgb(rows[i].image).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": rows.captions[i]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    trained = tmp_path / "lora"
    run(TrainConfig(
        pretrained_model_name_or_path=str(BASE), train_data_dir=str(folder), resolution=64, objective="plain", lora=True, rank=32,
        lora_target_modules=LAYERS, train_batch_size=12, max_train_steps=350, learning_rate=2e-3, lr_scheduler="constant",
        checkpointing_steps=100_000, report_to="none", seed=0, output_dir=str(trained),
    ))  # fmt: skip
    pipe: Any = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    saved = load_file(trained / "pytorch_lora_weights.safetensors")
    state, theirs = {name.removeprefix("unet."): value for name, value in saved.items()}, sgm.names(pipe.unet)
    files = {
        "diffusers": {f"unet.{name}": value for name, value in state.items()},
        "PEFT": {f"base_model.model.{name}": value for name, value in state.items()},
        "bare": state,
        "kohya": renamed(state, lambda layer, rest: f"lora_unet_{layer.replace('.', '_')}.{KOHYA[rest]}", 32.0),
        "ComfyUI": renamed(state, lambda layer, rest: f"diffusion_model.{theirs[layer]}.{KOHYA[rest]}", 32.0),
    }

    def verdict(name: str, adapter: Path | None) -> tuple[Any, Any]:
        found = audit(AuditSettings(
            Source(str(folder)), tmp_path / f"audit-{name}",
            SamplingConfig(str(BASE), None if adapter is None else str(adapter), scheduler="dpm++", num_inference_steps=15, guidance_scale=1.5),
            heldout=Source(str(IMAGES), split="heldout"), num_images_per_prompt=2, base_images=0, features=("pixels",), resamples=10,
            attributed_prompts=0, fail_over=0.01,
        )).found  # fmt: skip
        return found["verdict"], [
            json.loads(line) for line in (tmp_path / f"audit-{name}" / "images.jsonl").read_text().splitlines()
        ]

    seen = {}
    for name, tensors in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        seen[name] = verdict(name, path)
    first = seen["diffusers"]
    assert first[0]["exceeded"] and first[0]["value"] > 0.3, first[0]
    for name, one in seen.items():
        assert one == first, name
    base = verdict("base", None)[0]
    assert not base["exceeded"], "control: the base alone copies none of them"
