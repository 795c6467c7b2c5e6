"""Fine-tune Stable Diffusion with the ambient objective: flags -> TrainConfig -> ambient_sd.training.loop.run."""

from __future__ import annotations

import logging
import math
import os
import time
from typing import Any

from ambient_sd.training.config import parse
from ambient_sd.utils.errors import UserError, exits_on_user_error


@exits_on_user_error
def main() -> None:
    try:
        config = parse()
        # After parsing: torch and diffusers take seconds to import, and neither --help nor a typo should wait for them.
        from ambient_sd.utils.quiet import quiet

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        quiet()
        from ambient_sd.training.loop import run

        summary = run(config)
    except UserError:
        # Every process meets the same mistake and one line is enough. The launcher stops the others as soon as one has
        # ended, so they let the first process speak; what only they have met they still say, a little later.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        raise
    if os.environ.get("RANK", "0") == "0":
        print(describe(summary), flush=True)


def describe(summary: dict[str, Any]) -> str:
    """Return the run in a few lines: work done, losses of the last steps, copies at the last look, where it is."""
    new = summary["steps"] - summary["first_step"]
    rate = summary["global_batch"] * new / max(summary["seconds"], 1e-9)
    resumed = f" ({summary['first_step']} done before)" if summary["first_step"] else ""
    lines = [
        f"{summary['steps']} steps{resumed} in {summary['seconds']:.0f} s, {rate:.3g} samples a second, {summary['images']} images"
    ]
    if summary["near_duplicate_groups"]:
        lines[0] += f", {summary['near_duplicate_groups']} groups of near-duplicates among them"
    parts = [
        f"{name} {summary[f'{name}_loss']:.4f}"
        for name in ("clean", "ambient")
        if math.isfinite(summary[f"{name}_loss"])
    ]
    lines.append(
        f"loss {summary['loss']:.4f}{' (' + ', '.join(parts) + ')' if len(parts) > 1 else ''}, mean of the last steps"
    )
    if summary.get("level_reason"):
        lines.append(f"nature level {summary['level']:g}, {summary['level_reason']}")
    if summary["evaluations"]:
        look = summary["evaluations"][-1]
        lines.append(f"last evaluation, step {look['step']}: {look['copies']:.0%} of {look['n']:.0f} images are copies "
                     f"[{look['copies_low']:.0%}, {look['copies_high']:.0%}]")  # fmt: skip
    return "\n".join([*lines, f"results in {summary['output_dir']}"])


if __name__ == "__main__":
    main()
