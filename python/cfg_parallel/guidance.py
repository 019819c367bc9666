"""Guidance arithmetic: the rule, and its dispatch to CUDA, Triton or PyTorch."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from cfg_parallel import extension
from cfg_parallel.errors import ConfigurationError

if TYPE_CHECKING:
    from types import ModuleType

Backend = Literal["auto", "cuda", "triton", "torch"]
Numerics = Literal["exact", "fused"]

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def combine(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    scale: float,
    *,
    backend: Backend = "auto",
    numerics: Numerics = "exact",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Classifier-free guidance: ``uncond + scale * (cond - uncond)``.

    Args:
        cond: prediction with the prompt, of any shape.
        uncond: prediction with the negative prompt; same shape, dtype and device as `cond`.
        scale: the guidance scale, a Python number. 1 gives `cond` up to rounding, 0 gives `uncond`.
        backend: "cuda" (the compiled module) and "triton" take float32, float16 and bfloat16 tensors that are dense in
            memory with the same layout (contiguous or channels_last) and need no gradient; "torch" takes every
            floating-point tensor, on any device. "auto" takes the first of the three that can do the call.
        numerics: "exact" rounds to the dtype after every operation and so gives the bits of the eager expression,
            whatever the backend; "fused" computes in float32 (float64 for float64) and rounds once.
        out: where the result goes; may be `cond` or `uncond` itself, but not overlap one of them in part.

    Returns:
        `out`, or a new tensor with the layout of `uncond`.

    The kernel runs on the current stream of the tensors' device; nothing waits for it.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, as expected against got.
        ConfigurationError: a backend asked for by name that cannot do the call.
        ExtensionMissingError: backend="cuda" where the compiled module is not installed.

    Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6, with scale = 1 + w.
    """
    _check_arguments(cond, uncond, scale, backend, numerics, out)
    if backend == "auto":
        backend = _choose_backend(cond, uncond, out)
    elif backend != "torch":
        obstacle = _kernel_obstacle(cond, uncond, out)
        if obstacle is not None:
            raise ConfigurationError(f"backend={backend!r} {obstacle}; use backend='torch'.")
    if backend == "torch":
        return _combine_torch(cond, uncond, scale, numerics, out)
    if out is None:
        out = torch.empty_like(uncond)
    (_combine_cuda if backend == "cuda" else _combine_triton)(cond, uncond, float(scale), numerics, out)
    return out


def _check_arguments(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, backend: str, numerics: str, out: torch.Tensor | None
) -> None:
    if not isinstance(scale, (int, float)):
        raise TypeError(f"Expected `scale` as a Python number, but got {type(scale).__name__}.")
    if backend not in get_args(Backend):
        raise ValueError(f"Expected `backend` to be one of {', '.join(get_args(Backend))}, but got {backend!r}.")
    if numerics not in get_args(Numerics):
        raise ValueError(f"Expected `numerics` to be one of {', '.join(get_args(Numerics))}, but got {numerics!r}.")
    if not cond.is_floating_point():
        raise TypeError(f"Expected `cond` of a floating-point dtype, but got {cond.dtype}.")
    for name, tensor in (("uncond", uncond), ("out", out)):
        if tensor is None:
            continue
        if tensor.shape != cond.shape:
            raise ValueError(f"Expected `{name}` of shape {tuple(cond.shape)}, but got {tuple(tensor.shape)}.")
        if tensor.dtype != cond.dtype:
            raise ValueError(f"Expected `{name}` of dtype {cond.dtype}, but got {tensor.dtype}.")
        if tensor.device != cond.device:
            raise ValueError(f"Expected `{name}` on {cond.device}, but got {tensor.device}.")


def _choose_backend(cond: torch.Tensor, uncond: torch.Tensor, out: torch.Tensor | None) -> Backend:
    if not cond.is_cuda or _kernel_obstacle(cond, uncond, out) is not None:
        return "torch"
    if extension.missing_reason() is None:
        return "cuda"
    return "triton" if _triton_missing_reason() is None else "torch"


