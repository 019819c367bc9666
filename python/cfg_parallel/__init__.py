"""cfg-parallel: the guidance passes of a diffusers pipeline on different GPUs, with the same image bit for bit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfg_parallel import guidance
    from cfg_parallel.enable import disable_cfg_parallel, enable_cfg_parallel, last_report
    from cfg_parallel.errors import CfgParallelError, ConfigurationError, ExtensionMissingError, FollowerLostError
    from cfg_parallel.omni import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, OmniRequestOutput
    from cfg_parallel.patch import CfgParallel
    from cfg_parallel.report import Report

__version__ = "0.1.0"

__all__ = [
    "CfgParallel",
    "CfgParallelError",
    "ConfigurationError",
    "DiffusionParallelConfig",
    "ExtensionMissingError",
    "FollowerLostError",
    "Omni",
    "OmniDiffusionSamplingParams",
    "OmniRequestOutput",
    "Report",
    "disable_cfg_parallel",
    "enable_cfg_parallel",
    "guidance",
    "last_report",
]

_HOMES = {
    "CfgParallel": "patch",
    "disable_cfg_parallel": "enable",
    "enable_cfg_parallel": "enable",
    "last_report": "enable",
    "CfgParallelError": "errors",
    "ConfigurationError": "errors",
    "ExtensionMissingError": "errors",
    "FollowerLostError": "errors",
    "DiffusionParallelConfig": "omni",
    "Omni": "omni",
    "OmniDiffusionSamplingParams": "omni",
    "OmniRequestOutput": "omni",
    "Report": "report",
}


def __getattr__(name: str) -> Any:
    """Load on first use: `cfg-parallel --help` and a bad argument should not wait for torch."""
    if name == "guidance":
        return importlib.import_module("cfg_parallel.guidance")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cfg_parallel.{_HOMES[name]}"), name)
