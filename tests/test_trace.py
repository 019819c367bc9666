"""The timeline of a generation: what ran when, on which device of which process, on one clock."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cfg_parallel
from cfg_parallel import ConfigurationError, cli, timing
from helpers_demo import demo_model
from tiny import TINY, generate, picture

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import draw_trace

pytestmark = pytest.mark.usefixtures("forked")


def events_of(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


@pytest.mark.parametrize("name", ["qwen_image", "sd15"])
def test_a_trace_has_every_forward_in_its_step(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    pipe = tiny.build()
    path = tmp_path / "trace.json"
    with cfg_parallel.enable_cfg_parallel(pipe, devices=["cpu", "cpu"]) as handle:
        with pytest.raises(ConfigurationError, match="before the first generation"):
            handle.save_trace(path)
        for _ in range(2):
            generate(pipe, tiny.inputs(num_inference_steps=4))
        handle.save_trace(path)
        report = handle.report
        with pytest.raises(ConfigurationError, match="cannot be written"):
            handle.save_trace(tmp_path / "no" / "trace.json")
    events = events_of(path)
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"leader", "follower", "host", "cpu"} <= names
    spans = [event for event in events if event["ph"] == "X"]
    assert all(0 <= event["ts"] <= report.seconds * 1e6 and event["dur"] >= 0 for event in spans)
    steps = [event for event in spans if event["name"].startswith("step ")]
    assert len(steps) == report.steps
    assert all(abs(a["ts"] + a["dur"] - b["ts"]) < 1 for a, b in itertools.pairwise(steps))
    leader, follower = (
        [event for event in spans if event["pid"] == process and event["name"] == "forward"] for process in (0, 1)
    )
    assert len(leader) == report.calls_local and len(follower) == report.calls_shipped == report.steps
    assert sum("ship a call" in event["name"] for event in spans) == report.calls_shipped
    for step, there in zip(steps, follower, strict=True):  # one clock for both processes
        assert step["ts"] <= there["ts"] and there["ts"] + there["dur"] <= step["ts"] + step["dur"] + 1
    assert sum(event["dur"] for event in follower) / 1e3 == pytest.approx(report.follower_busy_ms, rel=1e-3)


def test_a_generation_that_fails_before_its_first_step_has_a_trace(tmp_path: Path) -> None:
    tiny = TINY["qwen_image"]
    pipe = tiny.build()
    with cfg_parallel.enable_cfg_parallel(pipe, devices=["cpu", "cpu"]) as handle:
        with pytest.raises(ZeroDivisionError):
            generate(pipe, tiny.inputs(num_inference_steps=0))
        handle.save_trace(tmp_path / "trace.json")
        assert handle.report.steps == 0
    assert not [event for event in events_of(tmp_path / "trace.json") if event["ph"] == "X"]


def test_a_step_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, path, picture_of = TINY["qwen_image"].build(), tmp_path / "trace.json", tmp_path / "step.png"
    with cfg_parallel.enable_cfg_parallel(pipe, devices=["cpu", "cpu"]) as handle:
        generate(pipe, TINY["qwen_image"].inputs(num_inference_steps=4))
        handle.save_trace(path)
    begin, end = draw_trace.window_of(events_of(path), 3)
    assert 0 < begin < end
    assert list(draw_trace.rows_of(events_of(path)).values())[-1] == "follower\ncpu"
    assert draw_trace.main([str(path), "--step", "3", "--out", str(picture_of)]) == 0
    assert Image.open(picture_of).size[0] > 500
    with pytest.raises(SystemExit, match="there is no step 9: the trace has 4"):
        draw_trace.main([str(path), "--step", "9", "--out", str(picture_of)])
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit):
        draw_trace.main([str(tmp_path / "other.json"), "--out", str(picture_of)])
    assert "is no trace" in capsys.readouterr().err


@pytest.mark.usefixtures("small_photographs")
def test_the_command_writes_one(tmp_path: Path) -> None:
    photo, out, trace = tmp_path / "photo.png", tmp_path / "out.png", tmp_path / "trace.json"
    picture(0, 48, 48).save(photo)
    arguments = ["edit", f"--model={demo_model()}", f"--image={photo}", "--prompt=a cat", "--negative-prompt=bad"]
    arguments += ["--height=64", "--width=64", "--num-inference-steps=2", "--devices=cpu,cpu", f"--output={out}"]
    assert cli.main([*arguments, f"--trace={trace}"]) == 0
    assert out.exists() and len(events_of(trace)) > 10
    assert cli.main([*arguments, f"--trace={tmp_path / 'no' / 'trace.json'}"]) == 2
    assert (
        cli.main([*arguments[:-2], "--devices=cpu", "--cfg-parallel-size=1", f"--output={out}", f"--trace={trace}"])
        == 2
    )


def test_marks_of_a_gpu_on_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, ms: float) -> None:
            self.ms = ms

        def elapsed_time(self, other: Event) -> float:
            return other.ms - self.ms

        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(timing, "mark", lambda device: Event(500.0))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 100.0)
    at = timing.on_host_clock(torch.device("cuda", 0))
    early, late = (Event(ms) for ms in (200.0, 450.0))
    assert at(early) == pytest.approx(99.7) and at(late) == pytest.approx(99.95)  # type: ignore[arg-type]
