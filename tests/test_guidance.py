"""cfg_parallel.guidance.combine: every rule against eager PyTorch bit for bit, diffusers' code, and fp64."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import adaptive_projected_guidance as diffusers_apg
from diffusers.guiders import classifier_free_guidance as diffusers_cfg
from diffusers.guiders import classifier_free_zero_star_guidance as diffusers_zero_star
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg_parallel import errors, extension, guidance
from cfg_parallel.fusion import Fusion
from cfg_parallel.guidance import RULES, EulerStep, combine, guidance_interval
from cfg_parallel.pending import is_unsettled, pending_outputs, settle
from cfg_parallel.program import interpret

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
POINTWISE = ["cfg", "cfg_cond", "lerp", "composed", "instruct_pix2pix"]
SUMS = ["norm", "rescale", "zero_star", "apg"]  # with sums over a row or a sample
SPECIALS = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-45, 6e-8, 3e38, -3e38, 65504.0, 1.0]
SPECIAL_SCALES = [0.0, 1.0, 7.5, -2.0, 0.3, 1e-40, 1e30, float("inf"), float("nan")]


# ---------------------------------------------------------------------------------------------------------------------
# What a test combines


@dataclass
class Case:
    """Arguments of `combine`, made from a seed."""

    rule: str
    c: list[torch.Tensor]
    n: torch.Tensor
    s: list[float | torch.Tensor]
    keywords: dict[str, Any] = field(default_factory=dict)

    def combine(self, **more: Any) -> torch.Tensor:
        one = self.rule not in ("composed", "instruct_pix2pix")
        cond, scale = (self.c[0], self.s[0]) if one else (tuple(self.c), tuple(self.s))
        return combine(cond, self.n, scale, rule=self.rule, **{**self.keywords, **more})

    @property
    def step(self) -> EulerStep | None:
        return self.keywords.get("step")

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [*self.c, self.n, *([] if self.step is None else [self.step.sample])]


def make_case(
    rule: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seed: int,
    *,
    scale: float = 4.5,
    scale_per_sample: bool = False,
    mask: bool = False,
    step: str = "none",
    momentum: bool = False,
    device: str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 3

    c = [normal(*shape).to(dtype).to(device) for _ in range({"composed": 3, "instruct_pix2pix": 2}.get(rule, 1))]
    n = normal(*shape).to(dtype).to(device)
    s: list[float | torch.Tensor] = [scale * (1 - 0.4 * k) for k in range(len(c))]
    keywords: dict[str, Any] = {}
    if scale_per_sample:
        s[0] = normal(shape[0]).to(device)
    if mask:
        keywords["active"] = (torch.rand(shape[0], generator=generator) < 0.6).to(device)
    if step != "none":
        sample = normal(*shape).to(torch.float32 if seed % 2 else dtype).to(device)
        dt = torch.tensor(-0.0371234, device="cpu" if step == "CPU tensor" else device)
        keywords["step"] = EulerStep(sample, dt.item() if step == "number" else dt)
    if rule == "rescale":
        keywords["rescale"] = 0.7
    if rule == "apg":
        keywords.update(eta=0.3, norm_threshold=2.0)
        if momentum:
            keywords.update(momentum=-0.5, state=normal(*shape).to(dtype).to(device))
    return Case(rule, c, n, s, keywords)


MODERATE = st.one_of(st.floats(-40, 40), st.sampled_from([0.0, 1.0, -1.0, 0.3, 7.5]))
ANY_SCALE = st.one_of(MODERATE, st.sampled_from([1e-30, 1e-40, 1e5, 1e30, -1e30, float("inf"), float("nan")]))


def draw_case(
    draw: Callable[[Any], Any],
    rules: list[str],
    dtype: torch.dtype,
    scales: st.SearchStrategy[float] = MODERATE,
    min_dims: int = 0,
) -> Case:
    rule = draw(st.sampled_from(rules))
    min_dims = max(min_dims, 2 if rule in SUMS else 0)
    shape = draw(
        st.one_of(
            st.lists(st.integers(0, 7), min_size=min_dims, max_size=5).map(tuple),
            st.sampled_from([(3, 1111), (2, 16, 64), (1, 4, 8, 8), (2, 3, 5, 7, 3)]),
        )
    )
    samples = len(shape) > 0
    return make_case(
        rule,
        dtype,
        shape,
        draw(st.integers(0, 2**31)),
        scale=draw(scales),
        scale_per_sample=samples and draw(st.booleans()),
        mask=samples and draw(st.booleans()),
        step=draw(st.sampled_from(["none", "number", "tensor"])),
        momentum=draw(st.booleans()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What it is held against: the eager expressions, and a bound on rounding errors


def eager_prediction(rule: str, c: list[torch.Tensor], n: torch.Tensor, s: list[float]) -> torch.Tensor:
    p = c[0]
    return {
        "cfg": lambda: n + s[0] * (p - n),
        "cfg_cond": lambda: p + s[0] * (p - n),
        "lerp": lambda: torch.lerp(n, p, s[0]),
        "composed": lambda: n + s[0] * (c[0] - n) + s[1] * (c[1] - n) + s[2] * (c[2] - n),
        "instruct_pix2pix": lambda: n + s[0] * (c[0] - c[1]) + s[1] * (c[1] - n),
    }[rule]()


def eager(case: Case) -> torch.Tensor:
    """The bits that exact mode promises for the pointwise rules: a sample has those of a call of its own."""
    active = case.keywords.get("active")
    if active is None and not any(isinstance(s, torch.Tensor) for s in case.s):
        v = eager_prediction(case.rule, case.c, case.n, case.s)  # type: ignore[arg-type]
    else:
        v = case.n.clone()
        for i in range(len(v)):
            s = [s[i].item() if isinstance(s, torch.Tensor) else s for s in case.s]
            own = [c[i : i + 1] for c in case.c]
            guided = active is None or bool(active[i])
            v[i : i + 1] = eager_prediction(case.rule, own, case.n[i : i + 1], s) if guided else own[0]
    if case.step is not None:
        v = (case.step.sample.to(torch.float32) + case.step.dt * v).to(v.dtype)
    return v


def same_bits(a: torch.Tensor, b: torch.Tensor, signed_zeros: bool = True) -> bool:
    """torch.equal that also tells -0.0 from 0.0 and finds a NaN equal to a NaN."""
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (x.masked_fill(x.isnan(), 0.0) for x in (a, b))
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype])) if signed_zeros else torch.equal(a, b)


class Bounded:
    """A value in fp64, and a bound on the error of computing it with roundings to `dtype`.

    Running error analysis (Higham 2002, section 3.3): an operation passes on the errors of its operands and adds its
    own, which is `unit` times its result, or `tiny` where that is subnormal. A sum of m terms in any order adds m - 1
    roundings of at most the sum of the magnitudes; a division is allowed 2 units in the last place, as Triton's is.
    """

    def __init__(self, value: torch.Tensor, error: torch.Tensor | float, dtype: torch.dtype) -> None:
        self.value, self.dtype = value, dtype
        self.error = torch.as_tensor(error, dtype=torch.float64, device=value.device)

    def _rounded(self, value: torch.Tensor, error: torch.Tensor, units: float = 1) -> Bounded:
        info = torch.finfo(self.dtype)
        unit, tiny = units * info.eps / 2, info.smallest_normal * info.eps
        return Bounded(value, error + unit * (value.abs() + error) + tiny, self.dtype)

    def _other(self, other: Bounded | float) -> Bounded:
        if isinstance(other, Bounded):
            return other
        value = torch.tensor(other, dtype=torch.float64, device=self.value.device)
        return Bounded(value, value.abs() * 2.0**-24, self.dtype)  # a Python number enters in fp32

    def __add__(self, other: Bounded | float) -> Bounded:
        other = self._other(other)
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded | float) -> Bounded:
        other = self._other(other)
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded | float) -> Bounded:
        other = self._other(other)
        error = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        value = self.value / other.value
        room = (other.value.abs() - other.error).clamp_min(0)  # none: the denominator may be zero, the bound infinite
        return self._rounded(value, (self.error + value.abs() * other.error) / room, units=4)

    def sqrt(self) -> Bounded:
        value = self.value.sqrt()
        return self._rounded(value, torch.where(self.error == 0, 0.0, self.error / value))

    def sum(self, dims: list[int]) -> Bounded:
        value, error = (x.sum(dim=dims, keepdim=True) for x in torch.broadcast_tensors(self.value, self.error))
        terms = self.value.abs().sum(dim=dims, keepdim=True)
        count = self.value.numel() / max(value.numel(), 1)
        return Bounded(value, error + count * torch.finfo(self.dtype).eps / 2 * (terms + error), self.dtype)

    def std(self, dims: list[int]) -> Bounded:
        count = self.value.numel() / max(self.value.shape[0], 1)
        deviation = self - self.sum(dims) / self._other(count)
        return ((deviation * deviation).sum(dims) / self._other(count - 1)).sqrt()


def bounded(case: Case, dtype: torch.dtype = torch.float32) -> Bounded:
    """The result of a case in fp64 and the error of computing it in `dtype`; a state is read as the call left it."""

    def exactly(x: torch.Tensor) -> Bounded:
        return Bounded(x.double(), 0.0, dtype)

    def per_sample(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, *[1] * (case.n.dim() - 1))

    c, n = [exactly(x) for x in case.c], exactly(case.n)
    s = [exactly(per_sample(x)) if isinstance(x, torch.Tensor) else n._other(x) for x in case.s]
    p, dims, options = c[0], list(range(1, case.n.dim())), case.keywords
    g = n + s[0] * (p - n)
    if case.rule == "cfg":
        v = g
    elif case.rule == "cfg_cond":
        v = p + s[0] * (p - n)
    elif case.rule == "lerp":  # computed from one end or the other
        v = Bounded(g.value, torch.maximum(g.error, (p - (n._other(1.0) - s[0]) * (p - n)).error), dtype)
    elif case.rule == "composed":
        v = g + s[1] * (c[1] - n) + s[2] * (c[2] - n)
    elif case.rule == "instruct_pix2pix":
        v = n + s[0] * (c[0] - c[1]) + s[1] * (c[1] - n)
    elif case.rule == "norm":
        v = g * ((p * p).sum([-1]).sqrt() / (g * g).sum([-1]).sqrt())
    elif case.rule == "rescale":
        v = g * (p.std(dims) / g.std(dims) * options["rescale"] + (1 - options["rescale"]))
    elif case.rule == "zero_star":
        m = n * ((p * n).sum(dims) / ((n * n).sum(dims) + 1e-8))
        v = m + s[0] * (p - m)
    else:
        d = exactly(options["state"]) if "state" in options else p - n
        cut = n._other(options["norm_threshold"]) / (d * d).sum(dims).sqrt()
        d = d * Bounded(cut.value.clamp_max(1), cut.error, dtype)
        parallel = (d * p).sum(dims) / (p * p).sum(dims) * p
        v = n + s[0] * (d - parallel + parallel * options["eta"])
    if "active" in options:
        active = per_sample(options["active"])
        v = Bounded(torch.where(active, v.value, p.value), torch.where(active, v.error, 0.0), dtype)
    if case.step is not None:
        dt = case.step.dt
        v = exactly(case.step.sample) + n._other(float(dt)) * v
    return v


def assert_within_bound(result: torch.Tensor, expected: Bounded) -> None:
    """With the rounding of the result to its own dtype added to what `expected` allows."""
    final = Bounded(expected.value, expected.error, result.dtype)._rounded(expected.value, expected.error)
    error = (result.double() - final.value).abs()
    fits = (error <= final.error) | (result.isnan() & final.value.isnan()) | final.error.isinf()
    assert bool(fits.all()), f"off by {error[~fits].max():.3g}, {(error / final.error)[~fits].max():.3g} of the bound"


def check_fused(case: Case, **keywords: Any) -> None:
    before = case.keywords["state"].clone() if "state" in case.keywords else None
    result = case.combine(numerics="fused", **keywords)
    assert result.dtype == case.n.dtype and result.shape == case.n.shape
    if result.numel() == 0:
        return
    if before is not None:
        state, momentum = case.keywords["state"], case.keywords["momentum"]
        exact = Bounded(case.c[0].double(), 0.0, torch.float32) - Bounded(case.n.double(), 0.0, torch.float32)
        exact = exact + Bounded(before.double(), 0.0, torch.float32) * momentum
        active = case.keywords.get("active", torch.ones(len(state), dtype=torch.bool, device=state.device))
        assert torch.equal(state[~active], before[~active])
        assert_within_bound(state[active], Bounded(exact.value[active], exact.error[active], torch.float32))
    assert_within_bound(result, bounded(case))


# ---------------------------------------------------------------------------------------------------------------------
# Eager PyTorch


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_torch_gives_the_bits_of_the_eager_expression(dtype: torch.dtype, data: st.DataObject) -> None:
    case = draw_case(data.draw, POINTWISE, dtype, ANY_SCALE)
    assert same_bits(case.combine(), eager(case))


@pytest.mark.filterwarnings("ignore:std..:UserWarning")  # of a single value
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_torch_fused_is_within_the_bound(dtype: torch.dtype, data: st.DataObject) -> None:
    check_fused(draw_case(data.draw, list(RULES), dtype))


@pytest.mark.parametrize("rule", RULES)
def test_the_bound_tells_the_rules_apart(rule: str) -> None:
    """A bound that any result fits would prove nothing."""
    case = make_case(rule, torch.float32, (2, 6, 50), 0)
    expected = bounded(case)
    assert (expected.error.max() / expected.value.abs().max()) < 1e-4
    for other in set(RULES) - {rule, "composed", "instruct_pix2pix"}:
        if {rule, other} == {"cfg", "lerp"}:
            continue  # two ways to compute the same
        keywords = make_case(other, torch.float32, (2, 6, 50), 0).keywords
        different = Case(other, case.c, case.n, case.s, keywords).combine(numerics="fused")
        with pytest.raises(AssertionError, match="of the bound"):
            assert_within_bound(different, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numerics", ["exact", "fused"])
def test_scale_zero_is_uncond_and_equal_inputs_are_a_fixed_point(dtype: torch.dtype, numerics: Any) -> None:
    case = make_case("cfg", dtype, (4, 33), 0)
    cond, uncond = case.c[0], case.n
    assert torch.equal(combine(cond, uncond, 0.0, numerics=numerics), uncond)
    assert torch.equal(combine(cond, cond, 7.5, numerics=numerics), cond)


def test_strided_inputs_and_gradients_go_through_torch() -> None:
    cond, uncond = torch.randn(2, 7, 5).transpose(1, 2)
    assert torch.equal(combine(cond, uncond, 2.0), uncond + 2.0 * (cond - uncond))
    leaf = cond.clone().requires_grad_()
    combine(leaf, uncond, 2.0).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


# ---------------------------------------------------------------------------------------------------------------------
# diffusers


def pipeline_lines(path: str, first: str, last: str) -> str:
    """Consecutive assignments in a pipeline's source: from the one to `first` to the one that ends with `last`."""
    source = (Path(diffusers.__file__).parent / "pipelines" / path).read_text()
    for node in ast.walk(ast.parse(source)):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            lines = [ast.unparse(x) for x in body] if isinstance(body, list) else []
            begins = [i for i, line in enumerate(lines) if line.startswith(f"{first} = ")]
            ends = [i for i, line in enumerate(lines) if line.endswith(last)]
            if begins and ends:
                return "\n".join(lines[begins[0] : ends[0] + 1])
    raise AssertionError(f"{path} does not assign {first} ... {last}")


