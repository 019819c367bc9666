"""A call's rows, its parts, which device gets which call, and whether a call can be run again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg_parallel.calls import Call, Denoiser, deal
from cfg_parallel.codec import Rows, UnshippableError

CPU = torch.device("cpu")


@dataclasses.dataclass
class Residuals:
    down: list[torch.Tensor]
    mid: torch.Tensor


class Recorder(torch.nn.Module):
    """Gives back what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs, torch.is_autocast_enabled("cpu"), list(self.entered)

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        self.entered.append((name, kwargs))
        yield
        self.entered.pop()


def call(*args: Any, **kwargs: Any) -> Call:
    return Call.of(Denoiser("d", Recorder()), args, kwargs, CPU)


def rows_of(part: Call) -> Any:
    args, kwargs, *_ = part.run(CPU)
    return args, kwargs


def test_rows_prefers_the_main_input() -> None:
    for name in ("hidden_states", "sample", "x", "latents"):
        assert call(other=torch.zeros(7, 2), **{name: torch.zeros(4, 2)}).rows() == 4
    assert call(torch.zeros(6, 2), torch.zeros(3)).rows() == 6
    assert call(torch.tensor(1.0), [torch.zeros(5, 1)]).rows() == 5
    assert call(torch.tensor(1.0), t=3).rows() == 0
    assert call().rows() == 0
    assert call(hidden_states=torch.tensor(1.0)).rows() == 0
    assert call(hidden_states=None, other=torch.zeros(2)).rows() == 2


