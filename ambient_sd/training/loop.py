"""The training run: build, then step, checkpoint, evaluate, and at the end save.

    loss = mean_b weight_b ||f(x_t_b, t_b, caption_b) - target_b||^2 / dim          t uniform over the base's timesteps

with (x_t, target, weight) from `AmbientObjective.corrupt`. The same code trains the whole U-Net or a LoRA, on one
process or several; sample p of a run has the same image, timestep and noise whichever process takes it. Text encoders
are trained by LoRA only, the VAE never. `plan` has checked everything before, `encode` computes what never changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from PIL import Image
from tqdm.auto import tqdm

from ambient_sd.data.buckets import BucketStream, assign
from ambient_sd.data.captions import as_read, without
from ambient_sd.data.duplicates import FixedNoise
from ambient_sd.data.latents import MAX_HELD_BYTES
from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import SampleStream, keyed_seed, process_batches
from ambient_sd.data.views import ViewRule
from ambient_sd.families.base import Base
from ambient_sd.families.origin import written
from ambient_sd.families.rank_schedule import RankSchedule
from ambient_sd.objective import AmbientObjective, CorruptedBatch
from ambient_sd.training import (
    adapters,
    auto_level,
    averaging,
    checkpoints,
    keeping,
    noising,
    optimizers,
    prior,
    processes,
    quantized,
    results,
    sharding,
    validation,
)
from ambient_sd.training.caption_augmentation import CaptionAugmentation
from ambient_sd.training.config import AUTO, TrainConfig
from ambient_sd.training.distillation import Teacher
from ambient_sd.training.dropping import Dropping
from ambient_sd.training.encode import Encoder
from ambient_sd.training.plan import Plan, make_accelerator, plan_run
from ambient_sd.training.probe import Probe, add_evaluation
from ambient_sd.training.recompute import recompute
from ambient_sd.training.record import LossLog, RunRecord, StepSums, describe_start
from ambient_sd.utils.devices import deterministic, send, tf32
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.prefetch import ahead

logger = logging.getLogger(__name__)

_FINAL_STEPS = 100  # the record's losses are means over that many last steps


@dataclass(frozen=True)
class TrainingBatch:
    """Hold what one forward pass of one process sees; handed to `on_batch`.

    Attributes:
        positions: places of the samples in the run's line of samples.
        keys: content keys of the images.
        captions: captions after caption dropout and mitigation.
        timesteps: (B,) long; float32 with flow matching.
        x0: (B, C, h, w) clean latents.
        eps_n: (B, C, h, w) fixed noise, or None where the objective has none.
        noise: (B, C, h, w) fresh noise.
        perturbation: (B, C, h, w) what is added to the noise of the input only, or None.
        time_ids: (B, 6) float32, SDXL's sizes in pixels, or None.
        prior: they are class images.

    Example:
        >>> x0 = torch.zeros(1, 4, 8, 8)
        >>> batch = TrainingBatch([7], ["key"], ["a cat"], torch.tensor([500]), x0, None, torch.randn(x0.shape))
        >>> batch.captions
        ['a cat']
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
    prior: bool = False

    def rows(self, chosen: torch.Tensor) -> TrainingBatch:
        """Return some of the samples, in the given order.

        Example:
            >>> x0 = torch.zeros(2, 4, 8, 8)
            >>> batch = TrainingBatch([7, 8], ["a", "b"], ["a cat", "a dog"], torch.tensor([500, 9]), x0, None, x0)
            >>> batch.rows(torch.tensor([1])).captions
            ['a dog']
        """
        places = chosen.tolist()
        found: dict[str, Any] = {
            f.name: value[chosen] if isinstance(value := getattr(self, f.name), torch.Tensor)
            else [value[i] for i in places] if isinstance(value, list) else value
            for f in dataclasses.fields(self)
        }  # fmt: skip
        return TrainingBatch(**found)


_Drawn = tuple[TrainingBatch, CorruptedBatch]


@dataclass(frozen=True)
class _Line:
    """One line of samples: the training images, or the class images beside them."""

    images: ImageDataset
    stream: SampleStream
    rule: ViewRule
    encoder: Encoder
    objective: AmbientObjective
    fixed_noise: FixedNoise | None
    caption: Callable[[int], str]
    prior: bool = False


