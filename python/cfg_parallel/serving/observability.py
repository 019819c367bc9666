"""Logs, a JSON object in each line, and metrics for Prometheus. No prompt is in either, unless asked for."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)

log = logging.getLogger("cfg_parallel.serve")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line = {"time": when.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        line |= {"event": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def tell(event: str, level: str = "info", **fields: Any) -> None:
    log.log(getattr(logging, level.upper()), event, extra={"fields": fields})


def set_up_logs() -> None:
    """To stderr; uvicorn's own lines too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("cfg_parallel.serve", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [] if name == "uvicorn.error" else [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = name == "uvicorn.error"


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "cfg_parallel"}
        self.requests = Counter("requests", "Answered requests.", ["endpoint", "status"], **common)
        self.request_seconds = Histogram(
            "request_seconds", "From the request to its answer.", ["endpoint"], buckets=_SECONDS, **common
        )
        self.queue_seconds = Histogram("queue_seconds", "Until a replica was free.", buckets=_SECONDS, **common)
        self.generation_seconds = Histogram("generation_seconds", "Of a replica.", buckets=_SECONDS, **common)
        self.images = Counter("images", "Pictures made.", **common)
        self.steps = Counter("steps", "Denoising steps of finished pictures.", ["on"], **common)
        self.queue = Gauge("queue_length", "Requests that wait.", **common)
        self.running = Gauge("running", "Requests that run.", **common)
        self.replicas = Gauge("replicas", "Engines.", ["state"], **common)
        self.restarts = Counter("follower_restarts", "Followers that took the place of a lost one.", **common)
        self._restarts = 0

    def observe(self, waiting: int, running: int, states: list[str], restarts: int) -> None:
        """What is the case now, before it is read."""
        self.queue.set(waiting)
        self.running.set(running)
        for state in ("starting", "ready", "degraded", "lost", "failed"):
            self.replicas.labels(state).set(states.count(state))
        self.restarts.inc(restarts - self._restarts)
        self._restarts = restarts

    def made(self, metrics: dict[str, Any], pictures: int, queue_seconds: float) -> None:
        self.images.inc(pictures)
        self.queue_seconds.observe(queue_seconds)
        self.generation_seconds.observe(metrics["seconds"])
        parallel = metrics.get("parallel_steps", 0)
        self.steps.labels("all devices").inc(parallel)
        self.steps.labels("one device").inc(metrics.get("steps", 0) - parallel)
