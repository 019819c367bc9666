"""The catalogue of guidance rules as Triton kernels. Importing this module needs Triton.

A rule is one function of the values at an element, all of them fp32:

    c    the conditional predictions, a tuple; p where there is one     n    the unconditional prediction
    s    their guidance scales, a tuple                                 k    coefficients of the sample (see below)
    to   the dtype that intermediate values are rounded to: in exact mode that of the tensors, as every op of eager
         PyTorch does; in fused mode float32, which rounds nothing

It returns the guided prediction. `_combine_kernel` puts p in its place where guidance is off, takes the Euler step if
there is one, rounds and stores. A rule that needs sums over a whole sample has them from `_statistics_kernel`, in which
each program takes a part of a sample, and from `_coefficients_kernel`, which adds up the parts in a fixed order and
makes k of them. To add a rule, write its function and give it a row in `RULES`.

Launch parameters are fixed rather than tuned, so that two ranks never run different code.

With TRITON_INTERPRET=1 set before the import, the kernels run on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

MAX_ROW = 16384  # a row of the norm rule is held by one program: 32 values of each tensor a thread with 16 warps
# Of the statistics kernel: an H200 runs about 1000 at a time. More leave more partial sums to merge: 4096 cost 3 us.
MAX_PROGRAMS = 1024


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


@triton.jit
def _to_float(x):
    """fp32 of a stored value. The interpreter would take bf16's subnormal numbers for zeros."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _from_float(x, dtype: tl.constexpr):
    """fp32 rounded to nearest, ties to even. The interpreter would truncate to bf16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _round(x, to: tl.constexpr):
    """What a store as `to` and a load leave of x: where eager PyTorch has an intermediate tensor."""
    return _to_float(_from_float(x, to))


@triton.jit
def _fma(x, y, z):
    """x * y + z with one rounding. The interpreter's tl.fma rounds twice; a product of two floats is exact in fp64."""
    if _INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, y, z)


# ---------------------------------------------------------------------------------------------------------------------
# Rules at an element


@triton.jit
def _conditional(c, n, s, k, to):
    """p. No guidance, which is what `active=False` asks for."""
    return c[0]


@triton.jit
def _cfg(c, n, s, k, to):
    """n + s (p - n). Classifier-free guidance, Ho & Salimans 2022 (arXiv:2207.12598), eq. 6 with s = 1 + w."""
    return n + _round(s[0] * _round(c[0] - n, to), to)


@triton.jit
def _cfg_cond(c, n, s, k, to):
    """p + s (p - n). The same equation with s = w; diffusers' use_original_formulation, Cosmos, Krea 2, Z-Image."""
    return c[0] + _round(s[0] * _round(c[0] - n, to), to)


@triton.jit
def _lerp(c, n, s, k, to):
    """torch.lerp(n, p, s): one fused multiply-add from the nearer end, and nothing is rounded on the way."""
    d = c[0] - n  # d * -1.0 and not -d, which Triton computes as 0 - d: another zero
    return tl.where(tl.abs(s[0]) < 0.5, _fma(s[0], d, n), _fma(d * -1.0, 1.0 - s[0], c[0]))


@triton.jit
def _composed(c, n, s, k, to):
    """n + s_1 (c_1 - n) + s_2 (c_2 - n) + ..., from left to right. Liu et al. 2022 (arXiv:2206.01714)."""
    total = n
    for i in tl.static_range(len(c)):
        total = _round(total + _round(s[i] * _round(c[i] - n, to), to), to)
    return total


@triton.jit
def _instruct_pix2pix(c, n, s, k, to):
    """n + s_text (text - image) + s_image (image - n). Brooks et al. 2022 (arXiv:2211.09800), eq. 3."""
    text = n + _round(s[0] * _round(c[0] - c[1], to), to)
    return _round(text, to) + _round(s[1] * _round(c[1] - n, to), to)


@triton.jit
def _norm(c, n, s, k, to):
    """g |p| / |g| with g = n + s (p - n), norms over the last dimension: the program's rows. Qwen-Image's pipelines."""
    g = _cfg(c, n, s, k, to)
    p_norm = tl.sqrt_rn(tl.sum(c[0] * c[0], axis=1, keep_dims=True))
    return g * (p_norm / tl.sqrt_rn(tl.sum(g * g, axis=1, keep_dims=True)))


@triton.jit
def _rescale(c, n, s, k, to):
    """g (phi std(p) / std(g) + 1 - phi) with g = n + s (p - n). Lin et al. 2023 (arXiv:2305.08891), section 3.4."""
    return _cfg(c, n, s, k, to) * k[0]


