"""A GPU that is not there: tensors in ordinary memory that say they lie on cuda:0, and refuse what CUDA refuses.

A set of storages is "on the GPU". A function mode answers for them (`.device`, `.to`, `.numpy`, factories, generators) and casts as autocast does
there; a dispatch mode refuses operations on tensors of two devices, counts what makes the host wait, and refuses to read on the CPU what is still
on its way there. Random numbers drawn "on the GPU" come from a generator of its own. The numbers are real ones.
Not seen: kernels (their rounding, speed, memory), streams, other threads, several processes.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.utils.checkpoint
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GPU = torch.device("cuda:0")
_CPUGenerator, _checkpoint, _grouped, _hooked, _applied = (
    torch.Generator,
    torch.utils.checkpoint.checkpoint,
    torch._C._group_tensors_by_device_and_dtype,
    Tensor.register_post_accumulate_grad_hook,
    torch.autograd.function.BackwardCFunction.apply,
)
# What autocast computes in half and what in single precision on CUDA (docs: amp); those that diffusers and peft call.
_HALF = {
    torch.conv2d,
    F.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    F.scaled_dot_product_attention,
}
_SINGLE = {torch.group_norm, F.group_norm, torch.layer_norm, F.layer_norm, torch.softmax, Tensor.softmax, F.softmax, torch.exp, torch.log, torch.pow,
           Tensor.pow, torch.norm, Tensor.norm, torch.sum, Tensor.sum, torch.cumsum, F.mse_loss, F.cosine_similarity, F.normalize}  # fmt: skip
_SAME_DEVICE = {
    "cat",
    "stack",
    "index_copy",
    "index_select",
    "gather",
    "addmm",
    "mm",
    "bmm",
    "convolution",
}  # not even a number from the CPU
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
    "repeat_interleave",
}
_PLAIN = {
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "requires_grad",
        "grad",
        "data",
        "layout",
        "is_leaf",
        "grad_fn",
        "is_sparse",
        "is_quantized",
    )
}
_PLAIN |= {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.untyped_storage, Tensor.stride, Tensor.element_size, Tensor.__len__,
           Tensor.is_contiguous, Tensor.detach, Tensor.requires_grad_, Tensor.view, Tensor.reshape, Tensor.chunk, Tensor.grad.__set__, Tensor.data.__set__}  # fmt: skip
_DEVICE, _IS_CUDA, _IS_CPU = Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__
_ASKED = {_DEVICE, _IS_CUDA, _IS_CPU, Tensor.get_device, Tensor.is_pinned, Tensor.pin_memory, Tensor.numpy, Tensor.__array__, Tensor.data_ptr,
          Tensor.tolist, Tensor.to, Tensor.cpu, Tensor.cuda}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Generator(_CPUGenerator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        self = super().__new__(cls, "cpu")
        self.place = torch.device(device)
        return self

    def __init__(self, device: Any = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU if self.place.type == "cuda" else self.place


class PretendGPU:
    """Hold what is on the GPU, and in `waits` how often the host waited for it, by kind; in `places`, by the line that made it wait."""

    def __init__(self) -> None:
        self.held: dict[int, StorageWeakRef] = {}
        self.pinned: dict[int, StorageWeakRef] = {}
        self.flying: dict[int, StorageWeakRef] = {}  # on the CPU, to be there when the host has waited
        self.waits: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self.generator = _CPUGenerator().manual_seed(
            0
        )  # CUDA's own, from which numbers are drawn where no generator is given

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.held

    def take(self, tensor: Tensor) -> Tensor:
        return _mark(self.held, tensor)

    def wait(self, kind: str, times: int = 1) -> None:
        if not times:
            return
        self.waits[kind] += times
        frame: Any = sys._getframe(1)
        while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        if frame is not None:
            self.places[f"{kind}: {'/'.join(frame.f_code.co_filename.split('/')[-3:])}:{frame.f_lineno}"] += times
        self.flying.clear()  # one stream: what was asked for before is done

    def landed(self, tensor: Tensor) -> None:
        """Refuse what the host has not waited for."""
        if tensor.untyped_storage()._cdata in self.flying:
            raise RuntimeError("read on the CPU before its copy from the GPU was waited for")

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Let what draws from torch's generator draw from the GPU's."""
        with _disable_current_modes():
            kept, own = torch.default_generator.get_state(), self.generator
            torch.default_generator.set_state(own.get_state())
        try:
            yield
        finally:
            with _disable_current_modes():
                own.set_state(torch.default_generator.get_state())
                torch.default_generator.set_state(kept)


