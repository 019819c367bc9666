"""The queue: who waits, which replica is next, and what a request gets to hear on its way."""

from __future__ import annotations

import asyncio
import collections
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cfg_parallel.serving.observability import tell
from cfg_parallel.serving.replica import Replica
from cfg_parallel.serving.schemas import ApiError
from cfg_parallel.serving.work import Picture, Work

_FIRST_GUESS = 10.0  # seconds that a picture takes, before one was made


@dataclass(frozen=True)
class Step:
    """`steps` is None, and `step` 0, when a replica has taken the job."""

    step: int
    steps: int | None = None
    one_device: bool = False


@dataclass(frozen=True)
class Partial:
    index: int
    pictures: list[Picture]


@dataclass(frozen=True)
class Done:
    pictures: list[Picture]
    metrics: dict[str, Any]


Event = Step | Partial | Done


@dataclass(eq=False)
class Job:
    """A request that waits or runs. `events` ends with Done or with the error that the client gets; `gone`: nobody
    waits for it any more. `request_id` may be the client's, so that another job can have it too."""

    work: Work
    request_id: str
    came: float = field(default_factory=time.monotonic)
    started: float | None = None
    tries: int = 0
    gone: bool = False
    replica: Replica | None = None
    events: asyncio.Queue[Event | ApiError] = field(default_factory=asyncio.Queue)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def finish(self, event: Done | ApiError) -> None:
        self.events.put_nowait(event)
        self.over.set()

    @property
    def waited(self) -> float:
        """Seconds until a replica took it."""
        return (self.started or time.monotonic()) - self.came

    async def next(self, timeout: float) -> Event | None:
        """What happens next, Done at last; None when nothing does. Raises ApiError where there is no picture."""
        try:
            event = await asyncio.wait_for(self.events.get(), timeout)
        except asyncio.TimeoutError:
            return None
        if isinstance(event, ApiError):
            raise event
        return event


class Dispatcher:
    """Hands jobs to replicas in the order in which they came. All methods are for the event loop's thread."""

    def __init__(self, replicas: list[Replica], max_queue: int, made: Callable[[Job, Done], None]) -> None:
        self.replicas = replicas
        self.max_queue = max_queue
        self.stopping = False
        self._made = made
        self._waiting: collections.deque[Job] = collections.deque()
        self._wake = asyncio.Event()
        self._mean = _FIRST_GUESS  # seconds of a generation, the last ones most
        self._tasks: list[asyncio.Task[None]] = []
        for replica in replicas:
            replica.failed = self._give_up

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._feed(replica)) for replica in self.replicas]

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(replica.job is not None for replica in self.replicas)

    def admit(self) -> None:
        """Whether one more may come. Raises ApiError: 503 where no replica serves, 429 where too many wait."""
        if self.stopping:
            raise _stopping()
        if not any(replica.serves for replica in self.replicas):
            raise _not_ready()
        free = sum(replica.serves and replica.job is None for replica in self.replicas)
        if len(self._waiting) >= self.max_queue + free:
            seconds = math.ceil(self._mean * (len(self._waiting) + 1) / len(self.replicas))
            raise ApiError(
                429,
                f"As many requests wait as may ({self.max_queue}); try again in {seconds} s.",
                "rate_limit_error",
                code="queue_full",
                retry_after=seconds,
            )

    def submit(self, job: Job) -> None:
        """Raises ApiError as `admit`."""
        self.admit()
        self._waiting.append(job)
        self._wake.set()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: it leaves the queue, or ends at the next step."""
        job.gone = True
        if job in self._waiting:
            self._waiting.remove(job)
            job.finish(client_gone())
        elif job.replica is not None and not job.over.is_set():
            job.replica.cancel(job.work.id)

    def stop(self) -> None:
        """What runs is finished; what waits, and what comes, is refused."""
        self.stopping = True
        self._refuse_waiting(_stopping())

    def _give_up(self) -> None:
        """A replica has failed for good. When it was the last one, nobody will come for those who wait."""
        if self._all_failed:
            self._refuse_waiting(_not_ready())

    @property
    def _all_failed(self) -> bool:
        return all(replica.state == "failed" for replica in self.replicas)

    def _refuse_waiting(self, error: ApiError) -> None:
        while self._waiting:
            job = self._waiting.popleft()
            job.finish(error)

    def _why_not_again(self, job: Job, error: Exception) -> ApiError | None:
        """Why a job whose engine has ended is not run once more."""
        if job.gone:
            return client_gone()
        if self.stopping:
            return _stopping()
        if self._all_failed:
            return _not_ready()
        if job.tries > 1:
            return ApiError(500, f"The engine ended twice: {error}", "server_error", code="engine_lost")
        return None

    async def close(self) -> None:
        self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    async def _feed(self, replica: Replica) -> None:
        while True:
            await replica.ready()
            if replica.state == "failed":
                return
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            if not replica.serves:  # it died while nobody asked for anything
                continue
            job = self._waiting.popleft()
            job.started = job.started or time.monotonic()
            job.tries += 1
            job.events.put_nowait(Step(0))
            try:
                outcome = await replica.run(job)
            except ConnectionError as error:  # its process is gone; another one is started
                refused = self._why_not_again(job, error)
                if refused is None:
                    self._waiting.appendleft(job)
                    self._wake.set()
                    continue
                outcome = refused
            except Exception as error:  # no memory to send it, say: its client is told, and the next ones are served
                tell("error", "error", request_id=job.request_id, error=repr(error))
                outcome = ApiError(500, "The server has an error; see its log.", "server_error")
            if isinstance(outcome, Done):
                self._mean += 0.3 * (time.monotonic() - job.started - self._mean)
                self._made(job, outcome)
            job.finish(outcome)


def client_gone() -> ApiError:
    return ApiError(499, "The client has gone.", code="cancelled")


def _not_ready() -> ApiError:
    return ApiError(503, "No replica is ready; see /health.", "server_error", code="not_ready", retry_after=5)


def _stopping() -> ApiError:
    return ApiError(503, "The server is shutting down.", "server_error", code="shutting_down", retry_after=30)
