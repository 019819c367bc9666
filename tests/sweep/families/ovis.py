"""Ovis-Image."""

from __future__ import annotations

import diffusers
from transformers import Qwen3Config, Qwen3Model

import tiny_models as models
from sweep.build import Case
from sweep.families.language_models import WIDTH, chat_tokenizer, decoder

PARTS = {
    "transformer": lambda: diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    ),
    "text_encoder": lambda: Qwen3Model(decoder(Qwen3Config, models.qwen_tokenizer())),
    "tokenizer": chat_tokenizer,
}

CASES = [Case("OvisImagePipeline", PARTS, {"max_sequence_length": 128})]
