"""LoRA of Stable Diffusion 3 and FLUX.1 beside diffusers' DreamBooth scripts: samples per second and peak memory, ratios in one run.

    python benchmarks/against_diffusers_flow.py --family sd3 --script diffusers/examples/dreambooth/train_dreambooth_lora_sd3.py
    python benchmarks/against_diffusers_flow.py --family flux --script diffusers/examples/dreambooth/train_dreambooth_lora_flux.py

Random models of the real classes; how it is timed: `against_diffusers.py`. The scripts come from a checkout of diffusers and need torchvision.

    one caption    theirs, one prompt for all images, encoded once, latents cached: the fastest that they have
    captions       theirs, a caption for each image, encoded in every step, latents cached
    ours           ambient, a caption for each image, the default: latents and captions held
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from against_diffusers import PICTURE_COUNT, ROOT, _span, prepare, timed
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (  # fmt: skip
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

sys.path.insert(0, str(ROOT / "tests"))
from tiny_flow import tiny_t5_tokenizer

from ambient_sd.assets import BASE

SIDE = 128  # pixels
TEXT = {"sd3": 256, "flux": 512}  # tokens of T5: what the pipelines sample with, and ours trains with


def model(family: str, folder: Path) -> None:
    """Write a random pipeline."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=77)
    clip = CLIPTextConfig(vocab_size=1870, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3, projection_dim=192,
                          bos_token_id=1868, eos_token_id=1869, pad_token_id=1869)  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=128, d_model=512, d_kv=64, d_ff=1024, num_layers=4, num_heads=8, feed_forward_proj="gated-gelu"))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=1, latent_channels=16, sample_size=SIDE, scaling_factor=1.5305,
        shift_factor=0.0609, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    common: dict[str, Any] = {"vae": vae, "tokenizer": tokenizer}
    if family == "sd3":
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=SIDE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=6, attention_head_dim=64,
                num_attention_heads=8, joint_attention_dim=512, caption_projection_dim=512, pooled_projection_dim=384,
                pos_embed_max_size=24, qk_norm="rms_norm",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=CLIPTextModelWithProjection(clip),
            text_encoder_2=CLIPTextModelWithProjection(clip), tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=tiny_t5_tokenizer(), **common,
        ).save_pretrained(folder)  # fmt: skip
    else:
        FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1, in_channels=64, num_layers=3, num_single_layers=6, attention_head_dim=64, num_attention_heads=8,
                joint_attention_dim=512, pooled_projection_dim=192, guidance_embeds=True, axes_dims_rope=(8, 28, 28),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), text_encoder=CLIPTextModel(clip), text_encoder_2=t5,
            tokenizer_2=tiny_t5_tokenizer(), **common,
        ).save_pretrained(folder)  # fmt: skip


def variants(family: str, folder: Path, script: Path | None, batch: int) -> dict[str, list[str]]:
    """Return the command of each variant, but for steps and output."""
    same = ["--pretrained_model_name_or_path", str(folder / "flow"), "--resolution", str(SIDE), "--train_batch_size", str(batch), "--rank", "4",
            "--learning_rate", "1e-4", "--seed", "0", "--checkpointing_steps", "1000000", "--mixed_precision", "no"]  # fmt: skip
    found = {}
    if script is not None:
        theirs = [sys.executable, str(script), *same, "--cache_latents", "--instance_prompt", "a picture", "--max_sequence_length", str(TEXT[family])]  # fmt: skip
        found["one caption"] = [*theirs, "--instance_data_dir", str(folder / "bare")]
        found["captions"] = [*theirs, "--dataset_name", str(folder / "images"), "--caption_column", "text"]
    found["ours"] = [sys.executable, str(ROOT / "train_text_to_image_ambient.py"), *same, "--train_data_dir", str(folder / "images"), "--lora",
                     "--report_to", "none"]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=("sd3", "flux"), required=True)
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora_sd3.py or _flux.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, default=2, help="steps of the short run")
    parser.add_argument("--long", type=int, default=10, help="steps of the long run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="some of the variants")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, PICTURE_COUNT)
        model(args.family, folder / "flow")
        (folder / "bare").mkdir()
        for image in (folder / "images").glob("*.png"):
            (folder / "bare" / image.name).symlink_to(image)
        commands = variants(args.family, folder, args.script, args.batch)
        commands = {k: v for k, v in commands.items() if not args.only or k in args.only}
        rates: dict[str, list[float]] = {variant: [] for variant in commands}
        peaks: dict[str, list[float]] = {variant: [] for variant in commands}
        work: dict[str, list[float]] = {variant: [] for variant in commands}
        for turn in range(args.rounds):
            for variant in list(commands) if turn % 2 == 0 else list(commands)[::-1]:
                short, _, before = timed(commands[variant], args.short)
                long, peak, after = timed(commands[variant], args.long)
                work[variant].append((after - before) / (args.long - args.short))
                rates[variant].append(args.batch * (args.long - args.short) / (long - short))
                peaks[variant].append(peak)
                print(f"round {turn + 1}: {variant:11} {rates[variant][-1]:6.2f} samples/s, peak {peak:5.0f} MB", flush=True)  # fmt: skip
        for variant in commands:
            if variant != "ours":
                speed = [a / b for a, b in zip(rates["ours"], rates[variant], strict=True)]
                memory = [a / b for a, b in zip(peaks["ours"], peaks[variant], strict=True)]
                effort = [a / b for a, b in zip(work["ours"], work[variant], strict=True)]
                print(
                    f"ours / {variant}: samples per second {_span(speed)}, CPU time a step {_span(effort)}, peak memory {_span(memory)}"
                )
    print(
        f"{args.family}, LoRA of rank 4, n = {args.rounds} rounds, batch {args.batch}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
