"""Timesteps on a GPU whose values the host knows: reading one does not wait for the GPU.

Schedulers keep their timesteps on the GPU and look single ones up in a table in host memory (DDIM, PNDM), or compare
them with a number (Wan 2.2). Each time the host waits until the GPU is done with everything before, and only then
prepares the next step. The values are known from the beginning: `HostKnown` carries them along.
"""

from __future__ import annotations

from typing import Any

import torch

from cfg_parallel.codec import version

# Results of these are known too, if all tensors that they are computed from are. On CPUs and GPUs they are the same.
_TWINS = {
    *("__getitem__", "unbind", "select", "expand", "view", "reshape", "flatten", "squeeze", "unsqueeze"),
    *("clone", "detach", "long", "int", "abs", "floor"),
    *("__add__", "add", "__radd__", "__sub__", "sub", "__rsub__", "rsub", "__mul__", "mul", "__rmul__", "__neg__"),
    *("__eq__", "eq", "__ne__", "ne", "__lt__", "lt", "__le__", "le", "__gt__", "gt", "__ge__", "ge"),
}
_READS = {
    *("item", "tolist", "cpu", "numpy"),
    *("__int__", "__float__", "__bool__", "__index__", "__format__", "__contains__"),
}


class HostKnown(torch.Tensor):
    """`real`, with `host`: the same values in host memory. In every operation it is `real`; reading its value, or
    looking something up by it in host memory, uses `host`, unless `real` has been overwritten since."""

    _real: torch.Tensor
    _host: torch.Tensor
    _seen: int

    @staticmethod
    def __new__(cls, real: torch.Tensor, host: torch.Tensor) -> HostKnown:
        self = torch.Tensor._make_subclass(cls, real)
        self._real, self._host, self._seen = real, host, version(real)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        subject: Any = args[0] if args else None
        if name in _READS and all(_is_known(obj) for obj in _flat((args, kwargs))):
            host = [arg.clone() if name in ("cpu", "numpy") else arg for arg in _map(args[:1], HostKnown._read)]
            return func(*host, *_map(args[1:], HostKnown._read), **kwargs)
        if name == "__getitem__" and not isinstance(subject, HostKnown) and subject.device.type == "cpu":
            return func(subject, _map(args[1], HostKnown._read))
        if name == "__getitem__" and isinstance(args[1], HostKnown) and _is_known(args[1]) and _is_index(args[1]):
            return subject[int(args[1])]
        if name == "nonzero" and _is_known(subject):  # how many there are is read (DDPM)
            hosts = func(subject._host, *args[1:], **kwargs)
            return know_all(hosts, subject.device)
        result = func(*_map(args, plain), **_map(kwargs, plain))
        if name == "to" and isinstance(subject, HostKnown) and _is_known(subject) and result.device == subject.device:
            return subject if result is subject._real else HostKnown(result, subject._host.to(result.dtype))
        if name in _TWINS and all(_is_known(obj) for obj in _flat((args, kwargs))):
            hosts = func(*_map(args, HostKnown._read), **_map(kwargs, HostKnown._read))
            if isinstance(result, torch.Tensor):
                return HostKnown(result, hosts)
            return type(result)(map(HostKnown, result, hosts))  # unbind
        return result

    def _is_current(self) -> bool:
        return version(self._real) == self._seen

    def _read(self) -> torch.Tensor:
        return self._host if self._is_current() else self._real


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor behind a HostKnown; any other as it is."""
    return tensor._real if isinstance(tensor, HostKnown) else tensor


def know_all(hosts: Any, device: torch.device) -> Any:
    """Tensors in host memory, or a tuple of them, as known ones on `device`. Waits for nothing."""
    if isinstance(hosts, tuple):
        return tuple(know_all(host, device) for host in hosts)
    return HostKnown(hosts.to(device, non_blocking=True, copy=True), hosts)


def know(timesteps: torch.Tensor) -> torch.Tensor:
    """`timesteps`, known on the host. Waits for the GPU, now and not at every step."""
    if isinstance(timesteps, HostKnown) and timesteps._is_current():
        return timesteps
    return HostKnown(plain(timesteps), plain(timesteps).cpu().clone())


def _is_known(obj: Any) -> bool:
    return not isinstance(obj, torch.Tensor) or (isinstance(obj, HostKnown) and obj._is_current())


def _is_index(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 0 and not tensor.dtype.is_floating_point and tensor.dtype != torch.bool


def _flat(obj: Any) -> list[Any]:
    if isinstance(obj, (tuple, list)):
        return [leaf for item in obj for leaf in _flat(item)]
    return _flat(list(obj.values())) if isinstance(obj, dict) else [obj]


def _map(obj: Any, fn: Any) -> Any:
    """`obj` with `fn` applied to what is HostKnown in tuples, lists and dicts."""
    if isinstance(obj, HostKnown):
        return fn(obj)
    if isinstance(obj, (tuple, list)):
        return type(obj)(_map(item, fn) for item in obj)
    if isinstance(obj, dict):
        return {key: _map(value, fn) for key, value in obj.items()}
    return obj