def run(
    config: TrainConfig,
    *,
    progress: bool = True,
    bar: Mapping[str, Any] | None = None,
    on_planned: Callable[[Plan], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_batch: Callable[[TrainingBatch], None] | None = None,
) -> RunRecord:
    """Run a training, under `accelerate launch` or inside another program.

    Args:
        config: the settings.
        progress: show progress bars (on the first process).
        bar: options for the bar of the steps (tqdm's), such as `desc` or `position`.
        on_planned: called on the first process when all is checked and nothing has been loaded or written yet.
        on_step: called on the first process after each optimizer step with the number of steps done and loss,
            clean_loss, ambient_loss and lr of that step (NaN where no sample was of that kind), and with
            memorization_threshold or agc the shares threshold_dropped and agc_dropped.
        on_batch: called on every process before each forward pass.

    Returns:
        What was trained and what came of it, on every process.

    Raises:
        UserError: something in settings, base, images or checkpoint is wrong; nothing has been written then. Or the
            loss became infinite.
        Interrupted: Ctrl-C or SIGTERM; its text names the newest checkpoint and how to resume.

    Example:
        >>> import tempfile
        >>> from ambient_sd.assets import IMAGES
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> base, output = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> tiny_pipeline().save_pretrained(base)
        >>> options = {"resolution": 32, "max_train_samples": 3, "max_train_steps": 2, "report_to": "none", "output_dir": output}
        >>> run(TrainConfig(base, train_data_dir=str(IMAGES), lora=True, **options), progress=False).steps
        2
    """
    progress = progress and processes.is_first()
    with processes.interruptible(config), deterministic(config.deterministic):
        plan = plan_run(config, progress=progress)
        if on_planned is not None and processes.is_first():
            on_planned(plan)
        with _accelerated(config) as accelerator, processes.report_peer_failure(), tf32(config.allow_tf32):
            return _Trainer(
                plan, accelerator, progress=progress, bar=bar or {}, on_step=on_step, on_batch=on_batch
            ).train()


@contextlib.contextmanager
def _accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """Start accelerate for one run, and leave nothing of it unless the program had started it before."""
    embedded = bool(AcceleratorState._shared_state)
    accelerator: Accelerator | None = None
    try:
        accelerator = make_accelerator(config)
        yield accelerator
    finally:
        if accelerator is not None:
            accelerator.free_memory()
        if not embedded:
            # Another run in this process may want another precision; accelerate never gives up the first one's.
            if accelerator is not None:
                accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)


