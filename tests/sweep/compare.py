"""One pipeline on one device and on two processes: is it the same, was it shared, and why not."""

from __future__ import annotations

import csv
import importlib
import json
import pkgutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

import cfg_parallel
from cfg_parallel import leader
from cfg_parallel.calls import Call, Denoiser, Split
from cfg_parallel.codec import map_tensors
from cfg_parallel.program import interpret
from reference import concatenate
from sweep import families
from sweep.build import Case

LIST = Path(__file__).parent / "pipelines.csv"
CPU = torch.device("cpu")
GENERATIONS = 3  # eager, with the fused kernels compared, with them alone


@dataclass
class Row:
    """What docs/supported_pipelines.json says of a pipeline.

    `equal`: bit for bit what one device gives with the branches of a batch one after the other, which for a pipeline
    that calls its denoiser once a branch is what it gives anyway. `max_diff`: from the pipeline as it is on one device,
    as a part of the largest value. `supported`: the branches were shared in every step with guidance that could be.
    `graph`: on one GPU every forward of the denoiser becomes a CUDA graph, or why not; the result has the same bits."""

    pipeline: str
    pattern: str
    deprecated: bool
    supported: bool | None = None
    equal: bool | None = None
    max_diff: float | None = None
    calls_shipped_per_step: float | None = None
    rule: str | None = None
    graph: bool | str | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cases() -> dict[str, Case]:
    """By pipeline, of all families."""
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(families.__path__):
        for case in importlib.import_module(f"sweep.families.{module.name}").CASES:
            if case.pipeline in found:
                raise ValueError(f"Two families have a case for {case.pipeline}.")
            found[case.pipeline] = case
    return found


def listed() -> dict[str, Row]:
    """Every pipeline that uses guidance, with nothing known yet."""
    with LIST.open() as lines:
        return {
            row["pipeline"]: Row(row["pipeline"], row["pattern"], row["deprecated"] == "True")
            for row in csv.DictReader(lines)
        }


def arrays(output: Any) -> list[np.ndarray]:
    """The numbers in what a pipeline returns."""
    if isinstance(output, torch.Tensor):
        return [output.detach().float().cpu().numpy()]
    if isinstance(output, np.ndarray):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [array for item in output for array in arrays(item)]
    if hasattr(output, "convert"):  # a picture
        return [np.asarray(output)]
    return []


def run(pipe: Any, arguments: dict[str, Any]) -> list[np.ndarray]:
    """Seeds PyTorch's global generator, from which some schedulers draw."""
    torch.manual_seed(0)
    np.random.seed(0)
    return arrays(pipe(**moved(arguments, pipe.device)))


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a call with their tensors on `device`, and new generators there."""

    def generator(old: torch.Generator) -> torch.Generator:
        return torch.Generator(device).manual_seed(old.initial_seed())

    tensors_there = map_tensors(arguments, lambda tensor: tensor.to(device))
    there: dict[str, Any] = map_tensors(tensors_there, generator, torch.Generator)
    return there


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    if len(a) != len(b):
        return False
    return len(a) == len(b) and all(
        x.shape == y.shape and np.array_equal(x, y, equal_nan=False) for x, y in zip(a, b, strict=True)
    )


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    pairs = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)]
    largest = max((float(np.abs(y).max(initial=0)) for _, y in pairs), default=0.0)
    return max((float(np.abs(x - y).max(initial=0)) for x, y in pairs), default=0.0) / (largest or 1.0)


@contextmanager
def branch_by_branch(pipe: Any, splits: dict[Any, Split]) -> Iterator[None]:
    """On one device, every batch that cfg-parallel has split (by the signature of its call) is run part by part."""
    known = {_without_context(signature): split for signature, split in splits.items()}
    with ExitStack() as stack:
        for name in {signature[0] for signature in splits}:
            module = getattr(pipe, name)
            plain = module.forward

            def forward(*args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
                call = Call.of(Denoiser(name, plain), args, kwargs, CPU)
                split = known.get(_without_context(call.signature()))
                if split is None:
                    return plain(*args, **kwargs)
                outputs = [part.run(CPU) for part in call.split(*split)]
                return put_together(outputs) if call.is_listed() else concatenate(outputs)

            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


def put_together(outputs: list[Any]) -> Any:
    """One output from the branches', whose rows are in a list."""
    first = outputs[0]
    if isinstance(first, list):
        return [row for output in outputs for row in output]
    if isinstance(first, tuple):
        return tuple(put_together(list(items)) for items in zip(*outputs, strict=True))
    return type(first)(**{key: put_together([output[key] for output in outputs]) for key in first})


def _without_context(signature: Any) -> Any:
    name, _, *rest = signature
    return name, *rest


