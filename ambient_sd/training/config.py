"""Every setting of a training run: one field of `TrainConfig` = one command-line flag = one key of a YAML file.

Names and defaults are those of diffusers' `train_text_to_image.py` and `train_text_to_image_lora.py` where those scripts
have the setting. Values are checked here, before anything heavy is imported; what needs the base model or the images
(a level beyond the schedule, a missing caption column) is checked by `ambient_sd.training.loop`, still before weights
load. This module imports no torch: `--help` must come at once.
"""

# ruff: noqa: RUF009
# (`option` returns a dataclasses.field.)

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ambient_sd.data.conditions import split_condition
from ambient_sd.utils import files
from ambient_sd.utils.errors import UserError

GROUPS = {
    "model": "Which base model is fine-tuned: a local pipeline folder or a hub id.",
    "data": "Images and captions: a folder with metadata.jsonl, a parquet file, WebDataset shards, or a dataset's hub id.",
    "objective": "The loss. `ambient` never shows the network a clean image above the nature level s_n = sigma / alpha "
    "(on SD's schedule s = 0.34 at t=100, 0.83 at 300, 1.16 at 400, 2.3 at 600, 14.6 at 999); one noise per image, fixed "
    "for ever. `plain` is the ordinary loss. `gap` is plain without the band of noise levels from the level to gap_upper; `weighted` is plain with ambient's weight a^q above the level: controls for studies.",
    "mitigation": "Published ways to keep a model from memorizing, beside the loss or in place of the ambient one; each off by default.",
    "optimisation": "Steps, batches and the optimizer (AdamW). Steps are optimizer steps.",
    "LoRA": "Low-rank adapters instead of a full fine-tune; these options need --lora.",
    "validation": "Images drawn during training, to TensorBoard and to output_dir/validation/.",
    "checkpoints": "Folders checkpoint-N in output_dir from which a run continues bit for bit.",
    "output": "Where results and logs go.",
}
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
CAPTION_MITIGATIONS = ("mc", "gn", "rc", "rt", "cwr")
DEFAULT_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
CONFIG_NAME = "train_config.yaml"
AUTO = "auto"
MAX_SEED = 2**64 - 1  # what torch's generators take
# Settings that answer one question: given on the command line, one of them replaces the others of the file.
RIVALS = (
    ("dataset_name", "train_data_dir"),
    ("ambient_level", "ambient_timestep"),
    ("validation_epochs", "validation_steps"),
    ("num_train_epochs", "max_train_steps"),
)
# Why the ambient loss cannot take them: see `ambient_sd.training.noising`.
AMBIENT_REFUSES = {
    "noise_offset": "the ambient loss needs fresh noise of the covariance of each image's fixed one, and an offset gives it "
    "another: above the nature level channel means would be learnt wrongly",
    "input_perturbation": "the ambient loss tells fixed from fresh noise by the level of its input, and a perturbed input "
    "lies above it",
}


# A value from a file may be of any size: YAML's anchors make lists of lists of lists that never end in print.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 200, 60, 200


def option(
    default: Any,
    group: str,
    text: str,
    *,
    choices: Sequence[Any] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    alias: str = "",
    secret: bool = False,
    words: Sequence[str] = (),
    bare: Any = None,
) -> Any:
    """Declare a setting: its default, its group in `--help`, its help text and the rule that its value must obey.

    `low` and `high` are inclusive bounds, `above` is an exclusive lower bound; `alias` is a second spelling of the flag. A `secret` is never
    printed nor written. `words` are values besides those of its type. `bare` is the value of the flag without one.
    """
    meta = {"group": group, "text": text, "choices": tuple(choices), "low": low, "above": above, "high": high, "alias": alias, "secret": secret, "words": tuple(words), "bare": bare}  # fmt: skip
    return field(default=default, metadata=meta, repr=not secret)


