"""CUDA kernels and NCCL point-to-point. Pointers and streams are integers; nothing here knows PyTorch.

Every failed call raises `Error` with the message of CUDA or NCCL and the file:line of the check. Calls that can block
release the GIL. The current CUDA device is the same after a call as before it.
"""

import enum
from collections.abc import Sequence
from typing import TypedDict

class Error(RuntimeError): ...

class BuildInfo(TypedDict):
    version: str
    cuda: str
    archs: str
    compiler: str
    pybind11: str

def build_info() -> BuildInfo: ...
def cuda_device_count() -> int:
    """Number of visible CUDA devices; 0 without a GPU or a driver."""

class DType(enum.Enum):
    float32 = ...
    float16 = ...
    bfloat16 = ...

class Numerics(enum.Enum):
    exact = ...
    fused = ...

def combine(
    cond: int,
    uncond: int,
    out: int,
    numel: int,
    scale: float,
    *,
    dtype: DType,
    numerics: Numerics,
    device: int,
    stream: int,
) -> None:
    """out = uncond + scale * (cond - uncond) over `numel` values; `out` may equal `cond` or `uncond`."""

def nccl_version() -> int:
    """22809 for 2.28.9. Raises when libnccl.so.2 is neither loaded nor on the loader's path."""

def nccl_unique_id() -> bytes:
    """128 bytes that name a new communicator: made by one rank, passed by every rank."""

class NcclComm:
    """One rank of a communicator of our own. `abort` and `async_error` may be called from any thread at any time."""

    def __init__(self, unique_id: bytes, rank: int, world_size: int, device: int) -> None:
        """Blocks, without bound, until all ranks have called it: run it in a thread where that matters."""

    def send(self, buffers: Sequence[tuple[int, int]], peer: int, stream: int) -> None:
        """Enqueue one group of sends of (pointer, bytes) on `stream`. Empty buffers are skipped, on both sides."""

    def recv(self, buffers: Sequence[tuple[int, int]], peer: int, stream: int) -> None:
        """Enqueue one group of receives: the same sizes in the same order as the peer's `send`."""

    def abort(self) -> None:
        """End pending kernels and host calls and free the communicator. Idempotent; other methods raise after it."""

    def destroy(self) -> None:
        """Free the communicator once the work enqueued on it is done. Idempotent; other methods raise after it."""

    def async_error(self) -> str | None:
        """What NCCL found wrong in the background, such as a peer that died."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> int: ...
