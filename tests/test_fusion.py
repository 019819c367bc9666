"""Fused evaluation, with programs run by the interpreter: what is fused, what is not, and that no bit and no value is
lost. tests/test_pending.py runs each of its cases this way too."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers import guiders

from cfg_parallel import ConfigurationError, enable_cfg_parallel
from cfg_parallel.calls import Denoiser
from cfg_parallel.codec import flat_bytes
from cfg_parallel.fusion import CHECKED, Fusion
from cfg_parallel.launch import LaunchError, NotCompiledError
from cfg_parallel.leader import Leader
from cfg_parallel.pending import PendingPrediction, RecordingError, is_unsettled, pending_outputs, settle, settle_all
from cfg_parallel.program import Program, interpret
from reference import reference
from tiny import TINY, generate

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked")]
CPU = torch.device("cpu")


@pytest.fixture
def fusion() -> Iterator[Fusion]:
    """Evaluates what this test records."""
    fusion = Fusion(CPU, interpret, "interpreter")
    fusion.install()
    with torch.no_grad():
        yield fusion
    fusion.remove()


def predictions(count: int, shape: tuple[int, ...] = (2, 4, 8), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def pend(value: torch.Tensor) -> PendingPrediction:
    return pending_outputs(lambda: [value], [(value.shape, value.stride(), value.dtype, value.device)])[1][0]


def step(p: Any, n: Any, sample: torch.Tensor) -> Any:
    return sample + -0.1 * (n + 4.0 * (p - n))


def test_the_first_of_a_kind_is_checked_and_the_rest_is_fused(fusion: Fusion) -> None:
    for seed in range(3):
        p, n, sample = predictions(3, seed=seed)
        assert torch.equal(settle(step(pend(p), pend(n), sample)), step(p, n, sample))
    assert fusion.fused == {"cfg + flow_match_euler (interpreter)": 2}
    assert fusion.replayed == {CHECKED: 1}


def test_other_shapes_dtypes_and_layouts_are_of_another_kind(fusion: Fusion) -> None:
    shapes = [(2, 4, 8), (2, 4, 9), (1, 4, 8), (1,)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            p, n, sample = (t.to(dtype) for t in predictions(3, shape))
            for _ in range(2):
                assert torch.equal(settle(step(pend(p), pend(n), sample)), step(p, n, sample))
    p, n, sample = predictions(3, (2, 4, 8, 8))
    p, n = (t.to(memory_format=torch.channels_last) for t in (p, n))
    for _ in range(2):
        got = settle(step(pend(p), pend(n), sample))
        assert torch.equal(got, step(p, n, sample))
        assert got.stride() == step(p, n, sample).stride()
    assert fusion.replayed == {CHECKED: 2 * len(shapes) + 1}


def test_other_numbers_are_of_the_same_kind(fusion: Fusion) -> None:
    p, n = predictions(2)
    for scale in (4.0, 7.5, -1.0, 0.0, float("inf")):
        got = settle(n + scale * (pend(p) - pend(n)))
        torch.testing.assert_close(got, n + scale * (p - n), rtol=0, atol=0, equal_nan=True)
    assert sum(fusion.fused.values()) == 4


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
def test_the_sign_of_a_zero_is_structure(fusion: Fusion, zeros: tuple[float, float]) -> None:
    p = predictions(1)[0]
    for zero in zeros * 2:
        got = settle((pend(p) * 2).clamp(-1.0, zero))
        assert torch.equal(got.signbit(), (p * 2).clamp(-1.0, zero).signbit())


def test_a_kernel_that_rounds_otherwise_is_found_out() -> None:
    def one_ulp_off(
        program: Program, inputs: Any, scalars: Any, outputs: Sequence[torch.Tensor], *arrival: Any
    ) -> None:
        interpret(program, inputs, scalars, outputs, *arrival)
        outputs[0].copy_(torch.nextafter(outputs[0], torch.tensor(torch.inf)))

    fusion = Fusion(CPU, one_ulp_off, "wrong")
    fusion.install()
    p, n, sample = predictions(3)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(settle(step(pend(p), pend(n), sample)), step(p, n, sample))
    fusion.remove()
    assert not fusion.fused
    assert fusion.replayed == {
        CHECKED: 1,
        "the fused kernel (cfg + flow_match_euler) does not round as PyTorch does here": 2,
    }


def test_a_value_that_was_left_out_can_still_be_had(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    for _ in range(4):
        a, b = pend(p), pend(n)
        guided = b + 4.0 * (a - b)
        latents = sample + -0.1 * guided
        settle(latents)
        assert torch.equal(settle(guided), n + 4.0 * (p - n))
        assert torch.equal(settle(a), p)
        assert torch.equal(settle(latents), step(p, n, sample))


def test_what_is_asked_for_is_stored_from_then_on(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    left = []
    for _ in range(4):
        a, b = pend(p), pend(n)
        guided = b + 4.0 * (a - b)
        settle(sample + -0.1 * guided)
        left.append(is_unsettled(guided))
        settle(guided)
    assert left == [True, False, False, False]


def test_a_multistep_scheduler_stores_what_its_next_step_reads(fusion: Fusion) -> None:
    """The history of such a scheduler must not grow into ever longer recordings."""
    p, n, sample = predictions(3)
    history: Any = None
    expected_history: Any = None
    for _ in range(8):
        x0 = sample - 0.5 * (pend(n) + 4.0 * (pend(p) - pend(n)))
        expected_x0 = sample - 0.5 * (n + 4.0 * (p - n))
        latents = x0 * 0.9 if history is None else x0 * 0.9 + (x0 - history) * 0.3
        expected = expected_x0 * 0.9 if history is None else expected_x0 * 0.9 + (expected_x0 - expected_history) * 0.3
        assert torch.equal(settle(latents), expected)
        history, expected_history = x0, expected_x0
    assert not is_unsettled(history)


def test_an_operand_that_was_overwritten(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    settle(step(pend(p), pend(n), sample))
    result = step(pend(p), pend(n), sample)
    sample.add_(1)
    with pytest.raises(RecordingError, match="changed in place"):
        settle(result)


def test_a_reduction_is_run_by_pytorch_between_two_programs(fusion: Fusion) -> None:
    def rescale(p: Any, n: Any) -> Any:
        g = n + 4.0 * (p - n)
        dims = list(range(1, p.dim()))
        return 0.7 * (g * (p.std(dim=dims, keepdim=True) / g.std(dim=dims, keepdim=True))) + 0.3 * g

    launches: list[Program] = []

    def execute(program: Program, *rest: Any) -> None:
        launches.append(program)
        interpret(program, *rest)

    fusion.execute = execute
    p, n = predictions(2)
    for _ in range(2):
        launches.clear()
        assert torch.equal(settle(rescale(pend(p), pend(n))), rescale(p, n))
    assert len(launches) == 2
    assert fusion.fused == {"cfg + rescale (interpreter)": 1}


def test_a_program_that_is_too_large_is_replayed(fusion: Fusion) -> None:
    tensors = predictions(20)
    result = pend(tensors[0])
    expected = tensors[0]
    for tensor in tensors[1:]:
        result, expected = result + tensor, expected + tensor  # type: ignore[assignment]
    assert torch.equal(settle(result), expected)
    ((reason, count),) = fusion.replayed.items()
    assert "20 inputs" in reason
    assert count == 1


def test_integers_and_doubles_are_left_to_pytorch(fusion: Fusion) -> None:
    p, n = predictions(2)
    for _ in range(2):
        got = settle(((pend(p) - pend(n)) * 2).double() * 0.1 + 1)
        assert torch.equal(got, ((p - n) * 2).double() * 0.1 + 1)
        got = settle(((pend(p) - pend(n)) * 2).to(torch.int32) * 3 + 1)
        assert torch.equal(got, ((p - n) * 2).to(torch.int32) * 3 + 1)


def test_fused_numerics_round_once() -> None:
    fusion = Fusion(CPU, interpret, "interpreter", exact=False)
    fusion.install()
    p, n = (t.bfloat16() for t in predictions(2, (64, 64)))
    with torch.no_grad():
        got = settle(n + 4.0 * (pend(p) - n))
    fusion.remove()
    wanted = n.double() + 4.0 * (p.double() - n.double())
    assert torch.equal(got, wanted.to(torch.bfloat16))  # fp32 holds these sums to far more digits than bf16 keeps
    assert not torch.equal(got, n + 4.0 * (p - n))
    assert not fusion.replayed


def test_settled_at_the_end_what_somebody_holds(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    a, b = pend(p), pend(n)
    guided = b + 4.0 * (a - b)
    latents = sample + -0.1 * guided
    settle_all()
    assert not is_unsettled(guided)
    assert not is_unsettled(latents)
    assert torch.equal(settle(latents), step(p, n, sample))


# What a review found


@pytest.mark.parametrize("execute", [None, interpret])
def test_latents_that_each_call_casts_make_no_step_of_their_own(execute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfg_parallel.leader.executor", lambda device, wait: (execute, "interpreter"))
    linear = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    leader = Leader(CPU, [])
    leader.begin()
    latents: Any = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(5):
            p, n = (leader.dispatch(Denoiser("d", linear), (latents.to(torch.bfloat16) * k,), {}) for k in (1, 2))
            latents = latents + -0.1 * (n + 4.0 * (p - n)).float()
        settle(latents)
    assert [step.branches for step in leader.end().steps] == [2] * 5


def test_memory_that_was_handed_out_is_cast_at_once(fusion: Fusion) -> None:
    for look in (torch.from_dlpack, lambda p: p.diagonal(0, 1, 2), lambda p: p.numpy()):
        x = torch.ones(2, 4, 4)
        p = pend(x.clone())
        view = look(p)
        cast = p.to(torch.float64)
        view.fill(0) if not isinstance(view, torch.Tensor) else view.zero_()
        assert torch.equal(settle(cast), x.double())


def test_a_left_value_whose_operand_was_overwritten(fusion: Fusion) -> None:
    x = predictions(1)[0]
    for _ in range(3):
        p = pend(x)
        doubled = p * 2
        left = doubled + 1
        settle(left * 3)
        settle(doubled).zero_()  # not by way of the prediction, so nothing could be settled before it
        with contextlib.suppress(RecordingError):  # the one refusal that is allowed
            assert torch.equal(settle(left), x * 2 + 1)


def failing(error: Exception) -> Any:
    """An `execute` that raises once and is wrong from then on."""
    calls: list[int] = []

    def execute(program: Program, inputs: Any, scalars: Any, outputs: Sequence[torch.Tensor], *arrival: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise error
        interpret(program, inputs, scalars, outputs, *arrival)
        outputs[0].add_(1)

    return execute


@pytest.mark.parametrize("error", [LaunchError("rows are not contiguous"), torch.OutOfMemoryError("full")])
def test_a_check_that_failed_is_none(error: Exception) -> None:
    p, n, sample = predictions(3)
    fusion = Fusion(CPU, failing(error), "failing")
    fusion.install()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(settle(step(pend(p), pend(n), sample)), step(p, n, sample))
    fusion.remove()
    assert not fusion.fused
    assert fusion.replayed[str(error)] == 2


def test_nobody_waits_for_a_compiler(fusion: Fusion) -> None:
    """Two steps are replayed while the kernel of the check is compiled, then one in which it is compared; likewise the
    kernel that waits for the prediction."""
    asked: Counter[bool] = Counter()

    def execute(program: Program, *args: Any) -> None:
        arrival = args[3] if len(args) > 3 else None
        asked[arrival is not None] += 1
        if asked[arrival is not None] <= 2:
            raise NotCompiledError("the fused kernels are being compiled")
        interpret(program, *args)

    prepared: list[int] = []
    fusion.execute = execute
    fusion.prepare = lambda program, arriving, device: prepared.append(arriving)
    for i in range(8):
        p, n, sample = predictions(3, seed=i)
        assert torch.equal(settle(step(Arriving(p).pending, pend(n), sample)), step(p, n, sample))
    assert fusion.replayed == {"the fused kernels are being compiled": 4, CHECKED: 1}
    assert fusion.fused == {"cfg + flow_match_euler (interpreter)": 3}
    assert len(set(prepared)) == 1, "the kernel that waits is compiled beside the one that is compared"


def test_a_launch_that_cannot_be_made_is_replayed(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    settle(step(pend(p), pend(n), sample))
    fusion.execute = failing(LaunchError("not aligned"))
    for _ in range(2):
        arriving = Arriving(p)
        assert torch.equal(settle(step(arriving.pending, pend(n), sample)), step(p, n, sample))
    assert fusion.replayed["not aligned"] >= 1


@pytest.mark.parametrize("make", [lambda x: x.to_sparse(), lambda x: torch.complex(x, x).imag, lambda x: x.conj()])
def test_operands_that_kernels_cannot_read(fusion: Fusion, make: Any) -> None:
    p, n = predictions(2, (4, 8))
    for _ in range(2):
        assert torch.equal(settle((pend(p) + make(n)) * 2), (p + make(n)) * 2)


def test_a_long_recording_takes_no_quadratic_time(fusion: Fusion) -> None:
    p = predictions(1)[0]
    result: Any = pend(p)
    for _ in range(1000):
        result = result.unsqueeze(0).squeeze(0)
    start = time.monotonic()
    assert torch.equal(settle(result * 2 + 1), p * 2 + 1)
    assert time.monotonic() - start < 20


@pytest.fixture
def launches(fusion: Fusion) -> list[int]:
    """How many outputs each launch of a program had."""
    counts: list[int] = []

    def execute(program: Any, inputs: Any, scalars: Any, outputs: Any, *arriving: Any) -> None:
        counts.append(len(outputs))
        interpret(program, inputs, scalars, outputs, *arriving)

    fusion.execute = execute
    return counts


def test_of_what_led_to_a_history_nothing_else_is_stored(fusion: Fusion, launches: list[int]) -> None:
    """A multi-step scheduler: what the last step predicted is read again, but not what that was computed from."""
    history: Any = [torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)]
    for i in range(8):
        p, n, sample = predictions(3, seed=i)
        denoised = [sample - 0.3 * (b + 4.0 * (a - b)) for a, b in [(pend(p), pend(n)), (p, n)]]
        latents = [sample * 0.9 + (x0 * 1.5 - last * 0.5) for x0, last in zip(denoised, history, strict=True)]
        launches.clear()
        assert torch.equal(settle(latents[0]), latents[1])
        history = denoised
    assert launches == [2]


def test_a_stack_of_one_is_a_view(fusion: Fusion, launches: list[int]) -> None:
    def update(p: Any, n: Any, dim: int) -> Any:
        differences = torch.stack([(p - n) / 3.0], dim=dim)
        rho = torch.tensor([0.7])
        return n - 0.5 * torch.einsum("k,bkc...->bc...", rho, differences if dim == 1 else differences.mT)

    p, n = predictions(2, (1, 1, 8))
    for _ in range(3):
        for dim in (1, -2):
            launches.clear()
            assert torch.equal(settle(update(pend(p), pend(n), dim)), update(p, n, dim))
    assert launches == [1]


def test_coefficients_in_device_memory_are_no_more_than_numbers(fusion: Fusion, launches: list[int]) -> None:
    p, n, *coefficients = [*predictions(2), *torch.linspace(0.1, 2.0, 20).split(1)]

    def weigh(p: Any, n: Any) -> Any:
        for coefficient in coefficients:
            p = p * coefficient - n
        return p

    for _ in range(2):
        launches.clear()
        assert torch.equal(settle(weigh(pend(p), pend(n))), weigh(p, n))
    assert launches == [1]


# The guiders of Modular Diffusers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("guider", "options", "rule"),
    [
        (guiders.ClassifierFreeGuidance, {}, "cfg"),
        (guiders.ClassifierFreeGuidance, {"guidance_rescale": 0.7}, "cfg + rescale"),
        (guiders.ClassifierFreeGuidance, {"use_original_formulation": True}, "cfg_cond"),
        (guiders.ClassifierFreeZeroStarGuidance, {}, "zero_star"),
        (guiders.AdaptiveProjectedGuidance, {}, "apg"),
        (
            guiders.AdaptiveProjectedGuidance,
            {"adaptive_projected_guidance_momentum": -0.5, "adaptive_projected_guidance_rescale": 15.0},
            "apg",
        ),
    ],
)
def test_guider(fusion: Fusion, guider: Any, options: dict[str, Any], rule: str, dtype: torch.dtype) -> None:
    mine, plain = guider(**options), guider(**options)
    for i in range(4):
        p, n = (t.to(dtype) for t in predictions(2, (2, 4, 8, 8), seed=i))
        for each in (mine, plain):
            each.set_state(step=i + 1, num_inference_steps=10, timestep=torch.tensor(500.0))
        assert torch.equal(settle(mine.forward(pend(p), pend(n)).pred), plain.forward(p, n).pred)
    assert fusion.fused == {f"{rule} (interpreter)": 3}


# Predictions that are still on their way


class Arriving:
    """A call whose output can be had once: borrowed, or by `force`."""

    def __init__(self, value: torch.Tensor, can_borrow: bool = True) -> None:
        self.offsets = [0]
        self.taken: list[str] = []
        self._value = value
        node, (self.pending,) = pending_outputs(self._force, [(value.shape, value.stride(), value.dtype, value.device)])
        node.borrow = lambda: self if can_borrow else None

    def copy_out(self, flats: Sequence[torch.Tensor]) -> None:
        self.taken.append("borrowed")
        flats[0].copy_(flat_bytes(self._value))

    def _force(self) -> list[torch.Tensor]:
        self.taken.append("forced")
        return [self._value]


def test_the_kernel_waits_for_a_prediction_itself(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    taken = []
    for _ in range(3):
        arriving = Arriving(p)
        assert torch.equal(settle(step(arriving.pending, pend(n), sample)), step(p, n, sample))
        assert torch.equal(settle(arriving.pending), p)  # the kernel has kept it
        taken.append(arriving.taken)
    assert taken == [["forced"], ["borrowed"], ["borrowed"]]


def test_a_prediction_that_cannot_be_borrowed_after_all(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    for _ in range(3):
        arriving = Arriving(p, can_borrow=False)
        assert torch.equal(settle(step(arriving.pending, pend(n), sample)), step(p, n, sample))
        assert arriving.taken == ["forced"]


def test_one_of_two_predictions_is_borrowed(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    taken = []
    for _ in range(3):
        first, second = Arriving(p), Arriving(n)
        assert torch.equal(settle(step(first.pending, second.pending, sample)), step(p, n, sample))
        assert torch.equal(settle(first.pending), p)
        assert torch.equal(settle(second.pending), n)
        taken.append(sorted(first.taken + second.taken))
    assert taken == [["forced", "forced"], ["borrowed", "forced"], ["borrowed", "forced"]]


def test_a_prediction_that_pytorch_reads_too_is_received_first(fusion: Fusion) -> None:
    def rescaled(p: Any, n: Any) -> Any:
        g = n + 4.0 * (p - n)
        return g * (p.std() / g.std()) * 0.9

    p, n = predictions(2)
    for _ in range(3):
        arriving = Arriving(p)
        assert torch.equal(settle(rescaled(arriving.pending, pend(n))), rescaled(p, n))
        assert arriving.taken == ["forced"]


def test_a_value_left_out_is_computed_from_the_kept_prediction(fusion: Fusion) -> None:
    p, n, sample = predictions(3)
    for i in range(4):
        arriving = Arriving(p)
        b = pend(n)
        guided = b + 4.0 * (arriving.pending - b)
        latents = sample + -0.1 * guided
        assert torch.equal(settle(latents), step(p, n, sample))
        assert torch.equal(settle(guided), n + 4.0 * (p - n)), i


# Pipelines


@pytest.fixture
def with_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfg_parallel.leader.executor", lambda device, wait: (interpret, "interpreter"))


@pytest.mark.usefixtures("with_interpreter")
@pytest.mark.parametrize(
    ("name", "scheduler", "rule"),
    [
        ("qwen_image", None, "cfg + norm + flow_match_euler (interpreter)"),
        ("flux", None, "cfg + flow_match_euler (interpreter)"),
        ("sd3", None, "cfg + flow_match_euler (interpreter)"),
        ("wan", None, "cfg + scheduler step (interpreter)"),
        ("instruct_pix2pix", None, "instruct_pix2pix + scheduler step (interpreter)"),
        ("sd15", diffusers.DPMSolverMultistepScheduler, "cfg + scheduler step (interpreter)"),
        ("sdxl", diffusers.EulerAncestralDiscreteScheduler, "cfg + scheduler step (interpreter)"),
    ],
)
def test_pipeline(name: str, scheduler: Any, rule: str) -> None:
    tiny = TINY[name]
    plain, pipe = tiny.build(), tiny.build()
    if scheduler is not None:
        for each in (plain, pipe):
            each.scheduler = scheduler.from_config(each.scheduler.config)
    with enable_cfg_parallel(pipe) as handle:
        for _ in range(3):
            inputs = {"num_inference_steps": 6}
            expected = reference(tiny, plain, tiny.inputs(**inputs))
            assert torch.equal(generate(pipe, tiny.inputs(**inputs)), expected)
    report = handle.report
    assert report.fused == {rule: 6}
    assert not report.replayed
    assert f"6 steps: {rule}" in str(report)


def test_without_kernels_the_report_says_why() -> None:
    pipe = TINY["qwen_image"].build()
    with enable_cfg_parallel(pipe) as handle:
        generate(pipe, TINY["qwen_image"].inputs())
    report = handle.report
    assert not report.fused
    assert report.replayed == {"there are no fused kernels for cpu": report.steps}


def test_numerics_is_checked() -> None:
    with pytest.raises(ConfigurationError, match="'exact' or 'fused', but got 'fast'"):
        enable_cfg_parallel(TINY["qwen_image"].build(), numerics="fast")


@pytest.mark.usefixtures("with_interpreter")
def test_fused_numerics_are_close() -> None:
    pipe, plain = (TINY["qwen_image"].build() for _ in range(2))
    with enable_cfg_parallel(pipe, numerics="fused") as handle:
        got = generate(pipe, TINY["qwen_image"].inputs())
    torch.testing.assert_close(
        got, reference(TINY["qwen_image"], plain, TINY["qwen_image"].inputs()), rtol=1e-3, atol=1e-3
    )
    assert sum(handle.report.fused.values()) == handle.report.steps
