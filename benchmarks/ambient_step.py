"""How much a training step costs with the ambient loss, beside the plain step: a ratio of the two, taken in one run.

The real trainer trains the embedded base on the embedded images, plain and ambient in turns, on whatever machine this is:

    python benchmarks/ambient_step.py --rounds 5 --steps 12

A turn's first steps (warm-up of caches and allocator) are dropped. A round gives one ratio of medians, so that a machine
that slows down for a minute slows both; the printed figure is the median over rounds with its smallest and largest. Seconds
of the clock, and seconds of processor time over all threads: on a machine that others use too, the second is the steadier.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from ambient_sd.commands.demo.work import TRAINING
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils.quiet import quiet

WARM_UP = 3


def step_seconds(objective: str, steps: int, batch: int) -> tuple[float, float]:
    """Return the median seconds of one optimizer step of a short training: by the clock, and of processor time."""
    stamps: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {**TRAINING, "objective": objective, "max_train_steps": steps + WARM_UP, "train_batch_size": batch,
                    "use_ema": False, "output_dir": folder}  # fmt: skip
        run(
            TrainConfig(**settings),
            progress=False,
            on_step=lambda step, record: stamps.append((time.perf_counter(), time.process_time())),
        )
    pairs = list(zip(stamps[WARM_UP:], stamps[WARM_UP + 1 :], strict=False))
    return statistics.median(b[0] - a[0] for a, b in pairs), statistics.median(b[1] - a[1] for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of turns (default 5)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a turn (default 12)")
    parser.add_argument("--batch", type=int, default=16, help="images per step (default 16)")
    args = parser.parse_args()
    quiet()
    ratios: dict[str, list[float]] = {"clock": [], "processor time": []}
    for number in range(args.rounds):
        order = ("plain", "ambient") if number % 2 == 0 else ("ambient", "plain")
        seconds = {objective: step_seconds(objective, args.steps, args.batch) for objective in order}
        for place, kind in enumerate(ratios):
            plain, ambient = seconds["plain"][place], seconds["ambient"][place]
            ratios[kind].append(ambient / plain)
            print(
                f"round {number + 1}, {kind}: plain {plain:.3f} s, ambient {ambient:.3f} s, ratio {ambient / plain:.3f}",
                flush=True,
            )
    for kind, values in ratios.items():
        print(f"ambient / plain by {kind} = {statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}], "
              f"n = {args.rounds}, batch {args.batch}, {torch.get_num_threads()} threads")  # fmt: skip


if __name__ == "__main__":
    main()
