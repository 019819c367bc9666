"""`cfg-parallel bench`: the whole harness of benchmarks/ in one command, and a table of what this machine gains.

Each script runs in a process of its own and writes its rows into one folder; what they are is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfg_parallel import __version__
from cfg_parallel.errors import ConfigurationError

PARTS = {
    "combine": "the guidance kernels on one GPU, against the bandwidth of a copy",
    "exchange": "the exchange between two GPUs, against NCCL and eager PyTorch",
    "step": "a denoising step, against one device, an all_gather loop and diffusers' Ulysses",
    "pipeline": "prompt (and photograph) in, PNG out, against one device, stage by stage",
}
_MODELS = ("sd15", "sdxl", "sd35-large", "qwen-image@512", "qwen-image@1024", "qwen-image-edit", "wan21-1.3b")
_QUICK_MODELS = ("sd15", "sdxl")
_DRY_MODELS = ("sdxl", "qwen-image")
_STEPS, _WHOLE_STEPS, _QUICK_STEPS, _DRY_STEPS = 20, 50, 8, 4
_EXACT = ("two-gpu-graphs", "two-gpu-auto", "two-gpu-eager")
_COMPILED = "two-gpu-compiled"
_ONE = "one-gpu-eager"
_RIVALS = ("all-gather", "ulysses")
_FILES = {"combine": "combine.json", "exchange": "peer_combine.json", "step": "step.json", "pipeline": "pipeline.json"}


@dataclass(frozen=True)
class Job:
    """A script to run; `why` says in its place why it is not."""

    part: str
    name: str
    command: tuple[str, ...]
    why: str | None = None


def run(args: argparse.Namespace, devices: Sequence[str]) -> int:
    """Runs the parts, writes `summary.md` and returns the exit status: 1 if a part failed or a picture differed."""
    scripts = harness()
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be made ({error}): change --out.") from error
    for name in args.model or ():
        _check_model(name, scripts)
    jobs = plan(args, devices, scripts, out)
    environment = os.environ | ({"OMP_NUM_THREADS": str(_threads(devices))} if devices[0] == "cpu" else {})
    began = time.perf_counter()
    failed = []
    for i, job in enumerate(jobs, 1):
        print(f"\n== {i}/{len(jobs)} {job.name}: {job.why or PARTS[job.part]}", flush=True)
        if job.why is None and subprocess.run(job.command, stdin=subprocess.DEVNULL, env=environment).returncode != 0:
            failed.append(job.name)
    text = summary(_rows(out), _rows(scripts / "results"), devices)
    (out / "summary.md").write_text(text + "\n")
    print(f"\n{text}\n\nwrote {out}/ in {time.perf_counter() - began:.0f} s: " + ", ".join(_written(out)))
    for name in failed:
        print(f"cfg-parallel: {name} failed or found a difference; what it said is above", file=sys.stderr)
    return 1 if failed else 0


def harness() -> Path:
    """Where the scripts are: within the installed package, or in the repository of an editable installation."""
    package = Path(__file__).resolve().parent
    for folder in (package / "harness" / "benchmarks", package.parents[1] / "benchmarks"):
        if (folder / "bench_step.py").is_file():
            return folder
    raise ConfigurationError(
        "the benchmarks are not in this installation: install cfg-parallel from its repository or a wheel of it."
    )


def plan(args: argparse.Namespace, devices: Sequence[str], scripts: Path, out: Path) -> list[Job]:
    """What to run, in order. Parts that need what is not there say so instead."""
    dry, two = devices[0] == "cpu", len(devices) > 1
    models = args.model or (_DRY_MODELS if dry else _QUICK_MODELS if args.quick else _MODELS)
    if args.size:
        models = tuple(f"{_sized(model)[0]}@{args.size}" for model in models)
    short = _DRY_STEPS if dry else _QUICK_STEPS if args.quick else None
    scale = ("--scale", "tiny") if dry else ()
    on = ("--devices", ",".join(devices))

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(scripts / f"bench_{name}.py"), *arguments, "--out", str(out / f"{name}.json"))

    jobs = []
    for part in args.only or PARTS:
        if part == "combine":
            why = "left out, as it needs a GPU" if dry else None
            quick = ("--quick",) if args.quick else ()
            jobs.append(Job(part, part, script("combine", "--device", devices[0], *quick), why))
        elif part == "exchange":
            why = None
            if dry or not two or not _have_peer_access(devices):
                why = "left out, as it needs two GPUs with peer access"
            elif list(devices) != ["cuda:0", "cuda:1"]:
                why = "left out, as it runs on cuda:0 and cuda:1 only; CUDA_VISIBLE_DEVICES makes others those"
            jobs.append(Job(part, part, script("peer_combine", *(("--quick",) if args.quick else ())), why))
        elif part == "step":
            modes = (_ONE, *_EXACT[:1], *(() if args.quick else (_COMPILED, *_RIVALS)))
            if dry:
                modes = (_ONE, _EXACT[-1], _RIVALS[0])
            elif not two:
                modes = (_ONE, "one-gpu-graphs")
            arguments = ["--models", ",".join(models), "--modes", ",".join(modes), *on, *scale]
            arguments += ["--steps", str(args.steps or short or _STEPS), "--repeat", "1" if short else "3", "--resume"]
            arguments += ["--chart", str(out / "step.png")] if _can_draw() else []
            jobs.append(Job(part, part, script("step", *arguments)))
        else:
            for model in models:
                name, size = _sized(model)
                modes = _EXACT[-1:] if dry else _EXACT[:1] if args.quick else (_EXACT[0], _COMPILED)
                arguments = ["--model", name, "--mode", ",".join(modes), *on, *scale]
                arguments += ["--size", size] if size else []
                arguments += ["--steps", str(args.steps or short or _WHOLE_STEPS)]
                why = None if two else "left out, as it compares two devices with one"
                jobs.append(Job(part, f"{part} of {model}", script("pipeline", *arguments), why))
    return jobs


def _threads(devices: Sequence[str]) -> int:
    """CPU threads of each process. They share the cores, and equal bits need equal threads."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // len(devices))


