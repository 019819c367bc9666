"""What makes a denoiser ready for its calls, on every device alike: the user's `prepare`, and torch.compile."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch

from cfg_parallel import compiling
from cfg_parallel.compiling import Compiled, CompileMode
from cfg_parallel.errors import ConfigurationError

Prepare = Callable[[torch.nn.Module], object]


@dataclass(slots=True)
class Preparation:
    """As asked for in enable_cfg_parallel, and what takes its compilations back."""

    prepare: Prepare | None = None
    compile: CompileMode = False
    compile_options: Mapping[str, Any] | None = None
    _undo: dict[str, Callable[[], None]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what cannot work before anything is started."""
        compiling.check(self.compile, self.compile_options)
        if self.prepare is not None and not callable(self.prepare):
            raise ConfigurationError(f"Expected prepare to be a function of the denoiser, but got {self.prepare!r}.")
        encode(self.prepare, [])

    def apply(self, name: str, module: torch.nn.Module) -> None:
        """Prepare `module` in place. A compilation of the module that had this name before is taken back."""
        self._undo.pop(name, lambda: None)()
        if self.prepare is not None:
            try:
                self.prepare(compiling.unwrap(module))
            except Exception as error:
                raise ConfigurationError(
                    f"prepare raised {type(error).__name__}: {error}. It is called with the denoiser {name!r} first; "
                    f"try prepare(pipe.{name}) without cfg-parallel."
                ) from error
        if self.compile is not False:
            self._undo[name] = compiling.compile_denoiser(name, module, self.compile, self.compile_options)

    def undo(self) -> None:
        """Take all compilations back. May be called twice."""
        while self._undo:
            self._undo.popitem()[1]()


def encode(prepare: Prepare | None, compiled: list[Compiled]) -> bytes:
    """What a follower does with its replica."""
    try:
        return bytes(cloudpickle.dumps((prepare, compiled)))
    except Exception as error:  # whatever a function may refer to
        raise ConfigurationError(
            f"prepare cannot be sent to the other processes ({type(error).__name__}: {error}); "
            "give it what it needs as arguments that can be pickled, with functools.partial."
        ) from error


def apply_to_replica(encoded: bytes, module: torch.nn.Module) -> None:
    """On a follower, whose `module` is a copy of the prepared denoiser, or on its rank under torchrun that denoiser."""
    prepare, compiled = pickle.loads(encoded)
    if prepare is not None:
        try:
            prepare(module)
        except Exception as error:
            raise ConfigurationError(
                f"prepare raised {type(error).__name__}: {error}. It is called with a copy of the prepared denoiser "
                "there, so it has to leave alone what is done already."
            ) from error
    compiling.apply(module, compiled)
