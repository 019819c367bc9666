"""Runs programs on a GPU: a kernel is compiled when a program first needs it, and launched from then on."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from cfg_parallel import codegen, extension, nvrtc
from cfg_parallel.errors import CfgParallelError
from cfg_parallel.program import Operand, Program

if TYPE_CHECKING:
    from cfg_parallel.transports.peer import Arrival


class LaunchError(CfgParallelError):
    """The kernels cannot run a program, on these tensors. Nothing was launched."""


class NotCompiledError(LaunchError):
    """The kernel is being compiled beside whatever the caller does next."""


_MOST_SAMPLES = 65534  # of a grid's second dimension, and even: sums begin at a multiple of 8 bytes

Execute = Callable[..., None]  # `launch`, or what takes its place


def executor(device: torch.device, wait: bool = True) -> tuple[Execute | None, str]:
    """What runs programs on `device`, and its name; None and why there is nothing. Unless it is to `wait`, it raises
    NotCompiledError for kernels that are not there yet: a compilation takes as long as many steps of a small model."""
    if device.type != "cuda":
        return None, f"there are no fused kernels for {device.type}"
    missing = extension.missing_reason() or nvrtc.missing_reason()
    if missing is not None:
        return None, missing
    return functools.partial(launch, wait=wait), "cuda"


def launch(
    program: Program,
    inputs: Sequence[torch.Tensor | None],
    scalars: Sequence[float],
    outputs: Sequence[torch.Tensor],
    arrival: Arrival | None = None,
    keep: torch.Tensor | None = None,
    wait: bool = True,
) -> None:
    """Fill `outputs` with one kernel on the current stream of their device.

    With an `arrival`, the input that is None is its only tensor: the kernel waits for it, chunk by chunk, and copies it
    to `keep`, which is laid out alike, if that is given. `wait` is as in `executor`."""
    device = outputs[0].device
    peer = None
    if arrival is not None:
        index = list(inputs).index(None)
        nbytes = _extent(program.shape, program.inputs[index])
        peer = (index, arrival.offsets[0], nbytes, _address(keep), arrival.wait)
    stream = torch.cuda.current_stream(device).cuda_stream
    addresses = [_address(tensor) for tensor in inputs], [tensor.data_ptr() for tensor in outputs]
    try:
        native = _native(program)
        statistics: Any = None
        if program.correction is not None:
            _held, *statistics = _statistics(program, device, stream)  # until the kernel is enqueued
        missing = native.launch(*addresses, scalars, device.index, stream, peer, statistics)
        if missing is not None:
            _, width, arriving = missing
            text = codegen.source(program, width, arriving if arriving >= 0 else None)
            if not (wait or _image(text, device.index).done()):
                raise NotCompiledError("the fused kernels are being compiled")
            native.add(missing, _kernel(text, device.index))
            native.launch(*addresses, scalars, device.index, stream, peer, statistics)
    except (extension.load().Error, codegen.Ungeneratable, nvrtc.NvrtcError) as error:
        raise LaunchError(str(error)) from error
    if arrival is not None:
        arrival.launched()


def prepare(program: Program, arriving: int, device: torch.device) -> None:
    """Have the kernel compiled that waits for input `arriving`, beside whatever the caller does next."""
    with contextlib.suppress(codegen.Ungeneratable):  # which a launch says
        _image(codegen.source(program, codegen.vector_width(program), arriving), device.index)


def _statistics(program: Program, device: torch.device, stream: int) -> tuple[torch.Tensor, int, int, int, int]:
    """Memory for what the blocks of a kernel that adds up samples find, and what the kernel is told: where the sums and
    the tickets of samples lie in it, the elements of a sample, and the blocks that share one."""
    samples = math.prod(
        size for size, stride in zip(program.shape, program.outputs[0].strides, strict=True) if stride != 0
    )
    if samples > _MOST_SAMPLES:
        raise LaunchError(f"there are more than {_MOST_SAMPLES} samples")
    per_sample = math.prod(program.shape) // samples
    on_gpu = torch.cuda.get_device_properties(device).multi_processor_count * codegen.STATISTICS_BLOCKS_PER_SM
    blocks = max(1, min(per_sample // (256 * codegen.VEC), on_gpu // samples))
    scratch = _scratch(4 * _MOST_SAMPLES + 24 * samples * blocks * len(program.outputs), device, stream)
    return scratch, scratch.data_ptr() + 4 * _MOST_SAMPLES, scratch.data_ptr(), per_sample, blocks


_scratches: dict[tuple[torch.device, int], torch.Tensor] = {}


def _scratch(nbytes: int, device: torch.device, stream: int) -> torch.Tensor:
    """Memory for one such kernel at a time on `stream`. The tickets, at its beginning, are zero before and after."""
    known = _scratches.get((device, stream))
    if known is None or known.numel() < nbytes:
        known = torch.zeros(2 * nbytes, dtype=torch.uint8, device=device)
        if not torch.cuda.is_current_stream_capturing():  # else it is zeroed by that graph, and for that graph alone
            _scratches[device, stream] = known
    return known


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _extent(shape: tuple[int, ...], operand: Operand) -> int:
    """Bytes that a tensor has, of which each element is read at least once."""
    return operand.dtype.itemsize * math.prod(
        size for size, stride in zip(shape, operand.strides, strict=True) if stride != 0
    )


@functools.lru_cache(maxsize=4096)
def _native(program: Program) -> Any:
    where = codegen.layout(program)
    width = codegen.vector_width(program)
    return extension.load().Program(
        where.sizes,
        where.strides,
        len(program.inputs),
        codegen.num_scalars(program),
        width,
        codegen.alignments(program, width),
    )


@functools.cache
def _kernel(source: str, device: int) -> Any:
    """Programs with the same source share the kernel; it is never unloaded."""
    return extension.load().Kernel(_image(source, device).result(), "cfg_parallel_program", device)


_images: list[Future[bytes]] = []


@functools.cache
def _image(source: str, device: int) -> Future[bytes]:
    """The kernel's machine code, once it is compiled."""
    capability = torch.cuda.get_device_capability(device)
    _images.append(_compilers().submit(nvrtc.compile_kernel, source, extension.load().kernel_headers(), capability))
    return _images[-1]


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, "cfg-parallel-nvrtc")


def finish_compiling() -> None:
    """Wait until every kernel that was asked for is there."""
    for image in _images:
        image.exception()
