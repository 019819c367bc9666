"""Flux 1 with true guidance, and Chroma."""

from __future__ import annotations

from typing import Any

import diffusers

import tiny_models as models
from sweep.build import Case, image
from sweep.families.from_tiny import LENGTH, parts_of
from tiny import picture


def mask() -> Any:
    return picture(1, 16, 16).convert("L")


def controlnet() -> diffusers.FluxControlNetModel:
    return diffusers.FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 6, 6],
    )


def chroma_inpaint_transformer() -> diffusers.ChromaTransformer2DModel:
    transformer = models.chroma().transformer
    transformer.register_to_config(guidance_embeds=False)  # the pipeline asks for what only a saved configuration has
    return transformer


FLUX = parts_of(models.flux, "transformer", "scheduler", "vae")
CHROMA = parts_of(models.chroma, "transformer", "scheduler", "vae")
IMAGE = {**LENGTH, "image": image, "strength": 1.0}
INPAINT = {**IMAGE, "mask_image": mask}
KONTEXT = {**LENGTH, "image": image, "max_area": 16 * 16, "_auto_resize": False}

CASES = [
    Case("FluxPipeline", FLUX, LENGTH),
    Case("FluxImg2ImgPipeline", FLUX, IMAGE),
    Case("FluxInpaintPipeline", FLUX, INPAINT),
    Case("FluxControlNetPipeline", {**FLUX, "controlnet": controlnet}, {**LENGTH, "control_image": image}),
    Case("FluxKontextPipeline", FLUX, KONTEXT),
    Case("FluxKontextInpaintPipeline", FLUX, {**KONTEXT, "mask_image": mask}),
    Case("ChromaPipeline", CHROMA, LENGTH),
    Case("ChromaImg2ImgPipeline", CHROMA, IMAGE),
    Case(
        "ChromaInpaintPipeline",
        {**CHROMA, "transformer": chroma_inpaint_transformer},
        {**INPAINT, "true_cfg_scale": None, "guidance_scale": 4.0},
        note="`guidance_scale` is the scale; `true_cfg_scale` is not used.",
    ),
]
