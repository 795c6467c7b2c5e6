"""Everything that is checked before any weights load: settings, packages, base, images, output folder, and the launch.

The cheapest check comes first and nothing is written: a mistake costs one line and no time. `Plan` is what is known then.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from ambient_sd import families
from ambient_sd.data.buckets import assign, read_buckets
from ambient_sd.data.captions import compose, find_cut, in_one_line, missing_from, perhaps_unknown
from ambient_sd.data.dataset_options import reading
from ambient_sd.data.duplicates import noise_fingerprint
from ambient_sd.data.enlargement import check_enlargement
from ambient_sd.data.layouts.layout import Ask
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.families.base import Base, check_base
from ambient_sd.families.family import Family
from ambient_sd.families.lora import Adapter
from ambient_sd.objective import AmbientObjective
from ambient_sd.sampling import collect_prompts
from ambient_sd.training import (
    adapters,
    auto_level,
    averaging,
    caption_augmentation,
    checkpoints,
    dropping,
    noising,
    optimizers,
    prior,
    processes,
    results,
    sharding,
)
from ambient_sd.training.config import AUTO, FLOW_SCHEMES, TrainConfig
from ambient_sd.training.prior import Prior
from ambient_sd.utils.errors import UserError, one_line

logger = logging.getLogger(__name__)

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
_NAMED = 3  # words of a note
# Settings that change the samples, the loss or the weights: a checkpoint that was written with others is of another run.
_IDENTITY = (
    "objective", "reweight", "gap_upper", "noise_seed", "near_duplicates", "fresh_copies", "snr_gamma", "logit_mean", "logit_std",
    "noise_offset", "input_perturbation", "memorization_threshold", "agc", "dropped_mean", "caption_mitigation",
    "caption_mitigation_p", "caption_noise_std", "caption_dropout", "seed", "resolution", "center_crop", "random_flip",
    "aspect_ratio_buckets", "use_ema", "use_8bit_adam", "lora", "rank", "lora_alpha", "lora_target_modules", "lora_dropout",
    "use_dora",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Hold a run whose settings, base model and images are checked, before any weights load.

    Attributes:
        config: the settings.
        base: the base model.
        objective: the loss on the base's schedule; with `ambient_level: auto` its level is provisional.
        images: the training images, checked and grouped.
        prompts: of the validation images.
        checkpoint: where the run continues, known on the first process only; None at the start.
        buckets: (width, height) by noise key; None: all images are seen as squares.
        notes: what the user should know before the run, a line each.
        new_captions: captions that are not trained, on which the probe measures quality.
        level_reason: where a measured level comes from; None if the settings give it.
        start: the adapter that the training starts from; None: a fresh one, or the whole U-Net.
        prior: the class images; None: there are none, or the base has yet to generate them.

    Example:
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> plan = plan_run(TrainConfig(str(BASE), train_data_dir=str(IMAGES), max_train_samples=3, resolution=64))
        >>> plan.fixed_noise, plan.with_level(0.5, "measured").objective.level
        (True, 0.5)
    """

    config: TrainConfig
    base: Base
    objective: AmbientObjective
    images: ImageDataset
    prompts: list[str]
    checkpoint: Path | None
    buckets: dict[str, tuple[int, int]] | None = None
    notes: tuple[str, ...] = ()
    new_captions: tuple[str, ...] = ()
    level_reason: str | None = None
    start: Adapter | None = None
    prior: Prior | None = None

    @property
    def fixed_noise(self) -> bool:
        """Tell whether each image keeps one noise and one view."""
        return self.objective.uses_noise

    def steps(self, global_batch: int) -> int:
        """Return the optimizer steps of the run, of so many samples each: as given, or those of its epochs."""
        config = self.config
        return config.max_train_steps or math.ceil(config.num_train_epochs * sum(self.images.repeats) / global_batch)

    def with_level(self, level: float, reason: str) -> Plan:
        """Return the plan with a measured level, or that of a checkpoint, in place of `auto`."""
        config = dataclasses.replace(self.config, ambient_level=level)
        return dataclasses.replace(
            self, config=config, objective=make_objective(config, self.base), level_reason=reason
        )

    def identity(self, global_batch: int) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to continue this run."""
        family = self.base.family
        return {
            **{name: getattr(self.config, name) for name in _IDENTITY},
            "ambient_level": self.objective.level,
            "distill_level": self.objective.distill_level,
            "prediction_type": self.objective.prediction_type,
            "base": self.base.identity,
            "vae": self.base.vae_label,
            # None where it is as it always was: checkpoints from before there was a choice go on.
            "image_interpolation_mode": None if (mode := self.config.image_interpolation_mode) == "lanczos" else mode,
            "lora_kind": None if self.config.lora_kind == "lora" else self.config.lora_kind,
            "lora_init": self.config.lora_init,
            "quantize_base": self.config.quantize_base,
            "full_bf16": self.config.full_bf16 or None,
            "use_rslora": self.config.use_rslora or None,
            "weighting_scheme": scheme if (scheme := self.config.weighting_scheme) in FLOW_SCHEMES else None,
            "mode_scale": self.config.mode_scale,
            "max_sequence_length": length if (length := family.text_length) != type(family).text_length else None,
            "guidance_scale": scale if (scale := family.embedded_guidance) != type(family).embedded_guidance else None,
            "flow_shift": self.config.flow_shift,
            "precondition_outputs": self.config.precondition_outputs or None,
            "distill_without": self.config.distill_without,
            "lora_min_rank": self.config.lora_min_rank,
            "train_text_encoder": self.config.train_text_encoder or None,
            "lora_weights": None if self.start is None else self.start.file.sha256,
            "global_batch": global_batch,
            "prior": None if self.prior is None else self.prior.identity(self.config.prior_loss_weight),
            "images": self.images.fingerprint(),
            "noise_keys": noise_fingerprint(self.images.noise_keys, self.images.mirrored),
        }


def base_of(config: TrainConfig) -> Base:
    """Read and check the base that the settings name.

    Raises:
        UserError: as `check_base`.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> base = base_of(TrainConfig(str(BASE), train_data_dir="my-images", resolution=64))
        >>> base.schedule.num_train_timesteps
        1000
    """
    base = check_base(
        str(config.pretrained_model_name_or_path), revision=config.revision, variant=config.variant, cache_dir=config.cache_dir,
        config=config.single_file_config, vae=config.pretrained_vae_model_name_or_path, prediction_type=config.prediction_type, lora=config.lora,
        resolution=config.resolution,
    )  # fmt: skip
    return dataclasses.replace(base, text_length=config.max_sequence_length, embedded_guidance=config.guidance_scale)


def plan_run(config: TrainConfig, *, progress: bool = False) -> Plan:
    """Check all that can be known before weights load, cheapest first; write nothing.

    Raises:
        UserError: something is wrong.

    Example:
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> plan = plan_run(TrainConfig(str(BASE), train_data_dir=str(IMAGES), max_train_samples=3, resolution=64))
        >>> len(plan.images), plan.objective.level, plan.checkpoint
        (3, 1.0, None)
    """
    _check_packages(config)
    sharding.check(config)
    base = base_of(config)
    objective = make_objective(config, base)
    if config.snr_gamma is not None:
        noising.min_snr_weight(base.schedule, torch.tensor([0]), config.snr_gamma, objective.prediction_type)
    if config.memorization_threshold is not None:
        dropping.check_scheduler(base.scheduler)
    check_family(config, base.family, base.network_config)
    if config.max_sequence_length is not None and (read := min(base.reading()[1])) < 1:
        raise UserError(f"max_sequence_length is {config.max_sequence_length}", rule=f"{config.max_sequence_length - read} tokens stand around every caption of {base.family.name}",
                        remedy="raise it")  # fmt: skip
    if config.objective == "distill" and config.prediction_type is not None:
        own = base_of(dataclasses.replace(config, prediction_type=None)).schedule.prediction_type
        if own != objective.prediction_type:
            raise UserError(f"prediction_type is {config.prediction_type} with objective distill", rule=f"the base predicts {own}, and its predictions are targets",
                            remedy="leave prediction_type out, or set objective to ambient or plain")  # fmt: skip
    start = None
    if config.lora:
        network = base.skeleton()[base.family.network]
        usual = base.family.usual_targets(network)
        if config.lora_weights is not None:
            start = adapters.read_start(config.lora_weights, base, text=config.train_text_encoder)
            config = adapters.settle(config, start, network, usual)
        else:
            config.lora_target_modules = config.lora_target_modules or usual
            adapters.check_targets(network, config.lora_target_modules, config.lora_init, config.rank or 4)
    prompts, new = collect_prompts(config.validation_prompts), collect_prompts(config.probe_prompts)
    checkpoint = _check_output(config)
    images = open_images(config)
    check_asks(config, images, fixed=objective.uses_noise)
    caption_augmentation.check(config, images)
    if strange := missing_from(images.all_captions, config.distill_without or ()):
        raise UserError(f"distill_without has {one_line(strange[0], 80)}", rule="it names words of the captions, and no caption has this one",
                        remedy="correct it, or leave it out")  # fmt: skip
    grouped = config.near_duplicates == "share" and objective.level > 0
    if (found := prior.find(config, base, images)) is None:
        images.check(progress, near_duplicates=grouped)
    else:
        if config.fused_backward_pass:
            raise UserError("fused_backward_pass is given with class images", rule="they have a pass of their own",
                            remedy="leave the flag or the images out")  # fmt: skip
        prior.check_together(images, found.images, near_duplicates=grouped, progress=progress)
    buckets = None
    if config.aspect_ratio_buckets is not None:
        sizes = read_buckets(config.aspect_ratio_buckets, config.resolution, base.pixel_step)
        buckets = assign(images.sizes, images.noise_keys, sizes)
    notes = _notes(config, base, images, prompts, buckets)
    if config.keep == "best":
        new = new or compose(images.captions, (config.probe_images or 32) // 2, config.seed)
        if trained := set(new) & set(images.all_captions):
            raise UserError(f"probe_prompts has {one_line(min(trained), 80)}", rule="quality is measured on captions that are not trained",
                            remedy="leave it out")  # fmt: skip
        if len(new) < 2:
            notes += (
                "quality is not measured on the way: the captions give no new ones; name some with --probe_prompts",
            )
    return Plan(
        config, base, objective, images, prompts, checkpoint, buckets, notes, tuple(new), start=start, prior=found
    )


def check_family(config: TrainConfig, family: Family, network: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse settings that a family's models know nothing of.

    Args:
        config: the settings.
        family: of the base.
        network: config.json of its network.

    Raises:
        UserError: names the setting and the reason.

    Example:
        >>> from ambient_sd.families import SD
        >>> check_family(TrainConfig("base-model", train_data_dir="my-images", flow_shift=3.0), SD)
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: flow_shift is given for Stable Diffusion 1.x or 2.x; it belongs to flow matching; leave it out
    """
    flow = "it belongs to flow matching"
    for given, name, rule in (
        (not family.flow and config.flow_shift, "flow_shift", flow),
        (not family.flow and config.precondition_outputs, "precondition_outputs", flow),
        (not family.flow and config.weighting_scheme in FLOW_SCHEMES, f"weighting_scheme {config.weighting_scheme}", flow),
        (family.flow and config.train_text_encoder, "train_text_encoder", "text encoders of U-Nets alone are trained here"),
        (family.flow and config.lora_min_rank, "lora_min_rank", "its mask by noise level reads the timestep inside a U-Net"),
        (family.flow and config.enable_xformers_memory_efficient_attention, "enable_xformers_memory_efficient_attention",
         "xformers knows no joint attention of text and image; PyTorch's own is as good"),
        (family.flow and config.output_kohya_format, "output_kohya_format", "the plain file is what ComfyUI and others read of transformers"),
        (config.max_sequence_length is not None and family.text_length is None, "max_sequence_length",
         "its text encoders read a fixed number of tokens"),
        (config.guidance_scale is not None and not family.guidance_embeds(network), "guidance_scale",
         "its network takes no guidance scale as an input; that of sampling is chosen when images are sampled"),
    ):  # fmt: skip
        if given:
            raise UserError(f"{name} is given for {family.name}", rule=rule, remedy="leave it out")
    if config.max_sequence_length is not None and family.text_most is not None and config.max_sequence_length > family.text_most:  # fmt: skip
        raise UserError(f"max_sequence_length is {config.max_sequence_length}", rule=f"the pipeline of {family.name} gives its text encoder at most {family.text_most}",
                        remedy="lower it")  # fmt: skip


