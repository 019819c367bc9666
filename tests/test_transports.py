"""The transports between two processes: every byte arrives, nothing grows, a peer's death is noticed."""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from cfg_parallel import extension, transports
from cfg_parallel.codec import flat_bytes
from cfg_parallel.errors import CfgParallelError, ConfigurationError, FollowerLostError
from cfg_parallel.link import Link
from cfg_parallel.transports.host import HostTransport
from cfg_parallel.transports.nccl import NcclTransport
from cfg_parallel.transports.peer import PeerTransport, offer

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn]

# The other process: it does what each header says.
PEER = textwrap.dedent("""
    import sys, time
    import torch
    from multiprocessing.connection import Connection
    from cfg_parallel.link import Link

    device = torch.device(sys.argv[2])
    link = Link(Connection(int(sys.argv[1])), device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    waiting = []
    while True:
        header = link.read()
        kind = header["kind"]
        if kind == "close":
            if link.transport.name != "peer":
                link.close()
            break
        if kind == "transport":
            if header["name"] == "peer":
                from cfg_parallel.transports.peer import PeerTransport, accept
                accept(link, PeerTransport(device, *map(int, sys.argv[3:])), header)
                link.send({"kind": "connected"})
            else:
                from cfg_parallel.transports.nccl import NcclTransport
                link.send({"kind": "connecting"})
                link.transport = NcclTransport.connect(header["ids"], 1, device, 60)
            continue
        if kind == "hang":
            time.sleep(600)
        tensors = link.pull(header) if header["specs"] else []
        if kind == "echo":
            time.sleep(header.get("delay", 0))
            link.send({"kind": "echo", "number": header["number"]}, tensors)
        elif kind == "add":  # results in the order of the calls, however late they are asked for
            if header.get("cycles"):
                torch.cuda._sleep(header["cycles"])
            for _ in range(header.get("launches", 0)):
                torch.zeros(1, device=device)
            link.send({"kind": "sum"}, [t + 1 for t in tensors])
        elif kind == "stream":  # without a header for each message
            import random
            from cfg_parallel.codec import flat_bytes
            chance = random.Random(1)
            for i in range(header["count"]):
                if chance.random() < 0.02:
                    torch.cuda._sleep(chance.randrange(300_000))
                value = torch.empty(header["sizes"][i % len(header["sizes"])], device=device)
                link.transport.pull(None, [flat_bytes(value)])
                link.transport.push([flat_bytes(value + 1)])
            torch.cuda.synchronize()
            link.send({"kind": "streamed"})
        elif kind == "replay":
            endpoint = link.transport.endpoint
            value = torch.zeros(header["numel"], device=device).add_(1)
            segments, graph = [(value.data_ptr(), value.nbytes, 0)], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                stream = torch.cuda.current_stream().cuda_stream
                endpoint.pull(segments, stream)
                value.add_(1)
                endpoint.push(segments, stream)
            for _ in range(header["count"]):
                graph.replay()
            torch.cuda.synchronize()
            link.send({"kind": "replayed"})
        elif kind == "facts":
            import os
            transport = link.transport
            facts = {"fds": len(os.listdir("/proc/self/fd"))}
            if transport.name == "host":
                facts |= {"own": len(transport._own), "peers": len(transport._peers)}
            link.send({"kind": "facts", "facts": facts})
""")


