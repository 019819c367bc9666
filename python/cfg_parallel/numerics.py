"""The settings of PyTorch that change which bits a forward gives, copied from the leader to its followers."""

from __future__ import annotations

from typing import Any

import torch

# (holder, attribute); a setting that this build of PyTorch lacks is left alone on both sides.
_SETTINGS = [
    ("torch.backends.cuda.matmul", "allow_tf32"),
    ("torch.backends.cuda.matmul", "allow_fp16_reduced_precision_reduction"),
    ("torch.backends.cuda.matmul", "allow_bf16_reduced_precision_reduction"),
    ("torch.backends.cuda.matmul", "allow_fp16_accumulation"),
    ("torch.backends.cudnn", "enabled"),
    ("torch.backends.cudnn", "allow_tf32"),
    ("torch.backends.cudnn", "benchmark"),
    ("torch.backends.cudnn", "deterministic"),
]
_SDP = ["flash", "mem_efficient", "math", "cudnn"]


def capture() -> dict[str, Any]:
    state: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "default_dtype": torch.get_default_dtype(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "sdp": {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _SDP},
    }
    for holder, attribute in _SETTINGS:
        module = _resolve(holder)
        if hasattr(module, attribute):
            state[f"{holder}.{attribute}"] = getattr(module, attribute)
    return state


def apply(state: dict[str, Any]) -> None:
    if torch.get_num_threads() != state["threads"]:
        torch.set_num_threads(state["threads"])
    torch.set_default_dtype(state["default_dtype"])
    enabled, warn_only = state["deterministic"]
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.set_float32_matmul_precision(state["matmul_precision"])
    for name in _SDP:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(state["sdp"][name])
    for holder, attribute in _SETTINGS:
        key = f"{holder}.{attribute}"
        if key in state and getattr(_resolve(holder), attribute) != state[key]:
            setattr(_resolve(holder), attribute, state[key])


def _resolve(path: str) -> Any:
    module: Any = torch
    for part in path.split(".")[1:]:
        module = getattr(module, part)
    return module