def _check_packages(config: TrainConfig) -> None:
    """Check that what optional settings need is installed."""
    if config.compile and "ACCELERATE_DYNAMO_BACKEND" not in os.environ:
        needs = "triton" if torch.cuda.is_available() else "a C++ compiler"
        if not (
            importlib.util.find_spec("triton")
            if torch.cuda.is_available()
            else shutil.which(os.environ.get("CXX", "c++"))
        ):
            raise UserError("compile is given", rule=f"torch's compiler needs {needs}", remedy="install it, or leave compile out")  # fmt: skip
    for given, flag, package in (
        (config.use_8bit_adam, "use_8bit_adam", "bitsandbytes"),
        (config.quantize_base, "quantize_base", "bitsandbytes"),
        (config.enable_xformers_memory_efficient_attention, "enable_xformers_memory_efficient_attention", "xformers"),
        (config.report_to == "wandb", "report_to wandb", "wandb"),
    ):
        if given and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} is given", rule=f"the package {package} is not installed",
                            remedy=f"pip install {package}, or leave it out")  # fmt: skip


def make_objective(config: TrainConfig, base: Base) -> AmbientObjective:
    """Build the objective on the base's schedule.

    Raises:
        UserError: level, timestep or gap lies beyond the schedule.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> config = TrainConfig(str(BASE), train_data_dir="my-images", resolution=64, ambient_level=0.5)
        >>> make_objective(config, base_of(config)).level
        0.5
    """
    options: dict[str, Any] = {"mode": config.objective}
    if config.objective != "plain":
        level = auto_level.PROVISIONAL if config.ambient_level == AUTO else config.ambient_level
        if level is None and config.ambient_timestep is None:
            level = config.distill_level
        options.update(
            level=level,
            timestep=config.ambient_timestep,
            gap_upper=config.gap_upper,
            distill_level=config.distill_level,
        )
    if config.objective in ("ambient", "weighted") or config.reweight is not None:
        options.update(reweight=config.reweight)
    try:
        return AmbientObjective(base.schedule, **options)
    except UserError as error:
        given = ", ".join(
            f"{name} is {value}"
            for name in ("ambient_level", "ambient_timestep", "gap_upper", "distill_level")
            if (value := getattr(config, name)) is not None
        )
        raise UserError(given or "the base's schedule cannot be trained", rule=str(error)) from None


