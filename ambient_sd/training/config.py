"""Every setting of a training run: one field of `TrainConfig` = one command-line flag = one key of a YAML file.

Names and defaults are those of diffusers' `train_text_to_image.py` and `train_text_to_image_lora.py` where those scripts
have the setting. Values are checked here, before anything heavy is imported; what needs the base model or the images
(a level beyond the schedule, a missing caption column) is checked by `ambient_sd.training.loop`, still before weights
load. This module imports no torch: `--help` must come at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambient_sd.data.conditions import split_condition
from ambient_sd.data.dataset_options import DatasetOptions
from ambient_sd.sampling_options import SamplingOptions
from ambient_sd.training.elsewhere import ELSEWHERE
from ambient_sd.utils import files, settings
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import Parser, add_flags, option, same

GROUPS = {
    "model": "Which base model is fine-tuned: a local pipeline folder, a whole model in one .safetensors file, or a hub id.",
    "data": "Images and captions: a folder with metadata.jsonl, a parquet file, WebDataset shards, or a dataset's hub id.",
    "objective": "The loss. `ambient` never shows the network a clean image above the noise level s_n = sigma / alpha "
    "(on SD's schedule s = 0.34 at t=100, 0.83 at 300, 1.16 at 400, 2.3 at 600, 14.6 at 999); each image keeps one "
    "noise. `plain` is the ordinary loss. `gap` is plain without the band of noise levels from the level to gap_upper; `weighted` is plain with ambient's weight a^q above the level: controls for studies. `distill` is plain up to the level and above it keeps to what the base model itself predicts: nothing of an image is learnt there. The training script's default is `ambient`; `ambient-sd train` and the presets take `distill`.",
    "mitigation": "Published ways to keep a model from memorizing, beside the loss or in place of the ambient one; each off by default.",
    "optimisation": "Steps, batches and the optimizer (AdamW). Steps are optimizer steps.",
    "LoRA": "Low-rank adapters instead of a full fine-tune; these options need --lora.",
    "class": "Prior preservation: images of the subject's class, trained beside the training images. Regularisation images of a dataset are used without a flag.",
    "validation": "Images sampled during training, to TensorBoard and to output_dir/validation/.",
    "checkpoints": "Folders checkpoint-N in output_dir from which a run resumes bit for bit.",
    "output": "Where results and logs go.",
}
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "hamming", "box", "nearest")
CAPTION_MITIGATIONS = ("mc", "gn", "rc", "rt", "cwr")
LORA_INITS = ("gaussian", "kaiming", "orthogonal", "pissa", "olora")
LORA_KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
LYCORIS = ("loha", "lokr")  # kinds whose factors are multiplied elementwise, and by Kronecker's product
FLOW_SCHEMES = ("sigma_sqrt", "mode", "cosmap", "u_shaped")  # of weighting_scheme, for flow matching only
RANK = 16  # of a LoRA, in the presets and where it is proposed
DISTILL_LEVEL = 2.5  # measured on a small model: docs/results/styles.md
MOVED_BASE = ("pissa", "olora")  # starts of an update that is not zero: the base gives what they take
QUANTIZED = ("int8", "fp8", "nf4")
CONFIG_NAME = "train_config.yaml"
AUTO = "auto"
PRESETS = Path(__file__).parents[1] / "presets"
CONFIG_HELP = "settings from a file with these same names, or a preset by name (sd2-lora, sdxl-lora, sd35-lora, flux-lora, z-image-lora, ...: see configs/); the command line wins"
MAX_SEED = 2**64 - 1  # what torch's generators take
_NOT_AMBIENT = ("objective=plain,gap,weighted,distill", "ambient_level=0")


@dataclass
class TrainConfig:
    """Hold the settings of one run, checked; `None` means "not given" and is resolved to its mode's default here.

    Raises:
        UserError: a value has the wrong type or is out of range, or an option of one mode is given in another.

    Example:
        >>> config = TrainConfig("base-model", train_data_dir="my-images", lora=True)
        >>> config.objective, config.ambient_level, config.rank, config.source
        ('ambient', 1.0, 4, 'my-images')
    """

    # fmt: off
    pretrained_model_name_or_path: str | None = option(None, "base model: pipeline folder, whole model in one .safetensors file, or hub id (required); `embedded` is the small one inside this package", group="model")
    pretrained_vae_model_name_or_path: str | None = option(None, "another VAE in place of the model's own: folder with config.json, or hub id. A full fine-tune saves it; a LoRA must be sampled with it", group="model", metavar="VAE")
    revision: str | None = option(None, "revision of the hub repository", group="model")
    variant: str | None = option(None, "variant of the weight files, e.g. fp16", group="model")
    single_file_config: str | None = same(SamplingOptions, "single_file_config", group="model")
    prediction_type: str | None = option(None, "what the U-Net predicts; default: as in the base model's scheduler. Saved with a full fine-tune; a LoRA must keep the base's", group="model", choices=("epsilon", "v_prediction", "sample"))

    dataset_name: str | None = option(None, "hub id of a dataset; a local folder or parquet file works too", group="data")
    dataset_config_name: str | None = option(None, "configuration of the hub dataset", group="data", needs="dataset_name")
    dataset_split: str | None = same(DatasetOptions, "dataset_split", group="data")
    train_data_dir: str | None = option(None, "folder with images and metadata.jsonl, a parquet file, or WebDataset shards: a folder of .tar files, one, or part-{000..010}.tar", group="data", rival="dataset_name", alias="instance_data_dir")
    image_column: str = same(DatasetOptions, "image_column", group="data")
    caption_column: str = same(DatasetOptions, "caption_column", group="data")
    unlisted: str = same(DatasetOptions, "unlisted", group="data")
    row_filter: list[str] | None = same(DatasetOptions, "row_filter", group="data")
    layout: str = same(DatasetOptions, "layout", group="data")
    caption_extension: str | None = same(DatasetOptions, "caption_extension", group="data")
    instance_prompt: str | None = same(DatasetOptions, "instance_prompt", group="data")
    trigger_word: str | None = same(DatasetOptions, "trigger_word", group="data")
    skip_broken: bool = same(DatasetOptions, "skip_broken", group="data")
    max_train_samples: int | None = option(None, "train on N images only, chosen by seed", group="data", low=1)
    cache_dir: str | None = option(None, "where hub downloads are kept", group="data")
    latent_cache_dir: str | None = option(None, "keep latents and caption embeddings in this folder: computed once, for this run and later ones; VAE and text encoder leave memory", group="data")
    resolution: int = option(512, "side of the images in pixels: they are resized (shorter side) and cropped to it", group="data", low=8)
    allow_upscaling: bool = option(False, "train although most images are enlarged several times to the resolution", group="data")
    image_interpolation_mode: str = option("lanczos", "filter with which images are resized; one for a whole run and for later ones on the same images: another gives each image another noisy copy", group="data", choices=INTERPOLATIONS)
    center_crop: bool = option(False, "crop the centre; otherwise crop at random (ambient: one fixed place per image)", group="data")
    aspect_ratio_buckets: str | None = option(None, "let images keep their shape: auto (sides for the area of resolution, 1:2 to 2:1), or height,width pairs such as 512,768;640,640;768,512; otherwise all are cropped to squares", group="data")
    random_flip: bool = option(False, "mirror half of the images (ambient: always the same half; otherwise chosen anew each epoch)", group="data")
    caption_dropout: float = option(0.1, "share of samples trained with the empty caption: guidance and the guard's score need a trained unconditional branch", group="data", low=0.0, high=1.0, alias="proportion_empty_prompts")
    max_sequence_length: int | None = option(None, "tokens of a caption that the text encoder of a transformer (T5, Qwen, Gemma) is given in training, padding included (default: as many as its pipeline gives it)", group="data", low=1)
    dataloader_num_workers: int = option(0, "worker processes that decode images where latents are not held in memory", group="data", low=0)

    objective: str = option("ambient", "the loss", group="objective", choices=("ambient", "plain", "gap", "weighted", "distill"))
    ambient_level: float | str | None = option(None, "ambient and weighted: noise level s_n, 0 is plain DDPM (default 1.0, t = 353 on SD's schedule); ambient: auto measures the images and proposes one; gap: lower edge of the band; distill: where the plain loss ends (default distill_level)", group="objective", low=0.0, words=(AUTO,), needs="objective=ambient,gap,weighted,distill")
    ambient_timestep: int | None = option(None, "the same level given as a timestep of the base model's schedule", group="objective", low=0, rival="ambient_level", needs="objective=ambient,gap,weighted,distill")
    gap_upper: float | None = option(None, "gap: upper edge of the noise levels without loss (required there)", group="objective", above=0.0, needs="objective=gap")
    distill_level: float | None = option(None, "distill: noise level above which the target is the base model's prediction on the same noisy image, without an adapter (default ambient_level, or 2.5); one more forward pass without gradient. From a lower ambient_level up to it the loss is ambient's", group="objective", above=0.0, needs="objective=distill")
    distill_without: list[str] | None = option(None, "distill: words or phrases of the captions that the base does not know, such as a trigger word: it is asked without them, and the model learns to draw the same with them", group="objective", needs="objective=distill")
    reweight: int | None = option(None, "ambient, weighted, and distill with a lower ambient_level: power q of the weight a^q, a = 1 - s_n^2 / s_t^2, on the levels above s_n: 2 = the paper's loss, 1 = noise target, 0 = full re-weighting (default 2)", group="objective", choices=(2, 1, 0), needs="objective=ambient,weighted,distill")
    noise_seed: int = option(0, "seed of what is fixed per image: its noise, its VAE draw and, under ambient, its view. The same images in a later run must keep the same seed: two noises of one image average out", group="objective", low=0, high=MAX_SEED)

    near_duplicates: str | None = option(None, "ambient, and distill with a lower ambient_level: share = re-encoded, resized or mirrored copies of an image get one noise, as exact copies always do; off = each its own, which leaks (default share)", group="objective", choices=("share", "off"), needs="objective=ambient,distill")
    fresh_copies: bool = option(False, "ambient, a control for studies: a NEW noisy copy of an image at every step in place of the fixed one. It leaks: copies of one image average out to the clean one", group="objective", needs="objective=ambient")
    snr_gamma: float | None = option(None, "Min-SNR weighting with this gamma (the paper's is 5), times the objective's own weight", group="objective", above=0.0)
    weighting_scheme: str = option("none", "none: uniform timesteps; logit_normal: noise levels s_t are log-normal, ln s ~ N(logit_mean, logit_std^2), as in EDM and Stable Diffusion 3 (EDM: mean -0.5, std 1.2 at latents of unit variance). Of flow matching too, before the scheduler's shift: mode and u_shaped draw timesteps from the middle or the ends, sigma_sqrt and cosmap weight the loss", group="objective", choices=("none", "logit_normal", *FLOW_SCHEMES))
    logit_mean: float | None = option(None, "logit_normal: mean of ln s (default 0)", group="objective", needs="weighting_scheme=logit_normal")
    logit_std: float | None = option(None, "logit_normal: standard deviation of ln s (default 1)", group="objective", above=0.0, needs="weighting_scheme=logit_normal")
    mode_scale: float | None = option(None, "mode: scale of the mode; below 0 the ends are drawn more often (default 1.29)", group="objective", needs="weighting_scheme=mode")
    flow_shift: float | None = option(None, "flow matching: shift of the noise levels that are trained, s -> shift * s; 1: none (default: the scheduler's, which may depend on the resolution)", group="objective", above=0.0)
    precondition_outputs: bool = option(False, "flow matching: the loss is that of the x0-prediction x_t - sigma * output, sigma^2 times that of the flow (Esser et al. 2024)", group="objective")
    guidance_scale: float | None = option(None, "FLUX.1 dev: the guidance scale that its network is given as an input in training (default 3.5, as its pipeline samples)", group="objective", low=0.0)
    noise_offset: float = option(0.0, "offset of the fresh noise per sample and channel, for very dark and bright images (without the ambient loss only)", group="objective", low=0.0, needs=_NOT_AMBIENT, because="the ambient loss needs fresh noise of the covariance of each image's fixed one, and an offset gives it another: above the noise level s_n channel means would be learnt wrongly")
    input_perturbation: float = option(0.0, "perturb the noise of the input, not of the target, by that much (without the ambient loss only; 0.1 in its paper)", group="objective", low=0.0, needs=_NOT_AMBIENT, because="the ambient loss tells fixed from fresh noise by the level of its input, and a perturbed input lies above it")

    memorization_threshold: float | None = option(None, "a sample with || eps_c - eps_u || of at least this gives no loss (Wen et al. 2024); one more forward pass without gradient per pass. The scale is the model's own", group="mitigation", above=0.0)
    agc: float | None = option(None, "a sample whose error is below this times the running mean of its timestep gives no loss (anti-gradient control, Liu et al. 2024; without a value 0.8: the 1/1.25 of its Stable Diffusion release; its CIFAR release has 0.5)", group="mitigation", above=0.0, high=1.0, bare=0.8)
    dropped_mean: str | None = option(None, "with memorization_threshold or agc: all = a dropped sample counts as 0 in the mean of a step (default); kept = the loss is divided by the samples kept, of all processes and passes, as published", group="mitigation", choices=("all", "kept"), needs=("memorization_threshold", "agc"))
    caption_mitigation: str | None = option(None, "change captions in training (Somepalli et al. 2023): mc = one of several captions of the row, gn = noise on embeddings, rc = a random caption, rt = random words put in, cwr = words of the caption repeated", group="mitigation", choices=CAPTION_MITIGATIONS)
    caption_mitigation_p: float | None = option(None, "share of samples whose caption is changed (default as published: 0.1 for rc, rt and cwr, 1 for mc and gn)", group="mitigation", low=0.0, high=1.0, needs="caption_mitigation")
    caption_noise_std: float | None = option(None, "gn: standard deviation of the noise, in the embedding's own units (default 0.1)", group="mitigation", above=0.0, needs="caption_mitigation=gn")

    seed: int = option(0, "seed: order, timesteps, fresh noise, caption dropout and LoRA start", group="optimisation", low=0, high=MAX_SEED)
    train_batch_size: int = option(16, "images per process and forward pass", group="optimisation", low=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", group="optimisation", low=1)
    num_train_epochs: int = option(100, "passes over the images; max_train_steps overrides it", group="optimisation", low=1)
    max_train_steps: int | None = option(None, "optimizer steps in total", group="optimisation", low=1, rival="num_train_epochs")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a quarter slower", group="optimisation")
    gradient_checkpointing_fraction: float | None = option(None, "share of the network's blocks that gradient_checkpointing recomputes, spread evenly (default: all)", group="optimisation", above=0.0, high=1.0, needs="gradient_checkpointing")
    learning_rate: float = option(1e-4, "peak learning rate", group="optimisation", above=0.0)
    scale_lr: bool = option(False, "multiply the learning rate by the global batch size", group="optimisation")
    lr_scheduler: str = option("constant", "learning-rate schedule, counted in optimizer steps", group="optimisation", choices=LR_SCHEDULERS)
    lr_num_cycles: int = option(1, "cosine_with_restarts: how often it starts", group="optimisation", low=1, needs="lr_scheduler=cosine_with_restarts")
    lr_power: float = option(1.0, "polynomial: its power", group="optimisation", above=0.0, needs="lr_scheduler=polynomial")
    lr_warmup_steps: int = option(500, "warm-up, in optimizer steps (constant has none)", group="optimisation", low=0)
    adam_beta1: float = option(0.9, "decay of the first moment", group="optimisation", low=0.0, below=1.0)
    adam_beta2: float = option(0.999, "decay of the second moment", group="optimisation", low=0.0, below=1.0)
    adam_weight_decay: float = option(1e-2, "decoupled weight decay", group="optimisation", low=0.0)
    adam_epsilon: float = option(1e-8, "added to the root of the second moment", group="optimisation", above=0.0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm over all trained weights; 0: they are not", group="optimisation", low=0.0)
    mixed_precision: str | None = option(None, "arithmetic of forward and backward passes; trained weights stay float32. Default: as `accelerate launch` says, else no", group="optimisation", choices=("no", "fp16", "bf16"))
    allow_tf32: bool = option(False, "let Ampere and later GPUs compute float32 matrix products and convolutions in TF32; otherwise neither is", group="optimisation")
    deterministic: bool = option(False, "use deterministic kernels only, so that a run that resumes on a GPU has the bits of one that was not stopped, with any number of processes; slower. An operation that has none ends the run", group="optimisation")
    use_8bit_adam: bool = option(False, "AdamW with moments in 8 bits (needs bitsandbytes)", group="optimisation")
    offload_optimizer: bool = option(False, "keep AdamW's moments in CPU memory between steps", group="optimisation", needs="not lora", because="the moments of an adapter are small")
    fused_backward_pass: bool = option(False, "make each weight's step within the backward pass and free its gradient: the same bits in less memory. Needs --max_grad_norm 0 and no accumulation", group="optimisation", needs="not lora", because="the gradients of an adapter are small")
    full_bf16: bool = option(False, "hold weights and gradients in bfloat16, rounded up or down by chance so that small steps are not lost. Needs --mixed_precision bf16", group="optimisation", needs="not lora", because="an adapter is trained in float32, and its base held in the precision that is computed in")
    compile: bool = option(False, "compile the network with torch.compile: minutes at the start and after each new image size, then less overhead on a GPU; with the bits of the compiled kernels", group="optimisation", rival="enable_xformers_memory_efficient_attention")
    enable_xformers_memory_efficient_attention: bool = option(False, "attention of xformers in place of torch's own (needs xformers)", group="optimisation")
    use_ema: bool = option(False, "average the weights over the steps; images are sampled from the average, and it is what is saved", group="optimisation")
    offload_ema: bool = option(False, "keep the average in CPU memory between steps; needs use_ema", group="optimisation", needs="use_ema")
    foreach_ema: bool = option(False, "update the average in one call over all tensors; needs use_ema", group="optimisation", needs="use_ema")

    lora: bool = option(False, "train a LoRA instead of the whole U-Net", group="LoRA")
    quantize_base: str | None = option(None, "hold the frozen network in 8 or 4 bits (QLoRA): int8, fp8 (e4m3) or nf4, linear layers and convolutions (needs bitsandbytes). The adapter is saved for the base as it is", group="LoRA", choices=QUANTIZED, needs="lora")
    offload_base: bool = option(False, "keep the codes of quantize_base in CPU memory; each layer fetches its own in both passes", group="LoRA", needs="quantize_base")
    lora_weights: str | None = same(SamplingOptions, "lora_weights", text="LoRA on the model: folder, .safetensors file or hub id. Training continues it; rank, lora_alpha, layers and kind are its own", group="LoRA", needs="lora")
    lora_kind: str | None = option(None, "what the update is made of (default lora): loha = two products B A multiplied elementwise, of rank up to rank^2; lokr = a small matrix and a product B A multiplied by Kronecker, the smallest file. Both are saved for diffusers as the LoRA that they are exactly, and in LyCORIS's format for ComfyUI, AUTOMATIC1111 and others", group="LoRA", choices=tuple(LORA_KINDS), needs="lora")
    rank: int | None = option(None, "rank of the update (default 4)", group="LoRA", low=1, needs="lora")
    lora_min_rank: int | None = option(None, "T-LoRA: let the rank of the U-Net's update depend on the noise level, from this at the highest to the rank at t = 0 (default: the rank everywhere). Sampling does so too in this package; other readers apply the whole rank", group="LoRA", low=1, needs="lora")
    lora_init: str | None = option(None, "how the update begins. gaussian (default, as in diffusers' scripts), kaiming, orthogonal: at zero. pissa: at the largest singular components of each weight, olora: at its QR components; both take them out of the base and are saved as a LoRA of twice the rank on the untouched base", group="LoRA", choices=LORA_INITS, needs="lora")
    use_rslora: bool = option(False, "scale the update by lora_alpha / sqrt(rank); saved as the lora_alpha that gives this scale in every reader", group="LoRA", needs="lora")
    lora_alpha: float | None = option(None, "the update is scaled by lora_alpha / rank (default: the rank); kept in the saved file", group="LoRA", above=0.0, needs="lora")
    lora_target_modules: list[str] | None = option(None, "names of the layers that get an adapter (default: the attention projections, in a U-Net to_k to_q to_v to_out.0), with spaces or commas between them", group="LoRA", needs="lora", alias="lora_layers")
    lora_dropout: float | None = option(None, "share of the update's input that is dropped in training (default 0); a function of seed, layer and place in the run", group="LoRA", low=0.0, below=1.0, needs="lora")
    use_dora: bool = option(False, "train DoRA: the length of each row of the weights too", group="LoRA", needs="lora")
    train_text_encoder: bool = option(False, "train adapters of the text encoders too, of the same kind, rank and alpha; embeddings are then computed at every step", group="LoRA", needs="lora")
    text_encoder_lr: float | None = option(None, "learning rate of the text encoders (default: learning_rate)", group="LoRA", above=0.0, needs="train_text_encoder")
    output_kohya_format: bool = option(False, "write pytorch_lora_weights_kohya.safetensors too, for ComfyUI, AUTOMATIC1111 and others", group="LoRA", needs="lora")

    validation_prompts: list[str] | None = option(None, "prompts, or a .jsonl file with one {\"prompt\": ...} a line", group="validation", alias="validation_prompt")
    num_validation_images: int | None = option(None, "images per prompt (default 4)", group="validation", low=1, needs="validation_prompts")
    validation_epochs: int | None = option(None, "sample every N epochs (default 5; with --lora 1)", group="validation", low=1, needs="validation_prompts")
    validation_steps: int | None = option(None, "sample every N optimizer steps instead", group="validation", low=1, rival="validation_epochs", needs="validation_prompts")

    with_prior_preservation: bool = option(False, "train as many class images as training images in each batch, so that the class of the subject stays what the base knows (DreamBooth)", group="class")
    class_data_dir: str | None = option(None, "their folder. What it lacks of num_class_images the base generates, under the guard, and the folder keeps; a folder that was filled by hand is taken as it is (required)", group="class", needs="with_prior_preservation")
    class_prompt: str | None = option(None, "their prompt, such as \"a photo of a dog\" (required)", group="class", needs="with_prior_preservation")
    num_class_images: int | None = option(None, "how many of them (default 100)", group="class", low=1, needs="with_prior_preservation")
    prior_loss_weight: float = option(1.0, "weight of their loss; also of a dataset's own regularisation images", group="class", above=0.0)

    probe_steps: int | None = option(None, "measure the copy rate every N optimizer steps: sample images for training captions and compare them with the training images", group="validation", low=1)
    probe_images: int | None = option(None, "images per evaluation (default 32)", group="validation", low=1, needs="probe_steps")
    stop_on_memorization: float | None = option(None, "end the run at the first evaluation whose copy rate, decided as in an audit, is above this; with --keep best at the second in a row", group="validation", low=0.0, high=1.0, needs="probe_steps")
    keep: str = option("last", "which weights are the result. best: of the last evaluation before copying begins, that is before two in a row have more copies than images of the base (and than stop_on_memorization), or more than half of the images beyond the base's nearest to their own training image; the run ends there. Every evaluation then leaves a checkpoint", group="validation", choices=("last", "best"), needs="probe_steps")
    probe_prompts: list[str] | None = option(None, "keep best: prompts that are not trained, or a file of them, on which the probe measures quality (default: composed of the training captions' words)", group="validation", needs="keep=best")

    checkpointing_steps: int = option(500, "write a checkpoint every N optimizer steps", group="checkpoints", low=1)
    checkpoints_total_limit: int | None = option(None, "keep only the N newest checkpoints", group="checkpoints", low=1)
    resume_from_checkpoint: str | None = option(None, "a checkpoint folder, or `latest`: the newest whole one in output_dir (none yet: start anew)", group="checkpoints")

    output_dir: str = option("sd-model-finetuned", "folder for everything that is written: the pipeline or pytorch_lora_weights.safetensors, " + CONFIG_NAME + ", checkpoints, logs", group="output", alias="out", metavar="PATH")
    overwrite: bool = option(False, "remove what an earlier run of this command left in the folder, and begin anew: result, checkpoints and records; every other file stays", group="output")
    report_to: str = option("tensorboard", "where curves go; all: wherever a package is installed for", group="output", choices=("tensorboard", "wandb", "all", "none"))
    tracker_project_name: str = option("text2image-fine-tune", "name under which curves are kept", group="output")
    logging_dir: str = option("logs", "folder of the TensorBoard files, inside output_dir", group="output")
    push_to_hub: bool = option(False, "upload the results at the end; token and repository are checked before training", group="output")
    hub_model_id: str | None = option(None, "repository that receives them, owner/name or name (default: the last part of output_dir)", group="output")
    hub_token: str | None = option(None, "token of the hub; better: HF_TOKEN or `hf auth login`. Never written", group="output", secret=True)
    hub_private_repo: bool = option(False, "create the repository private", group="output")
    # fmt: on

    def __post_init__(self) -> None:
        self.resolution_given = True  # `parse` knows better
        settings.check(self)
        self._check_modes()

    def _check_modes(self) -> None:
        """Refuse options of a mode that is off, and fill in the defaults of the modes that are on."""
        if not self.pretrained_model_name_or_path:
            raise UserError("pretrained_model_name_or_path is missing", rule="a base model is needed",
                            remedy="give a pipeline folder or a hub id")  # fmt: skip
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise UserError(
                "both dataset_name and train_data_dir are given" if self.dataset_name else "no images are named",
                rule="exactly one of dataset_name and train_data_dir is needed",
                remedy="name a folder with metadata.jsonl, a parquet file or a hub dataset",
            )
        settings.check_modes(self)
        for term in self.row_filter or ():
            split_condition(term)
        if self.lora_target_modules:
            self.lora_target_modules = [name.strip() for one in self.lora_target_modules for name in one.split(",")]

        if self.ambient_level is not None and self.ambient_timestep is not None:
            raise UserError("ambient_level and ambient_timestep are both given", rule="they say the same thing twice",
                            remedy="leave one of them out")  # fmt: skip
        no_level = self.ambient_level is None and self.ambient_timestep is None
        if self.ambient_level == AUTO and self.objective in ("gap", "weighted", "distill"):
            raise UserError(f"ambient_level is auto with objective {self.objective}", rule="the images propose a level for ambient",
                            remedy="add --objective ambient, or give the number that an ambient run printed: a control shares its level")  # fmt: skip
        if self.ambient_level == AUTO and self.near_duplicates == "off":
            raise UserError("ambient_level is auto with near_duplicates off", rule="it is measured between neighbours, and copies are none",
                            remedy="leave near_duplicates out, or give the level as a number")  # fmt: skip
        if self.objective in ("ambient", "weighted"):
            if no_level:
                self.ambient_level = 1.0
            if self.reweight is None:
                self.reweight = 2
            if self.objective == "ambient" and self.near_duplicates is None:
                self.near_duplicates = "share"
        elif self.objective == "gap":
            if no_level or self.gap_upper is None:
                raise UserError("objective gap has no band", rule="it needs a lower edge (ambient_level or ambient_timestep) and gap_upper",
                                remedy="for example --ambient_level 0.5 --gap_upper 2.0")  # fmt: skip
            if isinstance(self.ambient_level, float) and self.gap_upper <= self.ambient_level:
                raise UserError(f"gap_upper is {self.gap_upper}", rule=f"it must be above ambient_level = {self.ambient_level}",
                                remedy="raise gap_upper or lower ambient_level")  # fmt: skip
        elif self.objective == "distill":
            self._settle_distill(no_level)
        if self.weighting_scheme == "logit_normal":
            self.logit_mean = 0.0 if self.logit_mean is None else self.logit_mean
            self.logit_std = 1.0 if self.logit_std is None else self.logit_std
        if self.weighting_scheme == "mode" and self.mode_scale is None:
            self.mode_scale = 1.29
        if self.dropped_mean == "all":
            self.dropped_mean = None  # one spelling of one run
        if self.caption_mitigation is not None and self.caption_mitigation_p is None:
            self.caption_mitigation_p = 1.0 if self.caption_mitigation in ("mc", "gn") else 0.1
        if self.caption_mitigation == "gn":
            self.caption_noise_std = self.caption_noise_std or 0.1
        if self.lora_init == "gaussian":
            self.lora_init = None  # one spelling of one run
        for given, name, rule in (
            (self.use_dora and self.lora_init in MOVED_BASE, "use_dora", f"the row lengths of DoRA belong to weights that {self.lora_init} changes"),
            (self.lora_weights and self.lora_init, "lora_init", "an adapter that lora_weights names has begun already"),
            (self.lora_weights and self.use_rslora, "use_rslora", "the adapter that lora_weights names has a scale of its own"),
            (self.lora_min_rank and self.lora_init in ("orthogonal", *MOVED_BASE), "lora_min_rank", "the update would not begin at zero where components are masked"),
            (self.lora_init == "orthogonal" and (self.rank or 4) % 2, f"rank {self.rank}", "orthogonal halves need an even rank"),
        ):  # fmt: skip
            if given:
                raise UserError(f"{name} is given with {'lora_weights' if self.lora_weights else f'lora_init {self.lora_init}'}", rule=rule,
                                remedy="leave one of them out" if "rank " not in name else "give an even one")  # fmt: skip
        for name in ("use_dora", "lora_dropout"):
            if self.compile and getattr(self, name):
                raise UserError(f"compile is given with {name}", rule="torch takes it apart into dozens of graphs, which gain nothing",
                                remedy="leave one of them out")  # fmt: skip
        for name, rule in (
            ("compile", "the compiler chooses kernels by timing them"),
            ("enable_xformers_memory_efficient_attention", "the backward pass of its attention is not deterministic"),
        ):
            if self.deterministic and getattr(self, name):
                raise UserError(f"deterministic is given with {name}", rule=rule, remedy="leave one of them out")
        if self.gradient_checkpointing_fraction == 1:
            self.gradient_checkpointing_fraction = None  # one spelling of one run
        for name in ("quantize_base", "gradient_checkpointing_fraction"):
            if self.compile and getattr(self, name):
                raise UserError(
                    f"compile is given with {name}",
                    rule="the two were never tested together",
                    remedy="leave one of them out",
                )
        if self.lora_min_rank and self.use_dora:
            raise UserError("lora_min_rank is given with use_dora", rule="the row lengths of DoRA belong to the update of the whole rank",
                            remedy="leave one of them out")  # fmt: skip
        if self.lora_min_rank and not self.lora_weights and self.lora_min_rank >= (self.rank or 4):
            raise UserError(f"lora_min_rank is {self.lora_min_rank}", rule=f"it must be below the rank, {self.rank or 4}",
                            remedy="raise rank, or leave lora_min_rank out")  # fmt: skip
        for name, rule in (
            ("use_dora", "its row lengths are trained with a LoRA only"),
            ("use_rslora", "readers scale these kinds by lora_alpha / rank"),
            ("lora_min_rank", "it masks components of one product B A"),
            ("lora_init", "these kinds begin at zero, as peft and LyCORIS have it"),
            (
                "lora_dropout",
                "peft drops parts of these kinds by the global generator, and a resumed run would drop others",
            ),
        ):
            if self.lora_kind in LYCORIS and getattr(self, name):
                raise UserError(
                    f"{name} is given with lora_kind {self.lora_kind}", rule=rule, remedy="leave one of them out"
                )
        if self.fused_backward_pass:
            for given, name, rule in (
                (self.max_grad_norm > 0, f"max_grad_norm {self.max_grad_norm:g}", "the norm over all gradients is known after the pass only; add --max_grad_norm 0"),
                (self.gradient_accumulation_steps > 1, f"gradient_accumulation_steps {self.gradient_accumulation_steps}", "the first pass would make the step already"),
                (self.with_prior_preservation, "with_prior_preservation", "class images have a pass of their own"),
                (self.dropped_mean == "kept", "dropped_mean kept", "it scales the gradients after the pass"),
                (self.compile, "compile", "a compiled backward pass gives all gradients at once"),
            ):  # fmt: skip
                if given:
                    raise UserError(
                        f"fused_backward_pass is given with {name}", rule=rule, remedy="leave one of them out"
                    )
        if self.use_dora and self.output_kohya_format:
            raise UserError("output_kohya_format is given with use_dora",
                            rule="its readers disagree about which side of a weight a DoRA's lengths belong to",
                            remedy="leave one of them out")  # fmt: skip

        if self.lora:
            self.lora_dropout = self.lora_dropout or 0.0
        if self.lora and self.lora_weights is None:  # else the plan takes them from the adapter
            self.lora_kind, self.rank = self.lora_kind or "lora", self.rank or 4
            self.lora_alpha = self.lora_alpha or float(self.rank)

        if self.with_prior_preservation:
            for name in ("class_data_dir", "class_prompt"):
                if not getattr(self, name):
                    raise UserError(f"{name} is missing", rule="with_prior_preservation needs it",
                                    remedy="for example --class_data_dir class-images --class_prompt \"a photo of a dog\"")  # fmt: skip
            self.num_class_images = self.num_class_images or 100

        if self.validation_prompts:
            if self.validation_steps is not None and self.validation_epochs is not None:
                raise UserError("validation_steps and validation_epochs are both given", rule="one of them sets the rhythm",
                                remedy="leave one of them out")  # fmt: skip
            if self.validation_steps is None and self.validation_epochs is None:
                self.validation_epochs = 1 if self.lora else 5
            self.num_validation_images = self.num_validation_images or 4
        if self.push_to_hub and self.hub_model_id is None:
            self.hub_model_id = Path(self.output_dir).absolute().name
        if self.probe_steps is not None:
            self.probe_images = self.probe_images or 32
        if self.overwrite and self.resume_from_checkpoint is not None:
            raise UserError("overwrite and resume_from_checkpoint are both given", rule="one starts anew, the other continues",
                            remedy="leave one of them out")  # fmt: skip

    def _settle_distill(self, no_level: bool) -> None:
        """Check the two levels of `distill`: the ambient loss lies between them, and is off where they are one."""
        if no_level:
            self.distill_level = DISTILL_LEVEL if self.distill_level is None else self.distill_level
        elif self.distill_level is None and self.ambient_timestep is None:
            self.distill_level = float(self.ambient_level or 0.0)
        level, upper = self.ambient_level, self.distill_level
        if level == upper:  # one spelling of one run, and nothing that the next `--distill_level` would meet
            level = self.ambient_level = None
        if (upper is not None and upper <= 0) or (isinstance(level, float) and level <= 0):
            raise UserError(f"ambient_level is {0.0 if level is None else level:g} with objective distill", rule="nothing would be learnt from the images",
                            remedy="give a level above 0, such as 2.5")  # fmt: skip
        if isinstance(level, float) and upper is not None and upper < level:
            raise UserError(f"distill_level is {upper:g}", rule=f"it must be at least ambient_level, {level:g}",
                            remedy="raise distill_level or lower ambient_level")  # fmt: skip
        if any(not phrase.strip() for phrase in self.distill_without or ()):
            raise UserError("distill_without has an empty phrase", rule="words of the captions are left out",
                            remedy="name them, for example --distill_without sks")  # fmt: skip
        ambient = upper is not None and (level is not None or self.ambient_timestep is not None)
        for given, name, rule in (
            (not ambient and self.reweight is not None, "reweight", "without an ambient_level below distill_level no loss is ambient"),
            (not ambient and self.near_duplicates is not None, "near_duplicates", "without an ambient_level below distill_level no image has a fixed noise"),
            (ambient and self.noise_offset, "noise_offset", "between the two levels the loss is ambient's, which needs white noise"),
            (ambient and self.input_perturbation, "input_perturbation", "between the two levels the loss is ambient's, which reads the level of its input"),
            (self.agc, "agc", "near the base's own prediction the error is small from the start, and says nothing of memorization"),
            (self.lora_init in MOVED_BASE, f"lora_init {self.lora_init}", "the base without the adapter is no longer the base"),
        ):  # fmt: skip
            if given:
                raise UserError(f"{name} is given with objective distill", rule=rule, remedy="leave one of them out")
        if ambient:
            self.reweight = 2 if self.reweight is None else self.reweight
            self.near_duplicates = self.near_duplicates or "share"

    @property
    def source(self) -> str:
        """Return the name of the images' source, whichever of the two options gave it."""
        return str(self.train_data_dir if self.dataset_name is None else self.dataset_name)

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved settings without those that are `None` or secret; `TrainConfig(**config.to_dict())` equals `config`."""
        secret = {item.name for item in dataclasses.fields(self) if item.metadata["secret"]}
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k not in secret}

    def save(self, folder: Path) -> Path:
        """Write the resolved settings to `folder/train_config.yaml`, which `--config` reads back, and return the path."""
        import yaml

        path = folder / CONFIG_NAME
        head = "# Resolved settings of the run beside this file. Run it again: --config train_config.yaml\n"
        # A file that is read back must not overwrite anything, nor clash with --resume_from_checkpoint.
        values = {name: value for name, value in self.to_dict().items() if name != "overwrite"}
        files.atomic_write(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), synced=True)
        return path


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Turn a command line, and the YAML file that it may name with `--config`, into a `TrainConfig`.

    The command line wins over the file, key by key (`ambient_sd.utils.settings.over_file`). Where it switches a mode of the file off, the
    file's options of that mode are dropped, and one line on stderr says so.

    Raises:
        UserError: an unknown flag or key (the nearest known one is suggested), or a bad value.

    Example:
        >>> config = parse(["--pretrained_model_name_or_path", "base-model", "--train_data_dir", "my-images", "--resolution", "256"])
        >>> config.resolution, config.resolution_given
        (256, True)
    """
    flags = vars(make_parser().parse_args(argv))
    path = flags.pop("config", None)
    values, dropped = settings.over_file(TrainConfig, flags, load_yaml(path) if path else {})
    config = TrainConfig(**values)
    if dropped and os.environ.get("RANK", "0") == "0":
        print(f"ambient-sd: left out of {path}, for the command line chooses otherwise: {', '.join(dropped)}", file=sys.stderr)  # fmt: skip
    config.resolution_given = "resolution" in values
    return config


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file with the keys of `TrainConfig`, or from a preset of this package by its name, such as sd2-lora.

    Raises:
        UserError: the file is missing, is no YAML mapping, or has an unknown key.

    Example:
        >>> import tempfile
        >>> path = TrainConfig("base-model", train_data_dir="my-images").save(Path(tempfile.mkdtemp()))
        >>> load_yaml(path)["train_data_dir"]
        'my-images'
    """
    if not os.path.exists(path) and not Path(path).suffix and os.sep not in str(path):
        known = {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}
        if str(path) not in known:
            raise UserError(f"config is {path}", rule=f"there is no such file, and the presets are {', '.join(known)}",
                            remedy=settings.nearest(str(path), list(known)))  # fmt: skip
        path = known[str(path)]
    return settings.load_yaml(path, TrainConfig, ELSEWHERE)


def make_parser() -> Parser:
    """Build the command line from the fields of `TrainConfig`; only what the user gives ends up in the result.

    Example:
        >>> vars(make_parser().parse_args(["--max_train_steps", "100"]))  # texts, until `parse` checks them
        {'max_train_steps': '100'}
    """
    parser = Parser(
        prog="train_text_to_image_ambient.py",
        usage="[accelerate launch] train_text_to_image_ambient.py --config FILE.yaml [--flag value ...]",
        description="Fine-tune an image model, whole or by LoRA, so that it hands fewer of its training images back.",
        epilog="Example: accelerate launch train_text_to_image_ambient.py --config configs/sd2-lora.yaml --train_data_dir my-images",
        elsewhere=ELSEWHERE,
    )
    parser.add_argument("--config", metavar="NAME|FILE.yaml", help=CONFIG_HELP)  # fmt: skip
    add_flags(parser, TrainConfig, groups=GROUPS)
    return parser
