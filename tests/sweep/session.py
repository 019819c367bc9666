"""A process that takes pipelines one after the other: importing everything takes longer than most of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
LIMIT = 120  # seconds for one pipeline
_ANSWER = "ANSWER "


@dataclass(frozen=True)
class Answer:
    row: dict[str, Any]  # what was found out
    good: bool
    last: bool = False  # the process ends after it
    printed: str = ""  # what the process printed besides


class Session:
    """Started when it is first asked, and again after its process has ended. With `graphs` on one GPU, for the field
    `graph`; otherwise on two processes, for the others."""

    def __init__(self, graphs: bool = False) -> None:
        self._graphs = graphs
        self._process: Any = None

    def ask(self, name: str) -> Answer:
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        watchdog = threading.Timer(2 * LIMIT, self._process.kill)  # of code that Python cannot interrupt
        watchdog.start()
        try:
            return self._ask(name)
        finally:
            watchdog.cancel()

    def _ask(self, name: str) -> Answer:
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        printed: list[str] = []
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                answer = Answer(**json.loads(line.removeprefix(_ANSWER)) | {"printed": "".join(printed)})
                if answer.last:
                    self._process.wait()
                return answer
            printed.append(line)
        why = f"its process ended with status {self._process.wait()}"
        return Answer(failure(name, why, self._graphs), good=False, printed="".join(printed))

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate("")

    def _start(self) -> Any:
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen(
            [sys.executable, "-m", "sweep.session", *(["--graphs"] if self._graphs else [])],
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


def failure(name: str, why: str, graphs: bool) -> dict[str, Any]:
    """The fields of a row that say so."""
    return {"pipeline": name, "graph": f"failed: {why}"} if graphs else {"pipeline": name, "equal": False, "note": why}


def answers(names: Iterable[str], graphs: bool) -> Iterator[Answer]:
    """Ends early when this process is of no more use."""
    from sweep.compare import cases, compare, listed
    from sweep.graphs import capture, cuda_is_broken

    everything, rows = cases(), listed()
    for name in names:
        row, good = rows[name], True
        try:
            with time_limit(LIMIT):
                (capture if graphs else compare)(everything[name], row)
        except Exception as error:
            traceback.print_exc()
            good, why = False, f"{type(error).__name__}: {error}"
        found = {"pipeline": name, "graph": row.graph} if graphs else row.to_dict()
        last = cuda_is_broken()
        yield Answer(found if good else found | failure(name, why, graphs), good, last)
        if last:
            return


def main() -> None:
    """Takes names from standard input, and answers each."""
    import torch

    torch.set_num_threads(1)
    from forked import forked_followers

    graphs = "--graphs" in sys.argv[1:]
    with contextlib.nullcontext() if graphs else forked_followers():
        for answer in answers(map(str.strip, sys.stdin), graphs):
            print(_ANSWER + json.dumps(asdict(answer)), flush=True)


if __name__ == "__main__":
    main()
