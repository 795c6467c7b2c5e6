"""How images are sampled, for any purpose: the settings, the loading, the seed of an image, and the one loop over a pipeline.

The seed of an image is `image_seed(seed, prompt_index, image_index)`. Its start noise is what `torch.Generator().manual_seed(...)` of it
gives first, in float32 on the CPU, and a sampler that adds noise on the way goes on with the same generator. Batch size, precision, device, number of
processes and resuming change nothing but rounding, and in float32 diffusers' own pipeline makes the same image:

    pipe(prompt, generator=torch.Generator().manual_seed(image_seed(seed, 0, 0)))

Under `accelerate launch` the processes share the batches out and all of them see every result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from ambient_sd.data.captions import Cut, find_cut, in_one_line
from ambient_sd.families import named_tokenizers, network_of, of_pipeline, reading
from ambient_sd.families.base import Model, check_same_space
from ambient_sd.families.lora import fit, load_lora, locate, read, told
from ambient_sd.families.origin import TRAINED, VAE, adapter_file, read_origin, usable_vae
from ambient_sd.guard.base_above import BaseAbove
from ambient_sd.guard.calibration import Sampling
from ambient_sd.guard.recorder import ImageReport, MemorizationGuard, active_guard
from ambient_sd.sampling_options import MOST_IMAGES, SCHEDULERS, SamplingOptions
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.hub_ids import OPEN_CLIP, hub_file, resolve_model_id
from ambient_sd.utils.quiet import quiet

T = TypeVar("T")
_HUB_ID = r"\w[\w.-]*/\w[\w.-]*"


@dataclass(frozen=True)
class SamplingConfig(SamplingOptions):
    """Say with which model and how images are sampled; the options are those of `SamplingOptions`.

    Example:
        >>> SamplingConfig("my-model", scheduler="ddim").num_inference_steps
        50
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype is None:
            object.__setattr__(self, "dtype", _precision(self.device))

    @functools.cached_property
    def scale(self) -> float:
        """Return the scale of classifier-free guidance: the one given, or the usual one of the model's family."""
        return self.source().family.usual_scale if self.guidance_scale is None else self.guidance_scale

    def scale_of(self, pipe: Any) -> float:
        """Return the same of a loaded pipeline."""
        return of_pipeline(pipe).usual_scale if self.guidance_scale is None else self.guidance_scale

    def check(self) -> None:
        """Raise a `UserError` for what can be seen to be wrong without the model's weights; of an adapter that is everything."""
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise UserError(f"device is {self.device!r}", remedy="for example cpu, cuda or cuda:1") from None
        model = self.source()
        if model.family.flow and self.scheduler is not None:
            raise UserError(f"scheduler is {self.scheduler}", rule=f"{model.family.name} was trained by flow matching, and is sampled by its own",
                            remedy="leave scheduler out")  # fmt: skip
        model.check_weights()
        if model.vae_name is not None:
            model.family.check(model, model.read(f"{model.family.network}/config.json"), model.vae_settings)
        if self.base is not None:
            base = self.of(self.base).source()
            base.check_weights()
            check_same_space(model, base)
        self.lora()

    def source(self) -> Model:
        """Return the model, to be read file by file."""
        return Model(
            resolve_model_id(self.model), self.revision, self.variant, config=self.single_file_config,
            vae_name=self.pretrained_vae_model_name_or_path,
        )  # fmt: skip

    def of(self, model: str) -> SamplingConfig:
        """Return how another model is sampled in the same way: of a folder the variant is kept if it has it, the revision is MODEL's alone."""
        other = Model(resolve_model_id(model))
        variant = self.variant if self.variant is not None and other.has_variant(self.variant) else None
        config = self.single_file_config if other.is_file else None
        return dataclasses.replace(
            self, model=model, revision=None, variant=variant, single_file_config=config, lora_weights=None, base=None, base_above=None,
            pretrained_vae_model_name_or_path=None,
        )  # fmt: skip

    def lora(self) -> dict[str, Any] | None:
        """Return the record of the adapter (`ambient_sd.families.lora.Adapter.record`), without loading the model; None without one.

        Raises:
            UserError: it cannot be loaded whole into this model.
        """
        if self.lora_weights is None:
            return None
        path = locate(self.lora_weights)
        seen = path.stat()
        return dict(_fitted(self.lora_weights, path, (seen.st_mtime_ns, seen.st_size, seen.st_ino), self.source()))

    def public(self) -> dict[str, Any]:
        """Return what images depend on, fit to be written down: of local folders the last part of their name only."""
        return {
            "model": label(self.model), "lora_weights": None if self.lora_weights is None else label(self.lora_weights),
            **({} if self.lora_weights is None else {"lora": self.lora()}),
            **{name: label(value) for name in ("revision", "variant", "single_file_config", VAE) if (value := getattr(self, name)) is not None},
            "scheduler": self.scheduler, "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.scale, "resolution": self.resolution, "seed": self.seed, "dtype": self.dtype,
            **({} if self.base_above is None else {"base_above": self.base_above, "base": None if self.base is None else label(self.base)}),
        }  # fmt: skip

    def describe(self, pipe: Any) -> Sampling:
        """Describe the sampling of a loaded pipeline, as a calibration compares it."""
        return Sampling.of(
            pipe, num_inference_steps=self.num_inference_steps, guidance_scale=self.scale_of(pipe),
            height=self.resolution, width=self.resolution,
        )  # fmt: skip


