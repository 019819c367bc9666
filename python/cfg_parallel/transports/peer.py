"""CUDA IPC: each side writes into a buffer on the other's GPU, over NVLink or PCIe (csrc/peer.h has the protocol).

Tensors of a message lie one after the other in pieces of at most a slot of the receiver's buffer, of which there are
two. The sender may be two pieces ahead of the receiver; a third waits until the first has been read.

Why no order of calls deadlocks:
* No stream that computes ever waits for room: pushes run on a stream of their own (`reads_later`). The follower's third
  result in a row waits there for the leader to pull the first, which the leader may do long after it has sent the
  arguments of a fourth call. On the stream that computes, it would keep the follower from those arguments, and once
  some thousand launches were queued behind it, the follower's host from saying that it has launched.
* A push that may have to wait is preceded by a wait of one thread (`gate`), and what waits for data uses a small part
  of each SM: a kernel that waits with the whole GPU would keep the peer's data, or our own, from being moved.
* So a pull waits only for the peer's stream to reach a push that has been posted, a push waits only for the peer's host
  to post the pulls of earlier messages, and arguments are pulled as soon as their header is read.
* The kernels are loaded when the endpoint is made: loading one waits for the device to be idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from cfg_parallel import extension
from cfg_parallel.errors import CfgParallelError, FollowerLostError

if TYPE_CHECKING:
    from cfg_parallel.link import Link

_SLOT_BYTES = 64 << 20
# 512 KiB, a typical prediction, are 128 chunks, each pushed by an SM of its own in one go. Of a larger message several
# chunks are pushed, and flagged, together.
_CHUNK_BYTES = 4 << 10
_PUSH_BLOCKS_PER_SM = 1  # one fills the link, and with more of them the first chunk lands later
_SLOTS = 2  # csrc/peer.h
_SEGMENTS = 64  # csrc/peer.h
_ALIGNMENT = 256  # bytes; of each tensor in a slot
_PROBE_BYTES = (1 << 20) + 5
_PROBE_TIMEOUT = 10.0  # seconds

_FAILURES = {
    "timeout": "the other GPU did not answer in time",
    "aborted": "it was given up",
    "peer_failed": "the other side had given up",
    "broken": "an exchange before it had failed",
}


def pieces(nbytes: Sequence[int], slot_bytes: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """How tensors of these sizes travel: for each piece, (tensor, first byte, bytes, offset in the slot) of its parts.

    Depends on nothing else, so that both sides come to the same. Without a byte to move there is no piece."""
    piece: list[tuple[int, int, int, int]] = []
    end = 0
    for index, size in enumerate(nbytes):
        start = 0
        while start < size:
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            if offset >= slot_bytes or len(piece) == _SEGMENTS:
                yield piece
                piece, end = [], 0
                continue
            part = min(size - start, slot_bytes - offset)
            piece.append((index, start, part, offset))
            start, end = start + part, offset + part
    if piece:
        yield piece


class Arrival:
    """A message that lies in one slot, or will: for a kernel that waits for it and reads it there.

    `wait` is the kernel's PeerWait (csrc/peer_wait.cuh says how to use it), `offsets` tells where each tensor begins in
    the slot. Call `launched` when such a kernel is on the current stream, or `copy_out`, and before the next message is
    pulled: the channel counts the messages that kernels have read."""

    def __init__(self, transport: PeerTransport, nbytes: Sequence[int], taken: Callable[[], None]) -> None:
        self.wait = transport.endpoint.wait()
        self.offsets = [0] * len(nbytes)
        for index, _, _, offset in next(pieces(nbytes, transport.endpoint.slot_bytes)):
            self.offsets[index] = offset
        self._transport = transport
        self._taken = taken

    def copy_out(self, flats: Sequence[torch.Tensor]) -> None:
        """Receive the message into `flats` after all, as `pull` does."""
        self._finish()
        self._transport.pull(None, flats)
        self._taken()

    def launched(self) -> None:
        """A kernel that waits, reads and acknowledges has been launched on the current stream, or captured in a graph
        that is replayed in its place."""
        self._finish()
        self._taken()

    def _finish(self) -> None:
        if self._transport.borrowed is not self:
            raise CfgParallelError("An arrival can be taken once.")
        self._transport.borrowed = None


class PeerTransport:
    name = "peer"
    reads_later = True

    def __init__(self, device: torch.device, slot_bytes: int = _SLOT_BYTES, chunk_bytes: int = _CHUNK_BYTES) -> None:
        native = extension.load()
        self.endpoint = native.PeerEndpoint(
            device.index, slot_bytes=slot_bytes, chunk_bytes=chunk_bytes, push_blocks_per_sm=_PUSH_BLOCKS_PER_SM
        )
        self.handle: bytes = self.endpoint.handle()  # for the peer's `connect`
        self.borrowed: Arrival | None = None
        self._device = device
        # First in line, so that arguments leave before the local forward fills the GPU.
        self._pushes = torch.cuda.Stream(device, priority=-1)
        self._last_pull: torch.cuda.Stream | None = None
        self._ahead = 0  # pieces pushed whose pulls the peer may not have posted yet
        self._sent: deque[int] = deque()  # pieces of each message that the peer has not said to have pulled
        self._released = 0
        self._aborted = False

    def stage(self, flats: Sequence[torch.Tensor]) -> None:
        return None

    def push(self, flats: Sequence[torch.Tensor], conn: Connection | None = None) -> None:
        self._pushes.wait_stream(torch.cuda.current_stream(self._device))
        stream = self._pushes.cuda_stream
        count = 0
        for piece in pieces([flat.numel() for flat in flats], self.endpoint.slot_bytes):
            if self._ahead >= _SLOTS:
                self.endpoint.gate(stream)
            self.endpoint.push(_segments(flats, piece), stream)
            self._ahead += 1
            count += 1
        self._sent.append(count)
        for flat in flats:
            flat.record_stream(self._pushes)

    def accept(self, descriptor: None, conn: Connection) -> None:
        return None

    def pull(self, descriptor: None, flats: Sequence[torch.Tensor]) -> None:
        stream = self._pull_stream()
        for piece in pieces([flat.numel() for flat in flats], self.endpoint.slot_bytes):
            self.endpoint.pull(_segments(flats, piece), stream.cuda_stream)

    def borrow(self, nbytes: Sequence[int], taken: Callable[[], None] = lambda: None) -> Arrival | None:
        """The next message, of tensors of these sizes, where it lies; None when it takes more than one piece, or none.

        `taken` is called when it has been read, in stream order."""
        if len(list(pieces(nbytes, self.endpoint.slot_bytes))) != 1:
            return None
        self._pull_stream()
        self.borrowed = Arrival(self, nbytes, taken)
        return self.borrowed

    def _pull_stream(self) -> torch.cuda.Stream:
        """The current stream, behind the last pull: the kernels count messages, so they must run one after the other.

        While a graph is captured, its replays' order among other pulls is the caller's to keep."""
        if self.borrowed is not None:
            raise CfgParallelError("A borrowed message must be taken before the next one is pulled.")
        stream = torch.cuda.current_stream(self._device)
        if not torch.cuda.is_current_stream_capturing():
            if self._last_pull is not None and self._last_pull != stream:
                stream.wait_stream(self._last_pull)
            self._last_pull = stream
        return stream

    def release(self, messages: int) -> None:
        while self._released < messages:
            self._ahead -= self._sent.popleft()
            self._released += 1

    @property
    def receive_failed(self) -> bool:
        """Something received is garbage. Valid for what the device has passed."""
        return self.endpoint.pull_failure.name != "none"

    def check(self) -> None:
        failure = next((f for f in (self.endpoint.pull_failure, self.endpoint.push_failure) if f.name != "none"), None)
        if failure is not None:
            raise FollowerLostError(f"an exchange of tensors failed: {_FAILURES[failure.name]}")
        if self._aborted:
            raise FollowerLostError("the exchange of tensors was given up")

    def abort(self) -> None:
        self._aborted = True
        self.endpoint.abort()

    def detach(self) -> None:
        """End every wait and let go of the peer's memory. What was pulled before stays good."""
        self._aborted = True
        self.endpoint.detach()

    def close(self) -> None:
        """Free our memory too. The peer should have let go of it: CUDA calls it undefined otherwise, though the driver
        keeps memory for as long as somebody has it mapped."""
        self._aborted = True
        self.endpoint.close()

    # The handshake sends a pattern each way, because CUDA can open a handle and still not move a byte.

    def connect(self, handle: bytes) -> None:
        self.endpoint.connect(handle)

    def set_timeout(self, seconds: float) -> None:
        """How long a wait on the GPU may take."""
        self.endpoint.timeout = seconds

    def send_pattern(self, seed: int) -> None:
        pattern = _pattern(seed, self._device)
        stream = torch.cuda.current_stream(self._device)
        for piece in pieces([pattern.numel()], self.endpoint.slot_bytes):
            self.endpoint.push(_segments([pattern], piece), stream.cuda_stream)

    def check_pattern(self, seed: int) -> None:
        """Raises when the pattern does not arrive within the time-out, or another one does."""
        expected = _pattern(seed, self._device)
        received = torch.zeros_like(expected)
        self.pull(None, [received])
        torch.cuda.synchronize(self._device)
        self.check()
        if not torch.equal(received, expected):
            raise CfgParallelError("bytes were changed on their way between the GPUs")


