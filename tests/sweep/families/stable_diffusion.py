"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
)

import tiny_models as models
from sweep.build import Case, image
from tiny import picture

NO_CHECKER = {"requires_safety_checker": False}


def unet(in_channels: int = 4, **config: Any) -> diffusers.UNet2DConditionModel:
    return models.unet(16, in_channels=in_channels, out_channels=4, sample_size=8, **config)


def image_encoder(
    cls: type = CLIPVisionModelWithProjection, image_size: int = 16, patch_size: int = 8
) -> CLIPVisionModelWithProjection | CLIPVisionModel:
    return cls(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch_size,
        )
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def controlnet() -> diffusers.ControlNetModel:
    return diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(8, 16))


def adapter_unet() -> diffusers.UNet2DConditionModel:
    """The adapter adds to what the attention blocks give before they halve it."""
    return diffusers.UNet2DConditionModel.from_config(
        unet().config,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def depth_estimator() -> DPTForDepthEstimation:
    return DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
        )
    )


def upscaler_unet() -> diffusers.UNet2DConditionModel:
    """Conditioned on the pooled prompt beside 128 numbers for the level of noise; its last channel is not used."""
    return models.unet(16, in_channels=8, out_channels=5, sample_size=8, time_cond_proj_dim=128 + 16)


def prior_scheduler() -> diffusers.UnCLIPScheduler:
    return diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)


def prior(**config: Any) -> diffusers.PriorTransformer:
    return diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, **config)


def three_levels() -> diffusers.UNet2DConditionModel:
    """LEDITS++ reads attention maps of a quarter of the latents' size."""
    return diffusers.UNet2DConditionModel.from_config(
        unet().config,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def invert(pipe: Any) -> None:
    pipe.invert(image=picture(0, 32, 32), num_inversion_steps=4, skip=0.1)


MASK = {"image": image, "mask_image": lambda: picture(1, 16, 16).convert("L")}
CONTROL = {"controlnet": controlnet}
CONTROL_IMAGE = {"control_image": lambda: picture(2, 16, 16)}
UNCLIP: Mapping[str, Any] = {
    "image_normalizer": lambda: StableUnCLIPImageNormalizer(embedding_dim=16),
    "image_noising_scheduler": lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "unet": lambda: unet(class_embed_type="projection", projection_class_embeddings_input_dim=32),
}

CASES = [
    Case("StableDiffusionPipeline", NO_CHECKER),
    Case("StableDiffusionImg2ImgPipeline", NO_CHECKER, {"image": image, "strength": 1.0}),
    Case("StableDiffusionInpaintPipeline", NO_CHECKER | {"unet": lambda: unet(9)}, MASK),
    Case("StableDiffusionControlNetPipeline", NO_CHECKER | CONTROL, {"image": image}),
    Case(
        "StableDiffusionControlNetImg2ImgPipeline",
        NO_CHECKER | CONTROL,
        {"image": image, "strength": 1.0} | CONTROL_IMAGE,
    ),
    Case("StableDiffusionControlNetInpaintPipeline", NO_CHECKER | CONTROL, MASK | CONTROL_IMAGE),
    Case("StableDiffusionPAGPipeline", NO_CHECKER),
    Case("StableDiffusionPAGImg2ImgPipeline", NO_CHECKER, {"image": image, "strength": 1.0}),
    Case("StableDiffusionPAGInpaintPipeline", NO_CHECKER | {"unet": lambda: unet(9)}, MASK),
    Case("StableDiffusionControlNetPAGPipeline", NO_CHECKER | CONTROL, {"image": image}),
    Case("StableDiffusionControlNetPAGInpaintPipeline", NO_CHECKER | CONTROL, MASK | CONTROL_IMAGE),
    Case("StableDiffusionInstructPix2PixPipeline", NO_CHECKER | {"unet": lambda: unet(8)}, {"image": image}),
    Case(
        "StableDiffusionAdapterPipeline",
        NO_CHECKER
        | {
            "unet": adapter_unet,
            "adapter": lambda: diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2),
        },
        {"image": image},
    ),
    Case(
        "StableDiffusionDepth2ImgPipeline",
        {
            "unet": lambda: unet(5),
            "depth_estimator": depth_estimator,
            "feature_extractor": lambda: DPTImageProcessorPil(size={"height": 32, "width": 32}),
        },
        {"image": image, "strength": 1.0},
    ),
    Case(
        "StableDiffusionImageVariationPipeline",
        NO_CHECKER | {"image_encoder": image_encoder, "feature_extractor": image_processor},
    ),
    Case(
        "StableDiffusionLatentUpscalePipeline",
        {"unet": upscaler_unet, "scheduler": lambda: diffusers.EulerDiscreteScheduler(**models.SD_BETAS)},
        {"image": image},
        note="adds another tensor to the prediction before it takes the batch apart",
    ),
    Case(
        "StableDiffusionUpscalePipeline",
        {
            "unet": lambda: unet(7, num_class_embeds=1000),
            "low_res_scheduler": lambda: diffusers.DDPMScheduler(),
        },
        {"image": image},
    ),
    Case(
        "StableUnCLIPPipeline",
        {
            **UNCLIP,
            "prior": lambda: prior(embedding_dim=16),
            "prior_scheduler": prior_scheduler,
        },
        {"prior_num_inference_steps": 2},
        {"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
    ),
    Case(
        "StableUnCLIPImg2ImgPipeline",
        {**UNCLIP, "image_encoder": image_encoder, "feature_extractor": image_processor},
        {"image": image},
    ),
    Case(
        "LEditsPPPipelineStableDiffusion",
        NO_CHECKER
        | {
            "unet": three_levels,
            "scheduler": lambda: diffusers.DPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver++", solver_order=2, **models.SD_BETAS
            ),
        },
        {"editing_prompt": models.PROMPTS, "edit_guidance_scale": [5.0, 4.0]},
        {"editing_prompt": None},
        invert,
    ),
]
