"""What `cfg-parallel serve` is told."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from cfg_parallel.errors import ConfigurationError


def is_factory(model: str) -> bool:
    """Whether the model is `module:function`, which makes a pipeline when it is called with a device."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model) is not None


def check_factory(model: str) -> None:
    """Raises ConfigurationError where there is no such module. It is not imported here."""
    module = model.partition(":")[0]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        found = None
    if found is None:
        raise ConfigurationError(f"{model}: there is no module {module} here or in PYTHONPATH; check MODEL.")


@dataclass(frozen=True)
class Settings:
    """`devices`: of all replicas, one replica after the other. `enable`: arguments of `enable_cfg_parallel`.

    Limits: `max_queue` requests wait at once, the rest are told to come back; `max_steps`; `max_pixels` of a result and
    `max_input_pixels` of a picture that is sent; `max_outputs` of a request; `max_request_mb` of its body, which has
    `max_upload_seconds` to arrive; an engine has `max_step_seconds` for a step, or it is replaced."""

    model: str
    devices: tuple[str, ...]
    replicas: int = 1
    dtype: str = "auto"
    enable: tuple[tuple[str, Any], ...] = ()
    served_model_name: str | None = None
    api_key: str | None = None
    max_queue: int = 32
    max_steps: int = 200
    max_pixels: int = 2048 * 2048
    max_input_pixels: int = 50_000_000
    max_outputs: int = 4
    max_request_mb: float = 64.0
    max_upload_seconds: float = 60.0
    max_step_seconds: float = 1800.0  # the first may compile; a follower that hangs costs 600
    allow_remote_images: bool = False
    log_prompts: bool = False

    @property
    def name(self) -> str:
        """Of the model, for clients."""
        return self.served_model_name or self.model

    def devices_of(self, replica: int) -> tuple[str, ...]:
        size = len(self.devices) // self.replicas
        return self.devices[replica * size : (replica + 1) * size]
