"""The one loader of LoRA files, for every command and for Python: every tensor of a file reaches a layer, or nothing is loaded.

    W' = W + s B A,   s = alpha / rank   (rsLoRA: alpha / sqrt(rank))

diffusers warns about tensors that it has no place for and goes on without them: a model that was never fine-tuned is then measured in
the fine-tune's name. Here the names of a file are looked up among the layers that the pipeline has, in six schemes:

    diffusers   unet.down_blocks.0....to_q.lora_A.weight, text_encoder.*, text_encoder_2.*; also .lora.down., .processor.to_q_lora.down.
    PEFT        base_model.model.down_blocks.0....to_q.lora_A.weight
    bare        down_blocks.0....to_q.lora_A.weight
    OneTrainer  lora_transformer_transformer_blocks_0_...to_q.lora_down.weight
    kohya       lora_unet_down_blocks_0_...to_q.lora_down.weight, lora_te_*, lora_te1_*, lora_te2_*; also in Stability's (sgm) names;
                lycoris_down_blocks_0_... as LyCORIS and SimpleTuner have it
    ComfyUI     diffusion_model.input_blocks.1.1....to_q.lora_down.weight; also in diffusers' names

Before the pipeline is touched it is known that nothing is left over, no half of a pair is missing, shapes fit, and the update is not zero.
Afterwards the layers are read back: each holds the file's values, bit for bit, at the right scale, switched on. If not, the pipeline
is put back as it was. alpha comes from the file's alpha tensors, from diffusers' metadata, or from the adapter_config.json that PEFT
writes beside its file; where none says it, it is the rank, as diffusers has it, and the record says so.

Taken: LoRA and DoRA of linear and convolution layers, for every family, and LoHa, LoKr and LoRA in Tucker form as the LoRA that they are
exactly (`ambient_sd.families.lycoris`). A LoRA of a layer that is several here, such as queries, keys and values in one, is taken apart. Not taken: pickle, and every other kind. A rank that depends
on the noise level is kept (`ambient_sd.families.rank_schedule`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ambient_sd.families import lycoris, of_pipeline, rank_schedule
from ambient_sd.families.family import Family
from ambient_sd.families.rank_schedule import RankSchedule
from ambient_sd.families.sgm import layers_in
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.hub_ids import hub_file

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # diffusers'
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_METADATA_KEY = "lora_adapter_metadata"  # of diffusers, in the head of a file
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Part = str  # down, up, mid (of Tucker), alpha, magnitude, bias, or a tensor of `lycoris.NAMES`

# How names end, and what they end in says; "_lora.down" is diffusers' oldest format.
_ENDINGS: dict[str, Part] = {
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down", "_lora.down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up", "_lora.up.weight": "up",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude", ".dora_scale": "magnitude",
    ".lora_B.bias": "bias", ".lora_B.default.bias": "bias", ".lora_mid.weight": "mid",
    **{f".{name}{end}": name for name in sorted(lycoris.NAMES) for end in ("", ".default")},
}  # fmt: skip
_OLDEST = {
    "network": {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"},
    "text encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_OTHER_KINDS = {
    r"boft_": "BOFT", r"oft_": "OFT", r"lora_embedding_": "a LoRA of an embedding", r"\.on_input$|ia3_": "IA3", r"\.diff(_b)?$": "differences of whole weights",
    r"vera_": "VeRA", r"\.[ab][12]\.weight$": "GLoRA", r"lora_controlnet": "Control-LoRA",
    r"^bundle_emb|^emb_params|string_to_param": "textual inversion", r"modules_to_save": "layers trained whole (modules_to_save)",
}  # fmt: skip
_TRANSFORMER = re.compile(
    r"^(transformer[._]|lora_transformer_|(diffusion_model\.|model\.diffusion_model\.|base_model\.model\.|lora_unet_)?"
    r"(double_blocks|single_blocks|joint_blocks|single_transformer_blocks|(joint_)?transformer_blocks|blocks|(double_|single_)?layers)[._]\d)"
)
# Settings of peft that say nothing about what a finished adapter computes, or that are read here.
_HARMLESS = frozenset({
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "target_modules", "exclude_modules",
    "lora_dropout", "init_lora_weights", "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "layers_to_transform", "layers_pattern", "modules_to_save", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    # of LoHa and LoKr, whose tensors say the rest
    "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "decompose_both", "decompose_factor", "init_weights",
})  # fmt: skip
# The others (pissa, olora, loftq, corda, lora_ga) change the base's own weights, which the file does not hold.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraFile:
    """Hold what a file (or a state dict) contains.

    Attributes:
        label: what messages call it.
        name: of the file; None: a state dict.
        sha256: of the file's bytes; of a state dict, of its names, types, shapes and values.
        tensors: by their names.
        metadata: of the file's head.
        config: contents of PEFT's adapter_config.json; None without.

    Example:
        >>> tensors = {"conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "conv_in.lora_B.weight": torch.ones(16, 1, 1, 1)}
        >>> LoraFile("my-lora", "my.safetensors", "0" * 64, tensors).name
        'my.safetensors'
    """

    label: str
    name: str | None
    sha256: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    config: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Layer:
    """Hold the update of one layer, in the shapes that the layer has: `down` is A, `up` is B.

    Attributes:
        part: of the pipeline, the network or a text encoder.
        path: of the layer in it.
        down, up: `(rank, in)` and `(out, rank)`; of a convolution `(rank, in, h, w)` and `(out, rank, 1, 1)`.
        magnitude: DoRA's length of each row, `(out,)`, of a convolution `(1, out, 1, 1)`; None: plain LoRA.
        bias: of B, `(out,)`; None: none.
        alpha: the update is scaled by `scale`, which is alpha / rank, or alpha / sqrt(rank) under rsLoRA.
        kind: what the file has in its place, LoRA, LoHa or LoKr.
        said: rank (None: whole halves) and alpha of LoHa or LoKr as the file has them; None: those of the update.
        native: tensors of LoHa or LoKr by the names of `lycoris.KINDS`.

    Example:
        >>> layer = Layer("unet", "to_q", torch.ones(4, 16), torch.zeros(16, 4), None, None, alpha=4.0, scale=1.0)
        >>> layer.rank, layer.moves()
        (4, False)
    """

    part: str
    path: str
    down: Tensor
    up: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    alpha: float
    scale: float
    kind: str = "LoRA"
    said: tuple[int | None, float] | None = None
    native: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield its tensors by peft's names for them."""
        named = {"lora_A.weight": self.down, "lora_B.weight": self.up, "lora_B.bias": self.bias}
        named["lora_magnitude_vector"] = self.magnitude
        yield from ((name, tensor) for name, tensor in named.items() if tensor is not None)

    def moves(self) -> bool:
        """Say whether s B A is anything but zero, in float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return bool((product * self.scale != 0).any()) or (self.bias is not None and bool(self.bias.any()))


@dataclass(frozen=True)
class Adapter:
    """Hold a file whose every tensor has its place in a pipeline.

    Attributes:
        file: where it comes from.
        layers: all updates.
        schemes: how its tensors are named.
        alpha_from: what says alpha.
        rslora: per part, whether the scale is alpha / sqrt(rank).
        network: which part is the denoising network.
        schedule: how its rank in the network depends on the timestep; None: not at all.

    Example:
        >>> layer = Layer("unet", "to_q", torch.ones(4, 16), torch.ones(16, 4), None, None, alpha=8.0, scale=2.0)
        >>> file = LoraFile("my-lora", "my.safetensors", "0" * 64, {})
        >>> Adapter(file, [layer], ["PEFT"], "metadata", {"unet": False}, "unet").record()["rank"]
        4
    """

    file: LoraFile
    layers: Sequence[Layer] = field(repr=False)
    schemes: Sequence[str]
    alpha_from: str
    rslora: Mapping[str, bool]
    network: str
    schedule: RankSchedule | None = None

    def record(self) -> dict[str, Any]:
        """Return what outputs say of it, for JSON: which file, and what of it was loaded."""
        said = [layer.said or (layer.rank, layer.alpha) for layer in self.layers]
        kinds = sorted({"DoRA" if x.magnitude is not None and x.kind == "LoRA" else x.kind for x in self.layers})
        return {
            "file": None if self.file.name is None else one_line(self.file.name, 100), "sha256": self.file.sha256,
            "kind": " + ".join(kinds),
            "scheme": " + ".join(self.schemes), "tensors": len(self.file.tensors), "layers": len(self.layers),
            "parts": dict(sorted(Counter(layer.part for layer in self.layers).items())),
            "rank": _one_or_all({rank or "whole" for rank, _ in said}),
            "alpha": _one_or_all({alpha for _, alpha in said}), "alpha_from": self.alpha_from,
            **({} if self.schedule is None else {"min_rank": self.schedule.min_rank}),
        }  # fmt: skip


def load_lora(
    pipe: Any,
    source: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    low_cpu_mem_usage: bool = True,
    **hub: Any,
) -> dict[str, Any]:
    """Load a LoRA into a pipeline, whole or not at all, and return its record.

    Args:
        pipe: a pipeline of a known family.
        source: folder, .safetensors file, hub id, or a state dict.
        adapter_name: as in diffusers.
        weight_name, subfolder: which file of a folder or repository; without, `choose` says.
        low_cpu_mem_usage: as in diffusers.
        **hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        UserError: there is no such file, or a tensor of it does not reach a layer; the pipeline is then as it was.

    Example:
        >>> load_lora(pipe, "my-lora")["layers"]  # doctest: +SKIP
        32
    """
    if isinstance(source, Mapping):
        file = read_state_dict(source)
    else:
        place = locate(source, weight_name=weight_name, subfolder=subfolder, **hub)
        file = read(place, str(source))
    adapter = fit(file, parts_of(pipe), of_pipeline(pipe))
    attach(pipe, adapter, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    return adapter.record()


def told(record: Mapping[str, Any]) -> str:
    """Return a record in a line.

    Example:
        >>> what = {"kind": "LoRA", "rank": 4, "alpha": 8.0, "alpha_from": "metadata", "layers": 32}
        >>> told({"file": "my.safetensors", "scheme": "PEFT", "sha256": "0123456789abcdef", **what})
        'my.safetensors: LoRA of rank 4, alpha 8.0 (metadata), on 32 layers, PEFT names, 0123456789ab'
    """
    rank = f"{record['min_rank']} to {record['rank']} by noise level" if "min_rank" in record else record["rank"]
    said = f"{record['kind']} of rank {rank}, alpha {record['alpha']} ({record['alpha_from']}), on {record['layers']} layers"
    return f"{one_line(record['file'], 60)}: {one_line(said, 160)}, {record['scheme']} names, {record['sha256'][:12]}"


# --- which file ------------------------------------------------------------------------------------------------------


def choose(names: Sequence[str], where: str, weight_name: str | None = None) -> str:
    """Return the file of a folder that is the adapter.

    The one asked for; else diffusers' `pytorch_lora_weights.safetensors`; else PEFT's `adapter_model.safetensors`; else the only
    .safetensors file.

    Raises:
        UserError: there is none, only pickle, or several of which none has such a name.

    Example:
        >>> choose(["adapter_model.safetensors", "other.safetensors"], "a folder")
        'adapter_model.safetensors'
    """
    if weight_name is not None:
        refuse_pickle(weight_name)
        if weight_name not in names:
            raise UserError(f"{where} has no file {weight_name!r}", remedy="check weight_name")
        return weight_name
    for name in (WEIGHTS_NAME, PEFT_NAME):
        if name in names:
            return name
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{where} holds {len(found)} .safetensors files, {found[0]!r} and {found[1]!r} among them",
                        rule=f"one adapter is loaded, and none is called {WEIGHTS_NAME}",
                        remedy="name the file; in Python with weight_name")  # fmt: skip
    for name in sorted(names):
        if name.endswith(_PICKLES):
            refuse_pickle(name)
    raise UserError(f"adapter is {where}", rule=f"there is no .safetensors file and no folder with {WEIGHTS_NAME}")


def refuse_pickle(name: str) -> None:
    """Refuse every file that is not safetensors: pickle runs what it holds.

    Example:
        >>> refuse_pickle("my-lora.bin")
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: the adapter is 'my-lora.bin'; only .safetensors files are loaded: pickle can run any code; save it as safetensors
    """
    if not name.endswith(".safetensors"):
        raise UserError(f"the adapter is {name!r}", rule="only .safetensors files are loaded: pickle can run any code",
                        remedy="save it as safetensors")  # fmt: skip


def locate(
    source: str | Path, *, weight_name: str | None = None, subfolder: str | None = None, **hub: Any
) -> Path:  # fmt: skip
    """Return the local path of an adapter's file; one on the hub is downloaded.

    Args:
        source: folder, .safetensors file, hub id, or a file on the hub, such as owner/name/my.safetensors.
        weight_name, subfolder: as in diffusers.
        **hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        UserError: there is none, or it is pickle.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "my.safetensors").touch()
        >>> locate(folder).name
        'my.safetensors'
    """
    path, text = Path(source), str(source)
    if path.is_file():
        refuse_pickle(path.name)
        return path
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        return folder / choose(names, text, weight_name)
    if (file := hub_file(text)) is not None and weight_name is None and subfolder is None and not path.exists():
        inside, _, last = file.path.rpartition("/")
        return _from_hub(file.repo, last, inside, hub | ({"revision": file.revision} if file.revision else {}))
    if path.exists() or path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise UserError(f"adapter is {text}", rule=f"there is no .safetensors file and no folder with {WEIGHTS_NAME}")
    return _from_hub(text, weight_name, subfolder, hub)


def _from_hub(repo: str, weight_name: str | None, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    where = {key: value for key, value in options.items() if value is not None}
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""

    def get(name: str) -> Path:
        found = Path(hf_hub_download(repo, prefix + name, **where))
        if name == PEFT_NAME:  # its alpha
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(repo, prefix + PEFT_CONFIG, **where)
        return found

    try:
        if weight_name is not None:
            refuse_pickle(weight_name)
            return get(weight_name)
        for name in (WEIGHTS_NAME, PEFT_NAME):
            with contextlib.suppress(EntryNotFoundError):  # also: not in the cache, and no connection
                return get(name)
        told = {key: where[key] for key in ("revision", "token") if key in where}
        files = [] if where.get("local_files_only") else HfApi().list_repo_files(repo, **told)
        inside = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
        return get(choose([name for name in inside if "/" not in name], repo))
    except UserError:
        raise
    except Exception as error:  # no such repository or file, no connection: all mean that it cannot be had
        raise UserError(f"the adapter {repo} cannot be loaded", rule=one_line(f"{type(error).__name__}: {error}", 240),
                        remedy="check the name, weight_name and the connection") from None  # fmt: skip


# --- what it holds ---------------------------------------------------------------------------------------------------


def read(path: Path, label: str | None = None) -> LoraFile:
    """Read a .safetensors file whole, with PEFT's adapter_config.json if that is what it belongs to.

    Raises:
        UserError: it cannot be read, or holds no LoRA.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "my.safetensors"
        >>> safetensors.torch.save_file({"to_q.lora_A.weight": torch.ones(4, 16), "to_q.lora_B.weight": torch.ones(16, 4)}, file)
        >>> sorted(read(file).tensors)
        ['to_q.lora_A.weight', 'to_q.lora_B.weight']
    """
    shown = str(path) if label is None else label
    refuse_pickle(path.name)
    try:
        with safetensors.safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
        _require_lora(names, shown)  # before a whole model is read
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        config = path.with_name(PEFT_CONFIG)
        known = json.loads(config.read_text(encoding="utf-8")) if path.name == PEFT_NAME and config.is_file() else None
        if not isinstance(known, dict | None):
            raise ValueError(f"{PEFT_CONFIG} is no object")
    except UserError:
        raise
    except Exception as error:  # SafetensorError, OSError, ValueError, KeyError of unknown types: unusable files
        raise UserError(f"the adapter {shown} cannot be loaded", rule=one_line(f"{type(error).__name__}: {error}", 240),
                        remedy="give a LoRA for this model, in safetensors") from None  # fmt: skip
    return LoraFile(shown, path.name, hashlib.sha256(data).hexdigest(), tensors, metadata, known)


def read_state_dict(tensors: Mapping[str, Tensor]) -> LoraFile:
    """Take a state dict for a file.

    Raises:
        UserError: it holds no LoRA, or something that is no tensor.

    Example:
        >>> file = read_state_dict({"to_q.lora_A.weight": torch.ones(4, 16), "to_q.lora_B.weight": torch.ones(16, 4)})
        >>> file.label, len(file.tensors)
        ('the state dict', 2)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name!r} in the state dict is a {type(tensor).__name__}", rule="each value is a tensor")
        plain = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(plain.dtype), list(plain.shape)]).encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data if plain.numel() else b"")
    _require_lora(list(tensors), "the state dict")
    return LoraFile("the state dict", None, digest.hexdigest(), {k: v.detach().cpu() for k, v in tensors.items()})


