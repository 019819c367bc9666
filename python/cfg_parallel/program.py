"""Programs: straight-line elementwise arithmetic that one kernel launch runs, whatever its length.

Its values are fp32 and numbered: first the inputs (converted to fp32, which is exact), then the result of each
instruction. At the end some of them are stored as outputs. `round` rounds an instruction's result to a dtype and back,
which is what a tensor between two eager ops does to it. codegen.py writes a program's kernel, launch.py has it
compiled and launches it; `interpret` is the reference it is held against.
"""

from __future__ import annotations

import ctypes
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cfg_parallel.codec import flat_bytes

if TYPE_CHECKING:
    from cfg_parallel.transports.peer import Arrival

MAX_INPUTS = 12
MAX_OUTPUTS = 4
MAX_INSTRUCTIONS = 64
MAX_SCALARS = 32
MAX_DIMS = 6  # that do not lie in memory as one
SCALAR = 0x80  # an operand of SCALAR + k is scalar k; a smaller one is a value

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
    CLAMP = 8  # min(max(a, b), c); a NaN anywhere gives NaN
    ROUND = 9  # a
    NORM = 10  # 2-norm of a over the last dimension, the same for each of its elements

    @property
    def arity(self) -> int:
        """How many operands it has."""
        return _ARITY.get(self, 1)


_ARITY = {Op.ADD: 2, Op.SUB: 2, Op.MUL: 2, Op.DIV: 2, Op.FMA: 3, Op.CLAMP: 3}


@dataclass(frozen=True, slots=True)
class Instruction:
    op: Op
    a: int
    b: int = 0
    c: int = 0
    round: torch.dtype = torch.float32

    @property
    def operands(self) -> tuple[int, ...]:
        return (self.a, self.b, self.c)[: self.op.arity]


@dataclass(frozen=True, slots=True)
class Operand:
    """How a tensor is walked through: its stride in elements for each dimension of the program's shape."""

    dtype: torch.dtype
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """`code` over every element of `shape`. `stores[i]` is the number of the value that becomes output i.

    With a `correction`, output i is in place of that the value's standard deviation, with `correction` fewer degrees of
    freedom than elements, over the dimensions along which the output's stride is 0."""

    shape: tuple[int, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    code: tuple[Instruction, ...]
    stores: tuple[int, ...]
    correction: float | None = None

    @property
    def has_norm(self) -> bool:
        return any(instruction.op is Op.NORM for instruction in self.code)


def float32(value: float) -> float:
    """`value` as fp32 holds it; too large becomes inf."""
    return ctypes.c_float(value).value


def reciprocal32(value: float) -> float:
    """1 / value in fp32: what CUDA's division by a number multiplies with."""
    value = float32(value)
    if value == 0:
        return math.copysign(math.inf, value)
    return float32(1.0 / value)  # fp64 has more than twice the digits, so rounding twice is rounding once


def interpret(
    program: Program,
    inputs: Sequence[torch.Tensor | None],
    scalars: Sequence[float],
    outputs: Sequence[torch.Tensor],
    arrival: Arrival | None = None,
    keep: torch.Tensor | None = None,
) -> None:
    """What `launch` (launch.py) does, by PyTorch ops: in fp32, and in fp64 where a second rounding could show."""
    device = outputs[0].device
    values: list[torch.Tensor] = []
    for tensor, operand in zip(inputs, program.inputs, strict=True):
        if tensor is None:
            assert arrival is not None
            tensor = (
                keep if keep is not None else torch.empty_strided(program.shape, operand.strides, dtype=operand.dtype)
            )
            arrival.copy_out([flat_bytes(tensor)])
        values.append(tensor.as_strided(program.shape, operand.strides).float())

    def operand_value(operand: int) -> torch.Tensor:
        if operand >= SCALAR:
            return torch.tensor(scalars[operand - SCALAR], dtype=torch.float32, device=device)
        return values[operand]

    for step in program.code:
        result = _SEMANTICS[step.op](*map(operand_value, step.operands))
        values.append(result.to(step.round).float().expand(program.shape))
    for out, stored, operand in zip(outputs, program.stores, program.outputs, strict=True):
        value = values[stored]
        shape = program.shape
        if program.correction is not None:
            dims = [d for d, stride in enumerate(operand.strides) if stride == 0]
            value = value.double().std(dims, correction=program.correction, keepdim=True)  # type: ignore[call-overload]
            shape = tuple(value.shape)
        out.as_strided(shape, operand.strides).copy_(value)


_SEMANTICS: dict[Op, Any] = {
    Op.ADD: lambda a, b: a + b,
    Op.SUB: lambda a, b: a - b,
    Op.MUL: lambda a, b: a * b,
    Op.DIV: lambda a, b: a / b,
    Op.FMA: lambda a, b, c: (a.double() * b.double() + c.double()).float(),
    Op.NEG: lambda a: -a,
    Op.ABS: lambda a: a.abs(),
    Op.SQRT: lambda a: a.sqrt(),
    Op.CLAMP: lambda a, b, c: torch.minimum(torch.maximum(a, b), c),
    Op.ROUND: lambda a: a,
    Op.NORM: lambda a: torch.linalg.vector_norm(a, dim=-1, keepdim=True),
}