@pytest.mark.parametrize("dtype", DTYPES)
class TestDiffusers:
    """The eager expressions against the code that they are taken from."""

    def guider(self, kind: type, **settings: Any) -> Any:
        guider = kind(**settings)
        guider.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(0))
        return guider

    @pytest.mark.parametrize(("rule", "original"), [("cfg", False), ("cfg_cond", True)])
    def test_classifier_free_guidance(self, dtype: torch.dtype, rule: str, original: bool) -> None:
        case = make_case(rule, dtype, (2, 5, 7), 1)
        guider = self.guider(
            diffusers_cfg.ClassifierFreeGuidance, guidance_scale=4.5, use_original_formulation=original
        )
        assert same_bits(case.combine(), guider.forward(case.c[0], case.n).pred)

    def test_rescale(self, dtype: torch.dtype) -> None:
        case = make_case("rescale", dtype, (2, 5, 7), 2)
        guider = self.guider(diffusers_cfg.ClassifierFreeGuidance, guidance_scale=4.5, guidance_rescale=0.7)
        assert same_bits(case.combine(), guider.forward(case.c[0], case.n).pred)

    def test_zero_star(self, dtype: torch.dtype) -> None:
        case = make_case("zero_star", dtype, (2, 5, 7), 3)
        guider = self.guider(diffusers_zero_star.ClassifierFreeZeroStarGuidance, guidance_scale=4.5)
        assert same_bits(case.combine(), guider.forward(case.c[0], case.n).pred)

    @pytest.mark.parametrize("norm_threshold", [0.0, 2.0, 1e6])
    @pytest.mark.parametrize("momentum", [None, -0.75])
    def test_apg(self, dtype: torch.dtype, norm_threshold: float, momentum: float | None) -> None:
        guider = self.guider(
            diffusers_apg.AdaptiveProjectedGuidance,
            guidance_scale=4.5,
            adaptive_projected_guidance_momentum=momentum,
            adaptive_projected_guidance_rescale=norm_threshold,
            eta=0.3,
        )
        options: dict[str, Any] = {"eta": 0.3, "norm_threshold": norm_threshold}
        if momentum is not None:
            guider.momentum_buffer = diffusers_apg.MomentumBuffer(momentum)
            options.update(momentum=momentum, state=torch.zeros(2, 5, 7, dtype=dtype))
        for seed in range(3):
            case = make_case("apg", dtype, (2, 5, 7), seed)
            case.keywords = options
            assert same_bits(case.combine(), guider.forward(case.c[0], case.n).pred, signed_zeros=False)

    def test_norm_of_qwen_image(self, dtype: torch.dtype) -> None:
        case = make_case("norm", dtype, (2, 16, 64), 4)
        names = {"torch": torch, "noise_pred": case.c[0], "neg_noise_pred": case.n, "true_cfg_scale": 4.5}
        exec(pipeline_lines("qwenimage/pipeline_qwenimage.py", "comb_pred", "(cond_norm / noise_norm)"), names)
        assert same_bits(case.combine(), names["noise_pred"])

    def test_instruct_pix2pix(self, dtype: torch.dtype) -> None:
        case = make_case("instruct_pix2pix", dtype, (2, 4, 8, 8), 5)
        names: dict[str, Any] = {"self": SimpleNamespace(guidance_scale=case.s[0], image_guidance_scale=case.s[1])}
        names["noise_pred"] = torch.cat([*case.c, case.n])
        path = "stable_diffusion/pipeline_stable_diffusion_instruct_pix2pix.py"
        lines = pipeline_lines(path, "noise_pred_text, noise_pred_image, noise_pred_uncond", "- noise_pred_uncond)")
        exec(lines, names)
        assert same_bits(case.combine(), names["noise_pred"])

    @pytest.mark.parametrize("sample_dtype", DTYPES)
    def test_euler_step(self, dtype: torch.dtype, sample_dtype: torch.dtype) -> None:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(8)
        case = make_case("cfg", dtype, (2, 5, 7), 6)
        sample = torch.randn(2, 5, 7).to(sample_dtype)
        for i, timestep in enumerate(scheduler.timesteps):
            step = EulerStep(sample, scheduler.sigmas[i + 1] - scheduler.sigmas[i])
            expected = scheduler.step(case.combine(), timestep, sample, return_dict=False)[0]
            result = case.combine(step=step)
            assert same_bits(result, expected)
            sample = expected.to(sample_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("numerics", ["exact", "fused"])
def test_out_may_be_any_input(rule: str, numerics: Any) -> None:
    for i in range(5):
        case = make_case(rule, torch.bfloat16, (3, 17), 2, step="number", mask=True)
        if i >= len(case.inputs):
            break
        expected, out = case.combine(numerics=numerics), case.inputs[i]
        assert case.combine(numerics=numerics, out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("rule", RULES)
def test_not_active_is_the_conditional_prediction(rule: str) -> None:
    case = make_case(rule, torch.bfloat16, (2, 3, 5), 0, momentum=True)
    state = case.keywords["state"].clone() if rule == "apg" else None
    case.n = None  # type: ignore[assignment]
    result = case.combine(active=False)
    assert torch.equal(result, case.c[0]) and result.data_ptr() != case.c[0].data_ptr()
    step = EulerStep(torch.randn(2, 3, 5), -0.25)
    assert torch.equal(case.combine(active=False, step=step), (step.sample - 0.25 * case.c[0]).bfloat16())
    assert state is None or torch.equal(case.keywords["state"], state)


def test_active_without_dimensions_counts_for_all_samples() -> None:
    case = make_case("cfg", torch.float32, (3, 5), 0)
    assert torch.equal(case.combine(active=torch.tensor(True)), eager(case))
    assert torch.equal(case.combine(active=True), eager(case))
    assert torch.equal(case.combine(active=torch.tensor(False)), case.c[0])


def test_guidance_interval() -> None:
    sigmas = torch.tensor([0.1, 0.2, 0.3, 0.8, 0.9], dtype=torch.float64)
    inside = [False, False, True, True, False]
    assert [guidance_interval(sigma, 0.2, 0.8) for sigma in sigmas.tolist()] == inside
    assert torch.equal(guidance_interval(sigmas, 0.2, 0.8), torch.tensor(inside))
    case = make_case("cfg", torch.float32, (5, 4), 0)
    result = case.combine(active=guidance_interval(sigmas, 0.2, 0.8))
    assert guidance_interval(np.float64(0.1), 0.2, 0.8) is False, "also for NumPy's numbers"
    assert torch.equal(result[[0, 1, 4]], case.c[0][[0, 1, 4]]) and torch.equal(result[2:4], eager(case)[2:4])


ONES = torch.ones(2, 4)
PAIR = {"rule": "instruct_pix2pix", "cond": (ONES, ONES), "scale": (2.0, 1.0)}
APG = {"rule": "apg", "momentum": 0.5, "state": ONES}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"uncond": torch.ones(2, 3)}, ValueError, r"Expected `uncond` of shape \(2, 4\), but got \(2, 3\)"),
        ({"uncond": torch.ones(1, 4)}, ValueError, r"Expected `uncond` of shape \(2, 4\), but got \(1, 4\)"),
        ({"uncond": ONES.half()}, ValueError, "`uncond` of dtype torch.float32, but got torch.float16"),
        ({"uncond": torch.ones(2, 4, device="meta")}, ValueError, "Expected `uncond` on cpu, but got meta"),
        ({"uncond": None}, TypeError, "Expected `uncond` as a tensor, but got NoneType"),
        ({"uncond": None, "active": torch.tensor(False)}, TypeError, "Expected `uncond` as a tensor, but got NoneType"),
        ({"out": torch.ones(4, 2)}, ValueError, r"Expected `out` of shape \(2, 4\), but got \(4, 2\)"),
        ({"out": ONES.double()}, ValueError, "`out` of dtype torch.float32, but got torch.float64"),
        ({"cond": ONES.long()}, TypeError, "floating-point dtype, but got a tensor of torch.int64"),
        ({"cond": (ONES, ONES)}, TypeError, "Expected one `cond` for rule='cfg', but got tuple"),
        ({"scale": torch.tensor(2.0)}, ValueError, r"Expected `scale` of shape \(2,\), but got \(\)"),
        ({"scale": torch.ones(3)}, ValueError, r"Expected `scale` of shape \(2,\), but got \(3,\)"),
        ({"scale": torch.ones(2).half()}, ValueError, "`scale` of dtype torch.float32, but got torch.float16"),
        ({"scale": torch.ones(2, device="meta")}, ValueError, "Expected `scale` on cpu, but got meta"),
        ({"scale": "2"}, TypeError, "Expected `scale` as a Python number or a tensor, but got str"),
        ({"rule": "cgf"}, ValueError, "Expected `rule` to be one of cfg, .*, but got 'cgf'"),
        ({"backend": "cudnn"}, ValueError, "`backend` to be one of auto, cuda, triton, torch, but got 'cudnn'"),
        ({"numerics": "fast"}, ValueError, "Expected `numerics` to be one of exact, fused, but got 'fast'"),
        ({"backend": "cuda", "cond": torch.ones(4, 2).t()}, ValueError, "expects dense tensors of one memory layout"),
        ({**PAIR, "cond": ONES}, TypeError, "Expected `cond` as a tuple for rule='instruct_pix2pix', but got a tensor"),
        ({**PAIR, "scale": 2.0}, TypeError, "Expected `scale` as a tuple for rule='instruct_pix2pix', but got float"),
        ({**PAIR, "cond": (ONES,)}, ValueError, "Expected `cond` of length 2, but got 1"),
        ({**PAIR, "scale": (1, 2, 3)}, ValueError, "Expected `scale` of length 2, but got 3"),
        ({**PAIR, "rule": "composed", "cond": ()}, ValueError, "Expected `cond` of length 1 or more, but got 0"),
        ({**PAIR, "rule": "composed", "scale": (1,)}, ValueError, "Expected `scale` of length 2, as `cond`, but got 1"),
        ({**PAIR, "cond": (ONES, ONES[:1])}, ValueError, r"Expected `cond\[1\]` of shape \(2, 4\), but got \(1, 4\)"),
        ({"rescale": 0.5}, TypeError, r"Expected the options of rule='cfg' \(none\), but got 'rescale'"),
        ({"rule": "rescale"}, TypeError, "Expected `rescale` as a Python number for rule='rescale', but got NoneType"),
        ({"rule": "rescale", "rescale": 1, "cond": ONES[0]}, ValueError, "`cond` of 2 or more dimensions, but got 1"),
        ({"rule": "norm", "cond": ONES[0]}, ValueError, "Expected `cond` of 2 or more dimensions, but got 1"),
        ({"rule": "apg", "eta": ONES}, TypeError, "Expected `eta` as a Python number for rule='apg', but got a tensor"),
        ({"rule": "apg", "momentum": 0.5}, TypeError, "Expected `momentum` and `state` together"),
        ({**APG, "state": ONES[:1]}, ValueError, r"Expected `state` of shape \(2, 4\), but got \(1, 4\)"),
        ({"active": 1.5}, TypeError, "Expected `active` as a bool, a bool tensor or None, but got float"),
        ({"active": torch.ones(2)}, ValueError, "Expected `active` of dtype torch.bool, but got torch.float32"),
        ({"active": torch.ones(3).bool()}, ValueError, r"Expected `active` of shape \(2,\) or \(\), but got \(3,\)"),
        ({"step": (ONES, 0.1)}, TypeError, "Expected `step` as an EulerStep or None, but got tuple"),
        ({"step": EulerStep(ONES[:1], 0.1)}, ValueError, r"`step.sample` of shape \(2, 4\), but got \(1, 4\)"),
        ({"step": EulerStep(ONES.long(), 0.1)}, TypeError, "`step.sample` as a tensor of a floating-point dtype"),
        ({"step": EulerStep(ONES, "x")}, TypeError, "Expected `step.dt` as a Python number or a tensor, but got str"),
        ({"step": EulerStep(ONES, torch.ones(1))}, ValueError, r"Expected `step.dt` of shape \(\) and a float"),
        ({"step": EulerStep(ONES, torch.ones((), device="meta"))}, ValueError, "`step.dt` on cpu or the CPU, but got"),
    ],
)
def test_bad_input_is_answered_with_expected_against_got(arguments: dict, error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"cond": ONES, "uncond": ONES, "scale": 2.0}
    with pytest.raises(error, match=message):
        combine(**{**good, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cond": ONES.double(), "uncond": ONES.double()}, "float32, float16 or bfloat16, but got torch.float64"),
        ({"cond": ONES.clone().requires_grad_()}, "has no backward pass"),
        ({"cond": ONES[0, 0], "uncond": ONES[0, 0]}, "expects predictions of one or more dimensions"),
        ({"cond": torch.ones(2, 8)[:, ::2]}, r"dense tensors of one memory layout, but got strides \(8, 2\), \(4, 1\)"),
        ({"cond": torch.ones(4, 2).t()}, "expects dense tensors of one memory layout"),
        ({"rule": "norm", "cond": torch.ones(4, 2).t(), "uncond": torch.ones(4, 2).t()}, "expects contiguous tensors"),
        ({"out": torch.ones(1, 4).expand(2, 4)}, "expects dense tensors of one memory layout"),
        ({"cond": (x := torch.zeros(9))[:8], "uncond": torch.zeros(8), "out": x[1:]}, "`out` to be `cond` or apart"),
        ({**APG, "numerics": "fused", "cond": ONES}, "expects `state` apart from `cond`, but they overlap"),
        *(
            ({"rule": rule, **({"rescale": 1} if rule == "rescale" else {})}, f"adds up rule='{rule}' in another order")
            for rule in SUMS
        ),
    ],
)
def test_kernels_refuse_what_they_cannot_do(interpreted: None, arguments: dict, message: str) -> None:
    good: dict[str, Any] = {"cond": torch.ones(2, 4), "uncond": torch.ones(2, 4), "scale": 2.0}
    with pytest.raises(errors.ConfigurationError, match=message):
        combine(**{**good, **arguments}, backend="triton")


