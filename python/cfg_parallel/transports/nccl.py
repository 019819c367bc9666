"""NCCL point-to-point on communicators of our own, through the libnccl that PyTorch has loaded.

One communicator a direction: the operations of a communicator run in the order in which they are posted, so with a
single one a result that the leader has not asked for yet would hold up the arguments of the next call: a deadlock with
three branches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from cfg_parallel import extension
from cfg_parallel.errors import CfgParallelError

_GROUP = 64  # buffers in one ncclGroup: the weights of a 20 B model are some 2000 tensors


class NcclTransport:
    """`rank` is 0 on the leader and 1 on the follower; `ids` are the unique ids of the two directions."""

    name = "nccl"
    reads_later = True

    def __init__(self, ids: tuple[bytes, bytes], rank: int, device: torch.device) -> None:
        native = extension.load()
        self._peer = 1 - rank
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            down = native.NcclComm(ids[0], rank, 2, device.index)
            up = native.NcclComm(ids[1], rank, 2, device.index)
        self._out, self._in = (down, up) if rank == 0 else (up, down)
        self._device = device
        self._exchange_tokens(rank)

    def _exchange_tokens(self, rank: int) -> None:
        """The first operation of a direction connects the two, and blocks the host until the peer posts its part: a
        follower held up in its first result could not answer the next call, and the leader may wait for that first."""
        token = torch.zeros(1, dtype=torch.uint8, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        buffer, stream = [(token.data_ptr(), 1)], self._stream.cuda_stream
        if rank == 0:
            self._out.send(buffer, self._peer, stream)
            self._in.recv(buffer, self._peer, stream)
        else:
            self._in.recv(buffer, self._peer, stream)
            self._out.send(buffer, self._peer, stream)
        self._stream.synchronize()

    @staticmethod
    def unique_ids() -> tuple[bytes, bytes]:
        native = extension.load()
        return native.nccl_unique_id(), native.nccl_unique_id()

    @classmethod
    def connect(
        cls,
        ids: tuple[bytes, bytes],
        rank: int,
        device: torch.device,
        timeout: float,
        peer_tries: Callable[[], bool] = lambda: True,
    ) -> NcclTransport:
        """Meet the peer, within `timeout` seconds and as long as it tries: ncclCommInitRank itself waits for ever."""
        result: list[Any] = []

        def init() -> None:
            try:
                result.append(cls(ids, rank, device))
            except Exception as error:
                result.append(error)

        thread = threading.Thread(target=init, name="cfg-parallel-nccl-init", daemon=True)
        thread.start()
        deadline = time.monotonic() + timeout
        while thread.is_alive() and time.monotonic() < deadline and peer_tries():
            thread.join(0.1)
        thread.join(1.0)  # the peer may have said that it is connected a moment before we are
        if not result:
            raise CfgParallelError(f"NCCL did not connect within {timeout:.0f} s; try transport='host'.")
        if isinstance(result[0], Exception):
            raise CfgParallelError(f"NCCL could not connect: {result[0]}; try transport='host'.") from result[0]
        return result[0]

    def stage(self, flats: Sequence[torch.Tensor]) -> None:
        return None

    def push(self, flats: Sequence[torch.Tensor], conn: Connection) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for start in range(0, len(flats), _GROUP):
            group = flats[start : start + _GROUP]
            self._out.send([(f.data_ptr(), f.numel()) for f in group], self._peer, self._stream.cuda_stream)
        for flat in flats:
            flat.record_stream(self._stream)

    def accept(self, descriptor: None, conn: Connection) -> None:
        return None

    def pull(self, descriptor: None, flats: Sequence[torch.Tensor]) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for start in range(0, len(flats), _GROUP):
            group = flats[start : start + _GROUP]
            self._in.recv([(f.data_ptr(), f.numel()) for f in group], self._peer, stream)

    def release(self, messages: int) -> None:
        return None

    def check(self) -> None:
        return None

    def abort(self) -> None:
        """Both at once. To free a communicator NCCL waits for the whole device, so for a kernel of the other one too,
        and that ends only when the other one is aborted."""
        failures: list[Exception] = []

        def abort(communicator: Any) -> None:
            try:
                communicator.abort()
            except RuntimeError as error:  # the module's errors are
                failures.append(error)

        thread = threading.Thread(target=abort, args=(self._out,), name="cfg-parallel-nccl-abort", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending; what is pending then is a receive
            abort(self._in)
            abort(self._out)
        else:
            abort(self._in)
            thread.join()
        if failures:
            raise failures[0]

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        self._out.abort()  # destroy would wait for a peer that may be gone; nothing is in flight here
        self._in.abort()