def _segments(flats: Sequence[torch.Tensor], piece: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int]]:
    return [(flats[index].data_ptr() + start, nbytes, offset) for index, start, nbytes, offset in piece]


def _pattern(seed: int, device: torch.device) -> torch.Tensor:
    return torch.arange(_PROBE_BYTES, device=device).mul_(seed).remainder_(251).to(torch.uint8)


_DOWN, _UP = 7, 11  # seeds of the two patterns


def offer(
    link: Link, make: Callable[[], PeerTransport], timeout: float, read: Callable[[], dict[str, Any]]
) -> str | None:
    """The leader's part of the handshake. Why the transport does not work here, or None: then the link uses it.

    Each step follows what the other side has said of its own, so nobody waits for a step that failed."""
    made: list[PeerTransport] = []
    failure = _attempt(lambda: made.append(make()))
    if failure is not None:
        return failure
    (transport,) = made
    try:
        failure = _offer(link, transport, timeout, read)
    except BaseException:
        link.retire(transport)
        raise
    if failure is not None:
        link.retire(transport)
        return failure
    transport.set_timeout(timeout)
    link.use(transport)
    return None


def _offer(link: Link, transport: PeerTransport, timeout: float, read: Callable[[], dict[str, Any]]) -> str | None:
    link.send({"kind": "transport", "name": "peer", "handle": transport.handle, "timeout": timeout})
    opened = read()
    if opened["kind"] == "error":
        return opened["message"]

    def probe() -> None:
        transport.set_timeout(_PROBE_TIMEOUT)
        transport.connect(opened["handle"])
        transport.send_pattern(_DOWN)

    failure = _attempt(probe)
    link.send({"kind": "probe", "failure": failure})
    verdict = read()
    if failure is not None:
        return failure
    if verdict["kind"] == "error":
        return verdict["message"]
    return _attempt(lambda: transport.check_pattern(_UP))


def accept(link: Link, transport: PeerTransport, header: dict[str, Any]) -> None:
    """The follower's part, when the leader's header of kind `transport` has come; then the link uses the transport, and
    the caller answers that it is connected. Raises when it does not work here, which the caller answers too."""
    try:
        transport.set_timeout(_PROBE_TIMEOUT)
        transport.connect(header["handle"])
        link.send({"kind": "opened", "handle": transport.handle})
        probe = link.read()
        if probe["failure"] is not None:
            raise CfgParallelError(probe["failure"])
        transport.check_pattern(_DOWN)
        transport.send_pattern(_UP)
    except BaseException:
        link.retire(transport)
        raise
    transport.set_timeout(header["timeout"])
    link.use(transport)


def _attempt(step: Callable[[], None]) -> str | None:
    """The message of what went wrong. Only CUDA and this package raise in there, and both raise RuntimeError."""
    try:
        step()
    except RuntimeError as error:
        return str(error)
    return None
