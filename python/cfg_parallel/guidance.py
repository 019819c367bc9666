"""Guidance arithmetic on tensors: the rules as eager PyTorch, and their dispatch to CUDA, Triton or PyTorch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from cfg_parallel import extension
from cfg_parallel.errors import ConfigurationError
from cfg_parallel.fusion import Fusion
from cfg_parallel.launch import executor, launch
from cfg_parallel.pending import PendingPrediction, outputs_of

if TYPE_CHECKING:
    from types import ModuleType

Backend = Literal["auto", "cuda", "triton", "torch"]
Numerics = Literal["exact", "fused"]

_BACKENDS = get_args(Backend)
_NUMERICS = get_args(Numerics)
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class EulerStep:
    """A flow-matching Euler step: ``sample.to(float32) + dt * prediction``, cast to the prediction's dtype.

    This is the arithmetic of diffusers' ``FlowMatchEulerDiscreteScheduler.step``, with dt = sigma_next - sigma.

    Args:
        sample: the latents x_t, of the predictions' shape and device and any floating-point dtype.
        dt: a Python number, which enters in float32, or a tensor without dimensions, which PyTorch casts to the
            prediction's dtype first, unless it lies on the CPU and the prediction does not. numerics="exact" does as
            PyTorch does; numerics="fused" never rounds dt to less than float32.
    """

    sample: torch.Tensor
    dt: float | torch.Tensor


def guidance_interval(sigma: float | torch.Tensor, low: float, high: float) -> bool | torch.Tensor:
    """Whether low < sigma <= high, as `active` of `combine` takes it: a bool of a number, a bool tensor of a tensor.

    Any quantity that falls as the noise does will do, a timestep for instance. Where it is False, the unconditional
    prediction need not be computed. Kynkaanniemi et al. 2024 (arXiv:2404.07724).
    """
    inside = (low < sigma) & (sigma <= high)
    return inside if isinstance(inside, torch.Tensor) else bool(inside)  # a number of NumPy's gives a bool of its own


def combine(
    cond: torch.Tensor | Sequence[torch.Tensor],
    uncond: torch.Tensor | None,
    scale: float | torch.Tensor | Sequence[float | torch.Tensor],
    *,
    rule: str = "cfg",
    step: EulerStep | None = None,
    active: bool | torch.Tensor | None = None,
    backend: Backend = "auto",
    numerics: Numerics = "exact",
    out: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Combine the predictions of a denoiser by a guidance rule, and take an Euler step with the result if asked to.

    With p = `cond`, n = `uncond`, s = `scale` and g = n + s (p - n):

        cfg               g
        cfg_cond          p + s (p - n)
        lerp              torch.lerp(n, p, s)
        composed          n + s_1 (c_1 - n) + s_2 (c_2 - n) + ...; `cond` and `scale` are tuples
        instruct_pix2pix  n + s_text (text - image) + s_image (image - n); `cond` = (text, image)
        norm              g |p| / |g|, norms over the last dimension
        rescale           phi g std(p) / std(g) + (1 - phi) g, deviations of each sample; rescale=phi
        zero_star         a n + s (p - a n), a = <p, n> / (|n|^2 + 1e-8) of each sample
        apg               n + s (d_orth + eta d_par), d = p - n, cut to a norm and split along p for each sample;
                          eta=1, norm_threshold=0 (off), and momentum=, state= for a running average of d

    Sources, and what is exact on which backend: docs/guidance.md. The eager expressions are this module's references.

    Args:
        cond: prediction with the prompt, of any shape with samples along the first dimension; a tuple of them for
            "composed" and "instruct_pix2pix".
        uncond: prediction with the negative prompt; same shape, dtype and device as `cond`. Not needed (None will do)
            where `active` is False.
        scale: the guidance scale: a Python number, or a float32 tensor of shape (samples,) on the device of `cond`, of
            which each value has the effect on its sample that the number would have. A tuple of them, one for each
            prediction, where `cond` is a tuple.
        rule: a name of the table.
        step: return sample + dt * guided prediction instead of the guided prediction.
        active: where False, the result is `cond` itself (the first of a tuple): a bool, or a bool tensor for all
            samples or of shape (samples,). See `guidance_interval`.
        backend: "cuda" (the compiled module) and "triton" take float32, float16 and bfloat16 tensors that need no
            gradient and are dense in memory in one common order (contiguous, channels_last, ...), or dense within each
            sample; "torch" takes every floating-point tensor, on any device. "auto" takes the first of the three that
            can do the call.
        numerics: "exact" rounds to the dtype after every operation and so gives the bits of the eager expression,
            whatever the backend; a kernel that adds up sums in another order than PyTorch is not used then. "fused"
            computes in float32 (float64 for float64) and rounds once.
        out: where the result goes; may be an input itself, though not `state`, and not overlap one in part.
        options: what the rule needs besides. `state` is the running average of apg's p - n, of the shape and dtype of
            `cond`: zeros before the first step, updated in place at each (of the samples that are active).

    Returns:
        `out`, or a new tensor with the layout of `uncond`; of the dtype of `cond`, with a step too.

    Kernels run on the current stream of the tensors' device; nothing waits for them. Inside torch.compile the call is
    one custom op, except with gradients, where the eager expression is traced; a Python number that changes from call
    to call is compiled anew there, as always, and a tensor is not.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, as expected against got.
        ConfigurationError: a backend asked for by name that cannot do the call.
        ExtensionMissingError: backend="cuda" where the compiled module is not installed.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"Expected `backend` to be one of {', '.join(_BACKENDS)}, but got {backend!r}.")
    call = _checked_call(cond, uncond, scale, rule, step, active, numerics, out, options)
    if torch.compiler.is_compiling():
        result = _combine_torch(call) if call.needs_grad else _call_op(call, backend)
        return result if out is None else out.copy_(result)
    return _run(call, backend, out)


# The rules, as eager PyTorch: p, n, s as above, or c and s as tuples. A scale per sample is a `_PerSample`.


class _PerSample:
    """Scales of the samples of a batch, multiplied as numbers are: in float32 whatever the dtype, rounded once."""

    def __init__(self, values: torch.Tensor, like: torch.Tensor) -> None:
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.values = _per_sample(values.to(self.dtype), like)

    def __mul__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.values * x.to(self.dtype)).to(x.dtype)

    def lerp(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return torch.lerp(start.to(self.dtype), end.to(self.dtype), self.values).to(start.dtype)


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value for each sample, in a shape that broadcasts against `like`."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def _conditional(p, n, s):
    return p.clone()


def _cfg(p, n, s):
    return n + s * (p - n)


def _cfg_cond(p, n, s):
    return p + s * (p - n)


def _lerp(p, n, s):
    return s.lerp(n, p) if isinstance(s, _PerSample) else torch.lerp(n, p, s)


def _composed(c, n, s):
    result = n
    for p, weight in zip(c, s, strict=True):
        result = result + weight * (p - n)
    return result


def _instruct_pix2pix(c, n, s):
    text, image = c
    return n + s[0] * (text - image) + s[1] * (image - n)


def _norm(p, n, s):
    g = n + s * (p - n)
    return g * (torch.norm(p, dim=-1, keepdim=True) / torch.norm(g, dim=-1, keepdim=True))


def _rescale(p, n, s, rescale):
    g = n + s * (p - n)
    dims = list(range(1, g.dim()))
    rescaled = g * (p.std(dim=dims, keepdim=True) / g.std(dim=dims, keepdim=True))
    return rescale * rescaled + (1 - rescale) * g


def _zero_star(p, n, s):
    p_flat, n_flat = p.flatten(1).float(), n.flatten(1).float()
    dot = torch.sum(p_flat * n_flat, dim=1, keepdim=True)
    alpha = dot / (torch.sum(n_flat**2, dim=1, keepdim=True) + 1e-8)
    n = n * _per_sample(alpha.to(n.dtype), n)
    return n + s * (p - n)


def _apg(p, n, s, eta, norm_threshold, momentum=None, state=None):
    dims = list(range(1, p.dim()))
    d = p - n
    if state is not None:
        d = state.copy_(d + momentum * state.to(d.dtype)).to(d.dtype)
    if norm_threshold > 0:
        d = d * torch.minimum(torch.ones_like(d), norm_threshold / d.norm(p=2, dim=dims, keepdim=True))
    v0, v1 = d.double(), p.double()
    v1 = v1 / v1.norm(p=2, dim=dims, keepdim=True).clamp_min(1e-12)
    parallel = (v0 * v1).sum(dim=dims, keepdim=True) * v1
    orthogonal = v0 - parallel
    return n + s * (orthogonal.to(d.dtype) + eta * parallel.to(d.dtype))


@dataclass(frozen=True)
class _Rule:
    """A row of the table of rules."""

    reference: Callable[..., torch.Tensor]
    branches: int | None = 1  # how many conditional predictions; None: any number
    options: Mapping[str, float | None] = field(default_factory=dict)  # with their defaults; None: has to be given
    momentum: bool = False  # takes the options `momentum` and `state` as well
    over_samples: bool = False  # has sums over each sample
    over_rows: bool = False  # has sums over the last dimension

    @property
    def is_pointwise(self) -> bool:
        return not (self.over_samples or self.over_rows)

    @property
    def min_dims(self) -> int:
        return 0 if self.is_pointwise else 2  # that of the samples, and one to sum over


_RULES = {
    "cfg": _Rule(_cfg),
    "cfg_cond": _Rule(_cfg_cond),
    "lerp": _Rule(_lerp),
    "composed": _Rule(_composed, branches=None),
    "instruct_pix2pix": _Rule(_instruct_pix2pix, branches=2),
    "norm": _Rule(_norm, over_rows=True),
    "rescale": _Rule(_rescale, options={"rescale": None}, over_samples=True),
    "zero_star": _Rule(_zero_star, over_samples=True),
    "apg": _Rule(_apg, options={"eta": 1.0, "norm_threshold": 0.0}, momentum=True, over_samples=True),
}
RULES = tuple(_RULES)  # the names that `combine` takes
_CONDITIONAL = _Rule(_conditional)  # what every rule becomes where `active` is False


@dataclass(frozen=True)
class _Call:
    """The arguments of `combine` after the checks, in one form."""

    rule: str  # a name of the table, or "conditional"
    conds: tuple[torch.Tensor, ...]
    uncond: torch.Tensor
    scales: tuple[float | torch.Tensor, ...]  # as many as `conds`; a tensor is float32, of shape (samples,)
    options: Mapping[str, float]  # all that the rule reads, defaults too
    state: torch.Tensor | None  # apg's, with its options["momentum"]
    step: EulerStep | None
    active: torch.Tensor | None  # bool, of shape (samples,)
    numerics: str

    @property
    def definition(self) -> _Rule:
        return _CONDITIONAL if self.rule == "conditional" else _RULES[self.rule]

    @property
    def is_per_sample(self) -> bool:
        """Whether a number differs from sample to sample."""
        values = self.active is not None or any(isinstance(scale, torch.Tensor) for scale in self.scales)
        return values or self.definition.over_samples

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors of the predictions' shape that are only read, by their names."""
        inputs = {f"cond[{i}]" if i else "cond": tensor for i, tensor in enumerate(self.conds)}
        inputs["uncond"] = self.uncond
        if self.step is not None:
            inputs["step.sample"] = self.step.sample
        return inputs

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.inputs.values())


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _checked_call(
    cond: Any, uncond: Any, scale: Any, rule: str, step: Any, active: Any, numerics: str, out: Any, options: dict
) -> _Call:
    if not isinstance(rule, str) or rule not in _RULES:
        raise ValueError(f"Expected `rule` to be one of {', '.join(_RULES)}, but got {rule!r}.")
    if numerics not in _NUMERICS:
        raise ValueError(f"Expected `numerics` to be one of {', '.join(_NUMERICS)}, but got {numerics!r}.")
    definition = _RULES[rule]
    conds = _checked_branches("cond", cond, rule)
    scales = _checked_branches("scale", scale, rule)
    if len(scales) != len(conds):
        raise ValueError(f"Expected `scale` of length {len(conds)}, as `cond`, but got {len(scales)}.")
    first = conds[0]
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise TypeError(f"Expected `cond` as a tensor of a floating-point dtype, but got {_kind(first)}.")
    if first.dim() < definition.min_dims:
        raise ValueError(f"Expected `cond` of {definition.min_dims} or more dimensions, but got {first.dim()}.")
    values, state = _checked_options(rule, options)
    if step is not None:
        _check_step(step, first)
    if uncond is None and active is False:
        uncond = first

    like_cond = [*((f"cond[{i}]", tensor) for i, tensor in enumerate(conds)), ("uncond", uncond)][1:]
    like_cond += [(name, tensor) for name, tensor in (("state", state), ("out", out)) if tensor is not None]
    for name, tensor in like_cond:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"Expected `{name}` as a tensor, but got {_kind(tensor)}.")
        _check_shape_and_device(name, tensor, first)
        if tensor.dtype != first.dtype:
            raise ValueError(f"Expected `{name}` of dtype {first.dtype}, but got {tensor.dtype}.")
    for value in scales:
        if isinstance(value, torch.Tensor):
            _check_per_sample("scale", value, torch.float32, [first.shape[:1]], first)
        elif not isinstance(value, (int, float)):
            raise TypeError(f"Expected `scale` as a Python number or a tensor, but got {_kind(value)}.")
    if isinstance(active, torch.Tensor):
        _check_per_sample("active", active, torch.bool, [first.shape[:1], torch.Size()], first)
        active = active.expand(first.shape[:1])
    elif not (active is None or isinstance(active, bool)):
        raise TypeError(f"Expected `active` as a bool, a bool tensor or None, but got {_kind(active)}.")

    if active is False:  # nothing is left of the rule
        return _Call("conditional", conds[:1], uncond, scales[:1], {}, None, step, None, numerics)
    mask = active if isinstance(active, torch.Tensor) else None
    return _Call(rule, conds, uncond, scales, values, state, step, mask, numerics)


