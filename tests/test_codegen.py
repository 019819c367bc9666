"""The source of kernels: layouts, vectors, and that a compiler takes it."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfg_parallel import codegen, nvrtc
from cfg_parallel.program import DTYPES, SCALAR, Instruction, Op, Operand, Program
from test_program import RULES, rescaled, traced

CSRC = Path(__file__).parents[1] / "csrc"
BF16, FP32 = torch.bfloat16, torch.float32
DOUBLE = (Instruction(Op.ADD, 0, 0, round=BF16),)


def program(
    shape: tuple[int, ...], inputs: list[tuple[int, ...]], output: tuple[int, ...], dtype: torch.dtype = BF16
) -> Program:
    """Twice the first input."""
    return Program(shape, tuple(Operand(dtype, s) for s in inputs), (Operand(dtype, output),), DOUBLE, (len(inputs),))


# Layouts


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """A shape, and the strides of some tensors of it: permuted, with gaps, broadcast."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=5)))
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(shape))))
        strides, step = [0] * len(shape), 1
        for d in order:
            strides[d] = step
            step *= shape[d] + draw(st.sampled_from([0, 0, 0, 1, 5]))
        tensors.append(tuple(draw(st.sampled_from([s, s, 0])) for s in strides))
    dense = tuple(torch.empty(shape, device="meta").stride())
    return shape, [*tensors, dense]


