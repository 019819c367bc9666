"""A model folder, or an id of the Hugging Face hub, to a pipeline on its device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from cfg_parallel.errors import CfgParallelError, ConfigurationError
from cfg_parallel.preflight import first_line


def share_cpu_threads(devices: Sequence[str]) -> None:
    """The same number of threads in every process of both runs: bits can depend on it. OMP_NUM_THREADS wins."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))


def load_pipeline(model: str, dtype: str, device: str, *, quiet: bool = False) -> Any:
    """The pipeline in the folder, or of the Hugging Face id, `model`, on `device`. `dtype` is the name of one; "auto"
    is bfloat16 on GPUs and float32 on CPUs. Raises ConfigurationError, or CfgParallelError when it does not fit."""
    import diffusers
    import torch
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    # `torch_dtype` warns from diffusers 0.42 on; `dtype` is ignored before.
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    key = "dtype" if version >= (0, 42) else "torch_dtype"
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    if quiet:
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{key: getattr(torch, dtype)})
        return pipe.to(device)
    except torch.OutOfMemoryError as error:
        raise CfgParallelError(
            f"{model} does not fit on {device} ({first_line(error)}): use a larger device."
        ) from error
    except (OSError, ValueError, ImportError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{model} cannot be loaded ({first_line(error)}): check or download it again."
        ) from error
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
