"""Tiny, real diffusers pipelines for tests on the CPU: real classes, small configurations, seeded random weights.

`TINY[name].build()` makes the pipeline, `TINY[name].inputs()` the keyword arguments of one guided call. A call
advances the `torch.Generator` in its inputs, so make new inputs for every run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

import tiny_models as models

WEIGHTS_SEED = 0
T5_LENGTH = {"max_sequence_length": 40}  # the T5 pipelines pad every prompt, to 256 or 512 tokens unless told


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline and how to call it."""

    name: str
    pattern: str  # A: one batched call per step; B: one call per branch; C: one batched call of three branches
    make: Callable[[], diffusers.DiffusionPipeline]
    scale_kwarg: str = "guidance_scale"  # guidance is off when it is 1.0
    denoiser: str = "transformer"
    size: tuple[int, int] = (16, 16)  # height, width
    other_size: tuple[int, int] = (16, 32)
    takes_size: bool = True  # False: the picture's size is the result's
    takes_image: bool = False
    max_batch: int = 2
    per_prompt_kwarg: str = "num_images_per_prompt"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_branches(self) -> int:
        return 3 if self.pattern == "C" else 2

    def build(self) -> diffusers.DiffusionPipeline:
        """The pipeline, in eval mode. Two builds have equal weights. Seeds PyTorch's global generator."""
        torch.manual_seed(WEIGHTS_SEED)
        pipe = self.make()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        randomize(getattr(pipe, self.denoiser))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def inputs(
        self,
        seed: int = 0,
        *,
        batch: int = 1,
        num_images_per_prompt: int = 1,
        size: tuple[int, int] | None = None,
        **overrides: Any,
    ) -> dict[str, Any]:
        """Arguments of one call: guidance on, three steps, latents as the result. `overrides` replace any of them.

        The positive and the negative prompt differ in length, and so do the prompts of a batch. `num_images_per_prompt`
        goes by the pipeline's own name for it.
        """
        if batch > self.max_batch:
            raise ValueError(f"Expected a batch of at most {self.max_batch} for {self.name}, but got {batch}.")
        height, width = size or self.size
        pictures = [picture(seed + i, height, width) for i in range(batch)]
        inputs: dict[str, Any] = {
            "prompt": models.PROMPTS[:batch],
            "negative_prompt": models.NEGATIVE_PROMPTS[:batch],
            self.scale_kwarg: 4.0,
            self.per_prompt_kwarg: num_images_per_prompt,
            "num_inference_steps": 3,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
        }
        if self.takes_size:
            inputs |= {"height": height, "width": width}
        if self.takes_image:
            inputs["image"] = pictures
        if batch == 1:
            inputs |= {key: value[0] for key, value in inputs.items() if isinstance(value, list)}
        return inputs | self.extra | overrides

    def rows(self, inputs: dict[str, Any]) -> int:
        """The rows of one branch: prompts times images per prompt."""
        prompts = 1 if isinstance(inputs["prompt"], str) else len(inputs["prompt"])
        return prompts * inputs[self.per_prompt_kwarg]


def randomize(module: torch.nn.Module, seed: int = WEIGHTS_SEED) -> None:
    """Gives every matrix and convolution kernel normal values of variance 1 / fan-in, and every other parameter a
    little noise, in place. As constructed, some layers are zero, and the prompt would hardly reach the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(noise * 0.05)


def picture(seed: int, height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def generate(pipe: diffusers.DiffusionPipeline, inputs: dict[str, Any], seed: int = 0) -> Any:
    """The pipeline's images, frames or latents. Seeds PyTorch's global generator, from which flow-matching pipelines
    draw a stochastic scheduler's noise: they use their `generator` for the first latents only."""
    torch.manual_seed(seed)
    return pipe(**inputs, return_dict=False)[0]


# name: scheduler class, configuration, arguments of the call. The first group is for sd15, sdxl and instruct_pix2pix.
SCHEDULERS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, {}),
    "ddim": (diffusers.DDIMScheduler, {}, {}),
    "ddim_eta1": (diffusers.DDIMScheduler, {}, {"eta": 1.0}),
    "ddpm": (diffusers.DDPMScheduler, {}, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, {}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}, {}),
    "dpm++2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "lcm": (diffusers.LCMScheduler, {}, {}),
    "flow_euler_stochastic": (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, {}),
}
STOCHASTIC_SCHEDULERS = {"euler_ancestral", "ddim_eta1", "ddpm", "dpm++2m_sde", "lcm", "flow_euler_stochastic"}


def with_scheduler(pipe: diffusers.DiffusionPipeline, name: str) -> dict[str, Any]:
    """Gives the pipeline the named scheduler, made from its present one's configuration. Returns what a call must be
    given besides: `pipe(**tiny.inputs(**with_scheduler(pipe, "ddim_eta1")))`."""
    cls, config, call_kwargs = SCHEDULERS[name]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **config)
    return dict(call_kwargs)


_QWEN = {"scale_kwarg": "true_cfg_scale", "size": (32, 32), "other_size": (32, 48)}
TINY: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny("qwen_image", "B", models.qwen_image, **_QWEN),
        Tiny(
            "qwen_image_edit",
            "B",
            functools.partial(models.qwen_image_edit, models.QwenImageEditPipeline),
            takes_image=True,
            **_QWEN,
        ),
        Tiny(
            "qwen_image_edit_plus",
            "B",
            functools.partial(models.qwen_image_edit, models.QwenImageEditPlusPipeline),
            takes_image=True,
            max_batch=1,  # the pipeline refuses more
            **_QWEN,
        ),
        Tiny("flux", "B", models.flux, scale_kwarg="true_cfg_scale", extra=T5_LENGTH),
        Tiny("chroma", "B", models.chroma, extra=T5_LENGTH),
        Tiny(
            "wan",
            "B",
            models.wan,
            per_prompt_kwarg="num_videos_per_prompt",
            extra={"num_frames": 5, **T5_LENGTH},
        ),
        Tiny("sd15", "A", models.sd15, denoiser="unet"),
        Tiny("sdxl", "A", models.sdxl, denoiser="unet"),
        Tiny("sd3", "A", models.sd3, extra=T5_LENGTH),
        Tiny(
            "instruct_pix2pix",
            "C",
            models.instruct_pix2pix,
            denoiser="unet",
            takes_size=False,
            takes_image=True,
            extra={"image_guidance_scale": 1.5},
        ),
    )
}