def _require_lora(names: Sequence[str], label: str) -> None:
    for name in names:
        for pattern, kind in _OTHER_KINDS.items():
            if re.search(pattern, name):
                raise UserError(f"the adapter {label} holds {kind}: {name!r}", rule="taken are LoRA, DoRA, LoHa and LoKr",
                                remedy="convert it, or fuse it into the base and give the whole model")  # fmt: skip
    if not holds_lora(names):
        first = f", the first is {names[0]!r}" if names else ""
        raise UserError(f"the adapter {label} holds no LoRA: {len(names)} tensors{first}",
                        rule="its tensors are called lora_A and lora_B, lora_down and lora_up, hada_ or lokr_",
                        remedy="give a LoRA; a whole model is given as MODEL")  # fmt: skip


def holds_lora(names: Iterable[str]) -> bool:
    """Tell by the names of its tensors whether a file holds a LoRA.

    Example:
        >>> holds_lora(["lora_unet_mid_block_to_q.lora_down.weight"]), holds_lora(["model.diffusion_model.out.2.bias"])
        (True, False)
    """
    return any(_split(name) for name in names)


def _split(name: str) -> tuple[str, Part] | None:
    """Return what a tensor belongs to and what it is of it; None if its name does not end like one of a LoRA."""
    for ending, part in _ENDINGS.items():
        if name.endswith(ending):
            stem = name.removesuffix(ending)
            if ending.startswith("_lora"):
                stem += "_lora"
            return stem.replace(".processor.", "."), part
    return None


