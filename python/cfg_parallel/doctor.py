"""`cfg-parallel doctor`: is everything there, how fast is the link, and does a model fit.

Each check is a `Finding`: ok, a warning (it works, but) or an error (it does not), and what to do about it.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import functools
import importlib.metadata
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cfg_parallel import __version__, extension, nvrtc
from cfg_parallel.errors import CfgParallelError, ConfigurationError
from cfg_parallel.report import with_fix

Status = Literal["ok", "warning", "error"]

_NVLINK = 25.0  # GB/s of one link in one direction, since NVLink 2
_PCIE = {3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # GB/s of one lane in one direction
_GOOD = 0.6  # of what a link should give
_SMALL, _LARGE = 128 << 10, 64 << 20  # bytes: a prediction of SD 1.5 in bf16, and one of a video
_SECONDS = 0.5  # of each timed loop
_EMBEDDED = "guidance_embeds"  # the guidance scale is an input of the model
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_WORKING_MEMORY = 0.15  # of the weights: what forwards need besides, roughly


@dataclass(frozen=True)
class Finding:
    """`fix` is empty where nothing is to be done; `figures` are for programs."""

    check: str
    status: Status
    message: str
    fix: str = ""
    figures: dict[str, Any] | None = None

    def line(self) -> str:
        return f"{self.status:8}{self.check:14}{self.message}" + (f": {self.fix}" if self.fix else "")


def run(model: str | None, devices: Sequence[str] | None, quick: bool, as_json: bool) -> int:
    """Prints every finding; 1 if one is an error."""
    findings = []
    for finding in examine(model, devices, quick):
        findings.append(finding)
        if not as_json:
            print(finding.line(), flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return 1 if any(finding.status == "error" for finding in findings) else 0


def examine(model: str | None, devices: Sequence[str] | None, quick: bool) -> Iterator[Finding]:
    yield _versions()
    yield from _gpus()
    yield _module()
    yield _kernels()
    yield _triton()
    chosen = list(devices) if devices is not None else default_devices()
    links = _links(chosen)
    yield from links
    yield _transport(chosen)
    if len(chosen) > 1 and not quick:
        yield _exchange(chosen, links)
    yield from _environment()
    if model is not None:
        yield from _model(model, chosen)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _versions() -> Finding:
    names = ("torch", "diffusers", "transformers", "accelerate")
    shown = ", ".join(f"{name} {torch.__version__ if name == 'torch' else _version(name)}" for name in names)
    message = f"cfg-parallel {__version__}, Python {platform.python_version()}, {shown}"
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Finding(
            "versions", "error", message, "this PyTorch is a CPU build and the machine has GPUs; install a CUDA build"
        )
    return Finding("versions", "ok", message)


def _gpus() -> Iterator[Finding]:
    count = torch.cuda.device_count()
    if count == 0:
        visible = os.environ.get(_VISIBLE)
        fix = f"{_VISIBLE} is {visible!r}" if visible is not None else "two CPU processes can be tried out"
        yield Finding("GPUs", "warning", "PyTorch sees none", fix)
        return
    for gpu in range(count):
        properties = torch.cuda.get_device_properties(gpu)
        free, total = torch.cuda.mem_get_info(gpu)
        text = f"cuda:{gpu} {properties.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        text += f", compute capability {properties.major}.{properties.minor}"
        figures = {"gpu": gpu, "name": properties.name, "free_bytes": free, "total_bytes": total}
        yield Finding("GPUs", "ok", text, figures=figures)
    driver = _driver_version()
    yield Finding(
        "driver", "ok", f"for CUDA {driver // 1000}.{driver % 1000 // 10}, PyTorch is for {torch.version.cuda}"
    )
    if count == 1:
        hidden = f"{_VISIBLE} is {os.environ[_VISIBLE]!r}; " if _VISIBLE in os.environ else ""
        fix = f"{hidden}make a second one visible, or pass cfg_parallel_size=1, for CUDA graphs and compile on one"
        yield Finding("GPUs", "warning", "one GPU has no other to share guidance with", fix)
    names = {torch.cuda.get_device_name(gpu) for gpu in range(count)}
    if len(names) > 1:
        yield Finding(
            "GPUs",
            "warning",
            f"different kinds ({', '.join(sorted(names))})",
            "take two of one kind: bits may differ, and the slower one sets the pace",
        )


def _driver_version() -> int:
    """Of the newest CUDA that the driver runs, such as 13000."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _module() -> Finding:
    missing = extension.missing_reason()
    if missing is not None:
        status: Status = "error" if torch.cuda.device_count() > 1 else "warning"
        return Finding("CUDA module", status, "missing", missing)
    built = extension.load().build_info()
    message = f"built with CUDA {built['cuda']} for {built['archs']}"
    for gpu in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(gpu)
        if not _runs_on(built["archs"], major, minor):
            return Finding(
                "CUDA module",
                "error",
                f"{message}, and cuda:{gpu} is {major}.{minor}",
                f"build it with CFG_PARALLEL_CUDA_ARCHS={major}{minor}",
            )
    return Finding("CUDA module", "ok", message)


