"""A denoiser call: what it was given, where it may run, and how its rows are split into the branches of a batch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from cfg_parallel import caches
from cfg_parallel.caches import Cache
from cfg_parallel.codec import Rows, UnshippableError, encode_plain, map_tensors, signature, tensors_in

if TYPE_CHECKING:
    from cfg_parallel.graphs import Graphs

_MAIN_INPUTS = ("hidden_states", "sample", "x", "latents")


@dataclass(slots=True)
class Denoiser:
    """A pipeline component that predicts noise, and the cache context that the pipeline has entered on it."""

    name: str
    module: torch.nn.Module
    context: tuple[str, dict[str, Any]] | None = None
    cache: Cache | None = None


@dataclass(slots=True)
class Branch:
    """Of a denoiser with a cache: what a call needs of the calls before is where they ran, so it is where all run."""

    key: tuple[str, str]  # denoiser and context
    follower: int | None  # None: the leader
    calls: int = 0


@dataclass(slots=True)
class Call:
    """One forward of a denoiser. `args` and `kwargs` hold settled tensors."""

    denoiser: Denoiser
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: tuple[str, dict[str, Any]] | None
    autocast: torch.dtype | None
    branch: Branch | None = None
    is_part: bool = False  # some tensors are `Rows`
    _versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    @classmethod
    def of(cls, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Call:
        enabled = torch.is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if enabled else None
        if torch.is_inference_mode_enabled():  # no version to check before the call is run again, so keep copies
            args, kwargs = map_tensors(args, _copied), map_tensors(kwargs, _copied)
        call = cls(denoiser, args, kwargs, denoiser.context, autocast)
        call._versions = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()]
        return call

    def signature(self) -> Any:
        context = self.context[0] if self.context else None
        return (self.denoiser.name, context, self.autocast, signature(self.args), signature(self.kwargs))

    def unchanged(self) -> bool:
        """Whether no argument was overwritten since the call was made, so that it can be run again."""
        return all(tensor._version == version for tensor, version in self._versions)

    def run(self, device: torch.device, graphs: Graphs | None = None) -> Any:
        """The denoiser's output, on this device. Its context may have been left since, so it is entered again."""
        with contextlib.ExitStack() as stack:
            if self.context is not None and self.context is not self.denoiser.context:
                stack.enter_context(caches.same_context(self.denoiser.module))
                stack.enter_context(self.denoiser.module.cache_context(self.context[0], **self.context[1]))  # type: ignore[operator]
            now = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
            if self.autocast != now:
                stack.enter_context(torch.autocast(device.type, self.autocast, enabled=self.autocast is not None))
            args, kwargs = self.args, self.kwargs
            if self.is_part:
                args, kwargs = map_tensors(args, Rows.tensor, Rows), map_tensors(kwargs, Rows.tensor, Rows)
            if graphs is not None and graphs.on:
                try:
                    body, tensors = encode_plain((args, kwargs))
                    return graphs.run(self.denoiser.name, self.denoiser.module, body, cast("Any", tensors))
                except UnshippableError as error:  # what has no bytes has no graph, and the report says so
                    graphs.eager[str(error)] += 1
            return self.denoiser.module(*args, **kwargs)

    def rows(self) -> int:
        """The length of dim 0 of the main input, 0 when it has none."""
        for name in _MAIN_INPUTS:
            if isinstance(self.kwargs.get(name), torch.Tensor):
                return _length(self.kwargs[name])
        return next((_length(t) for t in tensors_in((self.args, self.kwargs)) if t.dim()), 0)

    def split(self, branches: int) -> list[Call]:
        """The call of each of `branches` equal groups of rows. A tensor of other rows than the main input is whole."""
        rows = self.rows()
        size = rows // branches
        if size * branches != rows:
            raise ValueError(f"Expected a multiple of {branches} rows, but got {rows}.")

        def part(branch: int, obj: Any) -> Any:
            def take(tensor: torch.Tensor) -> torch.Tensor | Rows:
                return Rows(tensor, branch * size, (branch + 1) * size) if _length(tensor) == rows else tensor

            return map_tensors(obj, take)

        return [
            replace(self, args=part(b, self.args), kwargs=part(b, self.kwargs), is_part=True) for b in range(branches)
        ]


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