def _checked_branches(name: str, value: Any, rule: str) -> tuple[Any, ...]:
    """`cond` or `scale` as a tuple, of the length that the rule takes."""
    branches = _RULES[rule].branches
    if branches == 1:
        if isinstance(value, (tuple, list)):
            raise TypeError(f"Expected one `{name}` for rule={rule!r}, but got {_kind(value)} (see rule='composed').")
        return (value,)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"Expected `{name}` as a tuple for rule={rule!r}, but got {_kind(value)}.")
    if len(value) == 0 or branches not in (None, len(value)):
        raise ValueError(f"Expected `{name}` of length {branches or '1 or more'}, but got {len(value)}.")
    return tuple(value)


def _checked_options(rule: str, options: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
    definition = _RULES[rule]
    names = [*definition.options, *(("momentum", "state") if definition.momentum else ())]
    for name in options:
        if name not in names:
            raise TypeError(f"Expected the options of rule={rule!r} ({', '.join(names) or 'none'}), but got {name!r}.")
    if (options.get("momentum") is None) != (options.get("state") is None):
        raise TypeError("Expected `momentum` and `state` together; state=torch.zeros_like(cond) before the first step.")
    values = {name: options.get(name, default) for name, default in definition.options.items()}
    if options.get("momentum") is not None:
        values["momentum"] = options["momentum"]
    for name, value in values.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"Expected `{name}` as a Python number for rule={rule!r}, but got {_kind(value)}.")
    return values, options.get("state")


