"""The verbs `sample`, `calibrate` and `compare` of the command `ambient-sd`: their flags, under diffusers' names where it has one.

Nothing heavy is imported before a verb runs, or its help is asked for: the list of policies needs torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from ambient_sd.utils.errors import UserError, one_line, require_guidance


class _HelpWithPolicies(argparse.Action):
    """Print the help with the policies that there are at its end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ambient_sd.guard.policies.by_name import listing

        parser.epilog = "policies and their settings, for --policy NAME[:key=value,...]:\n" + listing().replace(
            "%", "%%"
        )
        parser.print_help()
        parser.exit()


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def add_verbs(verbs: Any) -> None:
    """Add `sample`, `calibrate` and `compare` to the command's verbs."""
    sample = verbs.add_parser(
        "sample",
        help="sample images under the memorization guard, with scores, a sheet and a page",
        description="Sample images under the memorization guard and write them, their scores, a contact sheet and a page to OUT. "
        "Interrupted runs resume.",
        formatter_class=_Help,
        add_help=False,
    )
    sample.add_argument("-h", "--help", action=_HelpWithPolicies, nargs=0, help="show this, and the policies, and leave",
                        default=argparse.SUPPRESS)  # fmt: skip
    sample.add_argument("model", metavar="MODEL", help="pipeline folder or hub id")
    sample.add_argument("--prompt", nargs="+", metavar="TEXT", default=None, help="prompts")
    sample.add_argument(
        "--prompts", metavar="FILE", default=None, help='.jsonl with {"prompt": ...} rows, or text, one a line'
    )
    sample.add_argument("--policy", metavar="NAME[:key=value,...]", default=None,
                        help="mitigation, or several joined with +; see below")  # fmt: skip
    sample.add_argument(
        "--when", choices=["always", "flagged"], default="always", help="images that the policy acts on"
    )
    sample.add_argument("--threshold", default="auto", metavar="X|auto",
                        help="score that flags an image; auto: as calibrated, where the model has a threshold that fits. With --policy the first step "
                        "decides, before the policy acts: a number then flags only with --when flagged")  # fmt: skip
    sample.add_argument("--score_space", choices=["noise", "output"], default=argparse.SUPPRESS,
                        help="what scores, thresholds and targets are of: predicted noise, or outputs as they are, as published figures of v-prediction "
                        "models (SD2) are (default: that of a calibrated threshold, else noise)")  # fmt: skip
    sample.add_argument("--attribution", choices=["flagged", "all", "none"], default="flagged",
                        help="images of which the page shows how far the score hangs on each word; each is sampled once more, with a "
                        "backward pass at every step: about 2.6 times the price of sampling it")  # fmt: skip
    sample.add_argument("--num_images_per_prompt", type=int, default=1, help="images of each prompt")
    sample.add_argument("--out", type=Path, required=True, help="folder for the images")
    add_overwrite(sample)
    add_sampling(sample)
    add_base(sample)
    calibrate = verbs.add_parser(
        "calibrate",
        help="find the score above which an image is flagged, for one model and sampler",
        description="Sample ordinary prompts under the guard and find the thresholds that at most the asked share of them reaches. "
        "Writes memorization_threshold.json, which the guard then uses (of anisotropy: memorization_threshold_anisotropy.json). Interrupted runs resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    calibrate.add_argument("model", metavar="MODEL", help="pipeline folder or hub id")
    calibrate.add_argument("--ordinary", required=True, metavar="FILE",
                           help="prompts that the model cannot have memorized, a few hundred; .jsonl, or text, one a line")  # fmt: skip
    calibrate.add_argument(
        "--memorized",
        metavar="FILE",
        default=None,
        help="prompts that it has memorized, to see whether it tells; if it does not, no threshold is written and the exit status is 1",
    )
    calibrate.add_argument("--detector", choices=["norm", "anisotropy"], default="norm",
                           help="norm: what the guard sees while it samples; anisotropy: asked of pure noise before sampling, which the "
                           "guard cannot use while it samples (ambient_sd.guard.anisotropy.screen)")  # fmt: skip
    calibrate.add_argument("--score_space", choices=["noise", "output"], default="noise",
                           help="norm: of the difference of predicted noise, or of the outputs as they are, as published scores of v-prediction "
                           "models (SD2) are; the file remembers which, and the guard follows it")  # fmt: skip
    calibrate.add_argument("--fpr", type=float, default=0.01, help="share of ordinary prompts that may be flagged")
    calibrate.add_argument("--generations", type=int, default=4, help="images per prompt")
    calibrate.add_argument("--out", type=Path, default=None,
                           help="folder or .json file for the result (default: the adapter's or model's folder)")  # fmt: skip
    add_sampling(calibrate)
    compare = verbs.add_parser(
        "compare",
        help="try every detector and every mitigation on models whose training images are at hand, side by side",
        description="Sample the training captions, see which are memorized, score the detectors on them, and sample the memorized "
        "ones again under every mitigation. Writes tables, sheets and a page to OUT. Interrupted runs resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.add_argument("models", nargs="+", metavar="NAME=MODEL", help="pipeline folders or hub ids, each with a name of yours; "
                         "the memorized prompts are those of the first")  # fmt: skip
    compare.add_argument(
        "--data", required=True, help="the training images: folder, parquet file, tar shards, or hub dataset"
    )
    compare.add_argument("--heldout", required=True, help="images of the same kind that no model has seen")
    compare.add_argument("--heldout_split", default=None, help="split of the held-out images")
    add_unlisted(compare)
    compare.add_argument("--judge", required=True, metavar="MODEL",
                         help="model that judges how well images fit prompts; best one that has not seen them, such as the base")  # fmt: skip
    compare.add_argument("--resolution", type=int, required=True, help="side in pixels")
    compare.add_argument("--generations", type=int, default=4, help="images per prompt")
    compare.add_argument("--prompts", type=int, default=0, help="captions that are sampled at most; 0: all")
    compare.add_argument("--mitigated", type=int, default=60, help="memorized prompts that are mitigated at most")
    compare.add_argument("--mitigations", nargs="*", default=[], metavar="NAME", help="some of them (default: all)")
    compare.add_argument("--num_inference_steps", type=int, default=20, help="steps of DPM-Solver++")
    compare.add_argument("--guidance_scale", type=float, default=7.5, help="classifier-free guidance, above 1")
    compare.add_argument("--batch_size", type=int, default=16, help="images that go through the network together")
    compare.add_argument("--seed", type=int, default=0, help="of start noise, choice of prompts and intervals")
    compare.add_argument(
        "--lora_weights",
        nargs="+",
        default=[],
        metavar="NAME=LORA",
        help="LoRAs on some of the models: folder, .safetensors file or hub id",
    )
    compare.add_argument("--out", type=Path, required=True, help="folder for everything")
    add_overwrite(compare)


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_above", type=float, default=None, metavar="LEVEL", help="noise level (sigma / alpha) above which the base stands in "
                        "for the fine-tuned network: fewer copies, nothing to train; try 1.6")  # fmt: skip
    parser.add_argument(
        "--base",
        default=None,
        metavar="MODEL",
        help="the base of --base_above (default: MODEL without its --lora_weights)",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what an earlier run of this command left in OUT, and begin anew",
    )