@dataclass
class TrainConfig:
    """Hold the settings of one run, checked; `None` means "not given" and is resolved to its mode's default here.

    Raises:
        UserError: a value has the wrong type or is out of range, or an option of one mode is given in another.
    """

    # fmt: off
    pretrained_model_name_or_path: str | None = option(None, "model", "base pipeline: local folder or hub id (required)")
    pretrained_vae_model_name_or_path: str | None = option(None, "model", "another VAE in place of the base's: folder with config.json, or hub id. A full fine-tune saves it; a LoRA must be drawn with it")
    revision: str | None = option(None, "model", "revision of the hub repository")
    variant: str | None = option(None, "model", "variant of the weight files, e.g. fp16")
    prediction_type: str | None = option(None, "model", "what the U-Net predicts; default: as in the base model's scheduler. Saved with a full fine-tune; a LoRA must keep the base's", choices=("epsilon", "v_prediction", "sample"))

    dataset_name: str | None = option(None, "data", "hub id of a dataset; a local folder or parquet file works too")
    dataset_config_name: str | None = option(None, "data", "configuration of the hub dataset")
    dataset_split: str | None = option(None, "data", "split: of a hub dataset (default train), or the value of a local source's `split` column")
    train_data_dir: str | None = option(None, "data", "folder with images and metadata.jsonl, a parquet file, or WebDataset shards: a folder of .tar files, one, or part-{000..010}.tar")
    image_column: str = option("image", "data", "column of the images (parquet, hub; a folder uses file_name)")
    caption_column: str = option("text", "data", "column of the captions")
    unlisted: str = option("refuse", "data", "images in a folder that its list does not name, hidden ones, and kinds that are not read: refuse = end the run in one line; ignore = leave them out and say how many", choices=("refuse", "ignore"))
    row_filter: list[str] | None = option(None, "data", "keep rows where all of these hold: column=value, 'column<=number' or 'column>=number'")
    max_train_samples: int | None = option(None, "data", "train on that many images only (a draw by seed)", low=1)
    cache_dir: str | None = option(None, "data", "where hub downloads are kept")
    latent_cache_dir: str | None = option(None, "data", "keep latents and caption embeddings in this folder: computed once, for this run and later ones; VAE and text encoder leave memory")
    resolution: int = option(512, "data", "images are resized (shorter side) and cropped to this many pixels", low=8)
    allow_upscaling: bool = option(False, "data", "train although most images are enlarged several times to the resolution")
    center_crop: bool = option(False, "data", "crop the centre; otherwise the crop is drawn (ambient: once per image, for ever)")
    aspect_ratio_buckets: str | None = option(None, "data", "let images keep their shape: auto (sides for the area of resolution, 1:2 to 2:1), or height,width pairs such as 512,768;640,640;768,512; without it all are cropped to squares")
    random_flip: bool = option(False, "data", "mirror half of the images (ambient: drawn once per image, for ever; otherwise anew each epoch)")
    caption_dropout: float = option(0.1, "data", "share of samples trained with the empty caption: guidance and the guard's score need a trained unconditional branch", low=0.0, high=1.0, alias="proportion_empty_prompts")
    dataloader_num_workers: int = option(0, "data", "worker processes that decode images where latents are not held in memory", low=0)

    objective: str = option("ambient", "objective", "the loss", choices=("ambient", "plain", "gap", "weighted"))
    ambient_level: float | str | None = option(None, "objective", "ambient and weighted: nature level s_n, 0 is plain DDPM (default 1.0, t = 353 on SD's schedule); ambient: auto measures the images and proposes one; gap: lower edge of the band", low=0.0, words=(AUTO,))
    ambient_timestep: int | None = option(None, "objective", "the same level given as a timestep of the base model's schedule", low=0)
    gap_upper: float | None = option(None, "objective", "gap: upper edge of the noise levels without loss (required there)", above=0.0)
    reweight: int | None = option(None, "objective", "ambient and weighted: power q of the weight a^q, a = 1 - s_n^2 / s_t^2, on the levels above s_n: 2 = the paper's loss, 1 = noise target, 0 = full re-weighting (default 2)", choices=(2, 1, 0))
    noise_seed: int = option(0, "objective", "seed of what is fixed per image: its noise, its VAE draw and, under ambient, its view. The same images in a later run must keep the same seed: two noises of one image average out", low=0, high=MAX_SEED)

    near_duplicates: str | None = option(None, "objective", "ambient: share = re-encoded, resized or mirrored copies of an image get one noise, as exact copies always do; off = each its own, which leaks (default share)", choices=("share", "off"))
    fresh_copies: bool = option(False, "objective", "ambient, a control for studies: a NEW noisy copy of an image at every step in place of the fixed one. It leaks: copies of one image average out to the clean one")
    snr_gamma: float | None = option(None, "objective", "Min-SNR weighting with this gamma (the paper's is 5), times the objective's own weight; without it none", above=0.0)
    weighting_scheme: str = option("none", "objective", "none: timesteps are drawn uniformly; logit_normal: noise levels s_t are log-normal, ln s ~ N(logit_mean, logit_std^2), as EDM and Stable Diffusion 3 draw them (EDM: mean -0.5, std 1.2 at latents of unit variance)", choices=("none", "logit_normal"))
    logit_mean: float | None = option(None, "objective", "logit_normal: mean of ln s (default 0)")
    logit_std: float | None = option(None, "objective", "logit_normal: standard deviation of ln s (default 1)", above=0.0)
    noise_offset: float = option(0.0, "objective", "offset of the fresh noise per sample and channel, for very dark and bright images (plain and gap only)", low=0.0)
    input_perturbation: float = option(0.0, "objective", "perturb the noise of the input, not of the target, by that much (plain and gap only; 0.1 in its paper)", low=0.0)

    memorization_threshold: float | None = option(None, "mitigation", "a sample with || eps_c - eps_u || of at least this gives no loss (Wen et al. 2024); one more forward pass without gradient per pass. The scale is the model's own", above=0.0)
    agc: float | None = option(None, "mitigation", "a sample whose error is below this times the running mean of its timestep gives no loss (anti-gradient control, Liu et al. 2024; without a value 0.8: the 1/1.25 of its Stable Diffusion release; its CIFAR release has 0.5)", above=0.0, high=1.0, bare=0.8)
    dropped_mean: str | None = option(None, "mitigation", "with memorization_threshold or agc: all = a dropped sample counts as 0 in the mean of a step (default); kept = the loss is divided by the samples kept, of all processes and passes, as published", choices=("all", "kept"))
    caption_mitigation: str | None = option(None, "mitigation", "change captions in training (Somepalli et al. 2023): mc = one of several captions of the row, gn = noise on embeddings, rc = a random caption, rt = random words put in, cwr = words of the caption repeated", choices=CAPTION_MITIGATIONS)
    caption_mitigation_p: float | None = option(None, "mitigation", "share of samples whose caption is changed (default as published: 0.1 for rc, rt and cwr, 1 for mc and gn)", low=0.0, high=1.0)
    caption_noise_std: float | None = option(None, "mitigation", "gn: standard deviation of the noise, in the embedding's own units (default 0.1)", above=0.0)

    seed: int = option(0, "optimisation", "seed of order, timesteps, fresh noise, caption dropout and LoRA start", low=0, high=MAX_SEED)
    train_batch_size: int = option(16, "optimisation", "images per process and forward pass", low=1)
    gradient_accumulation_steps: int = option(1, "optimisation", "forward passes per optimizer step", low=1)
    num_train_epochs: int = option(100, "optimisation", "passes over the images; max_train_steps overrides it", low=1)
    max_train_steps: int | None = option(None, "optimisation", "optimizer steps in total", low=1)
    gradient_checkpointing: bool = option(False, "optimisation", "recompute activations in the backward pass: less memory, about a quarter slower")
    learning_rate: float = option(1e-4, "optimisation", "peak learning rate", above=0.0)
    scale_lr: bool = option(False, "optimisation", "multiply the learning rate by the global batch size")
    lr_scheduler: str = option("constant", "optimisation", "learning-rate schedule, counted in optimizer steps", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(500, "optimisation", "warm-up, in optimizer steps (constant has none)", low=0)
    adam_beta1: float = option(0.9, "optimisation", "decay of the first moment", low=0.0, high=1.0)
    adam_beta2: float = option(0.999, "optimisation", "decay of the second moment", low=0.0, high=1.0)
    adam_weight_decay: float = option(1e-2, "optimisation", "decoupled weight decay", low=0.0)
    adam_epsilon: float = option(1e-8, "optimisation", "added to the root of the second moment", above=0.0)
    max_grad_norm: float = option(1.0, "optimisation", "gradients are scaled down to this norm over all trained weights", above=0.0)
    mixed_precision: str | None = option(None, "optimisation", "arithmetic of forward and backward passes; trained weights stay float32. Default: as `accelerate launch` says, else no", choices=("no", "fp16", "bf16"))
    allow_tf32: bool = option(False, "optimisation", "let Ampere and later GPUs multiply float32 matrices in TF32")
    use_8bit_adam: bool = option(False, "optimisation", "AdamW with moments in 8 bits (needs bitsandbytes)")
    enable_xformers_memory_efficient_attention: bool = option(False, "optimisation", "attention of xformers in place of torch's own (needs xformers)")
    use_ema: bool = option(False, "optimisation", "average the weights over the steps; the average is drawn from, and saved at the end (whole U-Net only)")
    offload_ema: bool = option(False, "optimisation", "keep the average in the processor's memory between steps; needs use_ema")
    foreach_ema: bool = option(False, "optimisation", "update the average in one call over all tensors; needs use_ema")

    lora: bool = option(False, "LoRA", "train a LoRA; without it the whole U-Net is trained")
    rank: int | None = option(None, "LoRA", "rank of the update (default 4)", low=1)
    lora_alpha: float | None = option(None, "LoRA", "the update is scaled by lora_alpha / rank (default: the rank); kept in the saved file", above=0.0)
    lora_target_modules: list[str] | None = option(None, "LoRA", "names of the layers that get an adapter (default: the attention projections to_k to_q to_v to_out.0)")
    lora_dropout: float | None = option(None, "LoRA", "share of the update's input that is dropped in training (default 0); a function of seed, layer and place in the run", low=0.0, high=1.0)
    use_dora: bool = option(False, "LoRA", "train DoRA: the length of each row of the weights too")
    output_kohya_format: bool = option(False, "LoRA", "write pytorch_lora_weights_kohya.safetensors too, for ComfyUI, AUTOMATIC1111 and others")

    validation_prompts: list[str] | None = option(None, "validation", "prompts, or a .jsonl file with one {\"prompt\": ...} a line", alias="validation_prompt")
    num_validation_images: int | None = option(None, "validation", "images per prompt (default 4)", low=1)
    validation_epochs: int | None = option(None, "validation", "draw every that many epochs (default 5; with --lora 1)", low=1)
    validation_steps: int | None = option(None, "validation", "draw every that many optimizer steps instead", low=1)

    probe_steps: int | None = option(None, "validation", "look for copies every that many optimizer steps: draw images for captions of the training set and lay the training images over them", low=1)
    probe_images: int | None = option(None, "validation", "how many images one look draws (default 32)", low=1)
    stop_on_memorization: float | None = option(None, "validation", "end the run at the first look whose share of copies, decided as in an audit, is above this", low=0.0, high=1.0)

    checkpointing_steps: int = option(500, "checkpoints", "write a checkpoint every that many optimizer steps", low=1)
    checkpoints_total_limit: int | None = option(None, "checkpoints", "keep only that many newest checkpoints", low=1)
    resume_from_checkpoint: str | None = option(None, "checkpoints", "a checkpoint folder, or `latest`: the newest whole one in output_dir (none yet: start anew)")

    output_dir: str = option("sd-model-finetuned", "output", "receives the pipeline or pytorch_lora_weights.safetensors, " + CONFIG_NAME + ", checkpoints, logs")
    overwrite: bool = option(False, "output", "replace the result, checkpoints and records that an earlier training left in output_dir; every other file stays")
    report_to: str = option("tensorboard", "output", "where curves go; all: wherever a package is installed for", choices=("tensorboard", "wandb", "all", "none"))
    tracker_project_name: str = option("text2image-fine-tune", "output", "name under which curves are kept")
    logging_dir: str = option("logs", "output", "folder of the TensorBoard files, inside output_dir")
    push_to_hub: bool = option(False, "output", "upload the results at the end; token and repository are checked before training")
    hub_model_id: str | None = option(None, "output", "repository that receives them, owner/name or name (default: the last part of output_dir)")
    hub_token: str | None = option(None, "output", "token of the hub; better: HF_TOKEN or `hf auth login`. Never written", secret=True)
    hub_private_repo: bool = option(False, "output", "create the repository private")
    # fmt: on

    def __post_init__(self) -> None:
        self.resolution_given = True  # `parse` knows better
        for item in dataclasses.fields(self):
            setattr(self, item.name, _checked(item, getattr(self, item.name)))
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
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise _foreign("dataset_config_name", "it belongs to a hub dataset", "give --dataset_name, or leave it out")
        for term in self.row_filter or ():
            split_condition(term)

        if self.ambient_level is not None and self.ambient_timestep is not None:
            raise UserError("ambient_level and ambient_timestep are both given", rule="they say the same thing twice",
                            remedy="leave one of them out")  # fmt: skip
        no_level = self.ambient_level is None and self.ambient_timestep is None
        if self.ambient_level == AUTO and self.objective in ("gap", "weighted"):
            raise UserError(f"ambient_level is auto with objective {self.objective}", rule="the images propose a level for ambient",
                            remedy="give the number that the ambient run printed: a control shares its level")  # fmt: skip
        if self.ambient_level == AUTO and self.near_duplicates == "off":
            raise UserError("ambient_level is auto with near_duplicates off", rule="it is measured between neighbours, and copies are none",
                            remedy="leave near_duplicates out, or give the level as a number")  # fmt: skip
        if self.objective == "plain":
            for name in ("ambient_level", "ambient_timestep", "reweight", "gap_upper", "near_duplicates"):
                if getattr(self, name) is not None:
                    raise _foreign(name, "objective is plain", "leave it out, or choose --objective ambient or gap")
        elif self.objective == "weighted":
            for name in ("gap_upper", "near_duplicates"):
                if getattr(self, name) is not None:
                    raise _foreign(name, "objective is weighted", "leave it out, or choose --objective gap or ambient")
            if no_level:
                self.ambient_level = 1.0
            if self.reweight is None:
                self.reweight = 2
        elif self.objective == "ambient":
            if self.gap_upper is not None:
                raise _foreign("gap_upper", "objective is ambient", "leave it out, or choose --objective gap")
            if no_level:
                self.ambient_level = 1.0
            if self.reweight is None:
                self.reweight = 2
            if self.near_duplicates is None:
                self.near_duplicates = "share"
        else:
            for name in ("reweight", "near_duplicates"):
                if getattr(self, name) is not None:
                    raise _foreign(name, "objective is gap", "leave it out, or choose --objective ambient")
            if no_level or self.gap_upper is None:
                raise UserError("objective gap has no band", rule="it needs a lower edge (ambient_level or ambient_timestep) and gap_upper",
                                remedy="for example --ambient_level 0.5 --gap_upper 2.0")  # fmt: skip
            if isinstance(self.ambient_level, float) and self.gap_upper <= self.ambient_level:
                raise UserError(f"gap_upper is {self.gap_upper}", rule=f"it must be above ambient_level = {self.ambient_level}",
                                remedy="raise gap_upper or lower ambient_level")  # fmt: skip

        if self.fresh_copies and self.objective != "ambient":
            raise _foreign("fresh_copies", f"objective is {self.objective}, which has no noisy copies",
                           "leave it out, or choose --objective ambient")  # fmt: skip
        if self.objective == "ambient" and self.ambient_level != 0:
            for name, reason in AMBIENT_REFUSES.items():
                if getattr(self, name):
                    raise UserError(f"{name} is {getattr(self, name):g}", rule=reason,
                                    remedy="leave it out, or choose --objective plain or gap")  # fmt: skip
        if self.weighting_scheme == "logit_normal":
            self.logit_mean = 0.0 if self.logit_mean is None else self.logit_mean
            self.logit_std = 1.0 if self.logit_std is None else self.logit_std
        else:
            for name in ("logit_mean", "logit_std"):
                if getattr(self, name) is not None:
                    raise _foreign(name, "timesteps are drawn uniformly",
                                   "add --weighting_scheme logit_normal, or leave it out")  # fmt: skip
        if self.memorization_threshold is not None or self.agc is not None:
            self.dropped_mean = None if self.dropped_mean == "all" else self.dropped_mean  # one spelling of one run
        elif self.dropped_mean is not None:
            raise _foreign(
                "dropped_mean", "no sample is dropped", "add --memorization_threshold or --agc, or leave it out"
            )
        if self.caption_mitigation is None:
            if self.caption_mitigation_p is not None:
                raise _foreign(
                    "caption_mitigation_p", "no captions are changed", "add --caption_mitigation, or leave it out"
                )
        elif self.caption_mitigation_p is None:
            self.caption_mitigation_p = 1.0 if self.caption_mitigation in ("mc", "gn") else 0.1
        if self.caption_mitigation == "gn":
            self.caption_noise_std = self.caption_noise_std or 0.1
        elif self.caption_noise_std is not None:
            raise _foreign(
                "caption_noise_std", "embeddings get no noise", "add --caption_mitigation gn, or leave it out"
            )
        for name in ("offload_ema", "foreach_ema"):
            if getattr(self, name) and not self.use_ema:
                raise _foreign(name, "no average is kept", "add --use_ema, or leave it out")
        if self.use_ema and self.lora:
            raise _foreign("use_ema", "the average is kept and saved as a whole U-Net, and a LoRA trains none",
                           "leave it out, or fine-tune the whole U-Net")  # fmt: skip
        if self.use_dora and self.output_kohya_format:
            raise UserError("output_kohya_format is given with use_dora",
                            rule="its readers disagree about which side of a weight a DoRA's lengths belong to",
                            remedy="leave one of them out")  # fmt: skip

        if self.lora:
            self.lora_dropout = self.lora_dropout or 0.0
            if self.lora_dropout == 1.0:
                raise UserError("lora_dropout is 1", rule="nothing would be trained", remedy="try 0.1")
            self.rank = self.rank or 4
            self.lora_alpha = self.lora_alpha or float(self.rank)
            self.lora_target_modules = self.lora_target_modules or list(DEFAULT_TARGETS)
        else:
            for name in (
                "rank", "lora_alpha", "lora_target_modules", "lora_dropout", "use_dora", "output_kohya_format",
            ):  # fmt: skip
                if getattr(self, name) not in (None, False):
                    raise _foreign(name, "the whole U-Net is trained", "add --lora, or leave it out")

        if self.validation_prompts:
            if self.validation_steps is not None and self.validation_epochs is not None:
                raise UserError("validation_steps and validation_epochs are both given", rule="one of them sets the rhythm",
                                remedy="leave one of them out")  # fmt: skip
            if self.validation_steps is None and self.validation_epochs is None:
                self.validation_epochs = 1 if self.lora else 5
            self.num_validation_images = self.num_validation_images or 4
        else:
            for name in ("num_validation_images", "validation_epochs", "validation_steps"):
                if getattr(self, name) is not None:
                    raise _foreign(name, "no validation prompts are given", "add --validation_prompts, or leave it out")
        if self.push_to_hub and self.hub_model_id is None:
            self.hub_model_id = Path(self.output_dir).absolute().name
        if self.probe_steps is not None:
            self.probe_images = self.probe_images or 32
        else:
            for name in ("probe_images", "stop_on_memorization"):
                if getattr(self, name) is not None:
                    raise _foreign(name, "nobody looks for copies", "add --probe_steps, or leave it out")
        if self.overwrite and self.resume_from_checkpoint is not None:
            raise UserError("overwrite and resume_from_checkpoint are both given", rule="one starts anew, the other continues",
                            remedy="leave one of them out")  # fmt: skip
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1.0:
                raise UserError(
                    f"{name} is {getattr(self, name)}", rule="it must be below 1", remedy="try 0.9 and 0.999"
                )

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
        path = folder / CONFIG_NAME
        head = "# Resolved settings of the run beside this file. Run it again: --config train_config.yaml\n"
        # A file that is read back must not overwrite anything, nor clash with --resume_from_checkpoint.
        values = {name: value for name, value in self.to_dict().items() if name != "overwrite"}
        files.atomic_write(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), synced=True)
        return path


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Turn a command line, and the YAML file that it may name with `--config`, into a `TrainConfig`.

    The command line wins over the file, key by key; of settings that answer one question (`RIVALS`) it replaces all.

    Raises:
        UserError: an unknown flag or key (the nearest known one is suggested), or a bad value.
    """
    given, unknown = make_parser().parse_known_args(argv)
    if unknown:
        name = next((u for u in unknown if u.startswith("-")), unknown[0])
        key = name.lstrip("-").split("=")[0]
        raise UserError(f"unknown argument {name}", rule=_nearest(key, prefix="--"), remedy="--help lists all flags")
    flags = vars(given)
    path = flags.pop("config", None)
    settings = load_yaml(path) if path else {}
    for rivals in RIVALS:
        if any(name in flags for name in rivals):
            settings = {key: value for key, value in settings.items() if key not in rivals}
    config = TrainConfig(**{**settings, **flags})
    config.resolution_given = "resolution" in {**settings, **flags}
    return config


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file with the keys of `TrainConfig`.

    Raises:
        UserError: the file is missing, is no YAML mapping, or has an unknown key.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(
            f"config is {path}", rule=f"the file cannot be read ({error.strerror})", remedy="check the path"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, the 30th of February
        raise UserError(
            f"config is {path}", rule=f"it is no valid YAML: {error}", remedy="write one `key: value` a line"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UserError(
            f"config is {path}",
            rule=f"it holds a {type(values).__name__}, not keys with values",
            remedy="write one `key: value` a line",
        )
    names = {item.name for item in dataclasses.fields(TrainConfig)}
    for key in values:
        if key not in names:
            raise UserError(f"unknown key {key!r} in {path}", rule=_nearest(str(key)), remedy="--help lists all keys")
    return dict(values)


def make_parser() -> argparse.ArgumentParser:
    """Build the command line from the fields of `TrainConfig`; only what the user gives ends up in the result."""
    parser = _Parser(
        prog="train_text_to_image_ambient.py",
        description="Fine-tune a Stable Diffusion U-Net, whole or by LoRA, so that it does not hand its training images back.",
        epilog="Example: accelerate launch train_text_to_image_ambient.py --config configs/sd2-lora.yaml --train_data_dir my-images",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="settings from a file with these same names; the command line wins"
    )
    groups = {name: parser.add_argument_group(name, text) for name, text in GROUPS.items()}
    kinds = typing.get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        meta, kind = item.metadata, kinds[item.name]
        flags = [f"--{item.name}"] + ([f"--{meta['alias']}"] if meta["alias"] else [])
        text = meta["text"].replace("%", "%%")
        if item.default is not None and item.default is not False:
            text += f" (default {item.default})"
        extra: dict[str, Any] = {"help": text, "dest": item.name}
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["metavar"] = (
                "{" + ",".join(map(str, meta["choices"])) + "}"
                if meta["choices"]
                else "|".join([_type_name(kind).upper(), *meta["words"]])
            )
            if _bare(kind) == list[str]:
                extra["nargs"] = "+"
            if meta["bare"] is not None:
                extra |= {"nargs": "?", "const": str(meta["bare"])}
        groups[meta["group"]].add_argument(*flags, **extra)
    return parser


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which PyYAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message, remedy="--help explains every flag")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        # Fifty flags in one usage block teach nothing; the groups below do.
        return f"usage: [accelerate launch] {self._prog} --config FILE.yaml [--flag value ...]\n\n"


def _foreign(name: str, because: str, remedy: str) -> UserError:
    return UserError(f"{name} is given", rule=f"it has no effect here: {because}", remedy=remedy)


def _nearest(key: str, prefix: str = "") -> str:
    names = [item.name for item in dataclasses.fields(TrainConfig)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"the nearest known one is {prefix}{near[0]}" if near else "no known one is like it"


def _bare(kind: Any) -> Any:
    """Return `X` for the annotation `X | None`."""
    if isinstance(kind, types.UnionType):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def _type_name(kind: Any) -> str:
    bare = _bare(kind)
    return {int: "integer", float: "number"}.get(bare, "text")


def _checked(item: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` in the type of the field `item`, or raise a UserError that names key, value, rule and remedy."""
    kind = typing.get_type_hints(TrainConfig)[item.name]
    bare, meta = _bare(kind), item.metadata
    if (value is None and bare is not kind) or (isinstance(value, str) and value in meta["words"]):
        return value
    rule = ""
    converted: Any = value
    if bare == list[str]:
        converted = [value] if isinstance(value, str) else value
        if (
            not isinstance(converted, (list, tuple))
            or not converted
            or not all(isinstance(v, str) and v for v in converted)
        ):
            rule = "it must be a list of texts"
        else:
            converted = list(converted)
    elif bare is bool:
        rule = "" if isinstance(value, bool) else "it must be true or false"
    elif bare is str:
        converted = str(value) if isinstance(value, Path) else value
        # YAML 1.1 reads a bare `no` as false; mixed_precision has such a choice, and quoting it would be a trap.
        converted = "no" if value is False and "no" in meta["choices"] else converted
        rule = "" if isinstance(converted, str) and converted else "it must be a text"
    else:
        # YAML 1.1 reads 1e-4 as a text and the command line gives texts: both convert here, by one rule.
        try:
            if isinstance(value, bool):
                raise ValueError
            converted = bare(value)
            # Through float only what is no integer already: a seed of 64 bits has no exact float.
            if not math.isfinite(converted) or (isinstance(value, float) and converted != value):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            rule = " or ".join([f"it must be {'an integer' if bare is int else 'a finite number'}", *meta["words"]])
    if not rule:
        rule = _broken_rule(meta, converted)
    if rule:
        default = f"the default is {item.default}" if item.default is not None else "leave it out for the default"
        shown = "(hidden)" if meta["secret"] else _SHORT.repr(value)
        raise UserError(f"{item.name} is {shown}", rule=rule, remedy=default)
    return converted


def _broken_rule(meta: Mapping[str, Any], value: Any) -> str:
    if meta["choices"] and value not in meta["choices"]:
        return "it must be one of " + ", ".join(map(str, meta["choices"]))
    if meta["low"] is not None and value < meta["low"]:
        return f"it must be at least {meta['low']}"
    if meta["above"] is not None and value <= meta["above"]:
        return f"it must be above {meta['above']}"
    if meta["high"] is not None and value > meta["high"]:
        return f"it must be at most {meta['high']}"
    return ""
