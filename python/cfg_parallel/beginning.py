"""What a generation began with, so that it can begin again: random numbers, and tensors that it may write to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cfg_parallel.codec import tensors_in, version


class Beginning:
    """The states of the global generators of Python, NumPy, PyTorch's CPU and `device`, and of every torch.Generator in
    `arguments`; the values of the tensors there."""

    def __init__(self, device: torch.device, arguments: Any) -> None:
        self._device = device
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._given = [(generator, generator.get_state()) for generator in _generators(arguments)]
        self._tensors = [(tensor, version(tensor), tensor.clone()) for tensor in tensors_in(arguments)]

    @torch.no_grad()
    def restore(self) -> None:
        """Set all of them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu, self._device)
        for generator, state in self._given:
            generator.set_state(state)
        for tensor, then, value in self._tensors:
            if then == -1 or version(tensor) != then:  # one of inference mode does not tell
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(value)


def _generators(obj: Any) -> Iterator[torch.Generator]:
    if isinstance(obj, torch.Generator):
        yield obj
    elif isinstance(obj, (list, tuple)):
        for item in obj:
            yield from _generators(item)
    elif isinstance(obj, dict):
        yield from _generators(list(obj.values()))
