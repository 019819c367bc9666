"""Milliseconds of a denoising step: models x sizes x ways to run the two passes of guidance, in one command.

    python benchmarks/bench_step.py --models sd15,sdxl,sd35-large,qwen-image@512,qwen-image@1024 --repeat 3 \\
        --out benchmarks/results/step.json --chart benchmarks/results/step.png

Modes:

    one-gpu-eager    plain diffusers, always measured: the baseline of `speedup`
    one-gpu-graphs   enable_cfg_parallel on one device, with CUDA graphs
    two-gpu-eager    enable_cfg_parallel on two devices, without CUDA graphs
    two-gpu-graphs   the same with CUDA graphs
    two-gpu-compiled the same with CUDA graphs and compile=True, on a denoiser of its own
    all-gather       two processes with torch.distributed, as other projects do it: each has a denoiser of its own and
                     runs one branch of every step; then all_gather, eager guidance and scheduler step on both
    ulysses          diffusers' own sequence parallelism over the same devices: both branches on both

A step is timed as in bench_pipeline.py, in every mode: between two `callback_on_step_end` of a generation, on the first
device, without waiting. The processes of `all-gather` and `ulysses` run the same pipeline as the baseline, so what it
does between two forwards is in every row, and their pictures can be compared as well.

What is interleaved: each model and size has a process of its own, and every round in it measures the baseline and then
each mode once. Modes start side by side and stay up between the rounds: pipeline objects that share the denoiser on
the first device, with a follower each, and pairs of processes. Modes that do not fit into memory beside the ones before
come afterwards, in rounds of their own with the baseline. Peaks of the first device are those of the process, so they
hold the graphs of the other modes of the same rounds too. Models and sizes are not interleaved.

    python benchmarks/bench_step.py --models sd15,qwen-image --scale tiny --devices cpu,cpu --steps 4     # dry run

Exit status: 0, 1 if something failed or a picture differed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed
from tqdm import tqdm  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_pipeline, folder_models, models
from benchmarks.bench_pipeline import ONE_GPU, SKIPPED_STEPS, Bench, Measured
from benchmarks.results_file import markdown_table, merge_rows
from benchmarks.step_modes import MODES, Mode, Round, enabled, in_two_processes, one_line
from benchmarks.timing import some_of

COLUMNS: tuple[str, ...] = ("model", "size", "steps", "mode", "transport", "devices", "ms", "ms_p10", "ms_p90")
COLUMNS += ("speedup", "leader_forward_ms", "follower_forward_ms", "overhead_ms", "equal")
SAME = ("model", "size", "steps", "mode", "gpu", "dtype")  # what --resume compares
PROGRESS = "progress: "  # a line of a worker that only moves the bar


# One model and size: the worker.


def needed_memory(mode: Mode, bench: Bench, peak: int, resting: int) -> list[int]:
    """Bytes of each GPU that `mode` needs beside the baseline, whose own are `peak` and `resting`."""
    if bench.leader.type != "cuda":
        return []
    if mode.prepare is not None:
        return [peak, peak]
    forward = peak - resting  # more than that, as it holds the VAE's memory too
    weights = sum(parameter.nbytes for parameter in bench.denoiser.parameters())
    return [weights * mode.own_denoiser + forward, weights + forward][: mode.size]


def free_memory(bench: Bench) -> list[int]:
    """Bytes of each GPU that modes may take."""
    if bench.leader.type != "cuda":
        return []
    return [free - total // 20 for free, total in map(torch.cuda.mem_get_info, map(torch.device, bench.args.devices))]


@dataclass
class Outcome:
    """What a worker hands back through its file."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # mode, and why in one line

    def fail(self, mode: str, error: BaseException) -> None:
        traceback.print_exception(error)
        self.failed.append((mode, one_line(error)))
        bench_pipeline.say(f"{mode} failed: {one_line(error)}")

    def save(self, path: Path) -> None:
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text(json.dumps({"rows": self.rows, "failed": self.failed}))
        os.replace(scratch, path)