# --- where it belongs ------------------------------------------------------------------------------------------------


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the parts of a pipeline that a LoRA can change.

    Raises:
        UserError: adapters are not loaded into pipelines of its family.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> sorted(parts_of(tiny_pipeline()))
        ['text_encoder', 'unet']
    """
    family = of_pipeline(pipe)
    if not isinstance(getattr(pipe, family.network, None), nn.Module) or not family.lora_prefixes:
        raise UserError(
            f"{type(pipe).__name__} has no {family.network}",
            rule="adapters change the network of a pipeline, and some its text encoders",
        )
    named = {name: getattr(pipe, name, None) for name in family.lora_prefixes}
    return {name: part for name, part in named.items() if isinstance(part, nn.Module)}


@dataclass(frozen=True)
class _Target:
    scheme: str
    part: str
    paths: tuple[str, ...]  # several: their rows are one below the other
    swapped: bool = False  # the two halves of its rows stand in the other order


def _known(parts: Mapping[str, nn.Module], family: Family) -> dict[str, _Target | None]:
    """Return every name under which a layer, or several as one, may stand in a file; None where it would be that of two."""
    known: dict[str, _Target | None] = {}

    def add(name: str, scheme: str, part: str, *paths: str, swapped: bool = False) -> None:
        before = known.get(name)
        target = _Target(scheme, part, paths, swapped)
        other = before is not None and replace(before, scheme=scheme) != target
        known[name] = None if other or (before is None and name in known) else before or target

    for part, module in parts.items():
        is_network = part == family.network
        original = family.original_names(module) if is_network else {}
        bare = {"": "bare", "base_model.model.": "PEFT"} if is_network else {}
        prefixes = bare | {
            f"{part}.": "diffusers",
            f"{part}.base_model.model.": "PEFT",
            f"base_model.model.{part}.": "PEFT",
        }
        prefixes |= family.lora_prefixes[part]
        oldest = _OLDEST["network" if is_network else "text encoder"]
        several = family.fused_names(module) if is_network else {}
        turned = {name: (path,) for path, name in (family.swapped_names(module) if is_network else {}).items()}
        for name, paths in (several | turned).items():
            for prefix, scheme in prefixes.items():
                spelled = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
                add(spelled, scheme, part, *paths, swapped=name in turned)
        for path in layers_in(module):
            # Newer versions of transformers have no text_model between the encoder and its layers.
            short = path.removeprefix("text_model.")
            for name in {path, original.get(path, path)} if is_network else {short, f"text_model.{short}"}:
                for prefix, scheme in prefixes.items():
                    add(prefix + (name.replace(".", "_") if prefix.endswith("_") else name), scheme, part, path)
                for end, theirs in oldest.items():
                    if name.endswith(f".{theirs}"):
                        for prefix in ("", f"{part}.") if is_network else (f"{part}.",):
                            add(f"{prefix}{name.removesuffix(theirs)}{end}_lora", prefixes[prefix], part, path)
    return known


def fit(file: LoraFile, parts: Mapping[str, nn.Module], family: Family) -> Adapter:
    """Find the layer that each tensor of a file belongs to; the networks are only looked at, and may be without storage.

    Args:
        file: from `read`.
        parts: those of the base that a LoRA can change, by name.
        family: of the base.

    Raises:
        UserError: a tensor is left over, missing, of a wrong shape or not finite, or the update is zero everywhere.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe, down, up = tiny_pipeline(), torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1)
        >>> file = read_state_dict({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up})
        >>> fit(file, parts_of(pipe), of_pipeline(pipe)).record()["parts"]
        {'unet': 1}
    """
    _require_lora(list(file.tensors), file.label)
    known, modules = _known(parts, family), {part: layers_in(network) for part, network in parts.items()}
    found: dict[tuple[str, str], dict[Part, tuple[str, Tensor]]] = {}
    schemes: dict[str, None] = {}
    left = []
    for name, tensor in file.tensors.items():
        split = _split(name)
        target = None if split is None else known.get(split[0])
        if split is None or target is None:
            left.append(name)
            continue
        for path, piece in _pieces(file, name, split[1], tensor, target, modules[target.part]):
            place = found.setdefault((target.part, path), {})
            if split[1] in place:
                raise _unfit(file, f"has two tensors for one place, {place[split[1]][0]!r} and {name!r}")
            place[split[1]] = (name, piece)
        schemes[target.scheme] = None
    if left:
        what = f"{len(left)} of {len(file.tensors)} tensors of the adapter {file.label} belong to no layer of this {family.pipeline}"
        wrong = family.network == "unet" and any(_TRANSFORMER.match(name) for name in left)
        rule = "it was made for a transformer, such as SD3 or Flux, and the base has a U-Net" if wrong else (
            "an adapter is loaded whole or not at all"
        )  # fmt: skip
        raise UserError(f"{what}, the first is {one_line(left[0], 160)!r}", rule=rule,
                        remedy="give the base that it was trained on")  # fmt: skip
    configs = _configs(file, parts, family.network)
    layers, sources = [], set()
    for (part, path), tensors in found.items():
        layer, source = _layer(file, part, path, modules[part][path], tensors, configs.get(part, {}))
        layers.append(layer)
        sources.add(source)
    _check_settings(file, layers, configs, modules, family.network)
    adapter = Adapter(
        file, layers, list(schemes), " + ".join(sorted(sources)),
        {part: bool(configs.get(part, {}).get("use_rslora")) for part in parts}, family.network,
        RankSchedule.read(file.metadata, file.label),
    )  # fmt: skip
    if adapter.schedule is not None and any(x.magnitude is not None or x.kind != "LoRA" for x in layers):
        raise _unfit(
            file, f"has a rank that depends on the noise level, and is a {adapter.record()['kind']}", "give a LoRA"
        )
    if not any(layer.magnitude is not None or layer.moves() for layer in layers):
        raise _changes_nothing(file, len(layers))
    return adapter


def _pieces(
    file: LoraFile, name: str, kind: Part, tensor: Tensor, target: _Target, modules: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what of a tensor is whose: of one layer for several A and alpha are all theirs, and the rows of B each one's own.

    [W1; W2] + s [B1; B2] A  =  [W1 + s B1 A; W2 + s B2 A]

    Where the halves of a layer's rows stand in the other order, those of B do.
    """
    plain = len(target.paths) == 1 and not target.swapped
    if plain or kind in ("down", "alpha"):
        yield from ((path, tensor) for path in target.paths)
        return
    rows = [modules[path].weight.shape[0] for path in target.paths]
    if kind not in ("up", "bias"):
        what = "a layer whose halves are swapped" if target.swapped else f"{len(rows)} layers at once"
        raise _unfit(file, f"has {name!r} for {what}", "LoRA alone is taken apart: give one")
    if tensor.shape[:1] != (sum(rows),):
        raise _unfit(file, f"has a shape that does not fit: {name!r} is {tuple(tensor.shape)}, and {' + '.join(target.paths)} have {sum(rows)} rows",
                     "give the base that it was trained on")  # fmt: skip
    if target.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    yield from zip(target.paths, tensor.split(rows), strict=True)


