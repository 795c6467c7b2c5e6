"""Add to the steps of a study of a style which real image is closest to each sample, where they were measured before it was.

    python -m experiments.closest configs/study/style-60.yaml --output_dir build/study/style-60

`own`, `new` and `drawn`, by pixels and by contours, are those of `ambient_sd.audit.closest`, made of the sheets and figures that the study has left: nothing is sampled
again. A step that was merged has no samples and stays as it is. Then `experiments.sweep --results_only` writes the tables and curves with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ambient_sd.audit.closest import FEATURES, NAMES
from ambient_sd.audit.features import embed
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.files import atomic_write
from experiments.arguments import plan_of, study_parser
from experiments.measures import Reals, in_turn, prompts_of
from experiments.pages import samples_of
from experiments.plan import Plan
from experiments.style import NEW, closest_of
from experiments.sweep import APART, BASE, open_reals


def steps_of(plan: Plan, out: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each measured step and the seed of its samples: the base alone, runs, recipes apart."""
    yield out / BASE / "step-000000", 0
    for run in plan.runs:
        for step in plan.measure_at:
            yield out / "runs" / run.folder / f"step-{step:06d}", run.seed
    for step_dir in sorted((out / APART).glob("*/step-*")):
        yield step_dir, int(json.loads((step_dir / "figures.json").read_text(encoding="utf-8"))["seed"])


def fill_in(plan: Plan, step: Path, reals: Reals, side: int, seed: int) -> bool:
    """Add these figures to a step's own; return False where it has them, or no samples to make them of."""
    path = step / "figures.json"
    if not path.exists():
        return False
    kept = json.loads(path.read_text(encoding="utf-8"))
    if {f"{kind}-{feature}" for kind in NAMES for feature in FEATURES} <= set(kept["figures"]) or "new" not in kept:
        return False
    assert plan.style is not None
    some = [feature for feature in reals.features if feature.name in FEATURES]
    trained, new = (embed(samples_of(step, side, part)[0], some) for part in ("", NEW))
    captions = in_turn(reals.heldout_captions, plan.style.images, seed)
    found = closest_of((trained, prompts_of(reals, plan.sampling, seed)), (new, captions), reals, seed)
    kept["figures"] = {name: figure for name, figure in kept["figures"].items() if name not in NAMES}
    kept["figures"] |= {name: figure.as_dict() for name, figure in found.items()}
    atomic_write(path, json.dumps(kept, indent=1, allow_nan=False) + "\n")
    return True


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(__doc__)
    args = parser.parse_args(argv)
    plan = plan_of(args)
    if plan.style is None:
        raise UserError(
            f"study {plan.name}", rule="only a study of a style draws samples for captions that were not trained"
        )
    config: Any = plan.runs[0].config("study")
    reals = open_reals(plan, config)
    filled = [step for step, seed in steps_of(plan, args.output_dir) if fill_in(plan, step, reals, config.resolution, seed)]  # fmt: skip
    print(
        f"{len(filled)} steps filled in; now: python -m experiments.sweep {args.study} --output_dir {args.output_dir} --results_only"
    )


if __name__ == "__main__":
    main()
