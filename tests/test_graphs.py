"""CUDA graphs: which calls get one, and that a replay is the forward. Off a GPU by a capture that runs the forward."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch.nn.attention.flex_attention import flex_attention

from cfg_parallel import graphs as graphs_module
from cfg_parallel.codec import encode_plain
from cfg_parallel.graphs import Graph, Graphs, UncapturableError

CPU = torch.device("cpu")
FIRST = "the first calls of a kind are eager"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def rerun(forward: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """A capture for CPUs: a replay runs the forward again and leaves its results where the first ones were."""
    body, results = forward()

    def replay() -> None:
        for place, value in zip(results, forward()[1], strict=True):
            place.copy_(value)

    return (body, results), replay


@dataclass
class Output:
    sample: torch.Tensor
    extra: tuple[Any, ...] = ()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor, timestep: Any = 1.0, prompt: torch.Tensor | None = None) -> Any:
        y = x @ self.weight * timestep
        return Output(y if prompt is None else y + prompt, (x.mean(), "name"))


def run(graphs: Graphs, module: torch.nn.Module, *args: Any, name: str = "unet", **kwargs: Any) -> Any:
    body, tensors = encode_plain((args, kwargs))
    return graphs.run(name, module, body, tensors)  # type: ignore[arg-type]


def same(a: Output, b: Output) -> bool:
    return torch.equal(a.sample, b.sample) and torch.equal(a.extra[0], b.extra[0]) and a.extra[1] == b.extra[1]


@pytest.fixture
def graphs() -> Graphs:
    return Graphs(CPU, True, rerun)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def warm(graphs: Graphs, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Up to the capture."""
    for _ in range(3):
        run(graphs, module, *args, **kwargs)


def test_the_third_call_of_a_kind_is_captured(graphs: Graphs, model: Model) -> None:
    prompt = torch.randn(4, 8)
    for _ in range(10):
        x = torch.randn(4, 8)
        assert same(run(graphs, model, x, torch.tensor(0.5), prompt=prompt), model(x, 0.5, prompt))
    assert graphs.counts() == {"replayed": 7, "captured": 1, "eager": {FIRST: 3}}


def test_results_are_not_overwritten_by_the_next_replay(graphs: Graphs, model: Model) -> None:
    inputs = [torch.randn(4, 8) for _ in range(6)]
    outputs = [run(graphs, model, x) for x in inputs]
    assert all(same(output, model(x)) for output, x in zip(outputs, inputs, strict=True))
    outputs[-1].sample.zero_()
    assert same(run(graphs, model, inputs[0]), model(inputs[0]))


def test_arguments_written_in_place_are_seen(graphs: Graphs, model: Model) -> None:
    x, prompt = torch.randn(4, 8), torch.randn(4, 8)
    for _ in range(6):
        assert same(run(graphs, model, x, prompt=prompt), model(x, prompt=prompt))
        x.add_(1)
    prompt.mul_(2)
    assert same(run(graphs, model, x, prompt=prompt), model(x, prompt=prompt))


def test_what_has_not_changed_is_not_copied(graphs: Graphs, model: Model) -> None:
    x, prompt = torch.randn(4, 8), torch.randn(4, 8)
    warm(graphs, model, x, prompt=prompt)
    ((_, graph),) = graphs._graphs.items()
    versions = [place._version for place in graph.arguments]
    run(graphs, model, torch.randn(4, 8), prompt=prompt)
    assert [place._version - before for place, before in zip(graph.arguments, versions, strict=True)] == [1, 0]
    graphs.end()
    assert graph.seen == []  # a prompt need not stay
    assert same(run(graphs, model, x, prompt=prompt), model(x, prompt=prompt))


def test_plain_arguments_are_part_of_the_kind(graphs: Graphs, model: Model) -> None:
    x = torch.randn(4, 8)
    warm(graphs, model, x, 0.5)
    assert same(run(graphs, model, x, 0.25), model(x, 0.25))
    assert same(run(graphs, model, x, 0.5), model(x, 0.5))
    assert graphs.counts() == {"replayed": 1, "captured": 1, "eager": {FIRST: 4}}


