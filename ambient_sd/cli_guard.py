"""The verbs `sample` and `calibrate` of the command `ambient-sd`: their flags, under diffusers' names where it has one.

Nothing heavy is imported before a verb runs, or its help is asked for: the list of policies needs torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ambient_sd.errors import UserError


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
    """Add `sample` and `calibrate` to the command's verbs."""
    sample = verbs.add_parser(
        "sample",
        help="draw pictures under the memorization guard, with scores, a sheet and a page",
        description="Draw pictures under the memorization guard and write them, their scores, a contact sheet and a page to OUT. "
        "A run that was cut goes on where it stopped.",
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
    sample.add_argument("--policy", metavar="NAME[:key=value,...]", default=None, help="mitigation; see below")
    sample.add_argument(
        "--when", choices=["always", "flagged"], default="always", help="pictures that the policy acts on"
    )
    sample.add_argument("--threshold", default="auto", metavar="X|auto",
                        help="score that flags a picture; auto: as calibrated, where the model has a threshold that fits")  # fmt: skip
    sample.add_argument("--num_images_per_prompt", type=int, default=1, help="pictures of each prompt")
    sample.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    _drawing(sample)
    calibrate = verbs.add_parser(
        "calibrate",
        help="find the score above which a picture is flagged, for one model and sampler",
        description="Sample ordinary prompts under the guard and find the thresholds that at most the asked share of them reaches. "
        "Writes memorization_threshold.json, which the guard then uses. A run that was cut goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    calibrate.add_argument("model", metavar="MODEL", help="pipeline folder or hub id")
    calibrate.add_argument("--ordinary", required=True, metavar="FILE",
                           help="prompts that the model cannot have memorized, a few hundred; .jsonl, or text, one a line")  # fmt: skip
    calibrate.add_argument(
        "--memorized", metavar="FILE", default=None, help="prompts that it has memorized, to see how well it tells"
    )
    calibrate.add_argument("--fpr", type=float, default=0.01, help="share of ordinary prompts that may be flagged")
    calibrate.add_argument("--generations", type=int, default=4, help="pictures per prompt")
    calibrate.add_argument("--out", type=Path, default=None,
                           help="folder or .json file for the result (default: the adapter's or model's folder)")  # fmt: skip
    _drawing(calibrate)


def _drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="LORA", default=None, help="LoRA: folder, .safetensors file or hub id")
    parser.add_argument(
        "--scheduler", choices=["ddim", "dpm++", "euler", "pndm"], default=None, help="sampler (default: the model's)"
    )
    parser.add_argument("--num_inference_steps", type=int, default=50, help="steps of the sampler")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="classifier-free guidance, above 1")
    parser.add_argument("--resolution", type=int, default=None, help="side in pixels (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the start noise")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures that go through the network together")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="precision")
    parser.add_argument("--device", default=None, help="torch device (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> None:
    """Run `sample` or `calibrate`."""
    from ambient_sd.drawing import DrawSettings

    names = ("model", "adapter", "scheduler", "num_inference_steps", "guidance_scale", "resolution", "seed", "dtype",
             "device", "batch_size")  # fmt: skip
    drawing = DrawSettings(**{name: getattr(args, name) for name in names})
    if args.verb == "sample":
        _sample(args, drawing)
    else:
        from ambient_sd.calibrate import CalibrateSettings, calibrate, read_both, table

        ordinary, memorized = read_both(args.ordinary, args.memorized)
        found, path = calibrate(CalibrateSettings(drawing, ordinary, memorized, args.fpr, args.generations, args.out))
        print(f"\n{table(found)}\n\n{found.origin}; written to {path}", flush=True)


def _sample(args: argparse.Namespace, drawing: Any) -> None:
    from ambient_sd.sample import SampleSettings, prompts_of, sample

    threshold: Any = args.threshold
    if threshold != "auto":
        try:
            threshold = float(threshold)
        except ValueError:
            raise UserError(f"threshold is {threshold!r}", rule="it must be a number or auto") from None
    records = sample(
        SampleSettings(drawing, args.out, prompts_of(args.prompt, args.prompts), args.num_images_per_prompt, args.policy,
                       args.when, threshold)
    )  # fmt: skip
    flagged = sum(bool(record["flagged"]) for record in records)
    scores = sorted(record["score"] for record in records)
    said = "none is flagged: no threshold" if records[0]["threshold"] is None else f"{flagged} flagged"
    print(f"\n{len(records)} pictures, median score {scores[len(scores) // 2]:.4g}, highest {scores[-1]:.4g}; {said}\n"
          f"Look at them: {args.out / 'index.html'}", flush=True)  # fmt: skip
