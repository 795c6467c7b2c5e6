"""The training run: check everything, encode once, step, checkpoint, resume, save.

    loss = mean_b weight_b ||f(x_t_b, t_b, caption_b) - target_b||^2 / dim          t uniform over the base's timesteps

with (x_t, target, weight) from `AmbientObjective.corrupt`. The same code trains the whole U-Net or a LoRA, on one
process or several; sample p of a run has the same image, timestep and noise whichever process takes it. It does not
train the text encoder or the VAE. What a U-Net spread over the processes needs is in `sharding`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ambient_sd.commands.push import prepare, push
from ambient_sd.data import latents as data
from ambient_sd.data.buckets import BucketStream, assign, read_buckets
from ambient_sd.data.captions import find_cut, in_one_line
from ambient_sd.data.conditions import split_condition
from ambient_sd.data.duplicates import noise_fingerprint, shared_noise
from ambient_sd.data.enlargement import check_enlargement
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.data.stream import SampleStream, process_batches
from ambient_sd.data.views import Samples, ViewRule
from ambient_sd.families.base import Base, check_base
from ambient_sd.objective import AmbientObjective
from ambient_sd.reporting.model_card import describe_run, write_card
from ambient_sd.sampling import collect_prompts
from ambient_sd.training import (
    adapters,
    averaging,
    caching,
    checkpoints,
    extras,
    noising,
    peers,
    sharding,
    validation,
)
from ambient_sd.training import auto_level as leveling
from ambient_sd.training.caption_augmentation import LIVE, CaptionAugmentation
from ambient_sd.training.caption_augmentation import check as check_augmentation
from ambient_sd.training.config import AUTO, TrainConfig
from ambient_sd.training.dropout import AddressedDropout
from ambient_sd.training.dropping import Dropping, check_scheduler
from ambient_sd.training.losses import LossLog
from ambient_sd.training.probe import Probe, add_evaluation
from ambient_sd.utils import files
from ambient_sd.utils.errors import UserError, one_line

logger = logging.getLogger(__name__)

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
# Noise levels s = sigma / alpha whose errors get a curve each: the loss of one step says more of its timesteps than of the model.
_BANDS = ((0.0, 0.3), (0.3, 1.0), (1.0, 3.0), (3.0, math.inf))
_FINAL_STEPS = 100  # the summary's losses are means over that many last steps


@dataclass(frozen=True)
class TrainingBatch:
    """Hold what one forward pass of one process sees; handed to `on_batch`.

    Attributes:
        positions: places of the samples in the run's line of samples.
        keys: content keys of the images.
        captions: captions after caption dropout and mitigation.
        timesteps: (B,) long.
        x0: (B, C, h, w) clean latents.
        eps_n: (B, C, h, w) fixed noise, or None where the objective has none.
        noise: (B, C, h, w) fresh noise.
        perturbation: (B, C, h, w) what is added to the noise of the input only, or None.
        time_ids: (B, 6) float32, SDXL's sizes in pixels, or None.
    """

    positions: list[int]
    keys: list[str]
    captions: list[str]
    timesteps: torch.Tensor
    x0: torch.Tensor
    eps_n: torch.Tensor | None
    noise: torch.Tensor
    perturbation: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Hold a run whose settings, base model and images are checked, before any weights are loaded."""

    config: TrainConfig
    base: Base
    objective: AmbientObjective
    images: ImageDataset
    prompts: list[str]
    checkpoint: Path | None  # to continue from; known on the first process
    buckets: dict[str, tuple[int, int]] | None = None  # (width, height) by noise key; None: squares
    notes: tuple[str, ...] = ()  # what the user should know before the run, a line each


def run(
    config: TrainConfig,
    *,
    progress: bool = True,
    bar: Mapping[str, Any] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_batch: Callable[[TrainingBatch], None] | None = None,
) -> dict[str, Any]:
    """Run a training, under `accelerate launch` or inside another program.

    Args:
        config: the settings.
        progress: show progress bars (on the first process).
        bar: options for the bar of the steps (tqdm's), such as `desc` or `position`.
        on_step: called on the first process after each optimizer step with the number of steps done and loss,
            clean_loss, ambient_loss and lr of that step (NaN where no sample was of that kind), and with
            memorization_threshold or agc the shares threshold_dropped and agc_dropped.
        on_batch: called on every process before each forward pass.

    Returns:
        Summary: steps, first_step, seconds, images, losses (one per step, those before a resume too), loss, clean_loss,
        ambient_loss (means over the last 100 steps; with a rule that drops samples its share too), looks (one record per look for copies), level, learning_rate,
        global_batch, processes, data_fingerprint,
        near_duplicate_groups, output_dir, config; level_reason where the level is auto's.

    Raises:
        UserError: something in settings, base, images or checkpoint is wrong; nothing has been written then. Or the
            loss became infinite.
    """
    progress = progress and os.environ.get("RANK", "0") == "0"
    plan = plan_run(config, progress=progress)
    uploads = config.push_to_hub and os.environ.get("RANK", "0") == "0"
    if uploads:
        prepare(str(config.hub_model_id), token=config.hub_token, private=config.hub_private_repo or None)
    embedded = bool(AcceleratorState._shared_state)
    accelerator: Accelerator | None = None
    try:
        accelerator = _make_accelerator(config)
        with peers.report_peer_failure():
            summary = _Trainer(plan, accelerator, progress, bar, on_step, on_batch).train()
    finally:
        if accelerator is not None:
            accelerator.free_memory()
        if not embedded:
            # Another run in this process may want another precision; accelerate keeps the first one's for ever.
            if accelerator is not None:
                accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)
    if uploads:  # when all is on disk and no process waits for another
        push(
            config.output_dir, str(config.hub_model_id), token=config.hub_token, private=config.hub_private_repo or None
        )
    return summary


