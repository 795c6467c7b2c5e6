"""`ambient-sd audit`: its settings, its flags and what it prints; `ambient_sd.commands.audit.work` measures."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambient_sd.audit.registry import DEFAULT, FeatureOptions
from ambient_sd.commands.shared import SharedOptions
from ambient_sd.data.conditions import split_condition
from ambient_sd.data.dataset_options import AUTO, DatasetOptions, reading
from ambient_sd.sampling_options import SamplingOptions
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import REQUIRED, Parser, add_flags, check, from_flags, option, same

if TYPE_CHECKING:
    from ambient_sd.data.sources import ImageDataset
    from ambient_sd.sampling import SamplingConfig

_CONDITION = re.compile(r"\w+\s*(=|<=|>=)")  # of a row: its value may hold a slash


@dataclass(frozen=True)
class Source:
    """Say where real images come from, in the words of `load_rows`."""

    place: str
    split: str | None = None
    row_filter: tuple[tuple[str, str, str], ...] = ()
    image_column: str = "image"
    caption_column: str = "text"
    unlisted: str = "refuse"
    layout: str = AUTO
    caption_extension: str | None = None
    instance_prompt: str | None = None
    trigger_word: str | None = None
    skip_broken: bool = False

    def open(self, need_captions: bool) -> ImageDataset:
        """Open the dataset."""
        from ambient_sd.data.sources import load_rows

        options = {name: value for name, value in vars(self).items() if name != "place"}
        return load_rows(self.place, need_captions=need_captions, **options)

    def public(self) -> dict[str, Any]:
        """Return it fit to be written down: of local places the last part of their name only."""
        from ambient_sd.sampling import label

        return {"place": label(self.place), "split": self.split, "row_filter": ["".join(c) for c in self.row_filter]}


@dataclass(frozen=True)
class AuditedOptions:
    """Name the model, or images made elsewhere, and the real images beside it."""

    # fmt: off
    places: list[str] = option(REQUIRED, "pipeline folder or hub id, and the images that it was trained on: folder, parquet file, tar shards or hub dataset; with --generated only the images", positional=True, metavar="MODEL DATA")
    heldout: str | None = same(SharedOptions, "heldout")
    heldout_split: str | None = same(SharedOptions, "heldout_split")
    heldout_row_filter: list[str] | None = option(None, "held-out rows where all of these hold, as --row_filter", metavar="CONDITION")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)

    def sources(self, rows: DatasetOptions) -> tuple[Source, Source | None]:
        """Return training and held-out images; both are read alike."""

        def source(place: str, split: str | None, terms: Sequence[str] | None, layout: str) -> Source:
            conditions = tuple(split_condition(term) for term in terms or ())
            chosen = {"split": split, "row_filter": conditions, "layout": layout}
            return Source(place, **{**reading(rows), **chosen})

        heldout = (
            None if self.heldout is None else source(self.heldout, self.heldout_split, self.heldout_row_filter, AUTO)
        )
        return source(self.places[-1], rows.dataset_split, rows.row_filter, rows.layout), heldout


@dataclass(frozen=True)
class AuditSettings:
    """Say what is audited, against what, and how.

    `sampling` is model and sampler, or None with `generated`. Without `heldout` there is no background, no excess and no quality.
    `seed` chooses prompts and gives the intervals' draws (`sampling.seed` is that of the start noise). `resamples` are those of every interval but those of quality,
    which take a tenth. `unlisted` says what becomes of files of `generated`; of the real images it is their `Source` that does.

    Raises:
        UserError: a value breaks its rule.
    """

    # fmt: off
    training: Source
    output_dir: Path = same(SharedOptions, "output_dir")
    sampling: SamplingConfig | None = None
    generated: Path | None = option(None, "folder of images made elsewhere, instead of a model; prompts from its samples.jsonl or metadata.jsonl, if any", metavar="FOLDER")
    heldout: Source | None = None
    prompts: Path | None = same(SharedOptions, "prompts", text='file of prompts: .jsonl with {"prompt": ...} rows, or text, one a line (default: the training captions)')
    num_images_per_prompt: int = same(SharedOptions, "num_images_per_prompt", alias="samples_per_prompt")
    num_prompts: int = same(SharedOptions, "num_prompts", alias="max_prompts")
    base_model: str | None = option(None, "the pipeline that MODEL was fine-tuned from: its images for the same captions cannot be copies and calibrate the decision (default: with --lora_weights, MODEL without it)", metavar="MODEL")
    base_images: int = option(128, "images of the base model, one a prompt; 0: none", low=0)
    group_column: str | None = option(None, "column of the training rows (a person, a patient, an artist): counts what comes back of each", metavar="COLUMN")
    features: tuple[str, ...] = DEFAULT
    files: Mapping[str, str | None] = field(default_factory=dict)
    training_embeddings: Path | None = option(None, "what python -m ambient_sd.audit.embedding DATA --output_dir DIR has written: the training images are not embedded again", metavar="DIR")
    clip: str | None = option(None, "CLIP, folder or hub id: measures how well images show their prompts; after open_clip:, one of open_clip (the extra clip), as open_clip:ViT-g-14/laion2b_s12b_b42k", metavar="MODEL")
    judge: str | None = same(SharedOptions, "judge")
    mirrored: bool = option(True, "search for mirror images too")
    attributed_prompts: int = option(4, "most copied prompts whose tokens are examined; 0: none", low=0)
    fail_over: float | None = option(None, "exit with status 1 if the copy rate exceeds this, or, with its whole interval, the excess over held-out images by another of the features (copies in other colours, which pixels do not see); or if more than half of the images are nearest to their own training image, beyond the base's (redrawn copies)", low=0, below=1, metavar="RATE")
    seed: int = same(SamplingOptions, "seed", low=1 - 2**63, high=2**63 - 1)
    resamples: int = 1000
    unlisted: str = same(DatasetOptions, "unlisted")
    overwrite: bool = same(SharedOptions, "overwrite")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)

    def check(self) -> None:
        """Raise a `UserError` for what can be seen to be wrong without opening anything."""
        if (self.sampling is None) == (self.generated is None):
            raise UserError("a model and generated images are given " + ("both" if self.sampling else "neither"),
                            rule="an audit is of one of them")  # fmt: skip
        if self.generated is not None and self.prompts is not None:
            raise UserError("prompts with generated images", rule="their prompts are in the folder's own list")
        if self.base_model is not None and self.sampling is None:
            raise UserError("base_model with generated images", rule="their prompts and sampler are not known here",
                            remedy="give held-out images with --heldout")  # fmt: skip
        if self.sampling is not None:
            self.sampling.check()
            if (base := self.base()) is not None:
                base.check()

    def base(self) -> SamplingConfig | None:
        """Return how images of the base are sampled; None where none are."""
        config = self.sampling
        if config is None or not self.base_images or (self.base_model is None and config.lora_weights is None):
            return None
        if self.base_model is not None:
            return config.of(self.base_model)
        return dataclasses.replace(config, lora_weights=None, base=None, base_above=None)


def make_parser() -> Parser:
    """Build the command line from the settings."""
    parser = Parser(
        prog="ambient-sd audit",
        description="Sample images for the training captions (or take a folder of images), search each one's nearest training "
        "image, and write figures, the most copied images beside their originals, and a page. Exit status: 0; 1 if the copy rate "
        "exceeds --fail_over; 2 for a mistake. Interrupted runs resume.",
        usage="ambient-sd audit MODEL DATA --output_dir OUT [options]\n       ambient-sd audit --generated FOLDER DATA --output_dir OUT [options]",
    )
    add_flags(parser, AuditedOptions)
    add_flags(parser, AuditSettings)
    add_flags(parser, FeatureOptions)
    add_flags(parser, DatasetOptions, skip=("unlisted",))
    add_flags(parser, SamplingOptions, skip=("model", "seed"))
    return parser


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Audit, print what was found, and return the exit status."""
    audited, rows = from_flags(AuditedOptions, args), from_flags(DatasetOptions, args)
    wanted = 2 if getattr(args, "generated", None) is None else 1
    if len(audited.places) != wanted:
        said = "DATA alone, for --generated takes the model's place" if wanted == 1 else "MODEL and DATA"
        raise UserError(
            f"{len(audited.places)} places are given",
            rule=f"there must be {said}",
            remedy="see ambient-sd audit --help",
        )
    if wanted == 1:
        for name in ("lora_weights", "base", "base_above", "revision", "variant", "single_file_config"):
            if hasattr(args, name):
                raise UserError(
                    f"{name} with generated images", rule="no model is sampled", remedy="leave one of them out"
                )
    else:
        from_flags(SamplingOptions, args, model=audited.places[0])  # a mistake is found before torch is loaded
    training, heldout = audited.sources(rows)
    features, files = from_flags(FeatureOptions, args).chosen()
    fixed: dict[str, Any] = {"training": training, "heldout": heldout, "features": tuple(features), "files": files}
    from_flags(AuditSettings, args, **fixed)
    from ambient_sd.utils.quiet import quiet

    quiet()  # before the imports below, which load what speaks
    from ambient_sd.commands.audit.work import audit
    from ambient_sd.sampling import SamplingConfig, adapted

    sampling = None if wanted == 1 else adapted(from_flags(SamplingConfig, args, model=audited.places[0]))
    settings = from_flags(AuditSettings, args, **fixed, sampling=sampling)
    result = audit(settings, _command(words))
    if result is None:  # a process other than the main one
        return 0
    finding, verdict = result.found["finding"], result.found["verdict"]
    print(f"\n{finding['sentence']}\n{finding['detail']}", flush=True)
    if verdict["limit"] is not None:
        said = "exceeds" if verdict["value"] > verdict["limit"] else "does not exceed"
        print(f"{verdict['measure']} {verdict['value']:.4f} {said} {verdict['limit']:g}", flush=True)
        for name in verdict["others"]:
            why = (
                "more than half of the images are nearest to their own training image, beyond the base's"
                if name.startswith("own-")
                else f"the excess over held-out images exceeds {verdict['limit']:g} with its whole interval"
            )
            print(f"{name}: {why}", flush=True)
    print(f"\nLook at it: {settings.output_dir / 'audit.html'}", flush=True)
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
