"""What `ambient-sd sample` and `ambient-sd calibrate` share: settings, loading, prompt files, and start noise by address.

The noise of an image is a function of (seed, place of its prompt, place of the image among those of its prompt) alone, drawn in
float32 on the CPU: another batch size, precision or device, or a run that was cut and goes on, starts from the same noise.
Every image is sampled as a prompt of its own, so that nothing depends on which images share a batch but rounding.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ambient_sd.data.captions import Cut, find_cut, in_one_line
from ambient_sd.data.stream import keyed_generator
from ambient_sd.families import of_pipeline, tokenizers_of
from ambient_sd.families.base import Model, check_same_space
from ambient_sd.families.lora import fit, load_lora, locate, read, told
from ambient_sd.guard.base_above import BaseAbove
from ambient_sd.guard.calibration import Sampling
from ambient_sd.guard.recorder import ImageReport, MemorizationGuard
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.hub_ids import OPEN_CLIP, resolve_model_id
from ambient_sd.utils.quiet import quiet

SCHEDULERS = {
    "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
}  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")
_HUB_ID = r"\w[\w.-]*/\w[\w.-]*"


@dataclass(frozen=True)
class SamplingConfig:
    """Say with which model and how images are sampled.

    Attributes:
        model: folder or hub id of a pipeline.
        adapter: LoRA on it: folder, .safetensors file or hub id (`ambient_sd.families.lora`); None: none.
        scheduler: a key of `SCHEDULERS`; None: the model's own.
        num_inference_steps, guidance_scale: as diffusers takes them. A scale of 1 or less is none, and the guard, which measures
            guidance, then measures nothing.
        resolution: side in pixels, a multiple of 8; None: the model's own.
        seed: of the start noise.
        dtype: precision of the weights, one of `DTYPES`.
        device: torch device; None: a GPU if there is one.
        base_above: noise level above which the base's U-Net stands in for the model's (`guard.base_above`); None: nowhere.
        base: folder or hub id of the base that `base_above` takes; None: the model without its adapter.
        batch_size: images that go through the network together; changes rounding and nothing else.
    """

    model: str
    adapter: str | None = None
    scheduler: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    resolution: int | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    batch_size: int = 4
    base_above: float | None = None
    base: str | None = None

    def check(self) -> None:
        """Raise a `UserError` for what can be seen to be wrong without the model's weights; of an adapter that is everything."""
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"guidance_scale is {self.guidance_scale}", rule="it must be a finite number of at least 0")
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", rule="it must be at least 1")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise UserError(f"resolution is {self.resolution}", rule="it must be a multiple of 8 pixels")
        for name, known in (("scheduler", [None, *SCHEDULERS]), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}", rule=f"it must be one of {', '.join(filter(None, known))}"
                )
        if self.base_above is not None and not 0 <= self.base_above < math.inf:
            raise UserError(
                f"base_above is {self.base_above}", rule="it must be a noise level, a finite number of at least 0"
            )
        if self.base is not None and self.base_above is None:
            raise UserError("base without base_above", rule="it says above which noise level the base is used")
        if self.base_above is not None and self.base is None and self.adapter is None:
            raise UserError(
                "base_above without a base", rule="a model without adapter holds none", remedy="give --base MODEL"
            )
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise UserError(f"device is {self.device!r}", remedy="for example cpu, cuda or cuda:1") from None
        model = Model(resolve_model_id(self.model))
        assert model.family
        if self.base is not None:
            base = Model(resolve_model_id(self.base))
            assert base.family
            check_same_space(model, base)
        self.lora()

    def lora(self) -> dict[str, Any] | None:
        """Return the record of the adapter (`ambient_sd.families.lora.Adapter.record`), without loading the model; None without one.

        Raises:
            UserError: it cannot be loaded whole into this model.
        """
        if self.adapter is None:
            return None
        path = locate(self.adapter)
        seen = path.stat()
        return dict(
            _fitted(self.adapter, path, (seen.st_mtime_ns, seen.st_size, seen.st_ino), resolve_model_id(self.model))
        )

    def public(self) -> dict[str, Any]:
        """Return what images depend on, fit to be written down: of local folders the last part of their name only."""
        return {
            "model": label(self.model), "adapter": None if self.adapter is None else label(self.adapter),
            **({} if self.adapter is None else {"lora": self.lora()}),
            "scheduler": self.scheduler, "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale, "resolution": self.resolution, "seed": self.seed, "dtype": self.dtype,
            **({} if self.base_above is None else {"base_above": self.base_above, "base": None if self.base is None else label(self.base)}),
        }  # fmt: skip

    def sampling(self, pipe: Any) -> Sampling:
        """Describe the sampling of a loaded pipeline, as a calibration compares it."""
        return Sampling.of(
            pipe, num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale,
            height=self.resolution, width=self.resolution,
        )  # fmt: skip


def label(name: str) -> str:
    """Return a name that may be published: a hub id, or of a local place its last part; after `open_clip:`, if it begins so."""
    if name.startswith(OPEN_CLIP):
        return OPEN_CLIP + label(name.removeprefix(OPEN_CLIP))
    if Path(name).exists():
        name = Path(name).resolve().name
    elif not re.fullmatch(_HUB_ID, name):
        name = Path(name).name
    return one_line(name, 100)