def adapted(config: SamplingConfig) -> SamplingConfig:
    """Return the settings of a LoRA that is given as the model: its base, the LoRA on it, and its resolution; of others as they are.

    What is taken from where is said in a line each.

    Raises:
        UserError: nothing names its base, or that cannot be had.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> config = SamplingConfig(str(BASE))
        >>> adapted(config) is config
        True
    """
    if (file := adapter_file(config.model)) is None:
        config.check_base()
        return config
    shown = label(config.model)
    if config.revision is not None and not Path(config.model).exists():
        raise UserError(f"{shown} is a LoRA on the hub, and revision is given", rule="it would be that of the LoRA or of its base",
                        remedy="give its base as MODEL, whose revision it is, and the LoRA with --lora_weights")  # fmt: skip
    if config.lora_weights is not None:
        raise UserError(f"{shown} is a LoRA, and lora_weights is given", rule="one adapter is loaded", remedy="give its base as MODEL")  # fmt: skip
    origin = read_origin(file, shown)
    base, source = origin.base() if config.base is None else (config.base, "--base")
    say(f"{shown} is a LoRA: its base is {label(base)} ({source})")
    found: dict[str, Any] = {"model": base, "lora_weights": config.model, "base": None}
    if source == TRAINED:
        found |= {name: value for name, value in origin.loading.items() if getattr(config, name) is None}
    if config.pretrained_vae_model_name_or_path is None and origin.vae is not None:
        vae, why = origin.vae
        found[VAE] = usable_vae(vae)
        said = "the base's own, for it cannot be had: name it with --" + VAE if found[VAE] is None else "it"
        say(f"trained with the VAE {label(vae.replace(chr(92), '/'))} ({why}), sampled with {said}")
    if config.resolution is None:
        if origin.resolution is not None:
            found["resolution"] = origin.resolution[0]
            say(f"resolution: {origin.resolution[0]} ({origin.resolution[1]})")
        else:
            why = (
                "nothing names another"
                if origin.sides is None
                else "{} x {} ({}) is not sampled".format(*origin.sides[0], origin.sides[1])
            )
            say(f"resolution: the base's own; {why}")
    return dataclasses.replace(config, **found)


def _precision(device: str | None) -> str:
    """Return the precision of a device: on one H200 bfloat16 sampled 512 px six times as fast as float32."""
    gpu = torch.cuda.is_available() and (device is None or device.startswith("cuda"))
    return "bfloat16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def label(name: str) -> str:
    """Return a name that may be published: a hub id, or of a local place its last part; after `open_clip:`, if it begins so.

    Example:
        >>> label("/home/me/my-model"), label("someone/their-model")
        ('my-model', 'someone/their-model')
    """
    if name.startswith(OPEN_CLIP):
        return OPEN_CLIP + label(name.removeprefix(OPEN_CLIP))
    if Path(name).exists():
        name = Path(name).resolve().name
    elif (file := hub_file(name)) is not None:
        name = f"{file.repo}/{file.path}"
    elif not re.fullmatch(_HUB_ID, name):
        name = Path(name).name
    return one_line(name, 100)


