"""What every test shares: one thread, so that two processes fit on two cores, and the `gpu` marker."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts; the follower inherits it

import hypothesis
import pytest
import torch

# Random examples on a developer's machine, the same ones at every run of CI: a change is judged by what it changed.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        needed = marker.kwargs.get("count", 1)
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, and there are {gpus}"))


@pytest.fixture
def forked() -> Iterator[None]:
    """Followers without the seconds that a new Python needs to import PyTorch and diffusers, where there is no GPU."""
    from forked import forked_followers

    with contextlib.nullcontext() if torch.cuda.is_available() else forked_followers():
        yield
