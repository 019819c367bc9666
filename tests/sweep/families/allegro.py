"""Allegro."""

from __future__ import annotations

import diffusers

from sweep.build import Case
from sweep.families.video_parts import TEXT_LENGTH

PARTS = {
    "transformer": lambda: diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=1,
        cross_attention_dim=48,
        sample_width=6,
        sample_height=6,
        sample_frames=12,
        caption_channels=32,
    ),
    "vae": lambda: diffusers.AutoencoderKLAllegro(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, sample_size=48
    ),
    "scheduler": lambda: diffusers.EulerAncestralDiscreteScheduler(),
}

CASES = [
    Case("AllegroPipeline", PARTS, {**TEXT_LENGTH, "height": 48, "width": 48, "num_frames": 12, "clean_caption": False})
]
