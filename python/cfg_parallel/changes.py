"""Whether a denoiser has changed: since it was shipped, between two steps, between two calls, by a forward."""

from __future__ import annotations

import enum
import functools
import itertools
import operator
import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cfg_parallel.codec import is_special, take_apart, tensors_in, version
from cfg_parallel.modules import hooks_of, submodules
from cfg_parallel.offload import FIRST_FORWARD_HOOKS, restless

_TRACES_DEPTH = 5
_NO_STORES = (
    *(torch.nn.Module, type, functools.partial),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SCALARS = frozenset([bool, int, float, str, type(None)])
_CONTAINERS = frozenset([dict, OrderedDict, list, tuple, set])
# What PyTorch keeps in a module for itself. `_diffusers_hook` holds per-generation state, and what `_hook` reads.
_NOT_SETTINGS = frozenset(vars(torch.nn.Module())) - {"training", *_HOOKS} | {"_diffusers_hook"}
_IGNORED = _NOT_SETTINGS - {"_parameters", "_buffers", "_modules"}  # for a Watch, which looks into those dicts
_MISSING = object()
_NOT_HOOKED = _NOT_SETTINGS | {"forward"}  # group offload takes some hooks off in its first forward


def fingerprint(module: torch.nn.Module) -> tuple[Any, ...]:
    """Changes when weights, buffers, submodules, hooks or plain settings (a LoRA's scale, say) of `module` change.

    Compared once a generation; reads no tensor value: a tensor is its identity, its version counter and its memory. The
    memory does not count where a hook leaves the weights in another place after each forward."""
    moving = restless(module)
    parts: list[Any] = []
    add = parts.append
    for sub in submodules(module):
        attributes = sub.__dict__
        add(type(sub))
        if sub._modules:
            parts += sub._modules
            parts += map(id, sub._modules.values())
        for name, hook in hooks_of(sub).items():
            if name not in FIRST_FORWARD_HOOKS:
                parts += (name, *_hook(hook))
        moves = id(sub) in moving
        describe, without = (_moving_tensor, _NOT_HOOKED) if moves else (_tensor, _NOT_SETTINGS)
        for tensors in (sub._parameters, sub._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    parts += (key, *describe(tensor))
        for key, value in attributes.items():
            if key in without:
                continue
            kind = type(value)
            if kind in _SCALARS:
                parts += (key, value)
            elif kind not in _CONTAINERS or value:  # most are empty hook dicts
                parts += (key, _setting(value))
    return tuple(parts)


def traces(module: torch.nn.Module) -> dict[Any, int | float]:
    """What forwards of `module` can have left behind in plain objects that it holds, such as a store of attention
    maps that a pipeline looks into: lengths of containers, counts, tensors, by place. Not in modules themselves, where
    it is tables that a replica makes for itself."""
    found: dict[Any, int | float] = {}

    def look(value: Any, place: Any, depth: int) -> None:
        if type(value) in (int, float):
            found[place] = value
        elif isinstance(value, torch.Tensor):
            found[place] = id(value)
        elif isinstance(value, (dict, list, tuple, set)):
            found[place] = len(value)
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items if depth else ():
                look(item, (place, key), depth - 1)
        elif depth and not isinstance(value, _NO_STORES):
            look(getattr(value, "__dict__", None), (place, id(value)), depth - 1)

    for sub in submodules(module):
        for key, value in sub.__dict__.items():
            plain = type(value) not in _SCALARS and type(value) not in _CONTAINERS and not torch.is_tensor(value)
            if plain and key not in _NOT_SETTINGS:
                for name, inner in getattr(value, "__dict__", {}).items():
                    look(inner, (id(value), name), _TRACES_DEPTH)
    return found


def left_something(before: dict[Any, int | float], after: dict[Any, int | float]) -> bool:
    """What is new in its place, a replica makes for itself, too: the state of a quantized weight."""
    return any(before[place] != after[place] for place in before.keys() & after.keys())


class Watch:
    """Notices changes of a denoiser in a small part of a fingerprint's time."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        found = self._found = submodules(module)
        tensors = [*module.parameters(), *module.buffers()]
        self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self._settings = [
            (sub.__dict__, key)
            for sub in found
            for key, value in sub.__dict__.items()
            if key not in _NOT_HOOKED and type(value) not in _SCALARS and (type(value) not in _CONTAINERS or value)
        ]
        self._settings.append((module.__dict__, "_cache_config"))  # there only while a cache is enabled
        self._seen = self._look()
        # Not where weights are moved or cast for each forward, are made of several tensors, or have no version.
        self.can_tell = not (restless(module) or any(map(is_special, tensors)) or len(self._tensors) < len(tensors))
        self._keys = [(sub.__dict__, tuple(key for key in sub.__dict__ if key not in _IGNORED)) for sub in found]
        held = [each for sub in found for each in (sub._parameters, sub._buffers, sub._modules, hooks_of(sub))]
        self._dicts = [each for each in held if each]
        values = [attributes[key] for attributes, keys in self._keys for key in keys]
        self._sized = [
            *held,
            *(attributes for attributes, _ in self._keys),
            *(value for value in values if type(value) in _CONTAINERS),
        ]
        self._hooks = [hook for sub in found for hook in hooks_of(sub).values()]
        self._lengths, self._objects, self._rest = self._measure(), list(self._held()), self._look_closely()

    def changed(self) -> bool:
        """Whether there was what a callback can do between two steps: weights written in place, settings of a LoRA or
        an attention processor, processors replaced. Not new submodules or hooks."""
        return self._look() != self._seen

    def same(self) -> bool:
        """Whether nothing was done at all since: then its fingerprint, its device and its hooks are the same. False
        where an object was replaced by an equal one, too, and where it cannot tell."""
        return (
            self.can_tell
            and self._measure() == self._lengths
            and all(map(operator.is_, self._held(), self._objects))
            and self._look_closely() == self._rest
            and not self.changed()
        )

    def _look(self) -> tuple[list[int], list[Any]]:
        versions = [tensor._version for tensor in self._tensors]
        return versions, [_setting(holder.get(key)) for holder, key in self._settings]

    def _held(self) -> Iterator[Any]:
        yield from map(type, self._found)
        yield from itertools.chain.from_iterable(map(dict.keys, self._dicts))
        yield from itertools.chain.from_iterable(map(dict.values, self._dicts))
        for attributes, keys in self._keys:
            yield from map(attributes.get, keys, itertools.repeat(_MISSING))

    def _measure(self) -> list[int]:
        return list(map(len, self._sized))

    def _look_closely(self) -> tuple[list[Any], list[Any]]:
        return [(tensor.data_ptr(), tensor.dtype) for tensor in self._tensors], list(map(_hook, self._hooks))


def _hook(hook: Any) -> tuple[Any, ...]:
    """A hook's settings without its state: a cache of another configuration may get the address of the one before."""
    plain = {key: value for key, value in vars(hook).items() if type(value) in _SCALARS or type(value) is tuple}
    config = vars(hook).get("config")
    return id(hook), _setting(plain), _setting(getattr(config, "__dict__", config))


class Hooks:
    """Notices in a small part of a forward's time that a denoiser has other hooks or processors than before."""

    def __init__(self, module: torch.nn.Module) -> None:
        moving = restless(module)  # group offload takes some hooks off in its first forward
        self._modules = [(sub.__dict__, None if id(sub) in moving else type(sub)) for sub in submodules(module)]
        self._replaceable = [each for each in self._modules if _can_be_replaced(each[0])]
        self._dicts = [attributes for attributes, _ in self._modules]
        self._dicts += [attributes[key] for attributes, _ in self._modules for key in _HOOKS]
        self._lengths = list(map(len, self._dicts))
        self._seen, self._seen_replaceable = self._look(self._modules), self._look(self._replaceable)

    def changed(self) -> bool:
        # What is put on a module makes a dict longer; only what is there can be replaced.
        if list(map(len, self._dicts)) == self._lengths and self._look(self._replaceable) == self._seen_replaceable:
            return False
        if self._look(self._modules) != self._seen:
            return True
        self._lengths = list(map(len, self._dicts))
        return False

    def _look(self, modules: Sequence[tuple[dict[str, Any], Any]]) -> list[Any]:
        return [
            (
                _own_forward(attributes.get("forward"), cls),
                _processor(attributes),
                *(key for hooks in _HOOKS for key in attributes[hooks]),
            )
            for attributes, cls in modules
        ]


def _own_forward(forward: Any, cls: Any) -> Any:
    """What stands in the place of the class's forward. A hook that is taken off leaves that one as a bound method."""
    if cls is None or forward is None or getattr(forward, "__func__", None) is cls.forward:
        return None
    return forward


def _processor(attributes: dict[str, Any]) -> Any:
    return attributes.get("processor") or attributes["_modules"].get("processor")


def _can_be_replaced(attributes: dict[str, Any]) -> bool:
    hooked = any(attributes[hooks] for hooks in _HOOKS)
    return hooked or "forward" in attributes or _processor(attributes) is not None


def _tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    """`.to(dtype)` keeps a parameter's identity and version, but not its memory."""
    if is_special(tensor):
        kind, parts, context, *_ = take_apart(tensor)
        return id(kind), *(item for part in tensors_in(parts) for item in _tensor(part)[1:]), _setting(context)
    return id(tensor), version(tensor), tensor.data_ptr(), tensor.dtype


def _moving_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    """`.to()`, which brings it to a forward and back, gives a parameter other memory, and replaces a buffer."""
    identity = id(tensor) if isinstance(tensor, torch.nn.Parameter) else None
    if is_special(tensor):
        kind, parts, context, *_ = take_apart(tensor)
        return identity, version(tensor), id(kind), *(part.dtype for part in tensors_in(parts)), _setting(context)
    return identity, version(tensor), tensor.shape, tensor.dtype


def _setting(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, dict):
        return tuple((key if isinstance(key, str) else id(key), _setting(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)) and len(value) < 32:
        return tuple(_setting(item) for item in value)
    if isinstance(value, enum.Enum):
        return value
    # A plain object such as an attention processor: its scale, its backend.
    plain = {k: v for k, v in getattr(value, "__dict__", {}).items() if type(v) in _SCALARS or isinstance(v, enum.Enum)}
    return id(value), tuple(plain.items())
