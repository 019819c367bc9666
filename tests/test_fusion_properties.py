"""Random recordings, evaluated by programs, against the same ops on plain tensors: the same values, the same metadata,
the same effects of in-place writes, whatever is asked for, in whatever order, and however often the plans are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg_parallel.codec import flat_bytes
from cfg_parallel.fusion import Fusion, Plan
from cfg_parallel.pending import PendingPrediction, RecordingError, forget_unsettled, pending_outputs, settle
from cfg_parallel.program import interpret

pytestmark = pytest.mark.timeout(300)
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ERRORS = (RuntimeError, IndexError, ValueError, TypeError)


class Unchecked(Fusion):
    """Every plan is followed at once: here the test is what compares it with plain tensors."""

    def _make_plan(self, recorded: Any, wanted: frozenset[int]) -> Plan:
        self._checked.add(recorded.key)
        return super()._make_plan(recorded, wanted)


class PlannedForGpu(Unchecked):
    """With what only a GPU's plans have: norms, `alpha`, lerp. A CPU rounds these otherwise."""

    on_gpu = True  # type: ignore[assignment]


# What is recorded. An op of tensors `t` and two small integers.

Op = Callable[[Sequence[Any], int, int], Any]


def _dim(x: torch.Tensor, k: int) -> int:
    return k % max(x.dim(), 1) - (k % 2) * max(x.dim(), 1)


def _numbers(k: int) -> Any:
    return [4.5, -0.3, 0.0, -0.0, 1, 2, 1e-3, True, 1.0, 3][k % 10]


def _zero_dim(k: int) -> torch.Tensor:
    dtype = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool][k % 5]
    return torch.tensor([0.7, 1.0, -2.0, 3.0][k % 4]).to(dtype)


def _unit_view(x: Any, k: int) -> Any:
    """A view of the same elements with dimensions of size 1 put in and left out."""
    sizes = [size for size in x.shape if size != 1]
    for i in range(k % 3):
        sizes.insert((k >> i) % (len(sizes) + 1), 1)
    return x.view(sizes)


