"""What every test shares: one thread, so that two processes fit on two cores, and the `gpu` marker."""

from __future__ import annotations

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


# Files that start servers, ranks or commands: minutes each, so they come first, or one process would end the run alone.
_LONG = [
    *("test_serve.py", "test_serve_processes.py", "test_processes.py", "test_sweep.py", "test_enable.py"),
    *("test_snippets.py", "test_page.py", "test_compile.py", "test_faults.py", "test_bench_step.py"),
    *("test_composition.py", "test_pipelines.py", "test_omni.py", "test_ray_app.py"),
]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist's own order: by the number of tests in a file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
    gpus = torch.cuda.device_count()
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        needed = marker.kwargs.get("count", 1)
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, and there are {gpus}"))


@pytest.fixture
def small_photographs() -> Iterator[None]:
    """Edit pipelines make a photograph about 32 x 32 pixels, where they make it a megapixel."""
    from tiny_models import small_images

    with small_images():
        yield


@pytest.fixture
def forked() -> Iterator[None]:
    """Followers without the seconds that a new Python needs to import PyTorch and diffusers, where there is no GPU."""
    from forked import forked_followers

    with forked_followers():
        yield
