"""Detectors on the finished runs of a study: do they tell captions whose images come back from captions that were not trained?

    python -m experiments.detectors configs/study/style-60.yaml --output_dir build/study/style-60 --runs plain --seeds 0 1

Memorized: training captions of whose samples at the run's last step at least half are copies, as the study counted them. Ordinary: captions of
the held-out images, of the same form and style. Every detector sees the same noise, the sampler's first step alone:

    norm            || eps_c - eps_u ||                                Wen et al.
    relative        the same, less what the base's norm explains       `ambient_sd.guard.relative`, fitted to the ordinary captions
    beside base     || (eps_c - eps_u) - (eps'_c - eps'_u) ||          `ambient_sd.guard.beside_base`
    anisotropy      norm and alignment, each by its spread             `ambient_sd.guard.anisotropy`

Writes OUT/detectors.json and OUT/detectors.md; finished runs are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from ambient_sd import MemorizationGuard
from ambient_sd.audit.detection import detection_figures
from ambient_sd.data.stream import keyed_generator
from ambient_sd.guard.anisotropy import anisotropy
from ambient_sd.guard.beside_base import beside_base
from ambient_sd.guard.relative import Relation
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.hub_ids import resolve_model_id
from ambient_sd.utils.quiet import quiet
from experiments.arguments import plan_of, study_parser
from experiments.measures import prompts_of
from experiments.sweep import open_reals

GENERATIONS = 4
RATE = 0.01


def memorized(prompts: Sequence[str], copies: Sequence[bool]) -> list[str]:
    """Return the prompts of whose samples at least half are copies, in their order.

    Example:
        >>> memorized(["a", "b", "a", "b"], [True, False, False, False])
        ['a']
    """
    kept: dict[str, list[bool]] = {}
    for prompt, copy in zip(prompts, copies, strict=True):
        kept.setdefault(prompt, []).append(bool(copy))
    return [prompt for prompt, marks in kept.items() if 2 * sum(marks) >= len(marks)]


def terms(pipe: Any, base: UNet2DConditionModel, prompts: Sequence[str], steps: int) -> Tensor:
    """Return of each prompt and noise the norm, the base's norm, the norm beside the base, and anisotropy's two terms: `(N, G, 5)`."""
    own, out = pipe.unet, []
    side = own.config.sample_size
    for i, prompt in enumerate(prompts):
        noise = torch.randn(
            GENERATIONS, own.config.in_channels, side, side, generator=keyed_generator(0, "detectors", i)
        )
        call: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": 2.0,
            "num_images_per_prompt": GENERATIONS,
        }
        norms = []
        for network in (own, base):
            pipe.unet = network
            with MemorizationGuard(pipe, stop_after=1) as guard:
                norms.append([one.curve[0] for one in guard.decide(prompt, latents=noise.clone(), **call)])
        pipe.unet = own
        added = beside_base(pipe, prompt, base, latents=noise.clone(), **call)
        turned = anisotropy(pipe, prompt, latents=noise.clone(), **call)
        out.append([*norms, added, [one.norm for one in turned], [one.alignment for one in turned]])
    return torch.tensor(out, dtype=torch.float64).transpose(1, 2).contiguous()


def figures(hits: Tensor, ordinary: Tensor) -> dict[str, dict[str, Estimate]]:
    """Return AUC and TPR of each detector by its terms, a mean over the generations."""
    p, n = hits.mean(1), ordinary.mean(1)
    relation = Relation.fit(norms=n[:, 0], base=n[:, 1])
    spread = ordinary[..., 3:].reshape(-1, 2).std(0)
    scores = {
        "norm": (p[:, 0], n[:, 0]),
        "relative": tuple(relation.score(x[:, 0], x[:, 1]) for x in (p, n)),
        "beside base": (p[:, 2], n[:, 2]),
        "anisotropy": tuple((x[:, 3:] / spread).sum(1) for x in (p, n)),
    }
    out = {}
    for name, (high, low) in scores.items():
        area, rate = detection_figures(
            high.contiguous(), low.contiguous(), rate=RATE, memorized_groups=list(range(len(high))), ordinary_groups=list(range(len(low))), seed=0
        )  # fmt: skip
        out[name] = {"auc": area, "tpr": rate}
    return out


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--runs", nargs="+", default=["plain"], help="labels of runs of all weights")
    args = parser.parse_args(argv)
    quiet()
    plan = plan_of(args)
    path = args.output_dir / "detectors.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for run in plan.runs:
        if run.label not in plan.chosen(args.runs) or run.name in found:
            continue
        folder = args.output_dir / "runs" / run.folder
        record = folder / f"step-{plan.measure_at[-1]:06d}" / "figures.json"
        if not record.is_file():
            raise UserError(f"{run.name} is not finished in {args.output_dir}", rule="memorized captions are those of its last step",
                            remedy=f"run the study first: --only {run.label!r}")  # fmt: skip
        copies = json.loads(record.read_text(encoding="utf-8")).get("copies")
        if copies is None or not (folder / "model" / "model_index.json").is_file():
            raise UserError(f"{run.name} was merged into {args.output_dir}, without its model and images", rule="detectors need both",
                            remedy=f"run it here, in a folder without --merge: --only {run.label!r}")  # fmt: skip
        config: Any = run.config("study")
        reals = open_reals(plan, config)
        prompts = prompts_of(reals, plan.sampling, run.seed)
        known = memorized(prompts, copies)
        pipe = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        base = UNet2DConditionModel.from_pretrained(
            resolve_model_id(str(config.pretrained_model_name_or_path)), subfolder="unet"
        ).eval()
        steps = plan.sampling.num_inference_steps
        shares = figures(terms(pipe, base, known, steps), terms(pipe, base, reals.heldout_captions, steps))
        found[run.name] = {
            "memorized": len(known), "ordinary": len(reals.heldout_captions),
            "detectors": {name: {key: value.as_dict() for key, value in pair.items()} for name, pair in shares.items()},
        }  # fmt: skip
        atomic_write(path, json.dumps(found, indent=1) + "\n")
    lines = [
        f"One step, {GENERATIONS} generations.",
        "",
        "| run | memorized, ordinary | detector | AUC | found at 1 % false alarms |",
        "|---|---|---|---|---|",
    ]
    for name, one in found.items():
        for detector, pair in one["detectors"].items():
            auc, tpr = (Estimate.from_dict(pair[key]) for key in ("auc", "tpr"))
            lines.append(
                f"| {name} | {one['memorized']}, {one['ordinary']} | {detector} | {auc.show(3)} | {tpr.show(0, 100, ' %')} |"
            )
    atomic_write(args.output_dir / "detectors.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
