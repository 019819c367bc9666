"""A scheduler's coefficients: the same bits as plainly, computed once, and no wait for the device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch.overrides import TorchFunctionMode

from cfg_parallel import enable_cfg_parallel
from cfg_parallel.coefficients import Coefficients
from cfg_parallel.patch import scheduler_view
from cfg_parallel.timesteps import HostKnown
from reference import reference
from test_fusion import interpret
from tiny import TINY, generate

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (f"{name}Scheduler", {})
    for name in (
        *("DDIM", "DDPM", "PNDM", "LCM", "TCD", "IPNDM", "UniPCMultistep", "DEISMultistep", "SASolver"),
        *("DPMSolverMultistep", "DPMSolverSinglestep", "EDMDPMSolverMultistep", "EDMEuler"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "LTXEulerAncestralRF"),
    )
} | {
    "UniPC of Wan": ("UniPCMultistepScheduler", FLOW),
    "UniPC of order 3": ("UniPCMultistepScheduler", {"solver_order": 3, **FLOW}),
    "DPM++ SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


def make(name: str) -> Any:
    cls, config = SCHEDULERS[name]
    return getattr(diffusers, cls)(**config)


def generation(scheduler: Any, steps: int, device: str = "cpu", size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sample = torch.randn(1, 4, size, size, generator=generator).to(device)
    scheduler.set_timesteps(steps, device=device)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(torch.tanh(scaled * 0.3), t, sample, **extra).prev_sample
    return sample


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_gives_the_same_bits(name: str) -> None:
    coefficients = Coefficients("cpu")
    view = scheduler_view(make(name), coefficients)
    known = []
    for steps in (6, 7, 6, 7):
        expected = generation(make(name), steps)
        assert expected.isfinite().all()
        assert torch.equal(generation(view, steps), expected)
        known.append(len(coefficients._known))
    assert known[1] == known[2] == known[3]


class Waits(TorchFunctionMode):
    """Notes what would make the host wait for the GPU, were "meta" one. To read a value raises there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if isinstance(result, torch.Tensor) and result.is_meta:
            copied = name in ("to", "cuda") and args[0].device.type == "cpu" and not kwargs.get("non_blocking")
            if copied or name in ("tensor", "as_tensor", "linalg_solve"):
                self.found.append(name)
        return result


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_asks_the_device_for_nothing(name: str) -> None:
    def to_device(host: torch.Tensor) -> HostKnown:
        return HostKnown(host.to("meta"), host)

    view = scheduler_view(make(name), Coefficients("meta"))
    for first in (True, False):
        view.set_timesteps(6)
        view.timesteps = to_device(view.timesteps)
        if name.startswith(("FlowMatch", "LTX")):
            view.sigmas = to_device(view.sigmas)
        sample = torch.randn(1, 4, 8, 8, device="meta")
        with Waits() as waits:
            for t in view.timesteps:
                if hasattr(view, "scale_model_input"):
                    view.scale_model_input(sample, t)
                sample = view.step(sample, t, sample).prev_sample
        assert not (set(waits.found) - {"linalg_solve"} if first else waits.found)


def test_the_detector_finds_what_waits() -> None:
    scheduler = make("UniPC of Wan")
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    sample = torch.randn(1, 4, 8, 8, device="meta")
    with Waits() as waits:
        for t in scheduler.timesteps:
            sample = scheduler.step(sample, t, sample).prev_sample
    assert waits.found.count("to") >= 4 * 5
    assert "linalg_solve" in waits.found


# Coefficients


@pytest.fixture
def coefficients() -> Iterator[Coefficients]:
    with Coefficients("cpu") as entered:
        yield entered


def test_the_same_numbers_give_the_same_tensor(coefficients: Coefficients) -> None:
    def compute(sigma: float) -> torch.Tensor:
        x = torch.tensor(sigma, device="cpu")
        return torch.stack([torch.log(1 - x), x.to("cpu") / 2])[-1]

    assert compute(0.25) is compute(0.25)
    assert compute(0.25) is not compute(0.5)
    assert compute(0.25).item() == 0.125


@pytest.mark.parametrize(
    "pair", [(0.0, -0.0), (1, 1.0), (1, True), ([1.0], 1.0), ([1.0, 2.0], [[1.0, 2.0]]), ([1], [1.0])]
)
def test_numbers_that_are_equal_but_not_alike(coefficients: Coefficients, pair: Any) -> None:
    a, b = (torch.tensor(number, device="cpu") for number in pair)
    assert a is not b
    x = torch.tensor([4, 2], device="cpu")
    if not isinstance(pair[0], list):
        assert x.mul(pair[0]) is not x.mul(pair[1])
        assert x.mul(pair[1]).dtype == torch.tensor([4, 2]).mul(pair[1]).dtype


