"""Stable Video Diffusion."""

from __future__ import annotations

import diffusers

import tiny_models as models
from sweep.build import Case, image
from sweep.families.stable_diffusion import image_encoder, image_processor


def vae() -> diffusers.AutoencoderKLTemporalDecoder:
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4
    )


def unet() -> diffusers.UNetSpatioTemporalConditionModel:
    return diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        in_channels=8,
        out_channels=4,
        num_attention_heads=(2, 2),
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )


CASES = [
    Case(
        "StableVideoDiffusionPipeline",
        {
            "vae": vae,
            "unet": unet,
            "image_encoder": lambda: image_encoder(image_size=224, patch_size=56),
            "feature_extractor": image_processor,
            "scheduler": lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", **models.SD_BETAS),
        },
        {"image": image, "num_frames": 2, "max_guidance_scale": 4.0},
        {"max_guidance_scale": 1.0},
    )
]