class _Trainer:
    """One run on one process. All that it holds is built here, in the order in which memory allows it."""

    def __init__(
        self,
        plan: Plan,
        accelerator: Accelerator,
        *,
        progress: bool,
        bar: Mapping[str, Any],
        on_step: Callable[[int, dict[str, float]], None] | None,
        on_batch: Callable[[TrainingBatch], None] | None,
    ) -> None:
        config, schedule = plan.config, plan.objective.schedule
        self.accelerator, self.progress, self.bar, self.on_step, self.on_batch = (
            accelerator, progress, bar, on_step, on_batch,
        )  # fmt: skip
        if accelerator.is_main_process:
            for note in plan.notes:
                logger.warning("%s", note)

        # Which samples, in which order, seen how.
        self.global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self.steps = plan.steps(self.global_batch)
        stream, rule = _order(plan, plan.images, plan.buckets, plan.fixed_noise, self.global_batch, config.seed)
        self.levels: Any = None
        if plan.base.family.flow:
            self.levels = noising.FlowTimesteps(plan.base.scheduler, config.weighting_scheme, config.flow_shift, plan.base.family.shift, logit_mean=config.logit_mean or 0.0,
                                                logit_std=config.logit_std or 1.0, mode_scale=config.mode_scale or 0.0)  # fmt: skip
        elif config.weighting_scheme == "logit_normal":
            self.levels = noising.LogNormalLevels(schedule, config.logit_mean or 0.0, config.logit_std or 1.0)
        self.fingerprint = plan.images.fingerprint()
        processes.check_same_images(self.fingerprint, accelerator)
        if config.with_prior_preservation and plan.prior is None:
            plan = dataclasses.replace(plan, prior=prior.make(config, plan.base, accelerator, progress=progress))
        if plan.prior is not None:
            processes.check_same_images(plan.prior.images.fingerprint(), accelerator)

        # Where an interrupted run continues.
        self.checkpoint = checkpoints.agree(plan.checkpoint, accelerator)
        state: dict[str, Any] = {"step": 0}
        if self.checkpoint is not None:
            state = checkpoints.read_state(self.checkpoint)
            if config.ambient_level == AUTO and (known := auto_level.of_checkpoint(state, self.checkpoint.name)):
                plan = plan.with_level(*known)
            checkpoints.check_identity(self.checkpoint, state, plan.identity(self.global_batch))
        self.first_step = int(state["step"])
        if self.first_step > self.steps:
            raise UserError(f"{self.checkpoint} lies beyond the end of this run, {self.steps} steps",
                            remedy="raise max_train_steps or num_train_epochs")  # fmt: skip
        self.losses = LossLog(self.checkpoint)
        self.dropping = None
        if config.memorization_threshold is not None or config.agc is not None:
            self.dropping = Dropping(
                config.memorization_threshold, config.agc, scheduler=plan.base.scheduler,
                timesteps=schedule.num_train_timesteps, checkpoint=self.checkpoint,
            )  # fmt: skip

        # VAE and text encoders are gone, where nothing needs them any more, before the largest part comes.
        self.encoder = Encoder(plan, rule, stream, accelerator, progress=progress)
        if plan.config.ambient_level == AUTO:
            plan = plan.with_level(*auto_level.propose(
                plan.images, self.encoder.shapes, self.encoder.latents, accelerator, schedule.max_level
            ))  # fmt: skip
        self.plan, self.config, self.base, self.family = plan, plan.config, plan.base, plan.base.family
        self.identity = plan.identity(self.global_batch)
        self.augmentation = CaptionAugmentation(
            config.caption_mitigation, config.caption_mitigation_p or 0.0, config.caption_noise_std or 0.0,
            images=plan.images, stream=stream, tokenizer=self.encoder.caption_encoder.tokenizers[0],
        )  # fmt: skip
        self.line = _Line(
            plan.images,
            stream,
            rule,
            self.encoder,
            plan.objective,
            _noise(plan, plan.images, plan.fixed_noise),
            self.augmentation.caption,
        )
        self.prior = None if plan.prior is None else self._class_line(plan, plan.prior)

        # The network, its optimizer and its average.
        encoders = self.encoder.caption_encoder.parts if config.train_text_encoder else {}
        self.text = {name: part for name, part in encoders.items() if name.startswith("text_encoder")}
        # A CPU's layer norm takes no bfloat16 weights under autocast, and gains no speed from them.
        frozen = "no" if accelerator.device.type == "cpu" else accelerator.mixed_precision
        self.unet, self.dropouts = _load_unet(plan, self.checkpoint, frozen, self.text, accelerator.device)
        scale = self.global_batch if config.scale_lr else 1
        self.rate = config.learning_rate * scale
        self.text_trained = [p for part in self.text.values() for p in part.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for p in self.unet.parameters() if p.requires_grad]}]
        if self.text_trained:
            groups.append({"params": self.text_trained, "lr": (config.text_encoder_lr or config.learning_rate) * scale})
        optimizer = optimizers.make(config, groups, self.rate, self.first_step)
        # Not given to `prepare`: accelerate would step it once per process. It counts optimizer steps, and is a function
        # of settings and step alone: a run that resumes with another learning rate gets what it asks for.
        self.lr_schedule = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=self.steps,
            num_cycles=config.lr_num_cycles, power=config.lr_power, last_epoch=self.first_step - 1,
        )  # fmt: skip
        sharding.choose_blocks(accelerator, self.unet)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        if isinstance(optimizer, optimizers.ByWeight):
            optimizer.listen()
        # FSDP puts others in the place of the U-Net's.
        self.trained = [*(p for p in self.unet.parameters() if p.requires_grad), *self.text_trained]
        self.average = None
        if config.use_ema:
            self.average = averaging.Average(
                self.unet, self.text, offload=config.offload_ema, foreach=config.foreach_ema, checkpoint=self.checkpoint,
                step=self.first_step, name=self.family.network,
            )  # fmt: skip
        if self.checkpoint is not None:
            checkpoints.load_optimizer(self.checkpoint, state, self.optimizer)
            if accelerator.scaler is not None and state["scaler"]:
                accelerator.scaler.load_state_dict(state["scaler"])

        self.teacher = None
        if plan.objective.distill_level is not None:
            self.teacher = Teacher(
                plan.base, self.unet, self.text, lora=config.lora, dtype=_halves(frozen) or torch.float32, device=accelerator.device,
            )  # fmt: skip

        # What looks for copies on the way.
        self.evaluations: list[dict[str, float]] = list(state.get("evaluations", ()))
        self.probe = None
        if config.probe_steps is not None:
            self.probe = Probe(
                plan.images, count=config.probe_images or 32, resolution=config.resolution, seed=config.seed,
                new_captions=plan.new_captions, read=as_read(plan.images.captions, *plan.base.reading()),
            )  # fmt: skip

        # The folder: from here on something is written.
        self.output = Path(config.output_dir)
        if accelerator.is_main_process:
            if config.overwrite:
                results.clear(self.output, config.logging_dir)
            self.output.mkdir(parents=True, exist_ok=True)
            self.config.save(self.output)
            self.losses.open(self.output)
            results.write_skipped(self.output, self.plan.images.skipped)
        accelerator.wait_for_everyone()
        if config.report_to != "none":
            accelerator.init_trackers(config.tracker_project_name)

    def _class_line(self, plan: Plan, found: prior.Prior) -> _Line:
        """Return the line of the class images: real ones are trained as the training images are, generated ones with the plain loss."""
        images, fixed = found.images, found.real and plan.fixed_noise
        buckets = (
            None
            if plan.buckets is None or not found.real
            else assign(images.sizes, images.noise_keys, sorted(set(plan.buckets.values())))
        )
        stream, rule = _order(
            plan, images, buckets, fixed, self.global_batch, keyed_seed(plan.config.seed, "class images")
        )
        encoder = Encoder(plan, rule, stream, self.accelerator, progress=self.progress, beside=self.encoder)
        objective = plan.objective if found.real else AmbientObjective(plan.base.schedule, mode="plain")
        return _Line(
            images,
            stream,
            rule,
            encoder,
            objective,
            _noise(plan, images, fixed),
            lambda p: images.captions[stream.image(p)],
            prior=True,
        )

    def train(self) -> RunRecord:
        """Make all steps, with what comes between them, save the result and return the record."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            logger.info("%s", describe_start(
                self.plan, steps=self.steps, first_step=self.first_step, global_batch=self.global_batch,
                processes=accelerator.num_processes, trained=sum(p.numel() for p in self.trained),
                device=str(accelerator.device), precision=accelerator.mixed_precision,
            ))  # fmt: skip
        for part in (self.model, *self.text.values()):
            part.train()
        done, begin = self.first_step, time.perf_counter()
        lines = [self.line] if self.prior is None else [self.line, self.prior]
        batches = [self._batches(line) for line in lines]
        if self.probe is not None and config.keep == "best" and done == 0:
            self._evaluate(self.probe, 0)  # what the base itself counts
        options = {"desc": "training", **self.bar}
        with tqdm(total=self.steps, initial=self.first_step, disable=not self.progress, **options) as bar:
            for step in range(self.first_step + 1, self.steps + 1):
                record, bands = self._step(*batches)
                done = step
                self.losses.add(step, record)
                if accelerator.is_main_process:
                    self._track(record | bands, step)
                    bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.2e}")
                    if self.on_step is not None:
                        self.on_step(step, record)
                bar.update()
                if self._validates_after(step):
                    self._validate(step)
                evaluates = self.probe is not None and (step % (config.probe_steps or 1) == 0 or step == self.steps)
                if self.probe is not None and evaluates:
                    self._evaluate(self.probe, step)
                # After the evaluations: a run that is killed in between repeats the step, and none is missing.
                if step % config.checkpointing_steps == 0 or (evaluates and config.keep == "best"):
                    self._save_checkpoint(step)
                if step < self.steps and self._copies_too_much():
                    break
        seconds = time.perf_counter() - begin
        kept = self._kept()
        self._save_result(done if kept is None else kept.step)
        quantities = ["loss", "clean_loss", "ambient_loss", *(self.dropping.names if self.dropping else ())]
        quantities += [] if self.prior is None else ["prior_loss"]
        return RunRecord(
            plan=self.plan, output=self.output, steps=done, first_step=self.first_step, seconds=seconds,
            losses=[r["loss"] for r in self.losses.records],
            means={name: self.losses.late_mean(name, _FINAL_STEPS) for name in quantities},
            evaluations=self.evaluations, kept=kept, learning_rate=self.rate, global_batch=self.global_batch,
            processes=accelerator.num_processes, fingerprint=self.fingerprint,
        )  # fmt: skip

    def _batches(self, line: _Line) -> Iterator[_Drawn]:
        """Yield the batches of this process, from the step on that the run begins with, and what is made of each for the network."""
        config, accelerator = self.config, self.accelerator
        places = process_batches(
            self.first_step, self.steps, batch_size=config.train_batch_size, accumulation=config.gradient_accumulation_steps,
            rank=accelerator.process_index, processes=accelerator.num_processes,
        )  # fmt: skip
        drawn = (self._draw_batch(line, *at) for at in line.encoder.batches(places))
        # All draws are functions of seed and place: made early they are the same. On a CPU the cores are busy already.
        return ahead(drawn) if accelerator.device.type == "cuda" else drawn

    def _draw_batch(self, line: _Line, positions: list[int], keys: list[str], x0: torch.Tensor) -> _Drawn:
        """Draw what is fresh at these positions, look up what is fixed for these images, and corrupt the images."""
        timesteps, noise, captions, shape, stream = [], [], [], tuple(x0.shape[1:]), line.stream
        for position in positions:
            g = stream.generator("draw", position)
            uniform = torch.randint(line.objective.schedule.num_train_timesteps, (), generator=g)
            if self.family.flow:
                timesteps.append(
                    self.levels(stream, position, self.family.image_tokens(self.base.network_config, shape))
                )
            else:
                timesteps.append(uniform if self.levels is None else self.levels(stream, position))
            dropped = float(torch.rand((), generator=g)) < self.config.caption_dropout
            captions.append("" if dropped else line.caption(position))
            noise.append(torch.randn(shape, generator=g))
        eps_n = None
        if line.fixed_noise is not None:
            eps_n = line.fixed_noise([stream.image(p) for p in positions], shape)
            if self.config.fresh_copies:
                draws = [torch.randn(shape, generator=stream.generator("copy", p)) for p in positions]
                eps_n = torch.stack(draws).to(eps_n)
        fresh = noising.offset(torch.stack(noise), stream, positions, self.config.noise_offset)
        extra = noising.perturbation_at(stream, positions, shape, self.config.input_perturbation)
        sizes = line.rule.sizes(line.images, stream, positions) if self.family.takes_sizes else None
        batch = TrainingBatch(
            positions, keys, captions, torch.stack(timesteps), x0, eps_n, fresh, extra, sizes, line.prior
        )
        return batch, noising.corrupt(
            line.objective, batch.x0, batch.eps_n, batch.timesteps, noise=batch.noise,
            perturbation=batch.perturbation, snr_gamma=self.config.snr_gamma,
            scheme=self.config.weighting_scheme, preconditioned=self.config.precondition_outputs,
        )  # fmt: skip

    def _step(
        self, batches: Iterator[_Drawn], class_batches: Iterator[_Drawn] | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Make one optimizer step; return its record, and the mean error of each band of noise levels."""
        config, accelerator, device = self.config, self.accelerator, self.accelerator.device
        sums, class_sums = StepSums(device), StepSums(device)
        parts = config.gradient_accumulation_steps
        for part in range(parts):
            self._pass(self.line, next(batches), sums, parts, last=part == parts - 1 and class_batches is None)
        kept: torch.Tensor | None = None
        factor: float | torch.Tensor = 1.0
        if self.dropping is not None and config.dropped_mean == "kept":
            # So far each gradient is that of the sum of losses over the number of all samples. Left on the device, in the
            # precision of a Python number where it has it: nothing is waited for.
            kept = accelerator.reduce(self.dropping.kept(), "sum").to(sums.sums.dtype).clamp(min=1.0)
            factor = config.train_batch_size * parts * accelerator.num_processes / kept
        if self.prior is not None and class_batches is not None:
            # Nothing of them is dropped, so the factor is none of theirs.
            over = parts * factor / config.prior_loss_weight
            over = over.float() if isinstance(over, torch.Tensor) else over
            for part in range(parts):
                self._pass(self.prior, next(class_batches), class_sums, over, last=part == parts - 1)
        if accelerator.num_processes > 1:
            # Not wrapped as the U-Net is: of SDXL's first encoder the last layer has no gradient, which DDP takes for a fault.
            for parameter in self.text_trained:
                if parameter.grad is not None:
                    parameter.grad.copy_(accelerator.reduce(parameter.grad, "mean"))
        if kept is not None:
            for parameter in self.trained:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        if config.max_grad_norm > 0:
            accelerator.clip_grad_norm_(self.trained, config.max_grad_norm)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        dropped = {} if self.dropping is None else dict(zip(self.dropping.names, self.dropping.counts(), strict=True))
        if self.dropping is not None:
            self.dropping.end_step(accelerator.gather, device)
        record, bands = sums.means(accelerator, rate=rate, kept=kept, dropped=dropped)
        if class_batches is not None:
            record["prior_loss"] = class_sums.means(accelerator, rate=rate, kept=None, dropped={})[0]["loss"]
        if not all(math.isfinite(record.get(name, 0.0)) for name in ("loss", "prior_loss")):
            raise UserError(
                "the loss is NaN or Inf",
                rule="the weights are lost; checkpoints before this step are whole",
                remedy="lower learning_rate, or use bf16 or no in place of fp16",
            )
        return record, bands

    def _pass(self, line: _Line, drawn: _Drawn, sums: StepSums, over: float | torch.Tensor, *, last: bool) -> None:
        """Make one pass forward and back: add its mean loss divided by `over` to the gradients, which the last one of a step gathers."""
        config, accelerator, device = self.config, self.accelerator, self.accelerator.device
        batch, corrupted = drawn
        if self.on_batch is not None:
            self.on_batch(batch)
        for dropout in self.dropouts:
            # Of a class image another mask than of the training image at its place.
            dropout.positions = [-1 - p for p in batch.positions] if line.prior else batch.positions
        embeddings = line.encoder.embed(batch.captions)
        if not line.prior:
            embeddings = self.augmentation.embeddings(embeddings, batch.captions, batch.positions)
        inputs = self.family.inputs(embeddings, batch.time_ids, device)
        dropping = None if line.prior else self.dropping
        uncond = None
        if dropping is not None and config.memorization_threshold is not None:
            with torch.no_grad():
                uncond = self._forward(self.model, line, batch, corrupted.x_t, captioned=False)
        if corrupted.distilled is not None and self.teacher is not None:
            corrupted = self._distil(line, batch, corrupted)
        with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
            with accelerator.autocast():
                output = self.family.predict(
                    self.model, send(corrupted.x_t, device), send(batch.timesteps, device), inputs
                )
            error = (output.float() - send(corrupted.target, device)).square().flatten(1).mean(1)
            each = send(corrupted.weight, device) * error
            if dropping is not None:
                each = each * dropping.keep(error, output, uncond, batch.timesteps)
            accelerator.backward(each.mean() / over)
        level = line.objective.schedule.level(batch.timesteps)
        sums.add(each, error, clean=send(corrupted.clean, device), level=send(level, device))

    def _distil(self, line: _Line, batch: TrainingBatch, corrupted: CorruptedBatch) -> CorruptedBatch:
        """Ask the base for the targets of the samples above `distill_level`."""
        assert corrupted.distilled is not None and self.teacher is not None
        rows = corrupted.distilled.nonzero().flatten()
        asked = rows
        if not len(rows):
            if not sharding.is_spread(self.unet):
                return dataclasses.replace(corrupted, distilled=None)
            # The other processes gather a spread network's weights for theirs, so this one takes part, and drops what it gets.
            asked = torch.tensor([0])
        part = batch.rows(asked)
        if self.config.distill_without and not line.prior:
            part = dataclasses.replace(part, captions=[without(c, self.config.distill_without) for c in part.captions])
        with self.teacher.acting() as network:
            found = self._forward(network, line, part, corrupted.x_t[asked])
        return corrupted.with_base(found[: len(rows)])

    def _forward(
        self, network: Any, line: _Line, batch: TrainingBatch, x_t: torch.Tensor, *, captioned: bool = True
    ) -> torch.Tensor:
        """Return a network's output, without gradient, for the batch's captions or for empty ones."""
        device = self.accelerator.device
        embeddings = line.encoder.embed(batch.captions if captioned else [""] * len(batch.captions))
        if captioned and not line.prior:
            embeddings = self.augmentation.embeddings(embeddings, batch.captions, batch.positions)
        inputs = self.family.inputs(embeddings, batch.time_ids, device)
        # An autocast of its own, before the other: one block keeps its casts, and these know no gradient.
        with self.accelerator.autocast():
            output: torch.Tensor = self.family.predict(
                network, send(x_t, device), send(batch.timesteps, device), inputs
            )
        return output

    def _save_checkpoint(self, step: int) -> None:
        unet, optimizer = sharding.whole_unet(self.unet), sharding.whole_state(self.optimizer)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            with results.full_disk_in_one_line(f"checkpoint-{step}", self.output):
                checkpoints.save(
                    self.output,
                    step,
                    write_weights=partial(self._write_weights, unet),
                    optimizer=optimizer,
                    state={
                        "identity": self.identity,
                        "scaler": scaler.state_dict() if scaler is not None else {},
                        "versions": _versions(),
                        "evaluations": self.evaluations,
                    },
                    limit=self.config.checkpoints_total_limit,
                    spared=None if (kept := self._kept()) is None else kept.step,
                )
        self.accelerator.wait_for_everyone()

    def _write_weights(self, unet: Any, folder: Path) -> None:
        if self.config.lora:
            adapters.save(unet, folder, self.family, self.text, written(self.base, self.config.resolution))
        else:
            unet.save_pretrained(folder / self.family.network)
        if self.average is not None:
            self.average.save(folder)
        if self.dropping is not None:
            self.dropping.save(folder)
        self.losses.save(folder)

    def _validates_after(self, step: int) -> bool:
        config = self.config
        if not self.plan.prompts:
            return False
        if config.validation_steps is not None:
            return step % config.validation_steps == 0 or step == self.steps
        every = (config.validation_epochs or 1) * self.line.stream.count
        samples = step * self.global_batch
        return samples // every > (samples - self.global_batch) // every or step == self.steps

    def _pipeline(self) -> Any:
        return self.base.assemble(
            **{self.family.network: self.unet}, vae=self.encoder.image_encoder.vae, **self.encoder.caption_encoder.parts
        )

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Lend the averaged weights, which will be the result, to what is trained."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _validate(self, step: int) -> None:
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
            self._show("validation", validation.sheet(sampled, self.plan.prompts), step)
            scores = [score for row in sampled.scores for score in row]
            self._track({"guard/validation_score": sum(scores) / len(scores)}, step)
            validation.write_scores(self.output / "validation", step, scores)
        self.accelerator.wait_for_everyone()

    def _evaluate(self, probe: Probe, step: int) -> None:
        """Look for copies; the numbers go to the record and probe.jsonl, the images to probe/."""
        with self._averaged():
            seen = probe.evaluate(self._pipeline(), self.accelerator, step)
        record = seen.record()
        self.evaluations.append(record)
        if seen.sheet is not None:  # the main process
            (logger.warning if seen.blank else logger.info)("%s", seen.describe())
            self._show("probe", seen.sheet, step)
            if seen.new_sheet is not None:
                self._show("probe", seen.new_sheet, step, "-new")
            curves = ("copies", "published", "ratio", "guard_score", "kid", "own")
            self._track({f"probe/{name}": record[name] for name in curves if name in record}, step)
            add_evaluation(self.output / "probe.jsonl", record)
        self.accelerator.wait_for_everyone()

    def _kept(self) -> keeping.Kept | None:
        """Return what `--keep best` keeps as far as is known; None where the last weights are the result."""
        if self.config.keep == "last":
            return None
        return keeping.decide(self.evaluations, self.config.stop_on_memorization or 0.0)

    def _copies_too_much(self) -> bool:
        """Tell whether going on can only copy more; say so in a warning."""
        if (kept := self._kept()) is not None:
            if kept.confirmed:
                logger.warning("stopped after step %d: %s", self.evaluations[-1]["step"], kept.describe())
            return kept.confirmed
        limit = self.config.stop_on_memorization
        if limit is None or not self.evaluations:
            return False
        last = self.evaluations[-1]
        if last["copies"] <= limit:
            return False
        logger.warning(
            "stopped after step %d: %.0f %% of the probe images are copies, above stop_on_memorization %g",
            last["step"],
            100 * last["copies"],
            limit,
        )
        return True

    def _show(self, name: str, sheet: Image.Image, step: int, kind: str = "") -> None:
        folder = self.output / name
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{step}{kind}.png")
        for tracker in self.accelerator.trackers:
            pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
            pixels = pixels.reshape(sheet.height, sheet.width, 3)
            shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name + kind: pixels[None].numpy()}, step=step, **shape)

    def _track(self, values: dict[str, float], step: int) -> None:
        if self.config.report_to != "none":
            self.accelerator.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def _save_result(self, step: int | None) -> None:
        """Write the weights of a step: those at hand, or a checkpoint's where `--keep best` chose an earlier one."""
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        if step is None:
            if (kept := self._kept()) is not None and kept.began is None:
                raise UserError("the images of no evaluation could be compared", rule="no checkpoint is known to be clean, so --keep best keeps none",
                                remedy="look at probe/; try --mixed_precision no or a lower learning_rate, or give --keep last; the checkpoints are left")  # fmt: skip
            first = next(e["step"] for e in self.evaluations if e["step"] > 0)
            raise UserError(f"copying began before the first evaluation, step {first:g}", rule="no checkpoint is clean, so --keep best keeps none",
                            remedy="evaluate earlier (--probe_steps), lower learning_rate, or give --keep last; the checkpoints are left")  # fmt: skip
        accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        unet = sharding.whole_unet(self.unet)
        if accelerator.is_main_process:
            checkpoint = self.output / f"checkpoint-{step}"
            earlier = self.config.keep == "best" and step != self.evaluations[-1]["step"]
            if self.average is not None:
                if earlier:
                    self.average.resume(checkpoint, step)
                self.average.give()
            elif earlier and self.config.lora:
                adapters.load(unet, checkpoint, self.family, self.text)
            elif earlier:
                unet.load_state_dict(_read_network(self.base, checkpoint).state_dict())
            with results.full_disk_in_one_line("the result", self.output):
                results.write(self.output, unet, self.base, self.config, self.text)
        accelerator.wait_for_everyone()


