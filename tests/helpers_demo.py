"""The demo model and pictures that the tests of the demo and of the command share; the model is built once per
process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cfg_parallel.demo import build_demo_model


@functools.cache
def demo_model() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="cfg-parallel-demo-")
    _kept.append(folder)  # removed when the process ends
    return build_demo_model(Path(folder.name) / "model")


_kept: list[tempfile.TemporaryDirectory[str]] = []


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    """(height, width) of uint8: every column another grey, black on the left and white on the right."""
    return np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1))


def save_photo(path: Path) -> Path:
    Image.fromarray(gradient()).convert("RGB").save(path)
    return path
