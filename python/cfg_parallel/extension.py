"""The compiled module `cfg_parallel._C`: loaded once, with one clear message where it is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

from cfg_parallel.errors import ExtensionMissingError

_HOW_TO_GET_IT = (
    "install a CUDA toolkit (nvcc on PATH, or CUDA_HOME set) and run "
    "`CFG_PARALLEL_BUILD_EXTENSION=1 pip install --force-reinstall --no-deps .` in the source folder"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec("cfg_parallel._C") is None:
        return None, f"cfg-parallel was installed without its CUDA module: {_HOW_TO_GET_IT}."
    try:
        return importlib.import_module("cfg_parallel._C"), None
    except ImportError as error:  # built against another libstdc++, say
        return None, f"the CUDA module of cfg-parallel cannot be loaded ({error}): {_HOW_TO_GET_IT}."


def missing_reason() -> str | None:
    """Why the module cannot be used and how to get it, as one sentence; None when it is there."""
    return _load()[1]


def load() -> ModuleType:
    """The module; its functions are described in `_C.pyi`. Raises ExtensionMissingError with `missing_reason()`."""
    module, reason = _load()
    if module is None:
        raise ExtensionMissingError(reason)
    return module
