"""The same noisy images through several models and both oracles, by noise level (Figure 3 of Shah et al., ICML 2025).

    y = x0 + s z,   x_t = alpha_t y at the timestep whose level is s,   h = predicted x0,   error = |h - x0| / sqrt(d)

for images that the models were trained on and for held-out ones, z a function of (seed, level, image). The oracles are
those of `ambient_sd.oracle`: of the training set, which returns training images whatever it is shown, and above s_n of
its noisy copies. A model whose error on training images falls away from that on held-out ones knows the images at
that level; one that is as wrong on both does not.

Errors are in latents, per number. A low error alone is no memorization: compare it with the held-out one. The inputs are made from
clean images; what a sampler meets on its way may differ.

    python -m experiments.denoised plain=runs/plain ambient=runs/ambient --data images.parquet --out build/denoised
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ambient_sd.audit.metrics import bootstrap, difference
from ambient_sd.data.cache import fingerprint
from ambient_sd.data.latents import encode_all
from ambient_sd.data.noise import image_noise
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.data.stream import keyed_generator
from ambient_sd.data.views import ViewRule
from ambient_sd.families.encoders import CaptionEncoder, ImageEncoder
from ambient_sd.families.sd import SD
from ambient_sd.oracle import ideal_ambient_denoiser, ideal_denoiser
from ambient_sd.reporting import pages
from ambient_sd.reporting.charts import Line, chart
from ambient_sd.reporting.sheets import contact_sheet, data_uri, png_bytes
from ambient_sd.sampling import SamplingConfig, label, load_pipeline
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.estimate import Estimate
from ambient_sd.utils.files import atomic_write
from experiments.lemmas import decoder, enlarged

LEVELS = (0.2, 0.4, 0.8, 1.2, 1.6, 2.3, 3.3, 5.1, 8.3)
ORACLES = ("oracle, images", "oracle, noisy copies")
_ADAPTER, _BATCH = "pytorch_lora_weights.safetensors", 16
_TOP = 1.2  # of the error charts: just above s_n the oracle of noisy copies is far beyond


@dataclass(frozen=True)
class Error:
    """Hold one model at one level: error on training and held-out images, and held-out minus training."""

    model: str
    level: float
    train: Estimate
    heldout: Estimate
    gap: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        figures = {name: getattr(self, name).as_dict() for name in ("train", "heldout", "gap")}
        return {"model": self.model, "level": self.level, **figures}


def embedded(pipe: Any, captions: Sequence[str]) -> torch.Tensor:
    """Return the text encoder's hidden states of B captions, (B, L, D) float32 on the CPU."""
    return CaptionEncoder(SD, {"tokenizer": pipe.tokenizer, "text_encoder": pipe.text_encoder})(captions)["hidden"]


def denoise(pipe: Any, y: torch.Tensor, timestep: int, captions: Sequence[str]) -> torch.Tensor:
    """Return `predicted_x0` for B texts; empty ones for the unconditional branch."""
    return predicted_x0(pipe, y, timestep, embedded(pipe, captions))


