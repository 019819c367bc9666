"""The result on one device, in plain diffusers, that two processes must equal bit for bit. No cfg_parallel in here."""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import torch

from tiny import Tiny, generate


def reference(tiny: Tiny, pipe: diffusers.DiffusionPipeline, inputs: dict[str, Any], *, seed: int = 0) -> Any:
    """What `generate(pipe, inputs, seed)` must give with two devices. Sequential pipelines: the same on one device;
    batched ones: the same on one device with the batch's branches run one after the other."""
    if tiny.pattern == "B":
        return generate(pipe, inputs, seed)
    return run_branches_one_by_one(
        pipe, inputs, tiny.num_branches, rows=tiny.num_branches * tiny.rows(inputs), denoiser=tiny.denoiser, seed=seed
    )


def run_branches_one_by_one(
    pipe: diffusers.DiffusionPipeline,
    inputs: dict[str, Any],
    num_branches: int,
    *,
    rows: int,
    denoiser: str = "unet",
    seed: int = 0,
) -> Any:
    """Runs the pipeline with each denoiser call of `rows` rows cut into `num_branches` equal groups, run in order.

    A call of any other number of rows (guidance off, the skipped-layers call of SD 3) runs whole.
    """
    if rows % num_branches:
        raise ValueError(f"Expected a multiple of {num_branches} rows, but got {rows}.")
    module = getattr(pipe, denoiser)
    forward = module.forward

    def one_by_one(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["hidden_states"]
        if sample.shape[0] != rows:
            return forward(*args, **kwargs)
        size = rows // num_branches
        groups = [slice(start, start + size) for start in range(0, rows, size)]
        return concatenate([forward(*take(args, group, rows), **take(kwargs, group, rows)) for group in groups])

    with mock.patch.object(module, "forward", one_by_one):
        return generate(pipe, inputs, seed)


def take(value: Any, group: slice, rows: int) -> Any:
    """`value` with every tensor of `rows` rows in it replaced by its rows of the group."""
    if isinstance(value, torch.Tensor):
        return value[group] if value.ndim > 0 and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: take(item, group, rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take(item, group, rows) for item in value)
    return value


def concatenate(outputs: list[Any]) -> Any:
    """One output from the groups' outputs, in the container the denoiser used."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        # In the memory format that the denoiser gives; a later sum depends on it. torch.cat makes it contiguous.
        order = [0, *sorted(range(1, first.dim()), key=first.stride, reverse=True)]
        back = [order.index(dim) for dim in range(first.dim())]
        return torch.cat([output.permute(order) for output in outputs]).contiguous().permute(back)
    if isinstance(first, tuple):
        return tuple(concatenate(list(items)) for items in zip(*outputs, strict=True))
    if isinstance(first, dict):  # diffusers' BaseOutput is one, made from keyword arguments
        return type(first)(**{key: concatenate([output[key] for output in outputs]) for key in first})
    raise TypeError(f"Expected a tensor, a tuple or a dict of tensors from the denoiser, but got {type(first)}.")
