"""Classifier-free guidance as a Triton kernel. Importing this module needs Triton.

With TRITON_INTERPRET=1 set before the import, the kernel runs on CPU tensors in Triton's interpreter, which truncates
where it should round from fp32 to bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Eight values a thread with four warps: one 16-byte load of bf16 or two of fp32. Fixed rather than tuned, so that two
# ranks never run different code.
_BLOCK = 1024


@triton.jit
def _combine_kernel(cond_ptr, uncond_ptr, out_ptr, numel, scale, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    dtype = out_ptr.dtype.element_ty
    scale = tl.cast(scale, tl.float32)  # a plain float in the interpreter, fp32 on a GPU
    p = tl.load(cond_ptr + offsets, mask=mask).to(tl.float32)
    n = tl.load(uncond_ptr + offsets, mask=mask).to(tl.float32)
    if EXACT:
        d = (p - n).to(dtype).to(tl.float32)
        m = (scale * d).to(dtype).to(tl.float32)
        result = n + m
    else:
        result = tl.fma(scale, p - n, n)
    tl.store(out_ptr + offsets, result.to(dtype), mask=mask)


INTERPRETED = not isinstance(_combine_kernel, triton.JITFunction)


def combine(cond: torch.Tensor, uncond: torch.Tensor, scale: float, out: torch.Tensor, *, exact: bool) -> None:
    """out = uncond + scale * (cond - uncond), over the memory of three dense tensors with equal strides.

    float32, float16 or bfloat16; `out` may be `cond` or `uncond`. Runs on the current stream of the current device.
    `cfg_parallel.guidance.combine` checks what this function takes for granted.
    """
    numel = out.numel()
    if numel == 0:
        return
    # enable_fp_fusion would contract n + scale * d to one fused multiply-add: one rounding where eager makes two.
    _combine_kernel[(triton.cdiv(numel, _BLOCK),)](
        cond, uncond, out, numel, float(scale), EXACT=exact, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=not exact
    )
