"""An enabled tiny pipeline, the same one on one device, and what a fault may not leave behind."""

from __future__ import annotations

import gc
import os
import random
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

import cfg_parallel
from faults.faulty import Faulty
from reference import reference
from tiny import TINY, Tiny, generate

PATIENCE = 5.0  # seconds that a generation with a fault may take more than on one device
TIMEOUT = 2.0  # seconds until a follower that hangs is given up
LAYER = {
    "qwen_image": "proj_out",
    "flux": "proj_out",
    "wan": "proj_out",
    "sd15": "conv_out",
    "instruct_pix2pix": "conv_out",
}


@dataclass
class Outcome:
    """Of one generation with a fault in it."""

    returned: bool = False
    equal: bool = False
    seconds: float = 0.0
    one_device: float = 0.0  # seconds that the same generation took there
    told: list[str] = field(default_factory=list)  # warnings of this package
    error: str | None = None
    left_behind: list[str] = field(default_factory=list)
    generations: int = 0

    @property
    def late(self) -> float:
        """Seconds more than one device took."""
        return self.seconds - self.one_device

    @property
    def wrong(self) -> list[str]:
        """What is not as it should be."""
        found = []
        if not self.returned:
            found.append(f"no image: {self.error}")
        elif not self.equal:
            found.append("another image than one device gives")
        if self.late > PATIENCE:
            found.append(f"{self.late:.1f} s later than one device")
        if len(self.told) > self.generations:
            found.append(f"{len(self.told)} warnings: {self.told}")
        return found + self.left_behind


class World:
    def __init__(self, name: str, device: str, folder: Path) -> None:
        self.tiny: Tiny = TINY[name]
        self.device = device
        self.orders = folder / f"orders-{name}"
        self.plain, self.pipe = (self._build() for _ in range(2))
        devices = ["cpu", "cpu"] if device == "cpu" else None
        # Python code in a forward is not run when a graph is replayed.
        self.handle: Any = cfg_parallel.enable_cfg_parallel(
            self.pipe, devices=devices, cuda_graphs=False, follower_timeout=TIMEOUT
        )

    def _build(self) -> Any:
        pipe = self.tiny.build()
        denoiser = getattr(pipe, self.tiny.denoiser)
        layer = LAYER[self.tiny.name]
        setattr(denoiser, layer, Faulty(getattr(denoiser, layer), self.orders))
        return pipe.to(self.device)

    def close(self) -> None:
        self.handle.disable()

    @property
    def follower(self) -> Any:
        """The process that serves now."""
        return self.handle._leader.remotes[0].process

    def order(self, what: str, after: int) -> None:
        """The follower is to do this in its forward, after so many that go well."""
        self.orders.write_text(f"{what}:{after}")

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Arguments of a call; again the same ones for the same state of `rng`."""
        size = rng.choice([None, self.tiny.other_size]) if self.tiny.takes_size else None
        return self.tiny.inputs(rng.randrange(1000), size=size, num_inference_steps=rng.randint(3, 6))

    def expected(self, draw: random.Random, **changes: Any) -> tuple[torch.Tensor, float]:
        """What one device gives, branch by branch, and in how many seconds."""
        start = time.perf_counter()
        out = reference(self.tiny, self.plain, self.draw(draw) | changes).cpu()
        return out, time.perf_counter() - start

    def generate(self, draw: random.Random, **changes: Any) -> torch.Tensor:
        out: torch.Tensor = generate(self.pipe, self.draw(draw) | changes).cpu()
        return out

    def good(self, seed: int) -> float:
        """A generation without a fault, with a follower that serves: seconds."""
        expected, _ = self.expected(random.Random(seed))
        for _ in range(2):  # one that was killed at the end of the last generation may have looked alive
            if not self.handle.wait_until_ready(60):
                raise AssertionError(f"no follower came up: {self.handle._leader.remotes[0].lost}")
            start = time.perf_counter()
            got = self.generate(random.Random(seed))
            seconds = time.perf_counter() - start
            assert torch.equal(got, expected), "without a fault the result is wrong"
            if self.handle.report.calls_shipped > 0:
                return seconds
        raise AssertionError(f"without a fault nothing was shipped: {self.handle.report.why}")

    def attempt(self, seed: int, outcome: Outcome, **changes: Any) -> None:
        """The generation in which the fault happens, or that comes after one. It never raises."""
        expected, outcome.one_device = self.expected(random.Random(seed), **changes)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start = time.perf_counter()
            first, outcome.generations = outcome.generations == 0, outcome.generations + 1
            try:
                got = self.generate(random.Random(seed), **changes)
                outcome.returned = first or outcome.returned
                outcome.equal = torch.equal(got, expected) and (first or outcome.equal)
            except BaseException as error:
                outcome.returned = False
                outcome.error = f"{type(error).__name__}: {error}"
            outcome.seconds = max(outcome.seconds, time.perf_counter() - start)
        outcome.told += [text for text in (str(warning.message) for warning in caught) if "ollower" in text]

    def left_behind(self, before: dict[str, int]) -> list[str]:
        """What there is more of than before, when a follower serves again. A process may take a moment to go."""
        deadline = time.monotonic() + 5
        while True:
            now = belongings(self.device)
            more = [f"{name}: {before[name]} -> {now[name]}" for name in now if now[name] > before[name] + slack(name)]
            if not more or time.monotonic() > deadline:
                return more
            time.sleep(0.1)


def belongings(device: str) -> dict[str, int]:
    """What this process holds: child processes, open files, segments of shared memory, and MiB of each GPU."""
    gc.collect()
    me = psutil.Process()
    files = [os.readlink(link.path) for link in os.scandir("/proc/self/fd") if os.path.lexists(link.path)]
    segments = sum("memfd:cfg-parallel" in name for name in files)
    held = {
        "processes": len(me.children(recursive=True)),
        "open files": len(files) - segments,
        "shared memory": segments,
    }
    if device != "cpu":
        held |= {f"MiB of {name}": round(mib) for name, mib in gpu_memory().items()}
    return held


def gpu_memory() -> dict[str, float]:
    """MiB of each GPU that this process and its children hold; other programs may use the GPUs meanwhile."""
    import pynvml

    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    held = {}
    pynvml.nvmlInit()
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(gpu).uuid}")
        sizes = {each.pid: each.usedGpuMemory for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        if os.getpid() not in sizes:
            raise RuntimeError(f"NVML does not list this process on cuda:{gpu}, so what it holds there cannot be told")
        held[f"cuda:{gpu}"] = sum(size for pid, size in sizes.items() if pid in mine) / 2**20
    return held


def slack(name: str) -> int:
    """A connection has as many segments as it had messages on their way at once; a process's context on a GPU differs a
    little from another's."""
    return 64 if name.startswith("MiB") else 8 if name == "shared memory" else 0
