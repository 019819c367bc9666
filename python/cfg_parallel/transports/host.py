"""Shared memory between two processes of one machine: for CPU runs, and for GPUs when NCCL cannot be used.

Segments are anonymous (`memfd_create`) and handed over as file descriptors, so no name is left behind however a
process ends.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection

import torch

_ALIGNMENT = 64  # bytes; keeps every tensor on a cache line of its own
_GRAIN = 1 << 20  # segments are powers of two from 1 MiB, so that sizes that grow do not leave one of each behind


class _Segment:
    """One stretch of shared memory, as a uint8 tensor."""

    def __init__(self, number: int, fd: int, nbytes: int) -> None:
        self.number = number
        self.fd = fd
        self.memory = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return self.memory.numel()


def _offsets(flats: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for flat in flats:
        offsets.append(end)
        end += -(-flat.numel() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class HostTransport:
    name = "host"
    reads_later = False

    def __init__(self) -> None:
        self._own: list[_Segment] = []
        self._free: list[_Segment] = []
        self._sent: deque[_Segment] = deque()  # in the order of the messages they carry
        self._released = 0
        self._announced: set[int] = set()
        self._peers: dict[int, _Segment] = {}

    def stage(self, flats: Sequence[torch.Tensor]) -> tuple[int, int, bool]:
        offsets, total = _offsets(flats)
        segment = next((s for s in self._free if s.nbytes >= total), None)
        if segment is None:
            nbytes = max(_GRAIN, 1 << (total - 1).bit_length())
            fd = os.memfd_create("cfg-parallel")
            os.ftruncate(fd, nbytes)
            segment = _Segment(len(self._own), fd, nbytes)
            self._own.append(segment)
        else:
            self._free.remove(segment)
        for flat, offset in zip(flats, offsets, strict=True):
            segment.memory[offset : offset + flat.numel()].copy_(flat)  # from a GPU this waits for the value
        self._sent.append(segment)
        return segment.number, segment.nbytes, segment.number not in self._announced

    def push(self, flats: Sequence[torch.Tensor], conn: Connection) -> None:
        segment = self._sent[-1]
        if segment.number not in self._announced:
            self._announced.add(segment.number)
            reduction.send_handle(conn, segment.fd, None)  # type: ignore[arg-type]  # the pid is for Windows
            os.close(segment.fd)  # the mapping stays

    def accept(self, descriptor: tuple[int, int, bool], conn: Connection) -> None:
        number, nbytes, is_new = descriptor
        if is_new:
            fd = reduction.recv_handle(conn)
            self._peers[number] = _Segment(number, fd, nbytes)
            os.close(fd)

    def pull(self, descriptor: tuple[int, int, bool], flats: Sequence[torch.Tensor]) -> None:
        memory = self._peers[descriptor[0]].memory
        for flat, offset in zip(flats, _offsets(flats)[0], strict=True):
            flat.copy_(memory[offset : offset + flat.numel()])

    def release(self, messages: int) -> None:
        while self._released < messages:
            self._free.append(self._sent.popleft())
            self._released += 1

    def check(self) -> None:
        return None

    def abort(self) -> None:
        self.close()

    def close(self) -> None:
        for segment in self._own:
            if segment.number not in self._announced:
                os.close(segment.fd)
        self._own.clear()
        self._free.clear()
        self._sent.clear()
        self._peers.clear()
