"""`cfg-parallel edit`: a picture in, a picture and a report out, and with --compare the same on one device first."""

from __future__ import annotations

import argparse
import inspect
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cfg_parallel.errors import CfgParallelError, ConfigurationError
from cfg_parallel.preflight import (
    call_arguments,
    choose_devices,
    fetch_model_index,
    find_pipeline_class,
    first_line,
    read_model_index,
)

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
        _share_cpu_threads(devices)
    pipe = _load(args.model, args.dtype, devices[0], quiet=quiet_load)

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
        transport=args.transport,
        cuda_graphs={"auto": "auto", "on": True, "off": False}[args.cuda_graphs],  # type: ignore[arg-type]
        compile={"auto": True, "off": False}.get(args.compile, args.compile),
    ) as handle:
        started_s = time.perf_counter() - start
        many = _generate(pipe, call, args, devices[0])
        report = str(handle.report)
    _save(many, args.output)
    print(report)
    print(f"followers started once, in {started_s:.1f} s")
    if one is not None:
        print(one.line("one device", devices[0]))
    print(many.line("cfg-parallel", ",".join(devices)))
    return 0 if one is None else _compare(one, many, devices)


def _share_cpu_threads(devices: list[str]) -> None:
    """The same number of threads in every process of both runs: bits can depend on it. OMP_NUM_THREADS wins."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))


def _load(model: str, dtype: str, device: str, *, quiet: bool) -> Any:
    import diffusers
    import torch
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    # `torch_dtype` warns from diffusers 0.42 on; `dtype` is ignored before.
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    key = "dtype" if version >= (0, 42) else "torch_dtype"
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    if quiet:
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{key: getattr(torch, dtype)})
        return pipe.to(device)
    except torch.OutOfMemoryError as error:
        raise CfgParallelError(
            f"{model} does not fit on {device} ({first_line(error)}): use a larger device."
        ) from error
    except (OSError, ValueError, ImportError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{model} cannot be loaded ({first_line(error)}): check or download it again."
        ) from error
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])


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
        with _stopwatch(pipe, device) as clock:
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


@dataclass
class _Clock:
    start: float = 0.0
    begun: float = 0.0
    denoised: float = 0.0
    end: float = 0.0
    steps: int = 0


@contextmanager
def _stopwatch(pipe: Any, device: str) -> Iterator[_Clock]:
    """Times a generation without changing it. Denoising is from the progress bar's start to the first decoding by the
    VAE, where the latents are waited for: with cfg-parallel the last may still be on their way when the bar ends."""
    import torch

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    clock = _Clock()
    progress_bar = pipe.progress_bar
    vae: Any = getattr(pipe, "vae", None)
    decode: Any = getattr(vae, "decode", None)

    def timed_progress_bar(*args: Any, **kwargs: Any) -> Any:
        bar = progress_bar(*args, **kwargs)
        close = bar.close

        def timed_close() -> None:
            bar.close = close  # tqdm closes again when it is collected
            close()
            clock.steps += bar.n
            clock.denoised = now()

        bar.close = timed_close
        if not clock.steps:
            clock.begun = now()
        return bar

    def timed_decode(latents: Any, *args: Any, **kwargs: Any) -> Any:
        if not decoding:
            decoding.append(True)
            latents.reshape(-1)[0].item()
            clock.denoised = now()
        return decode(latents, *args, **kwargs)

    decoding: list[bool] = []
    pipe.progress_bar = timed_progress_bar
    if decode is not None:
        vae.decode = timed_decode
    clock.start = clock.begun = now()
    try:
        yield clock
    finally:
        clock.end = now()
        del pipe.progress_bar
        if decode is not None:
            del vae.decode


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
