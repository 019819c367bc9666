"""CUDA kernels, NCCL point-to-point and CUDA IPC. Pointers and streams are integers; nothing here knows PyTorch.

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

class Kernel:
    """A compiled kernel on one device, for as long as the process lives."""

    def __init__(self, image: bytes, name: str, device: int) -> None: ...

class Program:
    """What does not change from launch to launch: see csrc/program.h. Raises Error."""

    def __init__(
        self,
        sizes: Sequence[int],
        strides: Sequence[Sequence[int]],
        num_inputs: int,
        num_scalars: int,
        width: int,
        alignments: Sequence[int],
    ) -> None: ...
    def launch(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        scalars: Sequence[float],
        device: int,
        stream: int,
        peer: tuple[int, int, int, int, PeerWait] | None = None,
        statistics: Sequence[int] | None = None,
    ) -> tuple[int, int, int] | None:
        """Enqueue it on `stream`. An output may be the memory of an input, if both have the same layout.

        Without the kernel that this takes nothing is done, and which one is returned: (device, elements that a thread
        takes at once, arriving input or -1). `peer` = (input, offset, bytes, keep, wait): that input lies so many bytes
        into the next piece that the peer pushes, and is copied to the address `keep` too, unless that is 0.
        `statistics` = (address of the partial sums, of the tickets, elements of a sample, blocks for each)."""

    def add(self, variant: tuple[int, int, int], kernel: Kernel) -> None:
        """The kernel for what `launch` has returned."""

def kernel_headers() -> dict[str, str]:
    """What the source of a program's kernel includes: the text of each header by its name."""

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

class PeerFailure(enum.Enum):
    """Why a wait on the GPU ended without what it waited for."""

    none = ...
    timeout = ...
    aborted = ...
    peer_failed = ...
    broken = ...

class PeerWait:
    """What a kernel needs to read the next piece where it lies (csrc/peer_wait.cuh); opaque, good until `detach`."""

PEER_MAX_SEGMENTS: int

class PeerEndpoint:
    """One side of the peer transport: memory on our GPU that the peer's process writes into, and the peer's for us.

    A message travels in pieces of at most `slot_bytes`. Segments are (pointer, bytes, offset in the piece), by offset;
    offsets are multiples of 16, and a piece has at most PEER_MAX_SEGMENTS of them. `push` and `pull` only enqueue work;
    each side must keep its pushes in one order and its pulls in one order, by streams or events. They may be captured
    in CUDA graphs. `abort` may be called from any thread at any time; the rest is for one thread at a time."""

    def __init__(self, device: int, *, slot_bytes: int, chunk_bytes: int, push_blocks_per_sm: int = 2) -> None:
        """Allocates two slots. Both sides need the same `slot_bytes`, a multiple of `chunk_bytes`, a power of two."""

    def handle(self) -> bytes:
        """For the peer's `connect`."""

    def connect(self, handle: bytes) -> None:
        """Map the peer's memory. A handle of the same process works too, without IPC."""

    def gate(self, stream: int) -> None:
        """Enqueue a wait, by one thread, for the room that the next push needs; a push itself waits with all of its."""

    def push(self, segments: Sequence[tuple[int, int, int]], stream: int) -> None:
        """Enqueue the sending of the next piece."""

    def pull(self, segments: Sequence[tuple[int, int, int]], stream: int) -> None:
        """Enqueue the receiving of the next piece: the bytes and offsets of the peer's `push`."""

    def wait(self) -> PeerWait:
        """For a kernel that reads the next piece itself, in the place of `pull`."""

    def abort(self) -> None:
        """End every wait on the GPU, now and from now on. Makes no CUDA call."""

    def detach(self) -> None:
        """Abort, wait for the device and unmap the peer's memory; the peer may free it then. Idempotent."""

    def close(self) -> None:
        """Detach and free our memory; the peer should have detached by then. Idempotent."""

    timeout: float
    """Seconds that a wait of the kernels enqueued from now on may take."""

    @property
    def push_failure(self) -> PeerFailure:
        """The first wait of a push or a gate that was given up, once its stream has passed it."""

    @property
    def pull_failure(self) -> PeerFailure:
        """The first wait of a pull (or a kernel in its place) that was given up: what it received is garbage."""

    @property
    def device(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...
