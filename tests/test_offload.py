"""Models that do not stay on their GPU: offloaded whole, by groups of layers or one by one; weights kept in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cfg_parallel
from cfg_parallel import ConfigurationError, enable_cfg_parallel
from cfg_parallel.changes import fingerprint
from cfg_parallel.discovery import device_of
from cfg_parallel.graphs import Graphs
from cfg_parallel.offload import Placeholder, group_offload
from reference import reference
from scripts import PREAMBLE, torchrun
from test_graphs import rerun, run
from tiny import TINY, Tiny, generate

pytest.importorskip("accelerate", reason="diffusers offloads with accelerate")
pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("forked")]

QWEN = TINY["qwen_image"]
CPU = ["cpu", "cpu"]
accelerate_hooks = pytest.importorskip("accelerate.hooks")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.nn.Module]]:
    """Every module that accelerate sends to the CPU or brings to the GPU, in order."""
    modules: list[torch.nn.Module] = []

    class Spy(accelerate_hooks.CpuOffload):  # type: ignore[misc]
        def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
            modules.append(module)
            return super().init_hook(module)

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            modules.append(module)
            return super().pre_forward(module, *args, **kwargs)

    monkeypatch.setattr("accelerate.big_modeling.CpuOffload", Spy)
    yield modules


# The whole of the other models (enable_model_cpu_offload).


@pytest.mark.parametrize("when", ["before", "live"])
@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_model_offload(name: str, when: str, moved: list[torch.nn.Module]) -> None:
    """The denoiser stays where it is, and all else is as without cfg-parallel."""
    tiny = TINY[name]
    plain, pipe = tiny.build(), tiny.build()
    denoiser = getattr(pipe, tiny.denoiser)
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
        assert denoiser in moved
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        if when == "live":
            pipe.enable_model_cpu_offload(device="cpu")
        del moved[:]
        for seed in range(2):
            got = generate(pipe, tiny.inputs(seed), seed)
            assert torch.equal(got, reference(tiny, plain, tiny.inputs(seed), seed=seed))
            assert handle.report.parallel_steps == handle.report.steps
        shipped = handle.report.replica_bytes
        generate(pipe, tiny.inputs())
        assert handle.report.replica_bytes == shipped
        assert denoiser not in moved and getattr(pipe, tiny.denoiser) not in moved
        assert pipe.text_encoder in moved and pipe.vae in moved
        assert not any(isinstance(component, Placeholder) for component in pipe.components.values())
    del moved[:]
    assert torch.equal(generate(pipe, tiny.inputs()), generate(plain, tiny.inputs()))  # offloaded as before
    assert denoiser in moved and getattr(pipe, tiny.denoiser) is denoiser
    assert [hook.model for hook in pipe._all_hooks].count(denoiser) == 1


def test_model_offload_leaves_nothing_behind() -> None:
    plain, pipe = QWEN.build(), QWEN.build()
    for each in (plain, pipe):
        each.enable_model_cpu_offload(device="cpu")
        generate(each, QWEN.inputs())
    with enable_cfg_parallel(pipe, devices=CPU):
        generate(pipe, QWEN.inputs())
    assert type(pipe) is type(plain)
    assert set(pipe.__dict__) == set(plain.__dict__)
    for name in ("transformer", "text_encoder", "vae"):
        assert set(getattr(pipe, name).__dict__) == set(getattr(plain, name).__dict__)
        assert [type(h.hook) for h in pipe._all_hooks] == [type(h.hook) for h in plain._all_hooks]


def test_two_denoisers_and_an_order_in_which_the_first_is_before_the_other() -> None:
    pipe = TINY["wan"].build()
    pipe.register_modules(transformer_2=TINY["wan"].build().transformer)
    pipe.enable_model_cpu_offload(device="cpu")
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        order = [hook.model for hook in pipe._all_hooks]
        assert [type(model) for model in order][1:3] == [Placeholder, Placeholder]
        assert order[0] is pipe.text_encoder and order[3] is pipe.vae
        assert order[1:3] == handle._placeholders


class Elsewhere(torch.nn.Linear):
    """On a device that is not the CPU, as far as accelerate can see."""

    def __init__(self) -> None:
        super().__init__(2, 2, device="meta")
        self.moves: list[Any] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moves.append(args[0])
        return self


def test_a_placeholder_sends_the_model_before_it_away() -> None:
    """Else the text encoder would keep its memory while the denoiser computes."""
    from accelerate import cpu_offload_with_hook

    before, placeholder, after = Elsewhere(), Placeholder(), torch.nn.Identity()
    after.weight = torch.nn.Parameter(torch.ones(1))
    _, first = cpu_offload_with_hook(before, "meta")
    _, second = cpu_offload_with_hook(placeholder, "meta", prev_module_hook=first)
    del before.moves[:]
    placeholder()
    assert before.moves == ["cpu"]
    assert placeholder.weight.device.type == "cpu"  # it never seems to need to be sent away itself
    cpu_offload_with_hook(after, "cpu", prev_module_hook=second)
    after(torch.ones(1))
    assert before.moves == ["cpu"]


def test_the_text_encoder_goes_before_the_first_step() -> None:
    pipe = QWEN.build()
    calls: list[str] = []
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        pipe.enable_model_cpu_offload(device="cpu")
        generate(pipe, QWEN.inputs())  # a new placeholder from here on
        (placeholder,) = handle._placeholders
        placeholder.forward = lambda: calls.append("away")
        generate(pipe, QWEN.inputs())
        assert calls == ["away"] * 3  # before each step; accelerate sees that there is nothing to do
        pipe.remove_all_hooks()
        generate(pipe, QWEN.inputs())
        assert len(calls) == 3


def test_a_denoiser_with_the_hooks_of_another_pipeline_or_a_new_one() -> None:
    plain, pipe = QWEN.build(), QWEN.build()
    with enable_cfg_parallel(pipe, devices=CPU):
        pipe.enable_model_cpu_offload(device="cpu")
        generate(pipe, QWEN.inputs())
        pipe.transformer = QWEN.build().transformer
        with torch.no_grad():
            for each in (pipe, plain):
                each.transformer.proj_out.weight.mul_(1.5)
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))
        pipe.to("cpu")  # what diffusers advises on an offloaded pipeline
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))


def test_offloading_to_another_gpu_is_refused() -> None:
    pipe = QWEN.build()
    with enable_cfg_parallel(pipe, devices=CPU):
        for where in ({"gpu_id": 1}, {"device": "cuda:1"}, {"device": "cuda"}):
            with pytest.raises(ConfigurationError, match=r"the GPU of its denoiser, cpu.*disable_cfg_parallel"):
                pipe.enable_model_cpu_offload(**where)
        pipe.enable_model_cpu_offload()


def test_a_failure_to_enable_gives_the_offloading_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = QWEN.build()
    pipe.enable_model_cpu_offload(device="cpu")

    def fail(*args: Any) -> Any:
        raise cfg_parallel.FollowerLostError("no process")

    monkeypatch.setattr("cfg_parallel.enable.RemoteFollower.start", fail)
    with pytest.raises(cfg_parallel.FollowerLostError):
        enable_cfg_parallel(pipe, devices=CPU)
    assert pipe.transformer in [hook.model for hook in pipe._all_hooks]
    assert hasattr(pipe.transformer, "_hf_hook")


def test_a_denoiser_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = QWEN.build()
    pipe.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr("cfg_parallel.enable.device_of", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr("cfg_parallel.enable.choose_devices", lambda *_: [torch.device("cuda", 0)])
    to = type(pipe.transformer).to

    def full(self: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.device(device).type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(self, device, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "to", full)
    with pytest.raises(ConfigurationError, match=r"'transformer' \(.* GB\) does not fit on cuda:0.*layerwise_casting"):
        enable_cfg_parallel(pipe, cfg_parallel_size=1)
    assert pipe.transformer in [hook.model for hook in pipe._all_hooks]


# Weights in 8 bits (enable_layerwise_casting).


def casts(tiny: Tiny, storage: torch.dtype = torch.float8_e4m3fn) -> Any:
    pipe = tiny.build()
    getattr(pipe, tiny.denoiser).enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    return pipe


@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_layerwise_casting(name: str) -> None:
    tiny = TINY[name]
    full, plain, pipe = tiny.build(), casts(tiny), casts(tiny)
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        shipped = set()
        for seed in range(3):
            got = generate(pipe, tiny.inputs(seed), seed)
            assert torch.equal(got, reference(tiny, plain, tiny.inputs(seed), seed=seed))
            assert handle.report.parallel_steps == handle.report.steps
            shipped.add(handle.report.replica_bytes)
        assert len(shipped) == 1  # nothing looks as if it had changed
        assert not torch.equal(got, generate(full, tiny.inputs(2), 2))


@torch.no_grad()
def write_in_place(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(2)


def replace(pipe: Any) -> None:
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def load(pipe: Any) -> None:
    state = pipe.transformer.state_dict()
    key = next(key for key in state if key.endswith("to_q.weight"))
    pipe.transformer.load_state_dict(state | {key: state[key] * 2})


def add_lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), adapter_name="default")
    for path, weight in pipe.transformer.named_parameters():
        if "lora_" in path:
            torch.nn.init.constant_(weight, 0.1)


@pytest.mark.parametrize("grouped", [False, True], ids=["casting", "casting and group offload"])
@pytest.mark.parametrize("change", [write_in_place, replace, load, add_lora])
def test_real_changes_are_noticed(change: Callable[[Any], None], grouped: bool) -> None:
    """Though the memory of the weights, which every forward changes, says nothing."""
    tiny = TINY["qwen_image"]
    plain, pipe = (casts(tiny, torch.bfloat16) for _ in range(2))
    for each in (plain, pipe) if grouped else ():
        each.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        first = generate(pipe, tiny.inputs())
        shipped = handle.report.replica_bytes
        for each in (plain, pipe):
            change(each)
        got = generate(pipe, tiny.inputs())
        assert torch.equal(got, generate(plain, tiny.inputs()))
        assert not torch.equal(got, first)
        assert handle.report.replica_bytes > shipped
        shipped = handle.report.replica_bytes
        generate(pipe, tiny.inputs())
        assert handle.report.replica_bytes == shipped


def test_casting_has_no_graph() -> None:
    """It would read the memory where the weights lay when it was captured."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    from diffusers.hooks import apply_layerwise_casting

    module = Model()
    apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32)
    graphs = Graphs(torch.device("cpu"), True, rerun)
    seen = fingerprint(module)
    with torch.no_grad():
        for _ in range(4):
            run(graphs, module, torch.randn(2, 8))
    assert fingerprint(module) == seen
    assert graphs.replayed == 0 and "layerwise casting" in (graphs.failure or "")


