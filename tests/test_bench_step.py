"""The benchmark of a denoising step, on CPUs: its modes, its rows, its workers, and what happens when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_pipeline, bench_step, step_modes

from cfg_parallel.report import Report

pytestmark = pytest.mark.timeout(180)

DRY_RUN = ["--scale", "tiny", "--devices", "cpu,cpu", "--steps", "4"]
KEYS = {"bench", "model", "size", "steps", "mode", "devices", "transport", "ms", "ms_p10", "ms_p90", "speedup"}
KEYS |= {"equal", "equal_to", "leader_forward_ms", "follower_forward_ms", "overhead_ms", "leader_peak_gib"}
KEYS |= {"follower_peak_gib", "gpu", "torch", "diffusers", "date", "dtype", "seed", "repeat", "baseline_ms"}


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    deadline = time.monotonic() + 5
    while left := [child for child in psutil.Process().children(recursive=True) if child.pid not in before]:
        # The tracker of Python's multiprocessing, which lasts as long as the process that started it.
        left = [child for child in left if "resource_tracker" not in " ".join(child.cmdline())]
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def tiny(model: str, modes: str, rows: Path = Path("unused")) -> Any:
    return bench_step.parse(["--worker", str(rows), "--models", model, "--modes", modes, "--repeat", "1", *DRY_RUN])


def step_row(model: str, mode: str, **changes: Any) -> dict[str, Any]:
    """A row as a run of `DRY_RUN` would write it."""
    args = bench_step.parse([*DRY_RUN, "--models", model])
    (name, size), *_ = args.models
    values = {"bench": "step", "transport": None, "devices": "cpu", "ms": 2.0, "speedup": 1.5, "equal": True}
    return values | bench_step.combination(args, name, size, mode) | changes


# The whole command.


def test_dry_run_with_branches_in_turn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every mode that a CPU has, in processes of their own."""
    out, chart = tmp_path / "rows.json", tmp_path / "new" / "step.png"
    arguments = ["--models", "qwen-image", "--repeat", "2", "--out", str(out), "--chart", str(chart), *DRY_RUN]
    status = bench_step.main(arguments)
    printed = capfd.readouterr()
    assert status == 0, printed.out + printed.err
    rows = {row["mode"]: row for row in json.loads(out.read_text())}
    assert list(rows) == ["one-gpu-eager", "two-gpu-eager", "all-gather"]
    for row in rows.values():
        assert set(row) >= KEYS
        assert (row["bench"], row["model"], row["size"], row["repeat"]) == ("step", "qwen-image (tiny)", "64x64", 2)
        assert row["equal"] is True and row["equal_to"] == "one-gpu-eager"
        assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["ms"], rel=1e-2)
    one, two, gathered = rows.values()
    assert (one["speedup"], one["devices"], one["transport"]) == (1.0, "cpu", None)
    assert (two["devices"], two["transport"], two["report"]["calls_shipped"]) == ("cpu,cpu", "host", 4)
    assert two["overhead_ms"] is not None and two["compile_s"] == [0.0, 0.0]
    assert (gathered["devices"], gathered["transport"], gathered["overhead_ms"]) == ("cpu,cpu", "gloo", None)
    for mode in ("one-gpu-graphs", "two-gpu-graphs", "ulysses"):
        assert printed.out.count(f"{mode} is left out: it needs GPUs (qwen-image)") == 1
    assert printed.out.count("| two-gpu-eager |") == 1
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    assert bench_step.main([*arguments, "--resume"]) == 0, "nothing is left to do"
    assert "3 combinations are in" in capfd.readouterr().out
    assert [row["date"] for row in json.loads(out.read_text())] == [row["date"] for row in rows.values()]


