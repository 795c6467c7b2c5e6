"""Filter finished LoRAs of a study by the singular directions of the base, with plain rank truncation as the control, and measure both.

    python -m experiments.filter_lora configs/study/style-60.yaml --output_dir build/study/style-60 --run lora --keep 1 2 3

After "Filtering Memorization from Parameter-Space in Diffusion Models" (BAF, arXiv 2605.10439): the update of a layer is taken apart
into channels, `B A = sum_i sigma_i u_i v_i^T`, and those that are little aligned with the principal subspace of the layer's own weights are
taken to hold what was memorized, and dropped. Its exact score and threshold were not to be had; here

    W = U S V^T of the base, its k first directions those that hold `ENERGY` of sum S^2
    alignment of channel i = |U_k^T u_i| |V_k^T v_i|, the norm of what is left of u_i v_i^T in that subspace, 1 at most

    anchored   keeps the channels of the largest alignment
    cut        keeps as many of the largest sigma: the control. If it copies as little, alignment says nothing

A filtered file has the rank, names and head of the one that it was made of, with zeros in what was dropped, so every reader takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.hub_ids import resolve_model_id
from experiments.arguments import plan_of, study_parser
from experiments.sweep import measure_apart

ENERGY = 0.9
KINDS = ("anchored", "cut")
FILE = "pytorch_lora_weights.safetensors"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def channels(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take `up @ down` apart, float64: u `(out, r)`, sigma `(r,)` falling, v `(in, r)`."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, sigma, vh = torch.linalg.svd(r_up @ r_down.T)
    return q_up @ u, sigma, q_down @ vh.T


def alignment(weight: Tensor, u: Tensor, v: Tensor, energy: float = ENERGY) -> Tensor:
    """Return how far each channel u_i v_i^T lies in the principal subspace of `weight`, `(out, in)`: `(r,)` in [0, 1]."""
    left, s, right = torch.linalg.svd(weight.double(), full_matrices=False)
    k = int((s.square().cumsum(0) < energy * s.square().sum()).sum()) + 1
    return (left[:, :k].T @ u).norm(dim=0) * (right[:k] @ v).norm(dim=0)


def filtered(down: Tensor, up: Tensor, weight: Tensor, kind: str, keep: int) -> tuple[Tensor, Tensor]:
    """Return `down` `(r, in)` and `up` `(out, r)` of what a filter leaves, with zeros in place of what it drops."""
    u, sigma, v = channels(down, up)
    score = alignment(weight, u, v) if kind == "anchored" else sigma
    root = torch.zeros_like(sigma)
    chosen = score.argsort(descending=True, stable=True)[:keep]
    root[chosen] = sigma[chosen].sqrt()
    return (root[:, None] * v.T).to(down.dtype), (u * root).to(up.dtype)


def filter_file(source: Path, weights: Mapping[str, Tensor], kind: str, keep: int, folder: Path) -> Path:
    """Filter each layer of an adapter by the base's `weights`, and write it into `folder`.

    Raises:
        UserError: the file is no plain LoRA of linear layers of the base's U-Net.
    """
    with safe_open(source, "pt") as file:
        head, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    for name in [name for name in tensors if name.endswith(_DOWN)]:
        stem = name.removesuffix(_DOWN)
        weight = weights.get(stem.removeprefix("unet.") + ".weight")
        if weight is None or weight.dim() != 2 or stem + _UP not in tensors:
            raise UserError(
                f"{source.name}: {stem}", rule="the filter knows LoRAs of linear layers of the base's U-Net"
            )
        tensors[name], tensors[stem + _UP] = (
            t.contiguous() for t in filtered(tensors[name], tensors[stem + _UP], weight, kind, keep)
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata=head)
    return folder


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--run", default="lora", help="label of a run with lora")
    parser.add_argument("--keep", type=int, nargs="+", default=[1, 2, 3], help="channels that a layer keeps")
    args = parser.parse_args(argv)
    plan = plan_of(args)
    step = plan.measure_at[-1]
    for run in plan.runs:
        if run.label not in plan.chosen([args.run]):
            continue
        config: Any = run.config("study")
        source = args.output_dir / "runs" / run.folder / "model" / FILE
        if not config.lora or not source.is_file():
            raise UserError(f"{run.name} has no adapter in {args.output_dir}", rule="a finished run with lora is filtered",
                            remedy=f"run the study first: --only {run.label!r}")  # fmt: skip
        base = resolve_model_id(str(config.pretrained_model_name_or_path))
        weights = UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
        for keep in args.keep:
            for kind in KINDS:
                label = f"{run.label} {kind} keep={keep}"
                model = filter_file(
                    source, weights, kind, keep, args.output_dir / "filtered" / f"{run.folder}-{kind}-{keep}"
                )
                print(measure_apart(plan, args.output_dir, label, run.seed, step, model, {"of": run.name, "kind": kind, "keep": keep}, lora=True), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
