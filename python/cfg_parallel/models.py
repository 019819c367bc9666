"""What is known of diffusers' pipelines: the table of docs/supported_pipelines.json, for `cfg-parallel models`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from cfg_parallel.errors import ConfigurationError

_HEADER = ("pipeline", "pattern", "result", "rule", "graph", "note")


def pipelines(words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of pipelines whose name has one of `words` in it, in any case; all without words.

    Raises ConfigurationError when there is none."""
    text = (resources.files("cfg_parallel") / "supported_pipelines.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)
    found = [row for row in rows if not words or any(word.lower() in row["pipeline"].lower() for word in words)]
    if not found:
        raise ConfigurationError(
            f"No pipeline with guidance is named like {' or '.join(words)}; `cfg-parallel models` lists all."
        )
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: a line each, in columns."""
    cells = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER) - 1)]
    lines = ["  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in cells]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["pipeline"] + (" (deprecated)" if row["deprecated"] else ""),
        row["pattern"],
        _result(row),
        row["rule"] or "",
        _graph(row),
        _note(row),
    )


def _result(row: dict[str, Any]) -> str:
    if row["equal"] is None:
        return "not run"
    if not row["equal"]:
        return "not equal"
    return "in parallel, equal" if row["supported"] else "on one device, equal"


def _graph(row: dict[str, Any]) -> str:
    return {True: "yes", None: "not run"}.get(row["graph"], "no")


def _note(row: dict[str, Any]) -> str:
    reason = row["graph"]
    return "; ".join(filter(None, [row["note"], f"no graph: {reason}" if isinstance(reason, str) else ""]))
