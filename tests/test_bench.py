"""`cfg-parallel bench`: what it plans where, what it makes of the rows, and a dry run of it all."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_step, models

from cfg_parallel import bench, cli
from cfg_parallel.errors import ConfigurationError

GPUS = ["cuda:0", "cuda:1"]


def plan(devices: list[str], **given: Any) -> dict[str, bench.Job]:
    arguments = {"model": None, "size": None, "steps": None, "only": None, "quick": False, **given}
    jobs = bench.plan(SimpleNamespace(**arguments), devices, bench.harness(), Path("out"))  # type: ignore[arg-type]
    return {job.name: job for job in jobs}


def value(job: bench.Job, flag: str) -> str:
    return job.command[job.command.index(flag) + 1]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)


def test_two_gpus_run_everything(peers: None) -> None:
    jobs = plan(GPUS)
    assert list(jobs)[:3] == ["combine", "exchange", "step"]
    assert all(job.why is None for job in jobs.values())
    assert {"two-gpu-graphs", "two-gpu-compiled", "all-gather", "ulysses"} <= set(
        value(jobs["step"], "--modes").split(",")
    )
    whole = jobs["pipeline of qwen-image-edit"]
    assert value(whole, "--steps") == "50" and value(whole, "--mode") == "two-gpu-graphs,two-gpu-compiled"
    assert value(jobs["pipeline of qwen-image@512"], "--size") == "512"
    assert all(Path(job.command[1]).is_file() for job in jobs.values())


def test_quick_compiles_nothing(peers: None) -> None:
    jobs = plan(GPUS, quick=True)
    assert not any("two-gpu-compiled" in argument for job in jobs.values() for argument in job.command)
    assert "--quick" in jobs["combine"].command and "--quick" in jobs["exchange"].command


def test_without_peer_access_there_is_no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    assert plan(GPUS)["exchange"].why == "left out, as it needs two GPUs with peer access"


def test_the_exchange_of_other_gpus_says_how(peers: None) -> None:
    why = plan(["cuda:1", "cuda:0"], model=("sdxl",))["exchange"].why
    assert why is not None and "CUDA_VISIBLE_DEVICES" in why


def test_one_gpu_measures_graphs() -> None:
    jobs = plan(["cuda:0"], model=("sdxl",))
    assert value(jobs["step"], "--modes") == "one-gpu-eager,one-gpu-graphs"
    assert jobs["combine"].why is None
    assert jobs["exchange"].why is not None and jobs["pipeline of sdxl"].why is not None


def test_what_is_asked_for(peers: None) -> None:
    jobs = plan(GPUS, model=("sdxl", "qwen-image@512"), size=768, steps=30, only=("step", "pipeline"))
    assert list(jobs) == ["step", "pipeline of sdxl@768", "pipeline of qwen-image@768"]
    assert value(jobs["step"], "--models") == "sdxl@768,qwen-image@768"
    assert {value(job, "--steps") for job in jobs.values()} == {"30"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sdxl,nothing"], "nothing: there is no such folder.*sd15"),
        (["--only", "speed"], "expected some of combine,exchange,step,pipeline, but got 'speed'"),
        (["--devices", "cpu,cpu,cpu"], "--devices names 3"),
        (["--model", "sdxl,,"], "expected names with commas"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices = [] if "--devices" in arguments else ["--devices", "cpu,cpu"]
    assert cli.main(["bench", "--out", str(tmp_path / "out"), *devices, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line


def test_an_installation_without_the_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "bench.py"))
    with pytest.raises(ConfigurationError, match="install cfg-parallel from its repository"):
        bench.harness()


def test_the_summary_names_this_machine_and_two_h200() -> None:
    committed = bench._rows(bench.harness() / "results")
    assert all(committed.values())
    text = bench.summary(committed, committed, ["cpu", "cpu"])
    ours = next(row for row in committed["step"] if row["model"] == "sdxl" and row["mode"] == "two-gpu-graphs")
    line = next(line for line in text.splitlines() if line.startswith("| sdxl "))
    assert f"{ours['speedup']:.2f}x" in line and "yes" in line
    assert line.rstrip("| ").endswith("x") and " / " in line  # the last column is of two H200
    assert "## From prompt to picture" in text and "## Kernels" in text
    assert "a dry run" in text


def test_a_difference_is_shown() -> None:
    row = {"bench": "step", "model": "m", "size": "8x8", "ms": 1.0, "speedup": 2.0, "equal": False, "steps": 4}
    rows = [row | {"mode": "two-gpu-graphs"}, row | {"mode": "one-gpu-eager", "equal": True, "speedup": 1.0}]
    nothing: dict[str, Any] = {part: [] for part in bench.PARTS}
    text = bench.summary(nothing | {"step": rows}, nothing, ["cpu"])
    assert "| NO" in text


@pytest.mark.timeout(280)
def test_dry_run_with_a_model_of_ones_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "my-model", tmp_path / "out"
    small = models.build_pipeline("sd15", device="cpu", dtype=torch.float32, scale="tiny", text_encoders=True)
    small.save_pretrained(folder)
    arguments = ["--model", f"{folder}@64", "--devices", "cpu,cpu", "--only", "combine,pipeline", "--steps", "3"]
    status = cli.main(["bench", *arguments, "--out", str(out)])
    printed = capfd.readouterr()
    assert status == 0, printed.out[-3000:] + printed.err[-3000:]
    assert "combine: left out, as it needs a GPU" in printed.out
    assert bench_step.sized_models(f"{folder}@64,{folder}") == [(str(folder), 64), (str(folder), None)]
    whole = json.loads((out / "pipeline.json").read_text())
    assert [(row["model"], row["size"]) for row in whole] == [("my-model", "64x64")] * 2
    assert all(row["equal"] and row["encode_s"] > 0 and row["decode_s"] > 0 and row["png_s"] > 0 for row in whole)
    for row in whole:
        parts = row["encode_s"] + row["denoise_s"] + row["decode_s"] + row["png_s"]
        assert parts == pytest.approx(row["total_s"], abs=0.01)
    assert (out / "summary.md").read_text().strip() in printed.out
