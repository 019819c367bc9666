"""Offloading on an enabled pipeline: by model around the denoisers, which stay; by groups of layers on every device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cfg_parallel.errors import ConfigurationError
from cfg_parallel.modules import hooks_of, submodules

_GROUP = "group_offloading"
FIRST_FORWARD_HOOKS = ("layer_execution_tracker", "lazy_prefetch_group_offloading")  # of group offload with a stream
_CASTING = "layerwise_casting"
_GROUP_SETTINGS = (
    "offload_device",
    "offload_type",
    "num_blocks_per_group",
    "non_blocking",
    "record_stream",
    "low_cpu_mem_usage",
    "block_modules",
    "exclude_kwargs",
)


def is_offloaded(pipe: Any) -> bool:
    """Whether its models move between CPU and GPU (enable_model_cpu_offload)."""
    return bool(getattr(pipe, "_all_hooks", None))


def offload_device(pipe: Any) -> torch.device:
    """Where the models of an offloaded pipeline run."""
    return _with_index(pipe._offload_device)


def offload_all(pipe: Any) -> None:
    """Offload the denoisers too, as diffusers does it, when the pipeline is offloaded."""
    if is_offloaded(pipe):
        pipe.enable_model_cpu_offload(device=pipe._offload_device)


def offload_others(pipe: Any, cls: type, denoisers: Iterable[str], device: torch.device) -> list[Placeholder]:
    """Offload every component of `pipe`, a `cls`, but the denoisers: diffusers gets to see placeholders of them."""
    kept = {name: pipe.__dict__[name] for name in denoisers}
    placeholders = {name: Placeholder() for name in kept}
    pipe.__dict__.update(placeholders)
    try:
        pipe._offload_gpu_id = device.index or 0  # diffusers takes index 0 for none given, and then this one
        cls.enable_model_cpu_offload(pipe, device=device)  # type: ignore[attr-defined]
    finally:
        pipe.__dict__.update(kept)
    return list(placeholders.values())


class Placeholder(torch.nn.Module):
    """In a denoiser's place in the order of offloading. Calling it sends the model before it back to the CPU."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0))  # accelerate asks for the device of the first parameter

    def to(self, *args: Any, **kwargs: Any) -> Placeholder:
        return self

    def forward(self) -> None:
        pass


def keep_on(name: str, module: torch.nn.Module, device: torch.device) -> None:
    """Take a denoiser out of model offloading, and put it on `device`."""
    refuse_group_offload(name, module)
    remove_accelerate_hooks(module)
    if devices_of(module) == {device}:
        return
    try:
        module.to(device)
    except torch.OutOfMemoryError as error:
        size = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
        raise ConfigurationError(
            f"The denoiser {name!r} ({size / 1e9:.1f} GB) does not fit on {device}, where it stays while the other "
            f"models are offloaded; load it quantized, use pipe.{name}.enable_layerwise_casting(...), or offload all "
            "models by groups (apply_group_offloading) instead."
        ) from error


def refuse_group_offload(name: str, module: torch.nn.Module) -> None:
    if group_offload(module) is not None:
        raise ConfigurationError(
            f"The denoiser {name!r} is under group offload, which diffusers does not mix with "
            "enable_model_cpu_offload; call apply_group_offloading on the other models too."
        )


def remove_accelerate_hooks(module: torch.nn.Module) -> None:
    """What moves a module, or its arguments, to the device of another process."""
    if any("_hf_hook" in sub.__dict__ for sub in submodules(module)):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module, recurse=True)


def group_offload(module: torch.nn.Module) -> Any:
    """The configuration of its group offload, None when there is none."""
    hooks = (hooks_of(sub).get(_GROUP) for sub in submodules(module))
    return next((hook.config for hook in hooks if hook is not None), None)


def devices_of(module: torch.nn.Module) -> set[torch.device]:
    """Where it computes: the devices of its weights, or the one to which they are brought for each forward."""
    config = group_offload(module)
    if config is not None:
        return {_with_index(torch.device(config.onload_device))}
    weights = (sub._parameters.values() for sub in submodules(module))
    return {tensor.device for tensors in weights for tensor in tensors if tensor is not None}


def follow(module: torch.nn.Module, device: torch.device) -> None:
    """Make a replica do on `device` what its original does on its own: group offload, but no hooks of accelerate."""
    remove_accelerate_hooks(module)
    config = group_offload(module)
    if config is None:
        return
    from diffusers.hooks import HookRegistry, apply_group_offloading

    registry = HookRegistry.check_if_exists_or_initialize(module)
    for name in (_GROUP, *FIRST_FORWARD_HOOKS):
        registry.remove_hook(name, recurse=True)
    settings = {name: getattr(config, name) for name in _GROUP_SETTINGS if hasattr(config, name)}
    apply_group_offloading(module, onload_device=device, use_stream=config.stream is not None, **settings)


def restless(module: torch.nn.Module) -> set[int]:
    """The ids of the submodules whose weights are cast or moved for each forward, and back: to other memory."""
    ids: set[int] = set()
    for sub in submodules(module):
        hooks = hooks_of(sub)
        if _GROUP in hooks:
            return {id(each) for each in submodules(module)}
        if _CASTING in hooks:
            ids.update(map(id, submodules(sub)))
    return ids


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