def work(args: argparse.Namespace) -> Outcome:
    """All modes of one model and size. `args.worker` holds what is finished, whatever happens later."""
    outcome = Outcome()
    if args.devices[0].startswith("cuda"):
        torch.cuda.set_device(args.devices[0])  # the clock's events are recorded on the current device
    bench = Bench(args)
    resting = torch.cuda.memory_allocated() if bench.leader.type == "cuda" else 0
    effect = bench_pipeline.guidance_changes(bench)  # also the warm-up of the baseline
    reference, reference_name = bench_pipeline.exact_reference(bench)
    peak = torch.cuda.max_memory_allocated() if bench.leader.type == "cuda" else 0
    baseline = Measured()
    waiting = [mode for mode in args.modes if mode != ONE_GPU]
    while True:
        needed = partial(needed_memory, bench=bench, peak=peak, resting=resting)
        beside, waiting = one_group(bench, waiting, outcome, needed)
        one = beside.pop(ONE_GPU)
        baseline.step_ms += one.step_ms
        baseline.total_s += one.total_s
        baseline.stages_s += one.stages_s
        baseline.pictures += one.pictures
        baseline.peak_gib = one.peak_gib
        for mode, got in beside.items():
            exact = (reference, reference_name) if MODES[mode].size == 2 else (one.pictures[0], ONE_GPU)
            outcome.rows.append(row(args, mode, got, one, *exact) | {"guidance_changes": round(effect, 4)})
        outcome.save(args.worker)
        if not waiting:
            break
    if ONE_GPU in args.modes:
        exact = (reference if reference_name == ONE_GPU else baseline.pictures[0], ONE_GPU)
        first = row(args, ONE_GPU, baseline, baseline, *exact) | {"guidance_changes": round(effect, 4)}
        outcome.rows.insert(0, first)
    outcome.save(args.worker)
    return outcome


def one_group(
    bench: Bench, modes: list[str], outcome: Outcome, needed: Callable[[Mode], list[int]]
) -> tuple[dict[str, Measured], list[str]]:
    """Rounds of the baseline and of as many of `modes` as fit beside each other. Returns them, and the other modes."""
    results = {ONE_GPU: Measured()}
    gc.collect()
    if bench.leader.type == "cuda":
        torch.cuda.empty_cache()  # what the last group's graphs held is free for other processes
    free = free_memory(bench)
    beside: list[str] = []
    for mode in modes:
        left = [has - need for has, need in itertools.zip_longest(free, needed(MODES[mode]), fillvalue=0)]
        if not beside or min(left, default=0) >= 0:  # a smaller one may still fit after one that does not
            beside.append(mode)
            free = left
    with contextlib.ExitStack() as everything:
        # Pairs of processes start while pipelines are enabled. Nothing is measured until all are up.
        starters = everything.enter_context(ThreadPoolExecutor())
        opened: dict[str, tuple[Future[Round], contextlib.ExitStack]] = {}
        for mode in sorted(beside, key=lambda mode: MODES[mode].prepare is None):
            stack = everything.enter_context(contextlib.ExitStack())
            if MODES[mode].prepare is not None:
                opened[mode] = starters.submit(stack.enter_context, in_two_processes(mode, bench)), stack
            else:
                opened[mode] = Future(), stack
                try:
                    opened[mode][0].set_result(stack.enter_context(enabled(mode, bench)))
                except Exception as error:
                    opened[mode][0].set_exception(error)
        up: dict[str, tuple[Round, contextlib.ExitStack]] = {}
        for mode in beside:
            try:
                up[mode] = opened[mode][0].result(), opened[mode][1]
            except Exception as error:
                outcome.fail(mode, error)
            else:
                results[mode] = Measured()
        for _ in range(bench.args.repeat):
            bench.measure(ONE_GPU, results[ONE_GPU])
            print(f"{PROGRESS}{ONE_GPU}", flush=True)
            for mode, (measure, stack) in list(up.items()):
                try:
                    measure(results[mode])
                except Exception as error:
                    outcome.fail(mode, error)
                    del up[mode], results[mode]
                    stack.close()
                print(f"{PROGRESS}{mode}", flush=True)
    return results, [mode for mode in modes if mode not in beside]


