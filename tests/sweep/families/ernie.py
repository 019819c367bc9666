"""ERNIE-Image."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import Mistral3Config, Mistral3Model

import tiny_models as models
from sweep.build import Case
from sweep.families.language_models import WIDTH, flux2_vae


def text_encoder() -> Any:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    return Mistral3Model(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(models.t5_tokenizer()),
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                **sizes,
            },
            vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 16, "patch_size": 8, **sizes},
        )
    )


PARTS = {
    "transformer": lambda: diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    ),
    "vae": flux2_vae,
    "text_encoder": text_encoder,
    "tokenizer": models.t5_tokenizer(),
}

CASES = [Case("ErnieImagePipeline", PARTS)]
