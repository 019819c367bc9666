"""Every pipeline, or some: `python tests/sweep [NAME ...] [--workers 2] [--write docs/supported_pipelines.json]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
LIMIT = 120  # seconds for one pipeline
ROW = "ROW "


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def work() -> None:
    """A process that takes names from its standard input and answers each with a row."""
    import torch

    torch.set_num_threads(1)
    from forked import forked_followers
    from sweep.compare import cases, compare, listed

    everything, rows = cases(), listed()
    with forked_followers():
        for line in sys.stdin:
            row = rows[line.strip()]
            try:
                with time_limit(LIMIT):
                    compare(everything[row.pipeline], row)
            except Exception as error:
                traceback.print_exc()
                row.equal = False
                row.note = f"{type(error).__name__}: {error}"
            print(ROW + json.dumps(row.to_dict()), flush=True)


class Worker:
    """A process that works through names; started again for the next one when it ends."""

    def __init__(self, names: deque[str], verbose: bool) -> None:
        self.names = names
        self.rows: list[dict[str, Any]] = []
        self._verbose = verbose
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        process = None
        while True:
            try:
                name = self.names.popleft()
            except IndexError:
                break
            if process is None or process.poll() is not None:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).parent), "--work"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment,
                )
            self._ask(process, name)
        if process is not None:
            process.communicate("")

    def _ask(self, process: Any, name: str) -> None:
        start = time.perf_counter()
        process.stdin.write(name + "\n")
        process.stdin.flush()
        printed = []
        for line in process.stdout:
            if line.startswith(ROW):
                row = json.loads(line.removeprefix(ROW))
                break
            printed.append(line)
        else:
            row = {"pipeline": name, "equal": False, "note": f"its process ended with status {process.wait()}"}
        self.rows.append(row)
        good = bool(row["equal"])
        shown = {key: value for key, value in row.items() if key != "pipeline" and value not in (None, "")}
        print(f"{'ok  ' if good else 'FAIL'} {name} {time.perf_counter() - start:.1f} s {shown}", flush=True)
        if self._verbose and not good:
            print("".join(printed)[-5000:], flush=True)


def main() -> int:
    from sweep.compare import cases, listed, write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="pipeline classes, or parts of names (default: all that have a case)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="what a failing pipeline printed")
    parser.add_argument("--write", type=Path, help="write the table: FILE.json and FILE.md")
    options = parser.parse_args()
    known = list(cases())
    names = [name for name in known if not options.names or any(part in name for part in options.names)]
    if not names:
        parser.error(f"no case is named like {' '.join(options.names)}")
    queue = deque(names)
    start = time.perf_counter()
    workers = [Worker(queue, options.verbose) for _ in range(options.workers)]
    for worker in workers:
        worker.join()
    rows = [row for worker in workers for row in worker.rows]
    good = sum(bool(row["equal"]) for row in rows)
    print(f"{good} of {len(rows)} equal, in {time.perf_counter() - start:.0f} s")
    if options.write:
        write(options.write, rows, listed())
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        sys.exit(main())
