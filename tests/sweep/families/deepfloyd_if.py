"""DeepFloyd IF: pixels without a VAE, in two stages."""

from __future__ import annotations

from typing import Any

import diffusers

import tiny_models as models
from sweep.build import Case, image

BETAS = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}


def scheduler() -> Any:
    return diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True, **BETAS)


def unet(in_channels: int, **config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32,
        cross_attention_norm="group_norm",
        encoder_hid_dim=models.t5_text_encoder().config.d_model,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
        **config,
    )


SHARED = {
    "scheduler": scheduler,
    "safety_checker": None,
    "feature_extractor": None,
    "watermarker": None,
    "requires_safety_checker": False,
}
FIRST = SHARED | {"unet": lambda: unet(3)}
SECOND = SHARED | {
    "unet": lambda: unet(6, class_embed_type="timestep"),
    "image_noising_scheduler": lambda: diffusers.DDPMScheduler(**BETAS),
}
CALL = {"output_type": "pt"}
FROM_IMAGE = CALL | {"image": image, "strength": 1.0}

CASES = [
    Case("IFPipeline", FIRST, CALL),
    Case("IFImg2ImgPipeline", FIRST, FROM_IMAGE),
    Case("IFInpaintingPipeline", FIRST, FROM_IMAGE | {"mask_image": image}),
    Case("IFSuperResolutionPipeline", SECOND, CALL | {"image": image}),
    Case("IFImg2ImgSuperResolutionPipeline", SECOND, FROM_IMAGE | {"original_image": image}),
    Case("IFInpaintingSuperResolutionPipeline", SECOND, FROM_IMAGE | {"original_image": image, "mask_image": image}),
]
