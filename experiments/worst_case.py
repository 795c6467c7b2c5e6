"""A worst-case audit: embeddings searched for each image, and what the runs of a study then give back.

    python -m experiments.worst_case configs/study/style-60.yaml --output_dir build/study/style-60 --runs plain "distill level=2.5"

Copies are usually counted on samples for captions. A model may hold an image that no caption asks for: pruned models gave their images
back once the embedding was searched (Finding DoRI, arXiv 2507.16880). Here, for an image x0 and from its own caption's embedding on,

    e* = argmin_e  E_{t, eps} || v_theta(x_t, t, e) - v ||^2            Adam, `STEPS` steps of `DRAWS` draws

and `SAMPLES` images are sampled with e*. An embedding alone can describe an image that no model has seen, so the same is done for images of
the style that were not trained, and for the base alone: what counts is how many more of the trained images come back.

An image comes back if one of its samples is a copy of it (`ambient_sd.audit.decision`, trained and other targets in one set, the remaining
held-out images as the null). Writes OUT/worst-case.json; finished models are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from ambient_sd.audit.decision import CopyDecision
from ambient_sd.data.stream import keyed_generator
from ambient_sd.reporting.sheets import contact_sheet
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.quiet import quiet
from experiments.arguments import plan_of, study_parser
from experiments.plan import file_name
from experiments.sweep import open_reals

STEPS, DRAWS, RATE = 40, 4, 0.05
SAMPLES = 4
_TOGETHER = 8  # images that are searched for side by side


def search(
    pipe: Any, latents: Tensor, start: Tensor, seed: int, steps: int = STEPS, draws: int = DRAWS, rate: float = RATE
) -> tuple[Tensor, list[float]]:
    """Return the embeddings under which the network denoises images best, `(N, L, D)`, and the mean loss of each step.

    Args:
        latents: `(N, C, h, w)`, as the network sees them. start: `(N, L, D)`.
    """
    network, schedule = pipe.unet.requires_grad_(False), NoiseSchedule.from_scheduler(pipe.scheduler)
    embeds = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([embeds], lr=rate)
    losses = []
    x0 = latents.repeat_interleave(draws, 0)
    for step in range(steps):
        g = keyed_generator(seed, "worst case", step)
        # Stratified over the draws of an image, so that no step sees one end of the noise alone.
        u = (torch.arange(draws).repeat(len(latents)) + torch.rand(len(x0), generator=g)) / draws
        t = (u * schedule.num_train_timesteps).long().clamp_max(schedule.num_train_timesteps - 1)
        eps = torch.randn(x0.shape, generator=g)
        alpha = schedule.alpha(t).float().view(-1, 1, 1, 1)
        sigma = (1 - alpha.square()).sqrt()
        target = alpha * eps - sigma * x0 if schedule.prediction_type == "v_prediction" else eps
        found = network(alpha * x0 + sigma * eps, t, embeds.repeat_interleave(draws, 0)).sample
        loss = (found - target).square().flatten(1).mean(1)
        (embeds.grad,) = torch.autograd.grad(loss.sum() / draws, [embeds])
        optimizer.step()
        losses.append(float(loss.detach().mean()))
    return embeds.detach(), losses


@torch.no_grad()
def drawn(pipe: Any, embeds: Tensor, plan: Any, seed: int) -> list[Image.Image]:
    """Sample `SAMPLES` images for each embedding, an embedding's side by side."""
    out: list[Image.Image] = []
    empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    for row, one in enumerate(embeds):
        out += pipe(
            prompt_embeds=one[None].expand(SAMPLES, -1, -1), negative_prompt_embeds=empty.expand(SAMPLES, -1, -1),
            num_inference_steps=plan.sampling.num_inference_steps, guidance_scale=plan.sampling.guidance_scale,
            generator=[keyed_generator(seed, "worst case samples", SAMPLES * row + i) for i in range(SAMPLES)],
        ).images  # fmt: skip
    return out