def home(settings: SamplingConfig) -> Path | None:
    """Return the folder that a threshold of this model belongs in: the adapter's, else the model's; None on the hub."""
    place = Path(settings.adapter if settings.adapter is not None else settings.model)
    return place if place.is_dir() else place.parent if place.is_file() else None


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a file: .jsonl with "prompt" rows, or any other text, one prompt a line.

    Raises:
        UserError: the file cannot be read, holds no prompt, or one that no tokenizer takes.
    """
    from ambient_sd.training.validation import read_prompts as read_rows

    if str(path).endswith(".jsonl"):
        prompts = read_rows([str(path)])
    else:
        try:
            # By line feeds only: other characters that split lines for Python may stand in a prompt.
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt file {path} cannot be read", rule=str(error), remedy="check the path") from None
        prompts = [line.rstrip("\r") for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"{path} holds no prompt", remedy="write one a line")
    check_prompts(prompts)
    return prompts


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that no tokenizer takes: half of a surrogate pair is no text."""
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"prompt {number} cannot be encoded", rule="it holds half of a surrogate pair", remedy="remove it"
            ) from None


def say_cut(pipe: Any, prompts: Sequence[str]) -> dict[str, Cut]:
    """Return what the pipeline's text encoders do not read of prompts, by prompt, and say it in one line."""
    cuts = find_cut(prompts, tokenizers_of(pipe))
    if cuts:
        print(f"ambient-sd: {in_one_line(cuts, len(prompts), 'prompts', f'number {cuts[0].index + 1}')}", flush=True)
    return {prompts[cut.index]: cut for cut in cuts}


def digest(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of a list of prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def load(settings: SamplingConfig) -> Any:
    """Load the pipeline with adapter and scheduler, quietly, on its device.

    Raises:
        UserError: something cannot be loaded.
    """
    import diffusers

    # Both print prompts (as they are, control characters included) and bars that would break ours.
    quiet()
    diffusers.utils.logging.set_verbosity_error()
    settings.check()
    model = Model(resolve_model_id(settings.model))
    dtype: torch.dtype = getattr(torch, settings.dtype)
    try:
        pipe = model.load_pipeline(dtype)
    except Exception as error:  # OSError, ValueError, SafetensorError, ...: all mean unusable files
        raise UserError(f"{settings.model} cannot be loaded", rule=one_line(f"{type(error).__name__}: {error}", 240),
                        remedy="give a whole Stable Diffusion pipeline with safetensors weights") from None  # fmt: skip
    if settings.adapter is not None:
        found = load_lora(pipe, settings.adapter)
        if found != settings.lora():
            raise UserError(
                f"the adapter {settings.adapter} changed while it was loaded", remedy="leave it alone meanwhile"
            )
        print(f"ambient-sd: adapter {label(settings.adapter)}: {told(found)}", flush=True)
    if settings.scheduler is not None:
        scheduler = getattr(diffusers, SCHEDULERS[settings.scheduler])
        # PNDM's first steps run the network on other inputs four times each; Stable Diffusion is sampled without.
        extra = {"skip_prk_steps": True} if settings.scheduler == "pndm" else {}
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **extra)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe = pipe.to(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # no such device, or not enough memory on it
        raise UserError(f"the model does not go to {settings.device or 'the GPU'}", rule=one_line(error, 240),
                        remedy="give another --device") from None  # fmt: skip
    if settings.base_above is not None:
        base = None if settings.base is None else Model(resolve_model_id(settings.base))
        BaseAbove(pipe, settings.base_above, None if base is None else base.load(base.family.network, dtype))
    return pipe


@dataclass(frozen=True)
class Drawn:
    """Hold one image, what the guard saw (None: it was off), and whether the pipeline's own safety checker blanked it (None: it has none)."""

    image: Image.Image | None
    report: ImageReport | None
    nsfw: bool | None


def start_noise(pipe: Any, settings: SamplingConfig, places: Sequence[tuple[object, ...]]) -> torch.Tensor:
    """Return the noise of each image by its address, `(n, C, H, W)` as the pipeline takes it."""
    sampling = settings.sampling(pipe)
    shape = (1, *of_pipeline(pipe).start_shape(pipe, (sampling.width, sampling.height)))
    noise = [torch.randn(shape, generator=keyed_generator(settings.seed, "start noise", *place)) for place in places]
    return torch.cat(noise).to(pipe.device, pipe.unet.dtype)


def draw(
    pipe: Any,
    guard: MemorizationGuard | None,
    settings: SamplingConfig,
    prompts: Sequence[str],
    places: Sequence[tuple[object, ...]],
    *,
    decode: bool = True,
) -> list[Drawn]:
    """Sample one batch, under an enabled guard if one is given.

    Args:
        pipe: from `load`.
        guard: of this pipeline, on; None: nothing watches.
        prompts: one per image.
        places: address of each image; with the seed it gives its noise.
        decode: decode the latents; without, only the guard's reports are made.
    """
    sampling = settings.sampling(pipe)
    out = pipe(
        list(prompts),
        latents=start_noise(pipe, settings, places),
        # Samplers that add noise on the way draw it from here.
        generator=[keyed_generator(settings.seed, "noise on the way", *place) for place in places],
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=sampling.height,
        width=sampling.width,
        output_type="pil" if decode else "latent",
    )
    images = out.images if decode else [None] * len(prompts)
    blanked = getattr(out, "nsfw_content_detected", None) if decode else None
    return [
        Drawn(image, report, None if blanked is None else bool(blanked[i]))
        for i, (image, report) in enumerate(zip(images, guard.report if guard else [None] * len(prompts), strict=True))
    ]


@functools.lru_cache(maxsize=8)
def _fitted(adapter: str, path: Path, _: tuple[int, ...], model: str) -> dict[str, Any]:
    """Return the record of an adapter that fits a model, read from the model's configurations; by the file's time and size, once."""
    found = Model(model)
    return fit(read(path, adapter), found.skeleton(), found.family).record()
