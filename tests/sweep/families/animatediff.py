"""AnimateDiff: Stable Diffusion with layers between the frames."""

from __future__ import annotations

from typing import Any

import diffusers

import tiny_models as models
from sweep.build import Case
from sweep.families.stable_diffusion import controlnet
from tiny import picture


def motion_adapter(**config: Any) -> diffusers.MotionAdapter:
    return diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        **config,
    )


def ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)


def frames() -> list[Any]:
    return [picture(seed, 16, 16) for seed in range(5)]


def sdxl_unet() -> diffusers.UNet2DConditionModel:
    return models.unet(
        32,
        attention_head_dim=(1, 2),
        in_channels=4,
        sample_size=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def sparse_controlnet() -> diffusers.SparseControlNetModel:
    return diffusers.SparseControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        norm_num_groups=4,
        attention_head_dim=2,
        num_attention_heads=2,
        cross_attention_dim=16,
        motion_num_attention_heads=2,
    )


PARTS = {"motion_adapter": motion_adapter, "scheduler": ddim}

CASES = [
    Case("AnimateDiffPipeline", PARTS),
    Case("AnimateDiffPAGPipeline", PARTS),
    Case("AnimateDiffControlNetPipeline", PARTS | {"controlnet": controlnet}, {"conditioning_frames": frames}),
    Case("AnimateDiffVideoToVideoPipeline", PARTS, {"video": frames, "strength": 1.0}),
    Case(
        "AnimateDiffVideoToVideoControlNetPipeline",
        PARTS | {"controlnet": controlnet},
        {"video": frames, "strength": 1.0, "conditioning_frames": frames},
    ),
    Case(
        "AnimateDiffSDXLPipeline",
        PARTS | {"unet": sdxl_unet, "motion_adapter": lambda: motion_adapter(use_motion_mid_block=False)},
    ),
    Case(
        "AnimateDiffSparseControlNetPipeline",
        PARTS | {"controlnet": sparse_controlnet},
        {"conditioning_frames": lambda: frames()[:1]},
    ),
]
