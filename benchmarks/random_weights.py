"""Random weights for a model in its published geometry, made on the device that will run it.

A 20 B model is 41 GB: drawing it on the host and copying it over takes minutes, drawing it on the GPU a moment. So the
model is built with its parameters on the meta device; each parameter is then allocated on the target device in its
final dtype and drawn there, one by one, so that the peak is the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside land on the meta device; buffers and plain tensor attributes stay real.

    `torch.device("meta")` would also empty the rotary and sincos tables, which are computed in `__init__` and cannot be
    drawn at random. A parameter that is registered a second time (tied weights) stays the same object.
    """
    original = nn.Module.register_parameter

    def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and param.device.type != "meta":
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_random(
    construct: Callable[[], ModuleT], *, device: torch.device | str, dtype: torch.dtype, seed: int
) -> ModuleT:
    """Build a model on meta, then draw it on `device`. The same seed and device give the same weights."""
    with parameters_on_meta():
        model = construct()
    return materialize(model, device=torch.device(device), dtype=dtype, seed=seed)


def materialize(model: ModuleT, *, device: torch.device, dtype: torch.dtype, seed: int) -> ModuleT:
    """Allocate and draw every parameter of `model`, in the dtypes that `from_pretrained(torch_dtype=dtype)` gives.

    That is: what the class lists in `_keep_in_fp32_modules` stays fp32 (Wan's norms and time embedder), buffers of the
    checkpoint are cast, buffers that are not in the checkpoint (rotary tables) keep their dtype.
    """
    generator = torch.Generator(device).manual_seed(seed)
    keep_fp32 = _kept_in_fp32(model, dtype)
    drawn: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in drawn:
                fp32 = not keep_fp32.isdisjoint(f"{prefix}.{name}".split("."))
                value = torch.empty(param.shape, device=device, dtype=torch.float32 if fp32 else dtype)
                _draw(value, module, name, generator)
                drawn[id(param)] = nn.Parameter(value, requires_grad=param.requires_grad)
            module._parameters[name] = drawn[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.device.type == "meta":
                continue  # a meta buffer is reported below, with its full name
            in_checkpoint = name not in module._non_persistent_buffers_set
            cast = dtype if in_checkpoint and buffer.is_floating_point() else buffer.dtype
            module._buffers[name] = buffer.to(device=device, dtype=cast)
    if left := meta_tensors(model):
        raise RuntimeError(
            f"{type(model).__name__} still has tensors without data: {', '.join(left)}. They were created on the meta "
            "device; build the submodule that owns them outside of it."
        )
    return model.eval()


def _kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Diffusers has one list for both half precisions, transformers one for both and one for fp16 (T5's `wo`)."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or not hasattr(model, "_keep_in_fp32_modules_strict"):
        names.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    return names


def _draw(value: torch.Tensor, module: nn.Module, name: str, generator: torch.Generator) -> None:
    """Norms 1, biases 0, the rest N(0, 1 / fan_in): activations stay near unit scale through 60 layers in bf16."""
    if value.ndim < 2 or "norm" in type(module).__name__.lower():
        value.fill_(1.0 if name in ("weight", "gamma") else 0.0)
    else:
        value.normal_(0.0, value[0].numel() ** -0.5, generator=generator)


def meta_tensors(model: nn.Module) -> list[str]:
    """Names of parameters, buffers and tensors in plain attributes (also inside containers) that hold no data."""
    found: list[str] = []

    def visit(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.device.type == "meta":
                found.append(name)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                visit(f"{name}.{index}", item)

    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name != "_modules":
                tail = "" if name in ("_parameters", "_buffers") else f".{name}"
                visit(f"{prefix}{tail}".lstrip("."), value)
    return found
