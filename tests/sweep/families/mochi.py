"""Mochi 1."""

from __future__ import annotations

import diffusers

from sweep.build import Case
from sweep.families.video_parts import TEXT_LENGTH

PARTS = {
    "transformer": lambda: diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=16,
    ),
    "vae": lambda: diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ),
}

CASES = [Case("MochiPipeline", PARTS, {**TEXT_LENGTH, "num_frames": 7})]
