"""Ideogram 4: guidance of two transformers."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import Qwen3VLModel

from sweep.build import STEPS, Case
from sweep.families.language_models import WIDTH, chat_tokenizer, flux2_vae, qwen3_vl

TEXT_LAYERS, TAPPED_LAYERS = 36, 13


def transformer() -> Any:
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=TAPPED_LAYERS * WIDTH,
        mrope_section=(4, 2, 2),
    )


PARTS = {
    "transformer": transformer,
    "unconditional_transformer": transformer,
    "vae": flux2_vae,
    "text_encoder": lambda: qwen3_vl(Qwen3VLModel, TEXT_LAYERS),
    "tokenizer": chat_tokenizer,
}

SCHEDULE = {"guidance_scale": None, "guidance_schedule": (4.0,) * STEPS}

CASES = [
    Case(
        "Ideogram4Pipeline",
        PARTS,
        SCHEDULE | {"max_sequence_length": 32},
        {"guidance_schedule": (1.0,) * STEPS},
    )
]
