"""torch.compile on every replica: a denoiser that is compiled here is compiled on the followers in the same way."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cfg_parallel.codec import is_special
from cfg_parallel.errors import ConfigurationError
from cfg_parallel.modules import submodules

CompileMode = bool | Literal["regional", "full"]

_CONVOLUTIONAL = 0.05  # of a model's parameters in convolutions: a UNet has 0.12 (SDXL) and more, a transformer 0.001


@dataclass(frozen=True, slots=True)
class Compiled:
    """A submodule that is compiled, and the arguments of `torch.compile`."""

    path: str
    arguments: dict[str, Any]


def check(mode: CompileMode, options: Mapping[str, Any] | None) -> None:
    """Refuse what cannot work before anything is started."""
    if not isinstance(mode, (bool, str)) or mode not in (True, False, "regional", "full"):
        raise ConfigurationError(f"Expected compile to be True, False, 'regional' or 'full', but got {mode!r}.")
    if options is not None and not isinstance(options, Mapping):
        raise ConfigurationError(
            f"Expected compile_options to be a dictionary of torch.compile's arguments, but got {options!r}."
        )
    if options and mode is False:
        raise ConfigurationError("compile_options are given, but nothing is compiled; pass compile=True as well.")
    if options and "mode" in options and "options" in options:
        raise ConfigurationError("torch.compile takes mode or options, not both; leave one out of compile_options.")
    try:
        if options:
            torch.nn.Identity().compile(**options)  # compiles nothing before it is called
    except Exception as error:  # of several types
        raise ConfigurationError(
            f"torch.compile does not take these compile_options ({type(error).__name__}: "
            f"{textwrap.shorten(str(error), 300)}); see its documentation."
        ) from error
    if options and _has_graphs(dict(options)):
        raise ConfigurationError(
            "With these compile_options Inductor captures CUDA graphs of its own, and cfg-parallel could make none; "
            "use mode='max-autotune-no-cudagraphs' and cuda_graphs=True."
        )


def compile_denoiser(
    name: str, module: torch.nn.Module, mode: CompileMode, options: Mapping[str, Any] | None
) -> Callable[[], None]:
    """Have `module` compiled when it is called, in place; returns what takes that back.

    True is "regional" (the repeated blocks, one compilation for all) for transformers made of them and "full" for the
    others. Convolutions get weights in the channels_last format, which is theirs on a GPU.

    Inductor times variants of a reduction where it compiles, and sums in the order of the fastest: another one in
    another process. Its deterministic mode is therefore the default here, and every device gets the same bits."""
    if is_compiled(module):
        raise ConfigurationError(
            f"The denoiser {name!r} is compiled already; leave compile= out, or its own compile()."
        )
    repeated = _repeated_blocks(module)
    if mode == "regional" and not repeated:
        raise ConfigurationError(f"{type(module).__name__} has no repeated blocks to compile; use compile='full'.")
    convolutional = _is_convolutional(module)
    regional = mode == "regional" or (mode is True and repeated and not convolutional)
    parts = repeated if regional else [module]
    converted = _to_channels_last(module) if convolutional else []

    def undo() -> None:
        for part in parts:
            part._compiled_call_impl = None
        for weight in converted:
            weight.data = weight.data.contiguous()

    arguments = _deterministic(options or {})
    try:
        for part in parts:
            part.compile(**arguments)
    except BaseException:
        undo()
        raise
    return undo


def _deterministic(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with Inductor's deterministic mode, unless they choose another mode, backend or `deterministic`."""
    if "mode" in options or options.get("backend", "inductor") != "inductor":
        return dict(options)
    return {**options, "options": {"deterministic": True, **(options.get("options") or {})}}


def _repeated_blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Those that diffusers declares. Where it does not (SD 3): the model's lists of blocks of one class."""
    declared = getattr(module, "_repeated_blocks", None)
    if declared:
        return [sub for sub in module.modules() if type(sub).__name__ in declared]
    lists = [list(child) for child in module.children() if isinstance(child, torch.nn.ModuleList) and len(child) > 1]
    return [block for blocks in lists if len(set(map(type, blocks))) == 1 for block in blocks]


def _is_convolutional(module: torch.nn.Module) -> bool:
    sizes = [(p.numel(), p.dim() == 4 and p.shape[2:].numel() > 1) for p in module.parameters()]
    return sum(size for size, is_kernel in sizes if is_kernel) > _CONVOLUTIONAL * sum(size for size, _ in sizes)


