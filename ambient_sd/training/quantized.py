"""A frozen base in 8 or 4 bits under an adapter (QLoRA, Dettmers et al. 2023), by bitsandbytes' kernels.

    W ~ s_b c[i]        i: code of 8 or 4 bits, c: its value in [-1, 1], s_b: largest |W| in a block of 64 or 256 values

    int8: c evenly spaced        fp8: c as e4m3 floats        nf4: c at quantiles of a normal; its s_b in 8 bits too

With `offload` the codes wait in pinned CPU memory, where diffusers' group offloading would leave the backward pass without weights.
`y = W x` and `dL/dx = W^T dL/dy` each unpack one W in the precision of x and drop it: between them only codes are in memory. Linear layers
and convolutions alike, which peft's own layers for bitsandbytes are not. Not here: weights that are trained, arithmetic in 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input

FEWEST = 2**14  # smaller weights, such as a U-Net's first and last layer, are most sensitive and save nothing
_BLOCK, _NF4_BLOCK = 256, 64


def quantize(network: torch.nn.Module, kind: str, device: torch.device | str, *, offload: bool = False) -> int:
    """Replace the frozen weights of linear layers and convolutions by their codes, layer by layer, on the device that computes them.

    The layers stay where they are, so adapters must have been attached before. On the meta device shapes alone are made.

    Args:
        network: weights in any precision; those with a gradient are left alone.
        kind: int8, fp8 or nf4.
        device: where codes are made and computed with.
        offload: codes stay in CPU memory, and visit the device for each product.

    Returns:
        The number of layers.

    Example:
        >>> quantize(torch.nn.Linear(8, 8), "nf4", "cpu")  # too small to gain anything
        0
    """
    layers: list[Any] = [m for m in network.modules() if type(m) in _CLASSES]
    layers = [m for m in layers if not m.weight.requires_grad and (n := m.weight.numel()) >= FEWEST and n % 2 == 0]
    if not layers:
        return 0
    from bitsandbytes import functional

    values = {"int8": lambda: functional.create_linear_map(signed=True, total_bits=8), "fp8": lambda: functional.create_fp8_map(True, 4, 3, 8),
              "nf4": lambda: functional.create_dynamic_map(signed=True)}[kind]()  # fmt: skip
    table = _frozen(values.to(device))  # one for all layers
    for layer in layers:
        weight = layer.weight.detach()
        layer.__class__ = _CLASSES[type(layer)]
        del layer._parameters["weight"]
        layer.pack(weight.to(device), table, kind)
        if offload:
            layer.leave()
    return len(layers)


def _frozen(x: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(x, requires_grad=False)  # no buffer: DDP would send it anew at each pass


class _Packed(torch.nn.Module):
    """Hold what stands in the place of a weight."""

    def pack(self, weight: torch.Tensor, table: torch.nn.Parameter, kind: str) -> None:
        self.shape, self.dtype, self.table, self.offset = weight.shape, weight.dtype, table, None
        if kind == "nf4":
            codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(weight, _NF4_BLOCK, "nf4", torch.uint8)
            # Scales are positive: without their mean the signed codes are used on both sides.
            self.offset = _frozen(scales.mean())
            small, of_scales = torch.ops.bitsandbytes.quantize_blockwise.default(scales - self.offset, table, _BLOCK)
            self.scales, self.of_scales = _frozen(small), _frozen(of_scales)
        else:
            codes, scales = torch.ops.bitsandbytes.quantize_blockwise.default(weight.float(), table, _BLOCK)
            self.scales = _frozen(scales)
        self.codes = _frozen(codes)

    def leave(self) -> None:
        """Keep the codes in CPU memory: no parameter any more, which would move with the network."""
        codes: torch.Tensor = self._parameters.pop("codes").detach()  # type: ignore[union-attr]
        codes = codes.cpu().pin_memory() if codes.is_cuda else codes
        vars(self)["codes"] = codes

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        codes: torch.Tensor = self.codes
        if "codes" not in self._parameters:
            codes = codes.to(self.scales.device, non_blocking=True, copy=True)
        unblocked = torch.ops.bitsandbytes.dequantize_blockwise.default
        if self.offset is None:
            return unblocked(codes, self.scales, self.table, _BLOCK, dtype)
        scales = unblocked(self.scales, self.of_scales, self.table, _BLOCK, torch.float32) + self.offset
        # As one row: on CPUs rows of odd length would be unpacked by code that is compiled for each shape.
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, scales, _NF4_BLOCK, "nf4", [1, self.shape.numel()], dtype
        )
        return flat.view(self.shape)

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight that is computed with, made anew at each call: DoRA and savers of adapters ask for it."""
        return self.unpack(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        return _Product.apply(x, self)


class _PackedLinear(_Packed, torch.nn.Linear):  # type: ignore[override]
    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def gradient(self, shape: torch.Size, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ weight


class _PackedConv2d(_Packed, torch.nn.Conv2d):  # type: ignore[override]
    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._conv_forward(x, weight, bias)

    def gradient(self, shape: torch.Size, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


_CLASSES: dict[type, Any] = {torch.nn.Linear: _PackedLinear, torch.nn.Conv2d: _PackedConv2d}


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x, layer.unpack(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.layer.gradient(ctx.shape, ctx.layer.unpack(gradient.dtype), gradient), None
