"""The modules that a denoiser is made of, and the hooks of diffusers on them: looked through before each generation."""

from __future__ import annotations

from typing import Any

import torch


def submodules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Those of `module.modules()`, in its order and a fraction of its time: a transformer has thousands."""
    found: dict[int, torch.nn.Module] = {}
    left = [module]
    while left:
        sub = left.pop()
        if id(sub) not in found:
            found[id(sub)] = sub
            if sub._modules:
                left += [child for child in reversed(sub._modules.values()) if child is not None]
    return list(found.values())


def hooks_of(module: torch.nn.Module) -> dict[str, Any]:
    """The hooks that diffusers has put on one module (caches, offload, casting)."""
    registry = module.__dict__.get("_diffusers_hook")
    return registry.hooks if registry is not None else {}