@pytest.mark.parametrize(
    "other", [lambda x: x.double(), lambda x: x[:2], lambda x: x.t().contiguous().t(), lambda x: x[None]]
)
def test_layouts_are_part_of_the_kind(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    graphs, module, x = Graphs(CPU, True, rerun), Doubled(), torch.randn(4, 8)
    warm(graphs, module, x)
    got = run(graphs, module, other(x))
    assert torch.equal(got, other(x) * 2)
    assert got.stride() == (other(x) * 2).stride()
    assert graphs.replayed == 0


def test_inference_mode(graphs: Graphs, model: Model) -> None:
    with torch.inference_mode():
        for _ in range(5):
            x = torch.randn(4, 8)
            assert same(run(graphs, model, x), model(x))
    assert graphs.replayed == 2
    run(graphs, model, torch.randn(4, 8))
    assert graphs.eager[FIRST] == 4  # of another kind: its result must be usable outside


def test_a_changed_denoiser_or_setting_drops_graphs(graphs: Graphs, model: Model) -> None:
    x = torch.randn(4, 8)
    warm(graphs, model, x)
    warm(graphs, model, x, name="other")
    graphs.forget("unet")
    assert [key[0] for key in graphs._graphs] == ["other"]
    graphs.begin({"tf32": True})
    assert not graphs._graphs
    warm(graphs, model, x)
    graphs.begin({"tf32": True})
    assert len(graphs._graphs) == 1 and graphs.captured == 0


def test_a_part_of_a_forward_that_compiles_itself(graphs: Graphs) -> None:
    """Dynamo must not meet it in a way that makes it give up that code, for that breaks the eager forward too."""

    class Flex(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return flex_attention(x, x, x)  # type: ignore[return-value]

    module = Flex()
    for length in (16, 32):
        for _ in range(4):
            x = torch.randn(1, 1, length, 8)
            assert torch.equal(run(graphs, module, x), module(x))
    assert graphs.counts() == {"replayed": 2, "captured": 2, "eager": {FIRST: 6}}


# What cannot be captured


def failing(error: Exception) -> Callable[..., Any]:
    def capture(forward: Callable[[], Any]) -> Any:
        raise error

    return capture


def test_a_forward_that_cannot_be_captured_stays_eager(model: Model) -> None:
    graphs = Graphs(CPU, True, failing(RuntimeError("operation not permitted when stream is capturing\nmore")))
    x = torch.randn(4, 8)
    for _ in range(6):
        assert same(run(graphs, model, x), model(x))
    reason = "the forward cannot be captured: operation not permitted when stream is capturing"
    assert graphs.counts() == {"replayed": 0, "captured": 0, "eager": {FIRST: 2, reason: 4}}
    assert graphs.failure == reason


def test_a_denoiser_that_fails_again_and_again_is_left_alone(model: Model) -> None:
    tries = []

    def capture(forward: Callable[[], Any]) -> Any:
        tries.append(forward)
        raise RuntimeError("no")

    graphs = Graphs(CPU, True, capture)
    for rows in range(1, 12):
        warm(graphs, model, torch.randn(rows, 8))
    assert len(tries) == graphs_module._PATIENCE
    graphs.forget("unet")  # it is another one now
    warm(graphs, model, torch.randn(99, 8))
    assert len(tries) == graphs_module._PATIENCE + 1


def test_a_forward_that_overwrites_an_argument(graphs: Graphs) -> None:
    class Overwrites(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1) * 2

    for _ in range(5):
        x = torch.randn(4)
        expected = (x + 1) * 2
        assert torch.equal(run(graphs, Overwrites(), x), expected)
    assert graphs.failure == "the forward cannot be captured: it overwrites one of its arguments"


def test_a_forward_that_gives_something_else_each_time(graphs: Graphs) -> None:
    class Random(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn(4)

    for _ in range(5):
        run(graphs, Random(), torch.zeros(4))
    assert graphs.captured == 0
    assert "not the eager one" in (graphs.failure or "")


class Counts(Model):
    def forward(self, x: torch.Tensor, timestep: Any = 1.0, prompt: torch.Tensor | None = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        return super().forward(x, float(self.steps))


class Casts(Model):
    """As layerwise casting: the weights move in every forward."""

    def forward(self, x: torch.Tensor, timestep: Any = 1.0, prompt: torch.Tensor | None = None) -> Any:
        output = super().forward(x)
        self.weight.data = self.weight.data.clone()
        return output


@pytest.mark.parametrize("kind", [Counts, Casts])
def test_a_forward_that_changes_the_denoiser(graphs: Graphs, kind: type[Model]) -> None:
    module, other = kind(), kind()
    other.load_state_dict(module.state_dict())
    for _ in range(6):
        x = torch.randn(4, 8)
        assert same(run(graphs, module, x), other(x))
    assert graphs.replayed == 0
    assert "changes the denoiser" in (graphs.failure or "")


def test_forward_hooks_are_called_every_time(graphs: Graphs, model: Model) -> None:
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    for _ in range(6):
        run(graphs, model, torch.randn(4, 8))
    assert len(called) == 6
    assert "forward hook" in (graphs.failure or "")


def test_a_denoiser_with_a_cache_stays_eager(graphs: Graphs, model: Model) -> None:
    class Every2nd(ModelHook):
        """As caches do: what it computes is another thing in each step."""

        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.calls, self.last = [0], None

        def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls[0] += 1
            if self.calls[0] % 2:
                self.last = self.fn_ref.original_forward(*args, **kwargs)
            return self.last

    hook = Every2nd()
    HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, "every_2nd")
    for _ in range(6):
        run(graphs, model, torch.randn(4, 8))
    assert hook.calls == [6]  # none for a rehearsal
    reason = "the forward cannot be captured: its cache decides anew at every step what to compute"
    assert graphs.counts() == {"replayed": 0, "captured": 0, "eager": {FIRST: 2, reason: 4}}


def test_a_graph_keeps_what_it_reads(graphs: Graphs) -> None:
    """A table in a cache of the model's own, which drops it when it is full, as Qwen-Image's rotary embedding has."""

    class Tables(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8))

        @staticmethod
        @functools.lru_cache(maxsize=2)
        def table(rows: int) -> torch.Tensor:
            return torch.randn(rows, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.table(x.shape[0])) * self.weight

    module = Tables()
    warm(graphs, module, torch.randn(3, 8))
    table = weakref.ref(module.table(3).untyped_storage())
    ((_, graph),) = graphs._graphs.items()
    held = {tensor.data_ptr() for tensor in graph.keeps}
    assert {module.table(3).data_ptr(), module.weight.data_ptr()} <= held
    assert len(graph.keeps) == 3  # and the argument; nothing that the forward makes itself
    module.table.cache_clear()
    assert table() is not None
    graphs.clear()
    del graph
    gc.collect()
    assert table() is None


def test_alignment_is_part_of_the_kind(graphs: Graphs, model: Model) -> None:
    memory = torch.randn(64)
    warm(graphs, model, memory[:32].view(4, 8))
    run(graphs, model, memory[1:33].view(4, 8))
    assert graphs.replayed == 0
    run(graphs, model, memory[4:36].view(4, 8))
    assert graphs.replayed == 1


def test_an_argument_in_host_memory() -> None:
    graphs = Graphs(torch.device("meta"), True, rerun)
    with pytest.raises(UncapturableError, match="in host memory"):
        graphs._make(Model(), *encode_plain(((torch.randn(4, 8),), {})))  # type: ignore[arg-type]


# How many


def test_the_least_recently_used_graph_goes(graphs: Graphs, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "_MOST_GRAPHS", 2)
    a, b, c = (torch.randn(rows, 8) for rows in (1, 2, 3))
    for x in (a, b):
        warm(graphs, model, x)
        for _ in range(10):
            run(graphs, model, x)
    run(graphs, model, a)
    warm(graphs, model, c)
    assert [graph.arguments[0].shape[0] for graph in graphs._graphs.values()] == [1, 3]


def test_kinds_that_never_come_back_are_not_captured_for_ever(
    graphs: Graphs, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "_MOST_GRAPHS", 2)
    for rows in range(1, 20):
        warm(graphs, model, torch.randn(rows, 8))
    assert graphs.captured == 2 + graphs_module._PATIENCE
    assert graphs.eager["calls of one kind are too few for a graph to pay"] > 0


def test_what_is_counted_is_bounded(graphs: Graphs, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "_MOST_SEEN", 5)
    for rows in range(1, 50):
        run(graphs, model, torch.randn(rows, 8))
    assert len(graphs._kinds) == 5


def test_auto_waits_where_the_gpu_is_the_limit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(CPU, "auto", rerun)
    monkeypatch.setattr(graphs, "_is_launch_bound", lambda kind: False)
    x = torch.randn(4, 8)
    for _ in range(graphs_module._CALLS_WHEN_GPU_BOUND + 3):
        run(graphs, model, x)
    assert graphs.captured == 1
    assert graphs.replayed == 2


def test_auto_leaves_memory_to_others(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "_free_memory", lambda device: 0.19)
    x = torch.randn(4, 8)
    for mode, captured in (("auto", 0), (True, 1)):
        graphs = Graphs(CPU, mode, rerun)  # type: ignore[arg-type]
        warm(graphs, model, x)
        assert graphs.captured == captured


class Event:
    """A point in time on a device, in milliseconds; reached or not."""

    def __init__(self, at: float, reached: bool = True) -> None:
        self.at, self.reached = at, reached

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.mark.parametrize(
    ("host_ms", "end", "bound"),
    [(29.0, Event(29.3), True), (97.0, Event(177.0), False), (97.0, Event(177.0, reached=False), False)],
)
def test_launch_bound(host_ms: float, end: Any, bound: bool) -> None:
    kind = graphs_module._Kind(2, host_ms, (Event(0.0), end))  # type: ignore[arg-type]
    assert Graphs(CPU, "auto", rerun)._is_launch_bound(kind) is bound


# On a GPU


class Syncs(Model):
    def forward(self, x: torch.Tensor, timestep: Any = 1.0, prompt: torch.Tensor | None = None) -> Any:
        return super().forward(x, x.abs().max().item())


class Copies(Model):
    def forward(self, x: torch.Tensor, timestep: Any = 1.0, prompt: torch.Tensor | None = None) -> Any:
        return super().forward(x, torch.tensor([2.0], device=x.device))


class Selects(Model):
    def forward(self, x: torch.Tensor, timestep: Any = 1.0, prompt: torch.Tensor | None = None) -> Any:
        y = x.clone()
        y[x > 0] = x[x > 0] * 2
        return super().forward(y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_has_the_bits_of_the_forward(dtype: torch.dtype) -> None:
    graphs, model = Graphs(torch.device("cuda", 0), True), Model().to("cuda", dtype)
    x, prompt = (torch.randn(4, 8, device="cuda", dtype=dtype) for _ in range(2))
    outputs = []
    for step in range(10):
        outputs.append(run(graphs, model, x, torch.tensor(0.5 + step, device="cuda"), prompt=prompt))
        assert same(outputs[-1], model(x, torch.tensor(0.5 + step, device="cuda"), prompt))
        x = x + 1
    assert graphs.counts()["replayed"] == 7


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Syncs, Copies, Selects])
def test_forwards_that_talk_to_the_host(kind: type[Model]) -> None:
    graphs, model = Graphs(torch.device("cuda", 0), True), kind().to("cuda")
    for _ in range(6):
        x = torch.randn(4, 8, device="cuda")
        assert same(run(graphs, model, x), model(x))
    assert graphs.replayed == 0
    assert (graphs.failure or "").startswith("the forward cannot be captured: it waits for the GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Syncs, Copies, Selects])
def test_a_capture_that_fails_leaves_nothing_behind(kind: type[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def blind(device: torch.device) -> Iterator[list[Any]]:
        yield []

    monkeypatch.setattr(graphs_module, "_notice_waits", blind)
    device = torch.device("cuda", 0)
    graphs, model, good = Graphs(device, True), kind().to(device), Model().to(device)
    x = torch.randn(4, 8, device=device)
    for _ in range(5):
        assert same(run(graphs, model, x), model(x))
    assert graphs.replayed == 0
    assert "captur" in (graphs.failure or "")
    torch.cuda.synchronize()
    torch.randn(3, device=device)  # the generator is not stuck in the capture
    torch.cuda.empty_cache()
    for _ in range(5):
        assert same(run(graphs, good, x, name="good"), good(x))
    assert graphs.replayed == 2


@pytest.mark.gpu
def test_autocast_does_not_free_the_weights_of_a_graph() -> None:
    graphs, model = Graphs(torch.device("cuda", 0), True), Model().to("cuda")
    x = torch.randn(4, 8, device="cuda")
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):  # what it has cast is freed on leaving
            got, expected = run(graphs, model, x), model(x)
        torch.randn(1 << 20, device="cuda")
        assert same(got, expected)
    assert graphs.replayed == 2


@pytest.mark.gpu
def test_graphs_share_their_working_memory() -> None:
    class Wide(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.expand(64, -1).contiguous().sum(0)

    graphs, module = Graphs(torch.device("cuda", 0), True), Wide()
    sizes = [(1 << 20) + 8 * i for i in range(8)]
    warm(graphs, module, torch.randn(sizes[-1], device="cuda"))
    before = torch.cuda.memory_reserved()
    for size in sizes[:-1]:
        x = torch.randn(size, device="cuda")
        for _ in range(5):
            assert torch.equal(run(graphs, module, x), module(x))
    assert graphs.captured == len(sizes)
    assert torch.cuda.memory_reserved() - before < 600 << 20  # each alone takes 256 MiB, and so does an eager forward


@pytest.mark.gpu
def test_graphs_that_are_dropped_leave_their_memory_to_the_next_ones() -> None:
    graphs, module = Graphs(torch.device("cuda", 0), True), Model().to("cuda")
    x = torch.randn(1 << 16, 8, device="cuda")
    reserved = []
    for _ in range(6):  # a LoRA switched six times
        warm(graphs, module, x)
        assert same(run(graphs, module, x), module(x))
        reserved.append(torch.cuda.memory_reserved())
        graphs.forget("unet")
    assert graphs.captured == graphs.replayed == 6 and graphs.failure is None
    assert reserved[-1] == reserved[1]


def test_a_graph_copies_what_it_is_given_the_first_time() -> None:
    place, x = torch.zeros(2), torch.ones(2)
    graph = Graph(lambda: None, [place], *encode_plain(place), keeps=[])  # type: ignore[arg-type]
    graph.run([x])
    assert torch.equal(place, x)
