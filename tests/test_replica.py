"""A denoiser on the other side of a link: the same bits, and a fingerprint that changes when they would."""

from __future__ import annotations

import functools
import gc
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_layerwise_casting
from diffusers.models import attention_dispatch
from diffusers.utils.torch_utils import lru_cache_unless_export

import cfg_parallel
from cfg_parallel import numerics, replica
from cfg_parallel.errors import ConfigurationError, FollowerLostError
from cfg_parallel.link import Link
from cfg_parallel.replica import Hooks, Watch, clear_method_caches, fingerprint, receive_replica, send_replica
from reference import reference
from test_codec import Denoiser
from tiny import TINY, generate

CPU = torch.device("cpu")


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    ours, theirs = socket.socketpair()
    pair = Link(Connection(ours.detach()), CPU), Link(Connection(theirs.detach()), CPU)
    yield pair
    for link in pair:
        link.close()


def ship(links: tuple[Link, Link], module: torch.nn.Module, into: torch.nn.Module | None = None) -> torch.nn.Module:
    """As a follower does it: in a thread, with an error sent back as a message."""
    arrived: list[torch.nn.Module] = []

    def receive() -> None:
        header = links[1].read(10)
        try:
            arrived.append(receive_replica(links[1], header, into, timeout=10))
        except Exception as error:
            links[1].send({"kind": "error", "message": f"{type(error).__name__}: {error}", "traceback": ""})

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        send_replica(links[0], "transformer", module, timeout=10)
    finally:
        thread.join(20)
    return arrived[0]


def changed_by(module: torch.nn.Module, change: Callable[[], Any]) -> bool:
    before = fingerprint(module)
    assert fingerprint(module) == before
    hash(before)
    change()
    return fingerprint(module) != before


# The replica.


def test_replica_computes_the_same(links: tuple[Link, Link]) -> None:
    module = Denoiser().eval()
    arrived = ship(links, module)
    x = torch.randn(2, 3)
    assert arrived is not module and torch.equal(arrived(x), module(x))
    expected = module(x)
    with torch.no_grad():
        module.first.weight.zero_()
    assert torch.equal(arrived(x), expected)


@pytest.mark.parametrize("name", ["qwen_image", "sd15"])
def test_replica_of_a_diffusers_model(links: tuple[Link, Link], name: str) -> None:
    model = getattr(TINY[name].build(), TINY[name].denoiser)
    arrived = ship(links, model)
    assert type(arrived) is type(model) and arrived.config == model.config and not arrived.training
    theirs = arrived.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(theirs[key], value) and theirs[key].stride() == value.stride()
        assert theirs[key].data_ptr() != value.data_ptr() or not value.numel()
    assert [p.requires_grad for p in arrived.parameters()] == [p.requires_grad for p in model.parameters()]
    assert arrived.dtype == model.dtype and arrived.device == model.device


def test_weights_in_many_messages(links: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "_CHUNK", 100)
    module = Denoiser().eval()
    arrived = ship(links, module)
    assert all(torch.equal(arrived.state_dict()[key], value) for key, value in module.state_dict().items())
    assert arrived.first.weight is arrived.second.weight


def test_module_without_tensors(links: tuple[Link, Link]) -> None:
    assert type(ship(links, torch.nn.Identity())) is torch.nn.Identity


def test_module_of_awkward_tensors(links: tuple[Link, Link]) -> None:
    module = torch.nn.Module()
    module.register_buffer("empty", torch.empty(0, 3))
    module.register_buffer("scalar", torch.tensor(3, dtype=torch.int8))
    module.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
    module.register_buffer("float8", torch.randn(4).to(torch.float8_e4m3fn))
    module.register_buffer("expanded", torch.randn(1, 3).expand(4, 3))
    module.register_buffer("strided", torch.randn(4, 6)[:, ::2])
    module.low = torch.nn.Parameter(torch.randn(3).half(), requires_grad=False)
    arrived = ship(links, module)
    for key, value in module.state_dict().items():
        theirs = arrived.state_dict()[key]
        assert theirs.dtype == value.dtype and theirs.shape == value.shape
        assert torch.equal(theirs.cfloat(), value.cfloat())  # float8 has no `equal`


def test_into_a_module_that_is_here_already(links: tuple[Link, Link]) -> None:
    """Under torchrun each rank has loaded the model: its weights are overwritten, the object stays."""
    module, own = Denoiser().eval(), Denoiser().eval()
    parameters = dict(own.named_parameters())
    assert ship(links, module, into=own) is own
    assert all(own.get_parameter(name) is parameter for name, parameter in parameters.items())
    x = torch.randn(2, 3)
    assert torch.equal(own(x), module(x))


