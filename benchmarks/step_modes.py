"""The ways to run the two passes of guidance that bench_step.py times: enabled pipelines, and pairs of processes with
torch.distributed, as other projects have them."""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import multiprocessing
import os
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import diffusers
import torch
import torch.distributed
from benchmarks import bench_pipeline, models
from benchmarks.bench_pipeline import SKIPPED_STEPS, WARMUP_STEPS, Bench, BenchmarkError, Measured, StepClock

RECORDED_STEPS = 2

Round = Callable[[Measured], None]  # measures a mode once more


@dataclass(frozen=True)
class Mode:
    """One way to run the passes: an enabled pipeline (`enable`), or a pair of processes (`prepare`)."""

    enable: dict[str, Any] | None = None  # arguments of enable_cfg_parallel
    prepare: Callable[[Bench, int], contextlib.AbstractContextManager[dict[str, Any]]] | None = None
    gpu_only: bool = False
    own_denoiser: bool = False  # a copy, as what is done to it would be done to the baseline's
    unequal_because: str | None = None  # of a mode whose pictures cannot be those of the reference

    @property
    def size(self) -> int:
        return 2 if self.enable is None else self.enable["cfg_parallel_size"]


# The processes of `all-gather` and `ulysses`.


class Recorder(StepClock):
    """A clock that keeps the arguments of every call of the denoiser, in a list for each step."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.steps: list[list[dict[Any, Any]]] = [[]]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.steps.append([])
        return {}


def record(bench: Bench) -> list[list[dict[Any, Any]]]:
    """The denoiser's arguments in a short generation, by position or name. The halves of a batch are two calls."""
    recorder = Recorder(bench.leader)
    denoiser = bench.denoiser
    plain = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        recorder.steps[-1].append(copy.deepcopy(dict(enumerate(args)) | kwargs))
        return plain(*args, **kwargs)

    denoiser.forward = forward  # type: ignore[method-assign]
    with bench_pipeline.half_batches(denoiser):  # takes `forward` off when it ends
        bench.generate(RECORDED_STEPS, recorder)
    return [step for step in recorder.steps if step]


