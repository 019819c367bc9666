"""Followers that start while the pipeline is loaded."""

from __future__ import annotations

import os
import pydoc
import signal
from collections.abc import Iterator
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from cfg_parallel import ConfigurationError, DiffusionParallelConfig, Omni, enable_cfg_parallel, omni
from cfg_parallel.early import followers_coming
from cfg_parallel.preflight import model_modules, read_model_index
from cfg_parallel.remote import RemoteFollower
from tiny import TINY, generate

pytestmark = pytest.mark.timeout(120)

QWEN = TINY["qwen_image"]
CPUS = ["cpu", "cpu"]
TWO = {"parallel_config": DiffusionParallelConfig(cfg_parallel_size=2), "devices": CPUS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    QWEN.build().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def started(forked: None) -> Iterator[list[RemoteFollower]]:
    """Every follower of this test; none of them outlives it."""
    yield from noted_starts()


def noted_starts() -> Iterator[list[RemoteFollower]]:
    start = RemoteFollower.start
    all_of_them: list[RemoteFollower] = []

    def noted(*args: Any) -> RemoteFollower:
        all_of_them.append(start(*args))
        return all_of_them[-1]

    with mock.patch.object(RemoteFollower, "start", staticmethod(noted)):
        yield all_of_them
    for follower in all_of_them:
        process = follower.process
        assert process is not None
        assert not psutil.pid_exists(process.pid) or psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE


def test_enable_takes_the_one_that_is_coming(started: list[RemoteFollower]) -> None:
    pipe = QWEN.build()
    expected = generate(pipe, QWEN.inputs())
    with followers_coming(CPUS, ["decimal", "no_such_module"]), enable_cfg_parallel(pipe) as handle:
        assert handle._leader.remotes == started  # type: ignore[attr-defined]
        assert torch.equal(generate(pipe, QWEN.inputs()), expected)
        assert handle.report.parallel_steps == 3
    with enable_cfg_parallel(pipe):
        assert len(started) == 2


def test_what_nobody_takes_is_ended(started: list[RemoteFollower]) -> None:
    with pytest.raises(KeyError), followers_coming(CPUS * 2, []):
        raise KeyError
    assert len(started) == 3


def test_one_that_died_is_not_taken(started: list[RemoteFollower]) -> None:
    pipe = QWEN.build()
    with followers_coming(CPUS, []):
        (first,) = started
        assert first.process is not None
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait(5)
        with enable_cfg_parallel(pipe) as handle:
            generate(pipe, QWEN.inputs())
            assert handle.report.parallel_steps == 3
    assert len(started) == 2


def test_an_engine_starts_them_before_it_loads(
    folder: str, started: list[RemoteFollower], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = omni.load_pipeline
    before: list[int] = []
    monkeypatch.setattr(omni, "load_pipeline", lambda *args: before.append(len(started)) or load(*args))
    with Omni(folder, **TWO) as engine:
        (output,) = engine.generate({"prompt": "a cat", "negative_prompt": "blurry"})
        assert output.metrics["parallel_steps"] > 0
    assert before == [1] and len(started) == 1


def test_a_model_that_does_not_load_leaves_none(
    folder: str, started: list[RemoteFollower], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise ConfigurationError("on purpose")

    monkeypatch.setattr(omni, "load_pipeline", fail)
    with pytest.raises(ConfigurationError, match="on purpose"):
        Omni(folder, **TWO)
    assert len(started) == 1


def test_modules_of_a_model(folder: str) -> None:
    index = read_model_index(folder)
    assert index is not None
    found = model_modules(index)
    assert QWEN.build().transformer.__class__.__module__ in found
    assert all(name.startswith("diffusers.") for name in found), found


def test_a_scheduler_that_cannot_be_imported_is_no_concern_of_theirs(folder: str) -> None:
    """diffusers has a class in its place that raises at a touch."""
    index = read_model_index(folder)
    assert index is not None
    assert model_modules(index | {"scheduler": ["diffusers", "CosineDPMSolverMultistepScheduler"]})
    dummy = "diffusers.utils.dummy_torch_and_torchsde_objects.DPMSolverSDEScheduler"
    with mock.patch("diffusers.DPMSolverSDEScheduler", pydoc.locate(dummy)):
        assert model_modules(index | {"scheduler": ["diffusers", "DPMSolverSDEScheduler"]}) == model_modules(index)


@pytest.fixture
def really_started() -> Iterator[list[RemoteFollower]]:
    yield from noted_starts()


def test_the_real_thing(folder: str, really_started: list[RemoteFollower]) -> None:
    """A process of its own, which waits for a leader that loads."""
    with Omni(folder, **TWO) as engine:
        (follower,) = really_started
        assert follower.process is not None
        assert psutil.Process(follower.process.pid).cmdline()[1:3] == ["-m", "cfg_parallel.follower"]
        (output,) = engine.generate({"prompt": "a cat", "negative_prompt": "blurry"})
        assert output.metrics["parallel_steps"] == output.metrics["steps"]
