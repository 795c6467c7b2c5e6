"""Mitigations at sampling time beside an earlier stop of the same training: fewer copies at equal quality, or other images of them?

    python benchmarks/mitigated.py configs/study/text-60.yaml --out build/by-noise-level

The networks are those of `by_noise_level.py`, whose folder may be given: the study's plain run, kept at each of --steps. Each is sampled
alone, then the last one under each of --policies, names of `ambient-sd compare`, and measured as there. What a policy needs of ordinary prompts
(Wen's target) comes from the held-out captions. Goes on where it was cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from by_noise_level import COLUMNS, make_parser, measured, networks_of, page, table

from ambient_sd.commands.compare.work import MITIGATIONS, OrdinaryScores, ordinary_scores
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.sampling import generate, requests_for
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.quiet import quiet
from experiments.measures import Reals, config_of
from experiments.plan import Sampling, read_plan
from experiments.points import share, where_as_good


@exits_on_user_error
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--policies", nargs="+", default=["Wen", "STP", "STP until 400", "STP until 300", "OG", "OG+STP", "RT", "CWR"]
    )
    parser.add_argument("--guidance_scale", type=float, default=None, help="in place of the study's")
    args = parser.parse_args()
    if wrong := sorted(set(args.policies) - set(MITIGATIONS)):
        raise UserError(f"policy {wrong[0]!r}", rule=f"it must be one of {', '.join(MITIGATIONS)}")
    quiet()
    plan = read_plan(args.study, {"seeds": [args.seed], "measure_at": args.steps})
    networks, pipe, reals, resolution = networks_of(plan, args.out)
    at = ""
    if args.guidance_scale is not None and args.guidance_scale != plan.sampling.guidance_scale:
        plan = dataclasses.replace(
            plan, sampling=dataclasses.replace(plan.sampling, guidance_scale=args.guidance_scale)
        )
        at = f" at guidance {args.guidance_scale:g}"

    def row(name: str, around: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
        return measured(args.out, name + at, pipe, around, plan, reals, resolution, args.seed)

    rows = []
    for step in args.steps:
        pipe.unet = networks[f"step {step}"]
        rows.append(row(f"step {step}", contextlib.nullcontext))
    scores = _ordinary(pipe, plan.sampling, reals, resolution, args.seed)
    for name in args.policies:
        around = functools.partial(MemorizationGuard, pipe, MITIGATIONS[name][0](scores))
        rows.append(row(f"{name}, step {args.steps[-1]}", around))
        print(rows[-1]["name"], {k: round(v["value"], 3) for k, v in rows[-1]["figures"].items()}, flush=True)
    stem = f"mitigated{at.replace(' ', '-')}"
    atomic_write(args.out / f"{stem}.json", json.dumps(rows, indent=1) + "\n")
    shown = [done["name"] for done in rows[len(args.steps) - 1 :]]
    page(args.out, shown, reals, resolution).save(args.out / f"{stem}.png")
    print(table(rows))
    print(beside_plain(rows[: len(args.steps)], rows[len(args.steps) :]))


def beside_plain(plain: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """Return as Markdown what each row copies, and what plain copied where, on its way, it first was as good."""
    shown = [
        m for m in ("copies", "copied", "copied-coarsely", "copied-recoloured") if all(m in r["figures"] for r in (*plain, *rows))
    ]  # fmt: skip
    lines = [
        f"| sampled with | Frechet distance | {' | '.join(f'{COLUMNS[m]} | plain there' for m in shown)} |",
        "|---" * (2 + 2 * len(shown)) + "|",
    ]
    for row in rows:
        figures, cells = row["figures"], []
        for measure in shown:
            line = [
                (Estimate.from_dict(p["figures"][measure]), Estimate.from_dict(p["figures"]["distance"])) for p in plain
            ]
            there = where_as_good(line, figures["distance"]["value"])
            cells += [share(Estimate.from_dict(figures[measure])), "" if there is None else share(there)]
        lines.append(f"| {row['name']} | {figures['distance']['value']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ordinary(pipe: Any, sampling: Sampling, reals: Reals, resolution: int, seed: int) -> OrdinaryScores:
    """Return what the norms of captions are like that the network never saw."""
    captions = list(dict.fromkeys(reals.heldout_captions))[:96]
    config = config_of("", Path(), False, sampling, resolution, seed)
    batches = generate(pipe, requests_for(captions), config, guard=MemorizationGuard(pipe), decode=False)
    curves = [one.report.curve for batch in batches for one in batch if one.report is not None]
    return ordinary_scores(torch.tensor(curves)[:, None], range(len(curves)), sampling.guidance_scale)


if __name__ == "__main__":
    main()
