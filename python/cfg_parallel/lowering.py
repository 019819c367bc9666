"""From recorded ops to a `Program`: which ops are elementwise, what each does to bits, and how operands broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cfg_parallel.program import (
    DTYPES,
    MAX_INPUTS,
    MAX_INSTRUCTIONS,
    MAX_OUTPUTS,
    MAX_SCALARS,
    SCALAR,
    Instruction,
    Op,
    Operand,
    Program,
    float32,
    reciprocal32,
)
from cfg_parallel.recording import Node, Ref, refs_in

aten = torch.ops.aten

NORM_SIZES = (8, 16, 32, 64, 128, 256)  # 8 elements for each of the threads of a warp, or of part of one
EXACT_NORM_SIZES = (8, 16, 32, 64)  # which our kernel sums in the order of PyTorch's (csrc/program_kernel.cuh)


_LIMITS = (MAX_INPUTS, MAX_OUTPUTS, MAX_INSTRUCTIONS, MAX_SCALARS)


class Unfusable(Exception):
    """Why some ops do not fit in one program."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """An operand that was a plain tensor when the op was recorded: number `index` of the recording's tensors."""

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    on_device: bool


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number, or a tensor without dimensions in host memory: number `index` of the recording."""

    index: int
    is_tensor: bool = False
    reciprocal: bool = False
    round: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Constant:
    """A number that is part of the structure, spelled so that 0.0 and -0.0 differ."""

    hex: str

    @classmethod
    def of(cls, value: float) -> Constant:
        return cls(float32(value).hex())


@dataclass(slots=True)
class Step:
    """One recorded op with its operands in a form that recordings of the same structure share."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    on_device: bool

    def refs(self) -> Iterator[Ref]:
        return refs_in((self.args, self.kwargs))


@dataclass(frozen=True, slots=True)
class Source:
    """Where an input comes from: output `index` of the op at `position`, or tensor `index` of the recording."""

    position: int | None
    index: int


@dataclass(frozen=True, slots=True)
class Launch:
    """A program with what feeds it. `outputs` are positions of the ops whose values it computes."""

    program: Program
    inputs: tuple[Source, ...]
    scalars: tuple[Scalar | Constant, ...]
    outputs: tuple[int, ...]

    @property
    def positions(self) -> list[int]:
        """Of the ops and calls that it reads."""
        return [source.position for source in self.inputs if source.position is not None]

    def scalar_values(self, scalars: Sequence[float]) -> list[float]:
        values = []
        for scalar in self.scalars:
            if isinstance(scalar, Scalar):
                value = float32(scalars[scalar.index])
                if scalar.round is not torch.float32:
                    value = torch.tensor(value).to(scalar.round).item()
                values.append(reciprocal32(value) if scalar.reciprocal else value)
            else:
                values.append(float.fromhex(scalar.hex))
        return values


BINARY = {
    aten.add.Tensor: Op.ADD,
    aten.add.Scalar: Op.ADD,
    aten.sub.Tensor: Op.SUB,
    aten.sub.Scalar: Op.SUB,
    aten.rsub.Tensor: Op.SUB,
    aten.rsub.Scalar: Op.SUB,
    aten.mul.Tensor: Op.MUL,
    aten.mul.Scalar: Op.MUL,
    aten.div.Tensor: Op.DIV,
    aten.div.Scalar: Op.DIV,
}
_REVERSED = (aten.rsub.Tensor, aten.rsub.Scalar)
UNARY = {aten.neg.default: Op.NEG, aten.abs.default: Op.ABS, aten.sqrt.default: Op.SQRT}
COPIES = (aten._to_copy.default, aten.clone.default)
ELEMENTWISE = (
    frozenset(BINARY)
    | frozenset(UNARY)
    | frozenset(COPIES)
    | {aten.square.default, aten.pow.Tensor_Scalar, aten.clamp.default, aten.lerp.Scalar}
)
NORM = aten.linalg_vector_norm.default
STD = aten.std.correction
VIEWS = frozenset(
    [
        aten.alias.default,
        aten.detach.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.view.default,
        aten._unsafe_view.default,
        aten._reshape_alias.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
    ]
)


