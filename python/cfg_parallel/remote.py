"""The leader's view of one follower: starts it, ships denoisers and calls, collects results."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cfg_parallel.caches import Cache
from cfg_parallel.codec import Rows, TensorSpec, UnshippableError, encode_plain, encode_structure, version
from cfg_parallel.errors import CfgParallelError, FollowerLostError
from cfg_parallel.graphs import GraphMode
from cfg_parallel.link import Link
from cfg_parallel.pending import settle
from cfg_parallel.preparation import Prepare
from cfg_parallel.replica import send_replica
from cfg_parallel.timing import Mark, mark
from cfg_parallel.transports.nccl import NcclTransport
from cfg_parallel.transports.peer import Arrival, PeerTransport, offer

START_TIMEOUT = 180.0  # seconds: importing torch and diffusers from a cold disk takes most of a minute
_CLOSE_TIMEOUT = 5.0
_WATCH_INTERVAL = 0.25


@dataclass(slots=True)
class RemoteCall:
    """A denoiser call that a follower is answering."""

    remote: RemoteFollower
    header: dict[str, Any] | None = None
    tensors: list[torch.Tensor] | None = None
    pins: Sequence[torch.Tensor] = ()  # the arguments, until they have arrived

    def wait(self) -> tuple[bytes, list[TensorSpec]]:
        """Until the follower has launched the forward: the structure of its output. Raises what went wrong there."""
        header = self.remote.read_until(self)
        if header["kind"] == "error":
            raise RemoteCallError(header["message"])
        return header["body"], header["specs"]

    def values(self) -> list[torch.Tensor]:
        """The output's tensors, on the leader's device, in stream order."""
        self.wait()
        self.remote.pull_until(self)
        assert self.tensors is not None
        return self.tensors

    def borrow(self) -> Arrival | None:
        """The output's tensors where they lie in the receive buffer, for a kernel that waits for them and reads them
        there, in the order of `wait()`'s specs; None when that cannot be done, and `values` is to be used. Once such a
        kernel is launched the values are its own to keep: `values` has none then."""
        self.wait()
        return self.remote.borrow(self)


class RemoteCallError(CfgParallelError):
    """The denoiser raised on the follower."""


class PeerUnavailableError(CfgParallelError):
    """The peer transport does not work between these devices; another one may."""


@dataclass(slots=True)
class Sent:
    """What was shipped since the generation began: for the report."""

    calls: int = 0
    bytes: int = 0
    bytes_back: int = 0
    ships: list[tuple[float, float]] = field(default_factory=list)  # of the host, in seconds
    waits: list[tuple[float, float]] = field(default_factory=list)  # for launches
    receives: list[tuple[Mark, Mark]] = field(default_factory=list)

    @property
    def ship_ms(self) -> float:
        return 1e3 * sum(end - start for start, end in self.ships)

    @property
    def wait_ms(self) -> float:
        return 1e3 * sum(end - start for start, end in self.waits)


FOLLOWER_TIMEOUT = 600.0  # seconds without an answer, unless another number is asked for


class RemoteFollower:
    def __init__(self, conn: Connection, leader_device: torch.device, device: torch.device, timeout: float) -> None:
        self.device = device
        self.process: subprocess.Popen[bytes] | None = None
        self.link = Link(conn, leader_device)
        self.sent = Sent()
        self.gpu = ""  # its name, once it is up
        self.lost: str | None = None
        self.announced = False  # the user knows that it is lost
        self.replica = (0, 0.0)
        self._died = False  # with a receive under way in NCCL, whose result is garbage
        self._started = False
        self._since = time.monotonic()
        self._closing = False
        self._timeout = timeout
        self._stderr: Any = None
        _bound_waits(conn, timeout)
        self._unread: deque[RemoteCall] = deque()
        self._unpulled: deque[RemoteCall] = deque()
        self._residents: dict[Any, list[tuple[Any, ...]]] = {}
        self._settings: dict[str, Any] | None = None

    @classmethod
    def start(cls, leader_device: torch.device, device: torch.device, timeout: float) -> RemoteFollower:
        """Start a follower process on `device`, connected by a socket pair: no address, so nobody else can connect."""
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        package_root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "cfg_parallel.follower"]
        command += ["--fd", str(theirs.fileno()), "--parent", str(os.getpid()), "--device", str(device)]
        self = cls(Connection(ours.detach()), leader_device, device, timeout)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # unlinked at once; read when the start fails
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C is the leader's to handle
        )
        theirs.close()
        return self

    def prepare(self, modules: Sequence[str]) -> None:
        """Have it import these modules, long before `invite`."""
        self._send({"kind": "import", "path": sys.path, "modules": list(modules)})

    def invite(self, modules: Sequence[str]) -> None:
        """Apart from `greet`, so that several followers import these modules side by side."""
        self._send({"kind": "hello", "path": sys.path, "modules": list(modules)})

    def is_up(self, patience: float) -> bool:
        """Whether it has answered the invitation, or cannot any more, which `greet` says; waits `patience` seconds."""
        deadline = time.monotonic() + patience
        while not self.link.has_message(min(_WATCH_INTERVAL, max(0.0, deadline - time.monotonic()))):
            if not self._alive():
                return True
            if time.monotonic() - self._since > START_TIMEOUT:
                with self._watch():
                    raise FollowerLostError(f"no answer within {START_TIMEOUT:.0f} s")
            if time.monotonic() >= deadline:
                return False
        return True

    def greet(self) -> dict[str, Any]:
        """Wait until the follower is up: who it is."""
        with self._watch():
            header = self.link.read(START_TIMEOUT, self._alive)
        self._started = True
        return header

    def use_peer(self) -> None:
        """Change over to CUDA IPC. Raises PeerUnavailableError, with the link as it was, where that does not work."""
        with self._watch():
            failure = offer(
                self.link,
                lambda: PeerTransport(self.link.device),
                self._timeout,
                lambda: self.link.read(START_TIMEOUT, self._alive),
            )
        if failure is not None:
            raise PeerUnavailableError(failure)
        self._end_waits_when_dead()

    def use_nccl(self) -> None:
        """Change over to NCCL."""
        ids = NcclTransport.unique_ids()
        with self._watch():
            self.link.detach()
            self.link.send({"kind": "transport", "name": "nccl", "ids": ids, "timeout": START_TIMEOUT})
            try:
                transport = NcclTransport.connect(ids, 0, self.link.device, START_TIMEOUT, self._silent_and_alive)
            except CfgParallelError:
                if not self.link.has_message():
                    raise
                raise CfgParallelError(f"NCCL could not connect: {self.link.read(1).get('message')}") from None
            answer = self.link.read(START_TIMEOUT, self._alive)
        if answer["kind"] != "connected":
            raise CfgParallelError(f"NCCL could not connect on the follower: {answer['message']}")
        self.link.use(transport)
        self._end_waits_when_dead()

    def ship_denoiser(self, name: str, module: torch.nn.Module, prepare: Prepare | None = None) -> None:
        """Give the follower a replica; returns when it is there. Its bytes and seconds add up in `replica`.

        A denoiser whose cache has one state for all calls gets none: it runs on the leader alone."""
        cache = Cache.of(module)
        if cache is not None and not cache.by_context:
            return
        self.drain()
        start, before = time.perf_counter(), self.link.bytes_sent
        self._residents = {slot: kept for slot, kept in self._residents.items() if slot[0] != name}
        with self._watch():
            send_replica(self.link, name, module, self._timeout, prepare, self.process is not None)
        nbytes, seconds = self.replica
        self.replica = (nbytes + self.link.bytes_sent - before, seconds + time.perf_counter() - start)

    def check(self) -> str | None:
        """Why the follower is lost, or None. Notices a process that ended while nobody was talking to it."""
        if self.lost is None and not self._alive():
            with contextlib.suppress(FollowerLostError), self._watch():
                raise FollowerLostError("the process ended")
        return self.lost

    def begin(self, settings: dict[str, Any], graphs: GraphMode) -> None:
        """Before a generation: settings of PyTorch that the user may have changed."""
        self.sent = Sent()
        changed = settings if settings != self._settings else None
        self._send({"kind": "begin", "numerics": changed, "graphs": graphs})
        self._settings = settings

    def reset(self, name: str) -> None:
        """Empty the caches of a denoiser, as of the calls that follow."""
        self._send({"kind": "reset", "name": name})

    def call(self, name: str, branch: int, args: Any, kwargs: Any, context: Any, autocast: Any) -> RemoteCall:
        """Ship one forward of denoiser `name`; returns at once. `branch` is its place in the step.

        A tensor that is the same object at the same version as in the last call of this branch is not sent again."""
        start = time.perf_counter()
        body, tensors = encode_plain((args, kwargs), settle)
        # Apart from the arguments, as it may name the step, which makes no other kind of call of it.
        context_body, context_tensors = encode_plain(context, settle)
        tensors = [*tensors, *context_tensors]
        kept = self._residents.get((name, branch), [])
        identities = [_identity(tensor) for tensor in tensors]
        resident = [i < len(kept) and _same(identities[i], kept[i]) for i in range(len(tensors))]
        fresh = [_value(t) for t, is_resident in zip(tensors, resident, strict=True) if not is_resident]
        if self.link.transport.reads_later:  # on a stream of its own; the pipeline may overwrite its latents meanwhile
            fresh = [tensor.clone() for tensor in fresh]
        before = self.link.bytes_sent
        header = {"kind": "call", "slot": (name, branch), "body": body, "resident": resident, "autocast": autocast}
        header["context"] = context_body, len(context_tensors)
        call = RemoteCall(self, pins=fresh)
        with self._watch():  # an interrupt in here gives the follower up, so what is noted is what was sent
            self.link.send(header, fresh)
            self._residents[name, branch] = identities
            self._unread.append(call)
            self._unpulled.append(call)
        self.sent.calls += 1
        self.sent.bytes += self.link.bytes_sent - before
        self.sent.ships.append((start, time.perf_counter()))
        return call

    def read_until(self, call: RemoteCall) -> dict[str, Any]:
        while call.header is None:
            start = time.perf_counter()
            with self._watch():
                header = self.link.read(self._timeout, self._alive)
                if header["kind"] == "error":
                    self._residents.clear()  # who knows which arguments it has kept
                self._unread.popleft().header = header
            self.sent.waits.append((start, time.perf_counter()))
        return call.header

    def pull_until(self, call: RemoteCall) -> None:
        while call.tensors is None:
            earliest = self._unpulled[0]
            header = self.read_until(earliest)
            start, before = mark(self.link.device), self.link.bytes_received
            with self._watch():
                self._expect_values()
                earliest.tensors = self.link.pull(header)
                earliest.pins = ()
                self._unpulled.popleft()
            self.sent.bytes_back += self.link.bytes_received - before
            self.sent.receives.append((start, mark(self.link.device)))

    def borrow(self, call: RemoteCall) -> Arrival | None:
        if call.tensors is not None:
            return None
        while self._unpulled[0] is not call:
            self.pull_until(self._unpulled[0])
        header = self.read_until(call)
        start, before = mark(self.link.device), self.link.bytes_received

        def taken() -> None:
            call.pins, call.tensors = (), []
            self._unpulled.popleft()
            self.sent.bytes_back += self.link.bytes_received - before
            self.sent.receives.append((start, mark(self.link.device)))

        with self._watch():
            self._expect_values()
            return self.link.borrow(header, taken)

    def _expect_values(self) -> None:
        """The follower has said that it launched; only while it lives will it send what it computes. A kernel that
        waits for values that never come would cost the image, and now they can still be computed here."""
        if self.link.transport.reads_later and not self._alive():
            raise FollowerLostError("the process ended")

    def drain(self) -> None:
        """Receive what nobody asked for, so that the next call's result is the next message."""
        if self._unpulled and self.lost is None:
            self.pull_until(self._unpulled[-1])

    def end(self) -> None:
        """After a generation: its prompts and latents need not stay.

        Waits for the last result from a GPU: if it never arrives, it must not be handed out."""
        self.drain()
        self._wait_for_receives()
        with self._watch():
            self.link.transport.check()
        self.check()
        if self.lost is None:
            self._residents.clear()
            self._send({"kind": "forget"})

    def statistics(self) -> dict[str, Any]:
        self._send({"kind": "statistics"})
        with self._watch():
            header = self.link.read(self._timeout, self._alive)
            self.link.pull(header)
        return header

    def send_output(self, output: Any, failure: str | None = None) -> None:
        """Under torchrun: hand the leader's output, or why there is none, to the rank that served it."""
        body, tensors = encode_structure(output)
        with self._watch():
            self.link.send({"kind": "output", "body": body, "failure": failure}, tensors)

    @property
    def died(self) -> bool:
        """The follower was lost, and a result that was handed out may be garbage."""
        if self.lost is None:
            return False
        transport = self.link.transport
        if isinstance(transport, PeerTransport):  # the waits have been ended, and those that missed something say so
            self._wait_for_receives()
            return transport.receive_failed
        return self._died

    def _wait_for_receives(self) -> None:
        if self.link.transport.reads_later and self.sent.receives:
            self.sent.receives[-1][1].synchronize()  # type: ignore[union-attr]

    def close(self) -> None:
        """May be called twice."""
        self._closing, self._died = True, False
        try:
            self.link.detach()  # before the follower frees the memory
        finally:
            if self.lost is None:
                with contextlib.suppress(FollowerLostError):  # then it has closed already
                    self.link.send({"kind": "close"})
            if self.process is not None:
                try:
                    self.process.wait(_CLOSE_TIMEOUT if self._started and self.lost is None else 0)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
                self._stderr.close()
            self.link.close()
            for kept in (self._unread, self._unpulled, self._residents):  # prompts, latents
                kept.clear()

    def _send(self, header: dict[str, Any]) -> None:
        with self._watch():
            self.link.send(header)

    @contextlib.contextmanager
    def _watch(self) -> Any:
        """Note the loss of the follower, once; whoever waits for its tensors is woken up.

        Anything that breaks off a message half-way (Ctrl-C, no memory for a result) loses it too: the rest of the
        message would be read as the next one."""
        if self.lost is not None:
            raise FollowerLostError(self.lost)
        try:
            yield
        except UnshippableError:  # raised before anything was sent
            raise
        except BaseException as error:
            cause = error if isinstance(error, FollowerLostError) else f"{type(error).__name__} {error}".strip()
            what = "was lost" if self._started else "did not start"
            self.lost = f"The follower on {self.device} {what}: {cause}. {self._last_words()}".strip()
            self._abort()
            if isinstance(error, FollowerLostError):
                raise FollowerLostError(self.lost) from None
            raise

    def _abort(self) -> None:
        """End the follower and every wait for it. A receive that NCCL has not finished by now leaves garbage behind."""
        if isinstance(self.link.transport, NcclTransport) and not self._died:
            self._died = any(not end.query() for _, end in self.sent.receives)  # type: ignore[union-attr]
        if self.process is not None:
            self.process.kill()  # first: NCCL's abort waits for a peer that is alive and does not answer
        self.link.transport.abort()

    def _end_waits_when_dead(self) -> None:
        """A receive that a dead follower will never answer blocks the GPU, so the host too; an abort ends it."""
        process = self.process
        if process is None:  # under torchrun, which ends every rank when one dies
            return

        def watch() -> None:
            while process.poll() is None:
                time.sleep(_WATCH_INTERVAL)
            if not self._closing:
                self._abort()

        threading.Thread(target=watch, name="cfg-parallel-watch", daemon=True).start()

    def _silent_and_alive(self) -> bool:
        return self._alive() and not self.link.has_message()

    def _alive(self) -> bool:
        return self.process is None or self.process.poll() is None

    def _last_words(self) -> str:
        if self._stderr is None or self._stderr.closed:
            return ""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"Its last words: {lines[-1]}" if lines else ""


def _bound_waits(conn: Connection, seconds: float) -> None:
    """A process that hangs half-way through a message, or takes none, does not hold up this one for longer."""
    limit = struct.pack("ll", int(min(seconds, 1e9)), int(seconds % 1 * 1e6) if seconds < 1e9 else 0)
    with socket.socket(fileno=os.dup(conn.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _identity(tensor: torch.Tensor | Rows) -> tuple[Any, ...]:
    """The tensor, kept alive so that identity is sound, its version, and which rows. Version -1 never matches."""
    base, *rows = (tensor.base, tensor.start, tensor.stop, tensor.dim) if isinstance(tensor, Rows) else (tensor,)
    return base, version(base), *rows


def _same(now: tuple[Any, ...], then: tuple[Any, ...]) -> bool:
    return now[0] is then[0] and now[1] == then[1] != -1 and now[2:] == then[2:]


def _value(tensor: torch.Tensor | Rows) -> torch.Tensor:
    return tensor.tensor() if isinstance(tensor, Rows) else tensor
