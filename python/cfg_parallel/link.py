"""One connection between the leader and a follower: headers on a local socket, tensors by a transport."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from cfg_parallel.codec import TensorSpec, flat_bytes, is_dense
from cfg_parallel.errors import FollowerLostError
from cfg_parallel.transports.host import HostTransport
from cfg_parallel.transports.nccl import NcclTransport
from cfg_parallel.transports.peer import Arrival, PeerTransport

_DETACH_TIMEOUT = 5.0  # seconds for the peer to let go of our memory
_CHECKSUM = 4  # bytes, ahead of each message
_MAX_HEADER = 1 << 30  # bytes; a longer one is a corrupted stream, not a message


class Link:
    """Both ends use the same class. Every message is a header (a dict) and any number of tensors.

    `read` returns a header as soon as it is there; `pull` receives its tensors, and must be called once, in order, for
    each header that has some. The two are apart because a receive posted before the local forward would make the GPU
    wait in the wrong place.
    """

    def __init__(self, conn: Connection, device: torch.device) -> None:
        self.device = device
        self.transport: HostTransport | NcclTransport | PeerTransport = HostTransport()
        self.bytes_sent = 0
        self.bytes_received = 0
        self._conn = conn
        self._pulled = 0
        self._retired: list[PeerTransport] = []  # no longer used; the peer may still have our memory mapped

    def send(self, header: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        self.transport.check()
        flats = [flat_bytes(tensor) for tensor in tensors]
        by_transport, inline = self._sort(flats)
        header |= {
            "specs": [TensorSpec.of(tensor, self.device) for tensor in tensors],
            "inline": [flat.numpy().tobytes() for flat in inline],
            "pulled": self._pulled,
            "descriptor": self.transport.stage(by_transport) if by_transport else None,
        }
        self.bytes_sent += sum(flat.numel() for flat in flats)
        try:
            data = pickle.dumps(header, protocol=5)
            self._conn.send_bytes(zlib.crc32(data).to_bytes(_CHECKSUM, "little") + data)
            if by_transport:
                self.transport.push(by_transport, self._conn)
        except OSError as error:
            raise FollowerLostError(f"the connection broke while sending: {error}") from error

    def read(self, timeout: float | None = None, alive: Callable[[], bool] = lambda: True) -> dict[str, Any]:
        """The next header. Raises FollowerLostError when the peer is gone or silent for `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while deadline is not None and not self._conn.poll(min(0.5, max(0.0, deadline - time.monotonic()))):
                if not alive():
                    raise FollowerLostError("the process ended")
                self.transport.check()
                if time.monotonic() >= deadline:
                    raise FollowerLostError(f"no answer within {timeout:.0f} s")
            header = _decode(self._conn.recv_bytes(_MAX_HEADER))
            if header["descriptor"] is not None:
                self.transport.accept(header["descriptor"], self._conn)
        except (EOFError, OSError) as error:
            raise FollowerLostError(f"the connection closed ({type(error).__name__})") from error
        self.transport.release(header["pulled"])
        return header

    def has_message(self, patience: float = 0.0) -> bool:
        """Whether there is one, or the peer has closed its end; waits for it for `patience` seconds."""
        return self._conn.poll(patience)

    def pull(self, header: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors that belong to `header`, on this side's device."""
        tensors = [spec.empty(self.device) for spec in header["specs"]]
        self.pull_into(header, tensors)
        return tensors

    def borrow(self, header: dict[str, Any], taken: Callable[[], None]) -> Arrival | None:
        """In the place of `pull`: the tensors where they lie in the receive buffer, for a kernel that waits for them.

        None when they do not lie there, or not all in one piece: then `pull` is to be called. `taken` is called when
        the arrival has been taken out of the buffer, in stream order."""
        transport = self.transport
        specs: Sequence[TensorSpec] = header["specs"]
        if not isinstance(transport, PeerTransport) or not all(spec.on_device for spec in specs):
            return None
        transport.check()
        nbytes = [spec.nbytes for spec in specs]

        def count() -> None:
            self._pulled += 1
            self.bytes_received += sum(nbytes)
            taken()

        return transport.borrow(nbytes, count)

    def pull_into(self, header: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        self.transport.check()
        dense = [tensor if is_dense(tensor) else torch.empty_like(tensor).contiguous() for tensor in tensors]
        flats = [flat_bytes(tensor) for tensor in dense]
        by_transport, inline = self._sort(flats)
        for flat, data in zip(inline, header["inline"], strict=True):
            if data:
                flat.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if by_transport:
            self.transport.pull(header["descriptor"], by_transport)
            self._pulled += 1
        for tensor, received in zip(tensors, dense, strict=True):
            if received is not tensor:
                tensor.copy_(received)
        self.bytes_received += sum(flat.numel() for flat in flats)

    def _sort(self, flats: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the transport moves, and what is small and in host memory anyway and so travels in the header."""
        if self.transport.name == "host":
            return flats, []
        on_device = [flat for flat in flats if flat.device.type == self.device.type]
        return on_device, [flat for flat in flats if flat.device.type != self.device.type]

    def settle(self) -> None:
        """Until what was pulled is here. Raises FollowerLostError when some of it never came."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.transport.check()

    def use(self, transport: HostTransport | NcclTransport | PeerTransport) -> None:
        """From now on; both sides have let go of what they used before."""
        self.transport = transport
        self._close_retired()

    def retire(self, transport: PeerTransport) -> None:
        """Let go of the peer's memory. Our own stays until the peer has let go of it: until `use`, or `close`."""
        self._retired.append(transport)
        transport.detach()

    def detach(self) -> None:
        """Let go of the peer's memory, if any: only headers travel now. Before another transport is used or the peer
        ends."""
        transport = self.transport
        if isinstance(transport, PeerTransport):
            self.transport = HostTransport()
            self.retire(transport)

    def close(self) -> None:
        try:
            self.detach()
            if self._retired:
                self._wait_for_detach()
            self._close_retired()
            self.transport.close()
        finally:
            self._conn.close()

    def _close_retired(self) -> None:
        while self._retired:
            self._retired.pop().close()

    def _wait_for_detach(self) -> None:
        """Until the peer closes its end, which it does when it has let go of our memory, or with its process."""
        if self._conn.closed:
            return
        with contextlib.suppress(OSError, EOFError):
            with socket.socket(fileno=os.dup(self._conn.fileno())) as end:
                end.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + _DETACH_TIMEOUT
            while self._conn.poll(max(0.0, deadline - time.monotonic())):
                self._conn.recv_bytes(_MAX_HEADER)


def _decode(message: bytes) -> dict[str, Any]:
    """What was damaged on its way must not be unpickled: it could raise, or be, anything."""
    checksum, data = message[:_CHECKSUM], message[_CHECKSUM:]
    if zlib.crc32(data).to_bytes(_CHECKSUM, "little") != checksum:
        raise FollowerLostError("a message was damaged on its way")
    header: dict[str, Any] = pickle.loads(data)
    return header