# Groups of layers (enable_group_offload).


LEVELS: list[dict[str, Any]] = [
    {"offload_type": "leaf_level"},
    {"offload_type": "block_level", "num_blocks_per_group": 1},
]


@pytest.mark.parametrize("level", LEVELS, ids=["leaf", "block"])
@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_group_offload_of_the_denoiser(name: str, level: dict[str, Any]) -> None:
    tiny = TINY[name]
    plain, pipe = tiny.build(), tiny.build()
    denoiser = getattr(pipe, tiny.denoiser)
    denoiser.enable_group_offload(torch.device("cpu"), **level)
    before = set(denoiser.__dict__)
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        shipped = set()
        for seed in range(2):
            got = generate(pipe, tiny.inputs(seed), seed)
            assert torch.equal(got, reference(tiny, plain, tiny.inputs(seed), seed=seed))
            assert handle.report.parallel_steps == handle.report.steps
            shipped.add(handle.report.replica_bytes)
        assert len(shipped) == 1
    assert set(denoiser.__dict__) >= before


@pytest.mark.parametrize("level", LEVELS, ids=["leaf", "block"])
def test_group_offload_while_enabled(level: dict[str, Any]) -> None:
    plain, pipe = QWEN.build(), QWEN.build()
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        generate(pipe, QWEN.inputs())
        pipe.transformer.enable_group_offload(torch.device("cpu"), **level)
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))
        assert handle.report.parallel_steps == 3


