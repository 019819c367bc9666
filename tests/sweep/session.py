"""A process that compares pipelines, one after the other: importing everything takes longer than most of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
LIMIT = 120  # seconds for one pipeline
_ROW = "ROW "


class Session:
    """Started when it is first asked, and again after its process has ended."""

    def __init__(self) -> None:
        self._process: Any = None

    def ask(self, name: str) -> tuple[dict[str, Any], str]:
        """The row of a pipeline, and what its process printed besides."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        printed: list[str] = []
        for line in self._process.stdout:
            if line.startswith(_ROW):
                return json.loads(line.removeprefix(_ROW)), "".join(printed)
            printed.append(line)
        note = f"its process ended with status {self._process.wait()}"
        return {"pipeline": name, "equal": False, "note": note}, "".join(printed)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate("")

    def _start(self) -> Any:
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen(
            [sys.executable, "-m", "sweep.session"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )


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


def main() -> None:
    """Takes names from standard input and answers each with a row."""
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
            print(_ROW + json.dumps(row.to_dict()), flush=True)


if __name__ == "__main__":
    main()