class Peer:
    """The other process, and this side's link to it."""

    def __init__(self, here: torch.device = CPU, there: torch.device = CPU, slot_bytes: int = 64 << 20) -> None:
        ours, theirs = socket.socketpair()
        package = str(Path(transports.__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER, str(theirs.fileno()), str(there), str(slot_bytes)],
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self.link = Link(Connection(ours.detach()), here)
        self.slot_bytes = slot_bytes

    def use(self, name: str) -> None:
        if name == "peer":
            device, slot_bytes = self.link.device, self.slot_bytes
            failure = offer(self.link, lambda: PeerTransport(device, slot_bytes), 60, lambda: self.link.read(60))
            assert failure is None, failure
            return
        ids = NcclTransport.unique_ids()
        self.link.send({"kind": "transport", "name": "nccl", "ids": ids})
        self.link.read(60)
        self.link.transport = NcclTransport.connect(ids, 0, self.link.device, 60)

    def echo(self, tensors: list[torch.Tensor], number: int = 0) -> list[torch.Tensor]:
        self.link.send({"kind": "echo", "number": number}, tensors)
        header = self.link.read(30)
        assert header["number"] == number
        return self.link.pull(header) if header["specs"] else []

    def facts(self) -> dict[str, int]:
        self.link.send({"kind": "facts"})
        return self.link.read(30)["facts"]

    def end(self) -> None:
        if self.process.poll() is None:
            try:
                self.link.detach()
                self.link.send({"kind": "close"})
                self.process.wait(10)
            except (CfgParallelError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        self.link.close()


@pytest.fixture(scope="module")
def shared_peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.end()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    peer.echo([])  # it is up
    yield peer
    peer.end()


def random_tensors(seed: int, device: torch.device = CPU) -> list[torch.Tensor]:
    """Of any dtype, layout and size, from none to a few MB; now and then in host memory beside a GPU's."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(chance.randrange(6)):
        shape = [chance.choice([0, 1, 2, 3, 7, 64]) for _ in range(chance.randrange(5))]
        tensor = torch.randn(shape, generator=generator) * 4
        dtype = chance.choice(DTYPES)
        tensor = tensor > 0 if dtype == torch.bool else tensor.to(dtype)
        if tensor.dim() > 1 and chance.random() < 0.5:
            tensor = tensor.transpose(0, -1)
        if tensor.dim() and chance.random() < 0.3:
            tensor = tensor[..., ::2]
        tensors.append(tensor.to(device) if chance.random() < 0.8 else tensor)
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype, a.device.type) != (b.shape, b.dtype, b.device.type):
        return False
    a, b = a.cpu(), b.cpu()
    return torch.equal(a.float(), b.float()) if a.dtype.itemsize == 1 else torch.equal(a, b)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


# The host transport.


def test_random_tensors_both_ways(shared_peer: Peer) -> None:
    for seed in range(60):
        tensors = random_tensors(seed)
        assert equal(shared_peer.echo(tensors, seed), tensors)


def test_what_arrives_stays(shared_peer: Peer) -> None:
    """Memory is used again for the next message, but never while somebody holds what came in the last one."""
    kept = [(shared_peer.echo(random_tensors(seed)), random_tensors(seed)) for seed in range(20)]
    assert all(equal(a, b) for a, b in kept)


def test_sent_tensors_may_be_overwritten_at_once(shared_peer: Peer) -> None:
    tensor = torch.ones(1 << 20)
    shared_peer.link.send({"kind": "echo", "number": 1, "delay": 0.05}, [tensor])
    tensor.zero_()
    assert shared_peer.link.pull(shared_peer.link.read(30))[0].eq(1).all()


def test_many_in_flight_arrive_in_order(shared_peer: Peer) -> None:
    link = shared_peer.link
    for number in range(20):
        link.send({"kind": "echo", "number": number}, [torch.full((1000,), number)])
    headers = [link.read(30) for _ in range(20)]
    assert [header["number"] for header in headers] == list(range(20))
    assert [link.pull(header)[0][0].item() for header in headers] == list(range(20))


def test_pull_into(shared_peer: Peer) -> None:
    link = shared_peer.link
    value = torch.randn(4, 6)
    for target in (torch.zeros(4, 6), torch.zeros(6, 4).t(), torch.zeros(4, 12)[:, ::2], torch.zeros(8, 6)[1:5]):
        link.send({"kind": "echo", "number": 0}, [torch.empty_like(target).copy_(value)])
        link.pull_into(link.read(30), [target])
        assert torch.equal(target, value)


def test_segments_are_used_again_and_descriptors_do_not_grow(peer: Peer) -> None:
    def run() -> None:
        for seed in range(30):
            tensors = [*random_tensors(seed), torch.ones(1 << (10 + seed % 12))]
            assert equal(peer.echo(tensors), tensors)

    run()
    transport = peer.link.transport
    assert isinstance(transport, HostTransport)
    ours, theirs = psutil.Process().num_fds(), peer.facts()
    for _ in range(3):
        run()
    assert psutil.Process().num_fds() == ours and peer.facts() == theirs
    assert len(transport._own) <= 6 and theirs["own"] <= 6
    assert sum(segment.nbytes for segment in transport._own) <= 64 << 20
    for _ in range(5):  # a burst needs more, once
        for _ in range(8):
            peer.link.send({"kind": "echo", "number": 0}, [torch.ones(1000)])
        for _ in range(8):
            peer.link.pull(peer.link.read(30))
    assert len(transport._own) <= 16


def test_growing_messages_do_not_keep_every_size(peer: Peer) -> None:
    """Images of ever larger sizes: what is too small for the present ones is memory lost."""
    for mib in range(1, 25):
        peer.echo([torch.ones(mib << 18)])
    transport = peer.link.transport
    assert isinstance(transport, HostTransport)
    assert sum(segment.nbytes for segment in transport._own) <= 4 * 24 << 20


def test_nothing_is_left_behind() -> None:
    before, named = psutil.Process().num_fds(), set(os.listdir("/dev/shm"))
    peer = Peer()
    peer.echo([torch.ones(1 << 20)])
    peer.end()
    assert psutil.Process().num_fds() == before and set(os.listdir("/dev/shm")) <= named


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_death_is_noticed_while_waiting(peer: Peer, how: signal.Signals) -> None:
    peer.link.send({"kind": "hang"})
    threading.Timer(0.2, peer.process.send_signal, [how]).start()
    start = time.monotonic()
    with pytest.raises(FollowerLostError, match="closed"):
        peer.link.read(60, lambda: peer.process.poll() is None)
    assert time.monotonic() - start < 2
    with pytest.raises(FollowerLostError):
        for _ in range(3):
            peer.link.send({"kind": "echo", "number": 0}, [torch.ones(10)])


def test_death_is_noticed_while_another_process_holds_the_socket(peer: Peer) -> None:
    """A grandchild that inherited it keeps it open: the end of the process has to be asked for."""
    other = os.dup(peer.link._conn.fileno())  # an unrelated open end does no harm
    peer.link.send({"kind": "hang"})
    alive = iter([True])
    start = time.monotonic()
    with pytest.raises(FollowerLostError, match="ended"):
        peer.link.read(60, lambda: next(alive, False))
    assert time.monotonic() - start < 2
    os.close(other)
    peer.process.kill()


def test_silence_is_noticed(peer: Peer) -> None:
    peer.link.send({"kind": "hang"})
    start = time.monotonic()
    with pytest.raises(FollowerLostError, match="no answer within 1 s"):
        peer.link.read(0.6)
    assert 0.5 < time.monotonic() - start < 2
    peer.process.kill()


def test_death_before_the_tensors_were_pulled(peer: Peer) -> None:
    """They are in shared memory already: what was sent can be received."""
    value = torch.randn(1 << 18)
    peer.link.send({"kind": "echo", "number": 0}, [value])
    header = peer.link.read(30)
    peer.process.kill()
    peer.process.wait()
    assert torch.equal(peer.link.pull(header)[0], value)


@pytest.fixture
def raw() -> Iterator[tuple[Link, socket.socket]]:
    """A link, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    link = Link(Connection(ours.detach()), CPU)
    with closing(theirs):
        yield link, theirs
        link.close()


def pickled(header: Any) -> bytes:
    body = pickle.dumps(header)
    return struct.pack("!i", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!i", -1) + struct.pack("!Q", 1 << 40),
        struct.pack("!i", (1 << 30) + 1),
        struct.pack("!i", 100) + b"short",
        struct.pack("!i", 4) + b"\x80\x05K",
        struct.pack("!i", 8) + b"garbage!",
        struct.pack("!i", 0),
        pickled({"kind": "echo", "specs": [], "inline": [], "pulled": 0, "descriptor": (0, 1 << 20, True)}),
    ],
    ids=["huge", "over the limit", "cut", "cut pickle", "garbage", "empty", "no fd"],
)
def test_corrupt_stream(raw: tuple[Link, socket.socket], data: bytes) -> None:
    """One kind of error whatever is wrong with the stream, so that the leader goes on alone."""
    link, theirs = raw
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_RDWR)
    with pytest.raises(FollowerLostError):
        link.read(5)