def add_unlisted(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--unlisted", choices=["refuse", "ignore"], default="refuse", help="images in a folder that its list does not name, "
                        "hidden ones, and kinds that are not read: a mistake, or left out and counted")  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora_weights", "--adapter", metavar="LORA", default=None, help="LoRA: folder, .safetensors file or hub id"
    )
    parser.add_argument(
        "--scheduler", choices=["ddim", "dpm++", "euler", "pndm"], default=None, help="sampler (default: the model's)"
    )
    parser.add_argument("--num_inference_steps", type=int, default=50, help="steps of the sampler")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="classifier-free guidance; 1 or less is none, and then "
                        "there are no scores")  # fmt: skip
    parser.add_argument("--resolution", type=int, default=None, help="side in pixels (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the start noise")
    parser.add_argument("--batch_size", type=int, default=4, help="images that go through the network together")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="precision")
    parser.add_argument("--device", default=None, help="torch device (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> None:
    """Run `sample`, `calibrate` or `compare`."""
    if args.verb == "compare":
        _compare(args)
        return
    from ambient_sd.sampling import SamplingConfig, processes

    names = ["model", "lora_weights", "scheduler", "num_inference_steps", "guidance_scale", "resolution", "seed", "dtype",
             "device", "batch_size", *(["base_above", "base"] if args.verb == "sample" else [])]  # fmt: skip
    sampling = SamplingConfig(**{name: getattr(args, name) for name in names})
    if args.verb == "sample":
        _sample(args, sampling)
    else:
        from ambient_sd.commands.calibrate import CalibrateSettings, calibrate, read_both, table, useless

        ordinary, memorized = read_both(args.ordinary, args.memorized)
        found, path = calibrate(CalibrateSettings(sampling, ordinary, memorized, args.fpr, args.generations, args.out,
                                                  args.detector, args.score_space))  # fmt: skip
        if not processes().is_main_process:
            return
        if path is None:
            print(f"\n{table(found)}\n", flush=True)
            print(f"ambient-sd: {useless(found)}; no threshold is written", file=sys.stderr, flush=True)
            sys.exit(1)
        print(f"\n{table(found)}\n\n{found.origin}; written to {path}", flush=True)


def _sample(args: argparse.Namespace, sampling: Any) -> None:
    from ambient_sd.commands.sample import SampleSettings, prompts_of, sample
    from ambient_sd.sampling import processes

    threshold: Any = args.threshold
    if threshold != "auto":
        try:
            threshold = float(threshold)
        except ValueError:
            raise UserError(f"threshold is {threshold!r}", rule="it must be a number or auto") from None
    records = sample(
        SampleSettings(sampling, args.out, prompts_of(args.prompt, args.prompts), args.num_images_per_prompt, args.policy,
                       args.when, threshold, args.attribution, getattr(args, "score_space", None), args.overwrite)
    )  # fmt: skip
    if not processes().is_main_process:
        return
    flagged = sum(bool(record["flagged"]) for record in records)
    scores = sorted(record["score"] for record in records if record["score"] is not None)
    undecided = [record for record in records if record["undecided"]]
    flags = (
        f"{flagged} flagged"
        if any(record["threshold"] is not None for record in records)
        else "none is flagged: no threshold"
    )
    if undecided:
        flags = f"{flagged} flagged, of {len(undecided)} it is not known: {one_line(undecided[0]['undecided'], 300)}"
    said = f"median score {scores[len(scores) // 2]:.4g}, highest {scores[-1]:.4g}; {flags}" if scores else "no scores"
    print(
        f"\n{len(records)} image{'s' * (len(records) != 1)}, {said}\nLook at them: {args.out / 'index.html'}",
        flush=True,
    )


def _compare(args: argparse.Namespace) -> None:
    models = {}
    for entry in args.models:
        name, _, folder = entry.partition("=")
        if not (name and folder) or name in models or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"model {entry!r}", rule="each is NAME=MODEL, with a name of its own of letters, digits, - and _",
                            remedy="for example plain=out/plain ambient=out/ambient")  # fmt: skip
        models[name] = folder
    adapters = dict(entry.partition("=")[::2] for entry in args.lora_weights)
    for name, place in adapters.items():
        if name not in models or not place:
            raise UserError(
                f"lora_weights {name}={place}", rule=f"each is NAME=LORA, with a name of a model: {', '.join(models)}"
            )
    require_guidance(args.guidance_scale)
    for name in ("generations", "mitigated", "num_inference_steps", "batch_size", "resolution"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}", rule="it must be at least 1")
    from ambient_sd.commands.compare import Settings, compare
    from ambient_sd.data.sources import load_rows
    from ambient_sd.reporting.compare_page import tables
    from ambient_sd.utils.quiet import quiet

    quiet()
    settings = Settings(
        models=models, judge=args.judge, out=args.out, resolution=args.resolution, generations=args.generations,
        prompts=args.prompts, mitigated=args.mitigated, steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
        batch_size=args.batch_size, seed=args.seed, chosen=tuple(args.mitigations), lora_weights=adapters, overwrite=args.overwrite,
    )  # fmt: skip
    result = compare(
        settings,
        load_rows(args.data, unlisted=args.unlisted),
        load_rows(args.heldout, split=args.heldout_split, unlisted=args.unlisted),
        _command(args, models),
    )
    print(f"\n{tables(result)}\nLook at it: {args.out / 'comparison.html'}", flush=True)


def _command(args: argparse.Namespace, models: dict[str, str]) -> str:
    """Return the command with every setting, defaults too, and of local places the last part of their name only."""
    from ambient_sd.sampling import label

    words = ["ambient-sd", "compare", *(f"{name}={label(place)}" for name, place in models.items())]
    for name, value in vars(args).items():
        if name in ("verb", "version", "models", "overwrite") or value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        if name in ("data", "heldout", "judge"):
            values = [label(value)]
        elif name == "lora_weights":
            values = [f"{of}={label(place)}" for of, _, place in (entry.partition("=") for entry in value)]
        elif name == "out":
            values = [value.resolve().name]  # no hub id, even where it looks like one
        words += [f"--{name}", *map(str, values)]
    return shlex.join(words)
