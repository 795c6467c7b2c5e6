"""What the authors' own code calls the layers of a transformer, as kohya and ComfyUI have it in their files: one table a family.

A layer is one in both; or several of diffusers' are one of theirs (queries, keys and values), whose rows are ours one below the other; or the two
halves of its rows stand in the other order (the last modulation: theirs is shift and scale, ours scale and shift).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ambient_sd.families.sgm import layers_in


@dataclass(frozen=True)
class OriginalNames:
    """Hold the names of one family's layers.

    Attributes:
        blocks: their name of each list of blocks, by diffusers'.
        inner: by list of blocks, their name of a layer in a block, by diffusers'.
        outer: their name of a layer outside the blocks, by diffusers'.
        fused: by list of blocks, diffusers' layers that are one of theirs, by its name.
        swapped: their name of a layer whose halves stand in the other order, by diffusers' whole name; {last} is the last block's number.

    Example:
        >>> from torch import nn
        >>> names = OriginalNames({"layers": "blocks"}, inner={"layers": {"attn.to_out": "attn.proj"}})
        >>> network = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"to_out": nn.Linear(2, 2)})})])})
        >>> names.single(network)
        {'layers.0.attn.to_out': 'blocks.0.attn.proj'}
    """

    blocks: Mapping[str, str]
    inner: Mapping[str, Mapping[str, str]]
    outer: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    swapped: Mapping[str, str] = field(default_factory=dict)

    def single(self, network: Any) -> dict[str, str]:
        """Return their name of each layer that is the same in both, by diffusers' name."""
        found, turned = {}, self.turned(network)
        for path in layers_in(network):
            kind, _, rest = path.partition(".")
            place, _, inner = rest.partition(".")
            theirs = self.inner.get(kind, {}).get(inner)
            if path in turned:
                continue
            if theirs is not None:
                found[path] = f"{self.blocks[kind]}.{place}.{theirs}"
            elif path in self.outer:
                found[path] = self.outer[path]
        return found

    def several(self, network: Any) -> dict[str, tuple[str, ...]]:
        """Return diffusers' layers whose rows, one below the other, are those of one of theirs, by their name."""
        known, found = layers_in(network), {}
        for kind, layers in self.fused.items():
            for place in range(len(getattr(network, kind))):
                for theirs, inner in layers.items():
                    paths = tuple(f"{kind}.{place}.{name}" for name in inner)
                    if all(path in known for path in paths):
                        found[f"{self.blocks[kind]}.{place}.{theirs}"] = paths
        return found

    def turned(self, network: Any) -> dict[str, str]:
        """Return their name of each layer whose halves stand in the other order, by diffusers' name."""
        known, found = layers_in(network), {}
        for path, theirs in self.swapped.items():
            kind = path.partition(".")[0]
            last = str(len(getattr(network, kind)) - 1) if "{last}" in path else ""
            if (whole := path.replace("{last}", last)) in known:
                found[whole] = theirs.replace("{last}", last)
        return found