def _check_output(config: TrainConfig) -> Path | None:
    """Check that the output folder can be written to and may be, and return the checkpoint to continue from."""
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
    for name in ("pretrained_model_name_or_path", "train_data_dir", "dataset_name", "lora_weights", "class_data_dir"):
        given = getattr(config, name)
        if given is not None and folder.exists() and folder.resolve() == Path(given).expanduser().resolve():
            raise UserError(f"output_dir is {config.output_dir}", rule=f"that is {name} too, and would be overwritten",
                            remedy="name another one")  # fmt: skip
    images = Path(config.train_data_dir).expanduser() if config.train_data_dir else None
    if images is not None and os.path.isdir(images) and images.resolve() in folder.resolve().parents:
        raise UserError(f"output_dir is {config.output_dir}", rule="it lies in the folder of images, and a later run would take its pictures for some of them",
                        remedy="give --output_dir a folder outside")  # fmt: skip
    if not processes.is_first():
        return None  # one process looks and decides
    if config.resume_from_checkpoint is not None:
        return checkpoints.find(folder, config.resume_from_checkpoint)
    results.check_overwrite(folder, allowed=config.overwrite)
    return None


def open_images(config: TrainConfig) -> ImageDataset:
    """Open the training images that the settings name; nothing is decoded yet.

    Raises:
        UserError: as `load_rows`.

    Example:
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> len(open_images(TrainConfig(str(BASE), train_data_dir=str(IMAGES), max_train_samples=3)))
        3
    """
    return load_rows(
        config.source,
        max_samples=config.max_train_samples,
        seed=config.seed,
        config_name=config.dataset_config_name,
        cache_dir=config.cache_dir,
        local=config.train_data_dir is not None,
        several_captions=config.caption_mitigation == "mc",
        **reading(config),
    )