def _check_step(step: Any, cond: torch.Tensor) -> None:
    if not isinstance(step, EulerStep):
        raise TypeError(f"Expected `step` as an EulerStep or None, but got {_kind(step)}.")
    sample, dt = step.sample, step.dt
    if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
        raise TypeError(f"Expected `step.sample` as a tensor of a floating-point dtype, but got {_kind(sample)}.")
    _check_shape_and_device("step.sample", sample, cond)
    if isinstance(dt, torch.Tensor):
        if dt.dim() != 0 or not dt.is_floating_point():
            raise ValueError(f"Expected `step.dt` of shape () and a float, but got {tuple(dt.shape)}, {dt.dtype}.")
        if dt.device not in (cond.device, torch.device("cpu")):
            raise ValueError(f"Expected `step.dt` on {cond.device} or the CPU, but got {dt.device}.")
    elif not isinstance(dt, (int, float)):
        raise TypeError(f"Expected `step.dt` as a Python number or a tensor, but got {_kind(dt)}.")


def _check_shape_and_device(name: str, tensor: torch.Tensor, cond: torch.Tensor) -> None:
    if tensor.shape != cond.shape:
        raise ValueError(f"Expected `{name}` of shape {tuple(cond.shape)}, but got {tuple(tensor.shape)}.")
    if tensor.device != cond.device:
        raise ValueError(f"Expected `{name}` on {cond.device}, but got {tensor.device}.")


