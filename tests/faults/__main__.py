"""Random faults: `python tests/faults --cases 300 [--device cuda] [--seed 0] [--out benchmarks/results/faults.json]`.

Each case injects one fault at a random point of a generation of a tiny pipeline, with real follower processes, and
checks: an image came, it is the one of one device bit for bit, no later than one device's time and 5 s, at most one
warning a generation was given, and nothing is left behind (processes, open files, shared memory, GPU memory).

Exit status: 0, or 1 if a case was not as it should be; its line names the seed, with which `--only` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

if str(Path(__file__).parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.results_file import markdown_table

from faults.kinds import KINDS
from faults.run import run_case, summarize
from faults.world import LAYER, Outcome, World, belongings

KEY = ("device", "followers", "kind", "first_seed")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--pipelines", nargs="*", default=list(LAYER), choices=list(LAYER))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, by its seed")
    parser.add_argument("--forked", action="store_true", help="followers forked from this process, which start at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further case after so many")
    parser.add_argument(
        "--out", type=Path, help="JSON file; rows of the same kinds, device and first seed are replaced"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of followers, so that two processes fit on two cores
    seeds = [options.only] if options.only is not None else range(options.seed, options.seed + options.cases)
    results: list[tuple[str, Any]] = []
    until = time.monotonic() + 60 * options.minutes
    before = belongings(options.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if options.forked:
            from forked import forked_followers

            stack.enter_context(forked_followers())
        worlds: dict[str, World] = {}
        stack.callback(lambda: [world.close() for world in worlds.values()])
        for seed in seeds:
            if time.monotonic() > until:
                break
            rng = random.Random(seed)
            name, kind = rng.choice(options.pipelines), options.kinds[seed % len(options.kinds)]
            if name not in worlds:
                worlds[name] = World(name, options.device, Path(folder))
            try:
                outcome = run_case(worlds[name], kind, rng)
            except AssertionError as error:  # before the fault, or after it
                outcome = Outcome(error=str(error))
                worlds.pop(name).close()
            results.append((kind, outcome))
            if outcome.wrong:
                print(f"FAIL seed {seed}, {kind}, {name}: {'; '.join(outcome.wrong)}", flush=True)
            else:
                print(f"ok   seed {seed}, {kind}, {name}: {outcome.seconds:.2f} s", flush=True)
    after = belongings(options.device)
    left = {name: after[name] - before[name] for name in ("processes", "shared memory") if after[name] > before[name]}
    if left:
        print(f"FAIL left behind at the end: {left}", flush=True)
    rows = summarize(results, options.device, "forked" if options.forked else "started", options.seed)
    print(markdown_table(rows, ("kind", "cases", "returned", "equal", "worst_seconds", "worst_late", "left_behind")))
    if options.out:
        old = json.loads(options.out.read_text()) if options.out.exists() else []
        same = [[row.get(key) for key in KEY] for row in rows]
        rows = [row for row in old if [row.get(key) for key in KEY] not in same] + rows
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if left or any(outcome.wrong for _, outcome in results) else 0


if __name__ == "__main__":
    sys.exit(main())
