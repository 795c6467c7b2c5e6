"""Images during training: the same prompts with the same start noise each time, shared out over the processes.

They are sampled under the memorization guard, whose score (mean norm of the guidance, Wen et al., ICLR 2024) comes with each.
Every process samples its share and all meet in one gather, so none waits for longer than one image takes (sampling on the
first process alone ends in NCCL's timeout). Training is left as it was: own generators, modes restored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ambient_sd.data.stream import keyed_generator
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.files import atomic_write, json_safe
from ambient_sd.utils.json_schema import load_json, violation

INFERENCE_STEPS = 25
GUIDANCE_SCALE = 7.5
SCORES_NAME = "scores.json"
_SCORES = {
    "type": "object",
    "required": ["step", "scores"],
    "properties": {
        "step": {"type": "integer", "minimum": 0},
        "scores": {"type": "array", "items": {"type": ["number", "null"], "minimum": 0}},
    },
    "additionalProperties": False,
}


class Drawn(NamedTuple):
    """Hold sampled images, one row a prompt, and the guard's score of each, in the same rows."""

    rows: list[list[Image.Image]]
    scores: list[list[float]]


def read_prompts(entries: Sequence[str] | None) -> list[str]:
    """Return the prompts meant by `--validation_prompts`: each entry a prompt, or a .jsonl file with "prompt" rows.

    Raises:
        UserError: a file is missing or empty, or a line of it holds no prompt.
    """
    prompts: list[str] = []
    for entry in entries or ():
        if not entry.endswith(".jsonl"):
            prompts.append(entry)
            continue
        try:
            lines = Path(entry).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt file {entry} cannot be read", rule=str(error), remedy="check the path") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str):
                raise UserError(f"line {number} of {entry} holds no prompt", rule='it must read {"prompt": "..."}')
            prompts.append(prompt)
    if entries and not prompts:
        raise UserError(f"{' '.join(entries)} holds no prompt", remedy='write one {"prompt": "..."} a line')
    return prompts


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str],
    per_prompt: int,
    *,
    resolution: int,
    seed: int,
    accelerator: Accelerator,
    guidance_scale: float = GUIDANCE_SCALE,
) -> Drawn:
    """Draw `per_prompt` images of each prompt; to be called by every process.

    Args:
        pipe: a pipeline of the model in training (`Base.assemble`).
        prompts: one row of images each.
        per_prompt: images in a row.
        resolution: side in pixels.
        seed: with the image's place in the grid it gives its start noise.
        accelerator: who is here.
        guidance_scale: of classifier-free guidance, above 1.

    Returns:
        One row of images and of scores per prompt, on every process.
    """
    pipe.set_progress_bar_config(disable=True)
    unet, parts = pipe.unet, pipe.components
    homes = {name: parts[name].device for name in ("vae", "text_encoder", "text_encoder_2") if name in parts}
    training = unet.training
    unet.eval()
    try:
        for name in homes:
            parts[name].to(accelerator.device)
        total, ranks = len(prompts) * per_prompt, accelerator.num_processes
        shares = -(-total // ranks)
        mine, scores = [], []
        for turn in range(shares):
            # The last round may run out of places: draw one again, so that every process brings equally much.
            place = min(turn * ranks + accelerator.process_index, total - 1)
            with MemorizationGuard(pipe) as guard:
                array = pipe(
                    prompts[place // per_prompt], height=resolution, width=resolution, num_inference_steps=INFERENCE_STEPS,
                    guidance_scale=guidance_scale, generator=keyed_generator(seed, "validation", place), output_type="np",
                ).images[0]  # fmt: skip
            scores.append(guard.report[0].score)
            mine.append(torch.from_numpy((array * 255).round().astype(np.uint8)))
        gathered = accelerator.gather(torch.stack(mine).to(accelerator.device)).cpu().numpy()
        gathered_scores = accelerator.gather(torch.tensor(scores, device=accelerator.device)).tolist()
    finally:
        unet.train(training)
        for name, home in homes.items():
            parts[name].to(home)
    # Process r brought places r, r + ranks, ...: row r * shares + turn of the gathered stack.
    order = [(place % ranks) * shares + place // ranks for place in range(total)]
    starts = range(0, total, per_prompt)
    flat, flat_scores = [Image.fromarray(gathered[i]) for i in order], [gathered_scores[i] for i in order]
    return Drawn([flat[i : i + per_prompt] for i in starts], [flat_scores[i : i + per_prompt] for i in starts])


def grid(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """Lay rows of equal images on one white sheet."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (width + gap), y * (height + gap)))
    return sheet


def write_scores(folder: Path, step: int, scores: Sequence[float]) -> None:
    """Write the guard's scores of the images sampled at a step into `folder`, in the sheet's order; one that is not finite is null."""
    atomic_write(folder / SCORES_NAME, json.dumps(json_safe({"step": step, "scores": list(scores)})) + "\n")


def read_scores(folder: Path, step: int) -> list[float]:
    """Return the finite ones of the scores that `write_scores` left for a step; none if it left none, or those of another step.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SCORES_NAME
    if not path.is_file():
        return []
    try:
        given = load_json(path, 16 * 2**20)
        if wrong := violation(given, _SCORES):
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", rule=one_line(error, 200), remedy="remove it") from None
    return [float(score) for score in given["scores"] if score is not None] if given["step"] == step else []
