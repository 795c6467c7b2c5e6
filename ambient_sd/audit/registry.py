"""Features by the names that users give them: one list for every command, benchmark and test.

    pixels      RGB at 64 x 64; another side as pixels32             no weights
    standardized       the same without brightness and contrast             no weights
    edges       contours in any colour; another side as edges32      no weights
    efflite0    EfficientNet-Lite0                                   inside two packages
    sscd        SSCD                                                 --sscd FILE, or found (`features.Sscd`)
    sscd-wen    the same, prepared as by Wen et al. and DCR          --sscd FILE (sscd_disc_large)
    sscd-han    the same, prepared as by Han et al.                  --sscd FILE, or found
    dinov2      DINOv2                                               --dinov2 MODEL
    dinov2-paper  the same, prepared as by the paper's authors       --dinov2 MODEL
    inception   an Inception-v3                                      --inception FILE

What figures, folders of embeddings and audit.json call a feature (`pixels64`, `pixels64-standardized`, `EffLite0`, `SSCD`, ...) is a name of
it too, in any case. Nothing heavy is imported before a feature is made, so that commands can show their flags at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import check, option

if TYPE_CHECKING:
    import torch

    from ambient_sd.audit.features import Features

NAMES = (
    "pixels",
    "standardized",
    "edges",
    "efflite0",
    "sscd",
    "sscd-wen",
    "sscd-han",
    "dinov2",
    "dinov2-paper",
    "inception",
)
DEFAULT = (
    "pixels",
    "standardized",
    "edges",
    "efflite0",
)  # not what happens to be installed: one command, one verdict everywhere
WEIGHTS = ("sscd", "dinov2", "inception")
MAX_PIXELS = 256
_LABELS = {
    "efflite0": "EffLite0", "sscd": "SSCD", "sscd-wen": "SSCD-wen", "sscd-han": "SSCD-han", "dinov2": "DINOv2",
    "dinov2-paper": "DINOv2-paper", "inception": "Inception",
}  # fmt: skip
_NEEDED = ("dinov2", "dinov2-paper", "inception")
_PIXELS = re.compile(r"pixels([1-9]\d{0,3})?(-standardized)?|standardized")
_EDGES = re.compile(r"edges(4|8|16|32|64)?")


def label(name: str) -> str:
    """Return the name of a feature in figures, folders and files; nothing is loaded.

    Raises:
        UserError: there is no such feature.
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
    if low not in _LABELS:
        raise UserError(
            f"feature {name!r}", rule=f"there are {', '.join(NAMES)}, and pixels32 or edges32 for another side"
        )
    return _LABELS[low]


def labels(names: Sequence[str]) -> list[str]:
    """Return the `label` of each name.

    Raises:
        UserError: there are none, one is unknown, or two mean one feature.
    """
    found = [label(name) for name in names]
    if not found or len(set(found)) < len(found):
        raise UserError(f"features {','.join(names)!r}", rule="at least one, and no name twice")
    return found


def _weights(label: str) -> str:
    """Return the flag of the weights that the feature called `label` takes: SSCD-wen has those of sscd."""
    return label.lower().partition("-")[0]


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
        weighed = {_weights(name) for name in labels(names)}
        if unused := [name for name in given if name not in weighed]:
            raise UserError(f"--{unused[0]} without {unused[0]} among the features",
                            remedy=f"add it: --features {self.features},{unused[0]}")  # fmt: skip
        return names, files


def choose(
    names: Sequence[str], files: Mapping[str, str | None] | None = None, device: str | torch.device = "cpu"
) -> list[Features]:
    """Load the features called `names`.

    Args:
        names: no feature twice; the first one decides what counts as a copy.
        files: name -> weights, for those that need them.
        device: where networks run; SSCD runs on the CPU.

    Raises:
        UserError: a name is unknown or there twice, or weights are missing or cannot be used.
    """
    from ambient_sd.audit.features import Edges, EffLite0, Pixels, Sscd
    from ambient_sd.audit.networks import Dinov2, Inception

    files = files or {}
    known = labels(names)
    for name in _NEEDED:
        if _LABELS[name] in known and not files.get(_weights(name)):
            raise UserError(f"feature {name} without weights", remedy=f"give --{_weights(name)}")
    makers: dict[str, Any] = {
        "EffLite0": lambda: EffLite0(device=device),
        "SSCD": lambda: Sscd(files.get("sscd")),
        "SSCD-wen": lambda: Sscd(files.get("sscd"), preprocessing="wen"),
        "SSCD-han": lambda: Sscd(files.get("sscd"), preprocessing="han"),
        "DINOv2": lambda: Dinov2(str(files["dinov2"]), device=device),
        "DINOv2-paper": lambda: Dinov2(str(files["dinov2"]), device=device, preprocessing="paper"),
        "Inception": lambda: Inception(str(files["inception"]), device=device),
    }

    def make(name: str) -> Features:
        if name in makers:
            made: Features = makers[name]()
            return made
        if name.startswith("edges"):
            return Edges(int(name.removeprefix("edges")))
        return Pixels(
            int(name.removeprefix("pixels").removesuffix("-standardized")), standardized=name.endswith("-standardized")
        )

    return [make(name) for name in known]
