"""Tensors between CPU and GPU without making the host wait, and float32 products that are none of TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor on a device; what goes from the CPU to a GPU goes through pinned memory, so that the host need not wait.

    A copy from ordinary memory waits until the GPU has done all that it was told before: between two of them it idles.

    Example:
        >>> send(torch.ones(2), "cpu").device.type
        'cpu'
    """
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Let matrix products of float32 keep all of its digits, whatever the program has allowed; as before afterwards.

    Example:
        >>> with full_float32():
        ...     torch.get_float32_matmul_precision()
        'highest'
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU's float32 matrix products and convolutions run in TF32, or neither; as before afterwards. torch's own default is convolutions only.

    Example:
        >>> with tf32(True):
        ...     torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        (True, True)
    """
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = allowed
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value
