"""What the kernel benchmarks share: replayed CUDA graphs, wrong elements, facts about the machine, arguments."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch


def captured(calls: Sequence[Callable[[], Any]], count: int) -> torch.cuda.CUDAGraph:
    """A graph of `count` calls, of `calls` in turn. Whatever they load or compile has to be loaded before."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    # Only this thread's mistakes end the capture: NCCL's threads make CUDA calls of their own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(count):
            calls[i % len(calls)]()
    graph.instantiate()
    return graph


def node_count(graph: torch.cuda.CUDAGraph) -> int:
    """Kernels, copies and fills in a graph of `captured`."""
    count = ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    status = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if status != 0:
        raise RuntimeError(f"cuGraphGetNodes: CUDA error {status}")
    return count.value


def replay_us(graph: torch.cuda.CUDAGraph, repeat: int, warmup: int = 3) -> list[float]:
    """Microseconds of each of `repeat` replays in a row, between events on the current stream. Waits for their end."""
    for _ in range(warmup):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e3 for before, after in pairwise(marks)]


def spread(us: Sequence[float]) -> dict[str, float]:
    """The keys `us`, `us_p10` and `us_p90` of a row."""
    deciles = statistics.quantiles(us, n=10, method="inclusive") if len(us) > 1 else [us[0]] * 9
    values = {"us": statistics.median(us), "us_p10": deciles[0], "us_p90": deciles[-1]}
    return {name: round(value, 3) for name, value in values.items()}


def gbps(nbytes: int, us: float) -> float:
    """10^9 bytes a second."""
    return round(nbytes / us / 1e3, 1)


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements whose bits differ; any NaN equals any other."""
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return int(((a.view(bits) != b.view(bits)) & ~(a.isnan() & b.isnan())).sum())


def facts(device: torch.device) -> dict[str, str]:
    """The keys `gpu`, `torch` and `date` of a row."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def some_of(*known: str) -> Callable[[str], list[str]]:
    """An argparse type: names of `known`, with commas between them."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, but got {name!r}")
        return chosen

    return names
