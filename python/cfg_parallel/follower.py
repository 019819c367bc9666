"""The follower process: holds replicas of denoisers and answers calls. Started as `python -m cfg_parallel.follower`."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from cfg_parallel import caches, numerics
from cfg_parallel.calls import call_with_copies
from cfg_parallel.codec import decode, encode_plain
from cfg_parallel.compiling import CompileClock, is_compiled
from cfg_parallel.errors import CfgParallelError, FollowerLostError
from cfg_parallel.graphs import Graphs
from cfg_parallel.link import Link
from cfg_parallel.replica import clear_method_caches, receive_replica
from cfg_parallel.timing import Mark, elapsed_ms, mark, on_host_clock
from cfg_parallel.transports.nccl import NcclTransport
from cfg_parallel.transports.peer import PeerTransport, accept

_ORPHAN_CHECK = 0.5  # seconds; the leader's death ends its followers within 2 s


class Follower:
    """Serves one leader. `own` maps denoiser names to modules that are already here (under torchrun)."""

    def __init__(self, link: Link, own: dict[str, torch.nn.Module] | None = None) -> None:
        self._link = link
        self._own = own or {}
        self._denoisers: dict[str, torch.nn.Module] = {}
        self._residents: dict[Any, list[torch.Tensor]] = {}
        self._timings: list[tuple[Mark, Mark]] = []
        self._graphs = Graphs(link.device, False)
        self._clock: CompileClock | None = None

    def serve(self) -> Any:
        """Answer messages until the leader says `close` (gives None) or `output` (gives the leader's output)."""
        while True:
            header = self._link.read()
            kind = header["kind"]
            if kind == "close":
                return None
            if kind == "output":
                if header["failure"] is not None:
                    raise CfgParallelError(f"The pipeline failed on rank 0: {header['failure']}")
                output = decode(header["body"], self._link.pull(header))
                self._link.settle()
                return output
            tensors = self._link.pull(header)  # not in the try: a message received in part cannot be answered
            try:
                getattr(self, f"_on_{kind}")(header, tensors)
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                self._link.send({"kind": "error", "message": message})

    def greet(self) -> bool:
        """Answer the leader's invitation: who is here. False if there is none, and it is to end."""
        kind = ""
        while kind != "hello":
            header = self._link.read()
            kind = header["kind"]
            if kind == "close":
                return False
            sys.path[:] = header["path"]  # so that classes of the user's own modules can be unpickled
            for module in header["modules"]:
                with contextlib.suppress(ImportError):  # `__main__` in a notebook, say; its classes travel by value
                    importlib.import_module(module)
        device = self._link.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._link.send({"kind": "hello", "torch": torch.__version__, "gpu": gpu})
        return True

    def _on_begin(self, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        if header["numerics"] is not None:
            numerics.apply(header["numerics"])
        self._timings.clear()
        if self._clock is not None:
            self._clock.begin()
        self._graphs.mode = header["graphs"]
        self._graphs.begin(numerics.capture())

    def _on_transport(self, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        device = self._link.device
        self._link.detach()
        if header["name"] == "peer":
            accept(self._link, PeerTransport(device), header)
        else:
            self._link.use(NcclTransport.connect(header["ids"], 1, device, header["timeout"]))
        self._link.send({"kind": "connected"})

    def _on_denoiser(self, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        name = header["name"]
        replaced = self._denoisers.pop(name, None)
        states = {} if replaced is None else caches.states_of(replaced)
        self._graphs.forget(name)
        self._residents = {slot: kept for slot, kept in self._residents.items() if slot[0] != name}
        if replaced is not None:  # its memory is needed
            clear_method_caches(replaced)
            del replaced
            gc.collect()  # modules with hooks or LoRAs are in cycles
        module = receive_replica(self._link, header, self._own.get(name), timeout=None)
        caches.restore(module, states)
        self._denoisers[name] = module
        if self._clock is None and is_compiled(module):
            self._clock = CompileClock()

    def _on_reset(self, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        caches.reset(self._denoisers[header["name"]])

    def _on_forget(self, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        self._residents.clear()
        self._graphs.end()

    def _on_call(self, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        fresh = iter(tensors)
        slot, resident = header["slot"], header["resident"]
        kept = self._residents.get(slot, [])
        tensors = [kept[i] if is_resident else next(fresh) for i, is_resident in enumerate(resident)]
        self._residents[slot] = tensors
        versions = [tensor._version for tensor in tensors]
        context_body, context_tensors = header["context"]
        arguments = tensors[: len(tensors) - context_tensors]
        context = decode(context_body, tensors[len(arguments) :])
        module = self._denoisers[slot[0]]
        autocast = header["autocast"]
        start = mark(self._link.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if autocast is not None:
                stack.enter_context(torch.autocast(self._link.device.type, dtype=autocast))
            if context is not None:
                stack.enter_context(module.cache_context(context[0], **context[1]))  # type: ignore[operator]
            if self._graphs.on:
                output = self._graphs.run(slot[0], module, header["body"], arguments)
            else:
                args, kwargs = decode(header["body"], arguments)
                output = call_with_copies(module, args, kwargs)
        self._timings.append((start, mark(self._link.device)))
        if versions != [tensor._version for tensor in tensors]:
            self._residents.pop(slot)
            raise RuntimeError(
                "the denoiser overwrote one of its arguments, which a copy on another device cannot show"
            )
        body, results = encode_plain(output)
        self._link.send({"kind": "done", "body": body}, results)  # type: ignore[arg-type]

    def _on_statistics(self, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        """Of the last generation: milliseconds of each forward and between them; the peak of device memory in bytes."""
        on_gpu = self._link.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._link.device)
        forwards = [elapsed_ms(*marks) for marks in self._timings]
        at = on_host_clock(self._link.device)
        gaps = [elapsed_ms(before[1], after[0]) for before, after in itertools.pairwise(self._timings)]
        peak = torch.cuda.max_memory_allocated(self._link.device) if on_gpu else None
        self._link.send(
            {
                "kind": "statistics",
                "forward_ms": forwards,
                "forwards_at": [(at(start), at(end)) for start, end in self._timings],
                "wait_ms": sum(gaps),
                "peak_bytes": peak,
                "graphs": self._graphs.counts(),
                "compile_seconds": self._clock.seconds if self._clock is not None else 0.0,
            }
        )


def _end_with(parent: int) -> None:
    """Leave when the leader is gone, whatever the main thread is doing (a long forward, a wait in NCCL)."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_CHECK)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A follower of cfg-parallel. Started by enable_cfg_parallel, not by hand."
    )
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the leader")
    parser.add_argument("--parent", type=int, required=True, help="the leader's process id")
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    threading.Thread(target=_end_with, args=(options.parent,), name="cfg-parallel-orphan", daemon=True).start()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    link = Link(Connection(options.fd), device)
    follower = Follower(link)
    try:
        if follower.greet():
            follower.serve()
    except FollowerLostError:
        os._exit(1)  # the leader is gone
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # PyTorch's teardown takes seconds and there is nothing to save


if __name__ == "__main__":
    main()
