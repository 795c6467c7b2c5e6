"""Flags of diffusers' training scripts that are not here: why, and what does their work. Each ends in that one line."""

from __future__ import annotations

from collections.abc import Mapping

_BIAS = (
    "a range of timesteps is another range of noise levels on each schedule",
    "leave it out; --weighting_scheme draws levels, --reweight and --objective gap weigh them",
)
_PRODIGY = ("AdamW is the optimizer", "leave it out")
_DREAM = ("the ambient target above the noise level has no such form", "leave it out")

# By flag: the reason and the remedy.
ELSEWHERE: Mapping[str, tuple[str, str]] = {
    "non_ema_revision": ("one U-Net is trained and averaged", "name its branch with --revision"),
    "dream_training": _DREAM,
    "dream_detail_preservation": _DREAM,
    "local_rank": ("accelerate launch and torchrun say it through the environment", "leave it out"),
    **{f"timestep_bias_{name}": _BIAS for name in ("strategy", "multiplier", "begin", "end", "portion")},
    "enable_npu_flash_attention": ("it is for Huawei's NPUs, which are not trained on", "leave it out"),
    "debug_loss": ("losses.jsonl has the loss of each step", "leave it out; in Python, on_step gets it"),
    "optimizer": ("AdamW is the optimizer, and Prodigy is not here", "leave it out, with a --learning_rate such as 1e-4; --use_8bit_adam saves memory"),
    **{f"prodigy_{name}": _PRODIGY for name in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")},
    "adam_weight_decay_text_encoder": ("text encoders decay as the network does", "use --adam_weight_decay"),
    "cache_latents": ("latents are held in memory wherever views are fixed and they fit", "leave it out; --latent_cache_dir keeps them on disk"),
    "repeats": ("it is the same for every image, and so a number of epochs", "multiply --num_train_epochs; for images that differ in it, see docs/layouts.md"),
    "sample_batch_size": ("as many class images are sampled at once as fit", "leave it out"),
    "prior_generation_precision": ("class images are sampled in the precision of the run", "use --mixed_precision"),
    "upcast_before_saving": ("trained weights are float32, and saved so", "leave it out"),
    "skip_final_inference": ("nothing is sampled without prompts", "leave it and the validation prompts out"),
    "final_validation_prompt": ("the last validation is that of the result", "use --validation_prompts"),
    "use_aspect_ratio_buckets": ("the buckets themselves switch them on", "use --aspect_ratio_buckets auto"),
    "text_encoder_out_layers": ("captions are embedded as by the pipeline", "leave it out"),
    "system_prompt": ("captions are embedded as by the pipeline", "leave it out"),
    "offload": ("VAE and text encoders leave the GPU as soon as nothing needs them", "leave it out"),
    "fsdp_text_encoder": ("text encoders leave the GPU before the network is spread", "leave it out"),
    "enable_vae_tiling": ("images are decoded in small batches", "leave it out"),
    "do_fp8_training": ("matrix products in float8 are not here", "use --quantize_base fp8, which holds a LoRA's base in it"),
    "bnb_quantization_config_path": ("it has a flag of its own", "use --quantize_base nf4 or int8"),
    "lora_blocks": ("layers are named whole", "use --lora_target_modules, such as transformer_blocks.12.attn.to_q"),
}  # fmt: skip
