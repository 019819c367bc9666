"""A tiny pipeline, and the arguments of a call with guidance, from what the class says of itself."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

import tiny_models as models
from sweep.parts import PARTS
from tiny import picture, randomize

STEPS = 4


@dataclass(frozen=True)
class Case:
    """A pipeline class, and where it differs from what `build` and `arguments` would do.

    `parts` and `call` map names to values; a function among them is called for a new value each time. None leaves an
    argument of the call out."""

    pipeline: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] = field(default_factory=dict)  # changes of the call that turn guidance off
    prepare: Callable[[Any], None] = lambda pipe: None  # done to the pipeline
    note: str = ""  # a fact about the pipeline, for the table
    # How far two devices may be from one that runs a batch whole, of the largest value, in float32: a batch of two and
    # two of one run other kernels, and a few steps enlarge what their rounding differs by.
    tolerance: float = 2e-3

    @property
    def cls(self) -> Any:
        return getattr(diffusers, self.pipeline)

    def build(self, device: str = "cpu") -> Any:
        """The pipeline in eval mode. Two builds have equal weights. Seeds PyTorch's global generator."""
        torch.manual_seed(0)
        parts = {}
        for name, parameter in inspect.signature(self.cls.__init__).parameters.items():
            if name in self.parts:
                parts[name] = _value(self.parts[name])
            elif name != "self" and parameter.default is parameter.empty:
                parts[name] = part_for(self.cls, name)
        pipe = self.cls(**parts)
        for seed, (_, component) in enumerate(sorted(pipe.components.items())):
            if isinstance(component, torch.nn.Module):
                component.eval()
                randomize(component, seed)
        pipe.to(device)
        self.prepare(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """New arguments of one call with guidance on: it advances the generator."""
        parameters = inspect.signature(self.cls.__call__).parameters
        general = {name: make for name, make in ARGUMENTS.items() if name in parameters}
        if "true_cfg_scale" in general:
            general.pop("guidance_scale", None)
        general |= {
            name: ARGUMENTS_WITHOUT_DEFAULT[name]
            for name, parameter in parameters.items()
            if name in ARGUMENTS_WITHOUT_DEFAULT and parameter.default is parameter.empty
        }
        chosen = general | dict(self.call) | changes
        return {name: _value(value) for name, value in chosen.items() if value is not None}

    def without_guidance(self) -> dict[str, Any]:
        if self.off:
            return self.arguments(**self.off)
        given = self.arguments()
        scale = "true_cfg_scale" if "true_cfg_scale" in given else "guidance_scale"
        return self.arguments(**{scale: 1.0})


def _value(value: Any) -> Any:
    return value() if inspect.isfunction(value) or inspect.isbuiltin(value) else value


def part_for(cls: type, name: str) -> Any:
    """A tiny component of the class that the signature of `cls` names."""
    annotation = typing.get_type_hints(cls.__init__).get(name)
    named = [annotation, *typing.get_args(annotation)]
    for kind in named:
        make = PARTS.get(getattr(kind, "__name__", ""))
        if make is not None:
            return make()
    raise LookupError(f"{cls.__name__}: there is no tiny part for {name}: {annotation}")


# By the names that pipelines share.
ARGUMENTS: dict[str, Any] = {
    "prompt": models.PROMPTS[0],
    "negative_prompt": models.NEGATIVE_PROMPTS[0],
    "guidance_scale": 4.0,
    "true_cfg_scale": 4.0,
    "num_inference_steps": STEPS,
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "generator": lambda: torch.Generator().manual_seed(0),
    "output_type": "latent",
}


def image() -> Any:
    return picture(0, 16, 16)


ARGUMENTS_WITHOUT_DEFAULT: dict[str, Any] = {
    "image": image,
    "mask_image": lambda: picture(1, 16, 16).convert("L"),
    "control_image": lambda: picture(2, 16, 16),
}