def _unfit(file: LoraFile, what: str, remedy: str = "give the file as it was saved") -> UserError:
    return UserError(f"the adapter {file.label} {what}", rule="an adapter is loaded whole or not at all", remedy=remedy)


def _changes_nothing(file: LoraFile, layers: int) -> UserError:
    return UserError(f"the adapter {file.label} changes no weight: its update is zero in all {layers} layers",
                     rule="images of the base are not images of a fine-tune",
                     remedy="leave it out to measure the base, or give a trained one")  # fmt: skip


def _layer(
    file: LoraFile, part: str, path: str, module: Any, given: Mapping[Part, tuple[str, Tensor]], config: Mapping[str, Any]
) -> tuple[Layer, str]:  # fmt: skip
    """Return the update of one layer, checked against it, and what said its alpha; LoHa, LoKr and Tucker forms as a product of two."""
    where = f"{part}.{path}"
    for name, tensor in given.values():
        if tensor.dtype not in _DTYPES or not bool(torch.isfinite(tensor).all()):
            held = "values that are not finite" if tensor.dtype in _DTYPES else f"numbers of type {tensor.dtype}"
            raise _unfit(
                file, f"has {held} in {name!r}", "give one in float32, float16 or bfloat16 that was trained to its end"
            )
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise _unfit(file, f"changes {where}, a convolution in groups")
    given, product = dict(given), given.keys() & {"down", "up", "mid"}
    if product == {"down", "up", "mid"}:
        name, core = given.pop("mid")
        down = given["down"][1].double().flatten(1)
        if core.dim() != 4 or core.shape[1] != down.shape[0]:
            raise _unfit(file, f"has a shape that does not fit: {name!r} is {tuple(core.shape)}")
        given["down"] = name, torch.einsum("ij...,jx->ix...", core.double(), down).float()
    native = {key: given.pop(key)[1] for key in lycoris.NAMES & given.keys()}
    if not native:
        return _product(file, part, path, module, given, config)
    if product or "bias" in given:
        raise _unfit(file, f"has tensors of two kinds for {where}")
    try:
        rank = own = lycoris.rank_of(native)
        if own is None and config.get("r") is not None:
            rank = int(_number(file, "r", _of_layer(file, config, "rank_pattern", path, config["r"])))
        alpha, source = _alpha(file, part, path, rank or 1, given.pop("alpha", None), config)
        # Two whole halves stand as they are, whatever alpha, in every reader but peft.
        scale = alpha / rank if rank else 1.0
        if own is None and scale != 1 and "lokr_w1" in native:
            native["lokr_w1"], scale = native["lokr_w1"].float() * scale, 1.0
        kind, down, up = lycoris.as_lora(native, module.weight.shape)
    except UserError:
        raise
    except ValueError as why:
        raise _unfit(file, f"{why}, for {where}") from None
    given |= {"down": (where, down), "up": (where, up)}
    layer, _ = _product(file, part, path, module, given, {})
    said = (own, alpha if own else 1.0)
    return replace(layer, alpha=scale * layer.rank, scale=scale, kind=kind, said=said, native=native), source