def _read_network(base: Base, checkpoint: Path) -> Any:
    name = base.family.network
    try:
        return getattr(diffusers, base.family.parts[name][1]).from_pretrained(
            checkpoint, subfolder=name, dtype=torch.float32
        )
    except Exception as error:  # OSError, SafetensorError, RuntimeError: unusable files
        raise UserError(f"{name} of {checkpoint} cannot be read", rule=f"{type(error).__name__}: {error}"[:300],
                        remedy="resume from another checkpoint") from None  # fmt: skip


def _load_unet(
    plan: Plan, checkpoint: Path | None, precision: str, text: Mapping[str, Any], device: torch.device
) -> tuple[Any, list[adapters.AddressedDropout]]:
    """Load the U-Net that is trained, from the base or a checkpoint; give it and text encoders their LoRA; return it and the LoRA's dropout."""
    config, base, dropouts = plan.config, plan.base, list[adapters.AddressedDropout]()
    unet = (
        _read_network(base, checkpoint)
        if checkpoint is not None and not config.lora
        else base.load(base.family.network)
    )
    if config.lora:
        if (half := _halves(precision)) is not None:
            unet.to(half)  # frozen weights
        for part, module in {base.family.network: unet, **text}.items():
            own = part == base.family.network
            dropouts += adapters.attach(
            module, part=part, rank=config.rank or 4, alpha=config.lora_alpha or 4.0,
            targets=config.lora_target_modules or () if own else adapters.TEXT_TARGETS, seed=config.seed, dropout=config.lora_dropout or 0.0, dora=config.use_dora, start=plan.start,
            init=config.lora_init, rslora=config.use_rslora, checkpoint=checkpoint, kind=config.lora_kind,
            schedule=None if config.lora_min_rank is None else RankSchedule(config.lora_min_rank, base.schedule.num_train_timesteps),
        )  # fmt: skip
        if checkpoint is not None:
            adapters.load(unet, checkpoint, base.family, text)
        if config.quantize_base is not None:
            quantized.quantize(unet, config.quantize_base, device, offload=config.offload_base)
    if config.full_bf16:
        unet.to(torch.bfloat16)
    unet.register_to_config(_name_or_path=base.label)
    if config.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if config.gradient_checkpointing:
        recompute(unet, config.gradient_checkpointing_fraction or 1.0)
        for encoder in text.values():
            encoder.gradient_checkpointing_enable()
    return unet, dropouts


def _halves(precision: str) -> torch.dtype | None:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)


def _order(
    plan: Plan,
    images: ImageDataset,
    buckets: Mapping[str, tuple[int, int]] | None,
    fixed: bool,
    global_batch: int,
    seed: int,
) -> tuple[SampleStream, ViewRule]:
    """Return which samples come in which order, and how each is seen."""
    config = plan.config
    stream = SampleStream(len(images), seed, images.repeats)
    if buckets is not None:
        stream = BucketStream([buckets[key] for key in images.noise_keys], global_batch, seed, images.repeats)
    rule = ViewRule(
        config.resolution,
        config.center_crop,
        config.random_flip,
        fixed,
        config.noise_seed,
        buckets,
        config.image_interpolation_mode,
    )
    return stream, rule


def _noise(plan: Plan, images: ImageDataset, fixed: bool) -> FixedNoise | None:
    """Return the fixed noise of images, or None where they have none."""
    return FixedNoise(images.noise_keys, images.mirrored, plan.config.noise_seed, MAX_HELD_BYTES) if fixed else None


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "accelerate": accelerate.__version__}