def measure(pipe: Any, plan: Any, targets: dict[str, tuple[list[Image.Image], list[str]]], decision: CopyDecision, seed: int, sheet: Path) -> dict[str, Any]:  # fmt: skip
    """Search for every target and return, for each kind, the share that comes back; a sheet shows each beside its samples."""
    out: dict[str, Any] = {}
    first, tiles = 0, []
    for kind, (images, captions) in targets.items():
        side = images[0].size[0]
        with torch.no_grad():
            pixels = pipe.image_processor.preprocess(images, height=side, width=side)
            latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
            start = pipe.encode_prompt(captions, "cpu", 1, False)[0]
        samples: list[Image.Image] = []
        ends: list[float] = []
        for part in range(0, len(images), _TOGETHER):
            rows = slice(part, part + _TOGETHER)
            embeds, losses = search(pipe, latents[rows], start[rows], seed + part)
            samples += drawn(pipe, embeds, plan, seed + part)
            ends += [losses[0], losses[-1]]
        decided = decision(samples)
        own = torch.arange(first, first + len(images)).repeat_interleave(SAMPLES)
        back = (decided.copy & (decided.row == own)).view(-1, SAMPLES)
        first += len(images)
        for row, image in enumerate(images):
            tiles += [image, *samples[SAMPLES * row : SAMPLES * (row + 1)]]
        out[kind] = {
            "returned": Estimate.of_share(int(back.any(1).sum()), len(images), name=kind).as_dict(),
            "copies": Estimate.of_share(int(back.sum()), len(samples), name=kind).as_dict(),
            "loss": {"first": sum(ends[::2]) / len(ends[::2]), "last": sum(ends[1::2]) / len(ends[1::2])},
        }
    contact_sheet(tiles, 4 * (1 + SAMPLES)).save(sheet)
    return out


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument(
        "--runs", nargs="+", default=["plain"], help="labels, of the first seed; the base alone is always measured"
    )
    parser.add_argument(
        "--images", type=int, default=16, help="images that are searched for, trained ones and as many others"
    )
    args = parser.parse_args(argv)
    quiet()
    from diffusers import StableDiffusionPipeline

    plan = plan_of(args)
    seed = plan.runs[0].seed
    runs = [run for run in plan.runs if run.label in plan.chosen(args.runs) and run.seed == seed]
    path = args.output_dir / "worst-case.json"
    config: Any = runs[0].config("study")
    reals = open_reals(plan, config)
    n, away = args.images, list(reals.heldout_images)
    targets = {
        "trained": (list(reals.images[:n]), list(reals.captions[:n])),
        "not trained": (away[:n], list(reals.heldout_captions[:n])),
    }
    every = [image for images, _ in targets.values() for image in images]
    decision = CopyDecision.of(every, heldout=away[n:], vae=reals.vae, side=reals.side)
    settings = {
        "study": plan.name,
        "seed": seed,
        "images": n,
        "steps": STEPS,
        "draws": DRAWS,
        "rate": RATE,
        "samples": SAMPLES,
    }
    found: dict[str, Any] = {**settings, "models": {}}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if {k: before.get(k) for k in settings} == settings:
            found = before
    models = {"base alone": (Path(str(config.pretrained_model_name_or_path)), 0)}
    models |= {run.label: (args.output_dir / "runs" / run.folder / "model", plan.measure_at[-1]) for run in runs}
    for label, (folder, step) in models.items():
        if label in found["models"]:
            continue
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{label} has no model in {folder.parent}", rule="a finished run of all weights is searched",
                            remedy=f"run it here, in a folder without --merge: --only {label!r} --seeds {seed}")  # fmt: skip
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        sheet = args.output_dir / f"worst-case-{file_name(label)}.png"
        found["models"][label] = {"step": step, **measure(pipe, plan, targets, decision, seed, sheet)}
        atomic_write(path, json.dumps(found, indent=1) + "\n")
        for kind in targets:
            share = Estimate.from_dict(found["models"][label][kind]["returned"])
            print(f"{label}, {kind}: {share.show(1, 100, ' %')} come back", flush=True)


if __name__ == "__main__":
    main()
