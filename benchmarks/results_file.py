"""The result files under benchmarks/results: JSON lists of rows, one row per measured configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# A new measurement of the same configuration replaces the old one.
KEY = ("bench", "model", "size", "steps", "mode", "transport", "devices")
KEY += ("rule", "backend", "bytes", "dtype", "numerics", "step")
TABLE = ("model", "size", "steps", "mode", "transport", "devices", "ms", "total_s", "speedup", "speedup_total", "equal")


def merge_rows(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] | None = None) -> None:
    """Add `rows` to the file, in place of rows with the same key. The file is replaced in one step. With `columns`, a
    Markdown table of all rows is written beside it."""
    old = json.loads(path.read_text()) if path.exists() else []
    new_keys = {_key(row) for row in rows}
    merged = [row for row in old if _key(row) not in new_keys] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(merged, indent=1) + "\n")
    os.replace(scratch, path)
    if columns is not None:
        path.with_suffix(".md").write_text(markdown_table(merged, columns) + "\n")


def markdown_table(rows: list[dict[str, Any]], columns: tuple[str, ...] = TABLE) -> str:
    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)
