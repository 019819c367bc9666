"""Points in time on a device: an event on its current stream, or the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import torch

Mark: TypeAlias = "float | torch.cuda.Event"


def mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed_ms(start: Mark, end: Mark) -> float:
    """Milliseconds between two marks of one device, which must have been reached (synchronize first)."""
    if isinstance(start, float):
        return (end - start) * 1e3  # type: ignore[operator]
    return start.elapsed_time(end)  # type: ignore[arg-type]


def on_host_clock(device: torch.device) -> Callable[[Mark], float]:
    """When marks were reached, in seconds of `time.perf_counter`, which all processes of a host share. Waits for the
    device; off by what it takes to notice an event, some 20 us."""
    if device.type != "cuda":
        return lambda at: at  # type: ignore[return-value]
    now = mark(device)
    now.synchronize()  # type: ignore[union-attr]
    clock = time.perf_counter()
    return lambda at: clock - at.elapsed_time(now) / 1e3  # type: ignore[union-attr,arg-type]
