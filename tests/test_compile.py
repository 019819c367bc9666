"""`compile=`, denoisers that the user has compiled, and `prepare=`: the same on every replica, and gone afterwards."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import cfg_parallel
from cfg_parallel import ConfigurationError, compiling
from cfg_parallel.compiling import Compiled, find_compiled, is_compiled
from cfg_parallel.graphs import Graphs
from reference import reference
from test_graphs import rerun, run
from tiny import TINY, generate

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("forked")]

# The backend that changes nothing: what is tested is where it is applied. Its marks show in the code that ran.
EAGER = {"backend": "eager"}


def halving(code: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A backend whose code gives half of what it should, so that it shows whether compiled code has run."""
    return lambda *args: tuple(out / 2 if isinstance(out, torch.Tensor) else out for out in code(*args))


CPUS = {"devices": ["cpu", "cpu"]}


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


def paths(module: torch.nn.Module) -> list[str]:
    return [one.path for one in find_compiled(module)]


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("qwen_image", True, ["transformer_blocks.0", "transformer_blocks.1"]),
        ("qwen_image", "regional", ["transformer_blocks.0", "transformer_blocks.1"]),
        ("qwen_image", "full", [""]),
        ("sd15", True, [""]),
        ("sd3", True, ["transformer_blocks.0", "transformer_blocks.1"]),
        ("sd3", "full", [""]),
    ],
)
def test_what_is_compiled(name: str, mode: Any, expected: list[str]) -> None:
    tiny = TINY[name]
    denoiser: Any = getattr(tiny.build(), tiny.denoiser)
    before = {key: (weight.stride(), weight.clone()) for key, weight in denoiser.named_parameters()}
    undo = compiling.compile_denoiser("denoiser", denoiser, mode, EAGER)
    assert paths(denoiser) == expected
    kernels = [w for w in denoiser.parameters() if w.dim() == 4 and w.shape[2] > 1 and w.shape[1] > 1]
    assert (name == "sd15") == any(not w.is_contiguous() for w in kernels)
    assert name != "sd15" or all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
    undo()
    assert not is_compiled(denoiser)
    for key, weight in denoiser.named_parameters():
        assert weight.stride() == before[key][0] and torch.equal(weight, before[key][1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, {"deterministic": True}),
        ({"dynamic": False}, {"deterministic": True}),
        ({"options": {"epilogue_fusion": True}}, {"deterministic": True, "epilogue_fusion": True}),
        ({"options": {"deterministic": False}}, {"deterministic": False}),
    ],
)
def test_inductor_is_deterministic_unless_told_otherwise(options: Any, expected: dict[str, Any]) -> None:
    """Also on a follower, which gets the arguments from the compiled module."""
    block = torch.nn.Linear(2, 2)
    compiling.compile_denoiser("denoiser", block, "full", options)
    (found,) = find_compiled(block)
    assert {key: found.arguments["options"][key] for key in expected} == expected
    assert found.arguments["dynamic"] is (options or {}).get("dynamic")


def test_a_mode_of_inductor_is_left_as_it_is() -> None:
    block = torch.nn.Linear(2, 2)
    compiling.compile_denoiser("denoiser", block, "full", {"mode": "max-autotune-no-cudagraphs"})
    (found,) = find_compiled(block)
    assert "deterministic" not in found.arguments["options"] and found.arguments["options"]["max_autotune"]


