"""Settings that nobody gave, proposed from the images, the base and the device: what `ambient-sd train FOLDER` starts with.

    samples = clip(100 n, 4000, 40000)          n: images; steps = samples / batch: 100 epochs of a small set, fewer of a large one

The length is an upper bound: `--keep best` ends the run where copying begins. Rates and ranks are those of the presets; a network of less
than a tenth of Stable Diffusion's size takes a higher rate. Each proposal says why.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ambient_sd.data.noise_level import FEWEST
from ambient_sd.training.config import AUTO, DISTILL_LEVEL, RANK

SAMPLES_PER_IMAGE, FEWEST_SAMPLES, MOST_SAMPLES = 100, 4_000, 40_000
EVALUATIONS = 6
_SMALL = 100e6  # parameters; Stable Diffusion has 866 million
USABLE = 0.85  # of a GPU's memory: the rest is for its driver, workspaces and gaps
_SIDES = 64  # pixels that a proposed resolution is a multiple of, where the base has more


@dataclass(frozen=True)
class Proposal:
    """Hold one setting with its reason.

    Example:
        >>> print(Proposal("rank", 16, "as in the presets"))
        rank 16: as in the presets
    """

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.value}: {self.reason}"


def propose(
    given: Collection[str],
    *,
    sizes: Sequence[tuple[int, int]],
    count: int,
    distinct: int,
    native: int,
    step: int,
    parameters: int,
    device: torch.device,
    processes: int = 1,
    spread: bool = False,
    objective: str = "distill",
    lora: bool | None = None,
    batch: int | None = None,
    steps: int | None = None,
    keep: str = "best",
    memory: Callable[[Mapping[str, Any]], int] | None = None,
    room: int = 0,
) -> list[Proposal]:
    """Propose every setting of a training that is not among the given ones.

    Args:
        given: names of settings that the user chose.
        sizes: (width, height) of the images, or of some of them, pixels.
        count: number of images; distinct: without copies of each other.
        native: side that the base was trained at, pixels; step: what sides must be multiples of.
        parameters: of the base's network.
        device: that trains.
        processes: how many train together; spread: each holds its part of the network.
        objective: the given one or the one that is to be proposed. lora, batch, steps, keep: of those that are given.
        memory: of a GPU, predicts the bytes that settings take at the highest. room: bytes that the GPU has.

    Example:
        >>> found = propose([], sizes=[(800, 600)] * 20, count=20, distinct=20, native=512, step=8, parameters=866_000_000, device=torch.device("cpu"))
        >>> {one.name: one.value for one in found}["resolution"]
        512
        >>> print(next(one for one in found if one.name == "max_train_steps"))
        max_train_steps 1000: 4000 samples, 200 passes over 20 images, at most: the run ends where copying begins
    """
    found: list[Proposal] = []

    def add(name: str, value: Any, reason: str) -> Any:
        if name not in given:
            found.append(Proposal(name, value, reason))
        return value

    lora = add("lora", True, "a small file, and less memory") if lora is None else lora
    if lora and "lora_weights" not in given:
        add("rank", RANK, "as in the presets")
    resolution = _resolution(sizes, native, step)
    add("resolution", resolution, f"the base's {native}" if resolution == native else f"half of the images have a shorter side of at most {_median(sizes)} px")  # fmt: skip
    if _mixed(sizes) and "center_crop" not in given:
        add("aspect_ratio_buckets", AUTO, "many images are not square, and cropping would cut them")
    if batch is None:
        batch = min(add("train_batch_size", min(16 if resolution <= 2 * native and native <= 128 else 4, max(1, count)), "fits"), max(1, count))  # fmt: skip
    # Only where it is looked for, as below.
    ends = ", at most: the run ends where copying begins" if distinct > 1 and keep == "best" else ""
    samples = min(max(SAMPLES_PER_IMAGE * count, FEWEST_SAMPLES), MOST_SAMPLES)
    if steps is None:
        steps = max(1, round(samples / (batch * processes)))
        if not {"max_train_steps", "num_train_epochs"} & set(given):
            add("max_train_steps", steps, f"{samples} samples, {samples / count:.3g} passes over {count} images{ends}")  # fmt: skip
    add("learning_rate", 1e-3 if parameters < _SMALL else 1e-4, "a small network" if parameters < _SMALL else "as in the presets")  # fmt: skip
    if "train_text_encoder" not in given and not spread:  # the average is of the network alone, and of a whole one
        add("use_ema", True, "averaged weights are steadier")
    if objective == "distill":
        add(
            "objective",
            objective,
            "fewer images come back: where composition is decided the base itself is the target (plain: all is learnt)",
        )
        if not {"distill_level", "ambient_level", "ambient_timestep"} & set(given):
            add(
                "distill_level",
                DISTILL_LEVEL,
                "the noise level where that begins; a higher one learns more of the style, and of the images",
            )
    elif objective == "ambient":
        add("objective", objective, "a setting of its own is given")
        if not {"ambient_level", "ambient_timestep"} & set(given):
            known = distinct >= FEWEST
            add("ambient_level", AUTO if known else 1.0, "measured on the images" if known else f"fewer than {FEWEST} different images cannot be measured")  # fmt: skip
    if device.type == "cuda":
        add(
            "mixed_precision",
            "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16",
            "the GPU has it",
        )
        if "gradient_checkpointing" not in given and memory is not None:
            needed = memory({one.name: one.value for one in found})
            fits = needed <= USABLE * room
            add("gradient_checkpointing", not fits, f"without it the run takes {needed / 2**30:.1f} GiB, predicted, of {room / 2**30:.0f}")  # fmt: skip
            half = {"gradient_checkpointing_fraction": 0.5}
            if not fits and not (half.keys() | {"compile"}) & set(given) and (needed := memory({one.name: one.value for one in found} | half)) <= USABLE * room:  # fmt: skip
                add(*half.popitem(), f"half of the blocks is enough: {needed / 2**30:.1f} GiB, predicted")
    if distinct > 1:
        add("probe_steps", -(-steps // EVALUATIONS), f"{EVALUATIONS} evaluations, the last one at the end")
        add("probe_images", min(32, count), "captions that are probed")
        add("keep", "best", "the result is the last evaluation before copying begins")
        add("checkpoints_total_limit", 1, "the newest, and the one that is kept")
    return found


def _median(sizes: Sequence[tuple[int, int]]) -> int:
    return int(statistics.median(min(size) for size in sizes))


def _resolution(sizes: Sequence[tuple[int, int]], native: int, step: int) -> int:
    """Return the base's own side, or of smaller images the nearest one below theirs; a little enlargement costs less than a foreign size."""
    side = _median(sizes)
    if side >= native / 1.3:
        return native
    unit = _SIDES if native > 2 * _SIDES and side >= _SIDES else step
    return max(step, side // unit * unit)


def _mixed(sizes: Sequence[tuple[int, int]]) -> bool:
    return sum(max(w, h) > 1.15 * min(w, h) for w, h in sizes) > len(sizes) / 10