def test_group_offload_of_the_other_models() -> None:
    from diffusers.hooks import apply_group_offloading

    plain, pipe = QWEN.build(), QWEN.build()
    apply_group_offloading(pipe.text_encoder, torch.device("cpu"), offload_type="leaf_level")
    pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        inputs = {"output_type": "pt"}
        assert torch.equal(generate(pipe, QWEN.inputs(**inputs)), generate(plain, QWEN.inputs(**inputs)))
        assert handle.report.parallel_steps == 3


def test_group_offload_to_disk_is_refused(tmp_path: Path) -> None:
    pipe = QWEN.build()
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    with pytest.raises(ConfigurationError, match=r"offloaded to disk.*offload_to_disk_path"):
        enable_cfg_parallel(pipe, devices=CPU)


def test_group_offload_and_model_offload_are_not_mixed() -> None:
    pipe = QWEN.build()
    with enable_cfg_parallel(pipe, devices=CPU):
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        with pytest.raises(ConfigurationError, match=r"'transformer' is under group offload"):
            pipe.enable_model_cpu_offload(device="cpu")
        assert generate(pipe, QWEN.inputs()) is not None


def test_the_device_of_a_group_offloaded_denoiser() -> None:
    """Where its layers are brought for a forward, not where they lie."""
    pipe = QWEN.build()
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    group_offload(pipe.transformer).onload_device = torch.device("cuda", 1)
    assert device_of(pipe, {"transformer": pipe.transformer}) == torch.device("cuda", 1)


