"""Programs: what rules become, and the kernels against their reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cfg_parallel import codegen, extension
from cfg_parallel.fusion import Fusion, Plan
from cfg_parallel.launch import NotCompiledError, finish_compiling, launch
from cfg_parallel.pending import pending_outputs, settle
from cfg_parallel.program import (
    DTYPES,
    MAX_INPUTS,
    MAX_OUTPUTS,
    SCALAR,
    Instruction,
    Op,
    Operand,
    Program,
    float32,
    interpret,
    reciprocal32,
)

needs_module = pytest.mark.skipif(extension.missing_reason() is not None, reason="needs the compiled module")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# What a rule's ops become


class Traced(Fusion):
    """Plans for a GPU, and keeps the programs in place of running them."""

    on_gpu = True  # type: ignore[assignment]

    def __init__(self, exact: bool) -> None:
        self.programs: list[Program] = []
        super().__init__(torch.device("cpu"), lambda program, *_: self.programs.append(program), "traced", exact)

    def _make_plan(self, recorded: Any, wanted: frozenset[int]) -> Plan:
        self._checked.add(recorded.key)
        return super()._make_plan(recorded, wanted)


def _pending(value: torch.Tensor) -> Any:
    return pending_outputs(lambda: [value], [(value.shape, value.stride(), value.dtype, value.device)])[1][0]


def traced(fn: Callable[..., Any], dtypes: list[torch.dtype], exact: bool) -> list[Program]:
    """The programs that `fn` of predictions of these dtypes becomes."""
    fusion = Traced(exact)
    fusion.install()
    try:
        values = [torch.randn(2, 3, 64).to(dtype) for dtype in dtypes]
        settle(fn(*map(_pending, values)))
    finally:
        fusion.remove()
    return fusion.programs


def cfg(p: Any, n: Any) -> Any:
    return n + 4.0 * (p - n)


def norm_preserving(p: Any, n: Any) -> Any:
    """As QwenImagePipeline."""
    g = cfg(p, n)
    return g * (torch.norm(p, dim=-1, keepdim=True) / torch.norm(g, dim=-1, keepdim=True))


def euler(sample: Any, like: Any, guided: Any) -> Any:
    """As FlowMatchEulerDiscreteScheduler.step; the sum stands for dt, a tensor without dimensions on the device."""
    return (sample.to(torch.float32) + like.float().sum() * guided).to(guided.dtype)


RULES: dict[str, tuple[int, Callable[..., Any]]] = {
    "cfg": (2, cfg),
    "cfg_cond": (2, lambda p, n: p + 4.0 * (p - n)),
    "instruct_pix2pix": (3, lambda t, i, n: n + 7.5 * (t - i) + 1.5 * (i - n)),
    "norm": (2, norm_preserving),
    "cfg_euler": (3, lambda p, n, sample: euler(sample, sample, cfg(p, n))),
    "norm_euler": (3, lambda p, n, sample: euler(sample, sample, norm_preserving(p, n))),
}


def test_one_launch_for_guidance_step_and_casts() -> None:
    for name in ("cfg_euler", "norm_euler"):
        assert len(traced(RULES[name][1], [torch.bfloat16, torch.bfloat16, torch.bfloat16], True)) == 1


def test_a_norm_of_rows_that_exact_mode_cannot_sum_is_left_to_pytorch() -> None:
    def wide(p: Any, n: Any) -> Any:
        return norm_preserving(p.reshape(2, 1, 192), n.reshape(2, 1, 192))

    programs = traced(wide, [torch.bfloat16, torch.bfloat16], True)
    assert len(programs) == 2  # before the norms and after them
    assert not any(program.has_norm for program in programs)


def rescaled(p: Any, n: Any) -> Any:
    """As rescale_noise_cfg."""
    g = cfg(p, n)
    dims = list(range(1, g.dim()))
    ratio = p.std(dim=dims, keepdim=True) / g.std(dim=dims, keepdim=True)
    return 0.7 * (g * ratio) + 0.3 * g


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_passes_for_std_rescale(dtype: torch.dtype) -> None:
    """Neither stores what the other could read: both read the predictions."""
    sums, result = traced(rescaled, [dtype, dtype], False)
    assert (sums.correction, len(sums.inputs), len(sums.outputs)) == (1.0, 2, 2)
    assert [o.strides for o in sums.outputs] == [(1, 0, 0)] * 2
    assert (result.correction, len(result.inputs), len(result.outputs)) == (None, 4, 1)
    assert sorted(o.strides for o in result.inputs) == [(1, 0, 0)] * 2 + [(192, 64, 1)] * 2
    assert len(traced(rescaled, [dtype, dtype], True)) == 2  # around PyTorch's standard deviations
    assert all(program.correction is None for program in traced(rescaled, [dtype, dtype], True))


@pytest.mark.parametrize(
    ("std", "programs"),
    [
        (lambda x: x.std(dim=[1, 2], keepdim=True, correction=0), [0.0]),
        (lambda x: x.std(dim=(-1, 1), keepdim=True), [1.0]),
        (lambda x: x.std(dim=[0, 1, 2], keepdim=True), [1.0]),
        (lambda x: x.std(dim=2, keepdim=True), [1.0]),
        (lambda x: x.std(dim=[0], keepdim=True), []),  # samples are not first
        (lambda x: x.std(dim=[1, 2])[:, None, None], []),
        (lambda x: x.std(), []),
        (lambda x: x[:, :1, :1].std(dim=[1, 2], keepdim=True), []),  # of one element
    ],
)
def test_standard_deviations_that_programs_compute(std: Callable[..., Any], programs: list[float]) -> None:
    made = traced(lambda p, n: (p - n) * 2.0 * std(p * 3.0), [torch.float32] * 2, False)
    assert [program.correction for program in made if program.correction is not None] == programs


class OnGpu(Fusion):
    """Plans for a GPU, and runs by the interpreter."""

    on_gpu = True  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fn",
    [
        lambda p, n: p.float() / p.float().std(dim=[1, 2], keepdim=True),
        lambda p, n: p.clone() * p.clone().std(dim=[1, 2], keepdim=True),
        lambda p, n: (p - n).std(dim=[1, 2], keepdim=True) * (p - n) + n.std(dim=[1, 2], keepdim=True),
        lambda p, n: (p / p.std(dim=[1, 2], keepdim=True)).std(dim=[1, 2], keepdim=True) * n,
        rescaled,
    ],
)
def test_what_standard_deviations_are_combined_with(fn: Callable[..., Any], dtype: torch.dtype) -> None:
    predictions = [torch.randn(2, 3, 64).to(dtype) for _ in range(2)]
    fusion = OnGpu(torch.device("cpu"), interpret, "interpreter", exact=False)
    fusion.install()
    try:
        pendings = [_pending(v) for v in predictions]
        got = settle(fn(*pendings))
    finally:
        fusion.remove()
    exact = fn(*(prediction.double() for prediction in predictions))
    error = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(got.double(), exact.double(), rtol=error, atol=error)


def test_a_prediction_that_only_a_sum_reads_is_not_waited_for_by_its_kernel() -> None:
    plans = []

    class Planned(Traced):
        def _make_plan(self, recorded: Any, wanted: frozenset[int]) -> Plan:
            plans.append(super()._make_plan(recorded, wanted))
            return plans[-1]

    fusion = Planned(False)
    fusion.install()
    try:
        p, q = (_pending(torch.randn(2, 8)) for _ in range(2))
        for prediction in (p, q):
            prediction._node.borrow = lambda: None  # as of a call that is on its way
        settle(p * 1.5 / (q * 2.0).std(dim=[1], keepdim=True) * 2.0)
    finally:
        fusion.remove()
    (plan,) = plans
    launches = [action for action in plan.actions if not isinstance(action, int)]
    (sums,) = [launch for launch in launches if launch.program.correction is not None]
    assert sums.positions and not plan.borrowed & set(sums.positions)


# Numbers


def test_float32() -> None:
    assert float32(0.1) == torch.tensor(0.1, dtype=torch.float32).item()
    assert float32(1e300) == float("inf")
    assert float32(float("nan")) != float32(float("nan"))


@pytest.mark.parametrize("value", [3.0, -0.1, 1e-45, 1e38, 0.0, -0.0, float("inf"), -7.0])
def test_reciprocal32(value: float) -> None:
    expected = 1.0 / torch.tensor(value, dtype=torch.float32)
    assert torch.equal(torch.tensor(reciprocal32(value)), expected)


# The native class


@needs_module
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4], [[1]], 1, 0, 8, [16]), "inputs, outputs, dimensions"),
        (([4], [[1], [1]], 0, 0, 8, [16, 16]), "inputs, outputs, dimensions"),
        (([], [[], []], 1, 0, 8, [16, 16]), "inputs, outputs, dimensions"),
        (([4], [[1], [1]], 1, 0, 0, [16, 16]), "inputs, outputs, dimensions"),
        (([4], [[1], [1]], 1, 0, 8, [16]), "an alignment for each tensor"),
        (([4, 4], [[1, 4], [1]], 1, 0, 8, [16, 16]), "a stride for each dimension"),
    ],
)
def test_refused_programs(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(extension.load().Error, match=message):
        extension.load().Program(*arguments)


@needs_module
def test_a_launch_asks_for_the_kernel_that_it_needs() -> None:
    native = extension.load().Program([4096], [[1], [0], [1]], 2, 1, 8, [16, 4, 8])
    assert native.launch([16, 4], [8], [1.0], 3, 0) == (3, 8, -1)
    assert native.launch([16, 4], [4], [1.0], 3, 0) == (3, 1, -1)  # an address off its grid
    with pytest.raises(extension.load().Error, match="2 inputs, 1 outputs and 1 scalars, but got 1, 1 and 1"):
        native.launch([0], [0], [1.0], 0, 0)


# The kernels

_SHAPES = [(), (1,), (7,), (8,), (4096,), (4099,), (3, 64), (2, 5, 8), (2, 3, 16, 16), (1, 0, 4), (2, 3, 5, 7, 9)]
_SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-45, 65504.0, 3e38, 6e-8]


def _random_tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    values = torch.randn(shape, generator=generator) * 10 ** rng.uniform(-3, 3)
    where = torch.rand(shape, generator=generator) < 0.05
    special = torch.tensor(_SPECIAL)[torch.randint(len(_SPECIAL), shape, generator=generator)]
    return torch.where(where, special, values).to("cuda", dtype)


def _random_layout(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between rows, in another order of dimensions, or off the 16-byte grid."""
    how = rng.randrange(4)
    if how == 1 and tensor.dim():
        wide = tensor.new_empty((*tensor.shape[:-1], tensor.shape[-1] + rng.choice([1, 8])))
        return wide[..., : tensor.shape[-1]].copy_(tensor)
    if how == 2 and tensor.dim() == 4:
        return tensor.to(memory_format=torch.channels_last)
    if how == 3:
        flat = tensor.new_empty(tensor.numel() + 1)[1:]
        return flat.view(tensor.shape).copy_(tensor)
    return tensor


