"""Run every pipeline, or some: `python tests/sweep [NAME ...] [--workers 2] [--write]`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
LIMIT = 300  # seconds for one pipeline
ONE = """
import json, sys
from sweep.compare import cases, compare, listed
name = sys.argv[1]
row = listed()[name]
try:
    compare(cases()[name], row)
except Exception as error:
    import traceback
    traceback.print_exc()
    row.supported, row.note = False, f"{type(error).__name__}: {error}"
print("ROW " + json.dumps(row.to_dict()))
"""


def one(name: str) -> tuple[dict[str, Any] | None, str]:
    """A pipeline in a process of its own: its row, and what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-c", ONE, name], capture_output=True, text=True, timeout=LIMIT, env=environment
        )
    except subprocess.TimeoutExpired:
        return None, f"not done after {LIMIT} s"
    rows = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return (json.loads(rows[-1]) if rows else None), done.stdout + done.stderr


def main() -> int:
    from sweep.compare import cases, listed

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="pipeline classes (default: all that have a case)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="what a failing pipeline printed")
    options = parser.parse_args()
    names = options.names or list(cases())
    unknown = [name for name in names if name not in listed()]
    if unknown:
        parser.error(f"no pipeline with guidance: {', '.join(unknown)}")
    failed = 0
    start = time.perf_counter()
    with ThreadPoolExecutor(options.workers) as pool:
        for name, (row, printed) in zip(names, pool.map(one, names), strict=True):
            good = row is not None and row["equal"]
            failed += not good
            print(f"{'ok  ' if good else 'FAIL'} {name} {row or printed[-400:]}", flush=True)
            if options.verbose and not good:
                print(printed[-6000:], flush=True)
    print(f"{len(names) - failed} of {len(names)} in {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