def plan_run(config: TrainConfig, *, progress: bool = False) -> Plan:
    """Check all that can be known before weights load, cheapest first; write nothing.

    Raises:
        UserError: something is wrong.
    """
    extras.check_packages(config)
    sharding.check(config)
    base = check_base(config)
    objective = make_objective(config, base)
    if config.snr_gamma is not None:
        noising.min_snr_weight(base.schedule, torch.tensor([0]), config.snr_gamma, objective.prediction_type)
    if config.memorization_threshold is not None:
        check_scheduler(base.scheduler)
    if config.lora:
        adapters.check_targets(base.unet_config, config.lora_target_modules or ())
    prompts = collect_prompts(config.validation_prompts)
    checkpoint = _check_output(config)
    images = open_images(config)
    check_augmentation(config, images)
    images.check(progress, near_duplicates=config.near_duplicates == "share" and objective.level > 0)
    buckets = None
    if config.aspect_ratio_buckets is not None:
        sizes = read_buckets(config.aspect_ratio_buckets, config.resolution, base.pixel_step)
        buckets = assign(images.sizes, images.noise_keys, sizes)
    return Plan(
        config,
        base,
        objective,
        images,
        prompts,
        checkpoint,
        buckets,
        _notes(config, base, images, prompts, buckets),
    )


def _notes(
    config: TrainConfig,
    base: Base,
    images: ImageDataset,
    prompts: Sequence[str],
    buckets: Mapping[str, tuple[int, int]] | None,
) -> tuple[str, ...]:
    """Return what a run would otherwise do without a word; refuse what is certainly not meant."""
    notes = [enlargement_note(config, images, base.pixel_step, buckets)]
    if images.unlisted:
        notes.append(f"{images.unlisted} files in {images.source} are left out (unlisted is ignore)")
    if images.animated:
        notes.append(
            f"{len(images.animated)} images have several frames, of which the first is taken: {images.animated[0]}"
        )
    tokenizers = base.tokenizers()
    names = [images.names[i] for i in range(len(images)) for _ in images.captions_of(i)]
    for texts, what, named in ((images.all_captions, "captions", names), (prompts, "validation prompts", prompts)):
        if cuts := find_cut(texts, tokenizers):
            notes.append(in_one_line(cuts, len(texts), what, named[cuts[0].index]))
    return tuple(one_line(note) for note in notes if note)


def enlargement_note(
    config: TrainConfig, images: ImageDataset, step: int, buckets: Mapping[str, tuple[int, int]] | None = None
) -> str | None:
    """Return a warning where checked images are enlarged to the resolution, or None.

    Raises:
        UserError: most of them are enlarged so far that the resolution cannot be meant.
    """
    square = (config.resolution, config.resolution)
    targets = [square if buckets is None else buckets[key] for key in images.noise_keys]
    return check_enlargement(
        images.sizes, targets, resolution=config.resolution, step=step, given=config.resolution_given,
        allowed=config.allow_upscaling,
    )  # fmt: skip


def open_images(config: TrainConfig) -> ImageDataset:
    """Open the training images that the settings name; nothing is decoded yet.

    Raises:
        UserError: as `load_rows`.
    """
    return load_rows(
        config.source,
        config.image_column,
        config.caption_column,
        config.dataset_split,
        config.max_train_samples,
        config.seed,
        row_filter=[split_condition(term) for term in config.row_filter or ()],
        config_name=config.dataset_config_name,
        cache_dir=config.cache_dir,
        local=config.train_data_dir is not None,
        unlisted=config.unlisted,
        several_captions=config.caption_mitigation == "mc",
    )


def make_objective(config: TrainConfig, base: Base) -> AmbientObjective:
    """Build the objective on the base's schedule.

    Raises:
        UserError: level, timestep or gap lies beyond the schedule.
    """
    options: dict[str, Any] = {"mode": config.objective}
    if config.objective != "plain":
        level = leveling.PROVISIONAL if config.ambient_level == AUTO else config.ambient_level
        options.update(level=level, timestep=config.ambient_timestep, gap_upper=config.gap_upper)
    if config.objective in ("ambient", "weighted"):
        options.update(reweight=config.reweight)
    try:
        return AmbientObjective(base.schedule, **options)
    except UserError as error:
        given = ", ".join(
            f"{name} is {value}"
            for name in ("ambient_level", "ambient_timestep", "gap_upper")
            if (value := getattr(config, name)) is not None
        )
        raise UserError(given or "the base's schedule cannot be trained", rule=str(error)) from None