def _product(
    file: LoraFile, part: str, path: str, module: Any, given: Mapping[Part, tuple[str, Tensor]], config: Mapping[str, Any]
) -> tuple[Layer, str]:  # fmt: skip
    """Return the update B A of one layer, checked against it, and what said its alpha."""
    where = f"{part}.{path}"
    for half, other in (("down", "up"), ("up", "down")):
        if half not in given:
            kept = given[other] if other in given else next(iter(given.values()))
            raise _unfit(file, f"has {kept[0]!r} and no {half} (lora_{'A' if half == 'down' else 'B'}) for {where}")
    rank = int(given["up"][1].shape[1]) if given["up"][1].dim() > 1 else 0
    if isinstance(module, nn.Conv2d):
        wide = (rank, module.in_channels, *module.kernel_size)
        high: tuple[int, ...] = (module.out_channels, rank, 1, 1)
        long: tuple[int, ...] = (1, module.out_channels, 1, 1)
    else:
        wide, high, long = (rank, module.in_features), (module.out_features, rank), (module.out_features,)
    down, up = (_shaped(file, *given[key], shape, where) for key, shape in (("down", wide), ("up", high)))
    magnitude = bias = None
    if "magnitude" in given:
        name, tensor = given["magnitude"]
        across = tensor.dim() > 1 and tensor.shape[0] == 1 and (name.endswith(".dora_scale") or tensor.dim() == 2)
        if across and high[0] != 1:
            raise _unfit(
                file,
                f"scales the columns of {where} ({name!r} is {tuple(tensor.shape)})",
                "DoRA scales rows: convert it",
            )
        magnitude = _shaped(file, name, tensor.reshape(-1), (high[0],), where).reshape(long)
    if "bias" in given:
        bias = _shaped(file, *given["bias"], (high[0],), where)
    alpha, source = _alpha(file, part, path, rank, given.get("alpha"), config)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Layer(part, path, down, up, magnitude, bias, alpha, scale), source