POINTWISE: dict[str, Op] = {
    "add": lambda t, k, d: t[0] + t[1],
    "sub": lambda t, k, d: t[0] - t[1],
    "mul": lambda t, k, d: t[0] * t[1],
    "div": lambda t, k, d: t[0] / t[1],
    "cfg": lambda t, k, d: t[0] + 4.0 * (t[1] - t[0]),
    "add number": lambda t, k, d: t[0] + _numbers(k),
    "mul number": lambda t, k, d: t[0] * _numbers(k),
    "div number": lambda t, k, d: t[0] / _numbers(k),
    "rsub number": lambda t, k, d: float(_numbers(k)) - t[0],
    "add 0-dim": lambda t, k, d: t[0] + _zero_dim(k),
    "mul 0-dim": lambda t, k, d: _zero_dim(k) * t[0],
    "div 0-dim": lambda t, k, d: t[0] / _zero_dim(k),
    "0-dim div": lambda t, k, d: _zero_dim(k) / t[0],
    "neg": lambda t, k, d: -t[0],
    "abs": lambda t, k, d: t[0].abs(),
    "sqrt": lambda t, k, d: t[0].sqrt(),
    "pow 2": lambda t, k, d: t[0] ** 2,
    "pow 0.5": lambda t, k, d: t[0] ** 0.5,
    "clamp": lambda t, k, d: t[0].clamp(-0.5, [0.5, 0.0, -0.0, -1.0][k % 4]),
    "clamp low": lambda t, k, d: t[0].clamp(min=[0.0, -0.0, 0.25][k % 3]),
    "cast": lambda t, k, d: t[0].to(DTYPES[k % 3]),
    "clone": lambda t, k, d: t[0].clone(),
    "contiguous": lambda t, k, d: t[0].clone(memory_format=torch.contiguous_format),
}
VIEWS: dict[str, Op] = {
    "transpose": lambda t, k, d: t[0].transpose(_dim(t[0], k), _dim(t[0], d)),
    "permute": lambda t, k, d: t[0].permute([(i + k) % t[0].dim() for i in range(t[0].dim())]),
    "unsqueeze": lambda t, k, d: t[0].unsqueeze(k % (t[0].dim() + 1)),
    "squeeze": lambda t, k, d: t[0].squeeze(),
    "squeeze dim": lambda t, k, d: t[0].squeeze(_dim(t[0], k)),
    "t": lambda t, k, d: t[0].t(),
    "detach": lambda t, k, d: t[0].detach(),
    "expand": lambda t, k, d: t[0].expand(1 + k % 3, *t[0].shape),
    "expand as": lambda t, k, d: t[0].expand(torch.broadcast_shapes(t[0].shape, t[1].shape)),
    "flatten": lambda t, k, d: t[0].view(-1),
    "unit view": lambda t, k, d: _unit_view(t[0], k),
    "reshape": lambda t, k, d: t[0].reshape(*reversed(t[0].shape)),
    "slice": lambda t, k, d: t[0].narrow(_dim(t[0], d), 0, t[0].shape[_dim(t[0], d)] // 2),
    "select": lambda t, k, d: t[0].select(_dim(t[0], d), -1),
    "chunk": lambda t, k, d: t[0].chunk(2, _dim(t[0], d))[-1],
}
OTHER: dict[str, Op] = {
    "exp": lambda t, k, d: t[0].exp(),
    "sum": lambda t, k, d: t[0].sum(_dim(t[0], d), keepdim=True),
    "std": lambda t, k, d: t[0].std(),
    "norm": lambda t, k, d: torch.linalg.vector_norm(t[0], dim=-1, keepdim=True),
    "cat": lambda t, k, d: torch.cat([t[0], t[1]], _dim(t[0], d)),
    "maximum": lambda t, k, d: torch.maximum(t[0], t[1]),
    "double": lambda t, k, d: t[0].double(),
    "integer": lambda t, k, d: t[0].nan_to_num(0.0).clamp(-9, 9).to(torch.int32),
}
ONLY_CLOSE: dict[str, Op] = {
    "add alpha": lambda t, k, d: torch.add(t[0], t[1], alpha=[2, -0.5, 3][k % 3]),
    "sub alpha": lambda t, k, d: torch.sub(t[0], t[1], alpha=[2, -0.5, 3][k % 3]),
    "lerp": lambda t, k, d: torch.lerp(t[0], t[1], [0.3, 0.8, 0.0, 1.0][k % 4]),
}
WRITES: dict[str, Op] = {
    "add_": lambda t, k, d: t[0].add_(0.5),
    "copy_": lambda t, k, d: t[0].copy_(t[1]),
    "mul_": lambda t, k, d: t[0].mul_(t[1]),
    "fill": lambda t, k, d: t[0][..., :1].fill_(0.25),
}
EXACT = {**POINTWISE, **VIEWS, **OTHER, **WRITES}
CLOSE = {
    name: op for name, op in {**POINTWISE, **VIEWS, **OTHER, **ONLY_CLOSE}.items() if name != "cast"
}  # fp32 all through


@dataclass(frozen=True)
class Leaf:
    """A tensor that is there from the start. The output of a `call` can be borrowed, or is the second of two."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    call: bool
    borrows: bool
    second: bool

    def make(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = list(self.shape)
        if self.layout == "wide" and shape:
            value = torch.randn([*shape[:-1], shape[-1] + 3], generator=generator).to(self.dtype)
            return value[..., 1 : 1 + shape[-1]]
        if self.layout == "permuted":
            value = torch.randn(shape[::-1], generator=generator).to(self.dtype)
            return value.permute(list(reversed(range(len(shape)))))
        if self.layout == "expanded" and shape and not self.call:
            return torch.randn([1, *shape[1:]], generator=generator).to(self.dtype).expand(shape)
        return torch.randn(shape, generator=generator).to(self.dtype)


@dataclass(frozen=True)
class Line:
    """One op of earlier values; `ask`, when not None, is the number of a value that is asked for after it."""

    op: str
    operands: tuple[int, int]
    k: int
    d: int
    ask: int | None = None


@dataclass(frozen=True)
class Recipe:
    leaves: tuple[Leaf, ...]
    lines: tuple[Line, ...]
    order: tuple[int, ...]  # in which the values are asked for at the end


SHAPES = [(2, 3, 4), (3, 4), (1, 3, 4), (2, 3, 1), (4,), (1,), (), (2, 2), (2, 1, 2), (0, 4), (3, 3), (2, 3, 64)]


def recipes(ops: dict[str, Op], dtypes: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[Recipe]:
    small = st.integers(0, 11)
    leaf = st.builds(
        Leaf,
        st.sampled_from(SHAPES),
        st.sampled_from(dtypes),
        st.sampled_from(["plain", "plain", "wide", "permuted", "expanded"]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    )
    numbers = st.integers(0, 30)
    line = st.builds(
        Line,
        st.sampled_from([*(name for name in POINTWISE if name in ops), *ops]),  # the pointwise ones twice as often
        st.tuples(numbers, numbers),
        small,
        small,
        st.one_of(st.none(), st.none(), numbers),
    )
    call, flag = st.just(True), st.booleans()
    first = st.builds(Leaf, st.sampled_from(SHAPES[:5]), st.sampled_from(dtypes), st.just("plain"), call, flag, flag)
    return st.builds(
        lambda first, rest, lines, order: Recipe((first, *rest), tuple(lines), tuple(order)),
        first,
        st.lists(leaf, min_size=1, max_size=3),
        st.lists(line, min_size=2, max_size=14),
        st.permutations(range(18)),
    )


def pend(value: torch.Tensor, leaf: Leaf) -> PendingPrediction:
    values = [torch.zeros(2, 3), value] if leaf.second else [value]
    node, outputs = pending_outputs(lambda: values, [(v.shape, v.stride(), v.dtype, v.device) for v in values])
    if leaf.borrows and value.is_contiguous():
        node.borrow = lambda: None if leaf.second else Arriving(value)
    return outputs[-1]


class Arriving:
    """A prediction that a kernel waits for."""

    def __init__(self, value: torch.Tensor) -> None:
        self.offsets = [0]
        self._value = value

    def copy_out(self, flats: Sequence[torch.Tensor]) -> None:
        flats[0].copy_(flat_bytes(self._value))


def follow(recipe: Recipe, ops: dict[str, Op], seed: int, pending: bool) -> list[Any]:
    """What each line gives: a tensor, or the type of the error it raises. Asks for values where the recipe says so."""
    values: list[Any] = []
    for i, leaf in enumerate(recipe.leaves):
        value = leaf.make(100 * seed + i)
        values.append(pend(value, leaf) if leaf.call and pending else value)
    results: list[Any] = []
    for line in recipe.lines:
        operands = [values[number % len(values)] for number in line.operands]
        try:
            result = ops[line.op](operands, line.k, line.d)
        except RecordingError:
            raise
        except ERRORS:
            results.append("error")
            continue
        results.append(result)
        values.append(result)
        if line.ask is not None:
            settle(values[line.ask % len(values)])
    for number in recipe.order:
        if number < len(values):
            settle(values[number])
    return [*values[: len(recipe.leaves)], *results]


def metadata(t: torch.Tensor) -> tuple[Any, ...]:
    """Strides count where a dimension has more than one element; elsewhere PyTorch's kernels disagree about them. So do
    its meta kernels and those that compute where dimensions of one element lie between others, as a set."""
    strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1] if t.numel() else []
    return t.shape, sorted(strides) if 1 in t.shape else strides, t.dtype, t.device


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """A NaN equals a NaN; zeros of different sign differ."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    if not torch.equal(nan, b.isnan()):
        return False
    a, b = a.masked_fill(nan, 0.0), b.masked_fill(nan, 0.0)
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = b[b.isfinite()].abs().max().item() if bool(b.isfinite().any()) else 1.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(scale, 1.0), equal_nan=True)