@settings(deadline=None, max_examples=80)
@given(branches=st.integers(1, 4), size=st.integers(1, 3), seed=st.integers(0, 99))
def test_parts_are_the_rows(branches: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows = branches * size
    sample, text, other = torch.randn(rows, 3, 2), torch.randn(rows, 5), torch.randn(rows + 1, 2)
    timestep = torch.tensor(3.0)
    whole = call(
        sample,
        timestep,
        encoder_hidden_states=text,
        added={"time_ids": text[:, :2], "text": [text, (other, None)], "scale": 0.5},
        residuals=Residuals([text, sample.float()], sample),
        return_dict=False,
    )
    parts = whole.split(branches)
    assert len(parts) == branches
    results = [rows_of(part) for part in parts]
    for i, (args, kwargs) in enumerate(results):
        group = slice(i * size, (i + 1) * size)
        assert torch.equal(args[0], sample[group]) and args[1] is timestep
        assert torch.equal(kwargs["encoder_hidden_states"], text[group])
        assert torch.equal(kwargs["added"]["time_ids"], text[group, :2])
        assert torch.equal(kwargs["added"]["text"][0], text[group])
        assert kwargs["added"]["text"][1] == (other, None) and kwargs["added"]["text"][1][0] is other
        assert type(kwargs["residuals"]) is Residuals
        assert torch.equal(kwargs["residuals"].mid, sample[group])
        assert [torch.equal(r, e[group]) for r, e in zip(kwargs["residuals"].down, (text, sample), strict=True)]
        assert kwargs["return_dict"] is False and kwargs["added"]["scale"] == 0.5
    joined = torch.cat([args[0] for args, _ in results])
    assert torch.equal(joined, sample)


def test_parts_are_views_and_the_whole_is_untouched() -> None:
    sample = torch.randn(4, 2)
    whole = call(sample, extra=[sample])
    first, second = whole.split(2)
    assert whole.args[0] is sample and whole.kwargs["extra"][0] is sample and not whole.is_part
    assert rows_of(second)[0][0].data_ptr() == sample[2:].data_ptr()
    assert first.is_part and first.args[0] == Rows(sample, 0, 2)
    assert first.args[0].base is sample


def test_a_part_has_the_signature_of_a_call_with_its_rows() -> None:
    sample = torch.randn(4, 2)
    assert call(sample, t=1).split(2)[1].signature() == call(sample[:2], t=1).signature()
    assert call(sample, t=1).signature() != call(sample[:2], t=1).signature()


def test_a_part_remembers_the_versions_of_the_whole() -> None:
    sample, text = torch.randn(4, 2), torch.randn(4, 3)
    parts = call(sample, text=text).split(2)
    assert all(part.unchanged() for part in parts)
    text[3].zero_()  # a row of the other part: run again all the same
    assert not any(part.unchanged() for part in parts)


@pytest.mark.parametrize("branches", [2, 3])
def test_rows_that_do_not_divide_are_refused(branches: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of {branches} rows, but got 5"):
        call(torch.zeros(5, 1)).split(branches)


# Can it be run again?


def test_unchanged() -> None:
    sample, text = torch.randn(2, 2), torch.randn(2, 2)
    one = call(sample, [text], mask=None)
    assert one.unchanged()
    sample.add(1)
    assert one.unchanged()
    text.view(-1)[0] = 1
    assert not one.unchanged()
    assert call(sample, [text]).unchanged()


@pytest.mark.parametrize("write", ["add_", "setitem", "view", "out", "nested", "dataclass"])
def test_changed(write: str) -> None:
    sample = torch.randn(4, 4)
    one = {
        "nested": lambda: call(a={"b": [(sample,)]}),
        "dataclass": lambda: call(a=Residuals([sample], torch.ones(1))),
    }.get(write, lambda: call(sample))()
    if write == "setitem":
        sample[0, 0] = 0
    elif write == "view":
        sample.t()[1].mul_(2)
    elif write == "out":
        torch.zeros(4, 4, out=sample)
    else:
        sample.add_(1)
    assert not one.unchanged()


def test_changed_under_inference_mode() -> None:
    """Such tensors have no version, so that a write goes unseen: what is run again must be what was called."""
    with torch.inference_mode():
        sample = torch.randn(2, 2)
        before = sample.clone()
        one = call(sample)
        sample.add_(1)
        assert not one.unchanged() or torch.equal(rows_of(one)[0][0], before)


# Running.


def test_run_enters_the_context_that_the_pipeline_has_left() -> None:
    recorder = Recorder()
    denoiser = Denoiser("d", recorder, context=("cond", {"a": 1}))
    one = Call.of(denoiser, (torch.ones(1),), {}, CPU)
    with recorder.cache_context("cond", a=1):
        assert one.run(CPU)[3] == [("cond", {"a": 1})]  # still inside: not entered twice
    denoiser.context = None
    assert one.run(CPU)[3] == [("cond", {"a": 1})]
    denoiser.context = ("uncond", {})
    assert one.run(CPU)[3] == [("cond", {"a": 1})]
    assert recorder.entered == []


def test_context_is_left_when_the_denoiser_raises() -> None:
    recorder = Recorder()
    one = Call.of(Denoiser("d", recorder, context=("cond", {})), (torch.ones(1),), {}, CPU)
    one.denoiser.context = None
    recorder.forward = lambda *args: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        one.run(CPU)


@pytest.mark.parametrize("made", [None, torch.bfloat16])
@pytest.mark.parametrize("now", [False, True])
def test_run_has_the_autocast_of_the_call(made: torch.dtype | None, now: bool) -> None:
    """A call is run again long after the pipeline made it: when its value is needed."""
    with torch.autocast("cpu", torch.bfloat16, enabled=made is not None):
        one = Call.of(Denoiser("d", torch.nn.Linear(2, 2)), (torch.ones(1, 2),), {}, CPU)
        expected = one.run(CPU)
    with torch.autocast("cpu", torch.float16 if now else torch.bfloat16, enabled=now):
        assert one.run(CPU).dtype == expected.dtype


def test_signature_has_everything_that_sets_the_output() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(x)
    signatures = {
        "plain": call(x).signature(),
        "autocast": cast.signature(),
        "context": Call.of(Denoiser("d", Recorder(), ("cond", {})), (x,), {}, CPU).signature(),
        "name": Call.of(Denoiser("e", Recorder()), (x,), {}, CPU).signature(),
        "shape": call(x[:1]).signature(),
        "dtype": call(x.half()).signature(),
        "keyword": call(x=x).signature(),
        "flag": call(x, return_dict=False).signature(),
        "flag 2": call(x, return_dict=True).signature(),
    }
    assert len(set(signatures.values())) == len(signatures)
    assert call(x * 2).signature() == signatures["plain"]
    assert call(x, scale=1.0).signature() == call(x, scale=2.0).signature()


# Dealing.


@settings(deadline=None, max_examples=300)
@given(branches=st.integers(1, 40), devices=st.integers(1, 10))
def test_deal(branches: int, devices: int) -> None:
    own, followers = deal(branches, devices)
    assert own >= 1 and own + len(followers) == branches  # every call, and the last on the leader
    assert all(0 <= f < devices - 1 for f in followers)
    loads = [own] + [followers.count(f) for f in range(devices - 1)]
    assert max(loads) == -(-branches // devices)  # as soon done as can be
    assert own == min(loads) or min(loads) == 0  # the leader has the scheduler to run besides
    used = sorted(loads[1:], reverse=True)
    assert loads[1:] == used and used[:1] >= used[-1:] and (not used or used[0] - used[-1] <= 1)


def test_deal_examples() -> None:
    assert deal(1, 2) == (1, [])
    assert deal(2, 1) == (2, [])
    assert deal(2, 2) == (1, [0])
    assert deal(3, 2) == (1, [0, 0])
    assert deal(4, 2) == (2, [0, 0])
    assert deal(3, 3) == (1, [0, 1])
    assert deal(2, 8) == (1, [0])


def test_a_list_that_the_denoiser_empties_is_there_for_the_next_run() -> None:
    def forward(sample: torch.Tensor, residuals: list[torch.Tensor]) -> torch.Tensor:
        while residuals:
            sample = sample + residuals.pop(0)
        return sample

    given = [torch.ones(4, 2), torch.full((4, 2), 2.0)]
    call = Call.of(Denoiser("unet", forward), (torch.zeros(4, 2),), {"residuals": given}, CPU)  # type: ignore[arg-type]
    parts = call.split(2)
    assert torch.equal(call.run(CPU, as_given=True), torch.full((4, 2), 3.0))
    assert given == []  # as without cfg-parallel
    for _ in range(2):
        assert torch.equal(call.run(CPU), torch.full((4, 2), 3.0))
        assert torch.equal(torch.cat([part.run(CPU) for part in parts]), torch.full((4, 2), 3.0))


def test_what_a_denoiser_keeps_in_an_argument_is_not_lost() -> None:
    def forward(sample: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        cache["last"] = sample + 1
        return cache["last"]

    cache: dict[str, torch.Tensor] = {}
    call = Call.of(Denoiser("unet", forward), (torch.zeros(4, 2),), {"cache": cache}, CPU)  # type: ignore[arg-type]
    call.run(CPU, as_given=True)
    assert torch.equal(cache["last"], torch.ones(4, 2))
    for again in (call, *call.split(2)):
        with pytest.raises(UnshippableError, match="keeps something in one of its arguments"):
            again.run(CPU)


def test_what_has_several_rows_for_one_of_the_batch() -> None:
    sample, prompts, table = torch.randn(2, 3), torch.randn(8, 5), torch.randn(7, 5)
    one = call(sample, prompts, table=table)
    assert one.manners() == ["rows", "multiples"]
    first, second = one.split(2, "multiples")
    assert torch.equal(rows_of(first)[0][1], prompts[:4]) and torch.equal(rows_of(second)[0][1], prompts[4:])
    assert all(part.kwargs["table"] is table for part in (first, second))
    assert one.split(2)[0].args[1] is prompts


def test_rows_on_dimension_one() -> None:
    sample, states = torch.randn(2, 3), torch.randn(5, 2, 4)
    one = call(sample, states)
    assert one.manners() == ["rows", "dim 1"]
    assert torch.equal(rows_of(one.split(2, "dim 1")[1])[0][1], states[:, 1:])
    assert call(sample).manners() == ["rows"]
