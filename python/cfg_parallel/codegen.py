"""The CUDA source of a program's kernel: one line for each instruction, built of csrc/program_kernel.cuh."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cfg_parallel.program import MAX_DIMS, SCALAR, Op, Operand, Program

VEC = 8  # elements that a thread takes at once: 16 bytes of bf16. Of fp32 it takes half
STATISTICS_BLOCKS_PER_SM = 4  # of 256 threads, each of which has four vectors of an input on their way
_FEW_INPUTS = 6  # of which that many elements fit in a thread's registers
_TYPES = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}
_NORM_LANES = (1, 2, 4, 8, 16, 32)  # threads that hold a row


class Ungeneratable(Exception):
    """Why there is no kernel for a program."""


@dataclass(frozen=True)
class Layout:
    """A program's shape with neighbouring dimensions merged where every operand lies as one would; the fastest comes
    first. `strides` has those of each input, then of each output."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@functools.lru_cache(maxsize=4096)
def layout(program: Program) -> Layout:
    """Raises Ungeneratable."""
    operands: Sequence[Operand] = (*program.inputs, *program.outputs)
    dims = [d for d in reversed(range(len(program.shape))) if program.shape[d] != 1]
    order = program.outputs[0].strides
    if program.correction is not None:  # a sample's elements are neighbours
        dims.sort(key=lambda d: (order[d] != 0, program.inputs[0].strides[d]))
    elif not program.has_norm:  # the threads of a norm's row are neighbours
        dims.sort(key=lambda d: order[d])
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in dims:
        along = [operand.strides[d] for operand in operands]
        if sizes and all(new == row[-1] * sizes[-1] for new, row in zip(along, strides, strict=True)):
            sizes[-1] *= program.shape[d]
            continue
        sizes.append(program.shape[d])
        for row, stride in zip(strides, along, strict=True):
            row.append(stride)
    if len(sizes) > MAX_DIMS:
        raise Ungeneratable(f"the tensors have more than {MAX_DIMS} dimensions that do not lie as one")
    if not sizes:  # one element
        return Layout((1,), tuple((0,) for _ in operands))
    return Layout(tuple(sizes), tuple(map(tuple, strides)))


def vector_width(program: Program) -> int:
    """Elements that a thread can take at once when the tensors' addresses allow it; 1 for one by one."""
    where = layout(program)
    wide = all(operand.dtype is torch.float32 for operand in (*program.inputs, *program.outputs))
    inputs, outputs = where.strides[: len(program.inputs)], where.strides[len(program.inputs) :]
    many = sum(any(strides) for strides in inputs) > _FEW_INPUTS  # a single element is no vector
    width = VEC // 2 if (wide or many) and not program.has_norm else VEC
    if len(where.sizes) > 1 and where.sizes[0] % width:
        return 1  # with one dimension what is left over goes one by one; with more every row would have a rest
    for strides in where.strides:
        if strides[0] not in (0, 1) or (strides[0] == 1 and any(stride % width for stride in strides[1:])):
            return 1
    return width if program.correction is not None or all(strides[0] == 1 for strides in outputs) else 1


def alignments(program: Program, width: int) -> list[int]:
    """Bytes that the address of each input, then of each output, must be a multiple of for vectors of `width`."""
    operands = (*program.inputs, *program.outputs)
    strides = layout(program).strides
    return [
        min(16, width * operand.dtype.itemsize) if row[0] == 1 else operand.dtype.itemsize
        for operand, row in zip(operands, strides, strict=True)
    ]


