"""Stable Diffusion XL: text, pictures, masks, control nets, adapters, perturbed attention, edits."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

import tiny_models as models
from sweep.build import Case, image
from tiny import picture


def unet(in_channels: int = 4) -> diffusers.UNet2DConditionModel:
    return models.unet(
        32,  # both text encoders' hidden states side by side
        attention_head_dim=(1, 2),
        in_channels=in_channels,
        sample_size=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def scheduler() -> diffusers.EulerDiscreteScheduler:
    return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **models.SD_BETAS)


def control_net() -> diffusers.ControlNetModel:
    return diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(4, 8))


def control_net_union() -> diffusers.ControlNetUnionModel:
    return diffusers.ControlNetUnionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=4,
        attention_head_dim=(1, 2),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        conditioning_embedding_out_channels=(4, 8),
        num_trans_channel=8,
        num_trans_head=2,
        num_trans_layer=1,
        num_proj_channel=8,
    )


def adapter() -> diffusers.T2IAdapter:
    return diffusers.T2IAdapter(
        channels=(8, 16, 16, 16), num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )


def control_image() -> Image.Image:
    return picture(2, 16, 16)


def mask() -> Image.Image:
    """The left half."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :8] = 255
    return Image.fromarray(pixels)


def invert(pipe: Any) -> None:
    pipe.invert(picture(0, 32, 32), num_inversion_steps=4, generator=torch.Generator().manual_seed(0))


BASE = {"unet": unet, "scheduler": scheduler}
CONTROL = BASE | {"controlnet": control_net}
UNION = BASE | {"controlnet": control_net_union}

IMAGE = {"image": image, "strength": 1.0}
INPAINT = IMAGE | {"mask_image": mask}
CONTROL_IMAGE = {"control_image": control_image}
MODE = CONTROL_IMAGE | {"control_mode": 1}

CASES = [
    Case("StableDiffusionXLPipeline", BASE),
    Case("StableDiffusionXLImg2ImgPipeline", BASE, IMAGE),
    Case("StableDiffusionXLInpaintPipeline", BASE, INPAINT),
    Case(
        "StableDiffusionXLInstructPix2PixPipeline",
        BASE | {"unet": lambda: unet(8)},
        {"image": image, "image_guidance_scale": 1.5},
    ),
    Case("StableDiffusionXLControlNetPipeline", CONTROL, {"image": control_image}),
    Case("StableDiffusionXLControlNetImg2ImgPipeline", CONTROL, IMAGE | CONTROL_IMAGE),
    Case("StableDiffusionXLControlNetInpaintPipeline", CONTROL, INPAINT | CONTROL_IMAGE),
    Case("StableDiffusionXLControlNetUnionPipeline", UNION, MODE),
    Case("StableDiffusionXLControlNetUnionImg2ImgPipeline", UNION, IMAGE | MODE),
    Case("StableDiffusionXLControlNetUnionInpaintPipeline", UNION, INPAINT | MODE),
    Case("StableDiffusionXLAdapterPipeline", BASE | {"adapter": adapter}, {"image": control_image}),
    Case("StableDiffusionXLPAGPipeline", BASE),
    Case("StableDiffusionXLPAGImg2ImgPipeline", BASE, IMAGE),
    Case("StableDiffusionXLPAGInpaintPipeline", BASE, INPAINT),
    Case("StableDiffusionXLControlNetPAGPipeline", CONTROL, {"image": control_image}),
    Case("StableDiffusionXLControlNetPAGImg2ImgPipeline", CONTROL, IMAGE | CONTROL_IMAGE),
    Case(
        "LEditsPPPipelineStableDiffusionXL",
        BASE
        | {
            "scheduler": lambda: diffusers.DPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver++", **models.SD_BETAS
            )
        },
        {"editing_prompt": models.PROMPTS, "edit_guidance_scale": 5.0, "edit_threshold": 0.5},
        off={"editing_prompt": None},
        prepare=invert,
    ),
]