def check_asks(config: TrainConfig, images: ImageDataset, *, fixed: bool) -> None:
    """Refuse a source that asks for what the run does not do: settings of another trainer's file.

    Args:
        config: the run's settings.
        images: of its source.
        fixed: each image keeps one noise: what changes it anew at each epoch then gives it away.

    Raises:
        UserError: names all that is asked for, with the flags that do it.

    Example:
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> config = TrainConfig(str(BASE), train_data_dir=str(IMAGES), max_train_samples=3)
        >>> check_asks(config, open_images(config), fixed=True)  # asks for nothing
    """
    leaking = [ask for ask in images.asks if ask.fresh and fixed]
    if leaking:
        raise UserError(f"{images.source} asks for {', '.join(ask.text for ask in leaking)}",
                        rule="an image that is changed anew at each epoch gives itself away under ambient, where it has one noise",
                        remedy="; ".join(dict.fromkeys(ask.remedy for ask in leaking)))  # fmt: skip
    unmet = [ask for ask in images.asks if not _does(config, ask)]
    if unmet:
        told = [f"{ask.text} ({_flag(ask)})" for ask in unmet]
        raise UserError(f"{images.source} asks for {', '.join(told)}", rule="what changes a training is not left out in silence",
                        remedy="give these flags, or take the settings out of the file")  # fmt: skip


