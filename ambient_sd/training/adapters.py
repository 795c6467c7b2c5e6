"""LoRA, DoRA, LoHa and LoKr on the U-Net, and text encoders, through peft: attach, save, load; also in the format of kohya and LyCORIS.

    W' = W + (alpha / rank) B A          A gaussian, B zero: training starts at the base model

The saved file holds rank, alpha and target modules as metadata; without them a reader must guess alpha = rank and the
update comes back at the wrong scale. LoHa and LoKr are saved twice: as the LoRA that they are exactly, which stock diffusers reads, and
as their factors in LyCORIS's names, from which a run resumes. Merging is not done here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ambient_sd.data.stream import keyed_seed
from ambient_sd.families import lora, lycoris, rank_schedule
from ambient_sd.families.base import Base
from ambient_sd.families.family import Family
from ambient_sd.families.lora import WEIGHTS_NAME, Adapter
from ambient_sd.families.rank_schedule import RankSchedule
from ambient_sd.training.config import LYCORIS, MOVED_BASE, TrainConfig
from ambient_sd.utils.errors import UserError, one_line

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # as in diffusers' scripts
_NONE: Mapping[str, Any] = MappingProxyType({})
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"


class AddressedDropout(torch.nn.Module):
    """Drop entries of x by masks that are a function of (seed, layer, place in the run): `y = m x / (1 - p)`, m ~ Bernoulli(1 - p).

    `torch.nn.Dropout` takes from the global generator of its device: a resumed run, another cut into batches or a recomputed
    activation would drop other entries. Masks are drawn on the device of x; another kind of device gives another mask.
    x is (B, ...), and `positions` must name the B samples before each forward pass in training.

    Args:
        p: share that is dropped, in [0, 1).
        seed: seed of the run.
        layer: name of the layer, so that two layers drop other entries.

    Example:
        >>> dropout = AddressedDropout(0.5, seed=0, layer="to_q")
        >>> dropout.positions = [7]
        >>> torch.equal(dropout(torch.ones(1, 8)), dropout(torch.ones(1, 8)))
        True
    """

    def __init__(self, p: float, *, seed: int, layer: str) -> None:
        super().__init__()
        self.p, self.seed, self.layer = p, seed, layer
        self.positions: Sequence[int] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        if len(self.positions) != len(x):
            raise ValueError(f"{len(self.positions)} positions for {len(x)} samples")
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for row, position in zip(keep, self.positions, strict=True):
            g = torch.Generator(x.device).manual_seed(keyed_seed(self.seed, "lora_dropout", self.layer, position))
            row.bernoulli_(1.0 - self.p, generator=g)
        return x * keep / (1.0 - self.p)


def check_targets(network: torch.nn.Module, targets: Sequence[str], init: str | None = None, rank: int = 1) -> None:
    """Check that every target names layers of the network and nothing else, and such that can begin as asked; it needs no weights.

    Raises:
        UserError: a name fits no layer, something that is none, or one that `init` cannot start at this rank.

    Example:
        >>> check_targets(torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2)}), ["to_q"])
    """
    layers = {name: m for name, m in network.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    names = list(layers)
    for target in targets:
        if not any(_named(name, [target]) for name in names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names if not name[-1].isdigit()})
            raise UserError(
                f"lora_target_modules names {target!r}",
                rule="no linear or convolution layer of the network has this name or ending",
                remedy=_inside(network, names, target) or f"some that exist: to_out.0, {', '.join(ends[:12])}",
            )
        others = [name for name, _ in network.named_modules() if name not in layers and _named(name, [target])]
        if others:  # which peft refuses with a traceback
            kind, layer = type(network.get_submodule(others[0])).__name__, next(n for n in names if _named(n, [target]))
            inside = _inside(network, names, target) or "name layers alone"
            raise UserError(f"lora_target_modules names {target!r}", rule=f"{others[0]} is no layer but a {kind}",
                            remedy=f"{inside}; for the others their whole names, such as {layer}")  # fmt: skip
    for name, layer in layers.items():
        if init not in (None, "kaiming") and _named(name, targets):
            if isinstance(layer, torch.nn.Conv2d):
                raise UserError(f"lora_init is {init}", rule=f"it starts linear layers, and {name} is a convolution",
                                remedy="use gaussian or kaiming, or leave this layer out of lora_target_modules")  # fmt: skip
            if init in MOVED_BASE and rank > min(layer.weight.shape):
                raise UserError(f"rank is {rank} with lora_init {init}", rule=f"{name} has {min(layer.weight.shape)} components",
                                remedy="lower the rank")  # fmt: skip


def _inside(network: torch.nn.Module, layers: Sequence[str], target: str) -> str:
    """Say which layers stand inside what a target names; nothing where there are none."""
    found = dict.fromkeys(
        target + layer.removeprefix(name)
        for name, _ in network.named_modules() if name not in layers and _named(name, [target])
        for layer in layers if layer.startswith(f"{name}.")
    )  # fmt: skip
    return f"name the layers inside it: {', '.join([*found][:4])}" if found else ""


def _named(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def read_start(source: str, base: Base, *, text: bool = False) -> Adapter:
    """Read the adapter that a training starts from; no weights of the base are needed.

    Args:
        source: folder, .safetensors file or hub id.
        base: the base model.
        text: text encoders are trained too.

    Raises:
        UserError: it does not fit the base whole, or holds what is not trained here.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.families.base import check_base
        >>> read_start("./none", check_base(str(BASE)))
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: adapter is ./none; there is no .safetensors file and no folder with pytorch_lora_weights.safetensors
    """
    found = lora.fit(lora.read(lora.locate(source), source), base.skeleton(), base.family)
    for wrong, what, remedy in (
        ([x for x in found.layers if x.part != found.network and not text], "updates of {0.part}", "give --train_text_encoder too"),
        ([x for x in found.layers if x.bias is not None], "a bias of {0.path}", "give an adapter without biases"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"lora_weights {source} holds {what.format(wrong[0])}",
                            rule="training goes on with every weight of an adapter or not at all", remedy=remedy)  # fmt: skip
    return found


def settle(config: TrainConfig, start: Adapter, network: torch.nn.Module, usual: Sequence[str] = ()) -> TrainConfig:
    """Return the settings with rank, alpha, layers and kind of the adapter that the training starts from.

    Where layers differ in rank or alpha, the settings name that of most layers.

    Args:
        config: the settings.
        start: the adapter.
        network: what it changes.
        usual: the family's usual layers, to be named in their order.

    Raises:
        UserError: a setting is given and is another than the adapter's.

    Example:
        >>> layer = lora.Layer("unet", "to_q", torch.ones(8, 16), torch.ones(16, 8), None, None, alpha=4.0, scale=0.5)
        >>> start = Adapter(lora.LoraFile("mine", None, "0" * 64, {}), [layer], ["PEFT"], "metadata", {"unet": False}, "unet")
        >>> config = TrainConfig("base-model", train_data_dir="my-images", lora=True, lora_weights="mine")
        >>> config = settle(config, start, torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 16)}))
        >>> config.rank, config.lora_alpha, config.lora_target_modules
        (8, 4.0, ['to_q'])
    """
    mine = [layer for layer in start.layers if layer.part == start.network]
    if not mine:
        raise UserError(
            f"lora_weights {start.file.label} changes no layer of the {start.network}",
            remedy="give an adapter that does",
        )
    if len(kinds := sorted({layer.kind for layer in start.layers})) > 1:
        raise UserError(f"lora_weights {start.file.label} holds {' and '.join(kinds)}", rule="one kind of adapter is trained",
                        remedy="give an adapter of one kind")  # fmt: skip
    known = lora.peft_settings(mine, start.rslora[start.network])
    if ranked := [layer.said for layer in mine if layer.said and layer.said[0]]:
        known["r"], known["lora_alpha"] = (Counter(of).most_common(1)[0][0] for of in zip(*ranked, strict=True))
    paths, names = set(known["target_modules"]), [name for name, _ in network.named_modules()]
    # Endings, as a person would give them, in place of a path for each layer.
    ends = sorted(_find_minimal_target_modules(paths, set(names) - paths))
    found = {"lora_kind": kinds[0].lower(), "rank": known["r"], "lora_min_rank": None if start.schedule is None else start.schedule.min_rank,
             "lora_alpha": float(known["lora_alpha"]), "use_dora": known["use_dora"],
             "lora_target_modules": ends if set(ends) != set(usual) else list(usual)}  # fmt: skip
    for name, value in found.items():
        given = getattr(config, name)
        same = {path for path in names if _named(path, given)} == paths if isinstance(given, list) else given == value
        if given not in (None, False) and not same:
            raise UserError(f"{name} is {given}", rule=f"the adapter of lora_weights has {one_line(value, 200)}",
                            remedy=f"leave {name} out")  # fmt: skip
    settled = dataclasses.replace(config, **found)
    settled.resolution_given = config.resolution_given
    return settled


def attach(
    unet: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int, dropout: float = 0.0, dora: bool = False,
    part: str = "unet", start: Adapter | None = None, init: str | None = None, rslora: bool = False, checkpoint: Path | None = None,
    kind: str | None = None, schedule: RankSchedule | None = None,
) -> list[AddressedDropout]:  # fmt: skip
    """Add a LoRA in float32 to a U-Net or text encoder whose own weights are frozen from here on.

    Args:
        unet: the part of the pipeline, any dtype; its name in it is `part`.
        rank: r.
        alpha: the update is scaled by alpha / r.
        targets: layer names.
        seed: seed of the gaussian start of A, and of dropout.
        dropout: share of the update's input that is dropped in training.
        dora: train the length of each row of W' too.
        init: how the update begins, one of `LORA_INITS`; None: gaussian.
        rslora: the update is scaled by alpha / sqrt(r).
        checkpoint: folder that `save` wrote to, to be given to `load` afterwards; says with what `init` began.
        start: adapter to begin from, bit for bit; its layers, ranks and alphas then stand in place of those above.
        kind: lora, loha or lokr; None: lora.
        schedule: how the rank depends on the timestep; of a start that has a schedule, its own.

    Raises:
        UserError: `start` did not reach the layers whole.

    Returns:
        The dropout modules, which must be told the places of the samples before each forward pass; none without dropout.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> unet = tiny_pipeline().unet
        >>> layers = attach(unet, rank=4, alpha=4.0, targets=["to_q"], seed=0, dropout=0.1)
        >>> sum(p.requires_grad for p in unet.parameters()) == 2 * len(layers)  # A and B of each
        True
    """
    text = part.startswith("text_encoder")
    unet.requires_grad_(False)
    shape: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "use_dora": dora,
        "use_rslora": rslora,
    }
    layers = [] if start is None else [layer for layer in start.layers if layer.part == part]
    if start is not None and layers:
        shape = lora.peft_settings(layers, start.rslora[part])
    moved = init in MOVED_BASE
    begins: Any = True if init == "kaiming" or (moved and checkpoint is not None) else init or "gaussian"
    settings: Any
    if kind in LYCORIS:
        paths, more = shape["target_modules"], {"init_weights": "lycoris"} if kind == "lokr" else {}
        settings = {"loha": LoHaConfig, "lokr": LoKrConfig}[kind](r=rank, alpha=alpha, target_modules=paths, **more)  # type: ignore[arg-type]
    else:
        settings = LoraConfig(**shape, init_lora_weights=begins, lora_dropout=dropout)
    whole = {name: m.weight.clone() for name, m in unet.named_modules() if moved and _named(name, targets)}
    # peft draws from the global generator: borrow it with our seed, and give it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would move the GPU's too
        if not text:
            unet.add_adapter(settings)
        else:  # transformers' own method asks for a newer peft than its loader does
            inject_adapter_in_model(settings, unet, "default")
    if text:
        for module in unet.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # of attention: its masks would come from the global generator
    if kind in LYCORIS:
        _settle_factors(unet, {layer.path: layer for layer in layers})
    # Trained weights in half precision lose small updates, and the fp16 scaler refuses them.
    cast_training_params(unet, dtype=torch.float32)
    if moved:
        _move(
            unet,
            whole,
            None
            if checkpoint is None
            else {n: b for n, (_, b) in _halves(_of_part(_tensors(checkpoint / WEIGHTS_NAME), part, unet)).items()},
        )
    if start is not None and layers:
        state = {
            f"{layer.path}.{key}": value for layer in layers for key, value in (layer.native.items() or layer.tensors())
        }
        if wrong := _fill(unet, state):
            raise UserError(f"lora_weights {start.file.label} did not reach the {part} whole", rule=wrong[0])
    if (schedule := (start and start.schedule) or schedule) is not None and not text:
        rank_schedule.install(unet, "default", schedule)
    return _install(unet, p=dropout, seed=seed, part=part) if dropout else []


class _Never:
    """Stand for a share of updates that are skipped in training: none.

    peft asks whether a draw of the global generator is above it. Above 0.0 it is not once in 2^24 times, and fake tensors cannot say.
    """

    def __lt__(self, draw: object) -> bool:
        return True


def _settle_factors(unet: Any, start: Mapping[str, lora.Layer]) -> None:
    """Make the layers of LoHa or LoKr what LyCORIS's readers take them for, in the shapes of what is started from."""
    for path, module in [(n, m) for n, m in unet.named_modules() if "default" in getattr(m, "module_dropout", {})]:
        module.module_dropout["default"] = _Never()
        if path in start:
            own, module.alpha["default"] = start[path].said or (None, 1.0)
            module.r["default"], module.scaling["default"] = own or 1, start[path].scale
            device, native = module.get_base_layer().weight.device, start[path].native
            for name in module.adapter_layer_names:
                held = {"default": native[name].to(device, copy=True)} if name in native else {}
                setattr(module, name, torch.nn.ParameterDict(held))
        elif not any("default" in getattr(module, name) for name in module.adapter_layer_names if name.endswith("_b")):
            # Two whole halves are taken as they are by every reader but peft.
            module.r["default"], module.alpha["default"], module.scaling["default"] = 1, 1.0, 1.0