# One by one, and on several devices.


def test_sequential_offload_names_the_way_out() -> None:
    pipe = QWEN.build()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ConfigurationError, match=r"one by one \(enable_sequential_cpu_offload.*model_cpu_offload\(\)"):
        enable_cfg_parallel(pipe, devices=CPU)
    pipe = QWEN.build()
    with enable_cfg_parallel(pipe, devices=CPU):
        pipe.enable_sequential_cpu_offload(device="cpu")
        with pytest.raises(ConfigurationError, match="one by one"):
            generate(pipe, QWEN.inputs())


def test_device_map_names_the_way_out() -> None:
    pipe = QWEN.build()
    pipe.hf_device_map = {"text_encoder": 1, "transformer": 0, "vae": 0}
    with pytest.raises(ConfigurationError, match=r"text_encoder: 1, transformer: 0, vae: 0.*reset_device_map\(\)"):
        enable_cfg_parallel(pipe, devices=CPU)
    pipe.hf_device_map = {"text_encoder": 0, "transformer": 0, "vae": 0}  # all on one
    device_of(pipe, {"transformer": pipe.transformer})


def test_a_denoiser_dispatched_by_accelerate() -> None:
    """Its hooks bring the arguments to the leader's GPU; the replica must not have them."""
    from accelerate import dispatch_model

    plain, pipe = QWEN.build(), QWEN.build()
    dispatch_model(pipe.transformer, {"": "cpu"}, force_hooks=True)
    assert hasattr(pipe.transformer, "_hf_hook")
    with enable_cfg_parallel(pipe, devices=CPU) as handle:
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))
        assert handle.report.parallel_steps == 3
    assert hasattr(pipe.transformer, "_hf_hook")


