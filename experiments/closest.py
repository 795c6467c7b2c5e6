"""Which real image is closest to a sample: a measure that sees blurred and redrawn copies long before the copy decision does.

    python -m experiments.closest configs/study/style-60.yaml --output_dir build/study/style-60

The copy decision asks for a near-identical image, and a small network's early copies are blurred: anyone recognizes them, and the decision
does not count them. This asks less. Of all real images of a study of a style, trained and held out, in EfficientNet-Lite0 features:

    own     share of samples for training captions whose closest real image is their caption's own training image
    new     the same for captions of held-out images, which no run has seen: what a model can know of an image from its caption alone
    drawn   share of samples for held-out captions whose closest real image is a trained one; by chance the trained images' share of all

`own` far above `new` says that images were learned, not what captions mean. It is no decision: a model that draws what a caption says would have
both high. Made of the sheets and figures that the study has left; nothing is sampled. Writes OUT/closest.json and OUT/closest.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sd.audit.features import embed
from ambient_sd.audit.metrics import bootstrap
from ambient_sd.audit.neighbours import nearest
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from experiments.measures import Reals, in_turn, prompts_of
from experiments.pages import samples_of
from experiments.plan import Plan, read_plan
from experiments.points import MeanOverSeeds, share
from experiments.style import NEW, agreeing
from experiments.sweep import open_reals

FIGURES = ("own", "new", "drawn")


def closest(
    trained: Tensor, new: Tensor, prompts: Sequence[str], captions: Sequence[str], reals: Reals, seed: int
) -> dict[str, Estimate]:
    """Return the three shares; intervals resample prompts.

    Args:
        trained, new: features of the samples for `prompts`, training captions, and for `captions`, those of held-out images.
    """
    deep = reals.features[1].name
    every = torch.cat([reals.training[deep], reals.heldout[deep]])
    known, n = [*reals.captions, *reals.heldout_captions], len(reals.training[deep])
    hits = {}
    for name, rows, asked in (("own", trained, prompts), ("new", new, captions)):
        found = nearest(rows, every, 1).index
        hits[name] = (agreeing(found, asked, known), asked)
        if name == "new":
            hits["drawn"] = (found[:, 0] < n, asked)
    return {
        name: bootstrap(hit, torch.mean, name=name, groups=groups, seed=seed, share=True)
        for name, (hit, groups) in hits.items()
    }


def of_step(plan: Plan, step: Path, reals: Reals, side: int, seed: int) -> dict[str, Estimate]:
    """Return the shares of a measured step."""
    assert plan.style is not None
    first, later = (samples_of(step, side, part)[0] for part in ("", NEW))
    deep = reals.features[1]
    rows = [embed(images, [deep])[deep.name] for images in (first, later)]
    captions = in_turn(reals.heldout_captions, plan.style.images, seed)
    return closest(*rows, prompts_of(reals, plan.sampling, seed), captions, reals, seed)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder of the study; steps that are measured are read"
    )
    args = parser.parse_args(argv)
    plan = read_plan(args.study)
    if plan.style is None:
        raise UserError(
            f"study {plan.name}", rule="only a study of a style draws samples for captions that were not trained"
        )
    config: Any = plan.runs[0].config("study")
    reals = open_reals(plan, config)
    path = args.output_dir / "closest.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    steps = [("base alone", args.output_dir / "base" / "step-000000", 0)]
    steps += [
        (run.label, args.output_dir / "runs" / run.folder / f"step-{step:06d}", run.seed)
        for run in plan.runs
        for step in plan.measure_at
    ]
    table: dict[tuple[str, int], list[dict[str, Estimate]]] = {}
    for label, folder, seed in steps:
        if not (folder / "figures.json").exists():
            continue
        name = f"{folder.parent.name}/{folder.name}"
        if name not in kept:
            found = of_step(plan, folder, reals, config.resolution, seed)
            kept[name] = {key: value.as_dict() for key, value in found.items()}
            atomic_write(path, json.dumps(kept, indent=1) + "\n")
        one = {key: Estimate.from_dict(value) for key, value in kept[name].items()}
        table.setdefault((label, int(folder.name.removeprefix("step-"))), []).append(one)
    by_chance = len(reals.captions) / (len(reals.captions) + len(reals.heldout_captions))
    lines = [f"Of {len(reals.captions)} trained and {len(reals.heldout_captions)} held-out images; `drawn` by chance {100 * by_chance:.1f} %.", "",
             "| run | step | own | new | drawn |", "|---|---|---|---|---|"]  # fmt: skip
    for (label, step), found in table.items():
        cells = [share(MeanOverSeeds.of([one[key] for one in found])) for key in FIGURES]
        lines.append(f"| {label} | {step} | {' | '.join(cells)} |")
    atomic_write(args.output_dir / "closest.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
