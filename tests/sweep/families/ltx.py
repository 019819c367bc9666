"""LTX-Video."""

from __future__ import annotations

import diffusers

from sweep.build import Case
from sweep.families.video_parts import TEXT_LENGTH, frames
from tiny import picture

SIZE = {"height": 32, "width": 32, "num_frames": 9}
PARTS = {
    "transformer": lambda: diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    ),
    "vae": lambda: diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
    ),
}
CALL = {**SIZE, **TEXT_LENGTH}

CASES = [
    Case("LTXPipeline", PARTS, CALL),
    Case("LTXImageToVideoPipeline", PARTS, {**CALL, "image": lambda: picture(0, 32, 32)}),
    Case("LTXConditionPipeline", PARTS, {**CALL, "video": lambda: frames(5, 32)}),
    Case(
        "LTXI2VLongMultiPromptPipeline",
        {**PARTS, "scheduler": lambda: diffusers.LTXEulerAncestralRFScheduler()},
        {
            **CALL,
            "prompt": "a photo of a cat | a red dog",
            "cond_image": lambda: picture(0, 32, 32),
            "temporal_tile_size": 8,
            "temporal_overlap": 4,
        },
    ),
]
