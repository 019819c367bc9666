"""The process of a replica: an engine that serves one request after the other, and says what it is at."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfg_parallel.errors import CfgParallelError, ConfigurationError
from cfg_parallel.serving.settings import check_factory, is_factory
from cfg_parallel.serving.work import Facts, Picture, Work

if TYPE_CHECKING:
    from cfg_parallel.omni import Omni
    from cfg_parallel.serving.settings import Settings

_LOOK = 0.5  # seconds between two looks at the followers of an engine that has nothing to do


class Cancelled(Exception):
    """Nobody waits for the picture any more."""


class Worker:
    def __init__(self, connection: Connection, engine: Omni, leave: Callable[[int], Any] = os._exit) -> None:
        self.engine = engine
        self._leave = leave
        self._connection = connection
        self._sending = threading.Lock()
        self._waiting: queue.Queue[Work] = queue.Queue()
        self._known: set[str] = set()  # that wait or run
        self._cancelled: set[str] = set()
        self._followers: Any = None
        self._pids: set[int] = set()
        self._restarts = 0

    def send(self, *message: Any) -> None:
        with self._sending:
            self._connection.send(message)

    def serve(self) -> None:
        threading.Thread(target=self._listen, name="cfg-parallel-listen", daemon=True).start()
        while True:
            self._look_at_followers()
            try:
                work = self._waiting.get(timeout=_LOOK)
            except queue.Empty:
                continue
            self._run(work)
            self._known.discard(work.id)
            self._cancelled.discard(work.id)

    def _listen(self) -> Any:
        while True:
            try:
                kind, what = self._connection.recv()
            except (EOFError, OSError):
                return self._leave(0)  # the server is gone; followers end with this process
            if kind == "work":
                self._known.add(what.id)
                self._waiting.put(what)
            elif what in self._known:
                self._cancelled.add(what)

    def _look_at_followers(self) -> None:
        """Lost ones are replaced also while nobody asks for a picture."""
        handle = self.engine.handle
        handle.wait_until_ready(0)
        followers = handle.followers
        pids = {follower.pid for follower in followers if follower.pid is not None and follower.lost is None}
        self._restarts += len(pids - self._pids) if self._pids else 0
        self._pids |= pids
        if followers != self._followers:
            self._followers = followers
            self.send("followers", [(follower.device, follower.lost) for follower in followers], self._restarts)

    def _run(self, work: Work) -> None:
        begun = False

        def on_step(step: int, steps: int, one_device: bool = False) -> None:
            nonlocal begun
            begun = True
            if work.id in self._cancelled:
                raise Cancelled
            self.send("step", work.id, step, steps, one_device)

        try:
            if work.id in self._cancelled:
                raise Cancelled
            pictures, metrics = self._generate(work, on_step)
        except Cancelled:
            self.send("failed", work.id, "cancelled", "the client has gone")
        except ConfigurationError as error:
            self.send("failed", work.id, "refused", str(error))
        except Exception as error:
            # Before the first step it is what the pipeline says to arguments that it does not take.
            refused = isinstance(error, (ValueError, TypeError)) and not begun
            if not refused:
                self.send("warning", f"{type(error).__name__} in {_where(error)}")  # what it says may repeat the prompt
            text = " ".join(str(error).split())
            self.send("failed", work.id, "refused" if refused else "error", text if refused else _named(error))
            if not refused and _gpu_is_broken():
                self._leave(1)  # nothing works in this process any more
        else:
            self.send("done", work.id, pictures, metrics)

    def _generate(self, work: Work, on_step: Any) -> tuple[list[Picture], dict[str, Any]]:
        import numpy as np

        from cfg_parallel.omni import OmniDiffusionSamplingParams
        from cfg_parallel.serving.preview import previews

        def show(index: int, images: list[Any]) -> None:
            self.send("partial", work.id, index, [Picture.of(image.convert("RGB")) for image in images])

        params = OmniDiffusionSamplingParams(**work.params)
        showing: Any = contextlib.nullcontext({})
        if work.partial_images:
            showing = previews(self.engine.pipe, work.partial_images, show)
        with showing as call:
            (output,) = self.engine.generate(work.prompt, params, on_step=on_step, **call)
        metrics = output.metrics
        if work.compare:
            again = functools.partial(on_step, one_device=True)
            (alone,) = self.engine.generate(work.prompt, params, on_step=again, one_device=True)
            equal = all(np.array_equal(a, b) for a, b in zip(output.images, alone.images, strict=True))
            times = {name: alone.metrics[name] for name in ("seconds", "denoising_seconds")}
            metrics["one_device"] = times | {"equal": equal}
        return [Picture.of(image.convert("RGB")) for image in output.images], metrics


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _gpu_is_broken() -> bool:
    """Whether a kernel has left a CUDA context behind in which every call fails."""
    import torch

    try:
        for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            torch.cuda.synchronize(gpu)
    except RuntimeError:
        return True
    return False


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load(settings: Settings, replica: int) -> Omni:
    """The engine of a replica. Raises ConfigurationError for what cannot be served."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from cfg_parallel.omni import DiffusionParallelConfig, Omni
    from cfg_parallel.preflight import choose_devices

    if not sys.stderr.isatty():  # where each line of the log is to be one of JSON
        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()
    if not settings.log_prompts:  # of a prompt that is too long they show the rest
        for library in (diffusers_logging, transformers_logging):
            library.set_verbosity_error()
    devices = list(settings.devices_of(replica))
    choose_devices(len(devices), devices, dict(settings.enable).get("transport", "auto"))  # refuses what is not there
    engine = Omni(
        _made_by(settings.model, devices[0]) if is_factory(settings.model) else settings.model,
        parallel_config=DiffusionParallelConfig(cfg_parallel_size=len(devices)),
        devices=devices,
        dtype=settings.dtype,
        **dict(settings.enable),
    )
    engine.pipe.set_progress_bar_config(disable=True)
    return engine


