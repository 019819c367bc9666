"""Python objects to bytes with their tensors left out, so that tensors can travel by a faster road than pickle."""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle
import numpy as np
import torch

from cfg_parallel.errors import ConfigurationError


class UnshippableError(TypeError):
    """An argument is not plain data: a copy of it on the follower would drift from the leader's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """`start:stop` of dimension `dim` of `base`, uncut so that the same rows of a tensor are known to be resident."""

    base: torch.Tensor
    start: int
    stop: int
    dim: int = 0

    def tensor(self) -> torch.Tensor:
        return self.base.narrow(self.dim, self.start, self.stop - self.start)


_CACHE_LINE = 64  # bytes


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Everything about a tensor but its values. `on_device` is False for a tensor that stays in host memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    on_device: bool
    # Where in a cache line it begins: MKL sums in another order when an address is no multiple of 16, as weights mapped
    # from a safetensors file are not, and cuBLAS asks too. Two tensors that differ only in this are the same to a call.
    offset: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def of(cls, tensor: torch.Tensor, device: torch.device) -> TensorSpec:
        if tensor.layout is not torch.strided:
            raise UnshippableError(f"Expected strided tensors, but got layout {tensor.layout}; convert it to strided.")
        if tensor.device.type not in ("cpu", device.type):
            raise UnshippableError(f"Expected a tensor on cpu or {device}, but got one on {tensor.device}.")
        stride = tensor.stride() if is_dense(tensor) else torch.empty_like(tensor, device="meta").stride()
        aligned = is_dense(tensor) and tensor.data_ptr() % tensor.itemsize == 0
        offset = tensor.data_ptr() % _CACHE_LINE if aligned else 0
        return cls(tuple(tensor.shape), tuple(stride), tensor.dtype, tensor.device.type == device.type, offset)

    def empty(self, device: torch.device) -> torch.Tensor:
        device = device if self.on_device else torch.device("cpu")
        if not self.offset:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        memory = torch.empty(self.nbytes + 2 * _CACHE_LINE, dtype=torch.uint8, device=device)
        start = (self.offset - memory.data_ptr()) % _CACHE_LINE
        return memory[start : start + self.nbytes].view(self.dtype).as_strided(self.shape, self.stride)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def version(tensor: torch.Tensor) -> int:
    """Counts the writes to a tensor. One of inference mode has no such count, which is -1."""
    return -1 if tensor.is_inference() else tensor._version


def is_dense(tensor: torch.Tensor) -> bool:
    """True when the elements fill one span of memory without gap or overlap, in whatever order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of `tensor` in memory order as a 1-D uint8 tensor; a view when the tensor is dense."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not is_dense(tensor):
        tensor = tensor.clone()  # with the strides of `empty_like`
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class _StructurePickler(cloudpickle.Pickler):
    """For modules: any class, also one defined in a notebook cell."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> tuple[int, bool, bool] | None:
        if not isinstance(obj, torch.Tensor) or is_special(obj):
            return None
        index = self._index.setdefault(id(obj), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(obj)
        return index, isinstance(obj, torch.nn.Parameter), obj.requires_grad

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):  # quantized, say
            return _rebuild_special, take_apart(obj)
        if type(obj).__module__ in _OF_THIS_PROCESS:
            return _left_out, ()
        if isinstance(obj, torch.Stream):  # of a hook that moves weights
            return type(obj), ()
        if type(obj).__name__ == "ModuleGroup" and type(obj).__module__ == "diffusers.hooks.group_offloading":
            return type(None), ()  # it has the weights once more; the follower makes its own
        return super().reducer_override(obj)


# Process groups and device meshes: where a replica is sent to ranks that have their own, only its tensors are read.
_OF_THIS_PROCESS = ("torch._C._distributed_c10d", "torch.distributed.distributed_c10d", "torch.distributed.device_mesh")


def _left_out() -> None:
    """In the place of what another process has for itself."""


def is_special(tensor: torch.Tensor) -> bool:
    """Whether it is more than its elements: a tensor subclass, as quantized weights are."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def take_apart(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a special tensor is made of: plain tensors, and what is needed to put them together again.

    Either it wraps tensors by PyTorch's protocol for that (torchao, quanto; the mesh of a DTensor is a part too), or it
    is a tensor with attributes (GGUF, bitsandbytes)."""
    kind, is_parameter = type(tensor), isinstance(tensor, torch.nn.Parameter)
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        return kind, parts, context, tensor.size(), tensor.stride(), is_parameter, tensor.requires_grad
    if not _has_elements(tensor):
        raise ConfigurationError(
            f"The denoiser has a weight of type {kind.__name__}, which wraps other tensors and has no "
            "__tensor_flatten__ to take it apart by; load the denoiser without this quantization."
        )
    with torch._C.DisableTorchFunctionSubclass():
        elements = torch.Tensor._make_subclass(torch.Tensor, tensor.detach())
    return kind, {"": elements}, dict(tensor.__dict__), None, None, is_parameter, tensor.requires_grad


def _has_elements(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return tensor.data_ptr() != 0 or tensor.numel() == 0
        except RuntimeError:  # it has no storage
            return False


def _rebuild_special(
    kind: Any,
    parts: dict[str, Any],
    context: Any,
    size: Any,
    stride: Any,
    is_parameter: bool,
    requires_grad: bool,
) -> torch.Tensor:
    if size is None:
        tensor = torch.Tensor._make_subclass(kind, parts[""], requires_grad)
        tensor.__dict__.update(context)
        return tensor
    tensor = kind.__tensor_unflatten__(parts, context, size, stride)
    return torch.nn.Parameter(tensor, requires_grad=requires_grad) if is_parameter else tensor


# What a call may carry besides tensors and the builtin containers: values, not objects with a life of their own.
_PLAIN = (
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    torch.memory_format,
    np.generic,
    np.ndarray,
    np.dtype,
    enum.Enum,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.EllipsisType,
    complex,
    range,
    slice,
    tuple,
    list,
    dict,
    set,
)


class _PlainPickler(pickle.Pickler):
    """For the arguments and results of a call: plain data only, so that nothing the denoiser mutates is left behind."""

    def __init__(self, file: io.BytesIO, unwrap: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor | Rows] = []
        self._index: dict[Any, int] = {}
        self._unwrap = unwrap

    def persistent_id(self, obj: Any) -> int | None:
        key: Any
        if isinstance(obj, Rows):
            key = (id(obj.base), obj.start, obj.stop, obj.dim)
        elif isinstance(obj, torch.Tensor):
            if type(obj).__name__ == "AsyncCollectiveTensor":  # of context parallelism: nobody has waited for it yet
                obj = obj.trigger_wait()  # type: ignore[attr-defined]
            obj = self._unwrap(obj)
            if type(obj) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                raise UnshippableError(f"an argument is a {type(obj).__name__}, a tensor subclass")
            key = id(obj)
        else:
            return None
        index = self._index.setdefault(key, len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(obj)
        return index

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _PLAIN) or dataclasses.is_dataclass(obj):
            return NotImplemented
        raise UnshippableError(f"an argument is a {type(obj).__module__}.{type(obj).__qualname__}, not plain data")


class _Unpickler(pickle.Unpickler):
    def __init__(self, body: bytes, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(body))
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, int):
            return self._tensors[pid]
        index, is_parameter, requires_grad = pid
        tensor = self._tensors[index]
        if is_parameter and not isinstance(tensor, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=requires_grad)
            if isinstance(self._tensors, list):
                self._tensors[index] = tensor  # a tied parameter stays one object
        return tensor


def encode_structure(obj: Any) -> tuple[bytes, list[torch.Tensor]]:
    """A module (hooks, buffers and plain tensor attributes included) as bytes, and its tensors in order."""
    file = io.BytesIO()
    pickler = _StructurePickler(file)
    pickler.dump(obj)
    return file.getvalue(), pickler.tensors


def encode_plain(
    obj: Any, unwrap: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> tuple[bytes, list[torch.Tensor | Rows]]:
    """Arguments or results as bytes, and their tensors in order. `unwrap` turns a tensor subclass into its value.

    Raises UnshippableError when something in `obj` is not plain data."""
    file = io.BytesIO()
    pickler = _PlainPickler(file, unwrap)
    try:
        pickler.dump(obj)
    except (pickle.PicklingError, AttributeError) as error:  # a lambda, or a class that cannot be found by its name
        raise UnshippableError(f"an argument cannot be pickled: {error}") from error
    return file.getvalue(), pickler.tensors


def decode(body: bytes, tensors: Sequence[Any]) -> Any:
    """The object whose bytes are `body`, with `tensors` put back in their places."""
    return _Unpickler(body, tensors).load()


def map_tensors(obj: Any, fn: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    """`obj` with `fn` applied to every `kind` inside tuples, lists, dicts and dataclasses. Containers are copied."""
    if isinstance(obj, kind):
        return fn(obj)
    if isinstance(obj, tuple):
        items = [map_tensors(item, fn, kind) for item in obj]
        return type(obj)(*items) if hasattr(obj, "_fields") else type(obj)(items)
    if isinstance(obj, list):
        return [map_tensors(item, fn, kind) for item in obj]
    if isinstance(obj, Rows):
        return obj
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = [f.name for f in dataclasses.fields(obj) if f.init]
        return dataclasses.replace(obj, **{name: map_tensors(getattr(obj, name), fn, kind) for name in fields})
    if isinstance(obj, dict):
        return {key: map_tensors(value, fn, kind) for key, value in obj.items()}
    return obj


def tensors_in(obj: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside tuples, lists, dicts and dataclasses, in order."""
    if isinstance(obj, torch.Tensor):
        yield obj
    elif isinstance(obj, (tuple, list)):
        for item in obj:
            yield from tensors_in(item)
    elif isinstance(obj, dict):
        for item in obj.values():
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        for f in dataclasses.fields(obj):
            yield from tensors_in(getattr(obj, f.name))


def signature(obj: Any) -> Any:
    """A hashable summary: shapes and dtypes of tensors, values of everything else but floats.

    Two calls with equal signatures have outputs of equal shape: a float (a guidance strength, a timestep) sets none."""
    if isinstance(obj, Rows):
        obj = obj.tensor()
    if isinstance(obj, torch.Tensor):  # an output's strides follow its input's
        return ("tensor", tuple(obj.shape), obj.dtype, None if obj.is_contiguous() else obj.stride())
    if isinstance(obj, float):
        return float
    if isinstance(obj, (tuple, list)):
        return (type(obj), *(signature(item) for item in obj))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return (type(obj), *(signature(getattr(obj, f.name)) for f in dataclasses.fields(obj)))
    if isinstance(obj, dict):
        return (dict, *((key, signature(value)) for key, value in obj.items()))
    try:
        hash(obj)
    except TypeError:
        return (type(obj), repr(obj))
    return type(obj), obj  # the type too: True == 1
