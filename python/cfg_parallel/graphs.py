"""CUDA graphs of a denoiser's forward: one for each kind of call, captured when it pays and replayed from then on.

A forward of a small model takes the host longer to launch than the GPU to run. A graph is launched at once, by either
side of a step. It runs the kernels of the eager forward; before a graph is used, its result on the arguments at hand is
compared with the eager one bit for bit. What cannot be captured stays eager, and the report says why.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cfg_parallel.caches import Cache
from cfg_parallel.calls import call_with_copies
from cfg_parallel.changes import fingerprint, left_something, traces
from cfg_parallel.codec import TensorSpec, decode, encode_plain, is_dense, version
from cfg_parallel.compiling import has_graphs, is_compiled, uncompiled
from cfg_parallel.numerics import same_bits
from cfg_parallel.offload import restless
from cfg_parallel.replica import is_parallel
from cfg_parallel.timing import Mark, mark

GraphMode = Literal["auto", True, False]

_MOST_GRAPHS = 16  # on a device, the least recently used ones go; they share their working memory
_MOST_SEEN = 1024  # kinds of calls that are counted
_EAGER_CALLS = 2  # before a capture: the first call allocates, compiles and picks algorithms
_CALLS_WHEN_GPU_BOUND = 100  # "auto": a graph saves a few percent then, and capturing costs two forwards
_FREE_MEMORY = 0.2  # "auto": of the GPU's; a graph keeps the memory of a forward from everybody else
_LAUNCH_BOUND = 0.8  # of the GPU's time for a forward that the host needs to launch it
_FEW_REPLAYS = 8  # a graph that was replayed less than this was not worth its capture
_PATIENCE = 3  # such graphs, or failed captures, one after the other, until a denoiser is left alone

Capture = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


class UncapturableError(RuntimeError):
    """Why a forward cannot be a graph."""


@dataclass(slots=True)
class Graph:
    """A captured forward. `arguments` are read and `results` written by every replay."""

    replay: Callable[[], None]
    arguments: list[torch.Tensor]
    body: bytes  # of the output
    results: list[torch.Tensor]
    keeps: list[torch.Tensor]  # what it reads besides: weights, and tables that a model has in a cache and may drop
    replays: int = 0
    seen: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # what `arguments` were last copied from

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The output for these arguments, in memory of its own."""
        for i, (place, tensor) in enumerate(zip(self.arguments, tensors, strict=True)):
            now = version(tensor)
            if self.seen and now != -1 and self.seen[i][0] is tensor and self.seen[i][1] == now:
                continue
            place.copy_(tensor)
        self.seen = [(tensor, version(tensor)) for tensor in tensors]
        self.replay()
        self.replays += 1
        return decode(self.body, [result.clone() for result in self.results])


@dataclass(slots=True)
class _Kind:
    """What is known of the calls of one kind until they have a graph."""

    calls: int = 0
    host_ms: float = 0.0  # to launch the last forward
    marks: tuple[Mark, Mark] | None = None  # around it on the device
    refused: bool = False


