"""The peer transport without a second GPU: its layout, its kernels as CPU threads, its endpoints within one process."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfg_parallel import extension
from cfg_parallel.transports.peer import _ALIGNMENT, _SEGMENTS, _segments, pieces

# Layout.


@given(
    st.lists(st.one_of(st.integers(0, 3000), st.sampled_from([0, 256, 1024, 4096])), max_size=150),
    st.sampled_from([512, 1024, 4096, 1 << 20]),
)
def test_pieces_hold_every_byte_once(nbytes: list[int], slot_bytes: int) -> None:
    seen: dict[int, int] = defaultdict(int)
    for piece in pieces(nbytes, slot_bytes):
        assert 1 <= len(piece) <= _SEGMENTS
        end = 0
        for index, start, size, offset in piece:
            assert start == seen[index], "the bytes of a tensor travel in order"
            assert size > 0 and offset >= end and offset % _ALIGNMENT == 0 and offset + size <= slot_bytes
            end = offset + size
            seen[index] += size
    assert [seen[i] for i in range(len(nbytes))] == nbytes


def test_pieces_are_few() -> None:
    assert list(pieces([], 1024)) == list(pieces([0, 0], 1024)) == []
    assert list(pieces([1, 300, 0, 5], 1024)) == [[(0, 0, 1, 0), (1, 0, 300, 256), (3, 0, 5, 768)]]
    assert list(pieces([2500], 1024)) == [[(0, 0, 1024, 0)], [(0, 1024, 1024, 0)], [(0, 2048, 452, 0)]]
    assert len(list(pieces([4] * (_SEGMENTS + 1), 1 << 20))) == 2


def test_constants_are_those_of_the_module() -> None:
    if extension.missing_reason() is None:
        assert extension.load().PEER_MAX_SEGMENTS == _SEGMENTS


# The kernels.

_CSRC = Path(__file__).parents[1] / "csrc"
_ON_CPU = Path(__file__).parent / "peer_on_cpu"


def _compile(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    command = [compiler, "-std=c++20", "-O1", "-g", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += [*flags, "-I", str(folder), str(folder / "main.cpp"), "-o", str(folder / "main"), "-pthread"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "weakened",
    [
        None,
        pytest.param("memory_order_release", marks=pytest.mark.thorough),
        pytest.param("memory_order_acquire", marks=pytest.mark.thorough),
        "memory_order_acq_rel",
    ],
)
def test_kernels_as_cpu_threads(tmp_path: Path, weakened: str | None) -> None:
    """Every byte arrives, waits end, and ThreadSanitizer finds each access ordered; it finds a race as soon as one of
    the memory orders is missing."""
    for source in [
        *_ON_CPU.iterdir(),
        *(_CSRC / name for name in ("peer.h", "peer_wait.h", "peer_wait.cuh", "peer_kernels.cuh")),
    ]:
        shutil.copy(source, tmp_path)
    orders = tmp_path / "memory_order.cuh"
    if weakened is not None:
        text = orders.read_text()
        assert weakened in text
        orders.write_text(text.replace(weakened, "memory_order_relaxed"))
    built = _compile(tmp_path, "-fsanitize=thread")
    if "tsan" in built.stderr:
        pytest.skip("the C++ compiler has no ThreadSanitizer")
    assert (built.returncode, built.stderr) == (0, "")
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, timeout=120, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    if weakened is None:
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
    else:
        assert "data race" in done.stderr and "peer_copy" in done.stderr


# The endpoints.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slot_bytes": 4096, "chunk_bytes": 1000}, "power of two"),
        ({"slot_bytes": 4096, "chunk_bytes": 8}, "power of two of at least 16"),
        ({"slot_bytes": 5000, "chunk_bytes": 1024}, "multiple of it, but got 1024 and 5000"),
        ({"slot_bytes": 4096, "chunk_bytes": 1024, "push_blocks_per_sm": 0}, "push_blocks_per_sm >= 1, but got 0"),
    ],
)
def test_endpoint_refuses(arguments: dict[str, int], message: str) -> None:
    if extension.missing_reason() is not None:
        pytest.skip("cfg-parallel was installed without its CUDA module")
    native = extension.load()
    with pytest.raises(native.Error, match=message + r".*\[peer\.cu:\d+\]"):
        native.PeerEndpoint(0, **arguments)


SLOT_BYTES, CHUNK_BYTES = 64 << 10, 4 << 10


class Pair:
    """Two endpoints of this process on one GPU; `exchange` sends from the first to the second."""

    def __init__(self) -> None:
        native = extension.load()
        self.a, self.b = (native.PeerEndpoint(0, slot_bytes=SLOT_BYTES, chunk_bytes=CHUNK_BYTES) for _ in range(2))
        self.a.connect(self.b.handle())
        self.b.connect(self.a.handle())
        self.a.timeout = self.b.timeout = 20

    def push(self, flats: list[torch.Tensor]) -> None:
        for piece in pieces([flat.numel() for flat in flats], SLOT_BYTES):
            self.a.push(_segments(flats, piece), torch.cuda.current_stream().cuda_stream)

    def pull(self, flats: list[torch.Tensor]) -> None:
        for piece in pieces([flat.numel() for flat in flats], SLOT_BYTES):
            self.b.pull(_segments(flats, piece), torch.cuda.current_stream().cuda_stream)

    def failures(self) -> list[str]:
        torch.cuda.synchronize()
        return [f.name for end in (self.a, self.b) for f in (end.push_failure, end.pull_failure)]


NO_FAILURE = ["none"] * 4


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    for end in (pair.a, pair.b):
        end.detach()
    for end in (pair.a, pair.b):
        end.close()


def random_flats(chance: random.Random) -> list[torch.Tensor]:
    """Bytes of several tensors, at any alignment; at most two slots of them, since nobody pulls meanwhile."""
    flats = []
    for _ in range(chance.choice([1, 1, 2, 5, 70])):
        size = chance.choice([0, 1, 15, 16, 17, 255, 256, 1000, CHUNK_BYTES, CHUNK_BYTES + 1, 20_000])
        shift = chance.choice([0, 0, 1, 2, 4, 8])
        flats.append(torch.randint(256, (size + shift,), dtype=torch.uint8, device="cuda")[shift:])
    while len(list(pieces([flat.numel() for flat in flats], SLOT_BYTES))) > 2:
        flats.pop()
    return flats


def shifted(flats: list[torch.Tensor], chance: random.Random) -> list[torch.Tensor]:
    """Room for the same sizes, at other alignments."""
    return [torch.zeros(f.numel() + 16, dtype=torch.uint8, device="cuda")[s : f.numel() + s] for f in flats
            for s in [chance.choice([0, 0, 1, 2, 4, 8])]]  # fmt: skip


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


gpu = [pytest.mark.gpu, pytest.mark.timeout(90)]


class TestOnOneGpu:
    pytestmark = gpu

    def test_round_trips(self, pair: Pair) -> None:
        """Push before pull on one stream, so that it also runs under compute-sanitizer, which may serialise kernels."""
        chance = random.Random(0)
        for _ in range(100):
            sent = random_flats(chance)
            received = shifted(sent, chance)
            pair.push(sent)
            pair.pull(received)
            assert all_equal(sent, received)
        assert pair.failures() == NO_FAILURE

    @pytest.mark.parametrize("late", ["sender", "receiver"])
    def test_waits(self, pair: Pair, late: str) -> None:
        """Ten messages through two slots, on two streams, with one of them late."""
        chance = random.Random(1)
        sender, receiver = torch.cuda.Stream(), torch.cuda.Stream()
        messages = [random_flats(chance) for _ in range(10)]
        received = [shifted(message, chance) for message in messages]
        torch.cuda.synchronize()
        with torch.cuda.stream(sender if late == "sender" else receiver):
            torch.cuda._sleep(100_000_000)
        with torch.cuda.stream(receiver):
            for message in received:
                pair.pull(message)
        with torch.cuda.stream(sender):
            for message in messages:
                pair.a.gate(sender.cuda_stream)
                pair.push(message)
        assert pair.failures() == NO_FAILURE
        assert all(map(all_equal, messages, received))

    def test_replayed_from_a_graph(self, pair: Pair) -> None:
        """The epochs are counted on the GPU: replays go on where the last one stopped, and so does what is not one."""
        source = torch.arange(10_000, device="cuda").to(torch.uint8)
        target, wrong = torch.zeros_like(source), torch.zeros((), dtype=torch.int64, device="cuda")
        pair.push([source])
        pair.pull([target])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            source.add_(1)
            pair.push([source])
            pair.pull([target])
            wrong += (source != target).sum()
        for _ in range(3):
            for _ in range(333):
                graph.replay()
            pair.push([source])
            pair.pull([target.zero_()])
            assert torch.equal(source, target)
        assert pair.failures() == NO_FAILURE and wrong.item() == 0

    def test_a_wait_ends_in_time_and_nothing_follows_it(self, pair: Pair) -> None:
        data, room = torch.ones(9000, dtype=torch.uint8, device="cuda"), torch.zeros(9000, dtype=torch.uint8).cuda()
        pair.b.timeout = 0.3
        start = time.monotonic()
        pair.pull([room])
        assert pair.failures() == ["none", "none", "none", "timeout"]
        assert 0.2 < time.monotonic() - start < 3
        pair.b.push([(data.data_ptr(), 9000, 0)], torch.cuda.current_stream().cuda_stream)
        assert pair.failures()[2] == "broken"
        pair.a.pull([(room.data_ptr(), 9000, 0)], torch.cuda.current_stream().cuda_stream)
        assert pair.failures()[1] == "peer_failed"
        assert (data + 1).sum().item() == 18000, "the GPU is as good as before"

    def test_a_slot_that_was_not_read_is_not_overwritten(self, pair: Pair) -> None:
        messages = [torch.full((5000,), i, dtype=torch.uint8, device="cuda") for i in range(3)]
        received = [torch.zeros_like(message) for message in messages]
        pair.a.timeout = 0.3
        for message in messages:
            pair.push([message])
        assert pair.failures() == ["timeout", "none", "none", "none"]
        for target in received[:2]:
            pair.pull([target])
        assert all_equal(received[:2], messages[:2])
        pair.pull([received[2]])
        assert pair.failures()[3] == "peer_failed"

    def test_abort_ends_every_wait_at_once(self, pair: Pair) -> None:
        start = time.monotonic()
        for _ in range(20):
            pair.pull([torch.zeros(100_000, dtype=torch.uint8, device="cuda")])
        threading.Timer(0.3, pair.b.abort).start()
        assert pair.failures()[3] == "aborted"
        assert 0.2 < time.monotonic() - start < 3

    def test_close_gives_the_memory_back(self) -> None:
        """An eighth of the GPU at a time, twenty times over."""
        native = extension.load()
        slot_bytes = torch.cuda.get_device_properties(0).total_memory // 16 >> 20 << 20
        for _ in range(10):
            end = native.PeerEndpoint(0, slot_bytes=slot_bytes, chunk_bytes=CHUNK_BYTES)
            end.close()
            end.close()
            end.abort()
            with pytest.raises(native.Error, match="was closed"):
                end.handle()
            native.PeerEndpoint(0, slot_bytes=slot_bytes, chunk_bytes=CHUNK_BYTES)  # freed by its destructor

    def test_misuse_is_an_error(self, pair: Pair) -> None:
        native = extension.load()
        lonely = native.PeerEndpoint(0, slot_bytes=2 * SLOT_BYTES, chunk_bytes=CHUNK_BYTES)
        with pytest.raises(native.Error, match="not connected"):
            lonely.push([(0, 1, 0)], 0)
        with pytest.raises(native.Error, match=f"slots of {2 * SLOT_BYTES} bytes .* but got {SLOT_BYTES}"):
            lonely.connect(pair.a.handle())
        with pytest.raises(native.Error, match=r"handle of .* but got 3"):
            lonely.connect(b"abc")
        with pytest.raises(native.Error, match="connected already"):
            pair.a.connect(pair.b.handle())
        for segments in (
            [],
            [(0, 1, 0)] * 65,
            [(0, 0, 0)],
            [(0, 1, 8)],
            [(0, 17, 0), (0, 1, 16)],
            [(0, SLOT_BYTES, 16)],
        ):
            with pytest.raises(native.Error, match="segments"):
                pair.a.push(segments, 0)
        with pytest.raises(native.Error, match="above 0"):
            pair.a.timeout = 0
