"""Two networks in one sampling: one above a noise level, another below. Where in the noise levels does memorization sit?

    python benchmarks/by_noise_level.py configs/study/text-60.yaml --out build/by-noise-level

The study's plain run is trained once and its U-Net kept at each of --steps. Each of these networks is sampled and measured alone, as the study measures
its runs, then in pairs: base and each of --high above a level with the last step below it, and the last step above with the base below. Goes on where
it was cut.

Beside the study's figures:
    shaped    d1 / d2 < 1/2 of pixels without brightness and contrast: copies in other tones; for how many held-out images it holds is printed
    own       share of samples whose nearest training image, by contours, is that of their own prompt
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ambient_sd.audit.features import embed
from ambient_sd.audit.metrics import bootstrap
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose
from ambient_sd.guard.base_above import BaseAbove
from ambient_sd.reporting.sheets import contact_sheet, cut_sheet
from ambient_sd.sampling import load_pipeline
from ambient_sd.training.loop import run as train
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.quiet import quiet
from experiments.measures import Reals, config_of, measure_samples, prompts_of, sample
from experiments.plan import Plan, read_plan
from experiments.sweep import open_reals

COLUMNS = {
    "copies": "copies", "copied": "d1/d2 < 1/3", "copied-coarsely": "at 16 px", "copied-recoloured": "in any colour", "shaped": "standardized, d1/d2 < 1/2",
    "own": "own original nearest",
}  # fmt: skip


@exits_on_user_error
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--high", type=int, nargs="*", default=[200], help="those of the steps that come above, beside the base"
    )
    parser.add_argument("--levels", type=float, nargs="+", default=[0.8, 1.6, 3.0])
    args = parser.parse_args()
    if missing := sorted(set(args.high) - set(args.steps)):
        raise UserError(f"high {missing[0]}", rule="it must be one of --steps")
    quiet()
    plan = read_plan(args.study, {"seeds": [args.seed], "measure_at": args.steps})
    networks, pipe, reals, resolution = networks_of(plan, args.out)
    last = f"step {plan.measure_at[-1]}"
    pairs = [(name, name, 0.0) for name in networks]
    pairs += [
        (high, last, level) for high in ("base", *(f"step {step}" for step in args.high)) for level in args.levels
    ]
    pairs += [(last, "base", level) for level in args.levels]
    rows = []
    for high, low, level in pairs:
        pipe.unet = networks[low]
        around = functools.partial(BaseAbove, pipe, level, networks[high]) if level else contextlib.nullcontext
        rows.append(measured(args.out, _name(high, low, level), pipe, around, plan, reals, resolution, args.seed))
        print(rows[-1]["name"], {k: round(v["value"], 3) for k, v in rows[-1]["figures"].items()}, flush=True)
    atomic_write(args.out / "results.json", json.dumps(rows, indent=1) + "\n")
    shown = [_name(high, last, level) for high, low, level in pairs if high == "base" and low == last]
    page(args.out, [last, *reversed(shown), "base"], reals, resolution).save(args.out / "page.png")
    print(table(rows))
    print(f"Held-out images, standardized, d1/d2 < 1/2: {_by_chance(reals)} of {len(reals.heldout_images)}")


def make_parser(about: str) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of these networks takes."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 400, 600, 800, 1000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def networks_of(plan: Plan, out: Path) -> tuple[dict[str, Any], Any, Reals, int]:
    """Train what is missing; return the U-Nets by name, a pipeline to put them into, and the real images."""
    run = next((run for run in plan.runs if run.label == "plain"), None)
    if run is None or plan.from_scratch is not None:
        raise UserError(f"study {plan.name}", rule="needs a run called plain that starts from a base")
    config = run.config(out / "model")
    for step in plan.measure_at:
        config = run.config(
            out / "model", max_train_steps=step, checkpointing_steps=plan.checkpointing_steps, checkpoints_total_limit=1,
            resume_from_checkpoint="latest", report_to="none", latent_cache_dir=str(out / "latents"),
        )  # fmt: skip
        kept = out / f"unet-{step}"
        if not kept.exists():
            train(config)
            shutil.copytree(out / "model" / "unet", out / f".unet-{step}.part", dirs_exist_ok=True)
            (out / f".unet-{step}.part").rename(kept)
    base = str(config.pretrained_model_name_or_path)
    how = config_of(base, out / "model", False, plan.sampling, config.resolution, run.seed)
    pipe = load_pipeline(how, safety_checker=False)
    load = type(pipe.unet).from_pretrained
    networks = {"base": load(base, subfolder="unet").to(pipe.device)}
    networks |= {f"step {step}": load(out / f"unet-{step}").to(pipe.device) for step in plan.measure_at}
    return networks, pipe, open_reals(plan, config), config.resolution


def measured(
    out: Path, name: str, pipe: Any, around: Callable[[], AbstractContextManager[Any]], plan: Plan, reals: Reals, resolution: int, seed: int
) -> dict[str, Any]:  # fmt: skip
    """Sample a pipeline in `around()`, measure, and keep figures and images under `name`; return what is kept if it is there."""
    path = _file(out, name)
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    prompts = prompts_of(reals, plan.sampling, seed)
    with around():
        images = sample(pipe, prompts, config_of("", Path(), False, plan.sampling, resolution, seed))
    figures, _ = measure_samples(images, prompts, reals, seed)
    standardized, edges = choose(["standardized", "edges"])
    found, known = embed(images, [standardized, edges]), embed(reals.images, [standardized, edges])
    ratio = nearest(found[standardized.name], known[standardized.name]).ratio
    mine = torch.tensor([list(reals.captions).index(prompt) for prompt in prompts])
    own = nearest(found[edges.name], known[edges.name]).index[:, 0] == mine
    options: dict[str, Any] = {"groups": prompts, "seed": seed, "share": True}
    figures["shaped"] = bootstrap((ratio < 0.5).double(), torch.mean, name="shaped", **options)
    figures["own"] = bootstrap(own.double(), torch.mean, name="own", **options)
    contact_sheet(images, 20).save(path.with_suffix(".png"))
    record = {"name": name, "figures": {key: figure.as_dict() for key, figure in figures.items()}}
    atomic_write(path, json.dumps(record, indent=1) + "\n")
    return record


def _by_chance(reals: Reals) -> int:
    """Return how many held-out images would count as copies by the looser rule."""
    (standardized,) = choose(["standardized"])
    unseen, known = (
        embed(images, [standardized])[standardized.name] for images in (reals.heldout_images, reals.images)
    )
    return int((nearest(unseen, known).ratio < 0.5).sum())


def _name(high: str, low: str, level: float) -> str:
    return low if high == low else f"{high} above {level:g}, {low} below"


def _file(out: Path, name: str) -> Path:
    return out / f"{name.replace(' ', '-').replace(',', '')}.json"


def page(out: Path, names: Sequence[str], reals: Reals, resolution: int, shown: int = 16) -> Image.Image:
    """Lay out the training images of the first prompts, and under them what each network draws for these."""
    images = [image.convert("RGB").resize((resolution, resolution)) for image in reals.images[:shown]]
    for name in names:
        sheet = Image.open(_file(out, name).with_suffix(".png")).convert("RGB")
        images += cut_sheet(sheet, shown, resolution, 20)
    return contact_sheet(images, shown)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = [f"| network | {' | '.join(COLUMNS.values())} | Frechet distance |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = [_cell(row["figures"].get(key), 100, " %") for key in COLUMNS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {_cell(row['figures']['distance'], 1, '')} |")
    return "\n".join(lines)


def _cell(figure: dict[str, Any] | None, factor: float, unit: str) -> str:
    if figure is None:  # of a network that was measured before the figure existed
        return "-"
    return f"{factor * figure['value']:.1f}{unit} [{factor * figure['low']:.1f}, {factor * figure['high']:.1f}]"


if __name__ == "__main__":
    main()
