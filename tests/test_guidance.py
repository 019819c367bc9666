"""cfg_parallel.guidance.combine: each backend against fp64 or against the eager expression, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg_parallel import errors, extension
from cfg_parallel.guidance import combine

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
SPECIALS = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-45, 6e-8, 3e38, -3e38, 65504.0, 1.0]
TWO_TO_24 = 2.0**-24  # the unit roundoff of fp32, in which every kernel computes and the scale arrives

scales = st.one_of(st.floats(-40, 40), st.sampled_from([0.0, 1.0, -1.0, 7.5, 1e-30, 1e30]))
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


def eager(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    return uncond + scale * (cond - uncond)


def predictions(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 3).to(dtype).to(device) for _ in range(2)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """torch.equal that also tells -0.0 from 0.0 and finds a NaN equal to a NaN."""
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (x.masked_fill(x.isnan(), 0.0).view(BITS[x.dtype]) for x in (a, b))
    return torch.equal(a, b)


def tolerance(cond: torch.Tensor, uncond: torch.Tensor, scale: float, unit: float, step_unit: float) -> torch.Tensor:
    """A bound on |result - exact|, in fp64: each of d, m and o adds its rounding to what it inherits.

    `step_unit` is the relative rounding of an intermediate, `unit` that of the result; the last term of each line is
    the absolute error of a subnormal.
    """
    tiny = torch.finfo(cond.dtype).smallest_normal * unit
    p, n = cond.double(), uncond.double()
    d = (p - n).abs()
    o = (n + scale * (p - n)).abs()
    d_error = step_unit * d + tiny
    m_error = abs(scale) * d_error + (step_unit + TWO_TO_24) * abs(scale) * (d + d_error) + tiny
    return m_error + (unit + step_unit) * (o + m_error) + tiny


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@given(shape=shapes, scale=st.floats(-40, 40), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_torch_backend_is_within_the_derived_tolerance_of_fp64(
    dtype: torch.dtype, shape: tuple[int, ...], scale: float, seed: int
) -> None:
    cond, uncond = predictions(shape, dtype, seed)
    exact = uncond.double() + scale * (cond.double() - uncond.double())
    unit = torch.finfo(dtype).eps / 2
    steps: list[tuple[Any, float]] = [("exact", unit), ("fused", min(unit, TWO_TO_24))]
    for numerics, step_unit in steps:
        result = combine(cond, uncond, scale, backend="torch", numerics=numerics)
        assert result.dtype == dtype and result.shape == cond.shape
        error = (result.double() - exact).abs()
        assert bool((error <= tolerance(cond, uncond, scale, unit, step_unit)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes, scale=scales, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_torch_backend_gives_the_bits_of_the_eager_expression(
    dtype: torch.dtype, shape: tuple[int, ...], scale: float, seed: int
) -> None:
    cond, uncond = predictions(shape, dtype, seed)
    assert same_bits(combine(cond, uncond, scale), eager(cond, uncond, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numerics", ["exact", "fused"])
def test_scale_zero_is_uncond_and_equal_inputs_are_a_fixed_point(dtype: torch.dtype, numerics: Any) -> None:
    cond, uncond = predictions((4, 33), dtype, 0)
    assert torch.equal(combine(cond, uncond, 0.0, numerics=numerics), uncond)
    assert torch.equal(combine(cond, cond, 7.5, numerics=numerics), cond)


@pytest.mark.parametrize("alias", ["cond", "uncond", "neither"])
@pytest.mark.parametrize("numerics", ["exact", "fused"])
def test_out_may_be_an_input(alias: str, numerics: Any) -> None:
    cond, uncond = predictions((3, 17), torch.bfloat16, 1)
    expected = combine(cond, uncond, 3.5, numerics=numerics)
    out = {"cond": cond, "uncond": uncond, "neither": torch.empty_like(cond)}[alias]
    assert combine(cond, uncond, 3.5, numerics=numerics, out=out) is out
    assert torch.equal(out, expected)


def test_strided_inputs_and_gradients_go_through_torch() -> None:
    cond, uncond = (x.t() for x in predictions((5, 7), torch.float32, 2))
    assert torch.equal(combine(cond, uncond, 2.0), eager(cond, uncond, 2.0))
    leaf = cond.clone().requires_grad_()
    combine(leaf, uncond, 2.0).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"uncond": torch.ones(2, 3)}, ValueError, r"Expected `uncond` of shape \(2, 4\), but got \(2, 3\)"),
        ({"uncond": torch.ones(1, 4)}, ValueError, r"Expected `uncond` of shape \(2, 4\), but got \(1, 4\)"),
        ({"uncond": torch.ones(2, 4).half()}, ValueError, "`uncond` of dtype torch.float32, but got torch.float16"),
        ({"uncond": torch.ones(2, 4, device="meta")}, ValueError, "Expected `uncond` on cpu, but got meta"),
        ({"out": torch.ones(4, 2)}, ValueError, r"Expected `out` of shape \(2, 4\), but got \(4, 2\)"),
        ({"out": torch.ones(2, 4).double()}, ValueError, "`out` of dtype torch.float32, but got torch.float64"),
        ({"cond": torch.ones(2, 4).long()}, TypeError, "`cond` of a floating-point dtype, but got torch.int64"),
        ({"scale": torch.tensor(2.0)}, TypeError, "Expected `scale` as a Python number, but got Tensor"),
        (
            {"backend": "cudnn"},
            ValueError,
            "Expected `backend` to be one of auto, cuda, triton, torch, but got 'cudnn'",
        ),
        ({"numerics": "fast"}, ValueError, "Expected `numerics` to be one of exact, fused, but got 'fast'"),
        ({"backend": "cuda", "cond": torch.ones(4, 2).t()}, ValueError, "expects dense tensors of one memory layout"),
    ],
)
def test_bad_input_is_answered_with_expected_against_got(arguments: dict, error: type[Exception], message: str) -> None:
    good = {"cond": torch.ones(2, 4), "uncond": torch.ones(2, 4), "scale": 2.0}
    with pytest.raises(error, match=message):
        combine(**{**good, **arguments})


def test_kernels_refuse_what_they_cannot_do() -> None:
    cond, uncond = predictions((2, 4), torch.float64, 0)
    with pytest.raises(errors.ConfigurationError, match=r"expects float32, float16 or bfloat16, but got torch.float64"):
        combine(cond, uncond, 2.0, backend="triton")
    cond, uncond = predictions((2, 4), torch.float32, 0)
    with pytest.raises(errors.ConfigurationError, match="has no backward pass"):
        combine(cond.requires_grad_(), uncond, 2.0, backend="triton")
    memory = torch.zeros(9)
    with pytest.raises(errors.ConfigurationError, match="`out` to be `cond` or apart from it"):
        combine(memory[:8], torch.zeros(8), 2.0, backend="triton", out=memory[1:])


def test_cuda_backend_on_the_cpu_is_an_error_that_names_the_way_out() -> None:
    cond, uncond = predictions((2, 4), torch.float32, 0)
    message = "expects CUDA tensors" if extension.missing_reason() is None else "installed without its CUDA module"
    with pytest.raises(errors.CfgParallelError, match=message):
        combine(cond, uncond, 2.0, backend="cuda")


def test_missing_extension_named_as_backend_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_load", lambda: (None, "not installed: install a CUDA toolkit"))
    with pytest.raises(errors.ExtensionMissingError, match="install a CUDA toolkit"):
        combine(torch.ones(2), torch.ones(2), 2.0, backend="cuda")


def test_import_does_not_import_triton() -> None:
    code = "import sys, cfg_parallel.guidance; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """A copy of the kernels that runs in Triton's interpreter, next to the compiled ones that the GPU tests use."""
    pytest.importorskip("triton", reason="Triton is not installed")
    spec = importlib.util.find_spec("cfg_parallel.triton_kernels.guidance")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is decorated
        spec.loader.exec_module(module)
    assert module.INTERPRETED
    yield module


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which carries the interpreter, reports overflow
class TestTritonInterpreter:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @given(shape=shapes, scale=scales, seed=st.integers(0, 2**31))
    @settings(deadline=None, max_examples=40)
    def test_exact_gives_the_bits_of_eager(
        self, interpreted: ModuleType, dtype: torch.dtype, shape: tuple[int, ...], scale: float, seed: int
    ) -> None:
        cond, uncond = predictions(shape, dtype, seed)
        out = torch.empty_like(cond)
        interpreted.combine(cond, uncond, scale, out, exact=True)
        assert same_bits(out, eager(cond, uncond, scale))

    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @given(shape=shapes, scale=st.floats(-40, 40), seed=st.integers(0, 2**31))
    @settings(deadline=None, max_examples=20)
    def test_is_within_the_derived_tolerance_of_fp64(
        self, interpreted: ModuleType, dtype: torch.dtype, exact: bool, shape: tuple[int, ...], scale: float, seed: int
    ) -> None:
        cond, uncond = predictions(shape, dtype, seed)
        out = torch.empty_like(cond)
        interpreted.combine(cond, uncond, scale, out, exact=exact)
        # The interpreter truncates to bf16: a whole unit in the last place each time instead of half.
        unit = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
        error = (out.double() - (uncond.double() + scale * (cond.double() - uncond.double()))).abs()
        assert bool((error <= tolerance(cond, uncond, scale, unit, unit if exact else TWO_TO_24)).all())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_special_values(self, interpreted: ModuleType, dtype: torch.dtype) -> None:
        values = torch.tensor(SPECIALS).to(dtype)
        cond, uncond = (x.contiguous().flatten() for x in torch.meshgrid(values, values, indexing="ij"))
        for scale in (0.0, 1.0, 7.5, -2.0, float("inf"), float("nan")):
            out = torch.empty_like(cond)
            interpreted.combine(cond, uncond, scale, out, exact=True)
            assert same_bits(out, eager(cond, uncond, scale))

    @pytest.mark.parametrize("alias", ["cond", "uncond"])
    def test_out_may_be_an_input_of_more_than_one_block(self, interpreted: ModuleType, alias: str) -> None:
        cond, uncond = predictions((3, 1111), torch.float32, 3)
        expected = eager(cond, uncond, 4.0)
        out = cond if alias == "cond" else uncond
        interpreted.combine(cond, uncond, 4.0, out, exact=True)
        assert torch.equal(out, expected)

    def test_public_function_on_the_cpu(self) -> None:
        code = (
            "import torch; from cfg_parallel.guidance import combine\n"
            "c, u = (torch.randn(2, 5, 7, 3, 3).to(memory_format=torch.channels_last_3d) for _ in range(2))\n"
            "out = combine(c, u, 4.5, backend='triton')\n"
            "assert torch.equal(out, u + 4.5 * (c - u)) and out.stride() == u.stride()\n"
        )
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)

    def test_without_the_interpreter_cpu_tensors_are_refused(self) -> None:
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("this process was started with TRITON_INTERPRET=1")
        with pytest.raises(errors.ConfigurationError, match=r"expects CUDA tensors, but got cpu.*TRITON_INTERPRET=1"):
            combine(torch.ones(2), torch.ones(2), 2.0, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
class TestKernelsOnTheGpu:
    def test_exact_gives_the_bits_of_eager_over_random_shapes(self, backend: Any, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        for seed in range(300):
            dims = int(torch.randint(1, 5, (), generator=generator))
            limit = {1: 100_000, 2: 600, 3: 60, 4: 20}[dims]
            shape = tuple(torch.randint(0, limit, (dims,), generator=generator).tolist())
            scale = float(torch.randn((), generator=generator, dtype=torch.float64) * 8)
            cond, uncond = predictions(shape, dtype, seed, "cuda")
            assert same_bits(combine(cond, uncond, scale, backend=backend), eager(cond, uncond, scale)), (shape, scale)

    def test_fused_is_within_the_derived_tolerance(self, backend: Any, dtype: torch.dtype) -> None:
        unit = torch.finfo(dtype).eps / 2
        for seed, scale in enumerate((0.0, 1.0, 4.0, 7.5, -3.3, 30.1)):
            cond, uncond = predictions((257, 1031), dtype, seed, "cuda")
            result = combine(cond, uncond, scale, backend=backend, numerics="fused")
            error = (result.double() - (uncond.double() + scale * (cond.double() - uncond.double()))).abs()
            assert bool((error <= tolerance(cond, uncond, scale, unit, TWO_TO_24)).all())

    def test_special_values(self, backend: Any, dtype: torch.dtype) -> None:
        values = torch.tensor(SPECIALS, device="cuda").to(dtype)
        cond, uncond = (x.contiguous().flatten() for x in torch.meshgrid(values, values, indexing="ij"))
        for scale in (0.0, 1.0, 7.5, -2.0, 1e-40, 1e30, float("inf"), float("nan")):
            assert same_bits(combine(cond, uncond, scale, backend=backend), eager(cond, uncond, scale)), scale

    @pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (3, 2, 5), (8, 8, 8)])
    def test_slices_that_start_anywhere(self, backend: Any, dtype: torch.dtype, offsets: tuple[int, ...]) -> None:
        for numel in (0, 1, 7, 8, 9, 4099):
            buffers = [torch.randn(numel + 16, device="cuda").to(dtype) for _ in range(3)]
            cond, uncond, out = (b[o : o + numel] for b, o in zip(buffers, offsets, strict=True))
            guards = buffers[2].clone()
            combine(cond, uncond, 4.5, backend=backend, out=out)
            guards[offsets[2] : offsets[2] + numel] = eager(cond, uncond, 4.5)
            assert torch.equal(buffers[2], guards)  # and nothing outside the slice was written

    @pytest.mark.parametrize("alias", ["cond", "uncond"])
    def test_out_may_be_an_input(self, backend: Any, dtype: torch.dtype, alias: str) -> None:
        cond, uncond = predictions((1024, 1027), dtype, 5, "cuda")
        expected = eager(cond, uncond, 4.0)
        out = cond if alias == "cond" else uncond
        combine(cond, uncond, 4.0, backend=backend, out=out)
        assert torch.equal(out, expected)

    def test_channels_last_keeps_its_layout(self, backend: Any, dtype: torch.dtype) -> None:
        cond, uncond = (
            x.contiguous(memory_format=torch.channels_last) for x in predictions((2, 4, 8, 6), dtype, 6, "cuda")
        )
        result = combine(cond, uncond, 4.0, backend=backend)
        assert result.stride() == uncond.stride() and torch.equal(result, eager(cond, uncond, 4.0))

    def test_runs_on_the_current_stream_and_in_a_cuda_graph(self, backend: Any, dtype: torch.dtype) -> None:
        cond, uncond = predictions((64, 64), dtype, 7, "cuda")
        out = torch.empty_like(cond)
        combine(cond, uncond, 4.0, backend=backend, out=out)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            combine(cond, uncond, 4.0, backend=backend, out=out)
        cond.add_(1)
        out.zero_()
        graph.replay()
        assert torch.equal(out, eager(cond, uncond, 4.0))

    def test_runs_on_the_device_of_its_tensors(self, backend: Any, dtype: torch.dtype) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        cond, uncond = predictions((33, 65), dtype, 8, "cuda:1")
        with torch.cuda.device(0):
            result = combine(cond, uncond, 4.0, backend=backend)
            assert torch.cuda.current_device() == 0
        assert torch.equal(result, eager(cond, uncond, 4.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_elements() -> None:
    """64-bit indexing, in both kernels: 2^31 + 9 values of fp16 are 4 GiB."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    numel = 2**31 + 9
    cond = torch.zeros(numel, dtype=torch.float16, device="cuda")
    uncond = torch.ones(numel, dtype=torch.float16, device="cuda")
    cond[-9:] = torch.arange(9)
    for backend in ("cuda", "triton"):
        out = torch.zeros(numel, dtype=torch.float16, device="cuda")
        combine(cond, uncond, 2.0, backend=backend, out=out)
        assert torch.equal(out[-9:], eager(cond[-9:], uncond[-9:], 2.0))
        assert int((out[:-9] != -1).sum()) == 0


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