def _mark(marked: dict[int, StorageWeakRef], tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    if storage._cdata not in marked:
        marked[storage._cdata] = StorageWeakRef(storage)
    return tensor


class _Kind(NamedTuple):
    """Hold what is asked of an operation: by name and tags, which are slow to read."""

    name: str
    waits: bool
    indexed: bool
    same_device: bool  # of numbers too
    normed: bool
    seeded: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    name = func._schema.name.partition("::")[2]
    normed, seeded = name in ("native_group_norm", "native_layer_norm"), torch.Tag.nondeterministic_seeded in func.tags
    return _Kind(name, name in _WAITS, name in _INDEXED, name in _SAME_DEVICE, normed, seeded)


def _tensors(values: Iterable[Any], found: list[Tensor] | None = None) -> list[Tensor]:
    """Return the tensors in nested arguments."""
    found = [] if found is None else found
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (tuple, list)):
            _tensors(one, found)
        elif isinstance(one, dict):
            _tensors(one.values(), found)
    return found


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(change, one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        made = [_mapped(change, one) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made) if isinstance(value, tuple) else made
    return value


class _Dispatch(TorchDispatchMode):
    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what would keep torch.compile out costs more than most operations do

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, held, kwargs = self.gpu, self.gpu.held, kwargs or {}
        tensors = _tensors(kwargs.values(), _tensors(args)) if kwargs else _tensors(args)
        strangers = [t for t in tensors if t.untyped_storage()._cdata not in held]
        if len(strangers) == len(tensors):
            if gpu.flying:
                for t in tensors:
                    gpu.landed(t)
            return func(*args, **kwargs)
        kind = _kind(func)
        if kind.name == "copy_":
            return self._copy(func, *args, **kwargs)
        if kind.waits:
            gpu.wait(kind.name)
        if kind.indexed:  # indices may lie on the CPU; they are copied, masks counted first
            places = [t for t in args[1] if t is not None]
            gpu.wait("index", sum(t.dtype == torch.bool or not gpu.has(t) for t in places))
            strangers = [t for t in strangers if t is args[0] or not any(t is p for p in places)]
        if strangers and (
            kind.same_device or (kind.indexed and strangers[0] is args[0]) or any(t.ndim for t in strangers)
        ):
            raise RuntimeError(f"{kind.name}: expected all tensors to be on the same device")
        if kind.normed and len({t.dtype for t in tensors}) > 1:
            raise RuntimeError(f"{kind.name}: mixed dtype, which CUDA refuses")
        if kind.seeded and not isinstance(kwargs.get("generator"), _CPUGenerator):
            with gpu.drawing():
                return _mapped(gpu.take, func(*args, **kwargs))
        made = func(*args, **kwargs)
        return gpu.take(made) if isinstance(made, Tensor) else _mapped(gpu.take, made)

    def _copy(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        gpu = self.gpu
        if gpu.has(target) != gpu.has(source):
            host = source if gpu.has(target) else target
            if not (non_blocking and host.untyped_storage()._cdata in gpu.pinned):
                gpu.wait("host to device" if gpu.has(target) else "device to host")
            elif host is target:
                _mark(gpu.flying, host)
        return func(target, source, non_blocking)


class _Function(TorchFunctionMode):
    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PLAIN:
            return func(*args, **kwargs or {})
        gpu, kwargs = self.gpu, kwargs or {}
        here = bool(args) and isinstance(args[0], Tensor) and gpu.has(args[0])
        if func in _ASKED:
            return self._asked(func, here, args, kwargs)
        generator, device = kwargs.get("generator"), kwargs.get("device")
        there = device is not None and torch.device(device).type == "cuda" and func is not torch.device
        told = isinstance(generator, _CPUGenerator) and (here or there or (bool(args) and isinstance(args[0], Tensor)))
        if told and (generator.device.type == "cuda") != (here or there):
            raise RuntimeError(f"{func.__name__}: the generator is on another device")
        if there or (func is Tensor.new_tensor and here):
            return self._made(func, args, kwargs, generator)
        if kwargs.get("pin_memory") is True and func.__name__ != "DataLoader":
            return _mark(gpu.pinned, func(*args, **kwargs | {"pin_memory": False}))
        if (
            (func in _HALF or func in _SINGLE)
            and torch.is_autocast_enabled("cuda")
            and any(map(gpu.has, _tensors(kwargs.values(), _tensors(args))))
        ):
            dtype = torch.get_autocast_dtype("cuda") if func in _HALF else torch.float32
            plain = (torch.float64, torch.int64, torch.int32, torch.bool)  # float64 is left alone, as on CUDA
            args, kwargs = _mapped(lambda t: t if t.dtype in plain else _cast(t, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _asked(self, func: Any, here: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        """Answer where a tensor lies, and bring it elsewhere."""
        gpu = self.gpu
        if func == _DEVICE:
            return GPU if here else func(*args)
        if func == _IS_CUDA:
            return here
        if func == _IS_CPU:
            return not here and func(*args)
        if func is Tensor.get_device:
            return 0 if here else func(*args)
        if func is Tensor.is_pinned:
            return args[0].untyped_storage()._cdata in gpu.pinned
        if func is Tensor.pin_memory:
            if here:
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
            return _mark(gpu.pinned, _copied(args[0]))
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        if args[0].layout == torch.strided:
            gpu.landed(args[0])
            if here and func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.tolist and here:
            gpu.wait("tolist")
            with _disable_current_modes():
                return args[0].detach().clone().tolist()
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any], generator: Any) -> Any:
        """Make what a factory is to make on the GPU."""
        gpu = self.gpu
        if func is torch.as_tensor and isinstance(args[0], Tensor):
            return self._moved(Tensor.to, args[0], GPU, **({"dtype": kwargs["dtype"]} if kwargs.get("dtype") else {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            gpu.wait("host to device")
        with contextlib.nullcontext() if isinstance(generator, _CPUGenerator) else gpu.drawing():
            made = func(*args, **kwargs | {"device": "cpu"})
        return _mapped(lambda t: gpu.take(t.clone() if func is torch.as_tensor else t), made)

    def _moved(self, func: Any, x: Tensor, *given: Any, **named: Any) -> Tensor:
        gpu, target, dtype = self.gpu, None, named.get("dtype")
        options = [
            *given,
            *(named[k] for k in ("device", "other") if k in named),
            *({Tensor.cpu: ["cpu"], Tensor.cuda: ["cuda"]}.get(func, [])),
        ]
        flags = [v for v in options if isinstance(v, bool)]  # non_blocking, copy
        for value in options:
            if isinstance(value, Tensor):
                target, dtype = "cuda" if gpu.has(value) else "cpu", value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool)):
                target = "cuda" if isinstance(value, int) else torch.device(value).type
        if target == "meta" or x.device.type == "meta":
            return func(x, *given, **named)
        moved = _cast(x, dtype)
        if (layout := named.get("memory_format")) is not None:
            with torch._C.DisableTorchFunction():
                moved = moved.to(memory_format=layout)
        if target is None or (target == "cuda") == gpu.has(x):
            with torch._C.DisableTorchFunction():
                return moved.clone() if moved is x and (named.get("copy") or flags[1:] == [True]) else moved
        blocking = not (named.get("non_blocking") or flags[:1] == [True])
        if target == "cuda":
            if blocking or x.untyped_storage()._cdata not in gpu.pinned:
                gpu.wait("host to device")
            return gpu.take(_copied(moved, gpu))
        moved = _copied(moved, gpu)
        if blocking:
            gpu.wait("device to host")
            return moved
        return _mark(gpu.pinned, _mark(gpu.flying, moved))  # torch copies into pinned memory of its own


class _Copy(torch.autograd.Function):
    """A copy to the other side, whose gradient comes back to this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gpu: PretendGPU) -> Tensor:
        ctx.gpu, ctx.here = gpu, gpu.has(x)
        return x.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with _disable_current_modes():
            copied = gradient.clone()
        ctx.gpu.wait("host to device" if ctx.here else "device to host")
        return (ctx.gpu.take(copied) if ctx.here else copied), None


def _copied(x: Tensor, gpu: PretendGPU | None = None) -> Tensor:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        tracked = gpu is not None and x.requires_grad and torch.is_grad_enabled()
        return _Copy.apply(x, gpu) if tracked else x.detach().clone()


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x if dtype is None else x.to(dtype)


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """Let this process believe that it has one GPU."""
    gpu = PretendGPU()
    mode = _Function(gpu)

    def seeing(function: Any) -> Any:
        """What is called on the way back must see the mode too."""

        def again(*given: Any, **named: Any) -> Any:
            with contextlib.nullcontext() if torch.overrides._get_current_function_mode_stack() else mode:
                return function(*given, **named)

        return again

    def checkpoint(function: Any, *args: Any, **options: Any) -> Any:
        return _checkpoint(seeing(function), *args, **options)

    def hooked(tensor: Tensor, hook: Any) -> Any:
        return _hooked(tensor, seeing(hook))

    def applied(function: Any, *gradients: Any) -> Any:
        return (_applied if type(function) is _Copy._backward_cls else seeing(_applied))(function, *gradients)  # type: ignore[attr-defined]

    def grouped(lists: Any, indices: bool = False) -> Any:
        found = _grouped(lists, indices)
        return {
            (GPU if gpu.has(lists_[0][0][0]) else device, dtype): lists_ for (device, dtype), lists_ in found.items()
        }

    quiet = {"_lazy_init": None, "set_device": None, "empty_cache": None, "reset_peak_memory_stats": None, "is_available": True, "is_bf16_supported": True,
             "device_count": 1, "current_device": 0, "max_memory_allocated": 0, "memory_allocated": 0, "mem_get_info": (2**34, 2**34),
             "get_device_capability": (9, 0), "get_device_name": "pretended GPU", "is_initialized": True}  # fmt: skip
    answers: dict[str, Any] = {name: lambda *_, answer=answer, **__: answer for name, answer in quiet.items()}
    answers |= {
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "manual_seed_all": gpu.generator.manual_seed, "manual_seed": gpu.generator.manual_seed,
        "get_rng_state": lambda *_: gpu.generator.get_state(), "set_rng_state": lambda state, *_: gpu.generator.set_state(state),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # it knows devices from before, and must not know this one afterwards
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch.utils.checkpoint, "checkpoint", checkpoint))
        stack.enter_context(mock.patch.object(Tensor, "register_post_accumulate_grad_hook", hooked))
        stack.enter_context(mock.patch.object(torch.autograd.function.BackwardCFunction, "apply", applied))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        stack.enter_context(mode)
        stack.enter_context(_Dispatch(gpu))
        yield gpu