def compare(fusion: Fusion, recipe: Recipe, ops: dict[str, Op], equal: Callable[[Any, Any], bool]) -> None:
    """Three times with other values, so that plans are made, used again, and changed by what was asked for."""
    for seed in range(3):
        forget_unsettled()
        expected = follow(recipe, ops, seed, pending=False)
        fusion.install()
        try:
            got = follow(recipe, ops, seed, pending=True)
            for i, (g, e) in enumerate(zip(got, expected, strict=True)):
                assert isinstance(g, str) == isinstance(e, str), f"value {i}: {g} instead of {e}"
                if isinstance(e, str):
                    continue
                value = settle(g)
                for t in (g, value):
                    assert metadata(t) == metadata(e), f"value {i}, seed {seed}"
                assert equal(value, e), f"value {i}, seed {seed}: {value} instead of {e}"
        except RecordingError:  # may happen where a plain operand was written to: the one refusal there is
            assert any(line.op in WRITES for line in recipe.lines)
        finally:
            fusion.remove()


def recipe_of(*lines: Line, leaves: Sequence[Leaf], order: Sequence[int] = ()) -> Recipe:
    return Recipe(tuple(leaves), lines, tuple(order))


def prediction(*shape: int, borrows: bool = False, second: bool = False) -> Leaf:
    return Leaf(shape, torch.float32, "plain", True, borrows, second)


