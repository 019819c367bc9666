"""What a pipeline's denoisers are, and on which devices their passes shall run. Every refusal names the fix."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cfg_parallel.compiling import unwrap
from cfg_parallel.errors import ConfigurationError
from cfg_parallel.offload import devices_of, is_offloaded, offload_device

if TYPE_CHECKING:
    from cfg_parallel.spmd import Role


_MOST_CPU_PROCESSES = 8  # or as many as there are cores: each holds a copy of the denoiser


def check_pipeline(pipe: Any) -> dict[str, Any]:
    """Refuse what is no pipeline; returns its components."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        got = f"the class {pipe.__name__}" if isinstance(pipe, type) else type(pipe).__name__
        raise ConfigurationError(
            f"Expected a diffusers pipeline, but got {got}; pass the object that from_pretrained(...) of a pipeline "
            "class returns."
        )
    return components


def check_numbers(size: Any, devices: Any, follower_timeout: Any) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigurationError(f"Expected cfg_parallel_size to be an integer of at least 1, but got {size!r}.")
    if devices is not None and (not isinstance(devices, (list, tuple)) or not devices):
        raise ConfigurationError(
            f"Expected devices to be a list such as ['cuda:0', 'cuda:1'] or ['cpu', 'cpu'], but got {devices!r}."
        )
    is_number = isinstance(follower_timeout, (int, float)) and not isinstance(follower_timeout, bool)
    if not is_number or not follower_timeout > 0:
        raise ConfigurationError(
            f"Expected follower_timeout to be a number of seconds above 0, but got {follower_timeout!r}."
        )


def check_cpu_processes(size: int) -> None:
    most = max(_MOST_CPU_PROCESSES, os.cpu_count() or 1)
    if size > most:
        raise ConfigurationError(
            f"Expected a cfg_parallel_size of at most {most} on the CPU of this machine, but got {size}; use 2, or 3 "
            "for three guidance passes."
        )


def find_denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The components whose forward takes a timestep, ControlNets and VAEs left out."""
    components = check_pipeline(pipe)
    denoisers: dict[str, torch.nn.Module] = {}
    for name, module in components.items():
        if not isinstance(module, torch.nn.Module) or any(word in name for word in ("controlnet", "vae", "vocoder")):
            continue
        parameters = inspect.signature(unwrap(module).forward).parameters
        if any("timestep" in parameter or parameter == "t" for parameter in parameters):
            denoisers[name] = module
    if not denoisers:
        raise ConfigurationError(
            f"{type(pipe).__name__} has no denoiser: none of its components ({', '.join(components)}) takes a "
            "timestep; enable cfg-parallel on the pipeline that denoises."
        )
    return denoisers


def device_of(pipe: Any, modules: dict[str, torch.nn.Module]) -> torch.device:
    """Where the denoisers compute, which is where an offloaded pipeline brings them."""
    devices = set().union(*map(devices_of, modules.values()))
    if any(device.type == "meta" for device in devices):
        raise ConfigurationError(
            "The denoiser's weights are offloaded one by one (enable_sequential_cpu_offload, device_map), so there is "
            "nothing to replicate; load it without and call pipe.enable_model_cpu_offload(), or give the denoiser "
            "enable_group_offload(...)."
        )
    device_map = getattr(pipe, "hf_device_map", None)
    if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
        spread = ", ".join(f"{name}: {device}" for name, device in device_map.items())
        raise ConfigurationError(
            f"The pipeline's models are spread over the devices that the followers are to use ({spread}); call "
            "pipe.reset_device_map(), then pipe.to('cuda') or pipe.enable_model_cpu_offload()."
        )
    if len(devices) != 1:
        raise ConfigurationError(
            f"Expected the denoiser on one device, but it is on {sorted(map(str, devices))}; load it without "
            "device_map and move it with pipe.to('cuda')."
        )
    if is_offloaded(pipe):
        return offload_device(pipe)
    device = devices.pop()
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"Expected the pipeline on cpu or cuda, but it is on {device}; move it with pipe.to('cuda')."
        )
    return device


def choose_devices(
    leader: torch.device, size: int, devices: Sequence[str | torch.device] | None, role: Role | None
) -> list[torch.device]:
    if leader.type == "cpu" and role is None:
        check_cpu_processes(size)
    available = torch.cuda.device_count()
    if devices is None:
        if leader.type == "cpu":
            return [leader] * size
        if size > available:
            raise ConfigurationError(
                f"cfg_parallel_size={size} needs {size} GPUs, but {available} {'is' if available == 1 else 'are'} "
                f"visible; check CUDA_VISIBLE_DEVICES, or pass cfg_parallel_size={available}."
            )
        if role is not None:
            return _check_rank([torch.device("cuda", role.rank_of(i)) for i in range(size)], leader, role)
        return [torch.device("cuda", ((leader.index or 0) + i) % available) for i in range(size)]
    chosen = [_parse_device(device, available) for device in devices]
    if len(chosen) != size:
        raise ConfigurationError(
            f"cfg_parallel_size={size} needs {size} devices, but {len(chosen)} were given "
            f"({', '.join(map(str, chosen))}); pass cfg_parallel_size={len(chosen)} or {size} devices."
        )
    gpus = [device for device in chosen if device.type == "cuda"]
    if len(set(gpus)) != len(gpus):
        raise ConfigurationError(
            f"The same GPU is named twice in {list(map(str, chosen))}; name a different one for each."
        )
    if role is not None:
        _check_rank(chosen, leader, role)
    elif chosen[0] != leader:
        raise ConfigurationError(
            f"Expected the first device to be the pipeline's own, {leader}, but got {chosen[0]}; call "
            f"pipe.to('{chosen[0]}') first, or put '{leader}' first."
        )
    if len({device.type for device in chosen}) != 1:
        raise ConfigurationError(
            f"Expected GPUs only or CPUs only, but got {', '.join(map(str, chosen))}; use one kind."
        )
    return chosen


def _check_rank(devices: list[torch.device], own: torch.device, role: Role) -> list[torch.device]:
    if devices[role.place] != own:
        raise ConfigurationError(
            f"Expected the pipeline of rank {role.rank_of(role.place)} on {devices[role.place]}, but it is on {own}; "
            "under torchrun call pipe.to(f\"cuda:{os.environ['LOCAL_RANK']}\")."
        )
    return devices


def _parse_device(device: str | torch.device, available: int) -> torch.device:
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"Unknown device {device!r}; use 'cuda:0', 'cuda:1', ... or 'cpu'.") from error
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type != "cuda":
        raise ConfigurationError(f"Unsupported device {device!r}; use 'cuda:0', 'cuda:1', ... or 'cpu'.")
    index = torch.cuda.current_device() if parsed.index is None and available else parsed.index or 0
    if index >= available:
        raise ConfigurationError(
            f"There is no device cuda:{index}: {available} GPUs are visible; name another, or check "
            "CUDA_VISIBLE_DEVICES."
        )
    return torch.device("cuda", index)