def test_into_tensors_with_gaps(links: tuple[Link, Link]) -> None:
    """Not dense, so that there is no one stretch of memory to receive into."""

    def build(seed: int) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.randn(4, 8, generator=generator)[:, :4])
        module.register_buffer("table", torch.randn(4, 6, generator=generator)[:, ::2])
        return module

    module, own = build(0), build(1)
    ship(links, module, into=own)
    assert torch.equal(own.weight, module.weight) and torch.equal(own.table, module.table)


def test_into_another_model_is_refused(links: tuple[Link, Link]) -> None:
    with pytest.raises(RuntimeError, match=r"transformer.*same tensors on every rank"):
        ship(links, torch.nn.Linear(2, 2), into=torch.nn.Linear(2, 3))


def test_into_a_model_with_another_cache_is_refused(links: tuple[Link, Link]) -> None:
    module, own = Denoiser(), Denoiser()
    module._cache_config = FirstBlockCacheConfig(threshold=0.5)
    with pytest.raises(RuntimeError, match=r"same cache on every rank.*threshold=0.5.*None"):
        ship(links, module, into=own)


def test_attention_kernels_from_the_hub_are_loaded_with_a_replica(
    links: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(attention_dispatch, "_maybe_download_kernel_for_backend", loaded.append)
    transformer = TINY["wan"].build().transformer
    for module in transformer.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = "flash_hub"
    ship(links, transformer)
    assert loaded == [attention_dispatch.AttentionBackendName.FLASH_HUB]


def test_a_structure_that_cannot_be_built_is_an_error(links: tuple[Link, Link]) -> None:
    class Explosive(torch.nn.Module):
        def __setstate__(self, state: Any) -> None:
            raise ValueError("boom")

    with pytest.raises(RuntimeError, match="could not build the denoiser: ValueError: boom"):
        ship(links, Explosive())


def test_a_module_that_does_not_fit_on_the_follower(links: tuple[Link, Link]) -> None:
    links[1].send({"kind": "error", "message": "OutOfMemoryError: CUDA out of memory."})
    with pytest.raises(ConfigurationError, match=r"follower's GPU \(OutOfMemoryError.*enable_layerwise_casting"):
        send_replica(links[0], "transformer", torch.nn.Linear(2, 2), timeout=2)


def test_peer_that_leaves_is_an_error(links: tuple[Link, Link]) -> None:
    links[1].close()
    with pytest.raises(FollowerLostError):
        send_replica(links[0], "transformer", torch.nn.Linear(2, 2), timeout=2)


def test_an_unexpected_answer_is_an_error(links: tuple[Link, Link]) -> None:
    links[1].send({"kind": "done"})
    with pytest.raises(RuntimeError, match=r"'allocated'.*'done'"):
        send_replica(links[0], "transformer", torch.nn.Linear(2, 2), timeout=2)


# The fingerprint.


class Lora(torch.nn.Module):
    """As peft has it: weights, and settings beside them that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(4, 4)
        self.down = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2)})
        self.scaling = {"default": 1.0}
        self.active = ["default"]
        self.merged: list[str] = []
        self.disabled = False
        self.table = torch.ones(4)
        self.options = {"nested": {"values": [1, (2, 3)]}}
        self.first = torch.nn.SiLU()
        self.register_module("second", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def other_forward(x: torch.Tensor) -> torch.Tensor:
    return x


@torch.no_grad()
def in_place(module: Lora) -> None:
    module.base.weight.mul_(2)


class Parts(torch.Tensor):
    """Made of several tensors, as quantized weights are."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Parts:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data: torch.Tensor) -> None:
        self.data_part = data

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_part"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(arg.data_part if isinstance(arg, Parts) else arg for arg in args), **(kwargs or {}))


def quantized(module: Lora) -> None:
    module.base._parameters["weight"] = Parts(module.base.weight.detach())  # type: ignore[assignment]


def cast_for_each_forward(module: Lora) -> None:
    apply_layerwise_casting(module, storage_dtype=torch.float64, compute_dtype=torch.float32)


def of_inference(module: Lora) -> None:
    with torch.inference_mode():
        module.register_buffer("cache", torch.ones(2))


CHANGES: dict[str, Callable[[Lora], Any]] = {
    "in place": in_place,
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "new parameter": lambda m: setattr(m.base, "weight", torch.nn.Parameter(torch.randn(4, 4))),
    "removed parameter": lambda m: setattr(m.base, "bias", None),
    "data": lambda m: setattr(m.base.weight, "data", torch.zeros(4, 4)),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to dtype and back": lambda m: m.to(torch.float64).to(torch.float32),
    "half": lambda m: m.half(),
    "new module": lambda m: m.down.update({"second": torch.nn.Linear(4, 2)}),
    "removed module": lambda m: m.down.pop("default"),
    "replaced module": lambda m: setattr(m, "base", torch.nn.Linear(4, 4)),
    "replaced by another class": lambda m: setattr(m, "base", torch.nn.Identity()),
    "replaced without weights": lambda m: setattr(m, "first", torch.nn.SiLU()),
    "in another place": lambda m: m._modules.update(first=None, second=m.first),
    "scaling": lambda m: m.scaling.update(default=0.5),
    "adapter": lambda m: m.active.append("second"),
    "merged": lambda m: m.merged.append("default"),
    "flag": lambda m: setattr(m, "disabled", True),
    "nested": lambda m: m.options["nested"]["values"].append(4),
    "eval": lambda m: m.eval(),
    "buffer": lambda m: m.register_buffer("b", torch.ones(1)),
    "hook": lambda m: m.base.register_forward_hook(lambda *args: None),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "forward": lambda m: setattr(m, "forward", other_forward),
    "inner forward": lambda m: setattr(m.base, "forward", other_forward),
    "processor": lambda m: setattr(m, "processor", object()),
    "plain tensor": lambda m: m.table.mul_(2),
    "plain tensor replaced": lambda m: setattr(m, "table", torch.ones(4) * 2),
    "compiled": lambda m: m.compile(backend="eager"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprint_changes(name: str) -> None:
    module = Lora()
    assert changed_by(module, lambda: CHANGES[name](module))


@pytest.mark.parametrize("name", CHANGES)
def test_a_watch_sees_what_a_fingerprint_sees(name: str) -> None:
    module = Lora()
    watch = Watch(module)
    module(torch.ones(4))
    module.state_dict()
    assert watch.same() and not watch.changed()
    CHANGES[name](module)
    assert not watch.same()


@pytest.mark.parametrize("spoil", [quantized, cast_for_each_forward, of_inference])
def test_a_watch_that_cannot_tell(spoil: Callable[[Lora], Any]) -> None:
    module = Lora()
    spoil(module)
    watch = Watch(module)
    assert not watch.can_tell and not watch.same() and not watch.changed()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", TINY)
def test_no_fingerprint_where_nothing_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer has thousands of modules, and some models make twenty pictures a second."""
    tiny = TINY[name]
    pipe = tiny.build()
    with cfg_parallel.enable_cfg_parallel(pipe):
        for _ in range(2):
            generate(pipe, tiny.inputs())
        monkeypatch.setattr("cfg_parallel.enable.fingerprint", lambda module: pytest.fail("it was asked for"))
        generate(pipe, tiny.inputs())


def test_fingerprint_sees_a_tensor_in_the_place_of_a_freed_one() -> None:
    """A LoRA unloaded and another loaded: Python gives the new objects the addresses of the old ones."""
    module = torch.nn.Linear(8, 8)
    seen = fingerprint(module)
    for _ in range(2000):
        shape = module.weight.shape
        del module.weight
        module.weight = torch.nn.Parameter(torch.empty(shape))
        if fingerprint(module) == seen:
            pytest.fail("another parameter has the fingerprint of the first one")


def test_fingerprint_of_a_processor_with_settings() -> None:
    """An attention processor is a plain object: its scale is a setting of the model as well."""

    class Processor:
        scale = 1.0

    module = torch.nn.Linear(2, 2)
    module.processor = Processor()
    assert changed_by(module, lambda: setattr(module.processor, "scale", 0.5))


def test_fingerprint_of_inference_tensors() -> None:
    """A model loaded, or cast, under `torch.inference_mode()`: its tensors have no version counter."""
    with torch.inference_mode():
        module = torch.nn.Linear(2, 2)
    assert fingerprint(module) == fingerprint(module)
    module = torch.nn.Linear(2, 2)
    with torch.inference_mode():
        assert changed_by(module, lambda: module.register_buffer("cache", torch.ones(2)))
    assert fingerprint(module) == fingerprint(module)


def test_reading_changes_nothing() -> None:
    module = Lora()

    def read() -> None:
        module.state_dict()
        list(module.named_parameters())
        str(module)
        module.requires_grad_(True)
        with torch.no_grad():
            module(torch.ones(1, 4))

    assert not changed_by(module, read)


@pytest.mark.parametrize("name", ["qwen_image", "flux", "wan", "sd15", "sdxl", "sd3"])
def test_a_generation_changes_nothing(name: str) -> None:
    """Else every generation would ship the weights again."""
    tiny = TINY[name]
    pipe = tiny.build()
    generate(pipe, tiny.inputs())  # some models make tables on their first forward
    assert not changed_by(getattr(pipe, tiny.denoiser), lambda: generate(pipe, tiny.inputs(seed=1)))


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("generation", [0, 1], ids=["that one", "the next one"])
def test_weights_changed_during_a_generation(generation: int) -> None:
    """By a callback, a LoRA scale that follows a schedule for one: it counts in that generation, and in the next."""
    tiny = TINY["qwen_image"]

    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            with torch.no_grad():
                next(pipe.transformer.parameters()).mul_(1.5)
        return {}

    plain, pipe = tiny.build(), tiny.build()
    runs = [{"callback_on_step_end": on_step}, {}]
    expected = [reference(tiny, plain, tiny.inputs(**run)) for run in runs]
    with cfg_parallel.enable_cfg_parallel(pipe, devices=["cpu", "cpu"]):
        got = [generate(pipe, tiny.inputs(**run)) for run in runs]
    assert torch.equal(got[generation], expected[generation])


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("how", ["whole", "part"])
def test_latents_written_in_place_reach_the_follower(how: str) -> None:
    """The same tensor object in every step, overwritten by the scheduler: it is resident only while it is unchanged."""
    tiny = TINY["qwen_image"]

    def with_in_place_scheduler() -> Any:
        pipe = tiny.build()

        class InPlace(type(pipe.scheduler)):  # type: ignore[misc]
            def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
                result = super().step(model_output, timestep, sample, return_dict=False)[0]
                if self.step_index > 1:
                    if how == "whole":
                        sample.copy_(result)
                    else:
                        sample[:, :5] = result[:, :5]
                    return (sample,)
                return (result,)

        pipe.scheduler = InPlace.from_config(pipe.scheduler.config)
        return pipe

    inputs = {"num_inference_steps": 5}
    expected = reference(tiny, with_in_place_scheduler(), tiny.inputs(**inputs))
    pipe = with_in_place_scheduler()
    with cfg_parallel.enable_cfg_parallel(pipe, devices=["cpu", "cpu"]) as handle:
        assert torch.equal(generate(pipe, tiny.inputs(**inputs)), expected)
        assert handle.report.calls_shipped >= 4


# The settings that go with it.


@pytest.fixture
def restored() -> Iterator[None]:
    before = numerics.capture()
    yield
    numerics.apply(before)


@pytest.mark.usefixtures("restored")
def test_settings_are_carried_over() -> None:
    torch.backends.cuda.matmul.allow_tf32 = not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cuda.enable_flash_sdp(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    attention_dispatch._AttentionBackendRegistry.set_active_backend("_native_math")
    wanted = numerics.capture()
    assert wanted["attention_backend"] == "_native_math"
    torch.backends.cuda.matmul.allow_tf32 = not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cuda.enable_flash_sdp(True)
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    attention_dispatch._AttentionBackendRegistry.set_active_backend("native")
    assert numerics.capture() != wanted
    numerics.apply(wanted)
    assert numerics.capture() == wanted


def test_settings_by_the_new_names() -> None:
    """PyTorch refuses to read the old names of TF32 once the new ones were used, for good: in a process of its own."""
    script = """
import torch
from cfg_parallel import numerics
torch.backends.cuda.matmul.fp32_precision = "tf32"
wanted = numerics.capture()
torch.backends.cuda.matmul.fp32_precision = "ieee"
numerics.apply(wanted)
print(torch.backends.cuda.matmul.fp32_precision)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "tf32", result.stderr


# Hooks between two calls.


def test_hooks_notices_what_a_guider_or_pag_does() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.processor: Any = object()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    module = torch.nn.Sequential(Attention(), torch.nn.Linear(2, 2))
    hooks = Hooks(module)
    assert not hooks.changed()
    plain = module[0].processor
    module[0].processor = object()
    assert hooks.changed()
    module[0].processor = plain
    assert not hooks.changed()
    for register in (module[1].register_forward_hook, module[1].register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert hooks.changed()
        handle.remove()
        assert not hooks.changed()
    registry = HookRegistry.check_if_exists_or_initialize(module[1])
    registry.register_hook(ModelHook(), "skip")
    assert hooks.changed()
    registry.remove_hook("skip")
    assert not hooks.changed()  # the class's own forward is left on the object
    module[1].table = torch.ones(2)  # as a model does that makes something once
    assert not hooks.changed()


class Table(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    @functools.cache  # noqa: B019
    def table(self) -> torch.Tensor:
        return self.weight.detach() * 2

    @lru_cache_unless_export(maxsize=None)
    def other(self) -> torch.Tensor:
        return self.weight.detach() * 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table() + self.other()


def test_a_replica_that_was_replaced_is_freed() -> None:
    """Though its classes have caches around methods, as diffusers' rotary embeddings do."""
    module = torch.nn.Sequential(Table())
    expected = module(torch.ones(4))
    gone = weakref.ref(module[0])
    clear_method_caches(module)
    assert torch.equal(module(torch.ones(4)), expected)
    clear_method_caches(module)
    del module
    gc.collect()
    assert gone() is None