# What such searches have found.
SMALL, LARGE, NO_DIMS = prediction(3, 4, borrows=True), prediction(2, 3, 4), prediction()
FOUND = {
    "a borrowed call, read by an op that is alone": recipe_of(
        Line("add number", (1, 1), 0, 0), Line("add", (0, 2), 0, 0), leaves=[LARGE, SMALL], order=[3, 2]
    ),
    "a borrowed call that is broadcast": recipe_of(
        Line("add", (0, 1), 0, 0), Line("mul number", (2, 2), 0, 0), leaves=[SMALL, LARGE], order=[3]
    ),
    "the second output of a call": recipe_of(
        Line("neg", (0, 0), 0, 0), Line("mul", (1, 0), 0, 0), leaves=[prediction(4, 5, borrows=True, second=True)]
    ),
    "a bool": recipe_of(Line("mul number", (0, 0), 7, 0), Line("neg", (1, 1), 0, 0), leaves=[LARGE], order=[2]),
    "t of no dimensions": recipe_of(
        Line("neg", (0, 0), 0, 0), Line("t", (1, 1), 0, 0), Line("neg", (2, 2), 0, 0), leaves=[NO_DIMS], order=[3]
    ),
    "transpose of no dimensions": recipe_of(
        Line("neg", (0, 0), 0, 0),
        Line("transpose", (1, 1), 0, 0),
        Line("neg", (2, 2), 0, 0),
        leaves=[NO_DIMS],
        order=[3],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("kind", [Fusion, Unchecked])
def test_found_before(name: str, kind: type[Fusion]) -> None:
    compare(kind(CPU, interpret, "interpreter"), FOUND[name], EXACT, same_bits)


@torch.no_grad()
@settings(deadline=None, max_examples=400)
@given(recipe=recipes(EXACT), checks=st.booleans())
def test_same_as_plain_tensors(recipe: Recipe, checks: bool) -> None:
    compare((Fusion if checks else Unchecked)(CPU, interpret, "interpreter"), recipe, EXACT, same_bits)


@torch.no_grad()
@settings(deadline=None, max_examples=150)
@given(recipe=recipes(CLOSE, [torch.float32]), exact=st.booleans())
def test_plans_for_a_gpu_mean_the_same(recipe: Recipe, exact: bool) -> None:
    compare(PlannedForGpu(CPU, interpret, "interpreter", exact), recipe, CLOSE, close)
