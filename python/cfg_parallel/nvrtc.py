"""CUDA source to machine code at run time, by the compiler library (NVRTC) that every CUDA build of PyTorch brings."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from cfg_parallel.errors import CfgParallelError

# NVRTC has no standard headers of its own.
_CSTDINT = """#pragma once
namespace std {
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
}
"""


class NvrtcError(CfgParallelError):
    """NVRTC was not found, or does not compile a kernel."""


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    version = torch.version.cuda
    if version is None:
        return None, "kernels are compiled by NVRTC, which comes with a CUDA build of PyTorch; this is a CPU build"
    name = f"libnvrtc.so.{version.split('.')[0]}"
    # PyTorch's own road to it: a small library whose search path holds it, wherever pip or conda put it.
    through = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"
    with contextlib.suppress(OSError):  # the next line says whether it helped
        ctypes.CDLL(str(through))
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        return None, f"NVRTC, which compiles the kernels, was not found ({error}): reinstall PyTorch's CUDA packages"
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library, None


def missing_reason() -> str | None:
    """Why there is no NVRTC; None when there is."""
    return _load()[1]


def compile_kernel(source: str, headers: dict[str, str], capability: tuple[int, int]) -> bytes:
    """Machine code (a cubin) of `source` for GPUs of `capability`; `headers` by the names that it includes.

    Raises NvrtcError with the compiler's messages."""
    library, reason = _load()
    if library is None:
        raise NvrtcError(reason)

    def check(status: int) -> None:
        if status != 0:
            raise NvrtcError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")

    headers = {"cstdint": _CSTDINT, **headers}
    texts, names = _strings(list(headers.values())), _strings(list(headers))
    options = _strings(["--std=c++20", f"--gpu-architecture=sm_{capability[0]}{capability[1]}"])
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"cfg_parallel_program.cu", len(headers), texts, names
    )
    check(created)
    try:
        status = library.nvrtcCompileProgram(program, len(options), options)
        if status != 0:
            log = _bytes_of(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program, check)
            raise NvrtcError(
                f"NVRTC does not compile a kernel: {log.rstrip(bytes(1)).decode(errors='replace').strip()}"
            )
        return _bytes_of(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program, check)
    finally:
        check(library.nvrtcDestroyProgram(ctypes.byref(program)))


def _strings(values: list[str]) -> Any:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def _bytes_of(size_of: Any, get: Any, program: ctypes.c_void_p, check: Any) -> bytes:
    size = ctypes.c_size_t()
    check(size_of(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    check(get(program, data))
    return data.raw