def _check_output(config: TrainConfig) -> Path | None:
    folder = Path(config.output_dir)
    try:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    except OSError as error:  # longer than the system takes
        raise UserError(
            f"output_dir is {config.output_dir}", rule=str(error.strerror), remedy="name another one"
        ) from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output_dir is {config.output_dir}", rule=f"{existing} is no folder that can be written to",
                        remedy="name another one")  # fmt: skip
    for name in ("pretrained_model_name_or_path", "train_data_dir", "dataset_name"):
        given = getattr(config, name)
        if given is not None and folder.exists() and folder.resolve() == Path(given).expanduser().resolve():
            raise UserError(f"output_dir is {config.output_dir}", rule=f"that is {name} too, and would be overwritten",
                            remedy="name another one")  # fmt: skip
    if os.environ.get("RANK", "0") != "0":
        return None  # one process looks and decides
    if config.resume_from_checkpoint is not None:
        return checkpoints.find(folder, config.resume_from_checkpoint)
    if checkpoints.find_all(folder):
        raise UserError(
            f"output_dir {config.output_dir} holds checkpoints of an earlier run",
            rule="two runs in one folder cannot be told apart",
            remedy="add --resume_from_checkpoint latest, or name another output_dir",
        )
    return None


def _make_accelerator(config: TrainConfig) -> Accelerator:
    env = os.environ
    if env.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in env and "WORLD_SIZE" not in env:
        logger.warning(
            "accelerate launch --cpu starts ONE process whatever --num_processes says; for several on the CPU: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=str(Path(config.output_dir) / config.logging_dir),
        )
    except ValueError as error:
        raise UserError(
            f"mixed_precision is {config.mixed_precision}", rule=str(error), remedy="use no, or another precision"
        ) from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate takes it, and then neither casts nor scales.
        raise UserError("mixed_precision is fp16", rule="processors have no fp16 training", remedy="use no, or bf16")
    sharding.enable(accelerator)
    if config.use_ema:
        averaging.check_distribution(accelerator.distributed_type)
    if accelerator.distributed_type not in _SUPPORTED:
        raise UserError(
            f"accelerate is set to {accelerator.distributed_type.value}",
            rule="this trainer runs on one or more processes that each hold the whole model, or their part of it by FSDP2",
            remedy="choose no distribution, multi-GPU or FSDP with fsdp_version 2 in `accelerate config`",
        )
    return accelerator


