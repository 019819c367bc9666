"""Nucleus-Image, a mixture of experts."""

from __future__ import annotations

import diffusers

from sweep.build import Case
from sweep.families.language_models import QWEN3_VL, WIDTH, qwen_image_vae

PARTS = QWEN3_VL | {
    "transformer": lambda: diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="all_moe",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=[2.0, 2.0],
    ),
    "vae": qwen_image_vae,
}

CASES = [Case("NucleusMoEImagePipeline", PARTS, {"return_index": -1})]
