"""Two cases of each kind of fault (`python tests/faults` has hundreds), and what is promised when something fails."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import cfg_parallel
from cfg_parallel import successors
from cfg_parallel.beginning import Beginning
from cfg_parallel.remote import RemoteFollower
from faults.kinds import KINDS
from faults.run import run_case, summarize
from faults.world import LAYER, Outcome, World
from tiny import TINY, generate

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked")]

QWEN = TINY["qwen_image"]
CPUS = {"devices": ["cpu", "cpu"]}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qwen_image", 0),
        ("sd15", 1),
        *(pytest.param(name, part, marks=pytest.mark.thorough) for name in LAYER for part in (0, 1)),
    ],
)
def test_every_kind_of_fault(name: str, part: int, tmp_path: Path) -> None:
    """Each once; those of a pipeline share its followers, as they do in a service."""
    mine = list(KINDS)[part::2]
    world = World(name, "cpu", tmp_path)
    try:
        for seed, kind in enumerate(mine):
            outcome = run_case(world, kind, random.Random(seed))
            assert not outcome.wrong, (kind, seed)
    finally:
        world.close()


def test_a_case_that_went_wrong_is_seen() -> None:
    good = Outcome(returned=True, equal=True, seconds=3.0, one_device=1.0, told=["lost"], generations=1)
    assert not good.wrong and good.late == 2.0
    late = Outcome(returned=True, equal=True, seconds=7.0, one_device=1.0, generations=1)
    loud = Outcome(returned=True, equal=True, told=["lost", "lost again"], generations=1)
    for bad in (
        Outcome(error="no"),
        Outcome(returned=True),
        late,
        loud,
        Outcome(True, True, left_behind=["a process"]),
    ):
        assert len(bad.wrong) == 1
    rows = summarize([("killed", good), ("killed", late), ("stopped", Outcome())], "cpu", "forked")
    assert [(row["kind"], row["cases"], row["returned"], row["equal"]) for row in rows] == [
        ("killed", 2, True, True),
        ("stopped", 1, False, False),
    ]
    assert (rows[0]["worst_seconds"], rows[0]["worst_late"], rows[0]["left_behind"]) == (7.0, 6.0, 0)


@pytest.fixture
def pipe() -> Iterator[Any]:
    pipe = QWEN.build()
    yield pipe
    cfg_parallel.disable_cfg_parallel(pipe)


def process_of(handle: Any) -> Any:
    return handle._leader.remotes[0].process


def kill(handle: Any) -> None:
    process = process_of(handle)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(5)


# on_follower_loss="raise"


@pytest.mark.parametrize("how", ["killed", "stopped", "killed before"])
def test_a_loss_that_is_to_raise(pipe: Any, how: str) -> None:
    handle = cfg_parallel.enable_cfg_parallel(pipe, **CPUS, on_follower_loss="raise", follower_timeout=2)
    expected = generate(QWEN.build(), QWEN.inputs())
    if how == "killed before":  # nothing of the generation is lost: it waits for a new follower
        kill(handle)
        with pytest.warns(UserWarning, match="A new one is started"):
            assert torch.equal(generate(pipe, QWEN.inputs()), expected)
    else:

        def on_step(pipe: Any, step: int, timestep: Any, values: Any) -> dict[str, Any]:
            os.kill(process_of(handle).pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            return {}

        start = time.monotonic()
        with pytest.raises(cfg_parallel.FollowerLostError, match=r"The follower on cpu was lost"):
            generate(pipe, QWEN.inputs(callback_on_step_end=on_step))
        assert time.monotonic() - start < 5
    assert torch.equal(generate(pipe, QWEN.inputs()), expected)
    assert handle.report.parallel_steps == 3


def test_on_follower_loss_is_checked(pipe: Any) -> None:
    with pytest.raises(cfg_parallel.ConfigurationError, match="'recompute' or 'raise', but got 'ignore'"):
        cfg_parallel.enable_cfg_parallel(pipe, **CPUS, on_follower_loss="ignore")  # type: ignore[arg-type]


# New followers


def test_followers_that_do_not_start_are_tried_less_and_less(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    expected = generate(QWEN.build(), QWEN.inputs())
    tried: list[float] = []
    now = [1000.0]

    def start(*args: Any) -> RemoteFollower:
        tried.append(now[0])
        raise cfg_parallel.FollowerLostError("The follower on cpu did not start: no memory.")

    monkeypatch.setattr(successors.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(RemoteFollower, "start", start)
    kill(handle)
    told: list[str] = []
    for _ in range(60):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(generate(pipe, QWEN.inputs(num_inference_steps=2)), expected) or len(tried) > 0
        told += [str(warning.message) for warning in caught]
        now[0] += 1.0
    waits = [after - before for before, after in itertools.pairwise(tried)]
    assert waits == [2.0, 4.0, 8.0, 16.0], "twice as long each time"
    assert len(tried) == successors.MOST_TRIES
    assert sum("did not start: no memory" in text for text in told) == successors.MOST_TRIES
    assert "goes on alone. The next one is started in 2 s at the earliest." in told[1]
    assert "After 5 tries no further one is started: call disable_cfg_parallel and enable it again." in told[-1]
    assert not handle.wait_until_ready(), "at once: nothing is to be waited for"


def test_waiting_goes_on_until_a_follower_starts(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    start, tries = RemoteFollower.start, []

    def fail_once(*args: Any) -> RemoteFollower:
        tries.append(time.monotonic())
        if len(tries) == 1:
            raise cfg_parallel.FollowerLostError("The follower on cpu did not start: no memory.")
        return start(*args)

    monkeypatch.setattr(RemoteFollower, "start", fail_once)
    kill(handle)
    with pytest.warns(UserWarning, match="did not start: no memory. cpu goes on alone. The next one is started in 2 s"):
        assert handle.wait_until_ready(30)
    assert len(tries) == 2 and 1.9 < tries[1] - tries[0] < 4
    assert torch.equal(generate(pipe, QWEN.inputs()), generate(QWEN.build(), QWEN.inputs()))
    assert handle.report.parallel_steps == 3


def test_a_follower_that_comes_up_later_takes_part(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it longer than a generation takes."""
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    generate(pipe, QWEN.inputs())
    up = [False]
    monkeypatch.setattr(RemoteFollower, "is_up", lambda self, patience: up[0])
    kill(handle)
    with pytest.warns(UserWarning, match="A new one is started"):
        generate(pipe, QWEN.inputs())
    assert handle.report.calls_shipped == 0
    assert "did not come up" not in handle.report.why
    assert not handle.wait_until_ready(0.1)
    up[0] = True
    assert handle.wait_until_ready()
    assert torch.equal(generate(pipe, QWEN.inputs()), generate(QWEN.build(), QWEN.inputs()))
    assert handle.report.parallel_steps == 3