def home(settings: SamplingConfig) -> Path | None:
    """Return the folder that a threshold of this model belongs in: the adapter's, else the model's; None on the hub.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> home(SamplingConfig(str(BASE))) == BASE, home(SamplingConfig("someone/their-model"))
        (True, None)
    """
    place = Path(settings.lora_weights if settings.lora_weights is not None else settings.model)
    return place if place.is_dir() else place.parent if place.is_file() else None


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a file: .jsonl with "prompt" rows, or any other text, one prompt a line.

    Raises:
        UserError: the file cannot be read, holds no prompt, or one that no tokenizer takes.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = file.write_text('{"prompt": "a cat"}')
        >>> read_prompts(file)
        ['a cat']
    """
    try:
        # By line feeds only: other characters that split lines for Python may stand in a prompt.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read", rule=str(error), remedy="check the path") from None
    if rows := str(path).endswith(".jsonl"):
        prompts = [_prompt(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(
            f"{path} holds no prompt", remedy='write one {"prompt": "..."} a line' if rows else "write one a line"
        )
    check_prompts(prompts)
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f"{where} holds no prompt", rule='it must read {"prompt": "..."}')
    return prompt


def collect_prompts(entries: Sequence[str] | None) -> list[str]:
    """Return the prompts meant by a list in which each entry is a prompt, or a .jsonl file with "prompt" rows.

    Raises:
        UserError: a file cannot be read or holds no prompt.

    Example:
        >>> collect_prompts(["a cat", "a dog"])
        ['a cat', 'a dog']
    """
    prompts: list[str] = []
    for entry in entries or ():
        prompts += read_prompts(entry) if entry.endswith(".jsonl") else [entry]
    return prompts


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that no tokenizer takes: half of a surrogate pair is no text.

    Example:
        >>> check_prompts(["a cat", chr(0xD83D)])
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: prompt 2 cannot be encoded; it holds half of a surrogate pair; remove it
    """
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"prompt {number} cannot be encoded", rule="it holds half of a surrogate pair", remedy="remove it"
            ) from None


def say_cut(pipe: Any, prompts: Sequence[str]) -> dict[str, Cut]:
    """Return what the pipeline's text encoders do not read of prompts, by prompt, and say it in one line.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> say_cut(tiny_pipeline(), ["a cat", "a dog"])  # read whole
        {}
    """
    cuts = find_cut(prompts, *reading(of_pipeline(pipe), named_tokenizers(pipe)))
    if cuts:
        say(in_one_line(cuts, len(prompts), "prompts", f"number {cuts[0].index + 1}"))
    return {prompts[cut.index]: cut for cut in cuts}