def _random_program(rng: random.Random) -> tuple[Program, list[torch.Tensor], list[float]]:
    shape = rng.choice(_SHAPES)
    inputs = []
    for _ in range(rng.randint(1, MAX_INPUTS)):
        dims = tuple(1 if rng.random() < 0.15 else size for size in shape)  # broadcast along some
        inputs.append(_random_layout(rng, _random_tensor(rng, dims, rng.choice(DTYPES))).expand(shape))
    scalars = [float32(rng.choice([4.5, -0.3, 1e-3, 0.0, 7.5])) for _ in range(3)]
    code: list[Instruction] = []
    for _ in range(rng.randint(1, 20)):
        op = rng.choice([op for op in Op if op not in (Op.NORM, Op.FMA)])
        values = range(len(inputs) + len(code))
        operands = [rng.choice([*values, SCALAR, SCALAR + 1, SCALAR + 2]) for _ in range(op.arity)]
        code.append(Instruction(op, *operands, round=rng.choice(DTYPES)))
    stores = tuple(rng.randrange(len(inputs) + len(code)) for _ in range(rng.randint(1, MAX_OUTPUTS)))
    strides = torch.empty(shape).stride()
    outputs = tuple(Operand(rng.choice(DTYPES), strides) for _ in stores)
    program = Program(shape, tuple(Operand(t.dtype, t.stride()) for t in inputs), outputs, tuple(code), stores)
    return program, inputs, scalars[: codegen.num_scalars(program)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaNs of any payload count as equal: PyTorch's casts do not keep it."""
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.isnan(), b.isnan()) and bool(((a.view(whole) == b.view(whole)) | a.isnan()).all())


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(300))
def test_random_program(seed: int) -> None:
    program, inputs, scalars = _random_program(random.Random(seed))
    outputs = [[torch.empty(program.shape, dtype=o.dtype, device="cuda") for o in program.outputs] for _ in range(2)]
    launch(program, inputs, scalars, outputs[0])
    interpret(program, inputs, scalars, outputs[1])
    for got, expected in zip(*outputs, strict=True):
        assert same_bits(got, expected)


