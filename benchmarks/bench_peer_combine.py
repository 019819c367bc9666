"""The fused exchange between two GPUs: from the follower's prediction ready to the leader's guided result ready.

    python benchmarks/bench_peer_combine.py --out benchmarks/results/peer_combine.json
    python benchmarks/bench_peer_combine.py --stress 1000000 --out benchmarks/results/peer_combine.json

Two processes, as in a pipeline: the leader on cuda:0 has the unconditional prediction, the follower on cuda:1 the
conditional one. Both sides are CUDA graphs of many exchanges. The backends:

    peer         the follower pushes; one kernel of the leader waits for each chunk, combines and stores the result
    peer+copy    the same kernel stores the follower's prediction too, as a pipeline's step does
    peer+eager   the transport without the fusion: the leader copies the prediction out of the slot, then eager ops
    nccl+eager   ncclSend and ncclRecv on a communicator of our own, then eager ops
    copy-engine  cuMemcpyDtoDAsync from cuda:1 to cuda:0 in one process, queued back to back: the bandwidth of the link

The two GPUs have no common clock, so mode "latency" times a chain of round trips on the leader's clock:

    leader                           follower
    push a token (16 bytes)  ----->  pull it: the prediction is ready
    wait, combine            <-----  push the prediction, or ncclSend
    push the next token ...

A round trip is one way of the token and one exchange. The token's way is half a round trip of tokens alone, by the same
kernels in the same place (push there, pull and push back, pull), measured just before; `us` is the difference. It is
fair to all backends, because the token is the same one for each of them, and to the token, because every kernel's start
after the one before it is counted once on either side of the subtraction; the start of the next token's push after the
result is counted as part of the exchange. In mode "ahead" there are no tokens: both sides launch as far ahead as the
two slots (or NCCL) let them, and `us` is the time from result to result.

`share` is the bandwidth over the copy engine's at the same size. `wrong` counts the elements of results of the timed
graphs, on fresh random data, whose bits differ from eager PyTorch's.

--stress N runs N exchanges in a row in place of the times, of five sizes in turn, with random delays on either side
(kernels that spin up to 200 us, hosts that sleep up to 30 ms). The data is another for each exchange, both GPUs compute
it, and the leader's GPU compares each result with the eager one.

Exit status: 0, 1 if an element was wrong or a process failed, 2 for wrong arguments or without two GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import random
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import markdown_table, merge_rows
from benchmarks.timing import captured, differing, facts, gbps, replay_us, some_of, spread

from cfg_parallel import extension
from cfg_parallel.launch import launch
from cfg_parallel.program import SCALAR, Instruction, Op, Operand, Program
from cfg_parallel.transports.peer import PeerTransport

RULES = ("cfg", "norm", "cfg_euler")
BACKENDS = ("peer", "peer+copy", "peer+eager", "copy-engine", "nccl+eager")
SIZES = (128 << 10, 512 << 10, 4 << 20, 64 << 20)
ROW = 64  # elements of the last dimension: Qwen-Image's packed latents
SCALE = 4.0
DT = -0.04
TOKEN_BYTES = 16
TOKEN_ROUNDS = 200  # in a graph
WAIT_S = 30.0  # that a kernel waits for the other GPU at most
MEET_S = 120.0  # that a process waits for the other one at most
COLUMNS = ("rule", "backend", "mode", "bytes", "dtype", "us", "token_us", "gbps", "share", "wrong")
STRESS_COLUMNS = ("bench", "rule", "backend", "exchanges", "wrong", "seconds")
TABLE = ("bench", *COLUMNS, "exchanges", "seconds")  # of both, beside the JSON file

STRESS_ELEMENTS = (64, 8192, 8203, 65_536, 262_144)  # an odd number of sizes: each goes through both slots
STRESS_ROUNDS = 1000  # in a graph
STRESS_GRAPHS = 4  # with other delays

START = time.perf_counter()


class BenchmarkError(RuntimeError):
    """The other process failed, or an exchange did."""


def say(line: str) -> None:
    print(f"[{time.perf_counter() - START:7.1f} s] {line}", flush=True)


def guidance_program(rule: str, shape: tuple[int, ...], dtype: torch.dtype) -> Program:
    """The exact program that a pipeline's ops are lowered to. Inputs: sample and dt for an Euler step, the
    unconditional prediction, and last the conditional one."""
    strides = tuple(torch.empty(shape, device="meta").stride())
    tensor = Operand(dtype, strides)
    code: list[Instruction] = []
    inputs: tuple[Operand, ...] = (tensor, tensor)
    if rule == "cfg_euler":
        inputs = (tensor, Operand(torch.float32, (0,) * len(shape)), *inputs)

    def emit(op: Op, *operands: int, round: torch.dtype = dtype) -> int:
        code.append(Instruction(op, *operands, round=round))
        return len(inputs) + len(code) - 1

    n, p = len(inputs) - 2, len(inputs) - 1
    dt = emit(Op.ROUND, 1) if rule == "cfg_euler" and dtype is not torch.float32 else 1
    value = emit(Op.ADD, n, emit(Op.MUL, emit(Op.SUB, p, n), SCALAR))
    if rule == "norm":
        value = emit(Op.MUL, value, emit(Op.DIV, emit(Op.NORM, p), emit(Op.NORM, value)))
    if rule == "cfg_euler":
        value = emit(Op.ADD, 0, emit(Op.MUL, dt, value), round=torch.float32)
        if dtype is not torch.float32:
            value = emit(Op.ROUND, value)
    return Program(shape, inputs, (tensor,), tuple(code), (value,))


def eager(
    rule: str, p: torch.Tensor, n: torch.Tensor, sample: torch.Tensor | None = None, dt: torch.Tensor | None = None
) -> torch.Tensor:
    """The same ops as the pipelines have them."""
    g = n + SCALE * (p - n)
    if rule == "norm":
        return g * (torch.norm(p, dim=-1, keepdim=True) / torch.norm(g, dim=-1, keepdim=True))
    if rule == "cfg_euler":
        assert sample is not None and dt is not None
        return (sample.to(torch.float32) + dt * g).to(g.dtype)
    return g


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class Side:
    """One of the two processes. Both run the same functions in the same order, and `meet` in the same places."""

    def __init__(self, is_leader: bool, conn: Connection, device: torch.device) -> None:
        self.is_leader = is_leader
        self.device = device
        self._conn = conn
        torch.cuda.set_device(device)
        self.transport = PeerTransport(device)
        self.endpoint = self.transport.endpoint
        handle = self.meet(self.transport.handle)
        self.transport.set_timeout(WAIT_S)  # a captured wait keeps the time-out that it was captured with
        self.transport.connect(handle)
        self.token = torch.zeros(TOKEN_BYTES, dtype=torch.uint8, device=device)
        self.token_in = torch.zeros_like(self.token)
        self.comm: Any = None
        torch.cuda.synchronize()
        self.meet()

    def meet(self, value: Any = None) -> Any:
        """Wait until the other process is here too. Returns its value."""
        try:
            self._conn.send(("here", value))
            if not self._conn.poll(MEET_S):
                raise BenchmarkError(f"the other process did not come within {MEET_S:.0f} s")
            kind, theirs = self._conn.recv()
        except (EOFError, OSError):
            raise BenchmarkError("the other process has ended") from None
        if kind == "error":
            raise BenchmarkError(f"the other process failed: {theirs}")
        return theirs

    def connect_nccl(self) -> None:
        native = extension.load()
        ours = native.nccl_unique_id() if self.is_leader else None
        theirs = self.meet(ours)
        self.comm = native.NcclComm(ours or theirs, 0 if self.is_leader else 1, 2, self.device.index)

    def push(self, tensor: torch.Tensor) -> None:
        self.endpoint.push([(tensor.data_ptr(), tensor.nbytes, 0)], stream())

    def pull(self, tensor: torch.Tensor) -> None:
        self.endpoint.pull([(tensor.data_ptr(), tensor.nbytes, 0)], stream())

    def check(self) -> None:
        """Raises when a wait on this GPU was given up."""
        failures = [self.endpoint.push_failure.name, self.endpoint.pull_failure.name]
        if failures != ["none", "none"]:
            raise BenchmarkError(f"an exchange failed (push: {failures[0]}, pull: {failures[1]})")

    def close(self) -> None:
        """Both sides let go of each other's memory before either frees its own."""
        torch.cuda.synchronize()
        self.transport.detach()
        if self.comm is not None:
            self.comm.abort()  # nothing is in flight
        self.meet()
        self.transport.close()