def compare(case: Case, row: Row, devices: Sequence[str] = ("cpu", "cpu")) -> Row:
    """Fills in `row`. Raises AssertionError where two devices give something else than one."""
    row.note = case.note
    expected = run(case.build(), case.arguments())
    assert expected and all(np.isfinite(array).all() for array in expected), "one device gives nan, inf or nothing"
    assert not same(expected, run(case.build(), case.without_guidance())), "guidance changes nothing here"
    pipe = case.build()
    interpreter = mock.patch.object(leader, "executor", lambda device, wait: (interpret, "interpreter"))
    with warnings.catch_warnings(), interpreter:
        warnings.simplefilter("ignore")
        with cfg_parallel.enable_cfg_parallel(pipe, devices=devices, cfg_parallel_size=len(devices)) as handle:
            results = [run(pipe, case.arguments()) for _ in range(GENERATIONS)]
            report = handle.report
            splits = dict(handle._leader._splits)  # type: ignore[attr-defined]
    plain = case.build()
    with branch_by_branch(plain, splits):
        reference = run(plain, case.arguments())
    row.max_diff = max(difference(result, expected) for result in results)
    row.equal = all(same(result, reference) for result in results[1:])  # the first has found out what a batch is
    row.calls_shipped_per_step = round(report.calls_shipped / max(1, report.steps), 2)
    row.supported = report.guided_steps > 0 and report.parallel_steps == report.guided_steps
    row.rule = next((label.split(" (")[0] for label in report.fused), None)
    if not row.supported:
        row.note = "; ".join(filter(None, [case.note, *report.notes])) or report.why
    assert row.max_diff <= case.tolerance, f"two devices differ from one by {row.max_diff:.1e} of the largest value"
    assert row.equal, f"two devices differ from one, branch by branch, by {difference(results[-1], reference):.1e}"
    return row


def write(path: Path, rows: Sequence[dict[str, Any]], everything: dict[str, Row]) -> None:
    """The table as JSON, and as Markdown beside it. A pipeline that was not run keeps what the file said of it."""
    known = {name: row.to_dict() for name, row in everything.items()}
    if path.exists():
        known |= {row["pipeline"]: row for row in json.loads(path.read_text()) if row["pipeline"] in known}
    known |= {row["pipeline"]: merged(known[row["pipeline"]], row) for row in rows}
    table = [known[name] for name in sorted(known)]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in table) + "\n]\n")
    path.with_suffix(".md").write_text(markdown(table))


def merged(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A row with what was found out since: all fields but `graph` on two processes, that one alone on a GPU."""
    return known | {key: value for key, value in found.items() if key != "graph" or value is not None}


def markdown(table: Sequence[dict[str, Any]]) -> str:
    current = [row for row in table if not row["deprecated"]]
    ran = [row for row in current if row["equal"] is not None]
    equal = sum(row["equal"] for row in ran)
    shared = sum(bool(row["equal"] and row["supported"]) for row in ran)
    lines = [
        "# Supported pipelines",
        "",
        f"diffusers {diffusers.__version__} has {len(current)} pipelines that use guidance and are not deprecated.",
        f"{len(ran)} of them were run in a tiny size on two processes: {equal} gave what one device gives, and",
        f"{shared} shared every step with guidance. Made by",
        "`python tests/sweep --write docs/supported_pipelines.json`.",
        "",
        "*Pattern*: A one batched call a step, B a call for each branch, C three or more branches, E guiders. *Equal*:",
        "bit for bit, with the branches of a batch one after the other ([exactness](exactness.md)). *Off by*: from the",
        "batch as it is on one device, in parts of the largest value. *Shipped*: calls to the other device in a step.",
        *about_graphs(current),
        "",
        "| pipeline | pattern | shared | equal | off by | shipped | rule | graph | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    words = {True: "yes", False: "no", None: "not run"}
    for row in sorted(table, key=lambda row: (row["deprecated"], row["pipeline"])):
        off = "" if row["max_diff"] is None else f"{row['max_diff']:.0e}" if row["max_diff"] else "0"
        shipped = "" if row["calls_shipped_per_step"] is None else f"{row['calls_shipped_per_step']:g}"
        name = row["pipeline"] + (" (deprecated)" if row["deprecated"] else "")
        cells = [name, row["pattern"], words[row["supported"]], words[row["equal"]], off, shipped]
        graph = {True: "yes", None: ""}.get(row["graph"], row["graph"])
        texts = [(text or "").replace("|", "/") for text in (row["rule"], graph, row["note"])]
        lines.append(f"| {' | '.join(cells + texts)} |")
    return "\n".join(lines) + "\n"


def about_graphs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the column says, and how it was made."""
    known = [row["graph"] for row in rows if row["graph"] is not None]
    if not known:
        return ["*Graph*: no pipeline was run on a GPU for it yet (`python tests/sweep --graphs`)."]
    return [
        "*Graph*: each forward of the denoiser becomes a CUDA graph, or why not; empty where that was not tried.",
        f"{len(known)} of them were tried in a tiny size on one GPU with `cuda_graphs=True`: {known.count(True)} gave",
        "the bits of plain diffusers with nothing but replays in the last of four generations. Made by",
        "`python tests/sweep --graphs --write docs/supported_pipelines.json`.",
    ]
