"""A denoiser on the other side of a link: the same bits, and the settings that go with it."""

from __future__ import annotations

import functools
import gc
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models import attention_dispatch
from diffusers.utils.torch_utils import lru_cache_unless_export

import cfg_parallel
from cfg_parallel import numerics, replica
from cfg_parallel.errors import ConfigurationError, FollowerLostError
from cfg_parallel.link import Link
from cfg_parallel.replica import clear_method_caches, receive_replica, send_replica
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
