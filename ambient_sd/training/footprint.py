"""The memory that a training takes at its highest on its device, predicted before anything loads.

    peak = max(encoding, step, sampling)        encoding: VAE and text encoders turn images and captions into what is held
                                                step: weights + gradients + moments + average + activations
                                                sampling: weights + moments + average + VAE, text encoders and their activations

The real classes of the base act a step out on fake tensors (torch's FakeTensorMode), which have shapes, types and lifetimes and no
values; what would be alive at once is summed, in blocks of 512 bytes as CUDA's allocator gives them. So LoRA, gradient checkpointing,
autocast and its copies of weights count as they come. Not in it: the driver's own memory, workspaces of cuDNN and cuBLAS, and gaps
that no tensor fits in. Processes of one run hold the same each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ambient_sd.data.latents import most_at_once
from ambient_sd.families.base import Base
from ambient_sd.training import adapters, optimizers, quantized
from ambient_sd.training.caption_augmentation import LIVE
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.recompute import recompute
from ambient_sd.training.validation import images_at_once

_BLOCK = 512  # bytes that CUDA's caching allocator rounds up to
_QUANTIZED_BLOCK, _SMALLEST_QUANTIZED = (
    256,
    4096,
)  # of bitsandbytes: values that share a scale; smaller tensors stay float32
TEACHER = "teacher"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Footprint:
    """Hold the predicted memory of a training, bytes on each device.

    Attributes:
        weights: of the network, its adapter and text encoders that are trained.
        gradients, moments, average: of what is trained; zero where they live elsewhere.
        activations: what a step adds to these at its highest.
        encoding, step, sampling: the peak of each phase; sampling is zero where no images are sampled on the way.
        trained: number of weights that are trained.
        checkpoint: bytes of one on the disk.

    Example:
        >>> Footprint(weights=4, gradients=1, moments=2, average=1, activations=8, encoding=5, step=16, sampling=9).peak
        16
    """

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int
    encoding: int
    step: int
    sampling: int
    trained: int = 0
    checkpoint: int = 0

    @property
    def peak(self) -> int:
        return max(self.encoding, self.step, self.sampling)

    def describe(self) -> str:
        """Return the prediction in a line.

        Example:
            >>> print(Footprint(2**30, 0, 0, 0, 2**29, 2**28, 2**30 + 2**29, 0).describe())
            1.5 GiB at the highest (weights 1.0 GiB, activations 512 MiB)
        """
        held = {"weights": self.weights, "gradients": self.gradients, "moments": self.moments, "average": self.average,
                "activations": self.activations}  # fmt: skip
        what = ", ".join(f"{name} {_show(size)}" for name, size in held.items() if size)
        if self.peak > self.step:
            what = f"where images are {'encoded' if self.peak == self.encoding else 'sampled'}; a step takes {_show(self.step)}: {what}"
        return f"{_show(self.peak)} at the highest ({what})"


def _show(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


class _Alive(TorchDispatchMode):
    """Count the bytes of all storages that are alive, those made inside the `with` and those told of."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