def _runs_on(archs: str, major: int, minor: int) -> bool:
    """Whether a GPU runs code for `archs`, as CMake writes them: machine code of its generation, or an older PTX."""
    for number, kind in re.findall(r"(\d+)(-real|-virtual)?", archs):
        if kind != "-virtual" and int(number) // 10 == major and int(number) % 10 <= minor:
            return True
        if kind != "-real" and int(number) <= 10 * major + minor:
            return True
    return False


def _kernels() -> Finding:
    missing = nvrtc.missing_reason()
    if missing is None:
        return Finding("NVRTC", "ok", "compiles the kernels of guidance and scheduler steps")
    if torch.cuda.device_count() == 0:
        return Finding("NVRTC", "ok", "not needed without a GPU")
    return Finding("NVRTC", "warning", "missing, so guidance runs op by op", missing)


def _triton() -> Finding:
    version = _version("triton")
    if version == "missing":
        return Finding(
            "Triton", "warning", "missing", "only guidance.combine(backend='triton') and torch.compile need it"
        )
    return Finding("Triton", "ok", version)


def default_devices() -> list[str]:
    return (
        ["cuda:0", "cuda:1"]
        if torch.cuda.device_count() > 1
        else ["cpu", "cpu"]
        if torch.cuda.device_count() == 0
        else ["cuda:0"]
    )


# The link.


def _links(devices: Sequence[str]) -> list[Finding]:
    if len(devices) < 2 or devices[0] == "cpu":
        return []
    kinds = _topology()
    found = []
    leader = torch.device(devices[0])
    for device in map(torch.device, devices[1:]):
        access = torch.cuda.can_device_access_peer(leader, device) and torch.cuda.can_device_access_peer(device, leader)
        kind = kinds.get((leader.index or 0, device.index or 0), "unknown")
        should = _nominal(kind, leader.index or 0)
        text = f"{leader} to {device}: {_named(kind)}" + (f", {should:.0f} GB/s in each direction" if should else "")
        if access:
            copied = _copy_bandwidth(leader, device)
            figures = {"link": kind, "nominal_gb_s": should, "copied_gb_s": round(copied, 1)}
            text += f"; a copy runs at {copied:.0f} GB/s"
            slow = should is not None and copied < _GOOD * should
            fix = (
                "less than that link should give; is something else using it, or ACS or an IOMMU in the way"
                if slow
                else ""
            )
            found.append(Finding("link", "warning" if slow else "ok", text, fix, figures))
        else:
            fix = (
                "NCCL is used, which is slower for small models only; `nvidia-smi topo -p2p w` shows which GPUs have it"
            )
            found.append(Finding("link", "warning", f"{text}; no peer access", fix, {"link": kind}))
    return found


def _topology() -> dict[tuple[int, int], str]:
    """What `nvidia-smi topo -m` says of each pair: NV18 (links), PIX, PXB, PHB, NODE or SYS."""
    lines = _ask_driver("topo", "-m").splitlines()
    header = next((line.split("\t") for line in lines if "GPU0" in line and not line.startswith("GPU0")), None)
    if header is None:
        return {}
    columns = [name.strip().removeprefix("\x1b[4m") for name in header]
    kinds: dict[tuple[int, int], str] = {}
    for line in lines:
        cells = [cell.strip() for cell in line.split("\t")]
        if not cells[0].startswith("GPU") or cells == columns:
            continue
        for column, cell in zip(columns[1:], cells[1:], strict=False):
            if column.startswith("GPU") and column[3:].isdigit() and cell and cell != "X":
                kinds[int(cells[0][3:]), int(column[3:])] = cell
    return kinds


