"""Helios."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import UMT5Config, UMT5EncoderModel

import tiny_models as models
from sweep.build import Case
from sweep.families.video_parts import TEXT_LENGTH, wan_vae


def parts(**scheduler: Any) -> dict[str, Any]:
    return {
        "tokenizer": lambda: models.t5_tokenizer(),
        "text_encoder": lambda: models.t5_text_encoder(UMT5EncoderModel, UMT5Config),
        "transformer": lambda: diffusers.HeliosTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=8,
            ffn_dim=16,
            num_layers=1,
            rope_dim=(4, 4, 4),
        ),
        "vae": wan_vae,
        "scheduler": lambda: diffusers.HeliosScheduler(**scheduler),
    }


CALL = {
    **TEXT_LENGTH,
    "num_frames": 9,
    "num_latent_frames_per_chunk": 2,
    "history_sizes": lambda: [4, 2, 1],
}
CASES = [
    Case("HeliosPipeline", parts(stages=1, stage_range=[0, 1]), CALL),
    Case(
        "HeliosPyramidPipeline",
        parts(gamma=0.3),  # of 1 / 3, the default, the noise has no Cholesky factor in CPU arithmetic
        {**CALL, "height": 64, "width": 64, "pyramid_num_inference_steps_list": [2, 2, 2]},
    ),
]