def digest(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of a list of prompts.

    Example:
        >>> digest(["a cat", "a dog"]) == digest(["a dog", "a cat"])
        False
    """
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def load_pipeline(settings: SamplingConfig, *, safety_checker: bool = True) -> Any:
    """Load the pipeline with adapter and scheduler, quietly, on its device.

    Args:
        settings: which model, and how.
        safety_checker: keep the model's own, if it has one; it blanks images that it takes offence at.

    Raises:
        UserError: something cannot be loaded.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> load_pipeline(SamplingConfig(str(BASE), device="cpu", scheduler="ddim")).scheduler.config._class_name
        'DDIMScheduler'
    """
    import diffusers

    # Both print prompts (as they are, control characters included) and bars that would break ours.
    quiet()
    diffusers.utils.logging.set_verbosity_error()
    settings.check()
    model = settings.source()
    dtype: torch.dtype = getattr(torch, str(settings.dtype))
    try:
        options = {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}
        pipe = model.load_pipeline(dtype, **options)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, ...: all mean unusable files
        raise UserError(f"{settings.model} cannot be loaded", rule=one_line(f"{type(error).__name__}: {error}", 240),
                        remedy="give a whole Stable Diffusion pipeline with safetensors weights") from None  # fmt: skip
    if settings.lora_weights is not None:
        found = load_lora(pipe, settings.lora_weights)
        if found != settings.lora():
            raise UserError(
                f"the adapter {settings.lora_weights} changed while it was loaded", remedy="leave it alone meanwhile"
            )
        say(f"adapter {label(settings.lora_weights)}: {told(found)}")
    if settings.scheduler is not None:
        scheduler = getattr(diffusers, SCHEDULERS[settings.scheduler])
        # PNDM's first steps run the network on other inputs four times each; Stable Diffusion is sampled without.
        extra = {"skip_prk_steps": True} if settings.scheduler == "pndm" else {}
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **extra)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe = pipe.to(settings.device or own_device())
    except (RuntimeError, AssertionError) as error:  # no such device, or not enough memory on it
        raise UserError(f"the model does not go to {settings.device or 'the GPU'}", rule=one_line(error, 240),
                        remedy="give another --device") from None  # fmt: skip
    if pipe.device.type == "cuda":
        say(
            f"{label(settings.model)} runs in {settings.dtype} on {torch.cuda.get_device_name(pipe.device)}; --dtype float32 rounds as a CPU does, at a fraction of the speed"
        )
    if settings.base_above is not None:
        base = None if settings.base is None else settings.of(settings.base).source()
        BaseAbove(pipe, settings.base_above, None if base is None else base.load(base.family.network, dtype))
    return pipe


# --- the seeds -------------------------------------------------------------------------------------------------------


def image_seed(seed: int, prompt_index: int, image_index: int = 0) -> int:
    """Return the seed of one image: `(seed * 1_000_003 + prompt_index * 1_009 + image_index) mod 2**63`.

    Args:
        seed: of the whole run.
        prompt_index: place of the image's prompt, from 0.
        image_index: place of the image among those of its prompt, from 0 to 1008.

    Raises:
        UserError: there are more images of one prompt.

    Example:
        >>> image_seed(0, 2, 3)
        2021
    """
    check_images_per_prompt(image_index + 1)
    return (seed * 1_000_003 + prompt_index * MOST_IMAGES + image_index) % 2**63


def check_images_per_prompt(count: int, name: str = "images per prompt") -> None:
    """Raise a `UserError` unless from 1 to 1009 images of each prompt are asked for.

    Example:
        >>> check_images_per_prompt(2000)
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: images per prompt is 2000; it must be from 1 to 1009: seeds of more would collide
    """
    if not 1 <= count <= MOST_IMAGES:
        raise UserError(f"{name} is {count}", rule=f"it must be from 1 to {MOST_IMAGES}: seeds of more would collide")


@dataclass(frozen=True)
class Request:
    """Ask for one image: its prompt, and the two places that give its seed.

    Example:
        >>> Request("a cat", prompt_index=2, image_index=3).place
        (2, 3)
    """

    prompt: str
    prompt_index: int
    image_index: int = 0

    @property
    def place(self) -> tuple[int, int]:
        return self.prompt_index, self.image_index


def requests_for(prompts: Sequence[str], images_per_prompt: int = 1) -> list[Request]:
    """Return a request for every image, prompt by prompt.

    Example:
        >>> [request.place for request in requests_for(["a cat", "a dog"], 2)]
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    check_images_per_prompt(images_per_prompt)
    return [Request(prompt, p, i) for p, prompt in enumerate(prompts) for i in range(images_per_prompt)]


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """Hold one sampled image and what is known of it.

    Attributes:
        request: what was asked for.
        image: None where images were not decoded.
        report: what the guard saw; None without a guard.
        nsfw: whether the pipeline's own safety checker blanked it; None: it has none.

    Example:
        >>> Sampled(Request("a cat", 0), image=None, report=None, nsfw=None).request.prompt
        'a cat'
    """

    request: Request
    image: Image.Image | None
    report: ImageReport | None
    nsfw: bool | None


def generate(
    pipe: Any,
    requests: Sequence[Request],
    config: SamplingConfig,
    *,
    guard: MemorizationGuard | None = None,
    decode: bool = True,
    state: Any = None,
    bar: Mapping[str, Any] | None = None,
) -> Iterator[list[Sampled]]:
    """Sample images and yield them as they come, in the order of the requests. Every image is a prompt of its own for the pipeline.

    To resume, ask only for what is missing.

    Args:
        pipe: from `load_pipeline`, or one of a model in training.
        requests: what is wanted.
        config: steps, scale, size, seed and batch size; the model that it names is not looked at.
        guard: of this pipeline: it is on during the pipeline's calls. None: nothing watches.
        decode: decode the latents; without, only the guard's reports are made.
        state: accelerate's `PartialState` or `Accelerator`: process r of N samples the batches r, r + N, ..., and every process yields the
            results of all. None: this process samples everything.
        bar: options of a tqdm progress bar, shown by the main process; None: none.

    Yields:
        The results of one batch; of several processes those of one batch each.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> config = SamplingConfig("tiny", num_inference_steps=1, resolution=32)
        >>> [[one.image.size for one in batch] for batch in generate(tiny_pipeline(), [Request("a cat", 0)], config)]
        [[(32, 32)]]
    """

    def sample(batch: Sequence[Request], options: dict[str, Any]) -> list[Sampled]:
        if guard is not None:
            guard.image_indices = [r.image_index for r in batch]
        with contextlib.nullcontext() if guard is None or active_guard(pipe) is guard else guard:
            out = pipe(prompt=[r.prompt for r in batch], output_type="pil" if decode else "latent", **options)
        images = out.images if decode else [None] * len(batch)
        blanked = (getattr(out, "nsfw_content_detected", None) if decode else None) or [None] * len(batch)
        reports = [None] * len(batch) if guard is None else guard.report
        rows = zip(batch, images, reports, blanked, strict=True)
        return [Sampled(r, image, report, None if nsfw is None else bool(nsfw)) for r, image, report, nsfw in rows]

    pipe.set_progress_bar_config(disable=True)
    yield from in_batches(pipe, requests, config, sample, state=state, bar=bar)


def in_batches(
    pipe: Any,
    requests: Sequence[Request],
    config: SamplingConfig,
    ask: Callable[[Sequence[Request], dict[str, Any]], list[T]],
    *,
    state: Any = None,
    bar: Mapping[str, Any] | None = None,
) -> Iterator[list[T]]:
    """Ask something of a pipeline for every request, from the noise with which `generate` would sample it.

    Args:
        ask: takes the requests of a batch and the options of the pipeline's call; returns one result, which can be pickled, for each.
        pipe, requests, config, state, bar: as in `generate`.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> config = SamplingConfig("tiny", resolution=32, batch_size=2)
        >>> batches = in_batches(tiny_pipeline(), requests_for(["a cat"], 3), config, lambda batch, options: [options["width"]] * len(batch))
        >>> list(batches)
        [[32, 32], [32]]
    """
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    rank, ranks = (0, 1) if state is None else (state.process_index, state.num_processes)
    batches = [requests[i : i + config.batch_size] for i in range(0, len(requests), config.batch_size)]
    with tqdm(**{"total": len(requests), "unit": "image", **(bar or {}), "disable": bar is None or rank > 0}) as shown:
        for first in range(0, len(batches), ranks):
            # A process that is left without a batch does the last one again: of a sharded network each must call as often as the others.
            batch = batches[min(first + rank, len(batches) - 1)]
            found = ask(batch, _options(pipe, config, batch))
            if ranks > 1:
                found = gather_object(found if first + rank < len(batches) else [])
            yield found
            shown.update(len(found))


def _options(pipe: Any, config: SamplingConfig, batch: Sequence[Request]) -> dict[str, Any]:
    """Return the options of a pipeline's call for a batch: steps, scale, size, the generators and what they give first."""
    how = config.describe(pipe)
    family = of_pipeline(pipe)
    shape = (1, *family.start_shape(pipe, (how.width, how.height)))
    generators = [torch.Generator().manual_seed(image_seed(config.seed, *request.place)) for request in batch]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    # In the precision in which the pipeline would draw it, which in training need not be the network's.
    encoder = getattr(pipe, "text_encoder", None) or network_of(pipe)
    dtype = torch.float32 if family.exact_start else encoder.dtype
    return {
        "latents": family.start(noise).to(pipe.device, dtype), "generator": generators, "num_inference_steps": config.num_inference_steps,
        **family.guided(pipe, config.scale_of(pipe), len(batch)), "height": how.height, "width": how.width,
    }  # fmt: skip


# --- several processes -----------------------------------------------------------------------------------------------


def processes() -> Any:
    """Return accelerate's `PartialState`: of one process, or of those that `accelerate launch` has started.

    Example:
        >>> processes().num_processes
        1
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which Accelerator reads by itself


def own_device() -> str:
    """Return the device of this process: its GPU where there is one, else the CPU.

    Example:
        >>> own_device() in ("cpu", "cuda")
        True
    """
    state = processes()
    return str(state.device) if state.num_processes > 1 else "cuda" if torch.cuda.is_available() else "cpu"


def say(text: str) -> None:
    """Print a line of the command's, once however many processes there are.

    Example:
        >>> say("ready")
        ambient-sd: ready
    """
    if processes().is_main_process:
        print(f"ambient-sd: {text}", flush=True)


def from_main(make: Callable[[], T]) -> T:
    """Return on every process what `make` gives on the main one: what it reads or writes may lie on that machine alone.

    Example:
        >>> from_main(lambda: 2 + 3)
        5
    """
    from accelerate.utils import broadcast_object_list

    state = processes()
    made: list[Any] = [make() if state.is_main_process else None]
    return broadcast_object_list(made)[0] if state.num_processes > 1 else made[0]


# --- the model -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _fitted(adapter: str, path: Path, _: tuple[int, ...], model: Model) -> dict[str, Any]:
    """Return the record of an adapter that fits a model, read from the model's configurations; by the file's time and size, once."""
    return fit(read(path, adapter), model.skeleton(), model.family).record()