def row(
    args: argparse.Namespace, mode: str, got: Measured, one: Measured, reference: np.ndarray, reference_name: str
) -> dict[str, Any]:
    """The row of bench_pipeline.py, and what is known of a step."""
    values = bench_pipeline.row(args, mode, got, one, reference, reference_name)
    values |= {"bench": "step", "baseline_ms": round(statistics.median(one.step_ms), 3)}
    values.setdefault("leader_forward_ms", None)
    values.setdefault("follower_forward_ms", None)
    values.setdefault("overhead_ms", None)
    if mode == ONE_GPU:
        return values
    if MODES[mode].size == 1:
        values |= {"devices": args.devices[0], "transport": None}
    if MODES[mode].unequal_because is not None:
        values |= {"equal": None, "why": MODES[mode].unequal_because}
    return values


def run_worker(args: argparse.Namespace) -> int:
    """The process of one model and size."""
    outcome = Outcome()
    try:
        outcome = work(args)
    except Exception as error:
        if args.worker.exists():
            outcome.rows = json.loads(args.worker.read_text())["rows"]
        outcome.fail(ONE_GPU, error)
        outcome.save(args.worker)
    return 1 if outcome.failed else 0


# All models: the parent.


@dataclass(frozen=True)
class Job:
    """One worker: a model, a size (None: the model's own) and the modes to measure beside the baseline."""

    model: str
    size: int | None
    modes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.model if self.size is None else f"{self.model}@{self.size}"


def left_out(mode: str, model: str, devices: Sequence[str]) -> str | None:
    """Why `mode` cannot be run with `model`, if it cannot."""
    if mode == ONE_GPU:
        return None
    if MODES[mode].gpu_only and devices[0] == "cpu":
        return "it needs GPUs"
    if MODES[mode].size > len(devices):
        return "it needs two devices"
    if mode == "ulysses":
        denoiser = models.spec(model).denoiser
        if not hasattr(diffusers, "ContextParallelConfig"):
            return f"diffusers {diffusers.__version__} has no ContextParallelConfig"
        if getattr(getattr(diffusers, denoiser), "_cp_plan", None) is None:
            return f"diffusers has no context parallel plan for {denoiser}"
    return None


def combination(args: argparse.Namespace, model: str, size: int | None, mode: str) -> dict[str, Any]:
    """The values of `SAME` that the row will have."""
    on_gpu = args.devices[0].startswith("cuda")
    return {
        "model": models.label(model, args.scale),
        "size": models.size_label(model, size=size, scale=args.scale),
        "steps": args.steps,
        "mode": mode,
        "gpu": torch.cuda.get_device_name(args.devices[0]) if on_gpu else platform.machine(),
        "dtype": args.dtype,
    }


def plan(args: argparse.Namespace) -> list[Job]:
    """The workers to start. What is left out is said once for each reason."""
    done: list[dict[str, Any]] = []
    if args.resume and args.out.exists():
        old = [item for item in json.loads(args.out.read_text()) if item.get("bench") == "step"]
        done = [{key: item.get(key) for key in SAME} for item in old if item.get("equal") is not False]
    said: dict[str, list[str]] = {}
    jobs = []
    skipped = 0
    for model, size in args.models:
        modes = []
        for mode in args.modes:
            reason = left_out(mode, model, args.devices)
            if reason is not None:
                said.setdefault(f"{mode} is left out: {reason}", []).append(model)
            elif args.resume and combination(args, model, size, mode) in done:
                skipped += 1
            else:
                modes.append(mode)
        if modes:
            jobs.append(Job(model, size, tuple(modes)))
    for line, names in said.items():
        print(f"{line} ({', '.join(dict.fromkeys(names))})", flush=True)
    if skipped:
        print(f"{skipped} combinations are in {args.out} already and are skipped", flush=True)
    return jobs