def test_closed_links_say_so() -> None:
    ours, theirs = socket.socketpair()
    link, other = Link(Connection(ours.detach()), CPU), Link(Connection(theirs.detach()), CPU)
    other.send({"kind": "a"}, [torch.ones(3)])
    other.close()
    assert link.pull(link.read(1))[0].tolist() == [1, 1, 1]
    with pytest.raises(FollowerLostError):
        link.read(1)
    link.close()
    with pytest.raises(FollowerLostError):
        link.send({"kind": "a"})


def test_abort_lets_go_of_the_memory() -> None:
    transport = HostTransport()
    fds = psutil.Process().num_fds()
    for _ in range(3):
        transport.stage([torch.ones(10, dtype=torch.uint8)])
    transport.abort()
    assert psutil.Process().num_fds() == fds


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 2)]
    access = {(i, j) for i in range(3) for j in range(3)}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a.index, b.index) in access)
    monkeypatch.setattr(extension, "missing_reason", lambda: None)
    assert transports.resolve("auto", [CPU, CPU]) == ("host", "not all devices are GPUs")
    assert transports.resolve("auto", gpus[:1])[0] == "host"
    assert transports.resolve("host", gpus) == ("host", "asked for")
    assert transports.resolve("nccl", gpus) == ("nccl", "asked for")
    assert transports.resolve("peer", gpus) == ("peer", "asked for")
    assert transports.resolve("auto", gpus[:2]) == ("peer", "peer access between cuda:0 and cuda:1")
    access -= {(1, 2), (2, 1)}  # followers do not talk to each other
    assert transports.resolve("auto", gpus)[0] == "peer"
    access -= {(2, 0)}
    assert transports.resolve("auto", gpus) == ("nccl", "no peer access between cuda:0 and cuda:2")
    with pytest.raises(ConfigurationError, match=r"no peer access between cuda:0 and cuda:2 .* use 'nccl'"):
        transports.resolve("peer", gpus)
    for name in ("nccl", "peer"):
        with pytest.raises(ConfigurationError, match=f"{name}.* needs GPUs"):
            transports.resolve(name, [CPU, CPU])
    with pytest.raises(ConfigurationError, match="'mpi'"):
        transports.resolve("mpi", gpus)
    monkeypatch.setattr(extension, "missing_reason", lambda: "nvcc was not found.")
    assert transports.resolve("auto", gpus) == (
        "host",
        "peer and nccl need the compiled extension: nvcc was not found.",
    )
    with pytest.raises(ConfigurationError, match="needs the compiled extension: nvcc was not found"):
        transports.resolve("peer", gpus)