def test_what_was_overwritten_is_computed_again(coefficients: Coefficients) -> None:
    def double(value: float) -> torch.Tensor:
        return torch.full((2,), value, device="cpu") * 2

    first = double(3.0)
    first.add_(1)
    assert double(3.0).tolist() == [6.0, 6.0]
    assert (first * 2).tolist() == [14.0, 14.0]
    assert (first * 2).tolist() == [14.0, 14.0]


def test_what_depends_on_a_sample_or_on_chance_is_no_coefficient(coefficients: Coefficients) -> None:
    x = torch.tensor([0.5], device="cpu")
    sample = torch.ones(3)
    assert x * sample is not x * sample
    assert not torch.equal(torch.rand_like(x), torch.rand_like(x))
    assert torch.zeros(4096, device="cpu") is not torch.zeros(4096, device="cpu")
    assert x.clone() is not x.clone()


def test_a_number_that_is_read_is_known_too(coefficients: Coefficients) -> None:
    for _ in range(2):
        x = torch.tensor([0.5, 3.0], device="cpu")
        assert x[1].item() == 3.0
        assert bool(x[0] < x[1])
        assert float(x[0] * 2) == 1.0


def test_an_error_of_solve_is_raised_each_time(coefficients: Coefficients) -> None:
    for _ in range(2):
        singular = torch.ones((2, 2), device="cpu")
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            torch.linalg.solve(singular, torch.ones(2, device="cpu"))


def test_settings_are_part_of_a_key() -> None:
    coefficients = Coefficients("cpu")

    def one() -> torch.Tensor:
        coefficients.begin()
        with coefficients:
            return torch.ones((), device="cpu")

    before = torch.get_default_dtype()
    single = one()
    try:
        torch.set_default_dtype(torch.float64)
        assert one().dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert one() is single


def test_coefficients_of_inference_mode_serve_outside_of_it() -> None:
    coefficients = Coefficients("cpu")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode(), coefficients:
            x = torch.tensor([0.5], device="cpu") * 2
            assert not x.is_inference()
            assert not x.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (weight * x).backward()
    assert weight.grad is not None


def test_schedulers_that_copy_nothing_are_left_alone() -> None:
    coefficients = Coefficients("meta")
    view = scheduler_view(make("EulerDiscrete"), coefficients)
    generation(view, 6)
    assert not coefficients.are_needed
    view.set_timesteps(6)
    assert coefficients.are_needed


@pytest.mark.usefixtures("forked")
def test_a_pipeline_with_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfg_parallel.leader.executor", lambda device, wait: (interpret, "interpreter"))
    monkeypatch.setattr("cfg_parallel.enable.Coefficients", lambda device_type: Coefficients("cpu"))
    tiny = TINY["wan"]
    plain, pipe = tiny.build(), tiny.build()
    for each in (plain, pipe):
        each.scheduler = diffusers.UniPCMultistepScheduler.from_config(each.scheduler.config, **FLOW)
    with enable_cfg_parallel(pipe) as handle:
        for _ in range(3):
            expected = reference(tiny, plain, tiny.inputs(num_inference_steps=6))
            assert torch.equal(generate(pipe, tiny.inputs(num_inference_steps=6)), expected)
        assert handle.report.fused == {"cfg + scheduler step (interpreter)": 6}


# GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_gives_the_same_bits_on_a_gpu(name: str) -> None:
    view = scheduler_view(make(name), Coefficients("cuda"))
    for steps in (6, 7, 6):
        assert torch.equal(generation(view, steps, "cuda", size=64), generation(make(name), steps, "cuda", size=64))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_does_not_wait_for_the_gpu(name: str) -> None:
    """With noise from a generator in host memory, more of it than the driver copies at once without waiting."""
    view = scheduler_view(make(name), Coefficients("cuda"))
    generation(view, 6, "cuda", size=128)  # where it solves equations for the first time
    generator = torch.Generator()
    extra = {"generator": generator} if "generator" in inspect.signature(view.step).parameters else {}
    view.set_timesteps(6, device="cuda")
    sample, prediction = torch.randn(2, 1, 4, 128, 128, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in view.timesteps:
            if hasattr(view, "scale_model_input"):
                view.scale_model_input(sample, t)
            sample = view.step(prediction, t, sample, **extra).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_coefficients_belong_to_a_stream() -> None:
    coefficients = Coefficients("cuda")

    def compute() -> torch.Tensor:
        with coefficients:
            return torch.tensor(0.5).to("cuda") * 2

    first = compute()
    assert compute() is first
    with torch.cuda.stream(torch.cuda.Stream()):
        assert compute() is not first
