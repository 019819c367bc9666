"""Programs: straight-line elementwise arithmetic that one kernel launch runs, whatever its length.

A program has registers of fp32. The inputs are loaded into registers 0, 1, ... (converted to fp32, which is exact);
each instruction computes one register; at the end some registers are stored as outputs. `round` rounds an
instruction's result to a dtype and back, which is what a tensor between two eager ops does to it. The kernels are in
csrc/program.cu; `interpret` is the reference they are held against.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cfg_parallel import extension
from cfg_parallel.codec import flat_bytes
from cfg_parallel.errors import CfgParallelError

if TYPE_CHECKING:
    from cfg_parallel.transports.peer import Arrival

MAX_INPUTS = 12
MAX_OUTPUTS = 4
MAX_INSTRUCTIONS = 64
MAX_SCALARS = 32
REGISTERS = 20
SCALAR = 0x80  # an operand of SCALAR + k is scalar k; a smaller one is a register

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Op(enum.IntEnum):
    """What an instruction computes of its operands a, b, c, in fp32, each op rounding once."""

    ADD = 0  # a + b
    SUB = 1  # a - b
    MUL = 2  # a * b
    DIV = 3  # a / b
    FMA = 4  # a * b + c, rounded once
    NEG = 5  # -a
    ABS = 6  # |a|
    SQRT = 7  # square root of a
    CLAMP = 8  # min(max(a, b), c); NaN stays NaN
    ROUND = 9  # a
    NORM = 10  # 2-norm of a over the last dimension, the same for each of its elements


@dataclass(frozen=True, slots=True)
class Instruction:
    op: Op
    dst: int
    a: int
    b: int = 0
    c: int = 0
    round: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Operand:
    """How a tensor is walked through: its stride in elements for each dimension of the program's shape."""

    dtype: torch.dtype
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """`code` over every element of `shape`. `stores[i]` is the register that becomes output i."""

    shape: tuple[int, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    code: tuple[Instruction, ...]
    stores: tuple[int, ...]

    @property
    def has_norm(self) -> bool:
        return any(instruction.op is Op.NORM for instruction in self.code)


class LaunchError(CfgParallelError):
    """The kernels cannot run a program, on these tensors. Nothing was launched."""


def float32(value: float) -> float:
    """`value` as fp32 holds it; too large becomes inf."""
    return ctypes.c_float(value).value


def reciprocal32(value: float) -> float:
    """1 / value in fp32: what CUDA's division by a number multiplies with."""
    value = float32(value)
    if value == 0:
        return math.copysign(math.inf, value)
    return float32(1.0 / value)  # fp64 has more than twice the digits, so rounding twice is rounding once


Execute = Callable[..., None]  # `launch`, or what takes its place


def executor(device: torch.device) -> tuple[Execute | None, str]:
    """What runs programs on `device`, and its name; None and why there is nothing."""
    if device.type != "cuda":
        return None, f"there are no fused kernels for {device.type}"
    missing = extension.missing_reason()
    if missing is not None:
        return None, missing
    if os.environ.get("CFG_PARALLEL_FUSED") != "1":
        return None, "fused kernels are off: they are new, and CFG_PARALLEL_FUSED=1 turns them on"
    return launch, "cuda"


def launch(
    program: Program,
    inputs: Sequence[torch.Tensor | None],
    scalars: Sequence[float],
    outputs: Sequence[torch.Tensor],
    arrival: Arrival | None = None,
    keep: torch.Tensor | None = None,
) -> None:
    """Fill `outputs` with one kernel on the current stream of their device.

    With an `arrival`, the input that is None is its only tensor: the kernel waits for it, chunk by chunk, and copies it
    to `keep`, which is laid out alike, if that is given."""
    device = outputs[0].device
    peer = None
    if arrival is not None:
        peer = (list(inputs).index(None), arrival.offsets[0], _address(keep), arrival.wait)
    stream = torch.cuda.current_stream(device).cuda_stream
    addresses = [_address(tensor) for tensor in inputs], [tensor.data_ptr() for tensor in outputs]
    try:
        _native(program).launch(*addresses, scalars, device.index, stream, peer)
    except extension.load().Error as error:
        raise LaunchError(str(error)) from error
    if arrival is not None:
        arrival.launched()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=4096)
def _native(program: Program) -> Any:
    def operands(all_of_them: Sequence[Operand]) -> list[tuple[int, tuple[int, ...]]]:
        return [(DTYPES.index(operand.dtype), operand.strides) for operand in all_of_them]

    code = [(i.op, i.dst, i.a, i.b, i.c, DTYPES.index(i.round)) for i in program.code]
    return extension.load().Program(
        program.shape, operands(program.inputs), operands(program.outputs), code, program.stores
    )


def interpret(
    program: Program,
    inputs: Sequence[torch.Tensor | None],
    scalars: Sequence[float],
    outputs: Sequence[torch.Tensor],
    arrival: Arrival | None = None,
    keep: torch.Tensor | None = None,
) -> None:
    """What `launch` does, by PyTorch ops: in fp32, and in fp64 for FMA, which a second rounding can put off by one."""
    registers: list[Any] = [None] * REGISTERS
    for i, (tensor, operand) in enumerate(zip(inputs, program.inputs, strict=True)):
        if tensor is None:
            assert arrival is not None
            tensor = (
                keep if keep is not None else torch.empty_strided(program.shape, operand.strides, dtype=operand.dtype)
            )
            arrival.copy_out([flat_bytes(tensor)])
        registers[i] = tensor.as_strided(program.shape, operand.strides).float()

    def value(operand: int) -> torch.Tensor:
        if operand >= SCALAR:
            return torch.tensor(scalars[operand - SCALAR], dtype=torch.float32)
        return registers[operand]

    for step in program.code:
        result = _SEMANTICS[step.op](value(step.a), value(step.b), value(step.c))
        registers[step.dst] = result.to(step.round).float().expand(program.shape)
    for out, register, operand in zip(outputs, program.stores, program.outputs, strict=True):
        out.as_strided(program.shape, operand.strides).copy_(registers[register])


_SEMANTICS: dict[Op, Any] = {
    Op.ADD: lambda a, b, c: a + b,
    Op.SUB: lambda a, b, c: a - b,
    Op.MUL: lambda a, b, c: a * b,
    Op.DIV: lambda a, b, c: a / b,
    Op.FMA: lambda a, b, c: (a.double() * b.double() + c.double()).float(),
    Op.NEG: lambda a, b, c: -a,
    Op.ABS: lambda a, b, c: a.abs(),
    Op.SQRT: lambda a, b, c: a.sqrt(),
    Op.CLAMP: lambda a, b, c: torch.where(a.isnan(), a, torch.minimum(torch.maximum(a, b), c)),
    Op.ROUND: lambda a, b, c: a,
    Op.NORM: lambda a, b, c: torch.linalg.vector_norm(a, dim=-1, keepdim=True),
}