@pytest.mark.parametrize("when", ["before", "in a callback"])
def test_weights_that_change_while_no_follower_is_there(pipe: Any, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    plain = QWEN.build()
    monkeypatch.setattr(RemoteFollower, "is_up", lambda self, patience: False)

    def change(pipe: Any, step: int = 0, timestep: Any = None, values: Any = None) -> dict[str, Any]:
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.25)
        return {}

    kill(handle)
    changes: dict[str, Any] = {"callback_on_step_end": change} if when == "in a callback" else {}
    if when == "before":
        for each in (pipe, plain):
            change(each)
    with pytest.warns(UserWarning, match="A new one is started"):
        assert torch.equal(generate(pipe, QWEN.inputs(**changes)), generate(plain, QWEN.inputs(**changes)))
    monkeypatch.undo()
    assert handle.wait_until_ready()
    assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))
    assert handle.report.parallel_steps == 3


def test_disabling_ends_followers_that_are_coming_up(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    monkeypatch.setattr(RemoteFollower, "is_up", lambda self, patience: False)
    kill(handle)
    with pytest.warns(UserWarning, match="A new one is started"):
        generate(pipe, QWEN.inputs())
    (fresh,) = handle._successors._starting.values()
    assert fresh.process.poll() is None
    handle.disable()
    assert fresh.process.poll() is not None


# Beginning again


def test_the_same_random_numbers_again(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise from the user's generator, PyTorch's own, NumPy's and Python's; the callback sees the steps again."""
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    seen: list[tuple[int, float]] = []
    drawn: list[tuple[float, ...]] = []
    inputs = QWEN.inputs(3)

    def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        noise = torch.randn_like(values["latents"]) * 0.1
        drawn.append((float(noise.sum()), np.random.rand(), random.random(), float(torch.rand(1, generator=source))))
        seen.append((step, drawn[-1][0]))
        if lose and step == 1 and len(seen) == 2:
            raise cfg_parallel.FollowerLostError("A prediction may be incomplete.")
        return {"latents": values["latents"] + noise}

    source = inputs["generator"]
    results = []
    for lose in (False, True):
        source.manual_seed(5)
        torch.manual_seed(6)
        seen.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(pipe(**inputs | {"callback_on_step_end": on_step}, return_dict=False)[0])
        assert [str(w.message) for w in caught if "begins again" in str(w.message)] == (
            ["A prediction may be incomplete. The generation begins again on cpu."] if lose else []
        )
    assert torch.equal(*results)
    assert [step for step, _ in seen] == [0, 1, 0, 1, 2]
    assert drawn[-3:-1] == drawn[-5:-3], "the same numbers"
    assert "begins again" in str(handle.report)


def test_random_state() -> None:
    import numpy as np

    generators = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]
    state = Beginning(torch.device("cpu"), ((1, generators[0]), {"generator": [generators[1]]}))

    def draw() -> list[float]:
        return [
            random.random(),
            float(np.random.rand()),
            float(torch.rand(1)),
            *(float(torch.rand(1, generator=each)) for each in generators),
        ]

    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first


def test_a_prediction_that_never_came(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a kernel may have waited for it, so that the values since are garbage."""
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    abort = RemoteFollower._abort

    def with_garbage(self: Any) -> None:
        abort(self)
        self._died = True

    monkeypatch.setattr(RemoteFollower, "_abort", with_garbage)
    steps: list[int] = []

    def on_step(pipe: Any, step: int, timestep: Any, values: Any) -> dict[str, Any]:
        steps.append(step)
        if len(steps) == 2:
            kill(handle)
        return {}

    with pytest.warns(UserWarning, match=r"may be incomplete. The generation begins again on cpu") as told:
        got = generate(pipe, QWEN.inputs(callback_on_step_end=on_step))
    assert torch.equal(got, generate(QWEN.build(), QWEN.inputs()))
    assert steps == [0, 1, 0, 1, 2] and len(told) == 1
    assert handle.wait_until_ready()
    assert torch.equal(generate(pipe, QWEN.inputs()), got)
    assert handle.report.parallel_steps == 3


def test_latents_that_the_pipeline_writes_to(pipe: Any) -> None:
    """As Kandinsky 5 does with the user's."""
    latents = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    before = latents.clone()
    beginning = Beginning(torch.device("cpu"), ((), {"latents": latents}))
    latents.mul_(2.0)
    beginning.restore()
    assert torch.equal(latents, before)


def test_a_loss_while_a_batch_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY["sd15"]
    pipe = tiny.build()
    with cfg_parallel.enable_cfg_parallel(pipe, **CPUS, on_follower_loss="raise") as handle:
        leader: Any = handle._leader  # type: ignore[attr-defined]
        collect = leader._collect
        with monkeypatch.context() as patch, pytest.raises(cfg_parallel.FollowerLostError):
            patch.setattr(leader, "_collect", lambda *args: (kill(handle), collect(*args))[1])
            generate(pipe, tiny.inputs())
        assert handle.wait_until_ready()
        generate(pipe, tiny.inputs())
        generate(pipe, tiny.inputs())
        assert handle.report.parallel_steps == handle.report.steps


def test_whatever_a_start_raises_costs_no_image(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    expected = generate(QWEN.build(), QWEN.inputs())

    def start(*args: Any) -> RemoteFollower:
        raise OSError(24, "Too many open files")

    def on_step(pipe: Any, step: int, timestep: Any, values: Any) -> dict[str, Any]:
        if step == 2:
            kill(handle)
        return {}

    monkeypatch.setattr(RemoteFollower, "start", start)
    with pytest.warns(UserWarning, match="Too many open files.*goes on alone. The next one is started in 2 s"):
        assert torch.equal(generate(pipe, QWEN.inputs(callback_on_step_end=on_step)), expected)
        assert torch.equal(generate(pipe, QWEN.inputs()), expected)


def test_a_follower_that_hangs_while_it_is_sent_much(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a socket holds: the leader would wait in the middle of a message."""
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS, follower_timeout=1)
    generate(pipe, QWEN.inputs())
    changed = QWEN.build()
    for each in (pipe, changed):
        each.transformer.note = "x" * 4_000_000  # a setting, so it is part of the header
    os.kill(process_of(handle).pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.warns(UserWarning, match="was lost"):
        got = generate(pipe, QWEN.inputs())
    assert time.monotonic() - start < 5
    assert torch.equal(got, generate(changed, QWEN.inputs()))


def test_changed_weights_that_a_follower_has_no_memory_for(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    generate(pipe, QWEN.inputs())
    plain = QWEN.build()
    for each in (pipe, plain):
        with torch.no_grad():
            each.transformer.proj_out.weight.mul_(1.25)

    def ship(self: Any, *args: Any) -> None:
        with self._watch():
            raise cfg_parallel.ConfigurationError("The denoiser does not fit on the follower's GPU.")

    monkeypatch.setattr(RemoteFollower, "ship_denoiser", ship)
    with pytest.warns(UserWarning, match="does not fit on the follower's GPU. cpu goes on alone"):
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))


def test_waiting_in_a_callback_changes_no_follower(pipe: Any) -> None:
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    answers: list[bool] = []

    def on_step(pipe: Any, step: int, timestep: Any, values: Any) -> dict[str, Any]:
        if step == 0:
            kill(handle)
        answers.append(handle.wait_until_ready(5))
        return {}

    start = time.monotonic()
    with pytest.warns(UserWarning, match="was lost"):
        generate(pipe, QWEN.inputs(callback_on_step_end=on_step))
    assert answers == [False] * 3 and time.monotonic() - start < 4
    assert handle.wait_until_ready()


def test_a_follower_that_dies_while_it_is_asked_for_the_report(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with cfg_parallel.enable_cfg_parallel(pipe, **CPUS) as handle:
        generate(pipe, QWEN.inputs())
        (remote,) = handle._leader.remotes
        remote.process.kill()
        with monkeypatch.context() as patch:
            patch.setattr(remote, "check", lambda: None)  # it looked alive
            report = handle.report
        assert report.parallel_steps == report.steps > 0 and len(report.lost) == 1
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(QWEN.build(), QWEN.inputs()))


def test_waiting_leaves_others_alone(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    generate(pipe, QWEN.inputs())
    monkeypatch.setattr(RemoteFollower, "is_up", lambda self, patience: False)
    kill(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread = threading.Thread(target=handle.wait_until_ready, args=(6,))
        thread.start()
        time.sleep(0.2)
        start = time.monotonic()
        generate(pipe, QWEN.inputs())
        assert time.monotonic() - start < 3
        handle.disable()
    thread.join(1)
    assert not thread.is_alive(), "nothing is waited for when it is disabled"
    assert not handle.wait_until_ready()
    assert not handle._successors._starting


# Processes and threads


def test_a_forked_child_is_told(pipe: Any) -> None:
    cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    expected = generate(pipe, QWEN.inputs())
    answers = multiprocessing.get_context("fork").SimpleQueue()

    def child() -> None:
        try:
            pipe(**QWEN.inputs())
        except cfg_parallel.ConfigurationError as error:
            answers.put(str(error))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and not answers.empty()
    assert "was enabled in process" in (told := answers.get()) and "\n" not in told
    assert torch.equal(generate(pipe, QWEN.inputs()), expected), "the parent's follower is as it was"


def test_threads_while_followers_are_killed(pipe: Any) -> None:
    handle: Any = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
    plain = QWEN.build()
    expected = [plain(**QWEN.inputs(seed), return_dict=False)[0] for seed in range(12)]
    results: dict[int, torch.Tensor] = {}

    def work(first: int) -> None:
        for seed in range(first, 12, 3):
            results[seed] = pipe(**QWEN.inputs(seed), return_dict=False)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            time.sleep(0.15)
            process = process_of(handle)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(60)
    assert len(results) == 12 and all(torch.equal(results[seed], expected[seed]) for seed in range(12))


def test_nothing_is_left_of_many_pipelines() -> None:
    me = psutil.Process()
    before = len(me.children(recursive=True)), me.num_fds()
    for _ in range(4):
        pipe = QWEN.build()
        handle = cfg_parallel.enable_cfg_parallel(pipe, **CPUS)
        generate(pipe, QWEN.inputs())
        handle.disable()
        del pipe, handle
    assert len(me.children(recursive=True)) == before[0]
    assert me.num_fds() <= before[1] + 2
