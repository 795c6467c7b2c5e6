"""Tensors between CPU and GPU without making the host wait; float32 products that are none of TF32; kernels that give equal bits twice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from ambient_sd.utils.errors import UserError

_WORKSPACE, _FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # those of which cuBLAS promises equal bits


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


def fix_workspace() -> None:
    """Have cuBLAS use a workspace with which its products have equal bits each time; it asks once, when CUDA starts.

    Raises:
        UserError: it is too late, or another workspace is asked for.

    Example:
        >>> fix_workspace()
        >>> os.environ["CUBLAS_WORKSPACE_CONFIG"]
        ':4096:8'
    """
    given = os.environ.get(_WORKSPACE)
    if given is None and not torch.cuda.is_initialized():
        os.environ[_WORKSPACE] = given = _FIXED[0]
    if given not in _FIXED:
        rule = (
            f"{_WORKSPACE} is {given}"
            if given
            else f"CUDA has started here without {_WORKSPACE}, which cuBLAS asks for once"
        )
        raise UserError(
            "deterministic is given", rule=rule, remedy=f"set {_WORKSPACE}={_FIXED[0]} before Python starts"
        )


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let operations use deterministic kernels only, if wanted; as before afterwards, except for cuBLAS's workspace.

    Attention is settled with it: torch's flash and memory-efficient kernels then have deterministic backward passes, cuDNN's is left out.

    Raises:
        UserError: as `fix_workspace`; or an operation has no deterministic kernel.

    Example:
        >>> with deterministic(True):
        ...     torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
        (True, True)
    """
    if not wanted:
        yield
        return
    fix_workspace()
    cudnn: Any = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    chosen = cudnn.deterministic, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)  # with warn_only attention's backward passes would not be
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UserError(
            "deterministic is given", rule=str(error).partition(", but you set")[0], remedy="leave it out"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = chosen
