"""Builds the Python package, and the native module `cfg_parallel._C` when a CUDA compiler is found.

Environment variables of the build:
    CFG_PARALLEL_BUILD_EXTENSION  unset: build the module when nvcc is found; 1: require it; 0: leave it out.
    CFG_PARALLEL_CUDA_ARCHS       architectures such as "80;90;100" (the default); the newest is also kept as PTX.
    CUDACXX, CUDA_HOME, CUDA_PATH where nvcc is, ahead of PATH and /usr/local/cuda.
    MAX_JOBS                      how many compilers run at once (default: Ninja decides).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SWITCH = "CFG_PARALLEL_BUILD_EXTENSION"
DEFAULT_ARCHS = ("80", "90", "100")


def find_nvcc() -> str | None:
    """The first of $CUDACXX, $CUDA_HOME, $CUDA_PATH, PATH and /usr/local/cuda that has a compiler."""
    candidates = [os.environ.get("CUDACXX")]
    candidates += [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, filter(None, candidates)) if path), None)


def cuda_architectures(text: str) -> str:
    """CMake's list: machine code for every architecture, and PTX for the newest."""
    names = [name.removeprefix("sm_").replace(".", "") for name in re.split(r"[;,\s]+", text.strip()) if name]
    bad = [name for name in names if not re.fullmatch(r"\d{2,3}[af]?", name)]
    if bad or not names:
        raise SystemExit(f'Expected CFG_PARALLEL_CUDA_ARCHS such as "80;90;100", but got {text!r}.')
    names.sort(key=lambda name: (int(name.rstrip("af")), name))
    return ";".join([f"{name}-real" for name in names[:-1]] + names[-1:])


def default_architectures(nvcc: str) -> str:
    """Those of DEFAULT_ARCHS that this nvcc knows: sm_100 came with CUDA 12.8."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    return ";".join(arch for arch in DEFAULT_ARCHS if f"compute_{arch}" in known)


def tool(name: str, module_attribute: str) -> str:
    """The cmake or ninja of the build requirements, which need not be on PATH; else the system's."""
    try:
        folder = getattr(__import__(name), module_attribute)
    except ImportError:
        folder = None
    path = shutil.which(name, path=folder) if folder else shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} was not found: pip install {name}")
    return path


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc = find_nvcc()
        if nvcc is None:
            raise SystemExit(f"{SWITCH}=1 needs nvcc: set CUDACXX or CUDA_HOME, or put nvcc on PATH.")
        archs = cuda_architectures(os.environ.get("CFG_PARALLEL_CUDA_ARCHS") or default_architectures(nvcc))
        target = (Path.cwd() / self.get_ext_fullpath(ext.name)).parent
        build = Path(self.build_temp).resolve() / "native"
        configure = [
            tool("cmake", "CMAKE_BIN_DIR"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={archs}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCFG_PARALLEL_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        for command in (configure, [configure[0], "--build", str(build), *jobs]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"cfg-parallel: building the CUDA module with {nvcc} failed (the compiler's message is above). "
                    f"{SWITCH}=0 installs without it."
                ) from error


def extensions() -> list[Extension]:
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"Expected {SWITCH} to be 0 or 1, but got {switch!r}.")
    if switch == "0" or (switch == "" and find_nvcc() is None):
        why = (
            f"{SWITCH}=0"
            if switch == "0"
            else "nvcc was not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"
        )
        print(f"WARNING: cfg-parallel is installed without its CUDA module: {why}.", file=sys.stderr)
        return []
    return [Extension("cfg_parallel._C", sources=[])]


setup(
    # The Triton kernels lie at the top level of the repository and are installed inside the package: a top-level
    # `triton_kernels` is another project's name on PyPI.
    # So do the benchmarks, which `cfg-parallel bench` runs as scripts.
    package_dir={
        "": "python",
        "cfg_parallel.triton_kernels": "triton_kernels",
        "cfg_parallel.harness.benchmarks": "benchmarks",
    },
    packages=[*find_packages("python"), "cfg_parallel.triton_kernels", "cfg_parallel.harness.benchmarks"],
    package_data={
        "cfg_parallel": ["py.typed", "*.pyi", "*.json"],
        "cfg_parallel.serving": ["page/*"],
        "cfg_parallel.harness.benchmarks": ["results/*.json"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildWithCMake},
)
