"""Every way to gain nothing from a second device, or less than one could, started wrong on purpose.

One line that a user reads names the cause and the fix, and docs/troubleshooting.md quotes how it begins. Where the
cause is a GPU that is not there, only what PyTorch and the driver say of GPUs is replaced."""

from __future__ import annotations

import json
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import cfg_parallel
from cfg_parallel import ConfigurationError, cli, doctor, enable, enable_cfg_parallel, extension, nvrtc
from cfg_parallel.codec import TensorSpec
from cfg_parallel.discovery import choose_devices
from cfg_parallel.remote import RemoteFollower
from cfg_parallel.report import Report
from cfg_parallel.transports import resolve
from cfg_parallel.transports.peer import PeerTransport
from helpers_demo import demo_model, save_photo
from scripts import PREAMBLE, run
from test_doctor import TOPOLOGY, model_of
from test_doctor import gpus as machine_of
from tiny import TINY, generate, randomize

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
QUOTES = [quote for row in ROWS for quote in re.findall(r"`([^`]+)`", row)]
GPUS = [torch.device("cuda", 0), torch.device("cuda", 1)]
HOW_TO_BUILD = "CFG_PARALLEL_BUILD_EXTENSION=1 pip install"


def says(line: str, quote: str, *parts: str) -> None:
    """The docs quote the line, any number for any other, and it has these parts."""
    assert "\n" not in line and quote in QUOTES
    pattern = re.escape(re.sub(r"\s+", " ", quote)).replace(r"\.\.\.", ".*").replace(r"\ ", r"\s+")
    assert re.search(re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", pattern), line), line
    for part in parts:
        assert part in line, line


def report_of(pipe: Any, inputs: dict[str, Any], **arguments: Any) -> tuple[Report, list[str]]:
    """Of a generation on an enabled pipeline, with what it warned of."""
    with enable_cfg_parallel(pipe, **arguments) as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(pipe, inputs)
        said = [str(warning.message) for warning in caught]
        return handle.report, [message for message in said if message.startswith("cfg-parallel")]


def row(report: Report, name: str) -> str:
    return next(line for line in str(report).splitlines() if line.split()[0] == name)


Doctor = Callable[..., dict[str, list[str]]]


@pytest.fixture
def ask_doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs `cfg-parallel doctor --quick` with further flags; its lines, by what they are about."""

    def ask(*flags: str) -> dict[str, list[str]]:
        capsys.readouterr()
        cli.main(["doctor", "--quick", *flags])
        lines: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines():
            lines.setdefault(line[8:22].strip(), []).append(line)
        return lines

    return ask


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """Makes this one look like a machine with so many GPUs, with or without peer access, and with or without the
    compiled module."""

    def make(count: int, *, access: bool = True, module: bool = True) -> None:
        machine_of(monkeypatch, *[(9, 0)] * count)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: access)
        monkeypatch.setattr(doctor, "_copy_bandwidth", lambda a, b: 390.0)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'end'\n{TOPOLOGY.replace('NV18', 'SYS')}\nend\n")
        (tmp_path / "nvidia-smi").chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        native: Any = types.ModuleType("cfg_parallel._C")
        native.__spec__ = ModuleSpec("cfg_parallel._C", None)
        native.build_info = lambda: {"cuda": "13.0", "archs": "90"}
        monkeypatch.setitem(sys.modules, "cfg_parallel._C", native if module else None)
        extension._load.cache_clear()
        nvrtc._load.cache_clear()

    yield make
    monkeypatch.undo()
    extension._load.cache_clear()
    nvrtc._load.cache_clear()


# 1, 2: guidance that is off


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("name", "scale"), [("sd15", "guidance_scale"), ("qwen_image", "true_cfg_scale")])
def test_guidance_is_off(name: str, scale: str) -> None:
    tiny = TINY[name]
    report, warned = report_of(tiny.build(), tiny.inputs(**{scale: 1.0}), devices=["cpu", "cpu"])
    assert warned == [f"cfg-parallel: {report.why}"]
    assert report.why.startswith(
        f"no speed-up: guidance was off in {report.steps} of {report.steps} steps: {scale}=1.0"
    )
    assert f"a {scale} above 1 turns it on" in report.why and "\n" not in report.why
    if name == "sd15":
        quote = "guidance was off in 50 of 50 steps: guidance_scale=1.0; a guidance_scale above 1 turns it on"
        says(report.why, quote, "a distilled model has none")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_edit"])
def test_there_is_no_negative_prompt(name: str) -> None:
    tiny = TINY[name]
    report, warned = report_of(tiny.build(), tiny.inputs(negative_prompt=None), devices=["cpu", "cpu"])
    assert warned == [f"cfg-parallel: {report.why}"]
    says(
        report.why,
        "guidance was off in 50 of 50 steps: true_cfg_scale=4.0; a negative prompt is needed",
        "no speed-up: ",
        "(' ' will do)",
    )
    assert "above 1" not in report.why


# 3: one GPU


def test_one_gpu(machine: Machine, ask_doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    says(
        ask_doctor()["GPUs"][-1],
        "one GPU has no other to share guidance with",
        "warning",
        "CUDA_VISIBLE_DEVICES is '0'; make a second one visible, or pass cfg_parallel_size=1",
    )
    with pytest.raises(ConfigurationError) as refused:
        choose_devices(torch.device("cuda", 0), 2, None, None)
    says(
        str(refused.value),
        "cfg_parallel_size=2 needs 2 GPUs, but 1 is visible",
        "check CUDA_VISIBLE_DEVICES, or pass cfg_parallel_size=1.",
    )


def test_one_gpu_on_the_command_line(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine(1)
    flags = [f"--model={demo_model()}", f"--image={save_photo(tmp_path / 'photo.png')}", "--prompt=p"]
    capsys.readouterr()
    assert cli.main(["edit", *flags, f"--output={tmp_path / 'out.png'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--cfg-parallel-size 2 needs 2 GPUs and 1 is visible: use --cfg-parallel-size 1, make more visible" in line


@pytest.mark.parametrize("name", ["qwen_image", "sd15"])
def test_enabled_for_one_device(name: str) -> None:
    report, warned = report_of(TINY[name].build(), TINY[name].inputs(), cfg_parallel_size=1)
    says(report.why, "ran every pass, alone; cfg_parallel_size=2 takes a second device", "no speed-up: cpu")
    assert not warned  # it was asked for


@pytest.mark.gpu
def test_one_gpu_is_visible() -> None:
    """The first of this machine's."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    script = f"""{PREAMBLE}
from cfg_parallel import cli
pipe.to("cuda")
try:
    cfg_parallel.enable_cfg_parallel(pipe)
except cfg_parallel.ConfigurationError as error:
    print(error)
cli.main(["doctor", "--quick"])
"""
    done = run(["env", f"CUDA_VISIBLE_DEVICES={gpu}", sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    refused, *lines = done.stdout.splitlines()
    says(refused, "cfg_parallel_size=2 needs 2 GPUs, but 1 is visible", "or pass cfg_parallel_size=1.")
    (alone,) = [line for line in lines if "has no other" in line]
    says(alone, "one GPU has no other to share guidance with", f"CUDA_VISIBLE_DEVICES is {gpu!r}")


# 4: no peer access


def test_no_peer_access(machine: Machine, ask_doctor: Doctor) -> None:
    machine(2, access=False)
    lines = ask_doctor()
    (link,) = lines["link"]
    says(link, "no peer access: NCCL is used", "warning", "cuda:0 to cuda:1: PCIe (SYS)", "`nvidia-smi topo -p2p w`")
    (transport,) = lines["transport"]
    assert "auto takes nccl (no peer access between cuda:0 and cuda:1)" in transport
    says(
        row(Report(["cuda:0", "cuda:1"], *resolve("auto", GPUS)), "transport"),
        "nccl (no peer access between cuda:0 and cuda:1; ...)",
        "`nvidia-smi topo -p2p w` shows which GPUs have it",
    )


@pytest.mark.gpu(count=2)
def test_gpus_without_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    tiny = TINY["qwen_image"]
    report, _ = report_of(tiny.build().to("cuda:0"), tiny.inputs(), devices=["cuda:0", "cuda:1"])
    assert report.parallel_steps == report.steps
    quote = "nccl (no peer access between cuda:0 and cuda:1; ...)"
    says(row(report, "transport"), quote, "`nvidia-smi topo -p2p w`")


# 5: no CUDA graphs


def watch(module: torch.nn.Module, args: Any, output: Any) -> None:
    """A forward hook, as users put them on."""


class Waits(torch.nn.Module):
    """Around a layer: asks the GPU for a number in every forward."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        assert output.abs().max().item() >= 0
        return output


WITHOUT_GRAPHS = "cfg-parallel runs without CUDA graphs: the forward cannot be captured: ..."
EAGER = "eager 98 forwards: the forward cannot be captured: ..."


@pytest.mark.usefixtures("forked")
def test_graphs_are_not_captured() -> None:
    """On the CPU nothing is captured; why a forward could not be is found out before that."""
    tiny = TINY["qwen_image"]
    pipe: Any = tiny.build()
    pipe.transformer.register_forward_hook(watch)
    with enable_cfg_parallel(pipe, devices=["cpu", "cpu"]) as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle._leader.graphs.mode = True  # type: ignore[attr-defined]
        for _ in range(2):
            generate(pipe, tiny.inputs(num_inference_steps=5))
        report = handle.report
    (warned,) = [str(each.message) for each in caught if "CUDA graphs" in str(each.message)]  # once, and not each time
    says(warned, WITHOUT_GRAPHS, "a forward hook would no longer be called")
    says(row(report, "eager"), EAGER, "a forward hook would no longer be called; remove the hook")
    assert sum(report.eager_forwards.values()) == 10 and report.graph_forwards == 0  # on both devices


@pytest.mark.gpu
def test_a_forward_that_asks_the_gpu_for_a_number() -> None:
    tiny = TINY["qwen_image"]
    pipe: Any = tiny.build().to("cuda")
    pipe.transformer.norm_out = Waits(pipe.transformer.norm_out)
    inputs = tiny.inputs(num_inference_steps=6)
    report, warned = report_of(pipe, inputs, cfg_parallel_size=1, cuda_graphs=True)
    (line,) = warned
    says(line, WITHOUT_GRAPHS, "it waits for the GPU (.item(), a boolean mask)")
    says(
        next(line for line in str(report).splitlines() if "cannot be captured" in line),
        EAGER,
        "it waits for the GPU (.item(), a boolean mask)",
        "compile=True, if it is off, makes launching quicker without a graph",
    )
    assert report.graph_forwards == 0


# 6, 7: a transport that is slower than it had to be


def test_the_extension_is_missing(machine: Machine, ask_doctor: Doctor) -> None:
    machine(2, module=False)
    lines = ask_doctor()
    (module,) = lines["CUDA module"]
    says(module, "CUDA module missing: cfg-parallel was installed without its CUDA module", "error", HOW_TO_BUILD)
    (transport,) = lines["transport"]
    assert transport.startswith("warning") and HOW_TO_BUILD in transport
    says(
        transport,
        "host (peer and nccl need the compiled extension: ...)",
        "auto takes host",
        "through host memory, the slowest way",
    )
    says(
        row(Report(["cuda:0", "cuda:1"], *resolve("auto", GPUS)), "transport"),
        "host (peer and nccl need the compiled extension: ...)",
        HOW_TO_BUILD,
    )
    with pytest.raises(ConfigurationError, match=f"transport='peer' needs the compiled extension: .*{HOW_TO_BUILD}"):
        resolve("peer", GPUS)


def without_extension(script: str) -> list[str]:
    """The lines that a script prints in a process that finds no compiled module."""
    done = run([sys.executable, "-c", f"import sys; sys.modules['cfg_parallel._C'] = None\n{script}"], timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.timeout(120)
def test_a_process_without_the_extension() -> None:
    """Whatever GPUs there are."""
    lines = without_extension("from cfg_parallel import cli\ncli.main(['doctor', '--quick'])")
    (module,) = [line for line in lines if "CUDA module" in line and "missing:" in line]
    says(module, "CUDA module missing: cfg-parallel was installed without its CUDA module", HOW_TO_BUILD)


SLOWEST = "tensors went through host memory, the slowest way"


@pytest.mark.gpu(count=2)
def test_two_gpus_without_the_extension() -> None:
    script = f"""{PREAMBLE}
pipe.to("cuda")
with cfg_parallel.enable_cfg_parallel(pipe) as handle:
    generate(pipe, tiny.inputs())
    print(handle.report)
"""
    lines = without_extension(script)
    (transport,) = [line for line in lines if line.split()[0] == "transport"]
    says(transport, "host (peer and nccl need the compiled extension: ...)", HOW_TO_BUILD)
    says(lines[-1], SLOWEST, "in 3 of 3 steps")


@pytest.mark.parametrize("asked_for", ["nccl", "host"])
def test_a_slower_transport_was_asked_for(machine: Machine, asked_for: str) -> None:
    machine(2)
    quote = {
        "nccl": "nccl (asked for; transport='auto' takes the fastest that works here)",
        "host": "host (asked for; ...)",
    }[asked_for]
    report = Report(["cuda:0", "cuda:1"], *resolve(asked_for, GPUS), steps=3, guided_steps=3, parallel_steps=3)
    says(row(report, "transport"), quote, "transport='auto' takes the fastest that works here")
    if asked_for == "host":
        says(report.why, SLOWEST, "in parallel: in 3 of 3 steps")
    best = Report(["cuda:0", "cuda:1"], *resolve("auto", GPUS), steps=3, guided_steps=3, parallel_steps=3)
    assert row(best, "transport").endswith("peer (peer access between cuda:0 and cuda:1)")
    assert "slowest" not in best.why


@pytest.mark.gpu(count=2)
def test_gpus_with_the_host_transport() -> None:
    tiny = TINY["qwen_image"]
    report, _ = report_of(tiny.build().to("cuda:0"), tiny.inputs(), transport="host")
    says(row(report, "transport"), "host (asked for; ...)", "transport='auto' takes the fastest that works here")
    says(report.why, SLOWEST)


NO_IPC = "CUDA IPC is forbidden here"
FAILED = "nccl (peer does not work here: ...)"


@pytest.mark.usefixtures("forked")
def test_peer_that_fails_when_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handshake of two CPU processes that were to use CUDA IPC. What stands for NCCL is shared memory."""

    def forbidden(self: Any, *args: Any) -> None:
        raise RuntimeError(NO_IPC)

    monkeypatch.setattr(enable, "resolve", lambda name, devices: ("peer", "peer access between two GPUs"))
    monkeypatch.setattr(PeerTransport, "__init__", forbidden)
    monkeypatch.setattr(RemoteFollower, "use_nccl", lambda self: None)
    found = doctor._exchange(["cpu", "cpu"], [])
    assert found.status == "warning" and "by nccl: a step of nothing takes" in found.message
    assert f"peer does not work here: {NO_IPC}; in a container try --ipc=host" in found.line()
    report, _ = report_of(TINY["qwen_image"].build(), TINY["qwen_image"].inputs(), devices=["cpu", "cpu"])
    says(row(report, "transport"), FAILED, NO_IPC, "in a container try --ipc=host", "IOMMU")


# 8: a model that fits one GPU only

FOLLOWER = "cuda:1 needs about 46.0 GB for the denoiser, of which every device holds a copy, and has 24.0 GB free"
FITS_NOT = "The denoiser does not fit on the follower's GPU"


def test_doctor_knows_that_the_follower_has_too_little_memory(
    machine: Machine, ask_doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2)
    free = {0: 140 * 10**9, 1: 24 * 10**9}
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (free[getattr(device, "index", device)], 141 * 10**9)
    )
    (tmp_path / "model").mkdir()
    model = model_of(tmp_path / "model", "QwenImagePipeline", transformer=40 * 10**9, text_encoder=16 * 10**9)
    leader, follower = ask_doctor("--model", model)["memory"]
    assert leader.startswith("ok") and "cuda:0 needs about 64.4 GB for the whole pipeline and has 140.0 GB" in leader
    says(
        follower,
        FOLLOWER,
        "error",
        "quantize the denoiser, or use enable_layerwise_casting",
        "free what else is on cuda:1",
    )


@pytest.mark.usefixtures("forked")
def test_the_follower_has_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: TensorSpec, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total of 24 GiB.")

    pipe = TINY["qwen_image"].build()
    monkeypatch.setattr(TensorSpec, "empty", no_memory)  # where a follower takes the memory for its replica
    with pytest.raises(ConfigurationError) as refused:
        enable_cfg_parallel(pipe, devices=["cpu", "cpu"])
    says(str(refused.value), FITS_NOT, "CUDA out of memory", "load it quantized, or use enable_layerwise_casting(...)")
    assert type(pipe) is diffusers.QwenImagePipeline


@pytest.mark.gpu(count=2)
def test_the_second_gpu_has_too_little_memory() -> None:
    pipe: Any = TINY["qwen_image"].build().to("cuda:0")
    ballast = torch.zeros(4 << 30, dtype=torch.uint8, device="cuda:0")
    pipe.transformer.ballast = torch.nn.Parameter(ballast, requires_grad=False)
    free, _ = torch.cuda.mem_get_info(1)
    taken = torch.empty(free - (3 << 30), dtype=torch.uint8, device="cuda:1")
    try:
        with pytest.raises(ConfigurationError) as refused:
            enable_cfg_parallel(pipe, devices=["cuda:0", "cuda:1"])
    finally:
        del taken
        torch.cuda.empty_cache()
    says(str(refused.value), FITS_NOT, "load it quantized, or use enable_layerwise_casting(...)")


# 9: a model without guidance

ONE_PASS = (
    "no second pass was recognised in 50 of 50 steps: guidance_scale=7.5; a distilled model runs one pass at any scale"
)
NONE_GIVEN = "guidance was off in 50 of 50 steps; a model without guidance runs one pass a step"
ADDS_NO_PASS = "guidance_scale is an input of a distilled model and adds no pass"
MARKED = "with a distilled model (guidance_embeds), made for one pass a step"


def lcm() -> Any:
    """Stable Diffusion distilled: its UNet takes the scale as an input."""
    pipe = TINY["sd15"].build()
    unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
    randomize(unet)
    pipe.unet = unet.eval()
    return pipe


@pytest.mark.usefixtures("forked")
def test_a_distilled_model() -> None:
    report, warned = report_of(lcm(), TINY["sd15"].inputs(guidance_scale=7.5), devices=["cpu", "cpu"])
    assert warned == [f"cfg-parallel: {report.why}"] and report.guided_steps == 0
    says(report.why, ONE_PASS, "no speed-up: ", "`cfg-parallel models` lists what is recognised")


@pytest.mark.usefixtures("forked")
def test_a_distilled_model_that_could_have_true_guidance() -> None:
    """Flux as its page says to call it."""
    inputs = TINY["flux"].inputs(guidance_scale=3.5)
    del inputs["true_cfg_scale"], inputs["negative_prompt"]
    report, warned = report_of(TINY["flux"].build(), inputs, devices=["cpu", "cpu"])
    assert warned == [f"cfg-parallel: {report.why}"]
    says(report.why, ADDS_NO_PASS, "a negative prompt is needed", "a true_cfg_scale above 1 turns it on")


class OnePass:
    """A pipeline that takes no scale."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    @torch.no_grad()
    def __call__(self, steps: int) -> torch.Tensor:
        x = torch.ones(4)
        for step in range(steps):
            x = x - 0.1 * self.transformer(x, timestep=float(step))
        return x


@pytest.mark.usefixtures("forked")
def test_a_pipeline_without_guidance() -> None:
    pipe = OnePass(doctor._Echo().eval())
    with enable_cfg_parallel(pipe, devices=["cpu", "cpu"]) as handle, pytest.warns(UserWarning) as caught:
        pipe(4)
        says(handle.report.why, NONE_GIVEN, "no speed-up: ", "which no second device can share")
    assert [str(each.message) for each in caught] == [f"cfg-parallel: {handle.report.why}"]


@pytest.mark.parametrize(
    ("pipeline", "component", "file", "mark", "needs"),
    [
        (
            "FluxPipeline",
            "transformer",
            "transformer/config.json",
            {"guidance_embeds": True},
            "true_cfg_scale above 1 and a negative prompt",
        ),
        ("StableDiffusionPipeline", "unet", "unet/config.json", {"time_cond_proj_dim": 256}, "a second pass"),
        ("Flux2KleinPipeline", "transformer", "model_index.json", {"is_distilled": True}, "a second pass"),
    ],
)
def test_doctor_knows_distilled_models(
    ask_doctor: Doctor, tmp_path: Path, pipeline: str, component: str, file: str, mark: dict[str, Any], needs: str
) -> None:
    """By what their published configurations say."""
    model = model_of(tmp_path, pipeline, **{component: 1000})
    (before,) = ask_doctor("--model", model, "--devices=cpu,cpu")["model"]
    assert before.startswith("ok") and re.search(
        "its passes run in parallel.*, given (true_cfg|guidance)_scale", before
    )
    known = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(known | mark))
    (line,) = ask_doctor("--model", model, "--devices=cpu,cpu")["model"]
    assert line.startswith("warning") and line.endswith(f": two devices gain nothing without {needs}")
    (setting,) = mark
    assert f"{pipeline} {MARKED.replace('guidance_embeds', setting)}" in line
    assert MARKED in QUOTES and (f"({setting})" in QUOTES or setting in MARKED)


def test_doctor_does_not_know_a_pipeline(ask_doctor: Doctor, tmp_path: Path) -> None:
    model = model_of(tmp_path, "LatentConsistencyModelPipeline", unet=1000)
    (line,) = ask_doctor("--model", model, "--devices=cpu,cpu")["model"]
    says(line, "is not known to use guidance", "warning", "without a second pass two devices gain nothing")


# The docs


def test_the_docs_quote_the_code() -> None:
    """Of the rows that no test here starts, some part of each quote between two values is in the sources."""
    package = Path(cfg_parallel.__file__).parent
    text = "".join(path.read_text() for path in sorted(package.rglob("*.py")))
    text = re.sub(r"\"\s*\n\s*f?\"", "", text)  # strings that go on in the next line
    for quote in {*QUOTES} - {"CUDA out of memory"}:  # which PyTorch says
        parts = [part.strip() for part in re.split(r"(?:cuda:)?[\d.]*\d[\d.]*|\.\.\.|'[^']*'|[:;] |[()]|Cache ", quote)]
        assert any(part in text for part in parts if len(part) >= 9), quote