def test_rows_that_no_program_can_hold_are_refused(interpreted: None) -> None:
    row = torch.ones(1, 16385)
    with pytest.raises(errors.ConfigurationError, match=r"a last dimension of at most 16384 .*, but got 16385"):
        combine(row, row, 2.0, rule="norm", backend="triton", numerics="fused")


def test_cuda_backend_on_the_cpu_is_an_error_that_names_the_way_out() -> None:
    message = "expects CUDA tensors" if extension.missing_reason() is None else "installed without its CUDA module"
    with pytest.raises(errors.CfgParallelError, match=message):
        combine(ONES, ONES, 2.0, backend="cuda")


def test_missing_extension_named_as_backend_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_load", lambda: (None, "not installed: install a CUDA toolkit"))
    with pytest.raises(errors.ExtensionMissingError, match="install a CUDA toolkit"):
        combine(torch.ones(2), torch.ones(2), 2.0, backend="cuda")


def test_import_does_not_import_triton() -> None:
    code = "import sys, cfg_parallel.guidance; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("rule", RULES)
def test_compiles_with_the_same_bits(rule: str) -> None:
    torch.compiler.reset()
    case = make_case(rule, torch.bfloat16, (2, 3, 8), 0, scale_per_sample=True, momentum=True)
    case.keywords["active"] = torch.tensor([True, False])
    start = case.keywords.get("state", torch.zeros(()))

    def step(sample: torch.Tensor, dt: Any, state: torch.Tensor) -> torch.Tensor:
        return case.combine(step=EulerStep(sample * 2, dt), **({"state": state} if rule == "apg" else {})) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    sample = torch.randn(2, 3, 8)
    for dt in (-0.03, *torch.linspace(-0.1, 0, 20)):  # a tensor does not recompile, of which 8 would be an error
        eager_state, compiled_state = start.clone(), start.clone()
        assert same_bits(compiled(sample, dt, compiled_state), step(sample, dt, eager_state))
        assert torch.equal(eager_state, compiled_state) and torch.equal(eager_state, start) == (rule != "apg")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_takes_the_ops() -> None:
    cfg = make_case("cfg", torch.bfloat16, (2, 3, 8), 0, step="number", mask=True)
    apg = make_case("apg", torch.bfloat16, (2, 3, 8), 1, momentum=True)

    def both(state: torch.Tensor) -> torch.Tensor:
        return cfg.combine() * apg.combine(state=state)

    eager_state, compiled_state = (apg.keywords["state"].clone() for _ in range(2))
    assert same_bits(torch.compile(both, fullgraph=True)(compiled_state), both(eager_state))
    assert same_bits(compiled_state, eager_state)


