"""Memory of a training: what is predicted beside what is measured, and what cards of which size hold.

    python benchmarks/memory.py check                  on this machine, with a random model of Stable Diffusion 2's classes
    python benchmarks/memory.py cards                  Stable Diffusion 2 and XL by method, resolution and batch, predicted

`check` trains four steps of each setting, twice in a process of its own, and measures the second time: the highest memory above what
the process held before (`ambient_sd.utils.memory`), on a GPU what tensors held, on Linux without one what the process grew by.
`cards` needs no weights: configurations alone, written here as the two models are published.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from against_diffusers import SD2, SMALL, models, prepare

from ambient_sd.families.base import check_base
from ambient_sd.training import TrainConfig, run
from ambient_sd.training.footprint import predict
from ambient_sd.training.proposals import USABLE
from ambient_sd.utils.memory import peak_memory

FUSED: dict[str, Any] = {"fused_backward_pass": True, "max_grad_norm": 0.0}
SMALLEST: dict[str, Any] = {
    **FUSED, "full_bf16": True, "mixed_precision": "bf16", "use_8bit_adam": True, "gradient_checkpointing": True,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, averaged": {"use_ema": True},
    "all weights, gradient checkpointing": {"gradient_checkpointing": True},
    "all weights, bf16": {"mixed_precision": "bf16"},
    "LoRA of rank 16": {"lora": True, "rank": 16},
    "LoRA of rank 16, gradient checkpointing": {"lora": True, "rank": 16, "gradient_checkpointing": True},
    "LoRA of rank 16, half of the blocks recomputed": {
        "lora": True, "rank": 16, "gradient_checkpointing": True, "gradient_checkpointing_fraction": 0.5,
    },
    "LoRA of rank 16, base in int8": {"lora": True, "rank": 16, "quantize_base": "int8"},
    "LoRA of rank 16, base in nf4": {"lora": True, "rank": 16, "quantize_base": "nf4"},
    "all weights, fused backward pass": FUSED,
    "all weights, fused backward pass, 8-bit Adam": {**FUSED, "use_8bit_adam": True},
    "all weights in bf16, fused backward pass, 8-bit Adam, gradient checkpointing": SMALLEST,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "LoRA of rank 16": {"lora": True, "rank": 16},
    "LoRA of rank 16, gradient checkpointing": {"lora": True, "rank": 16, "gradient_checkpointing": True},
    "LoRA of rank 16, half of the blocks recomputed": {
        "lora": True, "rank": 16, "gradient_checkpointing": True, "gradient_checkpointing_fraction": 0.5,
    },
    "LoRA of rank 16, base in nf4": {"lora": True, "rank": 16, "quantize_base": "nf4"},
    "LoRA of rank 16, base in nf4, gradient checkpointing": {
        "lora": True, "rank": 16, "quantize_base": "nf4", "gradient_checkpointing": True,
    },
    "all weights, gradient checkpointing": {"gradient_checkpointing": True},
    "all weights, fused backward pass, gradient checkpointing": {**FUSED, "gradient_checkpointing": True},
    "all weights, averaged, gradient checkpointing": {"use_ema": True, "gradient_checkpointing": True},
    "all weights, averaged on the CPU, 8-bit Adam, gradient checkpointing": {
        "use_ema": True, "offload_ema": True, "use_8bit_adam": True, "gradient_checkpointing": True,
    },
    "all weights in bf16, averaged on the CPU, fused backward pass, 8-bit Adam, gradient checkpointing": {
        "use_ema": True, "offload_ema": True, **SMALLEST,
    },
    "the same, moments on the CPU": {"use_ema": True, "offload_ema": True, "offload_optimizer": True, **SMALLEST},
}  # fmt: skip
_CARDS = (8, 12, 16, 24, 40, 48, 80)  # GiB


def measure(folder: Path, options: dict[str, Any]) -> float:
    """Train four steps twice in this process; return the second one's peak in MiB: the first pays for what libraries set up once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(2):
        with tempfile.TemporaryDirectory() as out, peak_memory(device) as peak:
            run(config_of(folder, max_train_steps=4, output_dir=out, **options), progress=False)
    assert peak.mb is not None, "nothing can be measured on this system"
    return peak.mb


