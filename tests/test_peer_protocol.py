"""The peer transport's rules: no order of calls deadlocks in a model of them, and a failed handshake does no harm."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg_parallel import enable, follower, remote
from cfg_parallel.errors import CfgParallelError, ConfigurationError, FollowerLostError
from cfg_parallel.follower import Follower
from cfg_parallel.link import Link
from cfg_parallel.remote import PeerUnavailableError, RemoteFollower
from cfg_parallel.transports import ASKED_FOR
from cfg_parallel.transports.peer import PeerTransport

CPU = torch.device("cpu")

# The protocol, as a model: hosts post work on streams, and any of them may be the next to make a step.

SLOTS, CHUNKS = 2, 2
Step = Iterator[bool]  # True when something was done, False while it has to wait


class Overwritten(Exception):
    pass


class Deadlock(Exception):
    pass


@dataclass
class Channel:
    """One direction. `credits` and `flag_first` are what the tests break."""

    credits: int = SLOTS
    flag_first: bool = False
    slots: list[list[Any]] = field(default_factory=lambda: [[None] * CHUNKS for _ in range(SLOTS)])
    flags: list[list[int]] = field(default_factory=lambda: [[0] * CHUNKS for _ in range(SLOTS)])
    pushed: int = 0
    pulled: int = 0
    consumed: int = 0

    def gate(self) -> Step:
        while self.consumed + self.credits < self.pushed + 1:
            yield False

    def push(self, gpu: Gpu, message: Any) -> Step:
        epoch = self.pushed + 1
        gpu.spinning += 1
        while self.consumed + self.credits < epoch:
            yield False
        gpu.spinning -= 1
        for chunk in range(CHUNKS):
            for write_flag in (self.flag_first, not self.flag_first):
                if write_flag:
                    self.flags[epoch % SLOTS][chunk] = epoch
                else:
                    self.slots[epoch % SLOTS][chunk] = (message, chunk)
                yield True
        self.pushed = epoch

    def pull(self, message: Any) -> Step:
        epoch = self.pulled + 1
        for chunk in range(CHUNKS):
            while self.flags[epoch % SLOTS][chunk] != epoch:
                yield False
            yield True
            if self.slots[epoch % SLOTS][chunk] != (message, chunk):
                raise Overwritten(f"{message} at epoch {epoch}")
            yield True
        self.pulled = epoch
        yield True
        self.consumed = epoch


@dataclass
class Gpu:
    """Two streams. `compute` has room for so many launches: a forward has thousands, and a message only a few. While a
    push spins with all of its blocks, nothing else runs."""

    room: int
    spinning: int = 0
    compute: deque[Step] = field(default_factory=deque)
    pushes: deque[Step] = field(default_factory=deque)

    def post(self, stream: deque[Step], work: Step) -> Step:
        while stream is self.compute and len(stream) >= self.room:
            yield False
        stream.append(work)
        yield True

    def kernel(self) -> Step:
        while self.spinning:
            yield False
        yield True


def record(event: list[bool]) -> Step:
    event.append(True)
    yield True


def wait_for(event: list[bool]) -> Step:
    while not event:
        yield False


@dataclass
class Sender:
    """The host's part of one direction: gates, and what the peer has said to have pulled."""

    channel: Channel
    gpu: Gpu
    gated: bool
    own_stream: bool
    ahead: int = 0

    def post(self, name: Any, count: int) -> Step:
        stream = self.gpu.pushes if self.own_stream else self.gpu.compute
        if self.own_stream:
            event: list[bool] = []
            yield from self.gpu.post(self.gpu.compute, record(event))
            yield from self.gpu.post(stream, wait_for(event))
        for piece in range(count):
            if self.ahead >= SLOTS and self.gated:
                yield from self.gpu.post(stream, self.channel.gate())
            yield from self.gpu.post(stream, self.channel.push(self.gpu, (name, piece)))
            self.ahead += 1


@dataclass(frozen=True)
class ModelCall:
    arguments: int  # pieces
    results: int
    waits: bool  # the leader waits for the header of its result at once, as for a signature that it does not know


