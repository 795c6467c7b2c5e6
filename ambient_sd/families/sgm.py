"""What Stability's own U-Net (sgm, ldm) calls the layers of diffusers' one: the names in ComfyUI's files, and in kohya's of SDXL."""

from __future__ import annotations

from typing import Any

from torch import nn


def layers_in(part: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of a network by name; those with an adapter count as what they were.

    Example:
        >>> list(layers_in(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))))
        ['0', '2']
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in part.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found[name] = layer
    return found


def names(unet: Any) -> dict[str, str]:
    """Return the names that Stability's own U-Net (sgm, ldm) has for the layers of diffusers' one.

    A down block holds one input block for each residual block (`.0`; its transformer is `.1`) and one for the downsampler; an up block
    one output block for each residual block, of which the last one has the upsampler too.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> names(tiny_pipeline().unet)["mid_block.resnets.0.conv1"]
        'middle_block.0.in_layers.2'
    """
    places = {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip

    def block(ours: str, theirs: str, module: Any, j: int) -> bool:
        places[f"{ours}.resnets.{j}"] = f"{theirs}.0"
        attends = bool(getattr(module, "attentions", None))
        if attends:
            places[f"{ours}.attentions.{j}"] = f"{theirs}.1"
        return attends

    n = 1
    for i, module in enumerate(unet.down_blocks):
        for j in range(len(module.resnets)):
            block(f"down_blocks.{i}", f"input_blocks.{n}", module, j)
            n += 1
        if getattr(module, "downsamplers", None):
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i, module in enumerate(unet.up_blocks):
        for j in range(len(module.resnets)):
            attends = block(f"up_blocks.{i}", f"output_blocks.{n}", module, j)
            if j == len(module.resnets) - 1 and getattr(module, "upsamplers", None):
                places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n}.{1 + attends}.conv"
            n += 1
    if (middle := getattr(unet, "mid_block", None)) is not None:
        steps = ["resnets.0"]
        for j in range(len(middle.resnets) - 1):
            attention = [f"attentions.{j}"] if getattr(middle, "attentions", None) else []
            steps += [*attention, f"resnets.{j + 1}"]
        places |= {f"mid_block.{step}": f"middle_block.{k}" for k, step in enumerate(steps)}
    inner = {
        "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    found = {}
    for name in layers_in(unet):
        ours = next((place for place in places if name == place or name.startswith(f"{place}.")), None)
        if ours is not None:
            rest = name[len(ours) + 1 :]
            rest = inner.get(rest, rest) if ".resnets." in f".{ours}" else rest
            found[name] = places[ours] + (f".{rest}" if rest else "")
    return found
