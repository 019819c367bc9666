"""Krea 2."""

from __future__ import annotations

import diffusers
from transformers import Qwen3VLModel

import tiny_models as models
from sweep.build import Case
from sweep.families.language_models import WIDTH, qwen3_vl, qwen_image_vae

PARTS = {
    "transformer": lambda: diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    ),
    "vae": qwen_image_vae,
    "text_encoder": lambda: qwen3_vl(Qwen3VLModel),
    "tokenizer": models.qwen_tokenizer(),
    "text_encoder_select_layers": (1, 2),
}

CASES = [Case("Krea2Pipeline", PARTS, {"max_sequence_length": 32}, {"guidance_scale": 0.0})]
