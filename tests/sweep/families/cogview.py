"""CogView 3 and 4."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import GlmConfig, GlmModel

from sweep.build import Case
from sweep.families.video_parts import byte_tokenizer
from tiny import picture

DENOISER = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "out_channels": 4,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}


def glm() -> GlmModel:
    return GlmModel(
        GlmConfig(
            vocab_size=len(byte_tokenizer()),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def cogview4(in_channels: int) -> dict[str, Any]:
    return {
        "tokenizer": lambda: byte_tokenizer(padding_side="left"),
        "text_encoder": glm,
        "transformer": lambda: diffusers.CogView4Transformer2DModel(
            in_channels=in_channels, text_embed_dim=16, rope_axes_dim=(8, 8), **DENOISER
        ),
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
        ),
    }


CASES = [
    Case(
        "CogView3PlusPipeline",
        {
            "transformer": lambda: diffusers.CogView3PlusTransformer2DModel(
                in_channels=4, text_embed_dim=32, **DENOISER
            ),
            "scheduler": lambda: diffusers.CogVideoXDDIMScheduler(
                rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
            ),
        },
        {"max_sequence_length": 16},
    ),
    Case("CogView4Pipeline", cogview4(4)),
    Case("CogView4ControlPipeline", cogview4(8), {"control_image": lambda: picture(2, 16, 16)}),
]