def _factors(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of LoHa or LoKr by layer and name; none of a LoRA."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in get_peft_model_state_dict(unet).items():
        path, _, last = name.rpartition(".")
        if last in lycoris.NAMES:
            found.setdefault(path, {})[last] = value.detach().cpu().contiguous()
    return found


def _install(unet: Any, *, p: float, seed: int, part: str) -> list[AddressedDropout]:
    """Put addressed dropout of share `p` in place of peft's own into every adapted layer, and return the modules."""
    placed = []
    for name, layer in unet.named_modules():
        if "default" in getattr(layer, "lora_dropout", {}):
            layer.lora_dropout["default"] = AddressedDropout(
                p, seed=seed, layer=f"{part}.{name}" if part.startswith("text_encoder") else name
            )
            placed.append(layer.lora_dropout["default"])
    return placed


def _move(unet: Any, whole: Mapping[str, torch.Tensor], begun: Mapping[str, torch.Tensor] | None) -> None:
    """Take what the update begins with, that of peft or of a checkpoint, out of the base: `W <- W - s B0 A0`, and remember it.

    peft does so too, in an order of its own for each start; a resumed run must come to the same bits without its decomposition.
    """
    if begun is not None:
        _fill(unet, begun)
    unet.peft_config["default"].init_lora_weights = True  # of the file that is saved
    unet.begun = {name: value.detach().clone().cpu() for name, value in get_peft_model_state_dict(unet).items()}
    with torch.no_grad():
        for path, weight in whole.items():
            layer = unet.get_submodule(path)
            update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            layer.get_base_layer().weight.copy_(weight.float() - update)


def _halves(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return what is trained and what it began with of a saved adapter whose base was moved, by name."""
    found = {}
    for name, value in state.items():
        trained, begun = value.chunk(2, dim=1 if "lora_B" in name else 0)
        found[name] = trained.contiguous(), (-begun if "lora_B" in name else begun).contiguous()
    return found


def plain(unet: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the adapter as every reader takes it: a LoRA on the untouched base whose scale is alpha / rank.

        s (B A - B0 A0) = s [B, -B0] [A; A0]          what began at B0 A0 has twice the rank in the file

    LoHa and LoKr are of a higher rank in it (`ambient_sd.families.lycoris`).

    Returns:
        Its tensors by peft's names, and peft's settings as plain JSON, with the alpha of every layer that has one of its own.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> unet = tiny_pipeline().unet
        >>> modules = attach(unet, rank=4, alpha=4.0, targets=["to_q"], seed=0, rslora=True)
        >>> plain(unet)[1]["lora_alpha"]
        8.0
    """
    config, state = unet.peft_config["default"], get_peft_model_state_dict(unet)
    if factors := _factors(unet):
        layers = []
        for path, tensors in factors.items():
            module = unet.get_submodule(path)
            kind, down, up = lycoris.as_lora(tensors, module.get_base_layer().weight.shape)
            s = module.scaling["default"]
            layers.append(lora.Layer("", path, down, up, None, None, s * len(down), s, kind))
        config = LoraConfig(**lora.peft_settings(layers, rslora=False))
        state = {f"{layer.path}.{key}": value for layer in layers for key, value in layer.tensors()}
    # peft keeps sets, which JSON has not. The file may be published without the base's path on this machine. And diffusers leaves the
    # dropout of a loaded LoRA on while it samples: no two images of a seed would be equal.
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    settings |= {"base_model_name_or_path": None, "lora_dropout": 0.0}
    begun = getattr(unet, "begun", None)
    if begun is not None:
        state = {
            name: torch.cat(
                [value.cpu(), -begun[name] if "lora_B" in name else begun[name]], dim=1 if "lora_B" in name else 0
            )
            for name, value in state.items()
        }
        settings |= {"r": 2 * config.r}
    if begun is not None or config.use_rslora:
        factor = 1 if begun is None else 2
        alphas = {path: factor * m.r["default"] * m.scaling["default"] for path, m in lora.adapted(unet, "default")}
        most = Counter(alphas.values()).most_common(1)[0][0]
        settings |= {"use_rslora": False, "lora_alpha": most,
                     "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != most}}  # fmt: skip
    return state, settings


def save(
    unet: Any, folder: Path, family: Family, text: Mapping[str, Any] = _NONE, head: Mapping[str, str] = _NONE
) -> None:
    """Write the LoRA, with those of text encoders, its metadata and `head` to `folder/pytorch_lora_weights.safetensors`.

    Of LoHa and LoKr that is the LoRA that they are; `save_kohya`'s file beside it holds their factors.

    Example:
        >>> import tempfile
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.base import Model
        >>> unet, folder = tiny_pipeline().unet, Path(tempfile.mkdtemp())
        >>> modules = attach(unet, rank=4, alpha=4.0, targets=["to_q"], seed=0)
        >>> save(unet, folder, Model(str(BASE)).family)
        >>> [path.name for path in folder.iterdir()]
        ['pytorch_lora_weights.safetensors']
    """
    # In peft's names. `convert_state_dict_to_diffusers` renames the attention layers only, and a reader that takes a file
    # with both kinds of names drops one kind without a word.
    parts = {family.network: plain(unet)}
    for part, encoder in text.items():
        layers, settings = plain(encoder)
        parts[part] = {_clip_name(name): value for name, value in layers.items()}, settings
    family.save_lora(folder, parts)
    _settle(folder / WEIGHTS_NAME, {**head, **rank_schedule.head(unet, "default")})
    if _factors(unet):
        save_kohya(unet, folder, family, text, head)


def save_kohya(
    unet: Any, folder: Path, family: Family, text: Mapping[str, Any] = _NONE, head: Mapping[str, str] = _NONE
) -> None:
    """Write the LoRA and `head` to `folder/pytorch_lora_weights_kohya.safetensors`, as sd-scripts and ComfyUI name things.

    Readers of this format scale the update by `alpha / rank` with the alpha of each layer in the file.

    Example:
        >>> import tempfile
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.base import Model
        >>> unet, folder = tiny_pipeline().unet, Path(tempfile.mkdtemp())
        >>> modules = attach(unet, rank=4, alpha=4.0, targets=["to_q"], seed=0)
        >>> save_kohya(unet, folder, Model(str(BASE)).family)
        >>> [path.name for path in folder.iterdir()]
        ['pytorch_lora_weights_kohya.safetensors']
    """
    state: dict[str, torch.Tensor] = {}
    config, module, more = unet.peft_config["default"], "networks.lora", dict[str, str]()
    found = {"r": config.r, "lora_alpha": getattr(config, "alpha", None)}
    for part, network in {family.network: unet, **text}.items():
        if factors := _factors(network):
            module, more = "lycoris.kohya", {"ss_network_args": json.dumps({"algo": config.peft_type.value.lower()})}
            for path, key in _kohya_keys(network, part, family, factors).items():
                state |= {f"{key}.{name}": value for name, value in factors[path].items()}
                state[f"{key}.alpha"] = torch.tensor(float(network.get_submodule(path).alpha["default"]))
            continue
        tensors, settings = plain(network)
        keys = _kohya_keys(network, part, family, [name.split(".lora_", 1)[0] for name in tensors])
        for name, value in tensors.items():
            path, rest = name.split(".lora_", 1)
            state[f"{keys[path]}.lora_{'down' if rest == 'A.weight' else 'up'}.weight"] = (
                value.detach().cpu().contiguous()
            )
            # diffusers' own converter writes the rank as every layer's alpha.
            alpha = settings["alpha_pattern"].get(f"^{re.escape(path)}", settings["lora_alpha"])
            state[f"{keys[path]}.alpha"] = torch.tensor(float(alpha))
        found = settings if part == family.network else found
    metadata = {
        "format": "pt",
        "ss_network_module": module,
        "ss_network_dim": str(found["r"]),
        "ss_network_alpha": str(float(found["lora_alpha"])),
        **more,
    }
    save_file(state, folder / KOHYA_NAME, metadata=metadata)
    _settle(folder / KOHYA_NAME, {**head, **rank_schedule.head(unet, "default")})


def _kohya_keys(network: Any, part: str, family: Family, paths: Iterable[str]) -> dict[str, str]:
    """Return what layers of a part are called in kohya's files, by path."""
    theirs = family.kohya_names(network) if part == family.network else {}
    named = {path: theirs.get(path, path) if part == family.network else _clip_name(path) for path in paths}
    return {path: family.kohya_prefix(part) + name.replace(".", "_") for path, name in named.items()}


def _clip_name(name: str) -> str:
    """Return a layer of CLIP by the longer name: transformers 5 has no `text_model` around its layers, readers of every age know one."""
    return f"text_model.{name.removeprefix('text_model.')}"


def _settle(path: Path, head: Mapping[str, str]) -> None:
    """Add to a safetensors file's metadata and sort them: their order changes from process to process. Same weights, same bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted({**header["__metadata__"], **head}.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def load(unet: Any, folder: Path, family: Family, text: Mapping[str, Any] = _NONE) -> None:
    """Read weights that `save` wrote into a U-Net, and text encoders, with the same adapter attached.

    Raises:
        UserError: the file is missing or damaged, or is not this adapter, tensor for tensor.

    Example:
        >>> import tempfile
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.base import Model
        >>> unet, folder = tiny_pipeline().unet, Path(tempfile.mkdtemp())
        >>> modules = attach(unet, rank=4, alpha=4.0, targets=["to_q"], seed=0)
        >>> save(unet, folder, Model(str(BASE)).family)
        >>> load(unet, folder, Model(str(BASE)).family)
    """
    parts = {family.network: unet, **text}
    factors = {part: found for part, module in parts.items() if (found := _factors(module))}
    path = folder / (KOHYA_NAME if factors else WEIGHTS_NAME)
    held = _tensors(path)
    if factors:
        keys = {
            key: f"{part}.{path}"
            for part, found in factors.items()
            for path, key in _kohya_keys(parts[part], part, family, found).items()
        }
        split = [(name.partition("."), value) for name, value in held.items() if not name.endswith(".alpha")]
        held = {f"{keys.get(key, key)}.{last}": value for (key, _, last), value in split}
    wrong = [name for name in held if name.partition(".")[0] not in parts]
    for part, module in parts.items():
        state = _of_part(held, part, module)
        if (begun := getattr(module, "begun", None)) is not None:
            halves = _halves(state)
            state = {name: trained for name, (trained, _) in halves.items()}
            wrong += [name for name, (_, b) in halves.items() if name not in begun or not torch.equal(b, begun[name])]
        wrong = wrong or _fill(module, state)
    if wrong:
        raise UserError(f"{path} belongs to another adapter", rule=f"{len(wrong)} weights are missing, unknown or of another shape, the first is {wrong[0]}",
                        remedy="use another checkpoint")  # fmt: skip


def _of_part(tensors: Mapping[str, torch.Tensor], part: str, module: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a part of a saved adapter by peft's names in the module."""
    inner = (
        f"{part}." if not part.startswith("text_encoder") or hasattr(module, "text_model") else f"{part}.text_model."
    )
    return {n.removeprefix(inner).removeprefix(f"{part}."): v for n, v in tensors.items() if n.startswith(f"{part}.")}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a saved adapter."""
    try:
        return dict(load_file(path))
    except Exception as error:  # SafetensorError, OSError
        raise UserError(
            f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300], remedy="use another checkpoint"
        ) from None


def _fill(unet: Any, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Put values by peft's names into an attached adapter; return the names that are missing, unknown or not held as given."""
    expected = {name: value.shape for name, value in get_peft_model_state_dict(unet).items()}
    wrong = sorted(expected.keys() ^ state.keys()) or [n for n, v in state.items() if v.shape != expected[n]]
    if not wrong:
        set_peft_model_state_dict(unet, dict(state), adapter_name="default")
        held = get_peft_model_state_dict(unet)
        wrong = [n for n, value in state.items() if not torch.equal(held[n].cpu(), value.to(held[n].dtype))]
    return wrong