def is_elementwise(step: Step, exact: bool, on_gpu: bool) -> bool:
    """Whether a program can do `step`, with eager's bits when `exact`."""
    if step.op not in ELEMENTWISE or step.dtype not in DTYPES or not step.on_device:
        return False
    if not all(_can_read(arg, step, on_gpu) for arg in step.args if isinstance(arg, (Leaf, Ref))):
        return False
    if not all(isinstance(arg, (Leaf, Ref, Scalar)) for arg in step.args[: 2 if step.op in BINARY else 1]):
        return False  # a bool, say
    contracted = exact and not on_gpu  # where CPUs use fused multiply-add depends on the machine
    if step.op in BINARY:
        alpha = step.kwargs.get("alpha", step.args[2] if len(step.args) > 2 else 1)
        return alpha == 1 or (not contracted and step.op not in _REVERSED and isinstance(alpha, (int, float)))
    if step.op is aten.pow.Tensor_Scalar:
        return step.args[1] in (2, 0.5)
    if step.op is aten.clamp.default:
        # With a limit of zero the kernels' minimum and maximum may disagree about the sign of a zero.
        return all(limit is None or (isinstance(limit, (int, float)) and limit != 0) for limit in step.args[1:])
    if step.op is aten.lerp.Scalar:
        return not contracted
    return True


def _can_read(arg: Leaf | Ref, step: Step, on_gpu: bool) -> bool:
    if _dtype(arg) not in DTYPES or (isinstance(arg, Leaf) and not arg.on_device):
        return False
    # In host memory a tensor of no dimensions enters arithmetic with tensors of another dtype in fp32.
    shape = shape_of(arg)
    return on_gpu or bool(shape) or not step.shape or _dtype(arg) is step.dtype


def is_row_norm(step: Step, exact: bool) -> bool:
    """Whether a program can compute this norm: the 2-norm of rows that a few threads hold in registers."""
    if step.op is not NORM or step.dtype not in DTYPES or not step.on_device:
        return False
    x, order, dims, keepdim, dtype = (*step.args, *(2, None, False)[len(step.args) - 1 :], step.kwargs.get("dtype"))[:5]
    if not isinstance(x, (Leaf, Ref)) or order != 2 or dtype is not None or not keepdim or _dtype(x) is not step.dtype:
        return False
    shape = shape_of(x)
    if len(shape) < 2 or list(dims or ()) not in ([-1], [len(shape) - 1]):
        return False
    return shape[-1] in (EXACT_NORM_SIZES if exact else NORM_SIZES)


def is_sample_std(step: Step, exact: bool) -> bool:
    """Whether a program can compute this standard deviation: over all dimensions behind some first ones."""
    if exact or step.op is not STD or step.dtype not in DTYPES or not step.on_device:
        return False
    x, dims = (*step.args, None)[:2]
    if not isinstance(x, (Leaf, Ref)) or _dtype(x) is not step.dtype or not step.kwargs.get("keepdim", False):
        return False
    rank = len(shape_of(x))
    reduced = sorted(d % rank for d in dims) if rank and dims is not None else []
    return bool(reduced) and reduced == list(range(reduced[0], rank)) and math.prod(shape_of(x)[reduced[0] :]) > 1


