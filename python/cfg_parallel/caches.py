"""Caches that diffusers' hooks keep in a denoiser from step to step (`enable_cache`): what has one, and its state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cfg_parallel.modules import hooks_of, submodules

# diffusers' name for the context of a batch of passes. Its rows share a state, so it is not worth a journey.
BATCH = "cond_uncond"


@dataclass(frozen=True, slots=True)
class Cache:
    """What a denoiser keeps between two forwards."""

    name: str
    by_context: bool  # each cache_context has a state of its own; else all calls of the denoiser share one
    hooks: tuple[Any, ...]  # another cache has others, whatever its configuration

    @classmethod
    def of(cls, module: torch.nn.Module) -> Cache | None:
        hooks = dict(_stateful(module))
        if not hooks:
            return None
        config = getattr(module, "_cache_config", None)
        name = next(iter(hooks.values())) if config is None else type(config).__name__.removesuffix("Config")
        return cls(name, all(any(map(_is_manager, vars(hook).values())) for hook in hooks), tuple(hooks))

    @property
    def why_alone(self) -> str:
        return (
            f"{self.name} keeps one state for all passes, so they ran on one device as without cfg-parallel; "
            "disable_cache() lets them run in parallel"
        )


def reset(module: torch.nn.Module) -> None:
    """As a pipeline does at its end."""
    for sub in submodules(module):
        for hook in hooks_of(sub).values():
            if hook._is_stateful:
                hook.reset_state(sub)


@contextlib.contextmanager
def empty(module: torch.nn.Module) -> Iterator[None]:
    """The module without the state of its caches, inside the block."""
    kept = [(manager, dict(vars(manager))) for manager in _managers(module).values()]
    for manager, _ in kept:
        manager._state_cache = {}
        manager.set_context(None)
    try:
        yield
    finally:
        for manager, state in kept:
            vars(manager).update(state)


@contextlib.contextmanager
def same_context(module: torch.nn.Module) -> Iterator[None]:
    """Inside the block another cache_context may be entered and left; diffusers' own would leave none behind."""
    kept = [(manager, dict(vars(manager))) for manager in _managers(module).values()]
    try:
        yield
    finally:
        for manager, before in kept:
            vars(manager).update(before)


def states_of(module: torch.nn.Module) -> dict[Any, Any]:
    return {place: manager._state_cache for place, manager in _managers(module).items()}


def restore(module: torch.nn.Module, states: dict[Any, Any]) -> None:
    """Go on with the states of an older replica."""
    for place, manager in _managers(module).items():
        manager._state_cache = states.get(place, manager._state_cache)


def _stateful(module: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    for sub in submodules(module):
        for name, hook in hooks_of(sub).items():
            if hook._is_stateful:
                yield hook, name


def _managers(module: torch.nn.Module) -> dict[Any, Any]:
    """By the first place where each is found: several hooks may share one."""
    managers: dict[int, tuple[Any, Any]] = {}
    for path, sub in module.named_modules():
        for name, hook in hooks_of(sub).items():
            for key, value in vars(hook).items():
                if _is_manager(value):
                    managers.setdefault(id(value), ((path, name, key), value))
    return dict(managers.values())


def _is_manager(value: Any) -> bool:
    """Whether it is a StateManager of diffusers: a state for each context."""
    return hasattr(value, "_state_cache") and hasattr(value, "set_context")