def _does(config: TrainConfig, ask: Ask) -> bool:
    given = getattr(config, ask.setting) if ask.setting else None
    return bool(ask.setting) and (given in ask.values or (ask.values == ("auto",) and given is not None))


def _flag(ask: Ask) -> str:
    """Return the flag that does what is asked for."""
    if not ask.setting:
        return ask.remedy or "not done here"
    wanted = ask.values[0]
    return (
        f"without --{ask.setting}" if wanted is False else f"--{ask.setting}" + ("" if wanted is True else f" {wanted}")
    )


def _notes(
    config: TrainConfig,
    base: Base,
    images: ImageDataset,
    prompts: Sequence[str],
    buckets: Mapping[str, tuple[int, int]] | None,
) -> tuple[str, ...]:
    """Return what a run would otherwise do in silence: enlarge images, leave files out, cut captions."""
    notes = [enlargement_note(config, images, base.pixel_step, buckets)]
    notes += images.notes
    if images.heldout is not None:
        notes.append(f"{len(images.heldout)} images are set apart for validation, and not trained on")
    if images.unlisted:
        notes.append(f"{images.unlisted} files in {images.source} are left out (unlisted is ignore)")
    if images.animated:
        notes.append(
            f"{len(images.animated)} images have several frames; only the first frame of each is used: {images.animated[0]}"
        )
    tokenizers = base.tokenizers()
    read = families.reading(base.family, tokenizers)
    names = [images.names[i] for i in range(len(images)) for _ in images.captions_of(i)]
    for texts, what, named in ((images.all_captions, "captions", names), (prompts, "validation prompts", prompts)):
        if cuts := find_cut(texts, *read):
            notes.append(in_one_line(cuts, len(texts), what, named[cuts[0].index]))
    if config.objective == "distill" and config.distill_without is None:
        notes.append(_made_up(images.all_captions, next(iter(tokenizers.values()))))
    if config.objective == "distill" and config.lora_weights is not None:
        notes.append("objective is distill, and an adapter goes on: above the noise level the target is the base without it, so what it composes is unlearnt there; "
                     "--objective ambient or plain keeps it")  # fmt: skip
    return tuple(one_line(note) for note in notes if note)