class Graphs:
    """Runs the forwards of one device. `replayed` and `eager` count them since `begin`, the latter by reason."""

    def __init__(self, device: torch.device, mode: GraphMode, capture: Capture | None = None) -> None:
        self.device = device
        self.mode = mode
        self.replayed = 0
        self.captured = 0
        self.eager: Counter[str] = Counter()
        self._captures = (lambda: capture) if capture is not None else lambda: _CudaCapture(device)
        self._capture: Capture = self._captures()
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self._wasted: Counter[str] = Counter()  # denoiser -> captures in a row that were not worth it
        self._reasons: dict[str, str] = {}  # denoiser -> why its last capture failed
        self._settings: Any = None

    @property
    def failure(self) -> str | None:
        """Why a forward could not be captured, if one could not."""
        return next(iter(self._reasons.values()), None)

    @property
    def on(self) -> bool:
        return self.mode is not False

    def begin(self, settings: Any) -> None:
        """Before a generation; `settings` of PyTorch change the kernels that a forward runs."""
        self.replayed = self.captured = 0
        self.eager.clear()
        if settings != self._settings:
            self.clear()
        self._settings = settings

    def end(self) -> None:
        """After a generation: its prompts and latents need not stay."""
        for graph in self._graphs.values():
            graph.seen = []

    def counts(self) -> dict[str, Any]:
        """Of the generation, for the report."""
        return {"replayed": self.replayed, "captured": self.captured, "eager": dict(self.eager)}

    def forget(self, denoiser: str) -> None:
        """The denoiser has changed."""
        self._forget_all(lambda key: key[0] == denoiser)
        self._wasted.pop(denoiser, None)
        self._reasons.pop(denoiser, None)

    def clear(self) -> None:
        """Give the memory of all graphs back."""
        had = bool(self._graphs)
        self._forget_all(lambda key: True)
        self._capture = self._captures()
        if had and self.device.type == "cuda":
            torch.cuda.empty_cache()  # a pool that nobody uses PyTorch keeps until it runs out of memory

    def _forget_all(self, which: Callable[[Any], bool]) -> None:
        for known in (self._graphs, self._kinds):
            for key in [key for key in known if which(key)]:
                del known[key]  # type: ignore[attr-defined]

    def run(self, denoiser: str, module: torch.nn.Module, body: bytes, tensors: Sequence[torch.Tensor]) -> Any:
        """The denoiser's output. `body` and `tensors` are what encode_plain makes of (args, kwargs)."""
        cast = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else None
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        key = (denoiser, body, cast, modes, *(_layout(tensor, self.device) for tensor in tensors))
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self.replayed += 1
            return graph.run(tensors)
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        while len(self._kinds) > _MOST_SEEN:
            self._kinds.popitem(last=False)
        why = self._why_not_now(denoiser, kind)
        start, clock = mark(self.device), time.perf_counter()
        before = (fingerprint(module), traces(module)) if why is None else None
        watching: Any = _notice_waits(self.device) if why is None else contextlib.nullcontext([])
        with watching as waits:
            args, kwargs = decode(body, tensors)
            output = call_with_copies(module, args, kwargs)
        kind.host_ms = (time.perf_counter() - clock) * 1e3
        kind.marks = start, mark(self.device)
        kind.calls += 1
        if why is None:
            why = self._try_capture(key, kind, denoiser, module, body, tensors, output, bool(waits), before)
        self.eager[why] += 1
        return output

    def _why_not_now(self, denoiser: str, kind: _Kind) -> str | None:
        """Why this call is not the one to capture a graph at."""
        if kind.refused or self._wasted[denoiser] >= _PATIENCE:
            return self._reasons.get(denoiser, "calls of one kind are too few for a graph to pay")
        if kind.calls < _EAGER_CALLS:
            return "the first calls of a kind are eager"
        if self.mode == "auto":
            if kind.calls < _CALLS_WHEN_GPU_BOUND and not self._is_launch_bound(kind):
                return "the GPU is the limit, not the launching"
            if _free_memory(self.device) < _FREE_MEMORY:
                return "less than a fifth of the GPU's memory is free for graphs (cuda_graphs=True takes it)"
        return None

    def _is_launch_bound(self, kind: _Kind) -> bool:
        assert kind.marks is not None
        start, end = kind.marks
        if isinstance(start, float) or isinstance(end, float):
            return True
        # Not reached yet: the GPU is a whole call behind the host.
        return end.query() and kind.host_ms > _LAUNCH_BOUND * start.elapsed_time(end)

    def _try_capture(
        self,
        key: Any,
        kind: _Kind,
        denoiser: str,
        module: torch.nn.Module,
        body: bytes,
        tensors: Sequence[torch.Tensor],
        expected: Any,
        waits: bool,
        before: Any,
    ) -> str:
        """Capture a graph for the next call of this kind; why this one was eager."""
        try:
            if Cache.of(module) is not None:
                raise UncapturableError("its cache decides anew at every step what to compute")
            if waits:
                raise UncapturableError("it waits for the GPU (.item(), a boolean mask) or copies from host memory")
            settings, left = before
            if restless(module) or fingerprint(module) != settings or left_something(left, traces(module)):
                raise UncapturableError(
                    "it changes the denoiser's weights or settings (layerwise casting, group offload, a counter)"
                )
            if any(sub._forward_hooks or sub._forward_pre_hooks for sub in module.modules()):
                raise UncapturableError("a forward hook would no longer be called")
            if is_parallel(module):
                raise UncapturableError("it exchanges with other processes in its forward (enable_parallelism)")
            if has_graphs(module):
                raise UncapturableError("it is compiled with CUDA graphs of its own (mode='reduce-overhead')")
            graph = self._make(module, body, tensors)
            expected_body, values = encode_plain(expected)
            results = encode_plain(graph.run(tensors))[1]
            if expected_body != graph.body or not all(map(same_bits, values, results)):  # type: ignore[arg-type]
                raise UncapturableError("the graph's prediction is not the eager one")
        except Exception as error:  # whatever a model does that a graph cannot
            kind.refused = True
            self._wasted[denoiser] += 1
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            self._reasons[denoiser] = f"the forward cannot be captured: {first or type(error).__name__}"
            return self._reasons[denoiser]
        graph.replays = 0
        self.captured += 1
        del self._kinds[key]
        self._graphs[key] = graph
        while len(self._graphs) > _MOST_GRAPHS:
            old, evicted = self._graphs.popitem(last=False)
            self._wasted[old[0]] = self._wasted[old[0]] + 1 if evicted.replays < _FEW_REPLAYS else 0
        return "the first calls of a kind are eager"

    def _make(self, module: torch.nn.Module, body: bytes, tensors: Sequence[torch.Tensor]) -> Graph:
        if any(tensor.device != self.device for tensor in tensors):
            raise UncapturableError("one of its arguments is in host memory")  # what it reads there would stay as it is
        with torch.inference_mode(False):  # so that any tensor can be copied into them
            places = [TensorSpec.of(tensor, self.device).empty(self.device).copy_(tensor) for tensor in tensors]
        versions = [place._version for place in places]
        args, kwargs = decode(body, places)

        reads = _Reads()
        looking: Any = reads
        with _without_cast_cache(self.device.type):
            if is_compiled(module):
                looking = contextlib.nullcontext()
                with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                    with uncompiled(module) as eager, reads:
                        eager(*args, **kwargs)
                    args, kwargs = decode(body, places)  # a model may have emptied a list
                    module(*args, **kwargs)  # whatever these tensors need to be compiled anew for
                args, kwargs = decode(body, places)

            def forward() -> Any:
                with looking:
                    return encode_plain(module(*args, **kwargs))

            (output, results), replay = self._capture(forward)
        if versions != [place._version for place in places]:
            raise UncapturableError("it overwrites one of its arguments")
        return Graph(replay, places, output, results, reads.tensors)


