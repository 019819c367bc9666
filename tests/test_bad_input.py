"""Bad input to everything public: one line that names the fix, at once, and nothing is changed or left behind."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import psutil
import pytest
import torch

import cfg_parallel
from cfg_parallel import ConfigurationError, cli, disable_cfg_parallel, enable_cfg_parallel, last_report
from cfg_parallel.guidance import EulerStep, combine
from cfg_parallel.remote import RemoteFollower
from helpers_demo import demo_model, save_photo
from tiny import TINY, generate

QWEN = TINY["qwen_image"]
SECONDS = 10.0  # a check takes milliseconds; torch.compile's modules take seconds to import
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One for all rows, because none may change it."""
    return QWEN.build()


@pytest.fixture(scope="module")
def expected(pipe: Any) -> torch.Tensor:
    return generate(pipe, QWEN.inputs())


def no_process(*args: Any) -> RemoteFollower:
    raise AssertionError("bad input must be refused before a process is started")


def refusal(call: Callable[[], Any], message: str, *errors: type[Exception]) -> Exception:
    """What `call` raises, after a look at how: soon, in one line that matches, of the right type, all processes
    gone."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    start = time.monotonic()
    with pytest.raises(errors or ConfigurationError, match=message) as caught:
        call()
    assert time.monotonic() - start < SECONDS
    said = str(caught.value)
    assert "\n" not in said and len(said) < 1000
    assert type(caught.value) in (*errors, ConfigurationError), "a type that is documented, not one below it"
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    return caught.value


@pytest.fixture
def untouched(pipe: Any, expected: torch.Tensor) -> Iterator[None]:
    """The pipeline is after the test what it was before, and gives the same."""
    parts, attributes = dict(pipe.components), set(pipe.__dict__)
    yield
    assert type(pipe) is diffusers.QwenImagePipeline
    assert set(pipe.__dict__) == attributes
    assert all(part is parts[name] for name, part in pipe.components.items())
    assert torch.equal(generate(pipe, QWEN.inputs()), expected)


# enable_cfg_parallel: its arguments


class Unpicklable:
    def __call__(self, denoiser: Any) -> None: ...

    def __reduce__(self) -> Any:
        raise TypeError("a lock\nof this process")


SIZE = "Expected cfg_parallel_size to be an integer of at least 1, but got "
DEVICES = r"Expected devices to be a list such as \['cuda:0', 'cuda:1'\] or \['cpu', 'cpu'\], but got "
TIMEOUT = "Expected follower_timeout to be a number of seconds above 0, but got "
GRAPHS = "Expected cuda_graphs to be 'auto', True or False, but got "
COMPILE = "Expected compile to be True, False, 'regional' or 'full', but got "
TRANSPORT = "Expected transport to be one of auto, host, nccl, peer, but got "
NUMERICS = "Expected numerics to be 'exact' or 'fused', but got "
PREPARE = "Expected prepare to be a function of the denoiser, but got "
OPTIONS = "Expected compile_options to be a dictionary of torch.compile's arguments, but got "
REFUSED_OPTIONS = r"torch.compile does not take these compile_options \("

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"cfg_parallel_size": 0}, SIZE + "0"),
    ({"cfg_parallel_size": -2}, SIZE + "-2"),
    ({"cfg_parallel_size": True}, SIZE + "True"),
    ({"cfg_parallel_size": 2.0}, SIZE + "2.0"),
    ({"cfg_parallel_size": math.nan}, SIZE + "nan"),
    ({"cfg_parallel_size": "2"}, SIZE + "'2'"),
    ({"cfg_parallel_size": None}, SIZE + "None"),
    ({"cfg_parallel_size": torch.tensor(2)}, SIZE + r"tensor\(2\)"),
    ({"cfg_parallel_size": 100_000}, r"cfg_parallel_size of at most \d+ on the CPU .*, but got 100000; use 2"),
    ({"cfg_parallel_size": 5000, "devices": ["cpu"] * 5000}, r"of at most \d+ on the CPU .*, but got 5000; use 2"),
    ({"cfg_parallel_size": 3, "devices": ["cpu"] * 2}, "needs 3 devices, but 2 were given .* or 3 devices"),
    ({"devices": ["cpu"]}, "needs 2 devices, but 1 were given .*pass cfg_parallel_size=1 or 2 devices"),
    ({"devices": ["cpu"] * 3}, "needs 2 devices, but 3 were given .*pass cfg_parallel_size=3 or 2 devices"),
    ({"devices": []}, DEVICES + r"\[\]"),
    ({"devices": "cpu,cpu"}, DEVICES + "'cpu,cpu'"),
    ({"devices": torch.device("cpu")}, DEVICES + r"device\(type='cpu'\)"),
    ({"devices": 2}, DEVICES + "2"),
    ({"devices": {"cpu", "cuda:0"}}, DEVICES),
    ({"devices": {"cpu": 1, "cuda:0": 2}}, DEVICES),
    ({"devices": ["cpu", None]}, "Unknown device None; use 'cuda:0', 'cuda:1', ... or 'cpu'"),
    ({"devices": ["cpu", 1]}, "no device|Unknown device 1; use 'cuda:0'"),
    ({"devices": ["cpu", "gpu"]}, "Unknown device 'gpu'; use 'cuda:0'"),
    ({"devices": ["cpu", "cuda:-1"]}, "Unknown device 'cuda:-1'; use 'cuda:0'"),
    ({"devices": ["cpu", "cpu\n"]}, r"Unknown device 'cpu\\n'; use 'cuda:0'"),
    ({"devices": ["meta", "meta"]}, "Unsupported device 'meta'; use 'cuda:0'"),
    ({"devices": ["cpu", "cuda:97"]}, r"no device cuda:97: \d+ GPUs are visible; .* CUDA_VISIBLE_DEVICES"),
    ({"transport": "tcp"}, TRANSPORT + "'tcp'"),
    ({"transport": None}, TRANSPORT + "None"),
    ({"transport": "peer"}, "transport='peer' needs GPUs, but got devices cpu, cpu; use 'auto'"),
    ({"transport": "nccl"}, "transport='nccl' needs GPUs, but got devices cpu, cpu; use 'auto'"),
    ({"numerics": "fast"}, NUMERICS + "'fast'"),
    ({"numerics": torch.ones(2)}, NUMERICS + r"tensor\("),
    ({"cuda_graphs": "on"}, GRAPHS + "'on'"),
    ({"cuda_graphs": 1}, GRAPHS + "1"),
    ({"cuda_graphs": 0}, GRAPHS + "0"),
    ({"cuda_graphs": torch.ones(2, 2)}, GRAPHS + r"tensor\(\[\["),
    ({"cuda_graphs": True}, "cuda_graphs=True needs a GPU, but the pipeline is on cpu; use 'auto'"),
    ({"compile": "max-autotune"}, COMPILE + "'max-autotune'"),
    ({"compile": 0}, COMPILE + "0"),
    ({"compile": 1}, COMPILE + "1"),
    ({"compile": None}, COMPILE + "None"),
    ({"compile": torch.ones(2)}, COMPILE + r"tensor\("),
    ({"compile_options": {"dynamic": True}}, "compile_options are given, but nothing is compiled; pass compile=True"),
    ({"compile_options": []}, OPTIONS + r"\[\]"),
    ({"compile": True, "compile_options": 5}, OPTIONS + "5"),
    ({"compile": True, "compile_options": [("mode", "default")]}, OPTIONS + r"\[\('mode'"),
    (
        {"compile": True, "compile_options": {"mode": "default", "options": {}}},
        "takes mode or options, not both; leave",
    ),
    ({"compile": True, "compile_options": {"mode": "fastest"}}, REFUSED_OPTIONS + ".*mode=fastest, should be one of"),
    ({"compile": True, "compile_options": {"backend": "none"}}, REFUSED_OPTIONS + ".*'none', see.*list_backends"),
    ({"compile": True, "compile_options": {"modus": "x"}}, REFUSED_OPTIONS + ".*unexpected keyword argument 'modus'"),
    ({"compile": True, "compile_options": {"options": {"x": 1}}}, REFUSED_OPTIONS + ".*option x, known options are"),
    ({"compile": True, "compile_options": {"options": 5}}, REFUSED_OPTIONS),
    ({"compile": True, "compile_options": {3: 5}}, REFUSED_OPTIONS + ".*must be strings"),
    ({"compile": True, "compile_options": {"mode": "max-autotune"}}, "use mode='max-autotune-no-cudagraphs'"),
    ({"prepare": "flash"}, PREPARE + "'flash'"),
    ({"prepare": torch.ones(2, 2)}, PREPARE + r"tensor\(\[\["),
    ({"prepare": Unpicklable()}, "cannot be sent .*TypeError: a lock of this process.*with functools.partial"),
    ({"follower_timeout": 0}, TIMEOUT + "0"),
    ({"follower_timeout": -1.5}, TIMEOUT + "-1.5"),
    ({"follower_timeout": math.nan}, TIMEOUT + "nan"),
    ({"follower_timeout": "600"}, TIMEOUT + "'600'"),
    ({"follower_timeout": None}, TIMEOUT + "None"),
    ({"follower_timeout": True}, TIMEOUT + "True"),
    ({"follower_timeout": [600]}, TIMEOUT + r"\[600\]"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_arguments(
    untouched: None, pipe: Any, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteFollower, "start", no_process)
    refusal(lambda: enable_cfg_parallel(pipe, **arguments), message)


def no_parameters() -> None: ...


def no_such_backend(denoiser: Any) -> None:
    raise RuntimeError("no such\nattention backend")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            no_such_backend,
            r"prepare raised RuntimeError: no such attention backend\..* try prepare\(pipe.transformer\)",
        ),
        (no_parameters, r"prepare raised TypeError: no_parameters\(\) takes 0 .* try prepare\(pipe.transformer\)"),
        (torch.nn.Linear, r"prepare raised TypeError: .*'out_features'.* try prepare\(pipe.transformer\)"),
    ],
)
def test_prepare_that_raises(untouched: None, pipe: Any, prepare: Any, message: str) -> None:
    """With the real follower, which has been started by then and is ended while it still imports PyTorch."""
    refusal(lambda: enable_cfg_parallel(pipe, prepare=prepare), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg_parallel_size": 3}, "cfg_parallel_size=3 needs 3 GPUs, but 2 .* or pass cfg_parallel_size=2"),
        ({"devices": ["cuda:0", "cuda:0"]}, "same GPU is named twice .*; name a different one for each"),
        ({"devices": ["cuda:1", "cuda:0"]}, r"pipeline's own, cuda:0, but got cuda:1; call pipe.to\('cuda:1'\) first"),
        ({"devices": ["cpu", "cuda:0"]}, "pipeline's own, cuda:0, but got cpu; .*put 'cuda:0' first"),
        ({"devices": ["cuda:0", "cpu"]}, "Expected GPUs only or CPUs only, but got cuda:0, cpu; use one kind"),
        ({"devices": ["cuda:0", "cuda:2"]}, "no device cuda:2: 2 GPUs are visible; .* CUDA_VISIBLE_DEVICES"),
        (
            {"transport": "peer"},
            "transport='peer' cannot work: no peer access .*use 'nccl'|needs the compiled extension",
        ),
    ],
)
def test_arguments_for_a_pipeline_on_a_gpu(
    untouched: None, pipe: Any, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteFollower, "start", no_process)
    monkeypatch.setattr("cfg_parallel.enable.device_of", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: False)
    refusal(lambda: enable_cfg_parallel(pipe, **arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg_parallel_size": 0}, SIZE + "0"),
        ({"cfg_parallel_size": "2"}, SIZE + "'2'"),
        ({"cfg_parallel_size": 3}, "torchrun started 2; use torchrun --nproc-per-node=3"),
    ],
)
def test_arguments_under_torchrun(
    untouched: None, pipe: Any, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refusal(lambda: enable_cfg_parallel(pipe, **arguments), message)


# The pipeline


class NoDenoiser:
    components = {"vae": torch.nn.Identity(), "tokenizer": None}  # noqa: RUF012


NO_PIPELINE = {
    "None": lambda pipe: None,
    "its name": lambda pipe: "Qwen/Qwen-Image",
    "its class": lambda pipe: diffusers.QwenImagePipeline,
    "its denoiser": lambda pipe: pipe.transformer,
    "a list": lambda pipe: [pipe],
    "its components": lambda pipe: pipe.components,
    "a number": lambda pipe: 2,
}


@pytest.mark.parametrize("function", [enable_cfg_parallel, disable_cfg_parallel, last_report])
@pytest.mark.parametrize("name", NO_PIPELINE)
def test_no_pipeline(untouched: None, pipe: Any, function: Any, name: str) -> None:
    message = r"Expected a diffusers pipeline, but got [\w ]+; pass the object that from_pretrained\(\.\.\.\)"
    error = refusal(lambda: function(NO_PIPELINE[name](pipe)), message)
    assert (name == "its class") == ("the class QwenImagePipeline" in str(error))


def on_meta(pipe: Any) -> None:
    pipe.to("meta")


def half_on_meta(pipe: Any) -> None:
    pipe.transformer.proj_out.to("meta")


def sequential(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def device_map(pipe: Any) -> None:
    pipe.hf_device_map = {"transformer": 0, "vae": 1}


def no_denoiser(pipe: Any) -> None:
    pipe.transformer = None


def deleted_denoiser(pipe: Any) -> None:
    del pipe.transformer


def compiled_already(pipe: Any) -> None:
    pipe.transformer.compile()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # a deleted component is looked for in the configuration
@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (on_meta, {}, r"nothing to replicate; load it without and call pipe.enable_model_cpu_offload\(\)"),
        (half_on_meta, {}, r"nothing to replicate; load it without and call pipe.enable_model_cpu_offload\(\)"),
        (sequential, {}, r"enable_sequential_cpu_offload, device_map\).*call pipe.enable_model_cpu_offload\(\)"),
        (device_map, {}, r"spread over the devices .*transformer: 0, vae: 1\); call pipe.reset_device_map\(\)"),
        (no_denoiser, {}, "QwenImagePipeline has no denoiser: .*enable cfg-parallel on the pipeline that denoises"),
        (
            deleted_denoiser,
            {},
            "QwenImagePipeline has no denoiser: .*enable cfg-parallel on the pipeline that denoises",
        ),
        (compiled_already, {"compile": True}, r"is compiled already; leave compile= out, or its own compile\(\)"),
    ],
)
def test_pipeline_in_a_state_that_cannot_work(
    forked: None, spoil: Callable[[Any], None], arguments: dict[str, Any], message: str
) -> None:
    pipe = QWEN.build()
    spoil(pipe)
    refusal(lambda: enable_cfg_parallel(pipe, **arguments), message)
    assert type(pipe) is diffusers.QwenImagePipeline


def test_pipeline_without_a_denoiser() -> None:
    refusal(lambda: enable_cfg_parallel(NoDenoiser()), "NoDenoiser has no denoiser: .*pipeline that denoises")


def test_an_enabled_pipeline(forked: None, untouched: None, pipe: Any, expected: torch.Tensor) -> None:
    with enable_cfg_parallel(pipe) as handle:
        refusal(lambda: enable_cfg_parallel(pipe), r"enabled already; call disable_cfg_parallel\(pipe\) first")
        refusal(lambda: last_report(pipe), "no report before the first generation; call the pipeline first")
        refusal(lambda: handle.report, "no report before the first generation; call the pipeline first")
        refusal(lambda: last_report(handle), "Expected a diffusers pipeline, but got ")
        refusal(lambda: disable_cfg_parallel(handle), "Expected a diffusers pipeline, but got ")
        refusal(lambda: enable_cfg_parallel(handle), "Expected a diffusers pipeline, but got ")
        refusal(lambda: enable_cfg_parallel(pipe.transformer), "Expected a diffusers pipeline, but got ")
        refusal(lambda: pipe.enable_model_cpu_offload(gpu_id=3), "its denoiser, cpu, .*call disable_cfg_parallel")
        assert torch.equal(generate(pipe, QWEN.inputs()), expected)
        assert last_report(pipe).parallel_steps == 3
    refusal(lambda: last_report(pipe), r"not enabled; call enable_cfg_parallel\(pipe\) first")
    disable_cfg_parallel(pipe)  # a second time is no mistake


# combine


ONES = torch.ones(2, 4)
PAIR = {"cond": (ONES, ONES), "scale": (2.0, 1.0), "rule": "instruct_pix2pix"}

COMBINE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cond": None}, TypeError, "`cond` as a tensor of a floating-point dtype, but got NoneType"),
    ({"cond": [[1.0, 2.0]]}, TypeError, "Expected one `cond` for rule='cfg', but got list"),
    ({"cond": ONES.numpy()}, TypeError, "`cond` as a tensor of a floating-point dtype, but got ndarray"),
    ({"cond": ONES.long()}, TypeError, "`cond` as a tensor of a floating-point dtype, but got a tensor of torch.int64"),
    ({"cond": ONES.cfloat()}, TypeError, "floating-point dtype, but got a tensor of torch.complex64"),
    ({"uncond": None}, TypeError, "Expected `uncond` as a tensor, but got NoneType"),
    ({"uncond": 0.0}, TypeError, "Expected `uncond` as a tensor, but got float"),
    ({"uncond": torch.ones(4, 2)}, ValueError, r"Expected `uncond` of shape \(2, 4\), but got \(4, 2\)"),
    ({"uncond": ONES.bfloat16()}, ValueError, "`uncond` of dtype torch.float32, but got torch.bfloat16"),
    ({"uncond": ONES.to("meta")}, ValueError, "Expected `uncond` on cpu, but got meta"),
    ({"scale": None}, TypeError, "Expected `scale` as a Python number or a tensor, but got NoneType"),
    ({"scale": "4.0"}, TypeError, "Expected `scale` as a Python number or a tensor, but got str"),
    ({"scale": torch.ones(3)}, ValueError, r"Expected `scale` of shape \(2,\), but got \(3,\)"),
    ({"scale": torch.ones(2).long()}, ValueError, "`scale` of dtype torch.float32, but got torch.int64"),
    ({"rule": "cgf"}, ValueError, "Expected `rule` to be one of cfg, cfg_cond, .*, but got 'cgf'"),
    ({"rule": ["cfg"]}, ValueError, r"Expected `rule` to be one of cfg, cfg_cond, .*, but got \['cfg'\]"),
    ({"rule": None}, ValueError, "Expected `rule` to be one of cfg, cfg_cond, .*, but got None"),
    ({"backend": "cudnn"}, ValueError, "`backend` to be one of auto, cuda, triton, torch, but got 'cudnn'"),
    ({"backend": ["torch"]}, ValueError, r"`backend` to be one of auto, cuda, triton, torch, but got \['torch'\]"),
    ({"numerics": "fast"}, ValueError, "Expected `numerics` to be one of exact, fused, but got 'fast'"),
    ({**PAIR, "cond": (ONES,)}, ValueError, "Expected `cond` of length 2, but got 1"),
    ({**PAIR, "cond": ONES}, TypeError, "Expected `cond` as a tuple for rule='instruct_pix2pix', but got a tensor"),
    ({**PAIR, "scale": (1.0, None)}, TypeError, "Expected `scale` as a Python number or a tensor, but got NoneType"),
    ({**PAIR, "rule": "composed", "scale": (1.0,)}, ValueError, "Expected `scale` of length 2, as `cond`, but got 1"),
    ({"rescale": 0.7}, TypeError, r"Expected the options of rule='cfg' \(none\), but got 'rescale'"),
    ({"rule": "rescale"}, TypeError, "Expected `rescale` as a Python number for rule='rescale', but got NoneType"),
    ({"rule": "apg", "state": ONES}, TypeError, "`momentum` and `state` together; state=torch.zeros_like"),
    ({"active": 0}, TypeError, "Expected `active` as a bool, a bool tensor or None, but got int"),
    ({"active": 1}, TypeError, "Expected `active` as a bool, a bool tensor or None, but got int"),
    ({"active": [True, False]}, TypeError, "Expected `active` as a bool, a bool tensor or None, but got list"),
    ({"active": torch.ones(2)}, ValueError, "Expected `active` of dtype torch.bool, but got torch.float32"),
    ({"step": 0.1}, TypeError, "Expected `step` as an EulerStep or None, but got float"),
    ({"step": EulerStep(ONES, None)}, TypeError, "`step.dt` as a Python number or a tensor, but got NoneType"),  # type: ignore[arg-type]
    ({"out": torch.ones(2)}, ValueError, r"Expected `out` of shape \(2, 4\), but got \(2,\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), COMBINE)
def test_combine(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"cond": ONES, "uncond": ONES, "scale": 2.0}
    refusal(lambda: combine(**{**good, **arguments}), message, error)


def test_combine_with_a_backend_that_is_not_for_cpus() -> None:
    message = "expects CUDA tensors, but got cpu; use backend='torch'|install a CUDA toolkit"
    errors = (ConfigurationError, cfg_parallel.ExtensionMissingError)
    refusal(lambda: combine(ONES, ONES, 2.0, backend="cuda"), message, *errors)


# The command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with things of all kinds; the rows name them relative to it."""
    monkeypatch.chdir(tmp_path)
    photo = save_photo(tmp_path / "photo.png")
    Path("cut.png").write_bytes(photo.read_bytes()[:60])
    Path("notes.png").write_text("dear diary")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/diary.txt").write_text("dear diary")
    Path("locked").mkdir()
    index = json.loads((demo_model() / "model_index.json").read_text())
    texts = {
        "no-json": "{",
        "deep": "[" * 100_000,
        "no-class": "{}",
        "other-class": json.dumps({**index, "_class_name": "CatPipeline"}),
        "no-names": json.dumps({**index, "transformer": [1, 2]}),
    }
    for name, text in texts.items():
        Path(name).mkdir()
        Path(name, "model_index.json").write_text(text)
    Path("model").symlink_to(demo_model())

    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded")

    may = os.access  # for root, everything is writable
    monkeypatch.setattr(os, "access", lambda path, mode: may(path, mode) and Path(path).name != "locked")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    return tmp_path