class _Lengths(TorchFunctionMode):
    """Answer a network that asks a mask how many tokens each text has: all of them. Fake tensors have no numbers."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item:
            return self.longest
        return func(*args, **(kwargs or {}))


def _norms_in_float32(network: torch.nn.Module) -> None:
    """Let norms compute in float32 under autocast, as CUDA's has it and the CPU's has not: what follows them is kept in float32 too."""
    for norm in network.modules():
        if isinstance(norm, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            norm.forward = partial(_in_float32, norm)  # type: ignore[method-assign]


def _in_float32(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return type(norm).forward(norm, x)
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    with torch.autocast("cpu", enabled=False):
        if isinstance(norm, torch.nn.GroupNorm):
            return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def predict(
    config: TrainConfig, base: Base, size: tuple[int, int], *, precision: str | None = None, on_cpu: bool = False
) -> Footprint:
    """Predict the memory of a training on each of its devices.

    Args:
        config: the settings.
        base: checked; its configurations and tokenizers are read, no weights.
        size: (width, height) of the largest images, pixels.
        precision: "no", "bf16" or "fp16"; None: that of the settings.
        on_cpu: a CPU keeps frozen weights in float32.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.families.base import check_base
        >>> found = predict(TrainConfig(str(BASE), train_data_dir="my-images", train_batch_size=1), check_base(str(BASE)), (32, 32))
        >>> found.gradients == found.weights, found.moments == 2 * found.weights, found.average
        (True, True, 0)
    """
    tokenizers = {part: base.load(part) for part in base.text_parts if part.startswith("tokenizer")}
    dtype = _DTYPES.get(precision or config.mixed_precision or "no")
    outlines = _outlines(config, base, None if on_cpu else dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        act = _Act(config, base, {part: _fake(outline) for part, outline in outlines.items()} | tokenizers, size, dtype)
        if not on_cpu:
            for module in (act.network, *act.teacher):
                _norms_in_float32(module)
        together = 1 if on_cpu else most_at_once(size[0] * size[1])
        # Captions first; then the text encoders leave the device, unless captions are made up or texts are trained on the way.
        stay = [*act.encoders.values()] if config.train_text_encoder or config.caption_mitigation in LIVE else []
        encoding = max(
            _peak(act.read, [*act.encoders.values()]), _peak(partial(act.encode, together), [act.vae, *stay])
        )
        network, trained = [act.network, *act.text.values(), *act.teacher], act.trained
        count = sum(p.numel() for p in trained)
        weights, gradients = (
            _bytes(act.parameters) + _bytes(act.taught),
            0 if config.fused_backward_pass else _bytes(trained),
        )
        kept = sum(_moments(p, config.use_8bit_adam) for p in trained)
        moments = 0 if config.offload_optimizer else kept
        averaged = 4 * count if config.use_ema else 0
        average = 0 if config.offload_ema else averaged
        passes = _peak(act.train, network)
        held = weights + moments + average
        # Between the passes all gradients are held. One call over all weights copies each, and an average from the CPU visits for it; else one
        # tensor of it does, with its difference to the weight and a part of that.
        visiting = (
            averaged * (1 + config.offload_ema)
            if config.foreach_ema
            else 12 * config.offload_ema * max(p.numel() for p in trained)
        )
        step = max(passes + moments + average, held + gradients + visiting)
        sampling = 0
        if config.probe_steps is not None or config.validation_prompts:
            sampling = _peak(act.sample, [*network, act.vae, *act.encoders.values()]) + moments + average
        return Footprint(
            weights,
            gradients,
            moments,
            average,
            step - held - gradients,
            encoding,
            step,
            sampling,
            count,
            _bytes(trained) + kept + averaged,
        )


class _Act:
    """Hold the parts of a training as fake tensors, and act its phases out."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        parts: Mapping[str, Any],
        size: tuple[int, int],
        dtype: torch.dtype | None,
    ) -> None:
        self.config, self.family, self.dtype = config, base.family, dtype
        self.network, self.vae = parts[self.family.network], parts["vae"]
        self.parts = {part: parts[part] for part in base.text_parts}
        self.encoders = {part: module for part, module in self.parts.items() if part.startswith("text_encoder")}
        self.text = self.encoders if config.train_text_encoder else {}
        if config.gradient_checkpointing:
            recompute(self.network, config.gradient_checkpointing_fraction or 1.0)
            for encoder in self.text.values():
                encoder.gradient_checkpointing_enable()
        for module in (self.network, *self.text.values()):
            module.train()
        for weight in self.trained if config.fused_backward_pass else ():
            weight.register_post_accumulate_grad_hook(self._step)
        # A whole fine-tune that is held to the base's predictions keeps a frozen copy of it.
        self.teacher = [parts[TEACHER]] if TEACHER in parts else []
        self.taught = [p for module in self.teacher for p in module.parameters()]
        self.size, self.latent = size, base.latent_shape(size)
        with torch.no_grad():
            self.embedded = self.family.embed(self.parts, [""])

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for module in (self.network, *self.text.values()) for p in module.parameters()]

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters if p.requires_grad]

    @torch.no_grad()
    def encode(self, count: int) -> None:
        """The images that are encoded together."""
        self.family.encode(self.vae, torch.empty(count, 3, *self.size[::-1]), torch.empty(count, *self.latent))

    @torch.no_grad()
    def read(self) -> None:
        """One caption."""
        self.family.embed(self.parts, [""])

    def train(self) -> None:
        """One pass forward and back."""
        count = self.config.train_batch_size
        if self.config.objective == "distill":
            with torch.no_grad():
                target = self._predict(count, self._repeated(count), *self.teacher)
        else:
            target = torch.empty(count, *self.latent)
        embedded = self.family.embed(self.parts, [""] * count) if self.text else self._repeated(count)
        output = self._predict(count, embedded)
        (output.float() - target).square().flatten(1).mean(1).mean().backward()
        if self.config.full_bf16 or self.config.offload_optimizer:
            for weight in self.trained:
                self._step(weight)

    @torch.no_grad()
    def _step(self, weight: torch.Tensor) -> None:
        """What the step of one weight alone adds for as long as it lasts (`optimizers.ByWeight`)."""
        if weight.grad is None:
            return
        stand_in, gradient = weight.detach().float(), weight.grad.float()
        weight.grad = None
        moments = torch.empty(
            _moments(weight, self.config.use_8bit_adam) if self.config.offload_optimizer else 0, dtype=torch.uint8
        )
        del gradient, moments
        if weight.dtype == torch.bfloat16:
            optimizers.round_stochastically(stand_in)

    @torch.no_grad()
    def sample(self) -> None:
        """One step of the sampler under classifier-free guidance, and the images."""
        self.network.eval()
        count = images_at_once(self.config.resolution)
        self._predict(2 * count, self._repeated(2 * count))
        self.family.decode(self.vae, torch.empty(count, *self.latent))

    def _repeated(self, count: int) -> dict[str, torch.Tensor]:
        """Return the embeddings of as many captions, where their length varies the longest."""
        found = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in self.embedded.items()}
        if "mask" in found:
            rows = max(self.family.text_length or 0, found["mask"].shape[1])
            found = {name: value.new_empty(count, rows, *value.shape[2:]) for name, value in found.items()}
        return found

    def _predict(self, count: int, embedded: Mapping[str, torch.Tensor], network: Any = None) -> torch.Tensor:
        sizes, precision = torch.zeros(count, 6) if self.family.takes_sizes else None, self.dtype or torch.bfloat16
        with _Lengths(embedded["hidden"].shape[1]), torch.autocast("cpu", precision, enabled=self.dtype is not None):
            inputs = self.family.inputs(embedded, sizes, "cpu")
            return self.family.predict(
                network or self.network,
                torch.empty(count, *self.latent),
                torch.zeros(count, dtype=torch.float32 if self.family.flow else torch.long),
                inputs,
            )


