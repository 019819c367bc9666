"""Pipelines in folders, with their weights, as `save_pretrained` writes them, in place of those of model_specs.py."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from benchmarks.model_specs import Spec


def is_folder(name: str) -> bool:
    return (Path(name) / "model_index.json").is_file()


@functools.cache
def spec(folder: str) -> Spec:
    """What is known of it before it is loaded. Its configurations are in the folder, so none is in here."""
    index = json.loads((Path(folder) / "model_index.json").read_text())
    denoiser = next((index[key][1] for key in ("transformer", "unet") if key in index), None)
    if denoiser is None:
        raise ValueError(f"{folder} has neither a transformer nor a unet in its model_index.json.")
    parameters = _parameters(index["_class_name"])
    scale = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    if scale not in parameters:
        raise ValueError(f"{index['_class_name']} of {folder} takes no guidance scale, so there is nothing to compare.")
    given = parameters[scale].default
    return Spec(
        checkpoint=folder,
        pipeline=index["_class_name"],
        denoiser=denoiser,
        denoiser_real={},
        denoiser_tiny={},
        vae="",
        vae_real={},
        vae_tiny={},
        scheduler="",
        scheduler_config={},
        guidance={scale: float(given) if isinstance(given, (int, float)) and given > 1 else 4.0},
    )


def load(folder: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    from cfg_parallel.loading import load_pipeline

    return load_pipeline(folder, str(dtype).removeprefix("torch."), str(device), quiet=True)


def takes_photograph(folder: str) -> bool:
    from cfg_parallel.preflight import pictures_of

    return pictures_of(getattr(diffusers, spec(folder).pipeline))[1]


def takes(folder: str, argument: str) -> bool:
    return argument in _parameters(spec(folder).pipeline)


def _parameters(pipeline: str) -> Any:
    return inspect.signature(getattr(diffusers, pipeline).__call__).parameters
