"""Points in time on a device: an event on its current stream, or the clock on a CPU."""

from __future__ import annotations

import time
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