def config_of(folder: Path, **options: Any) -> TrainConfig:
    return TrainConfig(
        str(folder / "model"), train_data_dir=str(folder / "images"), resolution=SMALL[4], center_crop=True, report_to="none",
        checkpointing_steps=10**9, latent_cache_dir=str(folder / "cache"), **{"train_batch_size": 8, **options},
    )  # fmt: skip


def check(only: str = "") -> None:
    """Print prediction and measurement of each setting, and their ratio."""
    print(f"| {SMALL[4]} px, batch 8 | predicted, MiB | measured, MiB | measured / predicted |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, 16)
        base = check_base(str(folder / "model"))
        chosen = [item for item in SETTINGS.items() if only in item[0]]
        for number, (name, options) in enumerate([("", {}), *chosen]):  # the first fills the cache
            command = [sys.executable, __file__, "measure", str(folder), json.dumps(options)]
            measured = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            if number:
                found = predict(
                    config_of(folder, **options), base, (SMALL[4],) * 2, on_cpu=not torch.cuda.is_available()
                )
                predicted = found.peak / 2**20
                print(f"| {name} | {predicted:.0f} | {measured:.0f} | {measured / predicted:.2f} |", flush=True)


def sd2(folder: Path) -> Path:
    """Write the configurations of Stable Diffusion 2."""
    return _write(folder, "StableDiffusionPipeline", *models(SD2))


def sdxl(folder: Path) -> Path:
    """Write the configurations of Stable Diffusion XL."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    first = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768))  # fmt: skip
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280)
    )  # fmt: skip
    return _write(folder, "StableDiffusionXLPipeline", unet, vae, first, second)


def _write(folder: Path, pipeline: str, unet: Any, vae: Any, *texts: Any) -> Path:
    """Write configurations without weights, with the embedded base's tokenizer and schedule."""
    import shutil

    from ambient_sd.assets import BASE

    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
    shutil.copytree(BASE / "scheduler", folder / "scheduler")
    parts = {
        "unet": unet,
        "vae": vae,
        **{f"text_encoder{'' if i == 0 else f'_{i + 1}'}": text for i, text in enumerate(texts)},
    }
    for name, part in parts.items():
        if hasattr(part, "save_config"):
            part.save_config(folder / name)
        else:
            part.config.save_pretrained(folder / name)
        (folder / name / "model.safetensors").touch()  # asked for by name, never read
        index[name] = ["transformers" if name.startswith("text") else "diffusers", type(part).__name__]
    for i in range(len(texts)):
        name = f"tokenizer{'' if i == 0 else f'_{i + 1}'}"
        shutil.copytree(BASE / "tokenizer", folder / name)
        at = folder / name / "tokenizer_config.json"
        at.write_text(json.dumps({**json.loads(at.read_text()), "model_max_length": 77}))
        index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def card(gib: float) -> str:
    """Return the smallest card on which a peak leaves room for drivers and workspaces."""
    return next((f"{size} GB" for size in _CARDS if gib <= USABLE * size), "none")


def cards(batches: list[int], only: str = "") -> None:
    """Print the peak of each method by model, resolution and batch, and the smallest card for it."""
    for title, write, sides in (("Stable Diffusion 2", sd2, (512, 768)), ("SDXL", sdxl, (512, 768, 1024))):
        with tempfile.TemporaryDirectory() as place:
            with torch.device("meta"):
                folder = write(Path(place))
            base = check_base(str(folder))
            print(
                f"\n| {title}, bf16 | " + " | ".join(f"{side} px, batch {n}" for side in sides for n in batches) + " |"
            )
            print("|---" * (1 + len(sides) * len(batches)) + "|")
            for name, options in ((n, o) for n, o in METHODS.items() if only in n):
                cells = []
                for side in sides:
                    for n in batches:
                        config = TrainConfig(
                            str(folder), train_data_dir="images", resolution=side, train_batch_size=n, **options
                        )
                        gib = predict(config, base, (side, side), precision="bf16").peak / 2**30
                        cells.append(f"{gib:.1f} ({card(gib)})")
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "cards", "measure"])
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    if args.what == "measure":
        print(measure(Path(args.more[0]), json.loads(args.more[1])))
    elif args.what == "check":
        check(args.only)
    else:
        cards(args.batches, args.only)


if __name__ == "__main__":
    main()