def view_dims(step: Step, shape: tuple[int, ...]) -> list[int] | None:
    """For each dimension of the view `step` of a tensor of `shape`: which dimension of that tensor it is, -1 for a
    broadcast or new one. None when the elements change places in another way."""
    dims = len(shape)
    if step.op in (aten.alias.default, aten.detach.default) or (step.op is aten.t.default and dims < 2) or not dims:
        return list(range(dims)) if len(step.shape) == dims else [-1] * len(step.shape)
    if step.op is aten.permute.default:
        return [dim % dims for dim in step.args[1]]
    if step.op in (aten.transpose.int, aten.t.default):
        a, b = (step.args[1] % dims, step.args[2] % dims) if step.op is aten.transpose.int else (0, dims - 1)
        order = list(range(dims))
        order[a], order[b] = order[b], order[a]
        return order
    if step.op is aten.expand.default:
        new = len(step.shape) - dims
        return [-1] * new + [i if shape[i] == step.shape[new + i] else -1 for i in range(dims)]
    # What is left drops or adds dimensions of size 1, if it is to keep its elements in their places.
    kept = [i for i, size in enumerate(shape) if size != 1]
    if [shape[i] for i in kept] != [size for size in step.shape if size != 1]:
        return None
    places = iter(kept)
    return [-1 if size == 1 else next(places) for size in step.shape]


def shape_of(operand: Leaf | Ref) -> tuple[int, ...]:
    return operand.shape if isinstance(operand, Leaf) else operand.spec[0]


def _dtype(operand: Leaf | Ref) -> torch.dtype:
    return operand.dtype if isinstance(operand, Leaf) else operand.spec[2]


@dataclass(slots=True)
class _Value:
    """A value of the program under construction, before the inputs are numbered first."""

    op: Op | None  # None: an input
    operands: tuple[int | Scalar | Constant, ...] = ()  # an int is the number of a value
    round: torch.dtype = torch.float32
    source: Source | None = None
    operand: Operand | None = None