def _check_per_sample(
    name: str, values: torch.Tensor, dtype: torch.dtype, shapes: list[torch.Size], cond: torch.Tensor
) -> None:
    if cond.dim() == 0:
        raise ValueError(f"Expected `{name}` as a Python number for `cond` without dimensions, but got a tensor.")
    if values.dtype != dtype:
        raise ValueError(f"Expected `{name}` of dtype {dtype}, but got {values.dtype}.")
    if values.shape not in shapes:
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"Expected `{name}` of shape {wanted}, but got {tuple(values.shape)}.")
    if values.device != cond.device:
        raise ValueError(f"Expected `{name}` on {cond.device}, but got {values.device}.")


def _run(call: _Call, backend: str, out: torch.Tensor | None) -> torch.Tensor:
    if any(isinstance(tensor, PendingPrediction) for tensor in call.inputs.values()):
        result = _combine_torch(call)  # recorded, and so fused with what the pipeline does next
        return result if out is None else out.copy_(result)
    target = torch.empty_like(call.uncond) if out is None else out
    if target.numel() == 0:
        return target
    if backend == "auto":
        backend = _choose_backend(call, target)
    elif backend != "torch":
        obstacle = _kernel_obstacle(call, target) or (_triton_obstacle(call, target) if backend == "triton" else None)
        if obstacle is not None:
            raise ConfigurationError(f"backend={backend!r} {obstacle}; use backend='torch'.")
    if backend == "torch":
        result = _combine_torch(call)
        return result if out is None else out.copy_(result)
    (_combine_cuda if backend == "cuda" else _combine_triton)(call, target)
    return target


