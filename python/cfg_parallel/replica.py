"""A replica of a denoiser: its structure as bytes, its weights from memory to memory."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cfg_parallel import caches
from cfg_parallel.codec import TensorSpec, decode, encode_structure
from cfg_parallel.compiling import find_compiled, unwrap
from cfg_parallel.errors import CfgParallelError, ConfigurationError
from cfg_parallel.link import Link
from cfg_parallel.modules import submodules
from cfg_parallel.numerics import load_attention_kernels
from cfg_parallel.offload import follow, group_offload
from cfg_parallel.preparation import Prepare, apply_to_replica, encode

_CHUNK = 256 << 20  # bytes of weights in one message


def send_replica(
    link: Link,
    name: str,
    module: torch.nn.Module,
    timeout: float,
    prepare: Prepare | None = None,
    started: bool = True,
) -> None:
    """Give the follower at the other end of `link` a copy of `module`, named `name`, compiled as that is.

    `started`: by us, so that the module is made of what is sent; else it has one, and gets the weights."""
    _refuse_unsupported(name, module, started)
    with caches.empty(module):
        body, tensors = encode_structure(unwrap(module))
    specs = [TensorSpec.of(tensor, link.device) for tensor in tensors]
    header = {"name": name, "body": body, "weights": specs, "cache": _cache(module)}
    link.send({"kind": "denoiser", "preparation": encode(prepare, find_compiled(module)), **header})
    _expect(link.read(timeout), "allocated")  # weights that nobody receives would hold up this process for ever
    for chunk in _chunks(specs):
        link.send({"kind": "weights"}, [tensors[i] for i in chunk])
        _expect(link.read(timeout), "stored")
    _expect(link.read(timeout), "ready")
    _wait_for(link.device)


def is_parallel(module: torch.nn.Module) -> bool:
    """Whether several processes share its forwards (diffusers' context or tensor parallelism)."""
    return getattr(module, "_parallel_config", None) is not None


def _refuse_unsupported(name: str, module: torch.nn.Module, started: bool) -> None:
    """What a replica would get wrong without anybody noticing."""
    if started and is_parallel(module):
        raise ConfigurationError(
            f"Several processes share the forwards of the denoiser {name!r} (enable_parallelism), and a follower could "
            "not be one of them; start cfg_parallel_size times as many processes with torchrun."
        )
    config = group_offload(module)
    if config is not None and config.offload_to_disk_path is not None:
        raise ConfigurationError(
            f"The denoiser {name!r} is offloaded to disk, so there are no weights to replicate; leave "
            "offload_to_disk_path out of enable_group_offload."
        )


def _cache(module: torch.nn.Module) -> str:
    """The configuration of its cache, in words."""
    return repr(getattr(module, "_cache_config", None))


def _expect(header: dict[str, Any], kind: str) -> None:
    if header["kind"] == "error":
        message = header["message"]
        if "OutOfMemoryError" in message:
            said = message.split(" If reserved but unallocated")[0].rstrip(".")  # the rest is advice for something else
            raise ConfigurationError(
                f"The denoiser does not fit on the follower's GPU ({said}); load it quantized, or use "
                "enable_layerwise_casting(...) or enable_group_offload(...) on it."
            )
        raise CfgParallelError(f"The follower could not build the denoiser: {message}")
    if header["kind"] != kind:
        raise CfgParallelError(f"Expected a message of kind {kind!r} from the follower, but got {header['kind']!r}.")


def receive_replica(
    link: Link, header: dict[str, Any], into: torch.nn.Module | None, timeout: float | None
) -> torch.nn.Module:
    """The module that `header` announces. With `into`, its weights are written into that module instead."""
    specs: Sequence[TensorSpec] = header["weights"]
    if into is None:
        tensors: list[torch.Tensor] = [spec.empty(link.device) for spec in specs]
    else:
        if _cache(into) != header["cache"]:
            raise ValueError(
                f"Expected denoiser {header['name']!r} to have the same cache on every rank, but rank 0 has "
                f"{header['cache']} and this rank has {_cache(into)}; call enable_cache or disable_cache on all ranks."
            )
        with caches.empty(into):
            tensors = encode_structure(unwrap(into))[1]
        own = [TensorSpec.of(tensor, link.device) for tensor in tensors]
        if own != list(specs):
            raise ValueError(
                f"Expected denoiser {header['name']!r} to have the same tensors on every rank, but rank 0 has "
                f"{len(specs)} and this rank has {len(own)}, or they differ in shape; load the same model on all ranks."
            )
    link.send({"kind": "allocated"})
    for chunk in _chunks(specs):
        weights = link.read(timeout)
        with torch.no_grad():
            link.pull_into(weights, [tensors[i] for i in chunk])
        link.send({"kind": "stored"})
    module = decode(header["body"], tensors) if into is None else into
    if into is None:
        follow(module, link.device)
    apply_to_replica(header["preparation"], module)
    load_attention_kernels(module)
    _wait_for(link.device)
    link.send({"kind": "ready"})
    return module


def clear_method_caches(module: torch.nn.Module) -> None:
    """A `functools.lru_cache` around a method keeps its objects for ever: diffusers has some around rotary tables, and
    some of them in the closure of another decorator."""
    for cls in {type(sub) for sub in submodules(module)}:
        for name in dir(cls):
            method = inspect.getattr_static(cls, name, None)
            cells = getattr(method, "__closure__", None) or ()
            for found in (method, *(cell.cell_contents for cell in cells if cell != types.CellType())):
                if isinstance(found, functools._lru_cache_wrapper):
                    found.cache_clear()


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
