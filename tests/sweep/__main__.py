"""Every pipeline, or some: `python tests/sweep [NAME ...] [--workers 2] [--write docs/supported_pipelines.json]`.

On two CPU processes, or with --graphs on one GPU: then only the field `graph` is found out and written.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import deque
from pathlib import Path

if str(Path(__file__).parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from sweep.compare import cases, listed, write
from sweep.session import Answer, Session


def work(names: deque[str], answers: list[Answer], graphs: bool, verbose: bool) -> None:
    session = Session(graphs)
    while names:
        name = names.popleft()
        start = time.perf_counter()
        answer = session.ask(name)
        answers.append(answer)
        shown = {key: value for key, value in answer.row.items() if key != "pipeline" and value not in (None, "")}
        print(f"{'ok  ' if answer.good else 'FAIL'} {name} {time.perf_counter() - start:.1f} s {shown}", flush=True)
        if verbose and not answer.good:
            print(answer.printed[-5000:], flush=True)
    session.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pipeline classes, or parts of names (default: all that have a case)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--graphs", action="store_true", help="on one GPU, whether every forward is a CUDA graph")
    parser.add_argument("--verbose", action="store_true", help="what a failing pipeline printed")
    parser.add_argument("--write", type=Path, help="write the table: this JSON file, and Markdown beside it")
    options = parser.parse_args()
    if options.graphs and not torch.cuda.is_available():
        parser.error("--graphs needs a GPU, and PyTorch finds none")
    names = deque(name for name in cases() if not options.names or any(part in name for part in options.names))
    if not names:
        parser.error(f"no case is named like {' '.join(options.names)}")
    start, answers = time.perf_counter(), []
    arguments = (names, answers, options.graphs, options.verbose)
    workers = [threading.Thread(target=work, args=arguments) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    good = sum(answer.good for answer in answers)
    print(f"{good} of {len(answers)} equal, in {time.perf_counter() - start:.0f} s")
    if options.write:
        write(options.write, [answer.row for answer in answers], listed())
    return 0 if good == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