def _choose_backend(call: _Call, out: torch.Tensor) -> Backend:
    if not out.is_cuda or _kernel_obstacle(call, out) is not None:
        return "torch"
    has_cuda = executor(out.device)[0] is not None
    has_triton = _triton_missing_reason() is None and _triton_obstacle(call, out) is None
    if has_triton and (call.rule in ("zero_star", "apg") or not has_cuda):  # their sums have kernels in Triton only
        return "triton"
    return "cuda" if has_cuda else "torch"


def _kernel_obstacle(call: _Call, out: torch.Tensor) -> str | None:
    """Why no kernel can do this call, if none can."""
    for tensor in (*call.inputs.values(), out):
        if tensor.dtype not in _KERNEL_DTYPES:
            return f"expects float32, float16 or bfloat16, but got {tensor.dtype}"
    if call.needs_grad:
        return "has no backward pass, but an input requires grad"
    if out.dim() == 0:
        return "expects predictions of one or more dimensions, but got none"
    if _pieces(call, out) is None:
        strides = ", ".join(str(tensor.stride()) for tensor in (*call.inputs.values(), out))
        order = "contiguous tensors" if call.definition.over_rows else "dense tensors of one memory layout"
        return f"expects {order}, but got strides {strides}"
    for name, tensor in call.inputs.items():
        if not (_is_same_memory(out, tensor) or _is_apart(out, tensor)):
            return f"expects `out` to be `{name}` or apart from it, but they overlap in part"
    if call.state is not None:
        for name, tensor in (*call.inputs.items(), ("out", out)):
            if not _is_apart(call.state, tensor):
                return f"expects `state` apart from `{name}`, but they overlap"
    return None