@pytest.mark.thorough
def test_torchrun(tmp_path: Path) -> None:
    """Each rank takes its denoiser out of the offloading."""
    script = tmp_path / "script.py"
    script.write_text(
        PREAMBLE
        + f"""
rank = int(os.environ["RANK"])
expected = generate(pipe, tiny.inputs())
pipe.enable_model_cpu_offload(device="cpu")
with cfg_parallel.enable_cfg_parallel(pipe) as handle:
    for _ in range(2):
        assert torch.equal(generate(pipe, tiny.inputs()), expected)
    assert not hasattr(pipe.transformer, "_hf_hook")
    assert rank or handle.report.parallel_steps == 3
assert hasattr(pipe.transformer, "_hf_hook")
open({str(tmp_path)!r} + f"/done{{rank}}", "w").close()
"""
    )
    result = torchrun(script)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


# On GPUs, where things do move.


def on_gpu(tiny: Tiny) -> Any:
    return tiny.build().to("cuda", torch.bfloat16)


def where(module: torch.nn.Module) -> str:
    return str(next(module.parameters()).device)


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("when", ["before", "live"])
@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_model_offload_on_gpus(name: str, when: str) -> None:
    tiny = TINY[name]
    plain, pipe = on_gpu(tiny), on_gpu(tiny)
    places: list[tuple[str, str]] = []

    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        places.append((where(pipe.text_encoder), where(getattr(pipe, tiny.denoiser))))
        return {}

    if when == "before":
        pipe.enable_model_cpu_offload()
        assert where(getattr(pipe, tiny.denoiser)) == "cpu"
    with enable_cfg_parallel(pipe, cuda_graphs=False, follower_timeout=60) as handle:
        if when == "live":
            pipe.enable_model_cpu_offload()
        memory = next(getattr(pipe, tiny.denoiser).parameters()).data_ptr()
        shipped = []
        for seed in range(3):
            got = generate(pipe, tiny.inputs(seed, callback_on_step_end=on_step), seed)
            assert torch.equal(got, reference(tiny, plain, tiny.inputs(seed), seed=seed))
            assert got.device.type == "cuda"
            assert handle.report.parallel_steps == handle.report.steps
            shipped.append(handle.report.replica_bytes)
            assert where(pipe.text_encoder) == where(pipe.vae) == "cpu"
        assert set(places) == {("cpu", "cuda:0")}  # the text encoder was gone by the first step
        assert next(getattr(pipe, tiny.denoiser).parameters()).data_ptr() == memory  # it has not travelled
        assert shipped[1] == shipped[2]
        picture = generate(pipe, tiny.inputs(output_type="pt"))
        assert torch.equal(picture, reference(tiny, plain, tiny.inputs(output_type="pt")))
    assert where(getattr(pipe, tiny.denoiser)) == "cpu"
    expected = generate(plain, tiny.inputs())
    assert torch.equal(generate(pipe, tiny.inputs()), expected)  # by diffusers alone
    assert where(getattr(pipe, tiny.denoiser)) == "cpu"


@pytest.mark.gpu(count=2)
def test_model_offload_with_cuda_graphs() -> None:
    plain, pipe = on_gpu(QWEN), on_gpu(QWEN)
    with enable_cfg_parallel(pipe, cuda_graphs=True, follower_timeout=60) as handle:
        pipe.enable_model_cpu_offload()
        for seed in range(3):
            expected = generate(plain, QWEN.inputs(seed, num_inference_steps=6), seed)
            assert torch.equal(generate(pipe, QWEN.inputs(seed, num_inference_steps=6), seed), expected)
        assert handle.report.graph_forwards == handle.report.calls_shipped + handle.report.calls_local