@dataclass
class Lowering:
    """Builds one program over `shape` (without dimensions of size 1). `computed(position)` tells which ops are part of
    it and not inputs."""

    steps: Sequence[Step]
    position: dict[Node, int]
    computed: Callable[[int], bool]
    shape: tuple[int, ...]
    exact: bool
    on_gpu: bool
    values: list[_Value] = field(default_factory=list)
    _known: dict[Any, int] = field(default_factory=dict)
    _depth: int = 0

    def launch(self, outputs: Sequence[int]) -> Launch:
        roots = []
        for position in outputs:
            step = self.steps[position]
            count = iter(range(len(self.shape)))
            dims = tuple(next(count) if size != 1 else -1 for size in step.shape)
            roots.append(self._lower(position, dims))
        operands = [
            Operand(self.steps[p].dtype, self._strides(self.steps[p].shape, self.steps[p].strides)) for p in outputs
        ]
        return self._number(roots, operands, tuple(outputs))

    def standard_deviations(self, outputs: Sequence[int]) -> Launch:
        """Of steps that are `is_sample_std`, over tensors of this program's shape, with one correction."""
        roots, operands = [], []
        for position in outputs:
            step = self.steps[position]
            shape = shape_of(step.args[0])
            count = iter(range(len(self.shape)))
            roots.append(self._read(step.args[0], tuple(next(count) if size != 1 else -1 for size in shape)))
            along = [0 if size == 1 else stride for size, stride in zip(step.shape, step.strides, strict=True)]
            operands.append(Operand(step.dtype, self._strides(shape, tuple(along))))
        launch = self._number(roots, operands, tuple(outputs))
        correction = self.steps[outputs[0]].kwargs.get("correction")
        return replace(launch, program=replace(launch.program, correction=1.0 if correction is None else correction))

    def _strides(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(stride for size, stride in zip(shape, strides, strict=True) if size != 1)

    def _lower(self, position: int, dims: tuple[int, ...]) -> int:
        """The value of the op at `position`, whose dimension i runs along the program's dims[i], or along none (-1)."""
        key = (position, dims)
        if key not in self._known:
            if len(self._known) + self._depth > 2 * MAX_INSTRUCTIONS:
                raise Unfusable(f"there are more than {MAX_INSTRUCTIONS}")
            self._depth += 1
            self._known[key] = self._compute(self.steps[position], dims)
            self._depth -= 1
        return self._known[key]

    def _compute(self, step: Step, dims: tuple[int, ...]) -> int:
        rounding = step.dtype if self.exact else torch.float32
        if step.op in VIEWS:
            return self._operand(step.args[0], step, dims)
        if step.op is NORM:
            if not self.shape or len(self.shape) - 1 in dims or shape_of(step.args[0])[-1] != self.shape[-1]:
                raise Unfusable("a norm is not over the last dimension")
            x = self._read(step.args[0], (*dims[:-1], len(self.shape) - 1))
            return self._emit(Op.NORM, (x,), rounding)
        if step.op in BINARY:
            return self._binary(step, dims, rounding)
        x = self._cast(step.args[0], step, dims)
        if step.op in COPIES:
            return x
        if step.op is aten.clamp.default:
            low, high = (*step.args[1:], None, None)[:2]
            low, high = Constant.of(-math.inf if low is None else low), Constant.of(math.inf if high is None else high)
            return self._emit(Op.CLAMP, (x, low, high), rounding)
        if step.op is aten.lerp.Scalar:
            return self._lerp(x, self._cast(step.args[1], step, dims), step.args[2], rounding)
        if step.op is aten.square.default or (step.op is aten.pow.Tensor_Scalar and step.args[1] == 2):
            return self._emit(Op.MUL, (x, x), rounding)
        if step.op is aten.pow.Tensor_Scalar:
            return self._emit(Op.SQRT, (x,), rounding)
        op = UNARY[step.op]
        return self._emit(op, (x,), rounding if op is Op.SQRT else torch.float32)

    def _binary(self, step: Step, dims: tuple[int, ...], rounding: torch.dtype) -> int:
        op = BINARY[step.op]
        a, b = (self._cast(arg, step, dims) for arg in step.args[:2])
        if step.op in _REVERSED:
            a, b = b, a
        if self.exact and not self.on_gpu:
            a, b = _number_on_cpu(a, op, step, first=True), _number_on_cpu(b, op, step, first=False)
        alpha = step.kwargs.get("alpha", step.args[2] if len(step.args) > 2 else 1)
        if alpha != 1:
            factor = Constant.of(alpha if op is Op.ADD else -alpha)
            if self.exact:  # what the compiler makes of CUDA's `a + alpha * b`
                return self._emit(Op.FMA, (b, factor, a), rounding)
            return self._emit(Op.ADD, (a, self._emit(Op.MUL, (b, factor), torch.float32)), rounding)
        if op is Op.DIV and isinstance(a, Scalar) and self.exact:
            a = replace(a, round=step.dtype)  # CUDA's division has no form in which this number stays wide
        if op is Op.DIV and isinstance(b, Scalar) and self.exact and self.on_gpu:
            return self._emit(Op.MUL, (a, replace(b, reciprocal=True)), rounding)
        return self._emit(op, (a, b), rounding)

    def _lerp(self, start: int, end: int, weight: float, rounding: torch.dtype) -> int:
        """As PyTorch's kernel, which the compiler contracts to fused multiply-adds; the difference is not rounded."""
        difference = self._emit(Op.SUB, (end, start), torch.float32)
        weight = float32(weight)
        if abs(weight) < 0.5:
            return self._emit(Op.FMA, (difference, Constant.of(weight), start), rounding)
        return self._emit(Op.FMA, (difference, Constant.of(-float32(1.0 - weight)), end), rounding)

    def _cast(self, arg: Any, step: Step, dims: tuple[int, ...]) -> Any:
        """An operand, rounded to the dtype that the op computes in. Numbers enter in fp32: on a GPU."""
        if isinstance(arg, Scalar):
            return arg
        value = self._operand(arg, step, dims)
        if self.exact and _dtype(arg) is not step.dtype and step.dtype is not torch.float32:
            return self._emit(Op.ROUND, (value,), step.dtype)
        return value

    def _operand(self, arg: Leaf | Ref, step: Step, dims: tuple[int, ...]) -> int:
        """An operand of `step`, broadcast against it or seen through it."""
        shape = shape_of(arg)
        if step.op in VIEWS:
            places = view_dims(step, shape)
            assert places is not None
            inner = [-1] * len(shape)
            for dim, place in zip(dims, places, strict=True):
                if place >= 0:
                    inner[place] = dim
        else:
            aligned = dims[len(dims) - len(shape) :]
            inner = [-1 if size == 1 else dim for size, dim in zip(shape, aligned, strict=True)]
        return self._read(arg, tuple(inner))

    def _read(self, arg: Leaf | Ref, dims: tuple[int, ...]) -> int:
        if isinstance(arg, Ref) and self.computed(self.position[arg.node]):
            return self._lower(self.position[arg.node], dims)
        source = Source(None, arg.index) if isinstance(arg, Leaf) else Source(self.position[arg.node], arg.index)
        shape, strides = (arg.shape, arg.strides) if isinstance(arg, Leaf) else arg.spec[:2]
        along = [0] * len(self.shape)
        for dim, size, stride in zip(dims, shape, strides, strict=True):
            if dim >= 0 and size != 1:
                along[dim] += stride
        operand = Operand(_dtype(arg), tuple(along))
        return self._intern((source, operand), _Value(None, source=source, operand=operand))

    def _emit(self, op: Op, operands: tuple[Any, ...], rounding: torch.dtype) -> int:
        return self._intern((op, operands, rounding), _Value(op, operands, rounding))

    def _intern(self, key: Any, value: _Value) -> int:
        if key not in self._known:
            self._known[key] = len(self.values)
            self.values.append(value)
        return self._known[key]

    def _number(self, roots: list[int], operands: list[Operand], outputs: tuple[int, ...]) -> Launch:
        """Inputs get the first numbers, in the order of their first use."""
        inputs = [i for i, value in enumerate(self.values) if value.op is None]
        instructions = [i for i, value in enumerate(self.values) if value.op is not None]
        if not inputs:
            raise Unfusable("no tensor is read")
        number = {value: i for i, value in enumerate([*inputs, *instructions])}
        scalars = list(dict.fromkeys(x for i in instructions for x in self.values[i].operands if type(x) is not int))
        whole = [i for i in inputs if any(self.values[i].operand.strides)]  # type: ignore[union-attr]
        counts = [len(whole), len(outputs), len(instructions), len(scalars) + len(inputs) - len(whole)]
        if any(count > limit for count, limit in zip(counts, _LIMITS, strict=True)):
            raise Unfusable("{} inputs, {} outputs, {} ops or {} numbers are too many".format(*counts))

        def encoded(operand: Any) -> int:
            return number[operand] if type(operand) is int else SCALAR + scalars.index(operand)

        code = []
        for i in instructions:
            value = self.values[i]
            assert value.op is not None
            a, b, c = (*map(encoded, value.operands), 0, 0)[:3]
            code.append(Instruction(value.op, a, b, c, value.round))
        operands_in = tuple(self.values[i].operand for i in inputs)
        program = Program(
            self.shape,
            operands_in,  # type: ignore[arg-type]
            tuple(operands),
            tuple(code),
            tuple(number[root] for root in roots),
        )
        return Launch(program, tuple(self.values[i].source for i in inputs), tuple(scalars), outputs)  # type: ignore[arg-type, misc]


def _number_on_cpu(operand: Any, op: Op, step: Step, first: bool) -> Any:
    """PyTorch's CPU kernels for half precision round a number first, in some places."""
    if isinstance(operand, Scalar) and (op in (Op.ADD, Op.SUB) or (first and operand.is_tensor)):
        return replace(operand, round=step.dtype)
    return operand
