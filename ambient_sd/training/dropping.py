"""Samples that give no loss because the model seems to know them: two published rules, each a weight of zero.

    threshold   drop b if || eps_theta(x_t, t, c_b) - eps_theta(x_t, t, "") ||_2 >= tau
                Wen, Liu, Chen, Lyu, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024),
                mitigation in training. tau is in units of noise, of flow matching of the velocity (`guard.scores`), and belongs to one
                model and resolution
    AGC         drop b if l_b < factor * m[t_b];  then m[t] <- 0.8 m[t] + 0.2 l for every sample, dropped or not, m = 0 at first
                Liu, Guan, Wu, Miao, "Iterative Ensemble Training with Anti-Gradient Control for Mitigating Memorization in
                Diffusion Models" (ECCV 2024, IET-AGC), with factor 1/1.25 = 0.8 in their Stable Diffusion release and 1/2 in
                that for CIFAR; l is the unweighted error of a sample

Both papers' texts were out of reach: the rules are those of the authors' releases (AGC: a mean of 0.8 for each timestep, means that
start at zero, so that nothing is dropped at a timestep until it was met, and little at the first few visits). Where ours differs:

- A dropped sample has weight zero and by default still counts in the mean over the batch. Both releases divide by the number of those
  kept, each process for each of its passes by its own: `dropped_mean="kept"` divides by the samples kept in the whole step, on all
  processes and in all passes, which is theirs on one process in one pass, and depends on no cut into processes. The step is always
  taken, where Wen's release skips a pass that keeps none: ranks must agree on it, and AdamW's decay and momentum act in a step without
  any loss too.
- The means of AGC are those before the optimizer step, over all its forward passes and processes, and then take in its
  samples in the order of the run. Processes and accumulation do not change the rule.
- The unconditional half is the empty caption (of SDXL whatever its pipeline samples with). A sample whose own caption was
  dropped has the score 0 and stays. So does every sample at a timestep with alpha_t = 0 (the last at zero terminal SNR): there
  the score is 0 for every caption.
- Flow matching has any timestep in [0, N]: AGC's means are of those between two whole ones, which are as many as their release has.
- The two ensembles of IET are not here.

The rules look at errors and scores, not at which loss follows: under `ambient` the weight a^q depends on the timestep
alone, so comparing errors at one timestep is comparing losses. But above s_n the error has a floor, the noise of the target,
which also a model that knows the image cannot fall below: AGC hardly acts there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ambient_sd.guard import scores
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.devices import send
from ambient_sd.utils.errors import UserError

MOMENTUM = 0.8
BANK_NAME = "agc.safetensors"


class LossBank:
    """Hold AGC's running mean error m[t] of each timestep, float64 on the CPU.

    Args:
        timesteps: number of timesteps of the schedule.
        factor: a sample whose error is below factor * m[t] is dropped, in (0, 1].
        checkpoint: folder to continue from, or None.

    Raises:
        UserError: the checkpoint's means cannot be read.

    Example:
        >>> bank = LossBank(timesteps=2, factor=0.5)
        >>> bank.take_in([1, 1], [1.0, 1.0])
        >>> [round(v, 2) for v in bank.limit(torch.tensor([0, 1])).tolist()]
        [0.0, 0.18]
    """

    def __init__(self, timesteps: int, factor: float, checkpoint: Path | None = None) -> None:
        self.factor = factor
        self.mean = torch.zeros(timesteps, dtype=torch.float64)
        if checkpoint is not None:
            path = checkpoint / BANK_NAME
            try:
                mean = load_file(path)["mean_error"]
                if mean.shape != self.mean.shape or mean.dtype != torch.float64:
                    raise ValueError(f"it holds {tuple(mean.shape)} {mean.dtype}")
            except Exception as error:  # OSError, SafetensorError, KeyError, ValueError
                raise UserError(f"{path} cannot be used", rule=f"{type(error).__name__}: {error}"[:300],
                                remedy="resume from another checkpoint") from None  # fmt: skip
            self.mean = mean

    def limit(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the error below which a sample is dropped, `factor m[t]`, (B,) float64, for (B,) timesteps on the CPU, whole or not."""
        return self.factor * self.mean[timesteps.long().clamp(max=len(self.mean) - 1)]

    def take_in(self, timesteps: Sequence[float], errors: Sequence[float]) -> None:
        """Move each timestep's mean by each sample's error, in order: `m[t] <- 0.8 m[t] + 0.2 l`."""
        for timestep, error in zip(timesteps, errors, strict=True):
            t = min(int(timestep), len(self.mean) - 1)
            self.mean[t] = MOMENTUM * self.mean[t] + (1.0 - MOMENTUM) * error


