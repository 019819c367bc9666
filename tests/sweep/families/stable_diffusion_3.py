"""Stable Diffusion 3: text, pictures, masks, control nets, perturbed attention."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import CLIPTextModelWithProjection

import tiny_models as models
from sweep.build import Case, image
from sweep.families.stable_diffusion_xl import control_image, mask

SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 16,  # what the inpainting pipeline asks for
    "out_channels": 16,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,  # both CLIP encoders' side by side
    "pos_embed_max_size": 16,
}


def control_net(**config: Any) -> diffusers.SD3ControlNetModel:
    return diffusers.SD3ControlNetModel(num_layers=1, **SIZES, **config)


def projecting_encoder() -> Any:
    return models.clip_text_encoder(CLIPTextModelWithProjection)


BASE = {
    "transformer": lambda: diffusers.SD3Transformer2DModel(num_layers=2, **SIZES),
    "vae": lambda: models.vae(16, shift_factor=0.0609, scaling_factor=1.5305),
    "text_encoder": projecting_encoder,
    "text_encoder_2": projecting_encoder,
}
LENGTH = {"max_sequence_length": 40}
IMAGE = LENGTH | {"image": image, "strength": 1.0}

CASES = [
    Case("StableDiffusion3Pipeline", BASE, LENGTH),
    Case("StableDiffusion3Img2ImgPipeline", BASE, IMAGE),
    Case("StableDiffusion3InpaintPipeline", BASE, IMAGE | {"mask_image": mask}),
    Case("StableDiffusion3ControlNetPipeline", BASE | {"controlnet": control_net}, LENGTH | {"control_image": image}),
    Case(
        "StableDiffusion3ControlNetInpaintingPipeline",
        BASE | {"controlnet": lambda: control_net(extra_conditioning_channels=1)},
        LENGTH | {"control_image": control_image, "control_mask": mask},
    ),
    Case("StableDiffusion3PAGPipeline", BASE, LENGTH),
    Case("StableDiffusion3PAGImg2ImgPipeline", BASE, IMAGE),
]
