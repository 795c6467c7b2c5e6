"""LoHa and LoKr, the adapters of LyCORIS, as the LoRA that each of them is exactly.

    LoHa    dW = s (B1 A1) o (B2 A2) = s B A,   B[o, (ij)] = B1[o, i] B2[o, j],  A[(ij), x] = A1[i, x] A2[j, x]      rank r^2
    LoKr    dW = s W1 (x) W2 = s (L1 (x) L2)(R1 (x) R2),   W = L R: its two factors, or itself and the identity
    Tucker  W[o, x, k] = sum_ij t[i, j, k] a[i, o] b[j, x] = L R,   L = a^T,  R[i, x, k] = sum_j t[i, j, k] b[j, x]

A LoRA of rank r^2 is what diffusers, its fusing and scaling, the guard and `--base_above` know already, and the update comes out without
being built at every call. Where the rank would exceed that of any matrix of the layer's shape, B A = I dW stands for it.
Hyeon-Woo et al., "FedPara" (arXiv 2108.06098); Yeh et al., "LyCORIS" (arXiv 2309.14859), whose file format names the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

KINDS = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
NAMES = frozenset(name for names in KINDS.values() for name in names)


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the rank r of the factors of one layer; None where both halves of a LoKr are whole.

    Raises:
        ValueError: its factors have several, or one is no matrix.

    Example:
        >>> rank_of({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(8, 3), "lokr_w2_b": torch.ones(3, 8)})
        3
    """
    if wrong := [name for name, tensor in tensors.items() if tensor.dim() < 2 or 0 in tensor.shape]:
        raise ValueError(f"has a shape that does not fit: {wrong[0]!r} is {tuple(tensors[wrong[0]].shape)}")
    ranks = {int(tensor.shape[0]) for name, tensor in tensors.items() if name.endswith("_b")}
    if len(ranks) > 1:
        raise ValueError(f"has factors of ranks {sorted(ranks)}")
    return next(iter(ranks), None)


def as_lora(tensors: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[str, Tensor, Tensor]:
    """Return the kind of one layer's tensors, and A and B with `B A` = dW / s, in float32.

    Args:
        tensors: of the layer, by the names of `KINDS`.
        shape: of the layer's weight, `(out, in)` or `(out, in, h, w)`.

    Returns:
        LoHa or LoKr; A, `(rank, in)` or `(rank, in, h, w)`; B, `(out, rank)` or `(out, rank, 1, 1)`.

    Raises:
        ValueError: a tensor is missing, too many, or of a shape that does not fit; the text goes on from "the adapter".

    Example:
        >>> kind, down, up = as_lora({"lokr_w1": 2 * torch.eye(2), "lokr_w2": torch.ones(3, 1)}, (6, 2))
        >>> kind, torch.equal(up @ down, torch.kron(2 * torch.eye(2), torch.ones(3, 1)))
        ('LoKr', True)
    """
    kinds = [kind for kind, names in KINDS.items() if tensors.keys() & set(names)]
    if len(kinds) != 1:
        raise ValueError("has tensors of two kinds")
    rank_of(tensors)
    out, inner, area = int(shape[0]), int(shape[1]), math.prod(shape[2:])
    rest = dict(tensors)
    stem = {"LoHa": "hada", "LoKr": "lokr"}[kinds[0]]
    (left1, right1), (left2, right2) = (_half(rest, f"{stem}_{end}", shape[2:]) for end in ("w1", "w2"))
    if kinds[0] == "LoHa":
        if left1.shape[0] != left2.shape[0] or right1.shape[1] != right2.shape[1]:
            raise ValueError("has halves of two shapes")
        up = torch.einsum("oi,oj->oij", left1, left2).flatten(1)
        down = torch.einsum("ix,jx->ijx", right1, right2).flatten(0, 1)
    else:
        if right2.shape[1] % area:
            raise ValueError("has a shape that does not fit")
        up = torch.einsum("oi,pj->opij", left1, left2).flatten(2).flatten(0, 1)
        # The columns of W2 are (in, kernel), and the kernel stays last.
        down = torch.einsum("ip,jqk->ijpqk", right1, right2.unflatten(1, (-1, area))).flatten(2).flatten(0, 1)
    if (up.shape[0], down.shape[1]) != (out, inner * area):
        raise ValueError(f"gives {up.shape[0]} x {down.shape[1]} where {out} x {inner * area} is needed")
    if up.shape[1] > min(out, inner * area):
        up, down = _whole(up @ down)
    # Products of small factors fall out of half precision; a power of two moves between the halves without rounding.
    if (high := float(up.abs().max())) and (deep := float(down.abs().max())):
        step = 2.0 ** round(math.log2(deep / high) / 2)
        up, down = up * step, down / step
    rank, up, down = up.shape[1], up.float(), down.float()
    if not (bool(up.isfinite().all()) and bool(down.isfinite().all())):
        raise ValueError("has factors whose product is too large")
    return kinds[0], down.reshape(rank, *shape[1:]), up.reshape(out, rank, *[1] * len(shape[2:]))


def _half(rest: dict[str, Tensor], name: str, kernel: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Take one of the two matrices out of a layer's tensors: L and R with W = L R, the kernel flattened into R."""
    whole, left, right = (rest.pop(name + end, None) for end in ("", "_a", "_b"))
    core = rest.pop(name.replace("_w", "_t"), None)
    if whole is not None and left is None and right is None and core is None:
        if math.prod(whole.shape[2:]) > 1 and tuple(whole.shape[2:]) != tuple(kernel):
            raise ValueError(f"has a shape that does not fit: {name!r} is {tuple(whole.shape)}")
        return _whole(whole.double().flatten(1))
    if whole is not None or left is None or right is None:
        raise ValueError(
            f"lacks {name + '_a'!r} or {name + '_b'!r}" if whole is None else f"has {name!r} and factors of it"
        )
    left, right = left.double().flatten(1), right.double().flatten(1)
    if core is not None:
        if core.dim() < 3 or tuple(core.shape) != (left.shape[0], right.shape[0], *kernel):
            raise ValueError(f"has a shape that does not fit: the core of {name!r} is {tuple(core.shape)}")
        left, right = left.T, torch.einsum("ij...,jx->ix...", core.double(), right).flatten(1)
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"has a shape that does not fit: {name!r} is {tuple(left.shape)} times {tuple(right.shape)}")
    return left, right


def _whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix as a product of itself and the smaller identity."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype)