def _shaped(file: LoraFile, name: str, tensor: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """Return a tensor in the shape of its layer; only ones at the end may come or go, as between linear and 1 x 1."""
    if _without_ones(tensor.shape) != _without_ones(shape) or 0 in shape:
        raise _unfit(file, f"has a shape that does not fit: {name!r} is {tuple(tensor.shape)}, and {where} takes {tuple(shape)}",
                     "give the base that it was trained on")  # fmt: skip
    return tensor.reshape(tuple(shape))


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without ones at its end, but with its first two numbers."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def _alpha(
    file: LoraFile, part: str, path: str, rank: int, given: tuple[str, Tensor] | None, config: Mapping[str, Any]
) -> tuple[float, str]:  # fmt: skip
    """Return alpha of one layer, and what says so."""
    stated: float | None = None
    source = PEFT_CONFIG if file.config is not None else "metadata"
    if config.get("lora_alpha") is not None:
        stated = _number(file, "lora_alpha", _of_layer(file, config, "alpha_pattern", path, config["lora_alpha"]))
    told = config.get("r")
    if told is not None:
        told = _of_layer(file, config, "rank_pattern", path, told)
        if told != rank:
            raise _unfit(file, f"is of rank {rank} in {part}.{path}, and its settings say {one_line(told, 20)}")
    if given is not None:
        name, tensor = given
        if tensor.numel() != 1:
            raise _unfit(
                file, f"has a shape that does not fit: {name!r} is {tuple(tensor.shape)}, and alpha is one number"
            )
        value = _number(file, name, float(tensor.reshape(())))
        if stated is not None and value != stated:
            raise _unfit(file, f"has two alphas for {part}.{path}: {name!r} says {value:g}, its settings {stated:g}")
        return value, "alpha tensors"
    if stated is not None:
        return stated, source
    kohya = file.metadata.get("ss_network_alpha"), file.metadata.get("ss_network_dim")
    if kohya[0] not in (None, "None") and file.metadata.get("ss_network_module", "").startswith("networks."):
        try:
            same = float(kohya[0] or "nan") == float(kohya[1] or "nan")
        except ValueError:
            same = False
        if not same:
            raise _unfit(
                file,
                f"has no alpha for {part}.{path}, and its head says {one_line(kohya[0], 20)} at rank {one_line(kohya[1], 20)}",
            )
    return float(rank), "not stated: the rank"


def _number(file: LoraFile, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _unfit(file, f"has {name} {one_line(value, 20)}, which is no finite number")
    if value == 0:
        raise _unfit(file, f"has {name} 0, which switches its update off", "give the alpha that it was trained with")
    if value < 0:
        raise _unfit(file, f"has {name} {value:g}, which is below 0", "give the alpha that it was trained with")
    return float(value)


def _of_layer(file: LoraFile, config: Mapping[str, Any], key: str, path: str, default: Any) -> Any:
    """Return the setting of one layer by peft's rule: the first pattern that its name ends in."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise _unfit(file, f"has settings that cannot be read: {key}")
    for pattern, value in patterns.items():
        # A name with its dots plain or escaped, perhaps anchored; a stranger's expression may never end.
        if not re.fullmatch(r"\^?(\w|-|\\?\.)+\$?", pattern):
            raise _unfit(file, f"has a {key} that is no name of a layer: {one_line(pattern, 60)!r}")
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if path == name or (not pattern.startswith("^") and path.endswith(f".{name}")):
            return value
    return default


def _configs(file: LoraFile, parts: Mapping[str, nn.Module], network: str) -> dict[str, dict[str, Any]]:
    """Return peft's settings by part: those of the file's head, or of the adapter_config.json beside it."""
    found: dict[str, dict[str, Any]] = {}
    raw = file.metadata.get(_METADATA_KEY)
    if raw:
        try:
            values = dict(json.loads(raw))
        except (ValueError, TypeError, RecursionError):
            raise _unfit(file, f"has a head that cannot be read: {_METADATA_KEY}") from None
        for key, value in values.items():
            part, dot, name = str(key).partition(".")
            # Without a part: of the network's own `save_lora_adapter`.
            part, name = (part, name) if dot else (network, part)
            if part not in parts:
                raise _unfit(
                    file,
                    f"has settings for {one_line(part, 40)!r}, which the base has not",
                    "give the base that it was trained on",
                )
            found.setdefault(part, {})[name] = value
    if file.config is not None:
        found[network] = dict(file.config)
    for config in found.values():
        if _kind_of(config) != "LORA" and "alpha" in config:  # peft has another name for it in each kind
            config["lora_alpha"] = config.pop("alpha")
    return found


def _kind_of(config: Mapping[str, Any]) -> str:
    kind = config.get("peft_type")
    return "LORA" if kind is None else str(getattr(kind, "value", kind)).upper()


def _check_settings(
    file: LoraFile, layers: Sequence[Layer], configs: Mapping[str, Mapping[str, Any]], modules: Mapping[str, Mapping[str, nn.Module]],
    network: str,
) -> None:  # fmt: skip
    """Refuse settings under which the tensors mean something else, and layers that the settings name and the file lacks."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for part, config in configs.items():
        kinds = {layer.kind.upper() for layer in layers if layer.part == part}
        if config.get("peft_type") is not None and kinds - {_kind_of(config)}:
            raise _unfit(
                file,
                f"is of the kind {one_line(_kind_of(config), 30)}, and its tensors are not",
                "give a LoRA, LoHa or LoKr",
            )
        for key, value in config.items():
            if key not in _HARMLESS and value and value != defaults.get(key):
                raise _unfit(file, f"was trained with {one_line(key, 40)} {one_line(value, 40)}, which is not supported",
                             "fuse it into the base and give the whole model")  # fmt: skip
        start = config.get("init_lora_weights")
        if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS:
            raise _unfit(file, f"began from {one_line(start, 40)}, which changes the base's own weights",
                         "save it converted to a plain LoRA")  # fmt: skip
        held = [layer.path for layer in layers if layer.part == part]
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if config.get(key):
                break
        else:
            targets = config.get("target_modules")
            if isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets):
                ends = tuple(f".{target}" for target in targets)
                named = [path for path in modules[part] if path in targets or path.endswith(ends)]
                if missing := [path for path in named if path not in set(held)]:
                    raise _unfit(
                        file,
                        f"lacks {len(missing)} of {len(named)} layers that its settings name, the first is {part}.{missing[0]}",
                    )
        if config.get("use_dora") and not all(layer.magnitude is not None for layer in layers if layer.part == part):
            raise _unfit(file, f"is a DoRA without all its magnitudes in {part}")
        if config.get("lora_bias") and not all(layer.bias is not None for layer in layers if layer.part == part):
            raise _unfit(file, f"has not all the biases that its settings name in {part}")
    for part in modules:
        for name in ("magnitude", "bias"):
            have = [getattr(layer, name) is not None for layer in layers if layer.part == part]
            if any(have) and not all(have):
                raise _unfit(file, f"has a {name} in {sum(have)} of {len(have)} layers of {part}")
    if any(layer.bias is not None and layer.part != network for layer in layers):
        raise _unfit(file, "has biases of B in a text encoder, which is not supported")


