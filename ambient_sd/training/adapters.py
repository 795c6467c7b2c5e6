"""LoRA and DoRA on the U-Net through peft: attach, save, load; a LoRA also in kohya's format.

    W' = W + (alpha / rank) B A          A gaussian, B zero: training starts at the base model

The saved file holds rank, alpha and target modules as metadata; without them a reader must guess alpha = rank and the
update comes back at the wrong scale. Merging is not done here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ambient_sd.data.stream import keyed_seed
from ambient_sd.families import lora
from ambient_sd.families.base import Base
from ambient_sd.families.family import Family
from ambient_sd.families.lora import WEIGHTS_NAME, Adapter
from ambient_sd.training.config import DEFAULT_TARGETS, TrainConfig
from ambient_sd.utils.errors import UserError, one_line

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


def check_targets(network: torch.nn.Module, targets: Sequence[str]) -> None:
    """Check that every target names a layer of the network; it needs no weights.

    Raises:
        UserError: a name fits no layer.

    Example:
        >>> check_targets(torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2)}), ["to_q"])
    """
    names = [name for name, module in network.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    for target in targets:
        if not any(_named(name, [target]) for name in names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names if not name[-1].isdigit()})
            raise UserError(
                f"lora_target_modules names {target!r}",
                rule="no linear or convolution layer of the U-Net has this name or ending",
                remedy=f"some that exist: to_out.0, {', '.join(ends[:12])}",
            )


def _named(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def read_start(source: str, base: Base) -> Adapter:
    """Read the adapter that a training starts from; no weights of the base are needed.

    Args:
        source: folder, .safetensors file or hub id.
        base: the base model.

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
        ([x for x in found.layers if x.part != found.network], "updates of {0.part}", "give an adapter of the U-Net alone"),
        ([x for x in found.layers if x.bias is not None], "a bias of {0.path}", "give an adapter without biases"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"lora_weights {source} holds {what.format(wrong[0])}",
                            rule="training goes on with every weight of an adapter or not at all", remedy=remedy)  # fmt: skip
    return found


def settle(config: TrainConfig, start: Adapter, network: torch.nn.Module) -> TrainConfig:
    """Return the settings with rank, alpha, layers and kind of the adapter that the training starts from.

    Where layers differ in rank or alpha, the settings name that of most layers.

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
    known = lora.peft_settings(start.layers, start.rslora[start.network])
    paths, names = set(known["target_modules"]), [name for name, _ in network.named_modules()]
    # Endings, as a person would give them, in place of a path for each layer.
    ends = sorted(_find_minimal_target_modules(paths, set(names) - paths))
    found = {"rank": known["r"], "lora_alpha": float(known["lora_alpha"]), "use_dora": known["use_dora"],
             "lora_target_modules": ends if set(ends) != set(DEFAULT_TARGETS) else list(DEFAULT_TARGETS)}  # fmt: skip
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
    start: Adapter | None = None,
) -> list[AddressedDropout]:  # fmt: skip
    """Add a LoRA in float32 to a U-Net whose own weights are frozen from here on.

    Args:
        unet: UNet2DConditionModel, any dtype.
        rank: r.
        alpha: the update is scaled by alpha / r.
        targets: layer names.
        seed: seed of the gaussian start of A, and of dropout.
        dropout: share of the update's input that is dropped in training.
        dora: train the length of each row of W' too.
        start: adapter to begin from, bit for bit; its layers, ranks and alphas then stand in place of those above.

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
    unet.requires_grad_(False)
    shape: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), "use_dora": dora}
    if start is not None:
        shape = lora.peft_settings(start.layers, start.rslora[start.network])
    settings = LoraConfig(**shape, init_lora_weights="gaussian", lora_dropout=dropout)
    # peft draws from the global generator: borrow it with our seed, and give it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(settings)
    # Trained weights in half precision lose small updates, and the fp16 scaler refuses them.
    cast_training_params(unet, dtype=torch.float32)
    if start is not None:
        state = {f"{layer.path}.{key}": value for layer in start.layers for key, value in layer.tensors()}
        if wrong := _fill(unet, state):
            raise UserError(f"lora_weights {start.file.label} did not reach the U-Net whole", rule=wrong[0])
    return _install(unet, p=dropout, seed=seed) if dropout else []


