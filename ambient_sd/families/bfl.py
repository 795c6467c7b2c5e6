"""What Black Forest Labs' own code, and with it ComfyUI and kohya, calls the layers of FLUX.1, FLUX.2 and Chroma.

Queries, keys and values are one layer there, and in the single blocks of FLUX.1 and Chroma the MLP's first layer with them: its rows are those of
diffusers' layers one below the other. The modulation of the final layer is left out: its halves are the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ambient_sd.families.sgm import layers_in

_INNER: Mapping[str, Mapping[str, str]] = {
    "transformer_blocks": {
        "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
        "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
    },
    "single_transformer_blocks": {
        "proj_out": "linear2", "attn.to_out": "linear2", "attn.to_qkv_mlp_proj": "linear1", "norm.linear": "modulation.lin",
    },
}  # fmt: skip
_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
_OUTER = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    **{f"{stream}_modulation{end}.linear": f"{stream}_modulation{end}.lin" for stream, end in
       (("double_stream", "_img"), ("double_stream", "_txt"), ("single_stream", ""))},
    **{f"{ours}_embed.{kind}_embedder.linear_{n}": f"{theirs}_in.{layer}_layer" for ours in ("time_text", "time_guidance")
       for kind, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")) for n, layer in ((1, "in"), (2, "out"))},
}  # fmt: skip
_FUSED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "transformer_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_transformer_blocks": {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}


def names(network: Any) -> dict[str, str]:
    """Return their name of each layer that is one in both, by diffusers' name.

    Example:
        >>> import diffusers
        >>> small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1, "axes_dims_rope": (4, 4, 8)}
        >>> names(diffusers.FluxTransformer2DModel(**small, joint_attention_dim=8, pooled_projection_dim=8))["transformer_blocks.0.ff.net.2"]
        'double_blocks.0.img_mlp.2'
    """
    found = {}
    for path in layers_in(network):
        kind, _, rest = path.partition(".")
        place, _, inner = rest.partition(".")
        theirs = _INNER.get(kind, {}).get(inner)
        if kind in _BLOCKS and theirs is not None:
            found[path] = f"{_BLOCKS[kind]}.{place}.{theirs}"
        elif path in _OUTER:
            found[path] = _OUTER[path]
    return found


def fused(network: Any) -> dict[str, tuple[str, ...]]:
    """Return diffusers' layers whose rows, one below the other, are those of one of theirs, by their name.

    Example:
        >>> import diffusers
        >>> small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1, "axes_dims_rope": (4, 4, 8)}
        >>> layers = fused(diffusers.FluxTransformer2DModel(**small, joint_attention_dim=8, pooled_projection_dim=8))
        >>> layers["double_blocks.0.txt_attn.qkv"][0]
        'transformer_blocks.0.attn.add_q_proj'
    """
    known, found = layers_in(network), {}
    for kind, layers in _FUSED.items():
        for place in range(len(getattr(network, kind))):
            for theirs, inner in layers.items():
                paths = tuple(f"{kind}.{place}.{name}" for name in inner)
                if all(path in known for path in paths):
                    found[f"{_BLOCKS[kind]}.{place}.{theirs}"] = paths
    return found


class OriginalNames:
    """Give a family, as its first base, the names of Black Forest Labs' layers: FLUX.1's, FLUX.2's and Chroma's files have them.

    Example:
        >>> from ambient_sd.families.flux import Flux
        >>> issubclass(Flux, OriginalNames)
        True
    """

    def original_names(self, network: Any) -> dict[str, str]:
        return names(network)

    def fused_names(self, network: Any) -> dict[str, tuple[str, ...]]:
        return fused(network)