# --- into the pipeline -----------------------------------------------------------------------------------------------


def attach(pipe: Any, adapter: Adapter, adapter_name: str | None = None, *, low_cpu_mem_usage: bool = True) -> str:
    """Load a fitted adapter by diffusers' own means, read the layers back, and return the adapter's name.

    Raises:
        UserError: the name is taken, or a layer does not hold what the file does; the pipeline is then as it was.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe, down, up = tiny_pipeline(), torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1)
        >>> file = read_state_dict({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up})
        >>> attach(pipe, fit(file, parts_of(pipe), of_pipeline(pipe)), "mine")
        'mine'
    """
    from diffusers.utils import get_adapter_name

    parts = parts_of(pipe)
    name = get_adapter_name(parts[adapter.network]) if adapter_name is None else adapter_name
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"adapter_name is {name!r}", rule="it is made of letters, digits, - and _")
    if any(name in getattr(part, "peft_config", {}) for part in parts.values()):
        raise UserError(f"there is an adapter {name!r} already", remedy="give another adapter_name, or unload it")
    before = _Before(parts)
    try:
        _inject(pipe, adapter, name, low_cpu_mem_usage)
        why = misplaced(parts, adapter, name)
    except Exception as error:
        before.restore(name)
        raise UserError(f"the adapter {adapter.file.label} cannot be loaded",
                        rule=one_line(f"{type(error).__name__}: {error}", 240),
                        remedy="give a LoRA for this model, in safetensors") from error  # fmt: skip
    if why is not None:
        before.restore(name)
        raise _unfit(
            adapter.file, f"did not reach the model whole: {why}", "report it with the versions of diffusers and peft"
        )
    if not any(layer.moves() for layer in adapter.layers) and not _lengths_move(parts, adapter, name):
        before.restore(name)
        raise _changes_nothing(adapter.file, len(adapter.layers))
    if adapter.schedule is not None:
        rank_schedule.install(parts[adapter.network], name, adapter.schedule)
    return name