def test_worker_with_a_batch_of_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that cannot start and one that fails later cost neither the others nor what is known already."""

    @contextlib.contextmanager
    def fails_later(mode: str, bench: Any) -> Iterator[Any]:
        assert mode == "all-gather"

        def measure(into: Any) -> None:
            raise ValueError("in a round")

        yield measure

    monkeypatch.setattr(bench_step, "in_two_processes", fails_later)
    monkeypatch.setitem(step_modes.MODES, "wrong", step_modes.Mode(enable={"cfg_parallel_size": 3}))
    args = tiny("sd15", "one-gpu-eager,wrong,all-gather,two-gpu-eager", tmp_path / "rows.json")
    assert bench_step.run_worker(args) == 1
    written = json.loads(args.worker.read_text())
    one, two = written["rows"]
    assert (one["mode"], one["speedup"], one["equal"], one["equal_to"]) == ("one-gpu-eager", 1.0, True, "one-gpu-eager")
    assert (two["mode"], two["equal"]) == ("two-gpu-eager", True)
    assert two["equal_to"] == "one-gpu-eager, half-batches in turn"
    assert set(one) >= KEYS and set(two) >= KEYS
    (wrong, why), (later, why_later) = written["failed"]
    assert (wrong, later) == ("wrong", "all-gather")
    assert why.startswith("ConfigurationError: ") and why_later == "ValueError: in a round"


def fake_workers(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> None:
    """Workers that do nothing but run a line of Python, with `rows` the path of their file."""

    def command(args: Any, job: bench_step.Job, rows: Path) -> list[str]:
        return [sys.executable, "-c", f"import json, os, time; rows = {str(rows)!r}; {scripts[job.name]}"]

    monkeypatch.setattr(bench_step, "worker_command", command)


def writes(*rows: dict[str, Any], failed: list[list[str]] | None = None) -> str:
    return f"open(rows, 'w').write(json.dumps(dict(rows={list(rows)!r}, failed={failed or []!r})))"


def test_a_worker_that_crashes_costs_the_exit_status_and_no_rows_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half_done, done = step_row("sdxl", "two-gpu-eager"), step_row("qwen-image", "two-gpu-eager")
    scripts = {
        "sd15": "print('on my way', flush=True); os.kill(os.getpid(), 9)",
        "sdxl": f"{writes(half_done, failed=[['all-gather', 'Error: no']])}; os._exit(1)",
        "flux1-dev": f"{writes()}; time.sleep(60)",
        "qwen-image": writes(done),
    }
    fake_workers(monkeypatch, scripts)
    out = tmp_path / "rows.json"
    arguments = ["--models", ",".join(scripts), "--out", str(out), "--timeout", "3", *DRY_RUN]
    assert bench_step.main(arguments) == 1
    assert json.loads(out.read_text()) == [half_done, done]
    lines = capsys.readouterr().err.splitlines()
    assert "bench_step: sd15: worker: ended with status -9; it last said: on my way" in lines
    assert "bench_step: sdxl: all-gather: Error: no" in lines
    assert any(line.startswith("bench_step: flux1-dev: worker: was stopped after 3 s (--timeout)") for line in lines)
    assert not any("qwen-image" in line for line in lines if line.startswith("bench_step: "))


def test_a_result_that_differs_costs_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = step_row("sd15", "two-gpu-eager", equal=False, differing=0.25, equal_to="one-gpu-eager")
    fine = step_row("sd15", "ulysses", equal=None, why="another order")
    fake_workers(monkeypatch, {"sd15": writes(wrong, fine)})
    assert bench_step.main(["--models", "sd15", *DRY_RUN]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench_step: ")]
    assert lines == ["bench_step: sd15 (tiny) 64x64: two-gpu-eager: 25.00% of the picture differs from one-gpu-eager"]


def test_resume_starts_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    rows = [step_row("sd15", mode) for mode in ("one-gpu-eager", "two-gpu-eager", "all-gather")]
    rows += [step_row("sd15@128", "one-gpu-eager"), step_row("sd15@128", "two-gpu-eager", equal=False)]
    rows += [step_row("sdxl", mode, gpu="another") for mode in ("one-gpu-eager", "two-gpu-eager")]
    rows += [step_row("qwen-image", "two-gpu-eager", steps=5), {"bench": "pipeline", "mode": "two-gpu-eager"}]
    out.write_text(json.dumps(rows))
    arguments = ["--models", "sd15,sd15@128,sdxl,qwen-image", "--modes", "two-gpu-eager", "--out", str(out), *DRY_RUN]
    both = ("one-gpu-eager", "two-gpu-eager")
    assert [(job.name, job.modes) for job in bench_step.plan(bench_step.parse([*arguments, "--resume"]))] == [
        ("sd15@128", ("two-gpu-eager",)),  # it differed
        ("sdxl", both),
        ("qwen-image", both),
    ]
    every_job = bench_step.plan(bench_step.parse(arguments))
    assert [job.modes for job in every_job] == [both] * 4


def test_a_worker_gets_what_the_command_was_given(tmp_path: Path) -> None:
    args = bench_step.parse(
        ["--models", "sd15@128,sdxl", "--seed", "3", "--repeat", "2", "--dtype", "bfloat16", *DRY_RUN]
    )
    job = bench_step.Job("sd15", 128, ("two-gpu-eager",))
    _, script, *arguments = bench_step.worker_command(args, job, tmp_path / "rows.json")
    assert Path(script) == Path(bench_step.__file__).resolve()
    worker = bench_step.parse(arguments)
    assert (worker.model, worker.size, worker.modes) == ("sd15", 128, ["two-gpu-eager"])
    for name in ("steps", "seed", "repeat", "dtype", "scale", "devices", "transport"):
        assert getattr(worker, name) == getattr(args, name)


# The modes.


class TwoThreads:
    """torch.distributed.all_gather for two threads in place of two processes."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.here: dict[str, torch.Tensor] = {}

    def all_gather(self, into: list[torch.Tensor], tensor: torch.Tensor) -> None:
        rank = threading.current_thread().name[-1]
        self.here[rank] = tensor
        self.barrier.wait()
        for i, place in enumerate(into):
            place.copy_(self.here[str(i)])
        self.barrier.wait()