def round_trips(side: Side, enqueue: Callable[[], Any], rounds: int, replays: int) -> tuple[list[float], Any]:
    """Microseconds of each round on this side, a value for each replay of a graph of `rounds`; and that graph."""
    enqueue()  # loads kernels and connects NCCL
    torch.cuda.synchronize()
    side.check()
    graph = captured([enqueue], rounds)
    side.meet()
    us = [value / rounds for value in replay_us(graph, replays)]
    side.check()
    return us, graph


def token_us(side: Side, replays: int) -> float:
    """One way of a token: half a round trip."""

    def enqueue() -> None:
        if side.is_leader:
            side.push(side.token)
            side.pull(side.token_in)
        else:
            side.pull(side.token_in)
            side.push(side.token)

    us, _ = round_trips(side, enqueue, TOKEN_ROUNDS, replays)
    return statistics.median(us) / 2


class Exchange:
    """One rule, size and backend: the tensors of this side, and what it enqueues for one exchange."""

    def __init__(self, side: Side, rule: str, nbytes: int, backend: str, dtype: torch.dtype) -> None:
        self.side, self.rule, self.nbytes, self.backend = side, rule, nbytes, backend
        shape = (1, nbytes // (ROW * dtype.itemsize), ROW)

        def empty() -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=side.device)

        self.cond = empty()  # on the leader: where it is received, or copied to
        self.result = empty()
        self.uncond, self.sample = empty(), empty()
        self.dt = torch.tensor(DT, device=side.device)
        self.program = guidance_program(rule, shape[1:], dtype)
        self.refill(0)

    def refill(self, seed: int) -> None:
        """New predictions, the same on both GPUs; what the leader receives and computes is filled with NaN."""
        generator = torch.Generator(self.side.device).manual_seed(seed)
        for tensor in (self.cond, self.uncond, self.sample):
            values = torch.randn(tensor.shape, generator=generator, device=self.side.device)
            tensor.copy_(values)
        if self.side.is_leader:
            self.expected_cond = self.cond.clone()
            self.cond.fill_(float("nan"))
            self.result.fill_(float("nan"))
        torch.cuda.synchronize()

    def enqueue(self) -> None:
        (self._lead if self.side.is_leader else self._follow)()

    def _follow(self) -> None:
        if self.backend == "nccl+eager":
            self.side.comm.send([(self.cond.data_ptr(), self.nbytes)], 0, stream())
        else:
            self.side.push(self.cond)

    def _lead(self) -> None:
        euler = self.rule == "cfg_euler"
        if self.backend in ("peer", "peer+copy"):
            inputs = [*((self.sample, self.dt) if euler else ()), self.uncond, None]
            arrival = self.side.transport.borrow([self.nbytes])
            keep = self.cond[0] if self.backend == "peer+copy" else None
            launch(self.program, inputs, [SCALE], [self.result], arrival, keep)
            return
        if self.backend == "nccl+eager":
            self.side.comm.recv([(self.cond.data_ptr(), self.nbytes)], 1, stream())
        else:
            self.side.pull(self.cond)
        self.result = eager(self.rule, self.cond, self.uncond, self.sample, self.dt)

    def wrong(self) -> int:
        """Elements on the leader that differ from the eager result of what the follower has sent."""
        wrong = differing(self.result, eager(self.rule, self.expected_cond, self.uncond, self.sample, self.dt))
        return wrong + (0 if self.backend == "peer" else differing(self.cond, self.expected_cond))


