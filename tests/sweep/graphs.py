"""One pipeline on one GPU with CUDA graphs: is it the same, is every forward a replay, and why not."""

from __future__ import annotations

import traceback
import warnings
from typing import Any

import numpy as np
import torch

import cfg_parallel
from cfg_parallel.report import Report
from sweep.build import Case
from sweep.compare import Row, difference, run, same

GENERATIONS = 4  # for a kind of call that comes once in each: two eager calls, the one that is captured, a replay
SECOND_LOOK = 20  # at a pipeline on one GPU, where graphs seem to be wrong
_FAILURE = "the forward cannot be captured: "


def capture(case: Case, row: Row, device: str = "cuda:0") -> Row:
    """Fills in `row.graph`. Raises AssertionError where graphs give something else than plain diffusers."""
    try:
        plain = case.build(device)
        expected = run(plain, case.arguments())
        assert expected and all(np.isfinite(array).all() for array in expected), "nan, inf or nothing"
        steady = repeats(plain, case, expected, 1)
    except Exception as error:  # nothing of cfg-parallel was involved, and this is what there is to say of it
        traceback.print_exc()
        row.graph = f"the tiny pipeline does not run on a GPU: {one_line(error)}"
        return row
    if steady:
        pipe = case.build(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forwards that stay eager
            with cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1, cuda_graphs=True) as handle:
                results = [run(pipe, case.arguments()) for _ in range(GENERATIONS)]
                row.graph = graph_of(handle.report)
        if all(same(result, expected) for result in results):
            return row
        steady = repeats(plain, case, expected, SECOND_LOOK)  # some ops add up in the order in which blocks come
        off = max(difference(result, expected) for result in results)
        assert not steady, f"differs from plain diffusers by {off:.1e}"
    row.graph = "plain diffusers gives other bits each time on a GPU"
    return row


def repeats(plain: Any, case: Case, expected: list[np.ndarray], times: int) -> bool:
    """Whether the pipeline gives the same without cfg-parallel, each time."""
    return all(same(run(plain, case.arguments()), expected) for _ in range(times))


def graph_of(report: Report) -> bool | str:
    """True when every forward of the generation was a replay, otherwise why not, the most frequent reason first."""
    forwards = report.calls_local + report.calls_shipped
    if forwards and report.graph_forwards == forwards and not report.eager_forwards:
        return True
    # What the graphs do not count, such as a pass for which the pipeline changes hooks, is in the notes.
    reasons = report.eager_forwards or report.notes or {report.why: 0}
    why = "; ".join(reason.removeprefix(_FAILURE) for reason in sorted(reasons, key=reasons.__getitem__, reverse=True))
    if report.graph_forwards:
        return f"{forwards - report.graph_forwards} of {forwards} forwards are eager: {why}"
    return why


def one_line(error: BaseException) -> str:
    """The exception's type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def cuda_is_broken() -> bool:
    """Whether nothing works on the GPU any more in this process, as after an access to memory that is not there."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