def _made_by(factory: str, device: str) -> Any:
    """The pipeline that a function of the user's makes."""
    check_factory(factory)
    module, _, function = factory.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{factory} is no function that can be imported ({error}): check MODEL.") from error
    return make(device)


def facts_of(engine: Omni) -> Facts:
    import inspect

    from cfg_parallel.preflight import pictures_of
    from cfg_parallel.serving.preview import can_preview

    parameters = inspect.signature(engine.pipe.__call__).parameters
    name = type(engine.pipe).__name__
    if "num_frames" in parameters:
        raise ConfigurationError(f"{name} makes videos, and the server serves pictures; use Omni in Python.")
    takes, needs, several = pictures_of(type(engine.pipe))
    return Facts(
        pipeline=name,
        takes_image=takes,
        needs_image=needs,
        several_images=several,
        takes_mask="mask_image" in parameters,
        takes_negative_prompt="negative_prompt" in parameters,
        takes_size="height" in parameters and "width" in parameters,
        default_steps=_default(parameters, "num_inference_steps"),
        scales=tuple(scale for scale in ("true_cfg_scale", "guidance_scale") if scale in parameters),
        partial_images=can_preview(engine.pipe),
    )


def _default(parameters: Any, name: str) -> int | None:
    value = parameters[name].default if name in parameters else None
    return value if isinstance(value, int) else None


def main() -> None:
    parser = argparse.ArgumentParser(description="A replica of `cfg-parallel serve`. Started by it, not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the server")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server says when it is over, by closing the socket
    connection = Connection(options.fd)
    settings, replica = connection.recv()
    try:
        engine = load(settings, replica)
        worker = Worker(connection, engine)
        facts = facts_of(engine)
    except Exception as error:
        if not isinstance(error, CfgParallelError):
            traceback.print_exc()
        message = " ".join(str(error).split()) if isinstance(error, CfgParallelError) else _named(error)
        connection.send(("unusable", message))
        sys.stderr.flush()
        os._exit(1)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        worker.send("warning", " ".join(str(message).split()))

    warnings.showwarning = show
    warnings.simplefilter("always", UserWarning)  # each request has its own
    worker.send("ready", facts)
    worker.serve()


if __name__ == "__main__":
    main()
