"""Fine-tune the embedded base until it has memorized a known part of its images: a model to try guards on.

    python -m experiments.memorized --out build/memorized --objective plain
    python -m experiments.memorized --out build/memorized --objective ambient

It trains on the fixed subset of 300 images, in which the 60 of the smaller subset stand `--copies` times each: what is
repeated is memorized, what is seen as rarely as the rest is not. Repetition is the dose only. Which prompts are memorized
is measured on what the model draws (`ambient_sd.commands.compare`), never taken from this list.

`OUT/images.parquet` holds the rows, `OUT/plain`, `OUT/ambient` the models. A killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ambient_sd.assets import IMAGES
from ambient_sd.commands.demo.work import AMBIENT, EMBEDDED
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
from ambient_sd.utils.errors import exits_on_user_error
from ambient_sd.utils.quiet import quiet


def write_images(path: Path, copies: int) -> Path:
    """Write the 300 images, those of the subset of 60 `copies` times, as a parquet file."""
    rows = pq.read_table(IMAGES, filters=[("subset_300", "=", True)])
    repeated = rows.filter(rows["subset_60"])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables([rows, *[repeated] * (copies - 1)]), path)
    return path


def settings(out: Path, objective: str, *, copies: int, steps: int, seed: int) -> TrainConfig:
    """Return the training settings: the demo's at a higher rate without averaged weights, on the repeated images."""
    values: dict[str, Any] = {
        **{**EMBEDDED, "train_batch_size": 16, "learning_rate": 1e-3, "use_ema": False},
        "train_data_dir": str(write_images(out / "images.parquet", copies)),
        "objective": objective,
        "max_train_steps": steps,
        # Falling to 0: at a constant rate the copies stay a little blurred, and none passes for one.
        "lr_scheduler": "cosine",
        "checkpointing_steps": 100,
        "checkpoints_total_limit": 2,
        "resume_from_checkpoint": "latest",
        # The guard measures against the empty prompt, which has to stay trained.
        "caption_dropout": 0.1,
        "seed": seed,
        "output_dir": str(out / objective),
    }
    return TrainConfig(**(values | AMBIENT if objective == "ambient" else values))


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--objective", choices=["plain", "ambient"], default="plain")
    parser.add_argument("--copies", type=int, default=20, help="times that each of the 60 images stands in the set")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    run(settings(args.out, args.objective, copies=args.copies, steps=args.steps, seed=args.seed))


if __name__ == "__main__":
    main()