class _Trainer:
    """One run on one process."""

    def __init__(
        self,
        plan: Plan,
        accelerator: Accelerator,
        progress: bool,
        bar: Mapping[str, Any] | None,
        on_step: Callable[[int, dict[str, float]], None] | None,
        on_batch: Callable[[TrainingBatch], None] | None,
    ) -> None:
        self.plan, self.config, self.base = plan, plan.config, plan.base
        self.family = self.base.family
        self.accelerator, self.progress, self.bar = accelerator, progress, bar or {}
        self.on_step, self.on_batch = on_step, on_batch
        config = self.config
        self.output = Path(config.output_dir)
        self.global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self.steps = config.max_train_steps or math.ceil(config.num_train_epochs * len(plan.images) / self.global_batch)
        self.stream = SampleStream(len(plan.images), config.seed)
        if plan.buckets is not None:
            bucket_of = [plan.buckets[key] for key in plan.images.noise_keys]
            self.stream = BucketStream(bucket_of, self.global_batch, config.seed)
        # At level 0 there is no fixed noise, and the run is the plain one in its views too.
        fixed_noise = plan.objective.mode == "ambient" and plan.objective.level > 0
        self.rule = ViewRule(
            config.resolution, config.center_crop, config.random_flip, fixed_noise, config.noise_seed, plan.buckets
        )
        self.data_fingerprint = plan.images.fingerprint()
        self._check_same_images()
        self.levels: noising.LogNormalLevels | None = None
        if config.weighting_scheme == "logit_normal":
            self.levels = noising.LogNormalLevels(
                plan.objective.schedule, config.logit_mean or 0.0, config.logit_std or 1.0
            )
        if accelerator.is_main_process:
            for note in plan.notes:
                logger.warning("%s", note)
        self.average: averaging.Average | None = None
        self.dropouts: list[AddressedDropout] = []
        self.evaluations: list[dict[str, float]] = []
        self.bands: dict[str, float] = {}
        self.first_step = 0
        self.level_reason: str | None = None  # of a level that nobody gave
        self.checkpoint = self._same_checkpoint()
        self.losses = LossLog(self.checkpoint)
        self.state: dict[str, Any] = {}
        if self.checkpoint is not None:
            self.state = checkpoints.read_state(self.checkpoint)
            if config.ambient_level == AUTO and (known := leveling.of_checkpoint(self.state, self.checkpoint.name)):
                self._take_level(*known)
            checkpoints.check_identity(self.checkpoint, self.state, self.identity())
            self.first_step = int(self.state["step"])
            if self.first_step > self.steps:
                raise UserError(f"{self.checkpoint.name} lies beyond the end of this run, {self.steps} steps",
                                remedy="raise max_train_steps or num_train_epochs")  # fmt: skip
        self.dropping: Dropping | None = None
        if config.memorization_threshold is not None or config.agc is not None:
            self.dropping = Dropping(
                config.memorization_threshold, config.agc, scheduler=self.base.scheduler,
                timesteps=plan.objective.schedule.num_train_timesteps, checkpoint=self.checkpoint,
            )  # fmt: skip

    def _check_same_images(self) -> None:
        """Compare the images of all processes: another key of the same image would be a second noise."""
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([list(bytes.fromhex(self.data_fingerprint))], device=self.accelerator.device)
            if bool((self.accelerator.gather(mine) != mine).any()):
                raise UserError(
                    "the processes of this run decode different images",
                    rule="an image must have one key, hence one noise, everywhere",
                    remedy="give every machine the same files and the same version of Pillow",
                )

    def _same_checkpoint(self) -> Path | None:
        """Return the checkpoint that the first process chose, seen by this one too."""
        path = self.plan.checkpoint
        if self.accelerator.num_processes > 1:
            chosen = [(str(path), checkpoints.stamp(path)) if path is not None else None]
            broadcast_object_list(chosen)
            path = Path(chosen[0][0]) if chosen[0] is not None else None
            if chosen[0] is not None and checkpoints.stamp(Path(chosen[0][0])) != chosen[0][1]:
                raise UserError(
                    f"process {self.accelerator.process_index} sees another {path} than the first process",
                    rule="all processes continue from one checkpoint",
                    remedy="put output_dir where all machines see it",
                )
        return path

    def _take_level(self, level: float, reason: str) -> None:
        """Put the level that was measured, or that of a checkpoint, in the place of `auto`."""
        self.config = dataclasses.replace(self.config, ambient_level=level)
        self.plan = dataclasses.replace(self.plan, config=self.config, objective=make_objective(self.config, self.base))
        self.level_reason = reason
        if self.accelerator.is_main_process:
            logger.warning("ambient_level auto: s_n = %g: %s", level, reason)

    def _some_latents(self, rows: list[int]) -> torch.Tensor:
        """Return the latents of images of one shape, encoded if they are not held or cached."""
        if self.latents is not None:
            return torch.stack([self.latents[i] for i in rows])
        if isinstance(self.cached, caching.CachedLatents):
            fixed = SampleStream(len(self.plan.images), 0)  # as in `encode_all`
            keys = self.plan.images.noise_keys
            return torch.stack([self.cached.latent(i, self.rule.view(keys[i], fixed, 0)) for i in rows])
        return self._encode_shared(rows)

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to continue this run."""
        names = ("objective", "reweight", "gap_upper", "noise_seed", "near_duplicates", "seed", "resolution", "center_crop", "random_flip",
                 "caption_dropout", "lora", "rank", "lora_alpha", "lora_target_modules")  # fmt: skip
        return {
            **{name: getattr(self.config, name) for name in names},
            # None where they are off: a checkpoint from before they existed continues.
            **{name: getattr(self.config, name) or None for name in extras.IDENTITY},
            "ambient_level": self.plan.objective.level,
            "prediction_type": self.plan.objective.prediction_type,
            "vae": self.base.vae_label,
            "global_batch": self.global_batch,
            "images": self.data_fingerprint,
            "noise_keys": noise_fingerprint(self.plan.images.noise_keys, self.plan.images.mirrored),
        }

    def train(self) -> dict[str, Any]:
        config, accelerator = self.config, self.accelerator
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        # First: where VAE and text encoder are let go, they are gone before the largest part comes.
        self._encode_once()
        if self.config.ambient_level == AUTO:
            shapes = [self.base.latent_shape(self.rule.target(k)) for k in self.plan.images.noise_keys]
            self._take_level(*leveling.propose(
                self.plan.images, shapes, self._some_latents, accelerator, self.plan.objective.schedule.max_level
            ))  # fmt: skip
            config = self.config
        self.wording = CaptionAugmentation(
            config.caption_mitigation, config.caption_mitigation_p or 0.0, config.caption_noise_std or 0.0,
            images=self.plan.images, stream=self.stream, tokenizer=self.captions.tokenizers[0],
        )  # fmt: skip
        self.unet = self._load_unet()
        trained = [p for p in self.unet.parameters() if p.requires_grad]
        rate = config.learning_rate * (self.global_batch if config.scale_lr else 1)
        optimizer = extras.adamw(config.use_8bit_adam)(
            trained, lr=rate, betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["initial_lr"] = rate
        # Not given to `prepare`: accelerate would step it once per process. It counts optimizer steps, and is a function
        # of settings and step alone: a run that resumes with another learning rate gets what it asks for.
        self.lr_schedule = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=self.steps,
            last_epoch=self.first_step - 1,
        )  # fmt: skip
        model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        trained = [p for p in self.unet.parameters() if p.requires_grad]  # FSDP puts others in their place
        if config.use_ema:
            self.average = averaging.Average(
                self.unet, offload=config.offload_ema, foreach=config.foreach_ema, checkpoint=self.checkpoint,
                step=self.first_step,
            )  # fmt: skip
        if self.checkpoint is not None:
            checkpoints.load_optimizer(self.checkpoint, self.state, self.optimizer)
            if accelerator.scaler is not None and self.state["scaler"]:
                accelerator.scaler.load_state_dict(self.state["scaler"])
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            config.save(self.output)
            self.losses.open(self.output)
        accelerator.wait_for_everyone()
        if config.report_to != "none":
            accelerator.init_trackers(config.tracker_project_name)

        model.train()
        probe = None
        if config.probe_steps is not None:
            probe = Probe(
                self.plan.images, count=config.probe_images or 32, resolution=config.resolution, seed=config.seed
            )
        begin = time.perf_counter()
        bar = tqdm(
            total=self.steps, initial=self.first_step, disable=not self.progress, **{"desc": "training", **self.bar}
        )
        batches = self._batches()
        for step in range(self.first_step + 1, self.steps + 1):
            record = self._step(model, trained, batches)
            self.losses.add(step, record)
            if accelerator.is_main_process:
                self._track(record | self.bands, step)
                bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.2e}")
                if self.on_step is not None:
                    self.on_step(step, record)
            bar.update()
            if self._draws_after(step):
                self._draw(step)
            if probe is not None and (step % (config.probe_steps or 1) == 0 or step == self.steps):
                self._evaluate(probe, step)
            # After the looks: a run that is killed in between repeats the step, and they are not missing.
            if step % config.checkpointing_steps == 0:
                self._save_checkpoint(step)
            if step < self.steps and self._copies_too_much():
                self.steps = step
                break
        bar.close()
        seconds = time.perf_counter() - begin
        summary = self._summary(seconds)
        self._save_results(model)
        return summary

    def _load_unet(self) -> Any:
        config, folder = self.config, self.checkpoint
        if folder is not None and not config.lora:
            try:
                unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
            except Exception as error:  # OSError, SafetensorError, RuntimeError: unusable files
                raise UserError(f"unet of {folder} cannot be read", rule=f"{type(error).__name__}: {error}"[:300],
                                remedy="resume from another checkpoint") from None  # fmt: skip
        else:
            unet = self.base.load("unet")
        if config.lora:
            frozen = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
                self.accelerator.mixed_precision, torch.float32
            )
            unet.to(frozen)
            self.dropouts = adapters.attach(
                unet,
                rank=config.rank or 4,
                alpha=config.lora_alpha or 4.0,
                targets=config.lora_target_modules or (),
                seed=config.seed,
                dropout=config.lora_dropout or 0.0,
                dora=config.use_dora,
            )
            if folder is not None:
                adapters.load(unet, folder)
        unet.register_to_config(_name_or_path=self.base.label)
        if config.enable_xformers_memory_efficient_attention:
            unet.enable_xformers_memory_efficient_attention()
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet

    def _encode_once(self) -> None:
        """Compute what never changes, sharing the work out; let VAE and text encoder go if nothing needs them more."""
        images, accelerator, config = self.plan.images, self.accelerator, self.config
        self.latent_encoder: Any = self.base.images().to(accelerator.device)
        self.captions = self.base.captions().to(accelerator.device)
        self.embed: Callable[[Sequence[str]], dict[str, torch.Tensor]] = self.captions
        self.cached: Dataset[tuple[str, torch.Tensor]] | None = None
        # Texts that are made up on the way are encoded on the way.
        live = config.caption_mitigation in LIVE
        resting = accelerator.device if live else "cpu"
        if config.latent_cache_dir is not None:
            folder, options = config.latent_cache_dir, {"progress": self.progress}
            self.embed = caching.CachedCaptions(
                caching.fill_captions(folder, self.captions, images.all_captions, accelerator, **options),
                self.captions if live else None,
            )
            if self.rule.views(images) is None:
                logger.warning(
                    "latents are not cached: crops are drawn anew at each step; --center_crop makes them fixed"
                )
            else:
                store = caching.fill_latents(folder, self.latent_encoder, images, self.rule, accelerator, **options)
                self.cached = caching.CachedLatents(store, images, self.rule, self.stream)
                self.latent_encoder.to("cpu")
            self.captions.to(resting)
        elif self.captions.hold(images.all_captions, limit=data.MAX_HELD_BYTES, progress=self.progress):
            self.captions.to(resting)
        self.latents: list[torch.Tensor] | None = None
        shapes = [self.base.latent_shape(self.rule.target(key)) for key in images.noise_keys]
        if self.cached is None and self.rule.fixed(images) and sum(map(math.prod, shapes)) * 4 <= data.MAX_HELD_BYTES:
            self.latents = [torch.empty(0)] * len(images)
            for shape in sorted(set(shapes)):
                rows = [i for i, other in enumerate(shapes) if other == shape]
                for i, latent in zip(rows, self._encode_shared(rows), strict=True):
                    self.latents[i] = latent
            self.latent_encoder.to("cpu")
        if not self.plan.prompts and self.config.probe_steps is None:
            # Whatever is held in memory makes its maker superfluous.
            if self.latents is not None or self.cached is not None:
                self.latent_encoder = None
            if (self.captions.held or self.embed is not self.captions) and not live:
                self.captions.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode_shared(self, rows: Sequence[int]) -> torch.Tensor:
        """Encode images of one shape, each process its share, and return all of them on every process."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = -(-len(rows) // ranks)
        mine = [rows[min(i * ranks + rank, len(rows) - 1)] for i in range(share)]
        part = data.encode_all(self.latent_encoder, self.plan.images, self.rule, mine, progress=self.progress)
        if ranks > 1:
            gathered = self.accelerator.gather(part.to(self.accelerator.device)).cpu()
            part = gathered.reshape(ranks, share, *part.shape[1:]).transpose(0, 1).reshape(-1, *part.shape[1:])
        return part[: len(rows)].contiguous()

    def _batches(self) -> Iterator[tuple[list[int], list[str], torch.Tensor]]:
        """Yield (positions, keys, x0) of each forward pass of this process."""
        places = process_batches(
            self.first_step,
            self.steps,
            batch_size=self.config.train_batch_size,
            accumulation=self.config.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        if self.latents is not None:
            for positions in places:
                rows = [self.stream.image(p) for p in positions]
                yield (
                    positions,
                    [self.plan.images.keys[i] for i in rows],
                    torch.stack([self.latents[i] for i in rows]),
                )
            return
        samples: Dataset[Any] = self.cached or Samples(self.plan.images, self.rule, self.stream)
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=list(places),
            num_workers=self.config.dataloader_num_workers,
            collate_fn=list,
            # Its own generator: the loader would take a number from the global one.
            generator=torch.Generator(),
        )
        for positions, batch in zip(list(loader.batch_sampler), loader, strict=True):  # type: ignore[arg-type]
            if self.cached is not None:
                yield positions, [key for key, _ in batch], torch.stack([x0 for _, x0 in batch])
            else:
                yield (
                    positions,
                    [s.key for s in batch],
                    data.encode(self.latent_encoder, batch, noise_seed=self.config.noise_seed),
                )

    def _make_batch(self, positions: list[int], keys: list[str], x0: torch.Tensor) -> TrainingBatch:
        """Draw what is fresh at these positions and look up what is fixed for these images."""
        timesteps, noise, captions, shape = [], [], [], tuple(x0.shape[1:])
        for position in positions:
            g = self.stream.generator("draw", position)
            uniform = torch.randint(self.plan.objective.schedule.num_train_timesteps, (), generator=g)
            timesteps.append(uniform if self.levels is None else self.levels(self.stream, position))
            dropped = float(torch.rand((), generator=g)) < self.config.caption_dropout
            captions.append("" if dropped else self.wording.caption(position))
            noise.append(torch.randn(shape, generator=g))
        objective, eps_n = self.plan.objective, None
        if objective.mode == "ambient" and objective.level > 0:
            images, rows = self.plan.images, [self.stream.image(p) for p in positions]
            noise_keys, mirrored = [images.noise_keys[i] for i in rows], [images.mirrored[i] for i in rows]
            eps_n = shared_noise(noise_keys, mirrored, shape, seed=self.config.noise_seed)
            if self.config.fresh_copies:
                draws = [torch.randn(shape, generator=self.stream.generator("copy", p)) for p in positions]
                eps_n = torch.stack(draws).to(eps_n)
        fresh = noising.offset(torch.stack(noise), self.stream, positions, self.config.noise_offset)
        extra = noising.perturbation_at(self.stream, positions, shape, self.config.input_perturbation)
        sizes = self.rule.sizes(self.plan.images, self.stream, positions) if self.family.takes_sizes else None
        return TrainingBatch(positions, keys, captions, torch.stack(timesteps), x0, eps_n, fresh, extra, sizes)

    def _step(
        self,
        model: Any,
        trained: Sequence[torch.nn.Parameter],
        batches: Iterator[tuple[list[int], list[str], torch.Tensor]],
    ) -> dict[str, float]:
        """Make one optimizer step and return its record."""
        config, accelerator, device = self.config, self.accelerator, self.accelerator.device
        # Loss and count of all samples, of the clean ones, of the ambient ones, then unweighted error and count of each band
        # of noise levels, on this process.
        sums = torch.zeros(
            6 + 2 * len(_BANDS), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
        )
        parts = config.gradient_accumulation_steps
        for part in range(parts):
            batch = self._make_batch(*next(batches))
            if self.on_batch is not None:
                self.on_batch(batch)
            corrupted = noising.corrupt(
                self.plan.objective, batch.x0, batch.eps_n, batch.timesteps, noise=batch.noise,
                perturbation=batch.perturbation, snr_gamma=config.snr_gamma,
            )  # fmt: skip
            for dropout in self.dropouts:
                dropout.positions = batch.positions
            embeddings = self.wording.embeddings(self.embed(batch.captions), batch.captions, batch.positions)
            inputs = self.family.inputs(embeddings, batch.time_ids, device)
            uncond = None if config.memorization_threshold is None else self._unconditional(model, corrupted.x_t, batch)
            with accelerator.no_sync(model) if part < parts - 1 else contextlib.nullcontext():
                with accelerator.autocast():
                    output = self.family.predict(model, corrupted.x_t.to(device), batch.timesteps.to(device), inputs)
                error = (output.float() - corrupted.target.to(device)).square().flatten(1).mean(1)
                each = corrupted.weight.to(device) * error
                if self.dropping is not None:
                    each = each * self.dropping.keep(error, output, uncond, batch.timesteps)
                accelerator.backward(each.mean() / parts)
            clean = corrupted.clean.to(device)
            with torch.no_grad():
                kinds = [torch.ones_like(clean), clean, ~clean]
                level = self.plan.objective.schedule.level(batch.timesteps).to(device)
                inside = [(level >= low) & (level < high) for low, high in _BANDS]
                pairs = [(each, k) for k in kinds] + [(error, k) for k in inside]
                sums += torch.stack([s for value, k in pairs for s in ((value * k).sum(), k.sum())]).to(sums.dtype)
        kept = None
        if self.dropping is not None and config.dropped_mean == "kept":
            # So far each gradient is that of the sum of losses over the number of all samples.
            kept = max(float(accelerator.reduce(self.dropping.kept(), "sum")), 1.0)
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.mul_(config.train_batch_size * parts * accelerator.num_processes / kept)
        accelerator.clip_grad_norm_(trained, config.max_grad_norm)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.dropping is not None:
            sums = torch.cat([sums, self.dropping.counts().to(sums)])
            self.dropping.end_step(accelerator.gather, device)
        total, n, clean_total, clean_n, ambient_total, ambient_n, *bands = accelerator.reduce(sums, "sum").tolist()
        self.bands = {
            f"error/s {low:g} to {high:g}": bands[2 * i] / bands[2 * i + 1] if bands[2 * i + 1] else math.nan
            for i, (low, high) in enumerate(_BANDS)
        }
        record = {
            "loss": total / (n if kept is None else kept),
            "clean_loss": clean_total / clean_n if clean_n else math.nan,
            "ambient_loss": ambient_total / ambient_n if ambient_n else math.nan,
            "lr": rate,
        }
        if self.dropping is not None:
            shares = [count / n for count in bands[2 * len(_BANDS) :]]
            record |= dict(zip(self.dropping.names, shares, strict=True))
        if not math.isfinite(record["loss"]):
            raise UserError(
                "the loss is no finite number any more",
                rule="the weights are lost; checkpoints before this step are whole",
                remedy="lower learning_rate, or use bf16 or no in place of fp16",
            )
        return record

    @torch.no_grad()
    def _unconditional(self, model: Any, x_t: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """Return the network's output for the empty caption."""
        device = self.accelerator.device
        inputs = self.family.inputs(self.embed([""] * len(batch.captions)), batch.time_ids, device)
        # An autocast of its own, before the other: one block keeps its casts, and these know no gradient.
        with self.accelerator.autocast():
            return self.family.predict(model, x_t.to(device), batch.timesteps.to(device), inputs)

    def _save_checkpoint(self, step: int) -> None:
        unet, optimizer = sharding.whole_unet(self.unet), sharding.whole_state(self.optimizer)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            with _room(f"checkpoint-{step}", self.output):
                checkpoints.save(
                    self.output,
                    step,
                    write_weights=partial(self._write_weights, unet),
                    optimizer=optimizer,
                    state={
                        "identity": self.identity(),
                        "scaler": scaler.state_dict() if scaler is not None else {},
                        "versions": _versions(),
                    },
                    limit=self.config.checkpoints_total_limit,
                )
        self.accelerator.wait_for_everyone()

    def _write_weights(self, unet: Any, folder: Path) -> None:
        if self.config.lora:
            adapters.save(unet, folder)
        else:
            unet.save_pretrained(folder / "unet")
        if self.average is not None:
            self.average.save(folder)
        if self.dropping is not None:
            self.dropping.save(folder)
        self.losses.save(folder)

    def _draws_after(self, step: int) -> bool:
        config = self.config
        if not self.plan.prompts:
            return False
        if config.validation_steps is not None:
            return step % config.validation_steps == 0 or step == self.steps
        every = (config.validation_epochs or 1) * len(self.plan.images)
        samples = step * self.global_batch
        return samples // every > (samples - self.global_batch) // every or step == self.steps

    def _pipeline(self) -> Any:
        return self.base.assemble(unet=self.unet, vae=self.latent_encoder.vae, **self.captions.parts)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Lend the averaged weights, which will be the result, to the U-Net."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _draw(self, step: int) -> None:
        with self._averaged():
            sampled = validation.sample(
                self._pipeline(),
                self.plan.prompts,
                self.config.num_validation_images or 4,
                resolution=self.config.resolution,
                seed=self.config.seed,
                accelerator=self.accelerator,
            )
        if self.accelerator.is_main_process:
            self._show("validation", validation.grid(sampled.rows), step)
            scores = [score for row in sampled.scores for score in row]
            self._track({"guard/validation_score": sum(scores) / len(scores)}, step)
            validation.write_scores(self.output / "validation", step, scores)
        self.accelerator.wait_for_everyone()

    def _evaluate(self, probe: Probe, step: int) -> None:
        """Look for copies; keep the numbers in `looks` and probe.jsonl, the images in probe/."""
        with self._averaged():
            seen = probe.evaluate(self._pipeline(), self.accelerator, step)
        self.evaluations.append(seen.record())
        if seen.sheet is not None:  # the main process
            self._show("probe", seen.sheet, step)
            self._track(
                {
                    f"probe/{k}": v
                    for k, v in seen.record().items()
                    if k in ("copies", "published", "ratio", "guard_score")
                },
                step,
            )
            add_evaluation(self.output / "probe.jsonl", seen.record())
        self.accelerator.wait_for_everyone()

    def _copies_too_much(self) -> bool:
        """Say whether the last look's share of copies is above the limit, in a warning too."""
        limit = self.config.stop_on_memorization
        if limit is None or not self.evaluations:
            return False
        last = self.evaluations[-1]
        if last["copies"] <= limit:
            return False
        logger.warning(
            "stopped after step %d: %.0f %% of the probe are copies, above %g",
            last["step"],
            100 * last["copies"],
            limit,
        )
        return True

    def _show(self, name: str, sheet: Image.Image, step: int) -> None:
        folder = self.output / name
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{step}.png")
        for tracker in self.accelerator.trackers:
            pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
            pixels = pixels.reshape(sheet.height, sheet.width, 3)
            shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None].numpy()}, step=step, **shape)

    def _track(self, values: dict[str, float], step: int) -> None:
        if self.config.report_to != "none":
            self.accelerator.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def _save_results(self, model: Any) -> None:
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        unet = sharding.whole_unet(self.unet)
        if accelerator.is_main_process:
            with _room("the result", self.output):
                self._write_results(unet)
        accelerator.wait_for_everyone()

    def _write_results(self, unet: Any) -> None:
        config = self.config
        staging = self.output / ".results.part"
        files.remove(staging)
        staging.mkdir()
        if self.average is not None:
            self.average.give()
        if config.lora:
            adapters.save(unet, staging)
            if config.output_kohya_format:
                adapters.save_kohya(unet, staging, xl=self.base.is_xl)
        else:
            try:
                pipe = self.base.pipeline(unet)
            except Exception as error:  # the base was moved, the hub is out of reach, ...
                unet.save_pretrained(staging / "unet")
                self._show_results(staging)
                raise UserError(
                    f"the other parts of base model {self.base.name} cannot be loaded any more",
                    rule=f"{type(error).__name__}: {error}"[:300],
                    remedy=f"the trained U-Net is whole in {self.output / 'unet'}: put it into the base",
                ) from error
            pipe.save_pretrained(staging)
        self._show_results(staging)
        facts = describe_run(
            config, base=self.base, objective=self.plan.objective, images=self.plan.images,
            prompts=self.plan.prompts, steps=self.steps, batch=self.global_batch,
            level_proposed=self.level_reason is not None,
        )  # fmt: skip
        write_card(self.output, facts)

    def _show_results(self, staging: Path) -> None:
        files.sync_tree(staging)
        files.replace_all(staging, self.output, last="model_index.json")

    def _summary(self, seconds: float) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "first_step": self.first_step,
            "seconds": seconds,
            "images": len(self.plan.images),
            "notes": list(self.plan.notes),
            "near_duplicate_groups": len(self.plan.images.groups),
            "losses": [r["loss"] for r in self.losses.records],
            **{name: self.losses.late_mean(name, _FINAL_STEPS) for name in ("loss", "clean_loss", "ambient_loss")},
            **({n: self.losses.late_mean(n, _FINAL_STEPS) for n in self.dropping.names} if self.dropping else {}),
            "evaluations": self.evaluations,
            "level": self.plan.objective.level,
            "level_reason": self.level_reason,
            "learning_rate": self.optimizer.param_groups[0]["initial_lr"],
            "global_batch": self.global_batch,
            "processes": self.accelerator.num_processes,
            "data_fingerprint": self.data_fingerprint,
            "output_dir": str(self.output),
            "config": {**dataclasses.asdict(self.config), "hub_token": None},
        }


@contextlib.contextmanager
def _room(what: str, folder: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a lost mount into one line; what was whole before stays whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{what} cannot be written to {folder}",
            rule=one_line(f"{type(error).__name__}: {error}", 200),
            remedy="make room there and resume with --resume_from_checkpoint latest",
        ) from error


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "accelerate": accelerate.__version__}