@triton.jit
def _zero_star(c, n, s, k, to):
    """a n + s (p - a n) with a = <p, n> / (|n|^2 + 1e-8). CFG-Zero*, Fan et al. 2025 (arXiv:2503.18886)."""
    return _cfg(c, k[0] * n, s, k, to)


@triton.jit
def _apg(c, n, s, k, to):
    """n + s (d_orth + eta d_par), d = p - n cut to a norm and split along p. Sadat et al. 2024 (arXiv:2410.02416)."""
    return n + s[0] * (k[0] * (c[0] - n) + k[1] * c[0])


@triton.jit
def _apg_momentum(c, n, s, k, to):
    """The same with d = the running average of p - n, which the statistics have left in c[1]."""
    return n + s[0] * (k[0] * c[1] + k[1] * c[0])


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of a sample: `terms` adds a block to the accumulators, `merge` reduces them (first the lanes of a program,
# then the programs of a sample), `coefficients` makes k of the result.


@triton.jit
def _sums(acc):
    return [tl.sum(x, axis=0) for x in acc]


@triton.jit
def _zero_star_terms(acc, p, n, d, s, mask, seen):
    return acc[0] + p * n, acc[1] + n * n


@triton.jit
def _zero_star_coefficients(sums, parameters):
    return sums[0] / (sums[1] + 1e-8), 0.0


@triton.jit
def _apg_terms(acc, p, n, d, s, mask, seen):
    return acc[0] + d * d, acc[1] + d * p, acc[2] + p * p


@triton.jit
def _apg_coefficients(sums, parameters):
    """d_orth + eta d_par = k0 d + k1 p, where k0 cuts d to `norm_threshold` and d_par = k0 <d, p> p / |p|^2."""
    eta, norm_threshold = parameters
    cut = tl.where(norm_threshold > 0.0, tl.minimum(1.0, norm_threshold / tl.sqrt_rn(sums[0])), 1.0)
    p_norm = tl.maximum(tl.sqrt_rn(sums[2]), 1e-12)
    return cut, (eta - 1.0) * cut * (sums[1] / p_norm / p_norm)


@triton.jit
def _rescale_terms(acc, p, n, d, s, mask, seen):
    """Welford's recurrence for p and g: a large mean would drown the deviation in a sum of squares."""
    g = n + s * d
    count = acc[0] + tl.where(mask, 1.0, 0.0)
    weight = 1.0 / seen
    p_shift = tl.where(mask, p - acc[1], 0.0)
    p_mean = acc[1] + weight * p_shift
    p_squares = acc[2] + p_shift * (p - p_mean)
    g_shift = tl.where(mask, g - acc[3], 0.0)
    g_mean = acc[3] + weight * g_shift
    g_squares = acc[4] + g_shift * (g - g_mean)
    return count, p_mean, p_squares, g_mean, g_squares


@triton.jit
def _merge_moments(acc):
    """Counts, means and sums of squared deviations of disjoint parts, put together. Chan et al. 1979."""
    count = tl.sum(acc[0], axis=0)
    p_mean = tl.sum(acc[0] * acc[1], axis=0) / count
    p_squares = tl.sum(acc[2] + acc[0] * (acc[1] - p_mean) * (acc[1] - p_mean), axis=0)
    g_mean = tl.sum(acc[0] * acc[3], axis=0) / count
    g_squares = tl.sum(acc[4] + acc[0] * (acc[3] - g_mean) * (acc[3] - g_mean), axis=0)
    return count, p_mean, p_squares, g_mean, g_squares


@triton.jit
def _rescale_coefficients(moments, parameters):
    """phi std(p) / std(g) + 1 - phi; the counts under the two roots cancel."""
    phi = parameters[0]
    return phi * (tl.sqrt_rn(moments[2]) / tl.sqrt_rn(moments[4])) + (1.0 - phi), 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A tensor arrives as (pointer, elements from one sample to the next) and is dense within a sample.


@triton.jit
def _load(tensor, sample, start, within, mask):
    pointers = tensor[0] + (sample * tensor[1] + start) + within
    return _to_float(tl.load(pointers, mask=mask, other=0.0))


@triton.jit
def _store(tensor, sample, start, within, mask, value):
    dtype = tensor[0].dtype.element_ty
    tl.store(tensor[0] + (sample * tensor[1] + start) + within, _from_float(value, dtype), mask=mask)


@triton.jit
def _load_scales(scales, sample, PER_SAMPLE: tl.constexpr):
    # A number is a plain float in the interpreter and fp32 on a GPU.
    return [(tl.load(s + sample) if PER_SAMPLE else tl.cast(s, tl.float32)) for s in scales]


@triton.jit(do_not_specialize=["blocks"])
def _combine_kernel(
    conds,
    uncond,
    out,
    scales,
    coefficients,
    active,
    euler_sample,
    dt,
    sample_size,
    row_size,
    blocks,
    RULE: tl.constexpr,
    EXACT: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    DT_IS_TENSOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One pass over the elements: a program takes ROWS rows of `row_size` <= COLS elements of one sample."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * ROWS * row_size
    cols = tl.arange(0, COLS)[None, :]
    within = tl.arange(0, ROWS)[:, None] * row_size + cols
    mask = (cols < row_size) & (start + within < sample_size)
    dtype = out[0].dtype.element_ty
    to: tl.constexpr = dtype if EXACT else tl.float32

    c = [_load(x, sample, start, within, mask) for x in conds]
    n = _load(uncond, sample, start, within, mask)
    s = _load_scales(scales, sample, PER_SAMPLE)
    k = (0.0, 0.0)
    if coefficients is not None:
        k = (tl.load(coefficients + 2 * sample), tl.load(coefficients + 2 * sample + 1))
    v = RULE(c, n, s, k, to)
    if active is not None:
        v = tl.where(tl.load(active + sample) != 0, v, c[0])
    if euler_sample is not None:
        # FlowMatchEulerDiscreteScheduler.step: sample.to(float32) + dt * v, where a dt on the device of v is cast to
        # the dtype of v first, and a number is not.
        h = _round(tl.load(dt).to(tl.float32), to) if DT_IS_TENSOR else tl.cast(dt, tl.float32)
        v = _load(euler_sample, sample, start, within, mask) + _round(h * _round(v, to), to)
    _store(out, sample, start, within, mask, v)


@triton.jit(do_not_specialize=["blocks", "programs"])
def _statistics_kernel(
    cond,
    uncond,
    state,
    momentum,
    scales,
    active,
    partials,
    sample_size,
    blocks,
    programs,
    TERMS: tl.constexpr,
    MERGE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every `programs`-th block of a sample, merged to one value for each of `partials`."""
    sample = (tl.program_id(0) // programs).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    s = _load_scales(scales, sample, PER_SAMPLE)
    seen = 0.0
    acc = [tl.full([BLOCK], 0.0, tl.float32) for _ in partials]
    block = tl.program_id(0) % programs
    while block < blocks:
        start = block.to(tl.int64) * BLOCK
        mask = start + lanes < sample_size
        seen += 1.0
        p = _load(cond, sample, start, lanes, mask)
        n = _load(uncond, sample, start, lanes, mask)
        d = p - n
        if state is not None:
            # APG's running average, rounded as it is kept; a sample without guidance leaves it alone.
            d = _round(d + momentum * _load(state, sample, start, lanes, mask), state[0].dtype.element_ty)
            keep = mask if active is None else mask & (tl.load(active + sample) != 0)
            _store(state, sample, start, lanes, keep, d)
        acc = TERMS(acc, p, n, d, s[0], mask, seen)
        block += programs
    merged = MERGE(acc)
    for i in tl.static_range(len(merged)):
        tl.store(partials[i] + tl.program_id(0), merged[i])


@triton.jit(do_not_specialize=["programs"])
def _coefficients_kernel(
    partials, coefficients, programs, parameters, MERGE: tl.constexpr, COEFFICIENTS: tl.constexpr, SLOTS: tl.constexpr
):
    """What the programs of a sample have found, merged and turned into its two coefficients."""
    sample = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    acc = [tl.load(x + sample * programs + slots, mask=slots < programs, other=0.0) for x in partials]
    k = COEFFICIENTS(MERGE(acc), parameters)
    tl.store(coefficients + 2 * sample, k[0])
    tl.store(coefficients + 2 * sample + 1, k[1])


# ---------------------------------------------------------------------------------------------------------------------
# Launches


@dataclass(frozen=True)
class Statistics:
    """How a rule comes to its coefficients: `accumulators` values per lane, the functions, the options they read."""

    accumulators: int
    terms: Any
    merge: Any
    coefficients: Any
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A row of the catalogue. `over_rows`: the rule sums over the last dimension, so a program holds whole rows."""

    function: Any
    statistics: Statistics | None = None
    over_rows: bool = False


_APG = Statistics(3, _apg_terms, _sums, _apg_coefficients, ("eta", "norm_threshold"))

RULES: dict[str, Rule] = {
    "conditional": Rule(_conditional),
    "cfg": Rule(_cfg),
    "cfg_cond": Rule(_cfg_cond),
    "lerp": Rule(_lerp),
    "composed": Rule(_composed),
    "instruct_pix2pix": Rule(_instruct_pix2pix),
    "norm": Rule(_norm, over_rows=True),
    "rescale": Rule(_rescale, Statistics(5, _rescale_terms, _merge_moments, _rescale_coefficients, ("rescale",))),
    "zero_star": Rule(_zero_star, Statistics(2, _zero_star_terms, _sums, _zero_star_coefficients)),
    "apg": Rule(_apg, _APG),
    "apg_momentum": Rule(_apg_momentum, _APG),
}


def combine(
    rule: str,
    conds: Sequence[torch.Tensor],
    uncond: torch.Tensor,
    scales: Sequence[float | torch.Tensor],
    out: torch.Tensor,
    *,
    pieces: int,
    exact: bool,
    active: torch.Tensor | None = None,
    euler_sample: torch.Tensor | None = None,
    dt: float | torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    options: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Launch `rule` on the current stream of the current device. `cfg_parallel.guidance.combine` checks the arguments.

    The tensors are `pieces` pieces along their first dimension, in each of which they are dense and have one memory
    order, that of contiguous tensors for a rule over rows. What is per sample (`active`, a scale tensor, statistics)
    needs a piece for each sample. `out` may be an input; `state`, apg's running average, may not, and is updated.
    """
    if out.numel() == 0:
        return
    entry = RULES[rule if state is None else "apg_momentum"]
    piece_size = out.numel() // pieces
    per_sample = any(isinstance(scale, torch.Tensor) for scale in scales)
    if per_sample:  # then a number among them becomes a tensor as well
        numbers = out.new_ones(pieces, dtype=torch.float32)
        scales = [x.contiguous() if isinstance(x, torch.Tensor) else numbers * x for x in scales]
    active = None if active is None else active.contiguous().view(torch.uint8)

    def piecewise(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x, x.stride(0) if pieces > 1 else 0

    coefficients = None
    if entry.statistics is not None:
        statistics = entry.statistics
        block = 4 * 32 * 16 // out.element_size()  # a 16-byte load of each tensor for each thread of four warps
        blocks = triton.cdiv(piece_size, block)
        programs = min(blocks, max(MAX_PROGRAMS // pieces, 1))
        partials = tuple(out.new_empty((statistics.accumulators, pieces * programs), dtype=torch.float32))
        coefficients = out.new_empty((pieces, 2), dtype=torch.float32)
        _statistics_kernel[(pieces * programs,)](
            piecewise(conds[0]),
            piecewise(uncond),
            None if state is None else piecewise(state),
            float(options["momentum"]) if state is not None else 0.0,
            tuple(scales),
            active,
            partials,
            piece_size,
            blocks,
            programs,
            TERMS=statistics.terms,
            MERGE=statistics.merge,
            PER_SAMPLE=per_sample,
            BLOCK=block,
            num_warps=4,
        )
        _coefficients_kernel[(pieces,)](
            partials,
            coefficients,
            programs,
            tuple(float(options[name]) for name in statistics.options),
            MERGE=statistics.merge,
            COEFFICIENTS=statistics.coefficients,
            SLOTS=triton.next_power_of_2(programs),
            num_warps=16,
        )
        if state is not None:
            conds = [conds[0], state]

    tile = 4 * 32 * 32 // out.element_size()  # two 16-byte accesses of each tensor for each thread of four warps
    row_size = out.shape[-1] if entry.over_rows else tile
    cols = triton.next_power_of_2(row_size)
    rows = max(tile // cols, 1)
    blocks = triton.cdiv(piece_size, rows * row_size)
    _combine_kernel[(pieces * blocks,)](
        tuple(piecewise(x) for x in conds),
        piecewise(uncond),
        piecewise(out),
        tuple(scales),
        coefficients,
        active,
        None if euler_sample is None else piecewise(euler_sample),
        dt,
        piece_size,
        row_size,
        blocks,
        RULE=entry.function,
        EXACT=exact,
        PER_SAMPLE=per_sample,
        DT_IS_TENSOR=isinstance(dt, torch.Tensor),
        ROWS=rows,
        COLS=cols,
        num_warps=min(max(cols // 512, 4), 16),
        # Contracting n + s * d to one fused multiply-add would round once where eager rounds twice.
        enable_fp_fusion=not exact,
    )