def _to_channels_last(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    weights = [p for p in module.parameters() if p.dim() == 4 and not is_special(p) and p.is_contiguous()]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return weights


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module behind `torch.compile(module)`; any other as it is."""
    modules = module.__dict__.get("_modules")  # a scripted module has none
    original = modules.get("_orig_mod") if isinstance(modules, dict) else None
    return module if original is None else original


def is_compiled(module: torch.nn.Module) -> bool:
    return module is not unwrap(module) or any(_implementation(sub) is not None for sub in submodules(module))


def find_compiled(module: torch.nn.Module) -> list[Compiled]:
    """What of `unwrap(module)` is compiled, by compile=, by Module.compile or by torch.compile(module)."""
    found = [Compiled("", _arguments(module.dynamo_ctx))] if module is not unwrap(module) else []
    for path, sub in unwrap(module).named_modules():
        implementation = _implementation(sub)
        if implementation is not None:
            found.append(Compiled(path, _arguments(inspect.getclosurevars(implementation).nonlocals["self"])))
    return found


def apply(module: torch.nn.Module, compiled: list[Compiled]) -> None:
    """Compile a replica as its original is. What is compiled already stays as it is."""
    for one in compiled:
        sub = module.get_submodule(one.path)
        if _implementation(sub) is None:
            sub.compile(**one.arguments)


def compile_as(compiled: torch.nn.Module, module: torch.nn.Module) -> torch.nn.Module:
    """torch.compile(module), as `compiled` is, which is torch.compile's of another."""
    arguments = _arguments(compiled.dynamo_ctx)
    return torch.compile(module, **arguments)  # type: ignore[return-value]


def has_graphs(module: torch.nn.Module) -> bool:
    """Whether Inductor captures CUDA graphs of its own for a part of `module`."""
    return any(_has_graphs(one.arguments) for one in find_compiled(module))


def _implementation(module: torch.nn.Module) -> Callable[..., Any] | None:
    return module.__dict__.get("_compiled_call_impl")


def _arguments(context: Any) -> dict[str, Any]:
    """The arguments of `torch.compile` that decide what code is made, from what it keeps of them."""
    from torch._dynamo.eval_frame import innermost_backend

    backend = innermost_backend(context.callback)
    if isinstance(backend, torch._TorchCompileInductorWrapper):
        return {"dynamic": backend.dynamic, "options": dict(backend.config) or None}
    if isinstance(backend, torch._TorchCompileWrapper):
        return {"dynamic": backend.dynamic, "backend": backend.compiler_fn, **backend.kwargs}
    return {"backend": backend}


def _has_graphs(arguments: dict[str, Any]) -> bool:
    options = arguments.get("options") or {}
    return bool(options.get("triton.cudagraphs")) or arguments.get("mode") in ("reduce-overhead", "max-autotune")


@contextlib.contextmanager
def uncompiled(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`module` without its compiled code, for a run under a dispatch mode: Dynamo gives up, for good, the code that it
    meets under one."""
    parts = [(sub.__dict__, _implementation(sub)) for sub in module.modules() if _implementation(sub) is not None]
    try:
        for attributes, _ in parts:
            attributes["_compiled_call_impl"] = None
        yield unwrap(module)
    finally:
        for attributes, implementation in parts:
            attributes["_compiled_call_impl"] = implementation


class CompileClock:
    """Seconds that this process spends in torch.compile; `started` is called at the first compilation after `begin`.

    PyTorch has weak references for it, so that whoever holds the clock can be freed. `close` may be called twice."""

    def __init__(self, started: Callable[[], None] = lambda: None) -> None:
        from torch._dynamo.callback import callback_handler

        self.seconds = 0.0
        self._started = started
        self._is_first = True
        self._since: float | None = None
        start, end = _weakly(self._start), _weakly(self._end)
        callback_handler.register_start_callback(start)
        callback_handler.register_end_callback(end)
        self.close = weakref.finalize(self, _unregister, callback_handler, start, end)

    def begin(self) -> None:
        self.seconds, self._is_first, self._since = 0.0, True, None

    def _start(self) -> None:
        if self._is_first:
            self._is_first = False
            self._started()
        self._since = time.perf_counter()

    def _end(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None


def _weakly(method: Any) -> Callable[..., None]:
    reference = weakref.WeakMethod(method)

    def call(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call


def _unregister(handler: Any, start: Any, end: Any) -> None:
    with contextlib.suppress(ValueError):  # somebody has cleared the handler
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)