def _pieces(call: _Call, out: torch.Tensor) -> int | None:
    """Into how many equal pieces the first dimension falls so that kernels can walk through the memory of each.

    1 or the number of samples. In a piece, the tensors are dense and have one order of dimensions, whichever it is, or
    that of contiguous tensors for a rule over rows. None if they have not.
    """
    written = [out] if call.state is None else [out, call.state]
    tensors = [*call.inputs.values(), *written]
    samples = out.shape[0]
    if all(tensor.is_contiguous() for tensor in tensors):
        return samples if call.is_per_sample else 1
    for pieces, first_dim in ((1, 0), (samples, 1)):
        if pieces != samples and call.is_per_sample:
            continue
        strides = _dense_strides(out, first_dim)
        if strides is None or any(_dense_strides(tensor, first_dim) != strides for tensor in tensors):
            continue
        if call.definition.over_rows and list(strides) != sorted(strides, reverse=True):
            continue
        if pieces > 1 and any(tensor.stride(0) * samples < tensor.numel() for tensor in written):
            continue  # an expanded tensor: its samples are one memory
        return pieces
    return None


def _dense_strides(tensor: torch.Tensor, first_dim: int) -> tuple[int, ...] | None:
    """The strides of the dimensions from `first_dim` that are longer than 1, if they fill memory without a gap."""
    dims = [(s, n) for s, n in zip(tensor.stride()[first_dim:], tensor.shape[first_dim:], strict=True) if n > 1]
    filled = 1
    for stride, size in sorted(dims):
        if stride != filled:
            return None
        filled *= size
    return tuple(stride for stride, _ in dims)


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()


def _is_apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    def end(x: torch.Tensor) -> int:
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr() + (last + 1) * x.element_size()

    return end(a) <= b.data_ptr() or end(b) <= a.data_ptr()


def _combine_torch(call: _Call) -> torch.Tensor:
    """The reference that the kernels are held against."""
    dtype = call.uncond.dtype
    wide = torch.promote_types(dtype, torch.float32) if call.numerics == "fused" else dtype
    c = [cond.to(wide) for cond in call.conds]
    n = call.uncond.to(wide)
    s = [_PerSample(scale, n) if isinstance(scale, torch.Tensor) else scale for scale in call.scales]
    options: dict[str, Any] = dict(call.options)
    if call.state is not None:
        options["state"] = call.state
        before = call.state if call.active is None else call.state.clone()
    one = call.definition.branches == 1
    v = call.definition.reference(c[0] if one else c, n, s[0] if one else s, **options)
    if call.active is not None:
        active = _per_sample(call.active, n)
        v = torch.where(active, v, c[0])
        if call.state is not None:
            call.state.copy_(torch.where(active, call.state, before))
    if call.step is not None:
        v = call.step.sample.to(torch.float32) + call.step.dt * v
    return v.to(dtype)


def _combine_cuda(call: _Call, out: torch.Tensor) -> None:
    """The eager expression, evaluated by programs: one launch, or those around the sums, which are PyTorch's."""
    extension.load()
    if not out.is_cuda:
        raise ConfigurationError(f"backend='cuda' expects CUDA tensors, but got {out.device}; use backend='torch'.")
    _combine_recorded(call, _fusion(out.device, call.numerics == "exact", threading.get_ident()), out)


def _combine_recorded(call: _Call, fusion: Fusion, out: torch.Tensor) -> None:
    def pending(tensor: torch.Tensor) -> torch.Tensor:
        return outputs_of([tensor])[1][0]

    with fusion.recording():
        step = None if call.step is None else EulerStep(pending(call.step.sample), call.step.dt)
        recorded = replace(call, conds=tuple(map(pending, call.conds)), uncond=pending(call.uncond), step=step)
        fusion.settle_into(out, _combine_torch(recorded))


@functools.lru_cache(maxsize=64)
def _fusion(device: torch.device, exact: bool, thread: int) -> Fusion:
    return Fusion(device, launch, "cuda", exact)


