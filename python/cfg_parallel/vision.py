"""Text encoders that see: a picture that goes in with the prompt and with the negative prompt is looked at once.

Edit models encode "photograph and prompt", then "photograph and negative prompt". Of both, the picture is the larger
part: its preprocessing on the CPU, and the vision encoder on the GPU. Within one generation, asked the same thing
again, they give what they gave before. The bits are those of a second run.
"""

from __future__ import annotations

import contextlib
import enum
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from cfg_parallel.numerics import same_bits

# Those names are transformers' own, the same for all its models that see.
_ENCODES = "get_image_features"
_PREPROCESSES = "preprocess"
_PLAIN = (str, bytes, int, float, bool, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)


@contextlib.contextmanager
def pictures_seen_once(components: Iterable[Any]) -> Iterator[None]:
    """Within it, the vision encoders and image processors of `components` remember what they were asked.

    Not with gradients enabled, in training mode, or for arguments that are not plain data."""
    with contextlib.ExitStack() as stack:
        for component in components:
            if isinstance(component, torch.nn.Module):
                for module in (component, *component.children()):  # with a language model's head, and without
                    if hasattr(type(module), _ENCODES):
                        stack.enter_context(_remembering(module, _ENCODES))
            elif hasattr(component, "tokenizer"):
                processor = getattr(component, "image_processor", None)
                if callable(getattr(processor, _PREPROCESSES, None)):  # a configuration has a name in its place
                    stack.enter_context(_remembering(processor, _PREPROCESSES))
        yield


@contextlib.contextmanager
def _remembering(owner: Any, name: str) -> Iterator[None]:
    function: Callable[..., Any] = getattr(owner, name)
    answers: list[tuple[Any, Any]] = []

    def answer(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or getattr(owner, "training", False):
            return function(*args, **kwargs)
        for known, given in answers:
            if _same(known, (args, kwargs)):
                return _copy(given)
        try:
            asked = _copy((args, kwargs))
        except _NotPlainError:
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        with contextlib.suppress(_NotPlainError):  # then it is asked again
            answers.append((asked, _copy(result)))
        return result

    had = owner.__dict__.get(name)
    owner.__dict__[name] = answer
    try:
        yield
    finally:
        if had is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = had


class _NotPlainError(Exception):
    pass


def _copy(value: Any) -> Any:
    """A copy that nobody else can change. Raises `_NotPlainError` for what is not plain data."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (Image.Image, np.ndarray)):
        return value.copy()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, OrderedDict):  # such as a ModelOutput
        return type(value)(**{key: _copy(item) for key, item in value.items()})
    if isinstance(value, (dict, UserDict)):  # such as a BatchFeature
        return type(value)({key: _copy(item) for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    raise _NotPlainError


def _same(a: Any, b: Any) -> bool:
    """Equal in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.device == b.device and same_bits(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(item, b[key]) for key, item in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