def test_regional_needs_repeated_blocks() -> None:
    pipe = TINY["sd3"].build()
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[1:]
    with pytest.raises(ConfigurationError, match=r"SD3Transformer2DModel has no repeated blocks.*compile='full'"):
        cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1, compile="regional")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compile": "all"}, "Expected compile to be True, False, 'regional' or 'full', but got 'all'"),
        ({"compile_options": EAGER}, "nothing is compiled; pass compile=True"),
        ({"compile": True, "compile_options": {"mode": "reduce-overhead"}}, "CUDA graphs of its own.*no-cudagraphs"),
        ({"compile": True, "compile_options": {"options": {"triton.cudagraphs": True}}}, "CUDA graphs of its own"),
        ({"compile": True, "compile_options": {"mode": "default", "options": {}}}, "mode or options, not both"),
        ({"prepare": "flash"}, "Expected prepare to be a function of the denoiser, but got 'flash'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        cfg_parallel.enable_cfg_parallel(TINY["qwen_image"].build(), **CPUS, **arguments)


@pytest.mark.parametrize("name", ["qwen_image", pytest.param("sd15", marks=pytest.mark.thorough)])
def test_compiled_on_both_sides(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.build()
    denoiser = getattr(pipe, tiny.denoiser)
    with cfg_parallel.enable_cfg_parallel(pipe, **CPUS, compile=True, compile_options=EAGER) as handle:
        assert is_compiled(denoiser)
        first = generate(pipe, tiny.inputs())
        report = handle.report
        assert report.compile_seconds > 0 and report.follower_compile_seconds > 0
        assert report.parallel_steps >= 2
        assert "compiled  in" in str(report)
        again = generate(pipe, tiny.inputs())
        assert handle.report.compile_seconds < report.compile_seconds
    assert not is_compiled(denoiser)
    plain = reference(tiny, tiny.build(), tiny.inputs())
    assert torch.allclose(first, plain, rtol=1e-3, atol=1e-3)  # channels_last convolutions sum in another order
    assert torch.equal(first, again)
    if name == "qwen_image":
        assert torch.equal(first, plain)


def counting(code: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A backend that notes the rows of the latents that it compiles for; kernels of convolutions are small."""
    images = [value for value in inputs if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[-1] > 3]
    BATCHES.extend(image.shape[0] for image in images)
    return code.forward  # type: ignore[no-any-return]


BATCHES: list[int] = []


def test_a_batch_of_branches_is_never_compiled_for() -> None:
    """Only the first call has both, and it is run to be looked at."""
    BATCHES.clear()
    tiny = TINY["sd15"]
    pipe = tiny.build()
    with cfg_parallel.enable_cfg_parallel(
        pipe, **CPUS, compile="full", compile_options={"backend": counting}
    ) as handle:
        first = generate(pipe, tiny.inputs())
        assert handle.report.parallel_steps == handle.report.steps
        assert torch.equal(generate(pipe, tiny.inputs()), first)
    assert BATCHES and set(BATCHES) == {1}


def test_two_images_without_guidance_are_compiled_for() -> None:
    """A batch that turns out to be no branches has the compiled bits, in the first call too."""
    tiny = TINY["sd15"]
    inputs = functools.partial(tiny.inputs, guidance_scale=1.0, num_images_per_prompt=2)
    one, two = tiny.build(), tiny.build()
    compiling.compile_denoiser("unet", one.unet, "full", {"backend": halving})
    expected = generate(one, inputs())
    with cfg_parallel.enable_cfg_parallel(two, **CPUS, compile="full", compile_options={"backend": halving}):
        for _ in range(2):
            with pytest.warns(UserWarning, match="cfg-parallel"):
                assert torch.equal(generate(two, inputs()), expected)


USERS: dict[str, Callable[[Any], Any]] = {
    "Module.compile": lambda pipe: pipe.transformer.compile(**EAGER),
    "compile_repeated_blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(**EAGER),
    "torch.compile": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, **EAGER)),
}


@pytest.mark.parametrize(("when", "how"), [*(("before", how) for how in USERS), ("live", "torch.compile")])
def test_a_denoiser_that_the_user_compiles(when: str, how: str) -> None:
    tiny = TINY["qwen_image"]
    plain, pipe = tiny.build(), tiny.build()
    expected = generate(plain, tiny.inputs())
    if when == "before":
        USERS[how](pipe)
    with cfg_parallel.enable_cfg_parallel(pipe, **CPUS) as handle:
        if when == "live":
            assert torch.equal(generate(pipe, tiny.inputs()), expected)
            assert handle.report.follower_compile_seconds == 0
            USERS[how](pipe)
        assert torch.equal(generate(pipe, tiny.inputs()), expected)
        assert handle.report.follower_compile_seconds > 0
        assert handle.report.parallel_steps >= 2
    assert is_compiled(pipe.transformer)  # it is the user's


def test_a_user_who_compiles_does_not_ask_for_it_again() -> None:
    pipe = TINY["qwen_image"].build()
    pipe.transformer.compile(**EAGER)
    with pytest.raises(ConfigurationError, match="'transformer' is compiled already; leave compile= out"):
        cfg_parallel.enable_cfg_parallel(pipe, **CPUS, compile=True)


def test_the_options_travel() -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    linear[0].compile(mode="max-autotune-no-cudagraphs", dynamic=False)
    linear[1].compile(backend="aot_eager")
    found = find_compiled(linear)
    assert [one.path for one in found] == ["0", "1"]
    assert found[0].arguments["dynamic"] is False and found[0].arguments["options"]["max_autotune"] is True
    other = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    compiling.apply(other, found)
    assert find_compiled(other) == found
    wrapped = torch.compile(torch.nn.Linear(2, 2), mode="reduce-overhead")
    assert find_compiled(wrapped)[0] == Compiled("", {"dynamic": None, "options": {"triton.cudagraphs": True}})
    assert compiling.has_graphs(wrapped) and not compiling.has_graphs(linear)


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_compiled_code_runs_in_every_call(mode: Any) -> None:
    tiny = TINY["qwen_image"]
    one, two = tiny.build(), tiny.build()
    eager = generate(one, tiny.inputs())
    compiling.compile_denoiser("transformer", one.transformer, mode, {"backend": halving})
    expected = generate(one, tiny.inputs())
    assert not torch.equal(eager, expected)
    options = {"compile": mode, "compile_options": {"backend": halving}}
    with cfg_parallel.enable_cfg_parallel(two, **CPUS, **options):
        for _ in range(2):
            assert torch.equal(generate(two, tiny.inputs()), expected)


def test_each_device_compiles_for_one_branch() -> None:
    """Not for the prompts of both, which torch.compile would take as one of variable length."""
    tiny = TINY["qwen_image"]
    pipe, compiled = tiny.build(), []

    def counting(module: Any, inputs: Any) -> Any:
        compiled.append(module)
        return module.forward

    inputs = functools.partial(tiny.inputs, prompt="a cat on a sofa, high quality", negative_prompt="blurry")
    options = {"compile": True, "compile_options": {"backend": counting}}
    with cfg_parallel.enable_cfg_parallel(pipe, **CPUS, **options) as handle:
        for _ in range(2):
            generate(pipe, inputs())
            assert handle.report.parallel_steps == handle.report.steps
            assert len(compiled) == 1


class Block(torch.nn.Module):
    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x * 2 + table


class Tables(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.tables = [torch.arange(4.0)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(x, self.tables[0])
        return out


@pytest.mark.parametrize("path", ["block", ""])
def test_graphs_of_compiled_forwards(path: str) -> None:
    """The graph is one of the compiled code, which goes on being used, and what it reads is kept."""
    model = Tables().eval()
    model.get_submodule(path).compile(backend=halving)
    graphs = Graphs(torch.device("cpu"), True, rerun)
    graphs.begin(None)
    with torch.no_grad():
        outs = [run(graphs, model, torch.ones(4)) for _ in range(5)]
        assert graphs.captured == 1 and graphs.replayed == 2, graphs.failure
        assert all(torch.equal(out, (2 + torch.arange(4.0)) / 2) for out in outs)
        assert torch.equal(model(torch.ones(4)), outs[0])
    (graph,) = graphs._graphs.values()
    assert any(kept.data_ptr() == model.tables[0].data_ptr() for kept in graph.keeps)


@pytest.mark.parametrize("cast", [False, True])
def test_nothing_is_compiled_during_a_capture(cast: bool) -> None:
    compiled: list[Any] = []

    def backend(code: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(code)
        return code.forward

    def capture(forward: Callable[[], Any]) -> Any:
        before = len(compiled)
        captured = rerun(forward)
        assert len(compiled) == before
        return captured

    model = Tables().eval()
    model.compile(backend=backend)
    graphs = Graphs(torch.device("cpu"), True, capture)
    graphs.begin(None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        for _ in range(3):
            run(graphs, model, torch.ones(4))
    assert graphs.captured == 1, graphs.failure
    assert len(compiled) == 1 + cast  # a setting of autocast's cache is another kind of code


def test_code_with_graphs_of_its_own_is_left_alone() -> None:
    model = Tables().eval()
    model.compile(backend=halving)
    graphs = Graphs(torch.device("cpu"), True, rerun)
    with mock.patch.object(compiling, "find_compiled", lambda module: [Compiled("", {"mode": "reduce-overhead"})]):
        for _ in range(5):
            run(graphs, model, torch.ones(4))
    assert graphs.captured == 0 and "CUDA graphs of its own" in (graphs.failure or "")


def test_a_dropped_pipeline_is_freed() -> None:
    """PyTorch knows the clock of compilations, and must not know the denoiser by it."""
    pipe = TINY["qwen_image"].build()
    denoiser = weakref.ref(pipe.transformer)
    handle = cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1, compile=True, compile_options=EAGER)
    del pipe, handle
    gc.collect()
    assert denoiser() is None


def test_a_compilation_that_is_refused_leaves_the_weights() -> None:
    pipe = TINY["sd15"].build()
    before = [weight.stride() for weight in pipe.unet.parameters()]
    with pytest.raises(RuntimeError, match="bogus"):
        cfg_parallel.enable_cfg_parallel(pipe, **CPUS, compile=True, compile_options={"mode": "bogus"})
    assert [weight.stride() for weight in pipe.unet.parameters()] == before
    assert not is_compiled(pipe.unet)


def test_the_scheduler_of_a_compiled_denoiser_is_seen_through() -> None:
    pipe = TINY["qwen_image"].build()
    with cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1, compile=True, compile_options=EAGER):
        assert hasattr(type(pipe.scheduler), "_cfg_parallel_scheduler")


# prepare=


def backend_of(module: torch.nn.Module) -> Any:
    return next(sub.processor._attention_backend for sub in module.modules() if hasattr(sub, "processor"))  # type: ignore[union-attr]


def scale_once(module: Any, factor: float) -> None:
    """Prepares a denoiser so that it shows, and leaves alone what is done."""
    if not hasattr(module, "scaled_by"):
        with torch.no_grad():
            module.proj_out.weight.mul_(factor)
        module.scaled_by = factor


def patch_the_library(module: Any) -> None:
    """What is no part of the denoiser has to be done in every process."""
    torch.nn.functional.gelu = lambda x, approximate="none": torch.relu(x)  # type: ignore[assignment]


def test_prepare_runs_everywhere_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY["qwen_image"]
    plain, pipe = tiny.build(), tiny.build()
    unprepared = generate(plain, tiny.inputs())
    scale_once(plain.transformer, 0.5)
    expected = generate(plain, tiny.inputs())
    assert not torch.equal(unprepared, expected)
    with cfg_parallel.enable_cfg_parallel(pipe, **CPUS, prepare=functools.partial(scale_once, factor=0.5)):
        for _ in range(2):
            assert torch.equal(generate(pipe, tiny.inputs()), expected)
        with torch.no_grad():  # shipped again, as it is by now
            for each in (plain, pipe):
                each.transformer.proj_out.weight.add_(0.01)
        assert torch.equal(generate(pipe, tiny.inputs()), generate(plain, tiny.inputs()))
        replaced = tiny.build().transformer
        pipe.transformer = replaced
        assert torch.equal(generate(pipe, tiny.inputs()), expected)
        assert replaced.scaled_by == 0.5

    patched, gelu = tiny.build(), torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", gelu)  # put back at the end
    with cfg_parallel.enable_cfg_parallel(patched, **CPUS, prepare=patch_the_library):
        got = [generate(patched, tiny.inputs()) for _ in range(2)]
    one_device = generate(tiny.build(), tiny.inputs())
    assert all(torch.equal(image, one_device) for image in got)
    assert not torch.equal(one_device, unprepared)


def test_a_prepare_that_cannot_be_repeated() -> None:
    def prepare(module: Any) -> None:
        if hasattr(module, "prepared"):
            raise ValueError("it is prepared already")
        module.prepared = True

    with pytest.raises(
        cfg_parallel.CfgParallelError, match=r"prepare raised ValueError: it is prepared already.*leave alone what is"
    ):
        cfg_parallel.enable_cfg_parallel(TINY["qwen_image"].build(), **CPUS, prepare=prepare)


def test_a_prepare_that_cannot_travel() -> None:
    import threading

    lock = threading.Lock()

    def prepare(module: Any) -> None:
        with lock:
            pass

    with pytest.raises(ConfigurationError, match="prepare cannot be sent to the other processes"):
        cfg_parallel.enable_cfg_parallel(TINY["qwen_image"].build(), **CPUS, prepare=prepare)


def test_progress_is_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    tiny = TINY["qwen_image"]
    for disable in (True, False):
        torch.compiler.reset()
        pipe = tiny.build()
        pipe.set_progress_bar_config(disable=disable)
        with cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1, compile=True, compile_options=EAGER):
            generate(pipe, tiny.inputs())
            generate(pipe, tiny.inputs())
        shown = capfd.readouterr().err
        assert shown.count("cfg-parallel: compiling on cpu, once for each kind of call ...") == (not disable)
        assert shown.count("cfg-parallel: compiled in ") == (not disable)


COMPILED_BITS = """
import hashlib, sys; sys.path.insert(0, {tests!r})
import cfg_parallel
from tiny import TINY, generate
for name in ("qwen_image", "sd15"):
    pipe = TINY[name].build().to("cuda")
    with cfg_parallel.enable_cfg_parallel(pipe, cfg_parallel_size=1, compile=True, cuda_graphs=True):
        for _ in range(2):
            result = generate(pipe, TINY[name].inputs(num_inference_steps=6))
    print(hashlib.sha256(result.float().cpu().numpy().tobytes()).hexdigest())
"""


@pytest.mark.gpu
def test_every_process_compiles_the_same_bits(tmp_path: Path) -> None:
    """Each with kernels of its own, as on machines that share no cache."""
    script = COMPILED_BITS.format(tests=str(Path(__file__).parent))
    printed = []
    for folder in ("a", "b"):
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder), "TRITON_CACHE_DIR": str(tmp_path / folder / "t")}
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | caches, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout.split())
    assert len(printed[0]) == 2 and printed[0] == printed[1]