@dataclass
class World:
    """Leader and follower: `steps` of calls shipped in a row; all of them are pulled by the end of a step."""

    steps: Sequence[Sequence[ModelCall]]
    gated: bool = True
    results_on_own_stream: bool = True
    credits: int = SLOTS
    flag_first: bool = False
    launches: int = 3  # of a forward
    room: int = 4

    def run(self, chance: random.Random) -> None:
        """Let any order of steps happen that `chance` picks. Raises Deadlock or Overwritten."""
        leader, served = Gpu(self.room), Gpu(self.room)
        down, up = Channel(self.credits, self.flag_first), Channel(self.credits, self.flag_first)
        ship = Sender(down, leader, self.gated, own_stream=True)
        answer = Sender(up, served, self.gated, own_stream=self.results_on_own_stream)
        # Headers: the number of a call, and how many pieces of results or arguments have been pulled until then.
        headers: deque[tuple[int, ModelCall, int]] = deque()
        answers: deque[int] = deque()
        read = 0

        def read_answer(number: int) -> Step:
            nonlocal read
            while read <= number:
                while not answers:
                    yield False
                ship.ahead -= answers.popleft()
                read += 1
                yield True

        def forward(gpu: Gpu) -> Step:
            for _ in range(self.launches):
                yield from gpu.post(gpu.compute, gpu.kernel())

        def pull(gpu: Gpu, channel: Channel, name: Any, count: int) -> Step:
            for piece in range(count):
                yield from gpu.post(gpu.compute, channel.pull((name, piece)))

        def lead() -> Step:
            pulled = number = 0
            for step in self.steps:
                first = number
                for call in step:
                    headers.append((number, call, pulled))
                    yield from ship.post(("arguments", number), call.arguments)
                    if call.waits:
                        yield from read_answer(number)
                    number += 1
                yield from forward(leader)
                for result, call in enumerate(step, start=first):
                    yield from read_answer(result)
                    yield from pull(leader, up, ("result", result), call.results)
                    pulled += call.results

        def serve() -> Step:
            released = 0
            for _ in range(sum(map(len, self.steps))):
                while not headers:
                    yield False
                number, call, pulled = headers.popleft()
                answer.ahead -= pulled - released
                released = pulled
                yield from pull(served, down, ("arguments", number), call.arguments)
                yield from forward(served)
                answers.append(call.arguments)
                yield from answer.post(("result", number), call.results)

        hosts: list[Step] = [lead(), serve()]
        streams = [leader.compute, leader.pushes, served.compute, served.pushes]
        while hosts or any(streams):
            queues: list[Any] = [*streams, *([host] for host in hosts)]
            chance.shuffle(queues)
            for queue in queues:
                if not queue:
                    continue
                try:
                    if next(queue[0]):
                        break
                except StopIteration:
                    if isinstance(queue, deque):
                        queue.popleft()
                    else:
                        hosts.remove(queue[0])
                    break
            else:
                raise Deadlock


def random_calls(chance: random.Random) -> list[list[ModelCall]]:
    def call() -> ModelCall:
        return ModelCall(chance.choice([0, 1, 1, 1, 2, 5]), chance.choice([0, 1, 1, 1, 2, 5]), chance.random() < 0.3)

    return [[call() for _ in range(chance.choice([1, 1, 2, 3, 4, 6]))] for _ in range(chance.randrange(1, 5))]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_no_order_of_calls_deadlocks_or_overwrites(seed: int) -> None:
    chance = random.Random(seed)
    World(random_calls(chance)).run(chance)


_IN_A_ROW = [[ModelCall(1, 1, waits=True)] * 5] * 2  # five calls to one follower, each header awaited at once


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ({"results_on_own_stream": False}, Deadlock),
        ({"gated": False}, Deadlock),
        ({"credits": SLOTS + 1}, (Overwritten, Deadlock)),  # or its flag is, so that nobody sees it
        ({"flag_first": True}, Overwritten),
    ],
    ids=["results on the stream that computes", "no gate", "a credit too many", "the flag before the chunk"],
)
def test_the_model_finds_what_is_wrong(broken: dict[str, Any], error: Any) -> None:
    """Each rule of the protocol is needed: without it one of these orders fails."""
    with pytest.raises(error):
        for seed in range(200):
            World(_IN_A_ROW, **broken).run(random.Random(seed))
    for seed in range(50):
        World(_IN_A_ROW).run(random.Random(seed))


# The handshake, with transports of host memory.