def _made_up(captions: Sequence[str], tokenizer: Any) -> str | None:
    """Return what to do about a trigger word under distillation, or None where no caption has one."""
    words = " ".join(perhaps_unknown(captions, tokenizer)[:_NAMED])
    return words and (
        f"nearly every caption says {words}: if that is a made-up word, what the base draws of it is a target now; "
        f"--distill_without {words} asks the base without it"
    )


def enlargement_note(
    config: TrainConfig, images: ImageDataset, step: int, buckets: Mapping[str, tuple[int, int]] | None = None
) -> str | None:
    """Return a warning where checked images are enlarged to the resolution, or None.

    Raises:
        UserError: most of them are enlarged so far that the resolution cannot be meant.

    Example:
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> config = TrainConfig(str(BASE), train_data_dir=str(IMAGES), max_train_samples=3, resolution=64)
        >>> enlargement_note(config, open_images(config).check(), step=8) is None  # they have 64 pixels
        True
    """
    square = (config.resolution, config.resolution)
    targets = [square if buckets is None else buckets[key] for key in images.noise_keys]
    return check_enlargement(
        images.sizes, targets, resolution=config.resolution, step=step, given=config.resolution_given,
        allowed=config.allow_upscaling,
    )  # fmt: skip


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Start accelerate as it was launched, and check that the run can do with it.

    Raises:
        UserError: a precision that the device lacks, or a distribution that this trainer was never run under.

    Example:
        >>> from accelerate.state import AcceleratorState
        >>> accelerator = make_accelerator(TrainConfig("base-model", train_data_dir="my-images", report_to="none"))
        >>> accelerator.num_processes
        1
        >>> AcceleratorState._reset_state(reset_partial_state=True)  # another run may want another precision
    """
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
            # Gradients lie in the buckets that processes sum, and are not copied. torch rebuilds these after the first step, and then sums each
            # weight of three and more processes in another order than after a resume; not where it searches for unused weights.
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=processes.LIMIT),
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, find_unused_parameters=config.deterministic
                ),
            ],
            # Where accelerate was launched with another compiler, that one is asked for.
            dynamo_backend="inductor" if config.compile and "ACCELERATE_DYNAMO_BACKEND" not in env else None,
        )
    except ValueError as error:
        raise UserError(
            f"mixed_precision is {config.mixed_precision}", rule=str(error), remedy="use no, or another precision"
        ) from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate takes it, and then neither casts nor scales.
        raise UserError("mixed_precision is fp16", rule="CPUs have no fp16 training", remedy="use no, or bf16")
    sharding.enable(accelerator)
    optimizers.check(config, accelerator)
    if config.use_ema:
        averaging.check_distribution(accelerator.distributed_type)
    if accelerator.distributed_type not in _SUPPORTED:
        raise UserError(
            f"accelerate is set to {accelerator.distributed_type.value}",
            rule="this trainer runs on one or more processes that each hold the whole model, or their part of it by FSDP2",
            remedy="choose no distribution, multi-GPU or FSDP with fsdp_version 2 in `accelerate config`",
        )
    return accelerator
