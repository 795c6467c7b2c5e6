"""How much a training step costs with the ambient loss, beside the plain step: a ratio of the two, taken in one run.

The real trainer trains the embedded base on the embedded pictures, plain and ambient in turns, on whatever machine this is:

    python benchmarks/ambient_step.py --rounds 5 --steps 12

A turn's first steps (warm-up of caches and allocator) are dropped. A round gives one ratio of medians, so that a machine
that slows down for a minute slows both; the printed figure is the median over rounds with its smallest and largest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from ambient_sd.demo.run import TRAINING, quiet
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run

WARM_UP = 3


def step_seconds(objective: str, steps: int, batch: int) -> float:
    """Return the median seconds of one optimizer step of a short training."""
    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {**TRAINING, "objective": objective, "max_train_steps": steps + WARM_UP, "train_batch_size": batch,
                    "row_filter": ["subset_60=true"], "output_dir": folder}  # fmt: skip
        run(TrainConfig(**settings), progress=False, on_step=lambda step, record: stamps.append(time.perf_counter()))
    return statistics.median(b - a for a, b in zip(stamps[WARM_UP:], stamps[WARM_UP + 1 :], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of turns (default 5)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a turn (default 12)")
    parser.add_argument("--batch", type=int, default=16, help="pictures per step (default 16)")
    args = parser.parse_args()
    quiet()
    ratios = []
    for number in range(args.rounds):
        order = ("plain", "ambient") if number % 2 == 0 else ("ambient", "plain")
        seconds = {objective: step_seconds(objective, args.steps, args.batch) for objective in order}
        ratios.append(seconds["ambient"] / seconds["plain"])
        print(f"round {number + 1}: plain {seconds['plain']:.3f} s, ambient {seconds['ambient']:.3f} s, "
              f"ratio {ratios[-1]:.3f}", flush=True)  # fmt: skip
    print(f"ambient / plain = {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}], n = {args.rounds}, "
          f"batch {args.batch}, {torch.get_num_threads()} threads")  # fmt: skip


if __name__ == "__main__":
    main()
