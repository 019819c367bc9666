"""The settings of PyTorch that change which bits a forward gives, copied from the leader to its followers."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch

_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _attribute(path: str) -> _Setting:
    """A setting that is an attribute, such as `torch.backends.cudnn.enabled`."""
    holder, name = path.removeprefix("torch.").rsplit(".", 1)
    holder_of = operator.attrgetter(holder)
    return lambda: getattr(holder_of(torch), name), lambda value: setattr(holder_of(torch), name, value)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _attention() -> Any:
    """Where diffusers has its attention kernels, if it is in use."""
    module = sys.modules.get("diffusers.models.attention_dispatch")
    if module is None:
        raise AttributeError("diffusers has no attention backends, or was not imported")
    return module


def _attention_backend() -> str:
    dispatch = _attention()
    return str(dispatch.AttentionBackendName(dispatch._AttentionBackendRegistry._active_backend).value)


def _set_attention_backend(name: str) -> None:
    dispatch = _attention()
    dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName(name))


# In the order in which they are applied. TF32 has two sets of names: setting the old ones sets the new ones too, and
# once a new one was set, PyTorch refuses to read the old ones. So the old ones come first, then new ones that differ.
_FUNCTIONS: dict[str, _Setting] = {
    "num_threads": (torch.get_num_threads, torch.set_num_threads),
    "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "deterministic": (_deterministic, _set_deterministic),
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "attention_backend": (_attention_backend, _set_attention_backend),
}
_SETTINGS = _FUNCTIONS | {
    path: _attribute(path)
    for path in (
        "torch.backends.cuda.matmul.allow_tf32",
        "torch.backends.cudnn.allow_tf32",
        "torch.backends.fp32_precision",
        "torch.backends.cuda.matmul.fp32_precision",
        "torch.backends.cudnn.fp32_precision",
        "torch.backends.cudnn.conv.fp32_precision",
        "torch.backends.cudnn.rnn.fp32_precision",
        "torch.backends.mkldnn.fp32_precision",
        "torch.backends.mkldnn.matmul.fp32_precision",
        "torch.backends.mkldnn.conv.fp32_precision",
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
        "torch.backends.cuda.matmul.allow_fp16_accumulation",
        "torch.backends.cudnn.enabled",
        "torch.backends.cudnn.benchmark",
        "torch.backends.cudnn.deterministic",
    )
}
for _name in ("flash", "mem_efficient", "math", "cudnn"):
    _SETTINGS[f"sdp_{_name}"] = (
        getattr(torch.backends.cuda, f"{_name}_sdp_enabled"),
        getattr(torch.backends.cuda, f"enable_{_name}_sdp"),
    )


def capture() -> dict[str, Any]:
    """Every setting that this PyTorch has and lets one read."""
    state = {}
    for name, (read, _) in _SETTINGS.items():
        # RuntimeError: an old name of TF32 where new ones are in use, and those are captured.
        with contextlib.suppress(AttributeError, RuntimeError):
            state[name] = read()
    return state


def apply(state: dict[str, Any]) -> None:
    """Make this process's settings equal to `state`; what is equal already is not touched."""
    for name, (read, write) in _SETTINGS.items():
        # As above: this process uses the new names already, or has nothing that the setting is for.
        with contextlib.suppress(AttributeError, RuntimeError):
            if name in state and read() != state[name]:
                write(state[name])


def load_attention_kernels(module: torch.nn.Module) -> None:
    """Those from the Hub that its attention processors name: each process has to load them."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    load = getattr(dispatch, "_maybe_download_kernel_for_backend", None)
    if dispatch is None or load is None:
        return
    named = {getattr(sub.__dict__.get("processor"), "_attention_backend", None) for sub in module.modules()}
    for backend in named - {None}:
        load(dispatch.AttentionBackendName(backend))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the two have the same elements, bit for bit, in the same layout. Waits for the device."""
    layouts = zip(a.shape, a.stride(), b.stride(), strict=True)
    if a.shape != b.shape or a.dtype != b.dtype or any(size > 1 and x != y for size, x, y in layouts):
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(whole), b.view(whole))
