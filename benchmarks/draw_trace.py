"""Draws one step of a trace (`handle.save_trace`, `cfg-parallel edit --trace`) as a picture.

python benchmarks/draw_trace.py trace.json --step 10 --out docs/timeline.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {
    "forward": "#4c78a8",
    "prediction": "#f58518",
    "wait": "#e45756",
    "ship": "#54a24b",
    "step": "#d8d8d8",
}


def rows_of(events: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    """(process, row) -> its name, in the order of the trace."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    return {
        (e["pid"], e["tid"]): f"{names[e['pid']]}\n{e['args']['name']}" for e in events if e["name"] == "thread_name"
    }


def window_of(events: list[dict[str, Any]], step: int) -> tuple[float, float]:
    """Begin and end of a step of the leader's host, in microseconds. Raises SystemExit if there is no such step."""
    for event in events:
        if event["name"].startswith(f"step {step}:"):
            return event["ts"], event["ts"] + event["dur"]
    steps = sum(event["name"].startswith("step ") for event in events)
    raise SystemExit(f"draw_trace: there is no step {step}: the trace has {steps}; change --step")


def draw(events: list[dict[str, Any]], step: int, path: Path, title: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    begin, end = window_of(events, step)
    rows = rows_of(events)
    figure = Figure(figsize=(9, 1.0 + 0.62 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    seen = set()
    for event in events:
        place = (event["pid"], event.get("tid", 0))
        if event["ph"] != "X" or event["ts"] + event["dur"] < begin or event["ts"] > end:
            continue
        kind = next((kind for kind in COLOURS if event["name"].startswith(kind)), "step")
        seen.add(kind)
        left, right = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
        height = 0.8 if kind in ("step", "forward") else 0.5
        y = list(rows).index(place) - height / 2
        span = [((left - begin) / 1e3, (right - left) / 1e3)]
        axes.broken_barh(span, (y, height), facecolors=COLOURS[kind], edgecolor="white", linewidth=0.5)
    axes.set_yticks(range(len(rows)), list(rows.values()), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, (end - begin) / 1e3)
    axes.set_xlabel(f"milliseconds of step {step}")
    axes.set_title(title, fontsize=9)
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--step", type=int, default=2, help="counted from 1 (default: %(default)s)")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    args = parser.parse_args(argv)
    try:
        events = json.loads(args.trace.read_text())["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.trace} is no trace ({error}): make one with `cfg-parallel edit --trace FILE`")
    draw(events, args.step, args.out, args.title)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