def same(a: Any, b: Any) -> bool:
    """Equal, with every element of every tensor inside."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return both and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def branch_arguments(steps: list[list[dict[Any, Any]]], branch: int) -> dict[Any, Any]:
    """What the calls of `branch` get that those of the first branch do not, such as its prompt. It never changes."""
    if {len(step) for step in steps} != {2}:
        raise BenchmarkError(f"Expected two branches in every step, but got {[len(step) for step in steps]} calls.")
    first, mine = steps[0][0], steps[0][branch]
    own = {name: value for name, value in mine.items() if name not in first or not same(value, first[name])}
    for name, value in own.items():
        if name not in first or any(not same(value, step[branch][name]) for step in steps):
            raise BenchmarkError(f"Branch {branch} cannot be run ahead: its argument {name!r} depends on the step.")
    return own


@contextlib.contextmanager
def one_branch(bench: Bench, rank: int) -> Iterator[dict[str, Any]]:
    """`all-gather`: each process runs one branch of a step, and gets the other's prediction.

    A pipeline asks for one branch after the other. The first call runs this process's branch, with the latents and the
    timestep of the call, and gathers; the second finds its prediction there.
    """
    denoiser = bench.denoiser
    mine = branch_arguments(record(bench), rank)
    plain = denoiser.forward
    waiting: list[torch.Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not waiting:
            call = dict(enumerate(args)) | kwargs | mine
            by_position = [call.pop(i) for i in range(len(args))]
            prediction = plain(*by_position, **call)[0].contiguous()
            waiting.extend(torch.empty_like(prediction) for _ in range(2))
            torch.distributed.all_gather(list(waiting), prediction)
        return (waiting.pop(0),)

    denoiser.forward = forward  # type: ignore[method-assign]
    with bench_pipeline.half_batches(denoiser):
        yield {}


def odd_lengths(steps: list[list[dict[Any, Any]]]) -> bool:
    """Whether a sequence of picture or text tokens cannot be shared equally by two devices."""
    named = [call[name] for step in steps for call in step for name in call if str(name).endswith("hidden_states")]
    return any(isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] % 2 for value in named)


@contextlib.contextmanager
def half_sequences(bench: Bench, rank: int) -> Iterator[dict[str, Any]]:
    """`ulysses`: both processes run every forward, each on half of the tokens and, in attention, half of the heads."""
    anything = odd_lengths(record(bench))
    mesh = torch.distributed.device_mesh.init_device_mesh(
        bench.leader.type, (1, 2), mesh_dim_names=("ring", "ulysses")
    )  # diffusers' own takes the devices in the order of their indices
    config = diffusers.ContextParallelConfig(ulysses_degree=2, ulysses_anything=anything, mesh=mesh)
    denoiser: Any = bench.denoiser
    denoiser.enable_parallelism(config=config)
    yield {"ulysses_anything": anything}


MODES: dict[str, Mode] = {
    "one-gpu-graphs": Mode(enable={"cfg_parallel_size": 1, "cuda_graphs": True}, gpu_only=True),
    "two-gpu-eager": Mode(enable={"cfg_parallel_size": 2, "cuda_graphs": False}),
    "two-gpu-graphs": Mode(enable={"cfg_parallel_size": 2, "cuda_graphs": True}, gpu_only=True),
    "two-gpu-compiled": Mode(
        enable={"cfg_parallel_size": 2, "cuda_graphs": True, "compile": True},
        own_denoiser=True,
        gpu_only=True,
        unequal_because="compiled kernels round in their own way",
    ),
    "all-gather": Mode(prepare=one_branch),
    "ulysses": Mode(
        prepare=half_sequences, gpu_only=True, unequal_because="half of the heads at a time: sums in another order"
    ),
}


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def serve(mode: str, rank: int, args: argparse.Namespace, rendezvous: str, worker: Connection) -> None:
    """One of the two processes of a mode: prepares its pipeline, then measures whenever the worker says so.

    Ends when the worker does. A failure is sent in one line.
    """
    device = torch.device(args.devices[rank])
    prepare = MODES[mode].prepare
    assert prepare is not None
    try:
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may lead nowhere
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=2,
            timeout=datetime.timedelta(minutes=10),
            device_id=device if on_gpu else None,
        )
        bench = Bench(argparse.Namespace(**vars(args) | {"devices": [args.devices[rank]]}))
        with prepare(bench, rank) as extra:
            bench.generate(WARMUP_STEPS)
            worker.send(extra)
            while worker.recv():
                measured = Measured()
                bench.measure(f"{mode}, rank {rank}", measured)
                if rank > 0:
                    measured.pictures.clear()  # the first rank's are compared
                worker.send(measured)
        torch.distributed.destroy_process_group()
    except EOFError:  # the worker has closed the mode, or is gone
        return
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):  # the other rank's failure has ended the mode already
            worker.send(BenchmarkError(f"rank {rank}: {one_line(error)}"))


def answers(ranks: Sequence[tuple[Any, Connection]]) -> list[Any]:
    """The next message of every rank. The first failure ends the wait, as the others would wait for that rank."""
    got: dict[int, Any] = {}
    while len(got) < len(ranks):
        open_ranks = {rank: pair for rank, pair in enumerate(ranks) if rank not in got}
        wait([handle for process, connection in open_ranks.values() for handle in (connection, process.sentinel)])
        for rank, (process, connection) in open_ranks.items():
            if not connection.poll():
                if process.is_alive():
                    continue
                raise BenchmarkError(f"rank {rank} ended with status {process.exitcode}")
            try:
                got[rank] = connection.recv()
            except EOFError:
                process.join()
                raise BenchmarkError(f"rank {rank} ended with status {process.exitcode}") from None
            if isinstance(got[rank], BenchmarkError):
                raise got[rank]
    return [got[rank] for rank in range(len(ranks))]


@contextlib.contextmanager
def in_two_processes(mode: str, bench: Bench) -> Iterator[Round]:
    """A mode with `prepare`: a process for each device, which lasts until the context ends."""
    args = bench.args
    context = multiprocessing.get_context("spawn")
    ranks: list[tuple[Any, Connection]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(2):
                ours, theirs = context.Pipe()
                rendezvous = f"file://{folder}/rendezvous"
                process = context.Process(target=serve, args=(mode, rank, args, rendezvous, theirs), daemon=True)
                process.start()
                theirs.close()
                ranks.append((process, ours))
            extra = answers(ranks)[0] | {"transport": "gloo" if bench.leader.type == "cpu" else "nccl"}

            def measure(into: Measured) -> None:
                for _, connection in ranks:
                    connection.send(True)
                leader, follower = answers(ranks)
                into.step_ms += leader.step_ms
                into.total_s += leader.total_s
                into.stages_s += leader.stages_s
                into.pictures += leader.pictures
                into.extra |= extra
                if leader.peak_gib is not None:
                    into.peak_gib = max(into.peak_gib or 0.0, leader.peak_gib)
                    into.extra["follower_peak_gib"] = round(follower.peak_gib, 2)

            yield measure
        finally:
            for _, connection in ranks:
                with contextlib.suppress(OSError):  # it has ended
                    connection.send(False)
            for process, connection in ranks:
                process.join(5)  # it ends by itself unless it waits for the other
                connection.close()
                process.kill()
                process.join()


# Enabled pipelines.


def twin(pipe: Any, model: str, own_denoiser: bool = False) -> Any:
    """Another pipeline object with the same modules and a scheduler of its own: enabling it leaves `pipe` alone."""
    spec = models.spec(model)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    parts = pipe.components | spec.pipeline_kwargs | {"scheduler": scheduler}
    if own_denoiser:
        parts[spec.denoiser_attribute] = copy.deepcopy(parts[spec.denoiser_attribute])
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    return other


@contextlib.contextmanager
def enabled(mode: str, bench: Bench) -> Iterator[Round]:
    """A mode with `enable`: a pipeline that stays enabled until the context ends."""
    import cfg_parallel
    from cfg_parallel.launch import finish_compiling

    settings = MODES[mode].enable
    assert settings is not None
    mine = copy.copy(bench)
    mine.pipe = twin(bench.pipe, bench.args.model, MODES[mode].own_denoiser)
    devices = bench.args.devices[: MODES[mode].size]
    transport = bench.args.transport if len(devices) > 1 else "auto"
    with cfg_parallel.enable_cfg_parallel(mine.pipe, devices=devices, transport=transport, **settings) as handle:
        bench_pipeline.say(f"{mode}: enabled")
        compile_s = [0.0, 0.0]
        for _ in range(3):  # kernels of guidance: one that is compared, then one that waits for the prediction
            mine.generate(WARMUP_STEPS)
            finish_compiling()
            spent = handle.report.compile_seconds, handle.report.follower_compile_seconds
            compile_s = [round(before + more, 1) for before, more in zip(compile_s, spent, strict=True)]
        bench_pipeline.say(f"{mode}: warm, compiled in {compile_s} s")
        reports: list[Any] = []
        overheads: list[float] = []

        def measure(into: Measured) -> None:
            before = len(into.step_ms)
            mine.measure(mode, into)
            reports.append(handle.report)
            overheads.extend(overhead(into.step_ms[before:], handle.report.step_forward_ms))
            into.extra |= forward_keys(reports) | {"report": handle.report.to_dict(), "compile_s": compile_s}
            into.extra["overhead_ms"] = round(statistics.median(overheads), 3) if overheads else None

        yield measure


def overhead(step_ms: list[float], step_forward_ms: list[float]) -> list[float]:
    """What each step takes beside the forwards of the device that was busy longest. Empty where they are not known."""
    forwards = step_forward_ms[SKIPPED_STEPS:]
    return [step - forward for step, forward in zip(step_ms, forwards, strict=True)] if forwards else []


def forward_keys(reports: list[Any]) -> dict[str, Any]:
    """The forwards of a step on each side, in milliseconds: medians of the rounds."""

    def of_a_step(side: str, calls: str) -> float | None:
        # The first step of the first generation may have run its calls elsewhere, hence the rounding.
        values = [
            getattr(report, f"{side}_forward_ms") * max(1, round(getattr(report, calls) / report.steps))
            for report in reports
            if getattr(report, f"{side}_forward_ms") is not None
        ]
        return round(statistics.median(values), 3) if values else None

    return {
        "leader_forward_ms": of_a_step("leader", "calls_local"),
        "follower_forward_ms": of_a_step("follower", "calls_shipped"),
    }
