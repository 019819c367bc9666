"""What a scheduler's step computes on a GPU from numbers that the host knows: done once, and without waiting.

Schedulers keep their sigmas in host memory and move some to the GPU in each step, where they become coefficients by
dozens of operations on a few elements (UniPC). Such a copy makes the host wait until the GPU is done with everything
before, and so does solving a system of equations. The numbers are the same in each generation with as many steps: a
coefficient is computed where and as the scheduler does it, the first time, and then had by what it was computed from.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from cfg_parallel import numerics
from cfg_parallel.codec import flat_bytes, version

_LIMIT = 32_768  # coefficients, of 512 bytes each on a GPU; a schedule of 50 steps has about 4,000
_IDLE_STEPS = 3  # in a row that copied nothing; most schedulers never do
_SMALL = 1024  # bytes; what is larger is no coefficient
_STAGED = 64 * 1024  # bytes; the driver copies as much from pageable memory without waiting

# What they return depends on nothing but their operands, and it is not there to be written to.
_PURE = {
    *("__getitem__", "select", "stack", "cat", "unsqueeze", "squeeze", "flatten", "reshape", "view", "expand"),
    *("to", "float", "double", "abs", "exp", "expm1", "log", "log1p", "neg", "reciprocal", "rsqrt", "sqrt", "square"),
    *("sin", "cos", "sinh", "cosh", "tanh", "sigmoid", "maximum", "minimum", "clamp", "sum", "prod", "linalg_solve"),
    *("add", "sub", "mul", "div", "pow", "rsub", "eq", "ne", "lt", "le", "gt", "ge", "__neg__", "__abs__"),
    *("__add__", "__sub__", "__mul__", "__truediv__", "__pow__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__"),
    *("__ge__", "__radd__", "__rsub__", "__rmul__", "__rtruediv__", "__rdiv__", "__rpow__"),
    *("item", "__bool__", "__float__", "__int__"),
}
_FROM_DATA = (torch.tensor, torch.as_tensor)
_FACTORIES = (*_FROM_DATA, torch.ones, torch.zeros, torch.full)
_ATOMS = (int, str, type(None), type(...), torch.dtype, torch.device, torch.layout)


class _Coefficient(NamedTuple):
    name: int
    value: Any  # a tensor, or the number that was read from one
    version: int

    def is_current(self) -> bool:
        return _version(self.value) == self.version


class Coefficients(TorchFunctionMode):
    """While it is entered, what is computed on devices of type `device_type` from numbers alone is computed once.

    A coefficient is known by its operation, the numbers in it and the names of its operands. At the beginning are
    copies from host memory, known by what was copied, where to and PyTorch's settings."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self._known: dict[Any, _Coefficient] = {}
        self._by_id: dict[int, _Coefficient] = {}  # keeps them alive, so that no other tensor gets their id
        self._names = itertools.count()
        self._settings: Any = ()
        self._autocast: Any = ()
        self._idle_steps = 0

    def begin(self) -> None:
        """A schedule begins: with PyTorch's settings of now."""
        self._settings = tuple(numerics.capture().values())
        self._idle_steps = 0

    @property
    def are_needed(self) -> bool:
        """Whether to enter this again in the steps of this schedule: every operation inside costs the host a little."""
        return self._idle_steps < _IDLE_STEPS

    def __enter__(self) -> Coefficients:
        if len(self._by_id) > _LIMIT:
            self._known.clear()
            self._by_id.clear()
        self._idle_steps += 1
        self._autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        return super().__enter__()  # type: ignore[no-any-return]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind is None:
            return func(*args, **kwargs)
        if kind == "factory":
            return self._make(func, args, kwargs)
        if kind == "copy" and _is_in_host_memory(args[0]):
            target = torch.device("cuda") if func is torch.Tensor.cuda else _target(args[1:], kwargs)
            if target is not None and target.type == self._device_type:
                return self._copy(func, target, args, kwargs)
        for arg in args:
            if isinstance(arg, torch.Tensor) and id(arg) not in self._by_id:  # as most of the time
                return func(*args, **kwargs)
        return self._once((func,), func, args, kwargs)

    def _copy(self, func: Any, target: torch.device, args: Any, kwargs: Any) -> Any:
        """A tensor in host memory, on `target`: the host does not wait until it is there."""
        self._idle_steps = 0
        host: torch.Tensor = args[0]
        if not any(isinstance(arg, bool) for arg in args):  # non_blocking by its position
            kwargs = {**kwargs, "non_blocking": True}
        if host.nbytes > _STAGED and target.type == "cuda":
            dtype = next((obj for obj in (*args[1:], kwargs.get("dtype")) if isinstance(obj, torch.dtype)), host.dtype)
            host = host.to(dtype).pin_memory()
        if host.nbytes > _SMALL:
            return func(host, *args[1:], **kwargs)
        data = (flat_bytes(host).numpy().tobytes(), host.dtype, *host.shape, *host.stride())
        return self._once((*self._place(target), *data), lambda *rest, **kw: func(host, *rest, **kw), args[1:], kwargs)

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor that is made of numbers."""
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if target is None or target.type != self._device_type:
            return func(*args, **kwargs)
        if func not in _FROM_DATA:
            return self._once((func, *self._place(target)), func, args, kwargs)
        on_device = isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu"
        if on_device or not kwargs.keys() <= {"device", "dtype"}:
            return func(*args, **kwargs)
        host = func(*args, **{**kwargs, "device": "cpu"})
        return self._copy(torch.Tensor.to, target, (host, target), {})

    def _place(self, target: torch.device) -> tuple[Any, ...]:
        """On a GPU a tensor is there for the work of one stream."""
        stream = torch.cuda.current_stream(target) if target.type == "cuda" else None
        return (self._settings, self._autocast, target, stream)

    def _once(self, key: tuple[Any, ...], func: Any, args: Any, kwargs: Any) -> Any:
        """`func(*args, **kwargs)`, or what that was before."""
        parts = list(key)
        if not (self._spell(args, parts) and (not kwargs or self._spell((*kwargs, *kwargs.values()), parts))):
            return func(*args, **kwargs)
        key = tuple(parts)
        known = self._known.get(key)
        if known is None or not known.is_current():
            with torch.inference_mode(False), torch.no_grad():
                value = func(*args, **kwargs)
            if isinstance(value, torch.Tensor) and not self._is_coefficient(value):
                return value
            known = self._by_id.get(id(value)) or _Coefficient(next(self._names), value, _version(value))
            self._known[key] = self._by_id[id(value)] = known
        return known.value

    def _is_coefficient(self, tensor: torch.Tensor) -> bool:
        return type(tensor) is torch.Tensor and tensor.device.type == self._device_type and tensor.nbytes <= _SMALL

    def _spell(self, obj: Any, parts: list[Any]) -> bool:
        """Append what `obj` is to `parts`, if it is made of numbers and coefficients."""
        if isinstance(obj, torch.Tensor):
            known = self._by_id.get(id(obj))
            if known is None or not known.is_current():
                return False
            parts.append(known.name)
        elif isinstance(obj, float):
            parts.append((type(obj), float(obj).hex()))  # 0.0 and -0.0 differ
        elif isinstance(obj, _ATOMS):
            parts.append((type(obj), obj))
        elif isinstance(obj, (tuple, list)):
            parts.append((type(obj), len(obj)))
            for item in obj:
                if not self._spell(item, parts):
                    return False
        elif isinstance(obj, slice):
            parts.append(slice)
            return self._spell((obj.start, obj.stop, obj.step), parts)
        else:
            return False
        return True


def _version(value: Any) -> int:
    return version(value) if isinstance(value, torch.Tensor) else 0


def _is_in_host_memory(obj: Any) -> bool:
    return type(obj) is torch.Tensor and obj.device.type == "cpu" and obj.layout is torch.strided


@functools.lru_cache(1024)
def _kind(func: Any) -> str | None:
    if func in (torch.Tensor.to, torch.Tensor.cuda):
        return "copy"
    if func in _FACTORIES:
        return "factory"
    return "pure" if getattr(func, "__name__", "") in _PURE else None


def _target(args: Any, kwargs: Any) -> torch.device | None:
    """Where `Tensor.to(*args, **kwargs)` puts a tensor, if it says so."""
    for obj in (*args[:1], kwargs.get("device"), kwargs.get("other")):
        if isinstance(obj, (torch.device, str)):
            return torch.device(obj)
        if isinstance(obj, torch.Tensor):
            return obj.device
    return None
