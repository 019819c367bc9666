"""Another `__call__` on one pipeline object and on its denoisers: nothing global is changed, all can be undone."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cfg_parallel.calls import Denoiser
from cfg_parallel.coefficients import Coefficients
from cfg_parallel.errors import ConfigurationError
from cfg_parallel.leader import Leader
from cfg_parallel.offload import Placeholder, is_offloaded, offload_others, refuse_group_offload
from cfg_parallel.report import Report
from cfg_parallel.timesteps import know

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Follower:
    """A process that holds replicas. `lost`: why it does not take part, if it does not."""

    device: str
    pid: int | None
    lost: str | None


class CfgParallel:
    """What enable_cfg_parallel returns: the pipeline's report, and the way back.

    Replaces the class of one pipeline object by a subclass with another `__call__`."""

    def __init__(self, pipe: Any, denoisers: Sequence[str], device: torch.device) -> None:
        self._pipe = weakref.ref(pipe)
        self._class = type(pipe)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._names = denoisers
        self._device = device
        self._placeholders: list[Placeholder] = []
        if is_offloaded(pipe):
            self._offload_others(pipe)
        namespace: dict[str, Any] = {"__call__": self._wrap(type(pipe).__call__), "_cfg_parallel": self}
        if hasattr(type(pipe), "enable_model_cpu_offload"):
            namespace["enable_model_cpu_offload"] = self._wrap_offload(type(pipe).enable_model_cpu_offload)
        pipe.__class__ = _subclass(type(pipe), namespace)

    def _wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            self._check_process()
            with self._lock:
                return self._generate(functools.partial(call, pipe), args, kwargs)

        return __call__

    def _check_process(self) -> None:
        if os.getpid() != self._pid:  # a lock may be held for ever here, and the followers answer one process
            raise ConfigurationError(
                f"The pipeline was enabled in process {self._pid}, of which this one was forked; enable cfg-parallel "
                "after the fork, in the process that calls the pipeline."
            )

    def _wrap_offload(self, enable: Callable[..., Any]) -> Callable[..., Any]:
        """The pipeline calls this too, after each generation."""

        @functools.wraps(enable)
        def enable_model_cpu_offload(pipe: Any, gpu_id: int | None = None, device: Any = None) -> None:
            asked = None if device is None else torch.device(device)
            index = gpu_id if asked is None or asked.index is None else asked.index
            if (asked is not None and asked.type != self._device.type) or index not in (None, self._device.index or 0):
                raise ConfigurationError(
                    f"An enabled pipeline offloads to the GPU of its denoiser, {self._device}, not to "
                    f"{device or f'cuda:{gpu_id}'}; call disable_cfg_parallel(pipe) first."
                )
            with self._lock:
                for name in self._names:
                    refuse_group_offload(name, getattr(pipe, name))
                self._offload_others(pipe)

        return enable_model_cpu_offload

    def _offload_others(self, pipe: Any) -> None:
        self._placeholders = offload_others(pipe, self._class, self._names, self._device)

    def _generate(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    @property
    def report(self) -> Report:
        """What happened in the last generation. Waits for the device the first time it is asked for."""
        raise NotImplementedError

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write what every process and device did in the last generation, for https://ui.perfetto.dev or
        chrome://tracing."""
        raise ConfigurationError("Only the leader has a trace; ask on rank 0.")

    def wait_until_ready(self, timeout: float = 180.0) -> bool:
        """Whether every follower serves. Lost ones are replaced; what is being started, or has to be started again, is
        waited for, for `timeout` seconds."""
        return True

    def call_alone(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call, on its own device, as if it were not enabled: plain diffusers, to compare with."""
        self._check_process()
        with self._lock:
            return self._class.__call__(self._pipe(), *args, **kwargs)  # type: ignore[operator]

    @property
    def followers(self) -> list[Follower]:
        """The processes that take part, as they are now."""
        return []

    def disable(self) -> None:
        """Give the pipeline back as it was, and end the followers. May be called twice."""
        pipe = self._pipe()
        if pipe is not None and type(pipe) is not self._class:
            pipe.__class__ = self._class

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def _subclass(cls: type, namespace: dict[str, Any], metaclass: Any = None) -> type:
    """A subclass that passes for `cls` by name, so that messages, saving and `from_pipe` are unaffected."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    subclass: type = (metaclass or type(cls))(cls.__name__, (cls,), names | namespace)
    return subclass


def denoiser_view(denoiser: Denoiser, leader: Leader) -> torch.nn.Module:
    """The denoiser seen through another class: every attribute is shared with the module, but calling it dispatches.

    So the module itself, which other pipelines may hold too, is not touched."""
    module = denoiser.module

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return leader.dispatch(denoiser, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return operator.getitem, ([module], 0)  # the module, also where it is being pickled already

    def __copy__(self: Any) -> Any:
        return copy.copy(module)

    namespace: dict[str, Any] = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__copy__": __copy__,
        "_cfg_parallel_denoiser": denoiser,
    }
    if hasattr(module, "cache_context"):

        @contextlib.contextmanager
        def cache_context(self: Any, name: str, **kwargs: Any) -> Any:
            outer = denoiser.context
            denoiser.context = (name, kwargs)
            try:
                with module.cache_context(name, **kwargs):  # type: ignore[operator]
                    yield
            finally:
                denoiser.context = outer

        namespace["cache_context"] = cache_context
    if hasattr(type(module), "_reset_stateful_cache"):

        def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> None:
            module._reset_stateful_cache(*args, **kwargs)  # type: ignore[operator]
            leader.reset(denoiser)

        namespace["_reset_stateful_cache"] = _reset_stateful_cache
    cls = _subclass(type(module), namespace)
    view: torch.nn.Module = object.__new__(cls)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


def _passes_for(cls: type) -> Any:
    """A metaclass of subclasses that are equal to `cls`: a pipeline asks for `type(self.scheduler) != cls` (Bria)."""
    namespace = {"__eq__": lambda self, other: other is self or other is cls, "__hash__": lambda self: hash(cls)}
    return type(type(cls).__name__, (type(cls),), namespace)


def _plain_scheduler(cls: type, state: dict[str, Any]) -> Any:
    scheduler: Any = object.__new__(cls)
    scheduler.__dict__.update(state)
    return scheduler


def original_scheduler(scheduler: Any) -> Any:
    """The scheduler as the user gave it, which may be seen through a view, or made of a view's class by from_config."""
    original = getattr(type(scheduler), "_cfg_parallel_scheduler", None)
    if original is None or vars(scheduler) is vars(original):
        return scheduler if original is None else original
    scheduler.__class__ = type(original)
    return scheduler


def scheduler_view(scheduler: Any, coefficients: Coefficients, any_device: bool = False) -> Any:
    """The scheduler seen through another class: the host knows what its `set_timesteps` leaves on a GPU, and its `step`
    does not compute again what it has computed before."""

    original_set_timesteps, original_step = type(scheduler).set_timesteps, type(scheduler).step

    @functools.wraps(original_set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original_set_timesteps(self, *args, **kwargs)
        coefficients.begin()
        for name in ("timesteps", "sigmas"):
            schedule = self.__dict__.get(name)
            if isinstance(schedule, torch.Tensor) and (any_device or schedule.is_cuda):
                setattr(self, name, know(schedule))
        return result

    @functools.wraps(original_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # computes nothing to keep
        with coefficients if coefficients.are_needed and not capturing else contextlib.nullcontext():
            return original_step(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _plain_scheduler, (type(scheduler), dict(self.__dict__))

    namespace = {"set_timesteps": set_timesteps, "step": step, "__reduce_ex__": __reduce_ex__}
    namespace["_cfg_parallel_scheduler"] = scheduler
    cls = _subclass(type(scheduler), namespace, _passes_for(type(scheduler)))
    view: Any = object.__new__(cls)
    object.__setattr__(view, "__dict__", scheduler.__dict__)
    return view
