"""What doctor says of this machine, of others (their answers, replayed), and of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfg_parallel import cli, doctor, extension
from cfg_parallel.doctor import Finding
from helpers_demo import demo_model

TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-31\t0\t\tN/A
GPU1\tNV18\t X \tPHB\tPXB\t0-31\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tPXB\t0-31\t0\t\tN/A
NIC0\tPXB\tPXB\tPXB\t X \t\t\t\t

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def by_check(findings: list[Finding], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


@pytest.mark.usefixtures("forked")
@pytest.mark.timeout(120)
def test_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["doctor", "--json", "--model", str(demo_model()), "--devices", "cpu,cpu"]) == 0
    findings = [Finding(**each) for each in json.loads(capsys.readouterr().out)]
    assert all(finding.status != "error" and "\n" not in finding.line() for finding in findings)
    (gpus,) = by_check(findings, "GPUs")
    assert gpus.status == "warning" and gpus.fix
    (exchange,) = by_check(findings, "exchange")
    assert exchange.status == "ok" and exchange.figures is not None
    assert exchange.figures["equal"] and exchange.figures["transport"] == "host"
    assert exchange.figures["step_us"] > 0 and exchange.figures["gb_s"] > 0
    (model,) = by_check(findings, "model")
    assert model.status == "ok" and "QwenImageEditPipeline" in model.message
    assert by_check(findings, "memory")


def test_text_is_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok", "warning")) for line in lines) and len(lines) >= 6
    assert not any("exchange" in line for line in lines)


def test_the_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"topo": TOPOLOGY, "--query-gpu=pcie.link.gen.max,pcie.link.width.max": "5, 16\n"}
    monkeypatch.setattr(doctor, "_ask_driver", lambda *arguments: answers[arguments[0]])
    kinds = doctor._topology()
    assert kinds == {(0, 1): "NV18", (1, 0): "NV18", (0, 2): "SYS", (2, 0): "SYS", (1, 2): "PHB", (2, 1): "PHB"}
    assert doctor._nominal("NV18", 0) == 450 and doctor._named("NV18") == "NVLink (NV18)"
    assert doctor._nominal("SYS", 0) == pytest.approx(63, rel=0.01) and doctor._named("SYS") == "PCIe (SYS)"
    assert doctor._nominal("unknown", 0) is None
    answers["topo"] = ""
    assert doctor._topology() == {}


@pytest.mark.parametrize(
    ("access", "copied", "status", "says"),
    [
        (True, 390.0, "ok", "a copy runs at 390 GB/s"),
        (True, 20.0, "warning", "less than that link should give"),
        (False, 0.0, "warning", "no peer access"),
    ],
)
def test_links(monkeypatch: pytest.MonkeyPatch, access: bool, copied: float, status: str, says: str) -> None:
    monkeypatch.setattr(doctor, "_ask_driver", lambda *arguments: TOPOLOGY)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: access)
    monkeypatch.setattr(doctor, "_copy_bandwidth", lambda a, b: copied)
    (finding,) = doctor._links(["cuda:0", "cuda:1"])
    assert finding.status == status and says in finding.line() and "NVLink (NV18), 450 GB/s" in finding.message


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], free: float = 100.0) -> None:
    """A machine with these GPUs."""

    class Properties:
        def __init__(self, gpu: int) -> None:
            self.name = f"GPU {capabilities[gpu]}"
            self.major, self.minor = capabilities[gpu]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(doctor, "_driver_version", lambda: 13000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU {capabilities[gpu]}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 1e9), int(141e9)))


def test_gpus_that_differ_and_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (9, 0), (8, 0))
    found = list(doctor._gpus())
    assert [finding.status for finding in found] == ["ok", "ok", "ok", "warning"]
    assert "driver" in found[2].check and "CUDA 13.0" in found[2].message and "slower one" in found[3].fix
    gpus(monkeypatch, (9, 0))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    alone = list(doctor._gpus())[-1]
    assert "one GPU has no other" in alone.message and "cfg_parallel_size=1" in alone.fix
    assert "CUDA_VISIBLE_DEVICES" not in alone.fix


def test_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (9, 0), (9, 0))
    monkeypatch.setattr(extension, "missing_reason", lambda: "installed without its CUDA module: build it")
    found = doctor._module()
    assert found.status == "error" and "build it" in found.fix
    monkeypatch.setattr(extension, "missing_reason", lambda: None)

    class Built:
        archs = "80-real 90-real 100"

        def build_info(self) -> dict[str, str]:
            return {"cuda": "13.0", "archs": self.archs}

    monkeypatch.setattr(extension, "load", Built)
    assert doctor._module().status == "ok"
    monkeypatch.setattr(Built, "archs", "80-real 100")
    found = doctor._module()
    assert found.status == "error" and "CFG_PARALLEL_CUDA_ARCHS=90" in found.fix


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80-real 90-real 100", (9, 0), True),
        ("80-real 90-real 100", (8, 6), True),
        ("80-real 90-real 100", (7, 5), False),
        ("80-real 90-real 100", (12, 0), True),  # by the PTX for 10.0
        ("80-real", (9, 0), False),
        ("90", (9, 0), True),
        ("86-real", (8, 0), False),
    ],
)
def test_what_runs_where(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert doctor._runs_on(archs, *capability) is runs


def model_of(folder: Path, class_name: str, **sizes: int) -> str:
    index: dict[str, Any] = {"_class_name": class_name} | {name: ["diffusers", "X"] for name in sizes}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, size in sizes.items():
        (folder / name).mkdir()
        with (folder / name / "model.safetensors").open("wb") as file:
            file.truncate(size)
    return str(folder)


def test_a_model_and_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tmp_path, "QwenImagePipeline", transformer=40 * 10**9, text_encoder=16 * 10**9, vae=10**8)
    devices = ["cuda:0", "cuda:1"]
    gpus(monkeypatch, (9, 0), (9, 0), free=70)
    known, leader, follower = doctor._model(model, devices)
    assert known.status == leader.status == follower.status == "ok"
    assert "64.5 GB for the whole pipeline" in leader.message and "46.0 GB for the denoiser" in follower.message
    gpus(monkeypatch, (9, 0), (9, 0), free=50)
    _, leader, follower = doctor._model(model, devices)
    assert leader.status == "error" and "enable_model_cpu_offload" in leader.fix and follower.status == "ok"
    gpus(monkeypatch, (9, 0), (9, 0), free=24)
    assert all(
        finding.status == "error" and "quantize" in finding.fix for finding in list(doctor._model(model, devices))[1:]
    )


@pytest.mark.parametrize(
    ("class_name", "says"),
    [("StableDiffusionPAGPipeline", "runs on one device"), ("DDPMPipeline", "not known to use guidance")],
)
def test_models_that_gain_nothing(tmp_path: Path, class_name: str, says: str) -> None:
    found = next(doctor._model(model_of(tmp_path, class_name, unet=1000), ["cpu", "cpu"]))
    assert found.status == "warning" and says in found.message and found.fix


@pytest.mark.parametrize("model", ["/no/such/folder", "owner/not-downloaded"])
def test_a_model_that_is_not_there(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--quick", "--model", model]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("error") and model in last


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("CFG_PARALLEL_API_KEY", "s3cret")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    found = list(doctor._environment())
    assert [finding.status for finding in found] == ["ok", "warning", "warning"]
    assert not any("s3cret" in finding.line() for finding in found)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("what", ["raises", "other bytes"])
def test_an_exchange_that_fails(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def broken(run: Callable[[int], Any], device: str) -> float:
        raise RuntimeError("the link is down")

    if what == "raises":
        monkeypatch.setattr(doctor, "_seconds_of_a_step", broken)
    else:
        monkeypatch.setattr(doctor, "_seconds_of_a_step", lambda run, device: 1e-3)
        monkeypatch.setattr(torch, "equal", lambda a, b: False)
    found = doctor._exchange(["cpu", "cpu"], [])
    assert found.status == "error" and found.fix
