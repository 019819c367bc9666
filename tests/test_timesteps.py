"""Timesteps that the host knows: reads do not touch the device's copy, and everything else is as with plain tensors."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import cfg_parallel
from cfg_parallel.coefficients import Coefficients
from cfg_parallel.patch import scheduler_view
from cfg_parallel.timesteps import HostKnown, know, plain
from tiny import TINY, generate

TABLE = torch.linspace(0.1, 0.9, 1000)


class Poison:
    """Timesteps whose device copy holds other values, so that it shows which of the two was used."""

    def __init__(self, *values: int) -> None:
        self.host = torch.tensor(values)
        self.known = HostKnown(torch.full_like(self.host, 999), self.host)


READS: dict[str, Callable[[Any], Any]] = {
    "item": lambda t: t[1].item(),
    "int": lambda t: int(t[1]),
    "float": lambda t: float(t[1]),
    "index": lambda t: list(range(1000))[t[1]],
    "tolist": lambda t: t.tolist(),
    "iterate": lambda t: [x.item() for x in t],
    "enumerate": lambda t: [int(x) for _, x in enumerate(t[1:])],
    "format": lambda t: f"{t[1]:d}",
    "table": lambda t: TABLE[t[1]].item(),
    "table of several": lambda t: TABLE[t].tolist(),
    "arithmetic": lambda t: (t[2] - 20 + 3).item(),
    "reversed": lambda t: (1000 - t[0]).item(),
    "product": lambda t: (2 * t[2]).item(),
    "compare": lambda t: bool(t[1] >= 20),
    "branch": lambda t: "late" if t[0] < 20 else "early",
    "compare two": lambda t: bool(t[0] == t[1]),
    "contains": lambda t: 20 in t,
    "contains one of its own": lambda t: t[1] in t,
    "expand": lambda t: t[1].expand(3).tolist(),
    "unsqueeze": lambda t: t[1][None].tolist(),
    "ddim": lambda t: TABLE[t[1] - 10 if t[1] - 10 >= 0 else 0].item(),
    "position": lambda t: int((t == 20).nonzero()),
    "ddpm": lambda t: t[(t == 20).nonzero(as_tuple=True)[0][0] + 1].item(),
    "to host": lambda t: t.cpu().tolist(),
    "to where it is": lambda t: t[1].to(t.device).item(),
    "fraction": lambda t: TABLE[torch.floor(0.7 * t[1]).to(dtype=torch.long)].item(),
    "size": lambda t: (t[0] - t[1]).abs().item(),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_uses_what_the_host_knows(name: str) -> None:
    poison = Poison(10, 20, 30)
    assert READS[name](poison.known) == READS[name](poison.host)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "divide": lambda t: t / 1000,
    "cast": lambda t: t.to(torch.float32),
    "cat": lambda t: torch.cat([t, t]),
    "with a plain tensor": lambda t: t[1] + torch.ones(3),
    "matmul": lambda t: t.float() @ torch.ones(3),
    "stack": lambda t: torch.stack([t[0], t[1]]),
    "where": lambda t: torch.where(t > 20, 1.0, 0.0),
    "sin": lambda t: torch.sin(t.double()),
    "repeat": lambda t: t.repeat(2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_computing_uses_the_tensor_itself(name: str) -> None:
    poison = Poison(10, 20, 30)
    got, expected = OPERATIONS[name](poison.known), OPERATIONS[name](torch.full((3,), 999))
    assert torch.equal(plain(got), expected)
    assert got.dtype == expected.dtype
    assert (got.shape, got.device) == (expected.shape, expected.device)


def test_what_was_overwritten_is_read_again() -> None:
    values = torch.tensor([10, 20, 30])
    known = know(values)
    second = known[1]
    values[1] = 77
    assert second.item() == 77
    assert TABLE[second] == TABLE[77]
    assert (second - 7).item() == 70
    known.add_(1)
    assert known.tolist() == [11, 78, 31]


def test_copies_are_plain() -> None:
    known = know(torch.tensor([10, 20, 30]))
    for other in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert type(other) is torch.Tensor
        assert other.tolist() == [10, 20, 30]
    assert know(known) is known
    assert type(plain(known)) is torch.Tensor


SCHEDULERS = ["DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"]
SCHEDULERS += ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "LCMScheduler"]
SCHEDULERS += ["FlowMatchEulerDiscreteScheduler", "DEISMultistepScheduler", "KDPM2DiscreteScheduler"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_give_the_same_bits(name: str) -> None:
    def run(scheduler: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, 4, 8, 8, generator=generator)
        scheduler.set_timesteps(6)
        if type(scheduler) is not getattr(diffusers, name):
            assert isinstance(scheduler.timesteps, HostKnown)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            prediction = torch.tanh(scaled * 0.3 + plain(t) / 1000)
            extra = {"generator": generator} if takes_generator else {}
            sample = scheduler.step(prediction, t, sample, **extra).prev_sample
        return sample

    plainly, viewed = (getattr(diffusers, name)() for _ in range(2))
    assert torch.equal(run(plainly), run(scheduler_view(viewed, Coefficients("cuda"), any_device=True)))


def test_a_view_is_the_scheduler() -> None:
    scheduler = diffusers.DDIMScheduler()
    view: Any = scheduler_view(scheduler, Coefficients("cuda"), any_device=True)
    assert isinstance(view, diffusers.DDIMScheduler)
    assert type(view).__name__ == "DDIMScheduler"
    assert "timesteps" not in inspect.signature(view.set_timesteps).parameters
    assert inspect.signature(view.set_timesteps) == inspect.signature(scheduler.set_timesteps)
    view.set_timesteps(5)
    assert scheduler.num_inference_steps == 5  # one state
    assert scheduler.timesteps.tolist() == view.timesteps.tolist()
    assert view.config == scheduler.config


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
@pytest.mark.parametrize("made", ["of the object", "of its class", "not"])
def test_copies_of_a_view_are_schedulers(copied: Callable[[Any], Any], made: str) -> None:
    original = diffusers.DDIMScheduler()
    view: Any = scheduler_view(original, Coefficients("cuda"), any_device=True)
    if made == "of the object":
        view = view.from_config(view.config, timestep_spacing="trailing")
    elif made == "of its class":
        view = type(view).from_config(view.config, timestep_spacing="trailing")
    view.set_timesteps(5)
    other = copied(view)
    assert type(other) is diffusers.DDIMScheduler
    assert other.config.timestep_spacing == ("leading" if made == "not" else "trailing")
    other.set_timesteps(3)
    assert view.num_inference_steps == 5


def test_a_scheduler_made_of_a_view_stays_after_disabling() -> None:
    pipe = TINY["sd15"].build()
    with cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1):
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        trailing = generate(pipe, TINY["sd15"].inputs(num_inference_steps=3))
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert not hasattr(type(pipe.scheduler), "_cfg_parallel_scheduler")
    assert torch.equal(generate(pipe, TINY["sd15"].inputs(num_inference_steps=3)), trailing)


def test_a_pipeline_with_a_compiled_part_keeps_its_scheduler() -> None:
    pipe = TINY["sd15"].build()
    pipe.vae.compile()
    scheduler = pipe.scheduler
    with cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1):
        assert pipe.scheduler is scheduler


def test_an_enabled_pipeline_has_a_view_of_its_scheduler() -> None:
    pipe = TINY["sd15"].build()
    scheduler = pipe.scheduler
    with cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1):
        assert pipe.scheduler is not scheduler
        assert pipe.scheduler.__dict__ is scheduler.__dict__
        assert pipe.components["scheduler"].config == scheduler.config
        another = pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        generate(pipe, TINY["sd15"].inputs(num_inference_steps=2))
        assert pipe.scheduler is not another
        assert another.num_inference_steps == 2
    assert pipe.scheduler is another


def test_a_view_passes_for_its_class() -> None:
    original = diffusers.FlowMatchEulerDiscreteScheduler()
    view: Any = scheduler_view(original, Coefficients("cuda"))
    kind = type(view)  # a pipeline asks whether it is another class, by !=
    assert (kind == diffusers.FlowMatchEulerDiscreteScheduler) and (diffusers.FlowMatchEulerDiscreteScheduler == kind)
    assert kind != diffusers.DDIMScheduler
    assert {diffusers.FlowMatchEulerDiscreteScheduler: 1}[kind] == 1