def source(program: Program, width: int, arriving: int | None = None) -> str:
    """The kernel `cfg_parallel_program` for vectors of `width`, which waits for input `arriving` unless that is None.

    It fits every program with the same code, dtypes and merged dimensions, whatever their sizes. Raises Ungeneratable.
    """
    where = layout(program)
    inputs = len(program.inputs)
    if program.has_norm:
        row = program.shape[-1] if program.shape else 1
        if width != VEC or row % VEC or row // VEC not in _NORM_LANES:
            raise Ungeneratable(
                f"a norm needs rows of {', '.join(str(VEC * lanes) for lanes in _NORM_LANES)} elements that are "
                f"contiguous and aligned to 16 bytes"
            )

    line_break = "\n    "

    def name(operand: int) -> str:
        return f"tile.template scalar<{operand - SCALAR}>()" if operand >= SCALAR else f"v{operand}"

    loads = []
    for k, operand in enumerate(program.inputs):
        load = "load_one" if where.strides[k][0] == 0 else "load"
        loads.append(f"const auto v{k} = tile.template {load}<{k}, {_TYPES[operand.dtype]}>();")
    lines = [line for k, line in enumerate(loads) if k != arriving]  # on their way during the wait
    if arriving is not None:
        lines += ["if (!tile.arrived()) return false;", loads[arriving], "tile.has_read();"]
    for k, step in enumerate(program.code):
        operands = ", ".join(map(name, step.operands))
        value = operands if step.op is Op.ROUND else f"{step.op.name.lower()}({operands})"
        if step.op is Op.NORM:
            value = f"norm<{program.shape[-1] // VEC}>({operands})"
        if step.round is not torch.float32:
            value = f"rounded<{_TYPES[step.round]}>({value})"
        lines.append(f"const auto v{inputs + k} = {value};")

    def store(k: int, value: str) -> str:
        return f"tile.template store<{k}, {_TYPES[program.outputs[k].dtype]}>({value});"

    parameters = "const __grid_constant__ ProgramArgs<Code> args"
    bounds = "kProgramThreads"
    call = "run_program<Code>(args)"
    stores = [store(k, name(stored)) for k, stored in enumerate(program.stores)]
    functions = [("bool run(const Tile& tile)", [*lines, *stores, "return true;"])]
    if program.correction is not None:
        parameters += ", const __grid_constant__ StatisticsArgs statistics"
        bounds += f", {STATISTICS_BLOCKS_PER_SM}"
        call = "run_statistics<Code>(args, statistics)"
        adds = [f"tile.add(moments[{k}], {name(stored)});" for k, stored in enumerate(program.stores)]
        stores = [store(k, f"values[{k}]") for k in range(len(program.outputs))]
        functions = [
            ("void run(const Tile& tile, Moments (&moments)[kOutputs])", [*lines, *adds]),
            ("void store(const Tile& tile, const float (&values)[kOutputs])", stores),
        ]
    elif arriving is not None:
        parameters += ", const __grid_constant__ ArrivingInput input"
        bounds += ", 2 * kWaitingBlocksPerSm"
        call = "run_program<Code>(args, input)"
    bodies = "".join(
        f"""
  template <typename Tile>
  __device__ __forceinline__ static {function} {{
    {line_break.join(body)}
  }}
"""
        for function, body in functions
    )
    return f"""#include "program_kernel.cuh"

namespace cfg_parallel {{

struct Code {{
  static constexpr int kInputs = {inputs};
  static constexpr int kOutputs = {len(program.outputs)};
  static constexpr int kScalars = {max(1, num_scalars(program))};
  static constexpr int kDims = {len(where.sizes)};
  static constexpr int kVec = {width};
  static constexpr bool kHasNorm = {str(program.has_norm).lower()};
  static constexpr int kArriving = {arriving if arriving is not None else -1};
  static constexpr int kArrivingBytes = {program.inputs[arriving].dtype.itemsize if arriving is not None else 0};
  static constexpr double kCorrection = {program.correction or 0.0};
{bodies}}};

extern "C" __global__ void __launch_bounds__({bounds})
    cfg_parallel_program({parameters}) {{
  {call};
}}

}}  // namespace cfg_parallel
"""


def num_scalars(program: Program) -> int:
    """That a launch passes."""
    used = [x for step in program.code for x in step.operands if x >= SCALAR]
    return max((x - SCALAR + 1 for x in used), default=0)