@pytest.mark.gpu(count=2)
def test_a_pipeline_that_is_moved() -> None:
    plain, pipe = on_gpu(QWEN), on_gpu(QWEN)
    expected = generate(plain, QWEN.inputs())
    with enable_cfg_parallel(pipe, cuda_graphs=False, follower_timeout=60):
        pipe.to("cpu")
        with pytest.raises(ConfigurationError, match="has moved from cuda:0 to cpu"):
            generate(pipe, QWEN.inputs())
        pipe.to("cuda")
        assert torch.equal(generate(pipe, QWEN.inputs()), expected)
        pipe.enable_model_cpu_offload()
        pipe.to("cpu")  # what diffusers advises then
        assert torch.equal(generate(pipe, QWEN.inputs()), expected)
        assert where(pipe.transformer) == "cuda:0"


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_layerwise_casting_on_gpus(name: str) -> None:
    tiny = TINY[name]
    plain, pipe = on_gpu(tiny), on_gpu(tiny)
    for each in (plain, pipe):
        denoiser = getattr(each, tiny.denoiser)
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with enable_cfg_parallel(pipe, cuda_graphs=False, follower_timeout=60) as handle:
        shipped = []
        for seed in range(3):
            got = generate(pipe, tiny.inputs(seed), seed)
            assert torch.equal(got, reference(tiny, plain, tiny.inputs(seed), seed=seed))
            assert handle.report.parallel_steps == handle.report.steps
            shipped.append(handle.report.replica_bytes)
        assert shipped[1] == shipped[2]


@pytest.mark.gpu(count=2)
def test_layerwise_casting_has_no_cuda_graphs() -> None:
    plain, pipe = on_gpu(QWEN), on_gpu(QWEN)
    for each in (plain, pipe):
        each.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    expected = generate(plain, QWEN.inputs(num_inference_steps=6))
    with enable_cfg_parallel(pipe, cuda_graphs=True, follower_timeout=60) as handle:
        with pytest.warns(UserWarning, match="without CUDA graphs.*layerwise casting"):
            assert torch.equal(generate(pipe, QWEN.inputs(num_inference_steps=6)), expected)
        assert handle.report.graph_forwards == 0


GPU_LEVELS = [
    *LEVELS,
    {"offload_type": "leaf_level", "use_stream": True},
    {"offload_type": "leaf_level", "use_stream": True, "record_stream": True, "low_cpu_mem_usage": True},
    {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True},
]


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize(
    "level", GPU_LEVELS, ids=["leaf", "block", "leaf, stream", "leaf, on the fly", "block, stream"]
)
def test_group_offload_on_gpus(level: dict[str, Any]) -> None:
    plain, pipe = on_gpu(QWEN), on_gpu(QWEN)
    pipe.transformer.enable_group_offload(torch.device("cuda"), **level)
    assert where(pipe.transformer) == "cpu"
    with enable_cfg_parallel(pipe, cuda_graphs=False, follower_timeout=60) as handle:
        assert handle.devices[0] == torch.device("cuda", 0)
        shipped = []
        for seed in range(3):
            got = generate(pipe, QWEN.inputs(seed), seed)
            assert torch.equal(got, generate(plain, QWEN.inputs(seed), seed))
            assert handle.report.parallel_steps == handle.report.steps
            shipped.append(handle.report.replica_bytes)
        assert shipped[1] == shipped[2]
        with torch.no_grad():
            for each in (plain, pipe):
                each.transformer.proj_out.weight.mul_(1.5)
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))
        assert handle.report.replica_bytes > shipped[2]


@pytest.mark.gpu(count=2)
def test_group_offload_of_a_text_encoder_on_gpus() -> None:
    from diffusers.hooks import apply_group_offloading

    plain, pipe = on_gpu(QWEN), on_gpu(QWEN)
    apply_group_offloading(pipe.text_encoder, torch.device("cuda"), offload_type="leaf_level")
    with enable_cfg_parallel(pipe, cuda_graphs=False, follower_timeout=60) as handle:
        assert torch.equal(generate(pipe, QWEN.inputs()), generate(plain, QWEN.inputs()))
        assert handle.report.parallel_steps == 3
