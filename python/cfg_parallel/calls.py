"""A denoiser call: what it was given, where it may run, and how its rows are split into the branches of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch

from cfg_parallel import caches, compiling
from cfg_parallel.caches import Cache
from cfg_parallel.codec import Rows, UnshippableError, encode_plain, map_tensors, signature, tensors_in

if TYPE_CHECKING:
    from cfg_parallel.graphs import Graphs

# Which arguments a batch is cut in: those with as many rows as the main input; those too with several for each of its
# rows (prompts for each frame of AnimateDiff); those too whose rows are on dimension 1 (HiDream's Llama states).
Manner = Literal["rows", "multiples", "dim 1"]
MANNERS: tuple[Manner, ...] = ("rows", "multiples", "dim 1")

_MAIN_INPUTS = ("hidden_states", "sample", "x", "latents")


@dataclass(slots=True)
class Denoiser:
    """A pipeline component that predicts noise, and the cache context that the pipeline has entered on it."""

    name: str
    module: torch.nn.Module
    context: tuple[str, dict[str, Any]] | None = None
    cache: Cache | None = None

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Its calls inside run without compiled code."""
        compiled = self.module
        with compiling.uncompiled(compiled) as self.module:
            try:
                yield
            finally:
                self.module = compiled


class Split(NamedTuple):
    """Into what a batch is taken apart, and how."""

    branches: int
    manner: Manner


@dataclass(slots=True)
class Branch:
    """Of a denoiser with a cache: what a call needs of the calls before is where they ran, so it is where all run."""

    key: tuple[str, str]  # denoiser and context
    follower: int | None  # None: the leader
    calls: int = 0