def _install(unet: Any, *, p: float, seed: int) -> list[AddressedDropout]:
    """Put addressed dropout of share `p` in place of peft's own into every adapted layer, and return the modules."""
    placed = []
    for name, layer in unet.named_modules():
        if "default" in getattr(layer, "lora_dropout", {}):
            layer.lora_dropout["default"] = AddressedDropout(p, seed=seed, layer=name)
            placed.append(layer.lora_dropout["default"])
    return placed


def save(unet: Any, folder: Path, family: Family) -> None:
    """Write the LoRA with its metadata to `folder/pytorch_lora_weights.safetensors`.

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
    settings = unet.peft_config["default"].to_dict()
    # The file may be published without the base's path on this machine; and JSON has no sets.
    settings["base_model_name_or_path"] = None
    # diffusers leaves the dropout of a loaded LoRA on while it samples, and no two images of a seed are equal.
    settings["lora_dropout"] = 0.0
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    # In peft's names. `convert_state_dict_to_diffusers` renames the attention layers only, and a reader that takes a file
    # with both kinds of names drops one kind without a word.
    family.save_lora(folder, get_peft_model_state_dict(unet), plain)
    _settle(folder / WEIGHTS_NAME)


def save_kohya(unet: Any, folder: Path, family: Family) -> None:
    """Write the LoRA to `folder/pytorch_lora_weights_kohya.safetensors`, as sd-scripts and ComfyUI name things.

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
    settings = unet.peft_config["default"]
    theirs = family.kohya_names(unet)
    layers = {}
    for name, value in get_peft_model_state_dict(unet).items():
        path, rest = name.split(".lora_", 1)
        layers[f"unet.{theirs.get(path, path)}.lora_{rest}"] = value
    converted = convert_state_dict_to_kohya(layers)
    # diffusers writes the rank as every layer's alpha.
    state = {
        name: torch.tensor(float(settings.lora_alpha)) if name.endswith(".alpha") else value.detach().cpu().contiguous()
        for name, value in converted.items()
    }
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.r),
        "ss_network_alpha": str(float(settings.lora_alpha)),
    }
    save_file(state, folder / KOHYA_NAME, metadata=metadata)
    _settle(folder / KOHYA_NAME)


def _settle(path: Path) -> None:
    """Sort a safetensors file's metadata, whose order changes from process to process: same weights, same bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def load(unet: Any, folder: Path) -> None:
    """Read weights that `save` wrote into a U-Net with the same adapter attached.

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
        >>> load(unet, folder)
    """
    path = folder / WEIGHTS_NAME
    try:
        wrong = _fill(unet, {name.removeprefix("unet."): value for name, value in load_file(path).items()})
    except Exception as error:  # SafetensorError, OSError, shape mismatch (RuntimeError)
        raise UserError(
            f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300], remedy="use another checkpoint"
        ) from None
    if wrong:
        raise UserError(f"{path} belongs to another adapter", rule=f"{len(wrong)} weights are missing, unknown or of another shape, the first is {wrong[0]}",
                        remedy="use another checkpoint")  # fmt: skip


def _fill(unet: Any, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Put values by peft's names into an attached adapter; return the names that are missing, unknown or not held as given."""
    expected = {name: value.shape for name, value in get_peft_model_state_dict(unet).items()}
    wrong = sorted(expected.keys() ^ state.keys()) or [n for n, v in state.items() if v.shape != expected[n]]
    if not wrong:
        set_peft_model_state_dict(unet, dict(state), adapter_name="default")
        held = get_peft_model_state_dict(unet)
        wrong = [n for n, value in state.items() if not torch.equal(held[n].cpu(), value.to(held[n].dtype))]
    return wrong