def _is_folder(model: str) -> bool:
    return (Path(model) / "model_index.json").is_file()


def _sized(model: str) -> tuple[str, str]:
    """The name or folder, and the size, if there is one."""
    if "@" not in model or _is_folder(model):
        return model, ""
    name, _, size = model.rpartition("@")
    return name, size


def _check_model(model: str, scripts: Path) -> None:
    """Before anything runs. The scripts know best, but each would say it by itself."""
    name, _ = _sized(model)
    if _is_folder(name):
        return
    specs: Any = runpy.run_path(str(scripts / "model_specs.py"))["SPECS"]
    if name not in {*specs, *(spec.checkpoint for spec in specs.values())}:
        raise ConfigurationError(
            f"--model {model}: there is no such folder, and the benchmarks know {', '.join(specs)}; name some of them."
        )


def _have_peer_access(devices: Sequence[str]) -> bool:
    import torch

    return all(torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices if a != b)


def _can_draw() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def _written(out: Path) -> Iterable[str]:
    return sorted(path.name for path in out.iterdir() if path.suffix in (".json", ".md", ".png"))


def _rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        part: json.loads((folder / name).read_text()) if (folder / name).is_file() else []
        for part, name in _FILES.items()
    }


# What was measured.


def summary(
    here: dict[str, list[dict[str, Any]]], there: dict[str, list[dict[str, Any]]], devices: Sequence[str]
) -> str:
    """Markdown: the speed-ups of this machine beside those of `there`, the rows that come with cfg-parallel."""
    import torch

    on_gpu = devices[0] != "cpu"
    names = {torch.cuda.get_device_name(device) for device in devices} if on_gpu else {"CPU"}
    lines = [f"# cfg-parallel {__version__} on {len(devices)} x {', '.join(sorted(names))}", ""]
    lines.append(f"torch {torch.__version__}; times as fast as plain diffusers on one device, in the same run.")
    if not on_gpu:
        lines.append("Two CPU processes and tiny models: a dry run. Equality is meant, the times are not.")
    lines += _steps(here["step"], there["step"])
    lines += _whole(here["pipeline"], there["pipeline"])
    lines += _kernels(here["combine"], here["exchange"])
    return "\n".join(lines)


