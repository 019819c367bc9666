"""The kinds of fault: each makes one happen at a random point of a generation, and fills in an Outcome."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from faults.world import Outcome, World

Kind = Callable[[World, random.Random, Outcome], None]


def _signal_later(process: Any, what: int, seconds: float) -> threading.Timer:
    """The process may have ended by then, with the pipeline's next follower in its place."""

    def send() -> None:
        if process.poll() is None:
            os.kill(process.pid, what)

    timer = threading.Timer(seconds, send)
    timer.start()
    return timer


def killed_before(world: World, rng: random.Random, outcome: Outcome) -> None:
    os.kill(world.follower.pid, signal.SIGKILL)
    time.sleep(rng.choice([0.0, 0.05]))
    world.attempt(rng.randrange(1000), outcome)


def _at_a_random_time(what: int) -> Kind:
    def fault(world: World, rng: random.Random, outcome: Outcome) -> None:
        seed = rng.randrange(1000)
        seconds = world.good(seed)
        timer = _signal_later(world.follower, what, rng.uniform(0, 1.1 * seconds))
        world.attempt(seed, outcome)
        timer.join()

    return fault


def killed_in_a_callback(world: World, rng: random.Random, outcome: Outcome) -> None:
    process, at = world.follower, rng.randrange(3)

    def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if pipe is not world.plain and step == at and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(rng.choice([0.0, 0.02]))
        return {}

    world.attempt(rng.randrange(1000), outcome, callback_on_step_end=on_step)


def _in_its_forward(what: str) -> Kind:
    def fault(world: World, rng: random.Random, outcome: Outcome) -> None:
        world.order(what, after=rng.randrange(3))
        world.attempt(rng.randrange(1000), outcome)
        world.orders.unlink(missing_ok=True)

    return fault


class _Damaged:
    """A connection that spoils the message after `after` others."""

    def __init__(self, connection: Any, how: str, after: int, rng: random.Random) -> None:
        self._connection, self._how, self._after, self._rng = connection, how, after, rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def recv_bytes(self, *limit: int) -> bytes:
        data: bytes = self._connection.recv_bytes(*limit)
        self._after -= 1
        if self._after != -1:
            return data
        if self._how == "cut":
            return data[: self._rng.randrange(len(data))]
        spoiled = bytearray(data)
        for _ in range(self._rng.choice([1, 8])):
            spoiled[self._rng.randrange(len(spoiled))] ^= 1 << self._rng.randrange(8)
        return bytes(spoiled)


def _damaged_message(how: str) -> Kind:
    def fault(world: World, rng: random.Random, outcome: Outcome) -> None:
        link = world.handle._leader.remotes[0].link
        link._conn = _Damaged(link._conn, how, rng.randrange(3), rng)
        world.attempt(rng.randrange(1000), outcome)

    return fault


def no_new_follower(world: World, rng: random.Random, outcome: Outcome) -> None:
    """Two more generations while the next follower does not come up either."""
    with tempfile.TemporaryDirectory() as folder:
        executable = Path(folder, "python")
        executable.write_text(rng.choice(["#!/bin/sh\necho no memory >&2\nexit 1\n", "#!/bin/sh\nexec sleep 60\n"]))
        executable.chmod(0o700)
        with mock.patch.object(sys, "executable", str(executable)):
            killed_in_a_callback(world, rng, outcome)
            for _ in range(2):
                world.attempt(rng.randrange(1000), outcome)
                time.sleep(0.1)
    for process in list(world.handle._successors._starting.values()):
        process.process.kill()  # one that only sleeps is not waited for here


def callback_raises(world: World, rng: random.Random, outcome: Outcome) -> None:
    at = rng.randrange(3)

    def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if pipe is not world.plain and step == at:
            raise ZeroDivisionError("the user's")
        return {}

    try:
        world.generate(random.Random(rng.randrange(1000)), callback_on_step_end=on_step)
    except ZeroDivisionError:
        world.attempt(rng.randrange(1000), outcome)


def interrupted(world: World, rng: random.Random, outcome: Outcome) -> None:
    """Ctrl-C, at any moment of the main thread; the generation after it counts."""
    seed = rng.randrange(1000)
    seconds = world.good(seed)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, seconds))
        world.generate(random.Random(seed))
        time.sleep(seconds)
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    world.attempt(rng.randrange(1000), outcome)


KINDS: dict[str, Kind] = {
    "killed before the generation": killed_before,
    "killed at a random time": _at_a_random_time(signal.SIGKILL),
    "killed between two steps": killed_in_a_callback,
    "killed in its forward": _in_its_forward("kill"),
    "stopped at a random time": _at_a_random_time(signal.SIGSTOP),
    "stopped in its forward": _in_its_forward("stop"),
    "exit in its forward": _in_its_forward("exit"),
    "error in its forward": _in_its_forward("raise"),
    "no memory in its forward": _in_its_forward("no memory"),
    "a message is damaged": _damaged_message("spoil"),
    "a message is cut": _damaged_message("cut"),
    "no new follower comes up": no_new_follower,
    "a callback raises": callback_raises,
    "Ctrl-C": interrupted,
}