def _triton_obstacle(call: _Call, out: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot do this call, which some kernel can, if they cannot."""
    if call.numerics == "exact" and not call.definition.is_pointwise:
        return f"adds up rule={call.rule!r} in another order than PyTorch, which only numerics='fused' allows"
    longest = _triton_kernels().MAX_ROW
    if call.definition.over_rows and out.shape[-1] > longest:
        return f"expects a last dimension of at most {longest} for rule={call.rule!r}, but got {out.shape[-1]}"
    return None


def _combine_triton(call: _Call, out: torch.Tensor) -> None:
    kernels = _triton_kernels()
    if not (out.is_cuda or kernels.INTERPRETED):
        raise ConfigurationError(
            f"backend='triton' expects CUDA tensors, but got {out.device}; use backend='torch', or set "
            "TRITON_INTERPRET=1 before the first import to run the kernel in Triton's interpreter."
        )
    dt = None if call.step is None else call.step.dt
    if dt is not None and not (isinstance(dt, torch.Tensor) and dt.device == out.device):
        dt = float(dt)  # enters in float32; only a tensor on the device is cast to the dtype first
    # Triton launches on the current device.
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        kernels.combine(
            call.rule,
            call.conds,
            call.uncond,
            call.scales,
            out,
            pieces=_pieces(call, out),
            exact=call.numerics == "exact",
            active=call.active,
            euler_sample=None if call.step is None else call.step.sample,
            dt=dt,
            state=call.state,
            options=call.options,
        )


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


# Inside torch.compile, `combine` is one op, so that the kernels run as they do in eager mode and give the same bits. A
# schema has no union of number and tensor: each is two arguments, of which one counts. The op is functional, but for a
# running average, which has an op of its own: Inductor fails on None where a schema says that a tensor is written to.


def _combine_flat(
    state, conds, uncond, scales, sample_scales, rule, options, sample, dt, dt_tensor, active, numerics, backend
):
    definition = _CONDITIONAL if rule == "conditional" else _RULES[rule]
    names = [*definition.options, *(["momentum"] if state is not None else [])]
    call = _Call(
        rule,
        tuple(conds),
        uncond,
        tuple(number if tensor is None else tensor for number, tensor in zip(scales, sample_scales, strict=True)),
        dict(zip(names, options, strict=True)),
        state,
        None if sample is None else EulerStep(sample, dt if dt_tensor is None else dt_tensor),
        active,
        numerics,
    )
    return _run(call, backend, torch.empty_like(uncond))


_SCHEMA = (
    "Tensor[] conds, Tensor uncond, float[] scales, Tensor?[] sample_scales, str rule, float[] options, "
    "Tensor? sample, float dt, Tensor? dt_tensor, Tensor? active, str numerics, str backend) -> Tensor"
)
_combine_op = torch.library.custom_op(
    "cfg_parallel::combine", functools.partial(_combine_flat, None), mutates_args=(), schema=f"({_SCHEMA}"
)
_combine_momentum_op = torch.library.custom_op(
    "cfg_parallel::combine_momentum", _combine_flat, mutates_args=("state",), schema=f"(Tensor(a!) state, {_SCHEMA}"
)
_combine_op.register_fake(lambda conds, uncond, *_: torch.empty_like(uncond))
_combine_momentum_op.register_fake(lambda state, conds, uncond, *_: torch.empty_like(uncond))


def _call_op(call: _Call, backend: str) -> torch.Tensor:
    dt = 0.0 if call.step is None else call.step.dt
    arguments = (
        call.conds,
        call.uncond,
        [0.0 if isinstance(scale, torch.Tensor) else float(scale) for scale in call.scales],
        [scale if isinstance(scale, torch.Tensor) else None for scale in call.scales],
        call.rule,
        [float(value) for value in call.options.values()],
        None if call.step is None else call.step.sample,
        0.0 if isinstance(dt, torch.Tensor) else float(dt),
        dt if isinstance(dt, torch.Tensor) else None,
        call.active,
        call.numerics,
        backend,
    )
    return _combine_op(*arguments) if call.state is None else _combine_momentum_op(call.state, *arguments)
