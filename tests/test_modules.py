"""The modules of a denoiser: all of them, once, in PyTorch's order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfg_parallel.modules import submodules
from tiny import TINY


@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_those_of_a_denoiser(name: str) -> None:
    pipe = TINY[name].build()
    module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert submodules(module) == list(module.modules())


@given(st.lists(st.tuples(st.integers(0, 30), st.one_of(st.none(), st.integers(0, 30))), max_size=40))
def test_any_graph(edges: list[tuple[int, int | None]]) -> None:
    """Shared modules, cycles, and places that hold None."""
    nodes = [torch.nn.Module() for _ in range(31)]
    for number, (parent, child) in enumerate(edges):
        nodes[parent]._modules[f"child{number}"] = None if child is None else nodes[child]
    assert submodules(nodes[0]) == list(nodes[0].modules())