# Batched branches, also with a dictionary of arguments; other schedulers; another way to scale; a video.
@pytest.mark.parametrize("model", ["sd15", "sdxl", "sd35-large", "flux1-dev", "wan21-1.3b"])
def test_all_gather_makes_the_same_picture(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    benches = [bench_pipeline.Bench(tiny(model, "all-gather")) for _ in range(2)]
    reference, _ = bench_pipeline.exact_reference(benches[0])
    calls = [0, 0]

    def generate(rank: int) -> np.ndarray:
        def count(*_: Any) -> None:
            calls[rank] += 1

        bench = benches[rank]
        with step_modes.one_branch(bench, rank):
            blocks = next(child for child in bench.denoiser.children() if list(child.parameters()))
            with contextlib.closing(Removed(blocks.register_forward_hook(count))):
                picture = bench.generate(4)
        assert "forward" not in vars(bench.denoiser)
        return picture

    monkeypatch.setattr(torch.distributed, "all_gather", TwoThreads().all_gather)
    with ThreadPoolExecutor(2, thread_name_prefix="rank") as pool:
        pictures = list(pool.map(generate, range(2)))
    assert all(np.array_equal(picture, reference) for picture in pictures)
    assert calls[0] == calls[1] <= 5, "one forward a step on each side (PNDM makes one step more)"


class Removed:
    """A hook with the `close` that contextlib.closing calls."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self.close = handle.remove


@pytest.mark.parametrize("model", ["sd15", "sdxl", "sd35-large", "flux1-dev", "qwen-image", "wan21-1.3b"])
def test_a_pipeline_is_enabled_beside_the_baseline(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_modes.MODES, "one", step_modes.Mode(enable={"cfg_parallel_size": 1, "cuda_graphs": False}))
    bench = bench_pipeline.Bench(tiny(model, "two-gpu-eager"))
    parts, scheduler = bench.pipe.components, bench.pipe.scheduler
    one, got = bench_pipeline.Measured(), bench_pipeline.Measured()
    with step_modes.enabled("one", bench) as measure:
        for _ in range(2):
            bench.measure("baseline", one)
            measure(got)
    assert np.array_equal(got.pictures, np.stack([one.pictures[0]] * 2))
    assert np.array_equal(one.pictures[0], one.pictures[1])
    assert bench.pipe.components == parts and bench.pipe.scheduler is scheduler
    assert got.extra["follower_forward_ms"] is None
    assert 0 < got.extra["leader_forward_ms"] < statistics.median(got.step_ms) * 2
    assert got.extra["report"]["calls_shipped"] == 0


def test_forwards_of_a_step() -> None:
    """Two calls a step on one device; one on each of two, but for the first step."""
    one = [
        Report([], "host", "", steps=20, calls_local=40, leader_forward_ms=ms, follower_forward_ms=None)
        for ms in (3.0, 4.0, 9.0)
    ]
    assert step_modes.forward_keys(one) == {"leader_forward_ms": 8.0, "follower_forward_ms": None}
    two = Report(
        [], "peer", "", steps=20, calls_local=21, calls_shipped=19, leader_forward_ms=4.0, follower_forward_ms=5.0
    )
    assert step_modes.forward_keys([two]) == {"leader_forward_ms": 4.0, "follower_forward_ms": 5.0}


def test_overhead_is_what_a_step_takes_beside_its_longer_forward() -> None:
    assert step_modes.overhead([10.0, 11.0], [0.0, 0.0, 9.5, 10.0]) == [0.5, 1.0]
    assert step_modes.overhead([10.0, 11.0], []) == []


def test_arguments_of_a_branch_are_those_that_the_first_does_not_get() -> None:
    def call(prompt: float, step: float) -> dict[Any, Any]:
        return {
            0: torch.tensor(step),
            "prompt": torch.tensor(prompt),
            "added": {"text": [torch.tensor(prompt)]},
            "n": 1,
        }

    steps = [[call(1, 5), call(2, 5)], [call(1, 4), call(2, 4)]]
    assert step_modes.branch_arguments(steps, 0) == {}
    assert step_modes.branch_arguments(steps, 1) == {name: steps[0][1][name] for name in ("prompt", "added")}
    with pytest.raises(bench_pipeline.BenchmarkError, match="argument 'prompt' depends on the step"):
        step_modes.branch_arguments([[call(1, 5), call(2, 5)], [call(1, 4), call(3, 4)]], 1)
    with pytest.raises(bench_pipeline.BenchmarkError, match=r"two branches in every step, but got \[3\]"):
        step_modes.branch_arguments([[call(1, 5)] * 3], 1)


def test_sequences_that_two_devices_cannot_share_equally() -> None:
    def odd(tokens: int, text: int) -> bool:
        call = {"hidden_states": torch.empty(1, tokens, 2), "encoder_hidden_states": torch.empty(1, text, 2)}
        return step_modes.odd_lengths([[call | {"timestep": torch.empty(3)}]])

    assert [odd(16, 8), odd(16, 7), odd(15, 8)] == [False, True, True]


def test_a_rank_that_dies_or_fails_is_named() -> None:
    class Process:
        exitcode = -9

        def __init__(self) -> None:
            self.sentinel, self.end = os.pipe()

        def is_alive(self) -> bool:
            return self.end >= 0

        def join(self) -> None:
            pass

        def die(self) -> None:
            os.close(self.end)
            self.end = -1

    pipes = [step_modes.multiprocessing.Pipe() for _ in range(2)]
    processes = [Process(), Process()]
    ranks = [(process, ours) for process, (ours, _) in zip(processes, pipes, strict=True)]
    for _, theirs in pipes:
        theirs.send("ready")
    assert step_modes.answers(ranks) == ["ready", "ready"]
    pipes[1][1].send(bench_pipeline.BenchmarkError("rank 1: RuntimeError: no"))
    with pytest.raises(bench_pipeline.BenchmarkError, match="rank 1: RuntimeError: no"):
        step_modes.answers(ranks)
    processes[0].die()
    with pytest.raises(bench_pipeline.BenchmarkError, match="rank 0 ended with status -9"):
        step_modes.answers(ranks)
    processes[1].die()
    for process in processes:
        os.close(process.sentinel)


def test_modes_that_do_not_fit_beside_others_have_rounds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    up: list[str] = []

    @contextlib.contextmanager
    def opened(mode: str, bench: Any) -> Iterator[Any]:
        up.append(mode)
        yield lambda into: measured.append(mode)
        up.remove(mode)

    def needed(mode: step_modes.Mode) -> list[int]:
        return [mode.size]

    monkeypatch.setattr(bench_step, "free_memory", lambda bench: [3])
    monkeypatch.setattr(bench_step, "enabled", opened)
    monkeypatch.setattr(bench_step, "in_two_processes", opened)
    bench: Any = SimpleNamespace(
        args=SimpleNamespace(repeat=2), leader=torch.device("cpu"), measure=lambda mode, into: measured.append(mode)
    )
    modes = ["one-gpu-graphs", "two-gpu-eager", "two-gpu-graphs", "all-gather"]
    outcome = bench_step.Outcome()
    results, waiting = bench_step.one_group(bench, modes, outcome, needed)
    assert measured == ["one-gpu-eager", "one-gpu-graphs", "two-gpu-eager"] * 2
    assert (list(results), waiting) == (["one-gpu-eager", *modes[:2]], modes[2:])
    results, waiting = bench_step.one_group(bench, waiting, outcome, lambda mode: [4])
    assert (list(results), waiting) == (["one-gpu-eager", "two-gpu-graphs"], ["all-gather"]), "the first always starts"
    assert not up and not outcome.failed


def test_memory_that_a_mode_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 0, 1: 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 100))
    devices = ["cuda:0", "cuda:1"]
    denoiser = torch.nn.Linear(5, 1, bias=False)  # 20 bytes
    bench: Any = SimpleNamespace(
        args=SimpleNamespace(devices=devices), leader=torch.device(devices[0]), denoiser=denoiser
    )

    def needed(mode: str) -> list[int]:
        return bench_step.needed_memory(step_modes.MODES[mode], bench, peak=40, resting=30)

    assert needed("one-gpu-graphs") == [10]
    assert needed("two-gpu-graphs") == [10, 30]
    assert needed("two-gpu-compiled") == [30, 30]
    assert needed("all-gather") == [40, 40]
    free.update({0: 50, 1: 60})
    assert bench_step.free_memory(bench) == [45, 55]
    bench.leader = torch.device("cpu")
    assert needed("all-gather") == bench_step.free_memory(bench) == []


def test_what_cannot_run_is_left_out() -> None:
    gpus = ["cuda:0", "cuda:1"]
    modes = [mode for mode in step_modes.MODES if mode != "ulysses"]
    assert all(bench_step.left_out(mode, "sd15", gpus) is None for mode in modes)
    assert "no context parallel plan for UNet2DConditionModel" in str(bench_step.left_out("ulysses", "sd15", gpus))
    if hasattr(diffusers, "ContextParallelConfig"):
        assert bench_step.left_out("ulysses", "qwen-image", gpus) is None
    assert bench_step.left_out("all-gather", "sd15", ["cpu", "cpu"]) is None


def test_row_of_a_mode_with_other_pictures_says_why() -> None:
    def measured(ms: float, value: float) -> bench_pipeline.Measured:
        picture = np.full((1, 2, 2, 3), value)
        return bench_pipeline.Measured(step_ms=[ms] * 3, total_s=[1.0], pictures=[picture])

    one, got = measured(4.0, 0.5), measured(2.0, 0.75)
    row = bench_step.row(tiny("qwen-image", "ulysses"), "ulysses", got, one, one.pictures[0], "one-gpu-eager")
    assert (row["equal"], row["differing"], row["speedup"], row["baseline_ms"]) == (None, 1.0, 2.0, 4.0)
    assert "sums in another order" in row["why"] and row["overhead_ms"] is None
    got.extra |= {"leader_forward_ms": 1.5, "follower_forward_ms": None, "overhead_ms": 0.5}
    row = bench_step.row(tiny("sd15", "one-gpu-graphs"), "one-gpu-graphs", got, one, one.pictures[0], "one-gpu-eager")
    assert (row["equal"], row["devices"], row["transport"], row["overhead_ms"]) == (False, "cpu", None, 0.5)
    assert row["gpu"] == platform.machine()


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "sd16"], "but got 'sd16'"),
        (["--models", "sd15@big"], "multiple of 16 after sd15@, but got 'big'"),
        (["--models", "sd15@100"], "multiple of 16 after sd15@, but got '100'"),
        (["--modes", "two-gpus"], "but got 'two-gpus'"),
        (["--devices", "cpu"], "expected GPUs"),
        (["--devices", "cpu,cuda:0"], "expected GPUs"),
        (["--devices", "cuda:0,cuda:0"], "expected GPUs"),
        (["--devices", "cuda:97,cuda:98"], "is not there"),
        (["--devices", "gpu0,gpu1"], "'gpu0' is no device"),
        ([*DRY_RUN, "--steps", "2"], "expected at least 3"),
        ([*DRY_RUN, "--repeat", "0"], "--repeat: expected at least 1"),
        ([*DRY_RUN, "--timeout", "0"], "seconds above 0"),
        ([*DRY_RUN, "--resume"], "name the file to go on with in --out"),
        ([*DRY_RUN, "--chart", "step.svg"], "ends in .png"),
        ([*DRY_RUN, "--out", __file__], "is not a list of rows"),
    ],
)
def test_wrong_arguments_end_before_anything_is_started(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_step.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_models_and_modes_are_taken_once_and_the_baseline_always() -> None:
    args = bench_step.parse(["--models", "sd15,sd15@512,sd15", "--modes", "all-gather,all-gather", *DRY_RUN])
    assert args.models == [("sd15", None), ("sd15", 512)]
    assert args.modes == ["one-gpu-eager", "all-gather"]


def test_bench_step_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_step.main(["--help"])
    assert stopped.value.code == 0
    assert "--worker" not in capsys.readouterr().out
