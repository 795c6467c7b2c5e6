"""Write a diffusers pipeline as its authors would have: one file, ldm names. The inverse of what diffusers reads, written down from the published checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_RESNET = {"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3.",
           "time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection."}  # fmt: skip
_OUTSIDE = {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.", "time_embedding.linear_1.": "time_embed.0.",
            "time_embedding.linear_2.": "time_embed.2.", "add_embedding.linear_1.": "label_emb.0.0.",
            "add_embedding.linear_2.": "label_emb.0.2."}  # fmt: skip
_OPEN_CLIP = {"encoder.layers.": "transformer.resblocks.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.",
              "mlp.fc2.": "mlp.c_proj.", "self_attn.": "attn.", "final_layer_norm.": "ln_final.",
              "embeddings.token_embedding.": "token_embedding.", "embeddings.position_embedding.weight": "positional_embedding"}  # fmt: skip


def write_single_file(pipe: Any, path: Path, metadata: dict[str, str] | None = None, **extra: torch.Tensor) -> Path:
    """Write a pipeline of Stable Diffusion 1 (one number of heads), 2 or XL into one file, with what such files hold besides."""
    xl = hasattr(pipe, "text_encoder_2")
    old = isinstance(pipe.unet.config.attention_head_dim, int)
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet(pipe.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae(pipe.vae).items()}
    if xl:
        tensors |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= (
            clip(pipe.text_encoder, "cond_stage_model.transformer.")
            if old
            else open_clip(pipe.text_encoder, "cond_stage_model.model.")
        )
    tensors |= {"betas": torch.ones(8), "model_ema.decay": torch.ones(()), **extra}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata)
    return path


def unet(net: Any) -> dict[str, torch.Tensor]:
    places: dict[str, str] = dict(_OUTSIDE)
    n = 1
    for i, block in enumerate(net.down_blocks):
        for j in range(len(block.resnets)):
            places[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{n}.0."
            places[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{n}.1."
            n += 1
        if block.downsamplers:
            places[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{n}.0.op."
            n += 1
    n = 0
    for i, block in enumerate(net.up_blocks):
        for j in range(len(block.resnets)):
            places[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{n}.0."
            places[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{n}.1."
            n += 1
        attends = 2 if hasattr(block, "attentions") else 1
        places[f"up_blocks.{i}.upsamplers.0.conv."] = f"output_blocks.{n - 1}.{attends}.conv."
    places |= {"mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
               "mid_block.resnets.1.": "middle_block.2."}  # fmt: skip
    found = {}
    for name, tensor in net.state_dict().items():
        ours = next(place for place in places if name.startswith(place))
        rest = name.removeprefix(ours)
        if ".resnets." in ours:
            rest = next(theirs + rest.removeprefix(mine) for mine, theirs in _RESNET.items() if rest.startswith(mine))
        found[places[ours] + rest] = tensor
    return found


def vae(net: Any) -> dict[str, torch.Tensor]:
    last = len(net.config.block_out_channels) - 1
    found = {}
    for name, tensor in net.state_dict().items():
        theirs = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        theirs = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", theirs)
        theirs = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", theirs)
        theirs = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample.", theirs)
        theirs = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", theirs)
        theirs = theirs.replace("conv_shortcut.", "nin_shortcut.").replace("conv_norm_out.", "norm_out.")
        if "mid_block.attentions.0." in theirs:
            theirs = theirs.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm.", "norm.")
            theirs = re.sub(r"to_([qkv])\.", r"\1.", theirs).replace("to_out.0.", "proj_out.")
        wide = "attn_1" in theirs and tensor.dim() == 2  # convolutions of 1 x 1, there
        found[theirs] = tensor[:, :, None, None] if wide else tensor
    return found


def _inner(net: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in net.state_dict().items()}


def clip(net: Any, prefix: str) -> dict[str, torch.Tensor]:
    found = {f"{prefix}text_model.{name}": tensor for name, tensor in _inner(net).items()}
    length = net.config.max_position_embeddings
    return found | {f"{prefix}text_model.embeddings.position_ids": torch.arange(length)[None]}


def open_clip(net: Any, prefix: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {prefix + "logit_scale": torch.ones(())}
    inner = _inner(net)
    for name, tensor in inner.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        theirs, value = name, tensor
        if ".q_proj." in name:
            value = torch.cat([inner[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            theirs = name.replace("q_proj.", "in_proj_")
        for mine, open_clips in _OPEN_CLIP.items():
            theirs = theirs.replace(mine, open_clips)
        if name == "text_projection.weight":
            theirs, value = "text_projection", tensor.T
        found[prefix + theirs] = value
    if "text_projection.weight" not in inner:  # Stable Diffusion 2 does not use it
        found[prefix + "text_projection"] = torch.eye(net.config.hidden_size)
    return found