def walk(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """The offsets of the elements, the first dimension fastest."""
    offsets = [0]
    for size, stride in zip(sizes, strides, strict=True):
        offsets = [base + i * stride for i in range(size) for base in offsets]
    return offsets


@given(strided())
def test_a_layout_visits_the_same_elements(case: tuple[tuple[int, ...], list[tuple[int, ...]]]) -> None:
    shape, strides = case
    where = codegen.layout(program(shape, strides[:-1], strides[-1]))
    expected = zip(*(walk(shape, row) for row in strides), strict=True)
    merged = zip(*(walk(where.sizes, row) for row in where.strides), strict=True)
    assert sorted(merged) == sorted(expected)
    assert where.numel == math.prod(shape)


def test_what_lies_as_one_dimension_is_one() -> None:
    assert codegen.layout(program((2, 3, 4), [(12, 4, 1)], (12, 4, 1))).sizes == (24,)
    assert codegen.layout(program((2, 1, 4), [(4, 99, 1)], (4, 4, 1))).sizes == (8,)
    channels_last = (24, 1, 6, 2)
    assert codegen.layout(program((2, 2, 4, 3), [channels_last], channels_last)).sizes == (48,)
    rows = codegen.layout(program((2, 3, 4), [(24, 8, 1)], (12, 4, 1)))  # every other row of the input
    assert (rows.sizes, rows.strides) == ((4, 6), ((1, 8), (1, 4)))
    per_sample = codegen.layout(program((2, 3, 4), [(12, 4, 1), (1, 0, 0)], (12, 4, 1)))
    assert (per_sample.sizes, per_sample.strides[1]) == ((12, 2), (0, 1))
    assert codegen.layout(program((), [()], ())).sizes == (1,)


def test_too_many_dimensions() -> None:
    shape = (2,) * 14
    alternating = tuple(0 if d % 2 else 1 << d for d in range(14))
    with pytest.raises(codegen.Ungeneratable, match="more than 6 dimensions"):
        codegen.layout(program(shape, [alternating], torch.empty(shape, device="meta").stride()))


@pytest.mark.parametrize(
    ("shape", "inputs", "width"),
    [
        ((4096,), [(1,)], 8),
        ((4099,), [(1,)], 8),  # the rest goes one by one
        ((4096,), [(2,)], 1),
        ((4096,), [(0,)], 8),  # one element for all
        ((4, 64), [(72, 1)], 8),
        ((4, 64), [(65, 1)], 1),  # rows begin off the grid
        ((4, 12), [(16, 1)], 1),  # a rest in every row
        ((4096,), [(1,)] * 7, 4),
        ((2, 64), [(64, 1), (1, 0)], 8),  # a number for each sample
    ],
)
def test_vectors(shape: tuple[int, ...], inputs: list[tuple[int, ...]], width: int) -> None:
    assert codegen.vector_width(program(shape, inputs, tuple(torch.empty(shape).stride()))) == width


def test_alignments() -> None:
    mixed = Program(
        (64,), (Operand(FP32, (1,)), Operand(BF16, (0,)), Operand(BF16, (1,))), (Operand(BF16, (1,)),), DOUBLE, (3,)
    )
    assert codegen.alignments(mixed, 8) == [16, 2, 16, 16]
    assert codegen.alignments(mixed, 4) == [16, 2, 8, 8]


# Sources


def test_one_line_for_each_op() -> None:
    (cfg,) = traced(RULES["cfg"][1], [BF16, BF16], True)
    text = codegen.source(cfg, 8)
    for line in (
        "const auto v0 = tile.template load<0, bf16>();",
        "const auto v2 = rounded<bf16>(sub(v1, v0));",
        "const auto v3 = rounded<bf16>(mul(v2, tile.template scalar<0>()));",
        "const auto v4 = rounded<bf16>(add(v0, v3));",
        "tile.template store<0, bf16>(v4);",
    ):
        assert f"    {line}\n" in text
    assert "arrived" not in text


def test_what_is_here_is_loaded_during_the_wait() -> None:
    (cfg,) = traced(RULES["cfg"][1], [BF16, BF16], True)
    text = codegen.source(cfg, 8, arriving=0)
    order = [
        text.index(part)
        for part in ("v1 = tile", "if (!tile.arrived()) return false;", "v0 = tile", "has_read", "v2 =")
    ]
    assert order == sorted(order)


def test_sizes_are_no_part_of_the_source() -> None:
    assert codegen.source(program((64,), [(1,)], (1,)), 8) == codegen.source(program((4096,), [(1,)], (1,)), 8)
    assert codegen.source(program((4, 64), [(72, 1)], (64, 1)), 8) == codegen.source(
        program((9, 128), [(256, 1)], (128, 1)), 8
    )


@pytest.mark.parametrize("row", [24, 512, 4])
def test_norms_of_rows_that_threads_cannot_hold(row: int) -> None:
    norm = Program((4, row), (Operand(FP32, (row, 1)),), (Operand(FP32, (row, 1)),), (Instruction(Op.NORM, 0),), (1,))
    with pytest.raises(codegen.Ungeneratable, match="rows of 8, 16, 32, 64, 128, 256 elements"):
        codegen.source(norm, codegen.vector_width(norm))


def every_op() -> Program:
    """Each op on values that are vectors, or the same for all elements, or numbers; each dtype in and out."""
    operands = (Operand(FP32, (64, 1)), Operand(torch.float16, (0, 0)), Operand(BF16, (1, 0)))
    choices = (0, 1, 2, SCALAR, SCALAR + 1)
    code = [
        Instruction(op, *(choices[(i + k) % len(choices)] for k in range(op.arity)), round=DTYPES[i % 3])
        for op in Op
        if op is not Op.NORM
        for i in range(len(choices))
    ]
    code.append(Instruction(Op.NORM, 0))
    outputs = tuple(Operand(dtype, (64, 1)) for dtype in DTYPES)
    last = len(operands) + len(code) - 1
    return Program((4, 64), operands, outputs, tuple(code), (last, last - 1, last - 2))


@pytest.mark.timeout(180)
def test_the_compiler_takes_it(tmp_path: Path) -> None:
    """nvcc in the place of NVRTC, which needs no more than it: every op, and a rule's two kernels; no warnings."""
    compiler = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if compiler is None:
        pytest.skip("there is no nvcc")
    (norm_euler,) = traced(RULES["norm_euler"][1], [BF16] * 3, True)
    strided = program((2, 3, 4, 5), [(600, 1, 150, 30), (0, 20, 5, 1)], (60, 20, 5, 1))
    sums, _ = traced(rescaled, [BF16] * 2, False)
    cases = [(every_op(), 8, None), (norm_euler, 8, None), (norm_euler, 8, 3), (strided, 1, None), (strided, 1, 0)]
    cases += [(sums, 8, None), (sums, 1, None)]
    unit = []
    for i, (case, width, arriving) in enumerate(cases):
        text = codegen.source(case, width, arriving)
        unit.append(text.replace("Code", f"Code{i}").replace("cfg_parallel_program", f"program{i}"))
    (tmp_path / "all.cu").write_text("\n".join(unit))
    command = [compiler, "-std=c++20", "-arch=sm_90", "-cubin", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra"]
    command += ["-I", str(CSRC), str(tmp_path / "all.cu"), "-o", str(tmp_path / "all.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# NVRTC


def test_without_nvrtc_there_is_one_line() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has NVRTC")
    assert "CPU build" in (nvrtc.missing_reason() or "")
    with pytest.raises(nvrtc.NvrtcError, match="CPU build"):
        nvrtc.compile_kernel("", {}, (9, 0))


@pytest.mark.gpu
def test_nvrtc_says_what_it_does_not_compile() -> None:
    with pytest.raises(nvrtc.NvrtcError, match=r"does not compile a kernel: .*no_such_thing"):
        nvrtc.compile_kernel("__device__ int x = no_such_thing;", {}, torch.cuda.get_device_capability())