class Dropping:
    """Decide which samples of a step give no loss, and count them.

    Args:
        threshold: tau of Wen's rule, or None.
        agc: factor of AGC, or None.
        scheduler: the base's scheduler; it says what turns the network's output into noise.
        timesteps: number of its timesteps.
        checkpoint: folder to continue from, or None.

    Example:
        >>> rule = Dropping(None, 0.8, scheduler=None, timesteps=2, checkpoint=None)
        >>> rule.bank.take_in([1], [1.0])
        >>> outputs = torch.zeros(2, 4, 8, 8)  # of the network; AGC does not ask for them
        >>> rule.keep(torch.tensor([0.1, 0.5]), outputs, None, torch.tensor([1, 1])).tolist()
        [0.0, 1.0]
    """

    def __init__(
        self, threshold: float | None, agc: float | None, *, scheduler: Any, timesteps: int, checkpoint: Path | None
    ) -> None:
        self.threshold, self.scheduler = threshold, scheduler
        self.bank = None if agc is None else LossBank(timesteps, agc, checkpoint)
        self.names = [
            name for name, on in (("threshold_dropped", threshold is not None), ("agc_dropped", agc is not None)) if on
        ]
        self._counts: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        self._errors: list[torch.Tensor] = []
        self._timesteps: list[torch.Tensor] = []

    @torch.no_grad()
    def keep(
        self, error: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor | None, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return 1 for each sample that counts and 0 for each that is dropped.

        Args:
            error: (B,) unweighted error of each sample.
            cond: (B, C, h, w) the network's output.
            uncond: (B, C, h, w) its output for the empty caption; used with a threshold only.
            timesteps: (B,) long, of flow matching float32, on the CPU.

        Returns:
            (B,) of the dtype and on the device of `error`; nothing is waited for.
        """
        dropped = []
        if self.threshold is not None and uncond is not None:
            norm = scores.guidance_norm(cond=cond, uncond=uncond)
            if not NoiseSchedule.from_scheduler(self.scheduler).is_flow:  # there the norm is the velocity's
                norm = norm * send(scores.noise_factor(self.scheduler, timesteps).to(torch.float32), error.device)
            dropped.append(norm >= self.threshold)
        if self.bank is not None:
            dropped.append(error < send(self.bank.limit(timesteps).to(error.dtype), error.device))
            self._errors.append(error.detach())
            self._timesteps.append(timesteps)
        self._counts.append(torch.stack([d.sum() for d in dropped]))
        keep = (~torch.stack(dropped).any(0)).to(error.dtype)
        self._kept.append(keep.sum())
        return keep

    def kept(self) -> torch.Tensor:
        """Return how many samples of this process were kept since the last call, and forget them."""
        found = torch.stack(self._kept).sum()
        self._kept = []
        return found

    def counts(self) -> torch.Tensor:
        """Return how many samples of this process each rule of `names` has dropped since the last call, and forget them."""
        found = torch.stack(self._counts).sum(0)
        self._counts = []
        return found

    def end_step(self, gather: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """Let AGC's means take in the step's samples of all processes; to be called by each of them.

        Args:
            gather: returns the tensors of all processes, one below the other.
            device: where tensors may be gathered.
        """
        if self.bank is None:
            return
        # (passes, 2, B). Timesteps are exact in float32.
        mine = torch.stack([
            torch.stack([send(t.to(torch.float32), device), e.float()])
            for t, e in zip(self._timesteps, self._errors, strict=True)
        ])  # fmt: skip
        self._errors, self._timesteps = [], []
        every = gather(mine).cpu().reshape(-1, *mine.shape).double()
        # Pass by pass, process by process: the order of the samples in the run.
        in_order = every.permute(2, 1, 0, 3).reshape(2, -1)
        self.bank.take_in(in_order[0].tolist(), in_order[1].tolist())

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs into a checkpoint's folder."""
        if self.bank is not None:
            save_file({"mean_error": self.bank.mean}, folder / BANK_NAME)


def check_scheduler(scheduler: Any) -> None:
    """Check that the score of Wen's rule is defined for a base's scheduler.

    Raises:
        UserError: it is not.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> check_scheduler(tiny_pipeline().scheduler)
    """
    try:
        scores.StepFactor(scheduler)
    except UserError as error:
        raise UserError(
            "memorization_threshold is given", rule=str(error), remedy="leave it out for this base"
        ) from None