def measure(side: Side, exchange: Exchange, mode: str, replays: int, checks: int = 2) -> dict[str, Any]:
    """The keys `us`, `us_p10`, `us_p90`, `token_us` and `wrong`; those of the leader count."""
    nbytes = exchange.nbytes
    rounds = 200 if nbytes <= 1 << 20 else 100 if nbytes <= 8 << 20 else 20
    token = token_us(side, replays) if mode == "latency" else None

    def enqueue() -> None:
        if mode == "latency":
            if side.is_leader:
                side.push(side.token)
            else:
                side.pull(side.token_in)
        exchange.enqueue()

    us, graph = round_trips(side, enqueue, rounds, replays)
    wrong = 0
    for seed in range(1, checks + 1):
        side.meet()  # the other side is done with the data
        exchange.refill(seed)
        side.meet()
        graph.replay()
        torch.cuda.synchronize()
        side.check()
        if side.is_leader:
            wrong += exchange.wrong()
    row: dict[str, Any] = spread([value - (token or 0.0) for value in us])
    return row | {"token_us": None if token is None else round(token, 3), "wrong": wrong}


def copy_engine(nbytes: int, here: torch.device, there: torch.device, repeat: int) -> dict[str, Any]:
    """Copies from the other GPU by the copy engine, back to back, in this process alone."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=there)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=here)
    target.copy_(source)  # has PyTorch enable peer access, in this direction and in the other
    torch.empty_like(source).copy_(target)
    target.zero_()
    torch.cuda.synchronize(there)
    torch.cuda.synchronize(here)
    driver = ctypes.CDLL("libcuda.so.1")
    copies = 50
    us = []
    for _ in range(repeat + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # about 2 ms, in which all of them are queued: the host is not timed
        begin.record()
        for _ in range(copies):
            status = driver.cuMemcpyDtoDAsync_v2(
                ctypes.c_uint64(target.data_ptr()),
                ctypes.c_uint64(source.data_ptr()),
                ctypes.c_size_t(nbytes),
                ctypes.c_void_p(stream()),
            )
            if status != 0:
                raise BenchmarkError(f"cuMemcpyDtoDAsync: CUDA error {status}")
        end.record()
        torch.cuda.synchronize()
        us.append(begin.elapsed_time(end) * 1e3 / copies)
    wrong = int((target != source.to(here)).sum())
    return spread(us[2:]) | {"token_us": None, "wrong": wrong}


def bench(side: Side, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Adds the leader's rows to `rows` as they come."""
    dtype = getattr(torch, args.dtype)
    replays = 3 if args.quick else args.repeat

    def add(rule: str, backend: str, mode: str, nbytes: int, result: dict[str, Any]) -> None:
        row = {"bench": "peer_combine", "rule": rule, "backend": backend, "mode": mode, "bytes": nbytes}
        row |= {"dtype": args.dtype, "numerics": "exact"} | result | {"gbps": gbps(nbytes, result["us"])}
        rows.append(row)
        say(f"{rule}, {backend}, {mode}, {nbytes}: {row['us']:.2f} us, {row['gbps']:.0f} GB/s, {row['wrong']} wrong")

    for backend in BACKENDS:  # NCCL last, so that nothing that happens to it costs the other rows
        if backend not in args.backends:
            continue
        if backend == "nccl+eager":
            side.connect_nccl()
        for nbytes in args.sizes:
            if backend == "copy-engine":
                if side.is_leader:
                    there = torch.device("cuda", 1)
                    add("copy", backend, "ahead", nbytes, copy_engine(nbytes, side.device, there, replays))
                side.meet()  # the follower's GPU is idle meanwhile
                continue
            for rule in args.rules:
                for mode in ("latency", "ahead"):
                    result = measure(side, Exchange(side, rule, nbytes, backend, dtype), mode, replays)
                    if side.is_leader:
                        add(rule, backend, mode, nbytes, result)


