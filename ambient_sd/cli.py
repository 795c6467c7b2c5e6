"""The command `ambient-sd`: one verb a subcommand, each thin over the package.

Training has its own script, `train_text_to_image_ambient.py`, because `accelerate launch` wants one.
"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ambient_sd.commands.audit_flags import add_audit
from ambient_sd.commands.audit_flags import run as run_audit
from ambient_sd.commands.guard_flags import add_overwrite, add_unlisted, add_verbs
from ambient_sd.commands.guard_flags import run as run_guard
from ambient_sd.utils.errors import UserError, exits_on_user_error, require_guidance


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, remedy=f"see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ambient-sd",
        description="Fine-tune Stable Diffusion without the model handing the training images back, and see that it does.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    demo = verbs.add_parser(
        "demo",
        help="train a small model twice, plain and ambient, and look at the difference",
        description="Fine-tune the embedded base on embedded images twice, with the plain and with the ambient loss, sample "
        "both under the memorization guard, measure, and write OUT/report.html. About 8 minutes on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the page and the models")
    add_overwrite(demo)
    demo.add_argument("--subset", type=int, default=60, choices=[60, 300, 1000], help="how many training images")
    demo.add_argument(
        "--steps", type=_positive, default=None, help="optimizer steps of each run (as in configs/demo.yaml)"
    )
    demo.add_argument(
        "--level", type=float, default=None, help="nature level s_n of the ambient run (as in configs/demo.yaml)"
    )
    demo.add_argument("--samples_per_prompt", type=_positive, default=4, help="images per training caption")
    demo.add_argument("--prompts", type=_positive, default=60, help="how many training captions are sampled")
    demo.add_argument("--sampling_steps", type=_positive, default=15, help="DPM-Solver++ steps")
    demo.add_argument("--guidance_scale", type=float, default=1.5, help="classifier-free guidance, above 1")
    demo.add_argument("--seed", type=int, default=0, help="of training, sampling and intervals")
    demo.add_argument("--open", action="store_true", help="open the page in the browser when it is ready")
    inspect = verbs.add_parser(
        "inspect",
        help="list what is wrong with an image set: broken, small, captionless, duplicate",
        description="Read every image of DATA and list unusable, small, captionless and extreme ones, and groups of duplicates.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    inspect.add_argument(
        "data", metavar="DATA", help="folder with metadata.jsonl, parquet file, tar shards, or hub dataset"
    )
    inspect.add_argument("--html", type=Path, default=None, help="write a page with the duplicates as images")
    inspect.add_argument("--json", type=Path, default=None, help="write everything found, for machines")
    inspect.add_argument("--resolution", type=_positive, default=512, help="of the training, pixels")
    inspect.add_argument(
        "--model",
        default=None,
        help="base model, pipeline folder or hub id: its tokenizers count which captions are cut",
    )
    add_unlisted(inspect)
    inspect.add_argument("--image_column", default="image", help="column of the images")
    inspect.add_argument("--caption_column", default="text", help="column of the captions")
    inspect.add_argument("--dataset_split", default=None, help="split of the dataset")
    inspect.add_argument("--fail_on", choices=["nothing", "problems"], default="nothing",
                         help="problems: exit with status 1 if anything is found")  # fmt: skip
    level = verbs.add_parser(
        "level",
        help="see the nature level that an image set proposes, without training",
        description="Encode the images of DATA with the VAE of a base model and print, by noise level, how far noisy copies "
        "give their images away; propose s_n as --ambient_level auto does. docs/level.md explains the table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    level.add_argument("data", metavar="DATA", help="folder with metadata.jsonl, parquet file, or tar shards")
    level.add_argument("--model", required=True, help="base model: pipeline folder or hub id")
    level.add_argument(
        "--resolution",
        type=_positive,
        default=None,
        help="of the training, pixels (default: 512, if the images have it)",
    )
    level.add_argument(
        "--allow_upscaling", action="store_true", help="measure images that are enlarged several times, too"
    )
    add_unlisted(level)
    level.add_argument("--center_crop", action="store_true", help="as in the training")
    level.add_argument("--random_flip", action="store_true", help="as in the training")
    level.add_argument("--image_column", default="image", help="column of the images")
    level.add_argument("--caption_column", default="text", help="column of the captions")
    level.add_argument("--dataset_split", default=None, help="split of the dataset")
    level.add_argument("--row_filter", nargs="+", default=None, help="keep rows where all hold: column=value")
    level.add_argument("--html", type=Path, default=None, help="write a page with the curves")
    level.add_argument("--json", type=Path, default=None, help="write the table, for machines")
    add_verbs(verbs)
    sweep = verbs.add_parser(
        "sweep",
        help="train a grid of settings, each measured as it goes: quality against memorization",
        description="Train every run of a study (a YAML file such as those in configs/study/), measure copies, quality and "
        "errors at its steps, and write OUT/results.json, results.md and plots. Goes on where it was cut; two commands on one OUT "
        "share the work.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sweep.add_argument("study", type=Path, metavar="STUDY", help="YAML file of the study")
    sweep.add_argument("--out", type=Path, required=True, help="folder for everything")
    sweep.add_argument("--workers", type=_positive, default=1, help="runs side by side; on a CPU one a core is fastest")
    sweep.add_argument("--only", nargs="+", default=[], metavar="RUN",
                       help="runs to do now: labels, or entries of the study's runs with all of their sweep")  # fmt: skip
    sweep.add_argument("--seeds", nargs="+", type=int, default=None, help="seeds in place of the file's")
    sweep.add_argument("--merge", nargs="+", type=Path, default=[], metavar="RESULTS", help="results.json of the same study in "
                       "other folders, of other machines or published: their steps count as done")  # fmt: skip
    sweep.add_argument("--results_only", action="store_true", help="train nothing; write results of what is measured")
    add_audit(verbs)
    push = verbs.add_parser("push", help="upload the results of a training to the hub", description="Upload weights, "
        "configurations, card and validation images; never checkpoints, logs, tokens or local paths. Token: HF_TOKEN "
        "or `hf auth login`.")  # fmt: skip
    push.add_argument("folder", type=Path, help="output_dir of a finished training")
    push.add_argument("--repo", required=True, help="repository, owner/name; created if it is missing")
    push.add_argument("--private", action="store_true", help="create the repository private")
    push.add_argument("--revision", default=None, help="branch to upload to (default: the main one)")
    return parser


def _tokenizers(model: str | None) -> list[object]:
    if model is None:
        return []
    from ambient_sd.utils.quiet import quiet

    quiet()
    from ambient_sd.families.base import check_base
    from ambient_sd.training.config import TrainConfig

    base = check_base(TrainConfig(pretrained_model_name_or_path=model, train_data_dir="."))
    return base.tokenizers()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _demo(args: argparse.Namespace) -> None:
    require_guidance(args.guidance_scale)
    # After the arguments are checked: torch and diffusers take seconds to import.
    from ambient_sd.commands.demo import DemoSettings, finding, run_demo, table
    from ambient_sd.utils.quiet import quiet

    quiet()
    settings = {name: value for name, value in vars(args).items() if name not in {"verb", "version", "open"}}
    report = run_demo(DemoSettings(**settings))
    print(f"\n{table(report)}\n\n{finding(report)}\n\nLook at it: {args.out / 'report.html'}", flush=True)
    if args.open and not os.environ.get("CI"):
        webbrowser.open((args.out / "report.html").resolve().as_uri())


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.version:
        from ambient_sd import __version__

        print(f"ambient_sd {__version__}")
    elif args.verb == "demo":
        _demo(args)
    elif args.verb == "inspect":
        from ambient_sd.commands.inspect import run

        found = run(args.data, html_path=args.html, json_path=args.json, resolution=args.resolution, unlisted=args.unlisted,
                    tokenizers=_tokenizers(args.model),
                    image_column=args.image_column, caption_column=args.caption_column, split=args.dataset_split)  # fmt: skip
        if args.fail_on == "problems" and not found.clean:
            sys.exit(1)
    elif args.verb == "level":
        from ambient_sd.commands.level import run as run_level
        from ambient_sd.utils.quiet import quiet

        quiet()
        run_level(args.data, args.model, resolution=args.resolution, image_column=args.image_column, split=args.dataset_split,
                  caption_column=args.caption_column, row_filter=args.row_filter, center_crop=args.center_crop,
                  random_flip=args.random_flip, unlisted=args.unlisted, allow_upscaling=args.allow_upscaling, html_path=args.html, json_path=args.json)  # fmt: skip
    elif args.verb in ("sample", "calibrate", "compare"):
        run_guard(args)
    elif args.verb == "sweep":
        from ambient_sd.utils.quiet import quiet

        quiet()  # before the imports below, which load what speaks
        from experiments.plan import read_plan
        from experiments.results import write_results
        from experiments.sweep import gather, merge, write_pages
        from experiments.sweep import sweep as run_sweep

        plan = read_plan(args.study, {} if args.seeds is None else {"seeds": args.seeds})
        plan.chosen(args.only)  # a wrong name is found before anything is taken in
        if args.results_only and args.only:
            raise UserError("only with results_only", rule="it says what is trained", remedy="leave one of them out")
        if args.results_only and not args.merge and not (args.out / "runs").is_dir():
            raise UserError(f"{args.out} holds no runs", rule="results are written of what is measured",
                            remedy="name the study's folder with --out")  # fmt: skip
        for path in args.merge:
            print(f"{path}: {merge(plan, args.out, path)} steps taken in", flush=True)
        results = gather(plan, args.out) if args.results_only else run_sweep(
            plan, args.out, workers=args.workers, only=args.only
        )  # fmt: skip
        write_pages(plan, args.out)
        print(f"Look at it: {write_results(results, args.out)}", flush=True)
        if failed := results.get("failed"):
            name, why = next(iter(failed.items()))
            raise UserError(f"{len(failed)} runs could not be finished, {name} among them", rule=why,
                            remedy="the others are done: change the study's settings, or leave it")  # fmt: skip
    elif args.verb == "audit":
        if status := run_audit(args, sys.argv[1:] if argv is None else argv):
            sys.exit(status)
    elif args.verb == "push":
        from ambient_sd.commands.push import push

        print(push(args.folder, args.repo, private=args.private or None, revision=args.revision), flush=True)
    else:
        parser.print_help(sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