@pytest.mark.gpu
def test_a_launch_that_does_not_wait_for_its_kernel() -> None:
    program, inputs, scalars = _random_program(random.Random(4321))
    outputs = [[torch.empty(program.shape, dtype=o.dtype, device="cuda") for o in program.outputs] for _ in range(2)]
    with pytest.raises(NotCompiledError, match="are being compiled"):
        launch(program, inputs, scalars, outputs[0], wait=False)
    finish_compiling()
    launch(program, inputs, scalars, outputs[0], wait=False)
    interpret(program, inputs, scalars, outputs[1])
    for got, expected in zip(*outputs, strict=True):
        assert same_bits(got, expected)


def _statistics(shape: tuple[int, ...], inputs: list[torch.Tensor], first: int, correction: float) -> Program:
    """The standard deviations of a - b and of b over the dimensions from `first` on."""
    operands = tuple(Operand(t.dtype, t.stride()) for t in inputs)
    kept = torch.empty(shape[:first]).stride()
    strides = (*kept, *(0 for _ in shape[first:]))
    outputs = tuple(Operand(torch.float32, strides) for _ in range(2))
    return Program(shape, operands, outputs, (Instruction(Op.SUB, 0, 1),), (2, 1), correction)


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0.0, 3.0, -1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "first"),
    [((2,), 0), ((1, 4099), 1), ((3, 5, 8), 1), ((70, 3, 64, 64), 1), ((2, 9, 77), 2), ((2, 1 << 20), 1)],
)
def test_standard_deviations(shape: tuple[int, ...], first: int, dtype: torch.dtype, mean: float) -> None:
    inputs = [(torch.randn(shape, device="cuda") + mean).to(dtype) for _ in range(2)]
    program = _statistics(shape, inputs, first, 1.0)
    outputs = [[torch.empty(shape[:first], device="cuda") for _ in range(2)] for _ in range(3)]
    interpret(program, inputs, [], outputs[0])
    for k in (1, 2):
        launch(program, inputs, [], outputs[k])
    for expected, got, again in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        assert torch.equal(got, again)


@pytest.mark.gpu
def test_standard_deviation_of_what_is_not_finite() -> None:
    for value in (float("inf"), float("nan")):
        x = torch.randn(2, 1000, device="cuda")
        x[0, 777] = value
        out = [torch.empty(2, device="cuda") for _ in range(2)]
        launch(_statistics((2, 1000), [x, x], 1, 1.0), [x, x], [], out)
        assert out[1].isnan().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_in_the_memory_of_an_input(dtype: torch.dtype) -> None:
    p, n = (torch.randn(1000, 64, device="cuda").to(dtype) for _ in range(2))
    expected = cfg(p, n)
    (program,) = traced(cfg, [dtype, dtype], True)
    whole = Program((64000,), *((Operand(dtype, (1,)),) * k for k in (2, 1)), program.code, program.stores)
    launch(whole, [n, p], [4.0], [n])
    assert same_bits(n, expected)
