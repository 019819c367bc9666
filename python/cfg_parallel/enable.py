"""`enable_cfg_parallel` and `disable_cfg_parallel`: put the pieces together on a pipeline object, and take them off."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from cfg_parallel import spmd
from cfg_parallel.beginning import Beginning
from cfg_parallel.caches import Cache, reset
from cfg_parallel.calls import Denoiser
from cfg_parallel.changes import Watch, fingerprint
from cfg_parallel.codec import map_tensors, tensors_in
from cfg_parallel.coefficients import Coefficients
from cfg_parallel.compiling import CompileClock, CompileMode, compile_as, is_compiled, unwrap
from cfg_parallel.discovery import check_numbers, check_pipeline, choose_devices, device_of, find_denoisers
from cfg_parallel.early import take_or_start
from cfg_parallel.errors import CfgParallelError, ConfigurationError, FollowerLostError
from cfg_parallel.graphs import GraphMode
from cfg_parallel.leader import INCOMPLETE, Generation, Leader, OnLoss
from cfg_parallel.offload import devices_of, is_offloaded, keep_on, offload_all
from cfg_parallel.patch import CfgParallel, Follower, denoiser_view, original_scheduler, scheduler_view
from cfg_parallel.pending import PendingPrediction, settle, settle_all
from cfg_parallel.preparation import Preparation, Prepare
from cfg_parallel.remote import FOLLOWER_TIMEOUT, START_TIMEOUT, PeerUnavailableError, RemoteFollower
from cfg_parallel.report import Report, median, of_each_step, with_fix
from cfg_parallel.successors import Successors
from cfg_parallel.timing import elapsed_ms
from cfg_parallel.trace import save, timeline
from cfg_parallel.transports import ASKED_FOR, resolve
from cfg_parallel.vision import pictures_seen_once

_NEXT_LOOK = 0.05  # seconds, while a follower comes up
_GUIDANCE_ARGUMENTS = (
    "true_cfg_scale",
    "guidance_scale",
    "guidance_scale_2",
    "image_guidance_scale",
    "negative_prompt",
)


def enable_cfg_parallel(
    pipe: Any,
    *,
    cfg_parallel_size: int = 2,
    devices: Sequence[str | torch.device] | None = None,
    transport: str = "auto",
    numerics: str = "exact",
    cuda_graphs: GraphMode = "auto",
    compile: CompileMode = False,
    compile_options: Mapping[str, Any] | None = None,
    prepare: Prepare | None = None,
    on_follower_loss: OnLoss = "recompute",
    follower_timeout: float = FOLLOWER_TIMEOUT,
) -> CfgParallel:
    """Run the guidance passes of `pipe` on `cfg_parallel_size` devices. `pipe(...)` then gives the same result, sooner.

    The denoiser of this one pipeline object is replicated on the other devices by follower processes; nothing global
    is changed. The result is bit-equal to one device for pipelines that call their denoiser once per guidance pass; for
    pipelines that batch the passes it is bit-equal to running the batch's passes one after the other
    (docs/exactness.md).

    Args:
        pipe: a diffusers pipeline on its device (`pipe.to("cuda")` first), or under `enable_model_cpu_offload`.
        cfg_parallel_size: how many devices share the passes of a step, at least 1; 1 changes nothing but gives reports.
        devices: one device for each, the first being the pipeline's own; "cpu" may repeat (a process each). Default:
            the pipeline's device and the next visible GPUs; for a pipeline on the CPU, as many CPU processes.
        transport: "auto", "peer" (CUDA IPC), "nccl" or "host" (shared memory). "auto" takes "peer" between GPUs
            that can write into each other's memory, and "nccl" between others.
        numerics: "exact" gives the bits of PyTorch's op-by-op arithmetic; "fused" computes guidance and the scheduler's
            step in fp32 and rounds at the end, which is closer to the true value and another image.
        cuda_graphs: True captures the forward of each kind of call (shapes, dtypes, plain arguments) as a CUDA graph,
            on every device, after two eager calls, and replays it from then on; "auto" does so where it pays: where
            launching takes the host longer than the GPU needs, or after many calls of one kind. A forward that cannot
            be captured stays eager. False: never.
        compile: torch.compile on every device, another image than eager PyTorch's: "regional" (the denoiser's repeated
            blocks, the quickest), "full" (all of it, in minutes), or True: what suits the model. CUDA graphs are made
            of compiled forwards too. Compiles in the first calls; a UNet's weights become channels_last.
        compile_options: arguments of torch.compile, such as mode="max-autotune-no-cudagraphs". Without a mode,
            Inductor's deterministic mode is added to them: else each process gets other bits.
        prepare: a function of the denoiser, called with it before it is used and with its copy on every device: sets an
            attention backend, quantizes, patches a library. As it gets copies of what it has prepared, it must leave
            alone what is done already.
        on_follower_loss: "recompute": when a follower dies, hangs or raises, the generation goes on here, or, where
            what came from it cannot be trusted, begins again here with the same random numbers (callbacks see steps
            again); one warning names the cause, and a new follower is started beside the next generations. "raise":
            such a generation raises FollowerLostError, and the next one waits for a new follower.
        follower_timeout: seconds without an answer after which a follower is given up.

    Returns a handle: `handle.report` tells what happened in the last generation; as a context manager it disables on
    exit. Under `torchrun`, every rank calls this; rank 0 leads, and `pipe(...)` returns rank 0's output on every rank.

    Raises ConfigurationError, naming the fix, for arguments or pipelines that cannot work, and FollowerLostError when a
    follower does not start."""
    if getattr(type(pipe), "_cfg_parallel", None) is not None:
        raise ConfigurationError("This pipeline is enabled already; call disable_cfg_parallel(pipe) first.")
    if numerics not in ("exact", "fused"):
        raise ConfigurationError(f"Expected numerics to be 'exact' or 'fused', but got {numerics!r}.")
    preparation = Preparation(prepare, compile, compile_options)
    preparation.check()
    check_numbers(cfg_parallel_size, devices, follower_timeout)
    if on_follower_loss not in ("recompute", "raise"):
        raise ConfigurationError(
            f"Expected on_follower_loss to be 'recompute' or 'raise', but got {on_follower_loss!r}."
        )
    if not isinstance(cuda_graphs, (bool, str)) or cuda_graphs not in ("auto", True, False):
        raise ConfigurationError(f"Expected cuda_graphs to be 'auto', True or False, but got {cuda_graphs!r}.")
    modules = find_denoisers(pipe)
    leader_device = device_of(pipe, modules)
    if leader_device.type != "cuda":
        if cuda_graphs is True:
            raise ConfigurationError(
                f"cuda_graphs=True needs a GPU, but the pipeline is on {leader_device}; use 'auto'."
            )
        cuda_graphs = False
    role = spmd.role(cfg_parallel_size, modules.values())
    chosen = choose_devices(leader_device, cfg_parallel_size, devices, role)
    transport, reason = resolve(transport, chosen)
    remotes: list[RemoteFollower] = []
    try:
        if is_offloaded(pipe):
            for name, module in modules.items():
                keep_on(name, module, leader_device)
        if role is not None:
            connected = spmd.connect(chosen, role, follower_timeout)
            if isinstance(connected, spmd.ServingRank):
                return Serving(pipe, connected, modules, preparation, leader_device)
            remotes = connected
        else:
            for device in chosen[1:]:
                remotes.append(take_or_start(leader_device, device, follower_timeout))
        handle = Leading(
            pipe,
            modules,
            chosen,
            remotes,
            transport,
            reason,
            numerics,
            cuda_graphs,
            preparation,
            on_follower_loss,
            follower_timeout,
        )
    except BaseException:
        for remote in remotes:
            remote.close()
        offload_all(pipe)
        raise
    return handle


def disable_cfg_parallel(pipe: Any) -> None:
    """Give `pipe` back as it was, and end its followers. Does nothing when it is not enabled."""
    handle = getattr(type(pipe), "_cfg_parallel", None)
    if handle is None:
        check_pipeline(pipe)
    else:
        handle.disable()


def last_report(pipe: Any) -> Report:
    """What happened in the last `pipe(...)`. Raises ConfigurationError when there was none."""
    handle = getattr(type(pipe), "_cfg_parallel", None)
    if handle is None:
        check_pipeline(pipe)
        raise ConfigurationError("This pipeline is not enabled; call enable_cfg_parallel(pipe) first.")
    return handle.report


class Leading(CfgParallel):
    """The pipeline that leads: it runs, and its followers answer its calls."""

    def __init__(
        self,
        pipe: Any,
        modules: dict[str, torch.nn.Module],
        devices: list[torch.device],
        remotes: list[RemoteFollower],
        transport: str,
        transport_reason: str,
        numerics: str,
        cuda_graphs: GraphMode,
        preparation: Preparation,
        on_follower_loss: OnLoss,
        follower_timeout: float,
    ) -> None:
        self.devices = devices
        self.transport = transport
        self._transport_reason = transport_reason
        self._timeout = follower_timeout
        self._denoisers = {name: Denoiser(name, module) for name, module in modules.items()}
        self._leader = Leader(devices[0], remotes, numerics == "exact", cuda_graphs, on_follower_loss)
        self._coefficients = Coefficients("cuda")
        self._successors = Successors()
        self._close = weakref.finalize(pipe, _close_all, remotes, self._successors, os.getpid())
        self._running = False
        self._last_seconds = 0.0
        self._report: Report | None = None
        self._statistics: list[dict[str, Any]] = []  # what the followers have answered for it
        self._generation: Generation | None = None
        self._shipped: dict[str, Any] = {}
        self._guidance: dict[str, Any] = {}
        self._watches: dict[str, Watch] = {}
        self._warned_of_graphs = False
        self._preparation = preparation
        self._clock: CompileClock | None = None
        self._spmd = spmd.rank() is not None
        try:
            for denoiser in self._denoisers.values():
                preparation.apply(denoiser.name, denoiser.module)
            for remote in remotes:
                remote.invite(self._class_modules())
            self._connect(remotes)
            for denoiser in self._denoisers.values():
                self._ship(denoiser, remotes)
            if self._spmd:
                for remote in remotes:
                    remote.send_output(None)  # the other ranks are prepared
        except BaseException:
            self._close.detach()  # the caller has the followers
            preparation.undo()
            raise
        super().__init__(pipe, list(modules), devices[0])
        self._signature = inspect.signature(self._class.__call__)
        for name, denoiser in self._denoisers.items():
            pipe.__dict__[name] = denoiser_view(denoiser, self._leader)
        self._view_scheduler(pipe)

    def _view_scheduler(self, pipe: Any) -> None:
        """So that no step waits for the one before; also of a new scheduler."""
        scheduler = original_scheduler(pipe.__dict__.get("scheduler"))
        if not (hasattr(type(scheduler), "set_timesteps") and hasattr(type(scheduler), "step")):
            return
        parts = {name: part for name, part in pipe.__dict__.items() if isinstance(part, torch.nn.Module)}
        others = [part for name, part in parts.items() if name not in self._denoisers]
        # The compiler does not take such timesteps, and a compiled ControlNet is given them.
        known = not any(map(is_compiled, others))
        pipe.__dict__["scheduler"] = scheduler_view(scheduler, self._coefficients) if known else scheduler

    def _class_modules(self) -> list[str]:
        """What a follower is to import, ahead of the weights."""
        return [type(denoiser.module).__module__ for denoiser in self._denoisers.values()]

    def _connect(self, remotes: list[RemoteFollower]) -> None:
        for remote in remotes:
            hello = remote.greet()
            _check_same(hello, self.devices[0])
            remote.gpu = hello["gpu"]
        if self.transport == "peer":
            try:
                for remote in remotes:
                    remote.use_peer()
            except PeerUnavailableError as error:
                if self._transport_reason == ASKED_FOR:
                    raise ConfigurationError(
                        f"transport='peer' does not work here: {error}; use transport='nccl'."
                    ) from error
                self.transport, self._transport_reason = "nccl", f"peer does not work here: {error}"
        if self.transport == "nccl":
            for remote in remotes:
                remote.use_nccl()

    def _ship(self, denoiser: Denoiser, remotes: list[RemoteFollower]) -> None:
        for remote in remotes:
            if remote.lost is not None:  # the next one gets what there is by then
                continue
            try:
                remote.ship_denoiser(denoiser.name, denoiser.module, self._preparation.prepare)
            except CfgParallelError as error:
                is_first = denoiser.name not in self._shipped
                if remote.lost is None or is_first or self._spmd or self._leader.on_loss == "raise":
                    raise
                remote.announced = True
                warnings.warn(f"{error} {self.devices[0]} goes on alone.", stacklevel=7)
        self._shipped[denoiser.name] = fingerprint(denoiser.module)
        self._watches[denoiser.name] = Watch(denoiser.module)
        self._leader.forget(denoiser.name)
        self._leader.know_hooks(denoiser)
        cache = Cache.of(denoiser.module)
        if cache != denoiser.cache:
            denoiser.cache = cache
            self._leader.reset(denoiser)
        if self._clock is None and is_compiled(denoiser.module):
            self._clock = CompileClock(self._say_compiling)

    def _say(self, line: str) -> None:
        """A line of progress, for people who let the pipeline show its own."""
        if not getattr(self._pipe(), "_progress_bar_config", {}).get("disable"):
            tqdm.write(f"cfg-parallel: {line}", file=sys.stderr)

    def _say_compiling(self) -> None:
        self._say(f"compiling on {' and '.join(map(str, self.devices))}, once for each kind of call ...")

    def _generate(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running:  # a pipeline that calls itself, or a callback that does
            return call(*args, **kwargs)
        try:
            self._running = True
            may_begin_again = self._leader.on_loss == "recompute" and self._leader.remotes and not self._spmd
            before = Beginning(self.devices[0], (args, kwargs)) if may_begin_again else None
            earlier = self._generation
            try:
                output = self._attempt(call, args, kwargs)
            except FollowerLostError as error:
                if before is None:
                    raise
                again = f"The generation begins again on {self.devices[0]}."
                generation = self._generation
                if generation is None or generation is earlier or not generation.has_warned:
                    warnings.warn(f"{error} {again}", stacklevel=3)
                for remote in self._leader.remotes:
                    if remote.lost is not None:  # what it has left behind is no part of the generation that begins
                        remote.announced = True
                        remote.close()
                before.restore()
                output = self._attempt(call, args, kwargs, alone=f"{error} {again}")
            if may_begin_again:
                self._replace_lost(patience=0.0)  # it comes up while nothing is asked for
            return output
        finally:
            self._running = False

    def _attempt(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], alone: str | None = None
    ) -> Any:
        """A generation; `alone`, if it is to run here, says why. Raises FollowerLostError when there is no output."""
        has_callback = any("callback" in name and value is not None for name, value in kwargs.items())
        offloaded = is_offloaded(self._pipe())

        def before_step() -> None:
            if offloaded:
                for placeholder in self._placeholders:
                    placeholder()
            if has_callback:
                self._ship_what_a_callback_changed()

        self._leader.before_step = before_step if offloaded or has_callback else None
        output: Any = None
        failure: str | None = None
        begun = False
        try:
            self._refresh(alone is not None)
            self._report, self._generation, self._guidance = None, None, {}
            if self._clock is not None:
                self._clock.begin()
            begun = True
            self._leader.begin(alone)
            for denoiser in self._denoisers.values():  # a generation that failed has left something in its caches
                reset(denoiser.module)
                self._leader.reset(denoiser)
                if self._leader.is_hooked(denoiser):  # by group offload, which is no other fingerprint
                    self._leader.know_hooks(denoiser)
            with pictures_seen_once(list(self._pipe().__dict__.values())):
                output = call(*args, **kwargs)
            if any(isinstance(tensor, PendingPrediction) for tensor in tensors_in(output)):
                output = map_tensors(output, settle)
            settle_all()
            self._guidance = self._guidance_of(args, kwargs)
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            if begun and self._leader.generation is not None:
                self._generation = self._leader.end()
                self._note_success(failure)
            incomplete = self._incomplete()
            if self._spmd:
                self._hand_out(None if incomplete else output, failure or incomplete)
        if incomplete:
            raise FollowerLostError(incomplete)
        if self._clock is not None and self._clock.seconds:
            self._say(f"compiled in {self._clock.seconds:.1f} s.")
        self._warn_if_useless()
        return output

    def _incomplete(self) -> str | None:
        """Why the output of this generation may be wrong, if it may be."""
        dead = next((remote for remote in self._leader.remotes if remote.died), None)
        if dead is None:
            return None
        return f"{dead.lost} {INCOMPLETE}"

    def _hand_out(self, output: Any, failure: str | None) -> None:
        """Under torchrun: the other ranks answer only until they have the output, so the report is made before."""
        # A lost rank says so itself, and torchrun ends the others.
        with contextlib.suppress(FollowerLostError):
            if self._generation is not None:
                self._report = self._make_report(self._generation)
        for remote in self._leader.remotes:
            with contextlib.suppress(FollowerLostError):
                remote.send_output(output, failure)

    def _note_success(self, failure: str | None) -> None:
        assert self._generation is not None
        if failure is None and not self._generation.given_up:
            self._last_seconds = self._generation.seconds
        for place, remote in enumerate(self._leader.remotes):
            if failure is None and remote.lost is None and self._generation.steps:
                self._successors.worked(place)

    def _replace_lost(self, patience: float) -> None:
        """Start a follower in the place of each lost one, and take over those that are up.

        Waits for them for `patience` seconds. What goes wrong costs a warning, unless a loss is to raise."""
        deadline = time.monotonic() + patience
        for place, remote in enumerate(self._leader.remotes):
            lost = remote.check()
            if lost is None:
                continue
            try:
                remote.close()
                fresh = self._successors.get(place, functools.partial(self._start_another, remote, lost))
                if fresh is None or not fresh.is_up(deadline - time.monotonic()):
                    continue
                self._connect([fresh])
                for denoiser in self._denoisers.values():
                    fresh.ship_denoiser(denoiser.name, denoiser.module, self._preparation.prepare)
            except Exception as error:  # no file, no memory, no CUDA: whatever it is, one device can do without
                what = self._successors.failed(place)
                if self._leader.on_loss == "raise":
                    raise
                warnings.warn(f"{error} {self.devices[0]} goes on alone. {what}", stacklevel=6)
            except BaseException:
                self._successors.drop(place)
                raise
            else:
                self._leader.remotes[place] = self._successors.take(place)

    def _start_another(self, remote: RemoteFollower, lost: str) -> RemoteFollower:
        if not remote.announced:
            warnings.warn(f"{lost} A new one is started.", stacklevel=8)
            remote.announced = True
        fresh = RemoteFollower.start(self.devices[0], remote.device, self._timeout)
        try:
            fresh.invite(self._class_modules())
        except BaseException:
            fresh.close()
            raise
        return fresh

    def wait_until_ready(self, timeout: float = 180.0) -> bool:
        """As in the base class; raises what went wrong with on_follower_loss="raise"."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                if not self._close.alive:
                    return False
                if not (self._spmd or self._running):  # by a callback: a generation keeps its followers
                    self._replace_lost(patience=0.0)
                if all(remote.check() is None for remote in self._leader.remotes):
                    return True
                if self._spmd or self._running or self._successors.gave_up:
                    return False
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_NEXT_LOOK, left))

    def _refresh(self, alone: bool) -> None:
        """Before a generation: a lost follower is replaced, and a denoiser that has changed is shipped again."""
        if not self._spmd and not alone:
            must = self._leader.on_loss == "raise"
            # Longer than the last generation took, waiting for a second device saves nothing.
            self._replace_lost(START_TIMEOUT if must else self._last_seconds)
            lost = next((remote.lost for remote in self._leader.remotes if remote.lost is not None), None)
            if must and lost is not None:
                raise FollowerLostError(f"{lost} {self._successors.next_try()}")
        pipe = self._pipe()
        self._view_scheduler(pipe)
        for name, denoiser in self._denoisers.items():
            current = getattr(pipe, name)
            is_view = getattr(type(current), "_cfg_parallel_denoiser", None) is denoiser
            watch = self._watches[name]
            if is_view and watch.module is denoiser.module and watch.same():
                continue
            if is_offloaded(pipe):
                keep_on(name, current, self.devices[0])
            if self.devices[0] not in devices_of(current):
                device = device_of(pipe, {name: current})
                raise ConfigurationError(
                    f"The pipeline has moved from {self.devices[0]} to {device} since it was enabled; call "
                    "disable_cfg_parallel(pipe) and enable_cfg_parallel(pipe) again, or move it back."
                )
            if not is_view:
                seen = getattr(type(unwrap(current)), "_cfg_parallel_denoiser", None)
                # torch.compile(pipe.transformer) has compiled the view, so that a forward would come back to it.
                denoiser.module = current if seen is None else compile_as(current, seen.module)
                self._preparation.apply(name, denoiser.module)
                pipe.__dict__[name] = denoiser_view(denoiser, self._leader)  # type: ignore[union-attr]
                self._ship(denoiser, self._leader.remotes)
            elif fingerprint(denoiser.module) != self._shipped[name]:
                self._ship(denoiser, self._leader.remotes)
            elif watch.can_tell:  # an equal object took the place of another
                self._watches[name] = Watch(denoiser.module)

    def _ship_what_a_callback_changed(self) -> None:
        for name, watch in self._watches.items():
            if watch.changed():
                self._ship(self._denoisers[name], self._leader.remotes)

    @property
    def followers(self) -> list[Follower]:
        with self._lock:
            remotes = self._leader.remotes
            pids = [None if remote.process is None else remote.process.pid for remote in remotes]
            return [Follower(str(r.device), pid, r.check()) for r, pid in zip(remotes, pids, strict=True)]

    @property
    def report(self) -> Report:
        with self._lock:
            if self._leader.generation is not None:
                raise ConfigurationError(
                    "There is no report during a generation; ask for it when the pipeline is done."
                )
            if self._report is None:
                if self._generation is None:
                    raise ConfigurationError("There is no report before the first generation; call the pipeline first.")
                self._report = self._make_report(self._generation)
            return self._report

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        with self._lock:
            _ = self.report  # for which the followers are asked
            assert self._generation is not None
            save(timeline(self._generation, self.devices[0], self._leader.remotes, self._statistics), path)

    def _make_report(self, generation: Generation) -> Report:
        remotes = self._leader.remotes
        on_gpu = self.devices[0].type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.devices[0])
        forwards = [elapsed_ms(*marks) for marks in generation.forwards]
        statistics: list[dict[str, Any]] = []
        for remote in remotes:
            if remote.check() is None:
                with contextlib.suppress(FollowerLostError):  # just now; the report says so
                    statistics.append(remote.statistics() | {"device": str(remote.device)})
        self._statistics = statistics
        sides = [forwards, *(each["forward_ms"] for each in statistics)]
        remote_forwards = [ms for side in sides[1:] for ms in side]
        receives = sum(elapsed_ms(*marks) for remote in remotes for marks in remote.sent.receives)
        launch_waits = sum(remote.sent.wait_ms for remote in remotes)
        graphs = [self._leader.graphs.counts(), *(each["graphs"] for each in statistics)]
        peaks = [each["peak_bytes"] for each in statistics if each["peak_bytes"] is not None]
        return Report(
            devices=[str(device) for device in self.devices],
            transport=self.transport,
            transport_reason=self._transport_reason,
            gpus=[torch.cuda.get_device_name(self.devices[0]), *(remote.gpu for remote in remotes)] if on_gpu else [],
            seconds=generation.seconds,
            steps=len(generation.steps),
            guided_steps=sum(step.branches > 1 for step in generation.steps),
            parallel_steps=sum(0 < step.shipped < step.branches for step in generation.steps),
            calls_shipped=sum(remote.sent.calls for remote in remotes),
            calls_local=generation.local_calls,
            bytes_to_followers=sum(remote.sent.bytes for remote in remotes),
            bytes_from_followers=sum(remote.sent.bytes_back for remote in remotes),
            ship_ms=sum(remote.sent.ship_ms for remote in remotes),
            launch_wait_ms=launch_waits,
            leader_wait_ms=receives if on_gpu else launch_waits,
            follower_wait_ms=sum(each["wait_ms"] for each in statistics),
            leader_forward_ms=median(forwards),
            follower_forward_ms=median(remote_forwards),
            leader_busy_ms=sum(forwards),
            follower_busy_ms=sum(remote_forwards),
            step_forward_ms=of_each_step(sides, len(generation.steps)),
            follower_peak_bytes=max(peaks, default=None),
            replica_bytes=sum(remote.replica[0] for remote in remotes),
            replica_seconds=sum(remote.replica[1] for remote in remotes),
            guidance=self._guidance,
            fused=generation.fused,
            replayed=generation.replayed,
            graph_forwards=sum(each["replayed"] for each in graphs),
            graphs_captured=sum(each["captured"] for each in graphs),
            eager_forwards=dict(sum((Counter(each["eager"]) for each in graphs), Counter())),
            compile_seconds=self._clock.seconds if self._clock is not None else 0.0,
            follower_compile_seconds=max((each["compile_seconds"] for each in statistics), default=0.0),
            notes=dict(generation.notes),
            lost=[remote.lost for remote in remotes if remote.lost is not None],
        )

    def _guidance_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        given = {name: bound.arguments[name] for name in _GUIDANCE_ARGUMENTS if name in bound.arguments}
        if bound.arguments.get("negative_prompt_embeds") is not None:
            given["negative_prompt"] = ""  # there is one
        return given

    def _warn_if_useless(self) -> None:
        generation = self._generation
        assert generation is not None
        failure = self._leader.graphs.failure
        if failure is not None and not self._warned_of_graphs:
            self._warned_of_graphs = True
            warnings.warn(f"cfg-parallel runs without CUDA graphs: {with_fix(failure)}.", stacklevel=4)
        shared = any(0 < step.shipped < step.branches for step in generation.steps)
        if generation.steps and not shared and len(self.devices) > 1 and not generation.given_up:
            warnings.warn(f"cfg-parallel: {self.report.why}", stacklevel=4)

    def disable(self) -> None:
        """Give the pipeline back as it was, and end the followers. May be called twice."""
        with self._lock:
            pipe, was_enabled = self._pipe(), self._close.alive
            super().disable()
            if pipe is not None and was_enabled:
                for name, denoiser in self._denoisers.items():
                    if getattr(type(pipe.__dict__.get(name)), "_cfg_parallel_denoiser", None) is denoiser:
                        pipe.__dict__[name] = denoiser.module
                if "scheduler" in pipe.__dict__:
                    pipe.__dict__["scheduler"] = original_scheduler(pipe.__dict__["scheduler"])
            self._preparation.undo()
            if self._clock is not None:
                self._clock.close()
            self._leader.graphs.clear()  # the handle may outlive them
            if self._generation is not None and self._report is None:
                with contextlib.suppress(FollowerLostError):  # then there is nothing to report on
                    self._report = self._make_report(self._generation)
            self._close()
            if pipe is not None and was_enabled:
                offload_all(pipe)


