"""What a run tells: the means of each step, the lines at its start and end, its record for callers, and losses.jsonl.

    {"step": 1, "loss": 0.5, "clean_loss": null, "ambient_loss": 0.5, "lr": 1e-05}        null: no sample of that kind

losses.jsonl has one line per optimizer step, the same bytes whether the run was killed on the way or not: every checkpoint
holds the lines up to its step, and a resumed run begins with those. The file in the run's own folder may have been cut, or
have gone further than the checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ambient_sd.training.config import AUTO, LORA_KINDS
from ambient_sd.training.keeping import Kept
from ambient_sd.training.plan import Plan
from ambient_sd.utils import files
from ambient_sd.utils.errors import UserError

# Noise levels s = sigma / alpha whose errors get a curve each: the loss of one step says more of its timesteps than of the model.
_BANDS = ((0.0, 0.3), (0.3, 1.0), (1.0, 3.0), (3.0, math.inf))
LOSSES_NAME, CURVE_NAME = "losses.jsonl", "probe/curve.png"


@dataclass(frozen=True)
class RunRecord:
    """Hold what a finished training was and came to; enough for its card.

    Attributes:
        plan: settings, base, objective with its final level, images, notes.
        output: the run's folder.
        steps, first_step: optimizer steps in all, and how many of them were done before a resume.
        seconds: of the steps since then, with checkpoints, validation images and probe.
        losses: of every step, those before a resume too.
        means: loss, clean_loss and ambient_loss over the last 100 steps, NaN where no sample was of that kind; with a rule that
            drops samples also its share.
        evaluations: one record for each evaluation of the probe.
        kept: with `--keep best`, which evaluation the result is of and why.
        learning_rate: the peak rate.
        global_batch: samples per optimizer step.
        processes: how many trained together.
        fingerprint: SHA-256 over images and captions.

    Example:
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> from ambient_sd.training.config import TrainConfig
        >>> from ambient_sd.training.plan import plan_run
        >>> plan = plan_run(TrainConfig(str(BASE), train_data_dir=str(IMAGES), max_train_samples=3, resolution=64))
        >>> means = {"loss": 0.5, "clean_loss": math.nan, "ambient_loss": 0.5}
        >>> record = RunRecord(plan, Path("results"), 100, 0, 50.0, [0.5] * 100, means, [], 1e-5, 4, 1, plan.images.fingerprint())
        >>> print(record.describe())
        100 steps in 50 s, 8 samples a second, 3 images
        loss 0.5000, mean of the last steps
        results in results
    """

    plan: Plan
    output: Path
    steps: int
    first_step: int
    seconds: float
    losses: list[float]
    means: dict[str, float]
    evaluations: list[dict[str, float]]
    learning_rate: float
    global_batch: int
    processes: int
    fingerprint: str
    kept: Kept | None = None

    @property
    def loss(self) -> float:
        """Return the mean loss of the last 100 steps."""
        return self.means["loss"]

    @property
    def level(self) -> float:
        """Return the noise level s_n of the objective, measured or given."""
        return self.plan.objective.level

    def describe(self) -> str:
        """Return the run in a few lines: work done, losses of the last steps, copies at the last evaluation, where it is."""
        images, rate = self.plan.images, self.global_batch * (self.steps - self.first_step) / max(self.seconds, 1e-9)
        done = f"{self.steps} steps" + (f" ({self.first_step} done before)" if self.first_step else "")
        done += f" in {self.seconds:.0f} s, {rate:.3g} samples a second, {len(images)} images"
        if images.groups:
            done += f", {len(images.groups)} groups of near-duplicates among them"
        kinds = {name: self.means[f"{name}_loss"] for name in ("clean", "ambient")}
        if self.plan.objective.distill_level is not None:
            above = "ambient and above" if self.plan.objective.uses_noise else "above the level"
            kinds = {"images": kinds["clean"], above: kinds["ambient"]}
        parts = [f"{name} {loss:.4f}" for name, loss in kinds.items() if math.isfinite(loss)]
        split = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        lines = [done, f"loss {self.loss:.4f}{split}, mean of the last steps"]
        if math.isfinite(known := self.means.get("prior_loss", math.nan)):
            lines.append(f"loss of the class images {known:.4f}")
        if self.plan.level_reason:
            lines.append(f"noise level s_n = {self.level:g}, {self.plan.level_reason}")
        if self.evaluations:
            last = self.evaluations[-1]
            lines.append(f"last evaluation, step {last['step']}: {last['copies']:.0%} of {last['n']:.0f} images are copies "
                         f"[{last['copies_low']:.0%}, {last['copies_high']:.0%}]")  # fmt: skip
        if self.kept is not None:
            lines.append(self.kept.describe())
        return "\n".join([*lines, f"results in {self.output}"])


def describe_start(
    plan: Plan,
    *,
    steps: int,
    first_step: int,
    global_batch: int,
    processes: int,
    trained: int,
    device: str,
    precision: str,
) -> str:
    """Return what is about to be trained, as aligned lines.

    Args:
        plan: the run.
        steps: optimizer steps in all; first_step: of them done before.
        global_batch: samples per step; processes: how many train together.
        trained: number of weights that are trained.
        device: of this process; precision: of the forward and backward passes.

    Example:
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> from ambient_sd.training.config import TrainConfig
        >>> from ambient_sd.training.plan import plan_run
        >>> plan = plan_run(TrainConfig(str(BASE), train_data_dir=str(IMAGES), max_train_samples=3, resolution=64))
        >>> text = describe_start(plan, steps=100, first_step=0, global_batch=4, processes=1, trained=1234, device="cpu", precision="no")
        >>> print(text.splitlines()[2])
        steps      100, about 133 epochs
    """
    config, objective, images = plan.config, plan.objective, plan.images
    known = "measured at the start" if config.ambient_level == AUTO else f"s_n = {objective.level:g}"
    level = f", noise level {known}" if objective.mode != "plain" else ""
    if objective.distill_level is not None:
        level = f", the base above noise level {objective.distill_level:g}"
        level += f", ambient from s_n = {objective.level:g} to it" * objective.uses_noise
    if plan.level_reason:
        level += f" ({plan.level_reason})"
    kind = (
        f"{LORA_KINDS[config.lora_kind or 'lora']} of rank {f'{config.lora_min_rank} to ' if config.lora_min_rank else ''}{config.rank}"
        + (" with text encoders" * config.train_text_encoder)
        if config.lora
        else "whole U-Net"
    )
    grouped = f", {len(images.groups)} groups of near-duplicates" if images.groups else ""
    rows = {
        "images": f"{len(images)} at {config.resolution} px{grouped}",
        **({} if plan.prior is None else {"class": plan.prior.describe(config.prior_loss_weight)}),
        "objective": f"{config.objective}{level}, {objective.prediction_type}",
        "steps": f"{steps}, about {steps * global_batch / sum(images.repeats):.3g} epochs"
        + (f"; resuming after step {first_step}" if first_step else ""),
        "batch": f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulated x {processes} "
        f"process{'es' if processes > 1 else ''} = {global_batch} samples a step",
        "trained": f"{kind}, {trained:,} parameters",
        "device": f"{device}, {'float32' if precision == 'no' else precision}"
        + ", deterministic kernels" * config.deterministic,
        "output": config.output_dir,
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


class StepSums:
    """Sum up one step: losses of all samples, of clean and of ambient ones, and errors by band of noise levels.

    Args:
        device: of the samples.

    Example:
        >>> step, clean = StepSums(torch.device("cpu")), torch.tensor([True, False])
        >>> step.add(torch.tensor([0.5, 0.3]), torch.tensor([0.5, 0.3]), clean=clean, level=torch.tensor([0.2, 2.0]))
        >>> [round(v, 3) for v in step.sums[:6].tolist()]  # sum and count: all, clean, ambient
        [0.8, 2.0, 0.5, 1.0, 0.3, 1.0]
    """

    def __init__(self, device: torch.device) -> None:
        # Not every accelerator has float64.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.sums = torch.zeros(6 + 2 * len(_BANDS), dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, loss: torch.Tensor, error: torch.Tensor, *, clean: torch.Tensor, level: torch.Tensor) -> None:
        """Take in the samples of one forward pass.

        Args:
            loss: (B,) weighted errors, 0 where a sample is dropped.
            error: (B,) unweighted errors.
            clean: (B,) bool: the sample's input was made from the clean image.
            level: (B,) noise levels s_t of the inputs.
        """
        kinds = [torch.ones_like(clean), clean, ~clean]
        inside = [(level >= low) & (level < high) for low, high in _BANDS]
        pairs = [(loss, k) for k in kinds] + [(error, k) for k in inside]
        self.sums += torch.stack([s for value, k in pairs for s in ((value * k).sum(), k.sum())]).to(self.sums.dtype)

    def means(
        self, accelerator: Accelerator, *, rate: float, kept: torch.Tensor | None, dropped: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return the step's record and the mean error of each band, over all processes; to be called by each of them.

        Args:
            accelerator: who is here.
            rate: learning rate of the step.
            kept: what the loss is divided by in place of the number of samples, over all processes already, or None.
            dropped: samples that each rule dropped on this process.
        """
        mine = torch.cat([self.sums, *(count.reshape(1).to(self.sums) for count in dropped.values())])
        summed = accelerator.reduce(mine, "sum")
        if kept is not None:  # the one wait of the step brings it along
            summed = torch.cat([summed, kept.reshape(1).to(summed)])
        total, n, clean_total, clean_n, ambient_total, ambient_n, *rest = summed.tolist()
        over = n if kept is None else rest.pop()
        record = {
            "loss": total / over,
            "clean_loss": clean_total / clean_n if clean_n else math.nan,
            "ambient_loss": ambient_total / ambient_n if ambient_n else math.nan,
            "lr": rate,
            **{name: count / n for name, count in zip(dropped, rest[2 * len(_BANDS) :], strict=True)},
        }
        bands = {
            f"error/s {low:g} to {high:g}": rest[2 * i] / rest[2 * i + 1] if rest[2 * i + 1] else math.nan
            for i, (low, high) in enumerate(_BANDS)
        }
        return record, bands