def _steps(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> list[str]:
    rows = []
    for key, modes in _by_model(here).items():
        known = _by_model(there).get(key, {})
        one, exact = modes.get(_ONE), _exact(modes)
        rows.append(
            [
                *key[:2],
                _ms(one),
                _times(exact),
                _times(modes.get(_COMPILED)),
                *(_times(modes.get(rival)) for rival in _RIVALS),
                _equal(exact),
                f"{_times(_exact(known))} / {_times(known.get(_COMPILED))}" if known else "",
            ]
        )
    head = ["model", "size", "one device, ms a step", "exact", "compiled", "all_gather", "Ulysses", "equal", "two H200"]
    return ["", "## A denoising step", "", *_table(head, rows)] if rows else []


def _whole(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> list[str]:
    rows = []
    for key, modes in _by_model(here).items():
        known = _by_model(there).get(key, {})
        for mode in modes:
            row = modes[mode]
            stages = [row.get(f"{stage}_s") for stage in ("encode", "denoise", "decode", "png")]
            rows.append(
                [
                    *key[:2],
                    str(row["steps"]),
                    mode,
                    *("" if seconds is None else f"{seconds:.3f}" for seconds in stages),
                    f"{row['total_s']:.3f}",
                    f"{row['speedup_total']:.2f}x",
                    _equal(row),
                    f"{known[mode]['speedup_total']:.2f}x" if mode in known else "",
                ]
            )
    head = ["model", "size", "steps", "mode", "encode, s", "denoise, s", "decode, s", "PNG, s", "in all, s"]
    head += ["speed-up", "equal", "two H200"]
    return ["", "## From prompt to picture", "", *_table(head, rows)] if rows else []


def _kernels(combine: list[dict[str, Any]], exchange: list[dict[str, Any]]) -> list[str]:
    lines = []
    fused = [row for row in combine if row.get("backend") == "cuda" and row.get("rule") != "copy"]
    if fused:
        shares = sorted(row["share"] for row in fused)
        wrong = sum(row["wrong"] for row in combine)
        lines.append(
            f"Guidance kernels of {fused[0]['bytes'] / 2**20:.0f} MiB (`combine.md`): {len(fused)}, at {shares[0]:.0%} "
            f"to {shares[-1]:.0%} of the bandwidth of a copy; {wrong} elements wrong."
        )
    timed = [row for row in exchange if row.get("mode") == "latency" and row.get("rule") == "cfg" and "us" in row]
    for nbytes in sorted({row["bytes"] for row in timed}):
        of = {row["backend"]: row["us"] for row in timed if row["bytes"] == nbytes}
        if "peer" in of and "nccl+eager" in of:
            lines.append(
                f"Exchange and guidance of {nbytes / 2**10:.0f} KiB: {of['peer']:.1f} us; NCCL and eager PyTorch take "
                f"{of['nccl+eager']:.1f}."
            )
    return ["", "## Kernels", "", *lines] if lines else []


def _by_model(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, dict[str, Any]]]:
    """(model, size, steps) -> mode -> row. Steps of a denoising step's rows do not matter, and are 0."""
    found: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        steps = 0 if row["bench"] == "step" else row["steps"]
        found.setdefault((row["model"], row["size"], steps), {})[row["mode"]] = row
    return found


def _exact(modes: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return next((modes[mode] for mode in (*_EXACT, "one-gpu-graphs") if mode in modes), None)


def _ms(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['ms']:.2f}"


def _times(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['speedup']:.2f}x"


def _equal(row: dict[str, Any] | None) -> str:
    return "" if row is None or row.get("equal") is None else "yes" if row["equal"] else "NO"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, padded, for a terminal too. Columns with nothing in them are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    cells = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(kept))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines = [f"| {line} |" for line in padded]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