def test_compiles_to_one_op_unless_there_are_gradients() -> None:
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.append(" ".join(str(node.target) for node in graph.graph.nodes if node.op.startswith("call")))
        return graph.forward

    case = make_case("cfg", torch.float32, (2, 3), 0)
    out = torch.empty_like(case.n)
    compiled = torch.compile(case.combine, fullgraph=True, backend=backend)
    for keywords in ({}, {"active": False}, {"out": out}):
        expected = case.combine(**keywords).clone()
        out.zero_()
        assert same_bits(compiled(**keywords), expected)
    assert [text.count("combine") for text in ops] == [1, 1, 1]
    assert same_bits(out, expected)

    case.c[0].requires_grad_()
    compiled().sum().backward()
    assert "combine" not in ops[-1] and torch.equal(case.c[0].grad, torch.full((2, 3), 4.5))


def test_the_custom_ops_declare_what_they_do() -> None:
    c, n, state = torch.randn(3, 2, 5)
    active = torch.tensor([True, False])
    arguments = ([c], n, [2.0], [None], "apg", [0.3, 2.0], n, -0.1, None, active, "exact", "auto")
    torch.library.opcheck(torch.ops.cfg_parallel.combine.default, arguments)
    arguments = (*arguments[:5], [0.3, 2.0, -0.5], *arguments[6:])
    torch.library.opcheck(torch.ops.cfg_parallel.combine_momentum.default, (state, *arguments))