def test_nccl_aborts_both_directions_at_once() -> None:
    """One by one would be a deadlock: NCCL frees a communicator when the kernels of the other one have ended too."""
    both = threading.Barrier(2, timeout=10)
    transport = object.__new__(NcclTransport)
    transport._out = transport._in = SimpleNamespace(abort=both.wait)
    transport.abort()


# NCCL and CUDA IPC, on two GPUs.

EXCHANGES = int(os.environ.get("CFG_PARALLEL_TEST_EXCHANGES", "1000"))  # of the tests that repeat one many times


def connected(name: str) -> Iterator[Peer]:
    peer = Peer(torch.device("cuda", 0), torch.device("cuda", 1))
    with torch.cuda.device(0):
        try:
            peer.use(name)
            yield peer
        finally:
            peer.end()


@pytest.fixture(params=["nccl", "peer"])
def gpu_peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    yield from connected(request.param)


@pytest.fixture
def ipc_peer() -> Iterator[Peer]:
    yield from connected("peer")


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(180)
def test_gpu_random_tensors_both_ways(gpu_peer: Peer) -> None:
    for seed in range(60):
        tensors = random_tensors(seed, torch.device("cuda", 0))
        assert equal(gpu_peer.echo(tensors, seed), tensors)


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(180)
def test_gpu_results_outstanding_while_arguments_travel(gpu_peer: Peer) -> None:
    """Two results that nobody has asked for, and the arguments of a third call: no order of these may deadlock."""
    link = gpu_peer.link
    for round_ in range(10):
        calls = [[torch.full((1 << 20,), float(10 * round_ + i), device="cuda:0")] for i in range(4)]
        for call in calls[:2]:
            link.send({"kind": "add"}, call)
        first, second = link.read(60), link.read(60)
        link.send({"kind": "add"}, calls[2])
        results = [link.pull(first), link.pull(second)]
        link.send({"kind": "add"}, calls[3])
        results += [link.pull(link.read(60)), link.pull(link.read(60))]
        for call, result in zip(calls, results, strict=True):
            assert torch.equal(result[0], call[0] + 1)


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(180)
def test_gpu_is_stream_ordered(gpu_peer: Peer) -> None:
    """Sent before the value is computed, on both sides, and overwritten right after: no host wait is needed for it."""
    link = gpu_peer.link
    tensor = torch.zeros(1 << 22, device="cuda:0")
    torch.cuda._sleep(400_000_000)
    tensor.fill_(3)
    link.send({"kind": "add", "cycles": 400_000_000}, [tensor])
    copied = tensor.clone()
    start = time.monotonic()
    header = link.read(60)
    (result,) = link.pull(header)
    after = result * 2
    assert time.monotonic() - start < 10
    assert torch.equal(after, torch.full_like(after, 8.0)) and torch.equal(copied, tensor)


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(180)
def test_gpu_many_tensors(gpu_peer: Peer) -> None:
    """More than one group of them, as the weights of a model are."""
    tensors = [torch.full((i % 50,), float(i), device="cuda:0") for i in range(300)]
    assert equal(gpu_peer.echo(tensors), tensors)


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(180)
def test_gpu_abort_wakes_a_pending_receive(gpu_peer: Peer) -> None:
    link = gpu_peer.link
    link.send({"kind": "echo", "number": 0}, [torch.ones(4, device="cuda:0")])
    header = link.read(60)
    link.pull(header)
    gpu_peer.process.send_signal(signal.SIGSTOP)
    link.pull(header)  # for a message that will never be sent
    start = time.monotonic()

    def give_up() -> None:  # in this order: NCCL's abort waits for a peer that is alive and does not answer
        gpu_peer.process.kill()
        link.transport.abort()

    threading.Timer(0.5, give_up).start()
    torch.cuda.synchronize(0)
    assert 0.3 < time.monotonic() - start < 5
    assert (torch.ones(4, device="cuda:0") + 1).tolist() == [2.0] * 4  # the device is as good as new
    if isinstance(link.transport, PeerTransport):
        assert link.transport.receive_failed
        with pytest.raises(FollowerLostError, match="exchange of tensors"):
            link.pull(header)
    gpu_peer.process.wait()


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(180)
def test_gpu_death_of_the_peer_is_no_hang(gpu_peer: Peer) -> None:
    link = gpu_peer.link
    gpu_peer.process.kill()
    start = time.monotonic()
    with pytest.raises(FollowerLostError):
        link.read(60, lambda: gpu_peer.process.poll() is None)
    link.transport.abort()
    link.close()
    assert time.monotonic() - start < 5


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(180)
def test_gpu_large_tensors(gpu_peer: Peer) -> None:
    """More than the slots hold, in one tensor and in many, at odd sizes and offsets."""
    memory = torch.randint(256, (200 << 20,), dtype=torch.uint8, device="cuda:0")
    for tensors in ([memory], [memory[1:]], [memory[i << 20 : (i + 3 << 20) + i] for i in range(40)], [memory[:0]]):
        assert equal(gpu_peer.echo(tensors), tensors)


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(180)
def test_peer_many_calls_in_a_row(ipc_peer: Peer) -> None:
    """More results that nobody has asked for than there are slots, behind a forward of thousands of launches."""
    link = ipc_peer.link
    for numel in (1, 1 << 20, 40 << 20):
        calls = [[torch.full((numel,), float(i), device="cuda:0")] for i in range(6)]
        headers = []
        for call in calls:
            link.send({"kind": "add", "launches": 2000}, call)
            headers.append(link.read(60))
        for call, header in zip(calls, headers, strict=True):
            assert torch.equal(link.pull(header)[0], call[0] + 1)


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(120 + EXCHANGES // 1000)
def test_peer_many_exchanges_with_delays(ipc_peer: Peer) -> None:
    """CFG_PARALLEL_TEST_EXCHANGES=1000000 takes minutes."""
    sizes = [1, 1000, 70_000, 5, 262_144, 4097]
    transport, chance = ipc_peer.link.transport, random.Random(0)
    assert isinstance(transport, PeerTransport)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda:0")
    ipc_peer.link.send({"kind": "stream", "count": EXCHANGES, "sizes": sizes})
    for i in range(EXCHANGES):
        if chance.random() < 0.02:
            torch.cuda._sleep(chance.randrange(300_000))
        value = torch.full((sizes[i % len(sizes)],), float(i % 1000), device="cuda:0")
        transport.push([flat_bytes(value)])
        back = torch.empty_like(value)
        transport.pull(None, [flat_bytes(back)])
        wrong += (back != value + 1).sum()
    assert ipc_peer.link.read(60)["kind"] == "streamed"
    ipc_peer.link.settle()
    assert wrong.item() == 0


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(120 + EXCHANGES // 1000)
@pytest.mark.parametrize("numel", [1, 131_072, 1 << 20])
def test_peer_replayed_from_graphs(ipc_peer: Peer, numel: int) -> None:
    transport = ipc_peer.link.transport
    assert isinstance(transport, PeerTransport)
    endpoint = transport.endpoint
    value, back = torch.zeros(numel, device="cuda:0"), torch.ones(numel, device="cuda:0")
    wrong = (back != value.add_(1).remainder_(1000)).sum()  # loads the kernels, and counts nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        value.add_(1).remainder_(1000)
        endpoint.push([(value.data_ptr(), value.nbytes, 0)], stream)
        endpoint.pull([(back.data_ptr(), back.nbytes, 0)], stream)
        wrong += (back != value + 1).sum()
    ipc_peer.link.send({"kind": "replay", "count": EXCHANGES, "numel": numel})
    for _ in range(EXCHANGES):
        graph.replay()
    assert ipc_peer.link.read(60 + EXCHANGES / 1000)["kind"] == "replayed"
    ipc_peer.link.settle()
    assert wrong.item() == 0
    tensors = [torch.ones(1000, device="cuda:0")]
    assert equal(ipc_peer.echo(tensors), tensors)  # what is not replayed goes on where the replays stopped


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(120)
def test_peer_borrowed_messages(ipc_peer: Peer) -> None:
    """Taken out by `copy_out` in the place of `pull`; what is not in one piece, or not on the GPU, cannot be lent."""
    link = ipc_peer.link
    taken: list[int] = []
    for i in range(5):
        tensors = [torch.full((1000,), float(i), device="cuda:0"), torch.ones(3, device="cuda:0")]
        link.send({"kind": "echo", "number": i}, tensors)
        header = link.read(30)
        arrival = link.borrow(header, lambda: taken.append(1))
        assert arrival is not None and arrival.offsets == [0, 4096]
        with pytest.raises(CfgParallelError, match="must be taken"):
            link.transport.pull(None, [])
        received = [torch.empty_like(tensor) for tensor in tensors]
        arrival.copy_out([flat_bytes(tensor) for tensor in received])
        assert len(taken) == i + 1 and equal(received, tensors)
        with pytest.raises(CfgParallelError, match="taken once"):
            arrival.launched()
    for tensors in ([torch.ones(65 << 20, dtype=torch.uint8, device="cuda:0")], [torch.ones(3)]):
        link.send({"kind": "echo", "number": 0}, tensors)
        header = link.read(30)
        assert link.borrow(header, lambda: None) is None
        assert equal(link.pull(header), tensors)


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(120)
def test_peer_pulls_on_several_streams_stay_in_order(ipc_peer: Peer) -> None:
    link = ipc_peer.link
    streams = [torch.cuda.Stream(0) for _ in range(3)]
    for i in range(30):
        value = torch.full((1 << 16,), float(i), device="cuda:0")
        link.send({"kind": "add", "cycles": 1_000_000 if i % 3 == 0 else 0}, [value])
    results = []
    for i in range(30):
        with torch.cuda.stream(streams[i % 3]):
            results += link.pull(link.read(30))
    torch.cuda.synchronize()
    assert [result[0].item() for result in results] == [i + 1.0 for i in range(30)]


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(120)
def test_peer_two_followers() -> None:
    """Both on the second GPU, each with a channel of its own."""
    peers = [Peer(torch.device("cuda", 0), torch.device("cuda", 1)) for _ in range(2)]
    try:
        with torch.cuda.device(0):
            for peer in peers:
                peer.use("peer")
            for i in range(20):
                calls = [[torch.full((1 << 18,), float(10 * i + j), device="cuda:0")] for j in range(4)]
                for peer, call in zip(peers * 2, calls, strict=True):
                    peer.link.send({"kind": "add"}, call)
                for peer, call in zip(peers * 2, calls, strict=True):
                    assert torch.equal(peer.link.pull(peer.link.read(30))[0], call[0] + 1)
    finally:
        for peer in peers:
            peer.end()


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(120)
def test_peer_that_stops_is_noticed_in_time(ipc_peer: Peer) -> None:
    """A pull whose message never comes ends by itself, and its garbage is not taken for a result."""
    link, transport = ipc_peer.link, ipc_peer.link.transport
    assert isinstance(transport, PeerTransport)
    ipc_peer.process.send_signal(signal.SIGSTOP)
    transport.set_timeout(1.0)
    transport.pull(None, [torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:0")])
    start = time.monotonic()
    with pytest.raises(FollowerLostError, match="did not answer in time"):
        link.settle()
    assert 0.5 < time.monotonic() - start < 10
    for use in (lambda: link.send({"kind": "a"}), lambda: link.read(0.6), lambda: link.pull({"specs": []})):
        with pytest.raises(FollowerLostError):
            use()
    ipc_peer.process.kill()


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(120)
def test_peer_memory_of_a_dead_process(ipc_peer: Peer) -> None:
    """What is pushed after its end goes nowhere, and does no harm to the GPU."""
    transport = ipc_peer.link.transport
    assert isinstance(transport, PeerTransport)
    ipc_peer.process.kill()
    ipc_peer.process.wait()
    time.sleep(0.5)
    transport.set_timeout(1.0)
    for _ in range(3):
        transport.push([torch.ones(1 << 20, dtype=torch.uint8, device="cuda:0")])
    torch.cuda.synchronize(0)
    with pytest.raises(FollowerLostError, match="did not answer in time"):
        transport.check()
    ipc_peer.link.close()
    assert (torch.ones(4, device="cuda:0") + 1).tolist() == [2.0] * 4


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", ["close", "kill"])
def test_peer_leaves_no_memory_behind(how: str) -> None:
    """A quarter of each GPU at a time, five times over."""
    slot_bytes = min(torch.cuda.get_device_properties(i).total_memory for i in range(2)) // 8 >> 20 << 20
    with torch.cuda.device(0):
        for _ in range(5):
            peer = Peer(torch.device("cuda", 0), torch.device("cuda", 1), slot_bytes)
            peer.use("peer")
            tensors = [torch.ones(1000, device="cuda:0")]
            assert equal(peer.echo(tensors), tensors)
            if how == "kill":
                peer.process.kill()
                peer.process.wait()
            peer.end()
