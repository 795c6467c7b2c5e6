"""Options that several commands have: each takes them from here with `same`, so that a flag means the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ambient_sd.sampling_options import MOST_IMAGES
from ambient_sd.utils.settings import REQUIRED, option


@dataclass(frozen=True)
class SharedOptions:
    """Declare what a command may take from here; no command has them all."""

    # fmt: off
    output_dir: Path = option(REQUIRED, "folder for everything that is written", alias="out")
    overwrite: bool = option(False, "remove what an earlier run of this command left in the folder, and begin anew")
    prompts: Path | None = option(None, 'file of prompts: .jsonl with {"prompt": ...} rows, or text, one a line', metavar="FILE")
    num_images_per_prompt: int = option(4, "images of each prompt", low=1, high=MOST_IMAGES)
    num_prompts: int = option(0, "prompts that are sampled at most; 0: all", low=0)
    heldout: str | None = option(None, "real images of the same kind that no model has seen: what is hit by chance, and how good images can be", metavar="DATA")
    heldout_split: str | None = option(None, "split of the held-out images")
    judge: str | None = option(None, "Stable Diffusion that judges how well images show their prompts; best one that has not seen them, such as the base", metavar="MODEL")
    score_space: Literal["noise", "output"] | None = option(None, "what scores, thresholds and targets are of: predicted noise, or outputs as they are, as published figures of v-prediction models (SD2) are (default: that of a calibrated threshold, else noise)")
    html: Path | None = option(None, "write a page to this file")
    json: Path | None = option(None, "write what was found to this file, for machines")
    # fmt: on