class Serving(CfgParallel):
    """On a rank that serves the leader under torchrun: `pipe(...)` answers its calls and returns rank 0's output."""

    def __init__(
        self,
        pipe: Any,
        serving: spmd.ServingRank,
        modules: dict[str, torch.nn.Module],
        preparation: Preparation,
        device: torch.device,
    ) -> None:
        self._serving = serving
        self._preparation = preparation
        try:
            for name, module in modules.items():
                preparation.apply(name, module)
            serving.prepare(modules)
        except BaseException:
            preparation.undo()
            raise
        self._close = weakref.finalize(pipe, serving.close)
        super().__init__(pipe, list(modules), device)

    def _generate(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._serving.serve()

    @property
    def report(self) -> Report:
        raise ConfigurationError("The report is on the rank that leads (rank 0); this rank served its calls.")

    def disable(self) -> None:
        pipe, was_enabled = self._pipe(), self._close.alive
        super().disable()
        self._close()
        self._preparation.undo()
        if pipe is not None and was_enabled:
            offload_all(pipe)


def _close_all(remotes: list[RemoteFollower], successors: Successors, pid: int) -> None:
    if os.getpid() != pid:  # a forked child that ends has nothing to close
        return
    try:
        successors.close()
    finally:
        for remote in remotes:
            remote.close()


def _check_same(hello: dict[str, Any], leader: torch.device) -> None:
    if hello["torch"] != torch.__version__:
        raise ConfigurationError(f"The leader runs torch {torch.__version__}, but a follower runs {hello['torch']}.")
    if leader.type == "cuda" and hello["gpu"] != torch.cuda.get_device_name(leader):
        warnings.warn(
            f"The GPUs differ ({torch.cuda.get_device_name(leader)} and {hello['gpu']}), so predictions may differ in "
            "their last bits from those of one GPU.",
            stacklevel=6,
        )
