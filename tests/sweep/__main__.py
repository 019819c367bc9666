"""Every pipeline, or some: `python tests/sweep [NAME ...] [--workers 2] [--write docs/supported_pipelines.json]`."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

if str(Path(__file__).parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sweep.compare import cases, listed, write
from sweep.session import Session


def work(names: deque[str], rows: list[dict[str, Any]], verbose: bool) -> None:
    session = Session()
    while names:
        name = names.popleft()
        start = time.perf_counter()
        row, printed = session.ask(name)
        rows.append(row)
        shown = {key: value for key, value in row.items() if key != "pipeline" and value not in (None, "")}
        print(f"{'ok  ' if row['equal'] else 'FAIL'} {name} {time.perf_counter() - start:.1f} s {shown}", flush=True)
        if verbose and not row["equal"]:
            print(printed[-5000:], flush=True)
    session.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="pipeline classes, or parts of names (default: all that have a case)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="what a failing pipeline printed")
    parser.add_argument("--write", type=Path, help="write the table: this JSON file, and Markdown beside it")
    options = parser.parse_args()
    names = deque(name for name in cases() if not options.names or any(part in name for part in options.names))
    if not names:
        parser.error(f"no case is named like {' '.join(options.names)}")
    start, rows = time.perf_counter(), []
    workers = [threading.Thread(target=work, args=(names, rows, options.verbose)) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    good = sum(bool(row["equal"]) for row in rows)
    print(f"{good} of {len(rows)} equal, in {time.perf_counter() - start:.0f} s")
    if options.write:
        write(options.write, rows, listed())
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