@dataclass(slots=True)
class Call:
    """One forward of a denoiser. `args` and `kwargs` hold settled tensors, in containers of their own: a pipeline may
    go on with its own, and a denoiser may empty those that it is given (residuals of an adapter)."""

    denoiser: Denoiser
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: tuple[str, dict[str, Any]] | None
    autocast: torch.dtype | None
    branch: Branch | None = None
    is_part: bool = False  # some tensors are `Rows`
    given: tuple[Any, Any] | None = None  # the pipeline's own containers
    _versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    @classmethod
    def of(cls, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Call:
        enabled = torch.is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if enabled else None
        own = _own((args, kwargs))
        call = cls(denoiser, own[0], own[1], denoiser.context, autocast, given=(args, kwargs))
        call._versions = [(t, t._version) for t in tensors_in(own) if not t.is_inference()]
        return call

    def signature(self) -> Any:
        context = self.context[0] if self.context else None
        return (self.denoiser.name, context, self.autocast, signature(self.args), signature(self.kwargs))

    def unchanged(self) -> bool:
        """Whether no argument was overwritten since the call was made, so that it can be run again."""
        return all(tensor._version == version for tensor, version in self._versions)

    def run(
        self, device: torch.device, graphs: Graphs | None = None, *, as_given: bool = False, for_good: bool = False
    ) -> Any:
        """The denoiser's output, on this device. Its context may have been left since, so it is entered again.

        `as_given`: with the pipeline's own containers, which it may look into later. `for_good`: with others all the
        same, since it has to be run again; what it keeps there is lost, as it was on another device."""
        with contextlib.ExitStack() as stack:
            if self.context is not None and self.context is not self.denoiser.context:
                stack.enter_context(caches.same_context(self.denoiser.module))
                stack.enter_context(self.denoiser.module.cache_context(self.context[0], **self.context[1]))  # type: ignore[operator]
            now = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
            if self.autocast != now:
                stack.enter_context(torch.autocast(device.type, self.autocast, enabled=self.autocast is not None))
            if graphs is not None and graphs.on:
                try:
                    body, tensors = encode_plain(self._copies())
                    return graphs.run(self.denoiser.name, self.denoiser.module, body, cast("Any", tensors))
                except UnshippableError as error:  # what has no bytes has no graph, and the report says so
                    graphs.eager[str(error)] += 1
            module = self.denoiser.module
            if as_given and self.given is not None:
                args, kwargs = self.given
                return module(*args, **kwargs)
            args, kwargs = self._copies()
            return module(*args, **kwargs) if for_good else call_with_copies(module, args, kwargs)

    def _copies(self) -> tuple[Any, Any]:
        """The arguments, in new containers."""
        copies: tuple[Any, Any] = map_tensors((self.args, self.kwargs), Rows.tensor, Rows)
        return copies

    def is_listed(self) -> bool:
        """Whether the batch is a list of rows: tensors, or lists of them (Z-Image)."""
        return self._listed() is not None

    def _listed(self) -> Sequence[Any] | None:
        named = (value for value in map(self.kwargs.get, _MAIN_INPUTS) if value is not None)
        main = self.args[0] if self.args else next(named, None)
        return main if isinstance(main, list) and main and next(tensors_in(main), None) is not None else None

    def rows(self) -> int:
        """The length of dim 0 of the main input, 0 when it has none."""
        listed = self._listed()
        if listed is not None:
            return len(listed)
        for name in _MAIN_INPUTS:
            if isinstance(self.kwargs.get(name), torch.Tensor):
                return _length(self.kwargs[name])
        return next((_length(t) for t in tensors_in((self.args, self.kwargs)) if t.dim()), 0)

    def manners(self) -> list[Manner]:
        """Those that cut other arguments than the first does."""
        rows = self.rows()
        tensors = list(tensors_in((self.args, self.kwargs)))
        cuts = {manner: [_dim_of_rows(tensor, rows, manner) for tensor in tensors] for manner in MANNERS}
        return [manner for manner in MANNERS if manner == "rows" or cuts[manner] != cuts["rows"]]

    def split(self, branches: int, manner: Manner = "rows") -> list[Call]:
        """The call of each of `branches` equal groups of rows. A tensor that has no rows in this manner stays whole."""
        rows = self.rows()
        if rows % branches:
            raise ValueError(f"Expected a multiple of {branches} rows, but got {rows}.")

        def part(branch: int, obj: Any) -> Any:
            def take(tensor: torch.Tensor) -> torch.Tensor | Rows:
                dim = _dim_of_rows(tensor, rows, manner)
                if dim is None:
                    return tensor
                size = tensor.shape[dim] // branches
                return Rows(tensor, branch * size, (branch + 1) * size, dim)

            if listed and isinstance(obj, list) and len(obj) == rows:
                return obj[branch * rows // branches : (branch + 1) * rows // branches]
            if isinstance(obj, tuple) and not hasattr(obj, "_fields"):
                return tuple(part(branch, item) for item in obj)
            if isinstance(obj, dict):
                return {key: part(branch, value) for key, value in obj.items()}
            return map_tensors(obj, take)

        listed = self.is_listed()
        return [
            replace(self, args=part(b, self.args), kwargs=part(b, self.kwargs), is_part=True, given=None)
            for b in range(branches)
        ]


def _dim_of_rows(tensor: torch.Tensor, rows: int, manner: Manner) -> int | None:
    """The dimension along which a tensor is to be cut."""
    length = _length(tensor)
    if length == rows or (manner == "multiples" and length > rows and length % rows == 0):
        return 0
    return 1 if manner == "dim 1" and tensor.dim() > 2 and tensor.shape[1] == rows else None


def call_with_copies(module: Any, args: Any, kwargs: Any) -> Any:
    """The output of `module`, given containers that nobody looks into afterwards: so it must not leave anything there.

    Raises UnshippableError when it has."""
    before = list(tensors_in((args, kwargs)))
    output = module(*args, **kwargs)
    known = set(map(id, before))
    if any(id(tensor) not in known for tensor in tensors_in((args, kwargs))):
        raise UnshippableError("the denoiser keeps something in one of its arguments (a cache)")
    return output


def _own(obj: Any) -> Any:
    """`obj` in containers of its own. Tensors are copied in inference mode, which has no version to check later."""
    if isinstance(obj, (tuple, list)):
        items = [_own(item) for item in obj]
        return type(obj)(*items) if hasattr(obj, "_fields") else type(obj)(items)
    if isinstance(obj, dict):
        return {key: _own(value) for key, value in obj.items()}
    return map_tensors(obj, _copied) if torch.is_inference_mode_enabled() else obj


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _length(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def deal(branches: int, devices: int) -> tuple[int, list[int]]:
    """How many of a step's last calls the leader runs, and the follower (0-based) of each call before them.

    The leader gets the smaller share: it also launches the scheduler and the guidance.
    (2, 2) -> 1, [0]; (3, 2) -> 1, [0, 0]; (4, 2) -> 2, [0, 0]."""
    own = max(1, branches // devices)
    return own, [branch % (devices - 1) for branch in range(branches - own)]
