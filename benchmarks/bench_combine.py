"""The guidance kernels on one GPU: every rule, by each backend, against the copy bandwidth measured in the same run.

    python benchmarks/bench_combine.py --out benchmarks/results/combine.json

A time is that of one call within a CUDA graph of many, median over replays. The calls take turns among sets of tensors
that are many times the L2 together, so that every byte comes from memory. The copy (`torch.Tensor.copy_` of one such
tensor to another) is timed the same way, at the start and at the end, and the better one counts.

`gbps` is the bytes that the rule needs (`moved_bytes`) over the time, whatever a backend really moves. `wrong` counts
the elements, on fresh data, that differ from eager PyTorch (numerics="exact"; bit by bit, NaN equal to NaN) or lie
outside the rounding errors around the result in fp64 (numerics="fused").

Exit status: 0, 1 if an element was wrong or a call failed, 2 for wrong arguments or where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import markdown_table, merge_rows
from benchmarks.timing import captured, differing, facts, gbps, node_count, replay_us, some_of, spread

from cfg_parallel.errors import CfgParallelError
from cfg_parallel.guidance import EulerStep, combine

ROW = 64  # elements of the last dimension: Qwen-Image's packed latents
MOMENTUM = -0.5
DT = -0.04
ROTATION_BYTES = 512 << 20  # of all sets: ten times the L2 of an H200
GRAPH_BYTES = 2 << 30  # that a graph moves at least, so that what comes between two replays does not count
COLUMNS = ("rule", "step", "backend", "numerics", "dtype", "bytes", "us", "gbps", "share", "launches", "wrong")

START = time.perf_counter()


def say(line: str) -> None:
    print(f"[{time.perf_counter() - START:7.1f} s] {line}", flush=True)


@dataclass(frozen=True)
class Rule:
    """How a rule is called. `statistics`: it needs sums over a sample, and so reads its inputs twice."""

    scales: tuple[float, ...] = (4.0,)
    options: dict[str, float] = field(default_factory=dict)
    statistics: bool = False
    momentum: bool = False
    name: str | None = None  # in `combine`, where it is another one


_APG = {"eta": 0.5, "norm_threshold": 1000.0}
RULES = {
    "cfg": Rule(),
    "cfg_cond": Rule(),
    "lerp": Rule(),
    "composed": Rule(scales=(3.0, 1.5)),
    "instruct_pix2pix": Rule(scales=(7.5, 1.5)),
    "norm": Rule(),
    "rescale": Rule(options={"rescale": 0.7}, statistics=True),
    "zero_star": Rule(statistics=True),
    "apg": Rule(options=_APG, statistics=True),
    "apg_momentum": Rule(options=_APG, statistics=True, momentum=True, name="apg"),
}


def moved_bytes(rule: Rule, nbytes: int, step: bool) -> int:
    """The bytes that a call has to move, with inputs of `nbytes` that no cache holds.

    One pass: every prediction is read, and the latents for a step, and the result is written. Two passes: the
    predictions are read once more for the sums. APG's running average is read and written by the first pass and read
    by the second.
    """
    predictions = len(rule.scales) + 1
    tensors = predictions + step + 1
    if rule.statistics:
        tensors += predictions
    if rule.momentum:
        tensors += 3
    return tensors * nbytes


@dataclass
class Tensors:
    """One set of arguments."""

    conds: tuple[torch.Tensor, ...]
    uncond: torch.Tensor
    sample: torch.Tensor
    dt: torch.Tensor
    state: torch.Tensor
    out: torch.Tensor


def draw(rule: Rule, nbytes: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Random predictions of `nbytes` each that are alike, as those of a denoiser are; the result is filled with NaN."""
    shape = (1, nbytes // (ROW * dtype.itemsize), ROW)

    def normal() -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    uncond = normal()
    return Tensors(
        conds=tuple(0.8 * uncond + 0.6 * normal() for _ in rule.scales),
        uncond=uncond,
        sample=normal(),
        dt=torch.tensor(DT, device=device),
        state=normal() if rule.momentum else torch.empty(0, dtype=dtype, device=device),
        out=torch.full(shape, float("nan"), dtype=dtype, device=device),
    )


def call(label: str, tensors: Tensors, step: bool, backend: str, numerics: str) -> torch.Tensor:
    rule = RULES[label]
    one = len(rule.scales) == 1
    options: dict[str, Any] = dict(rule.options)
    if rule.momentum:
        options |= {"momentum": MOMENTUM, "state": tensors.state}
    return combine(
        tensors.conds[0] if one else tensors.conds,
        tensors.uncond,
        rule.scales[0] if one else rule.scales,
        rule=rule.name or label,
        step=EulerStep(tensors.sample, tensors.dt) if step else None,
        backend=backend,  # type: ignore[arg-type]
        numerics=numerics,  # type: ignore[arg-type]
        out=None if backend == "torch" else tensors.out,  # eager PyTorch would have to copy it there
        **options,
    )


def count_wrong(label: str, tensors: Tensors, step: bool, backend: str, numerics: str) -> int:
    """Of one call. `tensors` have not been used before; their state is left as the call left it."""
    before = tensors.state.clone()
    result = call(label, tensors, step, backend, numerics)
    if numerics == "fused":
        return _outside(label, tensors, step, before, result)
    after, tensors.state = tensors.state, before
    expected = call(label, tensors, step, "torch", "exact")
    tensors.state, expected_state = after, tensors.state
    return differing(result, expected) + differing(after, expected_state)


def _outside(label: str, tensors: Tensors, step: bool, before: torch.Tensor, result: torch.Tensor) -> int:
    """Elements off by more than one rounding to the dtype and 64 of fp32's for each term that they are a sum of.

    The sums over a sample enter as factors of at most 1, with a relative error of far less than 64 roundings: they are
    added up by trees with some 30 additions from leaf to root."""
    rule = RULES[label]
    wide = Tensors(
        conds=tuple(cond.double() for cond in tensors.conds),
        uncond=tensors.uncond.double(),
        sample=tensors.sample,
        dt=tensors.dt,
        state=tensors.state.double(),
        out=tensors.out,
    )
    wrong = 0
    size = wide.uncond.abs()
    for scale, cond in zip(rule.scales, wide.conds, strict=True):
        size += abs(scale) * (cond.abs() + wide.uncond.abs())
    options: dict[str, Any] = dict(rule.options)
    if rule.momentum:  # the running average is checked first, and what follows is computed from it as it was kept
        difference = wide.conds[0] - wide.uncond
        moved = difference + MOMENTUM * before.double()
        terms = wide.conds[0].abs() + wide.uncond.abs() + before.double().abs()
        wrong += _count_outside(tensors.state, moved, terms)
        options |= {"momentum": 1.0, "state": wide.state - difference}
        size += abs(rule.scales[0]) * wide.state.abs()
    one = len(rule.scales) == 1
    expected = combine(
        wide.conds[0] if one else wide.conds,
        wide.uncond,
        rule.scales[0] if one else rule.scales,
        rule=rule.name or label,
        backend="torch",
        numerics="fused",
        **options,
    )
    if step:
        expected = wide.sample.double() + wide.dt.double() * expected
        size = wide.sample.double().abs() + abs(DT) * size
    return wrong + _count_outside(result, expected, size)


def _count_outside(result: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> int:
    info = torch.finfo(result.dtype)
    error = 64 * torch.finfo(torch.float32).eps * size
    allowed = error + info.eps / 2 * (expected.abs() + error) + info.smallest_normal * info.eps
    return int((~((result.double() - expected).abs() <= allowed)).sum())  # NaN is outside


def rotation(make: Callable[[], Any], set_bytes: int) -> list[Any]:
    """Sets of tensors to take turns with: ROTATION_BYTES together, but two at least and not too many to launch."""
    return [make() for _ in range(min(max(2, -(-ROTATION_BYTES // set_bytes)), 512))]


def timed(calls: Sequence[Callable[[], Any]], moved: int, repeat: int) -> dict[str, Any]:
    """`us`, `us_p10`, `us_p90` and `launches` of one call; `calls` has one for each set."""
    for one in calls:
        for _ in range(3):  # compiles, and compares with eager PyTorch what is compared the first time
            one()
    torch.cuda.synchronize()
    count = -(-min(max(32, GRAPH_BYTES // moved), 1024) // len(calls)) * len(calls)
    graph = captured(calls, count)
    nodes = node_count(graph)
    return spread([us / count for us in replay_us(graph, repeat)]) | {"launches": round(nodes / count, 2)}


def copy_row(nbytes: int, repeat: int, device: torch.device) -> dict[str, Any]:
    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.randn(nbytes // 4, device=device)
        return source, torch.full_like(source, float("nan"))

    sets = rotation(pair, 2 * nbytes)
    result = timed([partial(target.copy_, source) for source, target in sets], 2 * nbytes, repeat)
    wrong = sum(differing(target, source) for source, target in sets)
    row = {"bench": "combine", "rule": "copy", "backend": "torch", "bytes": nbytes, "dtype": "float32"}
    row |= result | {"moved": 2 * nbytes, "gbps": gbps(2 * nbytes, result["us"]), "wrong": wrong}
    say(f"copy of {nbytes} bytes: {row['us']:.2f} us, {row['gbps']:.0f} GB/s")
    return row


def rows_of(args: argparse.Namespace, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows but for `share`. What cannot be done is told, and what fails is added to `problems`."""
    for dtype_name, label, step in itertools.product(args.dtypes, args.rules, args.steps):
        dtype, rule = getattr(torch, dtype_name), RULES[label]
        moved = moved_bytes(rule, args.bytes, step == "euler")
        make = partial(draw, rule, args.bytes, dtype, args.device)
        sets = rotation(make, moved)
        for backend, numerics in itertools.product(args.backends, args.numerics):
            if backend == "torch" and numerics == "fused":
                continue  # eager PyTorch is the exact one
            what = f"{label}{' + euler' if step == 'euler' else ''}, {backend}, {dtype_name}, {numerics}"
            wanted = (step == "euler", backend, numerics)
            try:
                result = timed([partial(call, label, tensors, *wanted) for tensors in sets], moved, args.repeat)
                wrong = count_wrong(label, make(), *wanted)  # now that the first call of its kind is over
            except CfgParallelError as error:
                say(f"{what}: left out: {error}")
                continue
            except Exception as error:  # a kernel that does not run must not cost the times of the others
                problems.append(f"{what}: {type(error).__name__}: {error}")
                say(f"{what}: FAILED: {type(error).__name__}: {error}")
                continue
            speed = gbps(moved, result["us"])
            say(f"{what}: {result['us']:.2f} us, {speed:.0f} GB/s, {result['launches']:g} launches, {wrong} wrong")
            if wrong:
                problems.append(f"{what}: {wrong} elements are wrong")
            yield {
                "bench": "combine",
                "rule": label,
                "backend": backend,
                "bytes": args.bytes,
                "dtype": dtype_name,
                "numerics": numerics,
                "step": None if step == "none" else step,
                **result,
                "moved": moved,
                "gbps": speed,
                "wrong": wrong,
            }


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    torch.cuda.set_device(args.device)
    torch.manual_seed(args.seed)
    problems: list[str] = []
    rows = [copy_row(args.bytes, args.repeat, args.device)]
    rows.append(copy_row(16 * args.bytes, args.repeat, args.device))  # what a long copy reaches, for comparison
    try:
        for row in rows_of(args, problems):
            rows.append(row)
        again = copy_row(args.bytes, args.repeat, args.device)
        rows[0] = max(rows[0], again, key=lambda row: row["gbps"])
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the rows so far are kept
        traceback.print_exc()
        problems.append(f"{type(error).__name__}: {error}")
    for row in rows:
        row["share"] = round(row["gbps"] / rows[0]["gbps"], 3)
        row |= facts(args.device)
    problems += [f"copy: {row['wrong']} elements are wrong" for row in rows[:2] if row["wrong"]]
    return rows, problems


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    backends, dtypes = ("cuda", "triton", "torch"), ("bfloat16", "float16", "float32")
    parser.add_argument("--rules", type=some_of(*RULES), default=list(RULES))
    parser.add_argument("--backends", type=some_of(*backends), default=list(backends), help="torch: eager PyTorch")
    parser.add_argument("--dtypes", "--dtype", type=some_of(*dtypes), default=["bfloat16", "float32"])
    parser.add_argument("--numerics", type=some_of("exact", "fused"), default=["exact", "fused"])
    parser.add_argument("--steps", type=some_of("none", "euler"), default=["none", "euler"], help="an Euler step too")
    parser.add_argument("--bytes", type=int, default=64 << 20, help="of each input (default: 64 MiB)")
    parser.add_argument("--repeat", type=int, default=20, help="replays of each graph")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 MiB, three replays, bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file to merge the rows into (default: none is written)")
    args = parser.parse_args(argv)
    if args.quick:
        args.bytes, args.repeat, args.dtypes = min(args.bytes, 1 << 20), min(args.repeat, 3), args.dtypes[:1]
    if args.bytes < 256 or args.bytes % 256:
        parser.error(f"--bytes: expected a positive multiple of 256, but got {args.bytes}")
    if args.repeat < 1:
        parser.error("--repeat: expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    gpus = torch.cuda.device_count()
    if args.device.type != "cuda" or (args.device.index or 0) >= gpus:
        print(f"bench_combine: --device {args.device} is not a GPU that is there ({gpus} are visible)", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # out of time: the rows so far are kept
    with torch.no_grad():
        rows, problems = run(args)
    print(markdown_table(rows, COLUMNS), flush=True)
    if args.out:
        merge_rows(args.out, rows, COLUMNS)
        say(f"wrote {args.out}")
    for problem in problems:
        print(f"bench_combine: {problem}", file=sys.stderr, flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
