"""README and docs are true: figures are those of the result files, links lead somewhere, commands are taken."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURE = re.compile(r"(?<![\w./-])\d+\.\d{2,}(?![\w.])")


def values(node: Any) -> Iterator[float]:
    if isinstance(node, dict):
        for value in node.values():
            yield from values(value)
    elif isinstance(node, list):
        for value in node:
            yield from values(value)
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield float(node)


@pytest.fixture(scope="module")
def measured() -> set[float]:
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    return {value for file in files for value in values(json.loads(file.read_text()))}


def figures(page: Path) -> list[str]:
    """Numbers with two decimals or more, outside of code."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    return FIGURE.findall(text)


# The sweep writes that page together with the JSON beside it.
@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "supported_pipelines"], ids=lambda page: page.name)
def test_every_figure_is_in_a_result_file(page: Path, measured: set[float]) -> None:
    assert not [figure for figure in figures(page) if float(figure) not in measured]


def test_a_figure_that_is_not_measured_is_found(tmp_path: Path, measured: set[float]) -> None:
    page = tmp_path / "page.md"
    page.write_text("It was 123.4567 times as fast, with `0.123` and torch 2.11.0 at 43.215 ms.")
    assert [figure for figure in figures(page) if float(figure) not in measured] == ["123.4567"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        ast.parse(code)


def commands() -> list[str]:
    """Lines of shell that begin with the command, continued lines joined."""
    found = []
    for page in PAGES:
        for code in re.findall(r"```(?:bash|shell|sh)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = code.replace("\\\n", " ").splitlines()
            found += [part.strip() for line in lines for part in line.split("&&") if "cfg-parallel " in part]
    return sorted({line for line in found if line.startswith("cfg-parallel ")})


def test_commands_are_taken() -> None:
    """Every flag exists: what is missing is a model, not an argument."""
    import shlex

    from cfg_parallel import cli

    assert len(commands()) >= 3
    for command in commands():
        cli._parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py")))
def test_benchmark_commands_are_taken(script: str) -> None:
    """Flags of the commands in the pages are in the script."""
    source = (ROOT / "benchmarks" / script).read_text()
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip().startswith(f"python benchmarks/{script}")]
    for flag in {flag for line in lines for flag in re.findall(r"(?<!\S)(--[a-z-]+)", line)}:
        assert re.search(rf'add_argument\(\s*"{flag}"', source), f"{script} has no {flag}"


def test_every_parameter_is_in_the_page() -> None:
    """Of `enable_cfg_parallel`, with its default; of the handle and the offline engine, by name."""
    import dataclasses
    import inspect

    import cfg_parallel

    page = (ROOT / "docs" / "parameters.md").read_text()
    for name, parameter in inspect.signature(cfg_parallel.enable_cfg_parallel).parameters.items():
        if name != "pipe":
            default = json.dumps(parameter.default) if isinstance(parameter.default, str) else repr(parameter.default)
            assert f"| `{name}` | `{default}` |" in page, name
    for name in ("report", "save_trace", "call_alone", "wait_until_ready", "followers", "disable"):
        assert hasattr(cfg_parallel.CfgParallel, name) and f"`handle.{name}" in page
    public = {name for name in vars(cfg_parallel.CfgParallel) if not name.startswith("_")}
    assert public == {"report", "save_trace", "call_alone", "wait_until_ready", "followers", "disable"}
    for cls in (cfg_parallel.DiffusionParallelConfig, cfg_parallel.OmniDiffusionSamplingParams):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in page, field.name


def test_every_environment_variable_is_in_the_page() -> None:
    """Whatever the package, its build or its tests read or ask for by name."""
    page = (ROOT / "docs" / "environment.md").read_text()
    sources = [*(ROOT / "python").rglob("*.py"), ROOT / "setup.py", *(ROOT / "tests").glob("*.py")]
    pattern = re.compile(r'environ(?:\.get\(|\.setdefault\(|\[)\s*"([A-Z_]+)"')
    read = {name for file in sources for name in pattern.findall(file.read_text())}
    assert "CFG_PARALLEL_API_KEY" in read
    own = {name for name in read if name.startswith("CFG_PARALLEL") or name in ("RANK", "WORLD_SIZE", "XDG_CACHE_HOME")}
    assert not [name for name in own if f"`{name}`" not in page]
    assert not [
        name for name in re.findall(r"`(CFG_PARALLEL_\w+)`", page) if not any(name in f.read_text() for f in sources)
    ]


def test_every_module_is_in_the_map() -> None:
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    files = sorted(file.name for file in (ROOT / "python" / "cfg_parallel").glob("*.py") if file.name != "__init__.py")
    assert not [name for name in files if f"`{name}`" not in page]
