"""The server's side of a replica: it starts the process, gives it work, and starts another one when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from cfg_parallel.errors import ConfigurationError
from cfg_parallel.serving.observability import tell
from cfg_parallel.serving.schemas import ApiError
from cfg_parallel.serving.work import Facts

if TYPE_CHECKING:
    from cfg_parallel.serving.dispatcher import Done, Job
    from cfg_parallel.serving.settings import Settings

_TRIES = 5  # processes in a row that end before they have made a picture
_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0)  # seconds before each
_END = 5.0  # seconds for a process to end by itself


class Replica:
    def __init__(self, settings: Settings, number: int) -> None:
        self.number = number
        self.devices = settings.devices_of(number)
        self.state = "starting"  # then "ready", "lost" (until the next process is up) or "failed"
        self.failure: str | None = None
        self.facts: Facts | None = None
        self.followers: list[tuple[str, str | None]] = []  # device, and why it is lost, if it is
        self.follower_restarts = 0
        self.job: Job | None = None
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._outcome: asyncio.Future[Done | ApiError] | None = None
        self._heard = 0.0  # when the process last said something
        self.failed: Callable[[], None] = lambda: None  # called when there will be no more processes
        self._changed = asyncio.Event()
        self._ended = 0  # processes in a row
        self._restarts_before = 0
        self._closing = False

    @property
    def serves(self) -> bool:
        return self.state == "ready"

    @property
    def health(self) -> dict[str, Any]:
        lost = [f"{device}: {why}" for device, why in self.followers if why is not None]
        state = "degraded" if self.serves and lost else self.state
        shown: dict[str, Any] = {"state": state, "devices": list(self.devices), "busy": self.job is not None}
        shown |= {"followers_lost": lost, "follower_restarts": self.follower_restarts}
        return shown | ({"failure": self.failure} if self.failure else {})

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cfg_parallel.serving.worker", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection.send((self._settings, self.number))
        arguments = (self._connection, self._process, loop)
        threading.Thread(target=self._listen, args=arguments, name=f"replica-{self.number}", daemon=True).start()

    def _listen(self, connection: Connection, process: Any, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: every message, and then the end."""
        try:
            while True:
                loop.call_soon_threadsafe(self._hear, *connection.recv())
        except (EOFError, OSError):
            pass
        except Exception as error:  # a message that cannot be read, or a loop that is closed
            tell("unreadable message", "error", replica=self.number, error=repr(error))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.kill()
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._end, f"its process ended with exit status {process.returncode}")

    def _hear(self, kind: str, *what: Any) -> None:
        from cfg_parallel.serving.dispatcher import Done, Partial, Step

        self._heard = time.monotonic()
        if kind == "ready":
            (self.facts,) = what
            self.state = "ready"
            self._changed.set()
            tell("replica ready", replica=self.number, devices=list(self.devices), pipeline=self.facts.pipeline)
        elif kind == "unusable":
            self.failure = what[0]
        elif kind == "followers":
            self.followers, restarts = what
            self.follower_restarts = self._restarts_before + restarts
            for _, why in self.followers:
                if why is not None:
                    tell("follower lost", "warning", replica=self.number, reason=why)
        elif kind == "warning":
            tell("warning", "warning", replica=self.number, text=what[0], **self._request())
        elif self.job is None or self.job.work.id != what[0]:
            return  # of a job that was given up
        elif kind == "step":
            self.job.events.put_nowait(Step(*what[1:]))
        elif kind == "partial":
            self.job.events.put_nowait(Partial(*what[1:]))
        elif kind == "done":
            self._ended = 0
            self._settle(Done(*what[1:]))
        elif kind == "failed":
            self._settle(_error_of(*what[1:]))

    def _request(self) -> dict[str, str]:
        return {} if self.job is None else {"request_id": self.job.request_id}

    def _settle(self, outcome: Done | ApiError) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)

    def _end(self, how: str) -> None:
        """The process is gone."""
        if self._closing:
            return
        self._ended += 1
        why = self.failure or how
        self.state, self.followers = "lost", []
        self._restarts_before = self.follower_restarts
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(ConnectionError(why))
        if self.facts is None or self._ended >= _TRIES:
            self.state, self.failure = "failed", why
            self._changed.set()
            tell("replica failed", "error", replica=self.number, reason=why)
            self.failed()
            return
        tell("replica lost", "error", replica=self.number, reason=why)
        self.failure = None
        asyncio.get_running_loop().call_later(_PAUSES[self._ended], self._start_again)

    def _start_again(self) -> None:
        if self._closing:
            return
        try:
            self.start()
        except OSError as error:  # no process, no file
            self._end(f"no process could be started ({error})")

    async def loaded(self) -> None:
        """Waits for the first process. Raises ConfigurationError with what is wrong."""
        await self.ready()
        if self.state == "failed":
            raise ConfigurationError(self.failure or "the engine did not start")

    async def ready(self) -> None:
        """Until it serves, or never will."""
        while self.state not in ("ready", "failed"):
            self._changed.clear()
            await self._changed.wait()

    async def run(self, job: Job) -> Done | ApiError:
        """Raises ConnectionError when the process ends before the picture is there."""
        assert self._connection is not None
        self.job, job.replica = job, self
        self._outcome = asyncio.get_running_loop().create_future()
        self._heard = time.monotonic()
        watching = asyncio.create_task(self._watch(job, self._outcome))
        try:
            try:
                await asyncio.to_thread(self._send, self._connection, ("work", job.work))
            except OSError as error:
                if not self._outcome.done():
                    raise ConnectionError(str(error)) from error
            return await self._outcome
        finally:
            watching.cancel()
            self.job = job.replica = None

    async def _watch(self, job: Job, outcome: asyncio.Future[Done | ApiError]) -> None:
        """Ends a process that hangs. Its job is not run again, as it may be the cause."""
        assert self._process is not None
        most = self._settings.max_step_seconds
        while (left := self._heard + most - time.monotonic()) > 0:
            await asyncio.sleep(left)
        if outcome.done():
            return
        self.state, self.failure = "lost", f"no step within {most:g} s"
        tell("engine hangs", "error", replica=self.number, reason=self.failure, request_id=job.request_id)
        outcome.set_result(ApiError(500, f"The engine hangs: {self.failure}.", "server_error", code="engine_hangs"))
        self._process.kill()

    def cancel(self, work_id: str) -> None:
        def send() -> None:
            assert self._connection is not None
            with contextlib.suppress(OSError):  # the process is gone, which run() says
                self._send(self._connection, ("cancel", work_id))

        asyncio.get_running_loop().run_in_executor(None, send)

    def _send(self, connection: Connection, message: Any) -> None:
        with self._sending:
            connection.send(message)

    async def close(self) -> None:
        self._closing = True
        if self._connection is not None:
            with contextlib.suppress(OSError):
                socket_shutdown(self._connection)
        if self._process is not None:
            await asyncio.to_thread(self._wait_for_end, self._process)

    @staticmethod
    def _wait_for_end(process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def socket_shutdown(connection: Connection) -> None:
    """End a connection whose file another thread is reading: to close it would not wake that up."""
    with socket.socket(fileno=connection.fileno()) as shared:
        try:
            shared.shutdown(socket.SHUT_RDWR)
        finally:
            shared.detach()


def _error_of(reason: str, message: str) -> ApiError:
    from cfg_parallel.serving.dispatcher import client_gone

    if reason == "cancelled":
        return client_gone()
    if reason == "refused":
        return ApiError(400, message, code="invalid_value")
    return ApiError(500, message, "server_error", code="generation_failed")
