"""The random numbers that a generation draws, so that it can begin again and draw the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class RandomState:
    """The global generators of Python, NumPy, PyTorch's CPU and `device`, and every torch.Generator in `arguments`."""

    def __init__(self, device: torch.device, arguments: Any) -> None:
        self._device = device
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._given = [(generator, generator.get_state()) for generator in _generators(arguments)]

    def restore(self) -> None:
        """Set all of them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu, self._device)
        for generator, state in self._given:
            generator.set_state(state)


def _generators(obj: Any) -> Iterator[torch.Generator]:
    if isinstance(obj, torch.Generator):
        yield obj
    elif isinstance(obj, (list, tuple)):
        for item in obj:
            yield from _generators(item)
    elif isinstance(obj, dict):
        yield from _generators(list(obj.values()))