class _Reads(TorchDispatchMode):
    """What the ops inside read that none of them has made."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """flex_attention compiles itself; code that Dynamo meets under another kind of mode it never compiles again."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        self._known: set[int] = set()  # memory that is kept, or was made inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._new_in((args, kwargs)):
            self.tensors.append(tensor.detach())
        result = func(*args, **(kwargs or {}))
        list(self._new_in(result))
        return result

    def _new_in(self, obj: Any) -> Iterator[torch.Tensor]:
        for tensor in tree_leaves(obj):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                memory = tensor.untyped_storage()._cdata
                if memory not in self._known:
                    self._known.add(memory)
                    yield tensor


def _without_cast_cache(device_type: str) -> Any:
    """Weights that autocast has cast and kept would be freed before a graph that reads them is. Compiled code is made
    for one setting of it, so what is to be captured runs once before in the same context."""
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


def _layout(tensor: torch.Tensor, device: torch.device) -> tuple[Any, ...]:
    """What of a tensor the kernels that a forward chooses may depend on. A timestep is an element of a table: where it
    lies is another place in each step, and of no consequence."""
    spec = TensorSpec.of(tensor, device)
    return (spec,) if tensor.dim() < 2 else (spec, tensor.data_ptr() % 16, is_dense(tensor))


class _CudaCapture:
    """Captures on a stream of its own. All graphs use the same working memory: none runs beside another, and what they
    leave behind is copied before the next one starts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        self._anchor: Any = None  # a pool that its last graph has left takes no other, and its memory is lost to all

    def __call__(self, forward: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
                self._anchor = self._empty(self._stream, self._pool)
            graph = torch.cuda.CUDAGraph()
            # Other threads, of the transport for one, go on calling CUDA.
            capturing = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            try:
                with capturing:
                    output = forward()
            except BaseException:
                self._recover()
                raise
            return output, graph.replay

    def _recover(self) -> None:
        """After a capture that failed PyTorch's allocator and random generator believe that it goes on (2.11, 2.13)."""
        with contextlib.suppress(RuntimeError):  # it was told
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        self._stream = self._pool = self._anchor = None  # graphs from before keep theirs
        self._empty(torch.cuda.Stream(self._device))

    def _empty(self, stream: Any, pool: Any = None) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=self._device)
        return graph


def _free_memory(device: torch.device) -> float:
    """The part of the device's memory that nobody holds, but for what PyTorch keeps for later."""
    if device.type != "cuda":
        return 1.0
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + kept) / total


@contextlib.contextmanager
def _notice_waits(device: torch.device) -> Iterator[list[Any]]:
    """What of PyTorch's warnings about waiting for `device` is raised inside: a graph could not do that. A capture that
    fails half-way is best avoided."""
    waits: list[Any] = []
    if device.type != "cuda":
        yield waits
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            waits.append(warning)
        elif "detect all synchronizing operations" not in str(warning.message):  # which setting the mode says
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