def _outlines(config: TrainConfig, base: Base, dtype: torch.dtype | None) -> dict[str, Any]:
    """Build the parts without weights, each in its precision, with what is trained on it."""
    family = base.family
    found = {part: base.outline(part) for part in family.parts if not part.startswith("tokenizer") and base.has(part)}
    for part, module in found.items():
        network, text = part == family.network, part.startswith("text_encoder") and config.train_text_encoder
        if not network:
            module.requires_grad_(False)
            if part.startswith("text_encoder"):
                module.to(base.text_dtype(part, dtype is not None and not config.train_text_encoder))
        elif config.lora or config.full_bf16:
            torch.nn.Module.to(module, torch.bfloat16 if config.full_bf16 else dtype or torch.float32)
        if config.lora and (network or text):
            targets = config.lora_target_modules or family.usual_targets(module) if network else adapters.TEXT_TARGETS
            adapters.attach(
                module, part=part, rank=config.rank or 4, alpha=config.lora_alpha or 4.0, targets=targets, seed=0, dora=config.use_dora,
                kind=config.lora_kind,
            )  # fmt: skip
        if network and config.quantize_base is not None:
            quantized.quantize(module, config.quantize_base, "meta", offload=config.offload_base)
    if config.objective == "distill" and not config.lora:
        found[TEACHER] = base.outline(family.network).requires_grad_(False)
        torch.nn.Module.to(found[TEACHER], dtype or torch.float32)
    return found


def _fake(module: torch.nn.Module) -> Any:
    """Give a part without storage fake tensors in the place of its weights."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                owner._parameters[name] = torch.nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, value in list(vars(owner).items()):  # codes in CPU memory
            if isinstance(value, torch.Tensor):
                setattr(owner, name, torch.empty(value.shape, dtype=value.dtype))
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return module


def _peak(act: Callable[[], None], modules: Sequence[torch.nn.Module]) -> int:
    """Return the most bytes that are alive at once while something is acted out, with the weights of what takes part."""
    alive = _Alive()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            alive.add(tensor)
    with alive:
        act()
    return alive.peak


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _moments(parameter: torch.Tensor, quantized: bool) -> int:
    """Return the bytes of AdamW's two moments of a weight, in float32 or in bitsandbytes' 8 bits with a scale for each block."""
    count = parameter.numel()
    if not quantized or count < _SMALLEST_QUANTIZED:
        return 8 * count
    return 2 * (count + 4 * -(-count // _QUANTIZED_BLOCK))