# ---------------------------------------------------------------------------------------------------------------------
# Triton


def load_kernels(interpret: str) -> ModuleType:
    """A copy of the kernels, next to the one that the package has loaded: how they run is decided at import."""
    pytest.importorskip("triton", reason="Triton is not installed")
    spec = importlib.util.find_spec("cfg_parallel.triton_kernels.guidance")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", interpret)
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look up the names in annotations
        spec.loader.exec_module(module)
    assert interpret == str(int(module.INTERPRETED))
    return module


@pytest.fixture(scope="module")
def interpreted_kernels() -> ModuleType:
    return load_kernels("1")


@pytest.fixture(scope="class")
def interpreted(interpreted_kernels: ModuleType) -> Iterator[None]:
    """backend="triton" runs in Triton's interpreter."""
    import triton.language as tl

    def interpreted_sum(x: Any, axis: int, keep_dims: bool = False) -> Any:
        return tl.reduce(x, axis, tl.standard._sum_combine, keep_dims)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guidance, "_triton_kernels", lambda: interpreted_kernels)
        patch.setattr(tl, "sum", interpreted_sum)  # Triton's own was decorated when Triton was imported
        yield


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which carries the interpreter, reports overflow
@pytest.mark.usefixtures("interpreted")
class TestTritonInterpreter:
    @pytest.mark.parametrize("dtype", DTYPES)
    @given(data=st.data())
    @settings(deadline=None, max_examples=40)
    def test_exact_gives_the_bits_of_eager(self, dtype: torch.dtype, data: st.DataObject) -> None:
        case = draw_case(data.draw, POINTWISE, dtype, ANY_SCALE, min_dims=1)
        signed_zeros = case.rule != "lerp"  # torch.lerp on the CPU subtracts the other way round than on a GPU
        assert same_bits(case.combine(backend="triton"), eager(case), signed_zeros)

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(data=st.data())
    @settings(deadline=None, max_examples=40)
    def test_fused_is_within_the_bound(self, dtype: torch.dtype, data: st.DataObject) -> None:
        check_fused(draw_case(data.draw, list(RULES), dtype, min_dims=1), backend="triton")

    @pytest.mark.parametrize("rule", POINTWISE)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_special_values(self, dtype: torch.dtype, rule: str) -> None:
        # Next to a subnormal, the interpreter's fused multiply-add rounds twice.
        values = [x for x in SPECIALS if not 0 < abs(x) < 1e-38] if rule == "lerp" else SPECIALS
        case = special_case(rule, dtype, "cpu", values)
        for scale in SPECIAL_SCALES:
            case.s = [scale] * len(case.c)
            assert same_bits(case.combine(backend="triton"), eager(case), signed_zeros=rule != "lerp"), scale

    def test_every_bfloat16(self) -> None:
        """The interpreter's own conversions truncate and lose subnormal numbers; the kernels work around both."""
        values = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
        cond, uncond = (values[torch.randperm(2**16, generator=torch.Generator().manual_seed(i))] for i in range(2))
        for scale in (1.0, 0.37):
            assert same_bits(combine(cond, uncond, scale, backend="triton"), uncond + scale * (cond - uncond))

    @pytest.mark.parametrize("rule", SUMS)
    def test_sums_over_many_programs(self, interpreted_kernels: ModuleType, rule: str) -> None:
        """More blocks than programs, a last block that is not full, and a mean that would drown the deviation."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreted_kernels, "MAX_PROGRAMS", 8)
            case = make_case(rule, torch.float32, (2, 81, 101), 0, step="number")
            case.c[0] += 1000
            case.n += 999
            check_fused(case, backend="triton")

    @pytest.mark.parametrize("rule", RULES)
    def test_out_may_be_any_input_of_more_than_one_program(self, rule: str) -> None:
        for i in range(5):
            case = make_case(rule, torch.float32, (3, 1111), 3, step="number", mask=True)
            if i >= len(case.inputs):
                break
            expected = case.combine(backend="triton", numerics="fused")
            case.combine(backend="triton", numerics="fused", out=case.inputs[i])
            assert torch.equal(case.inputs[i], expected)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("layout", ["slice of tokens", "channels_last_3d", "transposed", "expanded", "column"])
    def test_layouts(self, rule: str, layout: str) -> None:
        """Dense within a sample is enough, and in which order of the dimensions matters to sums over rows only."""
        change = {
            "slice of tokens": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
            "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
            "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
            "expanded": lambda x: x[:1].expand(x.shape),
            "column": lambda x: x[..., :1].contiguous(),
        }[layout]
        case = make_case(rule, torch.bfloat16, (2, 3, 2, 5, 4), 4, step="tensor", scale_per_sample=True)
        case.c, case.n = [change(x) for x in case.c], change(case.n)
        case.keywords["step"] = EulerStep(change(case.step.sample), case.step.dt)
        if layout == "transposed" or (rule == "norm" and layout == "channels_last_3d"):
            with pytest.raises(errors.ConfigurationError, match="but got strides"):
                case.combine(backend="triton", numerics="fused")
            return
        check_fused(case, backend="triton")
        result = case.combine(backend="triton", numerics="fused")
        assert result.stride() == torch.empty_like(case.n).stride()
        if rule in POINTWISE:
            assert same_bits(case.combine(backend="triton"), eager(case))

    def test_in_a_process_of_its_own(self) -> None:
        code = (
            "import torch; from cfg_parallel.guidance import combine\n"
            "c, u = (torch.randn(2, 5, 7, 3, 3).to(memory_format=torch.channels_last_3d) for _ in range(2))\n"
            "out = combine(c, u, 4.5, backend='triton')\n"
            "assert torch.equal(out, u + 4.5 * (c - u)) and out.stride() == u.stride()\n"
        )
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def special_case(rule: str, dtype: torch.dtype, device: str, values: list[float]) -> Case:
    """Every pair of the values."""
    one = torch.tensor(values, device=device).to(dtype)
    pairs = [x.contiguous().flatten() for x in torch.meshgrid(one, one, indexing="ij")]
    count = {"composed": 3, "instruct_pix2pix": 2}.get(rule, 1)
    return Case(rule, [pairs[0].roll(7 * i) for i in range(count)], pairs[1], [])


def test_without_the_interpreter_cpu_tensors_are_refused() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process was started with TRITON_INTERPRET=1")
    with pytest.raises(errors.ConfigurationError, match=r"expects CUDA tensors, but got cpu.*TRITON_INTERPRET=1"):
        combine(torch.ones(2), torch.ones(2), 2.0, backend="triton")


class Hopper:
    """Enough of a driver to compile for an H100 or H200 without one."""

    utils = None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture(scope="class")
def ptx() -> Iterator[Callable[[Case, Any], dict[str, str]]]:
    """The PTX of the kernels that a call launches, by their names."""
    kernels = load_kernels("0")
    import triton

    def ptx_of(case: Case, numerics: Any) -> dict[str, str]:
        texts: dict[str, str] = {}

        def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                texts[kernel.fn.__name__] = kernel.warmup(*args, grid=grid, **kwargs).asm["ptx"]

            return launch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "INTERPRETED", True)  # so that CPU tensors are let through
            patch.setattr(guidance, "_triton_kernels", lambda: kernels)
            patch.setattr(triton.JITFunction, "__getitem__", launcher)
            case.combine(backend="triton", numerics=numerics)
        return texts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", Hopper())
        yield ptx_of


class TestTritonCompiled:
    """What is true of the machine code can be seen without a GPU."""

    @pytest.mark.parametrize("rule", POINTWISE)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_exact_rounds_after_every_op(self, ptx: Any, rule: str, dtype: torch.dtype) -> None:
        case = make_case(rule, dtype, (2, 16, 64), 0, step="tensor")
        assert ("fma.rn.f32" in ptx(case, "exact")["_combine_kernel"]) == (rule == "lerp")  # where eager has one
        assert "fma.rn.f32" in ptx(case, "fused")["_combine_kernel"]

    @pytest.mark.parametrize("rule", RULES)
    def test_accesses_are_16_bytes_wide(self, ptx: Any, rule: str) -> None:
        case = make_case(
            rule, torch.bfloat16, (2, 16, 64), 0, step="tensor", scale_per_sample=True, mask=True, momentum=True
        )
        kernels = ptx(case, "fused")
        assert set(kernels) == {
            "_combine_kernel",
            *(["_statistics_kernel", "_coefficients_kernel"] if rule in ("rescale", "zero_star", "apg") else []),
        }
        for name in set(kernels) - {"_coefficients_kernel"}:
            accesses = [line for line in kernels[name].splitlines() if "ld.global" in line or "st.global" in line]
            assert not [line for line in accesses if ".b16" in line]  # no prediction goes by the element
            assert sum(".v4.b32" in line for line in accesses) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# backend="cuda" with its programs run by the interpreter


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[bool, Fusion]:
    fusions = {exact: Fusion(CPU, interpret, "interpreter", exact) for exact in (True, False)}
    monkeypatch.setattr(
        guidance,
        "_combine_cuda",
        lambda call, out: guidance._combine_recorded(call, fusions[call.numerics == "exact"], out),
    )
    return fusions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_programs(rule: str, dtype: torch.dtype, programs: dict[bool, Fusion]) -> None:
    for seed, extra in enumerate(({}, {"step": "tensor"}, {"step": "number", "scale_per_sample": True, "mask": True})):
        for _ in range(2):  # the first is the replay that the second is compared with
            case = make_case(rule, dtype, (2, 3, 16), seed, **extra)  # type: ignore[arg-type]
            assert same_bits(case.combine(backend="cuda"), case.combine(backend="torch"))
            check_fused(case, backend="cuda")
        out = torch.empty(2, 3, 16, dtype=dtype)
        case = make_case(rule, dtype, (2, 3, 16), seed, **extra)  # type: ignore[arg-type]
        result = case.combine(backend="cuda", out=out)
        assert result is out
        assert same_bits(out, case.combine(backend="torch"))


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"lerp"}))  # one op, which is PyTorch's own kernel
def test_programs_are_what_runs(rule: str, programs: dict[bool, Fusion], monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[torch.Tensor] = []

    def execute(program: Any, inputs: Any, scalars: Any, outputs: Any, *arrival: Any) -> None:
        launches.extend(outputs)
        interpret(program, inputs, scalars, outputs, *arrival)

    monkeypatch.setattr(programs[False], "execute", execute)
    case = make_case(rule, torch.bfloat16, (2, 3, 16), 0, step="tensor")
    out = torch.empty(2, 3, 16, dtype=torch.bfloat16)
    case.combine(backend="cuda", numerics="fused", out=out)
    assert launches[-1] is out  # without a copy


def test_combine_of_a_pending_prediction_stays_pending() -> None:
    values = [torch.randn(2, 3, 16) for _ in range(2)]
    pendings = [
        pending_outputs(lambda v=v: [v], [(v.shape, v.stride(), v.dtype, v.device)])[1][0]  # type: ignore[misc]
        for v in values
    ]
    with torch.no_grad():
        result = combine(*pendings, 4.0)
        assert is_unsettled(result)
        assert torch.equal(settle(result), combine(*values, 4.0))


# ---------------------------------------------------------------------------------------------------------------------
# GPUs


# The rules that each backend has, and whether it has the Euler step, masks and scales per sample.
KERNELS = [(backend, rule, True) for backend in ("cuda", "triton") for rule in RULES]


def random_cases(rule: str, dtype: torch.dtype, extras: bool, count: int) -> Iterator[Case]:
    """Any shape, with and without what can come with a rule."""
    generator = torch.Generator().manual_seed(0)
    min_dims = 2 if rule in SUMS else 1
    for seed in range(count):
        dims = int(torch.randint(min_dims, 6, (), generator=generator))
        limit = {1: 100_000, 2: 600, 3: 60, 4: 20, 5: 9}[dims]
        shape = tuple(torch.randint(0, limit, (dims,), generator=generator).tolist())
        if extras:  # `eager` goes from sample to sample
            shape = (min(shape[0], 8), *shape[1:])
        scale = float(torch.randn((), generator=generator, dtype=torch.float64) * 8)
        extra: dict[str, Any] = [
            {},
            {"step": "CPU tensor", "scale_per_sample": True},
            {"step": "tensor", "scale_per_sample": True, "mask": True, "momentum": True},
        ][seed % 3 if extras else 0]
        yield make_case(rule, dtype, shape, seed, scale=scale, device="cuda", **extra)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("backend", "rule", "extras"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
class TestKernelsOnTheGpu:
    def test_exact_gives_the_bits_of_eager(self, backend: Any, rule: str, extras: bool, dtype: torch.dtype) -> None:
        if rule in SUMS and (backend == "triton" or rule == "apg"):  # apg's state changes from call to call
            pytest.skip("sums in another order than PyTorch's")
        for case in random_cases(rule, dtype, extras, 210):
            expected = case.combine(backend="torch") if rule in SUMS else eager(case)
            for _ in range(2):  # the first CUDA launch of a kind is compared with eager, and the second one used
                assert same_bits(case.combine(backend=backend), expected), case.n.shape

    def test_fused_is_within_the_bound(self, backend: Any, rule: str, extras: bool, dtype: torch.dtype) -> None:
        for case in random_cases(rule, dtype, extras, 210):
            check_fused(case, backend=backend)

    def test_two_runs_give_the_same_bits(self, backend: Any, rule: str, extras: bool, dtype: torch.dtype) -> None:
        case = make_case(rule, dtype, (2, 64, 1031), 0, device="cuda")
        first, second = (case.combine(backend=backend, numerics="fused") for _ in range(2))
        assert same_bits(first, second)

    def test_special_values(self, backend: Any, rule: str, extras: bool, dtype: torch.dtype) -> None:
        if rule in SUMS:
            pytest.skip("the promise is about bits, which it does not make")
        case = special_case(rule, dtype, "cuda", SPECIALS)
        for scale in SPECIAL_SCALES:
            case.s = [scale] * len(case.c)
            for _ in range(2):
                assert same_bits(case.combine(backend=backend), eager(case)), scale

    @pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (3, 2, 5), (8, 8, 8)])
    def test_slices_that_start_anywhere(
        self, backend: Any, rule: str, extras: bool, dtype: torch.dtype, offsets: tuple[int, ...]
    ) -> None:
        for numel in (0, 1, 7, 8, 9, 4099):
            case = make_case(rule, dtype, (1, numel), 0, device="cuda")
            buffers = [torch.randn(numel + 16, device="cuda").to(dtype) for _ in range(3)]
            cond, uncond, out = (b[o : o + numel].view(1, -1) for b, o in zip(buffers, offsets, strict=True))
            case.c[0], case.n, guards = cond, uncond, buffers[2].clone()
            check_fused(case, backend=backend, out=out)
            guards[offsets[2] : offsets[2] + numel] = out
            assert same_bits(buffers[2], guards)  # nothing outside the slice was written

    def test_out_may_be_any_input(self, backend: Any, rule: str, extras: bool, dtype: torch.dtype) -> None:
        for i in range(5):
            case = make_case(rule, dtype, (3, 255, 257), 3, step="tensor" if extras else "none", device="cuda")
            if i >= len(case.inputs):
                break
            if case.step is not None:
                case.keywords["step"] = EulerStep(case.step.sample.to(dtype), case.step.dt)
            expected = case.combine(backend=backend, numerics="fused")
            case.combine(backend=backend, numerics="fused", out=case.inputs[i])
            assert torch.equal(case.inputs[i], expected)

    def test_channels_last_keeps_its_layout(self, backend: Any, rule: str, extras: bool, dtype: torch.dtype) -> None:
        if rule == "norm":
            pytest.skip("rows have to be contiguous")
        case = make_case(rule, dtype, (2, 4, 8, 6), 6, device="cuda")
        case.c = [x.contiguous(memory_format=torch.channels_last) for x in case.c]
        case.n = case.n.contiguous(memory_format=torch.channels_last)
        assert case.combine(backend=backend, numerics="fused").stride() == case.n.stride()
        check_fused(case, backend=backend)

    def test_runs_on_the_current_stream_and_in_a_cuda_graph(
        self, backend: Any, rule: str, extras: bool, dtype: torch.dtype
    ) -> None:
        case = make_case(rule, dtype, (64, 64), 7, device="cuda")
        out = torch.empty_like(case.n)
        case.combine(backend=backend, numerics="fused", out=out)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            case.combine(backend=backend, numerics="fused", out=out)
        case.c[0].add_(1)
        out.zero_()
        graph.replay()
        assert same_bits(out, case.combine(backend=backend, numerics="fused"))

    def test_runs_on_the_device_of_its_tensors(self, backend: Any, rule: str, extras: bool, dtype: torch.dtype) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        case = make_case(rule, dtype, (33, 65), 8, device="cuda:1")
        with torch.cuda.device(0):
            check_fused(case, backend=backend)
            assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_gives_the_bits_of_torch_in_exact_mode_on_the_gpu(rule: str, dtype: torch.dtype) -> None:
    case = make_case(rule, dtype, (2, 31, 64), 0, device="cuda")
    assert same_bits(case.combine(), case.combine(backend="torch"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_elements() -> None:
    """64-bit indexing: 2^31 + 9 values of fp16 are 4 GiB."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    numel = 2**31 + 9
    cond = torch.zeros(1, numel, dtype=torch.float16, device="cuda")
    uncond = torch.ones(1, numel, dtype=torch.float16, device="cuda")
    cond[0, -9:] = torch.arange(9)
    for backend, rule in (("cuda", "cfg"), ("triton", "cfg"), ("triton", "zero_star")):
        out = torch.zeros(1, numel, dtype=torch.float16, device="cuda")
        combine(cond, uncond, 2.0, rule=rule, backend=backend, numerics="fused", out=out)
        alpha = 36 / numel if rule == "zero_star" else 1.0  # <p, n> / |n|^2
        expected = (alpha + 2.0 * (cond[0, -9:].double() - alpha)).half()
        assert torch.equal(out[0, -9:], expected)
        assert int((out[0, :-9] != torch.tensor(-alpha).half().item()).sum()) == 0
        del out


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_makes_no_context_on_another_device() -> None:
    """A follower on cuda:1 must not take 500 MiB of cuda:0 because a guard went back to it."""
    code = (
        "import ctypes, torch; from cfg_parallel.guidance import combine\n"
        "def active():\n"
        "    flags, state = ctypes.c_uint(), ctypes.c_int()\n"
        "    ctypes.CDLL('libcuda.so.1').cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(state))\n"
        "    return state.value\n"
        "x = torch.ones(8, device='cuda:1'); before = active(), torch.cuda.current_device()\n"
        "combine(x, x, 2.0, backend='cuda'); torch.cuda.synchronize(1)\n"
        "assert (active(), torch.cuda.current_device()) == before, (before, active(), torch.cuda.current_device())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