class FakePeer(PeerTransport):
    """As PeerTransport to the handshake and the link; `broken` names the step that fails."""

    def __init__(self, side: str, world: FakeWorld) -> None:
        if world.broken == f"{side} cannot be made":
            raise RuntimeError("CUDA: out of memory")
        self.side, self.world = side, world
        self.handle = side.encode()
        self.inbox: list[int] = []
        world.sides[side] = self

    def connect(self, handle: bytes) -> None:
        if self.world.broken == f"{self.side} cannot map":
            raise RuntimeError("CUDA: invalid device context")
        self.peer = self.world.sides[handle.decode()]
        self.world.events.append(f"{self.side} maps")

    def set_timeout(self, seconds: float) -> None:
        self.timeout = seconds

    def send_pattern(self, seed: int) -> None:
        if self.world.broken != f"{self.side} sends into nothing":
            self.peer.inbox.append(seed + (self.world.broken == f"{self.side} changes bytes"))

    def check_pattern(self, seed: int) -> None:
        if not self.inbox:
            raise FollowerLostError("an exchange of tensors failed: the other GPU did not answer in time")
        if self.inbox.pop() != seed:
            raise CfgParallelError("bytes were changed on their way between the GPUs")

    def check(self) -> None:
        return None

    def release(self, messages: int) -> None:
        assert messages == 0

    def detach(self) -> None:
        self.world.events.append(f"{self.side} unmaps")

    def close(self) -> None:
        self.world.events.append(f"{self.side} frees")


class FakeWorld:
    def __init__(self, broken: str | None) -> None:
        self.broken = broken
        self.sides: dict[str, FakePeer] = {}
        self.events: list[str] = []


@pytest.fixture
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RemoteFollower, FakeWorld]]:
    """The leader's end of a follower that runs in a thread; both would use FakePeer."""
    world = FakeWorld(request.param)
    monkeypatch.setattr(remote, "PeerTransport", lambda device: FakePeer("leader", world))
    monkeypatch.setattr(follower, "PeerTransport", lambda device: FakePeer("follower", world))
    ours, theirs = socket.socketpair()
    link = Link(Connection(theirs.detach()), CPU)

    def serve() -> None:
        Follower(link).serve()
        link.close()

    thread = threading.Thread(target=serve)
    thread.start()
    end = RemoteFollower(Connection(ours.detach()), CPU, CPU, timeout=30)
    yield end, world
    start = time.monotonic()
    end.close()
    thread.join(10)
    assert not thread.is_alive() and time.monotonic() - start < 3
    for importer, exporter in (("leader", "follower"), ("follower", "leader")):
        if f"{importer} maps" in world.events:
            assert world.events.index(f"{importer} unmaps") < world.events.index(f"{exporter} frees"), world.events
    assert all(f"{side} frees" in world.events for side in world.sides)


@pytest.mark.parametrize("ends", [None], indirect=True)
def test_handshake(ends: tuple[RemoteFollower, FakeWorld]) -> None:
    end, world = ends
    end.use_peer()
    assert end.link.transport is world.sides["leader"]
    assert [side.timeout for side in world.sides.values()] == [30, 30]
    assert end.statistics()["forward_ms"] == []


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ("leader cannot be made", "out of memory"),
        ("follower cannot be made", "out of memory"),
        ("leader cannot map", "invalid device context"),
        ("follower cannot map", "invalid device context"),
        ("leader sends into nothing", "did not answer in time"),
        ("follower sends into nothing", "did not answer in time"),
        ("leader changes bytes", "bytes were changed"),
        ("follower changes bytes", "bytes were changed"),
    ],
    indirect=["ends"],
)
def test_handshake_that_fails_leaves_the_link_as_it_was(ends: tuple[RemoteFollower, FakeWorld], message: str) -> None:
    end, _ = ends
    with pytest.raises(PeerUnavailableError, match=message):
        end.use_peer()
    assert end.lost is None and end.link.transport.name == "host"
    assert end.statistics()["forward_ms"] == []


class FakeRemote:
    def __init__(self, peer_works: bool) -> None:
        self.peer_works = peer_works
        self.used: list[str] = []

    def invite(self, modules: Any) -> None:
        return None

    def greet(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "gpu": None}

    def use_peer(self) -> None:
        if not self.peer_works:
            raise PeerUnavailableError("no IPC here")
        self.used.append("peer")

    def use_nccl(self) -> None:
        self.used.append("nccl")


def connect(works: list[bool], reason: str) -> tuple[SimpleNamespace, list[FakeRemote]]:
    leading = SimpleNamespace(transport="peer", _transport_reason=reason, _denoisers={}, devices=[CPU])
    remotes = [FakeRemote(each) for each in works]
    enable.Leading._connect(leading, remotes)  # type: ignore[arg-type]
    return leading, remotes


def test_auto_goes_on_to_nccl() -> None:
    leading, remotes = connect([True, True], "peer access")
    assert leading.transport == "peer" and [r.used for r in remotes] == [["peer"], ["peer"]]
    leading, remotes = connect([True, False], "peer access")
    assert (leading.transport, leading._transport_reason) == ("nccl", "peer does not work here: no IPC here")
    assert [r.used[-1] for r in remotes] == ["nccl", "nccl"]
    with pytest.raises(ConfigurationError, match="no IPC here; use transport='nccl'"):
        connect([False], ASKED_FOR)
