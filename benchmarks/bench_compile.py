"""Whether two processes that compile a denoiser compute the same bits, and what Inductor's deterministic mode costs.

    python benchmarks/bench_compile.py --models sd15,sdxl --out benchmarks/results/compile.json
    python benchmarks/bench_compile.py --models qwen-image --at-once 2 --out benchmarks/results/compile.json

Every process has caches of its own, as on machines that share nothing, and generates the same latents: `equal` says
whether they are. By default Inductor times variants of a reduction, so it may choose others in another process.
`enable_cfg_parallel(compile=True)` asks for its deterministic mode. `ms` is the median forward (a CUDA graph) of one
more process alone on the GPU, with the caches of the first: nothing is compiled there.

Exit status: 0, 1 if a process failed or the deterministic mode was not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import models
from benchmarks.bench_pipeline import say
from benchmarks.results_file import markdown_table, merge_rows
from benchmarks.timing import facts, some_of

MODES = {"default": {"deterministic": False}, "deterministic": {"deterministic": True}}
COLUMNS = ("model", "size", "mode", "processes", "results", "equal", "ms")


def generate(name: str, mode: str, steps: int, seed: int) -> dict[str, Any]:
    """What this process makes of it."""
    import cfg_parallel

    torch.manual_seed(seed)
    pipe = models.build_pipeline(name, seed=seed)
    pipe.set_progress_bar_config(disable=True)
    options = {"dynamic": False, "options": MODES[mode]}
    with (
        torch.no_grad(),
        cfg_parallel.enable_cfg_parallel(
            pipe, cfg_parallel_size=1, compile=True, compile_options=options, cuda_graphs=True
        ) as handle,
    ):
        for _ in range(2):
            latents = pipe(**(models.inputs(name, steps=steps, seed=seed) | {"output_type": "latent"})).images
    if not latents.isfinite().all():
        raise SystemExit(f"bench_compile: {name} made latents with nan or inf in them")
    digest = hashlib.sha256(latents.float().cpu().numpy().tobytes()).hexdigest()
    return {"sha256": digest, "ms": handle.report.leader_forward_ms, "eager": handle.report.eager_forwards}


def in_a_process(args: argparse.Namespace, name: str, mode: str, caches: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", mode, "--models", name]
    command += ["--steps", str(args.steps), "--seed", str(args.seed)]
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{name}, {mode}: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"{name}, {mode}: {result['ms']:.2f} ms a forward, {result['sha256'][:12]}")
    return result


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    kinds = [(name, mode) for name in args.models for mode in MODES]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        caches = {(*kind, i): Path(folder) / "-".join([*kind, str(i)]) for kind in kinds for i in range(args.processes)}
        started = {key: pool.submit(in_a_process, args, *key[:2], path) for key, path in caches.items()}
        results = {key: future.result() for key, future in started.items()}
        for name, mode in kinds:
            alone = in_a_process(args, name, mode, caches[name, mode, 0])
            shas = [results[name, mode, i]["sha256"] for i in range(args.processes)]
            yield {
                "bench": "compile",
                "model": name,
                "size": models.size_label(name),
                "steps": args.steps,
                "mode": mode,
                "processes": args.processes,
                "results": len(set(shas)),
                "equal": len(set(shas)) == 1,
                "ms": round(alone["ms"], 3),
                "eager": alone["eager"],
                "sha256": shas,
                **facts(torch.device("cuda", 0)),
            }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    pictures = [name for name in models.SPECS if not name.startswith("wan")]
    parser.add_argument("--models", type=some_of(*pictures), default=["sd15", "sdxl"], help="one or several")
    parser.add_argument("--processes", type=int, default=2, help="that compile, of each model and mode")
    parser.add_argument("--at-once", type=int, default=8, help="processes that compile at the same time")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a process may take")
    parser.add_argument("--out", type=Path, help="JSON file to merge the rows into (default: none is written)")
    parser.add_argument("--worker", choices=list(MODES), help=argparse.SUPPRESS)  # this is one of the processes
    args = parser.parse_args(argv)
    if args.processes < 2 or args.at_once < 1 or args.steps < 4:
        parser.error("expected at least 2 --processes, 1 --at-once and 4 --steps")
    if not torch.cuda.is_available():
        parser.error("there is no GPU, and what Inductor chooses by timing are a GPU's kernels")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        print(json.dumps(generate(args.models[0], args.worker, args.steps, args.seed)))
        return 0
    rows = []
    for row in run(args):
        rows.append(row)
        if args.out:
            merge_rows(args.out, [row])
            say(f"wrote {args.out}")
    print(markdown_table(rows, COLUMNS), flush=True)
    bad = [row["model"] for row in rows if row["mode"] == "deterministic" and not row["equal"]]
    for name in bad:
        print(f"bench_compile: {name}: processes differ in the deterministic mode", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