def add_shares(rows: list[dict[str, Any]]) -> None:
    """`share` of the copy engine's bandwidth at the same size, where that was measured."""
    engine_us = {row["bytes"]: row["us"] for row in rows if row["backend"] == "copy-engine"}
    for row in rows:
        if row["bytes"] in engine_us:
            row["share"] = round(engine_us[row["bytes"]] / row["us"], 3)


@dataclass
class Stress:
    """Exchanges whose data is another each time. `phase`, `cond` and their course are the same on both GPUs."""

    side: Side
    phase: torch.Tensor
    cond: torch.Tensor
    uncond: torch.Tensor
    result: torch.Tensor
    wrong: torch.Tensor
    programs: dict[int, Program]

    @classmethod
    def make(cls, side: Side) -> Stress:
        most = max(STRESS_ELEMENTS)
        phase = (torch.arange(most, device=side.device) % 251).to(torch.int16)
        cond = torch.zeros(most, dtype=torch.bfloat16, device=side.device)
        uncond = torch.randn(most, device=side.device).to(torch.bfloat16)
        programs = {numel: guidance_program("cfg", (numel,), torch.bfloat16) for numel in STRESS_ELEMENTS}
        wrong = torch.zeros((), dtype=torch.int64, device=side.device)
        return cls(side, phase, cond, uncond, torch.zeros_like(cond), wrong, programs)

    def exchange(self, number: int, cycles: int) -> None:
        """Enqueue one, behind a delay. The leader compares with the eager result, on the GPU."""
        if cycles:
            torch.cuda._sleep(cycles)
        numel = STRESS_ELEMENTS[number % len(STRESS_ELEMENTS)]
        phase, cond, uncond, result = (t[:numel] for t in (self.phase, self.cond, self.uncond, self.result))
        phase.add_(37).remainder_(251)  # no element is what it was one or two exchanges ago
        cond.copy_(phase)  # whole numbers up to 256 are exact in bf16
        if not self.side.is_leader:
            self.side.push(cond)
            return
        launch(self.programs[numel], [uncond, None], [SCALE], [result], self.side.transport.borrow([cond.nbytes]))
        expected = eager("cfg", cond, uncond)
        self.wrong.add_((result.view(torch.int16) != expected.view(torch.int16)).sum())