def _ask_driver(*arguments: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # it is not there, and then nothing is known
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    return ""


def _nominal(kind: str, gpu: int) -> float | None:
    """GB/s in one direction."""
    if kind.startswith("NV") and kind[2:].isdigit():
        return int(kind[2:]) * _NVLINK
    if kind in ("PIX", "PXB", "PHB", "NODE", "SYS"):
        asked = "--query-gpu=pcie.link.gen.max,pcie.link.width.max"
        rows = list(csv.reader(_ask_driver(asked, "--format=csv,noheader", f"--id={gpu}").splitlines()))
        if rows and len(rows[0]) == 2 and all(cell.strip().isdigit() for cell in rows[0]):
            generation, lanes = (int(cell) for cell in rows[0])
            return _PCIE.get(generation, 0.0) * lanes or None
    return None


def _named(kind: str) -> str:
    if kind.startswith("NV"):
        return f"NVLink ({kind})"
    return {"unknown": "a link that nvidia-smi does not tell"}.get(kind, f"PCIe ({kind})")


def _copy_bandwidth(source: torch.device, target: torch.device) -> float:
    """GB/s of the copy engine."""
    a, b = (torch.empty(_LARGE, dtype=torch.uint8, device=device) for device in (source, target))
    b.copy_(a)
    torch.cuda.synchronize(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(source):
        begin.record()
        for _ in range(20):
            b.copy_(a, non_blocking=True)
        end.record()
        end.synchronize()
    return 20 * _LARGE / begin.elapsed_time(end) / 1e6


def _transport(devices: Sequence[str]) -> Finding:
    from cfg_parallel.transports import resolve

    name, why = resolve("auto", [torch.device(device) for device in devices])
    slow = name == "host" and devices[0] != "cpu" and len(devices) > 1
    fix = "through host memory, the slowest way; see the lines above" if slow else ""
    return Finding("transport", "warning" if slow else "ok", f"auto takes {name} ({why})", fix, {"transport": name})


class _Echo(torch.nn.Module):
    """A denoiser that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: torch.Tensor, timestep: float) -> torch.Tensor:
        return hidden_states + self.shift


class _Pipeline:
    """Guidance and nothing else."""

    def __init__(self, device: str) -> None:
        self.transformer = _Echo().to(device).eval()
        self.device = device

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    @torch.no_grad()
    def __call__(self, nbytes: int, steps: int, guidance_scale: float = 4.0) -> torch.Tensor:
        x = torch.arange(nbytes // 4, dtype=torch.float32, device=self.device) % 1000
        for step in range(steps):
            cond = self.transformer(x, timestep=float(step))
            uncond = self.transformer(x - 1, timestep=float(step))
            x = (uncond + guidance_scale * (cond - uncond)) % 1000
        return x


def _exchange(devices: Sequence[str], links: Sequence[Finding]) -> Finding:
    """A follower is started, and steps whose forwards do nothing are timed, against the same on one device."""
    from cfg_parallel.enable import enable_cfg_parallel

    alone = [_Pipeline(devices[0])(nbytes, 3) for nbytes in (_SMALL, _LARGE)]
    pipe: Any = _Pipeline(devices[0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with enable_cfg_parallel(pipe, devices=list(devices[:2]), cuda_graphs=False) as handle:
                equal = all(torch.equal(pipe(n, 3), one) for n, one in zip((_SMALL, _LARGE), alone, strict=True))
                small, large = (
                    _seconds_of_a_step(functools.partial(pipe, nbytes), devices[0]) for nbytes in (_SMALL, _LARGE)
                )
                transport, why = handle.report.transport, with_fix(handle.report.transport_reason)
    except (CfgParallelError, RuntimeError) as error:
        first = " ".join(str(error).split())
        return Finding("exchange", "error", "two processes do not work together", first)
    rate = 2 * _LARGE / large / 1e9  # there and back
    text = (
        f"by {transport}: a step of nothing takes {small * 1e3:.3g} ms, and 64 MiB go there and back at {rate:.1f} GB/s"
    )
    figures = {"transport": transport, "step_us": round(small * 1e6, 1), "gb_s": round(rate, 2), "equal": equal}
    if not equal:
        return Finding("exchange", "error", f"{text}, but the bytes are not the same", "try another transport", figures)
    copied = next(
        (link.figures["copied_gb_s"] for link in links if link.figures and "copied_gb_s" in link.figures), None
    )
    if copied is not None:
        text += f" (a copy alone: {copied:.0f})"
    if "peer does not work here" in why:  # though the driver says that it should
        return Finding("exchange", "warning", text, why, figures)
    return Finding("exchange", "ok", text, figures=figures)


def _seconds_of_a_step(run: Callable[[int], Any], device: str) -> float:
    def timed(steps: int) -> float:
        began = time.perf_counter()
        run(steps)
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed(5)
    steps = max(5, min(500, int(_SECONDS / (timed(5) / 5))))
    return timed(steps) / steps


# The environment, and a model.


def _environment() -> Iterator[Finding]:
    names = (
        _VISIBLE,
        "CUDA_LAUNCH_BLOCKING",
        "OMP_NUM_THREADS",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
    )
    given = {
        name: value
        for name, value in os.environ.items()
        if name in names or name.startswith(("NCCL_", "CFG_PARALLEL_"))
    }
    given = {name: "..." if "KEY" in name else value for name, value in given.items()}
    if given:
        yield Finding("environment", "ok", ", ".join(f"{name}={value}" for name, value in sorted(given.items())))
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        yield Finding("environment", "warning", "CUDA_LAUNCH_BLOCKING=1 waits for every kernel", "unset it")
    if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get(
        "PYTORCH_ALLOC_CONF", ""
    ):
        yield Finding(
            "environment",
            "warning",
            "expandable_segments:True: such memory has no CUDA IPC handle",
            "unset it if peer fails",
        )


def _model(model: str, devices: Sequence[str]) -> Iterator[Finding]:
    from cfg_parallel import models
    from cfg_parallel.preflight import read_model_index

    try:
        folder = Path(model)
        index = read_model_index(model)
        if index is None:
            folder = _downloaded(model)
            index = read_model_index(str(folder))
    except ConfigurationError as error:
        yield Finding("model", "error", f"{model} cannot be looked at", str(error))
        return
    assert index is not None
    name = index["_class_name"]
    row = next((row for row in models.pipelines() if row["pipeline"] == name), None)
    if row is None:
        yield Finding(
            "model", "warning", f"{name} is not known to use guidance", "without a second pass two devices gain nothing"
        )
    elif not row["supported"]:
        yield Finding("model", "warning", f"{name} runs on one device", row["note"] or "see `cfg-parallel models`")
    elif (mark := _distilled(folder, index)) is not None:
        needs = (mark == _EMBEDDED and _needs(name)) or "a second pass"
        fix = f"two devices gain nothing without {needs}"
        yield Finding("model", "warning", f"{name} with a distilled model ({mark}), made for one pass a step", fix)
    else:
        needs = f", given {needs}" if (needs := _needs(name)) else ""
        yield Finding("model", "ok", f"{name}: its passes run in parallel, with equal bits ({row['rule']}){needs}")
    yield from _memory(folder, index, devices)


def _needs(name: str) -> str:
    """What starts the second pass of a pipeline, by the arguments that it takes."""
    import diffusers

    pipeline_class = getattr(diffusers, name, None)
    parameters = inspect.signature(pipeline_class.__call__).parameters if pipeline_class is not None else {}
    if "true_cfg_scale" in parameters:
        return "true_cfg_scale above 1 and a negative prompt"
    return "guidance_scale above 1" if "guidance_scale" in parameters else ""


def _distilled(folder: Path, index: dict[str, Any]) -> str | None:
    """The setting that marks a model as made for one pass a step; some have none (schnell, Turbo)."""
    if index.get("is_distilled"):
        return "is_distilled"
    for component in filter(_is_denoiser, index):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # there is none, or it is no such file
            config = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
            for setting in ("time_cond_proj_dim", _EMBEDDED):
                if config.get(setting):
                    return setting
    return None


def _is_denoiser(component: str) -> bool:
    return component.startswith(("transformer", "unet", "prior"))


def _downloaded(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError) as error:
        raise ConfigurationError(f"{model} is not downloaded: `hf download {model}`, then ask again.") from error


def _memory(folder: Path, index: dict[str, Any], devices: Sequence[str]) -> Iterator[Finding]:
    """Weights as they lie on disk, which is in bf16 what they take."""
    sizes = {
        component: sum(file.stat().st_size for file in (folder / component).glob("*.safetensors"))
        for component, entry in index.items()
        if isinstance(entry, (list, tuple)) and (folder / component).is_dir()
    }
    whole, share = sum(sizes.values()), sum(sizes[component] for component in sizes if _is_denoiser(component))
    if not share:
        yield Finding(
            "memory", "warning", "the denoiser's weights are not there as safetensors", "their size is unknown"
        )
        return
    for place, device in enumerate(devices):
        need = (whole if place == 0 else share) * (1 + _WORKING_MEMORY)
        what = "the whole pipeline" if place == 0 else "the denoiser, of which every device holds a copy,"
        if device == "cpu":
            continue
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        text = f"{device} needs about {need / 1e9:.1f} GB for {what} and has {free / 1e9:.1f} GB free"
        if need <= free:
            yield Finding("memory", "ok", text)
        else:
            fix = (
                "enable_model_cpu_offload()"
                if place == 0 and share * (1 + _WORKING_MEMORY) <= free
                else "quantize the denoiser, or use enable_layerwise_casting or enable_group_offload on it"
            )
            yield Finding("memory", "error", text, f"{fix}, or free what else is on {device}")
    if all(device == "cpu" for device in devices):
        yield Finding(
            "memory", "ok", f"{(whole + share * (len(devices) - 1)) / 1e9:.1f} GB of weights in all processes"
        )
