"""Latte."""

from __future__ import annotations

import diffusers

import tiny_models as models
from sweep.build import Case

PARTS = {
    "transformer": lambda: diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=models.t5_text_encoder().config.d_model,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        video_length=2,
    ),
    "scheduler": lambda: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **models.SD_BETAS),
}

CASES = [Case("LattePipeline", PARTS, {"video_length": 2})]