def random_delay(chance: random.Random) -> int:
    """In cycles. Half of the exchanges wait, up to 20 us; two in a thousand up to 200 us (at 2 GHz)."""
    if chance.random() < 0.002:
        return chance.randrange(40_000, 400_000)
    return chance.randrange(1, 40_000) if chance.random() < 0.5 else 0


def stress(side: Side, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    chance = random.Random(2 * args.seed + side.is_leader)
    series = Stress.make(side)
    for number in range(len(STRESS_ELEMENTS)):
        series.exchange(number, 0)
    torch.cuda.synchronize()
    side.check()
    graphs = []
    for _ in range(STRESS_GRAPHS):
        delays = [random_delay(chance) for _ in range(STRESS_ROUNDS)]
        calls = [lambda i=i, cycles=cycles: series.exchange(i, cycles) for i, cycles in enumerate(delays)]
        graphs.append(captured(calls, STRESS_ROUNDS))
    side.meet()
    start = time.perf_counter()
    replays = -(-args.stress // STRESS_ROUNDS)
    for number in range(replays):
        chance.choice(graphs).replay()
        if chance.random() < 0.05:
            time.sleep(chance.uniform(0, 0.03))
        if number % 20 == 19:  # all waits end when one does; then there is nothing to go on for
            torch.cuda.synchronize()
            side.check()
        if side.is_leader and number % max(replays // 10, 1) == 0:
            say(f"stress: {number * STRESS_ROUNDS} of {replays * STRESS_ROUNDS} exchanges enqueued")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    side.check()
    if side.is_leader:
        row: dict[str, Any] = {"bench": "peer_combine_stress", "rule": "cfg", "backend": "peer", "mode": "stress"}
        row |= {"bytes": 2 * max(STRESS_ELEMENTS), "dtype": "bfloat16"}
        row |= {"exchanges": replays * STRESS_ROUNDS + len(STRESS_ELEMENTS)}
        row |= {"wrong": int(series.wrong), "seconds": round(seconds, 1)}
        rows.append(row)
    side.meet()


@contextlib.contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Ends the process, with its threads' tracebacks, when it takes longer: NCCL's waits have no end of their own."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def work(side: Side, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    with torch.no_grad():
        (stress if args.stress else bench)(side, args, rows)


def follow(conn: Connection, args: argparse.Namespace) -> None:
    """The follower's process. It ends with the leader's, whatever its GPU is doing."""
    # A signal goes to the whole process group. The leader ends, and takes this process along: if this one ended first,
    # the leader could stay for good in a wait for it that no signal ends, such as that for NCCL to connect.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        with no_longer_than(args.limit):
            side = Side(False, conn, torch.device("cuda", 1))
            work(side, args, [])
            side.close()
    except BaseException as error:
        with contextlib.suppress(OSError):  # the leader may be gone
            conn.send(("error", f"{type(error).__name__}: {error}"))
        raise


def lead(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str | None]:
    """The rows, and what ended the run before its end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=follow, args=(theirs, args), daemon=True)
    process.start()
    theirs.close()  # so that the follower's end of it is the only one, and its death is seen
    rows: list[dict[str, Any]] = []
    problem = None
    try:
        with no_longer_than(args.limit):
            side = Side(True, ours, torch.device("cuda", 0))
            say("connected")
            work(side, args, rows)
            finish(rows, args)  # before anything can go wrong in taking it all down
            side.close()
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the rows so far are kept
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
        finish(rows, args)
    finally:
        process.join(20 if problem is None else 1)
        if process.is_alive():
            process.kill()
            process.join()
    return rows, problem


def finish(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print and write what was measured, once."""
    if not rows or "gpu" in rows[0]:
        return
    add_shares(rows)
    for row in rows:
        row |= facts(torch.device("cuda", 0)) | {"devices": "cuda:0,cuda:1"}
    print(markdown_table(rows, STRESS_COLUMNS if args.stress else COLUMNS), flush=True)
    if args.out:
        merge_rows(args.out, rows, TABLE)
        say(f"wrote {args.out}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def sizes(text: str) -> list[int]:
        chosen = [int(part) for part in text.split(",")]
        for nbytes in chosen:
            if nbytes < 256 or nbytes % 256 or nbytes > 64 << 20:
                raise argparse.ArgumentTypeError(f"expected multiples of 256 up to 64 MiB, but got {nbytes}")
        return chosen

    parser.add_argument("--rules", type=some_of(*RULES), default=list(RULES))
    parser.add_argument("--backends", type=some_of(*BACKENDS), default=list(BACKENDS))
    parser.add_argument("--sizes", type=sizes, default=list(SIZES), help="bytes of a prediction, with commas between")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeat", type=int, default=20, help="replays of each graph")
    parser.add_argument("--stress", type=int, default=0, metavar="N", help="N exchanges with random delays instead")
    parser.add_argument("--seed", type=int, default=0, help="of the delays")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds after which both processes end")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two sizes, three replays")
    parser.add_argument("--out", type=Path, help="JSON file to merge the rows into (default: none is written)")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes = args.sizes[:2]
        args.stress = min(args.stress, 10 * STRESS_ROUNDS)
    if args.repeat < 1:
        parser.error("--repeat: expected at least 1")
    if args.stress < 0:
        parser.error("--stress: expected a number of exchanges")
    return args


def obstacle() -> str | None:
    """Why this machine cannot run it."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return f"two GPUs are needed ({gpus} are visible)"
    if not torch.cuda.can_device_access_peer(0, 1):
        return "cuda:0 cannot access the memory of cuda:1"
    return extension.missing_reason()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    reason = obstacle()
    if reason is not None:
        print(f"bench_peer_combine: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # out of time: the rows so far are kept
    rows, problem = lead(args)
    wrong = [row for row in rows if row["wrong"]]
    for row in wrong:
        print(
            f"bench_peer_combine: {row['rule']}, {row['backend']}: {row['wrong']} elements are wrong", file=sys.stderr
        )
    if problem is not None:
        print(f"bench_peer_combine: {problem}", file=sys.stderr, flush=True)
    return 1 if wrong or problem else 0


if __name__ == "__main__":
    sys.exit(main())
