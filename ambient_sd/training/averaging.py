"""Moving average of the trained weights: diffusers' `EMAModel`, saved and resumed without pickle and to the bit.

    shadow <- shadow - (1 - d)(shadow - weights)        d = min(0.9999, (1 + k) / (10 + k)) after k + 1 steps

Checkpoints hold `unet_ema/` in the layout of `EMAModel.save_pretrained`; of a LoRA `lora_ema.safetensors`, the average of its weights by name.
A model that is spread over devices is not averaged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file

from ambient_sd.utils.errors import UserError

LORA_NAME = "lora_ema.safetensors"
_NONE: Mapping[str, Any] = MappingProxyType({})
_SETTINGS = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def check_distribution(kind: DistributedType) -> None:
    """Check that each process holds the whole model.

    Raises:
        UserError: it is spread over the processes (FSDP, DeepSpeed).

    Example:
        >>> check_distribution(DistributedType.MULTI_GPU)
    """
    if kind not in _WHOLE:
        raise UserError(
            f"use_ema is given and accelerate is set to {kind.value}",
            rule="the average needs every weight whole on each process, and there they are spread out",
            remedy="leave --use_ema out, or choose no distribution or multi-GPU in `accelerate config`",
        )


class Average:
    """Average the trained weights of a network over the steps of a run.

    Args:
        unet: the network, on its device, trained weights in float32. Where some are frozen, as under a LoRA, only the others are averaged.
        text: text encoders whose adapters are trained too, by name.
        offload: keep the average in CPU memory; its tensors visit the device one by one, all together with `foreach`.
        foreach: update all tensors in one call.
        checkpoint: folder of a checkpoint to continue from; else the average begins as a copy of the weights.
        step: optimizer steps that the checkpoint must have averaged.
        name: of the network in its pipeline.

    Raises:
        UserError: the checkpoint's average is missing, damaged, or of another step.

    Example:
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> unet = tiny_pipeline().unet
        >>> average = Average(unet)
        >>> average.update()  # after each optimizer step
        >>> average.give()
    """

    def __init__(
        self, unet: Any, text: Mapping[str, Any] = _NONE, *, offload: bool = False, foreach: bool = False,
        checkpoint: Path | None = None, step: int = 0, name: str = "unet",
    ) -> None:  # fmt: skip
        self.offload, self.folder, self.kind = offload, f"{name}_ema", type(unet)
        self.named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        self.whole = len(self.named) == len(list(unet.parameters()))
        for part, encoder in text.items():
            self.named |= {f"{part}.{name}": p for name, p in encoder.named_parameters() if p.requires_grad}
        self.device = next(unet.parameters()).device
        whole: Any = {"model_cls": type(unet), "model_config": unet.config} if self.whole else {}
        self.model: Any = EMAModel(self.named.values(), foreach=foreach, **whole)
        # Of bfloat16 weights too: there the average would lose what it takes in.
        self.model.shadow_params = [p.float() for p in self.model.shadow_params]
        self._coming = False
        if checkpoint is not None:
            self.resume(checkpoint, step)
        else:
            self._place()

    def _place(self) -> None:
        self.model.to("cpu" if self.offload else self.device)
        self._coming = False
        if self.offload and self.device.type == "cuda":
            self.model.pin_memory()

    def _arrived(self) -> None:
        """Wait for the average if it is on its way to the CPU: whoever reads it there must call this first."""
        if self._coming:
            torch.cuda.synchronize(self.device)
            self._coming = False

    def resume(self, checkpoint: Path, step: int) -> None:
        """Take the average of a checkpoint.

        Raises:
            UserError: it is missing, damaged, of another network or of another step.
        """
        path = checkpoint / (self.folder if self.whole else LORA_NAME)
        try:
            shadow, settings = _read(path, self.named, self.kind)
        except Exception as error:  # OSError, JSON errors, KeyError, SafetensorError, RuntimeError
            raise UserError(f"{path} cannot be read", rule=f"{type(error).__name__}: {error}"[:300],
                            remedy="resume from another checkpoint, or without --use_ema in another folder") from None  # fmt: skip
        if shadow is None:
            raise UserError(f"{path} belongs to another network", remedy="resume from another checkpoint")
        if settings["optimization_step"] != step:
            raise UserError(f"{path} averages {settings['optimization_step']} steps", rule=f"its checkpoint has {step}",
                            remedy="resume from another checkpoint")  # fmt: skip
        self.model.load_state_dict({**settings, "shadow_params": shadow})
        self._place()

    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        if not self.offload:
            self.model.step(self.named.values())
            return
        # To the GPU and back without a wait: torch copies back into pinned memory.
        self._coming = self.device.type == "cuda"
        if self.model.foreach:
            self.model.to(self.device, non_blocking=True)
            self.model.step(self.named.values())
            self.model.to("cpu", non_blocking=True)
            return
        whole, done = self.model.shadow_params, self.model.optimization_step
        for shadow, weight in zip(whole, self.named.values(), strict=True):
            self.model.shadow_params, self.model.optimization_step = [shadow.to(self.device, non_blocking=True)], done
            self.model.step([weight])
            shadow.copy_(self.model.shadow_params[0], non_blocking=True)
        self.model.shadow_params = whole

    def save(self, checkpoint: Path) -> None:
        """Write `checkpoint/unet_ema/` (of a transformer `transformer_ema/`), or of a LoRA `checkpoint/lora_ema.safetensors`."""
        self._arrived()
        if not self.whole:
            settings = {name: self.model.state_dict()[name] for name in _SETTINGS}
            tensors = dict(zip(self.named, (p.detach().cpu() for p in self.model.shadow_params), strict=True))
            save_file(tensors, checkpoint / LORA_NAME, metadata={"ema": json.dumps(settings)})
            return
        # It builds a fresh model to fill, and a fresh model draws from the global generator.
        with torch.random.fork_rng(devices=[]):
            self.model.save_pretrained(checkpoint / self.folder)

    def give(self) -> None:
        """Replace the trained weights by their average, for good."""
        self.model.copy_to(self.named.values())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Lend the averaged weights to the network; the trained ones are put back whatever happens."""
        self.model.store(self.named.values())
        try:
            self.model.copy_to(self.named.values())
            yield
        finally:
            self.model.restore(self.named.values())


def _read(
    path: Path, named: Mapping[str, torch.nn.Parameter], kind: Any
) -> tuple[list[torch.Tensor] | None, dict[str, Any]]:
    """Return the saved average, None where its weights are not those of the network, and how it was made."""
    if path.name == LORA_NAME:
        with safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()["ema"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        # EMAModel.from_pretrained would fall back to .bin files, which are pickles.
        model: Any = kind.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
        found = {name: p.detach() for name, p in model.named_parameters()}
    fits = {name: p.shape for name, p in found.items()} == {name: p.shape for name, p in named.items()}
    return [found[name] for name in named] if fits else None, {name: settings[name] for name in _SETTINGS}
