"""The field `graph` of the table. It is found out on a GPU; here with a capture that runs the forward again."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cfg_parallel
from cfg_parallel import models
from cfg_parallel.codec import tensors_in
from cfg_parallel.graphs import Capture, Graphs
from cfg_parallel.report import Report
from sweep import __main__ as command
from sweep import session as session_module
from sweep.build import Case
from sweep.compare import Row, cases, listed, markdown, merged, moved, write
from sweep.graphs import capture, graph_of
from sweep.session import Answer, Session
from test_graphs import failing, rerun
from test_sweep import TABLE

pytestmark = pytest.mark.timeout(180)

CPU = torch.device("cpu")
FIRST = "the first calls of a kind are eager"
WAITS = "the forward cannot be captured: it waits for the GPU (.item(), a boolean mask) or copies from host memory"


def report(**fields: Any) -> Report:
    return Report(devices=["cuda:0"], transport="host", transport_reason="", **fields)


# From a report to the field


def test_replays_alone_are_graphs() -> None:
    assert graph_of(report(steps=4, calls_local=8, graph_forwards=8)) is True


def test_why_there_are_no_graphs() -> None:
    eager = report(steps=4, calls_local=8, eager_forwards={FIRST: 2, WAITS: 6})
    assert graph_of(eager) == f"{WAITS.removeprefix('the forward cannot be captured: ')}; {FIRST}"


def test_some_forwards_are_eager() -> None:
    some = report(steps=4, calls_local=8, graph_forwards=6, eager_forwards={FIRST: 2})
    assert graph_of(some) == f"2 of 8 forwards are eager: {FIRST}"


def test_forwards_that_the_graphs_do_not_count() -> None:
    hooked = {"the pipeline changes the denoiser's hooks or attention processors while it runs": 4}
    assert graph_of(report(steps=4, calls_local=4, notes=hooked)) == next(iter(hooked))
    assert graph_of(report(steps=4, calls_local=8, graph_forwards=4, notes=hooked)) == (
        f"4 of 8 forwards are eager: {next(iter(hooked))}"
    )
    assert graph_of(report()) == "no speed-up: the pipeline did not call its denoiser."


# One pipeline


def use(monkeypatch: pytest.MonkeyPatch, how: Capture) -> None:
    """`enable_cfg_parallel` with graphs on the CPU."""
    enable = cfg_parallel.enable_cfg_parallel

    def with_graphs(pipe: Any, *, cfg_parallel_size: int, cuda_graphs: bool) -> Any:
        assert (cfg_parallel_size, cuda_graphs) == (1, True)
        handle: Any = enable(pipe, cfg_parallel_size=1)
        handle._leader.graphs = Graphs(CPU, True, how)
        return handle

    monkeypatch.setattr(cfg_parallel, "enable_cfg_parallel", with_graphs)


def found(case: Case) -> bool | str | None:
    return capture(case, Row(case.pipeline, "", False), "cpu").graph


@pytest.mark.parametrize(
    "name", ["WanPipeline", "StableDiffusionInstructPix2PixPipeline", "EasyAnimateControlPipeline"]
)
def test_a_pipeline_with_graphs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use(monkeypatch, rerun)
    assert found(cases()[name]) is True


def test_a_pipeline_whose_forward_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, failing(RuntimeError("operation not permitted when stream is capturing\nmore")))
    assert found(cases()["WanPipeline"]) == "operation not permitted when stream is capturing"


def test_a_pipeline_that_hooks_its_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, rerun)
    assert found(cases()["StableDiffusionPAGPipeline"]) == (
        "the pipeline changes the denoiser's hooks or attention processors while it runs"
    )


def test_other_bits_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(forward: Any) -> Any:
        result, replay = rerun(forward)
        replays = []

        def replay_wrongly() -> None:
            replay()
            replays.append(1)
            if len(replays) > 1:  # the first is compared with the eager forward
                result[1][0].add_(1)

        return result, replay_wrongly

    use(monkeypatch, wrong)
    with pytest.raises(AssertionError, match="differs from plain diffusers by"):
        found(cases()["WanPipeline"])


def test_a_pipeline_that_does_not_run_there(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(pipe: Any) -> None:
        raise RuntimeError("Expected all tensors to be on the same device\nand more")

    case = dataclasses.replace(cases()["WanPipeline"], prepare=broken)
    assert found(case) == (
        "the tiny pipeline does not run on a GPU: RuntimeError: Expected all tensors to be on the same device"
    )
    assert "Traceback" in capsys.readouterr().err


def test_a_pipeline_that_cannot_be_compared() -> None:
    def forgetful(pipe: Any) -> None:
        def more(module: Any, args: Any) -> None:
            module.proj_out.bias.data.add_(1)

        pipe.transformer.register_forward_pre_hook(more)

    assert found(dataclasses.replace(cases()["WanPipeline"], prepare=forgetful)) == (
        "plain diffusers gives other bits each time on a GPU"
    )


def test_tensors_and_generators_go_to_the_pipelines_device() -> None:
    tensors = {"prompt": "cat", "latents": [torch.zeros(2)], "nested": {"x": (torch.ones(1),)}}
    there = moved(tensors, torch.device("meta"))
    assert there["prompt"] == "cat"
    assert [tensor.device.type for tensor in tensors_in(there)] == ["meta", "meta"]
    mine = torch.Generator().manual_seed(5)
    assert torch.equal(
        torch.randn(3, generator=moved({"generator": mine}, CPU)["generator"]), torch.randn(3, generator=mine)
    )


@pytest.mark.gpu
def test_a_pipeline_is_built_and_called_on_a_gpu() -> None:
    pipe = cases()["KandinskyV22ControlnetPipeline"].build("cuda:0")
    given = moved(cases()["KandinskyV22ControlnetPipeline"].arguments(), pipe.device)
    assert pipe.device == torch.device("cuda:0")
    assert {tensor.device for tensor in tensors_in(given)} == {given["generator"].device} == {pipe.device}


# The process that is asked


def test_answers_have_the_field_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(case: Case, row: Row) -> Row:
        row.graph = "it waits"
        return row

    monkeypatch.setattr("sweep.graphs.capture", fill)
    answers = list(session_module.answers(["WanPipeline"], graphs=True))
    assert answers == [Answer({"pipeline": "WanPipeline", "graph": "it waits"}, good=True)]


def test_a_failure_is_one_and_the_next_pipeline_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Case, row: Row) -> Row:
        raise AssertionError("differs")

    monkeypatch.setattr("sweep.graphs.capture", fail)
    answers = list(session_module.answers(["WanPipeline", "FluxPipeline"], graphs=True))
    assert [answer.good for answer in answers] == [False, False]
    assert answers[1].row == {"pipeline": "FluxPipeline", "graph": "failed: AssertionError: differs"}


def test_a_process_whose_gpu_is_lost_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.graphs.capture", lambda case, row: row)
    monkeypatch.setattr("sweep.graphs.cuda_is_broken", lambda: True)
    answers = list(session_module.answers(["WanPipeline", "FluxPipeline"], graphs=True))
    assert [(answer.row["pipeline"], answer.last) for answer in answers] == [("WanPipeline", True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_session_for_graphs() -> None:
    """Through the process; a pipeline cannot go to a GPU that is not there, and that is what the row says."""
    session = Session(graphs=True)
    for name in ("WanPipeline", "FluxImg2ImgPipeline"):
        answer = session.ask(name)
        assert answer.good, answer.printed
        assert answer.row.keys() == {"pipeline", "graph"}
        assert answer.row["pipeline"] == name
        assert answer.row["graph"].startswith("the tiny pipeline does not run on a GPU: ")
    session.close()


@pytest.mark.parametrize("graphs", [True, False])
def test_a_process_that_ends(monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    monkeypatch.setattr(session_module, "LIMIT", 0.05)  # long before it has imported anything
    answer = Session(graphs).ask("WanPipeline")
    assert not answer.good
    why = "its process ended with status -9"
    told = {"graph": f"failed: {why}"} if graphs else {"equal": False, "note": why}
    assert answer.row == {"pipeline": "WanPipeline", **told}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_the_command_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "--graphs"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--graphs needs a GPU" in capsys.readouterr().err


def test_the_command_fills_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Asked:
        def __init__(self, graphs: bool) -> None:
            assert graphs

        def ask(self, name: str) -> Answer:
            return Answer({"pipeline": name, "graph": name == "WanPipeline" or "it waits"}, good=True)

        def close(self) -> None:
            pass

    path = tmp_path / "supported_pipelines.json"
    path.write_text(TABLE.read_text())
    monkeypatch.setattr(command, "Session", Asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["sweep", "--graphs", "WanP", "WanV", "--workers", "2", "--write", str(path)])
    assert command.main() == 0
    before, after = ({row["pipeline"]: row for row in json.loads(each.read_text())} for each in (TABLE, path))
    changed = {"WanPipeline": True, "WanVACEPipeline": "it waits", "WanVideoToVideoPipeline": "it waits"}
    assert after == {name: row | ({"graph": changed[name]} if name in changed else {}) for name, row in before.items()}
    assert "3 of 3 equal" in capsys.readouterr().out


# The table


def row(name: str, graph: bool | str | None = None, **fields: Any) -> dict[str, Any]:
    return dataclasses.replace(Row(name, "A", False, graph=graph), **fields).to_dict()


def test_rows_keep_what_the_other_run_found_out() -> None:
    known = row("WanPipeline", True, equal=True, supported=True, max_diff=0.0, note="a fact")
    assert merged(known, {"pipeline": "WanPipeline", "graph": "it waits"}) == known | {"graph": "it waits"}
    rerun_on_cpus = row("WanPipeline", None, equal=True, supported=False, note="another fact")
    assert merged(known, rerun_on_cpus) == rerun_on_cpus | {"graph": True}
    failed = {"pipeline": "WanPipeline", "equal": False, "note": "its process ended with status -9"}
    assert merged(known, failed) == known | failed


def test_written_twice(tmp_path: Path) -> None:
    path, everything = tmp_path / "table.json", {name: Row(name, "A", False) for name in ("Wan", "Flux")}
    write(path, [row("Wan", equal=True, supported=True, max_diff=0.0)], everything)
    write(path, [{"pipeline": "Wan", "graph": True}, {"pipeline": "Flux", "graph": "a | b"}], everything)
    write(path, [row("Wan", equal=True, supported=False, max_diff=0.0, note="alone")], everything)
    flux, wan = json.loads(path.read_text())
    assert (wan["graph"], wan["supported"], wan["note"]) == (True, False, "alone")
    assert (flux["graph"], flux["equal"]) == ("a | b", None)
    text = path.with_suffix(".md").read_text()
    assert "| Wan | A | no | yes | 0 |  |  | yes | alone |" in text
    assert "| Flux | A | not run | not run |  |  |  | a / b |  |" in text


def test_the_head_of_the_table_says_how_the_column_was_made() -> None:
    unknown = markdown([row("Wan"), row("Flux")])
    assert "no pipeline was run on a GPU for it yet" in unknown
    known = markdown([row("Wan", True), row("Flux", "it waits"), row("Sana")])
    assert "2 of them were tried in a tiny size on one GPU with `cuda_graphs=True`: 1 gave" in known
    assert "`python tests/sweep --graphs --write docs/supported_pipelines.json`" in known
    assert "| pipeline | pattern | shared | equal | off by | shipped | rule | graph | note |" in known


def test_the_list_of_models_shows_it() -> None:
    lines = models.table([row("Wan", True), row("Flux", "it waits", note="a fact"), row("Sana")]).splitlines()
    assert lines[0].split() == ["pipeline", "pattern", "result", "rule", "graph", "note"]
    assert lines[1].split() == ["Wan", "A", "not", "run", "yes"]
    assert lines[2].endswith("no       a fact; no graph: it waits")
    assert lines[3].endswith("not run")


def test_the_table_has_no_failures() -> None:
    table = json.loads(TABLE.read_text())
    assert {row["pipeline"] for row in table} == set(listed())
    for each in table:
        assert each["graph"] in (None, True) or (isinstance(each["graph"], str) and each["graph"]), each
        assert not str(each["graph"]).startswith("failed: "), each


# On a GPU


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session(graphs=True)
    yield session
    session.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionXLPipeline", "WanPipeline"])
def test_graphs_on_a_gpu(session: Session, name: str) -> None:
    answer = session.ask(name)
    assert answer.good, answer.printed
    assert answer.row == {"pipeline": name, "graph": True}
