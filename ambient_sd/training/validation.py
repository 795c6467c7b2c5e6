"""Images during training: the same prompts with the same start noise every time, shared out over the processes.

They are sampled under the memorization guard, whose score (mean norm of the guidance, Wen et al., ICLR 2024) comes with each.
Every process samples its share and all meet in a gather after each batch, so none waits on another for longer than one batch takes
(sampling on the first process alone ends in NCCL's timeout). Training is left as it was: own generators, modes restored.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image

from ambient_sd.families import network_of
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.sampling import SamplingConfig, generate, requests_for
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.files import atomic_write, json_safe
from ambient_sd.utils.json_schema import load_json, violation
from ambient_sd.utils.sheets import prompt_sheet

INFERENCE_STEPS = 25
SCORES_NAME = "scores.json"
_PIXELS_AT_ONCE, _MOST_AT_ONCE = 2**20, 16  # of a batch: four images of 512 px, beside a model in training
_SCORES = {
    "type": "object",
    "required": ["step", "scores"],
    "properties": {
        "step": {"type": "integer", "minimum": 0},
        "scores": {"type": "array", "items": {"type": ["number", "null"], "minimum": 0}},
    },
    "additionalProperties": False,
}


class Samples(NamedTuple):
    """Hold sampled images, one row a prompt, and the guard's score of each, in the same rows.

    Example:
        >>> Samples(rows=[[Image.new("RGB", (8, 8))]], scores=[[1.5]]).scores
        [[1.5]]
    """

    rows: list[list[Image.Image]]
    scores: list[list[float]]


def images_at_once(resolution: int) -> int:
    """Return how many images of a resolution are sampled in one batch.

    Example:
        >>> images_at_once(512), images_at_once(64)
        (4, 16)
    """
    return max(1, min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // resolution**2))


@contextlib.contextmanager
def _ready_to_sample(pipe: Any, device: torch.device) -> Iterator[None]:
    """Lend the parts of a pipeline in training to sampling: on the device, in evaluation mode, and back as they were."""
    parts: list[Any] = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    network, training = network_of(pipe), [(part, part.training) for part in parts]
    for part in parts:
        part.eval()
    try:
        with lent([part for part in parts if part is not network], device), _decoding_in_half(pipe.vae, device):
            yield
    finally:
        for part, mode in training:
            part.train(mode)


@contextlib.contextmanager
def _decoding_in_half(vae: Any, device: torch.device) -> Iterator[None]:
    """Let a GPU that has bfloat16 decode in it. What a VAE asks for with `force_upcast` is no float16, whose range is too small for it."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        yield
        return
    decode = vae.decode
    vae.decode = torch.autocast("cuda", torch.bfloat16)(decode)
    try:
        yield
    finally:
        del vae.decode


@contextlib.contextmanager
def lent(parts: Sequence[Any], device: torch.device) -> Iterator[None]:
    """Lend networks to a device, and put each back where it was.

    Example:
        >>> with lent([torch.nn.Linear(2, 2)], torch.device("cpu")):
        ...     pass
    """
    homes = [(part, next(part.parameters()).device) for part in parts]
    try:
        for part, _ in homes:
            part.to(device)
        yield
    finally:
        for part, home in homes:
            part.to(home)


def sample(
    pipe: Any,
    prompts: Sequence[str],
    per_prompt: int,
    *,
    resolution: int,
    seed: int,
    accelerator: Accelerator,
    guidance_scale: float | None = None,
    steps: int | None = None,
) -> Samples:
    """Sample `per_prompt` images of each prompt; to be called by every process.

    Args:
        pipe: a pipeline of the model in training (`Base.assemble`).
        prompts: one row of images each.
        per_prompt: images in a row.
        resolution: side in pixels.
        seed: of the run; an image's own is `ambient_sd.sampling.image_seed` of it and of the place in the grid.
        accelerator: who is here.
        guidance_scale: of classifier-free guidance, above 1 (default: the usual one of the model's family).
        steps: of the sampler (default 25).

    Returns:
        One row of images and of scores per prompt, on every process.

    Example:
        >>> from accelerate import PartialState
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> sampled = sample(tiny_pipeline().to(PartialState().device), ["a cat"], 1, resolution=32, seed=0, accelerator=PartialState())
        >>> sampled.rows[0][0].size, len(sampled.scores[0])
        ((32, 32), 1)
    """
    config = SamplingConfig(
        "the model in training", num_inference_steps=steps or INFERENCE_STEPS, guidance_scale=guidance_scale, resolution=resolution,
        seed=seed, batch_size=images_at_once(resolution),
    )  # fmt: skip
    requests, images, scores = requests_for(prompts, per_prompt), [], []
    with _ready_to_sample(pipe, accelerator.device):
        for batch in generate(pipe, requests, config, guard=MemorizationGuard(pipe), state=accelerator):
            images += [one.image for one in batch if one.image is not None]
            scores += [one.report.score for one in batch if one.report is not None]
    starts = range(0, len(requests), per_prompt)
    return Samples([images[i : i + per_prompt] for i in starts], [scores[i : i + per_prompt] for i in starts])


def sheet(sampled: Samples, prompts: Sequence[str]) -> Image.Image:
    """Lay sampled images on one sheet, a row for each prompt, which stands above it, and each image's score below it.

    Example:
        >>> images = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]
        >>> sheet(Samples([images], [[1.5, 2.5]]), ["a square"]).width >= 128
        True
    """
    return prompt_sheet(sampled.rows, prompts, [[f"score {score:.3g}" for score in row] for row in sampled.scores])


def write_scores(folder: Path, step: int, scores: Sequence[float]) -> None:
    """Write the guard's scores of the images sampled at a step into `folder`, in the sheet's order; one that is not finite is null.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_scores(folder, step=100, scores=[1.5, float("inf")])
        >>> (folder / "scores.json").read_text()
        '{"step": 100, "scores": [1.5, null]}\\n'
    """
    atomic_write(folder / SCORES_NAME, json.dumps(json_safe({"step": step, "scores": list(scores)})) + "\n")


def read_scores(folder: Path, step: int) -> list[float]:
    """Return the finite ones of the scores that `write_scores` left for a step; none if it left none, or those of another step.

    Raises:
        UserError: the file is damaged.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_scores(folder, step=100, scores=[1.5, float("inf")])
        >>> read_scores(folder, step=100), read_scores(folder, step=200)
        ([1.5], [])
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
