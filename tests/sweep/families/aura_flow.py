"""AuraFlow."""

from __future__ import annotations

import diffusers
from transformers import UMT5Config, UMT5EncoderModel

import tiny_models as models
from sweep.build import Case


def transformer() -> diffusers.AuraFlowTransformer2DModel:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )


CASES = [
    Case(
        "AuraFlowPipeline",
        {
            "transformer": transformer,
            "text_encoder": lambda: models.t5_text_encoder(UMT5EncoderModel, UMT5Config),
        },
        {"max_sequence_length": 40},
    ),
]
