"""What Black Forest Labs' own code, and with it ComfyUI and kohya, calls the layers of FLUX.1, FLUX.2 and Chroma.

Queries, keys and values are one layer there, and in the single blocks of FLUX.1 and Chroma the MLP's first layer with them.
"""

from __future__ import annotations

from ambient_sd.families.original import OriginalNames

NAMES = OriginalNames(
    blocks={"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"},
    inner={
        "transformer_blocks": {
            "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
            "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
            "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
        },
        "single_transformer_blocks": {
            "proj_out": "linear2", "attn.to_out": "linear2", "attn.to_qkv_mlp_proj": "linear1", "norm.linear": "modulation.lin",
        },
    },
    outer={
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        **{f"{stream}_modulation{end}.linear": f"{stream}_modulation{end}.lin" for stream, end in
           (("double_stream", "_img"), ("double_stream", "_txt"), ("single_stream", ""))},
        **{f"{ours}_embed.{kind}_embedder.linear_{n}": f"{theirs}_in.{layer}_layer" for ours in ("time_text", "time_guidance")
           for kind, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")) for n, layer in ((1, "in"), (2, "out"))},
    },
    fused={
        "transformer_blocks": {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        },
        "single_transformer_blocks": {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
    },
    swapped={"norm_out.linear": "final_layer.adaLN_modulation.1"},
)  # fmt: skip