LONG = "x" * 300
COMMANDS: list[tuple[str, str]] = [
    ("", "arguments are required: COMMAND .*--help"),
    ("edti", "invalid choice: 'edti'.*--help"),
    ("edit", "arguments are required: --model, --prompt, --output .*--help"),
    ("models nothing-like-it", "No pipeline .*`cfg-parallel models` lists all"),
    ("models --yaml", "unrecognized arguments: --yaml .*--help"),
    ("demo --num-inference-steps=0", "--num-inference-steps: expected a whole number of at least 1"),
    ("demo --num-inference-steps=1", "use --num-inference-steps 2"),
    ("demo --output=empty", "empty is a folder: give --output a file name, such as empty/out.png"),
    ("demo --output=none/out.png", "folder none does not exist: create it or change --output"),
    ("demo --output=locked/out.png", "locked/out.png may not be written: check the permissions or change --output"),
    ("demo --model-only --model-dir=photo.png", "photo.png is a file; name a folder"),
    ("demo --model-only --model-dir=full", r"holds other files \(diary.txt\); name a new or an empty folder"),
    ("demo --model-only --model-dir=photo.png/model", "cannot be written .*: name another folder with --model-dir"),
    (f"demo --model-only --model-dir={LONG}", r"--model-dir: expected a path, but got .* \(File name too long\)"),
]
EDIT: list[tuple[str, str]] = [
    ("--image=none.png", "there is no image none.png: check the path given to --image"),
    ("--image=empty", "empty is a folder: give --image the picture itself"),
    ("--image=notes.png", "notes.png is no picture .*: convert it to PNG or JPEG"),
    ("--image=cut.png", "cut.png is damaged or cut short .*: copy or export it again"),
    ("--image=/dev/null", "/dev/null is no picture .*: convert it to PNG or JPEG"),
    ("--image=", "--image: expected a path, but got ''"),
    (f"--image={LONG}", r"--image: expected a path, but got .* \(File name too long\)"),
    ("--image=a\0b", r"--image: expected a path, but got 'a\\x00b' \(embedded null byte\)"),
    ("--image=photo.png --image=photo.png", "takes one picture, but 3 are given: keep one --image"),
    ("--output=", "--output: expected a path, but got ''"),
    ("--output=empty", "empty is a folder: give --output a file name, such as empty/out.png"),
    ("--output=none/out.png", "folder none does not exist: create it or change --output"),
    ("--output=photo.png/out.png", "folder photo.png does not exist: create it or change --output"),
    ("--output=locked/out.png", "may not be written: check the permissions or change --output"),
    ("--output=out", "a name without a suffix: end --output in .png, .jpg or .webp"),
    ("--output=out.doc", "the suffix .doc: end --output in .png, .jpg or .webp"),
    (f"--output={LONG}.png", r"--output: expected a path, but got .* \(File name too long\)"),
    ("--model=", "--model: expected a path, but got ''"),
    ("--model=none", "no folder none, and it is no Hugging Face id .*: check --model"),
    ("--model=photo.png", "photo.png is a file: give --model the folder that holds model_index.json"),
    ("--model=empty", "no model_index.json; give --model a folder in the diffusers format"),
    (f"--model={LONG}", r"--model: expected a path, but got .* \(File name too long\)"),
    ("--model=no-json", "model_index.json cannot be read .*: download it again"),
    ("--model=deep", "model_index.json cannot be read .*: download it again"),
    ("--model=no-class", "model_index.json names no pipeline class: download it again"),
    ("--model=other-class", "pipeline class CatPipeline, .*`pip install -U diffusers`, or check"),
    ("--model=no-names", "the transformer of no-names .*check model_index.json"),
    ("--num-inference-steps=0", "expected a whole number of at least 1 and at most 1000, but got '0'"),
    ("--num-inference-steps=100000000000", "expected a whole number of at least 1 and at most 1000, but got '1000"),
    ("--num-inference-steps=2.5", "expected a whole number of at least 1 and at most 1000, but got '2.5'"),
    ("--height=1", "--height: expected a whole number of at least 16 and at most 16384, but got '1'"),
    ("--width=1000000000", "--width: expected a whole number of at least 16 and at most 16384, but got '1000000000'"),
    ("--width=wide", "--width: expected a whole number of at least 16 and at most 16384, but got 'wide'"),
    ("--cfg-scale=inf", "--cfg-scale: expected a number, but got 'inf'"),
    ("--cfg-scale=four", "--cfg-scale: expected a number, but got 'four'"),
    ("--seed=-1", r"--seed: expected a whole number from 0 to 2\*\*64 - 1, but got '-1'"),
    ("--seed=1e3", r"--seed: expected a whole number from 0 to 2\*\*64 - 1, but got '1e3'"),
    ("--dtype=int8", "--dtype: invalid choice: 'int8'.*bfloat16"),
    ("--cfg-parallel-size=0", "--cfg-parallel-size: expected a whole number of at least 1, but got '0'"),
    ("--cfg-parallel-size=100000", r"of at most \d+ on the CPU .*, but got 100000; use 2|needs 100000 GPUs"),
    ("--cfg-parallel-size=3 --devices=cpu,cpu", "--devices names 2 and --cfg-parallel-size is 3: make them agree"),
    ("--devices=", "--devices: expected a list such as cuda:0,cuda:1 or cpu,cpu, but got ''"),
    ("--devices=cuda:,cuda:1", "--devices: expected a list such as cuda:0,cuda:1 or cpu,cpu, but got 'cuda:,cuda:1'"),
    ("--devices=cuda:97,cuda:98", "there is no cuda:97: .*; change --devices"),
    ("--transport=tcp", "--transport: invalid choice: 'tcp'.*auto"),
    ("--transport=peer --devices=cpu,cpu", "transport='peer' needs GPUs, but got devices cpu, cpu; use 'auto'"),
    ("--cuda-graphs=on --devices=cpu,cpu", "--cuda-graphs on needs GPUs, but would run on cpu,cpu: leave it out"),
    ("--compile=fast", "--compile: invalid choice: 'fast'.*regional"),
    ("--compare --cfg-parallel-size=1", "--compare compares one device with several: leave it out or raise"),
    ("--no-such-flag", "unrecognized arguments: --no-such-flag .*--help"),
]
GOOD = ["edit", "--model=model", "--image=photo.png", "--prompt=p", "--output=out.png"]


def words(command: str) -> list[str]:
    """Also of a flag with an empty value, or with a null character."""
    return command.split(" ") if command else []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *(pytest.param(words(command), message, id=command[:60] or "nothing") for command, message in COMMANDS),
        *(pytest.param([*GOOD, *words(extra)], message, id=ascii(extra[:60])) for extra, message in EDIT),
    ],
)
def test_command(here: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()  # building the demo model, the first time, shows a progress bar
    start = time.monotonic()
    assert cli.main(argv) == 2
    assert time.monotonic() - start < SECONDS
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("cfg-parallel: error: ")
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    assert re.search(message, printed.err)
    assert not Path("out.png").exists()


def test_exit_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cfg_parallel.cli", "edit", f"--model={tmp_path}", "--prompt=p", "--output=o.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("cfg-parallel: error: ") and done.stderr.count("\n") == 1