class LossLog:
    """Hold the records of all steps of a run.

    Args:
        checkpoint: folder of a checkpoint to continue from, or None.

    Attributes:
        records: one per step: step and what `add` was given.

    Raises:
        UserError: the checkpoint's losses cannot be read.

    Example:
        >>> log = LossLog(None)
        >>> log.add(1, {"loss": 0.5})
        >>> log.add(2, {"loss": 0.3})
        >>> log.late_mean("loss", steps=100)
        0.4
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.records: list[dict[str, float]] = []
        self._path: Path | None = None
        if checkpoint is not None:
            path = checkpoint / LOSSES_NAME
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                self.records = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300],
                                remedy="resume from another checkpoint") from None  # fmt: skip

    def open(self, folder: Path) -> None:
        """Write `folder/losses.jsonl` with the records so far; later ones are added to it."""
        self._path = folder / LOSSES_NAME
        files.atomic_write(self._path, self._text(), synced=True)

    def add(self, step: int, record: Mapping[str, float]) -> None:
        """Take in the record of a step."""
        self.records.append({"step": step, **record})
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(self.records[-1]))

    def save(self, checkpoint: Path) -> None:
        """Write the records so far into a checkpoint's folder."""
        (checkpoint / LOSSES_NAME).write_text(self._text(), encoding="utf-8")

    def late_mean(self, name: str, steps: int) -> float:
        """Return the mean of one quantity over the last `steps` steps that have it; NaN if none has."""
        values = [r[name] for r in self.records[-steps:] if math.isfinite(r[name])]
        return sum(values) / len(values) if values else math.nan

    def _text(self) -> str:
        return "".join(map(_line, self.records))


def _line(record: Mapping[str, float]) -> str:
    # JSON has no NaN.
    return json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n"
