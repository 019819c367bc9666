"""A layer that does harm in a follower's forward when it is told to, through a file that both processes know."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch


def _raise() -> None:
    raise RuntimeError("on purpose")


def _no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory, on purpose")


HARM: dict[str, Callable[[], None]] = {
    "raise": _raise,
    "no memory": _no_memory,
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


class Faulty(torch.nn.Module):
    """Its inner layer, for every process but the one that is to stay well."""

    def __init__(self, inner: torch.nn.Module, orders: Path) -> None:
        super().__init__()
        self.inner = inner
        self.orders = str(orders)
        self.well = os.getpid()

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.well and os.path.exists(self.orders):
            what, _, after = Path(self.orders).read_text().partition(":")
            if int(after) > 0:
                Path(self.orders).write_text(f"{what}:{int(after) - 1}")
            else:
                os.remove(self.orders)  # the next follower stays well
                HARM[what]()
        out: torch.Tensor = self.inner(*args, **kwargs)
        return out