def worker_command(args: argparse.Namespace, job: Job, rows: Path) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(rows), "--models", job.name]
    for name in ("steps", "repeat", "transport", "scale", "dtype", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--latents"] * args.latents
    return [*command, "--modes", ",".join(job.modes), "--devices", ",".join(args.devices)]


def run_job(args: argparse.Namespace, job: Job, bar: tqdm) -> Outcome:
    """Starts the worker of `job`, shows what it prints, and returns what it has finished."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        process = subprocess.Popen(
            worker_command(args, job, rows),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,  # its processes can be ended together
        )
        last = [""]

        def show() -> None:
            assert process.stdout is not None
            with process.stdout as lines:
                for line in lines:
                    if line.startswith(PROGRESS):
                        bar.update()
                    elif line.strip():
                        last[0] = line.strip()
                        bar.write(f"{job.name} {line.rstrip()}")

        reader = threading.Thread(target=show, daemon=True)
        reader.start()
        ended = "ended with status"
        try:
            process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            ended = f"was stopped after {args.timeout:g} s (--timeout), status"
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(10)
        outcome = Outcome()
        if rows.exists():
            content = json.loads(rows.read_text())
            outcome = Outcome(content["rows"], [(mode, line) for mode, line in content["failed"]])
        if process.returncode != 0 and not outcome.failed:
            outcome.failed.append(("worker", f"{ended} {process.returncode}; it last said: {last[0] or 'nothing'}"))
        return outcome


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar for the speed-up of each row, in a group for each model and size."""
    from matplotlib.figure import Figure

    def group_of(item: dict[str, Any]) -> tuple[Any, ...]:
        return item["model"], item["size"], item["steps"], item["gpu"]

    groups = list(dict.fromkeys(map(group_of, rows)))
    present = {item["mode"] for item in rows}
    modes = [mode for mode in MODES if mode in present]
    figure = Figure(figsize=(max(7.0, 2.0 + 1.6 * len(groups)), 4.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        values = {group_of(item): item["speedup"] for item in rows if item["mode"] == mode}
        places = [place + (i - (len(modes) - 1) / 2) * width for place, group in enumerate(groups) if group in values]
        bars = axes.bar(places, [values[group] for group in groups if group in values], width * 0.92, label=mode)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(2, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(groups)), [f"{model}\n{size}" for model, size, _, _ in groups], fontsize=8)
    axes.set_ylabel(f"speed-up of a step over {ONE_GPU}")
    steps, gpus = (", ".join(dict.fromkeys(str(group[i]) for group in groups)) for i in (2, 3))
    axes.set_title(f"{gpus}, {steps} steps", fontsize=9)
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=len(modes), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def run(args: argparse.Namespace) -> int:
    jobs = plan(args)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    # Every job measures the baseline, whether its row is there already or not.
    rounds = [args.repeat * len({ONE_GPU, *job.modes}) for job in jobs]
    with tqdm(total=sum(rounds), unit="generation", disable=None if jobs else True, dynamic_ncols=True) as bar:
        for i, job in enumerate(jobs):
            bar.set_description(job.name)
            outcome = run_job(args, job, bar)
            rows += outcome.rows
            failures += [f"{job.name}: {mode}: {line}" for mode, line in outcome.failed]
            if args.out and outcome.rows:
                merge_rows(args.out, outcome.rows)
            bar.n = sum(rounds[: i + 1])  # also after a failure, or more rounds of the baseline
            bar.refresh()
    failures += [
        f"{item['model']} {item['size']}: {item['mode']}: {item['differing']:.2%} of the picture differs from "
        f"{item['equal_to']}"
        for item in rows
        if item["equal"] is False
    ]
    if rows:
        print(markdown_table(rows, COLUMNS), flush=True)
        if args.out:
            print(f"wrote {args.out}", flush=True)
    if args.chart:
        everything = json.loads(args.out.read_text()) if args.out and args.out.exists() else rows
        shown = [item for item in everything if item.get("bench") == "step" and item["mode"] != ONE_GPU]
        if shown:
            draw(shown, args.chart)
        print(f"wrote {args.chart}" if shown else f"{args.chart} is not written: there is nothing to draw", flush=True)
    for line in failures:
        print(f"bench_step: {line}", file=sys.stderr, flush=True)
    return 1 if failures else 0


def sized_models(text: str) -> list[tuple[str, int | None]]:
    """An argparse type: names of models, each with or without @size, and folders."""
    chosen: list[tuple[str, int | None]] = []
    for item in text.split(","):
        sized = "@" in item and not folder_models.is_folder(item)
        name, at, size = item.rpartition("@") if sized else (item, "", "")
        name = models.argument(name)
        if at and (not size.isdecimal() or int(size) == 0 or int(size) % 16):
            raise argparse.ArgumentTypeError(f"expected a multiple of 16 after {name}@, but got {size!r}")
        chosen.append((name, int(size) if at else None))
    return list(dict.fromkeys(chosen))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = "sd15,sdxl,sd35-large,qwen-image"
    parser.add_argument("--models", type=sized_models, default=default, help="one or several: name or name@size")
    parser.add_argument("--modes", type=some_of(ONE_GPU, *MODES), default=list(MODES), help="one or several")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3, help="rounds: the baseline and each mode in turn")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="leader,follower; or one GPU, without modes of two")
    parser.add_argument("--transport", default="auto", choices=["auto", "peer", "nccl", "host"])
    parser.add_argument("--scale", default="real", choices=["real", "tiny"], help="tiny: for a dry run")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, tiny: float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--latents", action="store_true", help="compare latents, and decode none: a video takes seconds"
    )
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that a model and size may take")
    parser.add_argument("--out", type=Path, help="JSON file to merge the rows into (default: none is written)")
    parser.add_argument("--chart", type=Path, help="PNG file to draw the speed-ups into, of all rows in --out")
    parser.add_argument("--resume", action="store_true", help="skip what is in --out: model, size, steps, GPU and mode")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is the process of one model and size
    args = parser.parse_args(argv)
    args.devices = args.devices.split(",")
    args.dtype = args.dtype or ("bfloat16" if args.scale == "real" else "float32")
    args.modes = list(dict.fromkeys(args.modes if args.worker else [ONE_GPU, *args.modes]))
    args.image = None  # the sample photograph
    if len(args.devices) not in (1, 2):
        parser.error(f"--devices: expected leader,follower, or one GPU, but got {','.join(args.devices)}")
    check_devices(parser, args.devices)
    if args.steps <= SKIPPED_STEPS:
        parser.error(f"--steps: expected at least {SKIPPED_STEPS + 1}: the first {SKIPPED_STEPS} steps are not counted")
    if args.repeat < 1:
        parser.error("--repeat: expected at least 1")
    if not args.timeout > 0:
        parser.error("--timeout: expected a number of seconds above 0")
    if args.resume and not args.out:
        parser.error("--resume: name the file to go on with in --out")
    if args.out and args.out.exists():
        try:
            readable = isinstance(json.loads(args.out.read_text()), list)
        except (OSError, ValueError):
            readable = False
        if not readable:
            parser.error(f"--out: {args.out} is not a list of rows; name another file")
    if args.chart:
        if args.chart.suffix.lower() != ".png":
            parser.error(f"--chart: expected a name that ends in .png, but got {args.chart}")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--chart: needs Matplotlib; pip install matplotlib")
    if args.worker:
        args.model, args.size = args.models[0]
    return args


def check_devices(parser: argparse.ArgumentParser, names: list[str]) -> None:
    dry = "for a dry run without GPUs: --scale tiny --devices cpu,cpu"
    wanted = []
    for name in names:
        try:
            wanted.append(torch.device(name))
        except RuntimeError:
            parser.error(f"--devices: {name!r} is no device; use cuda:0,cuda:1; {dry}")
    if names == ["cpu", "cpu"]:
        return
    if any(device.type != "cuda" or device.index is None for device in wanted) or len(set(wanted)) != len(wanted):
        parser.error(f"--devices: expected GPUs, such as cuda:0,cuda:1, but got {','.join(names)}; {dry}")
    for device in wanted:
        if device.index >= torch.cuda.device_count():
            parser.error(f"--devices: {device} is not there ({torch.cuda.device_count()} GPUs are visible); {dry}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_worker(args) if args.worker else run(args)


if __name__ == "__main__":
    sys.exit(main())
