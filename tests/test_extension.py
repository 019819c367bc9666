"""The compiled module: what it links to, what machine code it holds, and that it answers without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfg_parallel import errors, extension

# Where setup.py looks.
NVCC_CANDIDATES = [
    os.environ.get("CUDACXX", ""),
    *(f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
    "nvcc",
    "/usr/local/cuda/bin/nvcc",
]
NVCC = next(filter(None, map(shutil.which, NVCC_CANDIDATES)), None)


@pytest.fixture(scope="module")
def library() -> Path:
    """The shared object. Its absence on a machine with nvcc is a broken build, and so a failure."""
    spec = importlib.util.find_spec("cfg_parallel._C")
    if spec is None and NVCC is None:
        pytest.skip("nvcc is not installed, so cfg-parallel was installed without its CUDA module")
    assert spec is not None, f"nvcc is at {NVCC}, but cfg_parallel._C was not built"
    assert spec.origin is not None
    return Path(spec.origin)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_no_symbol_of_torch_or_nccl_is_undefined(library: Path) -> None:
    undefined = output("nm", "-D", "--undefined-only", str(library)).splitlines()
    assert len(undefined) > 50
    foreign = [line for line in undefined if any(word in line for word in ("torch", "c10", "at6", "nccl", "cuda"))]
    assert foreign == []


def test_links_neither_cuda_nor_nccl_nor_torch(library: Path) -> None:
    needed = [
        line.split("[")[1].rstrip("]")
        for line in output("readelf", "-d", str(library)).splitlines()
        if "NEEDED" in line
    ]
    assert "libc.so.6" in needed
    allowed = ("libc.", "libm.", "libstdc++.", "libgcc_s.", "libdl.", "librt.", "libpthread.", "ld-linux")
    assert [name for name in needed if not name.startswith(allowed)] == []


def test_defines_nothing_but_its_init_function_in_c(library: Path) -> None:
    """The static cudart inside must not meet PyTorch's shared one."""
    defined = [line.split()[-1] for line in output("nm", "-D", "--defined-only", str(library)).splitlines()]
    assert [name for name in defined if not name.startswith("_Z")] == ["PyInit__C"]


def fatbin_images(library: Path) -> list[tuple[str, int]]:
    """("elf" or "ptx", architecture) of every image in .nv_fatbin: what `cuobjdump -lelf -lptx` would list.

    A fat binary is a 16-byte header (magic, version, header size, size) and entries that begin with kind (1 PTX,
    2 ELF), version, header size and payload size, and have the architecture at byte 28.
    """
    data = library.read_bytes()
    images = []
    for match in re.finditer(rb"\x50\xed\x55\xba", data):
        _, _, header_size, size = struct.unpack_from("<IHHQ", data, match.start())
        if header_size != 16:  # the magic as a constant in the code of cudart
            continue
        entry = match.start() + header_size
        end = entry + size
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            images.append(({1: "ptx", 2: "elf"}[kind], architecture))
            entry += entry_header + payload
    return images


def test_holds_machine_code_for_every_architecture_and_ptx_for_the_newest(library: Path) -> None:
    archs = extension.load().build_info()["archs"].split()
    numbers = [int(arch.removesuffix("-real").rstrip("af")) for arch in archs]
    images = fatbin_images(library)
    assert {number for kind, number in images if kind == "elf"} == set(numbers)
    assert {number for kind, number in images if kind == "ptx"} == {max(numbers)}
    if "CFG_PARALLEL_CUDA_ARCHS" not in os.environ:
        assert {80, 90, 100} <= set(numbers)


def test_loads_and_answers_without_torch_and_without_a_gpu(library: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(library)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.cuda_device_count(), module.build_info()['version'])\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["0", "0.1.0"]


def test_device_count_agrees_with_torch(library: Path) -> None:
    assert extension.load().cuda_device_count() == torch.cuda.device_count()


def test_build_info(library: Path) -> None:
    info = extension.load().build_info()
    assert set(info) == {"version", "cuda", "archs", "compiler", "pybind11"}
    assert all(isinstance(value, str) and value for value in info.values())


def test_a_failed_check_names_the_place(library: Path) -> None:
    native = extension.load()
    with pytest.raises(native.Error, match=r"unique id of 128 bytes, but got 3 \[bindings\.cpp:\d+\]"):
        native.NcclComm(b"abc", 0, 1, 0)
    with pytest.raises(native.Error, match=r"rank < world_size, but got rank 2 of 2 \[nccl\.cpp:\d+\]"):
        native.NcclComm(bytes(128), 2, 2, 0)
    assert issubclass(native.Error, RuntimeError)


def test_absent_nccl_is_an_error_that_says_what_to_do(library: Path) -> None:
    code = (
        "from cfg_parallel import extension\n"
        "native = extension.load()\n"
        "try:\n    print(native.nccl_version())\n"
        "except native.Error as error:\n    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    # A CUDA build of torch brings NCCL along; elsewhere the system may have it.
    assert "Import a CUDA build of torch first" in done.stdout or int(done.stdout) > 20000


def test_missing_module_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    extension._load.cache_clear()
    try:
        reason = extension.missing_reason()
        assert reason is not None and "CFG_PARALLEL_BUILD_EXTENSION=1 pip install" in reason and "nvcc" in reason
        with pytest.raises(errors.ExtensionMissingError, match="installed without its CUDA module"):
            extension.load()
    finally:
        extension._load.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestNcclOnOneDevice:
    """What one process can show: a communicator of one rank. The transport's tests have the two-rank cases."""

    def test_version_is_the_one_of_torch(self, library: Path) -> None:
        version = extension.load().nccl_version()
        assert (version // 10000, version // 100 % 100, version % 100) == torch.cuda.nccl.version()

    def test_unique_ids_are_unique(self, library: Path) -> None:
        native = extension.load()
        ids = {native.nccl_unique_id() for _ in range(4)}
        assert len(ids) == 4 and {len(each) for each in ids} == {128}

    def test_life_of_a_communicator(self, library: Path) -> None:
        native = extension.load()
        stream = torch.cuda.current_stream().cuda_stream
        device = torch.cuda.current_device()
        comm = native.NcclComm(native.nccl_unique_id(), 0, 1, device)
        assert (comm.rank, comm.world_size, comm.device) == (0, 1, device)
        assert comm.async_error() is None
        empty = torch.empty(0, device="cuda")
        comm.send([], 0, stream)
        comm.recv([(empty.data_ptr(), 0)], 0, stream)
        with pytest.raises(native.Error, match=r"peer in \[0, 1\), but got 1"):
            comm.send([(empty.data_ptr(), 0)], 1, stream)
        comm.destroy()
        comm.destroy()
        with pytest.raises(native.Error, match="was destroyed"):
            comm.send([], 0, stream)

    def test_abort_is_idempotent_and_final(self, library: Path) -> None:
        native = extension.load()
        comm = native.NcclComm(native.nccl_unique_id(), 0, 1, torch.cuda.current_device())
        comm.abort()
        comm.abort()
        comm.destroy()
        with pytest.raises(native.Error, match="was aborted"):
            comm.async_error()
        with pytest.raises(native.Error, match="was aborted"):
            comm.recv([], 0, 0)

    def test_the_current_device_is_left_alone(self, library: Path) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        native = extension.load()
        torch.cuda.set_device(0)
        comm = native.NcclComm(native.nccl_unique_id(), 0, 1, 1)
        assert torch.cuda.current_device() == 0
        del comm
        assert torch.cuda.current_device() == 0