def _inject(pipe: Any, adapter: Adapter, name: str, low_cpu_mem_usage: bool) -> None:
    by_part: dict[str, list[Layer]] = {}
    for layer in adapter.layers:
        by_part.setdefault(layer.part, []).append(layer)
    for part, layers in by_part.items():
        config = peft_settings(layers, adapter.rslora[part])
        if part == adapter.network:
            state = {f"{layer.path}.{key}": value for layer in layers for key, value in layer.tensors()}
            getattr(pipe, part).load_lora_adapter(
                state,
                prefix=None,
                metadata=config,
                adapter_name=name,
                _pipeline=pipe,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            continue
        theirs = {"lora_A.weight": "lora_linear_layer.down.weight", "lora_B.weight": "lora_linear_layer.up.weight"}
        state = {f"{part}.{layer.path}.{theirs.get(key, key)}": v for layer in layers for key, v in layer.tensors()}
        pipe.load_lora_into_text_encoder(
            state, network_alphas=None, text_encoder=getattr(pipe, part), prefix=part, adapter_name=name, _pipeline=pipe,
            metadata={f"{part}.{key}": value for key, value in config.items()}, low_cpu_mem_usage=low_cpu_mem_usage,
        )  # fmt: skip


def peft_settings(layers: Sequence[Layer], rslora: bool) -> dict[str, Any]:
    """Return what peft's LoraConfig is made of: nothing but what the tensors say.

    Example:
        >>> layer = Layer("unet", "to_q", torch.ones(4, 16), torch.ones(16, 4), None, None, alpha=8.0, scale=2.0)
        >>> settings = peft_settings([layer], rslora=False)
        >>> settings["r"], settings["lora_alpha"], settings["target_modules"]
        (4, 8.0, ['to_q'])
    """
    ranks, alphas = Counter(layer.rank for layer in layers), Counter(layer.alpha for layer in layers)
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": [layer.path for layer in layers],
        "rank_pattern": {f"^{re.escape(layer.path)}": layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {f"^{re.escape(layer.path)}": layer.alpha for layer in layers if layer.alpha != alpha},
        "use_rslora": rslora, "use_dora": layers[0].magnitude is not None, "lora_bias": layers[0].bias is not None,
    }  # fmt: skip


def misplaced(parts: Mapping[str, nn.Module], adapter: Adapter, name: str) -> str | None:
    """Say what differs between a file and the layers of a loaded model, or return None: they agree, value by value.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> pipe, down, up = tiny_pipeline(), torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1)
        >>> file = read_state_dict({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up})
        >>> misplaced(parts_of(pipe), fit(file, parts_of(pipe), of_pipeline(pipe)), "mine")  # not attached
        'unet.conv_in has no update'
    """
    expected = {(layer.part, layer.path): layer for layer in adapter.layers}
    found = {(part, path): module for part, network in parts.items() for path, module in adapted(network, name)}
    if extra := sorted(found.keys() - expected.keys()):
        return f"{'.'.join(extra[0])} has an update, and the file has none for it"
    for place, layer in expected.items():
        where, module = ".".join(place), found.get(place)
        if module is None:
            return f"{where} has no update"
        for key, value in layer.tensors():
            holder = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_B.bias": "lora_B"}.get(key, key)
            held = _stored(getattr(module, holder)[name], "bias" if key.endswith("bias") else "weight")
            if held is None or held.shape != value.shape or not torch.equal(held, value.to(held.dtype)):
                return f"{where} holds other values for {key}"
            if not bool(torch.isfinite(held).all()):
                return f"{where} cannot hold {key} in {held.dtype}"
        if bool(module.use_dora.get(name)) != (layer.magnitude is not None):
            return f"{where} takes LoRA for DoRA"
        if not math.isclose(module.scaling[name], layer.scale, rel_tol=1e-12):
            return f"{where} is scaled by {module.scaling[name]:g}, not {layer.scale:g}"
        if name not in module.active_adapters or module.disable_adapters or name in module.merged_adapters:
            return f"{where} is not switched on"
        if module.training and float(getattr(module.lora_dropout[name], "p", 0.0)):
            return f"{where} drops inputs"
    return None


@contextlib.contextmanager
def switched_off(*networks: nn.Module) -> Iterator[None]:
    """Let networks act without their adapters; layers that are off already stay so.

    By hand: peft's own switch turns gradients on as well, and all adapters, also of layers that were off.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> with switched_off(tiny_pipeline().unet):  # which has none
        ...     pass
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [m for network in networks for m in network.modules()]
    layers = [m for m in modules if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapted(network: nn.Module, name: str) -> list[tuple[str, Any]]:
    """Return the layers of a network that hold an adapter of a name.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> adapted(tiny_pipeline().unet, "default")
        []
    """
    from peft.tuners.lora import LoraLayer

    return [(path, m) for path, m in network.named_modules() if isinstance(m, LoraLayer) and (
        name in m.lora_A or name in m.lora_embedding_A)]  # fmt: skip


def _stored(module: nn.Module, key: str) -> Tensor | None:
    """Return a tensor of a layer on the CPU, also where accelerate keeps it elsewhere and leaves an empty one."""
    tensor = getattr(module, key, None)
    if tensor is not None and tensor.is_meta:
        from accelerate.utils import align_module_device

        with align_module_device(module, execution_device="cpu"):  # type: ignore[arg-type]
            tensor = getattr(module, key).detach().clone()
    return None if tensor is None or tensor.is_meta else tensor.detach().cpu()


def _lengths_move(parts: Mapping[str, nn.Module], adapter: Adapter, name: str) -> bool:
    """Say whether a DoRA whose B A is zero changes the lengths of a layer's rows by more than rounding."""
    for layer in adapter.layers:
        if layer.magnitude is None:
            continue
        weight = _stored(dict(adapted(parts[layer.part], name))[layer.path].get_base_layer(), "weight")
        if weight is None:
            return True
        lengths = weight.float().flatten(1).norm(dim=1)
        tolerance = 4 * max(torch.finfo(weight.dtype).eps, torch.finfo(layer.magnitude.dtype).eps)
        if not torch.allclose(layer.magnitude.float().flatten(), lengths, rtol=tolerance, atol=0.0):
            return True
    return False


class _Before:
    """Remember what loading an adapter changes in a pipeline's parts, and put it back."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._parts = dict(parts)
        self._flags = [(p, p.requires_grad) for part in parts.values() for p in part.parameters()]
        self._modes = [(m, m.training) for part in parts.values() for m in part.modules()]
        self._active = {id(m): (m, list(m.active_adapters)) for part in parts.values() for m in part.modules()
                        if isinstance(m, BaseTunerLayer)}  # fmt: skip
        self._loaded = {name: (getattr(part, "_hf_peft_config_loaded", None), dict(getattr(part, "peft_config", {})))
                        for name, part in parts.items()}  # fmt: skip

    def restore(self, name: str) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for part_name, part in self._parts.items():
            for path, module in list(part.named_modules()):
                if not isinstance(module, BaseTunerLayer):
                    continue
                if id(module) in self._active:
                    module.delete_adapter(name)
                else:
                    parent, _, last = path.rpartition(".")
                    setattr(part.get_submodule(parent), last, module.get_base_layer())
            loaded, configs = self._loaded[part_name]
            if configs:
                part.peft_config = configs  # type: ignore[assignment]
            elif hasattr(part, "peft_config"):
                del part.peft_config
            if hasattr(part, "_hf_peft_config_loaded"):
                part._hf_peft_config_loaded = loaded  # type: ignore[assignment]
        for module, active in self._active.values():
            module.set_adapter(active)
        for module, training in self._modes:
            module.training = training
        for parameter, wanted in self._flags:
            parameter.requires_grad_(wanted)


def _one_or_all(values: set[Any]) -> Any:
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    return ordered[0] if len(ordered) == 1 else ordered