def _kernel_obstacle(cond: torch.Tensor, uncond: torch.Tensor, out: torch.Tensor | None) -> str | None:
    """Why the CUDA and Triton kernels cannot do this call, if they cannot."""
    if cond.dtype not in _KERNEL_DTYPES:
        return f"expects float32, float16 or bfloat16, but got {cond.dtype}"
    tensors = [cond, uncond] if out is None else [cond, uncond, out]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "has no backward pass, but an input requires grad"
    # The kernels walk through memory, so any dense layout will do as long as it is the same one for all.
    layouts = [torch.contiguous_format]
    layouts += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(cond.dim(), [])
    if not any(all(tensor.is_contiguous(memory_format=layout) for tensor in tensors) for layout in layouts):
        strides = ", ".join(str(tensor.stride()) for tensor in tensors)
        return f"expects dense tensors of one memory layout, but got strides {strides}"
    if out is not None:
        for name, tensor in (("cond", cond), ("uncond", uncond)):
            distance = abs(out.data_ptr() - tensor.data_ptr())
            if 0 < distance < out.numel() * out.element_size():
                return f"expects `out` to be `{name}` or apart from it, but they overlap in part"
    return None


def _combine_torch(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, numerics: Numerics, out: torch.Tensor | None
) -> torch.Tensor:
    """The reference that the kernels are held against."""
    if numerics == "fused":
        dtype = torch.promote_types(cond.dtype, torch.float32)
        n = uncond.to(dtype)
        result = (n + scale * (cond.to(dtype) - n)).to(cond.dtype)
        return result if out is None else out.copy_(result)
    if out is None:
        return uncond + scale * (cond - uncond)
    return torch.add(uncond, scale * (cond - uncond), out=out)


def _combine_cuda(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, numerics: Numerics, out: torch.Tensor
) -> None:
    native = extension.load()
    if not cond.is_cuda:
        raise ConfigurationError(f"backend='cuda' expects CUDA tensors, but got {cond.device}; use backend='torch'.")
    native.combine(
        cond.data_ptr(),
        uncond.data_ptr(),
        out.data_ptr(),
        out.numel(),
        scale,
        dtype=_native_dtypes()[cond.dtype],
        numerics=getattr(native.Numerics, numerics),
        device=cond.device.index,
        stream=torch.cuda.current_stream(cond.device).cuda_stream,
    )


@functools.cache
def _native_dtypes() -> dict[torch.dtype, Any]:
    native = extension.load()
    return {dtype: getattr(native.DType, str(dtype).removeprefix("torch.")) for dtype in _KERNEL_DTYPES}


def _combine_triton(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, numerics: Numerics, out: torch.Tensor
) -> None:
    kernels = _triton_kernels()
    exact = numerics == "exact"
    if kernels.INTERPRETED:
        kernels.combine(cond, uncond, scale, out, exact=exact)
        return
    if not cond.is_cuda:
        raise ConfigurationError(
            f"backend='triton' expects CUDA tensors, but got {cond.device}; use backend='torch', or set "
            "TRITON_INTERPRET=1 before the first import to run the kernel in Triton's interpreter."
        )
    with torch.cuda.device(cond.device):  # Triton launches on the current device
        kernels.combine(cond, uncond, scale, out, exact=exact)


@functools.cache
def _triton_missing_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "backend='triton' needs Triton: pip install triton."
    if importlib.util.find_spec("cfg_parallel.triton_kernels") is None:
        # Only from a source tree on PYTHONPATH: the kernels lie outside its python/ folder.
        return "cfg_parallel.triton_kernels is not installed: pip install -e . in the source folder."
    return None


@functools.cache
def _triton_kernels() -> ModuleType:
    reason = _triton_missing_reason()
    if reason is not None:
        raise ConfigurationError(reason)
    return importlib.import_module("cfg_parallel.triton_kernels.guidance")
