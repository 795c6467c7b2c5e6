"""The verb `audit` of the command `ambient-sd`: its flags. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ambient_sd.audit.registry import add_features, chosen
from ambient_sd.commands.guard_flags import add_base, add_overwrite, add_sampling, add_unlisted
from ambient_sd.utils.errors import UserError

_CONDITION = re.compile(r"\w+\s*(=|<=|>=)")  # of a row: its value may hold a slash


def add_audit(verbs: Any) -> None:
    """Add `audit` to the command's verbs."""
    audit = verbs.add_parser(
        "audit",
        help="measure how much a model copies its training images, and how good its images are",
        description="Sample images for the training captions (or take a folder of images), search each one's nearest training "
        "image, and write figures, the most copied images beside their originals, and a page to OUT. Exit status: 0; 1 if the share "
        "of copies exceeds --fail-over; 2 for a mistake. Interrupted runs resume.",
        usage="ambient-sd audit MODEL DATA --out OUT [options]\n       ambient-sd audit --generated FOLDER DATA --out OUT [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    audit.add_argument("places", nargs="+", metavar="MODEL DATA",
                       help="pipeline folder or hub id, and the images that it was trained on: folder, parquet file, tar shards or "
                       "hub dataset; with --generated only the images")  # fmt: skip
    audit.add_argument("--generated", type=Path, default=None, metavar="FOLDER",
                       help="images made elsewhere instead of a model; prompts from its samples.jsonl or metadata.jsonl, if any")  # fmt: skip
    audit.add_argument("--heldout", default=None, metavar="DATA",
                       help="real images of the same kind that the model never saw: what is hit by chance, and how good images can be")  # fmt: skip
    audit.add_argument("--out", type=Path, required=True, help="folder for everything")
    audit.add_argument("--prompts", default=None, metavar="FILE", help=".jsonl with prompt rows, or text, one a line (default: the training captions)")  # fmt: skip
    audit.add_argument("--samples_per_prompt", type=int, default=4, help="images of each prompt")
    audit.add_argument("--max_prompts", type=int, default=0, help="prompts at most, drawn by the seed; 0: all")
    audit.add_argument("--base_model", default=None, metavar="MODEL",
                       help="the pipeline that MODEL was fine-tuned from: its images for the same captions cannot be copies and calibrate the "
                       "decision (default: with --lora_weights, MODEL without it)")  # fmt: skip
    audit.add_argument(
        "--base_images", type=int, default=128, metavar="N", help="images of the base model, one a prompt; 0: none"
    )
    audit.add_argument("--group_column", default=None, metavar="COLUMN",
                       help="column of the training rows (a person, a patient, an artist): counts what comes back of each")  # fmt: skip
    add_features(audit, "measures beside the decision; ")
    audit.add_argument(
        "--clip",
        default=None,
        metavar="MODEL",
        help="CLIP, folder or hub id: measures how well images show their prompts; after open_clip:, one of open_clip (the extra clip), "
        "as open_clip:ViT-g-14/laion2b_s12b_b42k",
    )
    audit.add_argument(
        "--judge",
        default=None,
        metavar="MODEL",
        help="Stable Diffusion that judges the same; best one that has not seen the images, such as the base",
    )
    audit.add_argument("--no_mirrored", dest="mirrored", action="store_false", help="do not search for mirror images")
    audit.add_argument(
        "--attribution", type=int, default=4, metavar="N", help="most copied prompts whose tokens are examined; 0: none"
    )
    audit.add_argument("--fail-over", "--fail_over", type=float, default=None, metavar="SHARE",
                       help="exit with status 1 if the share of copies exceeds this, or, with its whole interval, the excess over held-out "
                       "images by another of the features (copies in other colours, which pixels do not see)")  # fmt: skip
    audit.add_argument("--training_embeddings", type=Path, default=None, metavar="DIR",
                       help="what python -m ambient_sd.audit.embedding DATA --out DIR has written: the training images are not embedded again")  # fmt: skip
    audit.add_argument("--image_column", default="image", help="column of the images")
    audit.add_argument("--caption_column", default="text", help="column of the captions")
    audit.add_argument("--dataset_split", default=None, help="split of the training images")
    audit.add_argument("--row_filter", nargs="+", default=[], metavar="CONDITION", help="training rows where all of these hold: column=value, column<=number, column>=number")  # fmt: skip
    audit.add_argument("--heldout_split", default=None, help="split of the held-out images")
    audit.add_argument(
        "--heldout_row_filter", nargs="+", default=[], metavar="CONDITION", help="the same for held-out rows"
    )
    add_overwrite(audit)
    add_unlisted(audit)
    add_sampling(audit)
    add_base(audit)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run `audit` and return the exit status; `words` is the command line that gave `args`."""
    wanted = 1 if args.generated is not None else 2
    if len(args.places) != wanted:
        said = "DATA alone, for --generated takes the model's place" if wanted == 1 else "MODEL and DATA"
        raise UserError(
            f"{len(args.places)} places are given", rule=f"there must be {said}", remedy="see ambient-sd audit --help"
        )
    if args.generated is not None:
        for name in ("lora_weights", "base", "base_above"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"{name} with generated images", rule="no model is sampled from", remedy="leave one of them out"
                )
    from ambient_sd.utils.quiet import quiet

    quiet()  # before the imports below, which load what speaks
    from ambient_sd.commands.audit import AuditSettings, Source, audit
    from ambient_sd.data.conditions import split_condition
    from ambient_sd.sampling import SamplingConfig

    names = ("lora_weights", "scheduler", "num_inference_steps", "guidance_scale", "resolution", "seed", "dtype", "device",
             "batch_size", "base_above", "base")  # fmt: skip
    sampling = None
    if args.generated is None:
        sampling = SamplingConfig(model=args.places[0], **{name: getattr(args, name) for name in names})
    features, files = chosen(args)

    def source(place: str, split: str | None, conditions: list[str]) -> Source:
        return Source(
            place,
            split,
            tuple(split_condition(c) for c in conditions),
            args.image_column,
            args.caption_column,
            args.unlisted,
        )

    settings = AuditSettings(
        training=source(args.places[-1], args.dataset_split, args.row_filter),
        out=args.out,
        sampling=sampling,
        generated=args.generated,
        heldout=None if args.heldout is None else source(args.heldout, args.heldout_split, args.heldout_row_filter),
        prompts=args.prompts,
        samples_per_prompt=args.samples_per_prompt,
        max_prompts=args.max_prompts,
        base_model=args.base_model,
        base_images=args.base_images,
        group_column=args.group_column,
        features=tuple(features),
        files=files,
        training_embeddings=args.training_embeddings,
        clip=args.clip,
        judge=args.judge,
        mirrored=args.mirrored,
        attribution=args.attribution,
        limit=args.fail_over,
        seed=args.seed,
        unlisted=args.unlisted,
        overwrite=args.overwrite,
    )  # fmt: skip
    result = audit(settings, _command(words))
    if result is None:  # on another process than the main one
        return 0
    finding, verdict = result.found["finding"], result.found["verdict"]
    print(f"\n{finding['sentence']}\n{finding['detail']}", flush=True)
    if verdict["limit"] is not None:
        said = "exceeds" if verdict["value"] > verdict["limit"] else "does not exceed"
        print(f"{verdict['measure']} {verdict['value']:.4f} {said} {verdict['limit']:g}", flush=True)
        for name in verdict["others"]:
            print(
                f"{name}: the excess over held-out images exceeds {verdict['limit']:g} with its whole interval",
                flush=True,
            )
    print(f"\nLook at it: {args.out / 'audit.html'}", flush=True)
    return int(result.exceeded)


def _command(words: Sequence[str]) -> str:
    """Return the command as it may be published: of local places the last part of their name only, whether they are there yet or not."""
    from ambient_sd.sampling import label

    def public(value: str) -> str:
        is_place = "/" in value and not _CONDITION.match(value)
        return label(value) if is_place or value.startswith("~") else value

    shown = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        shown.append(flag + equals + public(value))
    return "ambient-sd " + shlex.join(shown)