@torch.no_grad()
def predicted_x0(pipe: Any, y: torch.Tensor, timestep: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return a pipeline's x0-prediction of `y = x0 + s z`, s the level of `timestep`, (B, C, h, w) float32 on the CPU.

    Args:
        pipe: a StableDiffusionPipeline.
        y: (B, C, h, w) noisy latents at signal 1.
        timestep: of its scheduler.
        hidden: (B, L, D) of the captions, by `embedded`.
    """
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    alpha, sigma = (float(v) for v in schedule.coefficients(torch.tensor(timestep)))
    device, found = pipe.unet.device, []
    for start in range(0, len(y), _BATCH):
        part = slice(start, start + _BATCH)
        x_t = (alpha * y[part].float()).to(device, pipe.unet.dtype)
        context = hidden[part].to(device, pipe.unet.dtype)
        output = pipe.unet(x_t, timestep, encoder_hidden_states=context, return_dict=False)[0]
        eps = schedule.predicted_noise(output.float(), sample=x_t.float(), timestep=timestep)
        found.append(((x_t.float() - sigma * eps) / alpha).cpu())
    return torch.cat(found)


def compare(
    pipes: Mapping[str, Any],
    train: ImageDataset,
    heldout: ImageDataset,
    *,
    resolution: int,
    levels: Sequence[float] = LEVELS,
    nature: float = 1.0,
    count: int = 64,
    unconditional: bool = False,
    seed: int = 0,
    noise_seed: int = 0,
) -> tuple[list[Error], dict[float, dict[str, torch.Tensor]]]:
    """Denoise the same images with every model and both oracles.

    Args:
        pipes: loaded Stable Diffusion 1 or 2 pipelines of one VAE and one noise schedule, by name.
        train, heldout: checked images; of duplicates the first counts. The oracles know all of `train`.
        levels: each is moved to the nearest timestep's.
        nature: s_n of the noisy copies. noise_seed: theirs.
        count: how many images of each kind are denoised, drawn by key.
        unconditional: the empty caption in place of the images' own.
        seed: of the noise of the inputs and of the intervals.

    Returns:
        Errors, and by level the outputs by name ("input" is y), training images before held-out ones.

    Raises:
        UserError: the models do not share VAE and schedule, or another kind of pipeline is given.
    """
    first = _same_space(pipes)
    schedule = NoiseSchedule.from_scheduler(first.scheduler)
    rule = ViewRule(resolution, True, False, True, noise_seed)
    known = train.subset(train.one_of_each()).check()
    unseen = heldout.subset(heldout.one_of_each()).check()
    if len(known) < 2 or not len(unseen):
        raise UserError(
            f"{len(known)} training and {len(unseen)} held-out images", rule="at least two and one are needed"
        )
    encoder = ImageEncoder(SD, first.vae)
    data = encode_all(encoder, known, rule, range(len(known)))
    shape = tuple(data.shape[1:])
    y_n = data.double() + nature * image_noise(known.keys, shape, seed=noise_seed).double()
    seen = sorted(range(len(known)), key=lambda i: known.keys[i])[:count]
    fresh = unseen.subset(sorted(range(len(unseen)), key=lambda i: unseen.keys[i])[:count]).check()
    x0 = torch.cat([data[seen], encode_all(encoder, fresh, rule, range(len(fresh)))])
    keys = [known.keys[i] for i in seen] + fresh.keys
    captions = [""] * len(x0) if unconditional else [known.captions[i] for i in seen] + fresh.captions
    hidden = {name: embedded(pipe, captions) for name, pipe in pipes.items()}  # once, not at every level
    errors, outputs = [], {}
    for timestep in _timesteps(schedule, levels):
        s = float(schedule.level(timestep))
        z = torch.stack([torch.randn(shape, generator=keyed_generator("denoised", seed, timestep, k)) for k in keys])
        y = x0 + s * z
        found = {"input": y, **{name: predicted_x0(pipe, y, timestep, hidden[name]) for name, pipe in pipes.items()}}
        found[ORACLES[0]] = ideal_denoiser(y, 1.0, s, data)
        # At and below s_n ambient training shows clean images.
        above = s > nature
        found[ORACLES[1]] = (
            ideal_ambient_denoiser(y, 1.0, s, y_n, alpha_n=1.0, sigma_n=nature) if above else found[ORACLES[0]]
        )
        outputs[s] = found
        for name, h in found.items():
            if name != "input":
                errors.append(_errors(name, s, (h.double() - x0).square().flatten(1).mean(1).sqrt(), len(seen), seed))
    return errors, outputs


def _errors(name: str, level: float, each: torch.Tensor, seen: int, seed: int) -> Error:
    options: dict[str, Any] = {"seed": seed, "resamples": 400}
    train, heldout = (
        bootstrap(part, lambda v: v.mean(), name=f"error {kind}", **options)
        for part, kind in ((each[:seen], "train"), (each[seen:], "held-out"))
    )
    # Other images: not resampled together, whatever the draws are called.
    return Error(name, level, train, heldout, _apart(heldout, train))


def _apart(a: Estimate, b: Estimate) -> Estimate:
    return difference(
        dataclasses.replace(a, draws=None), dataclasses.replace(b, draws=None), name="held-out minus train"
    )


def _same_space(pipes: Mapping[str, Any]) -> Any:
    if not pipes:
        raise UserError(
            "no model is given", rule="at least one is compared with the oracles", remedy="give NAME=FOLDER"
        )
    first = next(iter(pipes.values()))
    for name, pipe in pipes.items():
        if getattr(pipe, "text_encoder_2", None) is not None or getattr(pipe, "unet", None) is None:
            raise UserError(f"{name} is a {type(pipe).__name__}", rule="Stable Diffusion 1 and 2 are compared")
    schedule, space = NoiseSchedule.from_scheduler(first.scheduler), fingerprint(first.vae)
    for name, pipe in list(pipes.items())[1:]:
        other = NoiseSchedule.from_scheduler(pipe.scheduler)
        steps = torch.arange(min(schedule.num_train_timesteps, other.num_train_timesteps))
        if schedule.num_train_timesteps != other.num_train_timesteps or not torch.equal(
            schedule.level(steps), other.level(steps)
        ):
            raise UserError(
                f"{name} has another noise schedule than {next(iter(pipes))}", rule="the same inputs go to all"
            )
        if fingerprint(pipe.vae) != space:
            raise UserError(f"{name} has another VAE than {next(iter(pipes))}", rule="the same inputs go to all")
    return first


def _timesteps(schedule: NoiseSchedule, levels: Sequence[float]) -> list[int]:
    return list(dict.fromkeys(round(schedule.timestep(level)) for level in levels))


def write(
    out: Path, errors: Sequence[Error], outputs: Mapping[float, Mapping[str, torch.Tensor]], vae: Any, about: Mapping[str, Any],
    *, shown: int = 2,
) -> None:  # fmt: skip
    """Write denoised.json, denoised.png (`shown` training and held-out images), and index.html."""
    decode, levels = decoder(vae), list(outputs)
    names = list(outputs[levels[0]])
    seen = len(outputs[levels[0]]["input"]) - int(errors[0].heldout.n)
    cells, captions = [], []
    for kind, start in (("train", 0), ("held-out", seen)):
        for place in range(start, min(start + shown, start + (seen if kind == "train" else int(errors[0].heldout.n)))):
            for name in names:
                cells += decode(torch.cat([outputs[s][name][place : place + 1].float() for s in levels]))
                captions += [
                    f"{kind} {name}" if k == 0 and name == "input" else name if k == 0 else f"s {s:.2g}"
                    for k, s in enumerate(levels)
                ]
    sheet = contact_sheet([enlarged(c) for c in cells], columns=len(levels), captions=captions)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "denoised.png", png_bytes(sheet))
    result = {"version": 1, **about, "errors": [e.as_dict() for e in errors]}
    atomic_write(out / "denoised.json", json.dumps(result, indent=1) + "\n")
    charts = []
    for title, kind in (("Error on training images", "train"), ("Error on held-out images", "heldout"),
                        ("Held-out minus training: what the model knows of its training images", "gap")):  # fmt: skip
        lines = [
            Line(name, levels, [getattr(e, kind).value for e in errors if e.model == name],
                 [(getattr(e, kind).low, getattr(e, kind).high) for e in errors if e.model == name])
            for name in names[1:]
        ]  # fmt: skip
        svg = chart(title, lines, x_label="noise level s", y_label="error per number", top=_TOP)
        charts.append(
            pages.Chart(
                title, svg, f"per number of the latent; bands: 95 % intervals; what is above {_TOP:g} lies on the edge"
            )
        )
    rows = [[e.model, f"{e.level:.3g}", *(f"{f.value:.3f} [{f.low:.3f}, {f.high:.3f}]" for f in (e.train, e.heldout, e.gap))]
            for e in errors]  # fmt: skip
    pages.write_article(
        out / "index.html", "Denoised, by noise level", _answer(errors),
        [
            pages.Section("The same noisy images through each model", [], [pages.Picture(
                "Denoised", data_uri(sheet, 4000), f"Columns: noise level {', '.join(f'{s:.2g}' for s in levels)}. First training, then held-out images.")]),
            pages.Section("Errors", ["A model whose error on training images falls away from that on held-out ones knows the images at that level."],
                          charts=charts, tables=[pages.Table(["model", "s", "training", "held-out", "difference"], rows)],
                          terms=pages.terms("held-out", "interval")),
        ],
        made={**about, "models": ", ".join(f"{name} ({place})" for name, place in about["models"].items())},
    )  # fmt: skip


def _answer(errors: Sequence[Error]) -> str:
    """Say which model denoises its training images better than others, and where most."""
    models = [e for e in errors if e.model not in ORACLES]
    most = max(models, key=lambda e: e.gap.value)
    if most.gap.low > 0:
        return f"{most.model} denoises training images better than held-out ones, most at noise level {most.level:.2g}: it knows them there."
    return "No model denoises its training images measurably better than held-out ones."


def _named(text: str) -> tuple[str, str]:
    name, found, place = text.partition("=")
    if not (name and found and place):
        raise UserError(f"model is {text!r}", rule="it must read NAME=FOLDER", remedy="for example plain=runs/plain")
    return name, place


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    from ambient_sd.assets import IMAGES
    from ambient_sd.data.conditions import split_condition

    parser = argparse.ArgumentParser(
        prog="python -m experiments.denoised", description="The same noisy images through several models and the oracles.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="pipelines, or LoRA folders with --base")
    parser.add_argument("--base", default=None, help="pipeline that LoRA folders belong to")
    parser.add_argument("--data", required=True, help="the training images")
    parser.add_argument("--row_filter", nargs="+", default=[], help="which rows of them")
    parser.add_argument("--heldout", default=str(IMAGES), help="images that no model has seen")
    parser.add_argument("--heldout_filter", nargs="*", default=["split=heldout"], help="which rows of them")
    parser.add_argument("--resolution", type=int, default=64, help="pixels")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), help="noise levels")
    parser.add_argument("--nature", type=float, default=1.0, help="s_n of the noisy copies of the second oracle")
    parser.add_argument("--count", type=int, default=64, help="images of each kind")
    parser.add_argument("--shown", type=int, default=2, help="images of each kind on the sheet")
    parser.add_argument("--unconditional", action="store_true", help="empty captions")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs' noise")
    parser.add_argument("--noise_seed", type=int, default=0, help="of the noisy copies, as in training")
    parser.add_argument("--out", type=Path, required=True, help="folder of sheet, page and JSON")
    args = parser.parse_args(argv)
    named = dict(_named(text) for text in args.models)
    if len(named) < len(args.models) or set(named) & {"input", *ORACLES}:
        raise UserError("two models have one name", rule="each name is one column, and the oracles have theirs")
    if args.count < 1 or args.shown < 1 or not (math.isfinite(args.nature) and args.nature > 0):
        raise UserError("count, shown or nature is not positive")
    settings = {}
    for name, place in named.items():
        adapter = Path(place, _ADAPTER).is_file() and not Path(place, "model_index.json").is_file()
        if adapter and args.base is None:
            raise UserError(
                f"{name} is a LoRA", rule="it needs the pipeline that it was trained on", remedy="add --base"
            )
        settings[name] = SamplingConfig(*([args.base, place] if adapter else [place]), dtype="float32")
        settings[name].check()
    train, heldout = (
        load_rows(where, row_filter=[split_condition(term) for term in terms]).check(near_duplicates=True)
        for where, terms in ((args.data, args.row_filter), (args.heldout, args.heldout_filter))
    )
    pipes = {name: load_pipeline(one) for name, one in settings.items()}
    errors, outputs = compare(
        pipes, train, heldout, resolution=args.resolution, levels=args.levels, nature=args.nature, count=args.count,
        unconditional=args.unconditional, seed=args.seed, noise_seed=args.noise_seed,
    )  # fmt: skip
    about = {
        "models": {name: label(place) for name, place in named.items()}, "training_images": len(train.one_of_each()),
        "n_train": errors[0].train.n, "n_heldout": errors[0].heldout.n, "nature": args.nature, "seed": args.seed,
        "noise_seed": args.noise_seed, "conditional": not args.unconditional, "resolution": args.resolution,
        "data": label(args.data), "heldout": label(args.heldout),
    }  # fmt: skip
    write(args.out, errors, outputs, next(iter(pipes.values())).vae, about, shown=args.shown)
    for e in errors:
        print(f"{e.model:>24}  s {e.level:5.2f}  train {e.train.value:.3f}  held-out {e.heldout.value:.3f}  "
              f"difference {e.gap.value:+.3f} [{e.gap.low:+.3f}, {e.gap.high:+.3f}]")  # fmt: skip
    print(f"Look at it: {args.out / 'index.html'}", flush=True)


if __name__ == "__main__":
    main()
