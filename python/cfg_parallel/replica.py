"""A replica of a denoiser: its structure as bytes, its weights from memory to memory, and what makes it stale."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cfg_parallel.codec import TensorSpec, decode, encode_structure
from cfg_parallel.errors import ConfigurationError
from cfg_parallel.link import Link

_CHUNK = 256 << 20  # bytes of weights in one message


def send_replica(link: Link, name: str, module: torch.nn.Module, timeout: float) -> None:
    """Give the follower at the other end of `link` a copy of `module`, named `name`."""
    if any(getattr(sub, "_compiled_call_impl", None) is not None for sub in module.modules()):
        raise ConfigurationError(
            f"The denoiser {name!r} is compiled (torch.compile), which cfg-parallel does not support yet: its replica "
            "would round otherwise. Load it without compiling."
        )
    body, tensors = encode_structure(module)
    specs = [TensorSpec.of(tensor, link.device) for tensor in tensors]
    link.send({"kind": "denoiser", "name": name, "body": body, "weights": specs})
    for chunk in _chunks(specs):
        link.send({"kind": "weights"}, [tensors[i] for i in chunk])
        _expect(link.read(timeout), "stored")
    _expect(link.read(timeout), "ready")
    _wait_for(link.device)


def _expect(header: dict[str, Any], kind: str) -> None:
    if header["kind"] == "error":
        raise RuntimeError(f"The follower could not build the denoiser: {header['message']}")
    if header["kind"] != kind:
        raise RuntimeError(f"Expected a message of kind {kind!r} from the follower, but got {header['kind']!r}.")


def receive_replica(
    link: Link, header: dict[str, Any], into: torch.nn.Module | None, timeout: float | None
) -> torch.nn.Module:
    """The module that `header` announces. With `into`, its weights are written into that module instead."""
    specs: Sequence[TensorSpec] = header["weights"]
    if into is None:
        tensors: list[torch.Tensor] = [spec.empty(link.device) for spec in specs]
    else:
        tensors = encode_structure(into)[1]
        own = [TensorSpec.of(tensor, link.device) for tensor in tensors]
        if own != list(specs):
            raise ValueError(
                f"Expected denoiser {header['name']!r} to have the same tensors on every rank, but rank 0 has "
                f"{len(specs)} and this rank has {len(own)}, or they differ in shape; load the same model on all ranks."
            )
    for chunk in _chunks(specs):
        weights = link.read(timeout)
        with torch.no_grad():
            link.pull_into(weights, [tensors[i] for i in chunk])
        link.send({"kind": "stored"})
    module = decode(header["body"], tensors) if into is None else into
    _wait_for(link.device)
    link.send({"kind": "ready"})
    return module


def _wait_for(device: torch.device) -> None:
    """Weights may be changed, and trusted, as soon as they are said to be shipped."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _chunks(specs: Sequence[TensorSpec]) -> Iterator[list[int]]:
    chunk: list[int] = []
    nbytes = 0
    for i, spec in enumerate(specs):
        if chunk and nbytes + spec.nbytes > _CHUNK:
            yield chunk
            chunk, nbytes = [], 0
        chunk.append(i)
        nbytes += spec.nbytes
    if chunk:
        yield chunk


def fingerprint(module: torch.nn.Module) -> tuple[Any, ...]:
    """Changes when weights, buffers, submodules, hooks or plain settings (a LoRA's scale, say) of `module` change.

    Compared once a generation; reads no tensor value: a tensor is its identity and its version counter."""
    parts: list[Any] = []
    add = parts.append
    for path, sub in module.named_modules():
        add(path)
        add(type(sub))
        for tensors in (sub._parameters, sub._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    parts += (key, *_tensor(tensor))
        for key, value in sub.__dict__.items():
            if type(value) in _SCALARS:
                parts += (key, value)
            elif key not in _NOT_SETTINGS and (type(value) not in _CONTAINERS or value):  # most are empty hook dicts
                parts += (key, _setting(value))
    return tuple(parts)


# `_diffusers_hook` holds per-generation state; the hooks that it runs are functions replaced in `forward`.
_NOT_SETTINGS = frozenset(["_parameters", "_buffers", "_modules", "_diffusers_hook"])


_SCALARS = frozenset([bool, int, float, str, type(None)])
_CONTAINERS = frozenset([dict, OrderedDict, list, tuple, set])


def weights_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers whose in-place changes can be seen."""
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor for tensor in tensors if not tensor.is_inference()]


def _tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    """`.to(dtype)` keeps a parameter's identity and version, but not its memory."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype


def _setting(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, dict):
        return tuple((key if isinstance(key, str) else id(key), _setting(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)) and len(value) < 32:
        return tuple(_setting(item) for item in value)
    plain = {key: item for key, item in getattr(value, "__dict__", {}).items() if type(item) in _SCALARS}
    return id(value), tuple(plain.items())  # an attention processor's scale, say
