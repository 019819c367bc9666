"""A generation as a timeline of both processes and both devices, in the JSON of Chrome's tracing and of Perfetto.

It is made afterwards, from the marks that the report is made of, so it costs the generation nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfg_parallel.errors import ConfigurationError
from cfg_parallel.timing import on_host_clock

if TYPE_CHECKING:
    from cfg_parallel.leader import Generation
    from cfg_parallel.remote import RemoteFollower

_HOST, _DEVICE, _ARRIVALS = 0, 1, 2  # rows of a process
Span = tuple[float, float]  # seconds of time.perf_counter


def timeline(
    generation: Generation,
    device: torch.device,
    remotes: Sequence[RemoteFollower],
    statistics: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Events of a generation that is over. `statistics`: what the followers have answered, with their `device`."""
    at = on_host_clock(device)
    events = [*_process(0, "leader", {_HOST: "host", _DEVICE: str(device), _ARRIVALS: f"{device}: predictions"})]
    start = generation.started

    def add(process: int, row: int, name: str, spans: Iterable[Span]) -> None:
        for i, (begin, end) in enumerate(spans):
            event: dict[str, Any] = {"name": name, "ph": "X", "pid": process, "tid": row}
            events.append(event | {"ts": (begin - start) * 1e6, "dur": max(0.0, end - begin) * 1e6, "args": {"i": i}})

    ends = [step.began for step in generation.steps[1:]] + [start + generation.seconds]
    for i, (step, end) in enumerate(zip(generation.steps, ends, strict=False)):
        add(0, _HOST, f"step {i + 1}: {step.branches} calls, {step.shipped} shipped", [(step.began, end)])
    add(0, _DEVICE, "forward", ((at(a), at(b)) for a, b in generation.forwards))
    for remote in remotes:
        add(0, _HOST, f"ship a call to {remote.device}", remote.sent.ships)
        add(0, _HOST, f"wait for {remote.device} to launch", remote.sent.waits)
        add(0, _ARRIVALS, f"prediction from {remote.device}", ((at(a), at(b)) for a, b in remote.sent.receives))
    for process, answer in enumerate(statistics, 1):
        events += _process(process, "follower", {_DEVICE: answer["device"]})
        add(process, _DEVICE, "forward", answer["forwards_at"])
    return events


def _process(number: int, name: str, rows: dict[int, str]) -> Iterable[dict[str, Any]]:
    yield {"name": "process_name", "ph": "M", "pid": number, "args": {"name": name}}
    for row, title in rows.items():
        yield {"name": "thread_name", "ph": "M", "pid": number, "tid": row, "args": {"name": title}}


def save(events: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    try:
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise ConfigurationError(f"the trace {os.fspath(path)} cannot be written ({error}).") from error
