"""`cfg-parallel edit`: a picture in, a picture and a report out, and with --compare the same on one device first."""

from __future__ import annotations

import argparse
import inspect
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfg_parallel.errors import CfgParallelError, ConfigurationError
from cfg_parallel.loading import load_pipeline, share_cpu_threads
from cfg_parallel.preflight import (
    call_arguments,
    choose_devices,
    enable_arguments,
    fetch_model_index,
    find_pipeline_class,
    first_line,
    model_modules,
    read_model_index,
)
from cfg_parallel.stopwatch import stopwatch

if TYPE_CHECKING:
    from PIL import Image

_WARM_UP_STEPS = 2


def run_edit(args: argparse.Namespace, *, quiet_load: bool = False) -> int:
    """`cfg-parallel edit`. Returns its exit status; raises `CfgParallelError` for what the user can fix."""
    from cfg_parallel.images import check_output, load_image

    if args.compare and args.cfg_parallel_size == 1:
        raise ConfigurationError(
            "--compare compares one device with several: leave it out or raise --cfg-parallel-size."
        )
    if args.devices is not None and len(args.devices) != args.cfg_parallel_size:
        raise ConfigurationError(
            f"--devices names {len(args.devices)} and --cfg-parallel-size is {args.cfg_parallel_size}: make them agree."
        )
    if args.trace and args.cfg_parallel_size == 1:
        raise ConfigurationError("--trace shows several devices: leave it out or raise --cfg-parallel-size.")
    if args.trace and not Path(args.trace).parent.is_dir():
        raise ConfigurationError(f"the folder of {args.trace} does not exist: create it or change --trace.")
    check_output(args.output)
    images = [load_image(path) for path in args.image]
    index = read_model_index(args.model)

    # From here on torch and diffusers are needed (seconds to import); the weights are loaded last.
    devices = choose_devices(args.cfg_parallel_size, args.devices, args.transport)
    if devices[0] == "cpu" and args.cuda_graphs == "on":
        raise ConfigurationError(f"--cuda-graphs on needs GPUs, but would run on {','.join(devices)}: leave it out.")
    if index is None:
        index = fetch_model_index(args.model)
    call = call_arguments(find_pipeline_class(args.model, index), args, images)
    if devices[0] == "cpu":
        share_cpu_threads(devices)
    from cfg_parallel.early import followers_coming

    # Later where devices are compared: it would slow the first one down.
    with followers_coming(devices[:1] if args.compare else devices, model_modules(index)):
        pipe = load_pipeline(args.model, args.dtype, devices[0], quiet=quiet_load)
        return _edit(pipe, call, args, devices)


def _edit(pipe: Any, call: dict[str, Any], args: argparse.Namespace, devices: list[str]) -> int:
    if len(devices) == 1 and args.compile == "off":
        run = _generate(pipe, call, args, devices[0])
        _save(run, args.output)
        print(run.line("one device", devices[0]))
        return 0

    from cfg_parallel import enable_cfg_parallel

    one = None
    if args.compare:
        print(f"one device: {devices[0]}", flush=True)
        one = _generate(pipe, call, args, devices[0])
    print(f"cfg-parallel: {','.join(devices)}", flush=True)
    start = time.perf_counter()
    with enable_cfg_parallel(
        pipe,
        cfg_parallel_size=len(devices),
        devices=devices,
        **enable_arguments(args.transport, args.cuda_graphs, args.compile),
    ) as handle:
        started_s = time.perf_counter() - start
        many = _generate(pipe, call, args, devices[0])
        report = str(handle.report)
        _save(many, args.output)
        if args.trace:
            handle.save_trace(args.trace)
            print(f"wrote {args.trace} (open it in https://ui.perfetto.dev)")
    print(report)
    print(f"replicas made once, in {started_s:.1f} s")
    if one is not None:
        print(one.line("one device", devices[0]))
    print(many.line("cfg-parallel", ",".join(devices)))
    return 0 if one is None else _compare(one, many, devices)


@dataclass(frozen=True)
class _Run:
    images: list[Image.Image]
    steps: int
    denoising_s: float
    total_s: float

    def line(self, label: str, devices: str) -> str:
        per_step = f" ({1000 * self.denoising_s / self.steps:.0f} ms a step)" if self.steps else ""
        return f"{label:12}  {devices:14}  denoising {self.denoising_s:7.2f} s{per_step}, total {self.total_s:7.2f} s"


def _generate(pipe: Any, call: dict[str, Any], args: argparse.Namespace, device: str) -> _Run:
    """One picture and its times. To compare GPUs a short run goes first: first kernels and memory cost seconds."""
    import torch

    def generator() -> dict[str, Any]:
        if "generator" not in inspect.signature(type(pipe).__call__).parameters:
            torch.manual_seed(args.seed)
            return {}
        return {"generator": torch.Generator("cpu").manual_seed(args.seed)}  # the same numbers on every device

    try:
        if device != "cpu" and args.compare:
            pipe(**{**call, "num_inference_steps": min(_WARM_UP_STEPS, args.num_inference_steps)}, **generator())
        with stopwatch(pipe, device) as clock:
            output = pipe(**call, **generator())
    except torch.OutOfMemoryError as error:
        raise CfgParallelError(f"out of memory ({first_line(error)}): lower --height and --width.") from error
    except ValueError as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code.co_name == "check_inputs" for frame, _ in frames):
            raise ConfigurationError(f"{type(pipe).__name__} refuses the arguments: {first_line(error)}") from error
        raise
    images = getattr(output, "images", None)
    if not (isinstance(images, list) and images and hasattr(images[0], "save")):
        raise ConfigurationError(f"{type(pipe).__name__} made no picture: use enable_cfg_parallel in Python.")
    return _Run(images, clock.steps, clock.denoised - clock.begun, clock.end - clock.start)


def _save(run: _Run, output: str) -> None:
    try:
        run.images[0].save(output)
    except OSError as error:
        raise CfgParallelError(f"{output} cannot be written ({error}): free some space or change --output.") from error
    print(f"wrote {output} ({run.images[0].width}x{run.images[0].height})")


def _compare(one: _Run, many: _Run, devices: list[str]) -> int:
    import numpy as np
    import torch

    print(
        f"speed-up      denoising {one.denoising_s / max(many.denoising_s, 1e-9):.2f}x, "
        f"total {one.total_s / max(many.total_s, 1e-9):.2f}x"
        + ("" if devices[0] == "cpu" else f" (each after a warm-up of {_WARM_UP_STEPS} steps)")
    )
    if devices[0] == "cpu":
        print(
            f"              {torch.get_num_threads()} CPU thread(s) a process in both runs, because equal bits need "
            "equal threads; so one device leaves cores idle, and this speed-up compares equal threads, not equal cores"
        )
    left, right = (np.stack([np.asarray(image) for image in run.images]) for run in (one, many))
    if np.array_equal(left, right):
        print(f"pictures      equal, element for element ({left.size} values)")
        return 0
    if left.shape != right.shape:
        print(f"pictures      DIFFERENT: {left.shape} on one device, {right.shape} with cfg-parallel")
        return 1
    error = np.abs(left.astype(np.int16) - right.astype(np.int16))
    print(
        f"pictures      DIFFERENT: {np.count_nonzero(error)} of {error.size} values, by at most {error.max()} of 255. "
        "A pipeline that runs both passes as one batch is only close: other batch sizes use other kernels"
    )
    return 1
